"""What one rank does in a GPU test: ``python -m tests.gpu.worker TEST [JSON_FILE]`` under the harness.

Rank 0 writes the rows of the result table as JSON. Any error ends the process at once with code 1, so
that no destructor waits for a peer that will never answer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.kernels import (
    Case,
    bind,
    cases,
    gathered,
    inputs_for,
    reference,
    shared,
)
from tests.gpu.varying import unequal, varying
from tilelink.backend.accuracy import TOLERANCE, row_error
from tilelink.backend.runtime.errors import AgreementError, WaitTimeout
from tilelink.backend.runtime.watch import synchronize
from tilelink.errors import TilelinkError

Row = dict[str, Any]


def worst(error: torch.Tensor) -> float:
    """The largest of all ranks' errors."""
    both = error.detach().clone().reshape(1)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both)


def correctness(rank: int, world: int) -> list[Row]:
    """Every case twice on fresh inputs, against torch in fp32; those that the third argument names, if any."""
    rows = []
    for number, case in enumerate(cases(*sys.argv[3:4])):
        if shared(world) and case.resource.startswith("none"):
            continue  # the library's collectives need a GPU a rank
        row: Row = {**case.__dict__, "world": world}
        started = time.monotonic()
        try:
            call, error = bind(case, world), 0.0
            for seed in (2 * number, 2 * number + 1):
                a, b = inputs_for(case, rank, world, seed)
                want = reference(case, a, b, world)
                got = call(a, b)
                synchronize()
                error = max(error, worst(row_error(got, want)))
            row |= {"error": error, "ok": error < TOLERANCE[case.dtype]}
            if not shared(world):
                row |= host_time(call, a, b)
        except WaitTimeout:
            raise
        except TilelinkError as problem:
            row |= {"error": None, "ok": False, "refused": str(problem).splitlines()[0]}
        row["seconds"] = round(time.monotonic() - started, 2)
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
    return rows


def host_time(call: Any, a: torch.Tensor, b: torch.Tensor, calls: int = 20) -> Row:
    """Microseconds that a call keeps the host, and that it takes on the GPU, medians."""
    out = call(a, b)
    host, events = [], []
    for _ in range(calls):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        before = time.perf_counter()
        out = call(a, b)
        host.append(time.perf_counter() - before)
        stop.record()
        events.append((start, stop))
    synchronize()
    del out
    device = sorted(s.elapsed_time(e) for s, e in events)
    return {
        "host_us": round(sorted(host)[calls // 2] * 1e6, 1),
        "gpu_us": round(device[calls // 2] * 1e3, 1),
    }


def graph(rank: int, world: int) -> list[Row]:
    """Captures each kernel once, replays it on fresh inputs, compares every output on the device."""
    rows = []
    replays = 50 if shared(world) else 1000
    plain = [Case(kernel, 512, 512, 768) for kernel in ("ag_gemm", "gemm_rs", "gemm_ar")]
    library = [replace(case, emitter="library") for case in plain]
    alone = [replace(case, resource="none") for case in library if not shared(world)]
    for case in (*plain, *library, *alone):
        call = bind(case, world)
        a, b = inputs_for(case, rank, world, 0)
        call(a, b)
        synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = call(a, b)
        torch.cuda.synchronize()
        error = torch.zeros((), device="cuda")
        for replay in range(replays):
            fresh = inputs_for(case, rank, world, replay + 1)
            a.copy_(fresh[0])
            b.copy_(fresh[1])
            captured.replay()
            error = torch.maximum(error, row_error(out, reference(case, a, b, world)))
            if replay % 7 == 0:
                # Eager calls between replays share the same epochs.
                eager = call(a, b)
                error = torch.maximum(error, row_error(eager, reference(case, a, b, world)))
        synchronize()
        largest = worst(error)
        ok = largest < TOLERANCE["bf16"]
        rows.append(
            {
                "test": "graph",
                "kernel": case.kernel,
                "resource": case.resource,
                "emitter": case.emitter,
                "replays": replays,
                "error": largest,
                "ok": ok,
            }
        )
    return rows


def mismatch(rank: int, world: int) -> list[Row]:
    """Rank 1 comes with another shape: an error on all ranks, and the next call works."""
    case = Case("ag_gemm", 512, 256, 256)
    other = Case("ag_gemm", 512, 256, 512)
    a, b = inputs_for(other if rank == 1 else case, rank, world, 1)
    message, started = "", time.monotonic()
    try:
        bind(case, world)(a, b)
    except AgreementError as problem:
        message = str(problem)
    seconds = time.monotonic() - started
    print(f"rank {rank} after {seconds:.2f} s: {message}", flush=True)
    a, b = inputs_for(case, rank, world, 2)
    want = reference(case, a, b, world)
    error = worst(row_error(bind(case, world)(a, b), want))
    synchronize()
    ok = bool(message) and error < TOLERANCE["bf16"]
    return [{"test": "mismatch", "seconds": seconds, "message": message, "error": error, "ok": ok}]


def late_mismatch(rank: int, world: int) -> list[Row]:
    """All ranks know the program; then rank 1 alone calls with another shape."""
    case = Case("ag_gemm", 512, 256, 256)
    a, b = inputs_for(case, rank, world, 1)
    call = bind(case, world)
    call(a, b)
    synchronize()
    dist.barrier()
    message, started = "", time.monotonic()
    try:
        if rank == 1:
            wide = Case("ag_gemm", 512, 256, 512)
            bind(wide, world)(*inputs_for(wide, rank, world, 2))
        else:
            call(a, b)
        synchronize()
    except (AgreementError, WaitTimeout) as problem:
        message = str(problem)
    seconds = time.monotonic() - started
    print(f"rank {rank} after {seconds:.2f} s: {message}", flush=True)
    alive = float(torch.ones(8, device="cuda").sum()) == 8
    ok = bool(message) and alive and seconds < 60
    return [{"test": "late_mismatch", "seconds": seconds, "message": message, "ok": ok}]


def killed(rank: int, world: int) -> list[Row]:
    """Rank 1 dies between two calls: the others get a named error in time and keep their GPU."""
    case = Case("ag_gemm", 2048, 1024, 1024)
    a, b = inputs_for(case, rank, world, 1)
    call = bind(case, world)
    for _ in range(20):
        call(a, b)
    synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    message, started, out = "", time.monotonic(), torch.zeros(1)
    try:
        for _ in range(3):
            out = call(a, b)
        synchronize()
    except WaitTimeout as problem:
        message = str(problem)
    seconds = time.monotonic() - started
    print(f"rank {rank} after {seconds:.2f} s: {message}", flush=True)
    alive = float(torch.ones(8, device="cuda").sum()) == 8
    # The first call after the death may have had all it needs; the last one cannot have.
    nan = bool(out.float().isnan().all())
    ok = bool(message) and alive and nan and seconds < 30
    return [
        {
            "test": "killed",
            "seconds": seconds,
            "message": message,
            "alive": alive,
            "nan": nan,
            "ok": ok,
        }
    ]


def subgroups(rank: int, world: int) -> list[Row]:
    """Two groups of half the ranks each, at work at the same time."""
    half = world // 2
    groups = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    mine = groups[rank // half]
    from tests.gpu.kernels import ag_gemm

    case = Case("ag_gemm", 64 * half, 256, 256)
    a, b = inputs_for(case, rank, half, 3)
    whole = gathered(a, mine)
    got = ag_gemm.on(group=mine)(a, b)
    synchronize()
    error = worst(row_error(got, whole.float() @ b.float()))
    return [{"test": "subgroups", "error": error, "ok": error < TOLERANCE["bf16"]}]


TESTS = {
    t.__name__: t
    for t in (correctness, graph, varying, mismatch, late_mismatch, unequal, killed, subgroups)
}


def main(name: str, result: str | None) -> None:
    """Runs one test on this rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    if shared(world):
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=device)
    rows = TESTS[name](rank, world)
    sys.stdout.flush()
    if result is not None and rank == 0:
        Path(result).write_text(json.dumps(rows))
    bad = [row for row in rows if not row["ok"]]
    if name not in ("killed", "late_mismatch", "unequal"):
        dist.barrier()
        torch.cuda.synchronize()
    if bad and name != "correctness":
        print(f"rank {rank}: {bad}", flush=True)
        os._exit(1)
    # Without the process group's destructor, which would wait for ranks that are gone.
    os._exit(0)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
