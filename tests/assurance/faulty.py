"""What is done to a rank of the interpreter, from inside its process; see ``faults_interpreted``."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from tilelink.ir import layout

# In the page that ranks share behind their arenas: word EVENTS + rank counts signals. Instants are float64
# seconds of the monotonic clock, which all processes read alike, at these bytes: WHEN, that of the fault;
# WAITED + 8 * rank, when the rank began the first wait that it left with less than it waited for;
# LEFT + 8 * rank, when it was done with its calls, or knew that it was stopped; BEGAN + 8 * rank, when it
# was about to make the first one.
EVENTS = 128
WHEN = 1024
WAITED = 1536
LEFT = 2560
BEGAN = 3584


def number_of(value: Any) -> int:
    """A scalar of an interpreted kernel, or a constant, as an integer."""
    handle = getattr(value, "handle", None)
    return int(handle.data.flat[0]) if handle is not None else int(getattr(value, "value", value))


def break_rank(shared: Any, fault: str, rank: int, at: int, amount: float) -> Callable[[], None]:
    """Does ``fault`` to ``rank`` at its signal number ``at``; returns what undoes it.

    A signal is a nonzero releasing atomic of a kernel on a flag or a counter, a flag that a stream raises, or the
    words of a tile, which signal themselves.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    from tilelink.backend.runtime import worker
    from tilelink.device import signal as device
    from tilelink.device import words as primitives

    rmw, notify, wait = InterpreterBuilder.create_atomic_rmw, worker.Call.notify, device._wait
    words: Any = primitives
    put, overdue = words.put_places, words.overdue
    page = 2 * shared.world * shared.stride
    count, lock = 0, threading.Lock()

    def stamp(place: int, instant: float) -> None:
        struct.pack_into("<d", shared.map, page + place, instant)

    def is_signal(pointers: Any, mask: Any) -> bool:
        where = pointers.data[mask.data] - shared.base
        words = where % shared.stride // layout.WORD
        return bool(len(words) and ((words >= layout.ACK) & (words < layout.DATA // 4)).all())

    def happens() -> bool:
        """Counts a signal; does what can be done to the whole rank; true if this one is to be lost."""
        nonlocal count
        with lock:
            number, count = count, count + 1
            shared.words[EVENTS + shared.rank] = count
        if shared.rank != rank or number != at:
            return False
        stamp(WHEN, time.monotonic())
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "delay":
            time.sleep(amount)
        elif fault == "corrupt":
            word = shared.word(rank, layout.EPOCH)
            word.value = word.value + int(amount)
        return fault == "lost"

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        # What takes the next tile of a queue is relaxed: it says nothing to anyone.
        tells = value.data.any() and not str(rest[0]).endswith("RELAXED")
        if tells and is_signal(ptr, mask) and happens():
            value.data[...] = 0
            from triton._C.libtriton import ir

            return rmw(self, ir.ATOMIC_OP.ADD, ptr, value, mask, *rest)
        return rmw(self, op, ptr, value, mask, *rest)

    def raise_flag(self: Any, flag: str, index: tuple[int, ...], peer: int) -> None:
        notify(self, flag, index, peer)
        write = self._current.pop()
        self._current.append(lambda: None if happens() else write())

    waited = False

    def wait_and_see(ctx: Any, word: Any, expected: Any, *rest: Any) -> Any:
        nonlocal waited
        began = time.monotonic()
        token = wait(ctx, word, expected, *rest)
        if shared.stopped and not waited:
            seen = shared.word(shared.rank, number_of(word)).value
            if ctypes.c_int32(seen - number_of(expected)).value < 0:
                waited = True
                stamp(WAITED + 8 * shared.rank, began)
        return token

    def put_words(*given: Any) -> Any:
        return None if happens() else put(*given)

    polled = 0.0

    def look_and_see(ctx: Any, polls: Any, *rest: Any) -> Any:
        nonlocal waited, polled
        if not number_of(polls):
            polled = time.monotonic()
        found = overdue(ctx, polls, *rest)
        if not number_of(found[0]) and not waited:
            waited = True
            stamp(WAITED + 8 * shared.rank, polled)
        return found

    words.put_places, words.overdue = put_words, look_and_see
    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    worker.Call.notify = raise_flag  # type: ignore[method-assign]
    device._wait = wait_and_see
    stamp(BEGAN + 8 * shared.rank, time.monotonic())

    def undo() -> None:
        stamp(LEFT + 8 * shared.rank, time.monotonic())
        device._wait = wait
        words.put_places, words.overdue = put, overdue
        InterpreterBuilder.create_atomic_rmw = rmw
        worker.Call.notify = notify  # type: ignore[method-assign]

    return undo
