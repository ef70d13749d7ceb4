"""``tilelink check``: prove that the fused program cannot hang or race, or print the witness."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tilelink.cli import table
from tilelink.cli.errors import report
from tilelink.cli.options import add_common
from tilelink.cli.source import Unbuilt, Unit, load_each
from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import Op

if TYPE_CHECKING:
    from tilelink.backend.verify import Report

MEANING = {
    "bounds": "indices, flags, counters and buffers lie inside what was declared",
    "release-acquire": "each release and acquire has the scope, fences and drains its data needs",
    "cover": "every read of data from elsewhere is behind waits for all of it",
    "dataflow": "every read sees the region and the rank that the kernel asks for",
    "meaning": "every stage computes, op for op, what the kernel says, on each point once",
    "reuse": "the next call, of this or another program, overwrites nothing that is still read",
    "match": "what is notified to each flag and counter is what is waited for",
    "progress": "waits and queues of all ranks together have no cycle",
    "rows": "what is proven of a dynamic extent's capacity holds for every value up to it",
    "residency": "no order in which workers start, where not all fit at once, can hang",
}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="prove the synchronisation, or print the witness",
        description="Prove that the fused program cannot hang or race for this shape and world, and "
        "that every read sees the data it should; or print the witness.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser)
    parser.add_argument(
        "--deletions",
        action="store_true",
        help="also delete each wait and each notify in turn; every such program must be refused",
    )
    parser.add_argument(
        "--emitted",
        metavar="MODULE.py",
        help="prove that this emitted module (`-`: standard input) is the program of the kernel in FILE",
    )


def execute(args: argparse.Namespace) -> int:
    """Prints the report of each kernel, and the witness against each program that is refused."""
    if args.emitted:
        from tilelink.cli import emitted

        return emitted.execute(args)
    failures: list[TilelinkError] = []
    code = 0
    for unit in load_each(args):
        if isinstance(unit, Unbuilt):
            failures.append(unit.error)
            continue
        try:
            code |= judge(unit, args)
        except InternalError:
            raise
        except TilelinkError as error:
            failures.append(error)
    return report(failures) or code


def judge(unit: Unit, args: argparse.Namespace) -> int:
    """Prints the report of a kernel; 1 if a program that lacks a wait or a notify passes, too."""
    from tilelink.backend.verify import verify

    program = unproven(unit, args)
    print(render(unit, verify(program, None if unit.fused else unit.op)))
    if not args.deletions:
        return 0
    refused, passed = try_deletions(program)
    print(f"  deletions    {refused + len(passed)} tried, {refused} refused")
    for line in passed:
        print(f"    not refused: {line}")
    return int(bool(passed))


def unproven(unit: Unit, args: argparse.Namespace) -> Op:
    """The fused program, before the proof."""
    if unit.fused:
        return unit.program(args)
    from tilelink.backend.pipeline import run_passes

    return run_passes(unit.op, unit.schedule(args))


def render(unit: Unit, proof: Report) -> str:
    """The report as text: what was proven, counts, memory, assumptions."""
    rows = [
        ("shape", " ".join(f"{op.symbol}={op['value']}" for op in unit.op.find("extent"))),
        ("ranks", str(proof.world)),
        ("a call", counts_of(proof)),
        ("workspace", f"{table.size(proof.workspace_bytes)} a rank"),
        ("compared", f"{proof.pairs:,} pairs of accesses that could conflict"),
        *(("proven" if n == 0 else "", rule) for n, rule in enumerate(_rules(proof))),
        *(("assumed" if n == 0 else "", text) for n, text in enumerate(proof.assumptions)),
    ]
    return f"{unit.name}: cannot hang, race or read the wrong tile\n{table.pairs(rows)}"


def counts_of(proof: Report) -> str:
    """What a call of the program consists of."""
    counts = (
        (proof.tiles, "tile"),
        (proof.channels, "channel"),
        (proof.waits, "wait"),
        (proof.notifies, "notify"),
        (proof.transfers, "transfer"),
    )
    return ", ".join(table.number(count, noun) for count, noun in counts)


def try_deletions(program: Op) -> tuple[int, list[str]]:
    """How many programs with one wait or notify deleted are refused, and the lines of those that pass."""
    from tilelink.backend.mutate import deletions
    from tilelink.backend.verify import verify

    refused, passed = 0, []
    for line, mutant in deletions(program):
        try:
            verify(mutant)
        except TilelinkError:
            refused += 1
        else:
            passed.append(line)
    return refused, passed


def _rules(report: Report) -> list[str]:
    width = max(map(len, report.rules))
    return [f"{rule.ljust(width)}  {MEANING.get(rule, '')}".rstrip() for rule in report.rules]
