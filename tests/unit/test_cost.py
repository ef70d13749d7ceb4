"""What compiling costs at the shapes that are measured on GPUs, in CPU time: other load does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import verify
from tilelink.kernel import Kernel, load_kernels
from tilelink.schedules import default_schedule

ROOT = Path(__file__).parents[2]
WORLD = 8
SHAPES = [(8192, 8192, 7168), (8192, 3584, 8192)]
FRONT, PROOF, CHECK = 1.0, 2.5, 3.0  # CPU seconds
TRIES = 3
KERNELS = ["ag_gemm", "gemm_ar", "gemm_rs"]


def fresh(name: str) -> Kernel:
    """The kernel as a new process meets it: nothing built yet."""
    return load_kernels(ROOT / "tilelink" / "kernels" / f"{name}.py")[name]


def compile_and_prove(name: str, shape: tuple[int, int, int]) -> tuple[float, float]:
    """CPU seconds of the front end with the passes, and of the proof."""
    kernel = fresh(name)
    started = time.process_time()
    op = kernel.build(dict(zip("MKN", shape, strict=True)), world=WORLD)
    program = run_passes(op, default_schedule(op))
    compiled = time.process_time()
    report = verify(program)
    # A task is a tile or a transfer on one rank: the proof is about all of them.
    assert report.tasks > 10_000
    return compiled - started, time.process_time() - compiled


def check(name: str, shape: tuple[int, int, int]) -> float:
    """CPU seconds of ``tilelink check`` as a process, imports included."""
    extents = ",".join(f"{x}={n}" for x, n in zip("MKN", shape, strict=True))
    file = f"tilelink/kernels/{name}.py::{name}"
    command = [sys.executable, "-m", "tilelink", "check", file, "--set", extents]
    command += ["--world", str(WORLD)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert f"{name}: cannot hang, race or read the wrong tile" in out
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", KERNELS)
def test_compiling_and_proving(name: str, shape: tuple[int, int, int]) -> None:
    # CPU seconds grow where a core is shared, so the best of a few counts.
    runs = [compile_and_prove(name, shape)]
    while runs[-1][0] >= FRONT or runs[-1][1] >= PROOF:
        assert len(runs) < TRIES, runs
        runs.append(compile_and_prove(name, shape))


@pytest.mark.parametrize("name", KERNELS)
def test_check_as_a_process(name: str) -> None:
    seconds = [check(name, SHAPES[0])]
    while seconds[-1] >= CHECK:
        assert len(seconds) < TRIES, seconds
        seconds.append(check(name, SHAPES[0]))
