"""``share-workers``: tiles whose sums go over the link are computed beside those of other ranks' slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import (
    accesses,
    add_declarations,
    drawn,
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
# Elements of the depth that a worker could go through while it reads one part of a tile, or sends its sum to one
# rank: where its loader fetches the part, with products under way, and where it does so itself behind its product.
# And while the link of its GPU takes one tile. All are assumed.
FETCHED, READ, SENT = 256, 700, 12
# An own tile takes as long as so many others at most: of shorter depths, the link is all that counts.
MOST = 2.5
# What the workers of own tiles may be more or less than those that keep pace: one in so many.
NEAR = 4
# Where own tiles stand in the queue of every worker: after so many eighths of the others, in two turns or three.
TURNS = ((4,), (5,), (6,), (7,), (4, 6), (4, 7), (5, 7))
# Names of the parts of a stage, behind its own.
SUFFIXES = ("", ".rest", ".last")


def share_workers(program: Op) -> Op:
    """Let own tiles, of which they are the sum, be computed while there still are tiles of other ranks' slices.

    Before::

        stage @C.gemm {interleave = true, …} do (%m: tile, %n: tile) {…}
        stage @C.own {…} do (%m.own: tile, %n.own: tile) {… %s = load_sum @C[…] (%c.own) …}

    After, of 132 workers of 4 ranks, some of which compute own tiles beside the others::

        stage @C.gemm {…, positions = [0, 450]} do (%m: tile, %n: tile) {…}
        stage @C.gemm.rest {…, positions = [450, 3072], workers = [35, 132]} do (%m.rest: tile, …) {…}
        stage @C.own {…, positions = [0, 779], workers = [0, 35]} do (%m.own: tile, …) {…}
        stage @C.own.rest {…, positions = [779, 1024]} do (%m.own.rest: tile, …) {…}

    or, all of which compute some of them between the others, in turns::

        stage @C.gemm {…, positions = [0, 1536]} do (%m: tile, %n: tile) {…}
        stage @C.own {…, positions = [0, 400]} do (%m.own: tile, …) {…}
        stage @C.gemm.rest {…, positions = [1536, 3072]} do (%m.rest: tile, …) {…}
        stage @C.own.rest {…, positions = [400, 1024]} do (%m.own.rest: tile, …) {…}

    What own tiles read of peers (a sum that is pulled), or send to them (one that is pushed, with ``own`` in the
    schedule), so goes over the link all along. Beside the others about as many workers take them, in the same
    order of places, as keep pace with those that have the tiles of all other ranks. Own tiles begin when the
    others are ahead by a channel and by what notifies take; the last are left to all workers. That is for tiles of
    all ranks that take turns, of a number known before, where at least half of the own ones are computed so. As
    workers are through at different times then, and sums there already, what reads these next is drawn from one
    queue. Invariants: the parts of a queue are the queue; where one worker runs all of them, in the order of the
    text, each own tile comes behind all tiles of its place.
    """
    for name, tensor in tensors_of(program).items():
        own = "beside" if tensor.get("pulled") else schedule_of(program).move(name).own
        if own != "last" and folded(program, name):
            program = _share(program, name, own)
    return program


def _share(program: Op, name: str, how: str) -> Op:
    ops: list[Op] = []
    counters: list[Op] = []
    for op in program.body:
        shared = _shared(program, op, name, how) if op.name == "launch" else op
        if shared is not op and schedule_of(program).emitter != "gluon":
            shared, drawn = _drawn(shared, name)
            counters += drawn
        ops.append(shared)
    return add_declarations(program.with_ops(tuple(ops)), *counters)


def _drawn(launch: Op, name: str) -> tuple[Op, list[Op]]:
    """The launch in which whoever has no tile left takes the next of those that read the sums of all ranks, and
    the counters that these are drawn from."""
    stages: list[Op] = []
    counters: list[Op] = []
    for stage in launch.body:
        if any(accesses(stage, name, "load")):
            stage, counter = drawn(stage)
            counters.append(counter)
        stages.append(stage)
    return launch.with_ops(tuple(stages)), counters


def _shared(program: Op, launch: Op, name: str, how: str) -> Op:
    at = next((n for n, op in enumerate(launch.body) if any(accesses(op, name, "load_sum"))), 0)
    if at == 0:
        return launch
    others, own = launch.body[at - 1], launch.body[at]
    static = all(op.get("queue", "static") == "static" for op in (others, own))
    if not others.get("interleave") or not static or others.get("workers") is not None:
        return launch
    # What else these stages store is counted by stages.
    stored = {op.symbol for s in (others, own) for op in s.walk() if op.name == "store"} - {name}
    # Nor may a tile read what an own one, which now comes before it, stores in its place.
    read = {op.symbol for s in (others, own) for op in s.walk() if op.name == "load"}
    if stored & read or any(handed_on(program, symbol) for symbol in stored):
        return launch
    places, ranks = _count(program, own), int(program["world"])
    if not places or _count(program, others) != (ranks - 1) * places:
        return launch
    if moved(program, name).block != moved(program, name).shard:
        # Tiles that take turns at all blocks come in another order than those of one rank.
        return launch
    parts = _pace(program, launch, own, name).cut(places, how)
    if parts is None:
        return launch
    whole = (0, int(launch["workers"]))
    stages: list[Op] = []
    for number, part in enumerate(parts):
        stage = own if part.own else others
        before = sum(other.own == part.own for other in parts[:number])
        stages.append(
            _renamed(stage, SUFFIXES[before]).with_attrs(
                positions=part.positions,
                workers=None if part.workers == whole else part.workers,
                first=part.first or None,
            )
        )
    return launch.with_ops((*launch.body[: at - 1], *stages, *launch.body[at + 1 :]))


def _count(program: Op, stage: Op) -> int:
    tasks = tasks_of_stage(program, stage)
    return tasks if isinstance(tasks, int) else 0


def _pace(program: Op, launch: Op, own: Op, name: str) -> _Pace:
    names, ranks, info = environment(program), int(program["world"]), moved(program, name)
    loops = (op for op in own.body if op.name == "for_tiles" and op.get("extent") is not None)
    depth = max(1, sum(int(Expr.of(op["extent"][0]).evaluate(names)) for op in loops))
    roles = schedule_of(program).emitter == "gluon"
    part = FETCHED if info.pulled and roles else READ
    channel = int(Expr.of(info.tasks_of(Expr.const(0))).evaluate(names))
    return _Pace(
        ranks=ranks,
        workers=int(launch["workers"]),
        channel=channel,
        cost=min(MOST, 1 + part * (ranks - 1) / depth),
        link=SENT / depth,
        held=2.0 if roles else 1.0,
        pulled=info.pulled,
        unit=1 if info.channel_axis is None else channel,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Positions of the queue of ``own`` tiles or of others, the workers that take them, and which of these has
    the first."""

    own: bool
    positions: tuple[int, int]
    workers: tuple[int, int]
    first: int


@dataclass(frozen=True, slots=True)
class _Pace:
    """What takes how long, by the time of a tile of another rank's slice.

    ``cost``: an own tile; ``link``: the link of a GPU with one tile; ``held``: a notify until it is seen. With
    ``pulled``, own tiles bring what they add over the link, else every tile sends what it stores. ``channel``:
    tiles that are announced together. Parts of own tiles are of whole ``unit``.
    """

    ranks: int
    workers: int
    channel: int
    cost: float
    link: float
    held: float
    pulled: bool
    unit: int

    def cut(self, places: int, how: str) -> tuple[_Part, ...] | None:
        """The parts of both queues that are done first; None where they would be too small."""
        cuts = self._beside(places) if how == "beside" else self._between(places)
        return min(cuts, key=self.took, default=None)

    def _beside(self, places: int) -> Iterator[tuple[_Part, ...]]:
        """Some workers take own tiles, behind the others by a number of their tiles."""
        workers, others = self.workers, self.ranks - 1
        even = int(workers * self.cost / (others + self.cost))
        for few in range(even - even // NEAR, even + even // NEAR + 1):
            for notice in range(1, NOTICE + 1):
                lag = self.channel + int(notice * few / self.cost)
                if not 0 < few < workers or lag >= places:
                    continue
                ahead, total = others * lag, others * places
                beside = self._whole((total - ahead) / (workers - few) * few / self.cost)
                if places <= 2 * beside < 2 * places:
                    yield self._parts(
                        (False, (0, ahead), (0, workers)),
                        (False, (ahead, total), (few, workers)),
                        (True, (0, beside), (0, few)),
                        (True, (beside, places), (0, workers)),
                    )

    def _between(self, places: int) -> Iterator[tuple[_Part, ...]]:
        """All workers take own tiles in turns, of which each has as many as there are places ahead."""
        everyone, others = (0, self.workers), self.ranks - 1
        for turns in TURNS:
            for notice in range(2 * NOTICE + 1):
                lag = self.channel + notice * self.workers // (2 * others)
                ahead = [places * turn // 8 for turn in turns]
                owns = [self._whole(max(0, before - lag)) for before in ahead]
                if 2 * owns[-1] < places or owns[0] == 0:
                    continue
                parts: list[tuple[bool, tuple[int, int], tuple[int, int]]] = []
                cuts = zip((0, *ahead), (*ahead, places), (0, *owns), (*owns, places), strict=True)
                for low, high, first, last in cuts:
                    parts.append((False, (others * low, others * high), everyone))
                    parts.append((True, (first, last), everyone))
                yield self._parts(*parts)

    def _whole(self, tiles: float) -> int:
        return int(tiles / self.unit) * self.unit

    def _parts(self, *parts: tuple[bool, tuple[int, int], tuple[int, int]]) -> tuple[_Part, ...]:
        load = np.zeros(self.workers)
        return tuple(
            _Part(own, positions, few, _first(load, positions, few, self.cost if own else 1.0))
            for own, positions, few in parts
        )

    def took(self, parts: tuple[_Part, ...]) -> float:
        """About when all is done, and the link has taken everything."""
        free = np.zeros(self.workers)
        done, seen, own = [], np.zeros(0), []
        for part in parts:
            (lo, hi), (low, high) = part.positions, part.workers
            many = high - low
            who = low + (part.first + np.arange(hi - lo)) % many
            if not part.own:
                ends = free[who] + np.arange(hi - lo) // many + 1
                np.maximum.at(free, who, ends)
                # What a worker holds back when it comes to the end of a stage it announces then.
                seen = np.concatenate([seen, np.minimum(ends + self.held, free[who])])
                done.append(ends)
                continue
            each = (self.ranks - 1) * self.channel
            ready = np.maximum.reduceat(seen, np.arange(0, len(seen), each))
            for at in range(lo, hi, many):
                places = np.arange(at, min(hi, at + many))
                some = who[places - lo]
                # A tile is multiplied before it is added to what has arrived.
                free[some] = np.maximum(free[some] + 1, ready[places // self.channel])
                free[some] += self.cost - 1
                own.append(free[some])
        ends = np.concatenate(own if self.pulled else [*own, *done])
        size = np.full(len(ends), self.link)
        size[: sum(map(len, own))] *= self.ranks - 1
        order = np.argsort(-ends, kind="stable")
        drained = ends[order] + np.cumsum(size[order])
        return float(max(free.max(), drained.max()))


def _first(
    load: np.ndarray, positions: tuple[int, int], workers: tuple[int, int], cost: float
) -> int:
    """The worker, from the first of ``workers`` on, at which a queue begins, lest one have much more to do than
    another; ``load``, what each has, is added to."""
    low, high = workers
    many = high - low
    each, more = divmod(positions[1] - positions[0], many)
    begins = np.arange(many)[:, None]
    taken = ((np.arange(many) - begins) % many < more) * cost + (load[low:high] + each * cost)
    first = int(np.lexsort([(taken**2).sum(1), taken.max(1)])[0]) if more else 0
    load[low:high] = taken[first]
    return first


def _renamed(stage: Op, suffix: str) -> Op:
    """``stage`` once more, under names of its own."""
    if not suffix:
        return stage
    values = {
        value.name: Value(f"{value.name}{suffix}", value.type)
        for op in stage.walk()
        for value in (*op.results, *op.args)
    }
    return replace(substitute(stage, values), ref=Ref(f"{stage.symbol}{suffix}"))
