"""Texts of emitted modules with one place changed, which translation validation must refuse."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from tests.assurance.emitted import attempt
from tests.emitted_mutants import Mutant, mutants
from tilelink.backend.validate import read_module, validate
from tilelink.backend.validate.prove import Wanted
from tilelink.errors import Source
from tilelink.ir import Op


def check(program: Op, text: str) -> None:
    """Validates a module against its program, and raises what validation raises."""
    validate(read_module(Source("emitted.py", text)), program)


def changed(text: str, old: str, new: str, flags: int = 0) -> str:
    """A module with the first match of a pattern behind the program that it carries replaced."""
    start = text.index('"""\n', text.index("TEXT = ") + 12)
    body, count = re.subn(old, new, text[start:], count=1, flags=flags)
    assert count and body != text[start:], old
    return text[:start] + body


def refused_of(program: Op, text: str, concerned: Callable[[Mutant], bool], each: int = 6) -> int:
    """How many of a sample of ``concerned`` mutants, up to so many of each kind, are refused.

    The others must change no event of any worker: they are no mutants.
    """
    wanted = Wanted(program)
    original, reason = attempt(text, wanted)
    assert not reason
    kinds: dict[str, list[str]] = {}
    for mutant in mutants(text):
        if concerned(mutant):
            kinds.setdefault(mutant.kind, []).append(mutant.text)
    chance, refused = random.Random(0), 0
    for some in kinds.values():
        for mutated in chance.sample(some, min(each, len(some))):
            events, reason = attempt(mutated, wanted)
            refused += bool(reason)
            assert reason or events == original, mutated
    return refused
