"""Happens-before between accesses, through synchronisation elements only.

An *element* is one flag or counter word of one rank, or the start or end of an agent or a call on a
rank. It is reached once everything that raises it is done. Inside a task program order holds; between
tasks nothing is assumed but elements, so no assignment of tasks to workers is relied upon.

Tasks of the same phase and rank with the same waits and notifies in the same order are one *thread*;
a *node* is a thread and the number of its events passed. Access X is before access Y of another task
if X's task raises, after X, an element that is in Y's clock.

Weak synchronisation blocks and counts, but carries nothing: a notify that releases nothing is MUTE, a
wait that acquires nothing IDLE. A notify of a flag that words carry is CARRY: see ``words``. Through the
async proxy, a store releases from the next drain on, and a read takes what its task had acquired at its last
proxy fence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion, Sync

# Kinds of events. VOID: a wait whose passing tells nothing, and that is taken to pass at once. CARRY: a notify
# that hands on what its rank knew when the call began there, and nothing of the call itself.
NOTIFY, WAIT, PREVIOUS, VOID, MUTE, IDLE, CARRY = range(7)
_DRAIN, _PROXY, _SHIFT = (
    8,
    16,
    5,
)  # bits beside the kind in an event's code, and where the element starts


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
    mute: npt.NDArray[np.bool_]
    near: npt.NDArray[np.bool_]
    far: npt.NDArray[np.bool_]

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
        np.zeros(words, dtype=bool),
        np.zeros(words, dtype=bool),
        np.zeros(words, dtype=bool),
    )
    found.raised = zero.copy()
    kernels = np.array([p.kind in ("head", "stage", "finish") for p in out.phases], dtype=bool)
    for sync in out.syncs:
        if sync.wait:
            continue
        at = found.number(sync)
        np.add.at(found.raised, at, 1)
        np.minimum.at(found.low, at, sync.rank)
        np.maximum.at(found.high, at, sync.rank)
        np.minimum.at(found.least, at, sync.bound)
        np.maximum.at(found.most, at, sync.bound)
        if len(sync.task) == 0:
            continue
        kernel = kernels[out.task_phase[sync.task]]
        inside = kernel & (sync.home == sync.rank)
        if sync.relaxed:
            found.mute[at] = True
        elif sync.gpu:
            found.mute[at[~inside]] = True
            found.near[at[inside]] = True
        else:
            found.far[at[~inside]] = True
    return found


def carrier(out: Expansion, symbol: str) -> str:
    """The buffer whose words carry the flag ``symbol``; "" if it is a flag that is raised, or a counter."""
    found = out.declarations[symbol].get("carried")
    return found.symbol if found is not None else ""


def silent(words: Elements, sync: Sync) -> npt.NDArray[np.bool_]:
    """For each row of a notify: whether it releases nothing to anybody.

    Of several that a counter collects for one flag, the last raises the flag for all: one weak one among
    them makes all weak.
    """
    at = words.number(sync)
    if sync.relaxed:
        return np.ones(len(at), dtype=bool)
    if words.out.declarations[sync.symbol].name == "flag":
        return words.mute[at]
    found = np.zeros(len(at), dtype=bool)
    if sync.gpu:
        kinds = [p.kind in ("head", "stage", "finish") for p in words.out.phases]
        kernel = np.array(kinds, dtype=bool)[words.out.task_phase[sync.task]]
        found = ~(kernel & (sync.home == sync.rank))
    return found


def blind(words: Elements, sync: Sync) -> npt.NDArray[np.bool_]:
    """For each row of a wait: whether it acquires nothing.

    Scope gpu joins kernels of one rank. Where some of an element's notifies are in reach and others are
    not, nothing is taken from it.
    """
    at = words.number(sync)
    if sync.relaxed or not len(at):
        return np.ones(len(at), dtype=bool)
    kinds = [p.kind in ("head", "stage", "finish") for p in words.out.phases]
    kernel = np.array(kinds, dtype=bool)[words.out.task_phase[sync.task]]
    if sync.gpu:
        return ~kernel | words.far[at]
    return ~kernel & words.near[at]


def sound(words: Elements, sync: Sync) -> npt.NDArray[np.bool_]:
    """For each row of a wait: whether passing it means that all notifies of the element are done."""
    at = words.number(sync)
    raised = words.raised[at]
    if words.out.declarations[sync.symbol].name == "counter":
        met: npt.NDArray[np.bool_] = (raised == sync.bound) & (raised > 0)
        return met
    if sync.epoch not in (0, -1):
        # Epochs of other calls than this one and the one before say nothing of either.
        return np.zeros(len(at), dtype=bool)
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
    drains: list[int]
    proxies: list[int]


@dataclass(slots=True)
class Order:
    """Threads, nodes, and the clocks of two consecutive calls, of three in a program with slots.

    ``releases`` holds a mask a node, and behind them, where the program has accesses through TMA, one a
    node for TMA stores. ``proxied`` is the node of the last proxy fence before a node in its task,
    ``drained`` the first node behind which its TMA stores are complete.
    """

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
    nodes: int = 0
    packed: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    proxied: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    drained: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def node(self, access: Access) -> Ints:
        """The node of each row of an access."""
        at = np.searchsorted(self.keys, access.task * self.stride + access.seq)
        slot = at - self.first_key[access.task]
        firsts = np.array([t.node for t in self.threads], dtype=np.int64)
        return firsts[self.thread_of[access.task]] + slot

    def sync_node(self, sync: Sync) -> Ints:
        """The node of each row of a wait or notify: what its task had passed just before it."""
        seq = np.full_like(sync.seq, self.stride - 1) if sync.delay else sync.seq
        at = np.searchsorted(self.keys, sync.task * self.stride + seq)
        firsts = np.array([t.node for t in self.threads], dtype=np.int64)
        return firsts[self.thread_of[sync.task]] + at - self.first_key[sync.task]

    def release_node(self, access: Access) -> Ints:
        """The place in ``releases`` of each row of an access."""
        later = self.nodes if access.tma and access.write else 0
        return self.node(access) + later

    def takes(self, wait: Sync) -> npt.NDArray[np.bool_]:
        """For each row of a wait whether passing it acquires what the notifies release."""
        return sound(self.words, wait) & ~blind(self.words, wait)

    def masks(self, call: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """``releases`` and the first call's share of ``clocks`` as rows of 64-bit words."""
        if not self.packed:
            self.packed.append(_pack(self.releases, self.words.total))
        while len(self.packed) < len(self.clocks) + 1:
            self.packed.append(_pack(self.clocks[len(self.packed) - 1], self.words.total))
        return self.packed[0], self.packed[1 + call]

    def before(self, x: int, y: int, call: int = 0) -> bool:
        """Whether an access at node ``x`` in the first call precedes one at ``y`` of another task."""
        return bool(self.releases[x] & self.clocks[call][y])


def order(out: Expansion, words: Elements) -> Order:
    """Build threads and clocks. ``stuck`` is set where the waits of one call go in a circle."""
    tasks = len(out.task_rank)
    late = 1 + max(
        max((int(x.seq.max()) for x in out.syncs if len(x.seq)), default=0),
        max((int(x.seq.max()) for x in out.accesses), default=0),
    )
    parts: list[tuple[Ints, Ints, Ints]] = []
    for sync in out.syncs:
        code = words.number(sync) << _SHIFT
        if sync.wait:
            previous = sync.epoch < 0 and out.declarations[sync.symbol].name == "flag"
            idle = blind(words, sync)
            kind = np.where(idle, VOID if previous else IDLE, PREVIOUS if previous else WAIT)
            kind = np.where(sound(words, sync), kind, VOID) + _PROXY * sync.proxy
        else:
            raises = CARRY if carrier(out, sync.symbol) else NOTIFY
            kind = np.where(silent(words, sync), MUTE, raises) + _DRAIN * sync.drain
        # A notify that is held back comes after all that its task does.
        seq = np.full_like(sync.seq, late) if sync.delay else sync.seq
        parts.append((sync.task, seq, code + kind))
    task = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    seq = np.concatenate([p[1] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    code = np.concatenate([p[2] for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    stride = late + 1
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
            codes = table[number, 1:].tolist()
            events = [(c & 7, c >> _SHIFT) for c in codes]
            drains = [i for i, c in enumerate(codes) if c & _DRAIN]
            proxies = [i for i, c in enumerate(codes) if c & _PROXY]
            threads.append(Thread(rank, phase, one, start, done, node, events, drains, proxies))
            node += int(size) + 1
    found = Order(words, threads, thread_of, keys, first_key, stride, nodes=node)
    found.releases = _releases(threads, node)
    if any(a.tma for a in out.accesses):
        _async(found, out)
    for call in range(3 if out.program.get("slots") is not None else 2):
        _clocks(found, out, node, call)
        if found.stuck:
            break
    return found


def _pack(masks: list[int], bits: int) -> npt.NDArray[np.uint64]:
    size = (bits + 63) // 64 * 8
    low = (1 << bits) - 1
    data = b"".join((mask & low).to_bytes(size, "little") for mask in masks)
    return np.frombuffer(data, dtype="<u8").reshape(len(masks), size // 8)


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


def carries(order: Order, symbol: str) -> tuple[list[int], list[int]]:
    """Of the flags that words of ``symbol`` carry, as a mask a node: those that its task notifies behind it, and
    those that it has waited for in front of it."""
    words = order.words
    mine = 0
    for flag, first in words.base.items():
        if carrier(words.out, flag) == symbol:
            mine |= ((1 << words.size[flag] * words.out.world) - 1) << first
    told, asked = [0] * order.nodes, [0] * order.nodes
    for thread in order.threads:
        mask = 0
        for slot in range(len(thread.events) - 1, -1, -1):
            kind, element = thread.events[slot]
            if kind == CARRY:
                mask |= 1 << element & mine
            told[thread.node + slot] = mask
        mask = 0
        for slot, (kind, element) in enumerate(thread.events):
            if kind == WAIT:
                mask |= 1 << element & mine
            asked[thread.node + slot + 1] = mask
    return told, asked


def _async(found: Order, out: Expansion) -> None:
    """What holds of accesses through the async proxy: proxy fences, drains, and what they release."""
    drained_later: dict[int, bool] = {}
    flushed: set[int] = set()
    for number in reversed(range(len(out.phases))):
        phase = out.phases[number]
        if phase.kind == "flush" and phase.op.get("drain"):
            flushed.add(phase.agent)
        drained_later[number] = phase.agent in flushed
    found.proxied = np.zeros(found.nodes, dtype=np.int64)
    found.drained = np.full(found.nodes, np.iinfo(np.int64).max)
    complete = [0] * found.nodes
    for thread in found.threads:
        done = thread.done
        if out.phases[thread.phase].kind == "stage" and not drained_later[thread.phase]:
            done = found.words.agent("end", out.phases[thread.phase].agent, thread.rank)
        fence = thread.node
        proxies = set(thread.proxies)
        for slot in range(len(thread.events) + 1):
            if slot - 1 in proxies:
                fence = thread.node + slot
            found.proxied[thread.node + slot] = fence
        drains, following = set(thread.drains), -1
        for slot in range(len(thread.events), -1, -1):
            if slot in drains:
                following = slot
            node = thread.node + slot
            complete[node] = 1 << done if following < 0 else found.releases[thread.node + following]
            if following >= 0:
                found.drained[node] = thread.node + following + 1
    found.releases += complete


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
            if kind in (NOTIFY, MUTE, CARRY):
                missing[element] += 1
    clock = [0] * nodes
    reached = [0] * words.total
    fired = [False] * words.total
    for rank in range(out.world):
        if call:
            reached[words.call("start", rank)] = found.reached[call - 1][words.call("end", rank)]
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
            elif kind == MUTE:
                lower(element, 0)
            elif kind == CARRY:
                # A kernel begins when all that was before it on its rank has landed everywhere.
                lower(element, reached[words.call("start", thread.rank)])
            elif kind in (WAIT, IDLE):
                if not fired[element]:
                    position[number] = slot
                    waiting.setdefault(element, []).append(number)
                    return False
                if kind == WAIT:
                    now |= reached[element]
            elif kind == PREVIOUS and call:
                now |= found.reached[call - 1][element]
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
