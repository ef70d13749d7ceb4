"""All interleavings of a fused program on a small instance, and what a changed program still does.

A state is where every process stands, what it has seen, and the words of all flags and counters with
what their releases carry. What a process has seen is a *clock*: the set of segments (see
:mod:`explore_nodes`) that happen before what it does next, one bit each. Two conflicting segments race
if, when the later one runs, the bit of the earlier is not in its clock. Weak orders need nothing
further: a relaxed notify or wait hands no bits on, so the order in which it makes things run is not
taken for an order of memory. (Intervals, a write open until its release, a read open since its acquire,
would not do: a release by somebody who has not acquired closes them too early.) This is complete for the
instance: clocks are part of the state, every enabled step of every state is taken, and happens-before of
two segments of one execution is decided by the steps of that execution alone.

Values: each segment must find the same conflicting segments done in every state (the *version* rule).
A program without bad states then computes the same numbers in all schedules, and one run decides on
them: :func:`equivalent`.

Steps that touch no word of a flag, a counter or a queue commute with all others; they are made with the
step before them, and count neither as states nor as transitions. With ``reduce`` the search takes from
each state a persistent set only (:mod:`explore_reduce`): it visits fewer states, and finds a bad one if
and only if there is one. Workers of a launch with the same future are alike: states that differ in which
of them did what are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.simulate.errors import BoundsError
from tilelink.backend.simulate.explore_build import build
from tilelink.backend.simulate.explore_nodes import Unsupported
from tilelink.backend.simulate.explore_search import Explored, Problem, Search
from tilelink.backend.simulate.geometry import Geometry
from tilelink.errors import TilelinkError
from tilelink.ir import Op

Inputs: TypeAlias = "Sequence[Mapping[str, Any]]"
LIMIT = 200_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a changed program behaves as the intact one in all schedules.

    ``equivalent`` is None where that could not be decided: the program is too large, or its indices are
    known at run time only. ``kind`` is ``equivalent``, ``too large``, ``values``, a :class:`Problem`'s or the
    code of the error that a run raised.
    """

    equivalent: bool | None
    kind: str
    reason: str
    states: int = 0


def explore(
    program: Op,
    calls: int = 2,
    workers: int | None = None,
    resident: int | None = None,
    limit: int = LIMIT,
    *,
    reduce: bool = True,
    one_queue: bool = False,
) -> Explored:
    """Explore all interleavings of ``calls`` calls of a fused program up to the first bad state.

    ``workers`` overrides the workers of every launch, ``resident`` how many of them can be on the device
    at once (default: the launch's own, else all); ``limit`` bounds the states. ``reduce=False`` visits
    every state. ``one_queue``: all agents of a rank go through one hardware queue in the order in which
    the host enqueues them. Result and limits: see :class:`Explored`.
    """
    queues = (one_queue,)
    return next(explorations(program, calls, workers, resident, limit, queues, reduce=reduce))


def explorations(
    program: Op,
    calls: int = 2,
    workers: int | None = None,
    resident: int | None = None,
    limit: int = LIMIT,
    queues: Sequence[bool] = (False, True),
    *,
    reduce: bool = True,
) -> Iterator[Explored]:
    """:func:`explore`, once for each entry of ``queues``: whether all agents of a rank have one hardware queue."""
    why, bad, built = "", None, None
    try:
        built = build(Geometry(program, workers), calls, resident)
    except (BoundsError, IndexError, ZeroDivisionError) as error:
        bad = Problem("bounds", str(error))
    except Unsupported as error:
        why = str(error)
    for one in queues:
        if built is None:
            yield Explored(0, 0, bad, (), bad is not None, why, reduced=reduce)
        else:
            yield Search(built.in_queues(one), reduce, limit).run()


def equivalent(
    mutant: Op,
    intact: Op,
    kernel: Op | None = None,
    inputs: Sequence[Inputs] | None = None,
    *,
    calls: int = 2,
    workers: int | None = None,
    resident: int | None = None,
    limit: int = LIMIT,
    one_queue: bool = True,
) -> Verdict:
    """Whether ``mutant`` behaves as ``intact`` in all schedules of ``calls`` calls.

    No bad state is reachable, with hardware queues of their own for all agents and (``one_queue``) with
    one for all; and a run of it gives, in every call, the numbers of the reference on ``kernel``, or,
    without a kernel, those of a run of ``intact``. ``inputs``: one entry a call, a list over ranks each
    (default: :func:`whole_numbers`); results must be equal bit for bit, so use integer-valued data.
    """
    from tilelink.backend import reference, simulate

    states, queues = 0, (False, True) if one_queue else (False,)
    for found in explorations(mutant, calls, workers, resident, limit, queues):
        states += found.states
        if found.bad is not None:
            return Verdict(False, found.bad.kind, found.bad.detail, states)
        if not found.complete:
            return Verdict(None, "too large", found.why, states)
    given = inputs if inputs is not None else whole_numbers(intact, calls)
    if kernel is not None:
        wanted = [reference.run(kernel, [dict(r) for r in call]) for call in given]
    else:
        wanted = simulate.run_calls(intact, given, 0, workers)
    try:
        got = simulate.run_calls(mutant, given, 0, workers)
    except TilelinkError as error:
        return Verdict(False, error.code, str(error), states)
    for call, (left, right) in enumerate(zip(got, wanted, strict=True)):
        for rank, (mine, other) in enumerate(zip(left, right, strict=True)):
            reason = _difference(mine, other)
            if reason:
                reason = f"{reason} of rank {rank} in call {call}"
                return Verdict(False, "values", reason, states)
    return Verdict(True, "equivalent", "no bad state, and the same numbers", states)


def _difference(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str:
    """What differs between the outputs of a rank, or ""."""
    if sorted(mine) != sorted(other):
        return f"outputs {sorted(mine)} and {sorted(other)}"
    for name, tensor in mine.items():
        if (tensor.dtype, tensor.shape) != (other[name].dtype, other[name].shape):
            return f"element type or shape of `{name}`"
        if not torch.equal(tensor, other[name]):
            return f"numbers in `{name}`"
    return ""


def whole_numbers(program: Op, calls: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Random inputs for every call and rank whose elements are -2..2: sums of products are exact.

    Scalars are 1. Integer tensors would be indices, and are refused with ValueError.
    """
    geometry = Geometry(program)
    generator = torch.Generator().manual_seed(seed)
    found: list[list[dict[str, Any]]] = []
    for _ in range(calls):
        ranks: list[dict[str, Any]] = []
        for _ in range(geometry.world):
            one: dict[str, Any] = {op.symbol: 1 for op in program.find("scalar")}
            for decl in geometry.decls.values():
                if decl.kind != "tensor" or decl.op["role"] not in ("in", "inout"):
                    continue
                dtype = TORCH_DTYPES[decl.dtype]
                if not dtype.is_floating_point:
                    raise ValueError(f"`{decl.name}` holds integers")
                drawn = torch.randint(-2, 3, decl.shape, generator=generator)
                one[decl.name] = drawn.to(dtype)
            ranks.append(one)
        found.append(ranks)
    return found


__all__ = [
    "Explored",
    "Problem",
    "Verdict",
    "equivalent",
    "explorations",
    "explore",
    "whole_numbers",
]
