"""Options that every command on a FILE takes, and how their text is read."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilelink.cli.errors import UnknownName, UnreadableFile
from tilelink.errors import choices
from tilelink.ir import DTYPES, Op
from tilelink.ir.layout import MAX_WORLD
from tilelink.ir.limits import MAX_EXTENT

if TYPE_CHECKING:
    from tilelink.schedules import Schedule

Execute = Callable[[argparse.Namespace], int]

FILE_HELP = (
    "Python source or IR text (a kernel, or a fused program); `-` is standard input; "
    "FILE::NAME picks one kernel"
)


def add_common(parser: argparse.ArgumentParser, *, file_optional: bool = False) -> None:
    """FILE and the options that say for which shapes, ranks and schedule it is meant."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?" if file_optional else None, help=FILE_HELP
    )
    shape = parser.add_argument_group("what to compile it for")
    shape.add_argument("--world", type=world, metavar="W", help="number of ranks (default: 4)")
    shape.add_argument(
        "--set",
        type=extents,
        action="append",
        default=[],
        metavar="M=512,N=256",
        help="extents (default: the example of the kernel)",
    )
    shape.add_argument(
        "--dtype",
        type=dtypes,
        default={},
        metavar="bf16",
        help="element type of the floating-point arguments, A=bf16,B=fp32 for some of them, or both: "
        "bf16,mask=bool; without the first, arguments that are not named are as the first float that is, "
        "and outputs as the first argument",
    )
    shape.add_argument(
        "--dynamic",
        type=names,
        action="extend",
        default=[],
        metavar="M",
        help="extents that vary from call to call: their values here are capacities",
    )
    shape.add_argument(
        "--target",
        metavar="h200x8",
        help="machine: its GPU, links and, without --world, its number of GPUs",
    )
    how = parser.add_argument_group("how to schedule it")
    how.add_argument(
        "--schedule", metavar="FILE.json|JSON", help="a whole schedule (see docs/language.md)"
    )
    how.add_argument(
        "--tile",
        type=extents,
        action="append",
        default=[],
        metavar="M=128,K=64",
        help="tile lengths",
    )
    how.add_argument(
        "--resource",
        type=resources,
        default={},
        metavar="copy_engine|sm:16|epilogue|none",
        help="what moves the bytes: of every moved tensor, or A=copy_engine,C=epilogue",
    )
    how.add_argument(
        "--emitter",
        choices=("triton", "gluon", "library"),
        help="what launches are emitted as (default: triton)",
    )
    how.add_argument("--workers", type=positive, metavar="P", help="persistent CTAs a rank")


def positive(text: str) -> int:
    """A positive integer."""
    if not (text.isascii() and text.isdecimal()) or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"`{text:.40}` is not a positive integer")
    if len(text) > 18:
        raise argparse.ArgumentTypeError(f"`{text:.40}` is too large")
    return int(text)


def _at_most(most: int, text: str) -> int:
    value = positive(text)
    if value > most:
        raise argparse.ArgumentTypeError(
            f"`{text:.40}` is too large: it is a number from 1 to {most}"
        )
    return value


def world(text: str) -> int:
    """A number of ranks."""
    return _at_most(MAX_WORLD, text)


def seed(text: str) -> int:
    """A number that random generators take."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise argparse.ArgumentTypeError(f"`{text:.40}` is not an integer from 0 to 10^18")
    return int(text)


def extents(text: str) -> dict[str, int]:
    """``M=512,N=256`` as a dict."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise argparse.ArgumentTypeError(f"`{part}` is not NAME=NUMBER")
        if name.strip() in ("WORLD", "RANK"):
            raise argparse.ArgumentTypeError(
                f"`{name.strip()}` is no extent; `--world` gives the ranks"
            )
        found[name.strip()] = _at_most(MAX_EXTENT, value.strip())
    return found


def names(text: str) -> list[str]:
    """``M,N`` as a list."""
    return [part.strip() for part in text.split(",")]


def dtypes(text: str) -> dict[str, str]:
    """``bf16`` as ``{"": "bf16"}``, ``A=bf16,B=fp32`` by name."""
    found = _named(text)
    for value in found.values():
        if value not in DTYPES:
            raise argparse.ArgumentTypeError(f"`{value}` is no type; {choices(value, DTYPES)}")
    return found


def resources(text: str) -> dict[str, str]:
    """``sm:16`` as ``{"": "sm:16"}``, ``A=copy_engine,C=none`` by tensor."""
    from tilelink.schedules import Move, ScheduleError
    from tilelink.schedules.schedule import RESOURCES

    found = _named(text)
    for value in found.values():
        try:
            Move(resource=value)
        except ScheduleError:
            raise argparse.ArgumentTypeError(
                f"`{value}` is no resource; {choices(value, RESOURCES)}"
            ) from None
    return found


def _named(text: str) -> dict[str, str]:
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        found[name.strip() if equals else ""] = (value if equals else name).strip()
    return found


def merged(parts: list[dict[str, int]]) -> dict[str, int]:
    """Several ``--set`` or ``--tile`` options as one; the last one given wins."""
    return {name: value for part in parts for name, value in part.items()}


def schedule_of(args: argparse.Namespace, kernel: Op) -> Schedule:
    """The schedule that the options ask for: ``--schedule`` or the default, then the shorthands.

    Errors: ScheduleError for a bad field, UnknownName for a name the kernel does not have.
    """
    from tilelink.schedules import Schedule, default_schedule

    default = default_schedule(kernel, smaller=args.emitter != "gluon")
    extents = [op.symbol for op in kernel.find("extent")]
    moved = [name for name, _ in default.moves]
    schedule = default
    if args.schedule:
        schedule = Schedule.from_json(read_text(args.schedule))
        check_known("--schedule", "extent", dict(schedule.tiles), extents)
        check_known("--schedule", "moved tensor", [name for name, _ in schedule.moves], moved)
    tiles = merged(args.tile)
    check_known("--tile", "extent", tiles, extents)
    schedule = schedule.with_tiles(**tiles)
    if args.resource:
        check_known("--resource", "moved tensor", [n for n in args.resource if n], moved)
        moves = {name: schedule.move(name) for name in moved}
        for name, resource in args.resource.items():
            for target in [name] if name else moved:
                moves[target] = moves[target].by(resource)
        schedule = replace(schedule, moves=tuple(sorted(moves.items())))
    if args.workers:
        schedule = replace(schedule, workers=args.workers)
    if args.emitter:
        schedule = schedule.with_emitter(args.emitter)
    return schedule


def check_known(option: str, what: str, names: Iterable[str], known: list[str]) -> None:
    """UnknownName for the first of ``names``, which ``option`` gives, that is none of ``known``."""
    for name in names:
        if name not in known:
            advice = choices(name, known)
            raise UnknownName(option=option, what=what, name=name, advice=advice)


def read_text(text_or_path: str) -> str:
    """JSON given on the command line itself, else the content of the file it names."""
    if text_or_path.lstrip().startswith("{"):
        return text_or_path
    return read_file(text_or_path)


def read_file(path: str) -> str:
    """The content of a text file; UnreadableFile where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnreadableFile(path=_shown(path), reason=_reason(error)) from None


def read_input() -> str:
    """Standard input as text; UnreadableFile where it is none."""
    try:
        stream = getattr(sys.stdin, "buffer", None)
        # Of its bytes, since a locale may hide what is not UTF-8.
        return sys.stdin.read() if stream is None else stream.read().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UnreadableFile(path="<stdin>", reason=_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    text = str(error).replace("embedded null byte", "its name has a NUL character in it")
    return error.strerror if isinstance(error, OSError) and error.strerror else text


def _shown(path: str) -> str:
    """A path as errors show it: whole where it is of a sensible length, printable in any case."""
    text = path if len(path) <= 200 else f"{path[:80]}…{path[-40:]}"
    return text.encode("unicode_escape").decode() if not text.isprintable() else text


def add_output(parser: argparse.ArgumentParser) -> None:
    """``-o``, for commands that print one text; see :func:`writing`."""
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="write it there, not to standard output"
    )


def writing(execute: Execute) -> Execute:
    """``execute`` of a command, with what it prints in the file that ``-o`` names, if it names one.

    The file is written when all of it is there: a command that fails leaves it as it was.
    """

    def run(args: argparse.Namespace) -> int:
        if args.output is None:
            return execute(args)
        printed = io.StringIO()
        with redirect_stdout(printed):
            code = execute(args)
        write_file(args.output, printed.getvalue())
        return code

    return run


def write_file(path: str, text: str) -> None:
    """Writes a text file; UnreadableFile where that fails."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnreadableFile(path=path, reason=error.strerror or str(error)) from None
