"""Ranks that are broken on purpose, on the interpreter: named errors in time, and work behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.assurance.faults_interpreted import FAULTS, attack

ROOT = Path(__file__).parents[2]


def test_every_fault_is_named_in_time_and_the_next_run_works() -> None:
    # Other work on the machine slows the interpreter; the module itself holds a second. The epoch is that of a
    # program with streams: where the kernel alone writes it, what is overwritten heals.
    found = attack(len(FAULTS), 2.0, first=16, beyond=4.0, longest=0.5)
    assert found["failures"] == []
    assert found["by_fault"] == dict.fromkeys(FAULTS, 1)
    assert found["survived_delays"] == 1 and found["named_errors"] >= 1 + 2 + 2


def broken(*faults: str, runs: int = 1) -> dict[str, Any]:
    """What ``tests.gpu.faults`` says without GPUs: the run time of torch.distributed groups."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.faults", "--cpu", "--runs", str(runs), *faults],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("fault", ["kill", "exception"])
def test_live_ranks_of_a_process_group_go_on_in_a_new_generation(fault: str) -> None:
    found = broken(fault)
    assert (found["runs"], found["ok"], found["hangs"]) == (1, 1, 0)
    assert found["by_fault"][fault]["worst_s"] < 10
