"""Random programs against the reference: ``python -m tests.assurance.random_programs --count 1000``.

Hypothesis draws a kernel with its maps, shapes, tiles, order, resources, queue kinds, world and element
type. Each is compiled and proven, then run twice in a row on different data: in the simulator under a
seeded schedule, a share also in Triton's interpreter. Outputs of both calls must be those of the
reference, bit for bit where the data are whole numbers that every step keeps whole.

``--beside`` more are of kernels whose workers copy boxes beside products whose warps have roles, which need
whole tiles.

What the front end, a pass or the emitter refuses with an error of its own is counted apart, by stage and
code. Everything else is a mismatch: other numbers, any error of a run, and a proof that refuses what the
passes made. Each is printed as JSON, and ``--replay JSON`` runs that program again.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import tilelink
from tests.assurance.report import finish, progress
from tests.strategies import TORCH, Drawn, drawn_programs, move_of
from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.accuracy import TOLERANCE
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import run_calls
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.verify import verify
from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import Op, rewrite
from tilelink.kernel import Kernel, load_kernels

KERNELS = Path(__file__).parents[1] / "kernels"
CALLS = 2
# A wait of a slow machine is no hang: seconds that an interpreted run and a wait of it may take.
RUN_LIMIT, WAIT_LIMIT = 600.0, 150.0
# The same on every rank: what is added behind an all-reduce.
SHARED = ("bias", "residual", "R")

# What workers can copy beside products whose warps have roles: a gather, and a scatter with its sum.
BESIDE_ROLES = {
    "ag_gemm": "boxes",
    "ag_gemm_nk": "boxes",
    "ag_gemm_silu": "boxes",
    "ag_gemm_swiglu": "boxes",
    "ag_cyclic": "boxes",
    "ag_zigzag": "boxes",
    "gemm_rs": "boxes-folded",
    "gemm_rs_add": "boxes-folded",
    "gemm_rs_bias": "boxes-folded",
}


class Mismatch(AssertionError):
    """An executor's outputs are not those of the reference."""


@functools.cache
def kernels_of(file: str) -> dict[str, Kernel]:
    """The kernels of a file of tests/kernels."""
    return load_kernels(KERNELS / f"{file}.py")


def kernel_op(drawn: Drawn) -> Op:
    """The typed kernel of ``drawn``, under the mapping that was drawn."""
    family = drawn.family
    found: Kernel = (
        getattr(kernels, family.name)
        if family.file is None
        else kernels_of(family.file)[family.name]
    )
    if drawn.mapping:
        found = tilelink.kernel(drawn.mapping)(found.__wrapped__)
    present = [
        name
        for name in found.signature.names
        if name in found.signature.tensors and name not in family.optional
    ]
    op: Op = found.build(
        dict(drawn.extents),
        world=drawn.world,
        dtype=drawn.dtype,
        scalars=dict(drawn.constants),
        present=[*present, *drawn.present],
    )
    return op


def data(drawn: Drawn, program: Op) -> list[list[dict[str, torch.Tensor]]]:
    """Inputs of every call and rank; whole numbers -1..1 where the results are to be exact."""
    generator = torch.Generator().manual_seed(drawn.seed)
    geometry, calls = Geometry(program), []
    for _ in range(CALLS):
        ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(drawn.world)]
        for decl in geometry.decls.values():
            if decl.kind != "tensor" or decl.op["role"] not in ("in", "inout"):
                continue
            for one in ranks:
                if decl.name in SHARED and drawn.family.name.split("_")[1] == "ar" and ranks[0]:
                    shared = ranks[0].get(decl.name)
                    if shared is not None:
                        one[decl.name] = shared
                        continue
                if drawn.family.exact:
                    value = torch.randint(-1, 2, decl.shape, generator=generator).float()
                else:
                    value = torch.randn(decl.shape, generator=generator)
                one[decl.name] = value.to(TORCH[decl.dtype])
        calls.append(ranks)
    return calls


def with_dynamic_queues(program: Op, which: int) -> Op:
    """The same program with static queues dynamic, those of the stages whose bits are in ``which``.

    The proof holds for every assignment of tasks.
    """
    number = -1

    def change(op: Op) -> tuple[Op, ...]:
        nonlocal number
        if op.name != "stage" or op.get("workers") is not None:
            return (op,)
        number += 1
        return (op.with_attrs(queue="dynamic"),) if which >> number & 1 else (op,)

    return rewrite(program, change)


def copied_beside_roles(drawn: Drawn) -> Drawn:
    """A program like ``drawn`` in which workers copy boxes beside products whose warps have roles.

    Of whole tiles, one step deep, so that on up to three ranks what is whole stays whole.
    """
    (tensor, plain), *_ = drawn.schedule.moves
    world, extents, tile = 2 + drawn.world % 2, dict(drawn.extents), 64
    copying = 1 + drawn.workers % 3
    workers = copying + drawn.schedule.workers
    move = move_of(f"sm:{copying}-{BESIDE_ROLES[drawn.family.name]}", plain.channels)
    schedule = replace(
        drawn.schedule,
        tiles=(("K", tile), ("M", tile), ("N", tile * (1 + drawn.dynamic % 2))),
        workers=workers,
        warps=8,
        stages=3,
        emitter="gluon",
        moves=((tensor, move),),
    )
    sizes = {
        "K": tile,
        "M": tile * world * (1 + extents["M"] % 3),
        "N": tile * (1 + extents["N"] % 3),
    }
    return replace(
        drawn,
        mapping="",
        world=world,
        extents=tuple(sizes.items()),
        dtype="fp16" if drawn.dtype == "fp16" else "bf16",
        schedule=schedule,
        workers=workers,
    )


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over rows of ‖found − expected‖ / max(‖expected‖, √columns).

    Elements are sums of products of normal numbers, of the order of 1. One that cancels has the rounding
    error of its terms: in short rows that is large beside the element, and says nothing.
    """
    columns = expected.shape[-1]
    left, right = (t.double().reshape(-1, columns) for t in (found, expected))
    least = torch.full((len(right),), columns**0.5, dtype=torch.float64)
    error = ((left - right).norm(dim=1) / torch.maximum(right.norm(dim=1), least)).max()
    return float("inf") if error.isnan() else float(error)


def compare(drawn: Drawn, got: Any, wanted: Any, executor: str) -> None:
    """Mismatch where an output of any call and rank is not the reference's."""
    for call, (left, right) in enumerate(zip(got, wanted, strict=True)):
        for rank, (mine, other) in enumerate(zip(left, right, strict=True)):
            for name, expected in other.items():
                found = mine[name]
                same = found.shape == expected.shape and found.dtype == expected.dtype
                if same and drawn.family.exact:
                    same = torch.equal(found, expected)
                elif same:
                    same = deviation(found, expected) < TOLERANCE[drawn.dtype]
                if not same:
                    where = f"`{name}` of rank {rank} in call {call}"
                    raise Mismatch(f"{executor}: {where} is not the reference's")


def check(drawn: Drawn, interpreted: bool = False) -> str:
    """Run one random program; "" or the stage and code of the error that it is refused with.

    Raises Mismatch, and whatever the proof or a run raises.
    """
    stage = "front end"
    try:
        op = kernel_op(drawn)
        stage = "passes"
        program = run_passes(op, drawn.schedule)
    except InternalError:
        raise
    except TilelinkError as error:
        return f"{stage}: {error.code}"
    verify(program, op)
    inputs = data(drawn, program)
    wanted = [reference.run(op, call) for call in inputs]
    run = with_dynamic_queues(program, drawn.dynamic)
    compare(drawn, run_calls(run, inputs, drawn.seed, drawn.workers), wanted, "simulator")
    if interpreted:
        from tilelink.backend.runtime import interpret

        try:
            got = interpret.run_calls(program, inputs, timeout=RUN_LIMIT)
        except CannotEmit as error:
            return f"emitter: {error.code}"
        compare(drawn, got, wanted, "interpreter")
    return ""


@dataclass
class Tally:
    """Programs that ran, and those that were refused, by stage and code."""

    programs: int = 0
    interpreted: int = 0
    beside: int = 0
    maps: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)


def explore(
    count: int,
    number: int,
    interpreted: bool = False,
    report: Callable[[int], None] = lambda _: None,
    *,
    beside: bool = False,
) -> Tally:
    """``count`` distinct random programs from the seed ``number``; a failure is shrunk and ends it.

    ``beside``: all of workers that copy beside roles.
    """
    tally, seen = Tally(), set[str]()
    programs = drawn_programs(small=interpreted)
    if beside:
        programs = programs.filter(lambda one: one.family.name in BESIDE_ROLES)
        programs = programs.map(copied_beside_roles)
    failures: list[str] = []
    while tally.programs < count:
        before = len(seen)

        @seed(number)
        @settings(
            max_examples=max(20, count - tally.programs),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(drawn=programs)
        def one(drawn: Drawn) -> None:
            if repr(drawn) in seen or tally.programs >= count:
                return
            try:
                refusal = check(drawn, interpreted)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}\n--replay '{drawn.to_json()}'")
                raise
            seen.add(repr(drawn))
            if refusal:
                tally.refused[refusal] = tally.refused.get(refusal, 0) + 1
                return
            tally.programs += 1
            tally.interpreted += interpreted
            tally.beside += beside
            tally.maps += bool(drawn.mapping)
            if tally.programs % 50 == 0:
                report(tally.programs)

        try:
            one()
        except Exception as error:
            # As drawn, and shrunk; one that does not come again is a failure too.
            tally.mismatches += list(
                dict.fromkeys((failures or [repr(error)])[:: max(1, len(failures) - 1)])
            )
            return tally
        number += 1_000_003
        if len(seen) == before:
            raise RuntimeError("no more distinct programs")
    return tally


def _job(job: tuple[int, int, bool, bool]) -> Tally:
    torch.set_num_threads(1)
    start = time.perf_counter()

    def report(done: int) -> None:
        progress(f"seed {job[1]}: {done} of {job[0]}, {time.perf_counter() - start:.0f} s")

    count, number, interpreted, beside = job
    return explore(count, number, interpreted, report, beside=beside)


def replay(text: str, interpreted: bool) -> None:
    """Run one program again; exit code 1 where it mismatches."""
    mismatch = refusal = ""
    try:
        refusal = check(Drawn.from_json(text), interpreted)
    except Exception as error:
        mismatch = f"{type(error).__name__}: {error}"
    finish(not mismatch, mismatch=mismatch, refused=refusal)


def main() -> None:
    """Run them all; exit code 1 where an executor and the reference disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="programs in the simulator alone")
    parser.add_argument("--interpreted", type=int, default=40, help="and in the interpreter too")
    parser.add_argument("--beside", type=int, default=60, help="and of workers beside roles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--replay", metavar="JSON", help="run this program only")
    options = parser.parse_args()
    os.environ.setdefault("TILELINK_TIMEOUT", str(WAIT_LIMIT))
    if options.replay:
        replay(options.replay, options.interpreted > 0)
        return
    start = time.perf_counter()
    share = -(-options.count // (2 * options.processes))
    parts = [(share, options.seed + n, False, False) for n in range(2 * options.processes)]
    parts += [(options.beside, options.seed + 104_729, False, True)] * bool(options.beside)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        tallies = pool.map(_job, parts, chunksize=1)
    if options.interpreted:
        tallies.append(_job((options.interpreted, options.seed + 7919, True, False)))
    refused: dict[str, int] = {}
    for tally in tallies:
        for code, number in sorted(tally.refused.items()):
            refused[code] = refused.get(code, 0) + number
        for text in tally.mismatches:
            progress(f"MISMATCH {text}")
    programs = sum(t.programs for t in tallies)
    mismatches = sum(len(t.mismatches) for t in tallies)
    finish(
        mismatches == 0 and programs >= options.count,
        programs=programs,
        simulated=programs,
        interpreted=sum(t.interpreted for t in tallies),
        beside_roles=sum(t.beside for t in tallies),
        drawn_maps=sum(t.maps for t in tallies),
        mismatches=mismatches,
        refused=sum(refused.values()),
        codes=dict(sorted(refused.items())),
        seconds=round(time.perf_counter() - start, 1),
    )


if __name__ == "__main__":
    main()
