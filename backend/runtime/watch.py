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
    CallsDiffer,
    EpochOverwritten,
    ExtentsDiffer,
    PeerLost,
    PeerTimeout,
    WaitTimeout,
)
from tilelink.backend.runtime.groups import found
from tilelink.backend.runtime.image import Image, Wait
from tilelink.ir import layout

# Words of an error record; see ``tilelink.device.signal``.
WRITTEN, RANK, WORKER, TILE, WORD, EXPECTED, SEEN, PRODUCER, NUMBER, KIND, PROGRAM, EPOCH = range(
    12
)
# Kinds of a record: its producer had started the call, it had not, the host saw it die; or no wait ran
# out at all, but the rank's epoch is not what it was.
# Or the ranks called different programs, or one with different values of a dynamic extent.
PROGRESS, ARRIVAL, DEATH, OVERWRITTEN, DIFFERENT = 1, 2, 3, 4, 5
PERIOD = 0.25  # seconds between two rounds of the watchdog


def timeout_error(
    image: Image,
    record: Sequence[int],
    limit: float,
    rank: int | None = None,
    programs: Sequence[Image] = (),
) -> WaitTimeout:
    """The error that a record stands for.

    ``limit``: the time limit in seconds that ran out. ``rank``: the rank that reads it; a record that
    was never written there means that another rank told it to stop. ``programs``: of the group, by number.
    """
    if not record[WRITTEN]:
        return PeerTimeout(
            rank=rank, why=f"another rank of `{image.name}` ran into a time-out or gave up"
        )
    if record[KIND] == DIFFERENT:
        return _differing(image, record, programs)
    wait = _wait_of(image, record)
    why = {
        ARRIVAL: f"it has not started the call within {limit:g} s",
        DEATH: "its process has ended",
    }.get(record[KIND], f"it has started the call but sent nothing more for {limit:g} s")
    kinds = {DEATH: PeerLost, OVERWRITTEN: EpochOverwritten}
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
    )


def _differing(image: Image, record: Sequence[int], programs: Sequence[Image]) -> WaitTimeout:
    """That two ranks have begun one call as different ones; see ``tilelink.device.program.compare_calls``."""
    (program, here), (other, there) = (
        divmod(number % (1 << 32), layout.NUMBERED) for number in (record[EXPECTED], record[SEEN])
    )
    rank, producer = record[RANK], record[PRODUCER]
    if program == other:
        return ExtentsDiffer(
            rank=rank,
            producer=producer,
            kernel=image.name,
            extent=", ".join(image.dynamic),
            expected=here,
            seen=there,
        )
    mine, theirs = (_described(number, programs) for number in (program, other))
    return CallsDiffer(rank=rank, producer=producer, mine=mine, theirs=theirs)


def _described(number: int, programs: Sequence[Image]) -> str:
    """The program of a ``number`` with the shapes of its tensors."""
    if not 0 < number <= len(programs):
        return f"program {number}"
    image = programs[number - 1]
    dims = ", ".join(f"{s.name} {list(s.dims)}" for s in image.tensors.values() if s.role != "temp")
    return f"`{image.name}` of {dims} (program {number})"


def other_call(
    words: Sequence[int], rank: int, world: int, record: Sequence[int]
) -> list[int] | None:
    """The ``record`` of a wait that ran out, as that of ranks which call differently where they do.

    ``words``: the control words of the arena of ``rank``, which left the record.
    """
    epoch = record[EPOCH]
    numbers: dict[int, int] = {}
    for peer in range(world):
        at = layout.SAID + 2 * ((epoch & 1) * layout.MAX_WORLD + peer)
        number, began = words[at], words[at + 1]
        if began == epoch:
            numbers[peer] = number
    mine = numbers.get(rank)
    other = next((p for p, number in numbers.items() if number != mine), None)
    if mine is None or other is None:
        return None
    found = list(record)
    found[EXPECTED], found[SEEN], found[PRODUCER], found[KIND] = (
        mine,
        numbers[other],
        other,
        DIFFERENT,
    )
    return found


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

    def destroyed(self) -> bool:
        """Whether its group is no more, and nobody can call it."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_lock = threading.Lock()
_tending = threading.Lock()
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


def unwatch(thing: Watched) -> None:
    """Has nobody look at ``thing`` any more once this returns."""
    with _tending, _lock:
        _watched.discard(thing)


def _all() -> list[Watched]:
    """What is watched. Ranks of a group that was destroyed come to their ends as they please."""
    with _lock:
        for thing in [thing for thing in _watched if thing.destroyed()]:
            _watched.discard(thing)
            found.clear()
        return sorted(_watched, key=id)


def _forget() -> None:
    global _thread, _tending
    _thread, _tending = None, threading.Lock()


# A forked process has no threads but the one that forked.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# Before devices and stores are taken down.
atexit.register(_ending.set)


def _run() -> None:
    told: set[str] = set()
    while not _ending.wait(PERIOD):
        with _tending:
            _tend(told)


def _tend(told: set[str]) -> None:
    """One round of the watchdog, which holds nothing between them: what goes does so on another thread."""
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

    from tilelink.backend.runtime.release import sweep

    for thing in _all():
        thing.settle()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    sweep()
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
