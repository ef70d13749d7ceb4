"""Happens-before between accesses, through synchronisation elements only.

An *element* is one flag or counter word of one rank, or the start or end of an agent or a call on a
rank. It is reached once everything that raises it is done. Inside a task program order holds; between
tasks nothing is assumed but elements, so no assignment of tasks to workers is relied upon.

Tasks of the same phase and rank with the same waits and notifies in the same order are one *thread*;
a *node* is a thread and the number of its events passed. Access X is before access Y of another task
if X's task raises, after X, an element that is in Y's clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion, Sync

NOTIFY, WAIT, PREVIOUS, VOID = 0, 1, 2, 3


@dataclass(slots=True)
class Elements:
    """Numbers of all elements, and for flags and counters what raises them in one call."""

    out: Expansion
    base: dict[str, int]
    size: dict[str, int]
    total: int
    words: int
    raised: Ints
    low: Ints
    high: Ints
    least: Ints
    most: Ints

    def number(self, sync: Sync) -> Ints:
        """The element of each row of ``sync``."""
        return self.base[sync.symbol] + sync.home * self.size[sync.symbol] + sync.flat

    def agent(self, which: str, agent: int, rank: int) -> int:
        """``start``, ``done`` (all tasks of a launch) or ``end`` of an agent on a rank."""
        kinds = ("start", "done", "end")
        return self.words + (agent * self.out.world + rank) * 3 + kinds.index(which)

    def join(self, agent: int) -> int:
        """All ranks have started a collective."""
        return self.words + len(self.out.agents) * self.out.world * 3 + agent

    def call(self, which: str, rank: int) -> int:
        """``start`` or ``end`` of the call on a rank."""
        first = self.words + len(self.out.agents) * (self.out.world * 3 + 1)
        return first + rank * 2 + (which == "end")

    def name(self, element: int) -> str:
        """A flag or counter element as it is written, with its rank."""
        for symbol, first in self.base.items():
            size = self.size[symbol]
            offset = element - first
            if 0 <= offset < size * self.out.world:
                rank, flat = divmod(offset, size)
                index = np.unravel_index(flat, self.out.dims[symbol])
                return f"@{symbol}[{', '.join(str(int(i)) for i in index)}] on rank {rank}"
        return "the end of an agent"


def elements(out: Expansion) -> Elements:
    """Number the elements of ``out`` and count what raises each."""
    base: dict[str, int] = {}
    size: dict[str, int] = {}
    words = 0
    for symbol, op in out.declarations.items():
        if op.name in ("flag", "counter"):
            base[symbol] = words
            size[symbol] = int(np.prod(out.dims[symbol], dtype=np.int64))
            words += size[symbol] * out.world
    total = words + len(out.agents) * (out.world * 3 + 1) + 2 * out.world
    zero = np.zeros(words, dtype=np.int64)
    found = Elements(
        out,
        base,
        size,
        total,
        words,
        zero,
        zero + out.world,
        zero - 1,
        zero + (1 << 40),
        zero.copy(),
    )
    found.raised = zero.copy()
    for sync in out.syncs:
        if sync.wait:
            continue
        at = found.number(sync)
        np.add.at(found.raised, at, 1)
        np.minimum.at(found.low, at, sync.rank)
        np.maximum.at(found.high, at, sync.rank)
        np.minimum.at(found.least, at, sync.bound)
        np.maximum.at(found.most, at, sync.bound)
    return found


def sound(words: Elements, sync: Sync) -> npt.NDArray[np.bool_]:
    """For each row of a wait: whether passing it means that all notifies of the element are done."""
    at = words.number(sync)
    raised = words.raised[at]
    if words.out.declarations[sync.symbol].name == "counter":
        met: npt.NDArray[np.bool_] = (raised == sync.bound) & (raised > 0)
        return met
    single = words.low[at] == words.high[at]
    whole: npt.NDArray[np.bool_] = single & (words.least[at] == raised) & (words.most[at] == raised)
    return whole


@dataclass(slots=True)
class Thread:
    """Tasks that do the same: ``events`` are (kind, element); ``node`` is its first node."""

    rank: int
    phase: int
    task: int
    start: int
    done: int
    node: int
    events: list[tuple[int, int]]


@dataclass(slots=True)
class Order:
    """Threads, nodes, and the clocks of two consecutive calls."""

    words: Elements
    threads: list[Thread]
    thread_of: Ints
    keys: Ints
    first_key: Ints
    stride: int
    clocks: list[list[int]] = field(default_factory=list)
    reached: list[list[int]] = field(default_factory=list)
    releases: list[int] = field(default_factory=list)
    stuck: bool = False

    def node(self, access: Access) -> Ints:
        """The node of each row of an access."""
        at = np.searchsorted(self.keys, access.task * self.stride + access.seq)
        slot = at - self.first_key[access.task]
        firsts = np.array([t.node for t in self.threads], dtype=np.int64)
        return firsts[self.thread_of[access.task]] + slot

    def before(self, x: int, y: int, call: int = 0) -> bool:
        """Whether an access at node ``x`` in the first call precedes one at ``y`` of another task."""
        return bool(self.releases[x] & self.clocks[call][y])


def order(out: Expansion, words: Elements) -> Order:
    """Build threads and clocks. ``stuck`` is set where the waits of one call go in a circle."""
    tasks = len(out.task_rank)
    parts: list[tuple[Ints, Ints, Ints]] = []
    for sync in out.syncs:
        code = words.number(sync) * 4
        if sync.wait:
            good = sound(words, sync)
            kind = np.where(good, PREVIOUS if sync.epoch < 0 else WAIT, VOID)
        else:
            kind = np.full(len(code), NOTIFY)
        parts.append((sync.task, sync.seq, code + kind))
    task = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    seq = np.concatenate([p[1] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    code = np.concatenate([p[2] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    stride = 1 + max(
        int(seq.max()) if len(seq) else 0,
        max((int(a.seq.max()) for a in out.accesses), default=0),
    )
    keys = task * stride + seq
    by = np.argsort(keys, kind="stable")
    keys, task, code = keys[by], task[by], code[by]
    first_key = np.searchsorted(task, np.arange(tasks))
    length = np.bincount(task, minlength=tasks) if tasks else np.zeros(0, dtype=np.int64)

    threads: list[Thread] = []
    thread_of = np.zeros(tasks, dtype=np.int64)
    node = 0
    group = out.task_phase * out.world + out.task_rank
    for size in np.unique(length):
        some = np.flatnonzero(length == size)
        table = np.empty((len(some), size + 1), dtype=np.int64)
        table[:, 0] = group[some]
        table[:, 1:] = code[first_key[some][:, None] + np.arange(size)]
        sample, inverse = _distinct(table)
        thread_of[some] = len(threads) + inverse
        for number in sample:
            one = int(some[number])
            phase, rank = int(out.task_phase[one]), int(out.task_rank[one])
            start, done = _ends(out, words, phase, rank)
            events = [(int(c) & 3, int(c) >> 2) for c in table[number, 1:]]
            threads.append(Thread(rank, phase, one, start, done, node, events))
            node += int(size) + 1
    found = Order(words, threads, thread_of, keys, first_key, stride)
    found.releases = _releases(threads, node)
    for call in range(2):
        _clocks(found, out, node, call)
        if found.stuck:
            break
    return found


def _distinct(table: Ints) -> tuple[Ints, Ints]:
    """One row number of each distinct row, and for every row the number of its kind."""
    kind = np.zeros(len(table), dtype=np.int64)
    sample = np.zeros(1, dtype=np.int64)
    for column in table.T:
        # Column by column over plain integers: sorting whole rows is an order slower.
        both = kind * (int(column.max()) + 1) + column
        _, sample, kind = np.unique(both, return_index=True, return_inverse=True)
    return sample, kind.ravel()


def _ends(out: Expansion, words: Elements, phase: int, rank: int) -> tuple[int, int]:
    kind, agent = out.phases[phase].kind, out.phases[phase].agent
    if kind == "stage":
        return words.agent("start", agent, rank), words.agent("done", agent, rank)
    if kind == "finish":
        return words.agent("done", agent, rank), words.agent("end", agent, rank)
    return words.agent("start", agent, rank), words.agent("end", agent, rank)


def _releases(threads: list[Thread], nodes: int) -> list[int]:
    found = [0] * nodes
    for thread in threads:
        mask = 1 << thread.done
        for slot in range(len(thread.events), -1, -1):
            found[thread.node + slot] = mask
            if slot:
                kind, element = thread.events[slot - 1]
                if kind == NOTIFY:
                    mask |= 1 << element
    return found


def numbers(out: Expansion) -> dict[str, int]:
    """Agents by the name that `after` uses."""
    return {(a.ref.symbol if a.ref is not None else "head"): n for n, a in enumerate(out.agents)}


def ancestors(out: Expansion) -> list[set[int]]:
    """For each agent, by number, the agents that complete before it starts."""
    named = numbers(out)
    found: list[set[int]] = [set() for _ in out.agents]
    for _ in out.agents:
        for number, agent in enumerate(out.agents):
            for name in agent.get("after", ()):
                if name in named:
                    found[number] |= {named[name]} | found[named[name]]
    return found


def structure(out: Expansion, words: Elements) -> list[tuple[int, int]]:
    """Edges between starts and ends of agents and calls: (earlier element, later element)."""
    edges: list[tuple[int, int]] = []
    named = numbers(out)
    for rank in range(out.world):
        for number, agent in enumerate(out.agents):
            start, done, end = (words.agent(w, number, rank) for w in ("start", "done", "end"))
            edges.append((words.call("start", rank), start))
            edges += [
                (words.agent("end", named[b], rank), start)
                for b in agent.get("after", ())
                if b in named
            ]
            if agent.name == "launch":
                edges += [(start, done), (done, end)]
            else:
                edges.append((start, end))
            if agent.name == "collective":
                edges += [(start, words.join(number)), (words.join(number), end)]
            edges.append((end, words.call("end", rank)))
    return edges


def _clocks(found: Order, out: Expansion, nodes: int, call: int) -> None:
    words = found.words
    shift = call * words.total
    missing = [0] * words.total
    after: dict[int, list[int]] = {}
    for earlier, later in structure(out, words):
        missing[later] += 1
        after.setdefault(earlier, []).append(later)
    starting: dict[int, list[int]] = {}
    for number, thread in enumerate(found.threads):
        missing[thread.done] += 1
        starting.setdefault(thread.start, []).append(number)
        for kind, element in thread.events:
            if kind == NOTIFY:
                missing[element] += 1
    clock = [0] * nodes
    reached = [0] * words.total
    fired = [False] * words.total
    for rank in range(out.world):
        if call:
            reached[words.call("start", rank)] = found.reached[0][words.call("end", rank)]
    waiting: dict[int, list[int]] = {}
    position = [0] * len(found.threads)
    ready: deque[int] = deque(e for e in range(words.total) if missing[e] == 0 and e >= words.words)
    finished = 0

    def lower(element: int, value: int) -> None:
        reached[element] |= value
        missing[element] -= 1
        if missing[element] == 0:
            ready.append(element)

    def advance(number: int, now: int) -> bool:
        thread = found.threads[number]
        slot = position[number]
        while True:
            clock[thread.node + slot] = now
            if slot == len(thread.events):
                position[number] = slot
                lower(thread.done, now)
                return True
            kind, element = thread.events[slot]
            if kind == NOTIFY:
                lower(element, now)
            elif kind == WAIT:
                if not fired[element]:
                    position[number] = slot
                    waiting.setdefault(element, []).append(number)
                    return False
                now |= reached[element]
            elif kind == PREVIOUS and call:
                now |= found.reached[0][element]
            slot += 1

    while ready:
        element = ready.popleft()
        reached[element] |= 1 << (element + shift)
        fired[element] = True
        for later in after.get(element, ()):
            lower(later, reached[element])
        for number in starting.pop(element, ()):
            finished += advance(number, reached[element])
        for number in waiting.pop(element, ()):
            thread = found.threads[number]
            finished += advance(number, clock[thread.node + position[number]])
    found.stuck = found.stuck or finished < len(found.threads)
    found.clocks.append(clock)
    found.reached.append(reached)
