"""Faults on the simulator's virtual clock: no run hangs, lags are survived, all else gets a named error.

``python -m tests.assurance.faults_simulated [--seeds 200]`` runs tiny programs of the three kernels, two
calls each, on every resource, while a rank is killed, a signal lost, a rank or an agent delayed, or a
word of the control memory changed. It prints one line of JSON and exits with 1 if a run hung, if a delay
below the limits failed or gave wrong numbers, if a rank that ended without an error holds wrong numbers, or if a
survivor ended later than a second after its limit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.strategies import BESIDE_ROLES, move_of
from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.simulate import (
    Corrupt,
    DeadlockError,
    Delay,
    Drop,
    Fault,
    Kill,
    Limits,
    Outcome,
)
from tilelink.backend.simulate.faults import FaultRun
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.trace import Traces
from tilelink.cli.inputs import random_inputs
from tilelink.errors import TilelinkError
from tilelink.schedules import Schedule

LIMITS = Limits(progress=10.0, arrival=600.0)
SLACK = 1.0  # virtual seconds after its limit at which a survivor must have ended
MOVED = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}
PAIRS = [
    (kernel, resource)
    for kernel in MOVED
    for resource in ("copy_engine", "sm:1", "epilogue", "none")
    if (kernel, resource) != ("ag_gemm", "epilogue")
] + [
    (kernel, resource) for kernel, resources in BESIDE_ROLES.items() for resource in resources[-1:]
]
KINDS = ("kill", "drop", "delay", "late", "agent", "stall", "epoch", "flag")
DELAYS = ("delay", "late", "agent")  # below the limits: nothing may fail
CALLS = 2


@dataclass(frozen=True)
class Subject:
    """A compiled program with its inputs, what it should give, and how long a rank's run is."""

    traces: Traces
    inputs: list[Any]
    expected: list[Any]
    steps: int
    notifies: int
    agents: tuple[str, ...]
    flags: tuple[tuple[str, int], ...]


@dataclass
class Tally:
    """What the runs came to."""

    seeds: int = 0
    named_errors: int = 0
    seen_by_oracles: int = 0
    survived_delays: int = 0
    unaffected: int = 0
    hangs: int = 0
    max_over_timeout_s: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@cache
def subject(kernel: str, resource: str, world: int) -> Subject:
    """The tiny instance of ``kernel`` on ``world`` ranks."""
    roles = resource in BESIDE_ROLES.get(kernel, ())
    rows, size = (64, 64) if roles else (4, 8)
    # A tile and a half a rank; where warps have roles, workers copy whole ones.
    extents = {"M": (2 * rows if roles else rows * 3 // 2) * world, "K": size, "N": size}
    op = getattr(kernels, kernel).build(extents, world=world)
    moves = ((MOVED[kernel], move_of(resource)),)
    tiles = (("K", size), ("M", rows), ("N", size))
    emitter = "gluon" if roles else "triton"
    schedule = Schedule(tiles=tiles, workers=3, group=1, emitter=emitter, moves=moves)
    program = compile_kernel(op, schedule)
    inputs = [random_inputs(op, seed) for seed in range(CALLS)]
    traces = Traces(Geometry(program))
    clean = FaultRun(traces, inputs, 0, (), LIMITS)
    clean.outcome()
    flags = tuple(
        (decl.name, element)
        for decl in traces.geometry.decls.values()
        if decl.kind == "flag"
        for element in sorted(clean.memories[0].channels[decl.name].notified)
    )
    return Subject(
        traces,
        inputs,
        [reference.run(op, given) for given in inputs],
        clean.progress_of(0).steps,
        clean.progress_of(0).notifies,
        traces.geometry.agent_names,
        flags,
    )


def plan(what: Subject, kind: str, world: int, draw: random.Random) -> list[Fault]:
    """A fault of ``kind`` at a random place."""
    rank, step = draw.randrange(world), draw.randrange(what.steps)
    if kind == "kill":
        return [Kill(rank, step)]
    if kind == "drop":
        return [Drop(rank, draw.randrange(max(1, what.notifies)))]
    if kind == "delay":
        return [Delay(rank, step, draw.uniform(0.01, 0.95) * LIMITS.progress)]
    if kind == "late":
        # Before its first step the rank has not started the call: the longer limit holds.
        return [Delay(rank, 0, draw.uniform(0.01, 0.95) * LIMITS.arrival)]
    if kind == "agent":
        seconds = draw.uniform(0.01, 0.95) * LIMITS.progress
        return [Delay(rank, draw.randrange(4), seconds, draw.choice(what.agents))]
    if kind == "stall":
        return [Delay(rank, step, draw.uniform(1.5, 4.0) * LIMITS.progress)]
    if kind == "flag" and what.flags:
        symbol, element = draw.choice(what.flags)
        return [Corrupt(rank, step, -draw.randrange(1, 1 << 20), symbol, element)]
    return [Corrupt(rank, step, draw.choice((-2, -1, 1, 2)))]


def attempt(seed: int, tally: Tally) -> None:
    """One run of one seed."""
    draw = random.Random(seed)
    kernel, resource = PAIRS[seed % len(PAIRS)]
    kind = KINDS[seed // len(PAIRS) % len(KINDS)]
    world = draw.choice((2, 3))
    what = subject(kernel, resource, world)
    faults = plan(what, kind, world, draw)
    case = f"seed {seed}: {kernel} {resource} world {world} {faults}"
    tally.seeds += 1
    tally.kinds[kind] = tally.kinds.get(kind, 0) + 1
    try:
        outcome = FaultRun(what.traces, what.inputs, seed, faults, LIMITS).outcome()
    except DeadlockError as error:
        tally.hangs += 1
        tally.failures.append(f"{case}: hangs: {error}")
        return
    except TilelinkError as error:
        # A wrong word can let a wait pass early: the detectors see what no limit would.
        tally.seen_by_oracles += 1
        if kind not in ("epoch", "flag"):
            tally.failures.append(f"{case}: {error}")
        return
    judge(case, kind, what, outcome, tally)


def judge(case: str, kind: str, what: Subject, outcome: Outcome, tally: Tally) -> None:
    """Hold an outcome against what is promised."""
    for rank, error in outcome.errors.items():
        assert outcome.struck is not None
        over = outcome.ended[rank] - outcome.struck - outcome.allowed
        tally.max_over_timeout_s = max(tally.max_over_timeout_s, over)
        if over > SLACK:
            tally.failures.append(f"{case}: rank {rank} ended {over:.3f} s after its limit")
        if error.code not in ("wait-timeout", "peer-timeout"):
            tally.failures.append(f"{case}: {error}")
    for rank in range(what.traces.geometry.world):
        if rank in outcome.dead or rank in outcome.errors:
            continue
        for found, wanted in zip(outcome.outputs, what.expected, strict=True):
            for name, right in wanted[rank].items():
                if name not in found[rank]:
                    tally.failures.append(f"{case}: rank {rank} has no `{name}` and no error")
                elif not relative_error(found[rank][name], right) <= TOLERANCE["bf16"]:
                    tally.failures.append(f"{case}: `{name}` of rank {rank} is wrong")
    if outcome.errors:
        tally.named_errors += 1
        if kind in DELAYS:
            first = next(iter(outcome.errors.values()))
            tally.failures.append(f"{case}: a delay below the limits failed: {first}")
    elif kind in DELAYS:
        tally.survived_delays += 1
    else:
        tally.unaffected += 1


def main(argv: list[str] | None = None) -> int:
    """Runs all seeds; 0 if every promise held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200, help="runs; default: 200")
    parser.add_argument("--first", type=int, default=0, help="the first seed; default: 0")
    args = parser.parse_args(argv)
    tally, began = Tally(), time.monotonic()
    for seed in range(args.first, args.first + args.seeds):
        attempt(seed, tally)
        if (seed + 1) % 50 == 0:
            print(f"{seed + 1} of {args.first + args.seeds}", file=sys.stderr)
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    print(
        json.dumps(
            {
                "seeds": tally.seeds,
                "named_errors": tally.named_errors,
                "seen_by_oracles": tally.seen_by_oracles,
                "survived_delays": tally.survived_delays,
                "unaffected": tally.unaffected,
                "hangs": tally.hangs,
                "max_over_timeout_s": round(tally.max_over_timeout_s, 4),
                "failures": len(tally.failures),
                "kinds": tally.kinds,
                "seconds": round(time.monotonic() - began, 2),
            }
        )
    )
    return int(bool(tally.failures) or tally.hangs > 0)


if __name__ == "__main__":
    sys.exit(main())
