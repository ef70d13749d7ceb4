"""One GPU: the emitted GEMM in each of its structures against cuBLAS, interleaved in one process.

    python -m bench.gluon --out bench/results/gluon_gemm_h200.json

Every structure is checked against fp32 first, on whole and on ragged shapes. Each round runs all
candidates of a shape in a new order, as captured graphs, on inputs that rotate where they fit the L2 cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import describe, prepare

prepare()

import torch  # noqa: E402

from tilelink.backend.accuracy import TOLERANCE, relative_error  # noqa: E402
from tilelink.errors import TilelinkError  # noqa: E402
from tilelink.kernels import ag_gemm, ag_gemm_swiglu  # noqa: E402
from tilelink.schedules import Schedule  # noqa: E402

Run = Callable[[int], torch.Tensor]
CASES = (
    (8192, 8192, 7168), (8192, 8192, 3584), (8192, 4096, 2752), (8192, 4096, 1376),
    (8192, 4096, 3584), (8192, 3584, 3584), (8192, 3584, 8192), (8192, 1376, 4096),
    (8192, 1792, 4096), (8192, 4608, 4608), (4096, 8192, 7168), (4096, 3584, 8192),
    (2048, 8192, 7168), (1024, 8192, 7168), (1024, 3584, 8192),
)  # fmt: skip
CHECKED = (
    (128, 64, 128), (256, 512, 512), (1024, 1376, 1376), (1000, 200, 328), (8192, 72, 2752),
    (72, 1000, 264), (4096, 640, 4096), (2048, 4096, 8),
)  # fmt: skip
STRUCTURES = {
    "turns 128x128x5": ("gluon", 128, 128, 5),
    "turns 128x128x4": ("gluon", 128, 128, 4),
    "turns 64x256x4": ("gluon", 64, 256, 4),
    "halves 128x256x4": ("gluon", 128, 256, 4),
    "halves 128x256x3": ("gluon", 128, 256, 3),
    "halves 256x128x4": ("gluon", 256, 128, 4),
    "triton 128x256x3": ("triton", 128, 256, 3),
    "triton 128x256x4": ("triton", 128, 256, 4),
}
L2_BYTES = 64 << 20


def schedule(structure: str, group: int = 8) -> Schedule:
    """The schedule of a structure."""
    emitter, rows, columns, stages = STRUCTURES[structure]
    tiles = (("K", 64), ("M", rows), ("N", columns))
    return Schedule(tiles=tiles, stages=stages, emitter=emitter, group=group)


def inputs(case: tuple[int, int, int], dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Operands and output, as many sets as do not fit the L2 cache together (at most four)."""
    m, k, n = case
    size = 2 * (m * k + k * n + m * n)
    sets = min(4, max(1, math.ceil(2 * L2_BYTES / size)))
    made: list[tuple[torch.Tensor, ...]] = []
    for _ in range(sets):
        a = torch.randn(m, k, device="cuda").to(dtype)
        b = (torch.randn(k, n, device="cuda") / k**0.5).to(dtype)
        made.append((a, b, torch.empty(m, n, device="cuda", dtype=dtype)))
    return made


@dataclass(frozen=True, slots=True)
class Checked:
    """One call that is compared with fp32: ``kind`` is plain, bias (weights as (N, K)) or swiglu."""

    structure: str
    kind: str
    case: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16

    def call(self, a: torch.Tensor, b: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """Runs it; ``extra`` is the bias or the second weight."""
        how = schedule(self.structure)
        out: torch.Tensor
        if self.kind == "bias":
            out = ag_gemm.on(schedule=how)(a, b.T.contiguous(), bias=extra, nk=True)
        elif self.kind == "swiglu":
            out = ag_gemm_swiglu.on(schedule=how)(a, b, extra)
        else:
            out = ag_gemm.on(schedule=how)(a, b)
        return out

    def extra(self) -> torch.Tensor:
        """The bias, or the second weight."""
        _, k, n = self.case
        made: torch.Tensor = torch.randn(k, n, device="cuda") / k**0.5
        if self.kind == "bias":
            made = torch.randn(n, device="cuda")
        return made.to(self.dtype)

    def wanted(self, a: torch.Tensor, b: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """The same in fp32."""
        product: torch.Tensor = a.float() @ b.float()
        if self.kind == "bias":
            product = product + extra.float()
        if self.kind == "swiglu":
            product = torch.nn.functional.silu(product) * (a.float() @ extra.float())
        return product


def checks() -> list[Checked]:
    """Structures on shapes that are whole and ragged, with and without an epilogue."""
    roles = [name for name in STRUCTURES if STRUCTURES[name][0] == "gluon"]
    found = [Checked(name, "plain", case) for case in CHECKED for name in roles]
    for case in (CHECKED[3], CHECKED[1]):
        found += [Checked(name, "bias", case) for name in roles]
        found += [Checked(name, "plain", case, torch.float16) for name in roles]
        found += [Checked(name, "swiglu", case) for name in roles if " 128x128" in name]
    return found


def check(one: Checked) -> dict[str, Any]:
    """One structure against fp32, twice."""
    (a, b, _), *_ = inputs(one.case, one.dtype)
    extra = one.extra()
    where = {
        "structure": one.structure,
        "kind": one.kind,
        "shape": one.case,
        "dtype": str(one.dtype),
    }
    try:
        out = one.call(a, b, extra)
        torch.cuda.synchronize()
        again = one.call(a, b, extra)
        error = relative_error(out, one.wanted(a, b, extra))
        return {**where, "error": error, "repeats": bool(torch.equal(out, again))}
    except TilelinkError as problem:
        return {**where, "refused": str(problem)}


def compiled(one: Checked) -> None:
    """Fills the compiler's cache, in a process of its own."""
    (a, b, _), *_ = inputs(one.case, one.dtype)
    with contextlib.suppress(TilelinkError):
        one.call(a, b, one.extra())
        torch.cuda.synchronize()


def captured(run: Run, sets: int) -> list[torch.cuda.CUDAGraph]:
    """A graph of one call for each set of inputs."""
    graphs = []
    for i in range(sets):
        run(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(i)
        graphs.append(graph)
    return graphs


def measure(case: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """All candidates of a shape, interleaved."""
    data = inputs(case, torch.bfloat16)
    wanted = data[0][0].float() @ data[0][1].float()
    runs: dict[str, Run] = {"cublas": lambda i: torch.mm(data[i][0], data[i][1], out=data[i][2])}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name in STRUCTURES:
        call = ag_gemm.on(schedule=schedule(name))
        runs[name] = lambda i, call=call: call(*data[i])  # type: ignore[misc]
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {}
    for name, run in runs.items():
        try:
            run(0)
            data[0][2].fill_(float("nan"))
            run(0)
            torch.cuda.synchronize()
            errors[name] = relative_error(data[0][2], wanted)
            if not errors[name] < TOLERANCE["bf16"]:
                failed[name] = f"relative error {errors[name]:.3g}"
                continue
            graphs[name] = captured(run, len(data))
        except TilelinkError as problem:
            failed[name] = str(problem)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order, turn = list(graphs), 0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    chance = random.Random(0)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or turn < 10:
        chance.shuffle(order)
        for name in order:
            mine = graphs[name]
            mine[turn % len(mine)].replay()
            events[0].record()
            for step in range(3):
                mine[(turn + step) % len(mine)].replay()
            events[1].record()
            events[1].synchronize()
            samples[name].append(events[0].elapsed_time(events[1]) / 3 * 1e3)
        turn += 1
    return {
        "shape": case, "sets": len(data), "errors": errors, "failed": failed,
        "median_us": {name: statistics.median(s) for name, s in samples.items()},
        "samples_us": {name: [round(x, 2) for x in s] for name, s in samples.items()},
    }  # fmt: skip


def geomean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(results: list[dict[str, Any]]) -> str:
    """Ratios of medians, cuBLAS over a structure: above one the structure is faster."""
    lines = [f"{'shape':>20} {'cublas us':>9} " + " ".join(f"{n[:16]:>16}" for n in STRUCTURES)]
    best: list[float] = []
    each: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for result in results:
        base = result["median_us"]["cublas"]
        ratios = {n: base / t for n, t in result["median_us"].items() if n != "cublas"}
        for name, ratio in ratios.items():
            each[name].append(ratio)
        top = max(ratios, key=lambda n: ratios[n])
        best.append(ratios[top])
        shape = "x".join(map(str, result["shape"]))
        cells = " ".join(f"{ratios[n]:16.3f}" if n in ratios else f"{'-':>16}" for n in STRUCTURES)
        lines.append(f"{shape:>20} {base:9.1f} {cells}  best {ratios[top]:.3f} {top}")
    means = " ".join(f"{geomean(each[n]):16.3f}" if each[n] else f"{'-':>16}" for n in STRUCTURES)
    lines.append(
        f"{'geomean':>20} {'':>9} {means}  best {geomean(best):.3f}, least {min(best):.3f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Check, measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing a shape")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds after which no shape begins"
    )
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--skip-check", action="store_true", help="measure only")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    todo = [] if args.skip_check else checks()
    jobs = [*todo, *(Checked(name, "plain", case) for case in CASES for name in STRUCTURES)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for _ in pool.imap_unordered(compiled, jobs):
            pass
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
    checked = [check(one) for one in todo]
    print(f"checked by {time.perf_counter() - start:.0f} s", flush=True)
    wrong = [
        c for c in checked if c.get("error", 0.0) >= TOLERANCE["bf16"] or c.get("repeats") is False
    ]
    refused = sorted({c["refused"] for c in checked if "refused" in c})
    data: dict[str, Any] = {
        "kind": "gluon_gemm",
        "environment": describe(1),
        "checked": checked,
        "cases": [],
    }
    for case in CASES:
        if time.perf_counter() - start > args.budget:
            break
        data["cases"].append(measure(case, args.seconds))
        args.out.write_text(json.dumps(data))
        done = data["cases"][-1]
        print(
            case, {n: round(t, 1) for n, t in done["median_us"].items()}, done["failed"], flush=True
        )
    ran = [c for c in checked if "error" in c]
    print(f"checked {len(ran)}, wrong {len(wrong)}, refused {len(checked) - len(ran)}")
    for text in refused:
        print("  refused:", text.splitlines()[0])
    for one in wrong[:20]:
        print("  WRONG:", one)
    if ran:
        print(f"  largest error {max(c['error'] for c in ran):.2e}")
    print(table(data["cases"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
