"""Emitted programs with a dynamic number of rows on the interpreter: one module, calls of many lengths."""

from __future__ import annotations

import pytest
import torch

from tests.dynamic import CASES, expected, inputs_of, program_of, same
from tilelink import kernels
from tilelink.backend.runtime import interpret
from tilelink.backend.runtime.errors import BadArgument


@pytest.mark.parametrize(("name", "resource"), CASES)
def test_calls_of_many_lengths_follow_each_other(name: str, resource: str) -> None:
    # The largest first, so that what a call leaves behind is there for the smaller ones to trip over.
    lengths = [64, 2, 34, 16, 62, 64, 18] + ([1, 33] if "ar" in name else [])
    calls = [inputs_of(name, rows, seed=rows) for rows in lengths]
    outputs = interpret.run_calls(program_of(name, resource), calls, timeout=120.0)
    for rows, inputs, got in zip(lengths, calls, outputs, strict=True):
        assert same(got, expected(name, rows, inputs), name == "ag_gemm_swiglu"), rows


def test_the_public_call_runs_few_programs() -> None:
    call = kernels.ag_gemm.on("interpret", world=2, dynamic={"M": (32, 96)})
    generator = torch.Generator().manual_seed(3)
    b = [torch.randint(-3, 4, (16, 16), generator=generator).float() for _ in range(2)]
    for rows in (2, 64, 32, 34, 96):
        a = [torch.randint(-3, 4, (rows // 2, 16), generator=generator).float() for _ in range(2)]
        got = call(a, b)
        assert all(torch.equal(c, torch.cat(a) @ y) for c, y in zip(got, b, strict=True)), rows
    assert call.compilations == 2


def test_ranks_with_other_numbers_of_rows_are_refused() -> None:
    program = program_of("gemm_ar", "epilogue")
    inputs = [inputs_of("gemm_ar", rows)[rank] for rank, rows in enumerate((16, 24))]
    with pytest.raises(BadArgument, match=r"is .* on rank 1, .* on rank 0"):
        interpret.run(program, inputs)
