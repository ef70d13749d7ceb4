"""Compiles a fused program, for so many calls in a row, to the processes that the explorer interleaves.

Written from ``docs/ir.md``; only :mod:`geometry` is shared with the scheduler of the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tilelink.backend.simulate.explore_nodes import (
    ADD,
    ASYNC_READ,
    ASYNC_WRITE,
    CLEAR,
    END,
    HOLD,
    IN_KERNEL,
    IN_KERNEL_GPU,
    IN_STREAM,
    KERNEL,
    KERNEL_GPU,
    NOBODY,
    NONE,
    OTHER,
    PERFORM,
    PSEUDO,
    READ,
    RETURN,
    SET,
    SLOT,
    STREAM_GPU,
    TAKE,
    TAKES_NOTHING,
    WAIT,
    WRITE,
    Node,
    Unsupported,
    find_conflicts,
    meets,
)
from tilelink.backend.simulate.explore_roles import Roles
from tilelink.backend.simulate.geometry import Box, Env, Geometry, Tile, bind_args, keep_scalar
from tilelink.backend.simulate.roles import parts_of
from tilelink.ir import All, Expr, Op, Ref, Value

CONTROL = "<epoch and counters>"


@dataclass(slots=True)
class Processes:
    """The whole instance."""

    nodes: list[Node]
    begins: list[int]  # the first node of every process
    groups: list[tuple[int, int]]  # workers of one launch and call: [first, last + 1) processes
    names: list[str]  # of elements
    initial: list[int]  # their values
    segments: list[str]  # names of the bits of clocks
    flag_checks: list[tuple[int, int | None]]  # flag words and the most that they may be at the end
    elements: dict[tuple[Any, ...], int]
    ordered: set[int]  # words that are cleared by `head` and used behind it only
    queued: int  # the segments of tasks of dynamic queues: all must have been drawn in the end

    def in_queues(self, one: bool) -> Processes:
        """With one hardware queue for all agents of a rank, or with one of its own for each."""
        if one:
            return self
        begins = []
        for at in self.begins:
            while self.nodes[at].queue:
                at = self.nodes[at].next
            begins.append(at)
        return replace(self, begins=begins)


@dataclass(slots=True)
class _Place:
    """Where ops are being compiled: the agent, and the chain of nodes so far."""

    rank: int
    call: int
    name: str
    kernel: bool
    env: Env
    values: dict[str, Any]
    chain: list[Node] = field(default_factory=list)
    perform_first: bool = False
    deferred: list[Node] = field(default_factory=list)
    in_stage: bool = False
    control: bool = False


class Builder:
    """See :func:`build`."""

    def __init__(self, geometry: Geometry, calls: int, resident: int | None) -> None:
        self.geometry = geometry
        self.calls = calls
        self.resident = resident
        self.nodes: list[Node] = []
        self.elements: dict[tuple[Any, ...], int] = {}
        self.names: list[str] = []
        self.initial: list[int] = []
        self.begins: list[int] = []
        self.groups: list[tuple[int, int]] = []
        self.after_head = _after_head(geometry)
        # By element: counters asked for by waits and counted notifies, and words set or waited for.
        self.asked: dict[tuple[int, int], int] = {}
        self.counted: set[tuple[int, int]] = set()
        self.flag_asked: dict[int, int] = {}
        self.flag_set: set[int] = set()
        self.queues: set[int] = set()
        self.unordered: set[int] = set()
        self.cleared: set[int] = set()
        self.queued: list[Node] = []
        # Stores of words, and loads that poll them, each with its call.
        self.stored: list[tuple[int, Node]] = []
        self.polls: list[tuple[int, Node]] = []

    # Elements: words of flags and counters, and the ends of agents, which order them.

    def element(self, *key: Any, value: int = 0) -> int:
        found = self.elements.get(key)
        if found is None:
            found = self.elements[key] = len(self.names)
            self.initial.append(value)
            if key[0] == PSEUDO:
                self.names.append(" ".join(str(k) for k in key))
            else:
                rank, symbol, at = key
                self.names.append(f"@{symbol}[{', '.join(map(str, at))}] on rank {rank}")
        return found

    def words(self, rank: int, ref: Ref, env: Env, call: int) -> list[int]:
        """The words of ``rank`` that ``ref`` names in a call; with slots, odd calls have their own."""
        odd = ("odd",) if self.geometry.slot(ref.symbol, call) != ref.symbol else ()
        try:
            found = self.geometry.elements(ref, env)
        except KeyError as error:
            raise Unsupported(f"@{ref.symbol}: {error} is known at run time only") from None
        return [self.element(rank, ref.symbol, (*at, *odd)) for at in found]

    def all_words(self, rank: int, symbol: str, call: int) -> list[int]:
        return self.words(rank, Ref(symbol, ()), self.geometry.env(rank), call)

    # Chains of nodes.

    def link(self, chain: list[Node], after: int) -> int:
        """Number the nodes of ``chain`` and let the last go on at ``after``; the first of them."""
        first = len(self.nodes)
        for offset, node in enumerate(chain):
            node.next = first + offset + 1 if offset + 1 < len(chain) else after
            self.nodes.append(node)
        return first if chain else after

    def single(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    # The instance.

    def build(self) -> Processes:
        for rank in range(self.geometry.world):
            self._user(rank)
            for call in range(self.calls):
                before = len(self.nodes)
                for number in range(len(self.geometry.agents)):
                    self._agent(rank, call, number)
                for node in self.nodes[before:]:
                    node.call = call
        for node in self.nodes:
            if node.checks:
                rank, call = node.checks[0]
                node.checks = self._counter_checks(rank, call)
        self._meet_words()
        segments, queued = find_conflicts(self.nodes), 0
        for node in self.queued:
            queued |= node.bit | node.async_bit
        return Processes(
            self.nodes,
            self.begins,
            self.groups,
            self.names,
            self.initial,
            segments,
            self._flag_checks(),
            self.elements,
            self.cleared - self.unordered - self.flag_set,
            queued,
        )

    def _meet_words(self) -> None:
        """A load of words waits for every store of this call that it reads something of, and for ever for words
        that none stores, or that another load has emptied.

        Where a sentinel alone says that words are there, it does not wait for those that an earlier call left. Its
        rank's calls come one after the other, so which words those are is the same in every interleaving.
        """
        by_place: dict[tuple[int, int, str], list[tuple[Box, Node]]] = {}
        for call, node in self.stored:
            for rank, symbol, box, _ in node.accesses:
                by_place.setdefault((call, rank, symbol), []).append((box, node))
        held: dict[tuple[int, str], np.ndarray[Any, np.dtype[np.bool_]]] = {}
        for now in range(self.calls):
            taken: list[tuple[int, str, Box]] = []
            for call, poll in self.polls:
                if call == now:
                    self._meet(poll, call, by_place, held, taken)
            for (call, rank, symbol), stores in by_place.items():
                if call == now and (rank, symbol) in held:
                    for box, _ in stores:
                        held[rank, symbol][_slices(box)] = True
            for rank, symbol, box in taken:
                held[rank, symbol][_slices(box)] = False

    def _meet(
        self,
        poll: Node,
        call: int,
        by_place: dict[tuple[int, int, str], list[tuple[Box, Node]]],
        held: dict[tuple[int, str], np.ndarray[Any, np.dtype[np.bool_]]],
        taken: list[tuple[int, str, Box]],
    ) -> None:
        """What one load waits for; ``held``: words of earlier calls, ``taken``: what this call has emptied."""
        assert poll.op is not None
        found: dict[int, None] = {}
        decl = self.geometry.decls[self.geometry.home(poll.op.symbol)]
        place = self.geometry.slot(decl.name, call)
        for rank, symbol, box, kind in poll.accesses:
            if symbol != place or kind != READ:
                continue
            left = np.ones([hi - lo for lo, hi in box], dtype=bool)
            if decl.op["words"] == "sentinel":
                before = held.setdefault((rank, symbol), np.zeros(decl.shape, dtype=bool))
                left &= ~before[_slices(box)]
            missing = left.copy()
            for other, node in by_place.get((call, rank, symbol), ()):
                if meets(box, other):
                    inside = tuple(
                        slice(max(a, c) - a, min(b, d) - a)
                        for (a, b), (c, d) in zip(box, other, strict=True)
                    )
                    missing[inside] = False
                    if left[inside].any():
                        found[node.elements[0]] = None
            if missing.any() or any(
                (r, s) == (rank, symbol) and meets(box, b) for r, s, b in taken
            ):
                found[self.element(PSEUDO, "words that nobody stores")] = None
            if poll.op.get("empty"):
                taken.append((rank, symbol, box))
        poll.elements = tuple(found)

    def _user(self, rank: int) -> None:
        """The user writes inputs, calls, and reads outputs when all agents of the call have ended."""
        ins = [d for d in self._user_tensors() if d.op["role"] in ("in", "inout")]
        outs = [d for d in self._user_tensors() if d.op["role"] in ("out", "inout")]
        chain: list[Node] = []
        for call in range(self.calls):
            node = Node(NONE, where=f"the user of rank {rank} before call {call}")
            boxes = [(d.name, tuple((0, n) for n in d.shape)) for d in ins]
            node.accesses = [(rank, name, box, WRITE) for name, box in boxes]
            start = Node(ADD, elements=(self.element(PSEUDO, "start", rank, call),), mode=KERNEL)
            end = Node(WAIT, where=f"the user of rank {rank} after call {call}")
            end.elements = (self.element(PSEUDO, "end", rank, call),)
            end.need = len(self.geometry.agents)
            boxes = [(d.name, tuple((0, n) for n in d.shape)) for d in outs]
            end.accesses = [(rank, name, box, READ) for name, box in boxes]
            end.checks = ((rank, call),)  # filled in when all agents are known
            chain += [node, start, end]
        self.begins.append(self.link(chain, self.single(Node(END))))

    def _user_tensors(self) -> list[Any]:
        return [d for d in self.geometry.decls.values() if d.kind == "tensor"]

    def _begin(self, rank: int, call: int, number: int, where: str) -> tuple[list[Node], int]:
        """The nodes that a process of an agent starts with, and the word that counts its beginnings."""
        agent, names = self.geometry.agents[number], self.geometry.agent_names
        elements = [self.element(PSEUDO, "start", rank, call)]
        elements += [self.element(PSEUDO, "end of", a, rank, call) for a in agent.get("after", ())]
        chain = [Node(WAIT, None, where, elements=tuple(elements), need=1, proxy=True)]
        for earlier in range(number):
            other = self.geometry.agents[earlier]
            which = "end of" if other.name == "stream" else "begun"
            word = self.element(PSEUDO, which, names[earlier], rank, call)
            need = self.geometry.workers.get(names[earlier], 1)
            # The queue orders beginnings, not memory.
            chain.insert(0, Node(WAIT, None, where, elements=(word,), need=need, queue=True))
            chain[0].mode = TAKES_NOTHING
        return chain, self.element(PSEUDO, "begun", names[number], rank, call)

    def _end(self, rank: int, call: int, name: str) -> Node:
        ends = self.element(PSEUDO, "end of", name, rank, call)
        return Node(END, late=(ends, self.element(PSEUDO, "end", rank, call)))

    def _agent(self, rank: int, call: int, number: int) -> None:
        agent, name = self.geometry.agents[number], self.geometry.agent_names[number]
        if agent.name == "launch":
            self._launch(rank, call, number)
            return
        where = f"rank {rank} call {call} {'head' if name == 'head' else '@' + name}"
        chain, begun = self._begin(rank, call, number, where)
        at = _Place(rank, call, name, agent.name == "head", self.geometry.env(rank), {}, chain)
        at.chain.append(Node(ADD, None, where, elements=(begun,), mode=KERNEL))
        if agent.name == "head":
            self._head(at, agent)
        elif agent.name == "collective":
            self._collective(at, agent)
        self.block(at, agent.body, where)
        self.begins.append(self.link(at.chain, self.single(self._end(rank, call, name))))

    def _head(self, at: _Place, op: Op) -> None:
        where = at.chain[0].where
        at.chain[-1].accesses.append((at.rank, CONTROL, ((0, 1),), WRITE))
        cleared: list[int] = []
        for decl in self.geometry.decls.values():
            if decl.kind not in ("counter", "flag"):
                continue
            if not decl.op.get("cleared", decl.kind == "counter"):
                continue
            words = self.all_words(at.rank, decl.name, at.call)
            self.cleared.update(words)
            if decl.kind == "counter":
                cleared += words
            else:
                at.chain += [Node(CLEAR, op, where, elements=(word,)) for word in words]
        if cleared:
            at.chain.append(Node(CLEAR, op, where, elements=tuple(cleared)))

    def _collective(self, at: _Place, op: Op) -> None:
        where, world = at.chain[0].where, self.geometry.world
        source, to = (
            self.geometry.home(name)
            for name in (op.symbol, op["to"].symbol if op.get("to") is not None else op.symbol)
        )
        # In place, no rank writes before all have read.
        writes = int(source == to)
        for turn in range(writes + 2):
            joined = self.element(PSEUDO, "joined", at.name, at.call, turn)
            at.chain.append(Node(ADD, op, where, elements=(joined,), mode=KERNEL))
            at.chain.append(Node(WAIT, op, where, elements=(joined,), need=world))
            if turn == 0:
                box = tuple((0, n) for n in self.geometry.decls[source].shape)
                at.chain[-1].accesses += [(r, source, box, READ) for r in range(world)]
            if turn == writes:
                box = tuple((0, n) for n in self.geometry.decls[to].shape)
                at.chain[-1].accesses.append((at.rank, to, box, WRITE))

    def _launch(self, rank: int, call: int, number: int) -> None:
        launch, name = self.geometry.agents[number], self.geometry.agent_names[number]
        where = f"rank {rank} call {call} @{name}"
        count = self.geometry.workers[name]
        resident = self.resident if self.resident is not None else launch.get("resident")
        resident = count if resident is None else min(count, int(resident))
        slots = self.element(PSEUDO, "slots", name, rank, call, value=resident)
        finish = launch.find("finish")
        left = self.element(PSEUDO, "left", name, rank, call)
        done = self.element(PSEUDO, "done", name, rank, call)
        end = self.single(Node(END, where=where, elements=(left, slots), late=(done,)))
        first = len(self.begins)
        parts = parts_of(launch)
        if parts > 1:
            ends = (self.single(Node(END, where=where, elements=(left,), late=(done,))), end)
            programs = Roles(self, launch, rank, call, where).programs(ends)
        else:
            programs = self._workers(launch, rank, call, where, count, end)
        for process, program in enumerate(programs):
            who = f"{where} worker {process % count}"
            chain, begun = self._begin(rank, call, number, who)
            if resident < count and process < count:
                chain.append(Node(SLOT, None, who, elements=(slots,)))
            if process < count:
                chain.append(Node(ADD, None, who, elements=(begun,), mode=KERNEL))
            self.begins.append(self.link(chain, program))
        self.groups.append((first, len(self.begins)))
        at = _Place(rank, call, name, True, self.geometry.env(rank), {})
        at.chain = [Node(WAIT, where=f"{where} finish", elements=(left,), need=count * parts)]
        if finish:
            self.block(at, finish[0].body, f"{where} finish")
        at.chain.append(Node(WAIT, where=f"{where} finish", elements=(done,), need=count * parts))
        self.begins.append(self.link(at.chain, self.single(self._end(rank, call, name))))

    def _workers(
        self, launch: Op, rank: int, call: int, where: str, count: int, end: int
    ) -> list[int]:
        """The first node of every worker; workers with the same future share its nodes."""
        programs, memo = [end] * count, dict[tuple[int, int], int]()
        for position in reversed(range(len(launch.body))):
            stage = launch.body[position]
            if stage.name == "flush":
                for worker in range(count):
                    key = (position, programs[worker])
                    if key not in memo:
                        drain = bool(stage.get("drain"))
                        node = Node(PERFORM, stage, where, programs[worker], drain=drain)
                        memo[key] = self.single(node)
                    programs[worker] = memo[key]
            elif stage.name == "stage":
                lo, hi = self.geometry.worker_range(launch, stage)
                env = self.geometry.env(rank)
                queue = self.geometry.queue(stage, env)
                if stage.get("queue", "static") == "dynamic":
                    tasks = self._dynamic(launch, stage, rank, call, where, queue)
                    for worker in range(lo, min(hi, count)):
                        key = (position, programs[worker])
                        if key not in memo:
                            node = Node(TAKE, stage, where, programs[worker], tasks=tasks)
                            word = self.queue_word(stage, launch.symbol, rank, call, position)
                            node.elements = (word,)
                            memo[key] = self.single(node)
                        programs[worker] = memo[key]
                    self.nodes[end].tasks += tasks
                    continue
                for worker in range(lo, min(hi, count)):
                    first = self.geometry.first_position(stage, worker, lo, hi)
                    mine = queue[first :: hi - lo]
                    chain: list[Node] = []
                    for tiles in mine:
                        who = f"{where} worker {worker}"
                        chain += self._task(launch, stage, rank, call, who, tiles)
                    programs[worker] = self.link(chain, programs[worker])
        return programs

    def queue_word(self, stage: Op, name: str, rank: int, call: int, position: int) -> int:
        counter = stage.get("counter")
        if counter is None:
            word = self.element(PSEUDO, "queue", stage.symbol, rank, call, position)
        else:
            (word,) = self.words(rank, counter, self.geometry.env(rank), call)
            if name not in self.after_head:
                self.unordered.add(word)
        self.queues.add(word)
        return word

    def _dynamic(
        self,
        launch: Op,
        stage: Op,
        rank: int,
        call: int,
        where: str,
        queue: list[tuple[Tile, ...]],
    ) -> tuple[int, ...]:
        back = self.single(Node(RETURN))
        tasks = [self._task(launch, stage, rank, call, where, tiles) for tiles in queue]
        self.queued += [node for task in tasks for node in task]
        return tuple(self.link(task, back) for task in tasks)

    def _task(
        self, launch: Op, stage: Op, rank: int, call: int, where: str, tiles: tuple[Tile, ...]
    ) -> list[Node]:
        at = self.place(launch, stage, rank, call, where, tiles)
        self.block(at, stage.body, at.chain[0].where)
        if at.perform_first:
            at.chain += at.deferred
        return at.chain

    def place(
        self, launch: Op, stage: Op, rank: int, call: int, where: str, tiles: tuple[Tile, ...]
    ) -> _Place:
        """Where a task begins."""
        text = " ".join(f"{a.name}={t.start}" for a, t in zip(stage.args, tiles, strict=False))
        at = _Place(rank, call, launch.symbol, True, self.geometry.env(rank), {}, in_stage=True)
        at.perform_first = any(o.get("delay") for o in stage.walk() if o.name == "notify")
        at.chain = [Node(NONE, where=f"{where} stage @{stage.symbol} {text}")]
        bind_args(stage.args, tiles, at.env, at.values)
        return at

    # Ops.

    def block(self, at: _Place, ops: Iterable[Op], where: str) -> None:
        for op in ops:
            if op.name in ("wait", "notify", "transfer"):
                condition = op.get("if")
                if condition is not None and not self._value(condition, at):
                    continue
                if op.name == "wait":
                    self._wait(at, op, where)
                elif op.name == "notify":
                    self._notify(at, op, where)
                else:
                    self._transfer(at, op)
            elif op.name in ("for_tiles", "for_range"):
                for tiles in self._positions(at, op):
                    bind_args(op.args[: len(tiles)], tiles, at.env, at.values)
                    self.block(at, op.body, where)
            elif op.name in ("load", "load_sum"):
                self._load(at, op)
            elif op.name == "store":
                self._store(at, op, where)
            else:
                keep_scalar(op, at.values, at.env)

    def _value(self, expr: Any, at: _Place) -> int:
        try:
            return self.geometry.value(expr, at.env)
        except KeyError as error:
            raise Unsupported(f"{error} is known at run time only") from None

    def _positions(self, at: _Place, op: Op) -> list[tuple[Tile, ...]]:
        if op.name == "for_range":
            lo, hi = (self._value(op[k], at) for k in ("lo", "hi"))
            return [(Tile(i, i + 1, i),) for i in range(lo, hi)]
        if op.get("bounds"):
            low, high = (at.values.get(v.name) for v in op.operands[:2])
            if not (isinstance(low, int) and isinstance(high, int)):
                raise Unsupported("a loop whose bounds are known at run time only")
            return self.geometry.bounded(op, low, high)
        return self.geometry.queue(op, at.env)

    def _touch(self, at: _Place, rank: int, ref: Ref, kind: int) -> None:
        if kind in (READ, ASYNC_READ):
            ref = _bound(ref, at)
        try:
            _, box = self.geometry.region(ref, at.env, at.values)
        except KeyError as error:
            raise Unsupported(f"@{ref.symbol}: {error} is known at run time only") from None
        touch = (rank, self.geometry.slot(self.geometry.home(ref.symbol), at.call), box, kind)
        if touch not in at.chain[-1].accesses[-64:]:
            at.chain[-1].accesses.append(touch)

    def _load(self, at: _Place, op: Op) -> None:
        assert op.ref is not None
        own, when = op.get("own"), op.get("when")
        kind = ASYNC_READ if op.get("via") == "tma" else READ
        if self._decl(op.ref.symbol).get("words"):
            # Which stores it waits for is known when all are.
            poll = Node(WAIT, op, at.chain[0].where, need=1)
            at.chain.append(poll)
            self.polls.append((at.call, poll))
        if op.name == "load":
            ref = own if when is not None and self._value(when, at) else op.ref
            self._touch(at, at.rank, ref, kind)
            if op.get("empty"):
                self._touch(at, at.rank, ref, WRITE)
            return
        for source in range(self.geometry.world):
            if op.get("remote"):
                if not op.operands or source != at.rank:
                    self._touch(at, source, op.ref, kind)
            elif own is not None and source == at.rank:
                self._touch(at, at.rank, own, kind)
            elif not op.operands or source != at.rank:
                part = Ref(op.ref.symbol, (Expr.const(source), *op.ref.index[1:]))
                self._touch(at, at.rank, part, kind)
                if op.get("empty"):
                    self._touch(at, at.rank, part, WRITE)

    def _peer(self, at: _Place, op: Op) -> int:
        peer = op.get("peer")
        rank = at.rank if peer is None else self._value(peer, at)
        if not 0 <= rank < self.geometry.world:
            raise IndexError(f"peer {rank} of {self.geometry.world} ranks")
        return rank

    def _store(self, at: _Place, op: Op, where: str) -> None:
        assert op.ref is not None
        if at.perform_first:
            at.chain.append(Node(PERFORM, op, where))
            at.perform_first = False
            at.chain += at.deferred
        rank = self._peer(at, op)
        if self._decl(op.symbol).get("words"):
            # A segment of its own: it is all of this call that whoever polls the words learns of. It lands at
            # once; that words come late is that whoever polls them goes on late.
            word = self.element(PSEUDO, "words", len(self.stored))
            node = Node(ADD, op, where, elements=(word,))
            node.mode = self._good_for(at, rank, False, False)
            node.carry = (node,)
            at.chain.append(node)
            self._touch(at, rank, op.ref, WRITE)
            self.stored.append((at.call, node))
            at.chain.append(Node(NONE, op, where))
            return
        through_tma = op.get("via") == "tma"
        self._touch(at, rank, op.ref, ASYNC_WRITE if through_tma else WRITE)

    def _decl(self, symbol: str) -> Op:
        return self.geometry.decls[symbol].op

    def _transfer(self, at: _Place, op: Op) -> None:
        assert op.ref is not None
        self._touch(at, at.rank, op.ref, READ)
        self._touch(at, self._peer(at, op), op["to"], WRITE)

    def _use_control(self, at: _Place) -> None:
        """The epoch and the counters are read, which `head` writes; what comes later is ordered then."""
        if not at.control:
            at.control = True
            at.chain[-1].accesses.append((at.rank, CONTROL, ((0, 1),), READ))

    def _wait(self, at: _Place, op: Op, where: str) -> None:
        assert op.ref is not None
        self._use_control(at)
        words = self.words(at.rank, op.ref, at.env, at.call)
        gpu = op.get("scope", "sys") == "gpu"
        mode = (IN_KERNEL_GPU if gpu else IN_KERNEL) if at.kernel else IN_STREAM + gpu
        if op.get("order") == "relaxed":
            mode = TAKES_NOTHING
        if self.geometry.decls[op.symbol].kind == "counter":
            need = self._value(op.get("count", 1), at)
            for word in words:
                self.asked[at.call, word] = max(self.asked.get((at.call, word), 0), need)
        else:
            need = at.call + 1 + self._value(op.get("epoch", 0), at)
            for word in words:
                self.flag_asked[word] = max(self.flag_asked.get(word, need), need)
        self._mark(at, words)
        node = Node(WAIT, op, where, elements=tuple(words), need=need, mode=mode)
        node.equal, node.proxy = op.get("compare") == "equal", bool(op.get("proxy"))
        at.chain.append(node)

    def _mark(self, at: _Place, words: Iterable[int]) -> None:
        """Note the words that a process uses without being ordered behind `head`."""
        if at.name and at.name not in self.after_head:
            self.unordered.update(words)

    def _notify(self, at: _Place, op: Op, where: str) -> None:
        assert op.ref is not None
        self._use_control(at)
        counter = self.geometry.decls[op.symbol].kind == "counter"
        rank = at.rank if counter else self._peer(at, op)
        words = self.words(rank, op.ref, at.env, at.call)
        weak = op.get("order") == "relaxed" or op.get("barrier") is False
        gpu = op.get("scope", "sys") == "gpu"
        carried = self._decl(op.symbol).get("carried") is not None
        mode = self._good_for(at, rank, weak or carried, gpu)
        self._mark(at, words)
        drain, delayed = bool(op.get("drain")), bool(op.get("delay")) and at.in_stage
        if counter:
            for word in words:
                self.counted.add((at.call, word))
                node = Node(HOLD if delayed else ADD, op, where, elements=(word,), mode=mode)
                node.drain = drain
                # The task's first store performs what tasks before it have held back, not its own.
                (at.deferred if delayed and at.perform_first else at.chain).append(node)
            return
        count, slot = self._value(op.get("count", 1), at), -1
        if op.get("through") is not None:
            (slot,) = self.words(at.rank, op["through"], at.env, at.call)
            self._mark(at, [slot])
            self.asked[at.call, slot] = count
            self.counted.add((at.call, slot))
        if carried and count > 1:
            (word,) = words
            slot = self.element(PSEUDO, "storing", word, at.call)
        elif count > 1 and slot < 0:
            raise IndexError("a counted notify without a counter (`through`)")
        for number, word in enumerate(words):
            self.flag_set.add(word)
            kind = HOLD if delayed else SET
            node = Node(kind, op, where, elements=(word,), mode=mode, need=at.call + 1)
            node.drain, node.slot, node.count = drain, slot, count
            if number and slot >= 0:
                raise Unsupported("a counted notify of several elements")
            (at.deferred if delayed and at.perform_first else at.chain).append(node)

    def _good_for(self, at: _Place, home: int, weak: bool, gpu: bool) -> int:
        if weak:
            return NOBODY
        if at.kernel and home == at.rank:
            return KERNEL_GPU if gpu else KERNEL
        if not gpu:
            return OTHER
        return STREAM_GPU if home == at.rank else NOBODY

    # Balance.

    def _counter_checks(self, rank: int, call: int) -> tuple[tuple[int, int], ...]:
        """What the counters of ``rank`` must have come to; -1 where nothing waits for one."""
        found: dict[int, int] = {}
        mine = {
            word
            for key, word in self.elements.items()
            if key[0] == rank and self.geometry.decls[key[1]].kind == "counter"
        }
        for number, word in sorted(self.counted | set(self.asked)):
            if number == call and word in mine and word not in self.queues:
                found[word] = self.asked.get((call, word), -1)
        return tuple(sorted(found.items()))

    def _flag_checks(self) -> list[tuple[int, int | None]]:
        slack: dict[str, int] = {}
        for op in self.geometry.program.walk():
            if op.name == "wait" and self.geometry.decls[op.symbol].kind == "flag":
                late = -self.geometry.value(op.get("epoch", 0), self.geometry.env(0))
                slack[op.symbol] = max(slack.get(op.symbol, 0), late)
        found: list[tuple[int, int | None]] = []
        symbols = {word: key[1] for key, word in self.elements.items() if key[0] != PSEUDO}
        for word in sorted(self.flag_set):
            asked = self.flag_asked.get(word)
            most = None if asked is None else asked + slack.get(symbols[word], 0)
            found.append((word, most))
        return found


def _bound(ref: Ref, at: _Place) -> Ref:
    """``ref`` with the whole axis where its index is data: inputs may hold any index, so any of it may be read."""
    known = at.env.keys() | at.values.keys()
    index = (
        All() if isinstance(v, Value) and not v.type.is_tile and v.name not in known else v
        for v in ref.index
    )
    return Ref(ref.symbol, tuple(index))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in box)


def _after_head(geometry: Geometry) -> set[str]:
    """The agents that start when `head` has ended, and `head`."""
    found = {"head"}
    for agent, name in zip(geometry.agents, geometry.agent_names, strict=True):
        if found & set(agent.get("after", ())):
            found.add(name)
    return found


def build(geometry: Geometry, calls: int, resident: int | None = None) -> Processes:
    """The processes of ``calls`` calls of a program, with one hardware queue for all agents of a rank.

    They go through it in the order in which the host enqueues them; a kernel leaves it when all of its workers
    have begun, a stream when it has ended. Raises Unsupported, BoundsError, or IndexError for what no rank can do.
    """
    return Builder(geometry, calls, resident).build()
