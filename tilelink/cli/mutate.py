"""``tilelink mutate``: break the fused program in every known way, and see who notices."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilelink.cli import table
from tilelink.cli.check import unproven
from tilelink.cli.errors import IntactFails, UnknownName
from tilelink.cli.inputs import random_inputs
from tilelink.cli.options import add_common, positive, write_file
from tilelink.cli.source import Unit, load
from tilelink.errors import TilelinkError, choices
from tilelink.ir import Op, dynamic_extents, print_ir
from tilelink.ir.instance import at_extents

if TYPE_CHECKING:
    from tilelink.backend.mutate import Mutant
    from tilelink.backend.mutate.judge import Trial, Verdict

# The smallest instance that still has several tiles, ranks and workers: exploration visits every
# interleaving, and their number grows exponentially.
WORLD, TILE, TILES, CALLS = 2, 8, 3, 2
EVERY_S = 10.0  # seconds between two lines about the progress
HEADER = (
    "class",
    "mutants",
    "refused",
    "found",
    "equivalent",
    "undecided",
    "proof missed",
    "simulator missed",
)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "mutate",
        help="break the fused program on purpose; proof and simulator must notice",
        description="Make every single mistake of docs/mutants.md in the fused program, and ask the proof "
        "and the simulator about each, apart. What one of them misses is explored in every interleaving; "
        "unless it proves equivalent, it is printed: as missed, or as undecided where there are too many. "
        "Without --set, --world, --tile and --workers the "
        f"instance is small: {WORLD} ranks, {WORLD} workers, tiles of {TILE}, {TILES} of them along the "
        "moved axis (the next multiple of the ranks) and one along the others.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser)
    parser.add_argument(
        "--class", dest="classes", action="append", metavar="C", help="only mutants of this class"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="at most N, drawn by --seed (a fused program of user size may take seconds a mutant)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of inputs, schedules and --limit")
    parser.add_argument("--json", action="store_true", help="one line of JSON a kernel")
    parser.add_argument("--survivors", metavar="DIR", help="write survivors there, one file each")


def execute(args: argparse.Namespace) -> int:
    """Prints the table and the survivors of each kernel; 1 if there are any."""
    from tilelink.backend.mutate import CLASSES, mutants
    from tilelink.backend.mutate.judge import judge

    for name in args.classes or ():
        if name not in CLASSES:
            advice = choices(name, CLASSES)
            raise UnknownName(option="--class", what="class", name=name, advice=advice)
    code = 0
    for unit in small(args):
        program = unproven(unit, args)
        trial = trial_of(unit.op, program, args.seed)
        check_intact(program, trial, args.seed)
        chosen = [m for m in mutants(program) if not args.classes or m.name in args.classes]
        if args.limit and len(chosen) > args.limit:
            kept = set(random.Random(args.seed).sample(range(len(chosen)), args.limit))
            chosen = [m for n, m in enumerate(chosen) if n in kept]
        verdicts = []
        progress = Progress(unit.name, len(chosen))
        for mutant in chosen:
            verdicts.append(judge(mutant, trial, seed=args.seed))
            progress.step()
        print(as_json(unit, verdicts) if args.json else render(unit, verdicts, len(trial.inputs)))
        survivors = [v for v in verdicts if v.survivors]
        code |= bool(survivors)
        for number, verdict in enumerate(survivors):
            keep(unit, verdict, number, args)
    return code


def small(args: argparse.Namespace) -> list[Unit]:
    """The kernels of FILE for the extents of the options, and small ones where none are given."""
    if args.world is None and args.target is None and not args.file.endswith(".ir"):
        args.world = WORLD
    units = load(args)
    if any(unit.fused for unit in units):
        return units
    given, tiles = list(args.set), list(args.tile)
    shrunk = []
    for unit in units:
        args.file = f"{args.file.rpartition('::')[0] or args.file}::{unit.name}"
        extents = {op.symbol for op in unit.op.find("extent")}
        args.set = [small_extents(unit.op), *given]
        try:
            shrunk += load(args)
        except TilelinkError:
            # A kernel whose extents depend on each other: its example is the smallest that is known.
            args.set = given
            shrunk += load(args)
        if not args.schedule:
            args.tile = [dict.fromkeys(sorted(extents), TILE), *tiles]
    if args.workers is None and not args.schedule:
        sm = [int(r[3:]) for r in args.resource.values() if r.startswith("sm:")]
        args.workers = max([WORLD, *(n + 1 for n in sm)])
    return shrunk


def small_extents(kernel: Op) -> dict[str, int]:
    """An extent of a few tiles along the axes that move, and of one tile along the others."""
    world = int(kernel["world"])
    found = {op.symbol: TILE for op in kernel.find("extent")}
    for tensor in kernel.find("tensor"):
        axis = tensor["dims"][int(tensor.get("over", 0))] if tensor["dims"] else None
        if tensor["move"] != "local" and str(axis) in found:
            whole = tensor.get("over") is not None
            tiles = -(-TILES // world) * world if whole else TILES
            found[str(axis)] = max(found[str(axis)], TILE * tiles)
    return found


def trial_of(kernel: Op, program: Op, seed: int) -> Trial:
    """Inputs of a few calls, and what is right for them: the reference's outputs.

    Of a fused program without its kernel, what it computes itself; whether the numbers are those that
    somebody meant is not known then.
    """
    from tilelink.backend import reference
    from tilelink.backend.mutate.judge import Trial
    from tilelink.backend.simulate import run_calls

    # With slots it is the third call that comes back to the place of the first.
    calls = CALLS if program.get("slots") is None else CALLS + 1
    inputs = [random_inputs(program, calls * seed + call) for call in range(calls)]
    if kernel.name == "kernel":
        expected = [reference.run(kernel, given) for given in inputs]
        small = smaller_values(kernel)
        smaller = [
            (
                values,
                trial_of(at_extents(kernel, values, fixed=True), at_extents(program, values), seed),
            )
            for values in small
        ]
        return Trial(inputs, expected, kernel, smaller)
    return Trial(inputs, run_calls(program, inputs, seed))


def smaller_values(kernel: Op) -> list[dict[str, int]]:
    """Values of a dynamic extent to try beside its capacity: one tile that is not whole, and some."""
    world = int(kernel["world"])
    found: list[dict[str, int]] = []
    for op in dynamic_extents(kernel):
        capacity = int(op["value"])
        values = sorted({world, capacity // 2 // world * world + world})
        found += [{op.symbol: value} for value in values if value < capacity]
    return found


def check_intact(program: Op, trial: Trial, seed: int) -> None:
    """Raises where the program is refused before anything has been done to it."""
    from tilelink.backend.mutate.judge import simulate
    from tilelink.backend.verify import verify

    verify(program)
    found = simulate(program, trial, seed=seed)
    if found:
        raise IntactFails(name=program.symbol, oracle=found)


class Progress:
    """How many mutants have been judged, on standard error: a counter on a terminal, else a line now and then.

    Once it is seen that all take long, it is said how long, and that ``--limit`` judges fewer.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.start = self.said = time.monotonic()

    def step(self) -> None:
        """One more has been judged."""
        self.done += 1
        now = time.monotonic()
        if sys.stderr.isatty():
            end = "\n" if self.done == self.total else ""
            print(f"\r{self.text(now)}", end=end, file=sys.stderr, flush=True)
        elif now - self.said >= EVERY_S and self.done < self.total:
            self.said = now
            print(self.text(now), file=sys.stderr, flush=True)

    def text(self, now: float) -> str:
        """The count; behind ``EVERY_S`` seconds, the time that all take too."""
        count = f"{self.name}: {self.done} of {self.total} mutants"
        passed = now - self.start
        if passed < EVERY_S:
            return count
        whole = passed / self.done * self.total
        return (
            f"{count} in {passed:.0f} s, all in about {whole:.0f} s; `--limit N` judges N of them"
        )


def tally(verdicts: Sequence[Verdict]) -> dict[str, Counter[str]]:
    """What was said, by class."""
    found: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        counts = found.setdefault(verdict.mutant.name, Counter())
        counts["mutants"] += 1
        counts["refused"] += bool(verdict.proof)
        counts["found"] += bool(verdict.simulator)
        counts["equivalent"] += verdict.truth is not None and verdict.truth.word == "equivalent"
        counts["undecided"] += verdict.truth is not None and verdict.truth.word == "undecided"
        for name in verdict.missed:
            counts[f"{name} missed"] += 1
    return found


def render(unit: Unit, verdicts: Sequence[Verdict], calls: int) -> str:
    """The table, class by class."""
    counted = tally(verdicts)
    total: Counter[str] = Counter()
    rows = []
    for name, counts in counted.items():
        total += counts
        rows.append([name, *(str(counts[column]) for column in HEADER[1:])])
    rows.append(["all", *(str(total[column]) for column in HEADER[1:])])
    shape = " ".join(f"{op.symbol}={op['value']}" for op in unit.op.find("extent"))
    head = f"{unit.name}: {shape}, {unit.world} ranks, {calls} calls"
    return f"{head}\n{table.render(HEADER, rows, '  ')}"


def as_json(unit: Unit, verdicts: Sequence[Verdict]) -> str:
    """The same as one line of JSON."""
    classes = {name: dict(counts) for name, counts in tally(verdicts).items()}
    return json.dumps({"kernel": unit.name, "world": unit.world, "classes": classes})


def text_of(mutant: Mutant, verdict: Verdict) -> str:
    """A survivor as IR text that every command takes, and why it is wrong, or why nobody knows."""
    assert verdict.truth is not None
    who = "missed by" if verdict.missed else "may be right, no objection from"
    lines = [f"{mutant.name}: {mutant.description}", f"{who}: {', '.join(verdict.survivors)}"]
    lines += [f"{verdict.truth.word}: {line}" for line in verdict.truth.why.splitlines()]
    return "".join(f"# {line}\n" for line in lines) + print_ir(mutant.program)


def keep(unit: Unit, verdict: Verdict, number: int, args: argparse.Namespace) -> None:
    """Prints a survivor, or writes it to the folder of ``--survivors``."""
    text = text_of(verdict.mutant, verdict)
    if args.survivors:
        folder = Path(args.survivors)
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", unit.name)
        write_file(str(folder / f"{name}.{verdict.mutant.name}.{number}.ir"), text)
    elif not args.json:
        print(f"\n{text}", end="")
