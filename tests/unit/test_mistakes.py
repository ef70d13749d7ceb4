"""docs/mistakes.md: each command there prints the text below it.

``python -m tests.unit.test_mistakes`` writes the texts anew.
"""

import contextlib
import io
import re
import shlex
import subprocess
import unittest.mock
from pathlib import Path

import pytest

from tests.pages import COMMAND, shown
from tilelink.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mistakes.md"


def execute(command: str) -> tuple[int, str]:
    """The exit code of ``[sed … |] tilelink …``, run in the root of the tree, and what it says."""
    first, pipe, last = command.rpartition(" | ")
    words = shlex.split(last)
    assert words[0] == "tilelink"
    given = subprocess.check_output(shlex.split(first), cwd=ROOT, text=True) if pipe else ""
    output, errors = io.StringIO(), io.StringIO()
    # In this process, since importing torch takes longer than all the commands together.
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        unittest.mock.patch("sys.stdin", io.StringIO(given)),
    ):
        code = main(words[1:])
    assert output.getvalue() == ""
    return code, errors.getvalue().rstrip()


def written_anew(text: str) -> str:
    """The page with what each command says now."""
    kept = [
        line
        for line in text.splitlines()
        if line.startswith(COMMAND) or not line.startswith("    ")
    ]
    out = []
    for line in kept:
        out.append(line)
        if line.startswith(COMMAND):
            _, said = execute(line.removeprefix(COMMAND))
            out += [f"    {part}".rstrip() for part in said.splitlines()]
    return "\n".join(out) + "\n"


SAID = shown(PAGE.read_text())


def test_page_holds_the_mistakes_that_everyone_makes() -> None:
    codes = [re.match(r"error\[([\w-]+)\]", said) for said in SAID.values()]
    assert [code and code[1] for code in codes][:5] == [
        "unknown-name",
        "wrong-rank",
        "unmapped-read",
        "missing-over",
        "shape-mismatch",
    ]


@pytest.mark.parametrize("command", SAID)
def test_message_is_the_one_on_the_page(command: str) -> None:
    pytest.importorskip("torch")
    code, said = execute(command)
    assert said == SAID[command], "run: python -m tests.unit.test_mistakes"
    assert code in (1, 2)
    assert said.splitlines()[-1].lstrip().startswith("= help: ")
    assert "Traceback" not in said and "site-packages" not in said


if __name__ == "__main__":
    PAGE.write_text(written_anew(PAGE.read_text()))
