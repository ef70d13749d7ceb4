"""What a name or expression of a kernel body can stand for while it is being lowered.

Besides these kinds there are IR values (`tilelink.ir.Value`) and plain Python constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilelink.ir import Expr, Value


@dataclass(frozen=True, slots=True)
class Num:
    """An integer known as an expression: extents, loop scalars, bounds of tiles."""

    expr: Expr


@dataclass(frozen=True, slots=True)
class TileVar:
    """A loop tile; ``extent`` is what it walks, or None where it walks bounds."""

    value: Value
    extent: Expr | None

    @property
    def start(self) -> Expr:
        """The first global index."""
        return Expr.name(f"{self.value.name}.start")

    @property
    def stop(self) -> Expr:
        """One past the last global index."""
        return Expr.name(f"{self.value.name}.stop")


@dataclass(frozen=True, slots=True)
class MovedTile:
    """Arithmetic on a loop tile: ``start`` is the new start, or None where it is no shift."""

    tile: TileVar
    start: Expr | None


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A whole tensor: a parameter, an intermediate, or what an exchange fills."""

    name: str


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a value, not called yet."""

    owner: Any
    name: str


def describe(value: Any) -> str:
    """``value`` in the words of an error message."""
    if isinstance(value, Value):
        return f"a value of type `{value.type}`"
    if isinstance(value, TileVar):
        return f"the tile variable `{value.value.name}`"
    if isinstance(value, MovedTile):
        return describe(value.tile)
    if isinstance(value, TensorRef):
        return f"the tensor `{value.name}`"
    if isinstance(value, Num):
        return f"`{value.expr}`"
    if isinstance(value, Method):
        return f"the method `{value.name}`"
    if isinstance(value, tuple):
        return f"`({', '.join(map(_bare, value))})`"
    if isinstance(value, int | float | str | None):
        return f"`{value!r}`"
    return f"the class `{value.__name__}`" if isinstance(value, type) else type(value).__name__


def _bare(value: Any) -> str:
    """An item of a tuple, without quotes around it."""
    text = describe(value)
    return text[text.find("`") + 1 : text.rfind("`")] if "`" in text else text
