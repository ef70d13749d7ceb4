"""An emitted kernel that copies by way of shared memory: which boxes land in it, and where they go from there.

It is held to what :mod:`tilelink.device.boxes` asks of its callers: a tile is not loaded over one that may still
be on its way out, and what is sent is the tile that was loaded last, once it has landed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.ring import Room
from tilelink.backend.validate.values import Data, Descriptor, Ints, Mask, full, select

_AXES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """``boxes.landing``: a barrier for each of ``count`` boxes."""

    count: int


class BoxMachine(KernelMachine):
    """All workers of all ranks in step; a tile in shared memory is the region that was loaded into it."""

    modules = frozenset({"tl", "device", "boxes"})

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.room: Room | None = None
        self.landing: Landing | None = None
        self.loads: Ints = np.zeros(self.lanes, dtype=np.int64)
        self.held: Data | None = None
        self.full: Mask = np.zeros(self.lanes, dtype=bool)

    def once(self, held: object) -> None:
        """Refuses a second room, and shared memory behind the first access."""
        if held is not None or not self.all or self.stage != -1:
            self.unclear("shared memory that is made twice, or too late")

    def on_boxes_room(self, descriptor: Any, count: Any) -> Room:
        """``boxes.room``."""
        self.once(self.room)
        if not isinstance(descriptor, Descriptor) or len(descriptor.block) != _AXES:
            self.unclear("boxes of something that is no descriptor")
        dtype = str(self.layout.declared[descriptor.symbol]["dtype"])
        item = self.layout.item[descriptor.symbol]
        self.room = Room(descriptor.block, dtype, item, self.whole(count))
        return self.room

    def on_boxes_landing(self, count: Any) -> Landing:
        """``boxes.landing``."""
        self.once(self.landing)
        self.landing = Landing(self.whole(count))
        return self.landing

    def whole(self, value: Any) -> int:
        """A constant from 1."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.unclear("a number of boxes")
        return value

    def tile(self, descriptor: Any, row: Any, column: Any, room: Any, landing: Any) -> Descriptor:
        """The descriptor of a whole tile: as many boxes side by side as shared memory has room for."""
        if room is not self.room or landing is not self.landing or self.room is None:
            self.unclear("a tile in something that is no room for boxes")
        if self.landing is None or self.landing.count != self.room.count:
            self.hazard("not every box has a barrier that it lands behind")
        if not isinstance(descriptor, Descriptor) or descriptor.block != self.room.block:
            self.unclear("boxes of another shape than shared memory's")
        if self.layout.declared[descriptor.symbol]["dtype"] != self.room.dtype:
            self.hazard(f"elements of @{descriptor.symbol} in boxes of {self.room.dtype}")
        rows, columns = self.room.block
        return Descriptor(
            descriptor.symbol,
            (rows, columns * self.room.count),
            descriptor.peer,
            slot=descriptor.slot,
        )

    def on_boxes_load(
        self, descriptor: Any, row: Any, column: Any, room: Any, landing: Any
    ) -> None:
        """``boxes.load``: the tile that the next sends are of."""
        whole = self.tile(descriptor, row, column, room, landing)
        for lanes in self.tma.values():
            if (lanes & self.on).any():
                self.hazard("a tile is loaded over one that may still be on its way out")
        if (self.full & self.on).any():
            self.hazard("a tile is loaded over one that nothing has been done with")
        self.inside_whole(whole, row, column)
        loaded = self.fetch(whole, (self.number(row), self.number(column)))
        self.held = select(self.on, loaded, self.held)
        self.full = self.full | self.on
        self.loads = self.loads + self.on

    def inside_whole(self, whole: Descriptor, row: Any, column: Any) -> None:
        """Refuses a tile that reaches past the end: what is stored of it would be its neighbour's."""
        dims = self.layout.dims[whole.symbol][-_AXES:]
        for start, length, extent in zip((row, column), whole.block, dims, strict=True):
            last = np.asarray(full(self.number(start).v, self.lanes)) + length
            if (last[self.on] > extent).any():
                self.hazard(f"a box reaches past the end of @{whole.symbol}")

    def on_boxes_send(
        self,
        descriptors: Any,
        number: Any,
        row: Any,
        column: Any,
        room: Any,
        landing: Any,
        turn: Any,
    ) -> None:
        """``boxes.send``: by the descriptor of which it has the number, when the boxes have landed."""
        before = self.on, self.all
        if not isinstance(descriptors, tuple):
            self.unclear("descriptors of peers that are no tuple")
        wanted = np.asarray(full(self.number(number).v, self.lanes))
        if (self.on & ((wanted < 0) | (wanted >= len(descriptors)))).any():
            self.hazard("a store by a descriptor that does not exist")
        turns = np.asarray(full(self.number(turn).v, self.lanes))
        if self.held is None or (self.on & (turns != self.loads - 1)).any():
            self.hazard("what is sent has not been waited for")
        self.full = self.full & ~self.on
        for one, descriptor in enumerate(descriptors):
            self.on = before[0] & (wanted == one)
            self.all = bool(self.on.all())
            if self.on.any():
                whole = self.tile(descriptor, row, column, room, landing)
                self.inside_whole(whole, row, column)
                self.put(whole, (self.number(row), self.number(column)), self.held)
        self.on, self.all = before
