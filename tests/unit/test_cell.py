"""A problem on made-up GPUs: candidates are loaded, compared, captured, timed, and dropped alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.bench_fakes import FakeCluster, FakeEvent, FakeWatchdog, ranks
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.tuning import calibrate, cell, inputs, timing
from tilelink.tuning.cell import Cell
from tilelink.tuning.errors import CannotMakeInputs
from tilelink.tuning.prepare import Prepared
from tilelink.tuning.problem import READY_MADE, Problem

PRODUCT = Problem(READY_MADE, "gemm", {"M": 32, "K": 16, "N": 32}, 1)
FUSED = Problem(READY_MADE, "ag_gemm_swiglu", {"M": 32, "K": 16, "N": 32}, 1)


def schedules(of: Problem, count: int) -> list[Schedule]:
    base = default_schedule(of.build())
    return [replace(base, group=n + 1) for n in range(count)]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """No GPU: events read a made-up clock, graphs are the functions, modules compute with torch."""
    made = SimpleNamespace(wrong=set(), failing=set(), unusable=False, recovered=0, calls=[])

    def run_module(text: str, _: Any, tensors: dict[str, torch.Tensor], *__: Any) -> None:
        group = int(text)
        made.calls.append(group)
        if group in made.failing:
            raise RuntimeError("it hangs")
        FakeEvent.now += 0.001 * group
        tensors["C"].copy_(result(tensors) * (1.5 if group in made.wrong else 1.0))

    def result(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if "Wg" in tensors:
            gate, up = (tensors["A"].float() @ tensors[n].float() for n in ("Wg", "Wu"))
            return torch.nn.functional.silu(gate) * up
        return tensors["A"].float() @ tensors["B"].float()

    from tilelink.backend import runtime

    properties = SimpleNamespace(L2_cache_size=4096, multi_processor_count=4, name="GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent())
    monkeypatch.setattr(cell, "capture", lambda run, _: run)
    monkeypatch.setattr(runtime, "load_module", lambda path: SimpleNamespace(TEXT=path, host=None))
    monkeypatch.setattr(runtime, "run_module", run_module)
    monkeypatch.setattr(timing, "fatal", lambda _: False)
    monkeypatch.setattr(cell.Cell, "_recover", lambda self, wanted: None)
    return made


def opened(of: Problem, some: list[Schedule], part: Any = None, **options: Any) -> Cell:
    prepared = {s.to_json(): Prepared(str(s.group)) for s in some}
    return Cell(part or FakeCluster(), of, prepared, FakeWatchdog(), **options)  # type: ignore[arg-type]


def test_candidates_are_timed_beside_the_library(host: SimpleNamespace) -> None:
    some = schedules(PRODUCT, 3)
    marks: list[tuple[int, str]] = []
    found = opened(PRODUCT, some, mark=lambda s, state: marks.append((s.group, state)))
    measured = found.measure(some, 4)
    assert [m.failed for m in measured] == [None] * 3
    assert [round(m.us, 3) for m in measured] == [1.0, 2.0, 3.0]
    assert all(len(m.samples_us) == 4 for m in measured)
    assert found.baseline == {"cublas": 0.0}
    assert marks == [(g, state) for g in (1, 2, 3) for state in ("started", "checked")]
    # A second rung measures those that it is asked for, and builds none again.
    count = len(host.calls)
    assert [round(m.us, 3) for m in found.measure(some[1:2], 2)] == [2.0]
    assert set(host.calls[count:]) == {2}
    found.close()


def test_wrong_results_and_errors_are_told_and_the_rest_goes_on(host: SimpleNamespace) -> None:
    host.wrong, host.failing = {2}, {3}
    some = schedules(PRODUCT, 4)
    measured = opened(PRODUCT, some).measure(some, 2)
    assert [round(m.us, 3) if m.failed is None else None for m in measured] == [
        1.0,
        None,
        None,
        4.0,
    ]
    assert "wrong result" in str(measured[1].failed)
    assert "it hangs" in str(measured[2].failed)


def test_a_kernel_that_the_library_lacks_must_agree_with_the_trusted_schedule(
    host: SimpleNamespace,
) -> None:
    host.wrong = {2}
    some = schedules(FUSED, 3)
    found = opened(FUSED, some, trusted=some[0])
    measured = found.measure(some, 2)
    assert [m.failed is None for m in measured] == [True, False, True]
    assert found.baseline == {}


def test_a_candidate_that_was_not_compiled_fails_alone(host: SimpleNamespace) -> None:
    some = schedules(PRODUCT, 2)
    measured = opened(PRODUCT, some[:1]).measure(some, 2)
    assert measured[0].failed is None
    assert "not prepared" in str(measured[1].failed)


def test_what_fails_on_one_rank_fails_on_all(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = schedules(PRODUCT, 3)

    def one(agreement: Any) -> list[str | None]:
        part = FakeCluster(agreement)
        found = opened(PRODUCT, some, part)
        if agreement.rank == 1:
            # On this rank alone the second candidate cannot be loaded.
            found.prepared[some[1].to_json()] = Prepared(None)
        return [m.failed for m in found.measure(some, 2)]

    first, second = ranks(2, one)
    assert first == second
    assert [failed is None for failed in first] == [True, False, True]
    assert "rank 1" in str(first[1])


def test_integer_tensors_are_refused(host: SimpleNamespace) -> None:
    op = PRODUCT.build()
    tables = op.with_ops(
        tuple(
            o.with_attrs(dtype="int32") if o.name == "tensor" and o.symbol == "A" else o
            for o in op.body
        )
    )
    with pytest.raises(CannotMakeInputs, match="`A` is int32"):
        inputs.make_sets(tables, FakeCluster(), 0)  # type: ignore[arg-type]


def test_weights_rotate_until_they_leave_the_cache(host: SimpleNamespace) -> None:
    sets = inputs.make_sets(PRODUCT.build(), FakeCluster(), 0)  # type: ignore[arg-type]
    weights = {s["B"].data_ptr() for s in sets.tensors}
    # Twice the cache of 4096 bytes, in sets of A and B of 1024 bytes each.
    assert len(weights) == len(sets.tensors) == 4
    assert len({s["C"].data_ptr() for s in sets.tensors}) == 1


def test_calibration_makes_a_machine_of_what_it_measured(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(part: Any, call: Callable[[], Any], calls: int = 0) -> float:
        FakeEvent.now = 0.0
        return 100.0

    base = Machine.load()
    monkeypatch.setattr(calibrate, "timed_us", timed)
    monkeypatch.setattr(calibrate, "SHORT", (64, 64, 64))
    monkeypatch.setattr(calibrate, "LONG", (128, 64, 64))
    monkeypatch.setattr(calibrate, "STREAM_BYTES", 1 << 10)
    monkeypatch.setattr(calibrate, "emitters", lambda *_: base.emitters)
    machine, lines = calibrate.calibrate(FakeCluster(), base, "gpux1")  # type: ignore[arg-type]
    assert (machine.name, machine.device, machine.world, machine.sms) == ("gpux1", "GPU", 1, 4)
    assert machine.tflops["bf16"] == pytest.approx(2e-6 * 128 * 64 * 64 / 100)
    assert machine.hbm_gbps == pytest.approx(2 * 1024 / 100 * 1e-3)
    assert Machine.from_json(machine.to_json()) == machine
    assert any(line.startswith("tflops = ") for line in lines)
    # What one GPU cannot tell stays as it was.
    assert machine.collective_gbps == base.collective_gbps


def test_copies_give_bandwidth_and_fixed_costs(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([6.4, 6.4 + 127 * 2.8, 14.4])  # 1 MiB, 128 MiB, 1 MiB and four signals
    monkeypatch.setattr(calibrate, "timed_us", lambda *_: next(taken))
    memory = torch.zeros(8, dtype=torch.uint8)
    handle = SimpleNamespace(get_buffer=lambda *_: memory)
    fake = SimpleNamespace(empty=lambda *_, **__: memory, rendezvous=lambda *_: handle)
    monkeypatch.setattr(calibrate, "symm_mem", fake)
    monkeypatch.setattr(calibrate, "COPY_SIZES", (1 << 20, 128 << 20))
    part: Any = FakeCluster()
    found = calibrate.copies(part, Machine.load())
    assert found["link_gbps"] == pytest.approx((1 << 20) / 2.8 * 1e-3)
    assert found["copy_us"] == pytest.approx(6.4 - 2.8 - 1.0)
    assert found["copy_signal_us"] == pytest.approx(2.0)


def test_short_calls_are_timed_several_in_a_row() -> None:
    assert timing.calls_in_a_row(8192, 8192, 7168) == 1
    assert timing.calls_in_a_row(1, 3584, 8192) == timing.MOST_CALLS
    rows = [timing.calls_in_a_row(m, 3584, 8192) for m in (16, 256, 512, 1024, 4096)]
    assert rows == sorted(rows, reverse=True)
