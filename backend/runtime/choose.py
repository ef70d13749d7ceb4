"""The schedule of a call that names none: tuned for its shape or one near it, predicted, or the default.

Every rank chooses alone, so the choice depends on the kernel, the number of ranks and the name of the GPU,
never on a clock; ranks that read different tables disagree on the schedule, which is an error of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tilelink import knobs
from tilelink.backend.expand import environment, evaluate
from tilelink.backend.passes.common import tasks_of_stage
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.faults import fault, is_fault, reason
from tilelink.backend.simulate import predict
from tilelink.ir import Op
from tilelink.ir.instance import at_extents
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.roles import SHARED_BYTES, SHARED_RESERVE
from tilelink.schedules.search import prune
from tilelink.schedules.space import TAILS, Product, Space
from tilelink.schedules.tables import Found, lookup, world_of

# Tasks that the virtual clock may step through for one choice: some seconds, where that many are worth it.
TASKS = 60_000
# Schedules that are predicted for one: of fewer some forms are not among them.
LEAST, MOST = 4, 24
# Of a schedule with so many tasks, and as many times those of the default one, each is too small to win, and the
# clock takes long: copies by boxes of a slice whose rows no box divides, for one.
MANY, MORE = 2_000, 16
# Tasks up to which a schedule that was tuned for another shape is predicted again: a second each.
REFITTED = 12_000
SUM_BYTES = 8192  # of an all-reduce, the part that weighs as much as a task
# Of the rows that a program serves, from the least (0) to the capacity (1) in octaves, those at which it is
# predicted; and the tasks up to which it is at more than one.
PARTS, MOST_OF_ROWS = (0.0, 0.5, 1.0), 2_000
# The model's median error: a predicted gain below it is none.
GAIN = 0.05
# What a measurement at the capacity outweighs: of rows that vary, the model is off by this much at times.
OUTWEIGHED = 0.2


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule, None for the default one, and where it is from, in words."""

    schedule: Schedule | None
    origin: str


_Compiles: TypeAlias = Callable[[Choice], bool]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A fused program, proven, what is emitted of it, and where its schedule is from, in words.

    ``refused``: what came before it and cannot be compiled, each with where it is from and the reason.
    """

    program: Op
    source: str
    origin: str
    refused: tuple[tuple[str, str], ...] = ()


def choices(kernel: Op, device: str, compiles: _Compiles = lambda _: True) -> Iterator[Choice]:
    """Schedules of ``kernel`` on GPUs that CUDA calls ``device``, the one to try first first.

    What is tuned counts where it ``compiles``: of another shape, or of an earlier version, it need not.
    """
    if knobs.TUNED.get():
        found = lookup(kernel, device)
        tuned = [] if found is None else [Choice(found.schedule, found.origin)]
        if found is not None and found.distance > 0:
            refitted = _refitted(kernel, found.schedule, device)
            if refitted != found.schedule:
                tuned.insert(0, Choice(refitted, f"{found.origin}, tail {refitted.tail}"))
        if any(op.get("dynamic") for op in kernel.find("extent")):
            yield from _of_all_rows(kernel, device, found, tuned, compiles)
        else:
            yield from _of_shape(kernel, device, found, tuned, compiles)
    yield Choice(None, "default")


def _of_shape(
    kernel: Op, device: str, found: Found | None, tuned: Sequence[Choice], compiles: _Compiles
) -> Iterator[Choice]:
    """What is ``tuned`` for this shape or one near it, and what is predicted."""
    near = next((choice for choice in tuned if compiles(choice)), None)
    if found is not None and near is not None and found.distance == 0:
        yield near
    # What was measured at another shape is a guess here: the model may know better.
    yield from predicted_choices(kernel, device, None if near is None else near.schedule)
    if near is not None:
        yield near


def _of_all_rows(
    kernel: Op, device: str, found: Found | None, tuned: Sequence[Choice], compiles: _Compiles
) -> Iterator[Choice]:
    """The same of dynamic rows, by what is expected of all numbers of them that the program serves.

    What was measured at the capacity has that time there, less what a measurement outweighs, and elsewhere as
    many times less as the model says. What had parts of sums counts where it is expected to beat the default.
    """
    machine = Machine.of_device(device, world_of(kernel))
    some = [*tuned, *(_relaxed(choice) for choice in tuned)]
    known = [choice for choice in dict.fromkeys(some) if choice is not None and compiles(choice)]
    if machine is None:
        yield from known[:1]
        return
    exact = found.schedule if found is not None and found.distance == 0 else None
    expected: dict[Choice, float] = {}
    for choice in (*known, *predicted_choices(kernel, device)):
        assert choice.schedule is not None
        if any(choice.schedule == other.schedule for other in expected):
            continue
        times = _times_of_rows(kernel, choice.schedule, machine)
        if exact is not None and found is not None and choice in known:
            if exact.split != choice.schedule.split:
                usual = _times_of_rows(kernel, default_schedule(kernel), machine)
                if math.prod(times) > math.prod(usual):
                    continue
            elif found.entry.us and math.isfinite(sum(times)):
                times = [(1.0 - OUTWEIGHED) * found.entry.us * us / times[-1] for us in times]
        expected[choice] = math.prod(times)
    yield from sorted(expected, key=lambda choice: expected[choice])


def _times_of_rows(kernel: Op, schedule: Schedule, machine: Machine) -> list[float]:
    """Predicted microseconds at the least number of rows that a program serves, between, and at its capacity."""
    (rows,) = (op for op in kernel.find("extent") if op.get("dynamic"))
    most, world = int(rows["value"]), int(kernel["world"])
    least = max(int(rows.get("least", 1)), world)
    whole = _predicted_us(kernel, schedule, machine, MOST_OF_ROWS)
    if not math.isfinite(whole):
        # Of many tasks, the capacity alone: large programs differ little.
        return [_predicted_us(kernel, schedule, machine, MANY * MORE)] * len(PARTS)
    values = (round(least ** (1 - part) * most**part) // world * world for part in PARTS[:-1])
    program = run_passes(kernel, schedule)
    return [*(predict(at_extents(program, {rows.symbol: v}), machine) for v in values), whole]


def _relaxed(choice: Choice) -> Choice | None:
    """``choice`` without what needs to know how many rows there are, where it is much the same without."""
    schedule = choice.schedule
    assert schedule is not None
    moves = tuple(
        # Tiles that span shards wait for all of them, however they are copied.
        (name, replace(move, copies="rows") if move.spans else move)
        for name, move in schedule.moves
    )
    other = replace(schedule, tail=1, split=1, moves=moves)
    return None if other == schedule else Choice(other, f"{choice.origin}, for dynamic rows")


def _refitted(kernel: Op, schedule: Schedule, device: str) -> Schedule:
    """``schedule``, tuned for another shape, with the ``tail`` that the model expects most of.

    How full the last wave is depends on the shape, so what was best there says nothing of it here.
    """
    machine = Machine.of_device(device, world_of(kernel))
    # Where all tiles are cut already, or warps do not multiply, there is none to choose.
    if machine is None or schedule.split > 1 or schedule.emitter == "library":
        return schedule
    product = Space(kernel, machine).product
    others = [replace(schedule, tail=tail) for tail in (1, *TAILS) if tail != schedule.tail]
    others = [s for s in others if product is None or _has_room(product, s)]
    return min([schedule, *others], key=lambda s: _predicted_us(kernel, s, machine, REFITTED))


def _has_room(product: Product, schedule: Schedule) -> bool:
    """Whether the sums of a tile fit beside its ring, as they have to where Triton adds up its parts."""
    if schedule.tail == 1 or schedule.emitter != "triton":
        return True
    return product.shared_bytes(schedule) <= SHARED_BYTES - SHARED_RESERVE


def compile_chosen(
    kernel: Op, schedule: Schedule | None, device: str, default: bool = False
) -> Chosen:
    """``kernel`` compiled under ``schedule``; None takes the first of :func:`choices` that can be compiled, or
    (``default``) the default one.

    The passes, the proof and the emitter may each refuse one. A fault of theirs refuses it too, and is told by
    :func:`fault`; it is raised of the default schedule, and of one that is given.
    """
    if default and schedule is None:
        return _compiled(kernel, Choice(None, "default"))
    if schedule is not None:
        return _compiled(kernel, Choice(schedule, "given"))
    known: dict[Choice, Chosen | None] = {}
    refused: dict[Choice, str] = {}

    def attempt(choice: Choice) -> Chosen | None:
        if choice not in known:
            try:
                known[choice] = _compiled(kernel, choice)
            except Exception as error:
                known[choice] = None
                refused[choice] = reason(error)
                if is_fault(error):
                    fault(kernel, choice.schedule, error)
        return known[choice]

    def behind(chosen: Chosen) -> Chosen:
        return replace(chosen, refused=tuple((c.origin, why) for c, why in refused.items()))

    for choice in choices(kernel, device, lambda choice: attempt(choice) is not None):
        if choice.schedule is None:
            break
        found = attempt(choice)
        if found is not None:
            return behind(found)
    return behind(_compiled(kernel, Choice(None, "default")))


def _compiled(kernel: Op, choice: Choice) -> Chosen:
    from tilelink.backend.emit.triton import emit

    program = compile_kernel(kernel, choice.schedule)
    return Chosen(program, emit(program), choice.origin)


def predicted_choices(kernel: Op, device: str, near: Schedule | None = None) -> tuple[Choice, ...]:
    """The schedules with the shortest predicted times, the shortest first; none without a model of the machine.

    Each is expected to be faster by a clear gain than ``near``, the schedule of a shape nearby, or else than the
    default.
    """
    machine = Machine.of_device(device, world_of(kernel))
    if machine is None:
        return ()
    space = Space(kernel, machine)
    if space.product is None:
        return ()
    tasks = _tasks(space)
    effort, most = max(LEAST, min(MOST, TASKS // tasks)), max(MANY, MORE * tasks)

    def of(schedules: Sequence[Schedule]) -> list[float]:
        return [_predicted_us(kernel, s, machine, most) for s in schedules]

    trials = prune(space, of, keep=effort, effort=effort)
    (known_us,) = of([space.base if near is None else near])
    return tuple(
        Choice(trial.schedule, f"predicted {trial.predicted_us:.0f} us on {machine.name}")
        for trial in trials
        if _known_to_pay(kernel, trial.schedule) and trial.predicted_us <= (1.0 - GAIN) * known_us
    )


def _known_to_pay(kernel: Op, schedule: Schedule) -> bool:
    """Whether what is predicted has ever been measured to be faster: sums that are pulled have not, but those of
    few rows whose tiles span slices, nor own tiles of a scatter that do not come last. A search that measures may
    take them."""
    reduced = {tensor.symbol for tensor in kernel.find("tensor") if tensor["move"] == "reduce"}
    return all(
        (move.direction == "push" or move.spans) and (move.own == "last" or name in reduced)
        for name, move in schedule.moves
    )


def _tasks(space: Space) -> int:
    """About how many tasks one rank has under the default schedule."""
    assert space.product is not None
    sizes = zip(space.product.extent, space.product.tile(space.base), strict=True)
    rows, columns, _ = (-(-extent // tile) for extent, tile in sizes)
    sums = sum(
        space.bytes_of(tensor) // SUM_BYTES
        for tensor in space.kernel.find("tensor")
        if tensor["move"] == "reduce"
    )
    return max(1, rows * columns + sums)


def _predicted_us(kernel: Op, schedule: Schedule, machine: Machine, most: int) -> float:
    """Microseconds; infinity where the passes refuse the schedule, or make more than ``most`` tasks of it."""
    try:
        program = run_passes(kernel, schedule)
        env = environment(program)
        stages = [op for op in program.walk() if op.name == "stage"]
        if sum(evaluate(tasks_of_stage(program, s), env, s) for s in stages) > most:
            return math.inf
        return predict(program, machine)
    except Exception as error:
        if is_fault(error):
            fault(kernel, schedule, error)
        return math.inf


__all__ = ["Choice", "choices", "compile_chosen", "default_schedule", "predicted_choices"]
