"""reuse: the next call writes nothing that this call still reads or writes, on any rank."""

from __future__ import annotations

from tilelink.backend.expand_rows import Expansion
from tilelink.backend.verify.cover import channels, proxies, weak, where
from tilelink.backend.verify.errors import ReuseError
from tilelink.backend.verify.memory import Meeting, across
from tilelink.backend.verify.order import Order


def check_reuse(out: Expansion, order: Order, meeting: Meeting) -> None:
    """Raise ReuseError for a pair of accesses of two consecutive calls in no order."""
    pair = across(order, meeting)
    if pair is None:
        return
    first, second = pair
    late = meeting.access(second)[0]
    early = meeting.access(first)[0]
    blamed = late if late.write else early
    raise ReuseError(
        blamed.op.span,
        symbol=meeting.symbol,
        notes=(
            f"this call: {where(out, meeting, first)}",
            f"the next call: {where(out, meeting, second)}",
            "no chain of notifies and waits leads from the first to the second",
            f"behind the first, its task notifies {channels(order, meeting, first, waits=False)}",
            f"before the second, its task waits for {channels(order, meeting, second, waits=True)}",
            *proxies(meeting, first, second),
            *weak(order.words),
        ),
    )
