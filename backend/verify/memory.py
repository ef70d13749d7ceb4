"""Where accesses meet: each symbol's memory is cut into cells, and accesses are paired cell by cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion, boxes
from tilelink.backend.verify.order import Order, carries


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
    tma: npt.NDArray[np.bool_]
    write: npt.NDArray[np.bool_]
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


# Axes up to this long have their cuts marked element by element, which takes no sort.
DENSE = 2**22


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
    tma = np.concatenate([np.full(len(a.task), a.tma) for a in accesses])
    lo = np.concatenate([np.column_stack((a.home, a.lo)) for a in accesses])
    hi = np.concatenate([np.column_stack((a.home + 1, a.hi)) for a in accesses])
    whole = (out.world, *out.dims[symbol])
    cuts: list[Ints] = []
    first = np.empty_like(lo)
    last = np.empty_like(hi)
    for axis, extent in enumerate(whole):
        if extent > DENSE:
            cut = np.unique(np.concatenate((np.array([0, extent]), lo[:, axis], hi[:, axis])))
            cuts.append(cut)
            first[:, axis] = np.searchsorted(cut, lo[:, axis])
            last[:, axis] = np.searchsorted(cut, hi[:, axis])
            continue
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
    counts = [max(1, len(cut) - 1) for cut in cuts]
    steps = np.array([math.prod(counts[axis + 1 :]) for axis in range(len(counts))], dtype=np.int64)
    shape = last - first
    row, point = boxes(shape)
    cell = (first @ steps)[row]
    for axis in np.flatnonzero((shape > 1).any(axis=0)):
        cell += point[:, axis] * steps[axis]
    by = np.argsort(cell, kind="stable")
    row, cell = row[by], cell[by]
    is_write = write[row]
    write_row, write_cell = row[is_write], cell[is_write]
    read_row, read_cell = row[~is_write], cell[~is_write]

    rows = Rows(order, node, task, seq, tma, write)
    tagged = bool(out.declarations[symbol].get("words"))
    total = math.prod(counts)
    pair_write, pair_read = _join(write_cell, read_cell, total)
    both_first, both_second = _join(write_cell, write_cell, total)
    once = both_first < both_second
    both_first, both_second = both_first[once], both_second[once]
    return Meeting(
        symbol,
        accesses,
        source,
        inner,
        node,
        task,
        tma,
        write,
        write_row,
        write_cell,
        read_row,
        read_cell,
        pair_write,
        pair_read,
        rows.polled(symbol, write_row[pair_write], read_row[pair_read])
        if tagged
        else rows.order_of(write_row[pair_write], read_row[pair_read]),
        both_first,
        both_second,
        rows.order_of(write_row[both_first], write_row[both_second]),
        tuple(cuts),
    )


def _join(writes: Ints, others: Ints, cells: int) -> tuple[Ints, Ints]:
    """All pairs (write, other) of incidences with the same of so many cells; both are sorted by cell."""
    if cells <= DENSE * 4:
        each = np.bincount(writes, minlength=cells)
        count = each[others]
        begin = (np.cumsum(each) - each)[others]
    else:
        begin = np.searchsorted(writes, others, side="left")
        count = np.searchsorted(writes, others, side="right") - begin
    which = np.repeat(np.arange(len(others)), count)
    ends = np.cumsum(count)
    step = np.arange(len(which)) - np.repeat(ends - count, count)
    return np.repeat(begin, count) + step, which


# Pairs of nodes are looked up in one dense table up to this many entries, else sorted.
_DENSE = 1 << 26
# Masks of so many pairs are compared at once.
_CHUNK = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What happens-before needs to know of the access rows of a symbol; see ``Order``."""

    order: Order
    node: Ints
    task: Ints
    seq: Ints
    tma: npt.NDArray[np.bool_]
    write: npt.NDArray[np.bool_]

    def codes(self, a: Ints, b: Ints) -> Ints:
        """Pairs of rows as numbers: what ``a`` releases, and what had been acquired where ``b`` looks."""
        order = self.order
        if len(order.proxied) == 0:
            return self.node[a] * order.nodes + self.node[b]
        # A TMA store is complete from a drain on only. What the generic proxy, a peer or a copy
        # engine wrote is seen through the async proxy from a proxy fence on only. Worked out for rows,
        # of which there are fewer than pairs.
        first = (self.node + order.nodes * (self.tma & self.write)) * order.nodes
        generic = self.write & ~self.tma
        fenced = np.where(self.tma, order.proxied[self.node], self.node)
        codes: Ints = first[a] + np.where(generic[a], fenced[b], self.node[b])
        return codes

    def order_of(self, a: Ints, b: Ints) -> Ints:
        """1 where row ``a`` is before row ``b`` of the same call, -1 where after, 0 in no order."""
        found = np.zeros(len(a), dtype=np.int64)
        same = np.flatnonzero(self.task[a] == self.task[b])
        found[same] = self.within(a[same], b[same])
        other = np.flatnonzero(self.task[a] != self.task[b])
        one, two = a[other], b[other]
        forward = holds(self.order, self.codes(one, two))
        found[other[forward]] = 1
        rest = other[~forward]
        backward = holds(self.order, self.codes(b[rest], a[rest]))
        found[rest[backward]] = -1
        return found

    def polled(self, symbol: str, a: Ints, b: Ints) -> Ints:
        """1 where row ``a``, words stored, stands before a notify that the task of row ``b``, a load of words,
        waits for in front of it: the load goes on when it has found what ``a`` stored. 0 elsewhere."""
        told, asked = carries(self.order, symbol)
        pairs = np.column_stack((self.node[a], self.node[b]))
        some, inverse = np.unique(pairs, axis=0, return_inverse=True)
        found = np.array([bool(told[x] & asked[y]) for x, y in some.tolist()], dtype=np.int64)
        return found[inverse.ravel()]

    def within(self, a: Ints, b: Ints) -> Ints:
        """The same for rows of one task: program order, but for the async proxy."""
        sign: Ints = np.sign(self.seq[b] - self.seq[a])
        order = self.order
        if len(order.proxied) == 0:
            return sign
        first, last = np.where(sign > 0, a, b), np.where(sign > 0, b, a)
        open_store = self.tma[first] & self.write[first]
        late = order.drained[self.node[first]] > self.node[last]
        crossing = self.tma[last] & self.write[first] & ~self.tma[first]
        unseen = order.proxied[self.node[last]] <= self.node[first]
        sign[(open_store & late) | (crossing & unseen)] = 0
        return sign


def holds(order: Order, codes: Ints, call: int = 0) -> npt.NDArray[np.bool_]:
    """For each pair of ``Rows.codes`` whether the first precedes the second, ``call`` calls later."""
    if len(codes) == 0:
        return np.zeros(0, dtype=bool)
    size = len(order.releases) * order.nodes
    if size <= _DENSE:
        seen = np.zeros(size, dtype=bool)
        seen[codes] = True
        some = np.flatnonzero(seen)
        seen[some] = _meets(order, some, call)
        return seen[codes]
    some, inverse = np.unique(codes, return_inverse=True)
    return _meets(order, some, call)[inverse.ravel()]


def _meets(order: Order, codes: Ints, call: int) -> npt.NDArray[np.bool_]:
    if len(codes) < 4096:
        releases, clocks, width = order.releases, order.clocks[call], order.nodes
        pairs = (divmod(code, width) for code in codes.tolist())
        return np.array([bool(releases[x] & clocks[y]) for x, y in pairs], dtype=bool)
    left, right = order.masks(call)
    found = np.empty(len(codes), dtype=bool)
    for begin in range(0, len(codes), _CHUNK):
        x, y = np.divmod(codes[begin : begin + _CHUNK], order.nodes)
        found[begin : begin + _CHUNK] = (left[x] & right[y]).any(axis=1)
    return found


def across(order: Order, meeting: Meeting, calls: int = 1) -> tuple[int, int] | None:
    """Two rows in conflict, the first of one call, the second ``calls`` later, in no order; else None.

    A read that empties what it reads is a write too.
    """
    seq = np.zeros(0, dtype=np.int64)
    rows = Rows(order, meeting.node, meeting.task, seq, meeting.tma, meeting.write)
    writes, reads = meeting.write_row, meeting.read_row
    empties = np.array([bool(a.op.get("empty")) for a in meeting.accesses])
    emptied = reads[empties[meeting.source[reads]]]
    for first, second in (
        (reads[meeting.pair_read], writes[meeting.pair_write]),
        (writes[meeting.pair_write], reads[meeting.pair_read]),
        (writes[meeting.both_first], writes[meeting.both_second]),
        (writes[meeting.both_second], writes[meeting.both_first]),
        (writes, writes),
        (emptied, emptied),
    ):
        bad = np.flatnonzero(~holds(order, rows.codes(first, second), call=calls))
        if len(bad):
            return int(first[bad[0]]), int(second[bad[0]])
    return None
