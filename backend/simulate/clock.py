"""The virtual clock: a discrete-event run of a fused program without values.

Workers compute at their share of the machine's rates, copies and stores queue at the links of the
source and of the destination, streams are first in, first out. One call is timed, on an arena whose
former call every rank has finished.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from tilelink.backend.simulate.errors import DeadlockError
from tilelink.backend.simulate.geometry import Geometry, Tile, bind_args
from tilelink.backend.simulate.timeline import Segment, Timeline, Track, digit
from tilelink.backend.simulate.walk import Cost, Element, Event, Move, Notify, Wait, Walker, Work
from tilelink.ir import DTYPES, At, Op
from tilelink.schedules.machine import Machine

# Tiles of a CTA that the library chooses from.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (64, 128))


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
    """What the workers of a stage share: its rates (microseconds a unit on one worker)."""

    label: str
    tile_us: float
    hbm_bytes: float  # of one tile, where dots read tiles again and again
    hbm_us: float  # a byte
    share: float  # one worker has the machine's rates divided by this
    l2_us: float  # a byte
    sums: bool


@dataclass(slots=True)
class _Rank:
    walker: Walker
    left: dict[str, int] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    egress: float = 0.0
    ingress: float = 0.0
    sent: float = 0.0
    received: float = 0.0


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


class _Clock:
    def __init__(self, geometry: Geometry, machine: Machine, ranks: range, alone: bool) -> None:
        self.geometry = geometry
        self.machine = machine
        self.alone = alone
        self.ranks = [_Rank(Walker(geometry, r, sums=not alone)) for r in ranks]
        self.tasks: list[_Task] = []
        self.collectives = 0.0
        self._heap: list[tuple[float, int, _Task | _Signal]] = []
        self._pushed = 0
        self._unfinished = 0
        # A flag or counter element: its value, and the task and time of the last notify.
        self._values: dict[tuple[int, str, Element], tuple[int, Track, float]] = {}
        self._arrivals: dict[tuple[int, str, Element], float] = {}
        self._blocked: dict[tuple[int, str], list[_Task]] = {}
        self._met: dict[str, list[tuple[_Task, float]]] = {}
        self._stages: dict[int, _Stage] = {}

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
            waiting = [t for t in self.tasks if t.waiting is not None]
            span = waiting[0].waiting.op.span if waiting and waiting[0].waiting else None
            notes = tuple(f"{t.track.name} waits" for t in waiting[:8])
            raise DeadlockError(span, blocked=self._unfinished, notes=notes)
        return max((t.track.end for t in self.tasks), default=0.0)

    def _push(self, time: float, item: _Task | _Signal) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (time, self._pushed, item))

    # Agents.

    def _start(
        self, rank: int, agent: Op, name: str, now: float, cause: tuple[Track, float] | None
    ) -> None:
        machine, state = self.machine, self.ranks[rank]
        delay = {"head": machine.head_us, "launch": machine.launch_us}.get(agent.name, 0.0)
        if agent.get("folded"):
            delay = 0.0  # the workers of the launch do what it does
        if agent.name != "launch":
            body = iter(()) if agent.name == "collective" else state.walker.block(agent.body)
            # Workers share the names of their rank's walker, so each piece is walked at once.
            task = _Task(Track(rank, name, agent.name), iter(list(body)))
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
        self.collectives += took
        for other, since in met:
            if now > since:
                cause = (task.track, now)
                other.track.segments.append(Segment(since, now, "wait", "wait", ".", cause))
            label = str(op["op"])
            other.track.segments.append(Segment(now, now + took, "copy", label, "="))
            self._push(now + took, other)

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
                    iter(list(state.walker.block(finish[0].body))),
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
            while True:
                if dynamic:
                    q = positions.get(id(stage), 0)
                    positions[id(stage)] = q + 1
                if q >= len(queue):
                    break
                task.stage = self._stage(launch, stage, queue, hi - lo)
                task.glyph = self._glyph(stage, task.stage.sums, queue[q])
                bind_args(stage.args, queue[q], walker.env, walker.values)
                for event in list(walker.block(stage.body)):
                    yield event
                    if library and isinstance(event, Wait | Notify) and not self.alone:
                        yield _Gap(self.machine.launch_us)
                q += hi - lo
        task.stage = None

    def _stage(self, launch: Op, stage: Op, queue: list[tuple[Tile, ...]], workers: int) -> _Stage:
        found = self._stages.get(id(stage))
        if found is None:
            machine, tiles = self.machine, len(queue)
            library = launch.get("emitter") == "library"
            footprint = self._footprint(stage)
            # One worker alone cannot draw the whole bandwidth of memory.
            active = 1.0 if library else max(min(workers, tiles), machine.sms / 4)
            share = float(max(machine.sms, self.geometry.workers[launch.symbol]))
            if library:
                share = _waves([t.stop - t.start for t in queue[0]], machine.sms)
            found = self._stages[id(stage)] = _Stage(
                f"@{stage.symbol}",
                machine.tile_us,
                footprint / max(tiles, 1),
                active / (machine.hbm_gbps * 1e3),
                share,
                (1.0 if library else share) / (machine.l2_gbps * 1e3),
                _is_sum(stage),
            )
        return found

    def _footprint(self, stage: Op) -> float:
        """Bytes of all that the tiles of a stage touch; parts that are added are counted as they come."""
        axis = int(stage.get("axis", 0))
        env = self.ranks[0].walker.env
        extent = self.geometry.value(stage["extent"][axis], env)
        segment = self.geometry.value(stage.get("segment", extent), env)
        segments = self.geometry.value(stage.get("segments", extent // max(1, segment)), env)
        share = segment * segments / max(1, extent)
        found: dict[str, float] = {}
        for op in stage.walk():
            if op.name in ("load", "store", "load_sum") and not (
                op.name == "load_sum" and op.operands
            ):
                assert op.ref is not None
                decl = self.geometry.decls[op.symbol]
                size = prod(decl.shape) * DTYPES[decl.dtype]
                # A stage of some blocks touches its share of what lies along their axis.
                cut = any(
                    (item.value if isinstance(item, At) else item) == stage.args[axis]
                    for item in op.ref.index
                )
                whole = not cut or decl.op.get("over") is not None
                found[op.symbol] = max(found.get(op.symbol, 0.0), size * (1.0 if whole else share))
        return sum(found[symbol] for symbol in sorted(found))

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
            if isinstance(event, Work):
                took = self._work_us(event.cost, task.stage)
                label = task.stage.label if task.stage else "work"
                self._spend(task, now, took, "work", label, task.glyph)
                return
            if isinstance(event, _Gap):
                self._spend(task, now, event.us, "start", "start", " ")
                return
            if isinstance(event, Wait):
                if not self.alone and not self._satisfied(task, event):
                    task.waiting, task.since = event, now
                    self._blocked.setdefault((task.track.rank, event.symbol), []).append(task)
                    return
            elif isinstance(event, Notify):
                took = self._notify(task, event, now)
                if took:
                    self._spend(task, now, took, "signal", f"signal {event.symbol}", "|")
                    return
            elif self._move(task, event, now):
                return
        self._finished(task, now)

    def _spend(
        self, task: _Task, now: float, took: float, kind: str, label: str, glyph: str
    ) -> None:
        task.track.segments.append(Segment(now, now + took, kind, label, glyph))
        self._push(now + took, task)

    def _work_us(self, cost: Cost, stage: _Stage | None) -> float:
        machine = self.machine
        share = stage.share if stage is not None else machine.sms
        dot = machine.dot_us(cost.flops, cost.dtype) * share
        vector = cost.elementwise / (machine.elementwise_tflops * 1e6) * share
        if stage is None:
            return max(dot + vector, cost.bytes / (machine.l2_gbps * 1e3) * share)
        cached = cost.bytes * stage.l2_us
        hbm = stage.hbm_us * (stage.hbm_bytes if cost.flops else cost.bytes)
        overhead = stage.tile_us if cost.flops else 0.0
        return max(dot + vector, cached, hbm) + overhead

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
            label = f"wait {symbol}"
            segment = Segment(task.since, now, "wait", label, ".", (by, sent))
            task.track.segments.append(segment)
            task.waiting = None
            self._push(now, task)
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
        arrives = task.arrives
        if event.through is not None:
            slot = (rank, *event.through)
            arrives = max(arrives, self._arrivals.get(slot, 0.0))
            self._arrivals[slot] = arrives
            seen = self._values.get(slot, (0, task.track, now))[0] + 1
            self._values[slot] = (seen, task.track, now)
            if seen < event.count:
                return 0.0
        stream = task.track.kind == "stream"
        took = self.machine.copy_signal_us if stream else 0.0
        away = 0.0 if event.peer == rank else self.machine.store_signal_us
        visible = max(now, arrives) + (took if stream else away)
        for element in event.elements:
            signal = _Signal(event.peer, event.symbol, element, task.track, now)
            self._push(visible, signal)
        return took

    def _move(self, task: _Task, event: Move, now: float) -> bool:
        """Send bytes; whether the task goes on later."""
        machine, rank = self.machine, task.track.rank
        if event.peer == rank:
            took = event.bytes / (machine.hbm_gbps * 1e3 / machine.sms)
            self._spend(task, now, took, "work", f"store {event.op.symbol}", task.glyph)
            return True
        if self.alone:
            return False
        source, target = self.ranks[rank], self.ranks[event.peer]
        took = machine.link_us(event.bytes)
        # The two ends queue apart: a busy receiver does not hold up the sender's other peers.
        source.egress = max(source.egress, now) + took
        target.ingress = max(target.ingress, now) + took
        source.sent += event.bytes
        target.received += event.bytes
        arrives = max(source.egress, target.ingress) + machine.link_latency_us
        if event.store:
            task.arrives = max(task.arrives, arrives)
            return False
        if task.track.kind == "stream":
            done = arrives + machine.copy_us
        else:
            done = max(arrives, now + event.bytes / (machine.worker_copy_gbps * 1e3))
        task.arrives = max(task.arrives, done)
        label = f"{event.op.symbol} to rank {event.peer}"
        self._spend(task, now, done - now, "copy", label, digit(event.peer))
        return True


def _waves(shape: list[int], sms: int) -> float:
    """By how much a product of the library takes longer than at the whole machine's rate: its last wave
    of CTAs is not full, and edges of its tiles lie outside. It takes the best of its tile sizes."""
    rows, columns = shape
    found = []
    for m, n in LIBRARY_TILES:
        ctas = -(-rows // m) * -(-columns // n)
        found.append(-(-ctas // sms) * sms * m * n / (rows * columns))
    return min(found)


def _is_sum(stage: Op) -> bool:
    """Whether a stage does nothing but add parts: its time is no computation's."""
    return any(o.name == "load_sum" and not o.operands for o in stage.walk())
