"""Predicted times of schedules: the virtual clock of the simulator on a machine model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import predict
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import Predict


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
