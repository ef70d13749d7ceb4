"""What emitted roles hold: rings and rooms of shared memory, slots, tiles in them, sums under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tilelink.backend.validate.values import Data, Flow, Ints, Mask


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


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """``roles.tiles``: ``count`` boxes of shared memory of a descriptor's block and element type."""

    block: tuple[int, ...]
    dtype: str
    item: int
    count: int


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
    """What the loader did: per stage the first step and the number of steps of each lane's tasks."""

    ring: Ring
    rooms: list[Room]
    first: dict[int, list[Ints]] = field(default_factory=dict)
    count: dict[int, list[Ints]] = field(default_factory=dict)
    content: dict[tuple[int, int], list[tuple[Mask, Flow]]] = field(default_factory=dict)
