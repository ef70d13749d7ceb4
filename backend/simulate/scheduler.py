"""The hostile scheduler: runs all ranks' agents as cooperative tasks in one thread, by a seed.

Three ways to be hostile, chosen by the seed: any order; priorities with a few changes (PCT, Burckhardt
et al., ASPLOS 2010); and some ranks or agents that run only when nothing else can.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from tilelink.backend.simulate.collective import run_collective
from tilelink.backend.simulate.deadlock import explain
from tilelink.backend.simulate.errors import BalanceError, InputError
from tilelink.backend.simulate.execute import (
    CONTROL,
    Blocked,
    Body,
    Machine,
    Steps,
    Task,
    tile_text,
)
from tilelink.backend.simulate.geometry import Geometry, bind_args
from tilelink.backend.simulate.memory import Access, Channel, Clock, Memory, Tracker, garbage
from tilelink.backend.tile_ops import TORCH_DTYPES
from tilelink.ir import Op, make

Inputs: TypeAlias = "Sequence[Mapping[str, torch.Tensor | float]]"
_READ_BY_USER = make("read_by_user")


@dataclass(slots=True)
class _Call:
    """One rank's call that is under way."""

    number: int
    waiting: dict[str, int]
    workers: dict[str, int] = field(default_factory=dict)
    left: int = 0


class Scheduler:
    """Runs ``inputs`` (one entry a call) through ``program``; see :func:`run`."""

    def __init__(self, geometry: Geometry, inputs: Sequence[Inputs], seed: int) -> None:
        self.geometry = geometry
        self.inputs = inputs
        self.random = random.Random(seed)
        self.memories = [Memory(rank) for rank in range(geometry.world)]
        late = self.random.choice((0.0, 0.5, 1.0))
        self.machine = Machine(
            geometry, self.memories, self._wake, lambda: self.random.random() < late
        )
        self.outputs: list[list[dict[str, torch.Tensor]]] = [
            [{} for _ in range(geometry.world)] for _ in inputs
        ]
        self.tasks: list[Task] = []  # unfinished ones
        self.blocked: dict[tuple[int, str], list[Task]] = {}
        self.meetings: dict[tuple[int, str], list[Task]] = {}
        self.positions: dict[tuple[int, str, int], int] = {}
        self.calls: list[_Call] = []
        self._ready: list[tuple[float, int, Task]] = []
        self._pushed = 0
        self._components: dict[tuple[int, str, int], int] = {}
        self._make_components()
        self._make_priorities()
        self._make_memory()

    # Vector clocks: one component a worker, stream, head, collective and host of every rank. A later
    # call uses the components of the earlier one, which it follows.

    def _make_components(self) -> None:
        for rank in range(self.geometry.world):
            for agent, name in zip(self.geometry.agents, self.geometry.agent_names, strict=True):
                count = self.geometry.workers[name] if agent.name == "launch" else 1
                for worker in range(-1 if agent.name == "launch" else 0, count):
                    self._components[rank, name, worker] = len(self._components)
            self._components[rank, "<host>", 0] = len(self._components)
        size = len(self._components)
        self.clocks: list[Clock] = [np.zeros(size, dtype=np.int32) for _ in range(size)]
        for component, clock in enumerate(self.clocks):
            clock[component] = 1

    def _make_priorities(self) -> None:
        mode = self.random.randrange(3)
        self._mode = mode
        self._bias = [0.0] * len(self._components)
        if mode == 1:
            self._bias = [self.random.random() for _ in self._bias]
        elif mode == 2:
            slow_ranks = {r for r in range(self.geometry.world) if self.random.random() < 0.4}
            slow_agents = {a for a in self.geometry.agent_names if self.random.random() < 0.3}
            for (rank, agent, _), component in self._components.items():
                self._bias[component] = 2.0 * (rank in slow_ranks) + 1.0 * (agent in slow_agents)

    def _make_memory(self) -> None:
        for memory in self.memories:
            for decl in self.geometry.decls.values():
                if decl.kind in ("flag", "counter"):
                    memory.channels[decl.name] = Channel(decl.shape)
                    continue
                memory.tensors[decl.name] = garbage(decl.shape, decl.dtype)
                memory.trackers[decl.name] = Tracker(decl.name, memory.rank, len(decl.shape))
            memory.trackers[CONTROL] = Tracker(CONTROL, memory.rank, 1)

    # The run.

    def run(self) -> list[list[dict[str, torch.Tensor]]]:
        """Every call's outputs, a list over ranks each."""
        self.calls = [_Call(-1, {}) for _ in self.memories]
        order = list(range(self.geometry.world))
        self.random.shuffle(order)
        for rank in order:
            self._start_call(rank)
        while self._ready:
            _, _, task = heapq.heappop(self._ready)
            assert task.steps is not None
            try:
                blocked = next(task.steps)
            except StopIteration:
                self._finish_task(task)
                continue
            if blocked is None:
                self._push(task)
            else:
                task.blocked = blocked
                self.blocked.setdefault((task.rank, blocked.symbol), []).append(task)
        if self.tasks:
            raise explain(self.geometry, self.machine, self.tasks, self.calls_done())
        self._check_flags()
        return self.outputs

    def calls_done(self) -> list[int]:
        """The number of the call that each rank is in."""
        return [call.number for call in self.calls]

    def _push(self, task: Task) -> None:
        key = self._bias[task.component]
        if self._mode == 1:
            if self.random.random() < 0.01:
                self._bias[task.component] += 1.0
        else:
            key += self.random.random()
        self._pushed += 1
        heapq.heappush(self._ready, (key, self._pushed, task))

    def _wake(self, rank: int, symbol: str) -> None:
        waiting = self.blocked.get((rank, symbol))
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
        self.blocked[rank, symbol] = still

    # Calls and agents.

    def _start_call(self, rank: int) -> None:
        number = self.calls[rank].number + 1
        if number == len(self.inputs):
            return
        self._bind_inputs(rank, self.inputs[number][rank])
        agents = self.geometry.agents
        waiting = {
            name: len(agent.get("after", ()))
            for agent, name in zip(agents, self.geometry.agent_names, strict=True)
        }
        self.calls[rank] = _Call(number, waiting, left=len(agents))
        for index, agent in enumerate(agents):
            for position in range(len(agent.body) if agent.name == "launch" else 0):
                self.positions[rank, agent.symbol, position] = 0
            if waiting[self.geometry.agent_names[index]] == 0:
                self._start_agent(rank, index, [self._host_clock(rank)])

    def _host_clock(self, rank: int) -> Clock:
        return self.clocks[self._components[rank, "<host>", 0]]

    def _bind_inputs(self, rank: int, given: Mapping[str, Any]) -> None:
        memory = self.memories[rank]
        for op in self.geometry.program.find("scalar"):
            if op.symbol not in given:
                raise InputError(op.span, rank=rank, name=op.symbol, detail="it is missing")
            memory.scalars[op.symbol] = given[op.symbol]
        for decl in self.geometry.decls.values():
            if decl.kind != "tensor":
                continue
            if decl.op["role"] not in ("in", "inout"):
                memory.tensors[decl.name] = garbage(decl.shape, decl.dtype)
                continue
            tensor = given.get(decl.name)
            if not isinstance(tensor, torch.Tensor):
                detail = "it is missing" if tensor is None else "it is not a tensor"
            elif tuple(tensor.shape) != decl.shape:
                detail = f"shape {list(tensor.shape)} where the program has {list(decl.shape)}"
            elif tensor.dtype != TORCH_DTYPES[decl.dtype]:
                detail = f"{tensor.dtype} where the program has {decl.dtype}"
            else:
                # In-place programs must not change the tensors of the caller.
                inout = decl.op["role"] == "inout"
                memory.tensors[decl.name] = tensor.clone() if inout else tensor
                continue
            raise InputError(decl.op.span, rank=rank, name=decl.name, detail=detail)

    def _start_agent(self, rank: int, index: int, after: list[Clock]) -> None:
        agent, name = self.geometry.agents[index], self.geometry.agent_names[index]
        call = self.calls[rank]
        if agent.name != "launch":
            run = {"head": self._head, "stream": self._stream, "collective": self._collective}
            self._start_task(rank, name, 0, after, lambda t: run[agent.name](t, agent))
            return
        count = self.geometry.workers[name]
        call.workers[name] = count
        for worker in range(count):
            self._start_task(rank, name, worker, after, lambda t: self._worker(t, agent))

    def _start_task(
        self,
        rank: int,
        name: str,
        worker: int,
        after: list[Clock],
        steps: Callable[[Task], Steps],
    ) -> None:
        component = self._components[rank, name, worker]
        clock = self.clocks[component]
        for other in after:
            np.maximum(clock, other, out=clock)
        launch = name in self.geometry.workers and worker >= 0
        task = Task(
            rank, self.calls[rank].number, name, component, clock, worker if launch else None
        )
        task.steps = steps(task)
        self.tasks.append(task)
        self._push(task)

    def _finish_task(self, task: Task) -> None:
        self.tasks.remove(task)
        self.machine.flush(task)
        task.clock[task.component] += 1
        rank, name = task.rank, task.agent
        call = self.calls[rank]
        index = self.geometry.agent_names.index(name)
        agent = self.geometry.agents[index]
        ended = task.clock
        if task.worker is not None:
            call.workers[name] -= 1
            if call.workers[name]:
                return
            workers = range(self.geometry.workers[name])
            clocks = [self.clocks[self._components[rank, name, w]] for w in workers]
            finish = agent.find("finish")
            if finish:
                steps = lambda t: self._run_block(t, finish[0])  # noqa: E731
                self._start_task(rank, name, -1, clocks, steps)
                return
            ended = np.maximum.reduce(clocks)
        self._finish_agent(rank, index, ended)

    def _finish_agent(self, rank: int, index: int, clock: Clock) -> None:
        call = self.calls[rank]
        call.left -= 1
        host = self._host_clock(rank)
        np.maximum(host, clock, out=host)
        ended = self.geometry.agent_names[index]
        for other, agent in enumerate(self.geometry.agents):
            name = self.geometry.agent_names[other]
            if ended in agent.get("after", ()):
                call.waiting[name] -= 1
                if call.waiting[name] == 0:
                    self._start_agent(rank, other, self._clocks_after(rank, agent))
        if call.left == 0:
            self._finish_call(rank)

    def _clocks_after(self, rank: int, agent: Op) -> list[Clock]:
        clocks = [
            self.clocks[c]
            for (r, a, _), c in self._components.items()
            if r == rank and a in agent["after"]
        ]
        return clocks

    def _finish_call(self, rank: int) -> None:
        """The user may read outputs and write inputs now."""
        component = self._components[rank, "<host>", 0]
        memory, call = self.memories[rank], self.calls[rank].number
        access = Access(_READ_BY_USER, False, lambda: f"the user of rank {rank} after call {call}")
        for decl in self.geometry.decls.values():
            if decl.kind == "tensor" and decl.op["role"] in ("out", "inout"):
                box = tuple((0, size) for size in decl.shape)
                tracker = memory.trackers[decl.name]
                tracker.touch(box, access, component, self.clocks[component])
                self.outputs[call][rank][decl.name] = memory.tensors[decl.name]
        self.clocks[component][component] += 1
        self._check_counters(memory)
        self._start_call(rank)

    # Agents.

    def _run_block(self, task: Task, op: Op) -> Steps:
        task.stage = op.name if op.name == "finish" else ""
        yield from Body(self.machine, task).run(op.body)

    _stream = _run_block

    def _head(self, task: Task, op: Op) -> Steps:
        memory = self.memories[task.rank]
        self.machine.use_control(task, op, write=True)
        memory.epoch += 1
        for decl in self.geometry.decls.values():
            if decl.kind == "counter":
                memory.channels[decl.name] = Channel(decl.shape)
        yield from Body(self.machine, task).run(op.body)

    def _worker(self, task: Task, launch: Op) -> Steps:
        body = Body(self.machine, task)
        assert task.worker is not None
        for position, stage in enumerate(launch.body):
            if stage.name != "stage":
                continue
            lo, hi = self.geometry.worker_range(launch, stage)
            if not lo <= task.worker < hi:
                continue
            queue = self.geometry.queue(stage, body.env)
            task.stage = stage.symbol
            dynamic = stage.get("queue", "static") == "dynamic"
            key = (task.rank, launch.symbol, position)
            q = task.worker - lo
            while True:
                if dynamic:
                    q = self.positions[key]
                    self.positions[key] += 1
                if q >= len(queue):
                    break
                bind_args(stage.args, queue[q], body.env, body.values)
                task.tile = tile_text(stage, queue[q])
                yield None
                yield from body.run(stage.body)
                q += hi - lo
        task.stage = task.tile = ""

    def _collective(self, task: Task, op: Op) -> Steps:
        """All ranks meet; the last one to come moves the data of all."""
        met = self.meetings.setdefault((task.call, op.symbol), [])
        met.append(task)
        if len(met) < self.geometry.world:
            yield Blocked(op, f"collective {op.symbol}", (), 0)
            return
        joined = np.maximum.reduce([t.clock for t in met])
        for other in met:
            np.maximum(other.clock, joined, out=other.clock)
        met.sort(key=lambda t: t.rank)
        run_collective(self.machine, op, met)
        joined = np.maximum.reduce([t.clock for t in met])
        for other in met:
            np.maximum(other.clock, joined, out=other.clock)
            if other is not task:
                self.blocked[other.rank, f"collective {op.symbol}"].remove(other)
                other.blocked = None
                self._push(other)

    # Balance.

    def _check_counters(self, memory: Memory) -> None:
        for name in sorted(memory.channels):
            if self.geometry.decls[name].kind != "counter":
                continue
            channel = memory.channels[name]
            for element in sorted(channel.notified.keys() | channel.asked.keys()):
                seen, asked = channel.notified.get(element, 0), channel.asked.get(element)
                if seen != asked:
                    raise self._unbalanced(
                        name,
                        element,
                        memory.rank,
                        f"counted to {seen}, but nothing waits for it"
                        if asked is None
                        else f"counted to {seen} where {asked} are expected",
                    )

    def _check_flags(self) -> None:
        slack: dict[str, int] = {}
        for op in self.geometry.program.walk():
            if op.name == "wait" and self.geometry.decls[op.symbol].kind == "flag":
                slack[op.symbol] = max(slack.get(op.symbol, 0), -int(op.get("epoch", 0)))
        for memory in self.memories:
            for name in sorted(memory.channels):
                channel = memory.channels[name]
                if self.geometry.decls[name].kind != "flag":
                    continue
                for element, seen in sorted(channel.notified.items()):
                    asked = channel.asked.get(element)
                    if asked is None or asked + slack.get(name, 0) < seen:
                        detail = "notified, but nothing waits for it"
                        raise self._unbalanced(name, element, memory.rank, detail)

    def _unbalanced(
        self, name: str, element: tuple[int, ...], rank: int, detail: str
    ) -> BalanceError:
        channel = f"{name}[{', '.join(map(str, element))}]"
        span = self.geometry.decls[name].op.span
        return BalanceError(span, channel=channel, rank=rank, detail=detail)
