"""From samples to figures: results of candidates and cases, their JSON form, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.cases import GEMM
from bench.paired import Paired, paired

# Largest relative error that counts as correct, of the libraries compared with too, which may round parts of sums.
TOLERANCE = 1e-2

CUBLAS = "cublas"
NCCL = "nccl"
IN_TURN = "in_turn"
ASYNC_TP = "async_tp"
ONE_SHOT = "one_shot"
TWO_SHOT = "two_shot"
OURS = "tilelink"
# What a candidate of ours is compared with: whole operators that give the same result.
BASELINES = (IN_TURN, ASYNC_TP, ONE_SHOT, TWO_SHOT)
# Of ours, the schedule that a plain call chooses: the one that is judged, wherever it was measured.
TUNED = f"{OURS} tuned"


@dataclass(slots=True)
class Measured:
    """One candidate on one case.

    ``family``: one of the names above. ``error``: the largest relative error of a row over all
    ranks and inputs, None where there is nothing to compare. ``samples_us``: microseconds, each the
    largest over the ranks, a round each. ``rank_median_us``: the median of each rank alone. ``setup_s``:
    seconds to build and check. ``failed``: why there are no samples. ``repeats``: whether calls with the
    same inputs gave the same bits on every rank, before and after the rounds; ``checksum``: of those bits
    on all ranks. ``host_us``: microseconds that the host spends in a call, the median of the slowest
    rank; ``queue_full``: whether later calls of a batch took longer, since the device's queue was full.
    ``origin``: where the schedule is from, such as a table or the prediction of a model.
    """

    name: str
    family: str
    schedule: dict[str, Any] | None = None
    error: float | None = None
    samples_us: list[float] = field(default_factory=list)
    rank_median_us: list[float] = field(default_factory=list)
    setup_s: float | None = None
    failed: str | None = None
    repeats: bool | None = None
    checksum: str | None = None
    host_us: float | None = None
    queue_full: bool = False
    origin: str | None = None

    @property
    def median_us(self) -> float | None:
        """The median sample, or None where the candidate failed."""
        if self.failed is not None or not self.samples_us:
            return None
        return statistics.median(self.samples_us)


@dataclass(slots=True)
class CaseResult:
    """All candidates of one case. ``skipped``: why nothing was measured. ``calls``: in a row, of which a sample
    is the mean."""

    name: str
    kind: str
    m: int
    k: int
    n: int
    origin: str
    world: int
    input_sets: int = 0
    calls: int = 1
    seconds: float = 0.0
    skipped: str | None = None
    candidates: list[Measured] = field(default_factory=list)

    def best(self, family: str) -> Measured | None:
        """The fastest candidate of ``family`` that is correct, the first of equals."""
        timed = [c for c in self.candidates if c.family == family and c.median_us is not None]
        return min(timed, key=lambda c: c.median_us or 0.0, default=None)

    def time_us(self, family: str) -> float | None:
        """The median of the best of ``family``."""
        best = self.best(family)
        return None if best is None else best.median_us

    @property
    def bound_us(self) -> float | None:
        """max(cuBLAS alone, NCCL alone): what perfect overlap of the two would take."""
        parts = [self.time_us(CUBLAS), self.time_us(NCCL)]
        known = [part for part in parts if part is not None]
        return max(known) if len(known) == len(parts) else None

    @property
    def ours(self) -> Measured | None:
        """The candidate of ours that is judged: tuned, eager or in a graph; else the fastest of all."""
        tuned = [c for c in self.candidates if c.name.removesuffix(" graph") == TUNED]
        if not tuned:
            return self.best(OURS)
        timed = [c for c in tuned if c.median_us is not None]
        return min(timed, key=lambda c: c.median_us or 0.0, default=None)

    @property
    def ours_us(self) -> float | None:
        """The median of :attr:`ours`."""
        return None if self.ours is None else self.ours.median_us

    @property
    def best_baseline(self) -> Measured | None:
        """The baseline with the least median of its own, whatever its variant; for a product cuBLAS."""
        families = (CUBLAS,) if self.kind == GEMM else BASELINES
        found = [best for family in families if (best := self.best(family)) is not None]
        return min(found, key=lambda c: c.median_us or 0.0, default=None)

    @property
    def over_baseline(self) -> Paired | None:
        """The best baseline over ours, round by round; above 1 is a win."""
        ours, baseline = self.ours, self.best_baseline
        if ours is None or baseline is None:
            return None
        return paired(baseline.samples_us, ours.samples_us)

    @property
    def efficiency(self) -> float | None:
        """``bound_us`` over the time of ours."""
        return ratio(self.bound_us, self.ours_us)

    @property
    def speedup(self) -> float | None:
        """The best of both in turn, over ours; above 1 is a win."""
        return ratio(self.time_us(IN_TURN), self.ours_us)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the derived figures beside the raw ones."""
        data = asdict(self)
        for raw, candidate in zip(data["candidates"], self.candidates, strict=True):
            raw["median_us"] = candidate.median_us
        return data | {
            "bound_us": self.bound_us,
            "efficiency": self.efficiency,
            "speedup_over_in_turn": self.speedup,
            "over_best_baseline": None
            if self.over_baseline is None
            else asdict(self.over_baseline),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> CaseResult:
        """The result that :meth:`to_json` wrote; derived figures are computed anew."""
        derived = (
            "bound_us",
            "efficiency",
            "speedup_over_in_turn",
            "over_best_baseline",
            "candidates",
        )
        raw = [{k: v for k, v in c.items() if k != "median_us"} for c in data["candidates"]]
        kept = {key: value for key, value in data.items() if key not in derived}
        return CaseResult(**kept, candidates=[Measured(**c) for c in raw])


def ratio(above: float | None, below: float | None) -> float | None:
    """``above / below``, None where either is missing."""
    return None if above is None or below is None else above / below


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return statistics.geometric_mean(values) if values else None


def short_name(name: str, family: str) -> str:
    """``copy_engine graph`` of ``tilelink copy_engine graph``."""
    return name.removeprefix(family).strip()
