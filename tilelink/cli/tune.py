"""``tilelink tune``: search for schedules, check those that were found, and judge the model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tilelink.cli import table
from tilelink.cli.env import lacking
from tilelink.cli.errors import BadUsage, Unavailable
from tilelink.cli.options import add_common, merged, positive, read_file, schedule_of, write_file
from tilelink.cli.source import load, machine_of

if TYPE_CHECKING:
    from tilelink.schedules import Schedule
    from tilelink.schedules.tables import Table
    from tilelink.tuning.problem import Problem

ERROR_GOAL = 0.15
SCORES_ONLY = "its rules are for `--score`"


class NothingToTune(BadUsage):
    """``tilelink tune`` without a FILE and without one of the options that need none."""

    code = "nothing-to-tune"
    message = "there is no FILE to tune"
    hint = "give one, or --check, --score, --harvest or --calibrate"


class NothingToRecord(BadUsage):
    """``tilelink tune --record`` without ``--check``, or with a FILE."""

    code = "nothing-to-record"
    message = "the record is of the kernels of all tables that come with the package"
    hint = "`tilelink tune --check --record`, without a FILE"


class NotOfThisSearch(BadUsage):
    """An option of ``tilelink tune`` that the search which was asked for has no use for."""

    code = "not-of-this-search"
    message = "{option} does not apply to {what}: {why}"
    hint = "leave {option} out"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="search for the fastest schedule, or check the tuned tables",
        description="Search for the fastest schedule of a kernel: under torchrun by measuring, with "
        "--simulate by the model alone. --check verifies all tuned tables without a GPU.",
    )
    parser.set_defaults(execute=execute)
    add_common(parser, file_optional=True)
    search = parser.add_argument_group("search")
    search.add_argument("--simulate", action="store_true", help="search by the model; needs no GPU")
    search.add_argument(
        "--budget", type=positive, default=60, metavar="SECONDS", help="of measuring (default: 60)"
    )
    search.add_argument(
        "--candidates",
        type=positive,
        default=10,
        metavar="N",
        help="schedules to measure, or to show, after the model has chosen (default: 10)",
    )
    search.add_argument(
        "--effort",
        type=positive,
        default=128,
        metavar="N",
        help="schedules to predict in each of two passes (default: 128)",
    )
    search.add_argument(
        "--trials", metavar="OUT.jsonl", help="keep every trial here, and go on from it"
    )
    search.add_argument(
        "-o",
        "--out",
        metavar="TABLE.json|FOLDER",
        help="write or update a table (with --harvest: the tables of a folder)",
    )
    other = parser.add_argument_group("instead of a search")
    other.add_argument(
        "--check",
        action="store_true",
        help="verify all tables, or the FILE, without a GPU; 1 if an entry is wrong",
    )
    other.add_argument(
        "--record",
        action="store_true",
        help="with --check of all tables: compile every kernel, and write the record of those that passed",
    )
    other.add_argument(
        "--score",
        metavar="FILE.json",
        action="append",
        help="judge the model by measured times; may be given several times",
    )
    other.add_argument(
        "--changes",
        metavar="RULES.json",
        action="append",
        help="with --score: leave out what these rules say was measured with other code",
    )
    other.add_argument(
        "--harvest", metavar="FILE.json", action="append", help="make tables of raw measurements"
    )
    other.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the numbers of the machine model (under torchrun); -o writes them",
    )


def execute(args: argparse.Namespace) -> int:
    """Runs the part that the options ask for."""
    if args.record and (not args.check or args.file is not None):
        raise NothingToRecord()
    if args.check:
        return check(args)
    if args.score:
        return score(args)
    if args.harvest:
        return harvest(args)
    if args.calibrate:
        return calibrate(args)
    if args.file is None:
        raise NothingToTune()
    return simulate(args) if args.simulate else measure(args)


def check(args: argparse.Namespace) -> int:
    """Verifies tables; prints every error and a count."""
    from tilelink.schedules.tables import load_tables, parse_table
    from tilelink.tuning.check import MARGIN, check_tables
    from tilelink.tuning.compiled import Record

    if args.file is not None:
        tables = [parse_table(read_file(args.file), Path(args.file).name)]
    else:
        tables = list(load_tables())
    report = check_tables(tables, progress=_say, record=None if args.record else Record.load())
    if args.record and not report.errors:
        Record.path().write_text(report.record.to_json(), "utf-8")
    for error in report.errors:
        print(error, file=sys.stderr)
    print(f"{report} (margin to the default: {MARGIN:.0%})")
    return int(bool(report.errors))


def score(args: argparse.Namespace) -> int:
    """Prints how far predictions are off, and what would have been picked of each cell."""
    from tilelink.tuning.score import CLOSE, changes_of, in_words, newest, points_of, score

    read = [p for path in args.score for p in points_of(read_file(path), Path(path).name)]
    rules = [c for path in args.changes or () for c in changes_of(read_file(path), Path(path).name)]
    points = newest(read, rules)
    found = score(points, args.target)
    rows = [
        [name, str(count), f"{error:.1%}", f"{bias:+.1%}"]
        for name, (count, error, bias) in found.classes().items()
    ]
    print(table.render(("schedules", "points", "median error", "median bias"), rows))
    print()
    picks = [
        [
            cell,
            str(len(found.cells[cell])),
            f"{pick.picked.predicted_us:.1f}",
            f"{pick.picked.point.us:.1f}",
            f"{pick.best.point.us:.1f}",
            f"{pick.ratio:.2f}" + ("" if pick.close else " *"),
            in_words(pick.picked.point.schedule),
        ]
        for cell, pick in found.picks.items()
    ]
    header = ("cell", "points", "predicted", "measured", "best", "ratio", "picked")
    print(table.render(header, picks))
    for pick in found.picks.values():
        if not pick.close:
            print(
                f"* {pick.best.point.problem.cell}: {in_words(pick.best.point.schedule)} took "
                f"{pick.best.point.us:.1f} us, and was predicted to take {pick.best.predicted_us:.1f}"
            )
    print()
    for name, part in found.by_rows().items():
        good = sum(pick.close for pick in part.picks.values())
        print(
            f"{name}: {sum(map(len, part.cells.values()))} points in {len(part.cells)} cells, "
            f"median absolute error {part.median_error:.1%}, {good} of {len(part.picks)} picks close"
        )
    left = f" ({len(read) - len(points)} older ones left out)" if len(read) > len(points) else ""
    print(
        f"{len(points)} points{left} in {len(found.cells)} cells: median absolute error "
        f"{found.median_error:.1%}; the predicted best is within {CLOSE - 1:.0%} of the measured best "
        f"in {found.good_share:.0%} of {len(found.picks)} cells"
    )
    return int(found.median_error > ERROR_GOAL)


def harvest(args: argparse.Namespace) -> int:
    """Writes the tables that raw measurements make into the folder of ``--out``."""
    from tilelink.schedules.machine import Machine
    from tilelink.schedules.tables import parse_table
    from tilelink.tuning.check import fault_of
    from tilelink.tuning.harvest import harvest

    def fault(problem: Problem, schedule: Schedule, device: str) -> str:
        machine = Machine.of_device(device, problem.world)
        if machine is None:
            return ""  # --check refuses the table as a whole
        found = fault_of(problem, schedule, machine.name)
        if found:
            print(f"left out: {found}")
        return found

    folder = Path(args.out or "schedules/tuned")
    known: list[Table] = [
        parse_table(read_file(str(path)), path.name) for path in sorted(folder.glob("*.json"))
    ]
    for path in args.harvest:
        known = harvest(read_file(path), path, known, fault)
    folder.mkdir(parents=True, exist_ok=True)
    for made in known:
        write_file(str(folder / made.file_name), made.to_json())
        print(f"{folder / made.file_name}: {len(made.entries)} entries")
    return 0


def simulate(args: argparse.Namespace) -> int:
    """Searches by the model, and puts the best schedule through the proof and the simulator."""
    from tilelink.tuning.session import paste, tune_simulated

    refuse(
        args,
        "a search by the model",
        {
            "schedule": "a whole schedule leaves nothing to search; `tilelink simulate` times it",
            "trials": "nothing is measured, so there is no trial to keep",
            "out": "tables hold measured times; `--schedule` takes what is printed",
            "changes": SCORES_ONLY,
        },
    )
    machine = machine_of(args.target)
    for unit in load(args):
        kernel = unit.kernel("tune")
        found = tune_simulated(
            kernel,
            machine,
            args.candidates,
            args.effort,
            _say,
            schedule_of(args, kernel),
            fits_of(args),
        )
        rows = [[f"{trial.predicted_us:.1f}", trial.schedule.to_json()] for trial in found.trials]
        shape = " ".join(f"{op.symbol}={op['value']}" for op in kernel.find("extent"))
        print(f"{unit.name}: {shape}, predicted for {machine.name} at world {unit.world}")
        print(table.render(("us", "schedule"), rows))
        print(found.checked)
        print(paste(unit.path, kernel, found.trials[0]))
    return 0


def fits_of(args: argparse.Namespace) -> Callable[[Schedule], bool]:
    """Whether a schedule is as ``--tile``, ``--resource``, ``--emitter`` and ``--workers`` ask for."""
    tiles = merged(args.tile)

    def fits(schedule: Schedule) -> bool:
        if args.emitter and schedule.emitter != args.emitter:
            return False
        if args.workers and schedule.workers != args.workers:
            return False
        if any(schedule.tile(name, 0) != length for name, length in tiles.items()):
            return False
        # A tensor's own resource counts for more than that of all.
        asked = {name: args.resource.get(name, args.resource.get("")) for name, _ in schedule.moves}
        return all(asked[name] in (None, move.resource) for name, move in schedule.moves)

    return fits


def refuse(args: argparse.Namespace, what: str, useless: dict[str, str]) -> None:
    """NotOfThisSearch for the first option that was given and that ``useless`` says is of no use, and why."""
    for name, why in useless.items():
        if getattr(args, name):
            raise NotOfThisSearch(option=f"--{name}", what=what, why=why)


def measure(args: argparse.Namespace) -> int:
    """Searches by measuring on the GPUs of this host, one process each."""
    whole = "it searches all schedules; `--simulate` takes a part of them"
    parts = dict.fromkeys(("tile", "resource", "emitter", "workers"), whole)
    left = "a whole schedule leaves nothing to search; `tilelink run --backend cuda` runs it"
    refuse(args, "a search by measuring", {"schedule": left, **parts, "changes": SCORES_ONLY})
    _need_gpus("tilelink tune", args)
    from tilelink.cli.tune_cuda import execute_cuda

    return execute_cuda(args)


def calibrate(args: argparse.Namespace) -> int:
    """Measures what the machine model counts with."""
    _need_gpus("tilelink tune --calibrate", args)
    from tilelink.cli.tune_cuda import calibrate_cuda

    return calibrate_cuda(args)


def _need_gpus(command: str, args: argparse.Namespace) -> None:
    """Unavailable where there is no GPU, or no torchrun."""
    import os

    lacks = lacking("cuda")
    if lacks:
        advice = "" if args.calibrate else "; --simulate searches without"
        raise Unavailable(what=f"`{command}`", reason=f"it measures, and lacks {lacks}{advice}")
    if "LOCAL_RANK" not in os.environ:
        rest = " ".join(sys.argv[1:])
        raise Unavailable(
            what=f"`{command}`",
            reason=f"start it as: torchrun --nproc-per-node 8 -m tilelink {rest}",
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
