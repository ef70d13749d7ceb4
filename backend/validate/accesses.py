"""An emitted kernel, run by all workers of all ranks in step: every access and every signal it makes.

A *stage* is an outermost loop that touches data, a *task* one turn of it (of a flattened loop, whose
variable is `_`, the turns up to one that writes). A loop around flattened loops begins no task: what it does
in front of one of them belongs to the worker's next task. What a worker does between stages belongs to the
next stage's tasks of that worker; a delayed notify to the task whose stores it follows.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.validate import tiles
from tilelink.backend.validate.calls import TileCalls
from tilelink.backend.validate.layout import TL_NAMES, Layout, Misfit
from tilelink.backend.validate.trace import FINISH, PREFIX, Product, Signal, Touch, Trace
from tilelink.backend.validate.values import (
    Data,
    Descriptor,
    Flow,
    Inside,
    Ints,
    Key,
    Mask,
    Num,
    Pointer,
    full,
    options,
)
from tilelink.errors import Source

_TOUCHING = (
    "load store send forward tile_push_data fetch fetch_parts fetch_remote "
    "store_words load_words sum_words"
)
TOUCHING = frozenset(_TOUCHING.split())


def touches(node: ast.AST) -> bool:
    """Whether a statement reads or writes tiles."""
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
    return any(isinstance(c.func, ast.Attribute) and c.func.attr in TOUCHING for c in calls)


def stage_loops(body: list[ast.stmt]) -> list[ast.For | ast.While]:
    """The outermost loops that touch data, in order."""
    found: list[ast.For | ast.While] = []
    for node in body:
        if isinstance(node, ast.For | ast.While):
            if touches(node):
                found.append(node)
        elif isinstance(node, ast.If):
            found += stage_loops(node.body) + stage_loops(node.orelse)
    return found


def is_flat(node: ast.AST) -> bool:
    """Whether a loop is flattened: its turns are steps of tasks, not tasks."""
    return isinstance(node, ast.For) and ast.unparse(node.target) == "_"


class Loose(set[tiles.Site]):
    """Loads whose turns may come in any order, where what flows on does not follow their places.

    Those of a product whose order the program's rows decide, and all of what is moved: each rank begins elsewhere.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.moved = layout.moved

    def __contains__(self, site: object) -> bool:
        return super().__contains__(site) or (isinstance(site, tuple) and site[2] in self.moved)


class AccessMachine(TileCalls):
    """``workers`` lanes a rank, rank-major. ``streamed``: counters that streams wait for."""

    def __init__(
        self,
        source: Source,
        function: ast.FunctionDef,
        layout: Layout,
        workers: int,
        streamed: frozenset[str],
        reverse: bool = False,
    ) -> None:
        super().__init__(source, layout.world * workers)
        self.function, self.layout, self.workers, self.streamed = (
            function,
            layout,
            workers,
            streamed,
        )
        self.loose = Loose(layout)
        self.rank: Ints = np.repeat(np.arange(layout.world, dtype=np.int64), workers)
        self.worker: Ints = np.tile(np.arange(workers, dtype=np.int64), layout.world)
        self.trace = Trace(self.lanes)
        self.trace.passed = np.zeros(self.lanes, dtype=np.int64)
        self.reverse = reverse  # the last worker is the first to draw from a queue
        self.loops = stage_loops(function.body)
        # Stages that are loops around flattened loops, and those loops.
        inner = {
            loop: [n for n in ast.walk(loop) if n is not loop and is_flat(n)] for loop in self.loops
        }
        self.around = {loop: found for loop, found in inner.items() if found}
        self.between: Mask = np.zeros(
            self.lanes, dtype=bool
        )  # in such a loop, before a flattened one
        self.ahead: list[Signal] = []  # waits made there, for all tasks of the flattened loop
        self.stage = -1  # the stage that is open, FINISH, or -1 between stages
        self.segment: Ints = np.full(self.lanes, PREFIX, dtype=np.int64)
        self.dirty: Mask = np.zeros(self.lanes, dtype=bool)
        self.outside: dict[int, tuple[Mask, bool]] = {}  # waits before a stage: lanes, fence
        self.inside: dict[int, tuple[Mask, bool]] = {}  # waits of the running tasks
        self.tma: dict[str, Mask] = {}  # stores that nothing has drained
        self.ticket = np.zeros(self.lanes, dtype=np.int64)
        self.last_wait = np.zeros(self.lanes, dtype=np.int64)
        self.last_write = np.zeros(self.lanes, dtype=np.int64)
        # The task whose stores came last in each lane; -1 where none did.
        self.stored: tuple[Ints, Ints] = (np.array(-1), np.array(-1))
        self.queues: dict[int, Ints] = {}
        self.wait_names: list[int] = []
        self.left = False
        self.begun = False  # the call, by the workers
        # Beside slots: whether it takes an epoch; and of the first launch whether it waits for acknowledgements,
        # and whether it tells streams.
        self.signals: bool | None = None
        self.opened: tuple[bool, bool] | None = None
        # Whether the value of a dynamic extent was told to the peers, and compared with theirs.
        self.told = self.agreed = False
        self.ended = False
        self.spoiled: list[str] = []  # outputs, after an abort

    def start(self, arguments: Mapping[str, Any]) -> Trace:
        """Runs the kernel for arguments by parameter name."""
        self.env.update(arguments)
        self.run(self.function.body)
        self.trace.close()
        return self.trace

    # Stages and tasks -------------------------------------------------------------------------

    def statement(self, node: ast.stmt) -> None:
        """One statement; an outermost loop that touches data is a stage."""
        if node not in self.loops:
            super().statement(node)
            return
        if self.stage != -1 or self.left:
            self.unclear("a stage inside of another, or behind the last", node)
        assert isinstance(node, ast.For | ast.While)
        self.stage = self.stage_of(node)
        self.trace.stage_sites[self.stage] = (node.lineno, node.col_offset)
        self.segment = np.full(self.lanes, PREFIX, dtype=np.int64)
        self.dirty = np.zeros(self.lanes, dtype=bool)
        super().statement(node)
        self.passed_on()
        self.trace.segments[self.stage] = self.segment + 1
        self.stage = -1
        self.segment = np.full(self.lanes, PREFIX, dtype=np.int64)
        self.between = np.zeros(self.lanes, dtype=bool)
        self.outside.clear()
        self.inside.clear()

    def turn(self, node: ast.stmt) -> None:
        """A turn of a stage's loop begins a task; of a loop around flattened loops, theirs do."""
        if node in self.around:
            self.passed_on()
            self.between = self.on.copy()
            return
        if node not in self.loops and not any(node in inner for inner in self.around.values()):
            return
        fresh = self.on & ((self.segment == PREFIX) | self.dirty) if is_flat(node) else self.on
        self.between = self.between & ~self.on
        self.begin(fresh)
        if isinstance(node, ast.While):
            lane = np.flatnonzero(fresh)
            drawn = self.trace.tickets.setdefault(self.stage, [])
            drawn.append((lane, self.segment[lane], self.ticket[lane]))
        for wait, (mask, fence) in list(self.inside.items()):
            rest = mask & ~fresh
            if rest.any():
                self.inside[wait] = (rest, fence)
            else:
                del self.inside[wait]

    def passed_on(self) -> None:
        """The tasks of a flattened loop have ended: the waits in front of it stood before these."""
        for signal in self.ahead:
            assert signal.last is not None
            signal.last[:] = self.segment[signal.lane]
        self.ahead.clear()

    def begin(self, fresh: Mask) -> None:
        """A task begins in the lanes of ``fresh``."""
        self.segment = np.where(fresh, self.segment + 1, self.segment)
        self.dirty = self.dirty & ~fresh

    def next_stage(self) -> int:
        """The stage that is open, or the next one in the text."""
        if self.stage != -1:
            return self.stage
        line = self.site[0]
        found = next((loop for loop in self.loops if loop.lineno > line), None)
        return FINISH if found is None else self.stage_of(found)

    def stage_of(self, loop: ast.For | ast.While) -> int:
        """The number of the stage that an outermost loop is."""
        return self.loops.index(loop)

    # Accesses ---------------------------------------------------------------------------------

    def subset(self, mask: Mask, *arrays: Any) -> list[Ints]:
        """Values in the lanes of ``mask``."""
        return [full(a, self.lanes)[mask] for a in arrays]

    def spread(self, mask: Mask, rows: Ints) -> Ints:
        """Rows of the lanes of ``mask`` as rows of all lanes (0 elsewhere)."""
        wide = np.zeros((self.lanes, *rows.shape[1:]), dtype=np.int64)
        wide[mask] = rows
        return wide

    def read(
        self,
        symbol: str,
        via: str,
        on: Mask,
        home: Ints,
        lo: Ints,
        hi: Ints,
        tokens: Mapping[int, Mask] | None,
        pair: int = -1,
    ) -> None:
        """Records a read. ``tokens`` are those of its address; None where the order is otherwise kept."""
        if self.stage < 0:
            self.unclear("data is touched outside of every stage")
        if self.layout.declared[symbol].name == "buffer":
            for wait, (mask, fence) in {**self.outside, **self.inside}.items():
                after = mask & on
                if not after.any():
                    continue
                if via == "tma" and not fence:
                    self.hazard(f"@{symbol} is read by TMA behind a wait without the proxy fence")
                if tokens is not None and (after & ~tokens.get(wait, np.zeros_like(on))).any():
                    self.hazard(
                        f"the address of this read of @{symbol} does not depend on the wait before it",
                        "the compiler may then move the read above the wait",
                    )
        if pair < 0:
            self.trace.read(self.site, symbol, via, on, self.stage, self.segment, home, lo, hi)
            return
        lane = np.flatnonzero(on & (hi > lo).all(axis=1))
        self.trace.touches.append(
            Touch(
                self.site, symbol, False, via, lane, self.stage, self.segment[lane],
                self.trace.next(), home[lane], lo[lane], hi[lane], {}, pair,
            )
        )  # fmt: skip

    def write(
        self,
        symbol: str,
        via: str,
        on: Mask,
        home: Ints,
        lo: Ints,
        hi: Ints,
        flows: Mapping[Key, Flow],
        axes: tuple[int, ...] = (),
        pair: int = -1,
    ) -> None:
        """Records a write; ``axes`` gives each axis of the tile its axis of the symbol."""
        if self.stage < 0:
            self.unclear("data is touched outside of every stage")
        hi = self.of_rows_there(symbol, lo, hi)
        some = on & (hi > lo).all(axis=1)
        self.dirty = self.dirty | on
        seq = self.trace.next()
        self.last_write = np.where(on, seq, self.last_write)
        stage, segment = self.stored
        self.stored = (np.where(on, self.stage, stage), np.where(on, self.segment, segment))
        if via == "tma":
            self.tma[symbol] = self.tma.get(symbol, np.zeros_like(on)) | on
        if not some.any():
            return
        lane = np.flatnonzero(some)
        limits = [hi[:, a] - lo[:, a] if a >= 0 else np.ones(self.lanes, np.int64) for a in axes]
        cut: dict[Key, Flow] = {}
        for key, flow in tiles.collapsed(flows, self.on, self.loose).items():
            # Of a region only what reaches the elements that are stored.
            f = tiles.limited(flow, limits)
            cut[key] = replace(
                f, have=f.have[lane], home=f.home[lane], lo=f.lo[lane], hi=f.hi[lane]
            )
        self.trace.touches.append(
            Touch(
                self.site, symbol, True, via, lane, self.stage, self.segment[lane], seq,
                home[lane], lo[lane], hi[lane], cut, pair,
            )
        )  # fmt: skip

    def of_rows_there(self, symbol: str, lo: Ints, hi: Ints) -> Ints:
        """Where writes end, without the rows that a dynamic extent leaves out of a buffer with its capacity.

        At the capacity, where the same text is read too, nothing is left out, and a write that reached rows of
        another tile would be seen.
        """
        axis, period, live = self.layout.there.get(symbol, (0, 0, 0))
        if not period:
            return hi
        first = lo[:, axis] - lo[:, axis] % period
        end = np.minimum(hi[:, axis], np.maximum(first + live, lo[:, axis]))
        within = hi[:, axis] <= first + period
        cut = hi.copy()
        cut[:, axis] = np.where(within, end, hi[:, axis])
        return cut

    def block(self, value: Descriptor, at: Any, on: Mask) -> tuple[Ints, Ints]:
        """The box of a TMA access, cut off at the end of the tensor as the hardware does."""
        dims = self.layout.dims[value.symbol]
        if value.slot is not None:
            self.hazard(f"an access to @{value.symbol} in a slot that need not be the call's")
        if value.peer is not None:
            dims = dims[len(dims) - len(value.block) :]
        if not isinstance(at, tuple) or len(at) != len(value.block) or len(at) != len(dims):
            self.unclear("the index of a descriptor")
        starts = [self.number(a) for a in at]
        for start in starts:
            self.fits(start.v, False, None)
        lo = np.stack([full(s.v, self.lanes) for s in starts], axis=1)
        if (lo[on] < 0).any() or (lo[on] >= np.array(dims)).any():
            raise Misfit(f"a block of @{value.symbol} that begins outside of {dims}")
        return lo, np.minimum(lo + np.array(value.block), np.array(dims))

    def number(self, value: Any) -> Num:
        """An integer argument."""
        if isinstance(value, int) and not isinstance(value, bool):
            return Num(value)
        if isinstance(value, Num):
            return value
        self.unclear("this is no integer")

    def fetch(self, value: Any, at: Any) -> Data:
        """``descriptor.load``: what lies past the end reads as zero."""
        flows: dict[Key, Flow] = {}
        shape: tuple[int, ...] | None = None
        for mask, part in options(self.on, value):
            if not isinstance(part, Descriptor) or part.peer is not None:
                self.unclear("a load from something that is no descriptor of this rank's memory")
            on = self.on & mask
            if not on.any():
                continue
            # The index may be a choice too, but of integers, which are values a lane already.
            lo, hi = self.block(part, at, on)
            tokens: dict[int, Mask] = {}
            for start in at:
                for wait, lanes in getattr(start, "tokens", {}).items():
                    tokens[wait] = tokens.get(wait, np.zeros_like(on)) | lanes
            self.read(part.symbol, "tma", on, self.rank, lo, hi, tokens)
            if shape not in (None, part.block):
                self.unclear("a load of blocks of different shapes")
            shape = part.block
            axes = tuple(range(len(part.block)))
            flows[(*self.site, part.symbol, 0)] = Flow(part.symbol, on, self.rank, lo, hi, axes)
        if shape is None:
            self.unclear("a load by no worker")
        return Data(shape, flows, tuple(flows)[:1])

    def put(self, value: Any, at: Any, data: Any) -> None:
        """``descriptor.store``: what lies past the end is not written."""
        tile = self.data(data)
        for mask, part in options(self.on, value):
            if not isinstance(part, Descriptor) or part.roomy:
                self.unclear("a store to something that is no descriptor of a tensor")
            on = self.on & mask
            if not on.any():
                continue
            if tile.form or tile.shape != part.block:
                self.unclear(f"a store of a tile of shape {tile.shape} as a block of {part.block}")
            lo, hi = self.block(part, at, on)
            home, first = self.rank, 0
            if part.peer is not None:
                home = np.full(self.lanes, part.peer, dtype=np.int64)
            if len(part.block) < len(self.layout.dims[part.symbol]):
                first = 1
                lo = np.column_stack((self.rank, lo))
                hi = np.column_stack((self.rank + 1, hi))
            axes = tuple(range(first, first + len(part.block)))
            self.write(part.symbol, "tma", on, home, lo, hi, tile.flows, axes)

    def region(self, pointer: Pointer, mask: Any, on: Mask) -> tuple[Ints, Ints, tuple[int, ...]]:
        """The box that a tile of addresses covers where the mask holds; arrays of all lanes."""
        extents = [np.full(int(on.sum()), extent, dtype=np.int64) for extent in pointer.shape]
        if isinstance(mask, Inside):
            if len(mask.shape) != len(pointer.shape):
                self.unclear("a mask of another shape")
            for axis, limit in enumerate(mask.limits):
                if mask.shape[axis] == 1 and pointer.shape[axis] > 1:
                    (some,) = self.subset(on, limit)
                    extents[axis] = np.where(some > 0, extents[axis], 0)
                else:
                    (some,) = self.subset(on, limit)
                    extents[axis] = np.minimum(extents[axis], some)
        elif mask is not None:
            self.unclear("a mask")
        (base,) = self.subset(on, pointer.base)
        steps = self.subset(on, *pointer.steps)
        lo, hi, axes = self.layout.box(pointer.symbol, base, pointer.unit, extents, steps)
        if pointer.unit != self.layout.item[pointer.symbol]:
            self.unclear("a tile of units that are no elements")
        return self.spread(on, lo), self.spread(on, hi), axes

    def on_tl_load(
        self, pointer: Any, mask: Any = None, other: Any = None, eviction_policy: Any = None
    ) -> Data:
        """``tl.load``."""
        if other not in (None, 0, 0.0) or eviction_policy not in (None, "evict_first"):
            self.unclear("the options of a load")
        flows: dict[Key, Flow] = {}
        shape: tuple[int, ...] | None = None
        for lanes, part in options(self.on, pointer):
            on = self.on & lanes
            if not on.any():
                continue
            if not isinstance(part, Pointer):
                self.unclear("a load from something that is no address")
            lo, hi, axes = self.region(part, mask, on)
            home = full(part.home, self.lanes)
            if (home[on] != self.rank[on]).any() and part.symbol not in self.layout.remote:
                self.unclear("a read from memory of a peer")
            self.read(part.symbol, "generic", on, home, lo, hi, part.tokens)
            if shape not in (None, part.shape):
                self.unclear("a load of tiles of different shapes")
            shape = part.shape
            flows[(*self.site, part.symbol, 0)] = Flow(part.symbol, on, home, lo, hi, axes)
        if shape is None:
            self.unclear("a load by no worker")
        symbol = next(iter(flows))[2]
        kind = TL_NAMES[str(self.layout.declared[symbol]["dtype"])]
        return Data(shape, flows, tuple(flows)[:1], rounded=kind)

    def on_tl_store(self, pointer: Any, data: Any, mask: Any = None) -> None:
        """``tl.store``."""
        if not isinstance(pointer, Pointer):
            self.unclear("a store to something that is no address")
        tile = self.data(data)
        if tile.form or tile.shape not in (pointer.shape, ()):
            self.unclear(f"a store of a tile of shape {tile.shape} to {pointer.shape} addresses")
        lo, hi, axes = self.region(pointer, mask, self.on)
        live = [a for a in axes if a >= 0]
        if live != sorted(live):
            self.unclear("a store of a tile across its axes")
        home = full(pointer.home, self.lanes)
        flows = tiles.lifted(tile, pointer.shape).flows
        self.write(pointer.symbol, "generic", self.on, home, lo, hi, flows, axes)

    def paired(
        self, left: Key, one: Flow, i: int, right: Key, two: Flow, j: int, both: Mask
    ) -> bool:
        """Along an axis that is moved, the program says which place of the whole a place is."""
        if i != self.layout.moved.get(one.symbol) and j != self.layout.moved.get(two.symbol):
            return False
        self.loose |= {left[:3], right[:3]}
        lane = np.flatnonzero(both)
        sides = [
            replace(f, have=f.have[lane], home=f.home[lane], lo=f.lo[lane], hi=f.hi[lane])
            for f in (one, two)
        ]
        self.trace.products.append(
            Product(self.site, lane, self.stage, self.segment[lane], (sides[0], sides[1]), (i, j))
        )
        return True

    def slot(self, tile: Data, key: Key) -> tuple[Ints, Mask] | None:
        """The rank whose part a load of a sum has read in each lane; None if it is of no sum."""
        rank = np.zeros(self.lanes, dtype=np.int64)
        have = np.zeros(self.lanes, dtype=bool)
        for (line, column, symbol, _), flow in tile.flows.items():
            if (line, column) != key[:2] or symbol not in self.layout.parts | self.layout.own:
                continue
            which = flow.lo[:, 0] if symbol in self.layout.parts else self.rank
            if symbol in self.layout.remote:
                which = flow.home
            rank = np.where(flow.have, which, rank)
            have |= flow.have
        return (rank, have) if have.any() else None

    def summing(self, op: type[ast.operator], x: Data, y: Data) -> bool:
        """Parts of a sum over ranks are added from the left, in rank order, in fp32.

        Those of different sums may meet in anything, and no more of either is added to what comes of it.
        """
        sums = self.layout.sum_of
        known = [{sums[k[2]] for k in t.flows if k[2] in sums} for t in (x, y)]
        both = known[0] & known[1]
        if not both:
            return not known[0] or not known[1]
        sites = [{k[:2] for k in t.flows if sums.get(k[2]) in both} for t in (x, y)]
        if sites[0] == sites[1]:
            return True
        known_here = all(t.sums is None or not (self.on & ~t.sums).any() for t in (x, y))
        if op is not ast.Add or not known_here or not x.terms or len(y.terms or ()) != 1:
            raise Misfit(
                "parts of a sum over ranks meet in something else than a sum from the left"
            )
        if not x.single or not y.single:
            raise Misfit("parts of a sum over ranks are not added in fp32, or integers as such")
        before, after = self.slot(x, x.terms[-1]), self.slot(y, (y.terms or x.terms)[0])
        if before is None or after is None or ((before[0] + 1 != after[0]) & self.on).any():
            raise Misfit("parts of a sum over ranks are not added in rank order")
        return True
