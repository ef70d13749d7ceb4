"""Host time of eager calls: how long a call keeps the CPU, a schedule and a shape at a time.

    torchrun --nproc-per-node 8 bench/host_cost.py --out bench/results/host_cost.json

Calls follow each other without a wait of the host, in batches short enough that no queue of the driver
fills; the device is idle when a batch begins. Medians over all calls of all batches, the largest over the
ranks counts. Four ways of calling: with the same tensors each time and the output given (``same``), or
allocated by the call (``allocated``); with 8 sets of inputs in turn (``rotated``); and with tensors that no call
has seen before (``fresh``), which is what recording a call costs. ``TILELINK_GRAPHS=0`` measures without graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import environment
from bench.cases import AG_GEMM, GEMM_AR, GEMM_RS, Case

if TYPE_CHECKING:
    import torch

LIMIT_US = 60.0
SETS = 8
CASES = (
    Case(AG_GEMM, 1024, 4096, 1376, "small, so that the device keeps up"),
    Case(GEMM_RS, 1024, 1376, 4096, "small, so that the device keeps up"),
    Case(GEMM_AR, 16, 3584, 8192, "decoding"),
    Case(AG_GEMM, 8192, 8192, 7168, "MLP hidden 8192, intermediate 28672"),
    Case(GEMM_RS, 8192, 3584, 8192, "MLP hidden 8192, intermediate 28672"),
)
SCHEDULES = ("copy_engine", "sm:16", "epilogue", "none")
# Enqueued calls at a time: with graphs off, a call is some 25 entries of queues of 1024.
BATCH = 16
FRESH = 2  # batches of calls with tensors that are new


def measure(call: Callable[[int], object], settle: Callable[[], None], batches: int) -> list[float]:
    """Microseconds of each call, in order; ``settle()`` ends a batch."""
    times: list[float] = []
    number = 0
    for _ in range(batches):
        for _ in range(BATCH):
            begin = time.perf_counter()
            call(number)
            times.append((time.perf_counter() - begin) * 1e6)
            number += 1
        settle()
    return times


def figures(times: list[float]) -> dict[str, float]:
    """Median, 90th percentile and most of some times in microseconds."""
    ordered = sorted(times)
    return {
        "median_us": round(statistics.median(ordered), 2),
        "p90_us": round(ordered[int(0.9 * (len(ordered) - 1))], 2),
        "most_us": round(ordered[-1], 2),
    }


def ways(call: Any, case: Case, cluster: Any) -> dict[str, Callable[[int], object]]:
    """The ways of calling, each a function of the number of the call."""
    import torch

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=cluster.device)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        a = empty(case.rows_in(cluster.world), case.k)
        return a.zero_(), empty(case.k, case.n).zero_()

    out = empty(case.rows_out(cluster.world), case.n)
    sets = [inputs() for _ in range(SETS)]
    # Made here, and all kept: what the allocator costs where it has no block is not the call's.
    unseen = [empty(*out.shape) for _ in range(1 + FRESH * BATCH)]

    def fresh(_: int) -> object:
        return call(*sets[0], unseen.pop())

    return {
        "same": lambda _: call(*sets[0], out),
        "allocated": lambda _: call(*sets[0]),
        "rotated": lambda number: call(*sets[number % SETS], out),
        "fresh": fresh,
    }


def run(case: Case, text: str, cluster: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All ways of calling one kernel under one schedule. Collective."""
    import torch

    from bench.ours import kernel_of, schedule_of

    kernel = kernel_of(case.kind)
    schedule = schedule_of(kernel, case, cluster.world, text)
    call = kernel.on(group=cluster.group, schedule=schedule)
    record: dict[str, Any] = {"name": case.name, "schedule": text, "limit_us": LIMIT_US}
    for name, way in ways(call, case, cluster).items():
        batches = options.batches if name != "fresh" else FRESH
        # All sets often enough to have become graphs.
        for number in range(4 * SETS if name != "fresh" else 1):
            way(number)
            if number % BATCH == BATCH - 1:
                cluster.settle()
        cluster.settle()
        cluster.agreement.gather(None)
        mine = figures(measure(way, cluster.settle, batches))
        all_ranks = cluster.agreement.gather(mine)
        record[name] = {key: max(rank[key] for rank in all_ranks) for key in mine}
        record[name]["ranks_median_us"] = [rank["median_us"] for rank in all_ranks]
    torch.cuda.empty_cache()
    return record


def within(record: dict[str, Any]) -> bool:
    """Whether calls that repeat stay below the limit."""
    return all(record[way]["median_us"] <= LIMIT_US for way in ("same", "allocated", "rotated"))


def describe(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "failed" in record:
        return f"{record['name']} {record['schedule']}: {record['failed']}"
    parts = [
        f"{way} {record[way]['median_us']}" for way in ("same", "allocated", "rotated", "fresh")
    ]
    verdict = "within" if within(record) else "ABOVE"
    return f"{record['name']} {record['schedule']}: {', '.join(parts)} us, {verdict} {LIMIT_US:g}"


def main() -> int:
    """Measure, write, print; 1 where a call that repeats costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file for the JSON")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only cases named so")
    parser.add_argument("--watchdog", type=float, default=60, metavar="SECONDS")
    options = parser.parse_args()
    environment.prepare()
    from bench.cluster import Cluster, Watchdog, describe_error
    from tilelink.schedules import ScheduleError

    cluster = Cluster()
    data = {"kind": "host_cost", **environment.describe(cluster.world), "cases": []}
    path = Path(options.out)

    def write(stopped: str | None = None) -> None:
        if cluster.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(data | {"stopped": stopped}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")

    watchdog = Watchdog(options.watchdog + (10 if cluster.rank else 0), write)
    for case in CASES:
        for text in options.schedules.split(","):
            if options.only not in case.name or (case.kind == AG_GEMM and text == "epilogue"):
                continue
            watchdog.beat(f"{case.name} {text}")
            try:
                record = run(case, text, cluster, options)
            except ScheduleError as error:  # the same on all ranks
                record = {"name": case.name, "schedule": text, "failed": describe_error(error)}
            data["cases"].append(record)
            write()
            if cluster.rank == 0:
                print(describe(record), flush=True)
    cluster.agreement.gather(None)
    good = all(within(record) for record in data["cases"] if "failed" not in record)
    return 1 if not good and cluster.rank == 0 else 0


if __name__ == "__main__":
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
