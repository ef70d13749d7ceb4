"""The library's collectives, as the simulator runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilelink.backend.dtypes import sum_dtype
from tilelink.backend.simulate.errors import BoundsError
from tilelink.backend.simulate.execute import Machine, Runner, Task
from tilelink.backend.simulate.trace import Place, Region, Transfer
from tilelink.ir import Op


def run_collective(machine: Machine, op: Op, tasks: Sequence[Task]) -> None:
    """Move the data of the collective ``op``; ``tasks`` are its tasks on all ranks, in rank order.

    Contributions of a sum are added in rank order in fp32, integers as such, and rounded once: all ranks hold
    the same bits.
    """
    source, to = (
        machine.geometry.home(name)
        for name in (op.symbol, op["to"].symbol if op.get("to") is not None else op.symbol)
    )
    reads = [_whole(machine, op, task, source, 0) for task in tasks]
    writes = [_whole(machine, op, task, to, 1) for task in tasks]
    for task, read in zip(tasks, reads, strict=True):
        Runner(machine, task).see(read, 0, read.source)
    parts = []
    if machine.values:
        decl = machine.geometry.decls[source]
        parts = [machine.memories[task.rank].tensor(decl).clone() for task in tasks]
    for task, write in zip(tasks, writes, strict=True):
        value = None
        if machine.values:
            target = machine.memories[task.rank].tensor(machine.geometry.decls[to])
            value = _result(op, parts, target, task.rank).to(target.dtype).reshape(target.shape)
        Runner(machine, task).write(write, task.rank, write.target, value, False)
    for task in tasks:
        machine.flush(task)


def _whole(machine: Machine, op: Op, task: Task, symbol: str, number: int) -> Transfer:
    """The access of one rank to all of a tensor."""
    traces, shape = machine.traces, machine.geometry.decls[symbol].shape
    table, box = traces.tables.get(symbol), tuple((0, size) for size in shape)
    row = -1 if table is None or 0 in shape else table.row(box)
    place = Place(task.rank, task.agent)
    uid = traces.uid((task.rank, id(op), number), op, place)
    region = Region(symbol, (...,), (...,), box, row, shape)
    return Transfer(op, place, uid, task.rank, region, region)


def _result(op: Op, parts: list[torch.Tensor], target: torch.Tensor, rank: int) -> torch.Tensor:
    world, shape = len(parts), list(parts[0].shape)
    if op["op"] == "all_gather":
        if target.dim() == len(shape) + 1:
            return torch.stack(parts)
        axis = _axis(op, shape, list(target.shape), world)
        return torch.cat(parts, dim=axis)
    wide = sum_dtype(parts[0].dtype)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
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
