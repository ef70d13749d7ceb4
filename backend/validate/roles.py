"""The groups of warps that multiply, in an emitted kernel whose warps have roles: two lanes a worker in step.

What passes between them and the roles that load is followed step by step: these say what lies in a slot, the
groups what they take, multiply, add and give back. They are held to what :mod:`tilelink.device.roles` asks of its
callers, so that no role waits for ever and no slot is read too late.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.validate import tiles
from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.layout import TL_NAMES, Layout, Misfit
from tilelink.backend.validate.loader import RoleMachine
from tilelink.backend.validate.ring import (
    Cell,
    Corner,
    Flying,
    Loaded,
    Pair,
    Room,
    Slot,
    Taking,
    Turns,
    Zeros,
)
from tilelink.backend.validate.trace import Trace
from tilelink.backend.validate.values import (
    Data,
    Descriptor,
    Flow,
    Ints,
    Key,
    Lattice,
    Mask,
    Name,
    Num,
    full,
    options,
)
from tilelink.errors import Source
from tilelink.schedules.roles import SENT_BYTES, SENT_ROW

GROUPS = 2  # groups of warps that multiply
_CELL_AXES = 2


class GroupMachine(RoleMachine):
    """The groups that multiply: two lanes a worker, first those with ``role`` 0."""

    def __init__(
        self,
        source: Source,
        function: ast.FunctionDef,
        layout: Layout,
        workers: int,
        streamed: frozenset[str],
        loaded: Loaded,
        turns: Turns | None,
        pair: Pair | None,
        landed: Loaded | None,
        sums: Turns | None,
    ) -> None:
        self.single = layout.world * workers
        super().__init__(source, function, layout, workers, streamed, loaded)
        self.turns, self.pair = turns, pair
        self.lanes = self.single * GROUPS
        self.role = np.repeat(np.arange(GROUPS, dtype=np.int64), self.single)
        self.rank = np.tile(self.rank, GROUPS)
        self.worker = np.tile(self.worker, GROUPS)
        self.trace = Trace(self.lanes)
        self.on = np.ones(self.lanes, dtype=bool)
        zeros = np.zeros(self.lanes, dtype=np.int64)
        self.trace.passed = zeros.copy()
        self.segment = zeros - 1
        self.between = self.on & False
        self.dirty = self.on & False
        self.last_wait, self.last_write, self.ticket = zeros.copy(), zeros.copy(), zeros.copy()
        # What is taken of the operands, and of parts that have a ring of their own.
        self.operands = Taking.of(loaded, turns, self.lanes)
        self.parts = None if landed is None else Taking.of(landed, sums, self.lanes)
        self.ahead_of = (
            zeros - 1
        )  # tiles of a worker before the first that takes parts from that ring
        self.flying: list[tuple[Mask, Ints]] = []  # products under way, oldest first
        self.leaving: list[
            tuple[Mask, Ints]
        ] = []  # stores of slots that may not have been read yet
        self.met = zeros.copy()
        self.met_at = zeros.copy()
        self.columns: set[int] = set()  # of tiles that the group has

    def begin(self, fresh: Mask) -> None:
        """A task begins in some lanes: the one before must be over."""
        self.closed(fresh)
        super().begin(fresh)
        for taking in self.takings():
            taking.begin(fresh)

    def takings(self) -> list[Taking]:
        """What is taken from each ring."""
        return [self.operands] if self.parts is None else [self.operands, self.parts]

    def steps(self, taking: Taking) -> tuple[Ints, Ints]:
        """The first step and the number of steps of each lane's task, as the role that loads has them."""
        if taking is self.parts and self.stage not in taking.loaded.first:
            nothing = np.zeros(self.lanes, np.int64)
            return nothing, nothing.copy()
        return self.of_task(taking.loaded.first), self.of_task(taking.loaded.count)

    def of_task(self, table: dict[int, list[Ints]]) -> Ints:
        """What the loader has counted for each lane's task."""
        made = np.zeros(self.lanes, np.int64)
        rows = table.get(self.stage, [])
        for number in set(self.segment[self.on].tolist()):
            if number < 0:
                continue
            if number >= len(rows):
                self.hazard("a task that the loader does not have")
            np.copyto(made, np.concatenate([rows[number]] * GROUPS), where=self.segment == number)
        return made

    def closed(self, lanes: Mask) -> None:
        """Refuses a task that ends with steps that were taken and not given back, or in its turn."""
        lanes = lanes & (self.segment >= 0) & (self.stage >= 0)
        if not lanes.any():
            return
        idle = self.operands.taken == 0
        for taking in self.takings():
            before, self.on = self.on, lanes
            _, count = self.steps(taking)
            self.on = before
            if taking.turns is not None and (lanes & ~idle & (count > 0) & ~taking.over).any():
                self.hazard("a group that never passes its turn on")
            if taking.turns is None and (lanes & idle & (count > 0)).any():
                self.hazard("a group that leaves out a task of which it has half")
            if (lanes & ~idle & ~taking.done(count)).any():
                self.hazard("a task whose steps are not all taken and given back")

    def epilogue(self) -> None:
        """Refuses an access or a signal before the steps of the task are taken, given back, passed on."""
        if self.stage < 0:
            return  # the tasks of a stage are over behind it
        for taking in self.takings():
            _, count = self.steps(taking)
            if (self.on & ~taking.done(count)).any():
                self.hazard("a group touches memory before it has done with its main loop")

    def statement(self, node: ast.stmt) -> None:
        """One statement; at the end of a stage the last tasks are over."""
        was = self.stage
        super().statement(node)
        if was == -1 and node in self.loops:
            counts = self.trace.segments[self.loops.index(node)]
            if (counts[: self.single] != counts[self.single :]).any():
                self.hazard("groups that do not go through the same tasks")

    def loop(self, node: ast.For) -> None:
        """A stage's loop: behind it, its last tasks are over."""
        super().loop(node)
        if node in self.loops:
            self.closed(np.ones(self.lanes, dtype=bool))

    def repeat(self, node: ast.While) -> None:
        """A stage's loop over tasks that are drawn, likewise."""
        super().repeat(node)
        if node in self.loops:
            self.closed(np.ones(self.lanes, dtype=bool))

    # The ring ---------------------------------------------------------------------------------

    def on_roles_turn(self, turns: Any, number: Any) -> None:
        """``roles.turn``."""
        self.task()
        taking = self.turned(turns)
        at = self.number_of(number)
        wrong = (at != self.turn_of(taking)) | taking.mine | taking.over
        if taking is self.operands:
            wrong |= at % GROUPS != self.role
        if (self.on & wrong).any():
            self.hazard("a turn of another tile, or of another group")
        if taking is not self.operands:
            self.turn_of_sums(at)
        taking.mine = taking.mine | self.on

    def turned(self, turns: Any) -> Taking:
        """The ring that ``turns`` are of."""
        for taking in self.takings():
            if turns is not None and turns is taking.turns:
                return taking
        self.unclear("something that is no turns")

    def turn_of(self, taking: Taking) -> Ints:
        """The number of a task among those that take from a ring."""
        if taking is self.operands:
            return self.tile_index()
        parted = taking.loaded.first.keys()
        before = sum((n for s, n in self.trace.segments.items() if s in parted), np.int64(0))
        found: Ints = full(before, self.lanes) + np.maximum(self.segment, 0)
        return found

    def turn_of_sums(self, at: Ints) -> None:
        """Refuses a turn at the parts before that at the operands is over, or in which groups do not alternate.

        A parity tells two laps apart: so each group has to have every other one of these tiles, that is, they
        follow one another among all tiles of the worker.
        """
        _, count = self.steps(self.operands)
        if (self.on & ~self.operands.done(count)).any():
            self.hazard("a turn at the parts of a sum before the product has done with its own")
        ahead = self.tile_index() - at
        worker = self.ahead_of.reshape(GROUPS, -1).max(axis=0)
        known = np.tile(worker, GROUPS)
        if (self.on & (known >= 0) & (known != ahead)).any():
            self.hazard("groups that do not alternate at the tiles which take parts of a sum")
        self.ahead_of = np.where(self.on, ahead, self.ahead_of)

    def on_roles_pass_turn(self, turns: Any, number: Any) -> None:
        """``roles.pass_turn``."""
        taking = self.turned(turns)
        _, count = self.steps(taking)
        wrong = self.number_of(number) != self.turn_of(taking)
        wrong |= ~taking.mine | (taking.taken != count)
        if (self.on & wrong).any():
            self.hazard("a turn is passed on before all steps of the tile are taken")
        taking.mine, taking.over = taking.mine & ~self.on, taking.over | self.on

    def on_roles_take(self, ring: Any, step: Any) -> Slot:
        """``roles.take``: in turn, and one step after the other."""
        self.task()
        taking = self.ring_of(ring)
        at, (first, count) = self.number_of(step), self.steps(taking)
        if taking.turns is not None and (self.on & ~taking.mine).any():
            self.hazard("a step is taken out of turn: the other group's could be meant")
        if (self.on & ((at != first + taking.taken) | (taking.taken >= count))).any():
            self.hazard("steps are taken that are not those of the task, in their order")
        if (self.on & (taking.taken - taking.given >= taking.loaded.ring.slots)).any():
            self.hazard("a step is waited for while this group has all slots of the ring")
        taking.taken = taking.taken + self.on
        return Slot(at)

    def ring_of(self, ring: Any) -> Taking:
        """What is taken from a ring."""
        for taking in self.takings():
            if ring is taking.loaded.ring:
                return taking
        self.unclear("something that is no ring")

    def on_roles_give(self, ring: Any, step: Any, some: Any = True) -> None:
        """``roles.give``: a step that has been read, one after the other."""
        self.task()
        taking = self.ring_of(ring)
        on = self.on
        if isinstance(some, Num):
            on = on & (full(some.v, self.lanes) != 0)
        elif some is not True:
            self.unclear("a condition")
        at, (first, _) = self.number_of(step), self.steps(taking)
        if (on & ((at != first + taking.given) | (taking.given >= taking.taken))).any():
            self.hazard("a step is given back that was not taken, or not in its order")
        if taking is self.operands:
            for what, under_way in (("products", self.flying), ("stores", self.leaving)):
                if any((on & mask & (busy == at)).any() for mask, busy in under_way):
                    self.hazard(f"a step is given back while {what} of it are under way")
        taking.given = taking.given + on
        taking.gifts = taking.gifts + on

    # Products ---------------------------------------------------------------------------------

    def attribute(self, value: Any, node: ast.Attribute) -> Any:
        """Methods of shared memory, or what a kernel has."""
        if isinstance(value, Room | Cell):
            return Name(node.attr, value)
        return super().attribute(value, node)

    def method(
        self, value: Any, name: str, args: list[Any], options_: dict[str, Any], node: ast.Call
    ) -> Any:
        """``index``, ``slice`` and ``permute`` of shared memory."""
        if isinstance(value, Room) and name == "index" and len(args) == 1 and not options_:
            if isinstance(args[0], Slot):
                axes = range(_CELL_AXES)
                step = args[0].step
                return Cell(value, step, (0,) * _CELL_AXES, value.block, tuple(axes))
            if value.count != GROUPS or (self.number_of(args[0]) != self.role).any():
                self.hazard("a tile leaves by way of another group's memory")
            if any(value is t.loaded.rooms[n] for t in self.takings() for n in t.loaded.used):
                self.hazard("a tile leaves by way of memory that a ring has")
            return Corner(value)
        if isinstance(value, Cell) and name == "slice" and len(args) == 2:
            axis = options_.get("dim", 0)
            if set(options_) - {"dim"} or axis not in (0, 1) or value.order != (0, 1):
                self.unclear("a part of a tile", node)
            return self.part_of(value, args[0], args[1], axis)
        if isinstance(value, Cell) and name == "permute" and args == [(1, 0)] and not options_:
            return replace(value, order=value.order[::-1])
        return super().method(value, name, args, options_, node)

    def part_of(self, value: Cell, begin: Any, count: Any, axis: int) -> Cell:
        """``count`` rows or columns of a tile from ``begin`` on."""
        length = self.whole(count, "the length of a part")
        start, whole = self.number_of(begin), value.length[axis]
        if (self.on & ((start < 0) | (start + length > whole) | (start % length != 0))).any():
            self.hazard("a part that is not inside of its tile")
        first, lengths = list(value.first), list(value.length)
        first[axis], lengths[axis] = np.asarray(first[axis]) + start, length
        return replace(value, first=tuple(first), length=tuple(lengths))

    def held(self, cell: Any, operand: int) -> Data:
        """What lies in a tile of a slot that has been taken, as an operand of the current product.

        A tile that several products read flows into each of them.
        """
        if not isinstance(cell, Cell):
            self.unclear("an operand that is no tile of the ring")
        known = [
            (n, taking)
            for taking in self.takings()
            for n in taking.loaded.used
            if taking.loaded.rooms[n] is cell.room
        ]
        if not known:
            self.unclear("a tile that is none of the ring")
        ((tile, taking),) = known
        first, _ = self.steps(taking)
        fresh = (cell.step >= first + taking.given) & (cell.step < first + taking.taken)
        if (self.on & ~fresh).any():
            self.hazard("a tile is read that was not taken, or was given back")
        flows: dict[Key, Flow] = {}
        found = np.zeros(self.lanes, dtype=bool)
        for step in np.unique(cell.step[self.on]).tolist():
            some = self.on & (cell.step == step)
            for mask, flow in taking.loaded.content.get((tile, step), []):
                mine = some & np.tile(mask, GROUPS)
                if not mine.any():
                    continue
                found |= mine
                lo, hi = np.tile(flow.lo, (GROUPS, 1)), np.tile(flow.hi, (GROUPS, 1))
                for number, axis in enumerate(flow.axes):
                    start = full(cell.first[number], self.lanes)
                    begin = lo[:, axis] + start
                    end = np.minimum(hi[:, axis], begin + cell.length[number])
                    lo[:, axis] = np.minimum(begin, hi[:, axis])
                    hi[:, axis] = np.maximum(end, lo[:, axis])
                axes = tuple(flow.axes[number] for number in cell.order)
                have = mine & (hi > lo).all(axis=1)
                home = np.tile(full(flow.home, self.single), GROUPS)
                line, column = self.site
                key = (line, column + operand, flow.symbol, 0)
                held = flows.get(key)
                if held is None:
                    flows[key] = Flow(flow.symbol, have, home, lo, hi, axes)
                elif held.axes != axes:
                    self.unclear("tiles of different axes in one place of the text")
                else:
                    wide = have[:, None]
                    flows[key] = replace(
                        held,
                        have=held.have | have,
                        home=np.where(have, home, held.home),
                        lo=np.where(wide, lo, held.lo),
                        hi=np.where(wide, hi, held.hi),
                    )
        if (self.on & ~found).any():
            self.hazard("a tile is read that the loader did not fill in this step")
        shape = tuple(cell.length[a] for a in cell.order)
        return Data(shape, flows, tuple(flows)[:1])

    def on_hopper_warpgroup_mma(self, a: Any, b: Any, acc: Any, is_async: Any = False) -> Any:
        """``hopper.warpgroup_mma``: the tiles are read until it is waited for."""
        if is_async is not True:
            self.unclear("a product that is not under way")
        if isinstance(acc, Flying):
            total = acc.data
        elif isinstance(acc, Zeros):
            total = Data(acc.shape)
        else:
            self.unclear("products that are not added to products, nor to zeros")
        made = tiles.product(self.held(a, 0), self.held(b, 1), total, self.on)
        self.flying.append((self.on.copy(), a.step))
        return Flying(made)

    def on_hopper_warpgroup_mma_wait(self, count: Any, deps: Any) -> Any:
        """``hopper.warpgroup_mma_wait``: all but the last ``count`` products have read and added."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            self.unclear("how many products may be under way")
        if not isinstance(deps, tuple) or not deps:
            self.unclear("what is waited for")
        done = []
        for value in deps:
            data = value.data if isinstance(value, Flying) else self.data(value)
            done.append(Flying(data) if count else data)
        kept = self.flying[-count:] if count else []
        self.flying = [
            *(
                (mask & ~self.on, step)
                for mask, step in self.flying[: len(self.flying) - len(kept)]
            ),
            *kept,
        ]
        self.flying = [(mask, step) for mask, step in self.flying if mask.any()]
        return done[0] if len(done) == 1 else tuple(done)

    def data(self, value: Any) -> Data:
        """A tile of numbers, none of which is still being added up."""
        for _, part in options(self.on, value):
            if isinstance(part, Flying):
                self.hazard("a sum is used while products of it are under way")
        return Data(value.shape) if isinstance(value, Zeros) else super().data(value)

    def on_roles_sum_landed(
        self, own: Any, ring: Any, step: Any, room: Any, first: Any, rank: Any, world: Any
    ) -> Data:
        """``roles.sum_landed``: the parts of all other ranks from the next steps, each given back."""
        mine = self.data(own)
        self.among(rank, world)
        if not isinstance(room, Room) or len(mine.shape) != _CELL_AXES or mine.form:
            self.unclear("a sum of parts in no tiles of the ring, or of another shape")
        rows, width = mine.shape
        if room.block[1] != width:
            self.unclear("parts that are not as wide as the piece of the tile")
        if mine.rounded != TL_NAMES[room.dtype]:
            self.hazard(f"this rank's part is not rounded to {room.dtype}, as the others are")
        self.columns.add(width)
        at, flows = self.number_of(step), dict(mine.flows)
        for number in range(self.layout.world - 1):
            slot = self.on_roles_take(ring, Num(at + number))
            cell = Cell(room, slot.step, (0, 0), room.block, (0, 1))
            part = self.held(self.part_of(cell, first, rows, 0), 0)
            source = np.where(self.rank <= number, number + 1, number)
            for flow in part.flows.values():
                remote = flow.symbol in self.layout.remote
                if flow.axes != ((0, 1) if remote else (1, 2)):
                    self.hazard(f"operands of @{flow.symbol} are added as parts of a sum")
                of = flow.home if remote else flow.lo[:, 0]
                if (self.on & flow.have & (of != source)).any():
                    self.hazard("the part of a rank is added where another one's belongs")
                for one in (number, number + 1):
                    key = (self.site[0], self.site[1] + one, flow.symbol, 0)
                    added = replace(flow, have=flow.have & (source == one))
                    flows[key] = self.beside(flows.get(key), added)
            self.on_roles_give(ring, Num(at + number))
        return Data(mine.shape, flows, single=True)

    def beside(self, held: Flow | None, more: Flow) -> Flow:
        """Regions that flow into a tile in different lanes as one."""
        if held is None:
            return more
        wide = more.have[:, None]
        return replace(
            held,
            have=held.have | more.have,
            home=np.where(more.have, more.home, held.home),
            lo=np.where(wide, more.lo, held.lo),
            hi=np.where(wide, more.hi, held.hi),
        )

    # Layouts: what is where in registers changes no number. --------------------------------------

    def grid(self, columns: Any) -> int:
        """The columns of a tile that the group has: of its sums, or of parts of them."""
        count = self.whole(columns, "a number of columns")
        if count not in self.columns:
            self.unclear("the layout of tiles of another width")
        return count

    def on_roles_zeros(self, rows: Any, columns: Any) -> Zeros:
        """``roles.zeros``."""
        return Zeros(self.on_roles_full(rows, columns, 0).shape)

    def width(self, columns: Any, memory: Any) -> int:
        """The columns of an index vector: as memory is accessed any, otherwise those of a tile there is."""
        return self.whole(columns, "a number of columns") if memory is True else self.grid(columns)

    def on_roles_full(self, rows: Any, columns: Any, value: Any, dtype: Any = None) -> Data:
        """``roles.full``."""
        if dtype is not None:
            self.dtype(dtype)
        if not isinstance(value, int | float):
            self.unclear("a tile of something that is no number")
        self.columns.add(self.whole(columns, "a number of columns"))
        return Data((self.whole(rows, "a number of rows"), self.grid(columns)))

    def on_roles_row_index(self, rows: Any, columns: Any, memory: Any = False) -> Lattice:
        """``roles.row_index``."""
        self.fenced(memory)
        self.width(columns, memory)
        return self.on_tl_arange(0, rows)

    def on_roles_column_index(self, columns: Any, memory: Any = False) -> Lattice:
        """``roles.column_index``."""
        self.fenced(memory)
        return self.on_tl_arange(0, self.width(columns, memory))

    def on_roles_from_memory(self, value: Any, columns: Any) -> Data:
        """``roles.from_memory``."""
        tile = self.data(value)
        if len(tile.shape) != _CELL_AXES or tile.shape[1] not in (1, columns):
            self.unclear("the layout of a tile of another width")
        self.columns.add(columns)
        return tile

    on_roles_to_memory = on_roles_from_memory
    on_roles_piece = on_roles_from_memory

    # Memory -----------------------------------------------------------------------------------

    def read(self, *args: Any) -> None:
        """A read of the epilogue."""
        self.epilogue()
        super().read(*args)

    def on_roles_store(
        self, descriptor: Any, row: Any, column: Any, value: Any, corner: Any
    ) -> None:
        """``roles.store``: what lies past the end is not written."""
        self.leaves(descriptor, row, column, value, corner)

    def on_roles_send(
        self, descriptors: Any, number: Any, row: Any, column: Any, value: Any, corner: Any
    ) -> None:
        """``roles.send``: by the descriptor of which it has the number."""
        self.each_of(descriptors, number, lambda one: self.leaves(one, row, column, value, corner))

    def each_of(self, descriptors: Any, number: Any, store: Callable[[Any], None]) -> None:
        """A store by that of ``descriptors`` of which the lane has the number."""
        before, wanted = (self.on, self.all), self.number_of(number)
        if not isinstance(descriptors, tuple):
            self.unclear("descriptors of peers that are no tuple")
        if (self.on & ((wanted < 0) | (wanted >= len(descriptors)))).any():
            self.hazard("a store by a descriptor that does not exist")
        for one, descriptor in enumerate(descriptors):
            self.on = before[0] & (wanted == one)
            self.all = bool(self.on.all())
            if self.on.any():
                store(descriptor)
        self.on, self.all = before

    def leaves(self, descriptor: Any, row: Any, column: Any, value: Any, corner: Any) -> None:
        """A tile that leaves by one descriptor: of this rank's memory, or of its slice of a peer's."""
        if not isinstance(descriptor, Descriptor) or not isinstance(corner, Corner):
            self.unclear("a store to something that is no descriptor, or by way of no memory")
        if descriptor.flat or descriptor.roomy:
            self.unclear("a store by a descriptor of all ranks' parts, or past the end of a tensor")
        tile, block = self.data(value), descriptor.block
        dtype = self.layout.declared[descriptor.symbol]["dtype"]
        room = corner.room
        if len(block) != _CELL_AXES or room.dtype != dtype or not room.lies_as(block[1]):
            self.hazard("a tile leaves by way of memory of another shape or type")
        if block != (room.block if descriptor.peer is None else self.sent(room)):
            self.hazard(f"tiles leave by way of memory of {room.block} in boxes of {block}")
        matrix = len(tile.shape) == _CELL_AXES and not tile.form
        if not matrix or tile.shape[1] % room.block[1] or tile.shape[0] != room.block[0]:
            self.unclear(f"a store of a tile of shape {tile.shape} by way of {room.block}")
        home, lo, hi, axes = self.reached(descriptor, row, column, tile.shape)
        self.write(descriptor.symbol, "tma", self.on, home, lo, hi, tile.flows, axes)

    def reached(
        self, descriptor: Descriptor, row: Any, column: Any, shape: tuple[int, ...]
    ) -> tuple[Ints, Ints, Ints, tuple[int, ...]]:
        """Where a tile that leaves by a descriptor lands: the rank, the box, and the axes of the tile in it."""
        home, first = self.rank, len(self.layout.dims[descriptor.symbol]) - len(descriptor.block)
        if descriptor.peer is not None:
            home = np.full(self.lanes, descriptor.peer, dtype=np.int64)
        elif first:
            self.unclear("a store of a tile to a tensor of more axes")
        dims = np.array(self.layout.dims[descriptor.symbol][first:])
        starts = [self.number(row), self.number(column)]
        lo = np.stack([full(s.v, self.lanes) for s in starts], axis=1)
        if (lo[self.on] < 0).any():
            raise Misfit(f"a block of @{descriptor.symbol} that begins outside of {tuple(dims)}")
        hi = np.minimum(lo + np.array(shape), dims)
        lo = np.minimum(lo, dims)
        if first:
            lo, hi = np.column_stack((self.rank, lo)), np.column_stack((self.rank + 1, hi))
        return home, lo, hi, tuple(range(first, first + len(dims)))

    def sent(self, room: Room) -> tuple[int, int]:
        """The boxes in which tiles leave a room for other ranks, one when the one before has been read."""
        columns = min(room.block[1], SENT_ROW // room.item)
        rows = min(room.block[0], SENT_BYTES // (columns * room.item))
        if room.block[0] % rows or room.block[1] % columns:
            self.hazard("tiles leave for other ranks in boxes that do not come out even")
        return rows, columns

    # Signals ----------------------------------------------------------------------------------

    def on_roles_meet(self, pair: Any, number: Any) -> None:
        """``roles.meet``: both groups of a worker, meeting after meeting."""
        self.epilogue()
        if pair is not self.pair or pair is None:
            self.unclear("something that is no pair")
        if (self.on[: self.single] != self.on[self.single :]).any():
            self.hazard("a meeting to which one group of a worker does not come")
        if (self.on & (self.number_of(number) != self.met)).any():
            self.hazard("meetings are not counted one after the other")
        if any(
            (lanes & self.on).any() for s, lanes in self.tma.items() if s in self.layout.read_back
        ):
            self.hazard("groups meet before their TMA stores are drained")
        self.met = self.met + self.on
        self.met_at = np.where(self.on, self.trace.next(), self.met_at)

    def write(self, symbol: str, via: str, on: Mask, *args: Any, **facts: Any) -> None:
        """A write of the epilogue."""
        self.epilogue()
        super().write(symbol, via, on, *args, **facts)

    def on_device_delayed_tile_notify(self, *_: Any, **facts: Any) -> None:
        """A notify whose barrier is that of all warps, which other roles never come to."""
        self.hazard("a role waits at a barrier of the whole kernel")

    on_device_delayed_peer_notify = on_device_delayed_tile_notify
    on_device_delayed_counted_notify = on_device_delayed_tile_notify
    on_device_delayed_all_notify = on_device_delayed_tile_notify
    on_device_delayed_counted_all_notify = on_device_delayed_tile_notify
    on_roles_sum_parts = KernelMachine.on_device_tile_sum_parts
    on_roles_read_parts = KernelMachine.arrived
    on_roles_sum_remote = KernelMachine.on_device_tile_sum_remote
    on_roles_read_remote = KernelMachine.on_remote
    on_roles_add_parts = KernelMachine.added
    on_roles_delayed_tile_notify = KernelMachine.on_device_delayed_tile_notify
    on_roles_delayed_peer_notify = KernelMachine.on_device_delayed_peer_notify
    on_roles_delayed_counted_notify = KernelMachine.on_device_delayed_counted_notify

    def undrained(self, on: Mask) -> bool:
        """Whether TMA stores of these groups, or of the other half's, may still be under way."""
        both = on if self.turns is not None else on | np.roll(on, self.single)
        return super().undrained(both)

    def signal(self, on: Mask, symbol: str, home: Ints, flat: Ints, **facts: Any) -> int:
        """A wait or notify of the epilogue; a notify is for both halves of a tile."""
        self.epilogue()
        if not facts.get("delayed"):
            self.task()
        if self.turns is None and facts["wait"]:
            if (on[: self.single] != on[self.single :]).any():
                self.hazard("a wait of one group for both halves of a tile")
            on = on & (self.role == 0)  # one wait of the worker, made by both
        elif self.turns is None and on.any():
            other = np.roll(on, self.single)
            wrote = other & self.dirty & (self.last_write > self.met_at)
            if facts.get("delayed"):  # of a task that is over: neither has stored since
                wrote = (on | other) & (self.last_write > self.met_at)
            if wrote.any() or (on & self.dirty & (self.met_at == 0)).any():
                self.hazard("a notify before the other group has stored its half of the tile")
        return super().signal(on, symbol, home, flat, **facts)
