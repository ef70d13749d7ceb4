"""``tilelink tune --check``: a sound table passes, and each way to break an entry has its own error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tilelink.cli.main import main
from tilelink.errors import TilelinkError
from tilelink.kernels import gemm_rs
from tilelink.schedules.tables import kernel_key, parse_table
from tilelink.tuning import check
from tilelink.tuning.check import (
    BadCode,
    IllegalEntry,
    PredictedSlower,
    RefusedEntry,
    UnknownKernelKey,
    Unlike,
    WrongTarget,
    check_tables,
)
from tilelink.tuning.compiled import DAYS, BadRecord, Record, codes_of

SHAPE = {"M": 512, "K": 256, "N": 512}
GOOD = {"tiles": {"K": 64, "M": 64, "N": 128}, "warps": 4, "moves": {"C": {"resource": "epilogue"}}}


def text_of(change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
    """A table of one sound entry, after ``change``."""
    key = kernel_key(gemm_rs.build(SHAPE, {}, 4))
    data: dict[str, Any] = {
        "kernel": "gemm_rs",
        "key": key,
        "dtype": "bf16",
        "world": 4,
        "device": "NVIDIA H200",
        "runs": [{"source": "test", "date": "2026-01-01", "versions": {}}],
        "entries": [{"extents": SHAPE, "us": 50.0, "schedule": json.loads(json.dumps(GOOD))}],
    }
    change(data)
    return json.dumps(data)


def schedule(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields of the entry's schedule."""
    return lambda data: data["entries"][0]["schedule"].update(fields)


BROKEN = [
    pytest.param(
        lambda d: d.update(kernel="gemm_rss"), UnknownKernelKey, "no kernel `gemm_rss`", id="name"
    ),
    pytest.param(
        lambda d: d.update(key="0" * 16), UnknownKernelKey, "the table is of 0000", id="key"
    ),
    pytest.param(
        lambda d: d.update(device="Abacus"), WrongTarget, "no machine of 4 x Abacus", id="device"
    ),
    pytest.param(lambda d: d.update(world=16), WrongTarget, "16 x NVIDIA H200", id="world"),
    pytest.param(
        schedule(tiles={"K": 128, "M": 128, "N": 256}, stages=5, warps=8),
        IllegalEntry,
        "5 stages",
        id="shared-memory",
    ),
    pytest.param(
        schedule(tiles={"K": 64, "M": 128, "N": 256}), IllegalEntry, "4 warps", id="registers"
    ),
    pytest.param(
        schedule(moves={"X": {"resource": "epilogue"}}),
        RefusedEntry,
        "has no moved tensor `X`",
        id="tensor",
    ),
    pytest.param(
        lambda d: d["entries"][0].update(extents={"M": 512, "K": 256}),
        RefusedEntry,
        "N",
        id="extents",
    ),
    pytest.param(
        schedule(tiles={"K": 16, "M": 16, "N": 32}, stages=2, moves={"C": {"resource": "sm:1"}}),
        PredictedSlower,
        "the default schedule",
        id="slow",
    ),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """All broken tables, and a sound one, in one run: processes take seconds to start."""
    texts = {str(p.id): text_of(p.values[0]) for p in BROKEN}  # type: ignore[arg-type]
    texts["sound"] = text_of()
    tables = [parse_table(text, f"{name}.json") for name, text in texts.items()]
    report = check_tables(tables)
    return {"report": report, "names": list(texts)}


@pytest.mark.parametrize(("change", "error", "words"), BROKEN)
def test_a_broken_entry_is_refused_by_its_kind(
    outcomes: dict[str, Any],
    change: object,
    error: type[TilelinkError],
    words: str,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    found = [e for e in outcomes["report"].errors if f"{name}.json" in str(e)]
    assert [type(e) for e in found] == [error]
    assert words in str(found[0])


def test_a_sound_entry_passes_and_its_kernel_was_compiled(outcomes: dict[str, Any]) -> None:
    report = outcomes["report"]
    assert [e for e in report.errors if "sound.json" in str(e)] == []
    assert len(report.errors) == len(BROKEN)
    assert report.compiled == 1


def test_spilling_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that the filter of shapes would not let pass spills, and the lint says so."""
    from tilelink.tuning.problem import problem_of

    broken = parse_table(text_of(schedule(tiles={"K": 64, "M": 128, "N": 256})), "spill.json")
    problem = problem_of(broken, SHAPE)
    built = check.compile_entry(problem.to_json(), broken.entries[0].schedule.to_json(), "gemm_rs")
    (fault,) = check.read_code([built])
    assert not built.fault and "spills" in fault and "local accesses" in fault
    error = BadCode(place="spill.json, entry 0", detail=fault)
    assert error.code == "table-code"


def test_an_entry_without_a_host_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilelink.backend.emit.host import Host
    from tilelink.backend.emit.scope import CannotEmit
    from tilelink.tuning.problem import problem_of

    def text(_: Host) -> str:
        raise CannotEmit(detail="a host part", advice="use another")

    table = parse_table(text_of(), "host.json")
    problem = problem_of(table, SHAPE).to_json()
    args = problem, table.entries[0].schedule.to_json(), "h200x4"
    assert check.check_entry(*args).kind is None
    monkeypatch.setattr(Host, "text", text)
    assert check.check_entry(*args).kind == "RefusedEntry"


def test_programs_that_differ_in_numbers_alone_share_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilelink.backend.pipeline import run_passes
    from tilelink.schedules import Move, Schedule

    def key(m: int, tile: int, group: int = 8, exact: bool = False) -> str:
        op = gemm_rs.build({"M": m, "K": 256, "N": 512}, {}, 4)
        tiles = (("K", 64), ("M", tile), ("N", 128))
        chosen = Schedule(tiles=tiles, group=group, moves=(("C", Move("epilogue")),))
        (code,) = codes_of(run_passes(op, chosen), chosen)
        return code.digest if exact else code.skeleton

    assert key(1024, 64) == key(2048, 64) == key(1024, 64, group=4)
    assert key(1024, 64) != key(1024, 128)
    here = key(1024, 64, exact=True)
    assert here == key(1024, 64, exact=True) != key(2048, 64, exact=True)
    # It is the same in whatever folder the process runs.
    monkeypatch.chdir(tmp_path)
    assert key(1024, 64, exact=True) == here


def test_a_recorded_kernel_is_compiled_on_its_day_alone_and_must_be_as_recorded(
    outcomes: dict[str, Any],
) -> None:
    ((digest, use),) = outcomes["report"].record.kernels.items()
    table = parse_table(text_of(), "sound.json")
    days = [date(2026, 1, 1 + n) for n in range(DAYS)]
    known = Record.parse(Record({digest: use}).to_json(), "compiled.json")
    (due,) = [day for day in days if not known.trusted(digest, day)]
    other = next(day for day in days if day != due)
    as_recorded = check_tables([table], record=known, day=other)
    assert (as_recorded.compiled, as_recorded.recorded, as_recorded.errors) == (0, 1, ())
    assert as_recorded.record.kernels == known.kernels
    wrong = Record({digest: replace(use, registers=use.registers + 8)})
    found = check_tables([table], record=wrong, day=due)
    (error,) = found.errors
    assert isinstance(error, Unlike) and "sound.json, entry 0: `gemm_rs` is recorded" in str(error)
    assert found.record.kernels == known.kernels
    # A record of other kernels says nothing of this one.
    assert check_tables([table], record=Record({"0" * 32: use}), day=other).compiled == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": {"0": {"registers": 1}}}'])
def test_a_broken_record_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(BadRecord, match=r"compiled\.json: it is no record"):
        Record.parse(text, "compiled.json")


def test_the_record_of_the_package_holds_kernels_without_spills() -> None:
    assert {use.spills for use in Record.load().kernels.values()} == {0}


@pytest.mark.parametrize("arguments", [["--record"], ["TABLE.json", "--check", "--record"]])
def test_a_record_is_of_all_tables(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    assert "error[nothing-to-record]" in capsys.readouterr().err


def test_the_command_prints_every_error_and_exits_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text_of(lambda d: d.update(key="0" * 16)))
    assert main(["tune", str(path), "--check"]) == 1
    said = capsys.readouterr()
    assert "error[table-kernel]" in said.err
    assert "0 entries of 1 tables: 1 wrong" in said.out
    path.write_text('{"kernel": "gemm_rs"}')
    assert main(["tune", str(path), "--check"]) == 1
    assert "error[bad-table]" in capsys.readouterr().err
