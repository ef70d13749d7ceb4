"""Host time of eager calls: how long a call keeps the CPU, a schedule and a shape at a time.

    torchrun --nproc-per-node 8 bench/host_cost.py --out bench/results/host_cost.json

Calls follow each other without a wait of the host, in batches short enough that no queue of the driver
fills; the device is idle when a batch begins. Medians over all calls of all batches, the largest over the
ranks counts. The ways of calling take turns, a batch each: with the same tensors each time and the output
given (``same``), or allocated by the call (``allocated``); with 8 sets of inputs in turn (``rotated``); and
PyTorch's own two calls, product and collective (``in_turn``), which the library's schedule comes to. Behind
them calls with tensors that none has seen before (``fresh``), which is what recording a call costs. ``--steps``
times the parts of the library's schedule as well.
``TILELINK_GRAPHS=0`` measures without graphs.
"""

from __future__ import annotations

import argparse
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
# What the library's schedule may cost over PyTorch's own two calls.
OVER_US = 5.0
LIBRARY = "library"
IN_TURN = "in_turn"
SETS = 8
RESOURCES = ("copy_engine", "sm:16", "epilogue", "none", LIBRARY)
CASES = (
    (Case(AG_GEMM, 1024, 4096, 1376, "small, so that the device keeps up"), RESOURCES),
    (Case(GEMM_RS, 1024, 1376, 4096, "small, so that the device keeps up"), RESOURCES),
    (Case(GEMM_AR, 16, 3584, 8192, "decoding"), (*RESOURCES, "tuned")),
    (Case(AG_GEMM, 128, 8192, 7168, "few rows"), (LIBRARY, "tuned")),
    (Case(GEMM_RS, 128, 3584, 8192, "few rows"), (LIBRARY, "tuned")),
    (Case(AG_GEMM, 8192, 8192, 7168, "MLP hidden 8192, intermediate 28672"), (*RESOURCES, "tuned")),
    (Case(GEMM_RS, 8192, 3584, 8192, "MLP hidden 8192, intermediate 28672"), (*RESOURCES, "tuned")),
    (Case(GEMM_RS, 16384, 3584, 8192, "many copies"), ("copy_engine", "tuned")),
)
# Enqueued calls at a time: with graphs off, a call is some 25 entries of queues of 1024.
BATCH = 16
FRESH = 2  # batches of calls with tensors that are new

Ways = dict[str, Callable[[int], object]]


def measure(ways: Ways, settle: Callable[[], None], batches: int) -> dict[str, list[float]]:
    """Microseconds of each call of each way, in order; ``settle()`` stands before a batch of one.

    The ways take turns, so that what the machine does meanwhile meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for batch in range(batches):
        for name, way in ways.items():
            settle()
            for number in range(batch * BATCH, (batch + 1) * BATCH):
                begin = time.perf_counter()
                way(number)
                times[name].append((time.perf_counter() - begin) * 1e6)
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


class Tensors:
    """What the ways of calling one case work on; ``unseen`` outputs are used up."""

    def __init__(self, case: Case, cluster: Any) -> None:
        import torch

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=cluster.device)

        self.sets = [
            (empty(case.rows_in(cluster.world), case.k).zero_(), empty(case.k, case.n).zero_())
            for _ in range(SETS)
        ]
        self.out = empty(case.rows_out(cluster.world), case.n)
        # Made here, and all kept: what the allocator costs where it has no block is not the call's.
        self.unseen = [empty(*self.out.shape) for _ in range(1 + FRESH * BATCH)]
        # Between the library's two calls: all of A, or the product before it is summed.
        gathered = case.kind == AG_GEMM
        self.between = empty(case.m, case.k) if gathered else empty(case.m, case.n).zero_()


def ways(call: Any, tensors: Tensors) -> Ways:
    """The ways of calling that repeat, each a function of the number of the call."""
    sets, out = tensors.sets, tensors.out
    return {
        "same": lambda _: call(*sets[0], out),
        "allocated": lambda _: call(*sets[0]),
        "rotated": lambda number: call(*sets[number % SETS], out),
    }


def in_turn(case: Case, tensors: Tensors, product: Any, collective: Any) -> Callable[[int], object]:
    """Product and collective in the order of the case: ``product(a, b, out)``, ``collective(target, source)``."""
    sets, out, between = tensors.sets, tensors.out, tensors.between

    def gather(number: int) -> None:
        a, b = sets[number % SETS]
        collective(between, a)
        product(between, b, out)

    def scatter(number: int) -> None:
        product(*sets[number % SETS], between)
        collective(out, between)

    def reduce(number: int) -> None:
        product(*sets[number % SETS], out)
        collective(out, out)

    return {AG_GEMM: gather, GEMM_RS: scatter, GEMM_AR: reduce}[case.kind]


def steps(case: Case, tensors: Tensors, cluster: Any) -> Ways:
    """The library's two calls as PyTorch makes them, and what the runtime makes of them bit by bit."""
    import torch
    import torch.distributed as dist

    from tilelink.backend.runtime import library
    from tilelink.backend.runtime.driver import driver

    group, device = cluster.group, cluster.device

    def mm(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        torch.mm(a, b, out=into)

    op, theirs = {
        AG_GEMM: (
            "all_gather",
            lambda t, s: dist.all_gather_into_tensor(t, s, group=group),
        ),
        GEMM_RS: (
            "reduce_scatter",
            lambda t, s: dist.reduce_scatter_tensor(t, s, group=group),
        ),
        GEMM_AR: ("all_reduce", lambda t, _: dist.all_reduce(t, group=group)),
    }[case.kind]
    ours = library.collective_of(op, group, device)
    event, stream = driver().event(), torch.cuda.current_stream().cuda_stream
    both = in_turn(case, tensors, library.matmul, ours)

    def noted(number: int) -> None:
        both(number)
        driver().record(event.handle, stream)

    def nothing(*_: object) -> None:
        return

    return {
        IN_TURN: in_turn(case, tensors, mm, theirs),
        "backend": in_turn(case, tensors, mm, ours),
        "exact": both,
        "event": noted,
        "mm alone": in_turn(case, tensors, mm, nothing),
        "exact mm alone": in_turn(case, tensors, library.matmul, nothing),
        "collective alone": in_turn(case, tensors, nothing, theirs),
        "backend alone": in_turn(case, tensors, nothing, ours),
    }


def run(case: Case, text: str, cluster: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All ways of calling one kernel under one schedule. Collective."""
    import torch

    from bench.ours import kernel_of, schedule_of

    kernel = kernel_of(case.kind)
    schedule = schedule_of(kernel, case, cluster.world, text)
    call = kernel.on(group=cluster.group, schedule=schedule)
    tensors = Tensors(case, cluster)
    known = steps(case, tensors, cluster)
    if not (options.steps and text == LIBRARY):
        known = {IN_TURN: known[IN_TURN]}
    repeated = ways(call, tensors) | known
    # All sets often enough to have become graphs.
    for way in repeated.values():
        for number in range(4 * SETS):
            way(number)
            if number % BATCH == BATCH - 1:
                cluster.settle()
    cluster.agreement.gather(None)
    times = measure(repeated, cluster.settle, options.batches)
    fresh: Ways = {"fresh": lambda _: call(*tensors.sets[0], tensors.unseen.pop())}
    times |= measure(fresh, cluster.settle, FRESH)
    record: dict[str, Any] = {"name": case.name, "schedule": text, "limit_us": LIMIT_US}
    all_ranks = cluster.agreement.gather({name: figures(each) for name, each in times.items()})
    for name in times:
        ranks = [rank[name] for rank in all_ranks]
        record[name] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        record[name]["ranks_median_us"] = [rank["median_us"] for rank in ranks]
    torch.cuda.empty_cache()
    return record


def within(record: dict[str, Any]) -> bool:
    """Whether calls that repeat stay below the limit; those of the library, near PyTorch's own two calls."""
    limit = LIMIT_US
    if record.get("schedule") == LIBRARY and IN_TURN in record:
        limit = max(limit, record[IN_TURN]["median_us"] + OVER_US)
    return all(record[way]["median_us"] <= limit for way in ("same", "allocated", "rotated"))


def describe(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "failed" in record:
        return f"{record['name']} {record['schedule']}: {record['failed']}"
    parts = [f"{way} {us['median_us']}" for way, us in record.items() if isinstance(us, dict)]
    verdict = "within" if within(record) else "ABOVE"
    return f"{record['name']} {record['schedule']}: {', '.join(parts)} us, {verdict} {LIMIT_US:g}"


def main() -> int:
    """Measure, write, print; 1 where a call that repeats costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file for the JSON")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--schedules", default="", help="those of each case unless given")
    parser.add_argument("--steps", action="store_true", help="the parts of the library's schedule")
    parser.add_argument(
        "--only", default="", metavar="PARTS", help="only cases with one in the name"
    )
    parser.add_argument("--watchdog", type=float, default=60, metavar="SECONDS")
    options = parser.parse_args()
    environment.prepare()
    from bench.cluster import Cluster, Watchdog, describe_error
    from bench.run import write_json
    from tilelink.schedules import ScheduleError

    cluster = Cluster()
    data = {"kind": "host_cost", **environment.describe(cluster.world), "cases": []}

    def write(stopped: str | None = None) -> None:
        if cluster.rank == 0:
            write_json(Path(options.out), data | {"stopped": stopped})

    watchdog = Watchdog(options.watchdog + (10 if cluster.rank else 0), write)
    asked = options.schedules.split(",") if options.schedules else []
    for case, usual in CASES:
        for text in (s for s in usual if not asked or s in asked):
            if not any(part in case.name for part in options.only.split(",")) or (
                case.kind == AG_GEMM and text == "epilogue"
            ):
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
