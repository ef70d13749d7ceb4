"""Integer division by zero, which is refused by what runs programs in PyTorch."""

from __future__ import annotations

from typing import ClassVar

import torch

from tilelink.errors import TilelinkError
from tilelink.ir import Op


class DivisionByZero(TilelinkError):
    """An integer that is divided by 0 in the data: each GPU makes something else of it."""

    code: ClassVar[str] = "division-by-zero"
    message: ClassVar[str] = "`{sign}` of integers divides by 0 here, {count} of {all}"
    hint: ClassVar[str] = "put something else in the place of zeros first: `tk.where(b == 0, 1, b)`"


def check_divisor(op: Op, divisor: torch.Tensor) -> None:
    """DivisionByZero where ``op`` is `floordiv` or `mod` and an element of ``divisor`` is 0."""
    if op.name not in ("floordiv", "mod"):
        return
    count = int((divisor == 0).sum())
    if count:
        sign = "//" if op.name == "floordiv" else "%"
        raise DivisionByZero(op.span, sign=sign, count=count, all=divisor.numel())
