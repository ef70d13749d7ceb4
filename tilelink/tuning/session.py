"""A search from its problem to its result: prune by the model, measure or not, and say what to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.simulate.command import kernel_words
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import NothingRuns, Trial, prune
from tilelink.schedules.space import Space
from tilelink.tuning.predict import predictor

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Simulated:
    """A search without a GPU: trials that the proof accepts, the best first, and what was checked."""

    trials: tuple[Trial, ...]
    refused: int
    checked: str


def paste(file: str, kernel: Op, best: Trial) -> str:
    """A command line and a Python call that use the schedule of ``best`` for ``kernel``, which ``file`` holds."""
    text = json.dumps(best.schedule.to_sparse(), sort_keys=True)
    words = shlex.join([*kernel_words(kernel, file), "--schedule", text])
    return (
        f"  tilelink run {words}\n"
        f"  {kernel.symbol}.on(schedule=tilelink.schedules.Schedule.from_json('{text}'))"
    )


Fits = Callable[[Schedule], bool]


class Part(Space):
    """The schedules of a space that ``fits`` lets through; ``base`` is one, and the only one where no other is."""

    def __init__(self, kernel: Op, machine: Machine, base: Schedule, fits: Fits) -> None:
        super().__init__(kernel, machine)
        self.base, self.fits = base, fits

    def computations(self) -> list[Schedule]:
        """The ways to compute that fit."""
        return [s for s in super().computations() if self.fits(s)] or [self.base]

    def moves(self, schedule: Schedule) -> list[Schedule]:
        """The ways to move that fit."""
        return [s for s in super().moves(schedule) if self.fits(s)]


def anything(_: Schedule) -> bool:
    """What a search is restricted to where nothing is asked for."""
    return True


def tune_simulated(
    kernel: Op,
    machine: Machine,
    keep: int,
    effort: int,
    progress: Progress,
    base: Schedule | None = None,
    fits: Fits = anything,
) -> Simulated:
    """The ``keep`` schedules of ``kernel`` with the shortest predicted times, of those that ``fits`` lets through.

    ``base``, by default the default schedule, is what no part of the search changes; it has to fit.
    The best one is proven at the kernel's shape and timed on the virtual clock of all ranks; one that is
    refused gives way to the next. NothingRuns where all are.
    """
    from tilelink.backend.simulate import timeline

    progress(f"{kernel.symbol}: predicting schedules on {machine.name}")
    space = Part(kernel, machine, base or default_schedule(kernel), fits)
    trials = prune(space, predictor(kernel, machine), keep, effort, usable=fits)
    if not trials:
        compile_kernel(kernel, space.base)  # its error says what is asked for in vain
    refused: list[str] = []
    for number, trial in enumerate(trials):
        try:
            program = compile_kernel(kernel, trial.schedule)
        except TilelinkError as error:
            refused.append(f"{trial.schedule.to_json()}: {str(error).splitlines()[0]}")
            continue
        summary = timeline(program, machine).summary()
        checked = f"the first is proven; simulated: {summary}"
        if refused:
            checked += f"; {len(refused)} refused before it"
        rest = tuple(trials[number:])
        return Simulated(rest, len(refused), checked)
    raise NothingRuns(kernel=kernel.symbol, count=len(trials), notes=tuple(refused[:8]))
