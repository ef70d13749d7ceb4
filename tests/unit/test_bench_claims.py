"""Suites against the paper's table, statistics against counting, claims and pages from made-up runs."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import (
    claims,
    comparisons,
    measurements,
    paired,
    performance,
    run,
    selection,
    stats,
    tables,
)
from bench.cases import (
    AG_GEMM,
    GEMM,
    GEMM_AR,
    GEMM_RS,
    SUITES,
    Case,
    all_reduce_cases,
    gemm_cases,
    grid_cases,
    mlp_cases,
    scaling_cases,
    small_m_cases,
)
from tests.unit.bench_fakes import header


def shapes(cases: list[Case], kind: str) -> set[tuple[int, int, int]]:
    return {(c.m, c.k, c.n) for c in cases if c.kind == kind}


def test_mlp_has_the_six_shapes_of_the_paper() -> None:
    """TileLink, arXiv 2503.20313, table 4, on eight ranks: (hidden, intermediate / 8)."""
    table = [(4096, 1376), (4096, 1792), (3584, 1792), (4608, 4608), (8192, 3584), (8192, 3696)]
    cases = mlp_cases(8)
    padded = {(8192, 4096, 2816)}
    wanted = {(8192, h, n) for h, i in table for n in (i, 2 * i)} | padded
    assert shapes(cases, AG_GEMM) == wanted and len(cases) == 19
    assert shapes(cases, GEMM_RS) == {(8192, i, h) for h, i in table}
    assert not any(case.unsupported(world) for case in cases for world in (2, 4, 8))
    # Cut in four, nothing is padded, and slices are twice as long.
    assert shapes(mlp_cases(4), GEMM_RS) == {(8192, 2 * i, h) for h, i in table}
    assert len(mlp_cases(4)) == 18


def test_small_m_and_all_reduce_have_the_promised_rows() -> None:
    rows = (128, 256, 512, 1024, 2048, 4096, 16384)
    small = small_m_cases(8)
    assert shapes(small, AG_GEMM) == {(m, 8192, 7168) for m in rows}
    assert shapes(small, GEMM_RS) == {(m, 3584, 8192) for m in rows}
    assert shapes(all_reduce_cases(8), GEMM_AR) == {
        (m, 3584, 8192) for m in (1, 16, 64, 256, 1024, 4096)
    }
    assert not any(case.unsupported(8) for case in (*small, *all_reduce_cases(8)))


def test_the_grid_is_all_of_them_once_and_named_cells_lead() -> None:
    grid = grid_cases(8)
    parts = [*mlp_cases(8), *small_m_cases(8), *all_reduce_cases(8)]
    assert set(grid) == set(parts) and len(grid) == len(parts) == 39
    named = [cell for cell, _ in (*claims.EFFICIENCY_LEAST, *claims.BASELINE_LEAST)]
    named += [cell for cell, _ in claims.SMALL_IN_TURN_LEAST]
    leading = [(c.kind, c.m, c.k, c.n) for c in grid[: len(set(named))]]
    assert set(named) == set(leading)


def test_scaling_cuts_weights_in_as_many_parts_as_ranks() -> None:
    cases = scaling_cases(4)
    assert {c.world for c in cases} == {2, 4} and len({c.name for c in cases}) == len(cases)
    assert all(c.n * (c.world or 0) == 2 * 28672 for c in cases if c.kind == AG_GEMM)
    assert all(c.k * (c.world or 0) == 28672 for c in cases if c.kind != AG_GEMM)
    assert {c.world for c in scaling_cases(8)} == {2, 4, 8}
    assert {c.k for c in scaling_cases(2, parallel=8) if c.kind == GEMM_AR} == {3584}


def test_products_are_those_of_the_grid_once() -> None:
    cases = gemm_cases(8)
    wanted = {(c.m, c.k, c.n) for c in grid_cases(8) if c.m >= 1024}
    assert shapes(cases, GEMM) == wanted and len(cases) == len(wanted)
    assert set(SUITES) == {
        *["mlp", "small-m", "allreduce", "grid", "scaling", "decode", "untuned", "gemm"]
    }
    assert SUITES["gemm"](4, None) == cases


def test_turns_share_products_among_the_ranks() -> None:
    cases = [Case(GEMM, m, 64, 64, "") for m in (1, 2, 3, 4, 5)] + [Case(AG_GEMM, 8, 64, 64, "")]
    assert [len(turn) for turn in run.turns(cases, 2)] == [1, 2, 2, 1]
    assert sorted(c.m for turn in run.turns(cases, 2) for c in turn) == [1, 2, 3, 4, 5, 8]


def covered(count: int, k: int) -> float:
    """How often the k-th smallest and largest enclose the median, by all ways to fall beside it."""
    hits = 0
    for sides in itertools.product((False, True), repeat=count):
        below = sum(sides)
        # The k-th smallest lies below the median if k values do, the k-th largest above it likewise.
        hits += below >= k and count - below >= k
    return float(hits / 2**count)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 9, 12, 15])
def test_interval_is_the_narrowest_that_covers(count: int) -> None:
    k = paired.interval_rank(count)
    if k is None:
        assert covered(count, 1) < 0.95
        return
    assert covered(count, k) >= 0.95
    assert k == count // 2 or covered(count, k + 1) < 0.95


def test_twenty_rounds_take_the_sixth_of_each_end() -> None:
    assert paired.interval_rank(20) == 6
    above = [100.0 + i for i in range(20)]
    found = paired.paired(above, [100.0] * 20)
    assert found is not None and (found.low, found.high) == (1.05, 1.14)
    assert found.ratio == pytest.approx(statistics.median(above) / 100)


def test_ratios_are_taken_round_by_round() -> None:
    # Both slow down together: the times vary by 3, their ratio does not at all.
    drift = [1.0, 1.5, 2.0, 3.0, 1.2, 1.1, 2.5]
    found = paired.paired([12 * d for d in drift], [10 * d for d in drift])
    assert found is not None and found.low == pytest.approx(1.2) == found.high
    assert str(found) == "1.200 [1.200, 1.200]"


def test_a_loss_lies_wholly_below() -> None:
    assert paired.paired([0.98] * 8, [1.0] * 8).below(0.99)  # type: ignore[union-attr]
    mixed = paired.paired([0.90] * 4 + [0.995] * 4, [1.0] * 8)
    assert mixed is not None and mixed.ratio < 0.99 and not mixed.below(0.99)
    few = paired.paired([0.5] * 5, [1.0] * 5)
    assert few is not None and few.low is None and not few.below(0.99)
    assert paired.paired([], []) is None and paired.paired([1.0], [1.0, 2.0]) is None


def candidate(name: str, family: str, us: float, **more: Any) -> stats.Measured:
    samples = [us * (1 + 0.001 * (i % 3 - 1)) for i in range(20)]
    return stats.Measured(name, family, samples_us=samples, **more)


def cell(case: Case, *, tuned: float = 90.0, **more: Any) -> stats.CaseResult:
    """A case with in turn at 120, async-TP at 100 in a graph, and ours at ``tuned``."""
    found = stats.CaseResult(case.name, case.kind, case.m, case.k, case.n, case.origin, 8)
    found.candidates = [
        candidate("cublas", stats.CUBLAS, 80.0),
        candidate("nccl", stats.NCCL, 40.0),
        candidate("in_turn", stats.IN_TURN, 125.0, error=2e-3, host_us=30.0),
        candidate("in_turn graph", stats.IN_TURN, 120.0, error=2e-3),
        candidate("async_tp", stats.ASYNC_TP, 110.0, error=2e-3),
        candidate("async_tp graph", stats.ASYNC_TP, 100.0, error=2e-3),
        candidate("tilelink tuned", stats.OURS, 1.1 * tuned, **({"host_us": 50.0} | more)),
        candidate("tilelink tuned graph", stats.OURS, tuned, error=2.1e-3, repeats=True),
        # Faster, but not what a plain call chooses: it is not judged.
        candidate("tilelink copy_engine", stats.OURS, 0.5 * tuned, error=2e-3, repeats=True),
    ]
    return found


def a_run(results: list[stats.CaseResult], suite: str = "grid", **more: Any) -> dict[str, Any]:
    data = {
        "kind": "bench",
        **header(),
        "suite": suite,
        "stopped": None,
        "not_measured": [],
        "cases": [result.to_json() for result in results],
    }
    return json.loads(json.dumps(data | more))  # type: ignore[no-any-return]


def by_text(run: dict[str, Any]) -> dict[str, claims.Claim]:
    return {claim.text: claim for claim in claims.claims(run)}


LARGE = grid_cases(8)[0]
DOWN = grid_cases(8)[1]


def test_what_a_plain_call_chooses_is_judged() -> None:
    result = cell(LARGE)
    assert result.ours is not None and result.ours.name == "tilelink tuned graph"
    assert result.best_baseline is not None and result.best_baseline.name == "async_tp graph"
    over = result.over_baseline
    assert over is not None and over.ratio == pytest.approx(100 / 90)
    assert result.speedup == pytest.approx(120 / 90)
    assert result.efficiency == pytest.approx(80 / 90)
    lost = cell(LARGE)
    for one in lost.candidates:
        if one.name.startswith(stats.TUNED):
            one.failed = "it broke"
    assert lost.ours is None and lost.over_baseline is None


def test_claims_hold_or_are_missed() -> None:
    found = by_text(a_run([cell(LARGE), cell(DOWN, tuned=102.0, host_us=70.0)]))
    lost = found["cells with the 95 % interval below 0.99"]
    assert lost.figure == "1 of 2" and lost.holds is False
    worst = found["worst cell, ratio [interval]"]
    assert worst.figure.startswith("0.980 [0.980, 0.980] gemm_rs 8192x3584x8192")
    assert "async_tp graph; tilelink tuned graph" in worst.figure
    means = {k: found[f"{k} at M = 8192: geomean over in turn"] for k in (AG_GEMM, GEMM_RS)}
    assert means[AG_GEMM].figure == "1.333, 1 of 1 cells" and means[AG_GEMM].holds is True
    assert means[GEMM_RS].figure == "1.176, 1 of 1 cells" and means[GEMM_RS].holds is False
    assert found["ag_gemm 8192x8192x7168: efficiency"].figure == "0.889"
    assert found["ag_gemm 8192x8192x7168: efficiency"].holds is False
    assert found["largest error over that of in turn"].holds is True
    assert found["same bits in two calls"].figure == "4 of 4 candidates"
    host = found["host time of an eager call, largest"]
    assert host.figure.startswith("70 us (gemm_rs") and host.holds is False


def test_a_claim_without_its_cell_is_named_and_does_not_hold() -> None:
    # One of the promised cells failed, one was left out, and others are no part of the run.
    broken = cell(LARGE)
    for one in broken.candidates:
        one.failed = "it broke" if one.family == stats.OURS else None
    data = a_run([broken], not_measured=["gemm_rs 8192x3584x8192"], stopped="time budget of 5 s")
    found = by_text(data)
    lost = found["cells with the 95 % interval below 0.99"]
    assert lost.figure == "0 of 0, 1 without a figure" and lost.holds is False
    assert found["ag_gemm 8192x8192x7168: efficiency"].holds is False
    assert found["gemm_rs 8192x3584x8192: efficiency"].figure == "not measured"
    assert found["gemm_rs 8192x3584x8192: efficiency"].holds is None
    assert "gemm_ar 16x3584x8192: over the best of in turn, one-shot, two-shot" not in found
    text = claims.summary(data)
    assert "failed: ag_gemm 8192x8192x7168, tilelink tuned: it broke" in text
    assert "not measured (time budget of 5 s): gemm_rs 8192x3584x8192" in text


def test_a_cell_that_failed_is_no_win() -> None:
    broken = cell(DOWN)
    for one in broken.candidates:
        one.failed = "it broke" if one.family == stats.OURS else None
    lost = by_text(a_run([cell(LARGE), broken]))["cells with the 95 % interval below 0.99"]
    assert lost.figure == "0 of 1, 1 without a figure" and lost.holds is False


def test_wrong_bits_and_errors_are_missed() -> None:
    bad = cell(LARGE)
    for one in bad.candidates:
        if one.name == "tilelink tuned graph":
            one.error, one.repeats = 3e-3, False
    found = by_text(a_run([bad]))
    assert found["largest error over that of in turn"].figure.startswith("1.500")
    assert found["largest error over that of in turn"].holds is False
    assert found["same bits in two calls"].holds is False


def test_all_reduce_is_held_against_every_baseline() -> None:
    case = next(c for c in grid_cases(8) if (c.kind, c.m) == (GEMM_AR, 64))
    result = cell(case, tuned=50.0)
    result.candidates += [
        candidate("one_shot", stats.ONE_SHOT, 70.0),
        candidate("two_shot graph", stats.TWO_SHOT, 58.0),
    ]
    found = by_text(a_run([result]))
    claim = found["gemm_ar 64x3584x8192: over the best of in turn, one-shot, two-shot"]
    assert claim.figure == "1.160" and claim.holds is False
    row = tables.rows([result])[0]
    titles = tables.header(GEMM_AR)
    assert row[titles.index("two-shot")] == "0.058 graph"
    assert row[titles.index("best of them")] == "two_shot graph"


def product(n: int, **ours: float) -> stats.CaseResult:
    found = stats.CaseResult(f"gemm 1024x64x{n}", GEMM, 1024, 64, n, "x", 1)
    found.candidates = [candidate("cublas", stats.CUBLAS, 100.0, error=2e-3)]
    for name, us in ours.items():
        # Each is given by its faster variant.
        found.candidates.append(candidate(f"tilelink {name}", stats.OURS, 1.2 * us))
        found.candidates.append(candidate(f"tilelink {name} graph", stats.OURS, us))
    return found


def test_products_say_which_structure_won_where() -> None:
    data = a_run(
        [
            product(64, tuned=98.0, flat=99.0, gluon=97.0),
            product(128, tuned=104.0, flat=100.0, gluon=110.0),
        ],
        "gemm",
    )
    found = by_text(data)
    mean = (100 / 98 * 100 / 104) ** 0.5
    assert found["one GPU: products over cuBLAS, geomean of 2"].figure == f"{mean:.3f}"
    assert found["one GPU: products over cuBLAS, geomean of 2"].holds is False
    least = found["one GPU: least ratio"]
    assert least.figure.startswith("0.962 ") and least.holds is False
    assert "tilelink tuned" in least.figure
    assert found["one GPU: tilelink gluon"].figure == "0.968, least 0.909, fastest in 1 of 2"
    assert found["one GPU: tilelink flat"].figure == "1.005, least 1.000, fastest in 1 of 2"
    assert found["one GPU: the fastest of ours in each cell"].figure == "1.015, least 1.000"
    page = performance.page([("g.json", data)])
    assert "### Products of one GPU" in page and "| over cuBLAS [95 %] |" in page


def test_worlds_are_judged_apart() -> None:
    two, four = cell(LARGE), cell(LARGE, tuned=130.0)
    two.world, four.world = 2, 4
    data = a_run([two, four], "scaling")
    found = by_text(data)
    assert found["2 GPUs: cells with the 95 % interval below 0.99"].holds is True
    assert found["4 GPUs: cells with the 95 % interval below 0.99"].holds is False
    page = performance.page([("s.json", data)])
    assert "### All-gather + GEMM, 2 GPUs" in page and "### All-gather + GEMM, 4 GPUs" in page


def test_processes_are_compared_by_checksum() -> None:
    def with_sum(value: str) -> dict[str, Any]:
        result = cell(LARGE)
        for one in result.candidates:
            one.checksum = value if one.name == "tilelink tuned graph" else None
        return a_run([result])

    same = claims.checksums([with_sum("ab"), with_sum("ab")])
    assert same.figure == "1 of 1 results" and same.holds is True
    assert claims.checksums([with_sum("ab"), with_sum("cd")]).holds is False
    assert claims.checksums([with_sum("ab")]).holds is None


def test_summary_is_made_from_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = a_run([cell(LARGE), cell(DOWN, tuned=102.0)])
    for case in data["cases"]:
        # Derived figures of the file are not believed.
        case["efficiency"] = case["speedup_over_in_turn"] = 9.0
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data))
    assert run.summarize([str(file)]) == 1
    text = capsys.readouterr().out
    assert "1 of 2" in text and "MISSED" in text and "0.889" in text
    assert "slower: gemm_rs 8192x3584x8192 on 8: 0.980 [0.980, 0.980] of async_tp graph" in text
    assert "NCCL without NVLink multicast" in text


def test_page_lists_losses_with_intervals_and_says_what_is_compared() -> None:
    data = a_run([cell(LARGE), cell(DOWN, tuned=102.0)])
    page = performance.page([("r.json", data)])
    assert "- gemm_rs 8192x3584x8192 on 8: 0.980 [0.980, 0.980] of async_tp graph" in page
    assert "| cells with the 95 % interval below 0.99 | 1 of 2 | 0 | MISSED |" in page
    assert (
        "without NVLink multicast" in page and "| async_tp graph | 1.111 [1.111, 1.111] |" in page
    )
    assert "No cell is slower" in performance.page([("r.json", a_run([cell(LARGE)]))])


def files(names: list[str], **ours: float) -> stats.CaseResult:
    """A case whose candidates of ours are files, without a baseline."""
    found = stats.CaseResult(LARGE.name, LARGE.kind, LARGE.m, LARGE.k, LARGE.n, LARGE.origin, 8)
    for name in names:
        us = ours.get(name)
        one = candidate(f"tilelink {name}", stats.OURS, us or 1.0, error=2e-3)
        one.failed = "rank 0: ValueError: the table has no such case" if us is None else None
        found.candidates.append(one)
    return found


def test_runs_without_baselines_are_compared_and_not_judged() -> None:
    compared = a_run([files(["f0", "f1", "f2"], f0=100.0, f2=80.0)])
    runs = [("bench/results/a_pick.json", compared), ("r.json", a_run([cell(LARGE)]))]
    page = performance.page(runs)
    assert "a_pick" not in page and "`r.json`" in page.partition("## How it is measured")[0]
    _, _, behind = comparisons.page(runs).partition("## Schedules compared")
    assert "### a_pick: suite grid, 8 GPUs" in behind and "r.json" not in behind
    assert "| ag_gemm 8192x8192x7168 | 0.100 | - | 0.080 | f2 |" in behind
    # Nothing is promised of schedules in files, and what a file does not have has not failed.
    assert "MISSED" not in behind and "holds" not in behind and "Failed" not in behind
    alone = performance.page([("a_pick.json", compared)])
    assert "## Summary" not in alone and "over in turn |" not in alone


def test_schedules_of_files_are_compared_with_baselines_too_and_lose_in_public() -> None:
    result = cell(LARGE)
    result.candidates = [c for c in result.candidates if c.family != stats.OURS]
    result.candidates += files(["v0", "v1"], v0=130.0, v1=125.0).candidates
    runs = [("v.json", a_run([result]))]
    behind = comparisons.page(runs)
    row = "| 0.130 | 0.125 | v1 | 0.100 async_tp graph | 0.800 [0.800, 0.800] |"
    assert row in behind and "## Summary" not in performance.page(runs)
    assert "- ag_gemm 8192x8192x7168 on 8: 0.800 [0.800, 0.800] of async_tp graph" in behind


def test_the_summary_is_of_the_newest_whole_grid_of_each_world() -> None:
    whole = a_run([cell(LARGE), cell(DOWN, tuned=102.0)], date="2026-02-01")
    older = a_run([cell(LARGE)], date="2026-01-01")
    part = a_run(
        [cell(LARGE)], date="2026-03-01", command=["python", "run.py", "--only", "ag_gemm"]
    )
    two = a_run([cell(LARGE)], date="2026-01-01", world=2)
    runs = [("older.json", older), ("part.json", part), ("two.json", two), ("whole.json", whole)]
    assert [name for name, _ in selection.leading(runs)] == ["whole.json", "two.json"]
    # Without a whole one, that of most cells, however old.
    fewer = {**part, "cases": whole["cases"], "date": "2025-01-01"}
    assert selection.leading([("part.json", part), ("fewer.json", fewer)])[0][0] == "fewer.json"
    summary, _, rest = performance.page(runs).partition("## How it is measured")
    assert "| All-gather + GEMM | 1 | 1 | 0 | 0 | 1.111 | 1.333 | 0.889 |" in summary
    assert "| GEMM + reduce-scatter | 1 | 0 | 0 | 1 | 0.980 | 1.176 | 0.784 |" in summary
    assert "| all | 2 | 1 | 0 | 1 |" in summary
    assert "Not measured: 8 of 10 figures of single cells." in summary
    assert "not measured" not in summary
    earlier = comparisons.page(runs)
    for name in ("older", "part", "two", "whole"):
        newest = name in ("two", "whole")
        assert (f"Raw data: `{name}.json`" in rest, f"`{name}.json`" in earlier) == (
            newest,
            not newest,
        )
    assert "## Suite grid, 8 GPUs: 1 of its cells" in earlier


def test_other_suites_are_shown_by_their_newest_whole_run() -> None:
    names = ("old", "new", "part", "h100")
    runs = [
        (f"{n}.json", a_run([cell(LARGE)], "mlp", date=f"2026-0{i}-01"))
        for i, n in enumerate(names, 1)
    ]
    runs[2][1]["not_measured"] = [DOWN.name]
    runs[3][1]["hardware"] = {**runs[3][1]["hardware"], "gpu": "another"}
    assert [name for name, _ in selection.current(selection.suites(runs))] == [
        "h100.json",
        "new.json",
    ]
    page, earlier = performance.page(runs), comparisons.page(runs)
    for name in names:
        shown = name in ("new", "h100")
        assert (f"`{name}.json`" in page, f"`{name}.json`" in earlier) == (shown, not shown)


def test_the_summary_has_each_cell_as_plain_calls_were_measured_last() -> None:
    asked = ["python", "run.py", "--only", "gemm_rs"]
    whole = a_run([cell(LARGE), cell(DOWN, tuned=102.0)], date="2026-02-01")
    since = a_run([cell(DOWN, tuned=80.0)], date="2026-03-01", command=asked)
    before = a_run([cell(DOWN, tuned=50.0)], date="2026-01-01", command=asked)
    default = cell(DOWN, tuned=20.0)
    default.candidates = [
        replace(c, name=c.name.replace("tuned", "default")) for c in default.candidates
    ]
    other = a_run([default], date="2026-04-01", command=asked)
    runs = [("whole.json", whole), ("since.json", since), ("before.json", before)]
    summary, _, _ = performance.page([*runs, ("other.json", other)]).partition("## How it is")
    assert "`whole.json`; cells measured since from `since.json`." in summary
    assert "| GEMM + reduce-scatter | 1 | 1 | 0 | 0 | 1.250 | 1.500 |" in summary
    assert "| All-gather + GEMM | 1 | 1 | 0 | 0 | 1.111 | 1.333 | 0.889 |" in summary


def test_cells_that_a_run_left_out_are_counted_and_not_shown_as_rows() -> None:
    data = a_run(
        [cell(LARGE)], not_measured=["gemm_rs 8192x3584x8192"], stopped="time budget of 5 s"
    )
    assert len(claims.unmeasured(data)) == 9 and claims.PROMISED == 10
    summary, _, _ = performance.page([("r.json", data)]).partition("## How it is measured")
    assert "| gemm_rs 8192x3584x8192: efficiency |" not in summary
    assert "Cells not measured (time budget of 5 s): gemm_rs 8192x3584x8192." in summary
    assert "Not measured: 9 of 10 figures of single cells." in summary


def test_every_candidate_is_on_the_page_of_measurements() -> None:
    runs = [("r.json", a_run([cell(LARGE)])), ("v.json", a_run([files(["f0"], f0=100.0)]))]
    page = measurements.page([*runs, ("h.json", {"kind": "host_cost"})])
    for one in cell(LARGE).candidates:
        assert f"| ag_gemm 8192x8192x7168 | {one.name} |" in page
    assert "## v: suite grid, 8 GPUs" in page and "| tilelink f0 | 0.100 |" in page
    row = "| async_tp graph | 0.100 | 0.100 | 0.100 |"
    assert row in page and row not in performance.page(runs)


def test_page_and_summary_show_compile_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "name": "ag_gemm 1x2x3",
        "spec": "tuned",
        "cold_s": 1.25,
        "cached_s": 0.125,
        "steps_s": {"decorator": 0.004, "proof": 0.025},
    }
    broken = {"name": "gemm_rs 1x2x3", "spec": "tuned", "failed": "rank 0: it broke"}
    data = {"kind": "compile_time", **header(), "first_s": 3.0, "cases": [row, broken]}
    file = tmp_path / "compile.json"
    file.write_text(json.dumps(data))
    assert run.summarize([str(file)]) == 0
    text = capsys.readouterr().out
    assert "tuned: cold 1.25 s, from cache 0.12 s (decorator 4 ms, proof 25 ms)" in text
    page = performance.page([("c.json", data)])
    assert "| ag_gemm 1x2x3 | tuned | 1.25 | 0.12 | 4 | 25 |" in page
    assert "failed: rank 0: it broke" in page and "3.00 s cold" in page


def test_page_shows_host_time_and_skips_what_it_does_not_know() -> None:
    way = {"median_us": 41.26, "p90_us": 50.0, "most_us": 90.0}
    row = {"name": "ag_gemm 1x2x3", "schedule": "copy_engine", "same": way, "fresh": way}
    broken = {"name": "gemm_rs 1x2x3", "schedule": "sm:16", "failed": "it broke"}
    data = {"kind": "host_cost", **header(), "cases": [row, broken]}
    assert "by the backend" not in performance.page([("h.json", data)])
    parts = {"in_turn": way, "backend": {"median_us": 30.0}, "exact": {"median_us": 33.0}}
    library = {"name": "gemm_rs 1x2x3", "schedule": "library", "same": way, **parts}
    data["cases"].append(library)
    page = performance.page([("h.json", data), ("other.json", {"cases": []})])
    assert "| gemm_rs 1x2x3 | 41.3 | 30.0 | 33.0 | 41.3 | - | - |" in page
    assert "| ag_gemm 1x2x3 | copy_engine | 41.3 | - | - | - | 41.3 |" in page
    assert "| gemm_rs 1x2x3 | sm:16 | failed: it broke | - | - | - | - |" in page
    assert "other.json" not in page


def test_origins_of_plain_calls_are_counted() -> None:
    origins = (
        "tuned (ag_gemm.bf16.h200x4.json)",
        "tuned (ag_gemm.bf16.h200x4.json)",
        "tuned for M=8192 K=4096 N=2816 (ag_gemm.bf16.h200x4.json)",
        "predicted 81 us on h200x4",
        "default",
    )
    results = []
    for case, origin in zip(grid_cases(8), origins, strict=False):
        result = cell(case)
        for one in result.candidates:
            one.origin = origin if one.name == stats.TUNED else None
        results.append(result)
    claim = by_text(a_run(results))["schedules of plain calls"]
    assert claim.figure == "1 default, 1 predicted, 2 tuned, 1 tuned for"
