"""Replay captured CUDA graphs of fused kernels with fresh inputs, and compare every output.

    torchrun --nproc-per-node 8 bench/graph_check.py --out bench/results/graph_check.json

One graph of AG+GEMM (8192, 8192, 7168) and one of GEMM+RS (8192, 3584, 8192), in (M, K, N) of one rank.
Before each replay new random values, generated on the device, go into the static inputs; behind it the
output is compared with what torch computes from the same inputs. Eager calls are mixed in. At the end a
control compares the last output with the result of other inputs: it must find mismatches.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import environment
from bench.cases import AG_GEMM, GEMM_RS, Case

if TYPE_CHECKING:
    import torch

CASES = (
    Case(AG_GEMM, 8192, 8192, 7168, "MLP hidden 8192, intermediate 28672"),
    Case(GEMM_RS, 8192, 3584, 8192, "MLP hidden 8192, intermediate 28672"),
)
# An element may be off by this part of its size plus of its row's root mean square: several roundings
# to bf16 stay below, a tile that was read too early does not.
TOLERANCE = 0.03


@dataclass(slots=True)
class Problem:
    """Static inputs and output of this rank, and buffers of the reference."""

    case: Case
    cluster: Any
    a: torch.Tensor
    b: torch.Tensor
    out: torch.Tensor
    expected: torch.Tensor
    scratch: tuple[torch.Tensor, ...]
    generator: torch.Generator

    @staticmethod
    def make(case: Case, cluster: Any, seed: int) -> Problem:
        """Allocates everything for ``case``."""
        import torch

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=cluster.device)

        world, gathers = cluster.world, case.kind == AG_GEMM
        slice_ = case.m // world
        rows = slice_ if gathers else case.m
        whole = [(case.m, case.k)] if gathers else [(case.m, case.n), (world, slice_, case.n)]
        shape = (case.m, case.n) if gathers else (slice_, case.n)
        generator = torch.Generator(cluster.device).manual_seed(seed + 7919 * cluster.rank)
        return Problem(
            case,
            cluster,
            empty(rows, case.k),
            empty(case.k, case.n),
            empty(*shape),
            empty(*shape),
            tuple(empty(*sizes) for sizes in whole),
            generator,
        )

    def refresh(self) -> None:
        """New random values in the static inputs, and no values in the output."""
        self.a.normal_(generator=self.generator)
        self.b.normal_(std=self.case.k**-0.5, generator=self.generator)
        self.out.fill_(float("nan"))

    def reference(self) -> None:
        """Torch's result of the inputs as they are, into ``expected``: partial sums travel in bf16."""
        import torch
        import torch.distributed as dist

        if self.case.kind == AG_GEMM:
            dist.all_gather_into_tensor(self.scratch[0], self.a)
            torch.mm(self.scratch[0], self.b, out=self.expected)
            return
        partial, parts = self.scratch
        torch.mm(self.a, self.b, out=partial)
        dist.all_to_all_single(parts.view(-1, self.case.n), partial)
        # Added in fp32 and rounded once, as the language defines the sum.
        self.expected.copy_(parts.sum(0, dtype=torch.float32))

    def mismatches(self) -> torch.Tensor:
        """How many elements of the output are off, NaN included; a scalar on the device."""
        import torch

        total = torch.zeros((), dtype=torch.int64, device=self.out.device)
        # In slices: fp32 copies of the whole would be slow and large.
        for first in range(0, self.out.shape[0], 1024):
            out = self.out[first : first + 1024].float()
            wanted = self.expected[first : first + 1024].float()
            scale = wanted.square().mean(1, keepdim=True).sqrt()
            near = (out - wanted).abs() <= TOLERANCE * (wanted.abs() + scale)
            total += (~near).sum()
        return total


def check(problem: Problem, options: argparse.Namespace, watchdog: Any) -> dict[str, Any]:
    """All replays of one problem; the record that goes into the file. Collective."""
    import torch
    import torch.distributed as dist

    from bench.ours import schedule_of
    from tilelink.kernels import ag_gemm, gemm_rs

    case, cluster = problem.case, problem.cluster
    kernel = ag_gemm if case.kind == AG_GEMM else gemm_rs
    schedule = schedule_of(kernel, case, cluster.world, options.schedule)
    call = kernel.on(group=cluster.group, schedule=schedule)

    def run() -> None:
        call(problem.a, problem.b, problem.out)

    watchdog.beat(f"first calls of {case.name}")
    found = torch.zeros(options.replays + 1, dtype=torch.int64, device=cluster.device)
    problem.refresh()
    run()
    problem.reference()
    found[-1] += problem.mismatches()
    cluster.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    begin = time.monotonic()
    eager = 0
    for number in range(options.replays):
        problem.refresh()
        graph.replay()
        problem.reference()
        found[number] = problem.mismatches()
        if options.eager_every and number % options.eager_every == 0:
            problem.refresh()
            run()
            problem.reference()
            found[-1] += problem.mismatches()
            eager += 1
        if number % 20 == 19:
            cluster.settle()
            watchdog.beat(f"replay {number} of {case.name}")
    cluster.settle()
    seconds = time.monotonic() - begin
    # The control keeps the output and computes the reference of other inputs.
    problem.a.normal_(generator=problem.generator)
    problem.reference()
    control = problem.mismatches()
    for values in (found, control):
        dist.all_reduce(values)
    wrong = found[:-1].nonzero().flatten().tolist()
    return {
        "name": case.name,
        "kind": case.kind,
        "m": case.m,
        "k": case.k,
        "n": case.n,
        "schedule": options.schedule,
        "replays": options.replays,
        "elements_each": problem.out.numel() * cluster.world,
        "mismatched_elements": int(found[:-1].sum()),
        "wrong_replays": wrong[:100],
        "eager_calls": eager + 1,
        "eager_mismatched_elements": int(found[-1]),
        "control_mismatched_elements": int(control),
        "tolerance": TOLERANCE,
        "seconds": round(seconds, 2),
    }


def passed(record: dict[str, Any]) -> bool:
    """Whether nothing was off, and the control could tell."""
    if "failed" in record:
        return False
    wrong = record["mismatched_elements"] + record["eager_mismatched_elements"]
    return bool(wrong == 0 and record["control_mismatched_elements"] > 0)


def describe(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "failed" in record:
        return f"{record['name']} ({record['schedule']}): failed: {record['failed']}"
    return (
        f"{record['name']} ({record['schedule']}): {record['replays']} replays, "
        f"{record['mismatched_elements']} mismatched elements; {record['eager_calls']} eager calls, "
        f"{record['eager_mismatched_elements']}; control {record['control_mismatched_elements']}; "
        f"{'passed' if passed(record) else 'FAILED'} in {record['seconds']} s"
    )


def main() -> int:
    """Check, write, print; 1 where anything mismatched."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file for the JSON")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--eager-every", type=int, default=50, help="an eager call each so many")
    parser.add_argument("--schedule", default="copy_engine", help="as --schedules of run.py, one")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only cases named so")
    parser.add_argument("--watchdog", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    environment.prepare()
    from bench.cluster import Cluster, Watchdog, describe_error
    from bench.run import write_json

    cluster = Cluster()
    data = {"kind": "graph_check", **environment.describe(cluster.world), "cases": []}

    def write(stopped: str | None = None) -> None:
        if cluster.rank == 0:
            write_json(Path(options.out), data | {"stopped": stopped})

    watchdog = Watchdog(options.watchdog + (10 if cluster.rank else 0), write)
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            record = check(Problem.make(case, cluster, options.seed), options, watchdog)
        except Exception as error:
            failed = {"failed": describe_error(error), "schedule": options.schedule}
            data["cases"].append({"name": case.name, **failed})
            write()
            raise
        data["cases"].append(record)
        write()
        if cluster.rank == 0:
            print(describe(record), flush=True)
    cluster.agreement.gather(None)
    good = bool(data["cases"]) and all(map(passed, data["cases"]))
    return 1 if not good and cluster.rank == 0 else 0


if __name__ == "__main__":
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
