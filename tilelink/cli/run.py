"""``tilelink run``: execute on random inputs and compare with the reference."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tilelink.cli import table
from tilelink.cli.env import lacking
from tilelink.cli.errors import Unavailable
from tilelink.cli.inputs import random_inputs
from tilelink.cli.options import add_common
from tilelink.cli.source import Unit, load
from tilelink.errors import TilelinkError
from tilelink.ir import FLOATS, Op

if TYPE_CHECKING:
    import torch

    Tensors = list[dict[str, torch.Tensor]]
    Arguments = list[dict[str, Any]]

BACKENDS = ("simulate", "interpret", "cuda")
HEADER = (
    "kernel",
    "backend",
    "world",
    "dtype",
    "shape",
    "resource",
    "output",
    "error",
    "limit",
    "verdict",
)
# Relative error of a row that rounding to the output's element type may explain: both sides accumulate
# in fp32, in different orders, and round to nearest at the same places.
LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run on random inputs and compare with the reference",
        description="Run the fused program on random inputs and compare every output with the "
        "reference. The error is the largest over rows of |row - reference| / |reference row|.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="simulate",
        help="default: simulate; cuda runs one rank a process, started by torchrun",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the scheduler")


def execute(args: argparse.Namespace) -> int:
    """Prints a row an output; 1 if one is beyond its limit or a program is refused."""
    lacks = lacking(args.backend)
    if lacks:
        raise Unavailable(what=f"the {args.backend} backend", reason=f"lacks {lacks}")
    if args.backend == "cuda":
        from tilelink.cli.cuda import execute_cuda

        return execute_cuda(args)
    rows: list[list[str]] = []
    failures: list[TilelinkError] = []
    for unit in load(args):
        try:
            program = unit.program(args)
            inputs = random_inputs(unit.op, args.seed)
            outputs = run_program(program, inputs, args.backend, args.seed)
            rows += compare(unit, program, inputs, outputs, args.backend)
        except TilelinkError as error:
            failures.append(error)
            rows.append([*describe(unit, unit.op, args.backend), "-", "-", "-", "refused"])
    print(table.render(HEADER, rows))
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures) or any(row[-1] == "WRONG" for row in rows))


def run_program(program: Op, inputs: Arguments, backend: str, seed: int) -> Tensors:
    """The outputs of every rank."""
    if backend == "interpret":
        from tilelink.backend.runtime import interpret

        names = {child.symbol for child in program.find("scalar")}
        tensors = [{n: v for n, v in rank.items() if n not in names} for rank in inputs]
        scalars = {n: v for n, v in inputs[0].items() if n in names}
        return interpret.run(program, tensors, scalars=scalars)
    from tilelink.backend import simulate

    return simulate.run(program, inputs, seed=seed)


def compare(
    unit: Unit, program: Op, inputs: Arguments, outputs: Tensors, backend: str
) -> list[list[str]]:
    """A table row for each output: its worst error over the ranks against the reference."""
    lead = describe(unit, program, backend)
    if unit.fused:
        names = ", ".join(outputs[0])
        return [[*lead, names, "no reference", "-", "ran"]]
    from tilelink.backend import reference

    expected = reference.run(unit.op, inputs)
    rows = []
    for name in expected[0]:
        dtype = unit.op.declared(name)["dtype"]
        limit = LIMITS.get(dtype, 0.0)
        error = max(
            reference.relative_error(got[name], want[name])
            for got, want in zip(outputs, expected, strict=True)
        )
        verdict = "ok" if error <= limit else "WRONG"
        rows.append([*lead, name, f"{error:.1e}", f"{limit:.0e}", verdict])
    return rows


def describe(unit: Unit, program: Op, backend: str) -> list[str]:
    """The cells that say what was run."""
    dtypes = {child["dtype"] for child in unit.op.find("tensor") if child["dtype"] in FLOATS}
    shape = " ".join(f"{child.symbol}={child['value']}" for child in unit.op.find("extent"))
    return [
        unit.name,
        backend,
        str(unit.world),
        "/".join(sorted(dtypes)),
        shape,
        resources(program),
    ]


def resources(program: Op) -> str:
    """What moves the bytes: one word, or ``A=… C=…`` where the tensors differ."""
    from tilelink.schedules import Schedule

    text = program.get("schedule")
    if not text:
        return "-"
    moves = {name: move.resource for name, move in Schedule.from_json(text).moves}
    if len(set(moves.values())) <= 1:
        return next(iter(moves.values()), "-")
    return " ".join(f"{name}={resource}" for name, resource in sorted(moves.items()))
