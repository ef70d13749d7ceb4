"""All that GPUs can show, one step behind the other: ``python -m tests.gpu.evidence --out DIR --seconds 1500``.

Each step is a command of its own under a time limit, with a log beside its JSON: DIR/grid_h200x4.json,
DIR/grid_h200x4.log, named as ``bench/results/`` has them. Steps that there is no time for are said to be left
out; a step that fails or runs out of time does not keep the next from its turn. Nothing here imports torch:
this process holds no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OUT = "OUT"  # in a command: the file or folder that the step writes


@dataclass(frozen=True, slots=True)
class Step:
    """``command``: arguments of Python, where ``launched`` of torchrun. ``makes``: the file below the folder OUT
    that is the result, or empty where OUT is that file. ``seconds``: the least time worth beginning with, and
    the limit."""

    name: str
    command: tuple[str, ...]
    seconds: tuple[float, float]
    makes: str = ""
    launched: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def _reliability(*tests: str) -> tuple[str, ...]:
    return ("-m", "tests.gpu.reliability", *tests, "--warm", "--budget", "150", "--out", OUT)


def _bench(suite: str) -> tuple[str, ...]:
    cut = () if suite == "compile" else ("--tensor-parallel", "8")
    return ("bench/run.py", "--suite", suite, *cut, "--time-budget", "200", "--out", OUT)


# In the order of what is worth most. Where waits have to run out, they do so sooner than they would.
SOON = {"TILELINK_TIMEOUT": "4"}
FAULTS = ("-m", "tests.gpu.faults", "--out", OUT)
STEPS = (
    Step(
        "gpu_tests", ("-m", "tests.gpu.run_all", "--out", OUT), (200, 420), "gpu_tests.json", False
    ),
    Step("grid", _bench("grid"), (90, 320)),
    Step("soak", _reliability("soak", "replays"), (60, 330), "reliability_soak_replays.json"),
    Step("faults", (*FAULTS, "--seconds", "100", "kill", "lost"), (60, 130), launched=False),
    Step("mutants", _reliability("mutants"), (40, 200), "reliability_mutants.json", True, SOON),
    Step(
        "occupancy_shapes",
        _reliability("occupancy", "shapes"),
        (60, 200),
        "reliability_occupancy_shapes.json",
    ),
    Step("cost", _reliability("cost"), (40, 150), "reliability_cost.json"),
    Step("straggler", (*FAULTS, "--seconds", "130", "straggler"), (60, 150), launched=False),
    Step("host_cost", ("bench/host_cost.py", "--out", OUT), (30, 150)),
    Step(
        "varying_m",
        ("bench/varying_m.py", "--tensor-parallel", "8", "--time-budget", "90", "--out", OUT),
        (60, 400),
    ),
    Step("compile", _bench("compile"), (60, 400)),
)

Execute = Callable[[Sequence[str], dict[str, str], Path, float], int | None]


def execute(command: Sequence[str], env: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit code of ``command`` with its output in ``log``; None where it was killed at ``limit`` seconds."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            # All ranks: what torchrun has started is of its session.
            os.killpg(process.pid, 9)
            process.wait()
            return None


def command_of(step: Step, world: int, target: Path) -> list[str]:
    """The command line of ``step`` that writes to ``target``."""
    run = [str(target) if word == OUT else word for word in step.command]
    if step.launched:
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(world), *run),
        ]
    return [sys.executable, *run, "--world", str(world)]


def run_step(
    step: Step, world: int, out: Path, name: str, limit: float, run: Execute = execute
) -> str:
    """Runs ``step``, leaves its result as ``name``.json in ``out``; how it ended: `passed`, or why not."""
    result = out / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) if step.makes else result
        env = {**os.environ, **step.environment}
        code = run(command_of(step, world, target), env, out / f"{name}.log", limit)
        if step.makes and (made := Path(folder) / step.makes).exists():
            shutil.copy(made, result)
    if code is None:
        return f"stopped after {limit:.0f} s"
    return "passed" if code == 0 else f"exit code {code}"


def run_steps(
    steps: Sequence[Step],
    world: int,
    gpu: str,
    out: Path,
    seconds: float,
    run: Execute = execute,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """How each of ``steps`` ended, in their order; all of them end within ``seconds``."""
    begin, ends = clock(), {}
    for step in steps:
        left = seconds - (clock() - begin)
        least, most = step.seconds
        if left < least:
            ends[step.name] = f"left out: {left:.0f} s were left, it takes {least:.0f}"
            continue
        started, name = clock(), f"{step.name}_{gpu}x{world}"
        ends[step.name] = run_step(step, world, out, name, min(left, most), run)
        print(f"{clock() - begin:6.0f} s  {step.name}: {ends[step.name]}", flush=True)
        print(f"          {clock() - started:.0f} s, {out / name}.json, .log", flush=True)
    return ends


def gpus() -> tuple[str, int]:
    """``("h200", 4)``: what the GPUs here are called in names of files, and how many there are."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return "none", 0
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    found = re.search(r"NVIDIA (\w+)", lines[0]) if lines else None
    return (found[1].lower() if found else "gpu"), len(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a step did not pass, or had no time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the logs")
    parser.add_argument("--seconds", type=float, default=3600, help="for all steps together")
    parser.add_argument("--world", type=int, help="ranks (default: as many as GPUs, at most 8)")
    names = [step.name for step in STEPS]
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=", ".join(names) + "; all unless given"
    )
    options = parser.parse_args(arguments)
    for name in options.steps:
        if name not in names:
            parser.error(f"no step `{name}`; there are {', '.join(names)}")
    gpu, count = gpus()
    world = options.world or min(8, count)
    if not 2 <= world <= count:
        print(f"skipped: {max(2, world)} GPUs are needed, there are {count}", file=sys.stderr)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in STEPS if not options.steps or step.name in options.steps]
    ends = run_steps(chosen, world, gpu, options.out, options.seconds)
    print("\n".join(f"{name:18}{end}" for name, end in ends.items()))
    return 0 if all(end == "passed" for end in ends.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
