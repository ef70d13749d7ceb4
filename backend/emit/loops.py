"""Tile loops: the order in which tiles are visited, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from tilelink.backend.emit.scope import LANES, Dim, Scope, power_of_two, refuse
from tilelink.ir import Expr, Op, Value


@dataclass(frozen=True, slots=True)
class Walk:
    """The order of a queue of tiles, as ``docs/ir.md`` defines it."""

    extent: tuple[Any, ...]
    tile: tuple[int, ...]
    axis: int = 0
    segment: Any = None
    segments: Any = None
    live: Any = None
    visit: Any = None
    group: int = 1
    interleave: bool = False
    positions: tuple[int, int] | None = None

    @property
    def begin(self) -> int:
        """The position of the order that the queue begins with."""
        return self.positions[0] if self.positions else 0

    @staticmethod
    def of(op: Op) -> Walk:
        """The walk that an op's attributes describe."""
        return Walk(
            tuple(op.get("extent", ())),
            tuple(op["tile"]) if op.get("tile") is not None else (),
            int(op.get("axis", 0)),
            op.get("segment"),
            op.get("segments"),
            op.get("live"),
            op.get("visit"),
            int(op.get("group", 1)),
            bool(op.get("interleave")),
            op.get("positions"),
        )


def ceildiv(scope: Scope, value: Any, by: int) -> str:
    """ceil(value / by) as text."""
    constant = scope.program.constant(value)
    if constant is not None:
        return str(-(-constant // by))
    return f"tl.cdiv({scope.expr(value)}, {by})"


def multiply(*factors: str) -> str:
    """A product, folded where all factors are numbers."""
    number = 1
    rest: list[str] = []
    for factor in factors:
        if factor.isdigit():
            number *= int(factor)
        else:
            rest.append(
                factor if factor.replace("_", "").isalnum() or "(" in factor else f"({factor})"
            )
    if not rest:
        return str(number)
    return " * ".join(([str(number)] if number != 1 else []) + rest)


def block_of(scope: Scope, name: str, tile: int) -> int:
    """The block that holds a tile: a power of two, at least 16 where a matrix product needs it."""
    return max(power_of_two(tile), 16 if name in scope.program.dotted else 1)


def sizes(op: Op, tiles: Sequence[Value], walk: Walk) -> list[int]:
    """The tile size of every variable; 1 for those that are scalars."""
    given = iter(walk.tile)
    found: list[int] = []
    scalars = len(tiles) != len(walk.tile)
    for variable in tiles:
        if not variable.type.is_tile and scalars:
            found.append(1)
            continue
        size = next(given, None)
        if size is None:
            raise refuse(op, f"no tile size for `{variable.name}`")
        found.append(int(size) if variable.type.is_tile else 1)
    return found


def announce(scope: Scope, loop: Op) -> list[str]:
    """Declare the tile variables of a loop and of those inside it before they are entered; their names."""
    found: list[str] = []
    for op in loop.walk():
        if op.name != "for_tiles":
            continue
        variables = [a for a in op.args if a.type.is_tile]
        limits = op.get("extent") or (None,) * len(variables)
        for variable, size, limit in zip(variables, op.get("tile", ()), limits, strict=False):
            if variable.name not in scope.dims:
                block = block_of(scope, variable.name, int(size))
                start = f"{_base(variable)}_start"
                # As `place_tile` finds it: a load is made one way, before the loop and in it.
                whole = None if limit is None else scope.program.constant(limit)
                exact, fits = whole is not None and whole % int(size) == 0, block == size
                bound = str(whole) if fits and whole is not None and not exact else ""
                unit = 1 if whole is None else gcd(size, whole)
                scope.dims[variable.name] = Dim(
                    block, str(size), exact and fits, start, "", fits, fits, bound, unit
                )
                found.append(variable.name)
    return found


def place_tile(
    scope: Scope,
    variable: Value,
    number: str,
    start: str,
    size: int,
    limit: Any,
    low: str = "0",
    segment: int | None = None,
) -> None:
    """Names of a tile variable: its start, stop and number.

    Tiles of a segment start at a multiple of ``segment``, and end at one, or in front of it.
    """
    if not variable.type.is_tile:
        scope.define(variable)
        scope.writer.let(scope.names[variable.name], number)
        return
    from tilelink.backend.emit.text import identifier

    base = identifier(variable.name)
    names = {part: f"{base}_{part}" for part in ("start", "stop", "tile")}
    scope.used.update(names.values())
    if names["start"] != start:
        scope.writer.let(names["start"], start)
    whole = scope.program.constant(limit) if low == "0" else None
    exact = whole is not None and whole % size == 0
    stop = f"{names['start']} + {size}"
    ends = whole if segment is None else segment
    unit = 1 if ends is None else gcd(size, ends)
    if not exact:
        stop = f"tl.minimum({stop}, {scope.expr(limit)})"
        # Of the smaller one of two numbers Triton does not know what divides both.
        if unit % LANES == 0 and variable.name in scope.program.innermost:
            stop = f"tl.multiple_of({stop}, {LANES})"
    scope.writer.let(names["stop"], stop)
    scope.writer.let(names["tile"], number)
    scope.names[f"{variable.name}.tile"] = names["tile"]
    block = block_of(scope, variable.name, size)
    length = str(size) if exact else f"({names['stop']} - {names['start']})"
    fits = block == size
    bound = str(whole) if fits and whole is not None and not exact else ""
    scope.dims[variable.name] = Dim(
        block, length, exact and fits, names["start"], names["stop"], fits, fits, bound, unit
    )
    most = scope.program.capacity(limit) if low == "0" and segment is None else None
    if whole is None and most is not None:
        dim = replace(
            scope.dims[variable.name], held=fits and most % size == 0, live=Expr.of(limit)
        )
        scope.dims[variable.name] = dim


def decode(scope: Scope, op: Op, tiles: Sequence[Value], walk: Walk, q: str) -> str:
    """Write the tile variables at queue position ``q``; returns the number of tiles a segment."""
    if walk.begin:
        q = scope.writer.let(scope.fresh(f"{tiles[walk.axis].name}_place"), f"{q} + {walk.begin}")
    tile_sizes = sizes(op, tiles, walk)
    per, columns, segments = _counts(scope, walk, tile_sizes)
    axis = walk.axis
    inside, i = q, "0"
    within = multiply(per, *columns)
    if not within.isdigit():
        # Divided by below: a product would bind too loosely.
        within = scope.writer.let(scope.fresh(f"{tiles[axis].name}_within"), within)
    walked = walk.segment is not None
    position = scope.fresh(f"{tiles[axis].name}_segment")
    if walked and segments != "1":
        i = f"{position}_i"
        if walk.interleave:
            if not segments.isalnum():
                segments = scope.writer.let(scope.fresh(f"{tiles[axis].name}_segments"), segments)
            scope.writer.let(i, f"{q} % {segments}")
            inside = f"{q} // {segments}"
        else:
            scope.writer.let(i, f"{q} // {within}" if within != "1" else q)
            inside = f"{q} % {within}" if within != "1" else "0"
    if walked:
        shown = walk.visit if walk.visit is not None else Expr.name("i")
        outer = scope.names.get("i")
        scope.names["i"] = i
        scope.writer.let(position, scope.expr(shown))
        del scope.names["i"]
        if outer is not None:
            scope.names["i"] = outer
    others = [number for number in range(len(tiles)) if number != axis]
    wide = multiply(*columns) if columns else "1"
    a, b = scope.fresh(f"{tiles[axis].name}_at"), scope.fresh(f"{tiles[axis].name}_rest")
    if wide == "1":
        scope.writer.let(a, inside)
        scope.writer.let(b, "0")
    elif walk.group == 1:
        place = scope.fresh(f"{tiles[axis].name}_place") if inside != q else q
        if place != q:
            scope.writer.let(place, inside)
        scope.writer.let(a, f"{place} // {wide}")
        scope.writer.let(b, f"{place} % {wide}")
    else:
        args = [inside, per, wide, str(walk.group)]
        scope.writer.call(f"{a}, {b} = device.grouped_tile(", args)
    size = tile_sizes[axis]
    length = walk.segment if walked else walk.extent[axis]
    if walked:
        _segment_tile(scope, tiles[axis], walk, position, a, size, per)
    else:
        place_tile(scope, tiles[axis], a, multiply_start(a, size), size, length)
    rest = b
    for place_, number in reversed(list(enumerate(others))):
        count = columns[place_]
        at = scope.fresh(f"{tiles[number].name}_at")
        if place_ == 0:
            scope.writer.let(at, rest)
        else:
            scope.writer.let(at, f"{rest} % {count}")
            after = scope.fresh(f"{tiles[number].name}_rest")
            rest = scope.writer.let(after, f"{rest} // {count}")
        place_tile(
            scope,
            tiles[number],
            at,
            multiply_start(at, tile_sizes[number]),
            tile_sizes[number],
            walk.extent[number],
        )
    return within


def multiply_start(at: str, size: int) -> str:
    """Where tile number ``at`` of tiles of ``size`` starts."""
    return at if size == 1 else f"{at} * {size}"


def _segment_tile(
    scope: Scope, variable: Value, walk: Walk, position: str, a: str, size: int, per: str
) -> None:
    segment = scope.expr(walk.segment, 5)
    start = f"{position} * {segment} + {multiply_start(a, size)}"
    constant = scope.program.constant(walk.segment)
    if walk.live is not None:
        assert constant is not None
        per = str(-(-constant // size))
    number = f"{position} * {per} + {a}" if per != "1" else position
    if walk.live is not None:
        end = scope.fresh(f"{variable.name}_end")
        scope.writer.let(end, f"{position} * {segment} + {scope.expr(walk.live, 4)}")
        scope.names[end] = end
        live = scope.program.constant(walk.live)
        both = None if live is None or constant is None else gcd(constant, live)
        place_tile(scope, variable, number, start, size, Expr.name(end), segment=both)
        dim = scope.dims.get(variable.name)
        if dim is not None:
            held = dim.fits and constant is not None and constant % size == 0
            dim = replace(dim, ends=False, held=held, live=walk.live)
            scope.dims[variable.name] = dim
        return
    if constant is not None and constant % size == 0:
        # Any multiple of the tile will do as the limit of a tile that is always whole.
        place_tile(scope, variable, number, start, size, size)
        dim = scope.dims.get(variable.name)
        whole = scope.program.constant(walk.extent[walk.axis])
        if dim is not None and whole is not None and whole % size:
            scope.dims[variable.name] = replace(dim, ends=False)
        return
    end = scope.fresh(f"{variable.name}_end")
    scope.writer.let(end, f"({position} + 1) * {segment}")
    scope.names[end] = end
    place_tile(scope, variable, number, start, size, Expr.name(end), segment=constant)
    if variable.name in scope.dims:
        scope.dims[variable.name] = replace(scope.dims[variable.name], ends=False)


def _counts(scope: Scope, walk: Walk, tile_sizes: list[int]) -> tuple[str, list[str], str]:
    axis = walk.axis
    length = walk.segment if walk.segment is not None else walk.extent[axis]
    per = ceildiv(scope, walk.live if walk.live is not None else length, tile_sizes[axis])
    columns = [
        ceildiv(scope, walk.extent[number], tile_sizes[number])
        for number in range(len(tile_sizes))
        if number != axis
    ]
    if walk.segments is not None:
        segments = scope.expr(walk.segments)
    elif walk.segment is None:
        segments = "1"
    else:
        ratio = scope.program.constant(Expr.of(walk.extent[axis]) // walk.segment)
        segments = (
            str(ratio)
            if ratio is not None
            else scope.expr(Expr.of(walk.extent[axis]) // walk.segment)
        )
    return per, columns, segments


def total(scope: Scope, op: Op, tiles: Sequence[Value], walk: Walk) -> str:
    """The number of positions of the queue, as text."""
    if walk.positions is not None:
        return str(walk.positions[1] - walk.positions[0])
    per, columns, segments = _counts(scope, walk, sizes(op, tiles, walk))
    return multiply(segments, per, *columns)


def segment_counts(scope: Scope, op: Op, tiles: Sequence[Value], walk: Walk) -> tuple[str, str]:
    """The positions of one segment, and the number of segments, as text."""
    per, columns, segments = _counts(scope, walk, sizes(op, tiles, walk))
    return multiply(per, *columns), segments


@contextmanager
def enter_tiles(
    scope: Scope,
    op: Op,
    tiles: Sequence[Value],
    walk: Walk,
    suffix: str,
    bounds: tuple[str, str] | None,
) -> Iterator[None]:
    """The loop over all tiles, in one thread of control, open for its body."""
    ranger = "tl.range" if suffix else "range"
    writer = scope.writer
    if bounds is not None:
        variable, size = tiles[0], walk.tile[0]
        start = f"{_base(variable)}_start"
        scope.names[f"{variable.name}.limit"] = bounds[1]
        writer.line(f"for {start} in {ranger}({bounds[0]}, {bounds[1]}, {size}{suffix}):")
        with writer.indent():
            number = f"({start} - {bounds[0]}) // {size}"
            end = Expr.name(f"{variable.name}.limit")
            place_tile(scope, variable, number, start, size, end, bounds[0] or "lo")
            yield
        return
    simple = len(tiles) == 1 and walk.segment is None and tiles[0].type.is_tile
    if simple:
        size = walk.tile[0]
        start = f"{_base(tiles[0])}_start"
        limit = scope.expr(walk.extent[0])
        writer.line(f"for {start} in {ranger}(0, {limit}, {size}{suffix}):")
        with writer.indent():
            place_tile(scope, tiles[0], f"{start} // {size}", start, size, walk.extent[0])
            yield
        return
    q = scope.fresh(f"{tiles[0].name}_q")
    writer.line(f"for {q} in {ranger}(0, {total(scope, op, tiles, walk)}{suffix}):")
    with writer.indent():
        decode(scope, op, tiles, walk, q)
        yield


def _base(variable: Value) -> str:
    from tilelink.backend.emit.text import identifier

    return identifier(variable.name)
