"""What emitted roles hold: rings and rooms of shared memory, slots, tiles in them, sums under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilelink.backend.validate.values import Data, Flow, Ints, Mask

_ROW = 128  # bytes of a row of shared memory that lie beside each other, at most


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """``roles.ring``."""

    slots: int
    readers: int


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """``roles.turns``."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """``roles.pair``."""


@dataclass(slots=True, eq=False)
class Orders:
    """``roles.orders``: by number, the place in the queue that the loader of each lane has handed on.

    ``made``: how many it has.
    """

    made: Ints
    places: list[Ints] = field(default_factory=list)

    def add(self, on: Mask, place: Ints) -> None:
        """The next order of the lanes ``on``."""
        for number in np.unique(self.made[on]).tolist():
            if number == len(self.places):
                self.places.append(np.zeros_like(self.made))
            some = on & (self.made == number)
            self.places[number][some] = place[some]
        self.made = self.made + on

    def at(self, number: Ints) -> Ints:
        """The places of orders that have been made, a number a lane; 0 where it is negative."""
        found = np.zeros_like(self.made)
        for one in np.unique(number[number >= 0]).tolist():
            found = np.where(number == one, self.places[one], found)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """``roles.tiles``: ``count`` boxes of shared memory of a descriptor's block and element type.

    ``roles.room``: of another block, that lies as a box of ``columns`` does; 0 where they are the block's.
    """

    block: tuple[int, ...]
    dtype: str
    item: int
    count: int
    columns: int = 0

    def lies_as(self, columns: int) -> bool:
        """Whether a box of ``columns`` lies in shared memory as a part of this does, in rows of the same bytes."""
        mine = (self.columns or self.block[1]) * self.item
        return min(_ROW, columns * self.item) == min(_ROW, mine)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """What ``claim`` and ``take`` return: the slot of a step, a number a lane."""

    step: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A tile in a slot: ``first`` and ``length`` of what is left of it along each axis, and their order."""

    room: Room
    step: Ints
    first: tuple[Any, ...]
    length: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Corner:
    """The part of a room by way of which a group's tiles leave."""

    room: Room


@dataclass(frozen=True, slots=True, eq=False)
class Flying:
    """Sums that products under way still add to."""

    data: Data


@dataclass(frozen=True, slots=True)
class Zeros:
    """What products are added to first."""

    shape: tuple[int, ...]


@dataclass(slots=True)
class Loaded:
    """What fills a ring: per stage the first step and the number of steps of each lane's tasks.

    ``rooms``: all shared memory of the kernel. ``used``: of which the ring has a tile for each slot.
    """

    ring: Ring
    rooms: list[Room]
    used: set[int] = field(default_factory=set)
    first: dict[int, list[Ints]] = field(default_factory=dict)
    count: dict[int, list[Ints]] = field(default_factory=dict)
    content: dict[tuple[int, int], list[tuple[Mask, Flow]]] = field(default_factory=dict)


@dataclass(slots=True)
class Taking:
    """What the groups take from a ring, a lane a group: steps of its task that are taken and given back.

    ``mine``: its turn is open; ``over``: it is passed on. ``gifts``: steps given back in all.
    """

    loaded: Loaded
    turns: Turns | None
    taken: Ints
    given: Ints
    gifts: Ints
    mine: Mask
    over: Mask

    @classmethod
    def of(cls, loaded: Loaded, turns: Turns | None, lanes: int) -> Taking:
        """Nothing has been taken."""
        zeros, none = np.zeros(lanes, dtype=np.int64), np.zeros(lanes, dtype=bool)
        return cls(loaded, turns, zeros, zeros.copy(), zeros.copy(), none, none.copy())

    def begin(self, fresh: Mask) -> None:
        """A task begins in some lanes."""
        self.taken, self.given = np.where(fresh, 0, self.taken), np.where(fresh, 0, self.given)
        self.mine, self.over = self.mine & ~fresh, self.over & ~fresh

    def done(self, count: Ints) -> Mask:
        """Where all ``count`` steps of the task are taken and given back, and its turn is over."""
        done: Mask = (self.taken == count) & (self.given == count)
        return done & (self.over | (count == 0)) if self.turns is not None else done
