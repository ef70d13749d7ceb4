"""Seconds from the decorator to a binary that can be launched: cold, and from the caches on disk.

    torchrun --nproc-per-node 8 bench/run.py --suite compile --out bench/results/compile.json

A kernel is decorated anew and called on all ranks; the time is over when the call has enqueued it. Cold,
the caches of tilelink and of Triton are empty folders. From cache, everything is done again but what those
folders hold: the front end, the passes and the proof run as they do in a new process. The steps that need no
GPU are timed apart, in their order. What only the first kernel of a process pays is measured on a small
product before all others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import environment
from bench.cases import AG_GEMM, GEMM, GEMM_AR, GEMM_RS, Case

CASES = (
    Case(AG_GEMM, 8192, 8192, 7168, "MLP hidden 8192, intermediate 28672, gate and up"),
    Case(GEMM_RS, 8192, 3584, 8192, "MLP hidden 8192, intermediate 28672, down"),
    Case(GEMM_AR, 64, 3584, 8192, "MLP hidden 8192, intermediate 28672, down"),
    Case(AG_GEMM, 1024, 8192, 7168, "MLP hidden 8192, intermediate 28672, gate and up"),
    Case(GEMM_RS, 1024, 3584, 8192, "MLP hidden 8192, intermediate 28672, down"),
)
FIRST = Case(GEMM, 256, 256, 256, "the first kernel of the process")
EMITTED = "tilelink_emitted."
_made: list[Path] = []  # the caches of this run


def fresh(kernel: Any) -> Any:
    """The kernel of the same file, decorated again: nothing of it is built yet."""
    spec = importlib.util.spec_from_file_location(
        "bench_fresh", kernel.__wrapped__.__code__.co_filename
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


def steps(kernel: Any, case: Case, world: int, schedule: Any) -> dict[str, float]:
    """Seconds of each step that needs no GPU: decorator, typed kernel, passes, proof, emitted source."""
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import run_passes
    from tilelink.backend.verify import verify

    taken: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = step()
        taken[name] = round(time.perf_counter() - begin, 4)
        return result

    made = timed("decorator", lambda: fresh(kernel))
    extents = {"M": case.m, "K": case.k, "N": case.n}
    op = timed("typed kernel", lambda: made.build(extents, {}, world))
    program = timed("passes", lambda: run_passes(op, schedule))
    timed("proof", lambda: verify(program, op))
    timed("emitted source", lambda: emit(program))
    return taken


def forget(disk: bool = False) -> None:
    """Drops the emitted modules that are loaded, with what Triton has compiled for them in memory.

    ``disk``: what the caches that were made for this run hold on disk, too.
    """
    for name in [name for name in sys.modules if name.startswith(EMITTED)]:
        del sys.modules[name]
    if disk:
        for folder in _made:
            shutil.rmtree(folder, ignore_errors=True)


def first_call(part: Any, kernel: Any, case: Case, schedule: Any) -> float:
    """Seconds on this rank from the decorator to the end of the first call, which has enqueued it."""
    import torch

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=part.device)

    a, b = empty(case.rows_in(part.world), case.k), empty(case.k, case.n)
    out = empty(case.rows_out(part.world), case.n)
    part.settle()
    begin = time.perf_counter()
    fresh(kernel).on(group=part.group, schedule=schedule)(a, b, out)
    taken = time.perf_counter() - begin
    part.settle()
    return taken


def together(part: Any, step: Callable[[], Any]) -> tuple[list[Any], dict[str, str]]:
    """What ``step`` gave on every rank, and the error of any under ``failed``. Collective."""
    from bench.cluster import describe_error, fatal

    value, mine = None, {}
    part.agreement.gather(None)
    try:
        value = step()
    except Exception as error:
        if fatal(error):
            raise
        mine["failed"] = describe_error(error)
    return part.agreement.gather(value), part.agreement.errors(mine)


def row_of(part: Any, case: Case, spec: str, watchdog: Any) -> dict[str, Any]:
    """The record of one case and schedule; ``failed`` where any rank could not. Collective."""
    from bench.ours import device_name, kernel_of, schedule_of, shown_schedule

    kernel = kernel_of(case.kind)
    row: dict[str, Any] = {"name": case.name, "spec": spec}
    watchdog.beat(f"compile {case.name}, {spec}")
    schedule: Any = None

    def choose() -> Any:
        nonlocal schedule
        schedule = schedule_of(kernel, case, part.world, spec)
        return shown_schedule(kernel, case, part.world, schedule, device_name(part.device))

    def cold() -> float:
        # Another schedule may have come to the same kernel.
        forget(disk=True)
        return first_call(part, kernel, case, schedule)

    def cached() -> float:
        forget()
        return first_call(part, kernel, case, schedule)

    every = (
        ("schedule", choose),
        ("cold_s", cold),
        ("cached_s", cached),
        ("steps_s", lambda: steps(kernel, case, part.world, schedule)),
    )
    for name, step in every:
        found, failed = together(part, step)
        if failed:
            return {"name": case.name, "spec": spec, **failed}
        row[name] = round(max(found), 3) if name.endswith("d_s") else found[0]
    row["schedule"], row["origin"] = row["schedule"]
    row["rest_s"] = round(row["cold_s"] - sum(row["steps_s"].values()), 3)
    return row


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    head = f"{row['name']}, {row['spec']}: "
    if "failed" in row:
        return head + f"failed: {row['failed']}"
    parts = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in row["steps_s"].items())
    return head + f"cold {row['cold_s']:.2f} s, from cache {row['cached_s']:.2f} s ({parts})"


def measure(options: argparse.Namespace) -> int:
    """The suite: measure, write, print; 1 where a kernel failed."""
    folder = Path(tempfile.mkdtemp(prefix="tilelink-compile-"))
    # Before Triton is imported. A folder for each rank: all compile, as on machines of their own.
    for variable in ("TRITON_CACHE_DIR", "TILELINK_CACHE"):
        os.environ[variable] = str(folder / variable.lower())
        _made.append(folder / variable.lower())
    try:
        return _measure(options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(options: argparse.Namespace) -> int:
    from bench.cluster import Cluster, Watchdog
    from bench.run import specs_of, write_json

    cluster = Cluster()
    header = environment.describe(cluster.world)
    # Folders of this machine are no part of the record.
    header["variables"] = {
        k: v
        for k, v in header["variables"].items()
        if k not in ("TRITON_CACHE_DIR", "TILELINK_CACHE")
    }
    data: dict[str, Any] = {
        "kind": "compile_time",
        **header,
        "suite": "compile",
        "first_s": None,
        "stopped": None,
        "cases": [],
    }

    def write(stopped: str | None = None) -> None:
        data["stopped"] = stopped or data["stopped"]
        if cluster.rank == 0:
            write_json(Path(options.out), data)

    watchdog = Watchdog(options.watchdog + (10 if cluster.rank else 0), write)
    alone = [cluster.part([rank]) for rank in range(cluster.world)][cluster.rank]
    watchdog.beat("the first kernel")
    first = row_of(alone, FIRST, "default", watchdog)
    data["first_s"] = max(s or 0.0 for s in cluster.agreement.gather(first.get("cold_s")))
    for spec in specs_of("compile", options.schedules):
        for case in CASES:
            if options.only in case.name and case.unsupported(cluster.world) is None:
                row = row_of(cluster, case, spec, watchdog)
                data["cases"].append(row)
                write()
                if cluster.rank == 0:
                    print(line(row), flush=True)
    write()
    cluster.agreement.gather(None)
    failed = any("failed" in row for row in data["cases"])
    return 1 if failed and cluster.rank == 0 else 0
