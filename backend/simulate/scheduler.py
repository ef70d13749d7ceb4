"""Runs all ranks' agents as cooperative tasks in one thread, in the order that a seed chooses."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.simulate import balance
from tilelink.backend.simulate.collective import run_collective
from tilelink.backend.simulate.deadlock import explain
from tilelink.backend.simulate.errors import DeadlockError, InputError, StepsError, VersionError
from tilelink.backend.simulate.execute import Blocked, Flight, Machine, Runner, Steps, Task
from tilelink.backend.simulate.hostility import Hostility
from tilelink.backend.simulate.memory import Channel, Clock, Memory, Tracker, View
from tilelink.backend.simulate.roles import (
    LOADER,
    Handed,
    loader_of,
    loading_in,
    loading_of,
    shares_of,
)
from tilelink.backend.simulate.trace import Place, Traces, Work
from tilelink.backend.simulate.versions import Versions
from tilelink.ir import Op, make

Inputs: TypeAlias = "Sequence[Mapping[str, torch.Tensor | float]]"
STEPS = 1 << 24  # a run that takes more is cut off
TRACKED = 1 << 24  # elements of all ranks up to which the versions of reads are kept
_READ_BY_USER = make("read_by_user")


@dataclass(slots=True)
class _Call:
    """One rank's call that is under way."""

    number: int
    waiting: dict[str, int]
    began: Clock
    workers: dict[str, int] = field(default_factory=dict)
    queued: dict[str, list[int]] = field(default_factory=dict)
    after: dict[str, Clock] = field(default_factory=dict)
    parts: dict[str, list[int]] = field(default_factory=dict)
    handed: dict[str, list[Handed]] = field(default_factory=dict)
    left: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made: ``values`` false leaves the numbers out, ``explain`` false the notes of a
    deadlock; ``steps`` is the most that it may take; ``versions`` are shared with other runs, or this
    run's own, or False for none."""

    values: bool = True
    explain: bool = True
    steps: int = STEPS
    versions: Versions | bool = True
    races: bool = True


class Scheduler:
    """Runs ``inputs`` (one entry a call) through a program; see :func:`run`."""

    def __init__(
        self, traces: Traces, inputs: Sequence[Inputs], seed: int, options: Options | None = None
    ) -> None:
        self.traces = traces
        traces.prepare()
        self.geometry = geometry = traces.geometry
        self.inputs = inputs
        self.options = options or Options()
        self.memories = [Memory(rank) for rank in range(geometry.world)]
        given = self.options.versions
        self.versions = given if isinstance(given, Versions) else None
        if given is True and _elements(traces) <= TRACKED:
            self.versions = Versions(traces)
        self.outputs: list[list[dict[str, torch.Tensor]]] = [
            [{} for _ in range(geometry.world)] for _ in inputs
        ]
        self.tasks: dict[Task, None] = {}  # unfinished ones
        self.blocked: dict[tuple[int, str], list[Task]] = {}
        self.meetings: dict[tuple[int, str], list[Task]] = {}
        self.positions: dict[tuple[int, str, int], int] = {}
        self.calls: list[_Call] = []
        self.steps = 0
        self._ready: list[tuple[float, int, Task]] = []
        self._pushed = 0
        # Workers that have left with stores of the async proxy still under way, by launch.
        self._streaming: dict[tuple[int, str], list[Task]] = {}
        self.outline = outline = traces.outline
        self._components = outline.components
        steps = len(inputs) * outline.steps
        self.hostility = Hostility(seed, list(self._components), outline.streams, steps)
        self._key = self.hostility.key
        self.machine = Machine(
            traces, self.memories, self._wake, self.hostility.late, self.versions,
            self.options.values,
        )  # fmt: skip
        self.machine.launch = self._launch_words
        self._landings: set[Task] = set()
        self._make_async()
        self._make_memory()

    # Vector clocks: one component a worker, stream, head, collective and host of every rank. A later
    # call uses the components of the earlier one, which it follows. Stores through the async proxy
    # have components of their own, behind all others.

    def _make_async(self) -> None:
        size = count = len(self._components)
        if self.traces.tma_stores:
            for (_, name, _), component in self._components.items():
                if name in self.geometry.workers:
                    self.machine.apart[component] = size
                    self.machine.streamed[size] = 1
                    size += 1
        # A row a component: those of a launch lie side by side.
        self._rows = np.eye(count, size, dtype=np.int32)
        self.clocks: list[Clock] = list(self._rows)
        self._apart = frozenset(self.machine.apart.values())

    def _make_memory(self) -> None:
        for memory in self.memories:
            for place, size in self.outline.channels:
                memory.channels[place] = Channel(size)
            for decl, place in self.outline.buffers:
                if self.versions is not None and decl.name in self.traces.written:
                    self.versions.fresh(memory, decl, slot=place)
            for name, table in self.traces.tables.items():
                for place in self.outline.places(name):
                    memory.trackers[place] = Tracker(name, memory.rank, table, self.options.races)

    # The run.

    def run(self) -> list[list[dict[str, torch.Tensor]]]:
        """Every call's outputs, a list over ranks each. A scheduler runs once."""
        try:
            self._run()
        finally:
            self._let_go()
        return self.outputs

    def _run(self) -> None:
        self._begin()
        ready, most, key = self._ready, self.options.steps, self._key
        pop, push = heapq.heappop, heapq.heappush
        ran = self.hostility.ran if self.hostility.counts else None
        while ready:
            task = pop(ready)[2]
            self.steps += 1
            if self.steps > most:
                raise StepsError(self.geometry.program.span, steps=most)
            if self._step(task):
                # As :meth:`_push`.
                self._pushed = number = self._pushed + 1
                push(ready, (key(task.component, task.held, task.draws), number, task))
            if ran is not None:
                ran(task.component)
        if self.tasks or any(call.left for call in self.calls):
            raise self._deadlock()
        if self.machine.stale is not None:
            raise self.machine.stale
        balance.check_flags(self.geometry, self.memories)

    def _let_go(self) -> None:
        """What refers to itself in a circle would stay until the next garbage collection."""
        for task in (*self.tasks, *self._landings):
            task.steps = None
        self.machine.wake, self.machine.launch = lambda rank, place: None, lambda flight: None

    def _begin(self) -> None:
        self.calls = [_Call(-1, {}, self.clocks[0]) for _ in self.memories]
        order = list(range(self.geometry.world))
        self.hostility.random.shuffle(order)
        for rank in order:
            self._start_call(rank)

    def _step(self, task: Task) -> bool:
        """Let a task make a step; whether it can make another one now."""
        assert task.steps is not None
        try:
            blocked = next(task.steps)
        except StopIteration:
            self._finish_task(task)
            return False
        if blocked is None:
            return True
        task.blocked = blocked
        self.blocked.setdefault((task.rank, blocked.place), []).append(task)
        return False

    def _deadlock(self) -> DeadlockError:
        tasks = list(self.tasks)
        if not tasks:
            never = [name for call in self.calls for name, n in call.waiting.items() if n]
            notes = ("in one hardware queue, agents stand before those that they come after",)
            return DeadlockError(self.geometry.program.span, blocked=len(never), notes=notes)
        if self.options.explain:
            return explain(self.traces, self.machine, tasks, self.calls_done())
        span = tasks[0].blocked.op.span if tasks[0].blocked is not None else None
        return DeadlockError(span, blocked=len(tasks))

    def calls_done(self) -> list[int]:
        """The number of the call that each rank is in."""
        return [call.number for call in self.calls]

    def _push(self, task: Task) -> None:
        self._pushed = number = self._pushed + 1
        key = self._key(task.component, task.held, task.draws)
        heapq.heappush(self._ready, (key, number, task))

    def _wake(self, rank: int, place: str) -> None:
        """A word of a channel, or of its slot called ``place``, has changed."""
        waiting = self.blocked.get((rank, place))
        if not waiting:
            return
        still = []
        for task in waiting:
            assert task.blocked is not None
            if self.machine.missing(rank, task.blocked):
                still.append(task)
            else:
                task.blocked = None
                self._push(task)
        self.blocked[rank, place] = still

    # Calls and agents.

    def _start_call(self, rank: int) -> None:
        number = self.calls[rank].number + 1
        if number == len(self.inputs):
            return
        self._bind_inputs(rank, number, self.inputs[number][rank])
        agents = self.geometry.agents
        waiting = dict(self.outline.waiting)
        if self.hostility.one_queue:
            for index, name in enumerate(self.geometry.agent_names):
                waiting[name] += index
        began = self._host_clock(rank).copy()
        self.machine.began[rank, number] = began
        self.calls[rank] = _Call(number, waiting, began, left=len(agents))
        for symbol, position in self.outline.queues:
            self.positions[rank, symbol, position] = 0
        for index in [i for i, n in enumerate(self.geometry.agent_names) if waiting[n] == 0]:
            self._start_agent(rank, index, began)

    def _release(self, rank: int, index: int) -> None:
        """An agent has one thing less to wait for before it begins."""
        call, name = self.calls[rank], self.geometry.agent_names[index]
        call.waiting[name] -= 1
        if call.waiting[name] == 0:
            after = self._clocks_after(rank, name)
            self._start_agent(rank, index, call.began if after is None else after)

    def _leave_queue(self, rank: int, index: int) -> None:
        """With one hardware queue, what the host has enqueued behind an agent may begin.

        A kernel leaves the queue when all of its workers have begun, a stream when it has ended.
        """
        if self.hostility.one_queue:
            for later in range(index + 1, len(self.geometry.agents)):
                self._release(rank, later)

    def _host_clock(self, rank: int) -> Clock:
        return self.clocks[self._components[rank, "<host>", 0]]

    def _bind_inputs(self, rank: int, call: int, given: Mapping[str, Any]) -> None:
        if not self.traces.fits(given):
            self._check_inputs(rank, given)
            self.traces.fit(given)
        memory = self.memories[rank]
        for op in self.outline.scalars:
            memory.scalars[op.symbol] = given[op.symbol]
        for decl, inputs, copied in self.outline.tensors:
            if self.versions is not None and decl.name in self.traces.written:
                self.versions.fresh(memory, decl, call if inputs else None)
            if inputs:
                tensor = given[decl.name]
                # In-place programs must not change the tensors of the caller.
                kept = tensor.clone() if copied and self.options.values else tensor
                memory.tensors[decl.name] = kept
            else:
                memory.tensors.pop(decl.name, None)

    def _check_inputs(self, rank: int, given: Mapping[str, Any]) -> None:
        """InputError where the inputs of a rank are not those of the program."""
        for op in self.outline.scalars:
            if op.symbol not in given:
                raise InputError(op.span, rank=rank, name=op.symbol, detail="it is missing")
            if not isinstance(given[op.symbol], int | float):
                raise InputError(op.span, rank=rank, name=op.symbol, detail="it is not a number")
        for decl, inputs, _ in self.outline.tensors:
            if not inputs:
                continue
            tensor = given.get(decl.name)
            if not isinstance(tensor, torch.Tensor):
                detail = "it is missing" if tensor is None else "it is not a tensor"
            elif tuple(tensor.shape) != decl.shape:
                detail = f"shape {list(tensor.shape)} where the program has {list(decl.shape)}"
            elif tensor.dtype != TORCH_DTYPES[decl.dtype]:
                detail = f"{tensor.dtype} where the program has {decl.dtype}"
            else:
                continue
            raise InputError(decl.op.span, rank=rank, name=decl.name, detail=detail)

    def _start_agent(self, rank: int, index: int, after: Clock) -> None:
        agent, name = self.geometry.agents[index], self.geometry.agent_names[index]
        call = self.calls[rank]
        if agent.name != "launch":
            run = {"head": self._head, "stream": self._stream, "collective": self._collective}
            self._start_task(rank, name, 0, after, lambda t: run[agent.name](t, agent))
            if agent.name != "stream":
                self._leave_queue(rank, index)
            return
        count = self.geometry.workers[name]
        call.workers[name] = count
        call.parts[name] = [self.outline.parts[name]] * count
        call.handed[name] = [Handed() for _ in range(count)]
        order = list(range(count))
        resident = min(int(agent.get("resident", count)), count)
        if resident < count:
            self.hostility.random.shuffle(order)
        call.queued[name] = order[resident:]
        if call.queued[name]:
            call.after[name] = after.copy()
        for worker in order[:resident]:
            self._start_worker(rank, agent, worker, after)
        if not call.queued[name]:
            self._leave_queue(rank, index)

    def _start_worker(self, rank: int, launch: Op, worker: int, after: Clock) -> None:
        """Start a worker; where its warps have roles, each of them."""
        name = launch.symbol
        parts = self.outline.parts[name]
        if parts == 1:
            self._start_task(rank, name, worker, after, lambda t: self._worker(t, launch))
            return
        for part in range(parts):
            where = worker + part * self.geometry.workers[name]
            steps = functools.partial(self._role, launch=launch, part=part, parts=parts)
            self._start_task(rank, name, where, after, steps)

    def _start_task(
        self,
        rank: int,
        name: str,
        worker: int,
        after: Clock,
        steps: Callable[[Task], Steps],
    ) -> None:
        component = self._components[rank, name, worker]
        clock = self.clocks[component]
        np.maximum(clock, after, out=clock)
        launch = name in self.geometry.workers
        task = Task(
            rank,
            self.calls[rank].number,
            name,
            component,
            clock,
            launch or name == "head",
            View(component, clock),
            worker % self.geometry.workers[name] if launch and worker >= 0 else None,
        )
        if launch and self.traces.tma_loads:
            task.proxy = View(component, clock, clock, self._apart)
            self.machine.fence(task)
        task.steps = steps(task)
        self.tasks[task] = None
        self._push(task)

    def _launch_words(self, flight: Flight) -> None:
        """Words land whenever nothing says otherwise: a task of their own lets them."""
        by = flight.task
        task = Task(by.rank, by.call, by.agent, by.component, by.clock, by.kernel, by.view)

        def steps() -> Steps:
            yield None
            self.machine.touch_down(flight)

        task.steps = steps()
        self._landings.add(task)
        self._push(task)

    def _finish_task(self, task: Task) -> None:
        if task in self._landings:
            self._landings.remove(task)
            return
        del self.tasks[task]
        self.machine.end(task)
        rank, name = task.rank, task.agent
        call = self.calls[rank]
        index = self.traces.agents[name]
        agent = self.geometry.agents[index]
        if agent.name != "launch":
            self._finish_agent(rank, index, task.clock)
            return
        if task.streaming:
            self._streaming.setdefault((rank, name), []).append(task)
        if task.worker is not None:
            balance.check_held(task)
            call.parts[name][task.worker] -= 1
            if call.parts[name][task.worker]:
                return
            call.workers[name] -= 1
            if call.queued[name]:
                worker = call.queued[name].pop(0)
                self._start_worker(rank, agent, worker, call.after[name])
                if not call.queued[name]:
                    self._leave_queue(rank, index)
            if call.workers[name]:
                return
            finish = self.outline.finish[name]
            if finish is not None:
                steps = lambda t: self._block(t, finish)  # noqa: E731
                self._start_task(rank, name, -1, self._workers_know(rank, name), steps)
                return
        self._finish_launch(rank, index, name)

    def _workers_know(self, rank: int, name: str) -> Clock:
        """What the workers of a launch know together."""
        _, first, last = self.outline.rows[rank, name]
        return self._known(first, last)

    def _known(self, first: int, last: int) -> Clock:
        """What the components in a range know together."""
        known: Clock = self._rows[first].copy()
        if last - first > 1:
            np.maximum.reduce(self._rows[first:last], out=known)
        return known

    def _parts(self, name: str) -> range:
        """The workers of a launch; where their warps have roles, all parts of them."""
        return range(self.geometry.workers[name] * self.outline.parts[name])

    def _finish_launch(self, rank: int, index: int, name: str) -> None:
        """With the launch, its stores through the async proxy are complete, drained or not."""
        for task in self._streaming.pop((rank, name), ()):
            self.machine.drain(task)
        self.machine.land_all(rank)
        ended = self._workers_know(rank, name)
        finish = self._components[rank, name, -1]
        if self.outline.finish[name] is not None:
            np.maximum(ended, self.clocks[finish], out=ended)
        for worker in self._parts(name) if self.machine.apart else ():
            apart = self.machine.apart[self._components[rank, name, worker]]
            ended[apart] = self.machine.streamed[apart]
            self.machine.streamed[apart] += 1
        np.maximum(self.clocks[finish], ended, out=self.clocks[finish])
        self._finish_agent(rank, index, ended)

    def _finish_agent(self, rank: int, index: int, clock: Clock) -> None:
        call = self.calls[rank]
        call.left -= 1
        host = self._host_clock(rank)
        np.maximum(host, clock, out=host)
        for other in self.traces.followers[self.geometry.agent_names[index]]:
            self._release(rank, other)
        if self.geometry.agents[index].name == "stream":
            self._leave_queue(rank, index)
        if call.left == 0:
            self._finish_call(rank)

    def _clocks_after(self, rank: int, name: str) -> Clock | None:
        """What the agents that an agent comes after know together; None where it comes after none."""
        found: Clock | None = None
        for other in self.outline.after[name]:
            if (rank, other) in self.outline.rows:
                first, _, last = self.outline.rows[rank, other]
                known = self._known(first, last)
                found = known if found is None else np.maximum(found, known)
        return found

    def _finish_call(self, rank: int) -> None:
        """The user may read outputs and write inputs now."""
        component = self._components[rank, "<host>", 0]
        memory, call = self.memories[rank], self.calls[rank].number
        user = _User(rank, call)
        view = View(component, self.clocks[component])
        for decl in self.outline.outputs:
            if decl.name in self.traces.written and 0 not in decl.shape:
                row = self.traces.tables[decl.name].row(tuple((0, s) for s in decl.shape))
                memory.trackers[decl.name].read(row, _READ_BY_USER, user, None, view)
                self._check_output(memory, decl, call, user)
            if self.options.values:
                self.outputs[call][rank][decl.name] = memory.tensor(decl)
        self.clocks[component][component] += 1
        balance.check_counters(self.geometry, memory, self.outline.counters)
        self._start_call(rank)

    def _check_output(self, memory: Memory, decl: Any, call: int, user: _User) -> None:
        if self.versions is None or self.machine.stale is not None:
            return
        try:
            self.versions.output(memory, decl, call, user)
        except VersionError as error:
            self.machine.stale = error.with_traceback(None)

    # What agents do.

    def _block(self, task: Task, op: Op) -> Steps:
        yield from Runner(self.machine, task).block(op)

    _stream = _block

    def _head(self, task: Task, op: Op) -> Steps:
        memory = self.memories[task.rank]
        task.place = Place(task.rank, task.agent)
        self.machine.write_control(task, op)
        memory.epoch += 1
        for name in self.traces.cleared:
            memory.channels[self.geometry.slot(name, task.call)].clear()
        yield from Runner(self.machine, task).block(op)

    def _worker(self, task: Task, launch: Op) -> Steps:
        runner = Runner(self.machine, task)
        assert task.worker is not None
        for work in self.traces.work(task.rank, launch, task.worker):
            if work.stage.name == "flush":
                yield from runner.flush(bool(work.stage.get("drain")))
                continue
            stage, queue, q = work.stage, work.queue, work.first
            while True:
                if work.dynamic:
                    # Others may draw first: between the end of a task and the next draw there is time.
                    task.draws = True
                    yield None
                    task.draws = False
                    q = self._draw(task, launch, work)
                if q >= len(queue):
                    break
                yield None
                yield from runner.block(stage, q, queue[q])
                q += work.step

    def _draw(self, task: Task, launch: Op, work: Work) -> int:
        """The next position of a dynamic queue: what its counter holds, whoever has cleared it or not."""
        if work.counter is None:
            key = (task.rank, launch.symbol, work.position)
            self.positions[key] += 1
            return self.positions[key] - 1
        symbol, element = work.counter
        task.place = Place(task.rank, task.agent, f"queue of stage @{work.stage.symbol}")
        self.machine.control(task, work.stage)
        values = self.memories[task.rank].channels[self.geometry.slot(symbol, task.call)].values
        values[element] += 1
        return values[element] - 1

    def _role(self, task: Task, launch: Op, part: int, parts: int) -> Steps:
        """One of the ``parts`` of a worker, which come one behind the other: see :mod:`roles`."""
        runner, place, groups_at = Runner(self.machine, task), -1, loading_of(launch)
        assert task.worker is not None
        handed = self.calls[task.rank].handed[launch.symbol][task.worker]
        symbol = loader_of(launch.symbol, task.worker)
        for work in self.traces.work(task.rank, launch, task.worker):
            if work.stage.name == "flush":
                if part >= groups_at:  # every group holds back its own
                    yield from runner.flush(bool(work.stage.get("drain")))
                continue
            shares, loading = shares_of(launch, work.stage), loading_in(launch, work.stage)
            number, q = 0, work.first
            while True:
                if work.dynamic:
                    yield from self._ordered(task, launch, work, part, number)
                    q = handed.drawn[work.position][number]
                if q >= len(work.queue):
                    break
                place += 1
                if part < loading:
                    # What it goes on with are values alone: it has waited for none of what the loader has.
                    while part != LOADER and len(handed.clocks) <= place:
                        yield Blocked(work.stage, symbol, (), 0)
                    if part == LOADER:
                        handed.values.append({})
                    else:
                        runner.values = handed.values[place]
                    yield None
                    yield from runner.block(work.stage, q, work.queue[q], shares[part])
                    fenced = task.proxy.fenced if task.proxy is not None else None
                    handed.values[place] = dict(runner.values)
                    if part == LOADER:
                        handed.clocks.append([])
                    handed.clocks[place].append((task.clock.copy(), fenced))
                    task.clock[task.component] += 1
                    self._wake(task.rank, symbol)
                elif place % (parts - groups_at) == part - groups_at:
                    while len(handed.clocks) <= place or len(handed.clocks[place]) < loading:
                        yield Blocked(work.stage, symbol, (), 0)
                    for clock, fenced in handed.clocks[place]:
                        np.maximum(task.clock, clock, out=task.clock)
                        if task.proxy is not None and fenced is not None:
                            seen = task.proxy.fenced
                            task.proxy.fenced = fenced if seen is None else np.maximum(seen, fenced)
                    runner.values = handed.values[place]
                    yield None
                    yield from runner.block(work.stage, q, work.queue[q], shares[groups_at])
                    handed.values[place] = {}
                number, q = number + 1, q + work.step

    def _ordered(self, task: Task, launch: Op, work: Work, part: int, number: int) -> Steps:
        """Until the loader of a worker has drawn the ``number``-th position of a queue, which it does itself."""
        assert task.worker is not None
        drawn = self.calls[task.rank].handed[launch.symbol][task.worker].drawn
        positions = drawn.setdefault(work.position, [])
        symbol = loader_of(launch.symbol, task.worker)
        if part == LOADER:
            task.draws = True
            yield None
            task.draws = False
            positions.append(self._draw(task, launch, work))
            self._wake(task.rank, symbol)
        while len(positions) <= number:
            # A position says what the next task is, and no more: it orders no accesses.
            yield Blocked(work.stage, symbol, (), 0)

    def _collective(self, task: Task, op: Op) -> Steps:
        """All ranks meet; the last one to come moves the data of all."""
        task.place = Place(task.rank, task.agent)
        met = self.meetings.setdefault((task.call, op.symbol), [])
        met.append(task)
        if len(met) < self.geometry.world:
            yield Blocked(op, f"collective {op.symbol}", (), 0)
            return
        _join(met)
        met.sort(key=lambda t: t.rank)
        run_collective(self.machine, op, met)
        _join(met)
        for other in met:
            if other is not task:
                self.blocked[other.rank, f"collective {op.symbol}"].remove(other)
                other.blocked = None
                self._push(other)


@dataclass(frozen=True, slots=True)
class _User:
    """Who reads the outputs of a call."""

    rank: int
    call: int

    def describe(self, _: Place | None = None) -> str:
        """In words."""
        return f"the user of rank {self.rank} after call {self.call}"


def _join(tasks: list[Task]) -> None:
    joined = np.maximum.reduce([t.clock for t in tasks])
    for task in tasks:
        np.maximum(task.clock, joined, out=task.clock)


def _elements(traces: Traces) -> int:
    decls = traces.geometry.decls.values()
    kept = [d for d in decls if d.name in traces.written]
    return traces.geometry.world * sum(int(np.prod(d.shape, dtype=np.int64)) for d in kept)


def steps_of(traces: Traces) -> int:
    """About how many steps one call of all ranks takes."""
    return traces.outline.steps
