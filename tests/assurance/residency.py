"""Launches larger than the device: the proof's verdict against the simulator's, over seeded configurations.

    python -m tests.assurance.residency [--configurations 200] [--seed 0] [--schedules 200]

Each configuration is a compiled kernel with its own grid size, number of workers that are resident, tile
order, queue kinds, order of stages and resource. The proof says whether any order in which workers start
can hang; the simulator tries up to so many hostile schedules, each with its own start order. They agree
where the proof refuses and a schedule deadlocks, or the proof accepts and none does.

    {"configurations": 200, "agree": 200, "hang": ..., "fine": ..., "seconds": ...}
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tests.assurance.report import finish, progress
from tests.strategies import PULLED, Case
from tilelink.backend.expand import dims_of, environment
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate.errors import DeadlockError
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Options, Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.backend.verify import DataflowError, ProgressError, verify
from tilelink.ir import Block, Op
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs

KERNELS = {"ag_gemm": ag_gemm, "gemm_rs": gemm_rs, "gemm_ar": gemm_ar}
# Copies that wait for a launch stand behind it in the one hardware queue, which the proof counts with and
# these schedules do not have: they are left out. With `roles`, workers copy beside products whose warps have them.
RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:1", "sm:2", "sm:1-boxes roles"),
    "gemm_rs": (
        *("sm:1", "sm:2", "epilogue", "sm:2-folded", "epilogue-folded", *PULLED),
        "sm:1-boxes-folded roles",
    ),
    "gemm_ar": ("sm:1", "sm:2", "epilogue", "sm:2-two-folded", "epilogue-two-folded"),
}


@dataclass(frozen=True)
class Configuration:
    """A program, and what was chosen for it, in words."""

    program: Op
    words: str


def configurations(count: int, seed: int) -> Iterator[Configuration]:
    """``count`` programs, about half of them with a start order that hangs."""
    for number in range(count):
        yield _configuration(random.Random(f"{seed} {number}"))


def _configuration(chance: random.Random) -> Configuration:
    kernel = chance.choice(sorted(KERNELS))
    resource, _, roles = chance.choice(RESOURCES[kernel]).partition(" ")
    world = 2 if roles else chance.choice((1, 2, 2))
    workers = chance.randint(3, 5)
    # Such tiles have 64 rows at least, and end with a rank's.
    unit, lengths = (64, (64, 128)) if roles else (16, (16, 24, 32))
    case = Case(
        kernel=kernel,
        world=world,
        m=world * chance.choice(lengths),
        k=unit,
        n=chance.choice(lengths),
        dtype="bf16",
        resource=resource,
        tiles=(unit, unit, unit),
        channels=1 if roles else chance.choice((1, 2)),
        workers=workers,
        seed=0,
        emitter="gluon" if roles else "triton",
    )
    order = chance.choice(("auto", "row", "grouped"))
    op = KERNELS[kernel].build({"M": case.m, "N": case.n, "K": case.k}, world=world)
    program = run_passes(op, replace(case.schedule(), order=order, group=chance.choice((1, 2))))
    # On more ranks, or with one place too few on two, few start orders hang, and schedules may miss them.
    resident = chance.choice((1, 2, workers - 1 if world == 1 else 2, workers))
    queues = "given" if roles else chance.choice(("given", "given", "static", "dynamic"))
    # The proof takes stages in order, whoever runs them: these are run by all workers, each in order.
    swap = chance.random() < 0.1 and "sm" not in resource and queues != "dynamic"
    base = program
    program = _changed(base, resident, queues, swap)
    if swap and not _means_the_kernel(program):
        swap, program = False, _changed(base, resident, queues, False)
    words = f"{case} order={order} resident={resident} queues={queues} swap={swap}"
    return Configuration(program, words)


def _changed(program: Op, resident: int, queues: str, swap: bool) -> Op:
    body = program.body
    return program.with_ops(
        tuple(_launch(o, resident, queues, swap) if o.name == "launch" else o for o in body)
    )


def _means_the_kernel(program: Op) -> bool:
    """Whether no stage stands before one that makes what it reads: another rule refuses that."""
    try:
        verify(program)
    except (DataflowError, ProgressError) as error:
        return isinstance(error, ProgressError)
    return True


def _launch(launch: Op, resident: int, queues: str, swap: bool) -> Op:
    stages = [
        _queue(o, queues) if o.name == "stage" and o.get("counter") is None else o
        for o in launch.body
    ]
    if swap and len(stages) > 1 and stages[1].name == "stage":
        stages[0], stages[1] = stages[1], stages[0]
    changed = launch.with_attrs(resident=resident)
    return replace(changed, blocks=(Block(launch.blocks[0].args, tuple(stages)),))


def _queue(stage: Op, queues: str) -> Op:
    return stage if queues == "given" else stage.with_attrs(queue=queues)


def proof_hangs(program: Op) -> bool:
    """Whether the proof refuses the program as one that can hang."""
    try:
        verify(program)
    except ProgressError:
        return True
    return False


def schedule_hangs(program: Op, schedules: int) -> bool:
    """Whether one of ``schedules`` hostile schedules comes to a deadlock."""
    env = environment(program)
    inputs = [
        {
            op.symbol: torch.zeros(dims_of(op, env), dtype=torch.bfloat16)
            for op in program.find("tensor")
            if op["role"] in ("in", "inout")
        }
        for _ in range(env["WORLD"])
    ]
    traces = Traces(Geometry(program, None))
    options = Options(values=False, explain=False, versions=False, races=False)
    for seed in range(schedules):
        try:
            Scheduler(traces, [inputs], seed, options).run()
        except DeadlockError:
            return True
    return False


def measure(count: int, seed: int, schedules: int) -> dict[str, int | float]:
    """The figures of this page for ``count`` configurations."""
    begin = time.perf_counter()
    agree = hang = 0
    for number, configuration in enumerate(configurations(count, seed)):
        proven = proof_hangs(configuration.program)
        found = schedule_hangs(configuration.program, schedules)
        hang += proven
        agree += proven == found
        if proven != found:
            progress(f"{number}: proof {proven}, simulator {found}: {configuration.words}")
        if number % 50 == 49:
            progress(f"{number + 1} configurations, {agree} agree, {hang} hang")
    return {
        "configurations": count,
        "agree": agree,
        "hang": hang,
        "fine": count - hang,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--configurations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", type=int, default=200)
    args = parser.parse_args()
    found = measure(args.configurations, args.seed, args.schedules)
    count = args.configurations
    mixed = min(found["hang"], found["fine"]) >= 0.3 * count
    finish(found["agree"] == count and mixed, **found)


if __name__ == "__main__":
    main()
