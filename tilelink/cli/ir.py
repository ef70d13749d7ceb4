"""``tilelink ir``: the IR of a kernel at any point of the pipeline, as text that every command reads."""

from __future__ import annotations

import argparse

from tilelink.cli import table
from tilelink.cli.errors import UnknownName
from tilelink.cli.options import add_common, add_output, writing
from tilelink.cli.source import load
from tilelink.errors import choices
from tilelink.ir import print_ir


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "ir",
        help="print the IR: the kernel, after a pass, or the fused program",
        description="Print the kernel's IR, one op a line. Synchronisation is spelled `wait` and "
        "`notify`. The text can be edited and given to `run`, `check`, `simulate` and `emit` as FILE "
        "(see docs/ir.md).",
    )
    parser.set_defaults(execute=writing(execute))
    add_common(parser, file_optional=True)
    add_output(parser)
    point = parser.add_mutually_exclusive_group()
    point.add_argument("--after", metavar="PASS", help="the IR as this pass leaves it")
    point.add_argument("--fused", action="store_true", help="the fused program, after all passes")
    point.add_argument(
        "--list-passes", action="store_true", help="the passes in order; no FILE needed"
    )


def execute(args: argparse.Namespace) -> int:
    """Prints the IR asked for."""
    if args.list_passes:
        print(table.pairs([(name, _summary(function)) for name, function in _passes()], indent=""))
        return 0
    if args.file is None:
        args.parser.error("FILE is missing")
    if args.after is not None:
        known = [name for name, _ in _passes()]
        if args.after not in known:
            advice = choices(args.after, known)
            raise UnknownName(option="--after", what="pass", name=args.after, advice=advice)
    for unit in load(args):
        if args.after is not None:
            from tilelink.backend.pipeline import run_passes

            op = run_passes(unit.kernel("ir --after"), unit.schedule(args), after=args.after)
        else:
            op = unit.program(args) if args.fused else unit.op
        print(print_ir(op), end="")
    return 0


def _passes() -> list[tuple[str, object]]:
    from tilelink.backend.pipeline import PASSES

    return [(name, function) for name, function in PASSES]


def _summary(function: object) -> str:
    lines = (function.__doc__ or "").strip().splitlines()
    return lines[0].replace("``", "`") if lines else ""
