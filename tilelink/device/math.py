"""Elementwise functions that Triton lacks on some target or in its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent of fp32 ``x``; absolute error below 2e-7."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def erf(x):
    """The error function of fp32 ``x``."""
    return tl.erf(x)


@triton.jit
def floordiv(x, y):
    """Integer ``x / y`` rounded down, as Python has it; Triton's own ``//`` rounds towards zero."""
    rounded = x // y
    return tl.where((x % y != 0) & ((x < 0) != (y < 0)), rounded - 1, rounded)


@triton.jit
def floormod(x, y):
    """The rest of :func:`floordiv`: it has the sign of ``y``."""
    rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def integer_power(x, y, dtype: tl.constexpr):
    """``x`` to the power ``y`` in ``dtype``, int32 or int64, in which it wraps around.

    As in PyTorch, a negative power is 0, but for those of 1 and -1.
    """
    square = tl.cast(x, dtype)
    left = tl.cast(y, dtype)
    result = square * 0 + left * 0 + 1
    inverse = tl.where(square == 1, 1, tl.where(square == -1, 1 - 2 * (left & 1), 0))
    below = left < 0
    for _ in tl.static_range(dtype.primitive_bitwidth - 1):
        result = tl.where((left & 1) != 0, result * square, result)
        square = square * square
        left = left >> 1
    return tl.where(below, inverse, result)


@triton.jit
def power(x, y):
    """``x`` to the power ``y`` in fp32; a negative base takes integral exponents only, else NaN."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    signed = tl.where(odd, -size, tl.where(whole, size, float("nan")))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0, signed, size))
