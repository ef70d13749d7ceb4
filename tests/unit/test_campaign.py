"""A tuning run over many problems with a made-up lab: agreement of ranks, failures, resuming, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bench_fakes import ranks
from tilelink.cli.tune_cuda import failures
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.search import Measured
from tilelink.schedules.tables import Run, lookup, parse_table
from tilelink.tuning.campaign import Outcome, Plan, Settings, campaign, store
from tilelink.tuning.prepare import Prepared
from tilelink.tuning.problem import READY_MADE, Problem

RUN = Run("log", "2026-01-01", {})
DEVICE = "NVIDIA H200"


def problem(m: int = 1024, kernel: str = "ag_gemm") -> Problem:
    return Problem(READY_MADE, kernel, {"M": m, "K": 512, "N": 512}, 4)


def candidates(of: Problem) -> list[Schedule]:
    base = default_schedule(of.build())
    return [base, *(base.with_tiles(M=size) for size in (16, 32, 64))]


def tile_us(schedule: Schedule) -> float:
    return 1000.0 / dict(schedule.tiles)["M"]


class FakeCell:
    def __init__(self, lab: FakeLab, prepared: Mapping[str, Prepared], mark: Any) -> None:
        self.lab, self.prepared, self.mark = lab, prepared, mark
        self.baseline: dict[str, float] = {}
        self.closed = False

    def measure(self, schedules: Sequence[Schedule], samples: int) -> list[Measured]:
        self.lab.calls.append((len(schedules), samples))
        self.baseline["in_turn"] = 100.0
        found = []
        for schedule in schedules:
            self.mark(schedule, "started")
            if dict(schedule.tiles)["M"] == self.lab.fatal:
                raise KeyboardInterrupt
            self.mark(schedule, "checked")
            if dict(schedule.tiles)["M"] == self.lab.wrong:
                found.append(Measured(failed="wrong result"))
            else:
                # Each rank sees a time of its own; what counts is the same for all.
                mine = tile_us(schedule) + self.lab.rank
                times = self.lab.agreement.gather(mine) if self.lab.agreement else [mine]
                found.append(Measured((max(times),) * samples))
        return found

    def close(self) -> None:
        self.closed = True


class FakeLab:
    """Compiles nothing and measures by formula. ``agreement`` joins ranks that are threads."""

    def __init__(
        self,
        agreement: Any = None,
        wrong: int = 0,
        fatal: int = 0,
        uncompiled: int = 0,
    ) -> None:
        self.agreement, self.wrong, self.fatal, self.uncompiled = (
            agreement,
            wrong,
            fatal,
            uncompiled,
        )
        self.rank = agreement.rank if agreement else 0
        self.calls: list[tuple[int, int]] = []
        self.cells: list[FakeCell] = []
        self._submitted: dict[str, list[Schedule]] = {}

    def first(self, value: Any) -> Any:
        return self.agreement.first(value) if self.agreement else json.loads(json.dumps(value))

    def plan(self, problems: Sequence[Problem], keep: int, effort: int) -> list[list[Plan]]:
        assert self.rank == 0
        return [[Plan(s.to_json(), 1.0) for s in candidates(p)[:keep]] for p in problems]

    def submit(self, of: Problem, schedules: Sequence[Schedule]) -> None:
        assert self.rank == 0
        self._submitted[of.cell] = list(schedules)

    def ready(self, of: Problem) -> dict[str, Prepared]:
        assert self.rank == 0
        return {
            s.to_json(): Prepared(None, "does not compile")
            if dict(s.tiles)["M"] == self.uncompiled
            else Prepared("module.py")
            for s in self._submitted[of.cell]
        }

    def open(
        self,
        of: Problem,
        prepared: Mapping[str, Prepared],
        mark: Callable[[Schedule, str], None],
        trusted: Schedule | None,
    ) -> FakeCell:
        assert trusted is not None
        self.cells.append(FakeCell(self, prepared, mark))
        return self.cells[-1]


def run(
    lab: FakeLab, problems: list[Problem], log: Path | None = None, **changes: Any
) -> list[Outcome]:
    return campaign(problems, lab, Settings(**changes), log, lambda _: None)


def best(outcome: Outcome) -> int:
    assert outcome.result is not None
    return dict(outcome.result.best.schedule.tiles)["M"]


def test_every_problem_gets_its_fastest_schedule_and_the_baseline() -> None:
    lab = FakeLab()
    outcomes = run(lab, [problem(), problem(2048)])
    assert [best(o) for o in outcomes] == [128, 128]
    assert all(o.baseline == {"in_turn": 100.0} for o in outcomes)
    assert all(cell.closed for cell in lab.cells)


def test_ranks_decide_alike_by_the_slowest_of_them() -> None:
    results = ranks(3, lambda agreement: run(FakeLab(agreement), [problem(), problem(2048)]))
    assert [[best(o) for o in rank] for rank in results] == [[128, 128]] * 3
    times = {round(o.result.best.us, 3) for rank in results for o in rank if o.result is not None}
    assert times == {round(1000 / 128 + 2, 3)}


def test_failures_of_compiling_and_of_running_are_told() -> None:
    outcomes = run(FakeLab(wrong=64, uncompiled=32), [problem()])
    assert best(outcomes[0]) == 128
    told = failures(outcomes)
    assert len(told) == 2
    assert any("does not compile" in line for line in told)
    assert any("wrong result" in line for line in told)


def test_a_problem_of_which_nothing_runs_does_not_stop_the_others() -> None:
    lab = FakeLab(wrong=128)
    outcomes = run(lab, [problem(), problem(2048)], keep=1)
    assert [o.result for o in outcomes] == [None, None]
    assert all("none of 1 schedules" in str(o.skipped) for o in outcomes)
    assert all(cell.closed for cell in lab.cells)
    assert len(failures(outcomes)) == 2


def test_problems_beyond_the_budget_are_named() -> None:
    outcomes = run(FakeLab(), [problem()], budget=0.0)
    assert outcomes[0].result is None
    assert "out of time" in str(outcomes[0].skipped)


def test_an_interrupted_run_goes_on_without_what_stopped_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(FakeLab(fatal=64), [problem(2048), problem()], log)
    again = FakeLab(fatal=64)
    outcomes = run(again, [problem(2048)], log)
    assert best(outcomes[0]) == 128
    assert any("an earlier run ended" in line for line in failures(outcomes))
    last = FakeLab()
    outcomes = run(last, [problem(2048)], log)
    assert last.calls == []
    assert best(outcomes[0]) == 128


def test_what_was_found_is_stored_and_found_again(tmp_path: Path) -> None:
    outcomes = run(FakeLab(), [problem(), problem(2048), problem(1024, "gemm_rs")])
    files = store(outcomes, DEVICE, RUN, tmp_path)
    assert [f.name for f in files] == ["ag_gemm.bf16.h200x4.json", "gemm_rs.bf16.h200x4.json"]
    tables = [parse_table(f.read_text(), f.name) for f in files]
    assert [len(t.entries) for t in tables] == [2, 1]
    found = lookup(problem(2048).build(), DEVICE, tables)
    assert found is not None
    assert dict(found.schedule.tiles)["M"] == 128
    assert found.entry.baseline_us == 100.0
    # A second run replaces and adds.
    store(run(FakeLab(), [problem(4096)]), DEVICE, RUN, tmp_path)
    again = parse_table((tmp_path / files[0].name).read_text(), files[0].name)
    assert sorted(e.extents["M"] for e in again.entries) == [1024, 2048, 4096]


def test_problems_round_trip_and_have_names_of_their_own() -> None:
    one = problem()
    assert Problem.from_json(one.to_json()) == one
    nk = Problem(READY_MADE, "ag_gemm", one.extents, 4, constants={"nk": True})
    assert Problem.from_json(nk.to_json()) == nk
    assert nk.cell != one.cell
    assert nk.table(DEVICE).file_name != one.table(DEVICE).file_name
    assert math.prod(one.extents.values()) == 1024 * 512 * 512
