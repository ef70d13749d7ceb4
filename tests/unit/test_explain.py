"""Which schedule a call takes, as it is told; and faults of the compiler in those that give way."""

from __future__ import annotations

import doctest
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tilelink.backend.runtime import choose, faults
from tilelink.errors import InternalError, TilelinkError
from tilelink.frontend.errors import BadCall
from tilelink.ir import Op, parse_ir
from tilelink.kernels import ag_gemm, gemm, gemm_rs
from tilelink.schedules import Schedule, default_schedule

DEVICE = "NVIDIA H200"
ROOT = Path(__file__).parents[2]


def meta(*shape: int) -> torch.Tensor:
    """A shape without data."""
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def test_the_page_shows_what_is_told() -> None:
    parser = doctest.DocTestParser()
    page = (ROOT / "docs" / "tuning.md").read_text().replace("\n```", "\n\n```")
    shown = parser.get_doctest(page, {"torch": torch, "ag_gemm": ag_gemm}, "tuning", None, 0)
    assert len(shown.examples) == 3
    assert doctest.DocTestRunner().run(shown).failed == 0


def test_a_schedule_that_is_given_and_the_default_are_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = meta(64, 64), meta(64, 128)
    asked = Schedule.from_json('{"tiles": {"M": 64, "N": 64, "K": 32}}')
    found = ag_gemm.on(world=2, schedule=asked).explain(a, b, device=DEVICE)
    assert (found.origin, found.schedule, found.world) == ("given", asked, 2)
    assert found.extents == {"M": 128, "K": 64, "N": 128}
    simulated = ag_gemm.on("simulate").explain([a, a], b, device=DEVICE)
    assert (simulated.origin, simulated.world) == ("default", 2)
    unknown = gemm.explain(a, b, device="NVIDIA Nonesuch")
    assert (unknown.origin, unknown.world) == ("default", 1)
    assert "no description of a machine is of NVIDIA Nonesuch" in str(unknown)
    monkeypatch.setenv("TILELINK_TUNED", "0")
    assert ag_gemm.on(world=2).explain(a, b, device=DEVICE).origin == "default"


def test_of_rows_that_vary_the_capacity_is_told() -> None:
    found = ag_gemm.on(world=2, dynamic={"M": (96, 256)}).explain(
        meta(50, 64), meta(64, 128), device=DEVICE
    )
    assert found.extents["M"] == 256


def test_without_a_gpu_one_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadCall, match='device="NVIDIA H200"'):
        gemm.explain(meta(64, 64), meta(64, 64))
    with pytest.raises(BadCall, match="needs the argument `B`"):
        gemm.explain(meta(64, 64), device=DEVICE)


def built() -> Op:
    return gemm_rs.build({"M": 128, "K": 64, "N": 128}, {}, 2)


WRONG = Schedule.from_json('{"moves": {"X": {"resource": "copy_engine"}}}')


def with_choices(monkeypatch: pytest.MonkeyPatch, *schedules: Schedule) -> None:
    made = [choose.Choice(s, f"number {i}") for i, s in enumerate(schedules)]
    monkeypatch.setattr(choose, "choices", lambda *_: iter([*made, choose.Choice(None, "default")]))


def test_what_gave_way_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_choices(monkeypatch, WRONG, default_schedule(built()))
    found = gemm_rs.on(world=2).explain(meta(128, 64), meta(64, 128), device=DEVICE)
    assert found.origin == "number 1"
    ((origin, why),) = found.refused
    assert origin == "number 0" and "no moved tensor `X`" in why and why in str(found)


@pytest.mark.parametrize("error", [InternalError(detail="a wait too many"), KeyError("wait")])
@pytest.mark.parametrize("where", ["compile", "predict"])
def test_a_fault_of_the_compiler_is_told_once_with_what_makes_it_again(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    op, asked = built(), Schedule.from_json('{"tiles": {"M": 64, "N": 64, "K": 32}}')
    monkeypatch.setattr(faults, "_told", set())
    function = "compile_kernel" if where == "compile" else "run_passes"
    real = getattr(choose, function)

    def broken(kernel: Op, schedule: Schedule | None = None) -> Any:
        if schedule == asked:
            raise error
        return real(kernel, schedule)

    monkeypatch.setattr(choose, function, broken)
    with_choices(monkeypatch, asked)
    with caplog.at_level(logging.WARNING, "tilelink"):
        for _ in range(2):
            if where == "compile":
                found = choose.compile_chosen(op, None, DEVICE)
                assert found.origin == "default" and found.refused[0][0] == "number 0"
            else:
                machine: Any = None
                assert choose._predicted_us(op, asked, machine, 1000) == float("inf")
    (record,) = caplog.records
    said = record.getMessage()
    assert "not of your program" in said and "wait" in said
    path = Path(said.split()[-1])
    text = path.read_text()
    path.unlink()
    assert parse_ir(text) == op and asked.to_json() in text and "Traceback" in text
    # What was asked for is not replaced, and there is nothing behind the default.
    if where == "compile":
        with pytest.raises(type(error)):
            choose.compile_chosen(op, asked, DEVICE)


def test_what_is_refused_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_choices(monkeypatch, WRONG)
    assert choose.compile_chosen(built(), None, DEVICE).origin == "default"
    assert not caplog.records
    with pytest.raises(TilelinkError, match="no moved tensor `X`"):
        choose.compile_chosen(built(), WRONG, DEVICE)
