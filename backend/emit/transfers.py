"""Copies of regions by workers: where rows begin, how many there are, and how far apart they lie."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilelink.backend.emit.access import base, identifier_of, product, strides, times
from tilelink.backend.emit.scope import CannotEmit, Scope, item_bytes, refuse
from tilelink.ir import All, At, Expr, Index, Op, Range, Ref, Value


def transfer(scope: Scope, op: Op) -> None:
    """``transfer`` by one CTA: rows copied to the peer in 8-byte words where everything is even."""
    ref, to = op.ref, op["to"]
    assert ref is not None
    source, target = _region(scope, op, ref), _region(scope, op, to)
    dtype = str(scope.program.symbols[ref.symbol]["dtype"])
    source, target = _cut_as(source, target), _cut_as(target, source)
    if (source.rows, source.columns) != (target.rows, target.columns):
        raise _refuse(op, "a transfer between regions that split differently into rows")
    here = base(scope, ref.symbol)
    there = base(scope, to.symbol, scope.expr(op["peer"]))
    if scope.program.symbols[to.symbol].name == "tensor":
        raise refuse(op, "a transfer into a tensor of a peer; only buffers are shared")
    size = item_bytes(dtype)
    lengths = (source.columns, source.stride, target.stride, *source.shifts, *target.shifts)
    words = all(isinstance(v, int) and v * size % 16 == 0 for v in lengths)
    numbers: tuple[int | Expr, ...] = (source.columns, source.stride, target.stride)
    if words:
        numbers = tuple(int(v) * size // 8 for v in numbers if isinstance(v, int))
    cast = ".to(tl.pointer_type(tl.int64), bitcast=True)" if words else ""
    label = f"{identifier_of(to.symbol)}_push"
    pair = (f"{label}_from", f"{label}_to")
    scope.used.update(pair)
    for name, pointer, region in zip(pair, (here, there), (source, target), strict=True):
        scope.writer.line(f"{name} = {pointer}")
        for start in region.starts:
            scope.writer.line(f"{name} += {start}")
        if words:
            scope.writer.call(f"{name} = tl.multiple_of(", [f"{name}{cast}", "16"])
    texts = [scope.expr(n) for n in numbers]
    scope.writer.call("device.tile_push_data(", [*pair, source.rows, *texts])


def _refuse(op: Op, detail: str) -> CannotEmit:
    """The error for a transfer that another schedule of the tensor that moves does not have."""
    name = op["to"].symbol.partition(".")[0]
    advice = f"use the resource copy_engine for `{name}`, or a `moves.{name}.tile` that divides what a rank owns"
    return refuse(op, detail, advice)


def _cut_as(region: _Region, other: _Region) -> _Region:
    """A region without gaps cut into rows as long as those of ``other``, where they come out even."""
    rows = other.count
    if region.count != 1 or rows is None or product(rows, other.columns) != region.columns:
        return region
    return replace(region, rows=other.rows, count=rows, columns=other.columns, stride=other.columns)


@dataclass(frozen=True, slots=True)
class _Region:
    starts: tuple[str, ...]
    rows: str
    count: int | Expr | None  # of the rows, where it is known
    columns: int | Expr
    stride: int | Expr
    shifts: tuple[int | Expr, ...]  # steps in elements of everything that moves the start


def _region(scope: Scope, op: Op, ref: Ref) -> _Region:
    """A region as rows of equally many contiguous elements."""
    shape = scope.program.shape(ref.symbol)
    steps = strides(scope, ref.symbol)
    index: tuple[Index, ...] = ref.index or tuple(All() for _ in shape)
    starts: list[str] = []
    shifts: list[int | Expr] = []
    lengths: list[tuple[str, int | Expr | None, int | Expr, bool]] = []
    for item, whole, step in zip(index, shape, steps, strict=True):
        start, length, number = "0", scope.expr(whole), scope.program.constant(whole)
        full = isinstance(item, All)
        if isinstance(item, At | Value):
            value = item.value if isinstance(item, At) else item
            dim = scope.dims.get(value.name)
            start = scope.expr(item.start) if isinstance(item, At) else ""
            start = start or (dim.start if dim else scope.names[value.name])
            length, number = (dim.length, None) if dim else ("1", 1)
            if dim and (dim.exact or length.isdigit()):
                number = dim.block if dim.exact else int(length)
        elif isinstance(item, Range):
            start = scope.expr(item.lo)
            number = scope.program.length(item.lo, item.hi)
            length = str(number) if number is not None else scope.expr(item.hi - item.lo)
        elif isinstance(item, Expr):
            start, length, number = scope.expr(item), "1", 1
        if start != "0":
            constant = start.isdigit()
            shifts.append(int(start) * step if constant and isinstance(step, int) else step)
            wide = f"tl.cast({start}, tl.int64)"
            starts.append(times(start if constant else wide, scope.expr(step, 5)))
        lengths.append((length, number, step, full))
    # The longest run of whole axes at the end, with the axis before it, is contiguous. One element of an axis
    # that has more ends it: what lies before that axis lies further apart.
    kept = [
        entry
        for entry, whole in zip(lengths, shape, strict=True)
        if entry[1] != 1 or scope.program.constant(whole) != 1
    ] or lengths[-1:]
    inner = len(kept) - 1
    while inner > 0 and kept[inner][3]:
        inner -= 1
    while inner < len(kept) - 1 and kept[inner][1] == 1:
        inner += 1
    outer = [entry for entry in kept[:inner] if entry[1] != 1]
    rows: list[str] = []
    columns: int | Expr = 1
    for extent, count, _, _ in kept[inner:]:
        if count is None:
            rows.append(extent)
        else:
            columns = product(columns, count)
    if rows:  # a tile of run-time length: its rows one by one
        if kept[inner][1] is not None or len(rows) > 1 or outer:
            raise _refuse(
                op, "a transfer of tiles of which one may be short, and whose rows lie apart"
            )
        return _Region(tuple(starts), rows[0], None, columns, kept[inner][2], tuple(shifts))
    if not outer:
        return _Region(tuple(starts), "1", 1, columns, columns, tuple(shifts))
    while len(outer) > 1:
        (_, many, far, _), (_, count, near, _) = outer[-2:]
        if many is None or count is None or product(count, near) != far:
            break
        # The outer axis goes on where the inner one ends: they are one.
        both = product(many, count)
        outer[-2:] = [(scope.expr(Expr.of(both)), both, near, False)]
    if len(outer) > 1:
        name = op["to"].symbol.partition(".")[0]
        raise refuse(
            op,
            "a transfer of a region with more than one stride",
            f"use the resource none for `{name}`",
        )
    extent, count, step, _ = outer[0]
    return _Region(tuple(starts), extent, count, columns, step, tuple(shifts))
