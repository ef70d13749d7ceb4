"""The tile dependency graph: which tile needs which, across ranks, before any signal is placed.

Nodes are strings. A compute tile is ``C.gemm[12]@1`` (stage, place in the queue, rank). A communication
tile is ``A[2]:0->1`` (tensor, channel, source rank, destination rank); of a sum in two shots
``C.summed[2]:0->1`` is a part that rank 0 has summed. Node attributes: ``kind``
(``compute`` or ``transfer``), ``rank`` (the destination of a transfer), ``order`` (for sorting), and for
compute tiles ``tile`` (half-open intervals by loop variable). Edge attributes: ``kind``: ``RAW`` (the
reader needs what the writer wrote), or ``WAR`` with ``call = 1`` (the writer of the *next* call must
wait for the reader of this one, since buffers are used again); ``tensor``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeAlias

import networkx as nx
import numpy as np

from tilelink.backend.expand import Ints, Tile, environment, stage_tiles
from tilelink.backend.passes.common import (
    MOVED,
    Moved,
    accesses,
    global_dims,
    moved,
    stages_of,
    tensors_of,
)
from tilelink.backend.pipeline import run_passes
from tilelink.ir import Expr, Op, Value
from tilelink.ir.limits import TooLarge
from tilelink.schedules import Schedule

Interval: TypeAlias = tuple[Ints, Ints]
# Nodes and edges together; each is a Python object.
MAX_ELEMENTS = 2**22


def build_graph(kernel: Op, schedule: Schedule | None = None) -> nx.DiGraph[str]:
    """The tile dependency graph of ``kernel`` (Tile IR) on all ranks under the tiles of ``schedule``.

    Raises what the passes ``order-tiles`` and ``choose-channels`` refuse. Regions are compared as
    intervals of the moved axis, a tile against all channels at once.
    """
    program = run_passes(kernel, schedule, after="choose-channels")
    return _Builder(program).build()


class _Builder:
    def __init__(self, program: Op) -> None:
        self.program = program
        self.env = environment(program)
        self.world = self.env["WORLD"]
        self.graph: nx.DiGraph[str] = nx.DiGraph(kernel=program.symbol, world=self.world)
        self.order = 0
        self.elements = 0

    def build(self) -> nx.DiGraph[str]:
        infos = {
            n: moved(self.program, n)
            for n, t in tensors_of(self.program).items()
            if t["move"] in MOVED
        }
        for info in infos.values():
            self._transfers(info)
        stored: dict[str, list[list[str]]] = {}
        for stage in stages_of(self.program):
            nodes = [self._tasks(stage, rank) for rank in range(self.world)]
            for name, tensor in tensors_of(self.program).items():
                loads = list(accesses(stage, name, "load"))
                stores = [s for s in accesses(stage, name, "store") if not s.get("final")]
                if name in infos:
                    self._moved_edges(infos[name], stage, nodes, loads, stores, stored)
                elif loads and name in stored and tensor["move"] == "local":
                    for rank in range(self.world):
                        self._edges(stored[name][rank], nodes[rank], name)
                if stores:
                    stored[name] = nodes
        return self.graph

    def _add(self, node: str, **attributes: object) -> str:
        self._count(1)
        self.graph.add_node(node, order=self.order, **attributes)
        self.order += 1
        return node

    def _count(self, more: int) -> None:
        self.elements += more
        if self.elements > MAX_ELEMENTS:
            raise TooLarge(
                self.program.span,
                what=f"the graph of `{self.program.symbol}` has at least {self.elements:,} nodes and edges",
                most=MAX_ELEMENTS,
                unit="nodes and edges",
                advice="show it for smaller extents, a smaller world or larger tiles",
            )

    def _transfers(self, info: Moved) -> None:
        labels = (info.name, f"{info.name}.summed") if info.shots == 2 else (info.name,)
        for label, source, target in itertools.product(
            labels, range(self.world), range(self.world)
        ):
            if source != target:
                for channel in range(info.channels):
                    name = transfer_name(label, channel, source, target)
                    self._add(name, kind="transfer", tensor=info.name, rank=target, source=source)

    def _tasks(self, stage: Op, rank: int) -> list[str]:
        tiles = stage_tiles(stage, self.env, rank)
        bounds = {name: (tile.start.tolist(), tile.stop.tolist()) for name, tile in tiles.items()}
        count = len(next(iter(bounds.values()))[0]) if bounds else 0
        return [
            self._add(
                f"{stage.symbol}[{q}]@{rank}",
                kind="compute",
                rank=rank,
                tile={name: (lo[q], hi[q]) for name, (lo, hi) in bounds.items()},
            )
            for q in range(count)
        ]

    def _edges(self, sources: Iterable[str], targets: Iterable[str], tensor: str) -> None:
        sources, targets = list(sources), list(targets)
        self._count(len(sources) * len(targets))
        for source in sources:
            for target in targets:
                self.graph.add_edge(source, target, kind="RAW", tensor=tensor)

    def _moved_edges(
        self,
        info: Moved,
        stage: Op,
        nodes: list[list[str]],
        loads: list[Op],
        stores: list[Op],
        stored: dict[str, list[list[str]]],
    ) -> None:
        for rank in range(self.world):
            tiles = stage_tiles(stage, self.env, rank)
            if info.kind == "gather":
                for load in loads:
                    self._needs(info, nodes[rank], self._channels(info, load, tiles), rank)
                continue
            for store in stores:
                met = self._channels(info, store, tiles)
                self._gives(info, nodes[rank], met, rank, bool(store.get("relay")))
            for added in accesses(stage, info.name, "load_sum"):
                # The own part is in registers.
                self._needs(info, nodes[rank], self._channels(info, added, tiles), rank, False)
            for load in loads:
                total = info.shots == 2 and not load.get("relay")
                self._needs(info, nodes[rank], self._channels(info, load, tiles), rank, total)
                assert load.ref is not None
                boxes = [
                    self._interval(axis, info, load, tiles) for axis in range(len(load.ref.index))
                ]
                variables = self._stored_variables(info, total)
                self._own_part(info, variables, nodes[rank], boxes, stored[info.name][rank])

    def _interval(self, axis: int, info: Moved, access: Op, tiles: dict[str, Tile]) -> Interval:
        """What each task touches of ``axis``, as global element intervals."""
        assert access.ref is not None
        count = len(next(iter(tiles.values())).start)
        element = access.ref.index[axis] if access.ref.index else None
        if isinstance(element, Value) and element.name in tiles:
            tile = tiles[element.name]
            return tile.start, tile.stop
        return np.zeros(count, np.int64), np.full(count, self._extent(info, axis), np.int64)

    def _extent(self, info: Moved, axis: int) -> int:
        return global_dims(self.program.declared(info.name), self.env)[axis]

    def _channels(
        self, info: Moved, access: Op, tiles: dict[str, Tile]
    ) -> list[tuple[int, int, int]]:
        """(task, owner, channel) for every channel that what a task touches meets."""
        found: list[tuple[int, int, int]] = []
        start, stop = self._interval(info.axis, info, access, tiles)
        if info.channel_axis is not None:
            begin, end = self._interval(info.channel_axis, info, access, tiles)
            bounds = (
                start // info.shard,
                (stop - 1) // info.shard,
                begin // info.channel_rows,
                (end - 1) // info.channel_rows,
            )
            for task, (o, p, c, d) in enumerate(zip(*(b.tolist() for b in bounds), strict=True)):
                both = itertools.product(range(o, p + 1), range(c, d + 1))
                found += [(task, owner, channel) for owner, channel in both]
            return found
        one_block = bool(np.all(start // info.block == (stop - 1) // info.block)) and info.spread
        if one_block:
            e = Expr.name("e")
            owner = np.broadcast_to(info.owner_of(e).evaluate({"e": start}), start.shape)
            local = info.local_of(e).evaluate({"e": start})
            first, last = (
                local // info.channel_rows,
                (local + stop - start - 1) // info.channel_rows,
            )
            for task, (o, lo, hi) in enumerate(
                zip(owner.tolist(), first.tolist(), last.tolist(), strict=True)
            ):
                found += [(task, o, c) for c in range(lo, hi + 1)]
        elif not info.spread:
            first, last = start // info.channel_rows, (stop - 1) // info.channel_rows
            for task, (lo, hi) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                found += [(task, -1, c) for c in range(lo, hi + 1)]
        else:
            every = [(o, c) for o in range(self.world) for c in range(info.channels)]
            found = [(task, o, c) for task in range(len(start)) for o, c in every]
        return found

    def _needs(
        self,
        info: Moved,
        nodes: list[str],
        met: list[tuple[int, int, int]],
        rank: int,
        total: bool = False,
    ) -> None:
        """Tasks read what arrives, parts or their ``total``; the next call's transfers wait for them."""
        label = f"{info.name}.summed" if total else info.name
        for task, owner, channel in met:
            sources = [owner] if info.kind == "gather" or total else range(self.world)
            for source in sources:
                if source != rank:
                    transfer = transfer_name(label, channel, source, rank)
                    self._count(2)
                    self.graph.add_edge(transfer, nodes[task], kind="RAW", tensor=info.name)
                    self.graph.add_edge(nodes[task], transfer, kind="WAR", tensor=info.name, call=1)

    def _gives(
        self,
        info: Moved,
        nodes: list[str],
        met: list[tuple[int, int, int]],
        rank: int,
        total: bool,
    ) -> None:
        """Transfers carry what tasks stored, parts or their ``total``."""
        label = f"{info.name}.summed" if total else info.name
        for task, owner, channel in met:
            targets = [owner] if info.spread and not total else range(self.world)
            for target in targets:
                if target != rank:
                    transfer = transfer_name(label, channel, rank, target)
                    self._count(1)
                    self.graph.add_edge(nodes[task], transfer, kind="RAW", tensor=info.name)

    def _own_part(
        self,
        info: Moved,
        variables: list[str | None],
        nodes: list[str],
        reads: list[Interval],
        writers: list[str],
    ) -> None:
        """A sum takes this rank's own contribution where its tasks left it."""
        lows, highs = [], []
        for axis, variable in enumerate(variables):
            whole = (0, int(reads[axis][1].max(initial=0)))
            spans = [self.graph.nodes[w]["tile"][variable] if variable else whole for w in writers]
            lows.append(np.array([lo for lo, _ in spans], np.int64))
            highs.append(np.array([hi for _, hi in spans], np.int64))
        for task, node in enumerate(nodes):
            meets = np.ones(len(writers), bool)
            for axis in range(len(variables)):
                start, stop = reads[axis]
                meets &= (lows[axis] < stop[task]) & (highs[axis] > start[task])
            for index in np.flatnonzero(meets).tolist():
                self.graph.add_edge(writers[index], node, kind="RAW", tensor=info.name)

    def _stored_variables(self, info: Moved, total: bool) -> list[str | None]:
        """For each axis, the loop variable by whose tiles ``info``, or its ``total``, is stored; None: the
        whole axis at once."""
        for stage in stages_of(self.program):
            for store in accesses(stage, info.name, "store"):
                assert store.ref is not None
                if not store.get("final") and bool(store.get("relay")) == total:
                    inside = [i if i in stage.args else None for i in store.ref.index]
                    return [i.name if isinstance(i, Value) else None for i in inside]
        raise KeyError(info.name)


def transfer_name(tensor: str, channel: int, source: int, target: int) -> str:
    """The node of one communication tile."""
    return f"{tensor}[{channel}]:{source}->{target}"
