"""The library's collectives, as the simulator runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilelink.backend.simulate.errors import BoundsError
from tilelink.backend.simulate.execute import Machine, Task
from tilelink.backend.simulate.geometry import Box
from tilelink.ir import Op


def _box(tensor: torch.Tensor) -> Box:
    return tuple((0, size) for size in tensor.shape)


def run_collective(machine: Machine, op: Op, tasks: Sequence[Task]) -> None:
    """Move the data of the collective ``op``; ``tasks`` are its tasks on all ranks, in rank order.

    Contributions of a sum are added in rank order in fp32 and rounded once, so that all ranks hold
    the same bits.
    """
    source, to = op.symbol, op["to"].symbol if op.get("to") is not None else op.symbol
    parts = []
    for task in tasks:
        part = machine.memories[task.rank].tensors[source]
        machine.touch(task, task.rank, source, _box(part), op, write=False)
        parts.append(part.clone())
    for task in tasks:
        target = machine.memories[task.rank].tensors[to]
        value = _result(op, parts, target, task.rank)
        machine.touch(task, task.rank, to, _box(target), op, write=True)
        target.copy_(value)


def _result(op: Op, parts: list[torch.Tensor], target: torch.Tensor, rank: int) -> torch.Tensor:
    world, shape = len(parts), list(parts[0].shape)
    if op["op"] == "all_gather":
        if target.dim() == len(shape) + 1:
            return torch.stack(parts)
        axis = _axis(op, shape, list(target.shape), world)
        return torch.cat(parts, dim=axis)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    if op["op"] == "all_reduce":
        return total
    if target.dim() == len(shape) - 1:
        return total[rank]
    axis = _axis(op, list(target.shape), shape, world)
    return total.chunk(world, dim=axis)[rank]


def _axis(op: Op, small: list[int], large: list[int], world: int) -> int:
    """The axis along which ``large`` holds one ``small`` a rank; the first if there is one rank."""
    for axis, (a, b) in enumerate(zip(small, large, strict=True)):
        rest = small[:axis] + small[axis + 1 :] == large[:axis] + large[axis + 1 :]
        if a * world == b and rest:
            return axis
    detail = f"a {op['op']} between shapes {small} and {large} over {world} ranks"
    raise BoundsError(op.span, symbol=op.symbol, detail=detail)
