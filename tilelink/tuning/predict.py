"""Predicted times of schedules: the virtual clock of the simulator on a machine model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import predict
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import Predict
from tilelink.tuning.problem import Problem

CHUNK = 4  # schedules that a process of a pool predicts at a time


def predicted_us(kernel: Op, schedule: Schedule, machine: Machine) -> float:
    """Microseconds of one call; infinity where the schedule cannot be fused."""
    try:
        return predict(run_passes(kernel, schedule), machine)
    except TilelinkError:
        return math.inf


def predictor(kernel: Op, machine: Machine) -> Predict:
    """Predictions in this process, each schedule once."""
    known: dict[Schedule, float] = {}

    def of(schedules: Sequence[Schedule]) -> list[float]:
        for schedule in schedules:
            if schedule not in known:
                known[schedule] = predicted_us(kernel, schedule, machine)
        return [known[schedule] for schedule in schedules]

    return of


def pooled(problem: Problem, machine: Machine, pool: Executor) -> Predict:
    """Predictions in the processes of a pool."""
    text, given = machine.to_json(), problem.to_json()

    def of(schedules: Sequence[Schedule]) -> list[float]:
        texts = [schedule.to_json() for schedule in schedules]
        chunks = [texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK)]
        parts = pool.map(_chunk, [text] * len(chunks), [given] * len(chunks), chunks)
        return [us for part in parts for us in part]

    return of


def _chunk(machine: str, problem: str, schedules: list[str]) -> list[float]:
    kernel, model = Problem.from_json(problem).build(), Machine.from_json(machine)
    return [predicted_us(kernel, Schedule.from_json(text), model) for text in schedules]


Progress = Callable[[str], None]
