"""dataflow: what is read is the tile, the version and the rank's data that the kernel means.

Content of a cell is followed from where it is made. Along each axis it has a *shift*: coordinate of the
data minus index in the buffer. The coordinate of a computed tile is its own loop variable; of a shard,
the place in rank-major order of owners. A read states, through its loop variables, which coordinate it
means; both must agree, and so must the rank wherever contributions of ranks differ. An index that is known at
run time only may mean any coordinate of its axis: all of it has to be there, each at its own place.
Where the kernel itself places the tile elsewhere along an axis, and *meaning* has found the same words in the
program, the index is the coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilelink.backend.copying import copies_of
from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion
from tilelink.backend.verify.cover import where
from tilelink.backend.verify.errors import DataflowError
from tilelink.backend.verify.memory import Meeting
from tilelink.ir import Op

ANY = np.int64(-(1 << 60))  # a shift or rank that nothing is known or claimed of
MOVED = ("gather", "scatter", "reduce", "ring", "shard")
UNKNOWN_PLACES = "tiles that lie otherwise than in the tensor were moved there together"
ANY_INDEX = "an index known at run time only may ask for any of axis {axis}, and {what}"


@dataclass(frozen=True, slots=True)
class Content:
    """What each access row of a symbol's meeting puts there: rank ``[n]``, shift ``[n, axes]``."""

    rank: Ints
    shift: Ints


class Dataflow:
    """Contents of all written symbols, followed through transfers and collectives."""

    def __init__(self, out: Expansion, meetings: dict[str, Meeting]) -> None:
        self.out = out
        self.meetings = meetings
        self.contents: dict[str, Content] = {}
        self.resolved: dict[str, tuple[Ints, Ints]] = {}
        self.summed = summed_symbols(out)
        # Loads whose tiles stages that copy store as they are, by the store's identity.
        self.copied = {
            store: load for phase in out.phases for store, load in copies_of(phase.op).items()
        }

    def check(self) -> None:
        """Raise DataflowError for the first access, in program order, of wrong data."""
        for symbol in self.meetings:
            self.content(symbol)  # also what nothing reads must have been moved rightly
        for access in self.out.accesses:
            if not access.write and self.copies(access):
                continue  # it claims nothing: what it finds is followed to where it is stored
            if not access.write and access.op.name in ("load", "load_sum"):
                self.read(access)
            elif access.write and access.op.name == "store":
                self.store(access)

    def tensor(self, symbol: str) -> Op | None:
        """The tensor that ``symbol`` is or serves."""
        op = self.out.declarations.get(self.out.base(symbol))
        return op if op is not None and op.name == "tensor" else None

    def positions(self, symbol: str, index: Ints) -> Ints:
        """Global indices along ``over`` as places in rank-major order of owners; ANY outside."""
        owner, place = self.out.owners[symbol]
        shard = len(owner) // self.out.world
        inside = (index >= 0) & (index < len(owner))
        safe = np.where(inside, index, 0)
        return np.where(inside, owner[safe] * shard + place[safe], ANY)

    def run(self, symbol: str, lo: Ints, hi: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The position of ``lo``, and whether those from it to ``hi`` (exclusive) follow each other."""
        owner, _ = self.out.owners[symbol]
        first = self.positions(symbol, lo)
        steps = np.diff(self.positions(symbol, np.arange(len(owner)))) != 1
        turns = np.concatenate(([0], np.cumsum(steps)))
        inside = (first != ANY) & (hi <= len(owner)) & (lo < hi)
        safe, last = np.where(inside, lo, 0), np.where(inside, hi - 1, 0)
        return first, inside & (turns[safe] == turns[last])

    # Contents ---------------------------------------------------------------------------------

    def content(self, symbol: str) -> Content | None:
        """Contents of ``symbol``, or None where nothing writes it."""
        if symbol not in self.meetings:
            return None
        if symbol not in self.contents:
            meeting = self.meetings[symbol]
            axes = len(self.out.dims[symbol])
            # Entered first, so that a circle of transfers ends with nothing claimed.
            self.contents[symbol] = Content(
                np.full(len(meeting.node), ANY), np.full((len(meeting.node), axes), ANY)
            )
            parts = [self.made(a) for a in meeting.accesses]
            self.contents[symbol] = Content(
                np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            )
        return self.contents[symbol]

    def made(self, access: Access) -> tuple[Ints, Ints]:
        n, axes = access.lo.shape
        shift = np.full((n, axes), ANY)
        rank = np.full(n, ANY)
        if not access.write:
            return rank, shift
        if access.op.name == "store" and id(access.op) not in self.copied:
            return access.rank, self.coordinates(access) - access.lo
        source = self.source(access)
        if source is None:
            return rank, shift
        self.same_tensor(access, source)
        if access.op.name != "collective":
            self.lands(access)
        if access.op.name == "collective" and access.origin is None:
            return self.reduced(access, source)
        start, from_rank = self.taken(source, access)
        if access.op.name == "store":
            start, from_rank = self.handed(source, access, start, from_rank)
        if access.origin is not None:
            from_rank = np.where(from_rank == ANY, ANY, access.origin)
        few = source.lo.shape[1]
        drop = axes - few
        for axis in range(axes):
            other = axis - drop
            if 0 <= other < few:
                known = start[:, other] != ANY
                shift[:, axis] = np.where(known, start[:, other] - access.lo[:, axis], ANY)
        return from_rank, shift

    def handed(self, source: Access, access: Access, start: Ints, rank: Ints) -> tuple[Ints, Ints]:
        """What a task has loaded, ``start`` and ``rank`` by rows of ``source``, by rows of its stores of it.

        It loads its tile once, and stores it into several ranks, maybe part by part: both name the places of a
        tile by the same variables.
        """
        by = np.argsort(source.task, kind="stable")
        at = by[np.searchsorted(source.task[by], access.task)]
        drop = access.want.shape[1] - source.want.shape[1]
        inside = access.want[:, drop:] - source.want[at]
        return np.where(start[at] == ANY, ANY, start[at] + inside), rank[at]

    def source(self, access: Access) -> Access | None:
        made_by = self.copied.get(id(access.op), access.op)
        same = (a for a in self.out.accesses if not a.write and a.op is made_by)
        return next((a for a in same if access.pair < 0 or a.pair == access.pair), None)

    def taken(self, source: Access, access: Access) -> tuple[Ints, Ints]:
        """Coordinate at the start of each row's source region ``[n, axes]``, and whose data it is."""
        tensor = self.out.declarations[source.symbol]
        start = source.lo.copy()
        rank = source.rank
        if source.symbol in self.out.owners and tensor.get("role") in ("in", "inout"):
            owner, _ = self.out.owners[source.symbol]
            shard = len(owner) // self.out.world
            whose = access.origin if access.origin is not None else source.rank
            start[:, tensor["over"]] += whose * shard
        elif source.symbol in self.meetings:
            shift, rank = self.found(source)
            start = np.where(shift == ANY, ANY, start + shift)
        return start, rank

    def found(self, access: Access) -> tuple[Ints, Ints]:
        """What a read finds, if it is the same all over its region: shift ``[n, axes]``, rank ``[n]``."""
        shift, rank, meeting = self.resolve(access.symbol)
        number = meeting.accesses.index(access)
        mine = meeting.source[meeting.read_row] == number
        inner = meeting.inner[meeting.read_row[mine]]
        n, axes = access.lo.shape
        out = np.full((n, axes), ANY)
        for axis in range(axes):
            out[:, axis] = _uniform(inner, shift[mine, axis], n)
        return out, _uniform(inner, rank[mine], n)

    def reduced(self, access: Access, source: Access) -> tuple[Ints, Ints]:
        """A sum over ranks: each cell of the source must be this rank's contribution to that cell."""
        n, axes = access.lo.shape
        shift = np.zeros((n, axes), dtype=np.int64)
        tensor = self.tensor(access.symbol)
        if tensor is None or source.symbol not in self.meetings:
            return np.full(n, ANY), np.full((n, axes), ANY)
        have, rank = self.found(source)
        wrong = np.any(have != 0, axis=1) | (rank != source.rank)
        if wrong.any():
            self.fail(source, int(np.flatnonzero(wrong)[0]), "other tiles than its own are summed")
        if access.op.get("op") == "reduce_scatter":
            over = tensor["over"]
            shift[:, over] = access.rank * (self.out.dims[source.symbol][over] // self.out.world)
        return np.full(n, ANY), shift

    def same_tensor(self, access: Access, source: Access) -> None:
        """What is moved belongs to the tensor that it is moved for, as contribution or as sum."""
        out = self.out
        served = [out.base(a.symbol).split(".")[0] for a in (source, access)]
        serves = "." in access.symbol or self.tensor(access.symbol) is not None
        if serves and served[0] != served[1]:
            self.fail(access, 0, f"`{source.symbol}` is not of the tensor that this place serves")
        kinds = [out.declarations[a.symbol]["dtype"] for a in (source, access)]
        if kinds[0] != kinds[1]:
            self.fail(access, 0, f"{kinds[0]} is put where {kinds[1]} is read")
        if access.op.name == "collective":
            self.fits(access, source)

    def lands(self, access: Access) -> None:
        """What is copied goes into a buffer of a tensor that moves: only there every read says what it wants.

        What lies elsewhere is what stages compute with, and their reads claim nothing.
        """
        tensor = self.tensor(access.symbol)
        mine = [a for a in self.out.accesses if a.symbol == access.symbol]
        computed = any(
            a.op.name in ("load", "load_sum", "store") and not self.copies(a) for a in mine
        )
        serves = not computed if tensor is None else tensor.get("move") in MOVED
        if self.out.declarations[access.symbol].name != "buffer" or not serves:
            self.fail(access, 0, "it is copied over what stages compute with")

    def copies(self, access: Access) -> bool:
        """Whether a load or store is one of a stage that copies."""
        return id(access.op) in self.copied or any(
            access.op is load for load in self.copied.values()
        )

    def fits(self, access: Access, source: Access) -> None:
        """A collective does what its tensor's move asks for, between memory of the right shapes."""
        tensor, world, kind = self.tensor(access.symbol), self.out.world, access.op.get("op")
        small, large = self.out.dims[source.symbol], self.out.dims[access.symbol]
        move = None if tensor is None else tensor.get("move")
        if kind == "reduce_scatter":
            small, large = large, small
        over = int(tensor.get("over") or 0) if tensor is not None else 0
        cut = [s * world if axis == over else s for axis, s in enumerate(small)]
        if kind == "all_gather":
            good = list(large) in (cut, [world, *small])
            good &= move in ("gather", None) or len(large) > len(small)
        elif kind == "reduce_scatter":
            good = list(large) == cut and move in ("scatter", None)
        else:
            good = kind == "all_reduce" and large == small and move in ("reduce", None)
        if not good:
            shapes = (
                f"from {list(self.out.dims[source.symbol])} to {list(self.out.dims[access.symbol])}"
            )
            self.fail(access, 0, f"`{kind}` {shapes} is not how its tensor moves")

    def coordinates(self, access: Access) -> Ints:
        """The coordinate of what a store puts at the start of each row; ANY where rows hold several."""
        tensor = self.tensor(access.symbol)
        name = self.out.base(access.symbol)
        if tensor is None or name not in self.out.owners:
            return access.want
        axis = access.lo.shape[1] - len(tensor["dims"]) + int(tensor["over"])
        found = access.want.copy()
        if access.placed[axis]:
            length = access.hi[:, axis] - access.lo[:, axis]
            want = access.want[:, axis]
            first, together = self.run(name, want, want + length)
            # Far outside of every axis: such content is nobody's.
            found[:, axis] = np.where(together, first, -(1 << 40))
        return found

    def resolve(self, symbol: str) -> tuple[Ints, Ints, Meeting]:
        """For each read incidence of ``symbol``: shift and rank of the last write before it."""
        meeting = self.meetings[symbol]
        content = self.content(symbol)
        assert content is not None
        if symbol not in self.resolved:
            # Writes of a cell are totally ordered: the last before a read has most writes before it.
            good = meeting.pair_order == 1
            read, writer = meeting.pair_read[good], meeting.pair_write[good]
            if len(meeting.both_order):
                writes = len(meeting.write_row)
                age = np.bincount(meeting.both_second[meeting.both_order == 1], minlength=writes)
                age += np.bincount(meeting.both_first[meeting.both_order == -1], minlength=writes)
                by = np.lexsort((age[writer], read))
                read, writer = read[by], writer[by]
            last = np.full(len(meeting.read_row), -1, dtype=np.int64)
            last[read] = writer  # the last assignment wins, which is the youngest write
            row = meeting.write_row[last]
            known = last >= 0
            shift = np.where(known[:, None], content.shift[row], ANY)
            self.resolved[symbol] = (shift, np.where(known, content.rank[row], ANY))
        return (*self.resolved[symbol], meeting)

    # Demands ----------------------------------------------------------------------------------

    def demanded(self, access: Access) -> Ints:
        """The coordinate each row means at the start of its region ``[n, axes]``; ANY where it says none."""
        tensor = self.tensor(access.symbol)
        n, axes = access.lo.shape
        need = np.full((n, axes), ANY)
        if tensor is None:
            return need
        name = self.out.base(access.symbol)
        extents = [int(d) for d in self.globals(tensor)]
        lead = axes - len(extents)
        for axis in range(axes):
            which = axis - lead
            if not 0 <= which < len(extents):
                continue
            same = self.out.dims[access.symbol][axis] == extents[which]
            # A bound is a box over the whole axis, wherever in it the index is.
            bound = not access.exact and not access.placed[axis]
            bound &= bool((access.hi - access.lo)[:, axis].max() > 1)
            if bound and not same:
                there = f"{self.out.dims[access.symbol][axis]} of {extents[which]} are there"
                self.fail(access, 0, ANY_INDEX.format(axis=which, what=there))
            if not access.placed[axis] and not same:
                user = self.out.declarations[access.symbol].name == "tensor"
                if not user or name not in self.out.owners or which != tensor["over"]:
                    continue
            said = (id(access.op), which) in self.out.meant
            need[:, axis] = (access.lo if said else access.want)[:, axis]
            if name in self.out.owners and which == tensor["over"]:
                length = access.hi[:, axis] - access.lo[:, axis]
                want = access.want[:, axis]
                first, together = self.run(name, want, want + length)
                if not together.all():
                    there = ANY_INDEX.format(axis=which, what="it lies there owner by owner")
                    detail = there if bound else "its tile spans owners"
                    self.fail(access, int(np.flatnonzero(~together)[0]), detail)
                need[:, axis] = first
        return need

    def globals(self, tensor: Op) -> list[int]:
        """The global extents of a tensor."""
        dims = list(self.out.dims[tensor.symbol])
        over = tensor.get("over")
        if over is not None and tensor.get("role") in ("in", "out", "inout"):
            dims[over] = len(self.out.owners[tensor.symbol][0])
        return dims

    def held(self, access: Access, need: Ints) -> None:
        """A user tensor with ``over``: the index must be where this rank's shard holds the coordinate."""
        tensor = self.out.declarations[access.symbol]
        over = tensor["over"]
        shard = self.out.dims[access.symbol][over]
        wrong = need[:, over] != access.home * shard + access.lo[:, over]
        wrong &= need[:, over] != ANY
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            detail = "this rank's shard holds another part of it there"
            self.fail(access, row, detail)

    def read(self, access: Access) -> None:
        symbol = access.symbol
        tensor = self.tensor(symbol)
        if tensor is None:
            return
        user = self.out.declarations[symbol].name == "tensor"
        moved = tensor.get("move") in MOVED
        if user and symbol in self.out.owners and tensor.get("role") != "temp":
            self.held(access, self.demanded(access))
            return
        if symbol not in self.meetings or not moved or user:
            return
        need = self.demanded(access)
        shift, rank, meeting = self.resolve(symbol)
        number = meeting.accesses.index(access)
        mine = np.flatnonzero(meeting.source[meeting.read_row] == number)
        inner = meeting.inner[meeting.read_row[mine]]
        have = np.where(shift[mine] == ANY, ANY, access.lo[inner] + shift[mine])
        claim = need[inner]
        blank = np.any((have == ANY) & (claim != ANY), axis=1)
        self.report(access, meeting, mine, blank, UNKNOWN_PLACES)
        wrong = np.any((have != claim) & (have != ANY) & (claim != ANY), axis=1)
        self.report(access, meeting, mine, wrong, "another tile's data is there")
        if tensor.get("move") not in ("scatter", "reduce"):
            return
        if symbol in self.summed:
            if access.op.name == "load_sum":
                self.fail(access, 0, "it holds sums already")
            return
        if access.remote:
            whose = access.home[inner]
        elif access.op.name == "load_sum" and not access.own:
            whose = meeting.place(meeting.read_cell[mine])[:, 1]
        else:
            whose = access.rank[inner]
        self.report(access, meeting, mine, rank[mine] == ANY, UNKNOWN_PLACES)
        wrong = rank[mine] != whose
        self.report(access, meeting, mine, wrong, "another rank's contribution is there")

    def store(self, access: Access) -> None:
        declared = self.out.declarations[access.symbol]
        if declared.name != "tensor":
            return
        if access.symbol in self.out.owners and declared.get("role") in ("out", "inout"):
            self.held(access, self.demanded(access))
        kind = declared.get("move")
        if kind == "reduce" and declared.get("role") != "temp":
            wrong = np.any(access.want != access.lo, axis=1)
            if wrong.any():
                self.fail(access, int(np.flatnonzero(wrong)[0]), "the tile belongs elsewhere")
        shared = kind in ("scatter", "reduce") and declared.get("role") in ("out", "inout")
        if shared and self.out.world > 1 and access.symbol not in self.summed:
            self.fail(access, 0, "one rank's contribution is stored where the sum belongs")

    def report(
        self, access: Access, meeting: Meeting, mine: Ints, wrong: np.ndarray, detail: str
    ) -> None:
        if not wrong.any():
            return
        number = int(mine[np.flatnonzero(wrong)[0]])
        pairs = np.flatnonzero((meeting.pair_read == number) & (meeting.pair_order == 1))
        notes = [where(self.out, meeting, int(meeting.read_row[number]))]
        notes += [
            where(self.out, meeting, int(meeting.write_row[meeting.pair_write[p]]))
            for p in pairs[:1]
        ]
        raise DataflowError(access.op.span, symbol=access.symbol, detail=detail, notes=tuple(notes))

    def fail(self, access: Access, row: int, detail: str) -> None:
        region = ", ".join(
            f"{a}..{b}"
            for a, b in zip(access.lo[row].tolist(), access.hi[row].tolist(), strict=True)
        )
        note = f"@{access.symbol}[{region}]: {self.out.describe(int(access.task[row]))}"
        raise DataflowError(access.op.span, symbol=access.symbol, detail=detail, notes=(note,))


def _uniform(row: Ints, value: Ints, n: int) -> Ints:
    """Per row the value that all its incidences share, else ANY."""
    high = np.full(n, np.iinfo(np.int64).min)
    low = np.full(n, np.iinfo(np.int64).max)
    np.maximum.at(high, row, value)
    np.minimum.at(low, row, value)
    return np.where(high == low, high, ANY)


def summed_symbols(out: Expansion) -> frozenset[str]:
    """Symbols that hold sums over ranks: all that is put there comes from `load_sum` or a reduction."""
    made: dict[str, object] = {}
    for op in out.program.walk():
        for result in op.results:
            made[result.name] = op
    yields: dict[str, Op] = {}
    for op in out.program.walk():
        if op.results and op.body and op.body[-1].name == "yield":
            for result, value in zip(op.results, op.body[-1].operands, strict=False):
                yields[result.name] = op.body[-1]
                made.setdefault(value.name, op)
    writers = [
        op for op in out.program.walk() if op.name in ("store", "transfer", "collective") and op.ref
    ]
    found: set[str] = set()
    while True:
        bad: set[str] = set()
        good: set[str] = set()
        for op in writers:
            assert op.ref is not None
            if op.name == "store":
                (good if _from_sum(op, made, yields, found) else bad).add(op.ref.symbol)
            elif op.name == "transfer":
                (good if op.ref.symbol in found else bad).add(op["to"].symbol)
            else:
                total = op.get("op") in ("reduce_scatter", "all_reduce")
                (good if total or op.ref.symbol in found else bad).add(op["to"].symbol)
        if good - bad == found:
            return frozenset(found)
        found = good - bad


def _from_sum(store: Op, made: dict[str, object], yields: dict[str, Op], found: set[str]) -> bool:
    seen: set[str] = set()
    frontier = [v.name for v in store.operands]
    while frontier:
        name = frontier.pop()
        if name in seen:
            continue
        seen.add(name)
        op = made.get(name)
        if not isinstance(op, Op):
            continue
        if op.name == "load_sum" or (op.name == "load" and op.ref and op.ref.symbol in found):
            return True
        frontier += [v.name for v in op.operands]
        if name in yields:
            frontier += [v.name for v in yields[name].operands]
    return False
