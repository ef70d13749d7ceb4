"""Workers whose warps have roles: a loader that runs ahead, and groups that store behind it.

Of a task, everything up to its main loop is the loader's, the rest a group's; behind the loop, a sum of parts
that come through TMA and what stands in front of it is the loader's too. The loader goes through
its tasks without waiting for any group, further ahead than a ring of slots would let it; groups that take
turns have every other task each. All of them are agents with clocks of their own, so what one task of a
worker stores is in no order with what its next task loads, unless the program says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tilelink.backend.simulate.memory import Clock
from tilelink.ir import Op

LOADER = 0
_GROUPS = {"turns": 2, "halves": 1}  # two groups with half a tile each store and notify as one
T = TypeVar("T")


def parts_of(agent: Op) -> int:
    """How many agents a worker of a launch is: one, or a loader and its groups."""
    roles = agent.get("roles") if agent.name == "launch" else None
    return 1 if roles is None else 1 + _GROUPS[str(roles)]


def behind(stage: Op) -> frozenset[int]:
    """The identities of the ops of a stage that stand behind what its loader does."""
    loops = [
        n
        for n, op in enumerate(stage.body)
        if any(o.name == "dot" for o in op.walk())
        or (op.name == "load_sum" and op.operands and op.get("via") == "tma")
    ]
    last = loops[-1] if loops else -1
    return frozenset(id(op) for top in stage.body[last + 1 :] for op in top.walk())


def cut(instructions: Sequence[T], epilogue: frozenset[int]) -> int:
    """Where the first instruction of an epilogue stands."""
    for number, instruction in enumerate(instructions):
        if id(getattr(instruction, "op", None)) in epilogue:
            return number
    return len(instructions)


@dataclass(slots=True)
class Handed:
    """What the loader of one worker has passed on: by task its clocks and the values that it loaded."""

    clocks: list[tuple[Clock, Clock | None]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)


_INSIDE = "loader of "


def loader_of(agent: str, worker: int) -> str:
    """What a group waits for, as a blocked task names it."""
    return f"{_INSIDE}@{agent} worker {worker}"


def is_inside(symbol: str) -> bool:
    """Whether a blocked task waits for another part of its own worker, which nothing limits."""
    return symbol.startswith(_INSIDE)
