"""``tilelink run``: execute on random inputs and compare with the reference."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from tilelink.cli import table
from tilelink.cli.env import lacking
from tilelink.cli.errors import FusedOnly, SimulatedOnly, Unavailable, report
from tilelink.cli.inputs import check_memory, random_inputs
from tilelink.cli.options import add_common, positive, seed
from tilelink.cli.patience import patience
from tilelink.cli.source import Unbuilt, Unit, load_each
from tilelink.errors import TilelinkError
from tilelink.ir import FLOATS, Op
from tilelink.schedules import Schedule

if TYPE_CHECKING:
    import torch

    Tensors = list[dict[str, torch.Tensor]]
    Arguments = list[dict[str, Any]]

BACKENDS = ("simulate", "interpret", "cuda", "reference")
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
OUTPUT = HEADER.index("output")
# Value ops that round nothing: each element of the result is one of an operand, or that with another sign.
EXACT = frozenset(
    {"transpose", "expand", "where", "neg", "abs", "maximum", "minimum", "max", "min"},
)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run on random inputs and compare with the reference",
        description="Run the fused program on random inputs and compare every output with the "
        "reference. The error is the largest over rows of |row - reference| / |reference row|; NaN and "
        "infinities have to stand where the reference has them. With `--backend reference` the reference "
        "alone is run, of mappings too that cannot be fused.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="simulate",
        help="default: simulate; cuda runs one rank a process, started by torchrun; reference fuses nothing",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the inputs and of the scheduler")
    parser.add_argument(
        "--calls",
        type=positive,
        default=1,
        help="calls on one arena, each on inputs of its own (simulate only; default: 1)",
    )
    parser.add_argument(
        "--schedules",
        type=positive,
        default=1,
        help="hostile schedules to try, from that of the seed on (simulate only; default: 1)",
    )


def execute(args: argparse.Namespace) -> int:
    """Prints a row an output; 1 if one is beyond its limit or a program is refused."""
    lacks = lacking(args.backend)
    if lacks:
        raise Unavailable(what=f"the {args.backend} backend", reason=f"lacks {lacks}")
    repeated = args.calls > 1 or args.schedules > 1
    if repeated and args.backend != "simulate":
        raise SimulatedOnly(backend=args.backend)
    if args.backend == "cuda":
        from tilelink.cli.cuda import execute_cuda

        return execute_cuda(args)
    from tilelink.backend.reference_tilings import check_tilings
    from tilelink.backend.runtime.image import has_roles

    rows: list[list[str]] = []
    failures: list[TilelinkError] = []
    roles: list[str] = []
    for unit in load_each(args):
        if isinstance(unit, Unbuilt):
            failures.append(unit.error)
            rows.append([unit.name, args.backend, *["-"] * (len(HEADER) - 3), "refused"])
            continue
        try:
            if not unit.fused:
                check_memory(unit.op)  # before minutes are spent on a program that cannot be run
            if args.backend == "reference":
                rows.append(run_reference(unit, args))
                continue
            program = unit.program(args)
            if args.backend == "interpret" and has_roles(program):
                roles.append(unit.name)
            inputs = [random_inputs(unit.op, args.seed + call) for call in range(args.calls)]
            with patience(waiting(unit, args.backend)):
                if repeated:
                    outputs = run_calls(program, inputs, args.seed, args.schedules)
                else:
                    outputs = [run_program(program, inputs[0], args.backend, args.seed)]
                kernel = kernel_of(unit)
                wanted = [reference_of(kernel, given) for given in inputs]
        except TilelinkError as error:
            failures.append(error)
            rows.append([*describe(unit, unit.op, args.backend), "-", "-", "-", "refused"])
            continue
        for call, (found, expected) in enumerate(zip(outputs, wanted, strict=True)):
            of_call = compare(unit, program, found, expected, kernel, args.backend)
            for row in of_call if args.calls > 1 else ():
                row[OUTPUT] += f" (call {call})"
            rows += of_call
        try:
            if kernel is not None and wanted[0] is not None:
                check_tilings(kernel, inputs[0], wanted[0], limit_of)
        except TilelinkError as error:
            failures.append(error)
    print(table.render(HEADER, rows))
    if roles:
        print(f"{', '.join(roles)}: interpreted as Triton kernels; Gluon has no interpreter")
    return report(failures) or int(any(row[-1] == "WRONG" for row in rows))


def waiting(unit: Unit, backend: str) -> str:
    """What is said of a run that takes long."""
    shape = " ".join(f"{child.symbol}={child['value']}" for child in unit.op.find("extent"))
    what = {"simulate": "simulating", "interpret": "interpreting"}[backend]
    return f"{unit.name}: {what} {unit.world} ranks of {shape}; smaller extents (`--set`) take less"


def run_reference(unit: Unit, args: argparse.Namespace) -> list[str]:
    """The table row of a kernel that the reference has run, by whole extents and by shorter tiles.

    FusedOnly where a fused program carries no kernel for its extents and ranks.
    """
    from tilelink.backend.reference_tilings import check_tilings

    kernel = kernel_of(unit)
    if kernel is None:
        raise FusedOnly(command="run --backend reference", path=unit.path)
    if not unit.fused:
        unit.schedule(args)  # nothing is scheduled, but what is asked for has to be there
    inputs = random_inputs(kernel, args.seed)
    outputs = reference_of(kernel, inputs)
    assert outputs is not None
    check_tilings(kernel, inputs, outputs, limit_of)
    return [*describe(unit, kernel, args.backend), ", ".join(outputs[0]), "-", "-", "ran"]


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


def run_calls(program: Op, inputs: list[Arguments], seed: int, schedules: int) -> list[Tensors]:
    """The outputs of every call and rank under the schedule of ``seed``; what the attack finds under this
    and the next ones is raised."""
    from tilelink.backend import simulate
    from tilelink.backend.simulate.attack import attack
    from tilelink.backend.simulate.command import reproduce
    from tilelink.backend.simulate.errors import RunError

    if schedules > 1:
        found = attack(program, inputs, None, schedules, seed)
        if found is not None:
            # The same schedule once more: an error that one run shows by itself is told in full.
            simulate.run_calls(program, inputs, found.seed)
            if isinstance(found.error, RunError):
                again = reproduce(program, seed, len(inputs))
                found.error.command = f"{again} --schedules {schedules}"
            raise found.error
    return simulate.run_calls(program, inputs, seed)


def kernel_of(unit: Unit) -> Op | None:
    """The kernel whose reference a unit is held against: of a fused program that which it carries.

    None where it carries none, or one for other extents or ranks.
    """
    if not unit.fused:
        return unit.op
    from tilelink.backend.expand import environment
    from tilelink.backend.verify import carried

    kernel = carried(unit.op)
    same = kernel is not None and environment(kernel) == environment(unit.op)
    return kernel if same else None


def reference_of(kernel: Op | None, inputs: Arguments) -> Tensors | None:
    """What the outputs of every rank should be; None where no kernel says so."""
    if kernel is None:
        return None
    from tilelink.backend import reference

    return reference.run(kernel, inputs)


def compare(
    unit: Unit,
    program: Op,
    outputs: Tensors,
    expected: Tensors | None,
    kernel: Op | None,
    backend: str,
) -> list[list[str]]:
    """A table row for each output: its worst error over the ranks against the reference of ``kernel``."""
    lead = describe(unit, program, backend)
    if kernel is None or expected is None:
        names = ", ".join(outputs[0])
        return [[*lead, names, "no reference", "-", "ran"]]
    rows = []
    for name in expected[0]:
        limit = limit_of(kernel, name)
        pairs = [(got[name], want[name]) for got, want in zip(outputs, expected, strict=True)]
        error = max(error_of(got, want) for got, want in pairs)
        odd = sum(int((~want.isfinite()).sum()) for _, want in pairs)
        label = f"{name} ({odd} not finite)" if odd else name
        verdict = "ok" if error <= limit else "WRONG"
        rows.append([*lead, label, f"{error:.1e}", f"{limit:.0e}", verdict])
    return rows


def limit_of(kernel: Op, name: str) -> float:
    """How far an output may be from the reference: by what rounds it, or something on the way to it.

    0 for integers. Of floats the coarsest type counts that the kernel stores, converts to or computes: what is
    stored in bf16 and read again is rounded in other places where sums are taken in another order, and Triton's
    interpreter holds bf16 as fp32, so that what is computed in bf16 is rounded where it is stored, and not before.
    """
    from tilelink.backend.accuracy import TOLERANCE
    from tilelink.backend.reference_ops import COMPUTED

    own = kernel.declared(name)["dtype"]
    if own not in TOLERANCE:
        return 0.0
    rounded = {kernel.declared(op.symbol)["dtype"] for op in kernel.walk() if op.name == "store"}
    rounding = COMPUTED - EXACT
    rounded |= {op.results[0].type.dtype for op in kernel.walk() if op.name in rounding}
    return max(TOLERANCE[dtype] for dtype in {own, *rounded} if dtype in TOLERANCE)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of what is finite; infinity unless NaN and infinities stand at the same places."""
    from tilelink.backend.accuracy import finite_parts, relative_error

    both = finite_parts(found, expected)
    return math.inf if both is None else relative_error(*both)


def describe(unit: Unit, program: Op, backend: str) -> list[str]:
    """The cells that say what was run."""
    every = {child["dtype"] for child in unit.op.find("tensor")}
    dtypes = {dtype for dtype in every if dtype in FLOATS} or every
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
    # Of an intermediate tensor a fused program has buffers alone: the schedule knows it still.
    chosen = Schedule.from_json(program["schedule"]).moves if program.get("schedule") else ()
    moves = {name: move.resource for name, move in chosen} | {
        tensor.symbol: str(tensor["resource"])
        for tensor in program.find("tensor")
        if tensor.get("resource") is not None
    }
    if len(set(moves.values())) <= 1:
        return next(iter(moves.values()), "-")
    return " ".join(f"{name}={resource}" for name, resource in sorted(moves.items()))
