"""How large a program may be: what is enumerated of it, at compile time, has to fit in memory."""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import Span, TilelinkError

# Tasks and iterations of one loop over all ranks. A row of the proof takes some hundred bytes.
MAX_ROWS = 2**23
MAX_EXTENT = 2**31 - 1  # indices are int32
# Elements of an axis that ranks share out: its owners are an array.
MAX_SHARED = 2**26


class TooLarge(TilelinkError):
    """A loop or an axis with more elements than can be enumerated before the launch."""

    code: ClassVar[str] = "too-large"
    message: ClassVar[str] = "{what}; the limit is {most:,} {unit}"
    hint: ClassVar[str] = "{advice}"


def check_rows(count: int, loop: str, span: Span | None) -> None:
    """TooLarge where a loop has more than MAX_ROWS iterations over all tasks and ranks.

    ``loop`` is what to call it, with its extents.
    """
    if count > MAX_ROWS:
        raise TooLarge(
            span,
            what=f"{loop} has {count:,} iterations over all tasks and ranks",
            most=MAX_ROWS,
            unit="iterations",
            advice="take larger tiles, or smaller extents: the synchronisation of each one is proven",
        )


def check_shared(length: int, tensor: str, axis: int, span: Span | None) -> None:
    """TooLarge where an axis that the ranks share out has more than MAX_SHARED elements."""
    if length > MAX_SHARED:
        raise TooLarge(
            span,
            what=f"axis {axis} of `{tensor}`, which the ranks share out, has {length:,} elements",
            most=MAX_SHARED,
            unit="elements",
            advice="share out a shorter axis: reshape the tensor to rows and columns, and move rows",
        )
