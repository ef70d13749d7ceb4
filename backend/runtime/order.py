"""The order of fused calls on one device: one at a time, on whatever threads and streams."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from tilelink.backend.runtime import release
from tilelink.backend.runtime.driver import driver


class Marked(Protocol):
    """A process group whose calls leave an event behind them."""

    def mark(self, stream: int) -> int | None:
        """An event behind its last call, which is on ``stream``, or None where none can be told."""


class Order:
    """Of one device: who has its turn, and what its last call was.

    Two fused programs that ran at once could each hold the SMs that the other one waits for, and they share epochs
    and counters. Replays of captured graphs cannot be seen here; they are ordered by the stream that they are
    replayed on.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.stream: int | None = None  # the handle of the last call's
        self.last: Marked | None = None

    def follow(self, stream: int) -> None:
        """The next call, on ``stream``, comes behind the last one, on another stream; by who has the turn."""
        if self.last is not None and self.stream is not None:
            event = self.last.mark(self.stream)
            if event is not None:
                driver().wait_event(stream, event)


_orders: dict[Any, Order] = {}


def order_of(device: Any) -> Order:
    """The order of calls on the device of this number."""
    return _orders.setdefault(device, Order())


def _forget(state: Any) -> None:
    # Its calls have ended, so the next one need not follow any.
    for order in _orders.values():
        with order.turn:
            if order.last is state:
                order.stream = order.last = None


release.forgetting.append(_forget)
