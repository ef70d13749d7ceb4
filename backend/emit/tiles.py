"""How large a tile may be: the values of a kernel that Triton cannot hold are refused before it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tilelink.backend.emit.scope import Program, item_bytes, power_of_two
from tilelink.errors import TilelinkError
from tilelink.ir import Expr, Op, Value
from tilelink.schedules.schedule import MAX_TILE


class TileTooLarge(TilelinkError):
    """A value of a kernel with more elements than Triton allows a tile."""

    code: ClassVar[str] = "tile-too-large"
    message: ClassVar[str] = (
        "`{name}` is a tile of {shape} = {count:,} elements; the limit of Triton is {most:,}"
    )
    hint: ClassVar[str] = "{advice}"


@dataclass(slots=True)
class _Axis:
    """An axis of values: ``extent`` is that which a loop walks by tiles, empty where nothing does."""

    block: int
    extent: str = ""


def check_tiles(program: Program, launch: Op) -> None:
    """TileTooLarge at the first value of ``launch`` that no tile of Triton can hold.

    Its advice is of lengths with which all values of the launch fit.
    """
    axes = _axes(program, launch)
    large = [
        (op, value) for op, value in _values(launch) if _count(program, axes, value) > MAX_TILE
    ]
    if not large:
        return
    op, value = large[0]
    blocks = [_axis(program, axes, text).block for text in value.type.shape]
    raise TileTooLarge(
        op.span,
        name=value.name,
        shape=" x ".join(f"{block:,}" for block in blocks),
        count=math.prod(blocks),
        most=MAX_TILE,
        advice=_advice(program, axes, [value for _, value in large]),
    )


def step_bytes(program: Program, launch: Op) -> int:
    """Bytes of the tiles that a step of a main loop loads, which each stage holds; of the loop that loads most."""
    axes = _axes(program, launch)
    found = [0]
    for loop in launch.walk():
        if loop.name == "for_tiles" and any(op.name == "dot" for op in loop.body):
            loads = [op.results[0] for op in loop.body if op.name == "load"]
            found.append(sum(_count(program, axes, v) * item_bytes(v.type.dtype) for v in loads))
    return max(found)


def _values(launch: Op) -> Iterator[tuple[Op, Value]]:
    for op in launch.walk():
        for value in op.results:
            yield op, value


def _axes(program: Program, launch: Op) -> dict[str, _Axis]:
    """The axes that loops of ``launch`` walk, by the name of their variable."""
    found: dict[str, _Axis] = {}
    for op in launch.walk():
        variables = [v for v in op.args if v.type.is_tile]
        tiles, extents = op.get("tile") or (), op.get("extent") or ()
        if len(tiles) > len(variables):  # a stage counts its scalar variables too
            variables = list(op.args)
        for number, (variable, tile) in enumerate(zip(variables, tiles, strict=False)):
            extent = str(extents[number]) if number < len(extents) else variable.name
            least = 16 if variable.name in program.dotted else 1
            found[variable.name] = _Axis(max(least, power_of_two(int(tile))), extent)
    return found


def _axis(program: Program, axes: dict[str, _Axis], text: Expr | int | str) -> _Axis:
    """The axis that a dimension of a type names; one of a run-time length counts as one element here."""
    if str(text) in axes:
        return axes[str(text)]
    length = program.constant(text)
    return _Axis(power_of_two(length) if length is not None else 1)


def _count(program: Program, axes: dict[str, _Axis], value: Value) -> int:
    return math.prod(_axis(program, axes, text).block for text in value.type.shape)


def _advice(program: Program, axes: dict[str, _Axis], large: list[Value]) -> str:
    """What to give: the longest tile length of each value is halved until all of them fit."""
    given: dict[str, int] = {}
    for value in large:
        while _count(program, axes, value) > MAX_TILE:
            walked = [axes[text] for text in map(str, value.type.shape) if text in axes]
            longest = max(walked, key=lambda axis: axis.block, default=None)
            if longest is None or longest.block == 1:
                whole = [text for text in map(str, value.type.shape) if text not in axes]
                return f"walk the axes of `{value.name}` by `tk.tiles({', '.join(whole)})`"
            smaller = longest.block // 2
            for axis in axes.values():
                if axis.extent == longest.extent:
                    axis.block = min(axis.block, smaller)
            given[longest.extent] = smaller
    lengths = ",".join(f"{extent}={length}" for extent, length in sorted(given.items()))
    return f"make its tiles shorter: `--tile {lengths}`, or these `tiles` of the schedule"
