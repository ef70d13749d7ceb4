"""Values: the ops of a fused program, executed literally by one task (a worker, a stream, a head).

A task is a generator. It yields None where the scheduler may run another task, and a
:class:`Blocked` where it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from tilelink.backend.simulate.errors import BalanceError, BoundsError
from tilelink.backend.simulate.geometry import (
    Box,
    Env,
    Geometry,
    Tile,
    bind_args,
)
from tilelink.backend.simulate.memory import Access, Clock, Memory
from tilelink.backend.tile_ops import TORCH_DTYPES, apply
from tilelink.errors import InternalError
from tilelink.ir import At, Expr, Op, Range, Ref

BATCH = 64  # an inner loop that nothing synchronises runs with tiles so many times larger


@dataclass(frozen=True, slots=True)
class Blocked:
    """A wait that is not satisfied: the elements of a channel on this rank, and the value needed."""

    op: Op
    symbol: str
    elements: tuple[tuple[int, ...], ...]
    need: int


Steps: TypeAlias = Generator[Blocked | None, None, None]
BodySteps: TypeAlias = Generator[Blocked | None, None, list[Any]]


@dataclass(slots=True, eq=False)
class Task:
    """One agent of one rank in one call: its place in the vector clocks, and where it stands."""

    rank: int
    call: int
    agent: str
    component: int
    clock: Clock
    worker: int | None = None
    stage: str = ""
    tile: str = ""
    steps: Steps | None = None
    blocked: Blocked | None = None
    pending: list[Callable[[], None]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Stage and tile in words, with a space in front."""
        if not self.tile:
            return f" {self.stage}" if self.stage else ""
        return f" stage @{self.stage} tile {self.tile}"

    def describe(self) -> str:
        """Rank, agent, worker, tile and call in words."""
        worker = "" if self.worker is None else f" worker {self.worker}"
        name = self.agent if self.agent == "head" else f"@{self.agent}"
        return f"rank {self.rank} {name}{worker}{self.place} (call {self.call})"

    def snapshot(self) -> Callable[[], str]:
        """``describe`` as it is now, rendered when asked for."""
        rank, call, agent, worker = self.rank, self.call, self.agent, self.worker
        stage, tile = self.stage, self.tile
        return lambda: Task(rank, call, agent, 0, self.clock, worker, stage, tile).describe()


def tile_text(op: Op, tiles: tuple[Tile, ...]) -> str:
    """The tile of a queue position as ``m=0..16 n=8..16``."""
    return " ".join(
        f"{arg.name}={t.start}..{t.stop}" if arg.type.is_tile else f"{arg.name}={t.start}"
        for arg, t in zip(op.args, tiles, strict=False)
    )


class Machine:
    """What tasks share: the memory of all ranks, and the choices of the scheduler."""

    def __init__(
        self,
        geometry: Geometry,
        memories: list[Memory],
        wake: Callable[[int, str], None],
        late: Callable[[], bool],
    ) -> None:
        self.geometry = geometry
        self.memories = memories
        self.wake = wake
        self.late = late
        # Who has made which notify of which call, for the explanation of a deadlock.
        self.made: set[tuple[Any, ...]] = set()
        self._batch: dict[int, int] = {}
        self._written = _written_symbols(geometry)

    def touch(self, task: Task, rank: int, symbol: str, box: Box, op: Op, write: bool) -> None:
        """Tell the race detector of an access by ``task``."""
        if symbol in self._written:
            access = Access(op, write, task.snapshot())
            self.memories[rank].trackers[symbol].touch(box, access, task.component, task.clock)

    def is_written(self, op: Op) -> bool:
        """Whether the program writes what the load ``op`` reads."""
        own = op.get("own")
        return op.symbol in self._written or (own is not None and own.symbol in self._written)

    def use_control(self, task: Task, op: Op, write: bool = False) -> None:
        """Use of the epoch and the counters, which the head writes."""
        self.touch(task, task.rank, CONTROL, ((0, 1),), op, write)

    def released(self, task: Task) -> Clock:
        """Make every pending store of ``task`` visible; the clock that its release carries."""
        self.flush(task)
        carried = task.clock.copy()
        task.clock[task.component] += 1
        return carried

    def flush(self, task: Task) -> None:
        """Let the store buffer of ``task`` reach memory, in order."""
        for write in task.pending:
            write()
        task.pending.clear()

    def batch(self, op: Op) -> int:
        """By how much the tiles of the loop ``op`` may grow without a change of meaning."""
        found = self._batch.get(id(op))
        if found is None:
            found = BATCH if _may_batch(op) else 1
            self._batch[id(op)] = found
        return found

    def need(self, task: Task, op: Op, env: Env) -> int:
        """The value that a wait asks for."""
        if self.geometry.decls[op.symbol].kind == "counter":
            return int(self.geometry.value(op.get("count", 1), env))
        return self.memories[task.rank].epoch + int(op.get("epoch", 0))

    def missing(self, rank: int, blocked: Blocked) -> list[tuple[int, ...]]:
        """The elements that still keep a wait from passing."""
        values = self.memories[rank].channels[blocked.symbol].values
        need = np.int32(blocked.need)
        with np.errstate(over="ignore"):
            return [e for e in blocked.elements if np.int32(values[e] - need) < 0]


CONTROL = "<epoch and counters>"


def _written_symbols(geometry: Geometry) -> frozenset[str]:
    written = {CONTROL} | {d.name for d in geometry.decls.values() if d.kind == "buffer"}
    for op in geometry.program.walk():
        if op.name == "store" and op.ref is not None:
            written.add(op.ref.symbol)
        elif op.name in ("transfer", "collective") and isinstance(op.get("to"), Ref):
            written.add(op["to"].symbol)
    return frozenset(written)


def _expressions(op: Op) -> list[Expr]:
    refs = [op.ref, *(v for _, v in op.attrs if isinstance(v, Ref))]
    found = [v for _, v in op.attrs if isinstance(v, Expr)]
    for ref in refs:
        for item in ref.index if ref is not None else ():
            if isinstance(item, Expr):
                found.append(item)
            elif isinstance(item, Range):
                found += [item.lo, item.hi]
            elif isinstance(item, At):
                found.append(item.start)
    return found


def _may_batch(op: Op) -> bool:
    """Meaning never depends on a tile size unless an op has an effect a tile, or names the tile's fields.

    A loop with a ``segment`` keeps its tiles inside of one owner's block whatever their size, so the
    start of a tile may be named there.
    """
    if any(o.name in ("wait", "notify", "transfer", "store") for o in op.walk()):
        return False
    mine = {a.name for a in op.args if a.type.is_tile}
    starts = {f"{name}.start" for name in mine} if op.get("segment") is not None else set()
    used = {
        name
        for inner in op.walk()
        if inner is not op
        for expr in _expressions(inner)
        for name in expr.names
        if name.rpartition(".")[0] in mine
    }
    return used <= starts


class Body:
    """Executes the ops of a block for one task."""

    def __init__(self, machine: Machine, task: Task) -> None:
        self.machine = machine
        self.geometry = machine.geometry
        self.task = task
        self.memory = machine.memories[task.rank]
        self.env: Env = {**self.geometry.env(task.rank), **self.memory.scalars}
        for name, tensor in self.memory.tensors.items():
            if not tensor.is_floating_point():
                self.env[name] = tensor
        self.values: dict[str, Any] = {}

    def run(self, ops: tuple[Op, ...]) -> BodySteps:
        """Execute ``ops``; the values of a final ``yield``."""
        for op in ops:
            name = op.name
            if name == "yield":
                return [self.values[v.name] for v in op.operands]
            if name in ("for_tiles", "for_range"):
                yield from self._loop(op)
            elif name in ("wait", "notify", "transfer"):
                condition = op.get("if")
                if condition is None or self.geometry.value(condition, self.env):
                    yield from getattr(self, f"_{name}")(op)
            elif name == "store":
                yield from self._store(op)
            else:
                self._set(op, self._evaluate(op))
        return []

    def _set(self, op: Op, value: Any) -> None:
        result = op.results[0]
        if not result.type.shape and isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.reshape(()).item()
        if isinstance(value, int):
            self.env[result.name] = value
        self.values[result.name] = value

    def _loop(self, op: Op) -> Steps:
        carried_from = 0
        positions: list[tuple[Tile, ...]]
        if op.name == "for_range":
            lo, hi = (self.geometry.value(op[k], self.env) for k in ("lo", "hi"))
            positions = [(Tile(i, i + 1, i),) for i in range(lo, hi)]
        elif op.get("bounds"):
            lo, hi = (int(self.values[v.name]) for v in op.operands[:2])
            carried_from = 2
            positions = self.geometry.bounded(op, lo, hi, self.machine.batch(op))
        else:
            positions = self.geometry.queue(op, self.env, self.machine.batch(op))
        carried = [self.values[v.name] for v in op.operands[carried_from:]]
        loop_args = op.args[: len(op.args) - len(carried)]
        names = [a.name for a in op.args[len(loop_args) :]]
        for tiles in positions:
            bind_args(loop_args, tiles, self.env, self.values)
            self.values.update(zip(names, carried, strict=True))
            carried = yield from self.run(op.body)
        for result, value in zip(op.results, carried, strict=True):
            self.values[result.name] = value
            if isinstance(value, int):
                self.env[result.name] = value

    def _evaluate(self, op: Op) -> Any:
        name = op.name
        if name == "load":
            return self._load(op)
        if name == "load_sum":
            return self._load_sum(op)
        if name == "param":
            return self.memory.scalars[op.symbol]
        if name == "constant":
            return op["value"]
        if name == "index":
            tile = op.operands[0].name
            return torch.arange(
                self.env[f"{tile}.start"],
                self.env[f"{tile}.stop"],
                dtype=TORCH_DTYPES[op.results[0].type.dtype],
            )
        if name == "bound":
            return self.env[f"{op.operands[0].name}.{op['which']}"]
        shape: tuple[int, ...] = ()
        if name in ("zeros", "full", "reshape"):
            shape = self.geometry.shape(op.results[0], self.env)
        return apply(op, [self.values[v.name] for v in op.operands], shape)

    def _read(self, op: Op, ref: Ref) -> torch.Tensor:
        key, box = self.geometry.region(ref, self.env, self.values)
        self.machine.touch(self.task, self.task.rank, ref.symbol, box, op, write=False)
        return self.memory.tensors[ref.symbol][key]

    def _load(self, op: Op) -> torch.Tensor:
        assert op.ref is not None
        when = op.get("when")
        own = when is not None and self.geometry.value(when, self.env)
        found = self._read(op, op["own"] if own else op.ref)
        expected = self.geometry.shape(op.results[0], self.env)
        if tuple(found.shape) != expected:
            detail = f"a load of shape {list(found.shape)} where its type says {list(expected)}"
            raise BoundsError(op.span, symbol=op.symbol, detail=detail)
        found = found.to(TORCH_DTYPES[op.results[0].type.dtype])
        # A later store must not change what this load has seen.
        return found.clone() if self.machine.is_written(op) else found

    def _load_sum(self, op: Op) -> torch.Tensor:
        assert op.ref is not None
        own = op.get("own")
        total: torch.Tensor | None = None
        for source in range(self.geometry.world):
            if own is not None and source == self.task.rank:
                part = self._read(op, own)
            else:
                ref = Ref(op.ref.symbol, (Expr.const(source), *op.ref.index[1:]))
                part = self._read(op, ref)
            total = part.float() if total is None else total + part.float()
        assert total is not None
        return total.to(TORCH_DTYPES[op.results[0].type.dtype])

    def _write(
        self, op: Op, rank: int, symbol: str, key: tuple[Any, ...], box: Box, value: Any
    ) -> None:
        """A write to memory of ``rank``: remote ones may stay in the store buffer until a release."""
        self.machine.touch(self.task, rank, symbol, box, op, write=True)
        target = self.machine.memories[rank].tensors[symbol]
        if isinstance(value, torch.Tensor):
            shape = target[key].shape
            if value.dim() and value.shape != shape:
                detail = f"a value of shape {list(value.shape)} into a region of {list(shape)}"
                raise BoundsError(op.span, symbol=symbol, detail=detail)
            value = value.to(target.dtype)

        def land() -> None:
            target[key] = value

        if rank != self.task.rank and self.machine.late():
            self.task.pending.append(land)
        else:
            land()

    def _store(self, op: Op) -> Steps:
        assert op.ref is not None
        peer = op.get("peer")
        rank = self.task.rank if peer is None else self._peer(op, peer)
        key, box = self.geometry.region(op.ref, self.env, self.values)
        self._write(op, rank, op.symbol, key, box, self.values[op.operands[0].name])
        if peer is not None:
            yield None

    def _transfer(self, op: Op) -> Steps:
        """A copy engine reads late and lands late: other tasks may run before, between and after."""
        assert op.ref is not None
        to = op["to"]
        rank = self._peer(op, op["peer"]) if op.get("peer") is not None else self.task.rank
        yield None
        found = self._read(op, op.ref).clone()
        key, box = self.geometry.region(to, self.env, self.values)
        yield None
        self._write(op, rank, to.symbol, key, box, found)

    def _peer(self, op: Op, expr: Any) -> int:
        peer = self.geometry.value(expr, self.env)
        if not 0 <= peer < self.geometry.world:
            detail = f"peer {peer} of {self.geometry.world} ranks"
            raise BoundsError(op.span, symbol=op.symbol, detail=detail)
        return peer

    def _wait(self, op: Op) -> Steps:
        assert op.ref is not None
        self.machine.use_control(self.task, op)
        channel = self.memory.channels[op.symbol]
        elements = tuple(self.geometry.elements(op.ref, self.env))
        need = self.machine.need(self.task, op, self.env)
        blocked = Blocked(op, op.symbol, elements, need)
        yield None
        while self.machine.missing(self.task.rank, blocked):
            yield blocked
        for element in elements:
            carried = channel.released.get(element)
            if carried is not None:
                np.maximum(self.task.clock, carried, out=self.task.clock)
            channel.asked[element] = max(channel.asked.get(element, need), need)

    def _notify(self, op: Op) -> Steps:
        assert op.ref is not None
        self.machine.use_control(self.task, op)
        yield None
        carried = self.machine.released(self.task)
        if self.geometry.decls[op.symbol].kind == "counter":
            counted = self.geometry.elements(op.ref, self.env)
            self._made(op, self.task.rank, counted)
            for element in counted:
                self._count(op, op.symbol, element, carried)
            return
        rank = self._peer(op, op["peer"]) if op.get("peer") is not None else self.task.rank
        count = self.geometry.value(op.get("count", 1), self.env)
        through = op.get("through")
        if count > 1 and through is None:
            raise InternalError(op.span, detail="a counted notify without a counter (`through`)")
        elements = self.geometry.elements(op.ref, self.env)
        self._made(op, rank, elements)
        if through is not None:
            (slot,) = self.geometry.elements(through, self.env)
            seen = self._count(op, through.symbol, slot, carried)
            counter = self.memory.channels[through.symbol]
            counter.asked[slot] = count
            if seen > count:
                channel = f"{through.symbol}[{', '.join(map(str, slot))}]"
                detail = f"notified {seen} times where {count} are expected"
                raise BalanceError(op.span, channel=channel, rank=self.task.rank, detail=detail)
            if seen < count:
                return
            # The count-th notify has acquired the counter: its release carries the others.
            carried = np.maximum(carried, counter.released[slot])
        channel_on_peer = self.machine.memories[rank].channels[op.symbol]
        for element in elements:
            channel_on_peer.values[element] = self.memory.epoch
            channel_on_peer.released[element] = carried
            channel_on_peer.notified[element] = self.memory.epoch
        self.machine.wake(rank, op.symbol)

    def _made(self, op: Op, target: int, elements: list[tuple[int, ...]]) -> None:
        task = self.task
        for element in elements:
            self.machine.made.add(
                (task.call, task.rank, task.agent, task.place, id(op), target, element)
            )

    def _count(self, op: Op, symbol: str, element: tuple[int, ...], carried: Clock) -> int:
        """Add one to a local counter; its releases form one chain."""
        channel = self.memory.channels[symbol]
        before = channel.released.get(element)
        channel.released[element] = carried if before is None else np.maximum(before, carried)
        channel.values[element] += 1
        seen = int(channel.values[element])
        channel.notified[element] = seen
        self.machine.wake(self.task.rank, symbol)
        return seen
