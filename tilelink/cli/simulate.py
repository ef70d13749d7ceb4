"""``tilelink simulate``: the predicted timeline of a fused program on a machine model."""

from __future__ import annotations

import argparse
import json
import shutil

from tilelink.cli.options import add_common, write_file
from tilelink.cli.patience import patience
from tilelink.cli.source import load, machine_of


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "simulate",
        help="predict the timeline, the bounds and the overlap efficiency",
        description="Run the fused program on the virtual clock of a machine model. Times are "
        "predictions of the model, not measurements.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser)
    parser.add_argument(
        "--trace", metavar="OUT.json", help="write a trace for chrome://tracing or Perfetto"
    )


def execute(args: argparse.Namespace) -> int:
    """Prints the timeline, the critical path and the bounds of each kernel."""
    from tilelink.backend.simulate import timeline

    machine = machine_of(args.target)
    width = min(120, max(60, shutil.get_terminal_size((100, 24)).columns))
    traces = []
    for unit in load(args):
        shape = " ".join(f"{op.symbol}={op['value']}" for op in unit.op.find("extent"))
        program = unit.program(args)
        with patience(f"{unit.name}: predicting the tiles of {unit.world} ranks of {shape}"):
            predicted = timeline(program, machine)
        print(f"{unit.name}: {shape}, predicted by the machine model")
        print(predicted.render(width))
        print("critical path")
        print(predicted.critical_path_text())
        traces += predicted.to_chrome()["traceEvents"]
    if args.trace:
        write_file(args.trace, json.dumps({"traceEvents": traces, "displayTimeUnit": "ms"}))
    return 0
