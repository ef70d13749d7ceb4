"""residency: a launch with more workers than can be resident ends, in whatever order its workers start.

Workers beyond ``resident`` start when others have left. Suppose that a set B of workers never starts. What
then never happens follows from single causes: an event behind one that never happens, or a wait for an
element of which one notify never happens. So each wait has a set of causes, workers of which one in B is
enough. The launch hangs if B has a part of it on some rank, and at least ``resident`` of the others there
are held up: those may be the ones that were started.

A dynamic queue has no workers of its own: whoever is there takes its tasks, and each task that waits in
vain holds up one worker. Its notifies fail to happen if every worker of the stage's range may stay out, or
if a task of the queue or a worker of its range is held up before.

Every B is tried where there are few; else a bound counts each worker of a launch as held up that any other
could hold up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations, product
from math import comb
from typing import TypeAlias

from tilelink.backend.expand import evaluate
from tilelink.backend.expand_rows import Expansion, Phase, Sync
from tilelink.backend.verify.errors import ProgressError
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.order import Elements, numbers
from tilelink.backend.verify.progress import resident_of, spins, workers_of

Group: TypeAlias = "tuple[int, int]"  # a launch by its number, and a rank
# Phase, position and seq, whether it waits, the element, and the row of the Sync.
Event: TypeAlias = "tuple[int, int, int, bool, int, Sync, int]"


def check_residency(out: Expansion, words: Elements) -> None:
    """Raise ProgressError, with who stays out and who waits for it, where some start order can hang."""
    large = [
        (number, rank)
        for number, agent in enumerate(out.agents)
        if agent.name == "launch" and workers_of(agent) > resident_of(agent) and spins(out, number)
        for rank in range(out.world)
    ]
    if not large:
        return
    graph = _Graph(out, words)
    sources = [graph.start[n, r, w] for n, r in large for w in graph.workers(n)]
    bit = {source: 1 << number for number, source in enumerate(sources)}
    masks = graph.spread(bit)
    units = {group: graph.units(masks, bit, *group) for group in large}
    groups = {
        group: [bit[graph.start[*group, w]] for w in graph.workers(group[0])] for group in large
    }
    resident = {group: resident_of(out.agents[group[0]]) for group in large}
    tries = 1
    for group in large:
        workers = len(groups[group])
        spare = workers - resident[group]
        tries *= min(_TRIES + 1, sum(comb(workers, k) for k in range(spare + 1)))
        tries = min(tries, _TRIES + 1)
    found = (
        _try_all(large, groups, units, resident)
        if tries <= _TRIES
        else _bound(large, groups, units, resident)
    )
    if found is not None:
        group, away = found
        graph.refuse(masks, bit, *group, away)


_TRIES = 1 << 15


def _hangs(units: list[tuple[int, int]], away: int, resident: int) -> bool:
    """Whether so many are held up: units are (who it is or 0, its causes)."""
    return sum(bool(causes & away) and not own & away for own, causes in units) >= resident


def _try_all(
    large: list[Group],
    groups: dict[Group, list[int]],
    units: dict[Group, list[tuple[int, int]]],
    resident: dict[Group, int],
) -> tuple[Group, int] | None:
    """A launch on a rank that hangs, and who stays out; every set of workers is tried."""
    parts = []
    for group in large:
        spare = len(groups[group]) - resident[group]
        sets = (combinations(groups[group], k) for k in range(spare + 1))
        parts.append([sum(some) for several in sets for some in several])
    for chosen in product(*parts):
        away = 0
        for part in chosen:
            away |= part
        involved = [g for g, part in zip(large, chosen, strict=True) if part]
        if involved and all(_hangs(units[g], away, resident[g]) for g in involved):
            return involved[0], away
    return None


def _bound(
    large: list[Group],
    groups: dict[Group, list[int]],
    units: dict[Group, list[tuple[int, int]]],
    resident: dict[Group, int],
) -> tuple[Group, int] | None:
    """The same by a bound that may refuse what no start order hangs: anybody may stay out, and be held up."""
    while large:
        away = 0
        for group in large:
            away |= sum(groups[group])
        kept = []
        for group in large:
            held = sum(bool(causes & away & ~own) for own, causes in units[group])
            if min(held, len(groups[group]) - 1) >= resident[group]:
                kept.append(group)
        if kept == large:
            return large[0], away
        large = kept
    return None


@dataclass(slots=True)
class _Graph:
    """What never happens if something else never happens: ``edges`` from cause to effect."""

    out: Expansion
    words: Elements
    edges: list[list[int]] = field(default_factory=list)
    start: dict[tuple[int, int, int], int] = field(default_factory=dict)
    end: dict[tuple[int, int, int], int] = field(default_factory=dict)
    events: dict[int, tuple[Sync, int, int]] = field(default_factory=dict)
    element: dict[int, int] = field(default_factory=dict)
    named: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    began: dict[Group, int] = field(default_factory=dict)
    ended: dict[Group, int] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], list[Event]] = field(default_factory=dict)
    last: int = -1

    def __post_init__(self) -> None:
        out = self.out
        self.began = {(n, r): self.node() for n in range(len(out.agents)) for r in range(out.world)}
        self.ended = {(n, r): self.node() for n in range(len(out.agents)) for r in range(out.world)}
        self.rows = self._rows()
        for number, agent in enumerate(out.agents):
            for rank in range(out.world):
                if agent.name == "launch":
                    self._launch(number, rank)
                else:
                    self._chain(self.began[number, rank], self.rows.get((number, rank, -1), []))
                    self.join(self.last, self.ended[number, rank])
        self._agents()

    def workers(self, number: int) -> range:
        """The workers of a launch."""
        return range(workers_of(self.out.agents[number]))

    def node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def join(self, cause: int, effect: int) -> None:
        self.edges[cause].append(effect)

    def word(self, element: int) -> int:
        """The node of a flag or counter element: not all of its notifies are made."""
        if element not in self.element:
            self.element[element] = self.node()
        return self.element[element]

    def _rows(self) -> dict[tuple[int, int, int], list[Event]]:
        """Events by (agent, rank, chain).

        A chain is a worker, or -1 for an agent without workers, -2 for a finish, -3 - p for the dynamic
        stage that is phase p. A notify that is held back stands at the flush behind it.
        """
        out = self.out
        found: dict[tuple[int, int, int], list[Event]] = {}
        for sync in out.syncs:
            if sync.wait and sync.epoch < 0:
                continue
            phases = out.task_phase[sync.task].tolist()
            elements = self.words.number(sync).tolist()
            rows = zip(
                phases,
                sync.task.tolist(),
                sync.rank.tolist(),
                sync.seq.tolist(),
                elements,
                strict=True,
            )
            for row, (number, task, rank, seq, element) in enumerate(rows):
                phase = out.phases[number]
                position = (task - phase.first) % max(1, phase.count)
                chain = -1
                if phase.kind == "finish":
                    chain = -2
                elif phase.kind == "stage":
                    chain = worker_of(out, phase, position) if not dynamic(phase) else -3 - number
                place = (number, position, seq)
                if sync.delay:
                    place = (self.flush_behind(number), 0, 0)
                event = (*place, sync.wait, element, sync, row)
                found.setdefault((phase.agent, rank, chain), []).append(event)
        for events in found.values():
            events.sort(key=lambda e: e[:4])
        return found

    def flush_behind(self, number: int) -> int:
        agent = self.out.phases[number].agent
        for later in range(number + 1, len(self.out.phases)):
            if self.out.phases[later].kind == "flush" and self.out.phases[later].agent == agent:
                return later
        return len(self.out.phases)

    def _chain(
        self,
        first: int,
        events: Iterable[Event],
        gates: dict[int, list[int]] | None = None,
    ) -> None:
        """Nodes of events one behind the other from ``first`` on; ``gates`` hold up what is behind a phase."""
        last, seen = first, set()
        pending = sorted(gates.items()) if gates else []
        for phase, _, _, wait, element, sync, row in events:
            while pending and pending[0][0] < phase:
                last = self._gate(last, pending.pop(0)[1])
            if wait and element in seen:
                continue
            here = self.node()
            self.join(last, here)
            if wait:
                seen.add(element)
                self.join(self.word(element), here)
            else:
                self.join(here, self.word(element))
            self.events[here] = (sync, row, element)
            last = here
        for _, elements in pending:
            last = self._gate(last, elements)
        self.last = last

    def _gate(self, last: int, elements: list[int]) -> int:
        here = self.node()
        self.join(last, here)
        for element in elements:
            self.join(self.word(element), here)
        return here

    def _launch(self, number: int, rank: int) -> None:
        out = self.out
        agent = out.agents[number]
        spare = workers_of(agent) - resident_of(agent)
        waited: dict[int, dict[int, set[int]]] = {}  # by worker, by phase: elements
        queues = [n for n, p in enumerate(out.phases) if p.agent == number and dynamic(p)]
        gates: dict[int, dict[int, list[int]]] = {w: {} for w in self.workers(number)}
        for queue in queues:
            events = self.rows.get((number, rank, -3 - queue), [])
            mine = sorted({e[4] for e in events if e[3]})
            for worker in range(*range_of(out, out.phases[queue])):
                gates[worker][queue] = mine
        for worker in self.workers(number):
            start = self.node()
            self.named[start] = (number, rank, worker)
            self.start[number, rank, worker] = start
            self.join(self.began[number, rank], start)
            events = self.rows.get((number, rank, worker), [])
            for event in events:
                if event[3]:
                    waited.setdefault(worker, {}).setdefault(event[0], set()).add(event[4])
            for queue, elements in gates[worker].items():
                waited.setdefault(worker, {}).setdefault(queue, set()).update(elements)
            self._chain(start, events, gates[worker])
            end = self.end[number, rank, worker] = self.node()
            self.join(self.last, end)
            self.join(end, self.ended[number, rank])
        for queue in queues:
            lo, hi = range_of(out, out.phases[queue])
            start = self.node()
            self.join(self.began[number, rank], start)
            if hi - lo <= spare:
                for worker in range(lo, hi):
                    self.join(self.start[number, rank, worker], start)
            before = {
                e
                for worker in range(lo, hi)
                for phase, elements in waited.get(worker, {}).items()
                if phase < queue
                for e in elements
            }
            events = self.rows.get((number, rank, -3 - queue), [])
            # A notify that is held back is made when its worker comes to the flush.
            flush = self.flush_behind(queue)
            between = {
                e
                for worker in range(lo, hi)
                for phase, elements in waited.get(worker, {}).items()
                if queue <= phase < flush
                for e in elements
            }
            late = any(e[0] == flush for e in events)
            self._chain(
                self._gate(start, sorted(before)),
                events,
                {queue: sorted(between)} if late else None,
            )
            self.join(self.last, self.ended[number, rank])
        finish = self.rows.get((number, rank, -2), [])
        if finish:
            start = self.node()
            for worker in self.workers(number):
                self.join(self.end[number, rank, worker], start)
            self._chain(start, finish)
            self.join(self.last, self.ended[number, rank])

    def _agents(self) -> None:
        """`after`, the one hardware queue, and collectives, which need all ranks."""
        out = self.out
        named = numbers(out)
        for number, agent in enumerate(out.agents):
            for rank in range(out.world):
                began = self.began[number, rank]
                for name in agent.get("after", ()):
                    if name in named:
                        self.join(self.ended[named[name], rank], began)
                for earlier in range(number):
                    other = out.agents[earlier]
                    self.join(self.began[earlier, rank], began)
                    if other.name == "stream":
                        self.join(self.ended[earlier, rank], began)
                    elif other.name == "launch":
                        for worker in self.workers(earlier):
                            self.join(self.start[earlier, rank, worker], began)
                if agent.name == "collective":
                    for peer in range(out.world):
                        self.join(began, self.ended[number, peer])

    def spread(self, bit: dict[int, int]) -> list[int]:
        """For each node the workers, as bits, of which any one that stays out keeps it from happening."""
        found = [0] * len(self.edges)
        frontier = list(bit.items())
        while frontier:
            at, causes = frontier.pop()
            new = causes & ~found[at]
            if new:
                found[at] |= new
                frontier += [(effect, new) for effect in self.edges[at]]
        return found

    def units(
        self, masks: list[int], bit: dict[int, int], number: int, rank: int
    ) -> list[tuple[int, int]]:
        """What may hold up a worker: (its bit, causes) of each worker's own tasks, (0, causes) of each task
        of a dynamic queue, at most one a worker of its range."""
        found = []
        for worker in self.workers(number):
            own = bit[self.start[number, rank, worker]]
            causes = 0
            for event in self.rows.get((number, rank, worker), []):
                causes |= masks[self.word(event[4])] if event[3] else 0
            found.append((own, causes & ~own))
        for queue, phase in enumerate(self.out.phases):
            if phase.agent != number or not dynamic(phase):
                continue
            tasks: dict[int, int] = {}
            for _, position, _, wait, element, _, _ in self.rows.get(
                (number, rank, -3 - queue), []
            ):
                if wait:
                    tasks[position] = tasks.get(position, 0) | masks[self.word(element)]
            found += [(0, causes) for causes in tasks.values()]
        return found

    def refuse(
        self, masks: list[int], bit: dict[int, int], number: int, rank: int, away: int
    ) -> None:
        """Raise with a chain of waits from one that is held up back to a worker that stays out."""
        out = self.out
        agent = out.agents[number]
        workers, resident = workers_of(agent), resident_of(agent)
        nodes = [
            (node, self.events[node])
            for node in sorted(self.events)
            if self.events[node][0].wait and masks[node] & away
        ]
        here = [
            (node, event)
            for node, event in nodes
            if int(event[0].rank[event[1]]) == rank
            and out.phases[int(out.task_phase[event[0].task[event[1]]])].agent == number
        ]
        node, (sync, row, _) = next(
            ((n, e) for n, e in here if masks[self.word(e[2])] & away & ~self.worker_bit(bit, e)),
            here[0],
        )
        cause = (
            masks[self.word(self.events[node][2])] & away & ~self.worker_bit(bit, self.events[node])
        )
        cause = cause or masks[node] & away
        source = next(s for s, b in bit.items() if b & cause)
        path = self.path(source, self.word(self.events[node][2]))
        notes = [
            f"{resident} of {workers} workers of launch @{agent.symbol} can be resident; the others begin "
            "when one of those has left, in any order",
            self.tell(sync, row, self.events[node][2]),
        ]
        waited = True
        for step in path:
            # Of a worker that has not come to them, the notify that is waited for says enough.
            if step in self.events and (waited or self.events[step][0].wait):
                notes.append(self.tell(*self.events[step]))
                waited = self.events[step][0].wait
        first, by, worker = self.named[source]
        notes.append(
            f"worker {worker} of launch @{out.agents[first].symbol} on rank {by} has not begun"
        )
        raise ProgressError(
            guarded(out, sync) or agent.span,
            detail=f"{workers} workers spin, but {resident} can be resident",
            notes=tuple(notes),
        )

    def worker_bit(self, bit: dict[int, int], event: tuple[Sync, int, int]) -> int:
        """The bit of the worker that performs a row, or 0 where nobody can tell."""
        sync, row, _ = event
        task = int(sync.task[row])
        phase = self.out.phases[int(self.out.task_phase[task])]
        if phase.kind != "stage" or dynamic(phase):
            return 0
        worker = worker_of(self.out, phase, (task - phase.first) % max(1, phase.count))
        return bit.get(self.start.get((phase.agent, int(sync.rank[row]), worker), -1), 0)

    def path(self, source: int, target: int) -> list[int]:
        """Nodes from ``target`` back to ``source``, the shortest way."""
        before = {source: -1}
        frontier = deque([source])
        while frontier and target not in before:
            at = frontier.popleft()
            for effect in self.edges[at]:
                if effect not in before:
                    before[effect] = at
                    frontier.append(effect)
        found = []
        at = target
        while at != source and at >= 0:
            found.append(at)
            at = before.get(at, -1)
        return found

    def tell(self, sync: Sync, row: int, element: int) -> str:
        line = f" ({sync.op.span})" if sync.op.span is not None else ""
        verb = "waits for" if sync.wait else "would notify"
        return f"{self.out.describe(int(sync.task[row]))} {verb} {self.words.name(element)}{line}"


def dynamic(phase: Phase) -> bool:
    """Whether the phase is a stage whose tasks go to whoever is free."""
    return phase.kind == "stage" and phase.op.get("queue", "static") == "dynamic"


def range_of(out: Expansion, phase: Phase) -> tuple[int, int]:
    """The workers of a stage."""
    workers = workers_of(out.agents[phase.agent])
    lo, hi = (int(w) for w in phase.op.get("workers", (0, workers)))
    return lo, hi


def worker_of(out: Expansion, phase: Phase, position: int) -> int:
    """The worker that runs a position of a static queue."""
    lo, hi = range_of(out, phase)
    first = int(evaluate(phase.op.get("first", 0), out.env, phase.op))
    return lo + (position + first) % (hi - lo)
