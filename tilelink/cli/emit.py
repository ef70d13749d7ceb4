"""``tilelink emit``: the generated Triton source, or what it compiles to without a GPU."""

from __future__ import annotations

import argparse
import sys

from tilelink.cli.options import add_common, add_output, writing
from tilelink.cli.source import load

STAGES = ("source", "ttgir", "ptx", "sass")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "emit",
        help="print the generated Triton source, TTGIR, PTX or SASS",
        description="Print the generated Triton source. The later stages are compiled for sm_90 by "
        "the installed Triton; that needs no GPU.",
    )
    parser.set_defaults(execute=writing(execute))
    add_common(parser)
    add_output(parser)
    parser.add_argument("--stage", choices=STAGES, default="source", help="default: source")


def execute(args: argparse.Namespace) -> int:
    """Prints one stage of each kernel; 1 if the linter objects to the compiled code."""
    from tilelink.backend.emit.triton import emit

    problems = 0
    for unit in load(args):
        program = unit.program(args)
        source = emit(program)
        if args.stage == "source":
            print(source, end="")
            continue
        from tilelink.backend.emit.offline import compile_offline, lint

        for compiled in compile_offline(source, program):
            print(compiled.stages[args.stage].rstrip())
            for problem in lint(compiled):
                problems += 1
                print(f"lint: {compiled.name}: {problem}", file=sys.stderr)
    return int(problems > 0)
