"""Faults of the compiler in schedules that nobody asked for: told once, since the call goes on without them."""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from pathlib import Path

from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import Op, print_ir
from tilelink.schedules import Schedule

_told: set[tuple[str, str]] = set()


def is_fault(error: Exception) -> bool:
    """Whether an error is of the compiler itself, and no refusal of what it was given."""
    return isinstance(error, InternalError) or not isinstance(error, TilelinkError)


def reason(error: Exception) -> str:
    """An error in one line."""
    text = str(error) if isinstance(error, TilelinkError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0] if text else type(error).__name__


def fault(kernel: Op, schedule: Schedule | None, error: Exception) -> None:
    """Logs a fault with the file that makes it again; the same one of a kernel only once a process."""
    what = reason(error)
    if (kernel.symbol, what) in _told:
        return
    _told.add((kernel.symbol, what))
    try:
        where = str(write_reproducer(kernel, schedule, error))
    except OSError as problem:
        where = f"nowhere ({problem.strerror})"
    logging.getLogger("tilelink").warning(
        "a fault of tilelink, not of your program: a schedule of `%s` is left out, which may cost time: %s; "
        "please report it with %s",
        kernel.symbol,
        what,
        where,
    )


def write_reproducer(kernel: Op, schedule: Schedule | None, error: Exception) -> Path:
    """A file in the temp directory: the kernel as IR text, below its schedule and the traceback."""
    handle, name = tempfile.mkstemp(prefix="tilelink-", suffix=".ir")
    trace = "".join(traceback.format_exception(error))
    lines = [
        "# tilelink reproducer",
        f"# save the next line as s.json: tilelink emit {Path(name).name} --schedule s.json",
        "" if schedule is None else f"# {schedule.to_json()}",
        *(f"# {line}".rstrip() for line in trace.splitlines()),
    ]
    with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as out:
        out.write("\n".join([*lines, "", print_ir(kernel)]))
    return Path(name)
