"""What the lanes of a launch (or the ranks of the host function) do, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tilelink.backend.validate.values import Flow, Ints, Key, Mask

PREFIX = -1  # the segment of what a lane does before its first task of a stage
FINISH = -2  # the stage of what the last worker of a launch does


@dataclass(frozen=True, slots=True, eq=False)
class Touch:
    """One read or write by some lanes: boxes ``[lo, hi)``, segment and stage of each lane's task."""

    site: tuple[int, int]
    symbol: str
    write: bool
    via: str  # generic, tma or copy
    lane: Ints
    stage: int
    segment: Ints
    seq: int
    home: Ints
    lo: Ints
    hi: Ints
    flows: Mapping[Key, Flow] = field(default_factory=dict)
    pair: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """One wait or notify by some lanes: the element of ``symbol`` at rank ``home``.

    ``bound``: count of a counter wait or counted notify; ``epoch``: 0, or -1 for the call before.
    ``producer``: the rank that a wait names as the one that raises the flag. ``fence``: the proxy
    fence. ``system``: the scope of a counter's notify. ``drained``: TMA stores of these workers have
    completed. ``last``: the last of the tasks that a wait in front of a flattened loop stands before.
    """

    site: tuple[int, int]
    symbol: str
    wait: bool
    lane: Ints
    stage: int
    segment: Ints
    seq: int
    home: Ints
    flat: Ints
    bound: Ints
    epoch: int = 0
    through: str = ""
    through_flat: Ints | None = None
    fence: bool = False
    system: bool = True
    delayed: bool = False
    drained: bool = False
    producer: Ints | None = None
    last: Ints | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Two regions that a product sums over, axis ``axes[n]`` of ``sides[n]``, in some lanes."""

    site: tuple[int, int]
    lane: Ints
    stage: int
    segment: Ints
    sides: tuple[Flow, Flow]
    axes: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Poll:
    """What an error record would say of words that are polled: the flag that they carry, and who stores them."""

    site: tuple[int, int]
    symbol: str
    home: Ints
    flat: Ints
    producer: Ints


@dataclass(slots=True)
class _Open:
    """Reads of one load that may still grow: a box a lane."""

    have: Mask
    segment: Ints
    signals: Ints
    home: Ints
    lo: Ints
    hi: Ints
    seq: Ints


@dataclass(slots=True)
class Trace:
    """All events of one agent. ``segments`` counts the tasks of each lane in each stage."""

    lanes: int
    touches: list[Touch] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    polls: list[Poll] = field(default_factory=list)
    segments: dict[int, Ints] = field(default_factory=dict)
    stage_sites: dict[int, tuple[int, int]] = field(default_factory=dict)
    pairs: dict[int, tuple[int, int]] = field(default_factory=dict)
    queues: set[tuple[str, int]] = field(default_factory=set)
    tickets: dict[int, list[tuple[Ints, Ints, Ints]]] = field(default_factory=dict)
    drawers: dict[int, Mask] = field(default_factory=dict)  # who draws the tasks of a stage
    flushed: set[int] = field(
        default_factory=set
    )  # stages behind which held notifies are performed
    freed: list[tuple[int, int]] = field(default_factory=list)
    step: int = 0
    passed: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _open: dict[tuple[int, int, str, int, str], _Open] = field(default_factory=dict)

    def next(self) -> int:
        """The next number of the order of events."""
        self.step += 1
        return self.step

    def read(
        self,
        site: tuple[int, int],
        symbol: str,
        via: str,
        on: Mask,
        stage: int,
        segment: Ints,
        home: Ints,
        lo: Ints,
        hi: Ints,
    ) -> None:
        """A read; one that continues the lane's last read of the same load, with no signal between, is
        joined to it."""
        on = on & (hi > lo).all(axis=1)
        seq = self.next()
        key = (*site, symbol, stage, via)
        held = self._open.get(key)
        if held is None:
            self._open[key] = _Open(
                on.copy(),
                segment.copy(),
                self.passed.copy(),
                home.copy(),
                lo.copy(),
                hi.copy(),
                np.full(self.lanes, seq),
            )
            return
        same = on & held.have & (held.segment == segment) & (held.signals == self.passed)
        same &= held.home == home
        apart = (held.lo != lo) | (held.hi != hi)
        count = apart.sum(axis=1)
        follows = same & (count == 1) & ((held.hi == lo) | ~apart).all(axis=1)
        again = same & (count == 0)
        held.hi[follows] = hi[follows]
        fresh = on & ~follows & ~again
        self._flush(key, held, fresh & held.have)
        if fresh.any():
            held.have |= fresh
            held.segment[fresh] = segment[fresh]
            held.signals[fresh] = self.passed[fresh]
            held.home[fresh] = home[fresh]
            held.lo[fresh] = lo[fresh]
            held.hi[fresh] = hi[fresh]
            held.seq[fresh] = seq

    def _flush(self, key: tuple[int, int, str, int, str], held: _Open, which: Mask) -> None:
        for seq in np.unique(held.seq[which]).tolist():
            lane = np.flatnonzero(which & (held.seq == seq))
            self.touches.append(
                Touch(
                    key[:2],
                    key[2],
                    False,
                    key[4],
                    lane,
                    key[3],
                    held.segment[lane],
                    seq,
                    held.home[lane],
                    held.lo[lane],
                    held.hi[lane],
                )
            )

    def close(self) -> None:
        """Ends all reads that are still open."""
        for key, held in self._open.items():
            self._flush(key, held, held.have)
        self._open.clear()
