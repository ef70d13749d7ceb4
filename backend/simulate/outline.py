"""What a run asks of a program again and again, worked out once for all of its runs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from tilelink.backend.simulate.geometry import Decl, Geometry
from tilelink.backend.simulate.roles import parts_of
from tilelink.ir import Op


class Outline:
    """Agents, their components in the vector clocks, and what the memory of a rank holds.

    ``components``: of each worker (-1: what comes behind all of a launch), stream, head, collective and host of
    every rank, the parts of a worker with roles the number of workers apart; ``of`` those of an agent of a rank.
    ``waiting``: how many agents each one comes after. ``parts`` of a worker and the ``finish`` op, of a launch.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        named = tuple(zip(geometry.agents, geometry.agent_names, strict=True))
        self.components: dict[tuple[int, str, int], int] = {}
        self.of: dict[tuple[int, str], list[int]] = {}
        for rank in range(geometry.world):
            for agent, name in named:
                count = geometry.workers[name] if agent.name == "launch" else 1
                for worker in range(-1 if agent.name == "launch" else 0, count * parts_of(agent)):
                    self._component(rank, name, worker)
            self._component(rank, "<host>", 0)
        self.streams = frozenset(name for agent, name in named if agent.name == "stream")
        self.waiting = {name: len(agent.get("after", ())) for agent, name in named}
        self.parts = {name: parts_of(agent) for agent, name in named}
        self.finish: dict[str, Op | None] = {
            name: next(iter(agent.find("finish")), None) for agent, name in named
        }
        self.queues = [
            (agent.symbol, position)
            for agent in geometry.agents
            if agent.name == "launch"
            for position in range(len(agent.body))
        ]
        self.scalars = geometry.program.find("scalar")
        self.after = {name: tuple(agent.get("after", ())) for agent, name in named}
        # Of an agent of a rank: its first component, the first that is no `finish`, and the one behind its last.
        self.rows = {
            (rank, name): (found[0], found[0] + (found[-1] > found[0]), found[-1] + 1)
            for (rank, name), found in self.of.items()
        }
        decls = geometry.decls.values()
        # Each with whether the user gives it, and whether the program may write what the user has given.
        self.tensors = [
            (d, d.op["role"] in ("in", "inout"), d.op["role"] == "inout")
            for d in decls
            if d.kind == "tensor"
        ]
        self.outputs = [d for d, *_ in self.tensors if d.op["role"] in ("out", "inout")]
        # Each symbol with the name of each of its slots, and the elements of flags and counters.
        self.channels = [
            (place, int(np.prod(d.shape)))
            for d in decls
            if d.kind in ("flag", "counter")
            for place in self.places(d.name)
        ]
        self.counters = sorted(d.name for d in decls if d.kind == "counter")
        self.buffers: list[tuple[Decl, str]] = [
            (d, place)
            for d in decls
            if d.kind not in ("flag", "counter")
            for place in self.places(d.name)
        ]

    def _component(self, rank: int, name: str, worker: int) -> None:
        self.components[rank, name, worker] = number = len(self.components)
        self.of.setdefault((rank, name), []).append(number)

    def places(self, name: str) -> list[str]:
        """The names of the slots of a symbol."""
        return sorted({self.geometry.slot(name, call) for call in (0, 1)})

    @cached_property
    def steps(self) -> int:
        """About how many steps one call of all ranks takes."""
        geometry = self.geometry
        # A store of words is two flights at most to each rank, tasks of their own that begin and land.
        landings, total = 4 * geometry.world, 0
        words = {name for name, held in geometry.decls.items() if held.op.get("words")}
        for agent in geometry.agents:
            for op in agent.body if agent.name == "launch" else (agent,):
                tasks = 1
                if op.name == "stage":
                    tasks = len(geometry.queue(op, geometry.env(0)))
                inside: list[Any] = list(op.walk())
                each = 1 + sum(o.name in ("wait", "notify", "transfer") for o in inside)
                each += landings * sum(o.name == "store" and o.symbol in words for o in inside)
                total += tasks * each
        return max(1, total * geometry.world)
