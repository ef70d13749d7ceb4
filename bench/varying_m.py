"""Calls whose number of rows changes at every step: few programs, each call as fast as one of its own.

    torchrun --nproc-per-node 8 bench/varying_m.py --out bench/results/varying_m.json

One kernel with a dynamic M goes through a trace of lengths from 1 to 8192, in the order of the trace. At each
step it is timed, interleaved in one run, beside the kernel that a plain call compiles for this M alone and beside
NCCL and cuBLAS in turn. A step's ratio is the median of the dynamic call over the smaller of the other two. The
result also says how many programs the calls needed, and whether every output was right. Shapes are those of hidden
8192, intermediate 28672.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import environment, stats
from bench.cases import AG_GEMM, GEMM_AR, GEMM_RS, LARGE, Case

if TYPE_CHECKING:
    from bench.candidates import Candidate, Inputs

PROGRAMS = 8  # compilations that a trace may need, at most
MARGIN = 1.10  # of a dynamic call over the best of the others
LARGEST = 8192
DYNAMIC = f"{stats.OURS} dynamic"
KINDS = (AG_GEMM, GEMM_RS, GEMM_AR)


def trace(steps: int, unit: int, seed: int) -> list[int]:
    """Numbers of rows as serving has them: both ends, and between them one of each size, not a round one.

    Multiples of ``unit``, in no order; the same for the same seed.
    """
    draw = random.Random(seed)
    inner = range(1, max(2, steps) - 1)
    sizes = [2 ** (13 * (place + draw.uniform(-0.4, 0.4)) / (steps - 1)) for place in inner]
    rows = [-(-round(size) // unit) * unit for size in sizes]
    found = sorted({unit, LARGEST, *(min(LARGEST, size) for size in rows)})
    draw.shuffle(found)
    return found


def case_of(kind: str, rows: int, parallel: int) -> Case:
    """One step: the layer's product with so many rows."""
    hidden, intermediate = LARGE
    part = intermediate // parallel
    columns = (hidden, 2 * part) if kind == AG_GEMM else (part, hidden)
    return Case(kind, rows, *columns, "a step of a trace")


def candidates(
    cluster: Any, case: Case, inputs: Inputs, dynamic: Any
) -> Iterator[tuple[str, Candidate]]:
    """The dynamic call, the kernel for this M alone, and the library in turn."""
    from bench.baselines import baselines
    from bench.candidates import Candidate
    from bench.ours import kernel_of

    out = inputs.a(0).new_empty(case.rows_out(cluster.world), case.n)
    alone = kernel_of(case.kind).on(group=cluster.group)
    for name, call in ((DYNAMIC, dynamic), (stats.TUNED, alone)):

        def run(i: int, call: Any = call) -> Any:
            call(inputs.a(i), inputs.b(i), out)
            return out

        yield name, Candidate(name, stats.OURS, lambda run=run: run)  # type: ignore[misc]
    for candidate in baselines(cluster, case, inputs):
        if candidate.name == stats.IN_TURN:
            yield candidate.name, candidate


def prepare(kind: str, rows: int, parallel: int, world: int, device: str, dynamic: bool) -> None:
    """Compiles what a call with so many rows will choose, in a process without a GPU; ranks find it in a cache."""
    import torch

    from bench.ours import kernel_of
    from tilelink.backend.runtime import load_module, write_module
    from tilelink.backend.runtime.choose import compile_chosen
    from tilelink.backend.runtime.image import image_of
    from tilelink.tuning.prepare import compile_module

    case, kernel = case_of(kind, rows, parallel), kernel_of(kind)

    def matrix(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    a = matrix(rows // world if kind == AG_GEMM else rows, case.k)
    bound = kernel.bind((a, matrix(case.k, case.n)), world, {})
    bound, _ = kernel.at_capacity(bound, {"M": ()} if dynamic else {})
    with contextlib.suppress(Exception):  # the ranks meet it again
        chosen = compile_chosen(kernel.build_for(bound), None, device)
        path = write_module(chosen.source, kernel.name)
        compile_module(load_module(path), image_of(chosen.program))


def prepare_all(cluster: Any, traces: dict[str, list[int]], parallel: int) -> None:
    """Compiles all programs of all traces, a share on each rank, many at once. Collective."""
    import torch

    from tilelink.frontend.capacity import capacity_of
    from tilelink.tuning.prepare import make_pool

    device = torch.cuda.get_device_name()
    jobs = []
    for kind, lengths in traces.items():
        jobs += [(kind, rows, parallel, cluster.world, device, False) for rows in lengths]
        some = {capacity_of("M", rows, 1, ())[1]: rows for rows in lengths}  # one of each capacity
        jobs += [(kind, rows, parallel, cluster.world, device, True) for rows in some.values()]
    mine = jobs[cluster.rank :: cluster.world]
    with make_pool(max(1, (os.cpu_count() or 2) * 3 // 4 // cluster.world)) as pool:
        list(pool.map(prepare, *zip(*mine, strict=True)))
    cluster.agreement.gather(None)


def step(cluster: Any, case: Case, dynamic: Any, settings: Any, watchdog: Any) -> dict[str, Any]:
    """The record of one step. Collective."""
    from bench.candidates import make_inputs
    from bench.measure import Bench
    from tilelink.tuning.timing import calls_in_a_row

    inputs = make_inputs(cluster, case, settings.seed)
    bench = Bench(cluster, inputs, watchdog, calls_in_a_row(case.m, case.k, case.n))
    for _, candidate in candidates(cluster, case, inputs, dynamic):
        bench.add(candidate)
    bench.time(settings)
    bench.recheck()
    results = {name: asdict(result) for name, result in bench.results.items()}
    medians = {name: result.median_us for name, result in bench.results.items()}
    bench.close()
    mine = medians.get(DYNAMIC)
    others = [us for name, us in medians.items() if name != DYNAMIC and us is not None]
    ratio = None if mine is None or not others else round(mine / min(others), 4)
    return {
        "name": case.name,
        "m": case.m,
        "median_us": medians,
        "ratio": ratio,
        "programs": dynamic.compilations,
        "candidates": results,
    }


def describe(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    shown = ", ".join(
        f"{name} {'-' if us is None else f'{us:.1f}'}" for name, us in record["median_us"].items()
    )
    return f"{record['name']}: {shown} us; ratio {record['ratio']}, {record['programs']} programs"


def verdict(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What a trace shows: programs, the worst ratio and its place, steps above the margin or failed."""
    ratios = [(s["ratio"], s["name"]) for s in steps if s["ratio"] is not None]
    failed = [s["name"] for s in steps if s["candidates"][DYNAMIC]["failed"] is not None]
    return {
        "steps": len(steps),
        "programs": max((s["programs"] for s in steps), default=0),
        "worst": max(ratios, default=None),
        "above": [name for ratio, name in ratios if ratio > MARGIN],
        "failed": failed,
    }


def good(found: dict[str, Any]) -> bool:
    """Whether a trace keeps what is promised."""
    return not found["above"] and not found["failed"] and found["programs"] <= PROGRAMS


def main() -> int:
    """Measure, write, print; 1 where a trace needs too many programs or a step is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file for the JSON")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=16, help="calls of each trace")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="for each kind")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="cut weights in N")
    parser.add_argument("--watchdog", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    environment.prepare()
    from bench.cluster import Cluster, Watchdog
    from bench.measure import Settings
    from bench.ours import kernel_of
    from bench.run import write_json

    cluster = Cluster()
    settings = Settings(options.rounds, options.warmup, options.seed)
    data: dict[str, Any] = {"kind": "varying_m", **environment.describe(cluster.world)}
    data |= {"settings": asdict(settings), "traces": {}}

    def write(stopped: str | None = None) -> None:
        if cluster.rank == 0:
            write_json(Path(options.out), data | {"stopped": stopped})

    watchdog = Watchdog(options.watchdog + (10 if cluster.rank else 0), write)
    parallel = options.tensor_parallel or cluster.world
    traces = {
        kind: trace(options.steps, 1 if kind == GEMM_AR else cluster.world, options.seed)
        for kind in options.kinds.split(",")
    }
    begin = time.monotonic()
    prepare_all(cluster, traces, parallel)
    if cluster.rank == 0:
        print(f"compiled ahead in {time.monotonic() - begin:.0f} s", flush=True)
    for kind, lengths in traces.items():
        dynamic = kernel_of(kind).on(group=cluster.group, dynamic=("M",))
        steps: list[dict[str, Any]] = []
        begin = time.monotonic()
        for rows in lengths:
            over = options.time_budget is not None and (
                time.monotonic() - begin > options.time_budget
            )
            if cluster.agreement.first(over):
                break
            case = case_of(kind, rows, parallel)
            steps.append(step(cluster, case, dynamic, settings, watchdog))
            data["traces"][kind] = {"verdict": verdict(steps), "steps": steps}
            write()
            if cluster.rank == 0:
                print(describe(steps[-1]), flush=True)
        if cluster.rank == 0:
            print(f"{kind}: {verdict(steps)}", flush=True)
    cluster.agreement.gather(None)
    kept = all(good(found["verdict"]) for found in data["traces"].values())
    return 1 if not kept and cluster.rank == 0 else 0


if __name__ == "__main__":
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
