"""Balance at exit: every notify is consumed, every count is met, nothing is held back or lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tilelink.backend.simulate.errors import BalanceError
from tilelink.backend.simulate.execute import Task
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.memory import Memory


def check_held(task: Task) -> None:
    """BalanceError where a worker leaves its launch with a notify that it holds back."""
    if task.held:
        _, ins = task.held[0]
        raise BalanceError(
            ins.op.span,
            channel=f"{ins.symbol}",
            rank=task.rank,
            detail=f"{len(task.held)} notifies held back by {task.describe(ins.place)} are lost",
        )


def check_counters(geometry: Geometry, memory: Memory, counters: Iterable[str]) -> None:
    """BalanceError where one of the counters of a rank ends a call at another value than its waits expect."""
    for name in counters:
        channel = memory.channels[name]
        if channel.notified == channel.asked:
            continue
        for element in sorted(channel.notified.keys() | channel.asked.keys()):
            seen, asked = channel.notified.get(element, 0), channel.asked.get(element)
            if seen != asked:
                raise _unbalanced(
                    geometry,
                    name,
                    element,
                    memory.rank,
                    f"counted to {seen}, but nothing waits for it"
                    if asked is None
                    else f"counted to {seen} where {asked} are expected",
                )


def check_flags(geometry: Geometry, memories: list[Memory]) -> None:
    """BalanceError where a flag was set to an epoch that no wait asks for, or twice to one epoch."""
    slack = geometry.slack
    for memory in memories:
        for name, call in itertools.product(sorted(geometry.decls), (0, 1)):
            place = geometry.slot(name, call)
            if geometry.decls[name].kind != "flag" or (call and place == name):
                continue
            channel = memory.channels[place]
            for element, seen in sorted(channel.notified.items()):
                asked = channel.asked.get(element)
                if asked is None or asked + slack.get(name, 0) < seen:
                    detail = "notified, but nothing waits for it"
                    raise _unbalanced(geometry, name, element, memory.rank, detail)
                if element in channel.twice:
                    raise _unbalanced(
                        geometry, name, element, memory.rank, "notified twice in one call"
                    )


def _unbalanced(
    geometry: Geometry, name: str, element: int, rank: int, detail: str
) -> BalanceError:
    channel = geometry.channel(name, element)
    span = geometry.decls[name].op.span
    return BalanceError(span, channel=channel, rank=rank, detail=detail)
