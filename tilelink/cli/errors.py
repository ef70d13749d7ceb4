"""Mistakes on the command line, one class each. :class:`BadUsage` ends with exit code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import ClassVar

from tilelink import knobs
from tilelink.errors import TilelinkError
from tilelink.schedules import ScheduleError


class BadUsage(TilelinkError):
    """Base of the mistakes that lie in how a command was called, not in the program it was given."""

    code: ClassVar[str] = "usage"


class UnreadableFile(BadUsage):
    """A FILE, or a file named by an option, that cannot be read or written."""

    code: ClassVar[str] = "file"
    message: ClassVar[str] = "cannot open `{path}`: {reason}"


class NoFile(BadUsage):
    """A FILE argument with a part left out: the path, or the kernel behind ``::``."""

    code: ClassVar[str] = "no-file"
    message: ClassVar[str] = "`{given}` is no FILE and no FILE::kernel"
    hint: ClassVar[str] = "give a path, `-`, or a path with `::` and the name of a kernel in it"


class TooLarge(TilelinkError):
    """A program with more tiles, or deeper nesting, than this machine can work on."""

    code: ClassVar[str] = "too-large"
    message: ClassVar[str] = "{what}"
    hint: ClassVar[str] = "{advice}"


class NoKernel(BadUsage):
    """A FILE with no kernel in it, or without the one that ``::kernel`` names."""

    code: ClassVar[str] = "no-such-kernel"
    message: ClassVar[str] = "there is no kernel {wanted} in `{path}`"
    hint: ClassVar[str] = "{advice}"


class MissingExtents(BadUsage):
    """A kernel in Python with neither an example nor a ``--set`` for some extent."""

    code: ClassVar[str] = "missing-extents"
    message: ClassVar[str] = "the value of {names} of kernel `{kernel}` is not known"
    hint: ClassVar[str] = (
        "give it with `--set {first}=512`, or put example=dict({first}=512) on the kernel"
    )


class UnknownName(BadUsage):
    """An option that names an extent, tensor, pass or target that does not exist."""

    code: ClassVar[str] = "unknown-name"
    message: ClassVar[str] = "{option}: there is no {what} `{name}`"
    hint: ClassVar[str] = "{advice}"


class FusedIsFixed(BadUsage):
    """An option that would change a program which is already fused."""

    code: ClassVar[str] = "fused-program"
    message: ClassVar[str] = "{option} does not apply: `{path}` holds a fused program"
    hint: ClassVar[str] = "give the kernel instead; world, extents and schedule are settled here"


class FusedOnly(BadUsage):
    """A command that needs the kernel, given the fused program alone."""

    code: ClassVar[str] = "needs-kernel"
    message: ClassVar[str] = "`{command}` needs the kernel, and `{path}` holds a fused program"
    hint: ClassVar[str] = "give the Python file or the kernel's IR"


class BadWorld(BadUsage):
    """A world that is not the number of processes."""

    code: ClassVar[str] = "world"
    message: ClassVar[str] = "--world {asked}, but torchrun started {world} processes"


class Unavailable(TilelinkError):
    """Something the command needs is not on this machine."""

    code: ClassVar[str] = "unavailable"
    message: ClassVar[str] = "{what} is not available: {reason}"
    hint: ClassVar[str] = "`tilelink env` lists what each backend needs"


class IntactFails(TilelinkError):
    """A program in which the simulator finds a mistake before one has been made."""

    code: ClassVar[str] = "intact-fails"
    message: ClassVar[str] = "`{name}` is not sound as it is: the simulator's {oracle} objects"
    hint: ClassVar[str] = "`tilelink run FILE` shows the mistake; break a program that has none"


class SimulatedOnly(BadUsage):
    """Several calls or schedules asked of a backend that makes one run."""

    code: ClassVar[str] = "simulated-only"
    message: ClassVar[str] = "--calls and --schedules cannot be given to the backend {backend}"
    hint: ClassVar[str] = "only the simulator chooses the schedule, and runs calls on one arena"


def report(failures: Sequence[TilelinkError]) -> int:
    """Prints the errors of the kernels of a FILE on standard error, those that say the same once.

    The exit code they stand for, as of a single one: 2 where all lie in how the command was called.
    """
    sys.stdout.flush()
    shown: dict[str, TilelinkError] = {}
    for failure in failures:
        shown.setdefault(str(failure), failure)
    for text, failure in shown.items():
        if knobs.DEBUG.get():
            traceback.print_exception(failure)
        print(text, file=sys.stderr)
    usage = all(isinstance(error, BadUsage | ScheduleError) for error in failures)
    return 0 if not failures else 2 if usage else 1
