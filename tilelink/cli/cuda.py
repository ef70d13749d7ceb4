"""``tilelink run --backend cuda``: one rank of the run, in a process that torchrun started."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tilelink.cli import table
from tilelink.cli.errors import BadWorld, Unavailable
from tilelink.cli.inputs import random_inputs
from tilelink.cli.source import Unit, load
from tilelink.ir import Op


def execute_cuda(args: argparse.Namespace) -> int:
    """Runs every kernel on this rank's GPU; rank 0 compares all ranks' outputs and prints the table.

    Every rank returns the same exit code. Raises Unavailable outside of torchrun, BadWorld where the
    number of processes is not the world that was asked for.
    """
    if "LOCAL_RANK" not in os.environ:
        raise Unavailable(
            what="the cuda backend",
            reason=f"start it as: torchrun --nproc-per-node 8 -m tilelink run {args.file} --backend cuda",
        )
    import torch
    from torch import distributed

    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise Unavailable(
            what="the cuda backend", reason=f"process {local} has no GPU, as there are {count}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    try:
        world, rank = distributed.get_world_size(), distributed.get_rank()
        if args.world not in (None, world):
            raise BadWorld(asked=args.world, world=world)
        args.world = world
        rows = [row for unit in load(args) for row in run_unit(unit, args, rank, device)]
        if rank == 0:
            from tilelink.cli.run import HEADER

            print(table.render(HEADER, rows))
        verdict = [int(any(row[-1] == "WRONG" for row in rows))]
        distributed.broadcast_object_list(verdict, device=device)
        return verdict[0]
    finally:
        distributed.destroy_process_group()


def program_of(unit: Unit, args: argparse.Namespace, device: str) -> Op:
    """The fused program; where no option says how to schedule it, as a call of the kernel would choose."""
    from tilelink.backend.runtime.choose import compile_chosen

    if unit.fused or args.schedule or args.tile or args.resource or args.workers:
        return unit.program(args)
    return compile_chosen(unit.op, None, device).program


def run_unit(unit: Unit, args: argparse.Namespace, rank: int, device: Any) -> list[list[str]]:
    """Runs one kernel; the table's rows on rank 0, nothing elsewhere."""
    import torch
    from torch import distributed

    from tilelink.backend.emit.triton import emit
    from tilelink.backend.runtime import load_module, run_module, write_module
    from tilelink.backend.runtime.watch import synchronize
    from tilelink.cli.run import compare, kernel_of, reference_of

    program = program_of(unit, args, torch.cuda.get_device_name(device))
    inputs = random_inputs(unit.op, args.seed)
    scalars = {child.symbol for child in program.find("scalar")}
    mine = {n: v.to(device) for n, v in inputs[rank].items() if n not in scalars}
    module = load_module(write_module(emit(program), program.symbol))
    values = {n: v for n, v in inputs[rank].items() if n in scalars}
    results = run_module(module.TEXT, module.host, mine, scalars=values)
    synchronize()  # raises if a wait ran out
    names = [t.symbol for t in program.find("tensor") if t["role"] in ("out", "inout")]
    outputs = {n: value.cpu() for n, value in zip(names, results, strict=True)}
    gathered: list[Any] | None = [None] * unit.world if rank == 0 else None
    distributed.gather_object(outputs, gathered)
    if gathered is None:
        return []
    kernel = kernel_of(unit)
    return compare(unit, program, gathered, reference_of(kernel, inputs), kernel, "cuda")
