"""Executes the instructions of one task (a worker, a stream, a head) on the memory of the ranks.

A task is a generator. It yields None where the scheduler may run another task, and a
:class:`Blocked` where it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from tilelink.backend.dtypes import TORCH_DTYPES, sum_dtype
from tilelink.backend.simulate.errors import BalanceError, BoundsError, VersionError
from tilelink.backend.simulate.geometry import Env, Tile
from tilelink.backend.simulate.memory import Channel, Clock, Memory, Released, View
from tilelink.backend.simulate.roles import Share
from tilelink.backend.simulate.trace import (
    CONTROL,
    Copy,
    Instruction,
    Load,
    Notify,
    Place,
    Pure,
    Region,
    Set,
    Store,
    Traces,
    Transfer,
    Wait,
    check_shape,
)
from tilelink.backend.simulate.versions import Versions
from tilelink.backend.tile_ops import apply
from tilelink.ir import Op, Value


@dataclass(slots=True, eq=False)
class Blocked:
    """A wait that is not satisfied: the elements of a channel on this rank, and the value needed.

    ``place``: the name of the channel's slot. Or words that are polled, by region and the rank that they are of
    (-1: not known), in the slot ``place`` of their buffer.
    """

    op: Op
    symbol: str
    elements: tuple[int, ...]
    need: int
    equal: bool = False
    place: str = ""
    polled: tuple[tuple[Region, int], ...] = ()

    def __post_init__(self) -> None:
        self.place = self.place or self.symbol


NOWHERE = Place(0, "")
Steps: TypeAlias = Generator[Blocked | None, None, None]


@dataclass(slots=True, eq=False)
class Task:
    """One agent of one rank in one call: its place in the vector clocks, and where it stands.

    ``pending`` are stores that have not reached memory, ``streaming`` those of the async proxy, and
    ``held`` the notifies that the worker holds back, each with the position of its stage; ``draws`` says
    that its next step draws from a dynamic queue.
    """

    rank: int
    call: int
    agent: str
    component: int
    clock: Clock
    kernel: bool
    view: View
    worker: int | None = None
    proxy: View | None = None
    place: Place = NOWHERE
    steps: Steps | None = None
    blocked: Blocked | None = None
    controlled: tuple[Op, Place] | None = None
    pending: list[tuple[int, Region, Any, int]] = field(default_factory=list)
    streaming: list[tuple[int, Region, Any, int]] = field(default_factory=list)
    held: list[tuple[Op, Notify]] = field(default_factory=list)
    draws: bool = False

    def describe(self, place: Place | None = None) -> str:
        """Rank, agent, worker, tile and call in words."""
        worker = "" if self.worker is None else f" worker {self.worker}"
        name = self.agent if self.agent == "head" else f"@{self.agent}"
        text = (self.place if place is None else place).text
        return f"rank {self.rank} {name}{worker}{text} (call {self.call})"


# What is stored where words are emptied.
EMPTIED = object()


@dataclass(slots=True, eq=False)
class Flight:
    """Words of one store on their way to ``rank``."""

    task: Task
    rank: int
    region: Region
    value: Any
    uid: int
    epoch: int


def halves(flight: Flight) -> list[Flight]:
    """A flight as two that land each by itself: words come in any order. One where it has a single row."""
    found = []
    for region, at in flight.region.halves:
        value = flight.value
        if isinstance(value, torch.Tensor) and value.dim():
            value = value[at]
        found.append(Flight(flight.task, flight.rank, region, value, flight.uid, flight.epoch))
    return found or [flight]


def lacking(values: Sequence[int], elements: Sequence[int], need: int, equal: bool) -> list[int]:
    """The elements of a channel that keep a wait for ``need`` from passing."""
    if equal:
        return [e for e in elements if values[e] != need]
    # Compared cyclically, as 32-bit numbers.
    return [e for e in elements if (values[e] - need) & 0x80000000]


class Machine:
    """What tasks share: the memory of all ranks, and the choices of the scheduler.

    ``values`` false leaves out all that only computes values, for a program whose course depends on
    none; ``apart`` maps the component of a worker to that of its stores through the async proxy.
    """

    def __init__(
        self,
        traces: Traces,
        memories: list[Memory],
        wake: Callable[[int, str], None],
        late: Callable[[], bool],
        versions: Versions | None,
        values: bool,
    ) -> None:
        self.traces = traces
        self.geometry = traces.geometry
        self.places = traces.geometry.places
        self.memories = memories
        self.wake = wake
        self.late = late
        self.versions = versions
        self.values = values
        self.apart: dict[int, int] = {}
        self.streamed: dict[int, int] = {}
        self.stale: VersionError | None = None
        # Stores of words under way, which the scheduler lets land, and what the host of a rank knew when it
        # began a call.
        self.flying: dict[int, list[Flight]] = {}
        self.launch: Callable[[Flight], None] = lambda flight: None
        self.began: dict[tuple[int, int], Clock] = {}
        # Whether a notify is to be lost.
        self.lost: Callable[[Task, Notify], bool] | None = None
        # Who has made which notify of which call, for the explanation of a deadlock.
        self.made: list[tuple[int, Place, Op, int, tuple[int, ...]]] = []

    def control(self, task: Task, op: Op) -> None:
        """Use of the epoch and the counters, which the head writes; its first use by a task, and its
        last, are all that a write of the head can race with."""
        if task.controlled is None:
            self.read_control(task, op, task.place)
        task.controlled = (op, task.place)

    def read_control(self, task: Task, op: Op, place: Place) -> None:
        """Record a use of the epoch and the counters."""
        tracker = self.memories[task.rank].trackers[CONTROL]
        tracker.read(self.traces.control, op, task, place, task.view)

    def end(self, task: Task) -> None:
        """The task is over."""
        self.flush(task)
        if task.controlled is not None:
            self.read_control(task, *task.controlled)
        task.clock[task.component] += 1

    def write_control(self, task: Task, op: Op) -> None:
        """The head advances the epoch and clears words."""
        tracker = self.memories[task.rank].trackers[CONTROL]
        tracker.write(self.traces.control, op, task, task.place, task.view)

    def release(self, task: Task) -> Clock:
        """Make every pending store of ``task`` visible; the clock that its release carries."""
        if task.pending:
            self.flush(task)
        carried = task.clock.copy()
        task.clock[task.component] += 1
        return carried

    def fence(self, task: Task) -> None:
        """A proxy fence: what the task has seen holds for its async proxy too."""
        if task.proxy is not None:
            task.proxy.fenced = task.clock.copy()
            task.clock[task.component] += 1

    def flush(self, task: Task) -> None:
        """Let the store buffer of ``task`` reach memory, in order."""
        if task.pending:
            for rank, region, value, uid in task.pending:
                self.land(task, rank, region, value, uid)
            task.pending.clear()

    def drain(self, task: Task) -> None:
        """The stores through the async proxy have completed."""
        component = self.apart.get(task.component) if self.apart else None
        if component is None:
            return
        for rank, region, value, uid in task.streaming:
            self.land(task, rank, region, value, uid)
        task.streaming.clear()
        task.clock[component] = self.streamed[component]
        self.streamed[component] += 1

    def land(self, task: Task, rank: int, region: Region, value: Any, uid: int) -> None:
        """A store reaches memory."""
        memory, call = self.memories[rank], task.call
        if value is EMPTIED:
            self._empty(memory, region, call)
            return
        place = self.places[call & 1][region.symbol]
        if self.values:
            target = memory.tensor(self.geometry.decls[region.symbol], place)
            if isinstance(value, torch.Tensor):
                shape = region.shape
                if shape is None:
                    shape = tuple(target[region.key].shape)
                if value.dim() and value.shape != shape:
                    detail = f"a value of shape {list(value.shape)} into a region of {list(shape)}"
                    raise BoundsError(None, symbol=region.symbol, detail=detail)
            target[region.key] = value
        if self.versions is not None and region.row >= 0:
            self.versions.written(memory, place, region.mask, uid, call)

    def _empty(self, memory: Memory, region: Region, call: int) -> None:
        """The sentinel is back in words that were read."""
        decl, place = self.geometry.decls[region.symbol], self.places[call & 1][region.symbol]
        memory.words(decl, place)[0][region.mask] = 0
        if self.values:
            memory.tensor(decl, place)[region.key] = float("nan")
        if self.versions is not None and region.row >= 0:
            self.versions.emptied(memory, place, region.mask)

    def touch_down(self, flight: Flight) -> None:
        """Some words reach memory, and whoever polls them goes on."""
        flights = self.flying.get(flight.task.rank, [])
        if flight not in flights:
            return
        flights.remove(flight)
        task, region = flight.task, flight.region
        self.land(task, flight.rank, region, flight.value, flight.uid)
        place = self.places[task.call & 1][region.symbol]
        memory = self.memories[flight.rank]
        epochs, writers = memory.words(self.geometry.decls[region.symbol], place)
        epochs[region.mask], writers[region.mask] = flight.epoch, task.rank
        self.wake(flight.rank, place)

    def land_all(self, rank: int) -> None:
        """The launch of a rank has ended, and all words that it stored have landed."""
        for flight in list(self.flying.get(rank, ())):
            self.touch_down(flight)

    def missing(self, rank: int, blocked: Blocked) -> list[int]:
        """The elements that still keep a wait from passing; none of what is waited for otherwise.

        Of words that are polled, the numbers of the regions in which some are missing.
        """
        if blocked.polled:
            decl = self.geometry.decls[blocked.symbol]
            epochs, _ = self.memories[rank].words(decl, blocked.place)
            # A sentinel that is gone says nothing of the call that wrote there.
            any_call = decl.op["words"] == "sentinel"
            found = []
            for number, (region, _) in enumerate(blocked.polled):
                held = epochs[region.mask]
                absent = held == 0 if any_call else held != blocked.need
                if 1 in absent.tobytes():
                    found.append(number)
            return found
        if not blocked.elements:
            return []
        values = self.memories[rank].channels[blocked.place].values
        return lacking(values, blocked.elements, blocked.need, blocked.equal)


class Runner:
    """Executes instructions for one task."""

    def __init__(self, machine: Machine, task: Task) -> None:
        self.machine = machine
        self.geometry = machine.geometry
        self.task = task
        self.memory = machine.memories[task.rank]
        self.values: dict[str, Any] = {}
        self._env: Env | None = None  # where a block is traced while it runs
        self._due: list[Notify] = []
        self._written = machine.traces.written
        self._places = machine.places[task.call & 1]

    def block(
        self,
        op: Op,
        number: int = 0,
        tiles: tuple[Tile, ...] = (),
        share: Share | None = None,
    ) -> Steps:
        """The steps of the block of ``op``, position ``number`` of its queue, to be executed now.

        ``share``: of a task what one role does, and no more.
        """
        task, traces = self.task, self.machine.traces
        found = traces.trace(task.rank, task.agent, op, number, tiles)
        if task.held:
            self._due = [ins for stage, ins in task.held if stage is op]
        if found is not None:
            task.place = found.place
            self._env = None
            whole = found.all if self.machine.values else found.effects
            return self._run(whole if share is None else share.of(whole))
        if share is not None and share.until is not None:
            return self._run(())  # values rule its course: the group does all of it
        env = {**self.geometry.env(task.rank), **self.memory.scalars}
        for name, decl in self.geometry.decls.items():
            if decl.kind in ("tensor", "buffer") and decl.dtype in ("int32", "int64", "bool"):
                env[name] = self.memory.tensor(decl)
        self._env = env
        tracer = traces.tracer(task.rank, task.agent, op, number, tiles, env, self.values, True)
        task.place = tracer.place
        return self._run(tracer.block(op.body))

    def _run(self, instructions: Iterable[Instruction]) -> Steps:
        values, task, machine, memory = self.values, self.task, self.machine, self.memory
        for ins in instructions:
            if isinstance(ins, Wait):
                if task.controlled is None:
                    machine.read_control(task, ins.op, task.place)
                task.controlled = (ins.op, task.place)
                need = ins.need if ins.counter else memory.epoch + ins.need
                place = self._places[ins.symbol]
                channel, blocked = memory.channels[place], None
                yield None
                while lacking(channel.values, ins.elements, need, ins.equal):
                    if blocked is None:
                        blocked = Blocked(ins.op, ins.symbol, ins.elements, need, ins.equal, place)
                    yield blocked
                self._passed(ins, channel, need)
            elif isinstance(ins, Load):
                if ins.words:
                    yield from self._poll(ins)
                self._load(ins)
            elif isinstance(ins, Store):
                if self._due:
                    yield from self._perform_due()
                self._store(ins)
                if ins.remote:
                    yield None
            elif isinstance(ins, Notify):
                if ins.delay and task.place.op is not None:
                    task.held.append((task.place.op, ins))
                else:
                    if task.controlled is None:
                        machine.read_control(task, ins.op, task.place)
                    task.controlled = (ins.op, task.place)
                    yield None
                    self._signal(ins)
            elif isinstance(ins, Pure):
                given = [values[n] for n in ins.operands]
                self._set(ins.op.results[0], apply(ins.op, given, ins.shape))
            elif isinstance(ins, Set):
                values[ins.name] = ins.value
            elif isinstance(ins, Transfer):
                yield from self._transfer(ins)
            elif isinstance(ins, Copy):
                found = [values[n] for n in ins.source]
                for name, value in zip(ins.to, found, strict=True):
                    self._name(name, value)
            else:
                self._name(ins.name, memory.scalars[ins.symbol])

    def _perform_due(self) -> Steps:
        """The notifies that were held back until a store of a later task of this stage."""
        due, self._due = self._due, []
        self.task.held = [(op, ins) for op, ins in self.task.held if ins not in due]
        for ins in due:
            yield from self.notify(ins)

    def flush(self, drain: bool) -> Steps:
        """Perform all that is held back."""
        held, self.task.held = self.task.held, []
        if drain:
            self.machine.drain(self.task)
        for _, ins in held:
            yield from self.notify(ins)

    # Values.

    def _set(self, result: Value, value: Any) -> None:
        if not result.type.shape and isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.reshape(()).item()
        self._name(result.name, value)

    def _name(self, name: str, value: Any) -> None:
        if self._env is not None and isinstance(value, int):
            self._env[name] = value
        self.values[name] = value

    # Memory.

    def see(self, ins: Load | Transfer, part: int, region: Region, home: int | None = None) -> None:
        """A read, in the memory of rank ``home`` or of this one: tell the detectors of it."""
        if region.row < 0:
            return
        task, machine = self.task, self.machine
        home = task.rank if home is None else home
        memory = machine.memories[home]
        if task.pending:
            # A task sees its own stores.
            kept = []
            for store in task.pending:
                if store[0] == home and store[1].symbol == region.symbol:
                    machine.land(task, *store)
                else:
                    kept.append(store)
            task.pending = kept
        view, polled = task.view, -1
        if isinstance(ins, Load):
            if ins.tma:
                view = task.proxy or view
            elif ins.words:
                polled = task.call
        place = self._places[region.symbol]
        memory.trackers[place].read(region.row, ins.op, task, ins.place, view, polled)
        if machine.versions is not None and machine.stale is None:
            try:
                machine.versions.read(memory, place, ins, part, region, task.call, task)
            except VersionError as error:
                # A race says more of the same fault; this is what remains if none is found.
                machine.stale = error.with_traceback(None)

    def _poll(self, ins: Load) -> Steps:
        """Until each word that is read is there. Then whoever wrote one has begun the call there."""
        task, machine, symbol = self.task, self.machine, ins.op.symbol
        place = self._places[symbol]
        several = ins.op.name == "load_sum"
        parts = tuple((part, rank if several else -1) for rank, part in enumerate(ins.parts))
        need = self.memory.epoch
        blocked = Blocked(ins.op, symbol, (), need, place=place, polled=parts)
        yield None
        while machine.missing(task.rank, blocked):
            yield blocked
        _, writers = self.memory.words(self.geometry.decls[symbol], place)
        for part in ins.parts:
            for rank in sorted(set(writers[part.mask].reshape(-1).tolist())):
                began = machine.began.get((rank, task.call))
                if began is not None:
                    np.maximum(task.clock, began, out=task.clock)

    def _value(self, region: Region, home: int | None = None) -> torch.Tensor:
        place = self._places[region.symbol]
        memory = self.memory if home is None else self.machine.memories[home]
        return memory.tensor(self.geometry.decls[region.symbol], place)[region.key]

    def _load(self, ins: Load) -> None:
        for number, part in enumerate(ins.parts):
            self.see(ins, number, part, ins.homes[number] if ins.homes else None)
        if self.machine.values:
            self._take(ins)
        for part in ins.parts if ins.empty else ():
            self._empty(ins, part)

    def _empty(self, ins: Load, region: Region) -> None:
        """Put the sentinel back into words that were read; it may stay in the store buffer until a release."""
        task, machine = self.task, self.machine
        if region.row >= 0:
            tracker = self.memory.trackers[self._places[region.symbol]]
            tracker.write(region.row, ins.op, task, ins.place, task.view, polled=task.call)
        if machine.late():
            task.pending.append((task.rank, region, EMPTIED, -1))
        else:
            machine.land(task, task.rank, region, EMPTIED, -1)

    def _take(self, ins: Load) -> None:
        """The value of a load."""
        op, result = ins.op, ins.op.results[0]
        dtype = TORCH_DTYPES[result.type.dtype]
        if op.name == "load_sum":
            homes = ins.homes or (None,) * len(ins.parts)
            terms = [self._value(*at) for at in zip(ins.parts, homes, strict=True)]
            if ins.own:
                terms.insert(self.task.rank, self.values[ins.own])
            wide = sum_dtype(terms[0].dtype)
            total = terms[0].to(wide)
            for term in terms[1:]:
                total = total + term.to(wide)
            self._set(result, total.to(dtype))
            return
        found = self._value(ins.parts[0])
        check_shape(op, op.symbol, tuple(found.shape), ins.shape)
        found = found.to(dtype)
        # A later store must not change what this load has seen.
        changes = ins.empty or ins.parts[0].symbol in self._written
        self._set(result, found.clone() if changes else found)

    def _store(self, ins: Store) -> None:
        value = self.values[ins.value] if self.machine.values else None
        self.write(ins, ins.rank, ins.region, value, ins.tma)

    def write(
        self, ins: Store | Transfer, rank: int, region: Region, value: Any, tma: bool
    ) -> None:
        """A write to memory of ``rank``: it may stay in the store buffer until a release."""
        task, machine = self.task, self.machine
        component = machine.apart.get(task.component) if tma else None
        if region.row >= 0:
            stamp = None if component is None else (component, machine.streamed[component])
            tracker = machine.memories[rank].trackers[self._places[region.symbol]]
            tracker.write(region.row, ins.op, task, ins.place, task.view, stamp)
        if isinstance(ins, Store) and ins.words:
            flight = Flight(task, rank, region, value, ins.uid, self.memory.epoch)
            for part in halves(flight):
                machine.flying.setdefault(task.rank, []).append(part)
                machine.launch(part)
        elif not machine.late():
            machine.land(task, rank, region, value, ins.uid)
        elif component is not None:
            task.streaming.append((rank, region, value, ins.uid))
        else:
            task.pending.append((rank, region, value, ins.uid))

    def _transfer(self, ins: Transfer) -> Steps:
        """A copy engine reads late and lands late: other tasks may run before, between and after."""
        yield None
        self.see(ins, 0, ins.source)
        found = self._value(ins.source).clone() if self.machine.values else None
        yield None
        self.write(ins, ins.rank, ins.target, found, False)

    # Synchronisation.

    def _passed(self, ins: Wait, channel: Channel, need: int) -> None:
        """A wait has passed: the task knows what was released to it."""
        task, released, asked = self.task, channel.released, channel.asked
        acquires = not ins.relaxed and not ins.carried
        for element in ins.elements:
            if acquires:
                carried = released.get(element)
                if carried is not None:
                    carried.acquire(task.clock, task.kernel, ins.gpu)
            if asked.get(element, need) <= need:
                asked[element] = need
        if ins.proxy:
            self.machine.fence(task)

    def notify(self, ins: Notify) -> Steps:
        """Perform a notify now."""
        self.machine.control(self.task, ins.op)
        yield None
        self._signal(ins)

    def _signal(self, ins: Notify) -> None:
        task, machine = self.task, self.machine
        if machine.lost is not None and machine.lost(task, ins):
            return
        if ins.drain:
            machine.drain(task)
        # At device scope, only kernels of this rank are told anything.
        mute = (
            ins.relaxed or ins.carried or (ins.gpu and not (task.kernel and ins.rank == task.rank))
        )
        carried = None if mute else machine.release(task)
        machine.made.append((task.call, ins.place, ins.op, ins.rank, ins.elements))
        if ins.counter:
            for element in ins.elements:
                self._count(ins, ins.symbol, element, carried)
            return
        kernel = task.kernel and ins.rank == task.rank
        release = Released()
        if ins.through is not None:
            symbol, slot = ins.through
            seen = self._count(ins, symbol, slot, carried)
            counter = self.memory.channels[symbol]
            counter.asked[slot] = ins.count
            if seen > ins.count:
                raise BalanceError(
                    ins.op.span,
                    channel=self.geometry.channel(symbol, slot),
                    rank=task.rank,
                    detail=f"notified {seen} times where {ins.count} are expected",
                )
            if seen < ins.count:
                return
            # The last notify has acquired the counter: its release carries the others.
            before = counter.released.get(slot)
            if carried is not None and before is not None:
                for clock in before.taken(task.kernel, ins.gpu):
                    release.add(clock, kernel, ins.gpu)
        if carried is not None:
            release.add(carried, kernel, ins.gpu)
        place = self._places[ins.symbol]
        channel = machine.memories[ins.rank].channels[place]
        epoch = self.memory.epoch
        if ins.carried:
            # Who polls the words sees those of all who store some.
            (element,) = ins.elements
            last, count = channel.carried.get(element, (epoch, 0))
            channel.carried[element] = epoch, count + 1 if last == epoch else 1
            if channel.carried[element][1] < ins.count:
                return
        for element in ins.elements:
            channel.values[element] = epoch
            channel.released[element] = release
            if channel.notified.get(element) == epoch:
                channel.twice.setdefault(element, ins.op)
            channel.notified[element] = epoch
        machine.wake(ins.rank, place)

    def _count(self, ins: Notify, symbol: str, element: int, carried: Clock | None) -> int:
        """Add one to a local counter; its releases form one chain."""
        channel = self.memory.channels[symbol]
        if carried is not None:
            release = channel.released.get(element)
            if release is None:
                release = channel.released[element] = Released()
            # A counter that counts signals to a peer is read by the agent that counts last.
            release.add(carried, self.task.kernel, ins.gpu)
        channel.values[element] += 1
        seen = channel.values[element]
        channel.notified[element] = seen
        self.machine.wake(self.task.rank, symbol)
        return seen
