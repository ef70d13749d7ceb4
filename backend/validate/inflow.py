"""What flows into parts of a store, as the program has it: how much of which symbols, and in which boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tilelink.backend.expand_rows import Access
from tilelink.backend.validate.values import Flow, Ints, Mask


class Inflow:
    """What flows into ``count`` parts of stores, a row each.

    ``sizes``: by symbol, the elements for each row and rank in whose memory they lie. ``along``: by symbol, the
    axes that each axis of the tile may follow.
    """

    def __init__(self, count: int, world: int) -> None:
        self.count, self.world = count, world
        self.sizes: dict[str, Ints] = {}
        self.along: dict[str, list[tuple[int, ...]]] = {}
        self.boxes: dict[str, list[Flow]] = {}

    def declare(self, symbol: str, axes: tuple[int, ...]) -> None:
        """Something of ``symbol`` may flow in, along these axes."""
        self.sizes.setdefault(symbol, np.zeros((self.count, self.world), dtype=np.int64))
        self.along.setdefault(symbol, []).append(axes)

    def add(self, flow: Flow) -> None:
        """A box for each row that has one."""
        size = np.prod(flow.hi - flow.lo, axis=1) * flow.have
        self.sizes[flow.symbol][np.arange(self.count), flow.home] += size
        self.boxes.setdefault(flow.symbol, []).append(flow)

    def holds(self, symbol: str, rows: Ints, home: Ints, lo: Ints, hi: Ints) -> Mask:
        """Whether each region, in the memory of ``home``, lies in a box of its row."""
        found: Mask = np.zeros(len(rows), dtype=bool)
        for box in self.boxes.get(symbol, ()):
            within = np.all(lo >= box.lo[rows], axis=1) & np.all(hi <= box.hi[rows], axis=1)
            found = found | (within & box.have[rows] & (home == box.home[rows]))
        return found


def regions(
    access: Access,
    order: tuple[Ints, Ints],
    tasks: Ints,
    offset: Ints,
    length: Ints,
    cut: Sequence[tuple[int, int]],
) -> Iterator[Flow]:
    """What each of ``tasks`` reads by one access, a turn of its loops after the other.

    ``order`` is the access's rows by task, and their tasks. Of each pair in ``cut``, an axis of what is read goes
    with one of a store: there only what ``length`` elements from ``offset`` on need is read.
    """
    by, ordered = order
    begin = np.searchsorted(ordered, tasks, side="left")
    end = np.searchsorted(ordered, tasks, side="right")
    for step in range(int((end - begin).max()) if len(tasks) else 0):
        there = begin + step < end
        row = by[np.minimum(begin + step, len(by) - 1)]
        first, last = access.lo[row].copy(), access.hi[row].copy()
        for axis, stored in cut:
            first[:, axis] += offset[:, stored]
            last[:, axis] = np.minimum(last[:, axis], first[:, axis] + length[:, stored])
        there = there & np.all(last > first, axis=1)
        yield Flow(access.symbol, there, access.home[row], first, last, (-1,))
