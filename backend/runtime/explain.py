"""Which schedule a call takes, and where it is from, as users see it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tilelink.backend.runtime.choose import Chosen, compile_chosen
from tilelink.ir import Op
from tilelink.schedules import Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.tables import world_of


@dataclass(frozen=True, slots=True)
class Explanation:
    """The schedule of a call: ``str()`` of it is for reading.

    ``extents`` are those of the program, so of dynamic ones the capacity. ``origin`` says where the schedule
    is from: ``given``, ``tuned (FILE)``, ``tuned for SHAPE ... (FILE)``, ``predicted N us on MACHINE`` or
    ``default``. ``refused``: what would have come first and cannot be compiled, each with where it is from and
    the reason.
    """

    kernel: str
    extents: Mapping[str, int]
    world: int
    device: str
    schedule: Schedule
    origin: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.extents.items())
        lines = [
            f"{self.kernel}: {shape} on {self.world} x {self.device}",
            f"  schedule  {json.dumps(self.schedule.to_sparse())}",
            f"  from      {self.origin}",
        ]
        if self.origin == "default" and Machine.of_device(self.device, self.world) is None:
            lines.append(f"  note      no description of a machine is of {self.device}")
        lines += [f"  refused   {origin}: {why}" for origin, why in self.refused]
        return "\n".join(lines)


def explain(
    kernel: Op, schedule: Schedule | None, device: str, default: bool = False
) -> Explanation:
    """What :func:`compile_chosen` makes of a kernel, on GPUs that CUDA calls ``device``."""
    return explained(compile_chosen(kernel, schedule, device, default), device)


def explained(chosen: Chosen, device: str) -> Explanation:
    """What was chosen, without the program."""
    program = chosen.program
    return Explanation(
        kernel=str(program["kernel"]),
        extents={op.symbol: int(op["value"]) for op in program.find("extent")},
        world=world_of(program),
        device=device,
        schedule=Schedule.from_json(program["schedule"]),
        origin=chosen.origin,
        refused=chosen.refused,
    )
