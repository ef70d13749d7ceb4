"""Ratios of two candidates that were timed in the same rounds, with an interval.

In each round both meet the same clocks, temperature and neighbours, so their ratio varies less than
either time. The interval is that of the median by order statistics: of n independent ratios with median
m, the number below m is binomial (n, 1/2), so the k-th smallest and the k-th largest enclose m with
probability 1 - 2 P(B(n, 1/2) < k). The largest k that keeps 95 % is taken. No shape of the distribution is
assumed (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2: confidence interval for a quantile).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Paired:
    """``ratio``: the median over rounds; ``low``, ``high``: its interval, None of too few rounds."""

    ratio: float
    low: float | None
    high: float | None
    rounds: int

    def below(self, limit: float) -> bool:
        """Whether the whole interval lies below ``limit``."""
        return self.high is not None and self.high < limit

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f} [too few rounds]"
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval_rank(count: int, confidence: float = CONFIDENCE) -> int | None:
    """The k of the k-th smallest and k-th largest of ``count`` that enclose the median; None if none do."""
    outside, chosen = 0.0, None
    for k in range(1, count // 2 + 1):
        outside += 2 * math.comb(count, k - 1) / 2**count
        if 1 - outside < confidence:
            break
        chosen = k
    return chosen


def paired(above: Sequence[float], below: Sequence[float]) -> Paired | None:
    """``above[i] / below[i]`` over the rounds i; None of nothing, or of different numbers of rounds."""
    if not above or len(above) != len(below):
        return None
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    k = interval_rank(len(ratios))
    low, high = (None, None) if k is None else (ratios[k - 1], ratios[-k])
    return Paired(statistics.median(ratios), low, high, len(ratios))
