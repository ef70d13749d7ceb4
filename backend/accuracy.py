"""How far a result is from its reference."""

from __future__ import annotations

import math

import torch

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


__all__ = ["finite_parts", "relative_error", "row_error"]
