"""The search, with measurements that are made up: who wins, what is measured again, what is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tilelink.kernels import ag_gemm, gemm_rs
from tilelink.schedules import Move, Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import (
    CHECKED,
    RUNGS,
    STARTED,
    BadLog,
    Log,
    Measured,
    NothingRuns,
    Trial,
    prune,
    search,
)
from tilelink.schedules.space import Space, class_of

H200 = Machine.load()


def schedules(count: int) -> list[Schedule]:
    return [Schedule(tiles=(("M", 64),), group=n + 1, moves=(("A", Move()),)) for n in range(count)]


class Bench:
    """Times by group: ``group`` microseconds, failing where asked; remembers what was measured."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.failing = failing
        self.measured: list[tuple[int, int]] = []

    def __call__(self, some: Sequence[Schedule], samples: int) -> list[Measured]:
        self.measured += [(s.group, samples) for s in some]
        return [
            Measured(failed="it hangs")
            if s.group in self.failing
            else Measured((float(s.group),) * samples)
            for s in some
        ]


def trials(count: int) -> list[Trial]:
    # The model has it the wrong way round.
    return [Trial(s, 100.0 - s.group) for s in reversed(schedules(count))]


def test_the_fastest_wins_and_gets_the_most_samples() -> None:
    bench = Bench()
    result = search(trials(8), bench, Log(None, "c"), lambda: False)
    assert result.best.us == 1.0
    assert result.best.schedule.group == 1
    counts = [sum(s == samples for _, s in bench.measured) for samples in (5, 10, 20)]
    assert counts == [8, 4, 2]
    assert len(result.trials) == 8
    assert result.stopped is None


def test_failures_are_counted_and_told() -> None:
    result = search(trials(6), Bench(failing=(1, 3)), Log(None, "c"), lambda: False)
    assert result.best.schedule.group == 2
    assert sorted(t.schedule.group for t in result.failures) == [1, 3]
    assert "2 failed" in result.summary("k")
    assert [t.failed for t in result.trials[-2:]] == ["it hangs", "it hangs"]


def test_nothing_runs_is_an_error_that_says_why() -> None:
    with pytest.raises(NothingRuns, match="it hangs"):
        search(trials(2), Bench(failing=(1, 2)), Log(None, "c"), lambda: False)


def test_out_of_time_takes_the_best_so_far() -> None:
    result = search(trials(8), Bench(), Log(None, "c"), lambda: True)
    assert result.best.us == 1.0
    assert result.stopped is not None
    assert all(set(t.rungs) == {5} for t in result.trials)


def test_a_log_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = Bench()
    search(trials(6), first, Log(path, "c"), lambda: True)
    assert first.measured == [(n, 5) for n in range(6, 0, -1)]
    again = Bench()
    result = search(trials(6), again, Log(path, "c"), lambda: False)
    assert all(samples > 5 for _, samples in again.measured)
    assert result.best.us == 1.0
    other = Bench()
    search(trials(6), other, Log(path, "another cell"), lambda: True)
    assert len(other.measured) == 6


def test_a_line_that_an_interruption_cut_off_is_forgiven_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    search(trials(2), Bench(), Log(path, "c"), lambda: True)
    text = path.read_text()
    path.write_text(text + '{"cell": "c", "sched')
    assert len(Log(path, "c").known) == 2
    path.write_text('{"cell": "c", "sched\n' + text)
    with pytest.raises(BadLog, match=r"log\.jsonl:1"):
        Log(path, "c")


def test_a_schedule_that_ended_the_run_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, "c")
    for schedule in schedules(2):
        log.mark(schedule, STARTED)
        if schedule.group == 2:
            log.mark(schedule, CHECKED)
    bench = Bench()
    result = search(trials(3), bench, Log(path, "c"), lambda: False)
    assert {group for group, _ in bench.measured} == {2, 3}
    assert [t.schedule.group for t in result.failures] == [1]


def test_every_line_of_a_log_is_json_and_names_its_cell(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    search(trials(4), Bench(failing=(2,)), Log(path, "c"), lambda: False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["cell"] for line in lines} == {"c"}
    assert [line["failed"] for line in lines if line["us"] is None] == ["it hangs"]


def predicted(us_of: dict[str, float]) -> object:
    """A model that knows resources alone; tall tiles are a little better than others."""

    def of(some: Sequence[Schedule]) -> list[float]:
        return [
            us_of.get(class_of(s, None)[2][0], math.inf) - 0.01 * dict(s.tiles).get("M", 0)
            for s in some
        ]

    return of


def test_pruning_keeps_the_default_and_one_of_each_class_that_is_near() -> None:
    op = gemm_rs.build({"M": 2048, "K": 1024, "N": 2048}, {}, 4)
    space = Space(op, H200)
    model = predicted({"copy_engine": 100.0, "sm": 120.0, "epilogue": 150.0, "none": 500.0})
    kept = prune(space, model, keep=16)  # type: ignore[arg-type]
    assert len(kept) == 16
    assert space.base in [t.schedule for t in kept]
    assert [t.predicted_us for t in kept] == sorted(t.predicted_us for t in kept)
    assert {class_of(t.schedule, None)[2][0] for t in kept} == {
        "copy_engine",
        "sm",
        "epilogue",
        "none",  # what does not overlap is measured, whatever the model expects of it
    }
    assert dict(kept[0].schedule.tiles)["M"] == 256


def test_pruning_is_the_same_each_time() -> None:
    op = ag_gemm.build({"M": 2048, "K": 1024, "N": 2048}, {}, 4)
    model = predicted({"copy_engine": 100.0, "sm": 90.0, "none": 95.0})
    first, second = (prune(Space(op, H200), model, keep=6) for _ in range(2))  # type: ignore[arg-type]
    assert [t.schedule for t in first] == [t.schedule for t in second]


def test_pruning_asks_for_no_more_predictions_than_allowed() -> None:
    op = ag_gemm.build({"M": 2048, "K": 1024, "N": 2048}, {}, 4)
    asked: list[Schedule] = []

    def model(some: Sequence[Schedule]) -> list[float]:
        asked.extend(some)
        return [100.0] * len(some)

    prune(Space(op, H200), model, keep=4, effort=6)
    assert len(asked) <= 12
    assert len(set(asked)) == len(asked)


def test_a_schedule_that_cannot_be_compiled_is_not_kept() -> None:
    op = ag_gemm.build({"M": 2048, "K": 1024, "N": 2048}, {}, 4)
    model = predicted({"copy_engine": 100.0})
    kept = prune(Space(op, H200), model, keep=6)  # type: ignore[arg-type]
    assert kept and all(math.isfinite(t.predicted_us) for t in kept)
    assert all(t.schedule.move("A").resource == "copy_engine" for t in kept)


def test_rungs_narrow() -> None:
    assert all(a.samples < b.samples and a.keep > b.keep for a, b in pairwise(RUNGS))
    assert RUNGS[-1].keep == 1


def test_every_form_of_a_computation_meets_the_ways_to_move_that_it_allows() -> None:
    """The best product alone has a last wave in parts, which sums in an epilogue and copying workers exclude."""
    op = gemm_rs.build({"M": 8192, "K": 3584, "N": 8192}, {}, 4)
    space = Space(op, Machine.load("h200x4"))
    seen: list[Schedule] = []

    def predict(schedules: Sequence[Schedule]) -> list[float]:
        seen.extend(schedules)
        return [1.0] * len(schedules)

    prune(space, predict, keep=4, effort=32)
    moves = [(s.emitter, s.tail > 1, s.move("C")) for s in seen]
    assert any(tail for _, tail, _ in moves)
    assert ("gluon", "copy_engine") in {(e, m.resource) for e, _, m in moves if m.sum == "epilogue"}
    assert any(e == "gluon" and m.resource == "epilogue" for e, _, m in moves)


@pytest.mark.parametrize("rows", [1024, 2048])
def test_a_small_sum_may_be_pushed_by_warps_with_roles_whose_tiles_take_turns(rows: int) -> None:
    """The default of the smaller one has two slots, which such a product has not."""
    op = gemm_rs.build({"M": rows, "K": 3584, "N": 8192}, {}, 4)
    space = Space(op, Machine.load("h200x4"))
    seeds = [s for s in space.computations() if s.emitter == "gluon"]
    assert {s.group for s in seeds if dict(s.tiles)["M"] == 128} == (
        {2} if rows == 1024 else {2, 4}
    )
    pushed = [
        s
        for s in space.moves(seeds[0])
        if s.move("C").resource == "epilogue" and s.move("C").direction == "push"
    ]
    assert {s.order for s in pushed} == {"auto", "interleave"}


def test_more_computations_are_ordered_as_their_way_to_move_needs_it() -> None:
    op = gemm_rs.build({"M": 4096, "K": 3584, "N": 8192}, {}, 4)
    space = Space(op, Machine.load("h200x4"))

    def predict(schedules: Sequence[Schedule]) -> list[float]:
        return [1.0 if s.move("C").direction == "pull" else 2.0 for s in schedules]

    pulled = [
        t.schedule
        for t in prune(space, predict, keep=40, effort=96)
        if t.schedule.move("C").direction == "pull" and not t.schedule.move("C").spans
    ]
    assert len({s.tiles for s in pulled}) > 1
    assert {s.order for s in pulled} == {"interleave"}
