"""Programs with two slots on the interpreter: call after call, in turn with others, and when ranks break."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.assurance import faults_interpreted
from tests.interpret.test_plan import record
from tilelink import kernels
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret
from tilelink.schedules import Move, Schedule

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kernel", "tensor", "resource", "shots", "signal", "dtype"),
    [
        ("gemm_ar", "C", "epilogue", 1, "flag", "fp32"),
        ("gemm_ar", "C", "sm:1", 2, "flag", "fp32"),
        ("gemm_rs", "C", "epilogue", None, "flag", "fp32"),
        ("ag_gemm", "A", "sm:2", None, "flag", "fp32"),
        ("ag_gemm", "A", "sm:2-boxes", None, "flag", "fp32"),
        ("gemm_rs", "C", "sm:2-boxes", None, "flag", "fp32"),
        ("gemm_ar", "C", "epilogue", 1, "word", "fp32"),
        ("gemm_ar", "C", "epilogue", 2, "word", "fp16"),
        ("gemm_rs", "C", "epilogue", None, "word", "fp16"),
        ("gemm_ar", "C", "epilogue", 1, "sentinel", "fp32"),
        ("gemm_ar", "C", "epilogue", 2, "sentinel", "fp16"),
        ("gemm_rs", "C", "epilogue", None, "sentinel", "fp16"),
    ],
)
def test_calls_in_a_row_are_right(
    kernel: str, tensor: str, resource: str, shots: int | None, signal: str, dtype: str
) -> None:
    world, m, k = 4, 64, 16
    # Rows of 44 elements: tiles that end within a block, at a pair of words.
    n = 32 if signal == "flag" else 44
    op = getattr(kernels, kernel).build({"M": m, "K": k, "N": n}, world=world, dtype=dtype)
    resource, _, copies = resource.partition("-")
    move = Move(resource, shots=shots, slots=2, signal=signal, copies=copies or "rows")
    tiles = tuple((name, 16) for name in "KMN")
    program = compile_kernel(op, Schedule(tiles=tiles, workers=5, moves=((tensor, move),)))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-3, 4, shape, generator=generator)
        return drawn.half() if dtype == "fp16" else drawn.float()

    rows = m // world if kernel == "ag_gemm" else m
    calls = [[{"A": draw(rows, k), "B": draw(k, n)} for _ in range(world)] for _ in range(5)]
    # The epoch passes the largest int32 in the third call.
    outputs = interpret.run_calls(program, calls, epoch=2**31 - 3, timeout=120.0)
    for inputs, ranks in zip(calls, outputs, strict=True):
        if kernel == "ag_gemm":
            whole = torch.cat([i["A"] for i in inputs])
            right = [whole @ i["B"] for i in inputs]
        else:
            total = torch.stack([i["A"].float() @ i["B"].float() for i in inputs]).sum(0)
            right = list(total.chunk(world)) if kernel == "gemm_rs" else [total] * world
        for got, want in zip(ranks, right, strict=True):
            assert torch.equal(got["C"].float(), want)


@pytest.mark.parametrize("signal", ("word", "sentinel"))
@pytest.mark.parametrize(("world", "m", "n"), ((2, 13, 52), (4, 7, 72), (8, 21, 32)))
@pytest.mark.parametrize("shots", (1, 2))
def test_rows_that_fill_no_tile(signal: str, world: int, m: int, n: int, shots: int) -> None:
    """Words that are not written may not be polled, nor be emptied by another task."""
    op = kernels.gemm_ar.build({"M": m, "K": 16, "N": n}, world=world, dtype="fp16")
    move = Move(resource="epilogue", shots=shots, slots=2, signal=signal)
    tiles = (("K", 16), ("M", 16), ("N", 32))
    program = compile_kernel(op, Schedule(tiles=tiles, workers=3, moves=(("C", move),)))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).half()

    calls = [[{"A": draw(m, 16), "B": draw(16, n)} for _ in range(world)] for _ in range(5)]
    outputs = interpret.run_calls(program, calls, timeout=120.0)
    for inputs, ranks in zip(calls, outputs, strict=True):
        want = torch.stack([i["A"].float() @ i["B"].float() for i in inputs]).sum(0)
        assert all(torch.equal(got["C"].float(), want) for got in ranks)


def test_a_call_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    op = kernels.gemm_ar.build({"M": 16, "K": 16, "N": 64}, world=2)
    move = Move(resource="epilogue", shots=2, slots=2)
    program = compile_kernel(op, Schedule(workers=5, moves=(("C", move),)))
    recorded, log, _ = record(program, 0, monkeypatch)
    recorded.enqueue(1)
    assert log == [("kernel", "gemm_ar", 5)]


def test_programs_in_turn_on_the_arenas_of_a_group(tmp_path: Path) -> None:
    world = 3
    command = [sys.executable, "-m", "tests.interpret.slots_rank"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)[-3000:]


@pytest.mark.parametrize("form", ("slots", "words", "sentinels"))
def test_faults_are_named_and_an_epoch_that_is_overwritten_meanwhile_heals(form: str) -> None:
    resources = [resource for _, _, resource in faults_interpreted.CASES]
    number = resources.index(f"epilogue {form}")
    first = number * len(faults_interpreted.FAULTS)
    found = faults_interpreted.attack(4, 2.0, first=first, beyond=4.0, longest=0.5)
    assert found["failures"] == []
    assert found["survived_delays"] == 1 and found["named_errors"] >= 3
