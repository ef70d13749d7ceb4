"""Where accesses meet: each symbol's memory is cut into cells, and accesses are paired cell by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion, boxes
from tilelink.backend.verify.order import Order


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """The accesses to one symbol in one call, cell by cell.

    ``accesses[source[row]]`` at its row ``inner[row]`` is access row ``row``. Incidences of writes and
    reads are (row, cell), sorted by cell. ``pair_*`` pair a write incidence with a read incidence,
    ``both_*`` two write incidences of a cell; ``order`` is 1 where the first is before the second, -1
    after, 0 in no order. ``place`` is the coordinate [cell, axis] at which a cell starts, axis 0 the rank.
    """

    symbol: str
    accesses: tuple[Access, ...]
    source: Ints
    inner: Ints
    node: Ints
    task: Ints
    write_row: Ints
    write_cell: Ints
    read_row: Ints
    read_cell: Ints
    pair_write: Ints
    pair_read: Ints
    pair_order: Ints
    both_first: Ints
    both_second: Ints
    both_order: Ints
    cuts: tuple[Ints, ...]

    def access(self, row: int) -> tuple[Access, int]:
        """The access of a row and its row there."""
        return self.accesses[int(self.source[row])], int(self.inner[row])

    def place(self, cells: Ints) -> Ints:
        """The first rank and indices of each cell: ``[n, 1 + axes]``."""
        index = np.zeros((len(cells), len(self.cuts)), dtype=np.int64)
        rest = cells
        for axis in reversed(range(len(self.cuts))):
            count = max(1, len(self.cuts[axis]) - 1)
            index[:, axis] = self.cuts[axis][rest % count]
            rest = rest // count
        return index

    @property
    def cells(self) -> int:
        """How many cells there are on all ranks."""
        return int(np.prod([max(1, len(c) - 1) for c in self.cuts], dtype=np.int64))


def meet(out: Expansion, order: Order, symbol: str) -> Meeting:
    """Pair all accesses to ``symbol`` in one call."""
    accesses = tuple(a for a in out.accesses if a.symbol == symbol)
    source = np.concatenate(
        [np.full(len(a.task), n, dtype=np.int64) for n, a in enumerate(accesses)]
    )
    inner = np.concatenate([np.arange(len(a.task), dtype=np.int64) for a in accesses])
    node = np.concatenate([order.node(a) for a in accesses])
    task = np.concatenate([a.task for a in accesses])
    seq = np.concatenate([a.seq for a in accesses])
    write = np.concatenate([np.full(len(a.task), a.write) for a in accesses])
    lo = np.concatenate([np.column_stack((a.home, a.lo)) for a in accesses])
    hi = np.concatenate([np.column_stack((a.home + 1, a.hi)) for a in accesses])
    whole = (out.world, *out.dims[symbol])
    cuts: list[Ints] = []
    first = np.empty_like(lo)
    last = np.empty_like(hi)
    for axis, extent in enumerate(whole):
        edge = np.zeros(extent + 1, dtype=bool)
        edge[[0, extent]] = True
        edge[lo[:, axis]] = True
        edge[hi[:, axis]] = True
        if axis == 0:
            edge[:] = True
        cuts.append(np.flatnonzero(edge))
        number = np.cumsum(edge) - 1
        first[:, axis] = number[lo[:, axis]]
        last[:, axis] = number[hi[:, axis]]
    row, point = boxes(last - first)
    cell = np.zeros(len(row), dtype=np.int64)
    for axis, cut in enumerate(cuts):
        cell = cell * max(1, len(cut) - 1) + first[row, axis] + point[:, axis]
    by = np.argsort(cell, kind="stable")
    row, cell = row[by], cell[by]
    is_write = write[row]
    write_row, write_cell = row[is_write], cell[is_write]
    read_row, read_cell = row[~is_write], cell[~is_write]

    pair_write, pair_read = _join(write_cell, read_cell)
    both_first, both_second = _join(write_cell, write_cell)
    once = both_first < both_second
    both_first, both_second = both_first[once], both_second[once]
    return Meeting(
        symbol,
        accesses,
        source,
        inner,
        node,
        task,
        write_row,
        write_cell,
        read_row,
        read_cell,
        pair_write,
        pair_read,
        _order(order, write_row[pair_write], read_row[pair_read], node, task, seq),
        both_first,
        both_second,
        _order(order, write_row[both_first], write_row[both_second], node, task, seq),
        tuple(cuts),
    )


def _join(writes: Ints, others: Ints) -> tuple[Ints, Ints]:
    """All pairs (write, other) of incidences with the same cell; both are sorted by cell."""
    begin = np.searchsorted(writes, others, side="left")
    count = np.searchsorted(writes, others, side="right") - begin
    which = np.repeat(np.arange(len(others)), count)
    ends = np.cumsum(count)
    step = np.arange(len(which)) - np.repeat(ends - count, count)
    return np.repeat(begin, count) + step, which


# Pairs of nodes are looked up in one dense table up to this many entries, else sorted.
_DENSE = 1 << 26


def _order(order: Order, a: Ints, b: Ints, node: Ints, task: Ints, seq: Ints) -> Ints:
    found = np.zeros(len(a), dtype=np.int64)
    same = task[a] == task[b]
    found[same] = np.sign(seq[b[same]] - seq[a[same]])
    other = ~same
    total = len(order.releases)
    pairs = node[a[other]] * total + node[b[other]]
    dense = total * total <= _DENSE
    if dense:
        seen = np.zeros(total * total, dtype=bool)
        seen[pairs] = True
        codes = np.flatnonzero(seen)
    else:
        codes, inverse = np.unique(pairs, return_inverse=True)
    values = np.zeros(len(codes), dtype=np.int8)
    for number, code in enumerate(codes.tolist()):
        x, y = divmod(code, total)
        if order.before(x, y):
            values[number] = 1
        elif order.before(y, x):
            values[number] = -1
    if dense:
        table = np.zeros(total * total, dtype=np.int8)
        table[codes] = values
        found[other] = table[pairs]
    else:
        found[other] = values[inverse.ravel()]
    return found


def across(order: Order, meeting: Meeting) -> tuple[int, int] | None:
    """Two rows in conflict, the first of one call, the second of the next, in no order; else None."""
    node = meeting.node
    total = len(order.releases)
    writes, reads = meeting.write_row, meeting.read_row
    dense = total * total <= _DENSE
    tried = np.zeros(total * total if dense else 0, dtype=bool)
    for first, second in (
        (reads[meeting.pair_read], writes[meeting.pair_write]),
        (writes[meeting.pair_write], reads[meeting.pair_read]),
        (writes[meeting.both_first], writes[meeting.both_second]),
        (writes[meeting.both_second], writes[meeting.both_first]),
        (writes, writes),
    ):
        pairs = node[first] * total + node[second]
        if dense:
            seen = np.zeros_like(tried)
            seen[pairs] = True
            codes = np.flatnonzero(seen & ~tried)
            tried |= seen
        else:
            codes = np.unique(pairs)
        bad = [
            code for code in codes.tolist() if not order.before(code // total, code % total, call=1)
        ]
        if bad:
            at = int(np.flatnonzero(np.isin(pairs, bad))[0])
            return int(first[at]), int(second[at])
    return None
