"""The three kernels on the simulator over random shapes, tiles, resources and worlds, against the reference."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import LIMIT, MOVED, Case, cases
from tilelink import kernels
from tilelink.backend.reference import relative_error


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
        assert error < LIMIT[case.dtype], f"rank {rank}: {error}"


@pytest.mark.parametrize("kernel", sorted(MOVED))
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_simulator_agrees_with_the_reference(kernel: str, data: st.DataObject) -> None:
    check(data.draw(cases(kernel, worlds=(1, 2, 4, 8))), "simulate")
