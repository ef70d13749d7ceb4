"""Bad input at every entry point ends in a typed error that names the fault, soon, with no frames.

``python -m tests.assurance.bad_input [--only WORD] [--show]`` runs all cases.
"""

from __future__ import annotations

import argparse
import time

from tests.assurance import (
    bad_calls,
    bad_commands,
    bad_executors,
    bad_ir,
    bad_loops,
    bad_mappings,
    bad_schedules,
    bad_source,
)
from tests.assurance.bad_case import Case, outcome_of
from tests.assurance.report import finish, progress

MODULES = (
    bad_source,
    bad_loops,
    bad_mappings,
    bad_calls,
    bad_commands,
    bad_ir,
    bad_schedules,
    bad_executors,
)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)


def main() -> None:
    """Runs the cases; exit code 1 unless each ends as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--show", action="store_true", help="print the text of every error")
    args = parser.parse_args()
    start = time.monotonic()
    chosen = [case for case in CASES if args.only in case.name]
    faults = hangs = tracebacks = 0
    slowest = 0.0
    for case in chosen:
        outcome = outcome_of(case)
        slowest = max(slowest, outcome.seconds)
        hangs += outcome.hang
        tracebacks += outcome.traceback
        faults += bool(outcome.fault)
        if outcome.fault:
            progress(f"FAULT {case.name}: {outcome.fault}\n{outcome.text}")
        elif args.show:
            progress(f"== {case.name}\n{outcome.text}")
    finish(
        faults == 0 and bool(chosen),
        cases=len(chosen),
        typed=len(chosen) - faults,
        hangs=hangs,
        tracebacks=tracebacks,
        slowest_s=round(slowest, 2),
        seconds=round(time.monotonic() - start, 1),
    )


if __name__ == "__main__":
    main()
