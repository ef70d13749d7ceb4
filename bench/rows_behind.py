"""What TMA takes to fill in rows past the end of a matrix, against reading what lies behind it.

    python bench/rows_behind.py --out bench/results/rows_behind_h200.json

One GPU. Products of M x K by K x N under one schedule, with M dynamic, at several numbers of rows that a tile of
128 can have: once with descriptors that end with the rows (TMA fills in zeros), once with descriptors that reach
as far as the allocation does. Microseconds are the median of rounds, the two in turn, each the mean of several
passes. The facts about allocations are those of ``cuMemGetAddressRange`` in this process; ``--segments`` says
which allocator is asked for (``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` chooses the other one).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import environment
from tilelink import kernels, knobs
from tilelink.backend.runtime.driver import driver
from tilelink.backend.runtime.plan import rows_behind
from tilelink.schedules import Schedule

K, N = 8192, 7168
SHAPES = (1, 32, 64, 96, 127, 128)
PASSES, ROUNDS, SKIPPED = 10, 30, 5
SCHEDULES = {
    "triton 128": Schedule(tiles=(("K", 64), ("M", 128), ("N", 128)), stages=4),
    "triton 64": Schedule(tiles=(("K", 128), ("M", 64), ("N", 64)), stages=4, warps=4),
    "gluon 128": Schedule(tiles=(("K", 64), ("M", 128), ("N", 128)), stages=4, emitter="gluon"),
}


def timed(run: Any) -> float:
    """Microseconds of a pass, by events around several."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(400_000)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(PASSES):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / PASSES


def compare(name: str, rows: int) -> dict[str, Any]:
    """Both kinds of descriptors at ``rows``, and whether their results are the same bits."""
    a = torch.randn(rows, K, device="cuda").bfloat16()
    b = torch.randn(K, N, device="cuda").bfloat16()
    calls, outs = {}, {}
    for kind, reach in (("ends", "0"), ("behind", "1")):
        mine = a.clone()  # a recorded call is one with tensors at the same addresses
        call = kernels.gemm.on(schedule=SCHEDULES[name], dynamic={"M": 128})
        out = torch.empty(rows, N, device="cuda", dtype=torch.bfloat16)

        def run(call: Any = call, out: Any = out, reach: str = reach, mine: Any = mine) -> None:
            os.environ[knobs.READ_BEHIND.name] = reach
            call(mine, b, out)

        run()
        calls[kind], outs[kind] = run, out
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(SKIPPED + ROUNDS):
        for kind, run in calls.items():
            times[kind].append(timed(run))
    os.environ[knobs.READ_BEHIND.name] = "1"
    torch.cuda.synchronize()
    same = torch.equal(outs["ends"].view(torch.int16), outs["behind"].view(torch.int16))
    medians = {f"{k}_us": round(statistics.median(t[SKIPPED:]), 2) for k, t in times.items()}
    return {"schedule": name, "rows": rows, "behind": rows_behind(a), **medians, "same": same}


def allocations() -> list[dict[str, int]]:
    """How far memory reaches behind tensors of several sizes, and whether all of it can be read."""
    found = []
    for size in (1 << 12, 1 << 20, 3 << 20, 9 << 20, 40 << 20, 300 << 20):
        x = torch.zeros(size, dtype=torch.uint8, device="cuda")
        left = driver().end_of(x.data_ptr() + size - 1) - x.data_ptr() - size
        words = torch.zeros(8, dtype=torch.int64, device="cuda")
        # The last bytes that are said to be there, read by a copy: it fails where they are not.
        driver().copy(
            torch.cuda.current_stream().cuda_stream,
            words.data_ptr(),
            x.data_ptr() + size + left - 64,
            64,
        )
        torch.cuda.synchronize()
        found.append({"bytes": size, "behind": left})
    return found


def main() -> int:
    """Measures, prints a table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--segments", default="default", help="a name for the allocator's setting")
    parser.add_argument("--no-times", action="store_true", help="the facts about allocations alone")
    args = parser.parse_args()
    environment.prepare()
    torch.cuda.set_device(0)
    facts = allocations()
    rows = [] if args.no_times else [compare(n, m) for n in SCHEDULES for m in SHAPES]
    for row in (*facts, *rows):
        print(row, flush=True)
    report = {
        "kind": "rows_behind",
        **environment.describe(1),
        "segments": args.segments,
        "allocations": facts,
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
