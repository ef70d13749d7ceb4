"""Measure fused kernels beside the library on all GPUs of one node.

    torchrun --nproc-per-node 8 bench/run.py --suite mlp --out bench/results/mlp.json

In one run on the same machine: cuBLAS alone, the NCCL collective alone, both in turn, torch's
async-TP, and every schedule of ours. Each is compared with an fp32 reference on the device, then
timed in interleaved rounds; figures are medians of the largest over the ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import environment, stats
from bench.cases import SUITES, Case

SCHEDULES = "copy_engine,sm:16,epilogue,none"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="mlp")
    parser.add_argument("--out", required=True, help="file for the raw JSON")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only cases named so")
    parser.add_argument("--rounds", type=int, default=25, help="timed samples of each candidate")
    parser.add_argument("--warmup", type=int, default=3, help="untimed rounds before them")
    parser.add_argument(
        "--schedules",
        default=SCHEDULES,
        help=f"of ours: resources, `default` or JSON files, by comma (default {SCHEDULES})",
    )
    parser.add_argument("--no-graphs", action="store_true", help="do not time ours in CUDA graphs")
    parser.add_argument("--no-baselines", action="store_true", help="ours alone, for quick looks")
    parser.add_argument(
        "--time-budget", type=float, metavar="SECONDS", help="begin no case that would end later"
    )
    parser.add_argument(
        "--watchdog", type=float, default=60, metavar="SECONDS", help="end a launch that hangs"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="cut weights in N (default: the ranks)"
    )
    return parser.parse_args(arguments)


def chosen(suite: str, parallel: int, only: str) -> list[Case]:
    """The cases of ``suite``, weights cut in ``parallel``, whose name or origin contains ``only``."""
    return [case for case in SUITES[suite](parallel) if only in f"{case.name} ({case.origin})"]


class Report:
    """The results so far, and the file they are kept in. Only rank 0 writes."""

    def __init__(self, path: str, rank: int, header: dict[str, Any], cases: list[Case]) -> None:
        self.path = Path(path)
        self.rank = rank
        self.header = header
        self.cases = cases
        self.results: list[stats.CaseResult] = []
        self.stopped: str | None = None

    def data(self) -> dict[str, Any]:
        """Everything as JSON data; cases without a result are named."""
        done = {result.name for result in self.results}
        return {
            "kind": "bench",
            **self.header,
            "stopped": self.stopped,
            "not_measured": [case.name for case in self.cases if case.name not in done],
            "cases": [result.to_json() for result in self.results],
        }

    def write(self, stopped: str | None = None) -> None:
        """Replace the file by what is known now."""
        self.stopped = stopped or self.stopped
        if self.rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps(self.data(), indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)

    def table(self) -> str:
        """The summary that is printed last."""
        lines = [
            environment.hardware_line(self.header),
            "milliseconds; bound = max(cuBLAS, NCCL), efficiency = bound / tilelink",
            stats.render(stats.HEADER, stats.table_rows(self.results)),
        ]
        speedups = [r.speedup for r in self.results if r.speedup is not None]
        mean = stats.geometric_mean(speedups)
        if mean is not None:
            lines.append(f"geometric mean over in turn: {mean:.3f} of {len(speedups)} cases")
        for result in self.results:
            for candidate in result.candidates:
                if candidate.failed is not None:
                    lines.append(f"failed: {result.name}, {candidate.name}: {candidate.failed}")
        missing = self.data()["not_measured"]
        if missing:
            lines.append(f"not measured ({self.stopped}): {', '.join(missing)}")
        return "\n".join(lines)


def main() -> int:
    """Measure, write, print; 1 where one of ours failed, 0 otherwise."""
    options = parse()
    environment.prepare()
    from bench.cluster import Cluster, Watchdog
    from bench.measure import Settings

    cluster = Cluster()
    settings = Settings(options.rounds, options.warmup, options.seed)
    cases = chosen(options.suite, options.tensor_parallel or cluster.world, options.only)
    header = environment.describe(cluster.world)
    header |= {"suite": options.suite, "settings": asdict(settings)}
    report = Report(options.out, cluster.rank, header, cases)
    # Rank 0 goes first: it is the one that writes.
    patience = options.watchdog + (10 if cluster.rank else 0)
    watchdog = Watchdog(patience, report.write)
    start = time.monotonic()
    longest = 0.0
    for case in cases:
        elapsed = time.monotonic() - start
        over = options.time_budget is not None and elapsed + longest > options.time_budget
        if cluster.agreement.first(over):
            report.stopped = f"time budget of {options.time_budget:.0f} s"
            break
        result = measure_case(cluster, case, options, settings, watchdog)
        longest = max(longest, result.seconds)
        report.results.append(result)
        report.write()
        if cluster.rank == 0:
            cells = stats.table_rows([result])[0]
            print(f"[{time.monotonic() - start:6.1f} s] " + " | ".join(cells), flush=True)
    report.write()
    if cluster.rank == 0:
        print(report.table(), flush=True)
    cluster.agreement.gather(None)
    failed = any(c.failed for r in report.results for c in r.candidates if c.family == stats.OURS)
    # One rank is enough to fail the launch, and keeps what the launcher says about it short.
    return 1 if failed and cluster.rank == 0 else 0


def measure_case(
    cluster: Any, case: Case, options: argparse.Namespace, settings: Any, watchdog: Any
) -> stats.CaseResult:
    """Everything about one case. Collective."""
    from bench.candidates import baselines, make_inputs, ours
    from bench.measure import Bench

    begin = time.monotonic()
    result = stats.CaseResult(
        case.name, case.kind, case.m, case.k, case.n, case.origin, cluster.world
    )
    result.skipped = case.unsupported(cluster.world)
    if result.skipped is not None:
        return result
    watchdog.beat(f"inputs of {case.name}")
    inputs = make_inputs(cluster, case, settings.seed)
    result.input_sets = len(inputs.sets)
    bench = Bench(cluster, inputs, watchdog)
    if not options.no_baselines:
        for candidate in baselines(cluster, case, inputs):
            bench.add(candidate)
    specs = [spec for spec in options.schedules.split(",") if spec]
    for candidate in ours(cluster, case, inputs, specs, not options.no_graphs):
        bench.add(candidate)
    bench.time(settings)
    bench.recheck()
    bench.close()
    result.candidates = list(bench.results.values())
    result.seconds = round(time.monotonic() - begin, 3)
    return result


if __name__ == "__main__":
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
