"""Workers whose warps have roles: a loader that runs ahead, and groups that store behind it.

Of a task, everything up to its main loop, or up to the load of what it copies, is the loader's, the rest a
group's; behind the loop, a sum of parts that come through TMA and what stands in front of it is the loader's too,
or, where these parts land in a ring of their own, a fetcher's. Loader and fetcher go through their tasks without
waiting for any group, further ahead than a ring of slots would let them; groups that take turns have every other
task each. Tasks of a dynamic queue are drawn by the loader, and the others follow it. All of them are agents with
clocks of their own, so what one task of a worker stores is in no order with what its next task loads, unless the
program says so; nor is what a fetcher reads with what the loader of its worker has waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tilelink.backend.copying import copies_of
from tilelink.backend.simulate.memory import Clock
from tilelink.ir import Op

LOADER, FETCHER = 0, 1
_GROUPS = {"turns": 2, "halves": 1}  # two groups with half a tile each store and notify as one
T = TypeVar("T")


def parts_of(agent: Op) -> int:
    """How many agents a worker of a launch is: one, or a loader, maybe a fetcher, and its groups."""
    roles = agent.get("roles") if agent.name == "launch" else None
    return 1 if roles is None else loading_of(agent) + _GROUPS[str(roles)]


def loading_of(launch: Op) -> int:
    """How many of the agents of a worker load, of a launch with roles: they come first."""
    return FETCHER + 1 if launch.get("landing") is not None else LOADER + 1


def loading_in(launch: Op, stage: Op) -> int:
    """How many of the roles that load have a share of the tasks of ``stage``: a fetcher has none of copies."""
    return LOADER + 1 if copies_of(stage) else loading_of(launch)


@dataclass(frozen=True, slots=True)
class Share:
    """What one role does of a task: from the first op of ``since`` on, up to the first op of ``until``.

    Both are identities of ops; None: the task's start, its end.
    """

    since: frozenset[int] | None
    until: frozenset[int] | None

    def of(self, instructions: Sequence[T]) -> Sequence[T]:
        """Of the instructions of a task those of this role."""
        first = 0 if self.since is None else _first(instructions, self.since)
        end = len(instructions) if self.until is None else _first(instructions, self.until)
        return instructions[first:end]

    def within(self, stage: Op) -> tuple[Op, ...]:
        """Of the ops of a stage those of this role."""
        since = frozenset(map(id, stage.body)) if self.since is None else self.since
        until = frozenset[int]() if self.until is None else self.until
        return tuple(op for op in stage.body if id(op) in since and id(op) not in until)


def shares_of(launch: Op, stage: Op) -> list[Share]:
    """What the roles that load, and behind them a group, do of each task of a stage."""
    loop = sums = -1
    copies = bool(copies_of(stage))
    for number, op in enumerate(stage.body):
        if any(o.name == "dot" for o in op.walk()) or (copies and op.name == "load"):
            loop = number
        elif op.name == "load_sum" and op.operands and op.get("via") == "tma":
            sums = number
    ends = [_behind(stage, max(loop, sums))]
    if launch.get("landing") is not None:
        ends.insert(0, _behind(stage, loop))
    return [Share(*pair) for pair in zip((None, *ends), (*ends, None), strict=True)]


def _behind(stage: Op, last: int) -> frozenset[int]:
    return frozenset(id(op) for top in stage.body[last + 1 :] for op in top.walk())


def _first(instructions: Sequence[T], ops: frozenset[int]) -> int:
    for number, instruction in enumerate(instructions):
        if id(getattr(instruction, "op", None)) in ops:
            return number
    return len(instructions)


@dataclass(slots=True)
class Handed:
    """What the roles of one worker that load have passed on: by task the clocks of each, and values.

    Values are those of the one that has done its share last: each goes on with those of the one before. ``drawn``:
    by the place of a stage in its launch, the positions that the loader has drawn from its dynamic queue; the last
    is past the queue's end.
    """

    clocks: list[list[tuple[Clock, Clock | None]]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    drawn: dict[int, list[int]] = field(default_factory=dict)


_INSIDE = "loader of "


def loader_of(agent: str, worker: int) -> str:
    """What a group waits for, as a blocked task names it."""
    return f"{_INSIDE}@{agent} worker {worker}"


def is_inside(symbol: str) -> bool:
    """Whether a blocked task waits for another part of its own worker, which nothing limits."""
    return symbol.startswith(_INSIDE)
