"""The whole of ``bench/run.py`` on one CPU: collectives, events and kernels are stand-ins, the rest is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bench.cluster
from bench import baselines, claims, environment, measure, ours, performance, run, stats
from bench.candidates import Inputs, make_inputs
from bench.cases import AG_GEMM, GEMM, GEMM_AR, GEMM_RS, SUITES, Case
from tests.unit.bench_fakes import FakeCluster, FakeWatchdog, Store, header, ranks

CASES = (
    Case(AG_GEMM, 64, 32, 16, "a test"),
    Case(GEMM_RS, 64, 32, 16, "a test"),
    Case(GEMM_AR, 16, 32, 16, "a test"),
)


class Clock:
    """An event that reads the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        return 1000 * (end.at - self.at)


class StandIn:
    """A kernel of ours on one rank: its product is torch's; it builds as the real one does."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def build(self, *args: Any) -> Any:
        return self.kernel.build(*args)

    def on(self, group: Any = None, schedule: Any = None) -> Any:
        if schedule is not None and schedule.workers == 7:
            raise RuntimeError("seven workers")

        def call(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(a, b, out=out)

        return call


def checked(name: str, compute: Any) -> Any:
    """``compute``, called only with arguments that the schema of ``torch.ops.symm_mem.NAME`` takes."""
    schema = getattr(torch.ops.symm_mem, name).default._schema

    def call(*args: Any) -> Any:
        assert len(args) == sum(not argument.kwarg_only for argument in schema.arguments)
        for value, argument in zip(args, schema.arguments, strict=False):
            kind = str(argument.type)
            if kind == "Tensor":
                assert isinstance(value, torch.Tensor), argument.name
            elif kind == "List[Tensor]":
                assert [type(v) for v in value] == [torch.Tensor], argument.name
            else:
                assert isinstance(value, {"str": str, "int": int}[kind]), argument.name
        return compute(*args)

    return call


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One rank: all-gathers and reduce-scatters copy, all-reduces change nothing."""

    def copy(out: torch.Tensor, value: torch.Tensor, group: Any = None) -> None:
        assert out.shape == value.shape
        out.copy_(value)

    monkeypatch.setattr(dist, "all_gather_into_tensor", copy)
    monkeypatch.setattr(dist, "reduce_scatter_tensor", copy)
    monkeypatch.setattr(dist, "all_reduce", lambda value, group=None: None)
    for name, compute in (
        ("fused_all_gather_matmul", lambda a, bs, dim, group: (a, [a @ bs[0]])),
        ("fused_matmul_reduce_scatter", lambda a, b, op, dim, group: a @ b),
        ("one_shot_all_reduce", lambda x, op, group: x.clone()),
        ("two_shot_all_reduce_", lambda x, op, group: x),
    ):
        monkeypatch.setattr(torch.ops.symm_mem, name, checked(name, compute))
    # Other threads only get in the way of products as small as these.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure, "_event", Clock)
    monkeypatch.setattr(measure, "capture", lambda call, count: call)
    real = ours.kernel_of
    monkeypatch.setattr(ours, "kernel_of", lambda kind: StandIn(real(kind)))


@pytest.fixture
def job(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``main`` on one fake rank."""
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(environment, "describe", lambda world: header() | {"world": world})
    monkeypatch.setattr(bench.cluster, "Cluster", FakeCluster)
    monkeypatch.setattr(bench.cluster, "Watchdog", FakeWatchdog)
    monkeypatch.setitem(SUITES, "grid", lambda world, parallel: list(CASES))
    monkeypatch.setitem(SUITES, "gemm", lambda world, parallel: [Case(GEMM, 64, 32, 16, "a test")])


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    return run.main()


def test_grid_from_start_to_page(
    job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.json"
    wrong = tmp_path / "seven.json"
    wrong.write_text('{"workers": 7}')
    specs = f"tuned,default,copy_engine,no_such_thing,{wrong}"
    arguments = ("--suite", "grid", "--rounds", "8", "--warmup", "1", "--schedules", specs)
    # One of ours cannot be built and one is no schedule: both are recorded, all else is measured.
    assert start(monkeypatch, *arguments, "--out", str(out)) == 1
    data = json.loads(out.read_text())
    found = {result.kind: result for result in claims.results_of(data)}
    assert set(found) == {AG_GEMM, GEMM_RS, GEMM_AR} and data["not_measured"] == []
    for kind, result in found.items():
        by_name = {c.name: c for c in result.candidates}
        assert "no_such_thing" in str(by_name["tilelink no_such_thing"].failed), kind
        assert "seven workers" in str(by_name["tilelink seven"].failed)
        good = [c for c in result.candidates if c.failed is None]
        assert {len(c.samples_us) for c in good} == {8} and len(good) == len(by_name) - 3
        assert result.ours is not None and result.ours.name.startswith(stats.TUNED)
        assert result.over_baseline is not None and result.over_baseline.low is not None
        own = [c for c in good if c.family == stats.OURS]
        assert all(c.repeats and c.checksum and c.host_us and c.schedule for c in own)
        assert {c.origin for c in own} == {"given", "default"}
        # The same inputs and the same arithmetic: the same bits, whatever the schedule.
        assert len({c.checksum for c in own}) == 1
    assert {c.name for c in found[GEMM_AR].candidates} >= {"one_shot", "two_shot graph"}
    assert {c.name for c in found[GEMM_RS].candidates} >= {"async_tp", "async_tp graph"}
    text = capsys.readouterr().out
    assert "ag_gemm, 1 GPU\n" in text and "same bits in two calls" in text
    assert "## Suite grid, 1 GPU\n" in performance.page([("grid.json", data)])

    # A second process: the same inputs give the same checksums.
    again = tmp_path / "again.json"
    start(monkeypatch, *arguments, "--out", str(again))
    run.summarize([str(out), str(again)])
    assert "same bits in other processes: 18 of 18 results (holds)" in capsys.readouterr().out


def test_products_of_one_gpu(job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gemm.json"
    arguments = ("--suite", "gemm", "--rounds", "6", "--schedules", "tuned,flat 128x256x3")
    assert start(monkeypatch, *arguments, "--out", str(out)) == 0
    (result,) = claims.results_of(json.loads(out.read_text()))
    names = [c.name for c in result.candidates]
    wanted = ["cublas", "tilelink tuned", "tilelink flat 128x256x3"]
    assert names == [f"{name}{how}" for name in wanted for how in ("", " graph")]
    assert result.best_baseline is not None and result.best_baseline.family == stats.CUBLAS
    assert result.candidates[4].schedule is not None
    assert result.candidates[4].schedule["tiles"] == {"M": 128, "N": 256, "K": 64}


def test_a_budget_leaves_out_the_last_cases(
    job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid.json"
    arguments = ("--suite", "grid", "--rounds", "2", "--schedules", "tuned", "--no-baselines")
    start(monkeypatch, *arguments, "--time-budget", "0", "--out", str(out))
    data = json.loads(out.read_text())
    assert data["cases"] == [] and data["stopped"] == "time budget of 0 s"
    assert data["not_measured"] == [case.name for case in CASES]


def test_budget_expects_what_the_last_cases_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = run.Budget(20.0)
    assert not budget.over()
    # The first case took long because everything was started; the next ones are expected to be short.
    budget.taken = [9.0, 2.0, 3.0]
    now = 116.0
    assert not budget.over()
    now = 117.5
    assert budget.over()
    assert not run.Budget(None).over()


def test_ranks_measure_products_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(part: Any, case: Case, *_: Any) -> stats.CaseResult:
        result = stats.CaseResult(case.name, case.kind, case.m, 8, 8, "", part.world)
        result.candidates = [stats.Measured(f"of rank {part.agreement.name[-1]}", stats.OURS)]
        return result

    monkeypatch.setattr(run, "measure_case", one)
    cases = [Case(GEMM, m, 8, 8, "") for m in (1, 2)]

    def body(agreement: bench.cluster.Agreement) -> Any:
        cluster = FakeCluster(agreement)
        results = run.measure_turn(cluster, cases, run.parse(["--out", "x"]), None, FakeWatchdog())
        assert cluster.asked == [(0,), (1,), (2,)]
        return [(r.m, r.candidates[0].name, r.world) for r in results]

    assert ranks(3, body) == [[(1, "of rank 0", 1), (2, "of rank 1", 1)]] * 3


def test_a_part_of_the_ranks_measures_and_all_know(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[int] = []

    def one(part: Any, case: Case, *_: Any) -> stats.CaseResult:
        at_work.append(part.rank)
        assert part.agreement.first(part.rank) == 0
        return stats.CaseResult(case.name, case.kind, case.m, 8, 8, "", part.world)

    monkeypatch.setattr(run, "measure_case", one)
    cases = [Case(AG_GEMM, 8, 8, 8, "", world=2)]

    def body(agreement: bench.cluster.Agreement) -> Any:
        options = run.parse(["--out", "x"])
        cluster = FakeCluster(agreement)
        (result,) = run.measure_turn(cluster, cases, options, None, FakeWatchdog())
        return result.name, result.world

    assert ranks(4, body) == [("ag_gemm 8x8x8 on 2", 2)] * 4
    assert sorted(at_work) == [0, 1]


def test_baselines_apply_where_torch_takes_them() -> None:
    def native(m: int, world: int) -> bool:
        return baselines.native_applies(Case(AG_GEMM, m, 8192, 7168, ""), world)

    assert [m for m in (1024, 2048, 4096, 8192) if native(m, 8)] == [4096]
    assert not baselines.native_applies(Case(GEMM_RS, 4096, 3584, 8192, ""), 8)
    rows = (1, 16, 64, 256, 1024, 4096)
    small = [m for m in rows if baselines.one_shot_applies(Case(GEMM_AR, m, 3584, 8192, ""))]
    assert small == [1, 16, 64, 256, 1024]


def test_the_second_setting_of_async_tp_is_on_only_while_it_runs(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    seen: list[bool] = []

    def fused(a: torch.Tensor, bs: list[torch.Tensor], dim: int, group: str) -> Any:
        seen.append(baselines.NATIVE in os.environ)
        return a, [a @ bs[0]]

    monkeypatch.setattr(torch.ops.symm_mem, "fused_all_gather_matmul", fused)
    case = Case(AG_GEMM, 2056, 8, 8, "")
    part: Any = FakeCluster()
    inputs = make_inputs(part, case, 0)
    made = {c.name: c.build() for c in baselines.baselines(part, case, inputs)}
    made["async_tp"](0)
    made["async_tp native"](0)
    made["async_tp"](0)
    assert seen == [False, True, False]


def test_inputs_are_the_same_in_every_process_and_differ_between_ranks(stand_ins: None) -> None:
    def of(rank: int) -> Inputs:
        part: Any = FakeCluster(bench.cluster.Agreement(Store(), rank, 1))
        return make_inputs(part, CASES[1], 0)

    assert torch.equal(of(0).a(1), of(0).a(1)) and torch.equal(of(1).b(0), of(1).b(0))
    assert not torch.equal(of(0).a(0), of(1).a(0)) and not torch.equal(of(0).a(0), of(0).a(1))


def test_checksum_sees_every_bit_and_its_place() -> None:
    out = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = int(measure.checksum(out))
    assert int(measure.checksum(out.clone())) == first
    bits = out.view(torch.int16)
    for row, column in ((0, 0), (7, 23), (299, 11)):
        bits[row, column] ^= 1
        assert int(measure.checksum(out)) != first
        bits[row, column] ^= 1
    assert int(measure.checksum(out.flip(0))) != first
    assert int(measure.checksum(out.flip(1))) != first
    # In slices of rows: the place of a row is that in the whole.
    tall = torch.ones(5000, 8).bfloat16()
    swapped = tall.clone()
    tall[1], swapped[4999] = 2.0, 2.0
    assert int(measure.checksum(tall)) != int(measure.checksum(swapped))


def test_host_time_leaves_out_first_calls_and_sees_a_full_queue() -> None:
    steady = [[500.0, 40.0, 41.0, 42.0, 40.0, 41.0]] * 5
    assert measure.host_figures(steady) == (41.0, False)
    filling = [[500.0, 40.0, 41.0, 42.0, 300.0, 310.0]] * 5
    assert measure.host_figures(filling) == (42.0, True)
    # One slow call, as of a collection of garbage, is no full queue.
    hiccup = [*steady[:4], [500.0, 40.0, 41.0, 42.0, 900.0, 41.0]]
    assert measure.host_figures(hiccup)[1] is False


def test_calls_of_the_host_are_timed_between_waits() -> None:
    events: list[str] = []
    taken = measure.host_times(lambda i: events.append("call"), lambda: events.append("wait"))
    assert [len(batch) for batch in taken] == [measure.HOST_CALLS] * measure.HOST_BATCHES
    batch = ["wait", *["call"] * measure.HOST_CALLS]
    assert events == [*batch * measure.HOST_BATCHES, "wait"]
    assert all(us > 0 for batch in taken for us in batch)


@pytest.mark.parametrize("kind", [AG_GEMM, GEMM_RS, GEMM_AR])
def test_specs_name_schedules(kind: str, tmp_path: Path) -> None:
    case = Case(kind, 1024, 512, 1024, "")
    kernel = ours.kernel_of(kind)
    moved = ours.MOVED[kind]
    assert ours.schedule_of(kernel, case, 4, "tuned") is None
    shown, origin = ours.shown_schedule(kernel, case, 4, None, "no such GPU")
    default = ours.schedule_of(kernel, case, 4, "default")
    assert shown == json.loads(default.to_json()) and origin == "default"
    assert ours.shown_schedule(kernel, case, 4, default, "any") == (shown, "given")
    assert ours.schedule_of(kernel, case, 4, "sm:16").move(moved).resource == "sm:16"
    assert ours.schedule_of(kernel, case, 4, "none").move(moved).resource == "none"

    one, table = tmp_path / "one.json", tmp_path / "table.json"
    one.write_text('{"workers": 64}')
    table.write_text(json.dumps({case.name: {"workers": 32}}))
    assert ours.schedule_of(kernel, case, 4, str(one)).workers == 64
    assert ours.schedule_of(kernel, case, 4, str(table)).workers == 32
    assert ours.label_of(str(table)) == "table"
    tuned = tmp_path / "tuned.json"
    entry = {"extents": {"M": 1024, "K": 512, "N": 1024}, "schedule": {"workers": 16}, "us": 1.0}
    tuned.write_text(json.dumps({"kernel": kind, "world": 4, "entries": [entry]}))
    assert ours.schedule_of(kernel, case, 4, str(tuned)).workers == 16
    with pytest.raises(ValueError, match="on 8"):
        ours.schedule_of(kernel, case, 8, str(tuned))
    product = Case(GEMM, 1024, 512, 1024, "")
    with pytest.raises(ValueError, match="nothing moves"):
        ours.schedule_of(ours.kernel_of(GEMM), product, 1, "sm:16")
    other = Case(kind, 2048, 512, 1024, "")
    with pytest.raises(ValueError, match="2048x512x1024"):
        ours.schedule_of(kernel, other, 4, str(table))


def test_compile_steps_are_timed_and_kernels_made_anew() -> None:
    from bench import compile_time

    for case in (*compile_time.CASES, compile_time.FIRST):
        assert case.unsupported(8) is None
    case = Case(AG_GEMM, 512, 128, 256, "")
    kernel = ours.kernel_of(AG_GEMM)
    assert compile_time.fresh(kernel) is not compile_time.fresh(kernel)
    assert compile_time.fresh(kernel).name == "ag_gemm"
    steps = compile_time.steps(kernel, case, 4, None)
    assert list(steps) == ["decorator", "typed kernel", "passes", "proof", "emitted source"]
    assert all(seconds > 0 for seconds in steps.values())


def test_compile_times_of_all_ranks_count_and_one_failure_is_told_to_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench import compile_time

    case = Case(AG_GEMM, 384, 128, 256, "")
    broken = False

    def first_call(part: Any, *_: Any) -> float:
        if broken and part.rank == 1:
            raise RuntimeError("no compiler")
        return 1.0 + float(part.rank)

    monkeypatch.setattr(compile_time, "first_call", first_call)

    def body(agreement: bench.cluster.Agreement) -> dict[str, Any]:
        return compile_time.row_of(FakeCluster(agreement), case, "default", FakeWatchdog())

    for row in ranks(3, body):
        assert "failed" not in row, row
        assert (row["cold_s"], row["cached_s"]) == (3.0, 3.0)
        assert set(row["steps_s"]) and row["schedule"]["tiles"] and row["rest_s"] > 0
        assert compile_time.line(row).startswith("ag_gemm 384x128x256, default: cold 3.00 s")
    broken = True
    failed = {"name": case.name, "spec": "default", "failed": "rank 1: RuntimeError: no compiler"}
    for row in ranks(3, body):
        assert row == failed
