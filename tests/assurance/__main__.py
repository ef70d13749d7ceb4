"""All evidence that needs no GPU: ``python -m tests.assurance [NAME …] [--out FILE]``.

Each case is a module of its own, run in a process of its own; its JSON line is printed, and with
``--out`` all lines are written to a file with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Name, module, arguments.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "proof": ("mutants", ("--oracle", "proof")),
    "simulator": ("mutants", ("--oracle", "simulator")),
    "emitted": ("emitted", ()),
    "exhaustive": ("exhaustive", ()),
    "residency": ("residency", ()),
    "random_programs": ("random_programs", ()),
    "bad_input": ("bad_input", ()),
    "faults_simulated": ("faults_simulated", ()),
    "faults_interpreted": ("faults_interpreted", ()),
}


def run_case(name: str, limit: float) -> dict[str, Any]:
    """One case: its figures, exit code and seconds; a case that ran out of time has code None."""
    module, arguments = CASES[name]
    command = [sys.executable, "-m", f"tests.assurance.{module}", *arguments]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False
        )
        code, lines = done.returncode, done.stdout.splitlines()
    except subprocess.TimeoutExpired:
        code, lines = None, []
    seconds = round(time.monotonic() - begin, 1)
    figures = json.loads(lines[-1]) if lines else {}
    shown = f"python -m tests.assurance.{' '.join((module, *arguments))}"
    return {"name": name, "command": shown, "code": code, "seconds": seconds, "figures": figures}


def main() -> int:
    """Run the cases; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a case")
    options = parser.parse_args()
    for name in options.names:
        if name not in CASES:
            parser.error(f"no case `{name}`; there are {', '.join(CASES)}")
    cases = []
    for name in options.names:
        print(f"== {name}", file=sys.stderr, flush=True)
        cases.append(run_case(name, options.limit))
        print(json.dumps(cases[-1]), flush=True)
    if options.out is not None:
        data = {
            "kind": "assurance",
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "triton": version("triton"),
            "cases": cases,
        }
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if all(case["code"] == 0 for case in cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
