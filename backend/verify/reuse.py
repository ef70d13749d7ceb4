"""reuse: the next call writes nothing that this call still reads or writes, on any rank.

In a program with slots, what peers write lies in another place in the next call: there it is the call after
that which comes to the same place.
"""

from __future__ import annotations

from tilelink.backend.expand_rows import Expansion
from tilelink.backend.verify.cover import channels, proxies, weak, where
from tilelink.backend.verify.errors import ReuseError
from tilelink.backend.verify.memory import Meeting, across
from tilelink.backend.verify.order import Order


def slotted(out: Expansion, symbol: str) -> bool:
    """Whether odd and even calls have places of their own for ``symbol``."""
    shared = out.declarations[symbol]
    mine = shared.name == "flag" or (shared.name == "buffer" and shared.get("space") != "local")
    return mine and out.program.get("slots") is not None


def check_reuse(out: Expansion, order: Order, meeting: Meeting) -> None:
    """Raise ReuseError for a pair of accesses of two calls that use the same place, in no order."""
    apart = 2 if slotted(out, meeting.symbol) else 1
    pair = across(order, meeting, apart)
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
            f"{'the next call' if apart == 1 else 'two calls later'}: {where(out, meeting, second)}",
            "no chain of notifies and waits leads from the first to the second",
            f"behind the first, its task notifies {channels(order, meeting, first, waits=False)}",
            f"before the second, its task waits for {channels(order, meeting, second, waits=True)}",
            *proxies(meeting, first, second),
            *weak(order.words),
        ),
    )
