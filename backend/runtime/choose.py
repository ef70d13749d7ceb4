"""The schedule of a call that names none: tuned for its shape or one near it, predicted, or the default.

Every rank chooses alone, so the choice depends on the kernel, the number of ranks and the name of the GPU,
never on a clock; ranks that read different tables disagree on the schedule, which is an error of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tilelink import knobs
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import predict
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import prune
from tilelink.schedules.space import Space
from tilelink.schedules.tables import lookup, world_of

# Tasks that the virtual clock may step through for one choice: about a second.
TASKS = 12_000
SUM_BYTES = 8192  # of an all-reduce, the part that weighs as much as a task
# The model's median error: a predicted gain below it is none.
GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule, None for the default one, and where it is from, in words."""

    schedule: Schedule | None
    origin: str


def choices(kernel: Op, device: str) -> Iterator[Choice]:
    """Schedules of ``kernel`` on GPUs that CUDA calls ``device``, the one to try first first."""
    if knobs.TUNED.get():
        found = lookup(kernel, device)
        near = None if found is None else Choice(found.schedule, found.origin)
        if found is not None and near is not None and found.distance == 0:
            yield near
        # What was measured at another shape is a guess here: the model may know better.
        predicted = predicted_choice(kernel, device, None if found is None else found.schedule)
        if predicted is not None:
            yield predicted
        if near is not None:
            yield near
    yield Choice(None, "default")


def compile_chosen(kernel: Op, schedule: Schedule | None, device: str) -> tuple[Op, str]:
    """The fused program of ``kernel``, proven, and the origin of its schedule.

    ``schedule``: what the caller asks for; None takes the first of :func:`choices` that can be compiled.
    """
    if schedule is not None:
        return compile_kernel(kernel, schedule), "given"
    for choice in choices(kernel, device):
        if choice.schedule is None:
            break
        try:
            return compile_kernel(kernel, choice.schedule), choice.origin
        except TilelinkError:
            # Of another shape, or of an earlier version: the next one.
            continue
    return compile_kernel(kernel, None), "default"


def predicted_choice(kernel: Op, device: str, near: Schedule | None = None) -> Choice | None:
    """The schedule with the shortest predicted time; None without a model of the machine or a clear gain.

    The gain is over ``near``, the schedule of a shape nearby, or else over the default one.
    """
    machine = Machine.of_device(device, world_of(kernel))
    if machine is None:
        return None
    space = Space(kernel, machine)
    if space.product is None:
        return None
    effort = max(4, min(24, TASKS // _tasks(space)))

    def of(schedules: object) -> list[float]:
        return [_predicted_us(kernel, s, machine) for s in schedules]  # type: ignore[attr-defined]

    trials = prune(space, of, keep=effort, effort=effort)
    (known_us,) = of([space.base if near is None else near])
    best = next((trial for trial in trials if _known_to_pay(trial.schedule)), None)
    if best is None or best.predicted_us > (1.0 - GAIN) * known_us:
        return None
    return Choice(best.schedule, f"predicted {best.predicted_us:.0f} us on {machine.name}")


def _known_to_pay(schedule: Schedule) -> bool:
    """Whether what is predicted has ever been measured to be faster: sums that are pulled have not, but those of
    few rows whose tiles span slices, nor own tiles that do not come last. A search that measures may take them."""
    return all(
        (move.direction == "push" or move.spans) and move.own == "last"
        for _, move in schedule.moves
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


def _predicted_us(kernel: Op, schedule: Schedule, machine: Machine) -> float:
    try:
        return predict(run_passes(kernel, schedule), machine)
    except TilelinkError:
        return math.inf


__all__ = ["Choice", "choices", "compile_chosen", "default_schedule", "predicted_choice"]
