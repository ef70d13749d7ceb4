"""The three kernels on the interpreter over random shapes, tiles, resources and worlds, against the reference."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.test_shapes import check
from tests.strategies import MOVED, cases


@pytest.mark.parametrize("kernel", sorted(MOVED))
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_interpreter_agrees_with_the_reference(kernel: str, data: st.DataObject) -> None:
    check(data.draw(cases(kernel, worlds=(2, 4), size=6)), "interpret")
