"""Breaks ranks of the interpreter on purpose, seed after seed: ``python -m tests.assurance.faults_interpreted``.

Each seed runs three calls in a row on one process a rank and does one thing to one rank in the middle of
the first or the second: kills its process, loses a signal, sleeps, or overwrites its epoch. Ranks that
live must all get a named error within the time limit and a second in all; a sleep shorter than the limit
must not be noticed, and the numbers must be right. Behind each seed a clean run on the same processes (a
fresh one for a rank that was killed) must give the right numbers.

What is measured: ``MEASURED``. Nothing is subtracted but the limit; the calls themselves take 0.1 s.

An epoch is set back, and forward only where kernels raise all flags: a flag that a copy engine raised with
a later epoch cannot be told from a signal of a later call.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.assurance.faulty import BEGAN, EVENTS, LEFT, WAITED, WHEN
from tilelink import kernels
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, pool
from tilelink.backend.runtime.errors import RankFailed, WaitTimeout
from tilelink.backend.runtime.image import image_of
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import default_schedule

FAULTS = ("kill", "lost", "delay", "corrupt")
CALLS = 3
CASES = (
    ("gemm_ar", 2, "epilogue"),
    ("ag_gemm", 3, "copy_engine"),
    ("gemm_rs", 2, "epilogue"),
    ("ag_gemm", 2, "sm:1"),
    ("gemm_rs", 2, "copy_engine"),
    ("gemm_ar", 3, "epilogue words"),
    ("gemm_ar", 3, "epilogue sentinels"),
    ("gemm_ar", 3, "epilogue slots"),
)
M, K, N = 48, 16, 16
MEASURED = (
    "seconds beyond the time limit from the instant of the fault (SIGKILL sent, the lost signal due, the "
    "epoch overwritten), or, where no rank waited then for what does not come, from the instant at which "
    "the first such wait of any rank began, as stamped by the waiting process before its first poll, "
    "until the last surviving rank's process had left its call and held its error record"
)


@dataclass(frozen=True)
class Case:
    """A program with its name; ``streams``: some flags are raised by copy engines.

    ``heals``: the kernel alone writes the epoch, when a call begins and when it ends, so that what overwrites it
    meanwhile goes unnoticed.
    """

    name: str
    world: int
    program: Op
    streams: bool
    heals: bool = False


@dataclass
class Outcome:
    """What a seed led to; ``wrong`` says what must not be.

    ``over``: see ``MEASURED``. ``told``: the same until this process had the exceptions of all ranks.
    """

    seed: int
    fault: str
    case: str
    named: int = 0
    over: float = 0.0
    told: float = 0.0
    wrong: str = ""


def case_of(kernel: str, world: int, resource: str) -> Case:
    """A small program of one tile a rank."""
    op = getattr(kernels, kernel).build({"M": M, "K": K, "N": N}, world=world, dtype="fp32")
    resource, _, slots = resource.partition(" ")
    schedule = default_schedule(op).with_resource(resource)
    if slots:
        signal = {"words": "word", "sentinels": "sentinel"}.get(slots, "flag")
        moves = tuple(
            (name, replace(move, shots=2, slots=2, signal=signal)) for name, move in schedule.moves
        )
        schedule = replace(schedule, moves=moves)
    program = compile_kernel(op, schedule)
    streams = resource == "copy_engine"
    return Case(
        f"{kernel} {resource} {slots}".strip(), world, program, streams, image_of(program).ended
    )


def inputs_of(case: Case, seed: int) -> list[dict[str, torch.Tensor]]:
    """Small integers, so that every sum is exact whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    rows = M // case.world if case.name.startswith("ag_gemm") else M

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    return [{"A": draw(rows, K), "B": draw(K, N)} for _ in range(case.world)]


def expected(case: Case, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The output of each rank by plain matrix products."""
    if case.name.startswith("ag_gemm"):
        whole = torch.cat([i["A"] for i in inputs])
        return [whole @ i["B"] for i in inputs]
    total = torch.stack([i["A"] @ i["B"] for i in inputs]).sum(0)
    return list(total.chunk(case.world)) if "rs" in case.name else [total] * case.world


def right(case: Case, calls: list[Any], ranks: list[Any]) -> str:
    """Which rank and call has other numbers than it must have; empty if all are right."""
    for number, inputs in enumerate(calls):
        for rank, want in enumerate(expected(case, inputs)):
            if isinstance(ranks[rank], TilelinkError):
                return f"rank {rank}: {str(ranks[rank]).splitlines()[0]}"
            if not torch.equal(ranks[rank][number]["C"], want):
                return f"rank {rank} has wrong numbers in call {number}"
    return ""


def run(case: Case, calls: list[Any], limit: float, prepare: tuple[object, ...] | None) -> Any:
    """What becomes of each rank; ``limit`` is the time limit of a wait in seconds."""
    os.environ["TILELINK_TIMEOUT"] = str(limit)
    hook = ("tests.assurance.faulty", "break_rank", prepare) if prepare else None
    return interpret.run_ranks(case.program, calls, timeout=30.0, prepare=hook, epoch=2**31 - 3)


def page(case: Case) -> memoryview:
    """The words that the ranks share beside their arenas, as bytes."""
    found = pool.pool_for(case.world, 0)
    return memoryview(found.map)[2 * case.world * found.stride :]


def instants(case: Case, place: int, count: int) -> list[float]:
    """``count`` instants of the page from byte ``place`` on; 0 where nothing was stamped."""
    return list(struct.unpack_from(f"<{count}d", page(case), place))


def events_of(case: Case) -> tuple[list[int], float]:
    """How many signals each rank raises in a call, and the seconds of an undisturbed call."""
    run(case, [inputs_of(case, 0)] * CALLS, 10.0, ("count", -1, 0, 0.0))
    words = page(case)[4 * EVENTS :].cast("i")
    events = [words[rank] // CALLS for rank in range(case.world)]
    # A second time, for what happens once: the module is loaded now.
    run(case, [inputs_of(case, 0)] * CALLS, 10.0, ("count", -1, 0, 0.0))
    seconds = max(instants(case, LEFT, case.world)) - min(instants(case, BEGAN, case.world))
    return events, seconds / CALLS


def one_seed(
    seed: int, case: Case, events: list[int], limit: float, beyond: float, longest: float
) -> Outcome:
    """Runs a seed: the fault, what it led to, and a clean run behind it."""
    random_ = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    rank = random_.randrange(case.world)
    at = random_.randrange((CALLS - 1) * events[rank])
    if fault == "delay":
        amount = random_.uniform(0.1, longest) * limit
    else:
        amount = float(random_.randint(1, 1000)) * (-1 if case.streams else random_.choice((1, -1)))
    outcome = Outcome(seed, fault, f"{case.name} of {case.world}, rank {rank}, signal {at}")
    calls = [inputs_of(case, seed * CALLS + number) for number in range(CALLS)]
    pool.pool_for(case.world, 0).start()
    before = list(pool.pool_for(case.world, 0).pids)
    ranks = run(case, calls, limit, (fault, rank, at, amount))
    ended = time.monotonic()
    (when,) = instants(case, WHEN, 1)
    if when == 0.0:
        outcome.wrong = "the fault did not happen"
    elif fault == "delay" or (fault == "corrupt" and case.heals):
        outcome.wrong = right(case, calls, ranks)
    else:
        waits = [instant for instant in instants(case, WAITED, case.world) if instant]
        since = max(when, min(waits, default=when))
        outcome.over = max(instants(case, LEFT, case.world)) - since - limit
        outcome.told = ended - since - limit
        outcome.wrong = unnamed(ranks, rank if fault == "kill" else None)
        outcome.named = sum(isinstance(r, WaitTimeout) for r in ranks)
        if outcome.told > beyond:
            outcome.wrong = outcome.wrong or f"{outcome.told:.2f} s beyond the time limit"
    clean = [inputs_of(case, seed + 10_000)]
    outcome.wrong = outcome.wrong or right(case, clean, run(case, clean, 10.0, None))
    after = pool.pool_for(case.world, 0).pids
    kept = [r for r in range(case.world) if before[r] == after[r]]
    alive = [r for r in range(case.world) if fault != "kill" or r != rank]
    if kept != alive:
        outcome.wrong = outcome.wrong or f"ranks {kept} kept their process, not {alive}"
    return outcome


def unnamed(ranks: list[Any], killed: int | None) -> str:
    """Which rank has no error that names what happened."""
    for rank, became in enumerate(ranks):
        if rank == killed:
            if not isinstance(became, RankFailed) or f"{-signal.SIGKILL}" not in str(became):
                return f"the killed rank {rank} is {became}"
        elif not isinstance(became, WaitTimeout):
            return f"rank {rank} has no named error: {became if isinstance(became, TilelinkError) else 'numbers'}"
        elif "rank" not in became.values:
            return f"rank {rank}: {became}"
    if killed is not None:
        named = [r.values.get("producer") for r in ranks if isinstance(r, WaitTimeout)]
        if killed not in named or any(r not in (killed, None) for r in named):
            return f"no error names rank {killed} as the one that died"
    elif not any("expected" in r.values for r in ranks):
        return "no error names a channel"
    return ""


def attack(
    seeds: int,
    limit: float,
    first: int = 0,
    beyond: float = 1.0,
    longest: float = 0.7,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs ``seeds`` seeds and sums up; an error may come ``beyond`` seconds behind the time limit.

    ``longest``: the longest delay that must be survived, as a part of the limit; a wait lasts longer than
    the delay behind it, by what the late rank has left to compute.
    """
    started = time.monotonic()
    built: dict[int, tuple[Case, list[int]]] = {}
    usual = 0.0
    outcomes = []
    # Case after case, so that no two sets of processes are busy at once.
    for seed in sorted(range(first, first + seeds), key=lambda s: (s // len(FAULTS)) % len(CASES)):
        number = (seed // len(FAULTS)) % len(CASES)
        if number not in built:
            case = case_of(*CASES[number])
            events, seconds = events_of(case)
            built[number] = case, events
            usual = max(usual, seconds)
        outcome = one_seed(seed, *built[number], limit, beyond, longest)
        outcomes.append(outcome)
        say(
            f"seed {seed} {outcome.fault} ({outcome.case}): {outcome.wrong or 'ok'}, {outcome.over:+.3f} s"
        )
    late = [o for o in outcomes if o.fault != "delay"]
    return {
        "seeds": len(outcomes),
        "by_fault": {f: sum(o.fault == f for o in outcomes) for f in FAULTS},
        "named_errors": sum(o.named for o in outcomes),
        "survived_delays": sum(o.fault == "delay" and not o.wrong for o in outcomes),
        "hangs": sum("stuck" in o.wrong for o in outcomes),
        "failures": [f"seed {o.seed}: {o.wrong}" for o in outcomes if o.wrong],
        "timeout_s": limit,
        "measured": MEASURED,
        "max_over_timeout_s": max((round(o.over, 3) for o in late), default=0.0),
        "max_told_over_timeout_s": max((round(o.told, 3) for o in late), default=0.0),
        "undisturbed_call_s": round(usual, 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Runs the seeds that are asked for; 0 if all was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1.5, help="seconds that a wait may last")
    parser.add_argument("--beyond", type=float, default=1.0, help="seconds beyond it for an error")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = attack(args.seeds, args.timeout, args.first, args.beyond, say=say)
    print(json.dumps(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
