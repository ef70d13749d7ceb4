"""From samples to figures: results of candidates and cases, their JSON form, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Largest relative error that counts as correct: bf16 operands give up to a few 1e-3.
TOLERANCE = 1e-2

CUBLAS = "cublas"
NCCL = "nccl"
IN_TURN = "in_turn"
ASYNC_TP = "async_tp"
OURS = "tilelink"


@dataclass(slots=True)
class Measured:
    """One candidate on one case.

    ``family``: one of the names above. ``error``: the largest relative error of a row over all
    ranks and inputs, None where there is nothing to compare. ``samples_us``: microseconds, each the
    largest over the ranks. ``rank_median_us``: the median of each rank alone. ``setup_s``: seconds
    to build and check. ``failed``: why there are no samples.
    """

    name: str
    family: str
    schedule: dict[str, Any] | None = None
    error: float | None = None
    samples_us: list[float] = field(default_factory=list)
    rank_median_us: list[float] = field(default_factory=list)
    setup_s: float | None = None
    failed: str | None = None

    @property
    def median_us(self) -> float | None:
        """The median sample, or None where the candidate failed."""
        if self.failed is not None or not self.samples_us:
            return None
        return statistics.median(self.samples_us)


@dataclass(slots=True)
class CaseResult:
    """All candidates of one case. ``skipped``: why nothing was measured."""

    name: str
    kind: str
    m: int
    k: int
    n: int
    origin: str
    world: int
    input_sets: int = 0
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
    def efficiency(self) -> float | None:
        """``bound_us`` over the time of the best of ours."""
        return ratio(self.bound_us, self.time_us(OURS))

    @property
    def speedup(self) -> float | None:
        """The best of both in turn, over the best of ours; above 1 is a win."""
        return ratio(self.time_us(IN_TURN), self.time_us(OURS))

    def to_json(self) -> dict[str, Any]:
        """Everything, with the derived figures beside the raw ones."""
        data = asdict(self)
        for raw, candidate in zip(data["candidates"], self.candidates, strict=True):
            raw["median_us"] = candidate.median_us
        return data | {
            "bound_us": self.bound_us,
            "efficiency": self.efficiency,
            "speedup_over_in_turn": self.speedup,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> CaseResult:
        """The result that :meth:`to_json` wrote; derived figures are computed anew."""
        derived = ("bound_us", "efficiency", "speedup_over_in_turn", "candidates")
        raw = [{k: v for k, v in c.items() if k != "median_us"} for c in data["candidates"]]
        kept = {key: value for key, value in data.items() if key not in derived}
        return CaseResult(**kept, candidates=[Measured(**c) for c in raw])


def ratio(above: float | None, below: float | None) -> float | None:
    """``above / below``, None where either is missing."""
    return None if above is None or below is None else above / below


def geometric_mean(values: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return statistics.geometric_mean(values) if values else None


HEADER = (
    "case (M x K x N)",
    "cuBLAS",
    "NCCL",
    "in turn",
    "async-TP",
    "tilelink",
    "schedule",
    "over in turn",
    "efficiency",
)


def table_rows(results: Sequence[CaseResult]) -> list[list[str]]:
    """One row of text cells a case under :data:`HEADER`; times in ms."""
    rows = []
    for case in results:
        if case.skipped is not None:
            rows.append([case.name, *["-"] * 5, f"skipped: {case.skipped}", "-", "-"])
            continue
        ours = case.best(OURS)
        rows.append(
            [
                case.name,
                milliseconds(case.time_us(CUBLAS)),
                milliseconds(case.time_us(NCCL)),
                _with_name(case.best(IN_TURN), IN_TURN),
                _with_name(case.best(ASYNC_TP), ASYNC_TP),
                milliseconds(case.time_us(OURS)),
                "failed" if ours is None else short_name(ours.name, OURS),
                number(case.speedup, 2),
                number(case.efficiency, 3),
            ]
        )
    return rows


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, two spaces between columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def milliseconds(us: float | None) -> str:
    """``1.234`` from 1234 microseconds, ``-`` from None."""
    return number(None if us is None else us / 1000, 3)


def number(value: float | None, digits: int) -> str:
    """``value`` with ``digits`` decimals, ``-`` from None."""
    return "-" if value is None else f"{value:.{digits}f}"


def short_name(name: str, family: str) -> str:
    """``copy_engine graph`` of ``tilelink copy_engine graph``."""
    return name.removeprefix(family).strip()


def _with_name(candidate: Measured | None, family: str) -> str:
    if candidate is None:
        return "-"
    how = short_name(candidate.name, family)
    return milliseconds(candidate.median_us) + (f" {how}" if how else "")
