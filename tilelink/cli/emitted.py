"""``tilelink check --emitted``: prove that an emitted module is the program of its kernel."""

from __future__ import annotations

import argparse
import io
import sys
from typing import TYPE_CHECKING

from tilelink.cli.options import read_file
from tilelink.cli.source import load
from tilelink.cli.table import pairs
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir

if TYPE_CHECKING:
    from tilelink.backend.validate import Module, Validation


def execute(args: argparse.Namespace) -> int:
    """Validates each module of ``args.emitted``; one that is refused raises, with the place in it.

    What the options leave open is taken from the module: ranks, extents, element types and schedule.
    That is a question, not an answer: the program is compiled from the kernel all the same.
    """
    from tilelink.backend.validate import EmittedDiffers, read_module, split_modules, validate

    path = args.emitted
    if path == "-" and args.file.partition("::")[0] == "-":
        raise EmittedDiffers(None, detail="standard input cannot be both the module and the kernel")
    text = sys.stdin.read() if path == "-" else read_file(path)
    # Each module is for a kernel of its own, and standard input can be read once.
    kernel_text = sys.stdin.read() if args.file.partition("::")[0] == "-" else None
    for source in split_modules(text, "<stdin>" if path == "-" else path):
        module = read_module(source)
        asked = argparse.Namespace(**vars(args))
        carried = _carried(module)
        if carried is not None:
            _fill(asked, carried)
        name = _kernel(module, carried)
        if "::" not in args.file:
            asked.file = f"{args.file}::{name}"
        if kernel_text is not None:
            sys.stdin = io.StringIO(kernel_text)
        units = [u for u in load(asked) if u.name == name]
        if not units:
            raise EmittedDiffers(
                None, detail=f"`{args.file}` holds no kernel for the program `{module.name}`"
            )
        program = units[0].program(asked)
        print(render(module, program, validate(module, program)))
    return 0


def _carried(module: Module) -> Op | None:
    try:
        return parse_ir(module.text, module.source.name)
    except TilelinkError:
        return None  # the comparison with the kernel's program says so


def _kernel(module: Module, carried: Op | None) -> str:
    return str(carried.get("kernel", module.name)) if carried is not None else module.name


def _fill(args: argparse.Namespace, carried: Op) -> None:
    """Options that were not given, from what the module says of itself."""
    if not args.world and not args.target:
        args.world = int(carried.get("world", 0)) or None
    if not args.set:
        args.set = [
            {
                op.symbol: int(op["value"])
                for op in carried.find("extent")
                if op["value"] is not None
            }
        ]
    if not (args.schedule or args.tile or args.resource or args.workers or args.emitter):
        args.schedule = carried.get("schedule")
    if not args.dtype:
        floats = ("bf16", "fp16", "fp32")
        args.dtype = {
            op.symbol: str(op["dtype"])
            for op in carried.find("tensor")
            if op.get("role") != "temp" and op["dtype"] in floats
        }


def render(module: Module, program: Op, found: Validation) -> str:
    """What was read, and that it is proven."""
    report = found.report
    rows = [
        ("shape", " ".join(f"{op.symbol}={op['value']}" for op in program.find("extent"))),
        ("ranks", str(report.world)),
        ("read", f"{found.lanes:,} workers and what the host enqueues, each for itself"),
        ("found", f"{found.accesses:,} accesses, {found.signals:,} waits and notifies"),
        ("compared", "with the program of the kernel: accesses, sums, what flows into each store"),
        ("proven", ", ".join(report.rules)),
        *(("assumed" if n == 0 else "", text) for n, text in enumerate(report.assumptions)),
    ]
    name = f"{module.source.name}: {module.name}"
    return f"{name}: the text is the program of its kernel, and cannot hang or race\n{pairs(rows)}"
