"""The host side of a time-out: reads the record that a kernel left and raises it by name."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Protocol

from tilelink.backend.runtime.errors import PeerTimeout, WaitTimeout
from tilelink.backend.runtime.image import Image

# Words of an error record; see ``tilelink.device.signal``.
WRITTEN, RANK, WORKER, TILE, WORD, EXPECTED, SEEN, PRODUCER, NUMBER, KIND = range(10)
ARRIVAL = 2  # kind of a record whose producer had not started the call


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
    arrived = record[KIND] != ARRIVAL
    span = None
    if image.describe_word(record[WORD]).startswith("@"):
        wait = image.wait_for(record[WORD])
        span = wait.span if wait else None
    why = (
        f"it has started the call but sent nothing more for {limit:g} s"
        if arrived
        else f"it has not started the call within {limit:g} s"
    )
    return WaitTimeout(
        span,
        rank=record[RANK],
        worker=record[WORKER],
        tile=record[TILE],
        channel=image.describe_word(record[WORD]),
        expected=record[EXPECTED],
        seen=record[SEEN],
        producer=record[PRODUCER],
        limit=limit,
        why=why,
    )


class Watched(Protocol):
    """Something that may have timed out since it was last asked."""

    def check(self) -> None:
        """Raises WaitTimeout if it has."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()


def watch(thing: Watched) -> None:
    """Has every :func:`check_all` and :func:`synchronize` look at ``thing`` as long as it lives."""
    _watched.add(thing)


def check_all() -> None:
    """Raises the WaitTimeout of a call that has run into one, graph replays included."""
    for thing in sorted(_watched, key=id):
        thing.check()


def synchronize() -> None:
    """Waits for the work of the current device, then raises WaitTimeout if a fused call timed out.

    To be used where ``torch.cuda.synchronize()`` would be; without a GPU it only checks.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    check_all()


class HostRecord:
    """Pinned host memory that a kernel copies the error record to; read without touching the GPU."""

    def __init__(self, address: int, words: int) -> None:
        self._words = (ctypes.c_int32 * words).from_address(address)

    @property
    def aborted(self) -> bool:
        """Whether a call has been aborted: word 0."""
        return self._words[0] != 0

    @property
    def record(self) -> list[int]:
        """The error record, behind word 0."""
        return list(self._words[1:])
