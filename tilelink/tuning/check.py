"""``tilelink tune --check``: every entry of every table, without a GPU.

An entry passes if its kernel exists under the table's key, its target is known, its schedule is legal, the
fused program passes the proof and compiles without spills, and the model does not predict it slower than
the default schedule by more than ``MARGIN``. Each way to fail is an error of its own. Kernels that
compiled before, from the very same text, are taken from a record: see :mod:`tilelink.tuning.compiled`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, ClassVar

from tilelink.errors import TilelinkError
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.space import legal, product_of
from tilelink.schedules.tables import Entry, Table, kernel_key
from tilelink.tuning.compiled import Code, Record, Use, codes_of
from tilelink.tuning.predict import predicted_us
from tilelink.tuning.problem import Problem, problem_of

if TYPE_CHECKING:
    from tilelink.backend.emit.offline import Compiled

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


class Unlike(BadEntry):
    """A kernel that the record of compiled ones says something else of than the compiler."""

    code = "table-record"
    message = "{place}: `{kernel}` is recorded with {recorded}, and compiled with {used}"
    hint = "`tilelink tune --check --record` compiles all kernels and writes the record anew"


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
    """What checking an entry found: fields of an error of class ``kind``, or the kernels to compile."""

    kind: str | None
    fields: dict[str, Any]
    codes: tuple[Code, ...] = ()

    def error(self, place: str) -> TilelinkError | None:
        """What was found at ``place``, None if the entry passed so far."""
        if self.kind is None:
            return None
        kind = next(k for k in _KINDS if k.__name__ == self.kind)
        return kind(place=place, **self.fields)


@dataclass(frozen=True, slots=True)
class Built:
    """What is wrong with a kernel above its machine code, if anything is, and the kernel to disassemble."""

    fault: str
    kernel: Compiled | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All errors in order, and what was looked at. ``record``: of all kernels without a fault."""

    errors: tuple[TilelinkError, ...]
    tables: int
    entries: int
    compiled: int
    recorded: int
    seconds: float
    record: Record

    def __str__(self) -> str:
        return (
            f"{self.entries} entries of {self.tables} tables: {len(self.errors)} wrong; "
            f"{self.compiled + self.recorded} different kernels, {self.compiled} compiled and "
            f"{self.recorded} as recorded, {self.seconds:.0f} s"
        )


def check_tables(
    tables: Sequence[Table],
    progress: Callable[[str], None] = lambda _: None,
    record: Record | None = None,
    day: date | None = None,
) -> Report:
    """Checks every entry, entries in parallel on all cores.

    Kernels in ``record`` are compiled on their ``day`` alone (default: today); with none, all are.
    """
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
    known, day = record or Record({}), day or date.today()
    # Not forked: threads of torch do not survive that.
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, context, initializer=_prepare) as pool:
        outcomes = list(
            pool.map(
                check_entry,
                [p.problem.to_json() for p in places],
                [p.entry.schedule.to_json() for p in places],
                [p.machine for p in places],
            )
        )
        firsts: dict[str, tuple[_Place, Code]] = {}
        for place, outcome in zip(places, outcomes, strict=True):
            for code in outcome.codes:
                firsts.setdefault(code.skeleton, (place, code))
        due = [one for one in firsts.values() if not known.trusted(one[1].digest, day)]
        # The longest first, so that no process is left with one when the others are done.
        due.sort(key=lambda one: -one[1].length)
        new = sum(code.digest not in known.kernels for _, code in due)
        progress(
            f"{len(places)} entries proven and predicted, {len(due)} of {len(firsts)} kernels to "
            f"compile, {new} of them not in the record"
        )
        built = pool.map(
            compile_entry,
            [place.problem.to_json() for place, _ in due],
            [place.entry.schedule.to_json() for place, _ in due],
            [code.name for _, code in due],
        )
        faults, uses = _code_faults(list(built), pool)
    wrong: dict[str, str] = {}
    kept = {
        c.digest: known.kernels[c.digest] for _, c in firsts.values() if c.digest in known.kernels
    }
    for (place, code), fault, use in zip(due, faults, uses, strict=True):
        recorded = known.kernels.get(code.digest, use)
        if fault:
            wrong[code.skeleton] = fault
            kept.pop(code.digest, None)
        elif use is not None:
            kept[code.digest] = use
            if recorded != use:
                unlike = Unlike(place=place.name, kernel=code.name, recorded=recorded, used=use)
                errors.append(unlike)
    for place, outcome in zip(places, outcomes, strict=True):
        error = outcome.error(place.name)
        fault = "; ".join(wrong[c.skeleton] for c in outcome.codes if c.skeleton in wrong)
        if error is not None:
            errors.append(error)
        elif fault:
            errors.append(BadCode(place=place.name, detail=fault))
    return Report(
        tuple(errors),
        len(tables),
        len(places),
        len(due),
        len(firsts) - len(due),
        time.monotonic() - start,
        Record(kept),
    )


def _prepare() -> None:
    """What a process of the check does first: what it has imported is no garbage to look for."""
    gc.freeze()


def _code_faults(built: Sequence[Built], pool: Executor) -> tuple[list[str], list[Use | None]]:
    """What is wrong with the code of each, empty if nothing is, and what each uses.

    One disassembly a process serves all.
    """
    share = -(-len(built) // (os.cpu_count() or 1))
    parts = [built[at : at + share] for at in range(0, len(built), share or 1)]
    read = [fault for part in pool.map(read_code, parts) for fault in part]
    faults = [
        "; ".join(filter(None, pair)) for pair in zip((b.fault for b in built), read, strict=True)
    ]
    return faults, [None if b.kernel is None else Use.of(b.kernel) for b in built]


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
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import run_passes
    from tilelink.backend.verify import verify

    try:
        op, chosen = Problem.from_json(problem).build(), Schedule.from_json(schedule)
        if not legal(product_of(op), chosen):
            return Outcome("IllegalEntry", {"detail": f"the GPU: {_shape(chosen)}"})
        program = run_passes(op, chosen)
        verify(program, op)
        emit(program)
    except TilelinkError as error:
        return Outcome("RefusedEntry", {"detail": _line(error)})
    model = Machine.load(machine)
    us, default_us = (predicted_us(op, s, model) for s in (chosen, default_schedule(op)))
    if us > (1.0 + MARGIN) * default_us:
        fields: dict[str, Any] = {"us": us, "default_us": default_us, "margin": MARGIN}
        return Outcome("PredictedSlower", fields)
    return Outcome(None, {}, codes_of(program, chosen))


def compile_entry(problem: str, schedule: str, kernel: str) -> Built:
    """A kernel of an entry, compiled, and what is wrong with its forms before machine code."""
    from tilelink.backend.emit.offline import compile_offline, lint_text
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import run_passes

    try:
        program = run_passes(Problem.from_json(problem).build(), Schedule.from_json(schedule))
        (compiled,) = compile_offline(emit(program), program, sass=False, only=kernel)
    except TilelinkError as error:
        return Built(_line(error))
    found = "; ".join(f"`{kernel}`: {text}" for text in lint_text(compiled))
    return Built(found, replace(compiled, stages={}))


def read_code(built: Sequence[Built]) -> list[str]:
    """What is wrong with the machine code of each kernel; empty if nothing is, or it has none."""
    from tilelink.backend.emit.machine_code import disassemble
    from tilelink.backend.emit.offline import lint_code

    texts = iter(disassemble([b.kernel.cubin for b in built if b.kernel is not None]))
    return [
        ""
        if (k := one.kernel) is None
        else "; ".join(f"`{k.name}`: {text}" for text in lint_code(k, next(texts)))
        for one in built
    ]


def fault_of(problem: Problem, schedule: Schedule, machine: str) -> str:
    """Why no entry may have this schedule; empty if one may."""
    outcome = check_entry(problem.to_json(), schedule.to_json(), machine)
    error = outcome.error(problem.cell)
    if error is not None:
        return _line(error)
    built = [compile_entry(problem.to_json(), schedule.to_json(), c.name) for c in outcome.codes]
    found = "; ".join(filter(None, (*(b.fault for b in built), *read_code(built))))
    return f"{problem.cell}: {found}" if found else ""


def _shape(schedule: Schedule) -> str:
    tiles = " ".join(f"{name}={size}" for name, size in schedule.tiles)
    return f"tiles {tiles}, {schedule.stages} stages, {schedule.warps} warps"


def _line(error: TilelinkError) -> str:
    """The message of an error without its code."""
    first = str(error).splitlines()[0]
    return first.partition("]: ")[2] or first
