"""Candidates compiled ahead, scores of the model, tables of raw data, and the command line of tuning."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilelink.cli.main import main
from tilelink.kernels import gemm_rs
from tilelink.schedules import Move, Schedule, default_schedule
from tilelink.schedules.machine import BadMachineError, Machine, UnknownMachineError
from tilelink.tuning.harvest import BadHarvest, harvest
from tilelink.tuning.lab import plan_problem
from tilelink.tuning.prepare import Prepared, prepare
from tilelink.tuning.problem import READY_MADE, Problem
from tilelink.tuning.score import (
    BadChangesFile,
    BadScoreFile,
    Point,
    changes_of,
    in_words,
    newest,
    points_of,
    score,
)

ROOT = Path(__file__).parents[2]
PROBLEM = Problem(READY_MADE, "gemm_rs", {"M": 512, "K": 128, "N": 256}, 4)


def case(**candidates: Any) -> dict[str, Any]:
    base = default_schedule(PROBLEM.build())
    rows = []
    for name, samples in candidates.items():
        ours = name.startswith("tilelink")
        schedule = None
        if ours:
            resource = {"copy": "copy_engine"}.get(name.split("_")[1], name.split("_")[1])
            schedule = json.loads(base.with_resource(resource).to_json())
        rows.append(
            {
                "name": name.replace("_graph", " graph"),
                "family": "tilelink" if ours else name,
                "schedule": schedule,
                "samples_us": samples or [],
                "failed": None if samples else "it hangs",
            }
        )
    return {"kind": "gemm_rs", "m": 512, "k": 128, "n": 256, "world": 4, "candidates": rows}


def raw(*cases: dict[str, Any]) -> str:
    return json.dumps(
        {
            "date": "2026-01-01T00:00",
            "versions": {"triton": "3.6.0"},
            "hardware": {"gpu": "NVIDIA H200"},
            "cases": list(cases),
        }
    )


def test_a_candidate_is_proven_emitted_and_compiled_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILELINK_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    driver = pytest.importorskip("triton").runtime.driver
    before = driver._active
    try:
        schedule = default_schedule(PROBLEM.build()).with_tiles(M=64, N=64)
        done = prepare(PROBLEM.to_json(), schedule.to_json())
        assert done.failed is None
        assert done.path is not None
        assert "def gemm_rs" in Path(done.path).read_text()
        cubins = set((tmp_path / "triton").rglob("*.cubin"))
        assert len(cubins) == 1
        # A second time all of it is in the caches.
        assert prepare(PROBLEM.to_json(), schedule.to_json()) == done
        assert set((tmp_path / "triton").rglob("*.cubin")) == cubins
        wrong = schedule.to_json().replace('"C": {', '"X": {')
        refused = prepare(PROBLEM.to_json(), wrong)
    finally:
        driver._active = before
    assert refused == Prepared(None, refused.failed)
    assert "has no moved tensor `X`" in str(refused.failed)


def test_plans_hold_schedules_that_can_be_emitted() -> None:
    plans = plan_problem(PROBLEM.to_json(), Machine.load("h200x4").to_json(), 4, 8)
    assert 2 <= len(plans) <= 4
    assert [p.predicted_us for p in plans] == sorted(p.predicted_us for p in plans)
    assert default_schedule(PROBLEM.build()) in [Schedule.from_json(p.schedule) for p in plans]


def test_replays_count_where_there_are_both() -> None:
    text = raw(case(tilelink_copy=[50.0, 52.0], tilelink_copy_graph=[40.0], tilelink_none=[60.0]))
    points = points_of(text, "x.json")
    assert sorted(p.us for p in points) == [40.0, 60.0]
    assert all(p.problem == PROBLEM for p in points)


def test_a_score_says_how_far_off_and_how_often_right() -> None:
    text = raw(case(tilelink_copy=[1e6], tilelink_none=[10.0], tilelink_epilogue=[10.5]))
    found = score(points_of(text, "x.json"))
    assert found.median_error > 0.5
    assert list(found.picks) == [PROBLEM.cell]
    pick = found.picks[PROBLEM.cell]
    assert pick.best.point.us == 10.0
    assert pick.ratio == pick.picked.point.us / 10.0
    assert found.good_share == float(pick.close)
    assert set(found.classes()) == {"triton copy_engine", "triton none", "triton epilogue"}


def test_a_log_of_trials_can_be_scored() -> None:
    schedule = default_schedule(PROBLEM.build()).to_sparse()
    lines = [
        {"cell": PROBLEM.cell, "problem": json.loads(PROBLEM.to_json())},
        {"cell": PROBLEM.cell, "schedule": schedule, "state": "started"},
        {"cell": PROBLEM.cell, "schedule": schedule, "samples": 5, "us": 70.0, "failed": None},
        {"cell": PROBLEM.cell, "schedule": schedule, "samples": 20, "us": 60.0, "failed": None},
    ]
    points = points_of("\n".join(map(json.dumps, lines)), "log.jsonl")
    assert [p.us for p in points] == [60.0]


def point(us: float, date: str, kernel: str = "gemm_rs", **changes: Any) -> Point:
    """A measurement of the default schedule with some fields changed."""
    problem = replace(PROBLEM, kernel=kernel)
    return Point(problem, replace(default_schedule(PROBLEM.build()), **changes), us, date)


def test_of_several_measurements_the_newest_counts() -> None:
    old, new, other = point(50.0, "2026-01-01"), point(40.0, "2026-01-02"), point(7.0, "", stages=2)
    assert newest([new, old, other]) == [new, other]
    assert newest([old, other, new]) == [new, other]
    # Of the same date the last one given; what has no date is older than what has.
    assert newest([new, replace(new, us=41.0)])[0].us == 41.0
    assert newest([new, replace(new, us=41.0, date="")])[0].us == 40.0


def test_points_have_the_date_of_their_file() -> None:
    text = json.dumps({**json.loads(raw(case(tilelink_copy=[50.0]))), "date": "2026-05-01T10:00"})
    assert [p.date for p in points_of(text, "x.json")] == ["2026-05-01T10:00"]
    lines = [
        {"cell": PROBLEM.cell, "problem": json.loads(PROBLEM.to_json()), "date": "2026-05-02"},
        {"cell": PROBLEM.cell, "schedule": {}, "samples": 5, "us": 70.0, "failed": None},
    ]
    assert [p.date for p in points_of("\n".join(map(json.dumps, lines)), "x")] == ["2026-05-02"]


def test_what_was_measured_of_other_code_is_left_out() -> None:
    rule = {"before": "2026-02", "why": "new", "schedule": {"stages": 2}, "move": {"slots": 1}}
    (change,) = changes_of(json.dumps([{**rule, "kernels": ["gemm_rs"]}]), "rules.json")
    stale = point(50.0, "2026-01-31", stages=2)
    assert change.outdates(stale)
    two = replace(stale.schedule.moves[0][1], slots=2, resource="epilogue")
    kept = [
        point(50.0, "2026-02-01", stages=2),
        point(50.0, "2026-01-31", stages=3),
        point(50.0, "2026-01-31", "gemm_ar", stages=2),
        point(50.0, "2026-01-31", stages=2, moves=(("C", two),)),
    ]
    assert newest([stale, *kept], [change]) == kept


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[3]",
        '[{"why": "x"}]',
        '[{"before": "2026"}]',
        '[{"before": 3, "why": "x"}]',
        '[{"before": "2026", "why": "x", "move": {"colour": 1}}]',
    ],
)
def test_rules_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadChangesFile, match=r"x\.json"):
        changes_of(text, "x.json")


def test_the_rules_of_the_benchmarks_are_rules() -> None:
    path = ROOT / "bench" / "changes.json"
    rules = changes_of(path.read_text(), path.name)
    assert rules and all(rule.why for rule in rules)


def test_a_schedule_in_words_names_what_is_unusual() -> None:
    move = Move(resource="epilogue", sum="epilogue", slots=2)
    schedule = Schedule(tiles=(("K", 64), ("M", 128), ("N", 256)), stages=4, moves=(("C", move),))
    assert in_words(schedule) == "triton 128x256x64 stages=4 epilogue sum=epilogue slots=2"
    assert in_words(replace(schedule, emitter="library", moves=())) == "library"


@pytest.mark.parametrize("text", ["[1", '{"cases": []}', '{"cases": [{}]}'])
def test_files_without_measurements_are_refused(text: str) -> None:
    with pytest.raises(BadScoreFile, match=r"x\.json"):
        points_of(text, "x.json")


def test_tables_are_made_of_the_fastest_of_each_cell() -> None:
    text = raw(
        case(
            in_turn=[30.0],
            async_tp=[25.0],
            cublas=[5.0],
            tilelink_copy=[22.0, 20.0, 21.0],
            tilelink_none=None,
            tilelink_epilogue=[24.0],
        )
    )
    (table,) = harvest(text, "raw.json")
    (entry,) = table.entries
    assert (entry.us, entry.baseline, entry.baseline_us) == (21.0, "async_tp", 25.0)
    assert entry.schedule.move("C").resource == "copy_engine"
    assert table.runs[0].source == "raw.json"
    again = harvest(text, "raw.json", [table])
    assert again == [table]


def test_a_schedule_stays_until_another_one_is_clearly_faster_in_the_same_run() -> None:
    (table,) = harvest(raw(case(tilelink_copy=[20.0], tilelink_epilogue=[24.0])), "first.json")

    def after(**times: list[float] | None) -> tuple[str, float]:
        (made,) = harvest(raw(case(**times)), "second.json", [table])
        (entry,) = made.entries
        return entry.schedule.move("C").resource, entry.us

    # Its new time counts, slower or not; times of two runs are not compared.
    assert after(tilelink_copy=[23.0], tilelink_epilogue=[22.9]) == ("copy_engine", 23.0)
    assert after(tilelink_copy=[23.0], tilelink_epilogue=[22.5]) == ("epilogue", 22.5)
    assert after(tilelink_epilogue=[24.0]) == ("epilogue", 24.0)


def test_a_schedule_that_keeps_the_host_busy_is_no_new_entry() -> None:
    made = case(tilelink_copy=[20.0], tilelink_epilogue=[24.0])
    copied = next(c for c in made["candidates"] if "copy" in c["name"])
    for host_us, resource in ((60.0, "copy_engine"), (120.0, "epilogue")):
        copied["host_us"] = host_us
        (table,) = harvest(raw(made), "raw.json")
        assert table.entries[0].schedule.move("C").resource == resource


def test_a_schedule_that_may_be_no_entry_gives_way_to_the_next_fastest() -> None:
    def no(*resources: str) -> Callable[[Problem, Schedule, str], str]:
        return lambda _problem, schedule, _device: (
            "spills" if schedule.move("C").resource in resources else ""
        )

    text = raw(case(tilelink_copy=[20.0], tilelink_epilogue=[24.0]))
    (table,) = harvest(text, "raw.json", (), no("copy_engine"))
    (entry,) = table.entries
    assert (entry.schedule.move("C").resource, entry.us) == ("epilogue", 24.0)
    # What the table has stays: another check is there for it.
    (again,) = harvest(text, "raw.json", [table], no("copy_engine", "epilogue"))
    assert again.entries == table.entries
    assert harvest(text, "raw.json", (), no("copy_engine", "epilogue")) == []


def test_harvesting_leaves_out_what_the_check_of_tables_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spilling = case(tilelink_copy=[20.0], tilelink_epilogue=[25.0])
    for row in spilling["candidates"]:
        if row["name"] == "tilelink_copy":
            row["schedule"]["tiles"] |= {"M": 128, "N": 256}
            row["schedule"]["warps"] = 4
    path, out = tmp_path / "raw.json", tmp_path / "tuned"
    path.write_text(raw(spilling))
    assert main(["tune", "--harvest", str(path), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"left out: {PROBLEM.cell}: the schedule does not fit the GPU" in said
    (entry,) = json.loads(next(out.iterdir()).read_text())["entries"]
    assert entry["us"] == 25.0


def test_what_is_no_benchmark_makes_no_table() -> None:
    with pytest.raises(BadHarvest, match=r"raw\.json"):
        harvest("{}", "raw.json")


def test_machines_round_trip_and_stand_for_fewer_gpus() -> None:
    whole = Machine.load()
    assert Machine.from_json(whole.to_json()) == whole
    four = Machine.load("h200x4")
    assert (four.world, four.name, four.tflops) == (4, "h200x4", whole.tflops)
    assert Machine.of_device("NVIDIA H200", 4) == four
    assert Machine.of_device("NVIDIA H200", 16) is None
    assert Machine.of_device("Abacus", 4) is None
    for name in ("h200x16", "h200x", "h200xfour", "abacusx4"):
        with pytest.raises(UnknownMachineError):
            Machine.load(name)
    with pytest.raises(BadMachineError, match="tflops"):
        Machine.from_json("{}")


def test_collectives_of_other_numbers_of_ranks_take_the_nearest_curve() -> None:
    machine = Machine.load()
    size = 64 << 20
    two, four = (machine.collective_us("all_gather", size, world) for world in (2, 4))
    assert two == pytest.approx(four * (1 / 2) / (3 / 4))
    # There is no curve of an all-reduce of two.
    two, four = (machine.collective_us("all_reduce", size, world) for world in (2, 4))
    assert two == pytest.approx(four * (1 / 2) / (3 / 4))


def test_the_command_searches_by_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "tilelink" / "kernels" / "gemm_rs.py")
    command = ["tune", f"{file}::gemm_rs", "--simulate", "--target", "h200x4", "--effort", "8"]
    command += ["--dtype", "fp16"]
    assert main([*command, "--candidates", "3", "--set", "M=512,K=256,N=512"]) == 0
    said = capsys.readouterr().out
    assert "predicted for h200x4 at world 4" in said
    assert "the first is proven" in said
    pasted = next(line for line in said.splitlines() if "--schedule '" in line)
    words = shlex.split(pasted)
    assert main(words[1:]) == 0
    ran = capsys.readouterr().out.splitlines()[1].split()
    assert ran[1:4] == ["simulate", "4", "fp16"] and "M=512" in ran
    text = words[-1]
    op = gemm_rs.build({"M": 512, "K": 256, "N": 512}, {}, 4)
    assert dict(Schedule.from_json(text).tiles).keys() == dict(default_schedule(op).tiles).keys()


def test_what_is_asked_for_restricts_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "tilelink" / "kernels" / "gemm_rs.py")
    command = ["tune", f"{file}::gemm_rs", "--simulate", "--effort", "16", "--candidates", "4"]
    command += ["--set", "M=512,K=256,N=512", "--world", "4", "--target", "h200x4"]
    tile = "M=64,K=64,N=64"
    asked = ["--emitter", "triton", "--tile", tile, "--resource", "C=epilogue", "--workers", "96"]
    assert main([*command, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [Schedule.from_json(line[line.index("{") :]) for line in lines if line[:1].isdigit()]
    assert found
    for schedule in found:
        assert (schedule.emitter, schedule.workers) == ("triton", 96)
        assert dict(schedule.tiles) == {"M": 64, "K": 64, "N": 64}
        assert schedule.move("C").resource == "epilogue"


@pytest.mark.parametrize(
    "option", ["--schedule={}", "--trials=t.jsonl", "--out=t.json", "--changes=r.json"]
)
def test_what_a_search_by_the_model_has_no_use_for_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "tilelink" / "kernels" / "gemm_rs.py")
    assert main(["tune", file, "--simulate", option]) == 2
    said = capsys.readouterr().err
    assert f"error[not-of-this-search]: {option.partition('=')[0]} does not apply" in said


def test_a_search_by_measuring_is_of_all_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "tilelink" / "kernels" / "gemm_rs.py")
    assert main(["tune", file, "--emitter", "gluon"]) == 2
    assert "error[not-of-this-search]: --emitter does not apply" in capsys.readouterr().err


def test_the_command_scores_and_harvests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.json"
    path.write_text(raw(case(tilelink_epilogue=[40.0], tilelink_none=[45.0], in_turn=[50.0])))
    main(["tune", "--score", str(path)])
    said = capsys.readouterr().out
    assert "2 points in 1 cells" in said
    assert (
        next(line for line in said.splitlines() if line.startswith(PROBLEM.cell)).split()[6] == "2"
    )
    assert "gemm_rs, up to 1024 rows: 2 points in 1 cells" in said
    rules = tmp_path / "rules.json"
    rules.write_text('[{"before": "9", "why": "x", "move": {"resource": "none"}}]')
    main(["tune", "--score", str(path), "--score", str(path), "--changes", str(rules)])
    assert "1 points (3 older ones left out) in 1 cells" in capsys.readouterr().out
    out = tmp_path / "tuned"
    assert main(["tune", "--harvest", str(path), "-o", str(out)]) == 0
    assert [p.name for p in out.iterdir()] == ["gemm_rs.bf16.h200x4.json"]


def test_the_command_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tune"]) == 2
    assert "error[nothing-to-tune]" in capsys.readouterr().err
    from tilelink.cli import tune

    monkeypatch.setattr(tune, "lacking", lambda _: "a CUDA device")
    file = str(ROOT / "examples" / "gemm_rs.py")
    assert main(["tune", file]) == 1
    assert "--simulate searches without" in capsys.readouterr().err
    assert main(["tune", "--calibrate"]) == 1
    assert "it measures, and lacks a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(tune, "lacking", lambda _: "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["tune", file]) == 1
    assert "torchrun" in capsys.readouterr().err


def test_a_candidate_is_compiled_ahead_as_a_launch_compiles_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where words signal themselves the assembler is given all registers: left alone it would spill some."""
    monkeypatch.setenv("TILELINK_CACHE", str(tmp_path / "modules"))
    driver = pytest.importorskip("triton").runtime.driver
    from tilelink.backend.runtime import plan

    given: list[bool] = []
    real, before = plan.compile_launch, driver._active

    def compile_launch(*args: Any, **options: Any) -> Any:
        given.append("maxnreg" in options)
        return real(*args, **options)

    monkeypatch.setattr(plan, "compile_launch", compile_launch)
    problem = Problem("tilelink.kernels", "gemm_ar", {"M": 64, "K": 128, "N": 768}, 4, "bf16")
    schedule = default_schedule(problem.build())
    move = replace(schedule.moves[0][1], slots=2)
    try:
        for signal in ("sentinel", "flag"):
            one = replace(schedule, moves=(("C", replace(move, signal=signal)),))
            assert prepare(problem.to_json(), one.to_json()).failed is None
    finally:
        driver._active = before
    assert given == [True, False]
