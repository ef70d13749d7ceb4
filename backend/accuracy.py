"""How far a result is from its reference, and how far it may be."""

from __future__ import annotations

import math

import torch

TOLERANCE = {"bf16": 8e-3, "fp16": 2e-3, "fp32": 1e-5}
"""The largest relative error of a row that rounding may explain, by the coarsest type that is rounded to.

Operands are the same on both sides. What differs is where numbers are rounded, and the order of sums. Rounding
the elements of a row moves it by about 0.4 u of its norm, n independent roundings by 0.4 u √n, where the unit
roundoff u is 2^-8 of bf16, 2^-11 of fp16 and 2^-24 of fp32. Contributions of ranks, intermediates and results are
rounded to 16 bits: 8e-3 is 2 u of bf16, 2e-3 is 4 u of fp16, which is 25 and 100 roundings of everything. Sums of
K products in fp32 round K times on each side, and are 0.4 u √(2 K) apart: 3e-6 for K = 8192; 1e-5 is that for
K = 90,000.

Rows must be long, or their terms must not cancel: a sum of one element that cancels has the error of its terms.
"""

# Rows that are compared at once: whole copies of large outputs in fp64 would need several times their memory.
_ROWS = 2048


def row_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest over rows of ‖actual − expected‖ / ‖expected‖, in fp64: one number, where ``expected`` lies.

    A row runs along the last axis; a vector or a number is one row. Where the expected row is zero the
    error is ‖actual‖. A NaN or an infinity on either side gives infinity, no rows at all 0. Raises
    ValueError where the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    worst = torch.zeros((), dtype=torch.float64, device=expected.device)
    if expected.numel() == 0:
        return worst
    width = expected.shape[-1] if expected.ndim else 1
    left, right = (t.detach().reshape(-1, width) for t in (actual, expected))
    for first in range(0, len(right), _ROWS):
        got, want = (t[first : first + _ROWS].to(worst) for t in (left, right))
        norm = want.norm(dim=1)
        error = (got - want).norm(dim=1) / torch.where(norm == 0, 1.0, norm)
        worst = torch.maximum(worst, torch.where(error.isfinite(), error, math.inf).max())
    return worst


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """:func:`row_error` as a number."""
    return float(row_error(actual, expected))


def finite_parts(
    actual: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both with 0 where neither is finite; None unless NaN and infinities stand at the same places."""
    odd = ~expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not torch.equal(odd, ~actual.isfinite()) or not bool(same[odd].all()):
        return None
    return actual.masked_fill(odd, 0), expected.masked_fill(odd, 0)


__all__ = ["TOLERANCE", "finite_parts", "relative_error", "row_error"]
