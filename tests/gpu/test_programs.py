"""The GPU tests under pytest: each starts one process a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.harness import failures
from tests.gpu.run_all import LIMITS, run_test, table

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_on_all_gpus(name: str) -> None:
    world = torch.cuda.device_count()
    if world < 2 or (name == "subgroups" and world < 4):
        pytest.skip(f"{world} CUDA devices are too few")
    rows, ranks = run_test(name, world)
    assert failures(ranks, killed=(1,) if name == "killed" else ()) == ""
    assert rows
    assert all(row["ok"] for row in rows), table(rows)
