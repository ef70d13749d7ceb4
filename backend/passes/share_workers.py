"""``share-workers``: the own tiles of a sum that is pulled are computed beside those of other ranks' slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import (
    accesses,
    folded,
    handed_on,
    moved,
    schedule_of,
    substitute,
    tasks_of_stage,
    tensors_of,
)
from tilelink.ir import Expr, Op, Ref, Value

# Tiles that a worker computes between one that it stores and the latest moment at which its notify is seen: the
# notify is held back until another tile of the same warps, and these may have every other one of their worker's.
NOTICE = 3
# Elements of the depth that a worker could go through while it reads one part of a tile: where its loader fetches
# that, with products under way, and where it reads it itself behind its product. Both are assumed.
FETCHED, READ = 256, 700
# An own tile takes as long as so many others at most: of shorter depths, reads are all that counts.
MOST = 2.0


def share_workers(program: Op) -> Op:
    """Let some workers compute own tiles while the others compute those of which they are the sum.

    Before::

        stage @C.gemm {interleave = true, …} do (%m: tile, %n: tile) {…}
        stage @C.own {…} do (%m.own: tile, %n.own: tile) {… %s = load_sum @C[…] (%c.own) …}

    After, of 132 workers of 4 ranks::

        stage @C.gemm {…, positions = [0, 471]} do (%m: tile, %n: tile) {…}
        stage @C.gemm.rest {…, positions = [471, 3072], workers = [38, 132]} do (%m.rest: tile, …) {…}
        stage @C.own {…, positions = [0, 865], workers = [0, 38]} do (%m.own: tile, …) {…}
        stage @C.own.rest {…, positions = [865, 1024]} do (%m.own.rest: tile, …) {…}

    A sum that is pulled is read over the link while its tile is computed: so these tiles are spread over the
    call. As many workers take them, in the same order of places, as keeps pace with the others, which have the
    tiles of all other ranks. They begin when the others are ahead by a channel and by what notifies take; the last
    are left to all workers. That is for tiles of all ranks that take turns, of a number known before, where at
    least half of the own ones are computed so. Invariants: two parts of a queue are the queue; where one worker
    runs all of them, in the order of the text, each own tile comes behind all tiles of its place.
    """
    for name, tensor in tensors_of(program).items():
        if tensor.get("pulled") and folded(program, name):
            program = program.with_ops(
                tuple(
                    _shared(program, op, name) if op.name == "launch" else op for op in program.body
                )
            )
    return program


def _shared(program: Op, launch: Op, name: str) -> Op:
    at = next((n for n, op in enumerate(launch.body) if any(accesses(op, name, "load_sum"))), 0)
    if at == 0:
        return launch
    others, own = launch.body[at - 1], launch.body[at]
    static = all(op.get("queue", "static") == "static" for op in (others, own))
    if not others.get("interleave") or not static or others.get("workers") is not None:
        return launch
    # What else these stages store is counted by stages.
    stored = {op.symbol for s in (others, own) for op in s.walk() if op.name == "store"} - {name}
    if any(handed_on(program, symbol) for symbol in stored):
        return launch
    found = _cut(program, launch, others, own, name)
    if found is None:
        return launch
    ahead, beside, few = found
    workers, ranks = int(launch["workers"]), int(program["world"])
    total, places = (ranks - 1) * _count(program, own), _count(program, own)
    load = np.zeros(workers, dtype=np.int64)
    parts: list[Op] = []
    for stage, positions, low, high in (
        (others, (0, ahead), 0, workers),
        (_renamed(others), (ahead, total), few, workers),
        (own, (0, beside), 0, few),
        (_renamed(own), (beside, places), 0, workers),
    ):
        first = _first(load, low, high, positions[1] - positions[0])
        whole = (low, high) == (0, workers)
        parts.append(
            stage.with_attrs(
                positions=positions, workers=None if whole else (low, high), first=first or None
            )
        )
    return launch.with_ops((*launch.body[: at - 1], *parts, *launch.body[at + 1 :]))


def _count(program: Op, stage: Op) -> int:
    tasks = tasks_of_stage(program, stage)
    return tasks if isinstance(tasks, int) else 0


def _cut(program: Op, launch: Op, others: Op, own: Op, name: str) -> tuple[int, int, int] | None:
    """Tiles of other ranks' slices that come first, own tiles beside the rest of them, and the workers that
    compute these; None where it is not worth it."""
    workers, ranks = int(launch["workers"]), int(program["world"])
    places = _count(program, own)
    cost = _cost(program, own)
    few = int(workers * cost / (ranks - 1 + cost))
    if not places or not 0 < few < workers or _count(program, others) != (ranks - 1) * places:
        return None
    info = moved(program, name)
    if info.block != info.shard:
        return (
            None  # tiles that take turns at all blocks come in another order than those of one rank
        )
    channel = int(Expr.of(info.tasks_of(Expr.const(0))).evaluate({}))
    lag = channel + int(NOTICE * few / cost)
    rest = (ranks - 1) * (places - lag)
    beside = min(places, int(rest / (workers - few) * few / cost)) if rest > 0 else 0
    if 2 * beside < places or beside == places:
        return None
    return (ranks - 1) * lag, beside, few


def _cost(program: Op, own: Op) -> float:
    """How long an own tile takes, by that of another."""
    names = environment(program)
    loops = (op for op in own.body if op.name == "for_tiles" and op.get("extent") is not None)
    depth = sum(int(Expr.of(op["extent"][0]).evaluate(names)) for op in loops)
    part = FETCHED if schedule_of(program).emitter == "gluon" else READ
    return min(MOST, 1 + part * (int(program["world"]) - 1) / max(1, depth))


def _first(load: np.ndarray, low: int, high: int, count: int) -> int:
    """The worker, from ``low`` on, at which a queue of ``count`` tasks begins, lest one have many more than
    another; ``load``, what each has, is added to."""
    many = high - low
    each, more = divmod(count, many)
    load[low:high] += each
    best, least = 0, None
    for first in range(many if more else 0):
        taken = load[low:high].copy()
        taken[(first + np.arange(more)) % many] += 1
        cost = (int(taken.max()), int((taken**2).sum()))
        if least is None or cost < least:
            best, least = first, cost
    load[low + (best + np.arange(more)) % many] += 1
    return best


def _renamed(stage: Op) -> Op:
    """``stage`` once more, under names of its own."""
    values = {
        value.name: Value(f"{value.name}.rest", value.type)
        for op in stage.walk()
        for value in (*op.results, *op.args)
    }
    return replace(substitute(stage, values), ref=Ref(f"{stage.symbol}.rest"))
