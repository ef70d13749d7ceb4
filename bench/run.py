"""Measure fused kernels beside the library on all GPUs of one node.

    torchrun --nproc-per-node 8 bench/run.py --suite grid --out bench/results/grid.json
    python bench/run.py --summary bench/results/grid.json

Suites: `mlp`, `small-m`, `allreduce`, and all three as `grid`; `scaling` on 2, 4 and 8 of the ranks; `gemm`,
products of one GPU, a different one on each; `compile`, seconds from the decorator to a binary that can be
launched. In one run on the same machine: cuBLAS alone, the NCCL collective alone, both in turn, torch's
async-TP or its one-shot and two-shot all-reduce, and our schedules. Each is compared with an fp32
reference on the device, then timed in interleaved rounds; figures are medians of the largest over the
ranks. `--summary` prints what a run shows from its JSON alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import claims, environment, stats, tables
from bench.cases import GEMM, SUITES, Case, named
from bench.ours import STRUCTURES

SCHEDULES = "tuned,default,library"
COMPILE = "compile"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted([*SUITES, COMPILE]), default="mlp")
    parser.add_argument("--out", help="file for the raw JSON")
    parser.add_argument(
        "--summary",
        nargs="+",
        metavar="JSON",
        help="print what these runs show, and measure nothing",
    )
    parser.add_argument("--only", default="", metavar="TEXTS", help="only cases named so; by comma")
    parser.add_argument("--rounds", type=int, default=20, help="timed samples of each candidate")
    parser.add_argument("--warmup", type=int, default=3, help="untimed rounds before them")
    parser.add_argument(
        "--schedules",
        help="of ours, by comma: `tuned` (what a plain call chooses), `default`, `library`, resources, "
        f"names of structures, JSON files (default {SCHEDULES}; of `gemm`: tuned and all structures)",
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
    options = parser.parse_args(arguments)
    if options.summary is None and options.out is None:
        parser.error("--out is needed to measure")
    return options


def chosen(suite: str, world: int, parallel: int | None, only: str) -> list[Case]:
    """The cases of ``suite`` on ``world`` ranks whose name or origin contains one of ``only``.

    ``parallel``: in how many parts weights are cut, None for as many as there are ranks.
    """
    return named(SUITES[suite](world, parallel), only)


def specs_of(suite: str, given: str | None) -> list[str]:
    """The schedules of ours to measure."""
    if given is None:
        return ["tuned", *STRUCTURES] if suite == GEMM else SCHEDULES.split(",")
    return [spec for spec in given.split(",") if spec]


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
        if self.rank == 0:
            write_json(self.path, self.data())

    def table(self) -> str:
        """The tables and the summary that are printed last."""
        units = "milliseconds; bound = max(cuBLAS, NCCL), efficiency = bound / tilelink"
        return "\n".join([units, tables.text(self.results), "", claims.summary(self.data())])


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replaces the file at once: a reader sees the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".part")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


class Budget:
    """When to stop: no case begins that would end too late, by what the last cases took."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.start = time.monotonic()
        self.taken: list[float] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def over(self) -> bool:
        """Whether one more case would take too long. The first one also pays for starting up."""
        expected = max(self.taken[1:] or self.taken, default=0.0)
        return self.seconds is not None and self.elapsed + expected > self.seconds

    def reason(self) -> str:
        """Why nothing more was measured."""
        return f"time budget of {self.seconds:.0f} s"


def main() -> int:
    """Measure, write, print; 1 where one of ours failed, 0 otherwise."""
    options = parse()
    if options.summary is not None:
        return summarize(options.summary)
    environment.prepare()
    if options.suite == COMPILE:
        from bench.compile_time import measure

        return measure(options)
    from bench.cluster import Cluster, Watchdog
    from bench.measure import Settings

    cluster = Cluster()
    settings = Settings(options.rounds, options.warmup, options.seed)
    cases = chosen(options.suite, cluster.world, options.tensor_parallel, options.only)
    header = environment.describe(cluster.world)
    header |= {"suite": options.suite, "settings": asdict(settings)}
    report = Report(options.out, cluster.rank, header, cases)
    # Rank 0 goes first: it is the one that writes.
    patience = options.watchdog + (10 if cluster.rank else 0)
    watchdog = Watchdog(patience, report.write)
    budget = Budget(options.time_budget)
    for some in turns(cases, cluster.world):
        if cluster.agreement.first(budget.over()):
            report.stopped = budget.reason()
            break
        begin = budget.elapsed
        results = measure_turn(cluster, some, options, settings, watchdog)
        budget.taken.append(budget.elapsed - begin)
        report.results += results
        report.write()
        if cluster.rank == 0:
            for result in results:
                print(f"[{budget.elapsed:6.1f} s] {' | '.join(line(result))}", flush=True)
    report.write()
    if cluster.rank == 0:
        print(report.table(), flush=True)
    cluster.agreement.gather(None)
    failed = any(c.failed for r in report.results for c in r.candidates if c.family == stats.OURS)
    # One rank is enough to fail the launch, and keeps what the launcher says about it short.
    return 1 if failed and cluster.rank == 0 else 0


def turns(cases: Sequence[Case], world: int) -> list[list[Case]]:
    """What is measured at once: one case on all ranks, or a product on each of them."""
    alone = [case for case in cases if case.kind == GEMM]
    made = [[case] for case in cases if case.kind != GEMM]
    return made + [alone[i : i + world] for i in range(0, len(alone), world)]


def line(result: stats.CaseResult) -> list[str]:
    """What is printed of a case as soon as it is known."""
    return [result.name, *tables.rows([result])[0][1:]]


def measure_turn(
    cluster: Any, cases: list[Case], options: argparse.Namespace, settings: Any, watchdog: Any
) -> list[stats.CaseResult]:
    """The results of one of :func:`turns`, the same on every rank. Collective."""
    if cases[0].kind == GEMM:
        # Every rank has to take part in making the part of each.
        parts = [cluster.part([rank]) for rank in range(cluster.world)]
        mine = cases[cluster.rank] if cluster.rank < len(cases) else None
        part = parts[cluster.rank]
        makers = list(range(len(cases)))
    else:
        mine = cases[0]
        part = cluster.part(range(mine.world or cluster.world))
        makers = [0]
    result = None
    if mine is not None and part is not None:
        result = measure_case(part, mine, options, settings, watchdog).to_json()
    watchdog.pause()
    every = cluster.agreement.gather(result if cluster.rank in makers else None)
    watchdog.beat("the next case")
    return [stats.CaseResult.from_json(every[rank]) for rank in makers]


def measure_case(
    part: Any, case: Case, options: argparse.Namespace, settings: Any, watchdog: Any
) -> stats.CaseResult:
    """Everything about one case. Collective over ``part``."""
    from bench.baselines import baselines
    from bench.candidates import make_inputs
    from bench.measure import Bench
    from bench.ours import ours
    from tilelink.tuning.timing import calls_in_a_row

    begin = time.monotonic()
    result = stats.CaseResult(case.name, case.kind, case.m, case.k, case.n, case.origin, part.world)
    result.skipped = case.unsupported(part.world)
    if result.skipped is not None:
        return result
    watchdog.beat(f"inputs of {case.name}")
    inputs = make_inputs(part, case, settings.seed)
    result.input_sets = len(inputs.sets)
    result.calls = calls_in_a_row(case.m, case.k, case.n)
    bench = Bench(part, inputs, watchdog, result.calls)
    if not options.no_baselines:
        for candidate in baselines(part, case, inputs):
            bench.add(candidate)
    specs = specs_of(options.suite, options.schedules)
    for candidate in ours(part, case, inputs, specs, not options.no_graphs):
        bench.add(candidate)
    bench.time(settings)
    bench.host()
    bench.recheck()
    bench.close()
    result.candidates = list(bench.results.values())
    result.seconds = round(time.monotonic() - begin, 3)
    return result


def summarize(paths: Sequence[str]) -> int:
    """Prints what the runs show; 1 where a claim that was measured is missed."""
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    missed = False
    measured = [run for run in runs if run["kind"] == "bench"]
    for path, run in zip(paths, runs, strict=True):
        if run["kind"] == "compile_time":
            from bench.compile_time import line as compile_line

            print("\n".join([path, *map(compile_line, run["cases"]), ""]))
            continue
        print(f"{path}\n{claims.summary(run)}\n")
        missed |= any(claim.holds is False for claim in claims.claims(run))
    if len(measured) > 1:
        same = claims.checksums(measured)
        print(f"{same.text}: {same.figure} ({same.verdict})")
        missed |= same.holds is False
    return 1 if missed else 0


if __name__ == "__main__":
    if "--summary" in sys.argv:
        sys.exit(main())
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
