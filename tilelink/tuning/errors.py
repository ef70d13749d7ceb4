"""Mistakes that only a measurement meets, one class each."""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import TilelinkError


class CannotMakeInputs(TilelinkError):
    """A kernel with tensors for which random numbers are no sensible values."""

    code: ClassVar[str] = "tune-inputs"
    message: ClassVar[str] = "cannot make inputs for `{kernel}`: `{tensor}` is {dtype}"
    hint: ClassVar[str] = "kernels of floating-point tensors can be tuned"
