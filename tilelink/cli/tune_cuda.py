"""``tilelink tune`` on GPUs: one rank of the search, in a process that torchrun started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilelink.cli.errors import BadWorld
from tilelink.cli.options import write_file
from tilelink.cli.source import load, machine_of
from tilelink.schedules.machine import Machine, UnknownMachineError
from tilelink.tuning import NO_MULTICAST
from tilelink.tuning.campaign import Outcome, Settings, campaign, store
from tilelink.tuning.problem import Problem
from tilelink.tuning.session import paste

if TYPE_CHECKING:
    from tilelink.tuning.ranks import Part

WATCHDOG = 90.0  # seconds without progress after which a rank ends: a kernel hangs


def execute_cuda(args: argparse.Namespace) -> int:
    """Tunes the kernels of FILE at one shape; rank 0 prints. 1 if a kernel has no schedule that runs."""
    world = int(os.environ["WORLD_SIZE"])
    if args.world not in (None, world):
        raise BadWorld(asked=args.world, world=world)
    args.world = world
    units = load(args)
    path, _, _ = args.file.rpartition("::") if "::" in args.file else (args.file, "", "")
    problems = [
        Problem(
            os.path.abspath(path),
            unit.name,
            {op.symbol: int(op["value"]) for op in unit.kernel("tune").find("extent")},
            world,
            args.dtype.get("", "bf16"),
        )
        for unit in units
    ]
    machine = machine_of(args.target) if args.target else None
    settings = Settings(args.budget, args.candidates, args.effort)
    out = Path(args.out) if args.out else None

    def finished(outcome: Outcome) -> None:
        if outcome.result is not None:
            print(paste(path, outcome.problem.build(), outcome.result.best))

    try:
        return run_campaign(
            problems, settings, args.trials, out, machine, "tilelink tune", finished
        )
    finally:
        _leave()


def run_campaign(
    problems: Sequence[Problem],
    settings: Settings,
    log: str | None,
    folder: Path | None,
    machine: Machine | None,
    source: str,
    finished: Callable[[Outcome], None] = lambda _: None,
) -> int:
    """Tunes ``problems`` on the ranks of this job and updates the tables of ``folder`` after each.

    ``machine``: the model that plans, by default that of the GPUs found. ``source``: what a table says its
    times are from. 1 if a problem has no schedule that runs.
    """
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    import torch

    from tilelink.schedules.tables import Run
    from tilelink.tuning.lab import GpuLab, today, versions
    from tilelink.tuning.ranks import Cluster, Watchdog

    cluster = Cluster()
    watchdog = Watchdog(WATCHDOG + (10 if cluster.rank else 0), lambda _: None)
    device = torch.cuda.get_device_name(cluster.device)
    model = machine or model_of(device, cluster.world)
    lab = GpuLab(cluster, model, watchdog)
    run = Run(source, today(), versions())

    def done(outcome: Outcome) -> None:
        if cluster.rank == 0:
            finished(outcome)
            if folder is not None:
                store([outcome], device, run, folder)

    try:
        outcomes = campaign(problems, lab, settings, Path(log) if log else None, _say, done)
    finally:
        lab.close()
    watchdog.pause()
    if cluster.rank == 0:
        for line in failures(outcomes):
            print(line, file=sys.stderr)
    return int(any(o.result is None for o in outcomes))


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Every schedule that failed and every problem without a result, a line each."""
    lines = []
    for outcome in outcomes:
        if outcome.result is None:
            lines.append(f"no result: {outcome.problem.cell}: {outcome.skipped}")
            continue
        lines += [
            f"failed: {outcome.problem.cell}: {trial.schedule.to_json()}: {trial.failed}"
            for trial in outcome.result.failures
        ]
    return lines


def model_of(device: str, world: int) -> Machine:
    """The machine model of these GPUs; the default one where there is none, which a warning says."""
    found = Machine.of_device(device, world)
    if found is None:
        _say(f"no machine model of {world} x {device}: candidates are chosen by that of h200x8")
        found = Machine.load()
    return found


def calibrate_cuda(args: argparse.Namespace) -> int:
    """Measures the machine's numbers and writes its model; rank 0 prints."""
    from tilelink.tuning.calibrate import calibrate

    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    from tilelink.tuning.ranks import Cluster

    cluster: Part = Cluster()
    name = args.target or f"{_short_name()}x{cluster.world}"
    try:
        base = Machine.load(name)
    except UnknownMachineError:
        base = Machine.load()
    machine, lines = calibrate(cluster, base, name)
    if cluster.rank == 0:
        for line in lines:
            print(line)
        if args.out:
            write_file(args.out, machine.to_json())
            print(f"written: {args.out}")
        else:
            print(machine.to_json(), end="")
    _leave()
    return 0


def _leave() -> None:
    """Takes the process group down, where there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _short_name() -> str:
    import torch

    return torch.cuda.get_device_name().split()[-1].lower()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
