"""The benchmark's own arithmetic, tables and failure handling, with no GPU and no peers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    cluster,
    environment,
    evidence,
    graph_check,
    host_cost,
    measure,
    performance,
    report,
    run,
    stats,
    tables,
    varying_m,
)
from bench.candidates import Candidate, Inputs, set_count
from bench.cases import AG_GEMM, Case, grid_cases
from bench.measure import Bench, Settings
from tests.unit.bench_fakes import (
    FULL,
    FakeCluster,
    FakeEvent,
    FakeWatchdog,
    case_result,
    header,
    measured,
    ranks,
)


def test_figures_of_a_case() -> None:
    result = case_result(*FULL)
    assert result.bound_us == 1000
    best = result.best(stats.OURS)
    assert best is not None and best.name == "tilelink copy_engine graph"
    assert result.efficiency == pytest.approx(1000 / 1120)
    assert result.speedup == pytest.approx(1400 / 1120)


def test_no_bound_without_both_parts() -> None:
    result = case_result(FULL[0], FULL[6])
    assert result.bound_us is None and result.efficiency is None and result.speedup is None


def test_json_round_trip_computes_figures_anew() -> None:
    result = case_result(*FULL)
    data = json.loads(json.dumps(result.to_json()))
    assert data["bound_us"] == 1000 and data["candidates"][0]["median_us"] == 1000
    data["bound_us"] = data["efficiency"] = 1.0
    again = stats.CaseResult.from_json(data)
    assert again == result and again.efficiency == result.efficiency


def test_table_names_variants_skips_and_failures() -> None:
    skipped = case_result(skipped="K is odd")
    lost = case_result(*FULL[:5])
    text = tables.text([case_result(*FULL), skipped, lost])
    lines = text.splitlines()
    assert lines[0] == "ag_gemm, 8 GPUs" and len(lines) == 5
    for cell in (
        "1.000",
        "0.400",
        "1.400 graph",
        "1.300",
        "1.120",
        "copy_engine graph",
        "1.25",
        "async_tp",
        "1.161 [too few rounds]",
        "0.893",
    ):
        assert cell in lines[2], cell
    assert "skipped: K is odd" in lines[3]
    assert "failed" in lines[4]


def test_unsupported_shapes_say_why() -> None:
    assert "K = 12" in str(Case(AG_GEMM, 64, 12, 16, "").unsupported(8))
    assert "M = 60" in str(Case(AG_GEMM, 60, 16, 16, "").unsupported(8))


def test_rotation_outgrows_the_cache() -> None:
    for case in grid_cases(8):
        assert 2 <= set_count(case) <= 12
        assert set_count(case) * case.weight_bytes >= 2 * (60 << 20)


def test_ranks_agree_on_errors_and_on_rank_0() -> None:
    def body(agreement: cluster.Agreement) -> Any:
        mine = {"x": f"broke {agreement.rank}"} if agreement.rank in (1, 2) else {}
        return (
            agreement.errors(mine),
            agreement.first(10 * agreement.rank + 1),
            agreement.errors({}),
        )

    assert ranks(4, body) == [({"x": "rank 1: broke 1"}, 1, {})] * 4


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(3):
        a, b = (torch.randn(16, 16, generator=generator) for _ in range(2))
        sets.append((a, b, a @ b))
    return Inputs(sets)


def bench_of(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, *candidates: Candidate) -> Bench:
    monkeypatch.setattr(measure, "_event", FakeEvent)
    bench: Any = Bench(FakeCluster(), inputs, FakeWatchdog())  # type: ignore[arg-type]
    for candidate in candidates:
        bench.add(candidate)
    return bench  # type: ignore[no-any-return]


def product(inputs: Inputs, ms: float, factor: float = 1.0) -> Any:
    def call(i: int) -> torch.Tensor:
        FakeEvent.now += ms
        return factor * (inputs.a(i) @ inputs.b(i))

    return lambda: call


def test_rounds_time_each_candidate_alone(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Candidate("fast", stats.OURS, product(inputs, 1.5))
    slow = Candidate("slow", stats.IN_TURN, product(inputs, 4.0))
    bench = bench_of(inputs, monkeypatch, fast, slow)
    bench.time(Settings(rounds=5, warmup=2))
    bench.recheck()
    assert bench.results["fast"].samples_us == pytest.approx([1500.0] * 5)
    assert bench.results["slow"].samples_us == pytest.approx([4000.0] * 5)
    assert bench.results["fast"].failed is None
    assert bench.results["fast"].rank_median_us == pytest.approx([1500.0])


def test_wrong_results_are_not_timed(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Candidate("wrong", stats.OURS, product(inputs, 1.0, factor=1.02))
    bench = bench_of(inputs, monkeypatch, wrong)
    bench.time(Settings(rounds=3, warmup=0))
    result = bench.results["wrong"]
    assert result.failed is not None and "wrong result" in result.failed
    assert result.error == pytest.approx(0.02, rel=1e-2) and result.median_us is None


def test_an_unwritten_output_is_wrong(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = inputs.a(0) @ inputs.b(0)
    lazy = Candidate("lazy", stats.OURS, lambda: lambda i: kept)
    bench = bench_of(inputs, monkeypatch, lazy)
    assert "inf" in str(bench.results["lazy"].failed)


def test_stale_results_are_wrong(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(i: int) -> torch.Tensor:
        return inputs.a(0) @ inputs.b(0)

    bench = bench_of(inputs, monkeypatch, Candidate("stale", stats.OURS, lambda: stale))
    assert "wrong result" in str(bench.results["stale"].failed)


def test_a_failure_drops_one_candidate(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def breaks(i: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        # The check makes settling calls on three sets and four more; the second round breaks.
        if calls > 3 * measure.SETTLED + 4 + 2:
            raise RuntimeError("it broke")
        return inputs.a(i) @ inputs.b(i)

    def never() -> Any:
        raise ValueError("no such thing")

    bench = bench_of(
        inputs,
        monkeypatch,
        Candidate("never", stats.OURS, never),
        Candidate("never graph", stats.OURS, never, graph=True),
        Candidate("breaks", stats.OURS, lambda: breaks),
        Candidate("good", stats.OURS, product(inputs, 1.0)),
    )
    bench.time(Settings(rounds=4, warmup=0))
    assert bench.results["never"].failed == "rank 0: ValueError: no such thing"
    assert "never failed" in str(bench.results["never graph"].failed)
    assert bench.results["breaks"].failed == "rank 0: RuntimeError: it broke"
    # The round in which the other one broke has no samples.
    assert bench.results["good"].samples_us == pytest.approx([1000.0] * 3)


def test_a_lost_context_ends_the_run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench_of(inputs, monkeypatch, Candidate("lost", stats.OURS, lost))


def test_unmeasured_cases_are_named(tmp_path: Path) -> None:
    cases = [Case(AG_GEMM, 64, 32, 16, "a test"), Case(AG_GEMM, 128, 32, 16, "a test")]
    kept = run.Report(str(tmp_path / "deep" / "out.json"), 0, header(), cases)
    kept.results.append(case_result(*FULL))
    kept.write("time budget of 5 s")
    data = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert data["not_measured"] == ["ag_gemm 128x32x16"]
    assert data["stopped"] == "time budget of 5 s"
    table = kept.table()
    assert "not measured (time budget of 5 s): ag_gemm 128x32x16" in table
    assert "failed: ag_gemm 64x32x16, tilelink epilogue: wrong result" in table
    assert "not measured (time budget of 5 s)" in table and "1.250" not in table


def test_other_ranks_do_not_write(tmp_path: Path) -> None:
    run.Report(str(tmp_path / "out.json"), 3, header(), []).write()
    assert not list(tmp_path.iterdir())


def test_only_selects_by_name_and_origin() -> None:
    assert {c.kind for c in run.chosen("mlp", 4, 8, "gemm_rs")} == {"gemm_rs"}
    assert len(run.chosen("mlp", 8, None, "hidden 3584")) == 3
    assert run.chosen("mlp", 8, None, "nothing") == []


def graph_record(**changes: Any) -> dict[str, Any]:
    counts = {"mismatched_elements": 0, "eager_mismatched_elements": 0, "eager_calls": 21}
    return {
        "name": "gemm_rs 1x2x3",
        "schedule": "copy_engine",
        "replays": 1000,
        "control_mismatched_elements": 7,
        **counts,
        **changes,
    }


def test_page_shows_losses_failures_and_graph_checks(tmp_path: Path) -> None:
    slow = case_result(*FULL[:5], measured("tilelink none", stats.OURS, 2800))
    bench = {
        "kind": "bench",
        **header(),
        "stopped": None,
        "not_measured": [],
        "cases": [case_result(*FULL).to_json(), slow.to_json()],
    }
    graphs = {"kind": "graph_check", **header(), "cases": [graph_record()]}
    text = performance.page([("a.json", bench), ("b.json", graphs)])
    assert "1 of 2 slower than in turn" in text
    assert "| 0.50 |" in text and "| 1.25 |" in text
    assert "tilelink epilogue: wrong result" in text
    assert "NCCL without NVLink multicast" in text
    assert "torchrun --nproc-per-node 8 bench/run.py --suite mlp" in text
    assert "| gemm_rs 1x2x3 | copy_engine | 1,000 | 0 | 21 | 0 | 7 | passed |" in text

    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, data in zip(files, (bench, graphs), strict=True):
        file.write_text(json.dumps(data))
    out = tmp_path / "performance.md"
    arguments = [*map(str, files), "--out", str(out)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    out.write_text(out.read_text() + "an edit\n")
    assert report.main([*arguments, "--check"]) == 1


def test_evidence_shows_what_failed() -> None:
    case = {"name": "proof", "command": "python -m tests.assurance.mutants", "code": 1}
    assurance = {
        "kind": "assurance",
        "date": "2026-01-01",
        "cores": 2,
        **dict.fromkeys(("python", "torch", "triton"), "1.0"),
        "cases": [{**case, "figures": {"mutants": 2600, "survived": 3}}],
    }
    row = {"kernel": "ag_gemm", "resource": "sm:8", "us_a_call": 50.5}
    counts = {"calls": 1000, "eager_calls": 10, "wrong_elements": 7, "control_wrong_elements": 9}
    soak = {
        "kind": "reliability",
        **header(),
        "rows": [{"test": "soak", **row, **counts, "ok": False}],
    }
    text = evidence.page([("a.json", assurance), ("b.json", soak), ("c.json", {"kind": "bench"})])
    assert "FAILED (1): mutants 2,600, survived 3" in text
    assert "| ag_gemm | sm:8 | 1,000 | 10 | 7 | 9 | 50.5 | FAILED |" in text
    assert "NCCL without NVLink multicast" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"mismatched_elements": 1},
        {"eager_mismatched_elements": 1},
        {"control_mismatched_elements": 0},
        {"failed": "it broke"},
    ],
)
def test_a_graph_check_can_fail(changes: dict[str, Any]) -> None:
    assert graph_check.passed(graph_record())
    assert not graph_check.passed(graph_record(**changes))


def test_results_of_the_repository_make_its_page() -> None:
    files = sorted((report.ROOT / "bench" / "results").glob("*.json"))
    if not files:
        pytest.skip("no results in bench/results")
    assert report.main(["--check"]) == 0


def test_watchdog_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    stopped = threading.Event()

    def leave(code: int) -> None:
        ended.append(f"exit {code}")
        stopped.set()
        # The real one does not return; the thread ends with the process.
        threading.Event().wait()

    monkeypatch.setattr("os._exit", leave)
    begin = time.monotonic()
    dog = cluster.Watchdog(0.4, ended.append)
    for _ in range(4):
        time.sleep(0.15)
        dog.beat("work")
    # While others work, nothing is due.
    dog.pause()
    time.sleep(0.6)
    assert not ended
    dog.beat("hang")
    assert stopped.wait(5)
    assert ended[0].endswith("in: hang") and ended[1] == "exit 1"
    assert time.monotonic() - begin > 1.5


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("--out", "--out"),
        ("bench/run.py", "bench/run.py"),
        ("/a/b/run.json", "run.json"),
        ("tuned,/a/b/run.json,c/d.json,/e.json", "tuned,run.json,c/d.json,e.json"),
    ],
)
def test_record_names_no_folder_of_the_machine(given: str, recorded: str) -> None:
    assert environment.without_folder(given) == recorded


def test_a_trace_has_both_ends_and_lengths_that_ranks_can_share() -> None:
    for unit in (1, 8):
        rows = varying_m.trace(16, unit, seed=1)
        assert {unit, 8192} <= set(rows) and len(set(rows)) == len(rows) > 10
        assert all(m % unit == 0 and unit <= m <= 8192 for m in rows) and rows != sorted(rows)
        assert rows == varying_m.trace(16, unit, seed=1) != varying_m.trace(16, unit, seed=2)


def step_record(ratio: float | None, programs: int = 3, failed: str | None = None) -> Any:
    return {
        "name": f"ag_gemm at {ratio}",
        "ratio": ratio,
        "programs": programs,
        "candidates": {varying_m.DYNAMIC: {"failed": failed}},
    }


def test_a_trace_can_fail() -> None:
    fine = [step_record(1.02), step_record(0.9, 8)]
    assert varying_m.good(varying_m.verdict(fine))
    assert varying_m.verdict(fine)["worst"] == (1.02, "ag_gemm at 1.02")
    for bad in (step_record(1.2), step_record(1.0, 9), step_record(None, failed="wrong result")):
        assert not varying_m.good(varying_m.verdict([*fine, bad]))


def test_host_time_is_judged_by_calls_that_repeat() -> None:
    calls: list[int] = []
    ways: host_cost.Ways = {
        "one": calls.append,
        "other": lambda number: calls.append(number + 1000),
    }
    times = host_cost.measure(ways, lambda: calls.append(-1), batches=2)
    batch = host_cost.BATCH
    assert [len(each) for each in times.values()] == [2 * batch, 2 * batch]
    # A batch of each in turn, behind a wait for the device.
    assert calls[: batch + 2] == [-1, *range(batch), -1] and calls[batch + 2] == 1000
    assert calls[-2] == 1000 + 2 * batch - 1 and calls.count(-1) == 5
    assert host_cost.figures([3.0, 1.0, 2.0, 50.0, 2.0])["median_us"] == 2.0
    quick, slow = {"median_us": 30.0}, {"median_us": 90.0}
    record = {"same": quick, "allocated": quick, "rotated": quick, "fresh": slow}
    assert host_cost.within(record)
    assert not host_cost.within({**record, "rotated": slow})
    # The library's schedule is as good as PyTorch's own two calls.
    both = {**record, "schedule": "library", "rotated": {"median_us": 93.0}, "in_turn": slow}
    assert host_cost.within(both)
    assert not host_cost.within({**both, "rotated": {"median_us": 96.0}})
    assert not host_cost.within({**both, "schedule": "none"})
