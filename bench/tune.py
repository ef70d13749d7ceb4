"""Tune every cell of a suite and write the tables of the package, or of a folder.

    torchrun --nproc-per-node 4 bench/tune.py --suite grid --budget 300

The model chooses candidates, all cores compile them ahead, and the GPUs measure them in graphs, interleaved
with the library in turn. The log keeps every trial: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import environment
from bench.cases import SUITES, Case, named
from tilelink.tuning.campaign import Settings
from tilelink.tuning.problem import READY_MADE, Problem

TABLES = Path(__file__).resolve().parent.parent / "schedules" / "tuned"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="grid")
    parser.add_argument("--only", default="", metavar="TEXTS", help="only cases named so; by comma")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="of measuring")
    parser.add_argument("--candidates", type=int, default=12, help="measured a case")
    parser.add_argument(
        "--effort", type=int, default=128, help="predicted a case in each of two passes"
    )
    parser.add_argument("--trials", default="tune.jsonl", help="every trial; goes on from it")
    parser.add_argument("--tables", default=str(TABLES), metavar="FOLDER")
    parser.add_argument(
        "--source",
        help="what tables say their times are from (default: the name of the file of trials)",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="cut weights in N (default: the ranks)"
    )
    return parser.parse_args(arguments)


def problems_of(cases: list[Case], world: int) -> list[Problem]:
    """The problems of cases that can be measured on all of ``world`` ranks."""
    return [
        Problem(READY_MADE, case.kind, {"M": case.m, "K": case.k, "N": case.n}, world)
        for case in cases
        if case.unsupported(world) is None and case.world in (None, world)
    ]


def main() -> int:
    """Tunes on the ranks of this job."""
    options = parse()
    environment.prepare()
    from tilelink.cli.tune_cuda import run_campaign

    world = int(os.environ["WORLD_SIZE"])
    cases = SUITES[options.suite](world, options.tensor_parallel)
    problems = problems_of(named(cases, options.only), world)
    settings = Settings(options.budget, options.candidates, options.effort)
    source = options.source or os.path.basename(options.trials)
    return run_campaign(problems, settings, options.trials, Path(options.tables), None, source)


if __name__ == "__main__":
    from bench.cluster import run_all_or_none

    run_all_or_none(main)
