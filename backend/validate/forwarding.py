"""What roles do of a stage that copies, in an emitted kernel: tiles are drawn, loaded, and go on from the ring.

The loader draws a place of the queue and hands it on before anything else of the tile; both groups read every
place, and one of them sends the boxes on as they land. They are held to the order in which neither waits for
the other: a tile's boxes are loaded behind its order and before the next, and taken behind its order alone.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.loader import LoaderMachine
from tilelink.backend.validate.ring import Cell, Orders, Slot
from tilelink.backend.validate.roles import GROUPS, GroupMachine
from tilelink.backend.validate.values import Descriptor, Flow, Ints, Mask, Num
from tilelink.schedules.roles import LEAVING


class _Drawing(KernelMachine, ABC):
    """A role of a launch in which some workers copy what is drawn. ``orders``: None where none does.

    What it does of a task is held to the task's order by :meth:`in_order`: each role to its own side of it.
    """

    def __init__(self, orders: Orders | None, *args: Any) -> None:
        super().__init__(*args)
        self.orders = orders
        self.drawn_tasks = np.zeros(self.lanes, dtype=np.int64)  # that have begun

    def begin(self, fresh: Mask) -> None:
        """A task begins in some lanes."""
        super().begin(fresh)
        if fresh.any() and isinstance(self.loops[self.stage], ast.While):
            self.drawn_tasks = self.drawn_tasks + fresh
        self.in_order(fresh)

    @abstractmethod
    def in_order(self, on: Mask) -> None:
        """Refuses what is done where it is not the turn of the last task that began."""


class CopyingLoader(_Drawing, LoaderMachine):
    """The role that loads: it draws a place, hands it to the groups, and then loads the boxes."""

    def __init__(self, orders: Orders | None, reverse: bool, *args: Any) -> None:
        super().__init__(orders, *args)
        self.reverse = reverse
        self.draws = np.zeros(self.lanes, dtype=np.int64)

    def on_device_queue_next(self, ctx: Any, word: Any) -> Num:
        """``device.queue_next``: the place before has been handed on."""
        if self.orders is None:
            self.hazard("tasks are drawn, and there is nothing by which groups hear which ones")
        if (self.on & (self.draws != self.orders.made)).any():
            self.hazard("a place is drawn before the one before is handed to the groups")
        place = KernelMachine.on_device_queue_next(self, ctx, word)
        self.draws = self.draws + self.on
        return place

    def on_roles_order(self, orders: Any, number: Any, place: Any) -> None:
        """``roles.order``: the place that was drawn last, as the next number of its worker."""
        if not isinstance(orders, Orders) or orders is not self.orders:
            self.unclear("something that is no orders")
        if (self.on & (self.number_of(number) != orders.made)).any():
            self.hazard("orders are not numbered one after the other")
        if (self.on & (self.draws != orders.made + 1)).any():
            self.hazard("an order that nothing was drawn for")
        if (self.on & (self.number_of(place) != self.ticket)).any():
            self.hazard("another place is handed to the groups than the one that was drawn")
        orders.add(self.on, self.ticket)

    def in_order(self, on: Mask) -> None:
        """Refuses what is done before its order, behind the next one, or by a worker that copies beside it."""
        made = np.zeros(self.lanes, dtype=np.int64) if self.orders is None else self.orders.made
        if (on & ((self.draws != made) | (self.drawn_tasks != made))).any():
            self.hazard("a loader acts between the order of a tile and the tile, or for none")

    def on_roles_claim(self, ring: Any, step: Any, size: Any) -> Slot:
        """``roles.claim``: behind the order of the tile."""
        self.in_order(self.on)
        return super().on_roles_claim(ring, step, size)

    def on_roles_fetch(self, *args: Any) -> None:
        """``roles.fetch``: behind the order of the tile."""
        self.in_order(self.on)
        super().on_roles_fetch(*args)

    def signal(self, on: Mask, symbol: str, home: Ints, flat: Ints, **facts: Any) -> int:
        """A wait: behind the order of the tile."""
        self.in_order(on)
        return super().signal(on, symbol, home, flat, **facts)

    def finished(self) -> None:
        """Refuses a worker that never tells its groups that the queue has come to its end."""
        super().finished()
        if self.orders is not None:
            over = np.where(self.draws > 0, self.drawn_tasks + 1, 0)
            if (self.orders.made != over).any():
                self.hazard("groups are not told of every tile, and of the end of the queue")


class CopyingGroups(_Drawing, GroupMachine):
    """The groups: those of workers that copy send on what lies in the slots that they take."""

    def __init__(self, orders: Orders | None, *args: Any) -> None:
        super().__init__(orders, *args)
        self.read_orders = np.zeros(self.lanes, dtype=np.int64)

    def on_roles_ordered(self, orders: Any, number: Any) -> Num:
        """``roles.ordered``: by both groups, one after the other."""
        if not isinstance(orders, Orders) or orders is not self.orders:
            self.unclear("something that is no orders")
        at = self.number_of(number)
        if (self.on & (at != self.read_orders)).any():
            self.hazard("orders are not read one after the other")
        if (self.on & (at >= np.tile(orders.made, GROUPS))).any():
            self.hazard("an order is waited for that the loader never gives")
        place = np.zeros(self.lanes, dtype=np.int64)
        for group in np.split(np.arange(self.lanes), GROUPS):
            known = np.where(self.on[group], at[group], -1)
            place[group] = orders.at(known)
        self.read_orders = self.read_orders + self.on
        self.ticket = np.where(self.on, place, self.ticket)
        return Num(place)

    def in_order(self, on: Mask) -> None:
        """Refuses what belongs to a tile behind another order than its own."""
        if (on & (self.drawn_tasks != self.read_orders)).any():
            self.hazard("a tile is taken before its order has been read, or behind the next one")

    def on_roles_take(self, ring: Any, step: Any) -> Slot:
        """``roles.take``: the loader gives the next order when all of this tile has been loaded."""
        self.in_order(self.on)
        return super().on_roles_take(ring, step)

    def on_roles_forward(
        self, descriptors: Any, number: Any, row: Any, column: Any, tile: Any
    ) -> None:
        """``roles.forward``: whole boxes, to where all of them lie inside."""
        self.task()
        self.each_of(descriptors, number, lambda one: self.sent_on(one, row, column, tile))

    def sent_on(self, descriptor: Any, row: Any, column: Any, cell: Any) -> None:
        """What lies in a tile of a slot leaves by one descriptor."""
        if not isinstance(descriptor, Descriptor) or descriptor.flat or not isinstance(cell, Cell):
            self.unclear("a store by no descriptor, or of what is no tile of the ring")
        if descriptor.slot is not None:
            self.hazard(f"an access to @{descriptor.symbol} in a slot that need not be the call's")
        if cell.order != (0, 1) or cell.length != cell.room.block:
            self.unclear("a part of a tile of the ring is sent on")
        dtype = self.layout.declared[descriptor.symbol]["dtype"]
        if descriptor.block != cell.room.block or dtype != cell.room.dtype:
            self.hazard(f"a box of @{descriptor.symbol} lies in tiles of another shape or type")
        if any(cell.room is t.loaded.rooms[n] for t in self.takings()[1:] for n in t.loaded.used):
            self.hazard("parts of a sum are sent on")
        held = self.held(cell, 0)
        home, lo, hi, axes = self.reached(descriptor, row, column, held.shape)
        target = Flow(descriptor.symbol, self.on, home, lo, hi, axes)
        for flow in (target, *held.flows.values()):
            reached = (flow.hi - flow.lo)[:, list(flow.axes)]
            if (reached[self.on & flow.have] != np.array(cell.room.block)).any():
                self.hazard(f"a box that reaches past the end of @{flow.symbol} is sent on")
        # While the steps of the task are being taken: not an access of the epilogue.
        KernelMachine.write(self, descriptor.symbol, "tma", self.on, home, lo, hi, held.flows, axes)
        self.leaving.append((self.on.copy(), cell.step))

    def have_been_read(self, pending: int) -> None:
        """All but the last ``pending`` stores of each lane have been read from shared memory."""
        later = np.zeros(self.lanes, dtype=np.int64)
        kept: list[tuple[Mask, Ints]] = []
        for mask, step in reversed(self.leaving):
            left = mask & ~(self.on & (later >= pending))
            later = later + mask
            if left.any():
                kept.append((left, step))
        self.leaving = kept[::-1]

    def on_roles_forwarded(self, ring: Any, step: Any, first: Any, stores: Any) -> None:
        """``roles.forwarded``: gives back the box ``LEAVING`` before, if it is one of the tile."""
        self.have_been_read(LEAVING * self.whole(stores, "a number of stores"))
        self.back(ring, self.number_of(step) - LEAVING, first)

    def on_roles_all_forwarded(self, ring: Any, step: Any, first: Any) -> None:
        """``roles.all_forwarded``: gives back the last boxes of the tile."""
        self.have_been_read(0)
        for number in range(LEAVING):
            self.back(ring, self.number_of(step) - LEAVING + number, first)

    def back(self, ring: Any, step: Ints, first: Any) -> None:
        """Gives back a step, if it is not before ``first``."""
        self.on_roles_give(ring, Num(step), Num((step >= self.number_of(first)).astype(np.int64)))

    def on_device_drain_tma_stores(self) -> None:
        """``device.drain_tma_stores``: what has arrived has been read."""
        self.have_been_read(0)
        super().on_device_drain_tma_stores()

    def finished(self) -> None:
        """Refuses orders that a group does not read: the loader would wait for it."""
        if self.orders is not None and np.any(
            self.read_orders != np.tile(self.orders.made, GROUPS)
        ):
            self.hazard("a group that does not read all orders")
