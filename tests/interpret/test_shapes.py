"""The three kernels on the interpreter over random shapes, tiles, resources and worlds, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.test_shapes import check
from tests.strategies import MOVED, Case, cases
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret
from tilelink.kernels import gemm_rs


@pytest.mark.parametrize("kernel", sorted(MOVED))
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_interpreter_agrees_with_the_reference(kernel: str, data: st.DataObject) -> None:
    check(data.draw(cases(kernel, worlds=(2, 4), size=6)), "interpret")


def test_a_folded_sum_has_the_bits_of_a_stage_of_its_own() -> None:
    case = Case("gemm_rs", 3, 96, 40, 72, "bf16", "copy_engine", (32, 64, 32), 2, 3, 7)
    op = gemm_rs.build({"M": case.m, "K": case.k, "N": case.n}, world=case.world)
    left, right = case.inputs()
    inputs = [{"A": a, "B": b} for a, b in zip(left, right, strict=True)]
    found = []
    for resource in ("copy_engine", "copy_engine-folded", "epilogue-folded"):
        program = compile_kernel(op, replace(case, resource=resource).schedule())
        found.append([out["C"] for out in interpret.run(program, inputs, timeout=150.0)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
