"""Compiles the workers of a launch whose warps have roles: see :mod:`roles`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilelink.backend.simulate.explore_nodes import (
    ADD,
    FOLLOW,
    KERNEL,
    NOBODY,
    NONE,
    PERFORM,
    PSEUDO,
    RETURN,
    SET,
    TAKE,
    TAKES_NOTHING,
    WAIT,
    Node,
    Unsupported,
)
from tilelink.backend.simulate.geometry import Tile
from tilelink.backend.simulate.roles import LOADER, loading_in, loading_of, parts_of, shares_of
from tilelink.ir import Op

if TYPE_CHECKING:
    from tilelink.backend.simulate.explore_build import Builder


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A dynamic queue: its word, and the first nodes of its tasks for each role; the last are the groups'."""

    stage: Op
    queue: int
    tasks: list[tuple[int, ...]]


class Roles:
    """The workers of one launch of a rank in a call.

    What the roles that load hand on for a task is a word of its own, which its group waits for.
    """

    def __init__(self, builder: Builder, launch: Op, rank: int, call: int, where: str) -> None:
        self.builder = builder
        self.launch = launch
        self.rank, self.call, self.where = rank, call, where
        self.count = builder.geometry.workers[launch.symbol]
        self.parts, self.loading = parts_of(launch), loading_of(launch)
        self.groups = self.parts - self.loading

    def programs(self, ends: tuple[int, int]) -> list[int]:
        """The first node of every loader, then of every first group, and so on.

        ``ends``: of other roles, and of loaders, which leave the worker's place behind them.
        """
        builder, count = self.builder, self.count
        # What every process does, up to tasks that are drawn, and behind them.
        chains: list[list[Node]] = [[] for _ in range(count * self.parts)]
        tails: list[list[Node]] = [[] for _ in chains]
        drawing: dict[int, _Drawn] = {}
        places = [0] * count
        for position, stage in enumerate(self.launch.body):
            if stage.name == "flush":  # every group holds back its own
                for process in range(count * self.loading, count * self.parts):
                    chain = tails[process] if process % count in drawing else chains[process]
                    drain = bool(stage.get("drain"))
                    chain.append(Node(PERFORM, stage, self.where, drain=drain))
            if stage.name != "stage":
                continue
            lo, hi = builder.geometry.worker_range(self.launch, stage)
            if not drawing.keys().isdisjoint(range(lo, hi)):
                raise Unsupported("workers with roles that go on behind the tasks that they draw")
            if stage.get("queue", "static") == "dynamic":
                drawn = self._drawn(stage, position)
                drawing |= dict.fromkeys(range(lo, min(hi, count)), drawn)
                builder.nodes[ends[1]].tasks += tuple(t for one in drawn.tasks for t in one)
                continue
            queue = builder.geometry.queue(stage, builder.geometry.env(self.rank))
            for worker in range(lo, min(hi, count)):
                first = builder.geometry.first_position(stage, worker, lo, hi)
                for tiles in queue[first :: hi - lo]:
                    group = self.loading + places[worker] % self.groups
                    word = self._word("handed", worker, places[worker])
                    *front, back = self._task(stage, self._who(worker), tiles, word)
                    for role, chain in enumerate(front):
                        chains[worker + role * count] += chain
                    chains[worker + group * count] += back
                    places[worker] += 1
        found = []
        for process, (chain, tail) in enumerate(zip(chains, tails, strict=True)):
            role, worker = divmod(process, count)
            after = builder.link([*tail, self._over(role, worker)], ends[role == LOADER])
            if worker in drawing:
                after = self._course(drawing[worker], role, worker, places[worker], after)
            found.append(builder.link(chain, after))
        return found

    def _who(self, worker: int) -> str:
        return f"{self.where} worker {worker}"

    def _word(self, kind: str, *key: int) -> int:
        return self.builder.element(PSEUDO, kind, self.launch.symbol, self.rank, self.call, *key)

    def _over(self, role: int, worker: int) -> Node:
        """The end of a role, which the loader waits for."""
        words, who = (self._word("over", worker),), self._who(worker)
        if role != LOADER:
            return Node(ADD, None, who, elements=words, mode=KERNEL)
        return Node(WAIT, None, who, elements=words, need=self.parts - 1, mode=TAKES_NOTHING)

    def _task(self, stage: Op, who: str, tiles: tuple[Tile, ...], word: int) -> list[list[Node]]:
        """A task as the chains of those that have a share of it; ``word``: what those that load hand on by."""
        builder, loading = self.builder, loading_in(self.launch, stage)
        shares = [share.within(stage) for share in shares_of(self.launch, stage)]
        at = builder.place(self.launch, stage, self.rank, self.call, who, tiles)
        where, found = at.chain[0].where, []
        for ops in shares[:loading]:
            builder.block(at, ops, where)
            at.chain.append(Node(ADD, stage, where, elements=(word,), mode=KERNEL))
            found.append(at.chain)
            at.chain = [Node(NONE, stage, where)]
        at.chain = [Node(WAIT, stage, where, elements=(word,), need=loading)]
        builder.block(at, shares[-1], where)
        return [*found, at.chain + (at.deferred if at.perform_first else [])]

    def _drawn(self, stage: Op, position: int) -> _Drawn:
        """The tasks of a dynamic queue, whichever worker draws them."""
        builder, tasks = self.builder, []
        queue = builder.geometry.queue(stage, builder.geometry.env(self.rank))
        for number, tiles in enumerate(queue):
            word = self._word("handed by position", position, number)
            tasks.append(self._task(stage, self.where, tiles, word))
        builder.queued += [node for task in tasks for chain in task for node in chain]
        back = builder.single(Node(RETURN))
        by_role = [
            tuple(builder.link(task[role], back) for task in tasks)
            for role in range(loading_in(self.launch, stage) + 1)
        ]
        word = builder.queue_word(stage, self.launch.symbol, self.rank, self.call, position)
        return _Drawn(stage, word, by_role)

    def _course(self, drawn: _Drawn, role: int, worker: int, place: int, after: int) -> int:
        """Where a role begins with tasks that its worker draws, the first of them the worker's ``place``-th.

        The loader draws; what it draws for each place is a word, which who comes behind it waits for.
        """
        if len(drawn.tasks) - 1 <= role < self.loading:
            return after  # it has no share of these tasks
        builder, who, begin = self.builder, self._who(worker), -1
        tasks = drawn.tasks[role if role < self.loading else -1]
        last = place + len(tasks)
        for n in reversed(range(place, last + 1 if role == LOADER else last + self.groups)):
            word = self._word("drawn", worker, n)
            if role == LOADER:
                # Behind the last task every group learns that there is none.
                words = [self._word("drawn", worker, n + group) for group in range(self.groups)]
                past = [
                    Node(SET, None, who, elements=(w,), mode=NOBODY, need=len(tasks) + 1)
                    for w in words
                ]
                node = Node(TAKE, drawn.stage, who, builder.link(past, after), (drawn.queue,))
                node.slot = word
            elif role < self.loading or n % self.groups == role - self.loading:
                node = Node(FOLLOW, drawn.stage, who, after, (word,), slot=drawn.queue)
            else:
                continue
            node.tasks, node.again, begin = tasks, begin, builder.single(node)
        return begin
