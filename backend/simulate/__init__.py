"""Runs a fused program on the CPU: values, races, deadlocks, and a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tilelink.backend.simulate.clock import predict, timeline
from tilelink.backend.simulate.command import reproduce
from tilelink.backend.simulate.errors import (
    BalanceError,
    BoundsError,
    DeadlockError,
    InputError,
    RaceError,
    RankStopped,
    RunError,
    StepsError,
    VersionError,
    WaitRanOut,
)
from tilelink.backend.simulate.faults import (
    Corrupt,
    Delay,
    Drop,
    Fault,
    Kill,
    Limits,
    Outcome,
    survive,
)
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Inputs, Scheduler
from tilelink.backend.simulate.timeline import Timeline
from tilelink.backend.simulate.trace import Traces
from tilelink.ir import Op

__all__ = [
    "BalanceError",
    "BoundsError",
    "Corrupt",
    "DeadlockError",
    "Delay",
    "Drop",
    "Fault",
    "InputError",
    "Kill",
    "Limits",
    "Outcome",
    "RaceError",
    "RankStopped",
    "RunError",
    "StepsError",
    "Timeline",
    "VersionError",
    "WaitRanOut",
    "predict",
    "run",
    "run_calls",
    "survive",
    "timeline",
]


def run(
    program: Op,
    inputs: Inputs,
    seed: int = 0,
    calls: int = 1,
    workers: int | None = None,
    faults: Sequence[Fault] = (),
    limits: Limits | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Execute a fused program on all ranks, ``calls`` times on one arena; the last call's outputs.

    ``inputs`` is a list over ranks of name to tensor (shards where a tensor has ``over``) and name to
    number for scalars; the result is a list over ranks of output name to tensor. ``seed`` chooses
    the schedule; ``workers`` overrides the number of workers of every launch. Tensors of the caller
    are not changed. With ``faults`` or ``limits`` the run is on a virtual clock and waits have limits.

    Raises RaceError, DeadlockError, BalanceError, VersionError, BoundsError, StepsError or InputError;
    with faults or limits WaitRanOut too.
    """
    return run_calls(program, [inputs] * calls, seed, workers, faults, limits)[-1]


def run_calls(
    program: Op,
    inputs: Sequence[Inputs],
    seed: int = 0,
    workers: int | None = None,
    faults: Sequence[Fault] = (),
    limits: Limits | None = None,
) -> list[list[dict[str, torch.Tensor]]]:
    """Like :func:`run`, one entry of ``inputs`` and of the result a call.

    A rank starts its next call when its own agents have completed, so that ranks may be in
    different calls at once. Outputs of a rank that a fault has killed are missing.
    """
    geometry = Geometry(program, workers)
    check_ranks(geometry, inputs)
    try:
        if not faults and limits is None:
            return Scheduler(Traces(geometry), inputs, seed).run()
        outcome = survive(Traces(geometry), inputs, faults, seed, limits)
    except RunError as error:
        error.command = reproduce(program, seed, len(inputs), workers)
        raise
    for failure in outcome.errors.values():
        raise failure
    return outcome.outputs


def check_ranks(geometry: Geometry, inputs: Sequence[Inputs]) -> None:
    """InputError where a call does not have inputs for every rank."""
    for number, given in enumerate(inputs):
        if not isinstance(given, Sequence) or not all(isinstance(g, Mapping) for g in given):
            program = geometry.program
            detail = f"call {number} is no list over ranks of name to tensor"
            raise InputError(program.span, rank=0, name=program.symbol, detail=detail)
        if len(given) != geometry.world:
            detail = (
                f"{len(given)} ranks of inputs in call {number} for a world of {geometry.world}"
            )
            program = geometry.program
            raise InputError(program.span, rank=0, name=program.symbol, detail=detail)
