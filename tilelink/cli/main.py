"""``tilelink COMMAND …``: the parser, the exit code, and the one place where errors are printed."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tilelink import __version__, knobs
from tilelink.cli import check, emit, env, graph, ir, mutate, report, run, simulate, tune
from tilelink.cli.errors import BadUsage, TooLarge
from tilelink.cli.source import is_ir
from tilelink.errors import InternalError, TilelinkError, did_you_mean
from tilelink.schedules import ScheduleError

COMMANDS = (run, check, ir, graph, emit, simulate, report, tune, mutate, env)

DESCRIPTION = "A compiler for GPU kernels that compute and communicate at once."
EPILOG = """\
exit code: 0 fine, 1 the program is refused or its result is wrong, 2 bad usage.
TILELINK_DEBUG=1 shows the Python traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace()
    try:
        _, unknown = parser().parse_known_args(arguments, args)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        code: int = args.execute(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # how argparse ends, for --help and for what it refuses
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # The reader (`head`, `less`) has left: whatever is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except MemoryError as error:
        what = f"this does not fit into the memory of this machine: {error}".rstrip(": ")
        return fail(
            TooLarge(what=what, advice="try smaller extents or larger tiles"), arguments, args
        )
    except RecursionError:
        what = f"`{getattr(args, 'file', '')}` is nested too deep"
        return fail(TooLarge(what=what, advice="write shorter expressions"), arguments, args)
    except Exception as error:
        return fail(error, arguments, args)


class Parser(argparse.ArgumentParser):
    """A parser whose errors say what may have been meant by a word that it does not know."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and ``message``, and exits with 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        option = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        meant = ""
        if choice is not None:
            meant = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif option is not None:
            meant = did_you_mean(option[1], re.findall(r"--[\w-]+", self.format_help()))
        super().error(f"{message}; {meant}" if meant else message)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command module adds its own part."""
    top = Parser(
        prog="tilelink",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tilelink {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    for part in commands.choices.values():
        part.set_defaults(parser=part)
    return top


def fail(error: Exception, arguments: Sequence[str], args: argparse.Namespace) -> int:
    """Prints ``error`` on standard error and returns the exit code it stands for."""
    sys.stdout.flush()
    if knobs.DEBUG.get():
        traceback.print_exception(error)
    if isinstance(error, TilelinkError) and not isinstance(error, InternalError):
        print(error, file=sys.stderr)
        return 2 if isinstance(error, BadUsage | ScheduleError) else 1
    if not isinstance(error, InternalError):
        internal = InternalError(detail=f"{type(error).__name__}: {error}".rstrip(": "))
        internal.__cause__ = error
        error = internal
    print(error, file=sys.stderr)
    try:
        where = write_reproducer(error, arguments, args)
    except OSError as problem:
        print(f"  = note: no reproducer could be written: {problem.strerror}", file=sys.stderr)
    else:
        print(f"  = note: a reproducer was written to {where}", file=sys.stderr)
    return 1


def write_reproducer(error: Exception, arguments: Sequence[str], args: argparse.Namespace) -> Path:
    """A file in the temp directory with the command, the versions, the traceback and the input."""
    from tilelink.cli.env import versions

    named = ", ".join(f"{name} {version}" for name, version in versions())
    lines = [
        "# tilelink reproducer",
        f"# command: tilelink {' '.join(arguments)}",
        f"# python {platform.python_version()}, {named}",
    ]
    trace = "".join(traceback.format_exception(error))
    lines += [f"# {line}".rstrip() for line in trace.splitlines()]
    text = getattr(args, "text", "")  # absent where no FILE was read
    suffix = ".ir" if text and is_ir(args.file, text) else ".py"
    handle, name = tempfile.mkstemp(prefix="tilelink-", suffix=suffix)
    with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as out:
        out.write("\n".join([*lines, "", text]))
    return Path(name)
