"""Who runs next, and how late stores land: the choices of a hostile machine, all made by one seed.

Six ways to be hostile, taken in turn by the seed: any order; priorities with a few changes (PCT,
Burckhardt et al., ASPLOS 2010), which finds a fault that needs d choices with a probability of at least
1 / (n k^(d-1)) for n agents and k steps; some ranks or agents that run only when nothing else can; streams
last, with the ranks in a fixed order, so that one is as many calls ahead as the program lets it; some workers
only when nothing else can, so that others draw the tasks of queues and begin later ones early; and whoever
holds a notify back first, the others' draws from queues last, so that the holder comes to all waits that it can
come to, with what others wait for still in its hands.
"""

from __future__ import annotations

import random
from collections.abc import Callable

MODES = 6
RANDOM, PRIORITIES, STARVED, SKEWED, UNEVEN, HOLDING = range(MODES)
_AHEAD = 4.0  # more than the random part of what is sorted by


class Hostility:
    """The choices of one run. ``components`` are (rank, agent, worker) in the order of their numbers,
    ``streams`` the names of streams, ``steps`` about how many steps the run takes.

    ``key`` is what the next step of a task is sorted by, the smallest first: of its component, what notifies the
    task holds back, and whether the step draws from a dynamic queue. ``late`` says whether a store stays in the
    store buffer until a release.
    """

    def __init__(
        self,
        seed: int,
        components: list[tuple[int, str, int]],
        streams: frozenset[str],
        steps: int,
    ) -> None:
        self.random = random.Random(seed)
        self.mode = seed % MODES
        # CUDA promises no concurrency between streams: sometimes all agents share one hardware queue.
        self.one_queue = seed % 7 == 3
        self.lateness = (1.0, 0.5, 0.0)[seed // MODES % 3]
        ranks = sorted({rank for rank, _, _ in components})
        agents = sorted({agent for _, agent, _ in components})
        draw = self.random.random
        self.bias = [0.0] * len(components)
        self._changes: list[int] = []
        self._steps = 0
        if self.mode == PRIORITIES:
            self.bias = [draw() for _ in components]
            depth = self.random.randrange(4)
            self._changes = sorted(self.random.randrange(1, steps + 1) for _ in range(depth))
        elif self.mode == STARVED:
            slow_ranks = {r for r in ranks if draw() < 0.4}
            slow_agents = {a for a in agents if draw() < 0.3}
            self.bias = [
                2.0 * (rank in slow_ranks) + 1.0 * (agent in slow_agents)
                for rank, agent, _ in components
            ]
        elif self.mode == SKEWED:
            order = list(ranks)
            self.random.shuffle(order)
            self.bias = [
                2.0 * order.index(rank) + 2.0 * len(order) * (agent in streams)
                for rank, agent, _ in components
            ]

        elif self.mode == UNEVEN:
            # Alike on all ranks in half of the runs: a ring of waits needs them all.
            alike = draw() < 0.5
            found: dict[object, float] = {}
            self.bias = [
                found.setdefault(worker if alike else (rank, worker), 2.0 * (draw() < 0.5))
                for rank, _, worker in components
            ]
        self.key = self._keys()
        self.late = self._lateness()

    def ran(self, component: int) -> None:
        """A task has made a step."""
        self._steps += 1
        if self._changes and self._steps >= self._changes[0]:
            self._changes.pop(0)
            self.bias[component] += 1.0 + len(self._changes)

    @property
    def counts(self) -> bool:
        """Whether :meth:`ran` need be told of steps."""
        return bool(self._changes)

    # Asked at every step, so all that the seed has settled is left out of them.

    def _keys(self) -> Callable[..., float]:
        bias, draw = self.bias, self.random.random

        def by_priority(component: int, holds: object = (), draws: bool = False) -> float:
            return bias[component]

        def by_draw(component: int, holds: object = (), draws: bool = False) -> float:
            return bias[component] + draw()

        def holding(component: int, holds: object = (), draws: bool = False) -> float:
            turn = -_AHEAD if holds else _AHEAD if draws else 0.0
            return bias[component] + turn + draw()

        return {PRIORITIES: by_priority, HOLDING: holding}.get(self.mode, by_draw)

    def _lateness(self) -> Callable[[], bool]:
        lateness, draw = self.lateness, self.random.random
        if lateness in (0.0, 1.0):
            return lambda: lateness == 1.0
        return lambda: draw() < lateness
