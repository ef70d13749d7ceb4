"""The host side of a time-out: reads the record that a kernel left and raises it by name."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from tilelink.backend.runtime.errors import (
    EpochOverwritten,
    ExtentsDiffer,
    PeerLost,
    PeerTimeout,
    WaitTimeout,
)
from tilelink.backend.runtime.image import Image, Wait

# Words of an error record; see ``tilelink.device.signal``.
WRITTEN, RANK, WORKER, TILE, WORD, EXPECTED, SEEN, PRODUCER, NUMBER, KIND, PROGRAM, EPOCH = range(
    12
)
# Kinds of a record: its producer had started the call, it had not, the host saw it die; or no wait ran
# out at all, but the rank's epoch is not what it was.
# Or the ranks called with different values of a dynamic extent.
PROGRESS, ARRIVAL, DEATH, OVERWRITTEN, DIFFERENT = 1, 2, 3, 4, 5
PERIOD = 0.25  # seconds between two rounds of the watchdog


def timeout_error(
    image: Image, record: Sequence[int], limit: float, rank: int | None = None
) -> WaitTimeout:
    """The error that a record stands for.

    ``limit``: the time limit in seconds that ran out. ``rank``: the rank that reads it; a record that
    was never written there means that another rank told it to stop.
    """
    if not record[WRITTEN]:
        return PeerTimeout(
            rank=rank, why=f"another rank of `{image.name}` ran into a time-out or gave up"
        )
    wait = _wait_of(image, record)
    why = {
        ARRIVAL: f"it has not started the call within {limit:g} s",
        DEATH: "its process has ended",
    }.get(record[KIND], f"it has started the call but sent nothing more for {limit:g} s")
    kinds = {DEATH: PeerLost, OVERWRITTEN: EpochOverwritten, DIFFERENT: ExtentsDiffer}
    kind = kinds.get(record[KIND], WaitTimeout)
    return kind(
        wait.span if wait else None,
        rank=record[RANK],
        worker=record[WORKER],
        tile=record[TILE],
        channel=image.describe_word(record[WORD]),
        expected=record[EXPECTED],
        seen=record[SEEN],
        producer=record[PRODUCER],
        limit=limit,
        why=why,
        kernel=image.name,
        call=record[EPOCH] if len(record) > EPOCH else 0,
        extent=", ".join(image.dynamic),
    )


def _wait_of(image: Image, record: Sequence[int]) -> Wait | None:
    """The wait that left a record: by its number, if that one is on this flag."""
    channel = image.describe_word(record[WORD])
    if not channel.startswith("@"):
        return None
    number = record[NUMBER]
    if 0 <= number < len(image.waits) and channel.startswith(f"@{image.waits[number].symbol}["):
        return image.waits[number]
    return image.wait_for(record[WORD])


class Watched(Protocol):
    """Something that may have timed out since it was last asked."""

    def check(self) -> None:
        """Raises WaitTimeout if it has."""

    def tend(self) -> None:
        """Looks whether a call must be stopped; called by the watchdog."""

    def settle(self) -> None:
        """Waits until its calls have ended, or raises WaitTimeout."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None
_ending = threading.Event()


def watch(thing: Watched) -> None:
    """Has the watchdog, :func:`check_all` and :func:`synchronize` look at ``thing`` while it lives."""
    global _thread
    with _lock:
        _watched.add(thing)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="tilelink-watchdog", daemon=True)
            _thread.start()


def _all() -> list[Watched]:
    with _lock:
        return sorted(_watched, key=id)


def _forget() -> None:
    global _thread
    _thread = None


# A forked process has no threads but the one that forked.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# Before devices and stores are taken down.
atexit.register(_ending.set)


def _run() -> None:
    told: set[str] = set()
    while not _ending.wait(PERIOD):
        for thing in _all():
            try:
                thing.tend()
            except Exception as problem:
                # Once each: a process that ends takes its devices and stores away under this thread.
                if str(problem) not in told:
                    told.add(str(problem))
                    logging.getLogger("tilelink").warning("watchdog: %s", problem)


def check_all() -> None:
    """Raises the WaitTimeout of a call that has run into one, graph replays included."""
    for thing in _all():
        thing.check()


def synchronize() -> None:
    """Waits for the work of the current device, then raises WaitTimeout if a fused call timed out.

    To be used where ``torch.cuda.synchronize()`` would be; without a GPU it only checks. A fused call
    that a stopped group leaves stuck behind other work of its stream is an error, not a wait.
    """
    import torch

    for thing in _all():
        thing.settle()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    check_all()


class HostRecord:
    """Pinned host memory that a kernel copies the error record to, read without touching the GPU.

    ``words``: all of it; see :attr:`aborted` and :attr:`record`.
    """

    def __init__(self, address: int, words: int) -> None:
        self.words = (ctypes.c_int32 * words).from_address(address)

    @property
    def aborted(self) -> bool:
        """Whether a call has been aborted: word 0."""
        return self.words[0] != 0

    @property
    def record(self) -> list[int]:
        """The error record, behind word 0."""
        return list(self.words[1:])

    def clear(self) -> None:
        """Forgets that a call was aborted; a later one that is says so again."""
        self.words[0] = 0
