"""Launches larger than the device: the proof's verdict against the simulator's, over seeded configurations.

    python -m tests.assurance.residency [--configurations 200] [--beside 100] [--seed 0] [--schedules 200]

Each configuration is a compiled kernel with its own grid size, number of workers that are resident, tile
order, queue kinds, order of stages and resource. ``--beside`` more are of workers that copy boxes beside
products whose warps have roles: their queues are what they are. The proof says whether any order in which
workers start can hang; the simulator tries up to so many hostile schedules, each with its own start order.
They agree where the proof refuses and a schedule deadlocks, or the proof accepts and none does.

Few start orders of workers beside roles hang: one that needs a worker of each rank to stay out is seldom
met. Where no schedule deadlocks, all interleavings are explored, in all start orders; ``explored`` counts
those of which that came to its end within ``--states``.

    {"configurations": 300, "agree": 300, "hang": ..., "fine": ..., "beside": 100, "beside_hang": ...,
     "explored": ..., "seconds": ...}
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tests.assurance.report import finish, progress
from tests.strategies import BESIDE_ROLES, PULLED, Case
from tilelink.backend.expand import dims_of, environment
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate.errors import DeadlockError
from tilelink.backend.simulate.explore import explore
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Options, Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.backend.verify import DataflowError, ProgressError, verify
from tilelink.ir import Block, Op
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs

KERNELS = {"ag_gemm": ag_gemm, "gemm_rs": gemm_rs, "gemm_ar": gemm_ar}
# Copies that wait for a launch stand behind it in the one hardware queue, which the proof counts with and
# these schedules do not have: they are left out.
RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:1", "sm:2"),
    "gemm_rs": ("sm:1", "sm:2", "epilogue", "sm:2-folded", "epilogue-folded", *PULLED),
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
    world = chance.choice((1, 2, 2))
    workers = chance.randint(3, 5)
    case = Case(
        kernel=kernel,
        world=world,
        m=world * chance.choice((16, 24, 32)),
        k=16,
        n=chance.choice((16, 24, 32)),
        dtype="bf16",
        resource=chance.choice(RESOURCES[kernel]),
        tiles=(16, 16, 16),
        channels=chance.choice((1, 2)),
        workers=workers,
        seed=0,
    )
    order = chance.choice(("auto", "row", "grouped"))
    op = KERNELS[kernel].build({"M": case.m, "N": case.n, "K": case.k}, world=world)
    program = run_passes(op, replace(case.schedule(), order=order, group=chance.choice((1, 2))))
    # On more ranks, or with one place too few on two, few start orders hang, and schedules may miss them.
    resident = chance.choice((1, 2, workers - 1 if world == 1 else 2, workers))
    queues = chance.choice(("given", "given", "static", "dynamic"))
    # The proof takes stages in order, whoever runs them: these are run by all workers, each in order.
    swap = chance.random() < 0.1 and "sm" not in case.resource and queues != "dynamic"
    base = program
    program = _changed(base, resident, queues, swap)
    if swap and not _means_the_kernel(program):
        swap, program = False, _changed(base, resident, queues, False)
    words = f"{case} order={order} resident={resident} queues={queues} swap={swap}"
    return Configuration(program, words)


def beside_roles(count: int, seed: int) -> Iterator[Configuration]:
    """``count`` programs in which workers copy boxes beside products whose warps have roles."""
    for number in range(count):
        yield _beside_roles(random.Random(f"beside roles {seed} {number}"))


def _beside_roles(chance: random.Random) -> Configuration:
    kernel = chance.choice(sorted(BESIDE_ROLES))
    copying, resource = chance.choice(list(enumerate(BESIDE_ROLES[kernel], 1)))
    world, tile = 2, 64
    workers = copying + chance.randint(1, 3)
    case = Case(
        kernel=kernel,
        world=world,
        m=world * tile * chance.choice((1, 2, 3)),
        k=tile,
        n=tile * chance.choice((1, 2)),
        dtype="bf16",
        resource=resource,
        tiles=(tile, tile, tile),
        channels=chance.choice((1, 2)),
        workers=workers,
        seed=0,
        emitter="gluon",
    )
    op = KERNELS[kernel].build({"M": case.m, "N": case.n, "K": case.k}, world=world)
    program = run_passes(op, replace(case.schedule(), group=chance.choice((1, 2))))
    resident = chance.randint(1, workers)
    return Configuration(_changed(program, resident, "given", False), f"{case} resident={resident}")


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


def any_order_hangs(program: Op, states: int) -> bool | None:
    """Whether any interleaving of a call, in any start order, comes to a deadlock.

    None where there are more than so many states.
    """
    found = explore(program, calls=1, limit=states)
    if found.bad is not None and found.bad.kind == "deadlock":
        return True
    return False if found.complete and found.bad is None else None


def measure(
    count: int, seed: int, schedules: int, beside: int = 0, states: int = 20_000
) -> dict[str, int | float]:
    """The figures of this page for ``count`` configurations, and ``beside`` of workers beside roles."""
    begin = time.perf_counter()
    agree = hang = beside_hang = explored = 0
    both = itertools.chain(configurations(count, seed), beside_roles(beside, seed))
    for number, configuration in enumerate(both):
        proven = proof_hangs(configuration.program)
        found = schedule_hangs(configuration.program, schedules)
        if number >= count:
            beside_hang += proven
            if not found:
                every = any_order_hangs(configuration.program, states)
                found, explored = bool(every), explored + (every is not None)
        hang += proven
        agree += proven == found
        if proven != found:
            progress(f"{number}: proof {proven}, simulator {found}: {configuration.words}")
        if number % 50 == 49:
            progress(f"{number + 1} configurations, {agree} agree, {hang} hang")
    return {
        "configurations": count + beside,
        "agree": agree,
        "hang": hang,
        "fine": count + beside - hang,
        "beside": beside,
        "beside_hang": beside_hang,
        "explored": explored,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--configurations", type=int, default=200)
    parser.add_argument("--beside", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--states", type=int, default=20_000)
    args = parser.parse_args()
    found = measure(args.configurations, args.seed, args.schedules, args.beside, args.states)
    finish(found["agree"] == found["configurations"] and mixed(found), **found)


def mixed(found: dict[str, int | float]) -> bool:
    """Whether some three in ten hang and some three in ten do not, of each kind of configurations."""
    beside, hang = found["beside"], found["beside_hang"]
    others, hang_of_others = found["configurations"] - beside, found["hang"] - hang
    return all(
        min(some, every - some) >= 0.3 * every
        for some, every in ((hang_of_others, others), (hang, beside))
    )


if __name__ == "__main__":
    main()
