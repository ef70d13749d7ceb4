"""What the roles of an emitted kernel share, and the role that loads: which boxes go into which steps."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np

from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.layout import Layout
from tilelink.backend.validate.ring import Loaded, Room, Slot
from tilelink.backend.validate.trace import FINISH
from tilelink.backend.validate.values import Descriptor, Flow, Ints, Mask, Num, full, options
from tilelink.errors import Source


class RoleMachine(KernelMachine):
    """What roles share of a kernel: values of :mod:`tilelink.device.roles`."""

    modules = frozenset({"tl", "device", "roles", "hopper", "gl"})

    def __init__(
        self,
        source: Source,
        function: ast.FunctionDef,
        layout: Layout,
        workers: int,
        streamed: frozenset[str],
        loaded: Loaded | None = None,
    ) -> None:
        super().__init__(source, function, layout, workers, streamed)
        self.loaded = loaded

    def on_device_open_call(self, *_: Any) -> None:
        """``device.open_call``, which is a function of its own."""
        self.hazard("a role calls a function, which is made for other warps than its own")

    def on_device_queue_next(self, ctx: Any, word: Any) -> Num:
        """``device.queue_next``, by a role that hands what it draws to nobody."""
        self.hazard("tasks are drawn by another role than the one that loads operands")

    def whole(self, value: Any, what: str) -> int:
        """A constant from 1."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.unclear(what)
        return value

    def tile_index(self) -> Ints:
        """How many tasks each lane has begun before the one that it is in, over all stages."""
        before = sum((n for s, n in self.trace.segments.items() if s != FINISH), np.int64(0))
        found: Ints = full(before, self.lanes) + np.maximum(self.segment, 0)
        return found

    def task(self) -> None:
        """Refuses what stands outside of every task."""
        if self.stage < 0:
            self.unclear("steps outside of every stage")

    def number_of(self, step: Any) -> Ints:
        """A number a lane."""
        return np.array(full(self.number(step).v, self.lanes), dtype=np.int64)


class LoaderMachine(RoleMachine):
    """The role that loads: which boxes it puts into which steps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.claimed = np.zeros(self.lanes, dtype=np.int64)
        self.due = np.zeros(self.lanes, dtype=np.int64)  # bytes of the open step still to come
        self.open: Ints = np.full(self.lanes, -1, dtype=np.int64)

    def begin(self, fresh: Mask) -> None:
        """A task begins in some lanes."""
        super().begin(fresh)
        if self.loaded is None or not fresh.any():
            return
        for table in (self.loaded.first, self.loaded.count):
            rows = table.setdefault(self.stage, [])
            while len(rows) <= int(self.segment[fresh].max()):
                rows.append(np.zeros(self.lanes, dtype=np.int64))
        for number in np.unique(self.segment[fresh]).tolist():
            some = fresh & (self.segment == number)
            self.loaded.first[self.stage][number][some] = self.claimed[some]

    def on_roles_claim(self, ring: Any, step: Any, size: Any) -> Slot:
        """``roles.claim``: the steps of a worker one after the other, each whole before the next."""
        self.task()
        assert self.loaded is not None
        if ring is not self.loaded.ring:
            self.unclear("something that is no ring")
        at = self.number_of(step)
        if (self.on & (at != self.claimed)).any():
            self.hazard("the steps of the loader do not follow one another")
        if (self.on & (self.due != 0)).any():
            self.hazard("a step begins before the bytes of the one before are all asked for")
        self.due = np.where(self.on, self.whole(size, "a number of bytes"), self.due)
        self.open = np.where(self.on, at, self.open)
        self.claimed = self.claimed + self.on
        for number in np.unique(self.segment[self.on]).tolist():
            self.loaded.count[self.stage][number] += self.on & (self.segment == number)
        return Slot(at)

    def on_roles_fetch(
        self, ring: Any, slot: Any, descriptor: Any, row: Any, column: Any, room: Any
    ) -> None:
        """``roles.fetch``: what lies past the end reads as zero."""
        assert self.loaded is not None
        if ring is not self.loaded.ring or not isinstance(slot, Slot):
            self.unclear("a load into something that is no slot of the ring")
        if (self.on & (slot.step != self.open)).any():
            self.hazard("a load into a slot that is not the one claimed last")
        known = [n for n, r in enumerate(self.loaded.rooms) if r is room]
        if not known or room.count != self.loaded.ring.slots:
            self.unclear("a load into memory that has no tile for each slot")
        self.loaded.used.add(known[0])
        at = (self.number(row), self.number(column))
        for lanes, part in options(self.on, descriptor):
            on = self.on & lanes
            if not on.any():
                continue
            if not isinstance(part, Descriptor) or part.block != room.block:
                self.unclear("a load of blocks of another shape than the tile's")
            if part.peer is not None:
                self.unclear("an operand in memory of a peer")
            if self.layout.declared[part.symbol]["dtype"] != room.dtype:
                self.hazard(f"elements of @{part.symbol} in a tile of {room.dtype}")
            lo, hi = self.block(part, at, on)
            tokens: dict[int, Mask] = {}
            for start in at:
                for wait, mask in start.tokens.items():
                    tokens[wait] = tokens.get(wait, np.zeros_like(on)) | mask
            flow = Flow(part.symbol, on, self.rank, lo, hi, tuple(range(len(part.block))))
            self.lands(slot, known[0], flow, tokens)
        self.asked(room)

    def lands(self, slot: Slot, tile: int, flow: Flow, tokens: dict[int, Mask]) -> None:
        """A region is read into a tile of a slot."""
        assert self.loaded is not None
        on = flow.have
        if on.any():
            self.read(flow.symbol, "tma", on, flow.home, flow.lo, flow.hi, tokens)
            for step in np.unique(slot.step[on]).tolist():
                place = self.loaded.content.setdefault((tile, step), [])
                mine = on & (slot.step == step)
                if any((mask & mine).any() for mask, _ in place):
                    self.hazard("two loads into one tile of a step")
                place.append((mine, flow))

    def asked(self, room: Room) -> None:
        """The bytes of one tile of ``room`` are asked for."""
        size = int(np.prod(room.block)) * room.item
        self.due = self.due - np.where(self.on, size, 0)
        if (self.due < 0).any():
            self.hazard("more bytes are loaded than the step was claimed for")

    def on_roles_fetch_parts(
        self,
        ring: Any,
        step: Any,
        parts: Any,
        rows: Any,
        row: Any,
        column: Any,
        room: Any,
        rank: Any,
        world: Any,
    ) -> None:
        """``roles.fetch_parts``: a step for the part of every other rank, in rank order."""
        assert self.loaded is not None
        self.task()
        self.among(rank, world)
        if not isinstance(parts, Descriptor) or not parts.flat or not isinstance(room, Room):
            self.unclear("parts that are no matrix of all ranks' parts, or that land nowhere")
        known = [n for n, r in enumerate(self.loaded.rooms) if r is room]
        if not known or room.count != self.loaded.ring.slots or parts.block != room.block:
            self.unclear("parts that land in memory of another shape")
        self.loaded.used.add(known[0])
        symbol = parts.symbol
        if self.layout.declared[symbol]["dtype"] != room.dtype:
            self.hazard(f"elements of @{symbol} in a tile of {room.dtype}")
        dims = self.layout.dims[symbol]
        if rows != dims[1] or dims[0] != self.layout.world:
            self.hazard(f"@{symbol} has parts of {dims[1]} rows, not of {rows}")
        first = np.stack([self.number_of(row), self.number_of(column)], axis=1)
        last = first + np.array(room.block)
        if np.any(
            self.on & (np.any(first < 0, axis=1) | np.any(last > np.array(dims[1:]), axis=1))
        ):
            self.hazard(f"a box that does not lie inside of one part of @{symbol}")

        def box(source: Ints) -> Flow:
            lo, hi = np.column_stack((source, first)), np.column_stack((source + 1, last))
            return Flow(symbol, self.on.copy(), self.rank, lo, hi, (1, 2))

        self.others_land(ring, step, (row, column), room, known[0], box)

    def on_roles_fetch_remote(
        self,
        ring: Any,
        step: Any,
        parts: Any,
        row: Any,
        column: Any,
        room: Any,
        rank: Any,
        world: Any,
    ) -> None:
        """``roles.fetch_remote``: a step for the part in the memory of every other rank, in rank order."""
        assert self.loaded is not None
        self.task()
        self.among(rank, world)
        world = self.layout.world
        if not isinstance(parts, tuple) or len(parts) != world or not isinstance(room, Room):
            self.unclear("parts that are not one a rank, or that land nowhere")
        known = [n for n, r in enumerate(self.loaded.rooms) if r is room]
        if not known or room.count != self.loaded.ring.slots:
            self.unclear("parts that land in memory of another shape")
        self.loaded.used.add(known[0])
        for number, part in enumerate(parts):
            if not isinstance(part, Descriptor) or part.flat or part.block != room.block:
                self.unclear("parts that land in memory of another shape")
            if part.peer != number or part.symbol != parts[0].symbol or part.slot is not None:
                self.hazard(f"the part of rank {number} is read where another one's lies")
        symbol = parts[0].symbol
        if symbol not in self.layout.remote:
            self.hazard(f"the program reads no parts of @{symbol} from other ranks")
        if self.layout.declared[symbol]["dtype"] != room.dtype:
            self.hazard(f"elements of @{symbol} in a tile of {room.dtype}")
        dims = np.array(self.layout.dims[symbol])
        first = np.stack([self.number_of(row), self.number_of(column)], axis=1)
        last = first + np.array(room.block)
        outside = (first < 0).any(axis=1) | (last > dims).any(axis=1)
        if (self.on & outside).any():
            self.hazard(f"a box that does not lie inside of @{symbol}")

        def box(source: Ints) -> Flow:
            return Flow(symbol, self.on.copy(), source, first, last, (0, 1))

        self.others_land(ring, step, (row, column), room, known[0], box)

    def others_land(
        self,
        ring: Any,
        step: Any,
        corner: tuple[Any, Any],
        room: Room,
        number: int,
        box: Callable[[Ints], Flow],
    ) -> None:
        """A step for what comes of every other rank, in rank order; ``box``: that of a rank, a lane each.

        ``number``: that of the room. A box begins at a row and a column.
        """
        tokens: dict[int, Mask] = {}
        for start in map(self.number, corner):
            for wait, mask in start.tokens.items():
                tokens[wait] = tokens.get(wait, np.zeros_like(self.on)) | mask
        at, size = self.number_of(step), int(np.prod(room.block)) * room.item
        for other in range(self.layout.world - 1):
            source = np.where(self.rank <= other, other + 1, other)
            slot = self.on_roles_claim(ring, Num(at + other), size)
            self.lands(slot, number, box(source), tokens)
            self.asked(room)

    def finished(self) -> None:
        """Refuses a last step that is not whole."""
        if (self.due != 0).any():
            self.hazard("the last step is claimed for more bytes than are loaded")


class FetcherMachine(LoaderMachine):
    """The role that fetches the parts of sums into a ring of their own, behind its waits.

    ``stages``: which stages of the launch its loops are, those that have such a sum.
    """

    def __init__(self, stages: tuple[int, ...], *args: Any) -> None:
        self.stages = stages
        super().__init__(*args)
        if len(self.loops) != len(stages):
            self.unclear(
                "a fetcher that does not go through the stages that add parts", self.function
            )

    def stage_of(self, loop: ast.For | ast.While) -> int:
        """The number of the stage in the launch."""
        return self.stages[super().stage_of(loop)]

    def signal(self, on: Mask, symbol: str, home: Ints, flat: Ints, **facts: Any) -> int:
        """A wait for the parts of the task; what notifies has stored, and a fetcher stores nothing."""
        self.task()
        if not facts["wait"]:
            self.hazard("a notify of a role that stores nothing")
        return super().signal(on, symbol, home, flat, **facts)

    def on_roles_fetch(self, *_: Any) -> None:
        """``roles.fetch``: of operands, which are the loader's."""
        self.hazard("operands that are fetched as parts of a sum")
