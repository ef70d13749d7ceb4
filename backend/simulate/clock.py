"""The virtual clock: a discrete-event run of a fused program without values.

Workers compute at their share of the machine's rates (:mod:`tilelink.schedules.costs`), copies and
stores queue at the links of the source and of the destination, streams are first in, first out. One call
is timed, on an arena whose former call every rank has finished.

:func:`timeline` runs all ranks. :func:`predict` runs one, and takes it that each other rank does the same
at the same time (:mod:`tilelink.backend.simulate.mirror`), which is what a search can afford.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf, prod
from typing import Any, NamedTuple

from tilelink.backend.copying import copies_of
from tilelink.backend.simulate.draw import Draw, draw_of
from tilelink.backend.simulate.errors import DeadlockError, StandstillError
from tilelink.backend.simulate.geometry import Geometry, Tile, bind_args
from tilelink.backend.simulate.mirror import Asymmetric, Mirror, Piece
from tilelink.backend.simulate.timeline import Segment, Timeline, Track, digit
from tilelink.backend.simulate.trace import tile_text
from tilelink.backend.simulate.walk import (
    Cost,
    Element,
    Event,
    Move,
    Notify,
    Read,
    Wait,
    Walker,
    Work,
)
from tilelink.ir import DTYPES, Op, op_line
from tilelink.schedules.costs import Code, Timed
from tilelink.schedules.costs import Task as TaskCost
from tilelink.schedules.machine import Machine
from tilelink.schedules.roles import TURNS

TOLD = 8  # tasks that an error lists


@dataclass(slots=True, eq=False)
class _Task:
    """One agent or worker under way; ``arrives``: when its last store to a peer is there."""

    track: Track
    events: Iterator[Event | _Gap]
    stage: _Stage | None = None
    glyph: str = "#"
    arrives: float = 0.0
    waiting: Wait | None = None
    since: float = 0.0
    # What the events come from, and how many of them have been taken.
    piece: Piece | None = None
    taken: int = 0
    # Bytes that it has stored to peers since its last product, and when the last of them are on the link.
    stored: float = 0.0
    left: float = 0.0
    worked: float = 0.0  # how long its last product took
    copied: float = 0.0  # when it has moved what it copies, were its own rate the limit
    freed: float = -inf  # when the last wait that held it up was over
    seen: dict[int, list[Element]] = field(default_factory=dict)


class _Gap(NamedTuple):
    """A kernel that waits or notifies between products of the library, beside what it waits for."""

    us: float


class _Signal(NamedTuple):
    """A notify on its way to an element of a rank: who sent it, and when."""

    rank: int
    symbol: str
    element: Element
    by: Track
    sent: float


@dataclass(slots=True)
class _Stage:
    """What the tasks of a stage share: see :class:`tilelink.schedules.costs.Timed`."""

    label: str
    code: Code
    draw: Draw  # of a task with a product
    active: float
    share: float
    drawing: float  # on the cache: those that copy meanwhile read little
    sums: bool
    copies: bool  # by workers whose loader runs ahead
    timed: dict[Cost, Timed] = field(default_factory=dict)


@dataclass(slots=True)
class _Rank:
    walker: Walker
    left: dict[str, int] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    began: float = inf  # of the first product
    egress: float = 0.0
    ingress: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    engine: float = 0.0  # when the one engine that copies for all streams is free
    # Until ``busy`` products run, which draw this share of the bandwidth of memory for operands that stream.
    busy: float = 0.0
    drawn: float = 0.0


def timeline(program: Op, machine: Machine) -> Timeline:
    """Time one call of a fused program on all ranks; see :class:`Timeline`.

    DeadlockError if the program stops short of its end.
    """
    geometry = Geometry(program)
    clock = _Clock(geometry, machine, range(geometry.world), alone=False)
    makespan = clock.run()
    compute = _Clock(geometry, machine, range(1), alone=True).run()
    busiest = max(max(r.sent, r.received) for r in clock.ranks)
    communication = machine.link_us(busiest) + clock.collectives
    tracks = tuple(t.track for t in clock.tasks)
    return Timeline(
        program.symbol, machine.name, geometry.world, makespan, compute, communication, tracks
    )


def predict(program: Op, machine: Machine) -> float:
    """The makespan of :func:`timeline`, microseconds, from one rank where all do the same.

    Where ranks differ, all of them are run. DeadlockError if the program stops short of its end.
    """
    geometry = Geometry(program)
    try:
        mirror = Mirror(geometry)
        return _Clock(geometry, machine, range(1), False, mirror, record=False).run()
    except (Asymmetric, DeadlockError):
        return _Clock(geometry, machine, range(geometry.world), False, record=False).run()


class _Clock:
    def __init__(
        self,
        geometry: Geometry,
        machine: Machine,
        ranks: range,
        alone: bool,
        mirror: Mirror | None = None,
        record: bool = True,
    ) -> None:
        self.geometry = geometry
        self.machine = machine
        self.alone = alone
        self.mirror = mirror
        self.record = record  # what each track does; else its end alone
        text = geometry.program.get("schedule")
        self.emitter = str(json.loads(text).get("emitter", "triton")) if text else "triton"
        self.ranks = [_Rank(Walker(geometry, r, sums=not alone)) for r in ranks]
        self.tasks: list[_Task] = []
        self.collectives = 0.0
        self._library_us = 0.0  # when the last collective that has begun ends
        self._heap: list[tuple[float, int, _Task | _Signal]] = []
        self._pushed = 0
        self._unfinished = 0
        # A flag or counter element: its value, and the task and time of the last notify.
        self._values: dict[tuple[int, str, Element], tuple[int, Track, float]] = {}
        self._arrivals: dict[tuple[Any, ...], float] = {}
        self._blocked: dict[tuple[int, str], list[_Task]] = {}
        self._met: dict[str, list[tuple[_Task, float]]] = {}
        self._stages: dict[int, _Stage] = {}
        self._loose: dict[Cost, Timed] = {}  # of no stage

    def run(self) -> float:
        """The makespan, microseconds."""
        for rank, state in enumerate(self.ranks):
            for agent, name in zip(self.geometry.agents, self.geometry.agent_names, strict=True):
                state.left[name] = len(agent.get("after", ()))
            for agent, name in zip(self.geometry.agents, self.geometry.agent_names, strict=True):
                if state.left[name] == 0:
                    self._start(rank, agent, name, 0.0, None)
        now = 0.0
        while self._heap:
            now, _, item = heapq.heappop(self._heap)
            if isinstance(item, _Task):
                self._step(item, now)
            else:
                self._set(item, now)
        if self._unfinished:
            raise self._deadlock()
        if not self.tasks:
            return 0.0
        # The side streams join, and the guards of the outputs run.
        last = max((t.track for t in self.tasks), key=lambda track: track.end)
        end = last.end + self.machine.finish_us
        last.segments.append(Segment(last.end, end, "start", "finish", " "))
        last.end = end
        return end

    def _deadlock(self) -> StandstillError:
        """What each task waits for; of waits at one place of the program one is told before further ones."""
        waiting = [(t, t.waiting) for t in self.tasks if t.waiting is not None]
        met = [t for tasks in self._met.values() for t, _ in tasks if len(tasks) < len(self.ranks)]
        places = [id(wait.op) for _, wait in waiting]
        order = sorted(range(len(waiting)), key=lambda n: (places[:n].count(places[n]) > 0, n))
        lines = [self._awaited(*waiting[n]) for n in order]
        lines += [f"{t.track.name} waits for the collective on every rank" for t in met]
        if len(lines) > TOLD:
            lines = [*lines[:TOLD], f"and {len(lines) - TOLD} more"]
        span = waiting[order[0]][1].op.span if waiting else self.geometry.program.span
        return StandstillError(span, blocked=self._unfinished, notes=tuple(lines))

    def _awaited(self, task: _Task, wait: Wait) -> str:
        """A task, its tile, and the first element that it waits for in vain."""
        need = 1 if wait.count is None else wait.count
        rank = task.track.rank
        values = [self._values.get((rank, wait.symbol, e), (0,))[0] for e in wait.elements]
        element, value = next(
            (e, v) for e, v in zip(wait.elements, values, strict=True) if v < need
        )
        channel = f"{wait.symbol}[{', '.join(map(str, element))}]"
        tile = ""
        if task.piece is not None and task.piece.stage is not None:
            stage = task.piece.stage
            tiles = self.geometry.queue(stage, self.ranks[rank].walker.env)[task.piece.position]
            tile = f" stage @{stage.symbol} tile {tile_text(stage, tiles)}"
        place = f" ({wait.op.span})" if wait.op.span is not None else ""
        return (
            f"{task.track.name}{tile} waits at `{op_line(wait.op)}`{place} for {channel}, which is {value} "
            f"and must be {need}"
        )

    def _push(self, time: float, item: _Task | _Signal) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (time, self._pushed, item))

    # Agents.

    def _start(
        self, rank: int, agent: Op, name: str, now: float, cause: tuple[Track, float] | None
    ) -> None:
        machine, state = self.machine, self.ranks[rank]
        fixed = {"head": machine.head_us, "launch": machine.launch_us, "stream": machine.stream_us}
        delay = fixed.get(agent.name, 0.0)
        if agent.get("folded"):
            delay = 0.0  # the workers of the launch do what it does
        if agent.name != "launch":
            body = [] if agent.name == "collective" else state.walker.block(agent.body)
            # Workers share the names of their rank's walker, so each piece is walked at once.
            piece = Piece(agent.body)
            task = _Task(Track(rank, name, agent.name), iter(body), piece=piece)
            self._begin(task, now, delay, cause)
            if agent.name == "collective":
                self._meet(task, agent, now)
            return
        state.workers[name] = self.geometry.workers[name]
        for worker in range(self.geometry.workers[name]):
            task = _Task(Track(rank, name, "launch", worker), iter(()))
            task.events = self._worker(task, agent, worker)
            self._begin(task, now, delay, cause)

    def _begin(
        self, task: _Task, now: float, delay: float, cause: tuple[Track, float] | None
    ) -> None:
        self.tasks.append(task)
        self._unfinished += 1
        task.track.end = now
        if delay or cause is not None:
            task.track.segments.append(Segment(now, now + delay, "start", "start", " ", cause))
        if task.track.kind != "collective":
            self._push(now + delay, task)

    def _meet(self, task: _Task, op: Op, now: float) -> None:
        met = self._met.setdefault(op.symbol, [])
        met.append((task, now))
        if len(met) < len(self.ranks):
            return
        symbol = op["to"].symbol if op["op"] == "all_gather" and op.get("to") else op.symbol
        decl = self.geometry.decls[symbol]
        size = prod(decl.shape) * DTYPES[decl.dtype]
        took = 0.0
        if not self.alone:
            took = self.machine.collective_us(op["op"], size, self.geometry.world)
        # The library runs those of one group in turn.
        begin = max(now, self._library_us)
        self._library_us = end = begin + took
        self.collectives += took
        for other, since in met:
            if begin > since:
                cause = (task.track, now)
                other.track.segments.append(Segment(since, begin, "wait", "wait", ".", cause))
            label = str(op["op"])
            other.track.segments.append(Segment(begin, end, "copy", label, "="))
            self._push(end, other)

    def _finished(self, task: _Task, now: float) -> None:
        self._unfinished -= 1
        track = task.track
        track.end = now
        state, name = self.ranks[track.rank], track.agent
        agent = self.geometry.agents[self.geometry.agent_names.index(name)]
        if track.kind == "launch" and track.worker != -1:
            state.workers[name] -= 1
            if state.workers[name]:
                return
            finish = agent.find("finish")
            if finish:
                last = _Task(
                    Track(track.rank, name, "launch", -1),
                    iter(state.walker.block(finish[0].body)),
                    piece=Piece(finish[0].body),
                )
                self._begin(last, now, 0.0, (track, now))
                return
        for other, other_name in zip(self.geometry.agents, self.geometry.agent_names, strict=True):
            if name in other.get("after", ()):
                state.left[other_name] -= 1
                if state.left[other_name] == 0:
                    self._start(track.rank, other, other_name, now, (track, now))

    def _worker(self, task: _Task, launch: Op, worker: int) -> Iterator[Event | _Gap]:
        rank = task.track.rank
        walker, positions = self.ranks[rank].walker, self.ranks[rank].positions
        library = launch.get("emitter") == "library"
        for stage in launch.body:
            if stage.name != "stage" or (self.alone and _is_sum(stage)):
                continue
            lo, hi = self.geometry.worker_range(launch, stage)
            if not lo <= worker < hi:
                continue
            queue = self.geometry.queue(stage, walker.env)
            dynamic = stage.get("queue", "static") == "dynamic"
            q = self.geometry.first_position(stage, worker, lo, hi)
            args, body = stage.args, stage.body
            task.stage = self._stage(launch, stage, queue, hi - lo)
            while True:
                if dynamic:
                    q = positions.get(id(stage), 0)
                    positions[id(stage)] = q + 1
                if q >= len(queue):
                    break
                if self.record:
                    task.glyph = self._glyph(stage, task.stage.sums, queue[q])
                bind_args(args, queue[q], walker.env, walker.values)
                task.piece, task.taken = Piece(body, stage, q), 0
                for event in walker.block(body):
                    yield event
                    if library and isinstance(event, Wait | Notify) and not self.alone:
                        yield _Gap(self.machine.launch_us)
                q += hi - lo
        task.stage = None

    def _stage(self, launch: Op, stage: Op, queue: list[tuple[Tile, ...]], workers: int) -> _Stage:
        found = self._stages.get(id(stage))
        if found is None:
            tiles = len(queue)
            library = launch.get("emitter") == "library"
            waits = any(o.name == "wait" for o in stage.walk())
            # The simple emitter loses the overlap of tiles to waits between those of a segment.
            simple = self.emitter != "gluon"
            broken = simple and (
                (waits and stage.get("segment") is None) or stage.get("queue") == "dynamic"
            )
            flat = bool(stage.get("flatten")) and not broken
            code = Code(
                "library" if library else self.emitter if not simple else "triton",
                int(launch.get("warps", 8)),
                int(launch.get("stages", 3)),
                flat,
                launch.get("roles") == TURNS,
                launch.get("landing") is not None,
            )
            share = float(max(self.machine.sms, self.geometry.workers[launch.symbol]))
            share = 1.0 if library else share
            found = self._stages[id(stage)] = _Stage(
                f"@{stage.symbol}",
                code,
                draw_of(
                    stage, self.geometry, self.ranks[0].walker.env, workers, self.machine.l2_bytes
                ),
                # One worker alone cannot draw the whole bandwidth of memory.
                1.0 if library else max(min(workers, tiles), self.machine.sms / 4),
                share,
                max(1.0, share - _copying(launch)),
                _is_sum(stage),
                launch.get("roles") is not None and bool(copies_of(stage)),
            )
        return found

    def _glyph(self, stage: Op, sums: bool, tiles: tuple[Tile, ...]) -> str:
        if sums:
            return "+"
        if stage.get("segment") is None:
            return "#"
        segment = self.geometry.value(stage["segment"], self.ranks[0].walker.env)
        return digit(tiles[int(stage.get("axis", 0))].start // segment)

    # Events.

    def _step(self, task: _Task, now: float) -> None:
        for event in task.events:
            # Gaps are no events of the piece.
            task.taken += not isinstance(event, _Gap)
            if isinstance(event, Work):
                if event.cost.flops and self._stalls(task, event, now):
                    return
                took = self._work_us(event.cost, task, now)
                label = task.stage.label if task.stage else "work"
                self._spend(task, now, took, "work", label, task.glyph)
                return
            if isinstance(event, _Gap):
                self._spend(task, now, event.us, "start", "start", " ")
                return
            if isinstance(event, Wait):
                if self.alone:
                    continue
                if not self._satisfied(task, event):
                    task.waiting, task.since = event, now
                    self._blocked.setdefault((task.track.rank, event.symbol), []).append(task)
                    return
                # What a loader looks for while the last task is stored costs no time.
                took = 0.0 if _ahead(task) else self._poll_us(task, event)
                if took:
                    self._spend(task, now, took, "signal", f"acquire {event.symbol}", "|")
                    return
            elif isinstance(event, Notify):
                took = self._notify(task, event, now)
                if took:
                    self._spend(task, now, took, "signal", f"signal {event.symbol}", "|")
                    return
            elif isinstance(event, Read):
                if self._read(task, event, now):
                    return
            elif self._move(task, event, now):
                return
        self._finished(task, now)

    def _spend(
        self, task: _Task, now: float, took: float, kind: str, label: str, glyph: str
    ) -> None:
        if self.record:
            task.track.segments.append(Segment(now, now + took, kind, label, glyph))
        self._push(now + took, task)

    def _timed(self, cost: Cost, stage: _Stage | None) -> Timed:
        """How long a worker works for ``cost``."""
        known = self._loose if stage is None else stage.timed
        found = known.get(cost)
        if found is None:
            memory = stage.draw.memory if stage is not None and cost.flops else cost.bytes
            work = TaskCost(
                cost.flops,
                cost.dtype,
                cost.steps,
                cost.rows,
                cost.columns,
                cost.elementwise,
                cost.bytes,
                memory,
                cost.sums,
                cost.landed,
                cost.filled,
            )
            if stage is None:
                sms = self.machine.sms
                found = Timed(self.machine, work, Code(), sms, sms)
            else:
                found = Timed(
                    self.machine, work, stage.code, stage.share, stage.active, stage.drawing
                )
            known[cost] = found
        return found

    def _work_us(self, cost: Cost, task: _Task, now: float) -> float:
        machine, stage = self.machine, task.stage
        if _ahead(task):
            # Of its load nothing is seen but that the next one cannot begin before it.
            task.copied = now
            return machine.load_us
        timed = self._timed(cost, stage)
        if stage is None:
            return timed.us(now)
        if not cost.flops and now <= task.freed:
            return timed.late_us
        state = self.ranks[task.track.rank]
        if cost.flops:
            state.began = min(state.began, now)
        took = timed.us(max(0.0, now - state.began))
        if cost.flops:
            task.worked = took
            # Workers of a launch do the same at about the same time, so that one stands for all.
            most = machine.hbm_gbps * 1e3 * took
            drawn = min(1.0, stage.draw.streamed * stage.active / most) if took else 0.0
            state.drawn = drawn if now >= state.busy else max(state.drawn, drawn)
            state.busy = max(state.busy, now + took)
        if self.alone or not cost.flops:
            return took
        # Copies and stores to peers draw on the same memory, cache and power.
        busy = max(state.egress, state.ingress) - now
        return took + machine.contention * min(max(busy, 0.0), took)

    def _stalls(self, task: _Task, product: Work, now: float) -> bool:
        """Whether the loads of a product stand behind what its worker stores to peers; it goes on later."""
        held, task.stored = task.stored / (self.machine.store_gbps * 1e3), 0.0
        if held <= 0.0:
            return False
        task.events = chain((product,), task.events)
        task.taken -= 1
        self._spend(task, now, held, "copy", "loads behind stores", ":")
        return True

    def _poll_us(self, task: _Task, event: Wait) -> float:
        """What it takes to see that a wait is over; a worker that waits for the same again need not look."""
        if task.track.kind == "stream":
            return self.machine.stream_wait_us
        if task.track.kind != "launch" or task.seen.get(id(event.op)) == event.elements:
            return 0.0
        task.seen[id(event.op)] = event.elements
        # Words of all ranks are polled together, and their load is the look.
        looks = 0 if self._carried(event.symbol) else len(event.elements)
        return self.machine.poll_us * looks

    def _carried(self, symbol: str) -> bool:
        """Whether words carry a flag: nothing is raised behind them."""
        return self.geometry.decls[symbol].op.get("carried") is not None

    def _satisfied(self, task: _Task, wait: Wait) -> bool:
        # Flags of former epochs (acknowledgements) are set: the former call is over everywhere.
        if wait.count is None and int(wait.op.get("epoch", 0)) < 0:
            return True
        need = 1 if wait.count is None else wait.count
        values, rank = self._values, task.track.rank
        for element in wait.elements:
            found = values.get((rank, wait.symbol, element))
            if found is None or found[0] < need:
                return False
        return True

    def _set(self, signal: _Signal, now: float) -> None:
        rank, symbol, element, by, sent = signal
        key = (rank, symbol, element)
        before = self._values.get(key)
        self._values[key] = ((before[0] if before else 0) + 1, by, sent)
        waiting = self._blocked.get((rank, symbol))
        if not waiting:
            return
        still = []
        for task in waiting:
            assert task.waiting is not None
            if not self._satisfied(task, task.waiting):
                still.append(task)
                continue
            took = self._poll_us(task, task.waiting)
            if self.record:
                label = f"wait {symbol}"
                segment = Segment(task.since, now, "wait", label, ".", (by, sent))
                task.track.segments.append(segment)
            if took and self.record:
                acquired = Segment(now, now + took, "signal", f"acquire {symbol}", "|")
                task.track.segments.append(acquired)
            task.waiting, task.freed = None, now + took
            self._push(task.freed, task)
        self._blocked[rank, symbol] = still

    def _notify(self, task: _Task, event: Notify, now: float) -> float:
        """Deliver a signal; how long the task is held up by it."""
        if self.alone:
            return 0.0
        rank = task.track.rank
        if self.geometry.decls[event.symbol].kind == "counter":
            for element in event.elements:
                self._set(_Signal(rank, event.symbol, element, task.track, now), now)
            return 0.0
        arrives, carried = task.arrives, self._carried(event.symbol)
        if event.through is not None or (carried and event.count > 1):
            # Words of several tasks are all there when the last are.
            slot: Any = (rank, event.symbol, event.elements[0], event.peer)
            if event.through is not None:
                slot = (rank, *event.through)
            arrives = max(arrives, self._arrivals.get(slot, 0.0))
            self._arrivals[slot] = arrives
            seen = self._values.get(slot, (0, task.track, now))[0] + 1
            self._values[slot] = (seen, task.track, now)
            if seen < event.count:
                return 0.0
        if carried:
            took = away = 0.0
        elif task.track.kind == "stream":
            state, away = self.ranks[rank], self.machine.copy_signal_us
            state.engine = max(now, state.engine) + away
            took = away = state.engine - now
        else:
            # A release waits until the stores before it are there, unless it is held back.
            # Where warps take turns, the other group stores the next task meanwhile.
            held = event.op.get("delay") is not None or event.op.get("order") == "relaxed"
            held = held or _ahead(task)
            took = 0.0 if held else max(0.0, arrives - now)
            away = self.machine.store_signal_us
        for sender, sent in self._sent(task, event):
            near = sent.peer == sender and task.track.kind != "stream"
            visible = max(now, arrives) + (0.0 if near else away)
            target = sent.peer if self.mirror is None else 0
            for element in sent.elements:
                self._push(visible, _Signal(target, sent.symbol, element, task.track, now))
        return took

    def _sent(self, task: _Task, event: Notify) -> Iterator[tuple[int, Notify]]:
        """The rank and the signal of every notify that happens with ``event``.

        It alone; where one rank stands for all, what each rank signals to this one at this point.
        """
        if self.mirror is None:
            yield task.track.rank, event
            return
        assert task.piece is not None
        for rank in range(self.geometry.world):
            other = self.mirror.notify(task.piece, task.taken - 1, event, rank)
            if other.peer == 0:
                yield rank, other

    def _move(self, task: _Task, event: Move, now: float) -> bool:
        """Send bytes; whether the task goes on later."""
        machine, rank = self.machine, task.track.rank
        if event.peer == rank:
            took = event.bytes / (machine.hbm_gbps * 1e3 / machine.sms)
            self._spend(task, now, took, "work", f"store {event.op.symbol}", task.glyph)
            return True
        if self.alone:
            return False
        source = self.ranks[rank]
        target = source if self.mirror is not None else self.ranks[event.peer]
        ahead = _ahead(task)
        took = event.bytes / (machine.box_gbps * 1e3) if ahead else machine.link_us(event.bytes)
        streamed = task.track.kind == "stream" and not event.store
        begin = max(now, source.engine) if streamed else now
        if begin < source.busy:
            # What goes over the links passes the memory of both ends, where operands stream meanwhile.
            drag = machine.store_drag if event.store and not ahead else machine.copy_drag
            took *= 1.0 + drag * source.drawn
        # The two ends queue apart: a busy receiver does not hold up the sender's other peers.
        source.egress = max(source.egress, begin) + took
        target.ingress = max(target.ingress, begin) + took
        source.sent += event.bytes
        target.received += event.bytes
        arrives = max(source.egress, target.ingress) + machine.link_latency_us
        if ahead:
            task.copied += event.bytes / (machine.bulk_copy_gbps * 1e3)
            task.arrives = max(task.arrives, arrives, task.copied)
            left = max(source.egress, task.copied) - now
            label = f"{event.op.symbol} to rank {event.peer}"
            self._spend(task, now, max(left, 0.0), "copy", label, digit(event.peer))
            return True
        if event.store:
            bulk = event.op.get("via") == "tma"
            rate = machine.bulk_copy_gbps if bulk else machine.push_gbps
            stored = now + event.bytes / (rate * 1e3)
            task.arrives = max(task.arrives, arrives, stored)
            if task.worked > 0.0:
                task.stored += event.bytes
            # Its shared memory, or its place in the queue of stores, is free once the bytes are on the link. Of
            # two groups that take turns each has its own, which it needs again behind the other's next tile.
            turns = task.stage is not None and task.stage.code.turns
            free, task.left = task.left if turns else source.egress, source.egress
            if free <= (now if turns else now + took):
                return False
            label = f"{event.op.symbol} to rank {event.peer}"
            self._spend(task, now, free - now, "copy", label, digit(event.peer))
            return True
        if streamed:
            done = source.engine = arrives + machine.copy_us
        else:
            bulk = event.op.get("via") == "tma"
            rate = machine.bulk_copy_gbps if bulk else machine.worker_copy_gbps
            done = max(arrives, now + event.bytes / (rate * 1e3))
        task.arrives = max(task.arrives, done)
        label = f"{event.op.symbol} to rank {event.peer}"
        self._spend(task, now, done - now, "copy", label, digit(event.peer))
        return True

    def _read(self, task: _Task, event: Read, now: float) -> bool:
        """Read bytes of peers; whether the task goes on later.

        A loader asks for them while the product in front of them is computed.
        """
        if self.alone:
            return False
        machine, rank = self.machine, task.track.rank
        target = self.ranks[rank]
        peers = [state for n, state in enumerate(self.ranks) if n != rank] or [target]
        ahead = task.worked if event.op.get("via") == "tma" else 0.0
        # Beside products; a stage behind them has the links for itself.
        beside = task.stage is not None and not task.stage.sums
        rate = machine.read_gbps if beside else machine.link_gbps
        # What it had to wait for it cannot have asked for before.
        begin, took = max(now - ahead, min(now, task.freed)), event.bytes / (rate * 1e3)
        target.ingress = max(target.ingress, begin) + took
        target.received += event.bytes
        for state in peers:
            state.egress = max(state.egress, begin) + took / len(peers)
            state.sent += event.bytes / len(peers)
        done = max(target.ingress, *(state.egress for state in peers)) + machine.link_latency_us
        if not ahead:
            done = max(done, now + event.bytes / (machine.worker_copy_gbps * 1e3))
        if done <= now:
            return False
        self._spend(task, now, done - now, "copy", f"{event.op.symbol} of all ranks", task.glyph)
        return True


def _ahead(task: _Task) -> bool:
    """Whether a task copies boxes, with a loader that has the next ones while these are stored."""
    return task.stage is not None and task.stage.copies


def _copying(launch: Op) -> int:
    """How many workers of a launch with roles copy, and do nothing else."""
    if launch.get("roles") is None:
        return 0
    ranges = (s["workers"] for s in launch.find("stage") if copies_of(s))
    return sum(int(high) - int(low) for low, high in ranges)


def _is_sum(stage: Op) -> bool:
    """Whether a stage does nothing but add parts: its time is no computation's."""
    return any(o.name == "load_sum" and not o.operands for o in stage.walk())
