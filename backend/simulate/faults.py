"""Faults on a virtual clock: ranks that die or lag, signals that get lost, words that go bad.

The run keeps a clock in seconds. Every wait has two limits, as at run time: *arrival* while the rank that
should signal has not started the call, *progress* once it has. A wait that runs out gives its rank the
error that the runtime gives, tells all other ranks to stop, and the run ends; nothing is left waiting.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from tilelink.backend.simulate import balance
from tilelink.backend.simulate.deadlock import Sources
from tilelink.backend.simulate.errors import RankStopped, WaitRanOut
from tilelink.backend.simulate.execute import Blocked, Task
from tilelink.backend.simulate.memory import garbage
from tilelink.backend.simulate.roles import is_inside
from tilelink.backend.simulate.scheduler import Inputs, Options, Scheduler
from tilelink.backend.simulate.trace import Notify, Traces
from tilelink.errors import TilelinkError

STEP = 1e-5  # seconds that a step takes, on average
TOLD = 1e-3  # seconds until the abort word of a rank that gave up is seen by the others


@dataclass(frozen=True, slots=True)
class Kill:
    """Rank ``rank`` does nothing from its step number ``step`` on."""

    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The ``number``-th notify of rank ``rank``, counted from 0 over all its calls, has no effect."""

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Delay:
    """From step ``step`` of rank ``rank`` on, the rank stands still for ``seconds`` of virtual time; with
    ``agent`` that agent of it only, from the agent's step number ``step``."""

    rank: int
    step: int
    seconds: float
    agent: str | None = None


@dataclass(frozen=True, slots=True)
class Corrupt:
    """At step ``step`` of rank ``rank``, ``change`` is added to its epoch, or to ``element`` (its number
    in row-major order) of flag or counter ``symbol``."""

    rank: int
    step: int
    change: int
    symbol: str | None = None
    element: int = 0


Fault: TypeAlias = "Kill | Drop | Delay | Corrupt"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a wait lasts, seconds: for a rank that has started the call, and for one that has not."""

    progress: float = 10.0
    arrival: float = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run with faults ended.

    ``outputs`` is a list over calls of a list over ranks of name to tensor: NaN in the call in which a
    rank failed, nothing for calls that it did not come to. ``errors`` is the error of each rank that got
    one, ``dead`` the ranks that were killed, ``ended`` the virtual seconds at which each other rank ended,
    ``struck`` when the first fault took effect (None if none did), ``allowed`` the limits that the
    first wait to run out was given in all (0 if none did).
    """

    outputs: list[list[dict[str, torch.Tensor]]]
    errors: dict[int, TilelinkError]
    dead: frozenset[int]
    ended: dict[int, float]
    struck: float | None
    allowed: float


@dataclass(slots=True, eq=False)
class _Watch:
    """The limits of one wait for one element: who should signal, since when the present limit runs."""

    task: Task
    blocked: Blocked
    element: int  # -1 for a collective; of words that are polled, the number of the region
    began: float
    started: float
    producer: int
    call: int
    here: bool
    stuck: bool = False


@dataclass(slots=True)
class Progress:
    """How far one rank has come: its steps, the calls it has started, its notifies."""

    steps: int = 0
    started: int = 0  # calls
    by_agent: dict[str, int] = field(default_factory=dict)
    notifies: int = 0
    dead: bool = False
    until: dict[str, float] = field(default_factory=dict)


class FaultRun(Scheduler):
    """A run of ``inputs`` in which ``faults`` strike; see :func:`survive`."""

    def __init__(
        self,
        traces: Traces,
        inputs: Sequence[Inputs],
        seed: int,
        faults: Sequence[Fault],
        limits: Limits | None = None,
        options: Options | None = None,
    ) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Task | _Watch | int]] = []
        self._ranks = [Progress() for _ in range(traces.geometry.world)]
        self._faults = list(faults)
        self._drops = {(f.rank, f.number) for f in faults if isinstance(f, Drop)}
        self.limits = limits or Limits()
        self.errors: dict[int, TilelinkError] = {}
        self.ended: dict[int, float] = {}
        self.struck: float | None = None
        self.allowed = 0.0
        self._watches: dict[Task, _Watch] = {}
        self._sources: Sources | None = None
        super().__init__(traces, inputs, seed, options)
        self.machine.lost = self._is_lost

    def outcome(self) -> Outcome:
        """Run to the end. RaceError, VersionError or BalanceError where a fault made the others go wrong,
        DeadlockError where only waits without a limit are left."""
        self._begin()
        while self._heap:
            self.now, _, item = heapq.heappop(self._heap)
            if isinstance(item, Task):
                self._turn(item)
            elif isinstance(item, _Watch):
                self._check(item)
            else:
                self._stop(item, None)
        for rank, state in enumerate(self._ranks):
            if state.dead or rank in self.errors:
                continue
            if any(task.rank == rank for task in self.tasks):
                raise self._deadlock()
        if self.machine.stale is not None:
            raise self.machine.stale
        if not self.errors and not self._drops and not any(s.dead for s in self._ranks):
            balance.check_flags(self.geometry, self.memories)
        dead = frozenset(r for r, state in enumerate(self._ranks) if state.dead)
        ended = {r: t for r, t in self.ended.items() if r not in dead}
        return Outcome(self.outputs, self.errors, dead, ended, self.struck, self.allowed)

    def progress_of(self, rank: int) -> Progress:
        """How far a rank has come."""
        return self._ranks[rank]

    # The clock.

    def _push(self, task: Task) -> None:
        self._watches.pop(task, None)
        took = STEP * (0.1 + 1.8 * self.hostility.random.random())
        self._at(self.now + took, task)

    def _at(self, time: float, item: Task | _Watch | int) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (time, self._pushed, item))

    def _turn(self, task: Task) -> None:
        state = self._ranks[task.rank]
        if state.dead or task.rank in self.errors:
            return
        until = max(state.until.get("", 0.0), state.until.get(task.agent, 0.0))
        if until > self.now:
            self._at(until, task)
            return
        self._strike(task, state)
        if state.dead or max(state.until.get("", 0.0), state.until.get(task.agent, 0.0)) > self.now:
            self._at(self.now, task)
            return
        state.steps += 1
        state.by_agent[task.agent] = state.by_agent.get(task.agent, 0) + 1
        if state.started <= task.call:
            state.started = task.call + 1
            self._arrived(task.rank)
        if self._step(task):
            self._push(task)
        if task.blocked is not None and task not in self._watches:
            self._watch(task, task.blocked)
        call = self.calls[task.rank]
        if call.left == 0 and call.number == len(self.inputs) - 1:
            self.ended.setdefault(task.rank, self.now)

    def _strike(self, task: Task, state: Progress) -> None:
        """Let the faults whose step has come take effect."""
        for fault in list(self._faults):
            if isinstance(fault, Drop) or fault.rank != task.rank:
                continue
            steps = state.steps
            if isinstance(fault, Delay) and fault.agent is not None:
                if task.agent != fault.agent:
                    continue
                steps = state.by_agent.get(task.agent, 0)
            if steps < fault.step:
                continue
            self._faults.remove(fault)
            self._struck()
            if isinstance(fault, Kill):
                state.dead = True
            elif isinstance(fault, Delay):
                state.until[fault.agent or ""] = self.now + fault.seconds
            elif fault.symbol is None:
                self.memories[fault.rank].epoch += fault.change
            else:
                place = self.geometry.slot(fault.symbol, self.calls[fault.rank].number)
                values = self.memories[fault.rank].channels[place].values
                values[fault.element] += fault.change
                self._wake(fault.rank, place)

    def _struck(self) -> None:
        self.struck = self.now if self.struck is None else self.struck

    def _is_lost(self, task: Task, _: Notify) -> bool:
        state = self._ranks[task.rank]
        state.notifies += 1
        lost = (task.rank, state.notifies - 1) in self._drops
        if lost:
            self._struck()
        return lost

    # Limits.

    def _watch(self, task: Task, blocked: Blocked) -> None:
        agent = self.geometry.agents[self.geometry.agent_names.index(task.agent)]
        if agent.name == "stream" or is_inside(blocked.symbol):
            return  # a stream has no limit of its own: the abort of a rank releases it
        call = task.call + 1
        if blocked.elements and self.geometry.decls[blocked.symbol].kind == "flag":
            call = blocked.need
        waits = blocked.elements or blocked.polled
        element = self.machine.missing(task.rank, blocked)[0] if waits else -1
        producer = self._producer(task, blocked, element)
        watch = _Watch(task, blocked, element, self.now, self.now, producer, call, False)
        watch.here = self._has_arrived(watch)
        self._watches[task] = watch
        self._at(self.now + self._limit(watch), watch)

    def _limit(self, watch: _Watch) -> float:
        return self.limits.progress if watch.here else self.limits.arrival

    def _has_arrived(self, watch: _Watch) -> bool:
        return self._ranks[watch.producer].started >= watch.call

    def _wake(self, rank: int, place: str) -> None:
        super()._wake(rank, place)
        for task in self.blocked.get((rank, place), ()):
            watch = self._watches.get(task)
            if watch is None or task.blocked is None:
                continue
            # A wait looks at one element after the other, each with limits of its own.
            if watch.element not in self.machine.missing(rank, task.blocked):
                self._watch(task, task.blocked)

    def _producer(self, task: Task, blocked: Blocked, element: int) -> int:
        """The rank whose signal is missing."""
        if blocked.polled:
            rank = blocked.polled[element][1]
            late = [r for r, other in enumerate(self._ranks) if other.started <= task.call]
            return rank if rank >= 0 else late[-1] if late else task.rank
        if element < 0:
            met = {t.rank for t in self.meetings[task.call, blocked.op.symbol]}
            return next((r for r in range(self.geometry.world) if r not in met), task.rank)
        if self._sources is None:
            self._sources = Sources(self.geometry, self.machine)
        index = self.geometry.element(blocked.symbol, element)
        found = self._sources.found.get((task.rank, blocked.symbol, index), [])
        return found[0].rank if found else task.rank

    def _arrived(self, rank: int) -> None:
        """A rank has started a call: for those that wait for it, the other limit begins."""
        for watch in list(self._watches.values()):
            if not watch.here and watch.producer == rank and self._has_arrived(watch):
                watch.here, watch.started = True, self.now
                self._at(self.now + self._limit(watch), watch)

    def _check(self, watch: _Watch) -> None:
        """A limit has passed; nothing to do if the wait is over or the limit has been set anew."""
        task = watch.task
        if self._watches.get(task) is not watch or self._ranks[task.rank].dead:
            return
        if task.rank in self.errors or self.now < watch.started + self._limit(watch) - 1e-9:
            return
        until = max(self._ranks[task.rank].until.values(), default=0.0)
        if until > self.now:
            self._at(until, watch)  # it is its own rank that stands still, and cannot look
            return
        if watch.here and not watch.stuck:
            # The producer is here, but may itself wait for a rank that is not.
            watch.stuck = True
            absent = [r for r, other in enumerate(self._ranks) if other.started < watch.call]
            if absent:
                watch.here, watch.started, watch.producer = False, self.now, absent[-1]
                self._at(self.now + self._limit(watch), watch)
                return
        self._stop(task.rank, watch)
        for rank in range(self.geometry.world):
            if rank != task.rank:
                self._at(self.now + TOLD * self.hostility.random.random(), rank)

    def _stop(self, rank: int, watch: _Watch | None) -> None:
        """The rank leaves its call: its own wait ran out, or it is told that another's did."""
        if self._ranks[rank].dead or rank in self.errors or rank in self.ended:
            return
        self.ended[rank] = self.now
        call = self.calls[rank].number
        for decl in self.geometry.decls.values():
            if decl.kind == "tensor" and decl.op["role"] in ("out", "inout"):
                self.outputs[call][rank][decl.name] = garbage(decl.shape, decl.dtype)
        if watch is None:
            first = next(iter(self.errors))
            why = f"a wait of rank {first} ran out"
            self.errors[rank] = RankStopped(rank=rank, why=why)
            return
        self.allowed = self.allowed or watch.started - watch.began + self._limit(watch)
        task, blocked = watch.task, watch.blocked
        channel, seen = f"collective {blocked.op.symbol}", 0
        if blocked.polled:
            channel, seen = f"@{blocked.symbol}", blocked.need - 1
        elif watch.element >= 0:
            channel = self.geometry.channel(blocked.symbol, watch.element)
            seen = self.memories[rank].channels[blocked.place].values[watch.element]
        late = "it has not started the call" if not watch.here else "it has started the call"
        self.errors[rank] = WaitRanOut(
            blocked.op.span,
            rank=rank,
            worker=0 if task.worker is None else task.worker,
            tile=task.place.text.strip() or task.agent,
            channel=channel,
            expected=blocked.need,
            seen=seen,
            producer=watch.producer,
            limit=self._limit(watch),
            why=f"{late}, and the limit of {self._limit(watch):g} s has passed",
        )


def survive(
    traces: Traces,
    inputs: Sequence[Inputs],
    faults: Sequence[Fault],
    seed: int = 0,
    limits: Limits | None = None,
) -> Outcome:
    """Run ``inputs``, one entry a call, on ``traces`` while ``faults`` strike; how it ended."""
    return FaultRun(traces, inputs, seed, faults, limits).outcome()
