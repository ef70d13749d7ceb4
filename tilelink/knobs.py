"""Settings from the environment, all of them: name, type, default and meaning in one table.

A knob is read each time it is asked for, so a test or a program may set it after import; its meaning says
so where what was read is kept. ``docs()`` renders the table that the documentation and ``tilelink env`` show.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from tilelink.errors import TilelinkError

T = TypeVar("T")


class BadKnob(TilelinkError):
    """An environment variable whose text is not of the knob's type."""

    code: ClassVar[str] = "bad-knob"
    message: ClassVar[str] = "{name}={text} is not {what}"
    hint: ClassVar[str] = "{meaning}; unset it for the default, {default}"


@dataclass(frozen=True, slots=True)
class Knob(Generic[T]):
    """One setting: ``get()`` is the value of the environment variable ``name``, or the default."""

    name: str
    default: T
    what: str
    meaning: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """The value now; BadKnob where the variable holds something else than ``what``."""
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise BadKnob(
                name=self.name,
                text=text,
                what=self.what,
                meaning=self.meaning,
                default=self.default,
            ) from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache")) / "tilelink"


TIMEOUT = Knob(
    "TILELINK_TIMEOUT",
    10.0,
    "a number of seconds",
    "how long a wait may go on once its producer has started the call; read before the first call of a program in "
    "a group, for all of them",
    _seconds,
)
ARRIVAL_TIMEOUT = Knob(
    "TILELINK_ARRIVAL_TIMEOUT",
    600.0,
    "a number of seconds",
    "how long a rank waits for another one to start the call, read as the one above, or to agree to a program, "
    "read each time",
    _seconds,
)
CACHE = Knob(
    "TILELINK_CACHE",
    _folder(),
    "a folder",
    "where emitted modules are written before they are loaded; nobody else should be able to write there",
    Path,
)
ARENA_MB = Knob(
    "TILELINK_ARENA_MB",
    64,
    "a number of MiB",
    "the smallest arena that is allocated for a process group; larger programs get larger ones",
    _count,
)
GRAPHS = Knob(
    "TILELINK_GRAPHS",
    True,
    "0 or 1",
    "whether calls that repeat with the same tensors are enqueued as one CUDA graph each",
    _switch,
)
READ_BEHIND = Knob(
    "TILELINK_READ_BEHIND",
    True,
    "0 or 1",
    "whether kernels read on behind the rows of an input, within its allocation, where a tile has more rows; read "
    "when a call has tensors that no call had before",
    _switch,
)
TUNED = Knob(
    "TILELINK_TUNED",
    True,
    "0 or 1",
    "on GPUs, a call without a schedule takes a tuned or predicted one; 0: the default schedule",
    _switch,
)
DEBUG = Knob("TILELINK_DEBUG", False, "0 or 1", "shows the Python traceback of an error", _switch)

KNOBS: tuple[Knob[float] | Knob[int] | Knob[Path] | Knob[bool], ...] = (
    TIMEOUT,
    ARRIVAL_TIMEOUT,
    CACHE,
    ARENA_MB,
    GRAPHS,
    READ_BEHIND,
    TUNED,
    DEBUG,
)


def docs() -> str:
    """The knobs as a Markdown table."""
    # Of this folder, what does not depend on the user.
    folder = (
        "`$XDG_CACHE_HOME/tilelink` or `~/.cache/tilelink`; where that cannot be written, a temporary folder of "
        "the process"
    )
    rows = [f"| `{k.name}` | {folder if k is CACHE else k.default} | {k.meaning} |" for k in KNOBS]
    return "\n".join(("| variable | default | meaning |", "| --- | --- | --- |", *rows))
