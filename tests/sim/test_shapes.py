"""The three kernels on the simulator over random shapes, tiles, resources and worlds, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import MOVED, RESOURCES, Case, cases
from tilelink import kernels
from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.simulate import timeline
from tilelink.schedules.machine import Machine


def check(case: Case, backend: str) -> None:
    """Run ``case`` on ``backend`` and on the reference; the error of every rank stays below the limit."""
    kernel = getattr(kernels, case.kernel)
    a, b = case.inputs()
    got = kernel.on(backend, world=case.world, schedule=case.schedule(), seed=case.seed)(a, b)
    expected = kernel.on("reference", world=case.world)(a, b)
    assert len(got) == len(expected) == case.world
    for rank, (mine, reference) in enumerate(zip(got, expected, strict=True)):
        assert mine.dtype == reference.dtype and mine.shape == reference.shape
        error = relative_error(mine, reference)
        assert error < TOLERANCE[case.dtype], f"rank {rank}: {error}"


@pytest.mark.parametrize("kernel", sorted(MOVED))
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_simulator_agrees_with_the_reference(kernel: str, data: st.DataObject) -> None:
    check(data.draw(cases(kernel, worlds=(1, 2, 4, 8))), "simulate")


UNEVEN = Case("gemm_rs", 2, 66, 8, 8, "bf16", "copy_engine", (16, 16, 16), 2, 3, 0)


@pytest.mark.parametrize(
    ("kernel", "resource"), [(k, r) for k in sorted(MOVED) for r in RESOURCES[k] if r != "none"]
)
def test_last_channel_may_be_shorter(kernel: str, resource: str) -> None:
    """Channels of 32 and of 1 row: what is waited for is a different number in each."""
    case = replace(UNEVEN, kernel=kernel, resource=resource)
    check(case, "simulate")
    program = compile_kernel(
        getattr(kernels, kernel).build({"M": case.m, "K": case.k, "N": case.n}, world=case.world),
        case.schedule(),
    )
    assert timeline(program, Machine.load()).seconds > 0
