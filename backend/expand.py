"""The concrete meaning of a fused program: extents, queue orders, sizes.

Everything here is arithmetic over NumPy arrays; nothing runs. ``docs/ir.md`` ("The fused program") is
the text that this module follows. Rows of accesses and of synchronisation are in
:mod:`tilelink.backend.expand_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from tilelink.errors import TilelinkError
from tilelink.ir import DTYPES, Expr, Op
from tilelink.ir.layout import ENCODINGS, PAYLOAD
from tilelink.ir.limits import check_rows

Ints: TypeAlias = npt.NDArray[np.int64]
Env: TypeAlias = Mapping[str, Any]


class UnknownExtent(TilelinkError):
    """An expression of a program names something that has no value at compile time."""

    code: ClassVar[str] = "unknown-extent"
    message: ClassVar[str] = "`{expr}` has no value here: `{name}` is not known"
    hint: ClassVar[str] = "extents, WORLD, RANK and the variables of enclosing loops are known"


class ZeroDivisor(TilelinkError):
    """An expression of a program divides by 0 on some rank, for some task."""

    code: ClassVar[str] = "zero-divisor"
    message: ClassVar[str] = "`{expr}` divides by 0 here"
    hint: ClassVar[str] = "an index or a condition has to have a value for every task of every rank"


@dataclass(frozen=True, slots=True)
class Tile:
    """The values of one loop variable: first index, one past the last, and tile number; int64, any shape.

    A scalar variable with value v has ``start = tile = v`` and ``stop = v + 1``.
    """

    start: Ints
    stop: Ints
    tile: Ints


def environment(program: Op) -> dict[str, int]:
    """Extents by name and ``WORLD``; a dynamic extent has its capacity."""
    env: dict[str, int] = {"WORLD": int(program.get("world", 1))}
    for op in program.find("extent"):
        env[op.symbol] = int(evaluate(op["value"], env, op))
    return env


def evaluate(value: Expr | int, env: Env, op: Op | None = None) -> Any:
    """An attribute or expression under ``env``: an int, or an array where a name is bound to one.

    Raises UnknownExtent at ``op`` where a name is unbound, ZeroDivisor where it divides by 0.
    """
    if not isinstance(value, Expr):
        return value
    span = op.span if op is not None else None
    try:
        with np.errstate(divide="raise"):
            return value.evaluate(env)
    except KeyError as missing:
        raise UnknownExtent(span, expr=str(value), name=missing.args[0]) from None
    except (FloatingPointError, ZeroDivisionError):
        raise ZeroDivisor(span, expr=str(value)) from None


def dims_of(declaration: Op, env: Env) -> tuple[int, ...]:
    """The shape in memory of a tensor, buffer, flag or counter: a tensor with ``over`` is its shard.

    The same on every rank.
    """
    dims = [int(evaluate(d, env, declaration)) for d in declaration["dims"]]
    over = declaration.get("over")
    held = declaration.get("role") in ("in", "out", "inout")
    if declaration.name == "tensor" and over is not None and held:
        dims[over] //= int(env["WORLD"])
    return tuple(dims)


def bytes_of(declaration: Op, env: Env) -> int:
    """The size in bytes of a tensor's shard, a buffer, a flag or a counter array on one rank.

    Half of a buffer of words that hold epochs is epochs.
    """
    item = 4 if declaration.name in ("flag", "counter") else DTYPES[declaration["dtype"]]
    size = int(np.prod(dims_of(declaration, env), dtype=np.int64)) * item
    words = declaration.get("words")
    return -(-size // PAYLOAD) * ENCODINGS[words].bytes if words else size


def queue(
    extents: Sequence[int],
    tiles: Sequence[int],
    env: Env,
    rows: int,
    *,
    axis: int = 0,
    segment: int | None = None,
    segments: int | None = None,
    live: int | None = None,
    visit: Expr | int | None = None,
    group: int = 1,
    interleave: bool = False,
    positions: tuple[int | None, int | None] = (None, None),
    op: Op | None = None,
) -> tuple[Tile, ...]:
    """The order of a tile loop or stage: for each variable a Tile of arrays ``[rows, positions]``.

    ``live``: elements of each segment that are there, the first ones. ``interleave``: positions take turns at
    the segments. ``positions``: those of the order, from the first on and below the second, that the queue has.
    ``env`` binds row variables (RANK, outer loops) to arrays of length ``rows`` or to ints; only ``visit`` may
    depend on them. Raises TooLarge at ``op`` where there are too many.
    """
    length = extents[axis] if segment is None else segment
    count = (extents[axis] // length if length else 0) if segments is None else segments
    tile = max(1, tiles[axis])
    whole, there = -(-length // tile), length if live is None else live
    per = -(-there // tile)
    others = [j for j in range(len(extents)) if j != axis]
    shape = [-(-extents[j] // max(1, tiles[j])) for j in others]
    nb = math.prod(shape)
    check_rows(rows * count * per * nb, loop_text(op), None if op is None else op.span)

    i = np.arange(count, dtype=np.int64)
    if isinstance(visit, Expr):
        wide = {k: v[:, None] if isinstance(v, np.ndarray) else v for k, v in env.items()}
        wide["i"] = i[None, :]
        order = evaluate(visit, wide, op)
        seg = np.broadcast_to(np.asarray(order, dtype=np.int64), (rows, count))
    else:
        seg = np.broadcast_to(i if visit is None else np.full(count, visit), (rows, count))

    r = np.arange(per * nb, dtype=np.int64)
    width = max(1, group * nb)
    first = r // width * group
    deep = np.maximum(1, np.minimum(per - first, group))
    a = first + r % width % deep
    b = r % width // deep

    def placed(values: Ints) -> Ints:
        """Of every segment (axis 1) and place in it (axis 2), by position."""
        values = np.broadcast_to(values, (rows, count, per * nb))
        values = values.swapaxes(1, 2) if interleave else values
        return values.reshape(rows, count * per * nb)[:, slice(*positions)]

    start = placed(seg[:, :, None] * length + a * tile)
    last = placed(seg[:, :, None] * length + there)
    found: list[Tile | None] = [None] * len(extents)
    found[axis] = Tile(start, np.minimum(start + tile, last), placed(seg[:, :, None] * whole + a))
    for j, number in zip(reversed(others), reversed(shape), strict=True):
        which = placed(b % max(1, number))
        b = b // max(1, number)
        begin = which * tiles[j]
        found[j] = Tile(begin, np.minimum(begin + tiles[j], extents[j]), which)
    return tuple(t for t in found if t is not None)


def loop_text(op: Op | None) -> str:
    """A stage or a loop in the words of an error."""
    if op is None:
        return "a loop"
    name = f"the stage @{op.symbol}" if op.ref is not None else "this loop"
    variables = ", ".join(value.name for value in op.args[: len(op.get("extent", (0,)))])
    if "extent" in dict(op.attrs):
        return f"{name} of `{variables}` over [{', '.join(map(str, op['extent']))}]"
    return f"{name} of `{variables}`"


def tile_sizes(op: Op, env: Env) -> tuple[int, ...]:
    """The tile size of every variable of a stage or tile loop; 1 for a scalar variable."""
    given = [int(evaluate(t, env, op)) for t in op.get("tile", ())]
    variables = op.args[: len(op["extent"])] if "extent" in dict(op.attrs) else op.args[:1]
    if len(given) == len(variables):
        return tuple(given)
    rest = iter(given)
    return tuple(next(rest, 1) if v.type.is_tile else 1 for v in variables)


def loop_tiles(op: Op, env: Env, rows: int) -> tuple[Tile, ...]:
    """The tiles of a stage or of a tile loop with constant extents: arrays ``[rows, positions]``."""
    extents = [int(evaluate(e, env, op)) for e in op["extent"]]
    segment = op.get("segment")
    segments, live = op.get("segments"), op.get("live")
    return queue(
        extents,
        tile_sizes(op, env),
        env,
        rows,
        axis=int(op.get("axis", 0)),
        segment=None if segment is None else int(evaluate(segment, env, op)),
        segments=None if segments is None else int(evaluate(segments, env, op)),
        live=None if live is None else int(evaluate(live, env, op)),
        visit=op.get("visit"),
        group=int(evaluate(op.get("group", 1), env, op)),
        interleave=bool(op.get("interleave")),
        positions=op.get("positions", (None, None)),
        op=op,
    )


def stage_tiles(stage: Op, env: Env, rank: int) -> dict[str, Tile]:
    """The queue of ``stage`` on ``rank``: for each variable the tiles by position, arrays ``[positions]``."""
    tiles = loop_tiles(stage, {**env, "RANK": np.array([rank], dtype=np.int64)}, 1)
    return {
        value.name: Tile(t.start[0], t.stop[0], t.tile[0])
        for value, t in zip(stage.args, tiles, strict=False)
    }


def owner_order(tensor: Op, env: Env) -> tuple[Ints, Ints]:
    """For every global index along ``over``: the rank that owns it, and its place in that rank's shard.

    Arrays ``[extent]``. A shard is its owner's elements in increasing order.
    """
    extent = int(evaluate(tensor["dims"][tensor["over"]], env, tensor))
    index = np.arange(extent, dtype=np.int64)
    world = int(env["WORLD"])
    rule = tensor.get("owner")
    owner = (
        index // max(1, extent // world) if rule is None else evaluate(rule, {**env, "e": index})
    )
    owner = np.broadcast_to(np.asarray(owner, dtype=np.int64), (extent,))
    place = np.zeros(extent, dtype=np.int64)
    for rank in range(world):
        mine = owner == rank
        place[mine] = np.arange(int(mine.sum()))
    return owner, place
