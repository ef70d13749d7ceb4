"""What a run shows, from its raw JSON alone: each figure with the limit that it is held against.

    python bench/run.py --summary bench/results/grid_h200x8.json

Ratios with an interval are medians over rounds of the time of the best baseline over ours in the same
round (:mod:`bench.paired`); the best baseline of a case is the variant with the least median of its own.
All other figures are ratios of medians. Ours is what a plain call chooses, eager or in a graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import environment, stats
from bench.cases import AG_GEMM, EXTRA, GEMM, GEMM_AR, GEMM_RS, ROWS
from bench.stats import CaseResult
from bench.tables import gpus, number, render

LOSS = 0.99
IN_TURN_LEAST = {AG_GEMM: 1.30, GEMM_RS: 1.35}
# (kind, M, K, N) of one rank, and the least efficiency.
EFFICIENCY_LEAST = (
    ((AG_GEMM, 8192, 8192, 7168), 0.97),
    ((AG_GEMM, 8192, 4096, 2816), 0.92),
    ((AG_GEMM, 4096, 8192, 7168), 0.94),
    ((GEMM_RS, 8192, 3584, 8192), 0.95),
    ((GEMM_RS, 8192, 1376, 4096), 0.95),
    ((GEMM_RS, 4096, 3584, 8192), 0.92),
)
BASELINE_LEAST = (((GEMM_AR, 16, 3584, 8192), 1.20), ((GEMM_AR, 64, 3584, 8192), 1.20))
SMALL_IN_TURN_LEAST = (((GEMM_RS, 1024, 3584, 8192), 1.05), ((AG_GEMM, 1024, 8192, 7168), 1.05))
ERROR_MOST = 1.10
HOST_MOST_US = 60.0
GEMM_GEOMEAN_LEAST, GEMM_EACH_LEAST = 1.00, 0.97


# Figures of single cells that have a limit.
PROMISED = len(EFFICIENCY_LEAST) + len(BASELINE_LEAST) + len(SMALL_IN_TURN_LEAST)


@dataclass(frozen=True, slots=True)
class Claim:
    """``figure`` against ``limit``; ``holds`` is None where it was not ``measured``, or has no limit."""

    text: str
    figure: str
    limit: str
    holds: bool | None
    measured: bool = True

    @property
    def verdict(self) -> str:
        """``holds``, ``MISSED``, or ``-``."""
        return {True: "holds", False: "MISSED", None: "-"}[self.holds]


def results_of(run: dict[str, Any]) -> list[CaseResult]:
    """The cases of a run's JSON; every derived figure is computed anew from the samples."""
    return [CaseResult.from_json(case) for case in run["cases"]]


def claims(run: dict[str, Any]) -> list[Claim]:
    """Everything that the run says something about."""
    measured = [r for r in results_of(run) if r.skipped is None]
    fused = [r for r in measured if r.kind != GEMM]
    worlds = sorted({r.world for r in fused})
    found: list[Claim] = []
    for world in worlds:
        chosen = [r for r in fused if r.world == world]
        cells = _cells(chosen, run["not_measured"])
        made = [*_never_slower(chosen), *_in_turn(chosen), *cells, *_quality(chosen)]
        found += [_on(world, claim) for claim in made] if len(worlds) > 1 else made
    return found + _products([r for r in measured if r.kind == GEMM])


def unmeasured(run: dict[str, Any]) -> list[str]:
    """The cells that single figures are promised for and that the run has not measured, one a figure."""
    known = {(r.kind, r.m, r.k, r.n) for r in results_of(run) if r.skipped is None}
    promised = (*EFFICIENCY_LEAST, *BASELINE_LEAST, *SMALL_IN_TURN_LEAST)
    return [
        f"{kind} {m}x{k}x{n}" for (kind, m, k, n), _ in promised if (kind, m, k, n) not in known
    ]


def summary(run: dict[str, Any]) -> str:
    """The claims as text, with the losses, and what failed or was left out."""
    results = results_of(run)
    lines = [f"suite {run['suite']}, {gpus(run['world'])}, {run['date']}"]
    lines.append(environment.hardware_line(run))
    rows = [[c.text, c.figure, c.limit, c.verdict] for c in claims(run)]
    lines.append(render(("", "figure", "limit", ""), rows))
    lines += losses(results)
    lines += [
        f"failed: {result.name}, {candidate.name}: {candidate.failed}"
        for result in results
        for candidate in result.candidates
        if candidate.failed is not None
    ]
    lines += [f"skipped: {r.name}: {r.skipped}" for r in results if r.skipped is not None]
    if run["not_measured"]:
        lines.append(f"not measured ({run['stopped']}): {', '.join(run['not_measured'])}")
    return "\n".join(lines)


def losses(results: Iterable[CaseResult]) -> list[str]:
    """A line for each cell whose median ratio is below 1, the worst first."""
    found = [(r.over_baseline, r) for r in results if r.over_baseline is not None]
    slower = sorted(
        ((p.ratio, str(p), r) for p, r in found if p.ratio < 1), key=lambda x: (x[0], x[2].name)
    )
    return [
        f"slower: {r.name}{_among(r)}: {text} of {_name(r.best_baseline)}, by {_name(r.ours)}"
        for _, text, r in slower
    ]


def checksums(runs: Sequence[dict[str, Any]]) -> Claim:
    """Whether processes that measured the same cell on the same inputs got the same bits."""
    seen: dict[tuple[Any, ...], set[str]] = {}
    times: dict[tuple[Any, ...], int] = {}
    for run in runs:
        for result in results_of(run):
            for c in result.candidates:
                if c.family == stats.OURS and c.checksum is not None and c.failed is None:
                    seed = run["settings"]["seed"]
                    key = result.name, result.world, seed, c.name, str(c.schedule)
                    seen.setdefault(key, set()).add(c.checksum)
                    times[key] = times.get(key, 0) + 1
    shared = [key for key, count in times.items() if count > 1]
    same = sum(len(seen[key]) == 1 for key in shared)
    return Claim(
        "same bits in other processes",
        f"{same} of {len(shared)} results",
        "all",
        same == len(shared) if shared else None,
    )


def _never_slower(results: list[CaseResult]) -> list[Claim]:
    found = [(p, r) for r in results if (p := r.over_baseline) is not None]
    missing = len(results) - len(found)
    lost = sum(p.below(LOSS) for p, _ in found)
    without = f", {missing} without a figure" if missing else ""
    text = f"cells with the 95 % interval below {LOSS}"
    made = [Claim(text, f"{lost} of {len(found)}{without}", "0", lost == 0 and not missing)]
    if found:
        worst, cell = min(found, key=lambda pair: pair[0].ratio)
        where = f"{worst} {cell.name} ({_name(cell.best_baseline)}; {_name(cell.ours)})"
        made.append(Claim("worst cell, ratio [interval]", where, "", None))
    return made


def _in_turn(results: list[CaseResult]) -> list[Claim]:
    made = []
    for kind, least in IN_TURN_LEAST.items():
        chosen = [r for r in results if r.kind == kind and r.m == ROWS and EXTRA not in r.origin]
        if not chosen:
            continue
        known = [s for r in chosen if (s := r.speedup) is not None]
        mean = stats.geometric_mean(known)
        text = f"{kind} at M = {ROWS}: geomean over in turn"
        figure = f"{number(mean, 3)}, {len(known)} of {len(chosen)} cells"
        made.append(Claim(text, figure, f">= {least:.2f}", _at_least(mean, least)))
    return made


def _cells(results: list[CaseResult], missing: Sequence[str]) -> list[Claim]:
    """The cells that single figures are promised for, as far as they belong to the run."""

    def of(
        cells: Iterable[tuple[tuple[str, int, int, int], float]],
        what: str,
        figure: Callable[[CaseResult], float | None],
    ) -> list[Claim]:
        made = []
        for (kind, m, k, n), least in cells:
            name = f"{kind} {m}x{k}x{n}"
            found = [r for r in results if (r.kind, r.m, r.k, r.n) == (kind, m, k, n)]
            if found or name in missing:
                value = figure(found[0]) if found else None
                shown = number(value, 3) if found else "not measured"
                holds = _at_least(value, least) if value is not None or not found else False
                text = f"{name}: {what}"
                made.append(Claim(text, shown, f">= {least:.2f}", holds, bool(found)))
        return made

    def over_best(r: CaseResult) -> float | None:
        return (
            None if r.best_baseline is None else stats.ratio(r.best_baseline.median_us, r.ours_us)
        )

    return [
        *of(EFFICIENCY_LEAST, "efficiency", lambda r: r.efficiency),
        *of(BASELINE_LEAST, "over the best of in turn, one-shot, two-shot", over_best),
        *of(SMALL_IN_TURN_LEAST, "over in turn", lambda r: r.speedup),
    ]


def _quality(results: list[CaseResult]) -> list[Claim]:
    errors = [(e, r) for r in results if (e := error_ratio(r)) is not None]
    made = []
    if errors:
        worst, cell = max(errors, key=lambda pair: pair[0])
        figure = f"{worst:.3f} ({cell.name}, {len(errors)} cells)"
        text = "largest error over that of in turn"
        made.append(Claim(text, figure, f"<= {ERROR_MOST:.2f}", worst <= ERROR_MOST))
    made += _origins(results)
    own = [(c, r) for r in results for c in r.candidates if c.family == stats.OURS]
    repeated = [c.repeats for c, _ in own if c.failed is None and c.repeats is not None]
    if repeated:
        figure = f"{sum(repeated)} of {len(repeated)} candidates"
        made.append(Claim("same bits in two calls", figure, "all", all(repeated)))
    eager = [
        (c.host_us, c, r)
        for c, r in own
        if c.host_us is not None and not c.name.endswith(" graph") and c.failed is None
    ]
    judged = [x for x in eager if x[1].name == stats.TUNED] or eager
    if judged:
        most, candidate, cell = max(judged, key=lambda x: x[0])
        full = sum(c.queue_full for _, c, _ in judged)
        figure = f"{most:.0f} us ({cell.name}, {candidate.name}; {full} with a full queue)"
        text = "host time of an eager call, largest"
        made.append(Claim(text, figure, f"<= {HOST_MOST_US:.0f} us", most <= HOST_MOST_US))
    return made


def _origins(results: Iterable[CaseResult]) -> list[Claim]:
    """Where the schedules are from that plain calls took, by the first words."""
    plain = [c for r in results for c in r.candidates if c.name == stats.TUNED]
    words = [re.split(r" \(| \S+=|\d", c.origin)[0].strip() for c in plain if c.origin is not None]
    if not words:
        return []
    counts = [f"{words.count(word)} {word}" for word in sorted(set(words))]
    return [Claim("schedules of plain calls", ", ".join(counts), "", None)]


def error_ratio(result: CaseResult) -> float | None:
    """The error of ours over that of NCCL and cuBLAS in turn, its larger variant."""
    ours = result.ours
    turns = [c.error for c in result.candidates if c.family == stats.IN_TURN and c.error]
    return None if ours is None or not turns else stats.ratio(ours.error, max(turns))


def _products(results: list[CaseResult]) -> list[Claim]:
    found = [(p, r) for r in results if (p := r.over_baseline) is not None]
    if not found:
        return []
    mean = stats.geometric_mean([p.ratio for p, _ in found])
    worst, cell = min(found, key=lambda pair: pair[0].ratio)
    return [
        Claim(
            f"one GPU: products over cuBLAS, geomean of {len(found)}",
            number(mean, 3),
            f">= {GEMM_GEOMEAN_LEAST:.2f}",
            _at_least(mean, GEMM_GEOMEAN_LEAST),
        ),
        Claim(
            "one GPU: least ratio",
            f"{worst} {cell.name} ({_name(cell.ours)})",
            f">= {GEMM_EACH_LEAST:.2f}",
            worst.ratio >= GEMM_EACH_LEAST,
        ),
        *structures(results),
    ]


def structures(results: Sequence[CaseResult]) -> list[Claim]:
    """For each schedule of the products: where it was the fastest of ours, and its geomean."""
    ratios: dict[str, list[float]] = {}
    won: dict[str, int] = {}
    best: list[float] = []
    for result in results:
        cublas = result.time_us(stats.CUBLAS)
        known: dict[str, float] = {}
        for c in result.candidates:
            over = stats.ratio(cublas, c.median_us) if c.family == stats.OURS else None
            if over is not None:
                # Of a schedule, the faster of eager calls and graphs counts.
                name = c.name.removesuffix(" graph")
                known[name] = max(over, known.get(name, 0.0))
        for name, value in known.items():
            ratios.setdefault(name, []).append(value)
        if known:
            winner = max(known, key=lambda name: known[name])
            won[winner] = won.get(winner, 0) + 1
            best.append(known[winner])
    rows = [
        Claim(
            f"one GPU: {name}",
            f"{number(stats.geometric_mean(values), 3)}, least {min(values):.3f}, "
            f"fastest in {won.get(name, 0)} of {len(values)}",
            "",
            None,
        )
        for name, values in ratios.items()
    ]
    if best:
        figure = f"{number(stats.geometric_mean(best), 3)}, least {min(best):.3f}"
        rows.append(Claim("one GPU: the fastest of ours in each cell", figure, "", None))
    return rows


def _at_least(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


def _on(world: int, claim: Claim) -> Claim:
    return Claim(f"{gpus(world)}: {claim.text}", claim.figure, claim.limit, claim.holds)


def _among(result: CaseResult) -> str:
    return "" if " on " in result.name or result.kind == GEMM else f" on {result.world}"


def _name(candidate: stats.Measured | None) -> str:
    return "-" if candidate is None else candidate.name
