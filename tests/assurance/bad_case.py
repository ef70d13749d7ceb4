"""What a case of bad input is, and how one is run: it must end in a typed error that names the fault."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tilelink.cli.main import main
from tilelink.errors import InternalError, TilelinkError

ROOT = Path(__file__).parents[2]
LIMIT_S = 20.0  # seconds for one case; imports of torch and triton included
_FRAMES = ("Traceback", 'File "', "site-packages", "error[internal]")


@dataclass(frozen=True, slots=True)
class Command:
    """``tilelink ARGUMENTS`` in a folder with ``files``; refused with exit code ``code``.

    ``words`` must all stand in what it writes on standard error. ``process``: as a program of its own.
    """

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    code: int = 1
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    given: str | bytes = ""
    process: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A function that must raise a TilelinkError whose text holds all ``words``."""

    name: str
    function: Callable[[], Any]
    words: tuple[str, ...]


Case = Command | Call


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case. ``fault`` is empty where it ended as it must."""

    text: str
    fault: str
    hang: bool = False
    traceback: bool = False
    seconds: float = 0.0


class TooLong(BaseException):
    """The time limit of a case has passed; no handler of the code under test may catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block once ``seconds`` have passed; main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(case: Case, limit: float = LIMIT_S) -> Outcome:
    """Runs one case in a folder of its own."""
    start = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bad-input-") as folder,
            contextlib.chdir(folder),
            time_limit(limit),
        ):
            text, fault = _command(case) if isinstance(case, Command) else _call(case)
    except TooLong:
        return Outcome("", f"no answer within {limit:g} s", hang=True)
    seconds = time.monotonic() - start
    shown = next((mark for mark in _FRAMES if mark in text), None)
    if shown is not None:
        return Outcome(text, f"`{shown}` in the text", traceback=True, seconds=seconds)
    missing = [word for word in case.words if word not in text]
    if not fault and missing:
        fault = f"the text lacks {missing}"
    return Outcome(text, fault, seconds=seconds)


def _call(case: Call) -> tuple[str, str]:
    try:
        result = case.function()
    except InternalError as error:
        return str(error), "an internal error"
    except TilelinkError as error:
        frames = "".join(traceback.format_exception(error))
        inner = [line for line in frames.splitlines() if "/frontend/" in line]
        return str(error), f"a compiler frame: {inner[0].strip()}" if inner else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}", "an error that is not typed"
    return repr(result)[:200], "accepted"


def _command(case: Command) -> tuple[str, str]:
    for name, content in case.files.items():
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data)
    code, text = _as_process(case) if case.process else _in_process(case)
    return text, "" if code == case.code else f"exit code {code} instead of {case.code}"


def _in_process(case: Command) -> tuple[int, str]:
    data = case.given if isinstance(case.given, bytes) else case.given.encode()
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    output, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        unittest.mock.patch("sys.stdin", stdin),
    ):
        code = main(case.arguments)
    return code, errors.getvalue()


def _as_process(case: Command) -> tuple[int, str]:
    data = case.given if isinstance(case.given, bytes) else case.given.encode()
    done = subprocess.run(
        [sys.executable, "-m", "tilelink", *case.arguments],
        input=data,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LIMIT_S,
    )
    return done.returncode, done.stderr.decode(errors="replace")
