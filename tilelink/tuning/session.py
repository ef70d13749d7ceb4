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


def tune_simulated(
    kernel: Op, machine: Machine, keep: int, effort: int, progress: Progress
) -> Simulated:
    """The ``keep`` schedules of ``kernel`` with the shortest predicted times.

    The best one is proven at the kernel's shape and timed on the virtual clock of all ranks; one that is
    refused gives way to the next. NothingRuns where all are.
    """
    from tilelink.backend.simulate import timeline

    progress(f"{kernel.symbol}: predicting schedules on {machine.name}")
    trials = prune(Space(kernel, machine), predictor(kernel, machine), keep, effort)
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
