"""rows: what holds for a dynamic extent's capacity holds for every value that a call may give it.

A program with a dynamic extent M is one text. Memory, segments, flags and channels are those of the
capacity, where the other rules prove it. A call with fewer rows runs the tasks that have some, on as many rows
as there are: the rows of a segment that are *there* are its first ones, and the user's tensors hold those alone,
segment behind segment. Three things make that the kernel's meaning for this M, without a hang or a race:

- No row of a result depends on another row, or on the number of a row. So rows that are not there may hold
  anything, and each of the others is what it is at the capacity.
- Each access of a row finds it in the place that it has at the capacity, in the user's tensors, and in what a
  gather fills for tiles that span shards, in its place among the rows that are there. Such a place is of another
  rank in a call with other rows. So each rank hears from every other one between two calls that use the same
  memory: what any of them did there in the one is over when it begins the other.
- Which tasks there are, and what they wait for and notify, changes only where a number of tiles or of channels
  does. Of all M between two such values the largest stands for the others: their tasks are the same, with fewer
  rows in the last tile of a segment, on the reading and on the writing side alike. So the program is
  enumerated at both ends of each such range, where places and bounds are compared, and proven at the upper one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tilelink.backend.endless import mixed_rows, tile_variable
from tilelink.backend.expand import Ints, environment, evaluate, loop_tiles
from tilelink.backend.expand_rows import Expansion
from tilelink.backend.expand_walk import expand
from tilelink.backend.verify.errors import RowsError
from tilelink.ir import At, Broadcast, Expr, Index, Op, Range, Ref, Value, dynamic_extents
from tilelink.ir.instance import at_extents

_MEMORY = ("load", "load_sum", "store")
# Attributes that may name the extent; what they say is compared with the capacity, or enumerated and proven.
_MAY_NAME = {
    "stage": {"extent", "live", "first"},
    "wait": {"count", "if"},
    "notify": {"count", "if"},
    "transfer": {"to", "if"},
    "load": {"own"},
    "load_sum": {"own"},
}


def check_rows(
    out: Expansion,
    kernel: Op | None,
    prove: Callable[[Expansion], object],
    inside: Callable[[Expansion], None],
) -> None:
    """Raise RowsError, or an error of ``prove`` or ``inside``, where a call with fewer rows could go wrong.

    ``out`` is the program at its capacity, proven; ``prove`` proves the order of accesses and the signals of
    another value's rows, ``inside`` that they lie in what is declared. Nothing to do where no extent is dynamic.
    """
    if not dynamic_extents(out.program):
        return
    rows = _rows_of(out, kernel)
    rows.declarations()
    rows.independent()
    rows.alike()
    rows.apart(out)
    lower, upper = rows.ends()
    for value in sorted({*lower, *upper}):
        small = at_extents(out.program, {rows.name: value})
        rows.placed(small)
        there = expand(small, kernel)
        rows.copied(there)
        rows.apart(there)
        if value in upper:
            prove(there)
        else:
            inside(there)


def smaller(out: Expansion, kernel: Op | None) -> list[Op]:
    """The program at each value of its dynamic extent at which it is enumerated beside the capacity."""
    if not dynamic_extents(out.program):
        return []
    rows = _rows_of(out, kernel)
    values = sorted({value for end in rows.ends() for value in end})
    return [at_extents(out.program, {rows.name: value}) for value in values]


def _rows_of(out: Expansion, kernel: Op | None) -> _Rows:
    found = dynamic_extents(out.program)
    if len(found) > 1:
        _fail(found[1], "a second dynamic extent")
    if kernel is None:
        _fail(found[0], "it carries no kernel, which says what a row is")
    return _Rows(out, found[0].symbol, kernel)


class _Rows:
    def __init__(self, out: Expansion, name: str, kernel: Op) -> None:
        self.out, self.name, self.world = out, name, out.world
        self.capacity = int(out.env[name])
        self.stages = [p.op for p in out.phases if p.kind == "stage"]
        # The axes of the tensors that have a row for each element of the extent: buffers that serve them
        # have those of the capacity.
        self.tall = {
            op.symbol: len(op["dims"])
            for op in kernel.find("tensor")
            if name in Expr.of(op["dims"][0]).names
        }
        # What the library's collectives read and write is as long as there are rows.
        self.collected = {ref.symbol for agent in out.agents for ref in _sides(agent)}
        # Of what a gather fills, buffers in which shards lie side by side, as long as they are.
        self.closed = {
            op.symbol
            for op in out.declarations.values()
            if op.name == "buffer"
            and op.get("space") == "symmetric"
            and Expr.of(op["dims"][0]) == Expr.name(name)
        }
        self.unit = 1
        for stage in self.stages:
            for extent in stage["extent"]:
                if Expr.of(extent) == Expr.name(name) // Expr.name("WORLD"):
                    self.unit = self.world
            if stage.get("live") is not None:
                self.unit = self.world
        if any(t.get("over") is not None for t in kernel.find("tensor") if t.symbol in self.tall):
            self.unit = self.world

    def tensors(self) -> Iterator[Op]:
        return (op for op in self.out.declarations.values() if op.name == "tensor")

    # The text -----------------------------------------------------------------------------------

    def declarations(self) -> None:
        """Rows are the first axis of tensors, and memory does not depend on how many there are."""
        for op in self.out.declarations.values():
            dims = [Expr.of(d) for d in op["dims"]]
            if not any(self.name in d.names for d in dims):
                continue
            first = dims[0] == Expr.name(self.name) and op.get("over", 0) == 0
            if op.name == "buffer" and op.get("space") == "local" and op.symbol in self.collected:
                # Laid out at the capacity; the library takes it whole.
                part = Expr.name(self.name) // Expr.name("WORLD")
                if dims[0] in (Expr.name(self.name), part) and not any(
                    self.name in d.names for d in dims[1:]
                ):
                    continue
            inner = any(self.name in d.names for d in dims[1:])
            if op.symbol in self.closed and self.out.base(op.symbol) in self.tall and not inner:
                continue
            if op.name != "tensor" or not first or inner:
                _fail(op, f"`{op.symbol}` has `{self.name}` where memory would depend on it")

    def independent(self) -> None:
        """No row depends on another one, or on its own number."""
        for op in self.out.program.walk():
            may = _MAY_NAME.get(op.name, set())
            for key, value in op.attrs:
                if (
                    op.name not in ("tensor", "buffer")
                    and key not in may
                    and self.name in _names(value)
                ):
                    _fail(op, f"`{key}` depends on `{self.name}`")
            if op.name in ("wait", "notify") and self.name in _names(op.ref):
                _fail(op, f"its element depends on `{self.name}`")
        for agent in self.out.agents:
            for ref in _sides(agent):
                declared = self.out.declarations[ref.symbol]
                long = self.name in Expr.of(declared["dims"][0]).names
                if self.out.base(ref.symbol) not in self.tall or ref.index or not long:
                    _fail(
                        agent,
                        "a collective of the library takes all rows that are there, and no others",
                    )
        for stage in self.stages:
            self.body(stage, self.row_of(stage))

    def row_of(self, stage: Op) -> str | None:
        """The variable of a stage that walks the rows, if one does."""
        found: str | None = None
        for number, extent in enumerate(stage["extent"]):
            if self.name not in Expr.of(extent).names:
                continue
            whole = Expr.of(extent) == Expr.name(self.name)
            part = Expr.of(extent) == Expr.name(self.name) // Expr.name("WORLD")
            cut = stage.get("segment") is not None and int(stage.get("axis", 0)) == number
            length = int(evaluate(stage["segment"], self.out.env, stage)) if cut else 0
            live = Expr.of(stage["live"]) if stage.get("live") is not None else None
            shard = Expr.name(self.name) // Expr.name("WORLD")
            fits = part and not cut
            fits |= whole and cut and live == shard and length * self.world == self.capacity
            fits |= whole and not cut and live is None
            if not fits or found is not None or not stage.args[number].type.is_tile:
                _fail(stage, "it walks the rows in a way whose end is not known")
            found = stage.args[number].name
        if found is None and stage.get("live") is not None:
            _fail(stage, "`live` of an extent that is not dynamic")
        return found

    def body(self, stage: Op, row: str | None) -> None:
        for op, what in mixed_rows(stage, row) if row is not None else ():
            _fail(op, what)
        for op in stage.walk():
            if op is stage:
                continue
            if op.name in ("for_tiles", "for_range"):
                bounds = [op.get(key) for key in ("extent", "lo", "hi", "segment", "segments")]
                if any(self.name in _names(value) for value in bounds):
                    _fail(op, "a loop inside of a task over the rows")
            shapes = [v.type.shape for v in (*op.operands, *op.results)]
            if op.name == "constant" and self.name in _names(op["value"]):
                _fail(op, f"the value of `{self.name}` itself")
            if any(self.name in re.findall(r"[\w.]+", d) for shape in shapes for d in shape):
                _fail(op, "a tile of all rows")
            if row is not None and op.name in ("index", "bound") and op.operands[0].name == row:
                _fail(op, "the number of a row")
            if op.name in _MEMORY:
                own = op.get("own")
                for ref in (op.ref, *([own] if isinstance(own, Ref) else [])):
                    assert ref is not None
                    self.access(op, ref, row)

    def access(self, op: Op, ref: Ref, row: str | None) -> None:
        """A tensor with rows is accessed by the row variable on that axis, and by it nowhere else."""
        stacked = self.stacked(ref)
        uses = [tile_variable(item) == row and row is not None for item in ref.index]
        for item in ref.index:
            if isinstance(item, Value) and not item.type.is_tile and row in item.type.shape:
                _fail(op, "rows that an index of rows picks")
        axes = [not isinstance(item, Broadcast) for item in ref.index]
        place = 0 if stacked is None else stacked
        tall = stacked is not None
        at = [n for n, axis in enumerate(axes) if axis][place : place + 1] if tall else []
        wanted = [n in at for n in range(len(uses))]
        if uses != wanted or (tall and not at):
            _fail(op, f"`{ref}` is not one row of `{ref.symbol}` for each row of the task")
        if op.name == "store" and ref is op.ref and row is not None and not tall:
            _fail(op, f"`{ref.symbol}` has no rows, and each task of the rows stores to it")

    def alike(self) -> None:
        """Who reads rows takes them to lie as who wrote them: those of each owner at the place of its shard at the
        capacity, or all that are there side by side. Tasks over a part or over all of the rows say which; what is
        copied lies on both sides alike."""
        groups: dict[str, str] = {}

        def root(symbol: str) -> str:
            while groups.setdefault(symbol, symbol) != symbol:
                symbol = groups[symbol]
            return symbol

        for _, (source, target), _ in _transfers(self.out).values():
            if self._lies(source) and self._lies(target):
                groups[root(source)] = root(target)
        kinds: dict[str, bool] = {}
        for stage in self.stages:
            row = self.row_of(stage)
            if row is None:
                continue
            number = next(n for n, v in enumerate(stage.args) if v.name == row)
            part = Expr.of(stage["extent"][number]) != Expr.name(self.name)
            for op in stage.walk():
                refs = (op.ref, op.get("own")) if op.name in _MEMORY else ()
                for ref in refs:
                    if (
                        not isinstance(ref, Ref)
                        or self.stacked(ref) is None
                        or not self._lies(ref.symbol)
                    ):
                        continue
                    item = next(i for i in ref.index if tile_variable(i) == row)
                    if part and not isinstance(item, At):
                        continue  # memory of this rank's shard alone
                    by_owner = part or stage.get("live") is not None
                    if kinds.setdefault(root(ref.symbol), by_owner) != by_owner:
                        detail = f"rows of `{ref.symbol}` lie by owner for some tasks, side by side for others"
                        _fail(op, detail)

    def _lies(self, symbol: str) -> bool:
        """Whether the places of rows in ``symbol`` are those of the tasks: of what has a row for each there is,
        they are side by side always."""
        declared = self.out.declarations[symbol]
        if self.out.base(symbol) not in self.tall:
            return False
        long = Expr.of(declared["dims"][0]) == Expr.name(self.name)
        return not (long and (declared.name == "buffer" or declared.get("over") is None))

    def stacked(self, ref: Ref) -> int | None:
        """Axes before the rows of what ``ref`` names; None where it has none."""
        axes = self.tall.get(self.out.base(ref.symbol))
        return None if axes is None else len(self.out.dims[ref.symbol]) - axes

    # Values -------------------------------------------------------------------------------------

    def ends(self) -> tuple[list[int], list[int]]:
        """The values of the extent, without its capacity, that begin and end a range of equal structure."""
        unit, least = self.unit, 1
        declared = self.out.program.declared(self.name)
        if declared.get("least") is not None:
            least = int(declared["least"])
        values = np.arange(-(-least // unit), self.capacity // unit + 1, dtype=np.int64) * unit
        if not len(values) or self.capacity % unit:
            _fail(declared, f"its capacity is not a multiple of {unit}, or below its least value")
        env = {**self.out.env, self.name: values}
        kinds: list[Ints] = []
        for stage in self.stages:
            if self.row_of(stage) is None:
                continue
            number = next(n for n, e in enumerate(stage["extent"]) if self.name in Expr.of(e).names)
            length = evaluate(stage.get("live", stage["extent"][number]), env, stage)
            kinds.append(-(-length // int(stage["tile"][number])))
        for tensor in self.tensors():
            if tensor.symbol in self.tall and tensor.get("channel_rows") is not None:
                length = values if tensor.get("over") is None else values // self.world
                kinds.append(-(-length // int(tensor["channel_rows"])))
        change = np.zeros(len(values), dtype=bool)
        change[0] = True
        for kind in kinds:
            change[1:] |= (
                np.broadcast_to(kind, values.shape)[1:] != np.broadcast_to(kind, values.shape)[:-1]
            )
        first = np.flatnonzero(change)
        last = np.append(first[1:] - 1, len(values) - 1)
        lower, upper = ([int(values[n]) for n in some] for some in (first, last))
        return [v for v in lower if v != self.capacity], [v for v in upper if v != self.capacity]

    def placed(self, small: Op) -> None:
        """Each access in a stage begins where it does at the capacity, in the user's whole tensors among the
        rows that are there."""
        env = environment(small)
        value = int(env[self.name])
        for stage in self.stages:
            row = self.row_of(stage)
            if row is None:
                continue
            number = next(n for n, v in enumerate(stage.args) if v.name == row)
            ranks = np.arange(self.world, dtype=np.int64)
            tile = loop_tiles(stage, {**env, "RANK": ranks}, self.world)[number]
            fields = {
                f"{row}.{field}": np.asarray(array).ravel()
                for field, array in (
                    ("start", tile.start),
                    ("stop", tile.stop),
                    ("tile", tile.tile),
                )
            }
            count = tile.start.shape[1]
            here: dict[str, Any] = {**env, **fields, "RANK": np.repeat(ranks, count)}
            start = fields[f"{row}.start"]
            cut = stage.get("live") is not None
            gap = (self.capacity - value) // self.world if cut else 0
            segment = self.capacity // self.world
            closed = start - (start // segment * gap if cut else 0)
            for op in stage.walk():
                if op.name not in _MEMORY:
                    continue
                for ref in (op.ref, op.get("own")):
                    if not isinstance(ref, Ref) or self.stacked(ref) is None:
                        continue
                    item = next(i for i in ref.index if tile_variable(i) == row)
                    self.place(op, ref, item, here, start, closed)

    def place(
        self, op: Op, ref: Ref, item: Index, here: dict[str, Any], start: Ints, closed: Ints
    ) -> None:
        declared = self.out.declarations[ref.symbol]
        at = evaluate(item.start, here, op) if isinstance(item, At) else start
        long = Expr.of(declared["dims"][0]) == Expr.name(self.name)
        if long and (declared.name == "buffer" or declared.get("over") is None):
            wanted = closed
        elif isinstance(item, At):
            wanted = evaluate(item.start, {**here, self.name: self.capacity}, op)
        else:
            wanted = start
        if np.any(np.broadcast_to(at, start.shape) != wanted):
            _fail(op, f"with {self.name} = {here[self.name]} `{ref}` begins at another row")

    def copied(self, small: Expansion) -> None:
        """Each transfer copies from and to where it does at the capacity, as many rows there as here."""
        whole, part = _transfers(self.out), _transfers(small)
        value = int(small.env[self.name])
        for number, (op, sides, places) in part.items():
            for side, symbol in enumerate(sides):
                if symbol in self.closed:
                    live, axes = value // self.world, len(self.out.dims[symbol])
                    at = 2 if side == 0 else places.shape[1] - axes
                    row = places[:, at]
                    places[:, at] = row // live * (self.capacity // self.world) + row % live
            known = set(map(tuple, whole[number][2].tolist()))
            if not all(tuple(place) in known for place in places.tolist()):
                _fail(op, f"with {self.name} = {value} it copies other rows")

    def apart(self, out: Expansion) -> None:
        """Where rows lie side by side, two calls with other numbers of them do not meet there."""
        if not self.closed or heard(out).all():
            return
        _fail(
            out.declarations[min(self.closed)],
            "its rows are other ranks' in another call, and not every rank hears from all between the two",
        )


def heard(out: Expansion) -> npt.NDArray[np.bool_]:
    """[world, world]: whether a rank waits in each call for a signal of another one, and so of each."""
    found = np.eye(out.world, dtype=bool)
    for wait in out.syncs:
        for notify in out.syncs:
            if not wait.wait or notify.wait or wait.symbol != notify.symbol:
                continue
            element = np.unique(np.stack((wait.rank, wait.home, wait.flat), axis=1), axis=0)
            told = np.unique(np.stack((notify.rank, notify.home, notify.flat), axis=1), axis=0)
            same = (element[:, None, 1:] == told[None, :, 1:]).all(axis=2)
            one, other = np.nonzero(same)
            found[element[one, 0], told[other, 0]] = True
    return found


def _transfers(out: Expansion) -> dict[int, tuple[Op, tuple[str, str], Ints]]:
    """For each transfer, by its number in the program: what it copies from and to, and rank, peer, and where both
    sides begin.

    Of one whose rows are not there in a call there is nothing, so those that are there are not counted.
    """
    numbers = {id(op): number for number, op in enumerate(out.program.walk())}
    sides: dict[int, list[Any]] = {}
    for access in out.accesses:
        if access.pair >= 0:
            sides.setdefault(access.pair, []).append(access)
    found: dict[int, tuple[Op, tuple[str, str], Ints]] = {}
    for pair in sides.values():
        source, target = sorted(pair, key=lambda access: access.write)
        here, there = ((a.hi - a.lo).prod(axis=1) for a in (source, target))
        if here.shape != there.shape or np.any(here != there):
            _fail(source.op, "it copies from another number of elements than to")
        columns = (source.rank[:, None], target.home[:, None], source.lo, target.lo)
        places = np.concatenate(columns, axis=1)
        number = numbers[id(source.op)]
        if number in found:
            places = np.concatenate((found[number][2], places))
        found[number] = (source.op, (source.symbol, target.symbol), places)
    return found


def _sides(agent: Op) -> tuple[Ref, ...]:
    """What a collective of the library reads and writes; nothing for other agents."""
    if agent.name != "collective":
        return ()
    assert agent.ref is not None
    return agent.ref, agent["to"]


def _names(value: object) -> frozenset[str]:
    """The names in the expressions of an attribute."""
    if isinstance(value, Expr):
        return value.names
    if isinstance(value, Range):
        return value.lo.names | value.hi.names
    if isinstance(value, At):
        return value.start.names
    if isinstance(value, tuple):
        return frozenset[str]().union(*map(_names, value))
    if isinstance(value, Ref):
        return _names(value.index)
    return frozenset()


def _fail(op: Op, detail: str) -> NoReturn:
    raise RowsError(op.span, name=op.name, detail=detail)
