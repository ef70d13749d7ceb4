"""Judges mutants: what the proof says, what the simulator finds, and who is right.

The proof and the simulator are asked apart. What either of them misses is explored in full, with its
numbers: only a mutant whose every interleaving ends with the right numbers is *equivalent*. What cannot be
explored is *undecided*: nobody knows whether it was missed, and it survives like one that was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tilelink.backend.mutate.sites import Mutant
from tilelink.backend.simulate.attack import Outputs, attack
from tilelink.backend.simulate.explore import explorations
from tilelink.backend.simulate.shared import Shared
from tilelink.backend.verify import verify
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.ir.instance import at_extents

EQUIVALENT, DIFFERENT, UNDECIDED = "equivalent", "different", "undecided"
# What one run decides on, whatever the schedule: wrong numbers, indices and shapes.
_PLAIN = ("numbers", "bounds", "execution")
SCHEDULES = 20  # hostile schedules a mutant, at most
LIMIT = 20_000  # states of an exploration, at most


@dataclass(frozen=True, slots=True)
class Trial:
    """What a program is run on: inputs of the calls, over ranks, and the outputs that are right.

    ``kernel`` is what the program was made from, where that is known: the proof holds the one against
    the other. ``smaller`` are values of a dynamic extent below its capacity, with trials of their own. ``shared``:
    what mutants of one program have in common.
    """

    inputs: Sequence[Sequence[Mapping[str, Any]]]
    expected: Outputs
    kernel: Op | None = None
    smaller: Sequence[tuple[Mapping[str, int], Trial]] = ()
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Truth:
    """Whether a program means what the intact one does: one of the three words, and why."""

    word: str
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A mutant and what was said of it.

    ``proof`` and ``simulator`` say what they object to, None where they were not asked; "" means that
    they saw nothing. ``truth`` is None where nobody missed the mutant.
    """

    mutant: Mutant
    proof: str | None
    simulator: str | None
    truth: Truth | None

    @property
    def survivors(self) -> tuple[str, ...]:
        """The oracles, of `proof` and `simulator`, that said nothing of a mutant that is not equivalent."""
        if self.truth is None or self.truth.word == EQUIVALENT:
            return ()
        said = (("proof", self.proof), ("simulator", self.simulator))
        return tuple(name for name, word in said if word == "")

    @property
    def missed(self) -> tuple[str, ...]:
        """Those of the survivors' oracles that should have objected: the mutant is known to be wrong."""
        known = self.truth is not None and self.truth.word == DIFFERENT
        return self.survivors if known else ()


def prove(program: Op, kernel: Op | None = None) -> str:
    """The code of the error that the proof refuses ``program`` with, or "" where it accepts."""
    try:
        verify(program, kernel)
    except TilelinkError as error:
        return error.code
    return ""


def simulate(program: Op, trial: Trial, schedules: int = SCHEDULES, seed: int = 0) -> str:
    """The simulator's oracle that objects to ``program``, or "" where none does."""
    failure = attack(
        program, _copied(trial).inputs, trial.expected, schedules, seed, shared=trial.shared
    )
    found = "" if failure is None else failure.oracle
    for values, other in trial.smaller:
        found = found or simulate(at_extents(program, values), other, schedules, seed)
    return found


def decide(
    program: Op, trial: Trial, limit: int = LIMIT, seed: int = 0, *, right: bool = False
) -> Truth:
    """Run ``program`` once for its numbers, and explore every interleaving.

    ``right``: the simulator has run it on this trial and found nothing, so that its numbers are known.

    Agents have hardware queues of their own, then all one, in the order in which the host enqueues them.
    A program without a bad state computes the same numbers in every schedule, so one run shows them. What
    is too large to explore is undecided, whatever some schedules of it have shown.
    """
    failure = None
    if not right:
        inputs = _copied(trial).inputs
        failure = attack(program, inputs, trial.expected, 1, seed, shared=trial.shared)
    if failure is not None and failure.oracle in _PLAIN:
        return Truth(DIFFERENT, str(failure))
    states = 0
    found_in = explorations(program, len(trial.inputs), limit=limit)
    for one_queue, found in zip((False, True), found_in, strict=True):
        states += found.states
        if found.bad is not None:
            queue = ", one hardware queue" if one_queue else ""
            return Truth(DIFFERENT, f"{found.bad}{queue}")
        if not found.complete:
            return Truth(UNDECIDED, found.why)
    if failure is not None:
        # Explored without a bad state, and yet this run had one: the two executors disagree.
        return Truth(UNDECIDED, f"no bad state, but a run: {failure}")
    for values, other in trial.smaller:
        truth = decide(at_extents(program, values), other, limit, seed, right=right)
        if truth.word != EQUIVALENT:
            named = ", ".join(f"{name} = {value}" for name, value in values.items())
            return Truth(truth.word, f"with {named}: {truth.why}")
    return Truth(EQUIVALENT, f"{states} states, the same numbers")


def _copied(trial: Trial) -> Trial:
    """The trial with inputs of its own: a mutant may write what no program should."""
    copied = [
        [{n: v.clone() if hasattr(v, "clone") else v for n, v in rank.items()} for rank in call]
        for call in trial.inputs
    ]
    return replace(trial, inputs=copied)


def judge(
    mutant: Mutant,
    trial: Trial,
    *,
    proof: bool = True,
    simulator: bool = True,
    schedules: int = SCHEDULES,
    seed: int = 0,
) -> Verdict:
    """Ask the proof and the simulator about ``mutant``; explore it where one of them missed it."""
    proven = prove(mutant.program, trial.kernel) if proof else None
    found = simulate(mutant.program, trial, schedules, seed) if simulator else None
    if "" not in (proven, found):
        return Verdict(mutant, proven, found, None)
    return Verdict(mutant, proven, found, decide(mutant.program, trial, right=found == ""))
