"""Emitted modules against mutants of their text: ``python -m tests.assurance.emitted``.

For each kernel, resource, shape and schedule the intact module must be accepted, and every mutant of its
text refused. A mutant in which every worker makes the same accesses and signals in the same order as in
the intact text (at this shape, on all ranks) is no mutant: it is left out, and counted as ``same``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from tests.emitted_mutants import Mutant, mutants
from tests.strategies import (
    FOLDED,
    FOLDED_TWO,
    OWN_TWO,
    PULLED,
    PULLED_TWO,
    SPANNING,
    move_of,
    order_of,
)
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.validate import read_module
from tilelink.backend.validate.prove import Validator, Wanted
from tilelink.backend.validate.trace import Signal, Touch
from tilelink.errors import Source, TilelinkError
from tilelink.ir import Op
from tilelink.schedules import default_schedule

RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:2", "none"),
    "ag_gemm_swiglu": ("copy_engine", "sm:2", "none"),
    "gemm_rs": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED, *PULLED, *SPANNING),
    "gemm_rs_add": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED, *PULLED, *SPANNING),
    "gemm_ar": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED_TWO, *PULLED_TWO),
    "gemm_ar_add": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED_TWO, *PULLED_TWO),
}
MUTATED = ("ag_gemm", "gemm_rs", "gemm_ar")
# What the library's products can be beside.
BESIDE = ("copy_engine", "none")
EVEN = {"M": 512, "N": 256, "K": 128}
# Several tasks a worker, so that what one task leaves to the next counts.
TILES = (("K", 64), ("M", 64), ("N", 128))
# Slices of fewer rows than a tile.
LOW = {"M": 128, "N": 256, "K": 128}
ODD = {"M": 360, "N": 136, "K": 72}
WIDE = {"M": 1024, "N": 1024, "K": 256}
# What products with roles can be beside, and the tiles of both structures.
BY_ROLES = tuple(
    r for r in (*FOLDED, *FOLDED_TWO) if not r.startswith("sm:") and not r.endswith("between")
)
ROLES = ("copy_engine", "epilogue", "none", *BY_ROLES, *PULLED, *SPANNING)
# What workers of their own copy beside these, from a queue: only beside groups that take turns.
COPYING = {
    "ag_gemm": ("sm:2-boxes",),
    "ag_gemm_swiglu": ("sm:2-boxes",),
    "gemm_rs": ("sm:2-boxes-folded",),
    "gemm_rs_add": ("sm:2-boxes-folded",),
}
ROLE_TILES = {
    "turns": (("K", 64), ("M", 64), ("N", 128)),
    "halves": (("K", 64), ("M", 128), ("N", 256)),
}


@dataclass(frozen=True)
class Case:
    """One module: a kernel, its resource, shape, ranks and schedule."""

    kernel: str
    resource: str
    shape: tuple[tuple[str, int], ...]
    world: int = 4
    workers: int | None = None
    tiles: tuple[tuple[str, int], ...] = ()
    flags: tuple[tuple[str, object], ...] = ()
    extra: tuple[str, ...] = ()
    emitter: str = "triton"

    def program(self) -> Op:
        """The fused program."""
        kernel = getattr(kernels, self.kernel)
        present = None
        if self.extra:
            present = [n for n in kernel.signature.tensors if n in ("A", "B", *self.extra)]
        op = kernel.build(dict(self.shape), {}, self.world, present, dict(self.flags))
        schedule = default_schedule(op)
        move = move_of(self.resource)
        moves = tuple((name, move) for name, _ in schedule.moves)
        order = order_of(move, schedule.order)
        schedule = replace(schedule, moves=moves, emitter=self.emitter, order=order)
        schedule = schedule.with_tiles(**dict(self.tiles))
        if self.emitter == "gluon":
            schedule = replace(schedule, warps=8, stages=3)
        if self.workers:
            schedule = replace(schedule, workers=self.workers)
        return compile_kernel(op, schedule)

    def __str__(self) -> str:
        shape = "x".join(str(v) for _, v in self.shape)
        more = [f"world {self.world}", *(f"{n}={v}" for n, v in (*self.tiles, *self.flags))]
        if self.emitter != "triton":
            more.append(self.emitter)
        return f"{self.kernel} {self.resource} {shape} {' '.join([*more, *self.extra])}"


def case(kernel: str, resource: str, shape: dict[str, int], **more: object) -> Case:
    """A case by keywords."""
    return Case(kernel, resource, tuple(shape.items()), **more)  # type: ignore[arg-type]


def intact() -> Iterator[Case]:
    """All kernels and resources, several shapes, schedules, worlds and forms of the kernels."""
    for kernel, resources in RESOURCES.items():
        for resource in resources:
            for shape in (EVEN, ODD, WIDE, *([LOW] if resource in SPANNING else [])):
                yield case(kernel, resource, shape)
            yield case(kernel, resource, EVEN, world=2, workers=3)
            if resource in OWN_TWO:
                yield case(kernel, resource, WIDE, workers=5)
            small = (("M", 32), ("N", 32), ("K", 32))
            yield case(kernel, resource, ODD, world=8 if kernel != "ag_gemm" else 4, tiles=small)
            if kernel in ("gemm_rs_add", "gemm_ar_add"):
                yield case(kernel, resource, ODD, extra=("bias", "residual"))
            yield case(kernel, resource, EVEN, flags=(("nk", True),))
            if resource in BESIDE and kernel != "ag_gemm_swiglu":
                for shape in (EVEN, ODD):
                    yield case(kernel, resource, shape, emitter="library")
                yield case(kernel, resource, EVEN, emitter="library", flags=(("nk", True),))
            if resource in ROLES:
                yield from roles(kernel, resource)
        yield from copying(kernel)


def roles(kernel: str, resource: str, workers: int | None = 3) -> Iterator[Case]:
    """The cases of a kernel whose launches that multiply have roles."""
    for name, tiles in ROLE_TILES.items():
        if name == "halves" and kernel == "ag_gemm_swiglu":
            # Two sums take twice the registers.
            tiles = (("K", 64), ("M", 128), ("N", 128))
        # Halves of a tile need all of its rows.
        odd = ODD if name == "turns" else {**ODD, "M": EVEN["M"]}
        # Ranks share out the sum of a reduce along an axis whose parts may be none that TMA can load.
        for shape in (EVEN, odd) if resource not in FOLDED_TWO else (EVEN,):
            yield case(kernel, resource, shape, emitter="gluon", tiles=tiles, workers=workers)


def copying(kernel: str, workers: int = 5) -> Iterator[Case]:
    """The cases of a kernel in which workers copy beside products whose warps have roles."""
    for resource in COPYING.get(kernel, ()):
        for shape, world in ((EVEN, 4), (WIDE, 4), (EVEN, 2)):
            turns = ROLE_TILES["turns"]
            yield case(
                kernel, resource, shape, world=world, emitter="gluon", tiles=turns, workers=workers
            )


def fingerprint(validator: Validator) -> str:
    """All events of all workers in their order, without the lines that they stand on.

    Writes between two signals of a worker are in no order: a text is only accepted where all writes
    of a task to one tensor are of different places. A notify that is held back may stand behind any of the reads
    that follow its task.
    """
    found = hashlib.sha256()
    for trace in validator.traces:
        both: list[Touch | Signal] = [*trace.touches, *trace.signals]
        events = sorted(both, key=lambda e: e.seq)
        writes: list[bytes] = []
        reads: list[bytes] = []
        for event in events:
            one = _digest(event)
            if isinstance(event, Touch) and not event.write:
                reads.append(one)
                continue
            if reads and not (isinstance(event, Signal) and event.delayed):
                for part in (*sorted(writes), *reads):
                    found.update(part)
                writes.clear()
                reads.clear()
            if isinstance(event, Touch) and event.write:
                writes.append(one)
                continue
            for write in sorted(writes):
                found.update(write)
            writes.clear()
            found.update(one)
        for part in (*sorted(writes), *reads):
            found.update(part)
    return found.hexdigest()


def _digest(event: Touch | Signal) -> bytes:
    found = hashlib.sha256()
    for field in fields(event):
        name, value = field.name, getattr(event, field.name)
        if name in ("site", "seq", "pair"):
            continue
        if name == "flows":
            for key, flow in value.items():
                found.update(f"{key[2]} {flow.axes}".encode())
                for part in (flow.have, flow.home, flow.lo, flow.hi):
                    found.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(f"{name}={value};".encode())
    return found.digest()


def attempt(text: str, program: Op | Wanted) -> tuple[str, str]:
    """The fingerprint of a text that is accepted, and why it is refused otherwise."""
    try:
        wanted = Wanted(program) if isinstance(program, Op) else program
        validator = Validator(read_module(Source("emitted.py", text)), wanted)
        validator.run()
    except TilelinkError as error:
        return "", f"{error.code}: {str(error).splitlines()[0]}"
    return fingerprint(validator), ""


def chosen(text: str, count: int, seed: int) -> list[Mutant]:
    """``count`` mutants of a text, of all kinds in turn."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in mutants(text):
        kinds.setdefault(mutant.kind, []).append(mutant)
    generator = random.Random(seed)
    for some in kinds.values():
        generator.shuffle(some)
    found: list[Mutant] = []
    while len(found) < count and any(kinds.values()):
        for some in kinds.values():
            if some and len(found) < count:
                found.append(some.pop())
    return found


@dataclass
class Result:
    """The counts of a run."""

    mutants: int = 0
    refused: int = 0
    same: int = 0
    intact: int = 0
    intact_refused: int = 0


def attack(one: Case, count: int, seed: int, result: Result, kinds: Counter[str]) -> None:
    """Tries one module's mutants."""
    program = one.program()
    text, wanted = emit(program), Wanted(program)
    original, reason = attempt(text, wanted)
    result.intact += 1
    if reason:
        result.intact_refused += 1
        say(f"REFUSED {one}: {reason}")
        return
    for mutant in chosen(text, count, seed):
        print_, reason = attempt(mutant.text, wanted)
        if not reason and print_ == original:
            result.same += 1
            continue
        result.mutants += 1
        result.refused += bool(reason)
        kinds[f"{mutant.kind}: {reason.split(':')[0] or 'ACCEPTED'}"] += 1
        if not reason:
            say(f"ACCEPTED {one} line {mutant.line} {mutant.kind}: {mutant.what}")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def run(count: int, seed: int, *, all_intact: bool = True) -> Result:
    """Checks intact texts and ``count`` mutants of each kernel in each resource."""
    result = Result()
    for one in intact() if all_intact else ():
        program = one.program()
        _, reason = attempt(emit(program), program)
        result.intact += 1
        result.intact_refused += bool(reason)
        if reason:
            say(f"REFUSED {one}: {reason}")
    kinds: Counter[str] = Counter()
    for kernel in MUTATED:
        for resource in RESOURCES[kernel]:
            before = replace(result)
            even = LOW if resource in SPANNING else EVEN
            shapes = (even, ODD) if count >= 2 else (even,)
            for number, shape in enumerate(shapes):
                part = count // len(shapes)
                one = case(kernel, resource, shape, workers=5, tiles=TILES)
                attack(one, part, seed + number, result, kinds)
                if resource in BESIDE:
                    attack(replace(one, emitter="library"), part, seed + number, result, kinds)
            if resource in ROLES:
                for number, one in enumerate(roles(kernel, resource, workers=5)):
                    attack(one, count // 4, seed + number, result, kinds)
            told(f"{kernel} {resource}", before, result)
        before = replace(result)
        for number, one in enumerate(copying(kernel)):
            attack(one, count // 2, seed + number, result, kinds)
        if kernel in COPYING:
            told(f"{kernel}, copied beside products", before, result)
    for kind, number in sorted(kinds.items()):
        say(f"  {number:5}  {kind}")
    return result


def told(what: str, before: Result, now: Result) -> None:
    """What came of the mutants between two counts."""
    made, caught = now.mutants - before.mutants, now.refused - before.refused
    say(f"{what}: {caught} of {made} refused, {now.same - before.same} same")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="mutants a kernel and resource")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    result = run(args.count, args.seed)
    print(
        json.dumps(
            {
                "mutants": result.mutants,
                "refused": result.refused,
                "same": result.same,
                "intact": result.intact,
                "intact_refused": result.intact_refused,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )
    good = result.refused == result.mutants >= 100 and not result.intact_refused and result.intact
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
