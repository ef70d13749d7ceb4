"""Runs a fused program on the CPU: values, races, deadlocks, and a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilelink.backend.simulate.clock import timeline
from tilelink.backend.simulate.errors import (
    BalanceError,
    BoundsError,
    DeadlockError,
    InputError,
    RaceError,
)
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Inputs, Scheduler
from tilelink.backend.simulate.timeline import Timeline
from tilelink.ir import Op

__all__ = [
    "BalanceError",
    "BoundsError",
    "DeadlockError",
    "InputError",
    "RaceError",
    "Timeline",
    "run",
    "run_calls",
    "timeline",
]


def run(
    program: Op, inputs: Inputs, seed: int = 0, calls: int = 1, workers: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Execute a fused program on all ranks, ``calls`` times on one arena; the last call's outputs.

    ``inputs`` is a list over ranks of name to tensor (shards where a tensor has ``over``) and name to
    number for scalars; the result is a list over ranks of output name to tensor. ``seed`` chooses
    the schedule; ``workers`` overrides the number of workers of every launch. Tensors of the caller
    are not changed.

    Raises RaceError, DeadlockError, BalanceError, BoundsError or InputError.
    """
    return run_calls(program, [inputs] * calls, seed, workers)[-1]


def run_calls(
    program: Op, inputs: Sequence[Inputs], seed: int = 0, workers: int | None = None
) -> list[list[dict[str, torch.Tensor]]]:
    """Like :func:`run`, one entry of ``inputs`` and of the result a call.

    A rank starts its next call when its own agents have completed, so that ranks may be in
    different calls at once.
    """
    geometry = Geometry(program, workers)
    for number, given in enumerate(inputs):
        if len(given) != geometry.world:
            detail = (
                f"{len(given)} ranks of inputs in call {number} for a world of {geometry.world}"
            )
            raise InputError(program.span, rank=0, name=program.symbol, detail=detail)
    # Many small matrix products: more threads than the products need only add their starts.
    return Scheduler(geometry, inputs, seed).run()
