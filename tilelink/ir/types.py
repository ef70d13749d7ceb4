"""Types of values: element type and tile shape."""

from __future__ import annotations

from dataclasses import dataclass

# Element types by their name in the language, with their size in bytes.
DTYPES: dict[str, int] = {
    "bf16": 2,
    "fp16": 2,
    "fp32": 4,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
FLOATS = ("bf16", "fp16", "fp32")
INTEGERS = ("int32", "int64")
# Order of promotion between two element types of arithmetic.
_RANKING = ("bool", "int32", "int64", "fp16", "bf16", "fp32")


@dataclass(frozen=True, slots=True)
class Type:
    """The type of a value: ``dtype[shape]``; no shape is a scalar; dtype ``tile`` is a loop tile.

    A dimension is a string: the name of a tile variable (``m``: as long as that tile), the text of an
    extent expression (``K``), or a number.
    """

    dtype: str
    shape: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.shape)}]" if self.shape else self.dtype

    @property
    def is_tile(self) -> bool:
        """Whether this is a loop tile: a range of an axis, not data."""
        return self.dtype == "tile"


TILE = Type("tile")
INDEX = Type("int32")


def promote(left: str, right: str) -> str:
    """The element type of arithmetic between two; bf16 with fp16 gives fp32."""
    if {left, right} == {"bf16", "fp16"}:
        return "fp32"
    return max(left, right, key=_RANKING.index)
