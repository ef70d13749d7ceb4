"""Every interleaving of every synchronisation state of small programs: ``python -m tests.assurance.exhaustive``.

The three kernels in every resource, 2 ranks with 3 tiles and 3 ranks with 1, two calls, for every number
of CTAs from 1 to the number of tasks, with hardware queues of their own for all agents and with one for
all. ``states`` counts those of the search with persistent sets, which decides on all interleavings;
``unreduced`` repeats it without them wherever the states are at most ``--full``. Controls are the same
programs with one flag or count dropped or relaxed: every one must be bad, in both searches. And of the
mutants (docs/mutants.md) of still smaller programs every ``--step``-th is explored in both searches, which
must agree on whether it is bad.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.assurance.report import finish, progress
from tests.strategies import BESIDE_ROLES, FOLDED, PULLED, move_of
from tilelink import kernels
from tilelink.backend.mutate import mutants
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate.explore import Explored, explore
from tilelink.ir import Op, rewrite
from tilelink.schedules import Schedule

MOVED = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}
TWO = ("copy_engine-two-folded", "sm:1-two-folded", "epilogue-two-folded")
RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:1", "sm:2", "none"),
    "gemm_rs": ("copy_engine", "sm:1", "sm:2", "epilogue", "none", *FOLDED, *PULLED),
    "gemm_ar": ("copy_engine", "sm:1", "sm:2", "epilogue", "none", *TWO),
}
SIZES = ((2, 3), (3, 1))  # ranks, tiles of a rank
FEWER = (
    (2, 2),
    (3, 1),
)  # where own tiles that tell every rank are drawn from a queue, or what roles copy
# Tiles as short as kernels whose warps have roles multiply.
TILE, ROLES_TILE = 16, 64


@dataclass(frozen=True, slots=True)
class Instance:
    """A kernel, the resource that moves its tensor, ranks, tiles of a rank, and CTAs of the launch."""

    kernel: str
    resource: str
    world: int
    tiles: int
    workers: int

    @property
    def name(self) -> str:
        """The instance in words."""
        size = f"{self.world} ranks x {self.tiles} tiles, {self.workers} CTAs"
        return f"{self.kernel} {self.resource}, {size}"

    def program(self) -> Op:
        """The fused program, as the passes make it; not proven."""
        tile = ROLES_TILE if self.roles else TILE
        rows = tile * self.tiles * (self.world if _by_rank(self.kernel, self.resource) else 1)
        built = getattr(kernels, self.kernel).build(
            {"M": rows, "K": tile, "N": tile}, world=self.world
        )
        moves = ((MOVED[self.kernel], move_of(self.resource)),)
        schedule = Schedule(
            tiles=tuple((name, tile) for name in "KMN"),
            # Those that copy do nothing else, so that others can not do their part.
            workers=self.workers if self.roles else 3,
            group=2,
            emitter="gluon" if self.roles else "triton",
            moves=moves,
        )
        return run_passes(built, schedule)

    @property
    def roles(self) -> bool:
        """Whether warps have roles, and workers copy beside those that multiply."""
        return self.resource in BESIDE_ROLES.get(self.kernel, ())


def _by_rank(kernel: str, resource: str) -> bool:
    """Whether ranks own parts of the moved axis."""
    return kernel != "gemm_ar" or "-two" in resource


@dataclass(frozen=True, slots=True)
class Result:
    """What the explorations of one instance found."""

    instance: Instance
    states: int
    transitions: int
    unreduced: int
    controls: int
    wrong: tuple[str, ...]


def instances() -> list[Instance]:
    """Every instance, in a fixed order."""
    found = []
    for kernel, resources in RESOURCES.items():
        for size, resource in itertools.product(range(len(SIZES)), resources):
            world, tiles = (FEWER if resource == TWO[1] else SIZES)[size]
            tasks = tiles * (world if _by_rank(kernel, resource) else 1)
            for workers in range(1, tasks + 1):
                found.append(Instance(kernel, resource, world, tiles, workers))
    for kernel, resources in BESIDE_ROLES.items():
        for (world, tiles), (copying, resource) in itertools.product(FEWER, enumerate(resources)):
            for workers in range(copying + 2, tiles * world + 1):
                found.append(Instance(kernel, resource, world, tiles, workers))
    return found


def controls(program: Op) -> Iterator[tuple[str, Op]]:
    """Programs that must be bad: each op on a flag dropped or relaxed, each count dropped.

    In two shots every rank hears of the sums of all others, which are made behind their reads: the
    acknowledgements must come, but order nothing that is not ordered already.
    """
    flags = {op.symbol for op in program.find("flag")}
    two = any(flag.endswith(".summed") for flag in flags)

    def kinds(op: Op) -> tuple[str, ...]:
        if two and op.name in ("wait", "notify") and op.symbol == "ack":
            return ("dropped",)
        if op.name in ("wait", "notify") and op.symbol in flags:
            return ("dropped", "relaxed")
        return ("dropped",) if op.name == "notify" else ()

    sites = sum(bool(kinds(op)) for op in program.walk())
    for number in range(sites):
        for kind in ("dropped", "relaxed"):
            seen, label = -1, ""

            def change(op: Op, number: int = number, kind: str = kind) -> tuple[Op, ...]:
                nonlocal seen, label
                seen += bool(kinds(op))
                if seen != number or not kinds(op) or kind not in kinds(op):
                    return (op,)
                label = f"{kind} {op.name} @{op.symbol}"
                return () if kind == "dropped" else (op.with_attrs(order="relaxed"),)

            mutant = rewrite(program, change)
            if label:
                yield label, mutant


def right(found: Explored) -> bool:
    """Explored to the end without a bad state."""
    return found.complete and found.bad is None


def examine(job: tuple[Instance, int, bool]) -> Result:
    """Explore one instance; with controls where asked for."""
    instance, full, with_controls = job
    program, workers = instance.program(), instance.workers
    states = transitions = unreduced = tried = 0
    wrong: list[str] = []
    for one_queue in (False, True):
        found = explore(program, 2, workers, one_queue=one_queue)
        states, transitions = states + found.states, transitions + found.transitions
        if not right(found):
            wrong.append(f"{instance.name}: {found.bad or found.why}")
    if full:
        whole = explore(program, 2, workers, limit=full, reduce=False)
        if whole.complete:
            unreduced = whole.states
        if whole.bad is not None:
            wrong.append(f"{instance.name}, unreduced: {whole.bad}")
    for label, mutant in controls(program) if with_controls else ():
        tried += 1
        found = explore(mutant, 2, workers)
        if found.bad is None:
            wrong.append(f"{instance.name}: {label} was not found to be bad")
        if full:
            whole = explore(mutant, 2, workers, limit=full, reduce=False)
            if whole.complete and whole.bad is None:
                wrong.append(f"{instance.name}, unreduced: {label} was not found to be bad")
    return Result(instance, states, transitions, unreduced, tried, tuple(wrong))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mutants of an instance that both searches explored to the end, how many are bad, and differences."""

    instance: Instance
    mutants: int
    bad: int
    differ: tuple[str, ...]


def agree(job: tuple[Instance, int, int]) -> Agreement:
    """Explore every ``step``-th mutant with and without persistent sets."""
    instance, step, full = job
    explored = bad = 0
    differ: list[str] = []
    for number, mutant in enumerate(mutants(instance.program())):
        if number % step:
            continue
        for one_queue in (False, True):
            some, every = (
                explore(
                    mutant.program, 2, instance.workers, limit=full, reduce=r, one_queue=one_queue
                )
                for r in (True, False)
            )
            if not (some.complete and every.complete):
                continue
            explored, bad = explored + 1, bad + (every.bad is not None)
            if (some.bad is None) != (every.bad is None):
                differ.append(
                    f"{instance.name}, mutant {number}: {some.bad}, unreduced: {every.bad}"
                )
    return Agreement(instance, explored, bad, tuple(differ))


def small() -> list[Instance]:
    """Programs whose mutants are explored twice."""
    return [
        Instance(kernel, resource, 2, tiles, 3 if resource.startswith("sm:2") else 2)
        for kernel, resources in RESOURCES.items()
        for resource in resources
        for tiles in (1, 2)
        if resource != "none"
    ] + [
        Instance(kernel, resource, 2, tiles, copying + 2)
        for kernel, resources in BESIDE_ROLES.items()
        for copying, resource in enumerate(resources)
        for tiles in (1, 2)
    ]


def has_all_workers(instance: Instance) -> bool:
    """Controls are run where no two tasks need share a CTA."""
    tasks = instance.tiles * (1 if instance.kernel == "gemm_ar" else instance.world)
    return instance.workers == tasks and instance.resource != "none"


def main() -> None:
    """Explore everything; exit code 1 where a program is bad or a control is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", type=int, default=4000, help="states of a search without reduction"
    )
    parser.add_argument("--step", type=int, default=20, help="1 takes all mutants, 0 none")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    jobs = [(one, options.full, has_all_workers(one)) for one in instances()]
    results: list[Result] = []
    with multiprocessing.Pool(options.processes) as pool:
        # Long ones first: more CTAs, more states.
        for result in pool.imap_unordered(examine, sorted(jobs, key=lambda j: -j[0].workers)):
            results.append(result)
            progress(f"{result.instance.name}: {result.states} states, {result.controls} controls")
            for line in result.wrong:
                progress(f"WRONG {line}")
        agreements: list[Agreement] = []
        twice = [(one, options.step, options.full) for one in small() if options.step]
        for agreement in pool.imap_unordered(agree, twice):
            agreements.append(agreement)
            progress(f"{agreement.instance.name}: {agreement.mutants} mutants in both searches")
            for line in agreement.differ:
                progress(f"WRONG {line}")
    differ = sum(len(a.differ) for a in agreements)
    bad = sum(len(r.wrong) for r in results)
    finish(
        bad == 0 and differ == 0,
        programs=len(results),
        states=sum(r.states for r in results),
        transitions=sum(r.transitions for r in results),
        unreduced_programs=sum(r.unreduced > 0 for r in results),
        unreduced_states=sum(r.unreduced for r in results),
        controls=sum(r.controls for r in results),
        bad=bad,
        mutants=sum(a.mutants for a in agreements),
        mutants_bad=sum(a.bad for a in agreements),
        mutants_differ=differ,
        seconds=round(time.perf_counter() - start, 1),
    )


if __name__ == "__main__":
    main()
