"""``tilelink tune --check``: every entry of every table, without a GPU.

An entry passes if its kernel exists under the table's key, its target is known, its schedule is legal, the
fused program passes the proof and compiles without spills, and the model does not predict it slower than
the default schedule by more than ``MARGIN``. Each way to fail is an error of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, ClassVar

from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.space import legal, product_of
from tilelink.schedules.tables import Entry, Table, kernel_key
from tilelink.tuning.predict import predicted_us
from tilelink.tuning.problem import Problem, problem_of

# How much slower than the default a measured choice may be predicted: single predictions err by a tenth
# either way (`tilelink tune --score`), and a measurement outweighs the model within that.
MARGIN = 0.2


class BadEntry(TilelinkError):
    """Base of what is wrong with an entry of a table."""

    code: ClassVar[str] = "table-entry"


class UnknownKernelKey(BadEntry):
    """A table for a kernel that does not exist, or that computes or moves something else by now."""

    code = "table-kernel"
    message = "{place}: {detail}"
    hint = "`tilelink tune` with the kernel as it is, or delete the table"


class WrongTarget(BadEntry):
    """A table for a device or a number of ranks that no machine model describes."""

    code = "table-target"
    message = "{place}: there is no machine of {world} x {device}"
    hint = "`tilelink tune --calibrate` on such a machine describes it; known: {known}"


class IllegalEntry(BadEntry):
    """A schedule that does not fit the GPU: shared memory, registers, or idle warps."""

    code = "table-illegal"
    message = "{place}: the schedule does not fit {detail}"
    hint = "smaller tiles, fewer stages or more warps"


class RefusedEntry(BadEntry):
    """A schedule that cannot be fused, or whose program the proof refuses."""

    code = "table-refused"
    message = "{place}: {detail}"
    hint = "`tilelink check` with the entry's schedule shows it in full"


class BadCode(BadEntry):
    """A schedule whose kernel does not compile, spills, or fails the lint."""

    code = "table-code"
    message = "{place}: {detail}"
    hint = "tune it again without this schedule"


class PredictedSlower(BadEntry):
    """A schedule that the model predicts slower than the default by more than the margin."""

    code = "table-slower"
    message = "{place}: predicted {us:.1f} us, the default schedule {default_us:.1f}"
    hint = "measure it again: an entry may be {margin:.0%} slower at most"


_KINDS = (IllegalEntry, RefusedEntry, BadCode, PredictedSlower)


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    problem: Problem
    entry: Entry
    machine: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What checking an entry found: fields of an error of class ``kind``, or the code to compile."""

    kind: str | None
    fields: dict[str, Any]
    code_key: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All errors in order, and what was looked at."""

    errors: tuple[TilelinkError, ...]
    tables: int
    entries: int
    compiled: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.entries} entries of {self.tables} tables: {len(self.errors)} wrong; "
            f"{self.compiled} different kernels compiled, {self.seconds:.0f} s"
        )


def check_tables(
    tables: Sequence[Table],
    progress: Callable[[str], None] = lambda _: None,
    compile_code: bool = True,
) -> Report:
    """Checks every entry, entries in parallel on all cores."""
    start = time.monotonic()
    errors: list[TilelinkError] = []
    places: list[_Place] = []
    for table in tables:
        found = _of_table(table)
        if found is not None:
            errors.append(found)
            continue
        for number, entry in enumerate(table.entries):
            machine = Machine.of_device(table.device, table.world)
            assert machine is not None
            problem = problem_of(table, entry.extents)
            places.append(_Place(f"{table.name}, entry {number}", problem, entry, machine.name))
    # Not forked: threads of torch do not survive that.
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        outcomes = list(
            pool.map(
                check_entry,
                [p.problem.to_json() for p in places],
                [p.entry.schedule.to_json() for p in places],
                [p.machine for p in places],
            )
        )
        firsts: dict[str, int] = {}
        for index, outcome in enumerate(outcomes):
            if outcome.kind is None:
                firsts.setdefault(outcome.code_key, index)
        progress(f"{len(places)} entries proven and predicted, {len(firsts)} kernels to compile")
        chosen = [places[i] for i in firsts.values()] if compile_code else []
        faults = pool.map(
            compile_entry,
            [p.problem.to_json() for p in chosen],
            [p.entry.schedule.to_json() for p in chosen],
        )
        codes = dict(zip(firsts, faults, strict=False))
    for place, outcome in zip(places, outcomes, strict=True):
        fault = codes.get(outcome.code_key)
        if outcome.kind is not None:
            kind = next(k for k in _KINDS if k.__name__ == outcome.kind)
            errors.append(kind(place=place.name, **outcome.fields))
        elif fault:
            errors.append(BadCode(place=place.name, detail=fault))
    seconds = time.monotonic() - start
    return Report(tuple(errors), len(tables), len(places), len(codes), seconds)


def _of_table(table: Table) -> TilelinkError | None:
    """What is wrong with a table as a whole."""
    if not table.entries:
        return UnknownKernelKey(place=table.name, detail="it has no entries")
    if Machine.of_device(table.device, table.world) is None:
        known = ", ".join(f"{m.device} x {m.world}" for m in map(Machine.load, Machine.known()))
        return WrongTarget(
            place=table.name, device=table.device, world=table.world, known=known or "none"
        )
    try:
        # The key is the same for all extents.
        example = problem_of(table, {}).decorated().example
        op = problem_of(table, example or table.entries[0].extents).build()
    except KeyError:
        return UnknownKernelKey(
            place=table.name, detail=f"there is no kernel `{table.kernel}` in tilelink.kernels"
        )
    except TilelinkError as error:
        return UnknownKernelKey(place=table.name, detail=_line(error))
    if kernel_key(op) != table.key:
        return UnknownKernelKey(
            place=table.name,
            detail=f"`{table.kernel}` has the key {kernel_key(op)}, the table is of {table.key}",
        )
    return None


def check_entry(problem: str, schedule: str, machine: str) -> Outcome:
    """Everything about one entry but the compilation; arguments are JSON, and a machine's name."""
    from tilelink.backend.pipeline import run_passes
    from tilelink.backend.verify import verify

    try:
        op, chosen = Problem.from_json(problem).build(), Schedule.from_json(schedule)
        if not legal(product_of(op), chosen):
            return Outcome("IllegalEntry", {"detail": f"the GPU: {_shape(chosen)}"})
        program = run_passes(op, chosen)
        verify(program, op)
    except TilelinkError as error:
        return Outcome("RefusedEntry", {"detail": _line(error)})
    model = Machine.load(machine)
    us, default_us = (predicted_us(op, s, model) for s in (chosen, default_schedule(op)))
    if us > (1.0 + MARGIN) * default_us:
        fields: dict[str, Any] = {"us": us, "default_us": default_us, "margin": MARGIN}
        return Outcome("PredictedSlower", fields)
    return Outcome(None, {}, code_key(program, chosen))


def code_key(program: Op, schedule: Schedule) -> str:
    """What makes the code of two programs differ beyond the numbers of their shapes.

    Programs of one key differ in constants alone, which change no register count: one stands for all.
    """
    from tilelink.backend.emit.triton import emit

    source = emit(program)
    # Behind the program's text, which a line of three quotes ends.
    _, _, code = source.partition('\n"""\n')
    skeleton = re.sub(r"\d+", "#", code)
    dtypes = sorted({str(op["dtype"]) for op in program.find("tensor")})
    parts = (skeleton, schedule.tiles, schedule.warps, schedule.stages, schedule.emitter, dtypes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_entry(problem: str, schedule: str) -> str:
    """What is wrong with the compiled code of an entry; empty if nothing is."""
    from tilelink.backend.emit.offline import compile_offline, lint
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import run_passes

    try:
        program = run_passes(Problem.from_json(problem).build(), Schedule.from_json(schedule))
        compiled = compile_offline(emit(program), program)
    except TilelinkError as error:
        return _line(error)
    found = [f"`{kernel.name}`: {text}" for kernel in compiled for text in lint(kernel)]
    return "; ".join(found)


def _shape(schedule: Schedule) -> str:
    tiles = " ".join(f"{name}={size}" for name, size in schedule.tiles)
    return f"tiles {tiles}, {schedule.stages} stages, {schedule.warps} warps"


def _line(error: TilelinkError) -> str:
    """The message of an error without its code."""
    first = str(error).splitlines()[0]
    return first.partition("]: ")[2] or first
