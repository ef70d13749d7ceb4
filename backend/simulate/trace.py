"""What one task does, in order: the ops of a block with every region, element and peer made concrete.

A block whose course depends on no value (no table, no scalar parameter) is traced once and kept for
every later call and schedule; any other one is traced while it is executed, from the values it has.
Reads and writes carry a number that is the same in every schedule, which is how a run tells what a
read saw.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import torch

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.simulate.batch import BATCH, may_batch
from tilelink.backend.simulate.errors import BoundsError
from tilelink.backend.simulate.geometry import Box, Env, Geometry, Tile, bind_args
from tilelink.backend.simulate.outline import Outline
from tilelink.backend.simulate.shared import Shared
from tilelink.backend.tile_ops import apply
from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import Expr, Op, Ref
from tilelink.ir.limits import TooLarge

NARROW = 2**31 - 1  # the largest offset of an element that 32 bits hold
CONTROL = "<epoch and counters>"
MAX_ITERATIONS = 2**20  # of the loops of one task: its trace is kept, some hundred bytes an op


@dataclass(slots=True, eq=False)
class Place:
    """Where in the program of a rank a piece of work stands."""

    rank: int
    agent: str
    stage: str = ""
    op: Op | None = None
    tiles: tuple[Tile, ...] = ()

    @property
    def text(self) -> str:
        """Stage and tile in words, with a space in front."""
        if self.op is None:
            return f" {self.stage}" if self.stage else ""
        return f" stage @{self.stage} tile {tile_text(self.op, self.tiles)}"


@dataclass(eq=False)
class Region:
    """A box of a tensor or buffer of one rank; ``row`` is its row in the tables of boxes, or -1."""

    symbol: str
    key: tuple[Any, ...]
    mask: tuple[Any, ...]  # ``key`` for NumPy
    box: Box
    row: int
    shape: tuple[int, ...] | None  # None where an index is a tile of integers

    @cached_property
    def halves(self) -> tuple[tuple[Region, tuple[slice, ...]], ...]:
        """The region in two, each with where it lies in a value of the whole; () where it has a single row."""
        for axis, part in enumerate(self.key):
            whole = not isinstance(part, slice) or part.start is None
            length = 1 if whole else part.stop - part.start
            if length < 2:
                continue
            middle, found = part.start + length // 2, []
            before = sum(not isinstance(k, int) for k in self.key[:axis])
            for lo, hi in ((part.start, middle), (middle, part.stop)):
                new = (*self.key[:axis], slice(lo, hi), *self.key[axis + 1 :])
                box = (*self.box[:axis], (lo, hi), *self.box[axis + 1 :])
                inside = slice(lo - part.start, hi - part.start)
                at = (*(slice(None),) * before, inside)
                found.append((Region(self.symbol, new, new, box, self.row, None), at))
            return tuple(found)
        return ()


@dataclass(slots=True, eq=False)
class Set:
    """A value known beforehand."""

    name: str
    value: Any


@dataclass(slots=True, eq=False)
class Copy:
    """Loop-carried values take their next names."""

    to: tuple[str, ...]
    source: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Param:
    """A scalar parameter."""

    name: str
    symbol: str


@dataclass(slots=True, eq=False)
class Pure:
    """A pure tile op."""

    op: Op
    operands: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Load:
    """A read of this rank's memory; ``parts`` has one region, or one a source rank for ``load_sum``.

    ``homes``: in whose memory each part lies, where that is not this rank's for all of them.
    ``own``: the value that is the part of this rank, whose region is left out then; "" where there is none.
    ``words``: it polls words that signal themselves; ``empty``: and empties them.
    """

    op: Op
    place: Place
    uid: int
    parts: tuple[Region, ...]
    shape: tuple[int, ...]
    tma: bool
    own: str = ""
    words: bool = False
    empty: bool = False
    homes: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Store:
    """A write to memory of ``rank``; ``words``: of words that signal themselves."""

    op: Op
    place: Place
    uid: int
    rank: int
    region: Region
    value: str
    tma: bool
    remote: bool
    words: bool = False


@dataclass(slots=True, eq=False)
class Transfer:
    """A copy of a region of this rank into memory of ``rank``."""

    op: Op
    place: Place
    uid: int
    rank: int
    source: Region
    target: Region


@dataclass(slots=True, eq=False)
class Wait:
    """A wait; ``need`` is a count, or what is added to the epoch of the call for a flag.

    ``carried``: by words, and what it acquires their load does.
    """

    op: Op
    place: Place
    symbol: str
    elements: tuple[int, ...]
    need: int
    counter: bool
    equal: bool
    relaxed: bool
    gpu: bool
    proxy: bool
    carried: bool


@dataclass(slots=True, eq=False)
class Notify:
    """A notify; ``through`` is the counter and element that count it. ``carried``: by words; it releases
    nothing."""

    op: Op
    place: Place
    symbol: str
    elements: tuple[int, ...]
    rank: int
    count: int
    through: tuple[str, int] | None
    counter: bool
    relaxed: bool
    gpu: bool
    drain: bool
    delay: bool
    carried: bool


Instruction: TypeAlias = "Set | Copy | Param | Pure | Load | Store | Transfer | Wait | Notify"


@dataclass(slots=True, eq=False)
class Trace:
    """The instructions of a block, and those of them that touch memory or synchronise."""

    place: Place
    all: tuple[Instruction, ...]
    effects: tuple[Instruction, ...]


@dataclass(slots=True, eq=False)
class Work:
    """What one worker does at one child of its launch: positions of a queue, or a flush.

    ``counter``: of a dynamic queue, the word that its positions are drawn from, as counter and element;
    None where the program names none.
    """

    stage: Op
    position: int
    queue: list[tuple[Tile, ...]]
    first: int
    step: int
    dynamic: bool
    counter: tuple[str, int] | None = None


def tile_text(op: Op, tiles: tuple[Tile, ...]) -> str:
    """The tile of a queue position as ``m=0..16 n=8..16``."""
    return " ".join(
        f"{arg.name}={t.start}..{t.stop}" if arg.type.is_tile else f"{arg.name}={t.start}"
        for arg, t in zip(op.args, tiles, strict=False)
    )


class Traces:
    """All that is worked out once for a program, whatever the number of calls and schedules.

    ``shared``: what programs that this one is an edit of, or that are edits of it, have worked out.
    """

    def __init__(self, geometry: Geometry, shared: Shared | None = None) -> None:
        self.geometry = geometry
        self.outline = Outline(geometry)
        self.written = _written_symbols(geometry)
        self.blocks = (shared or Shared()).blocks(geometry, self.written)
        self.tables = self.blocks.tables
        self.cleared = [
            d.name
            for d in geometry.decls.values()
            if d.kind in ("flag", "counter") and d.op.get("cleared", d.kind == "counter")
        ]
        self._prepared = False
        self.dynamic = False  # whether some block could not be traced without values
        self.tma_loads = self.tma_stores = False
        for op in geometry.program.walk():
            if op.name in ("load", "load_sum", "store") and op.get("via") == "tma":
                self.tma_loads |= op.name != "store"
                self.tma_stores |= op.name == "store"
        self.uid, self.sources = self.blocks.uid, self.blocks.sources
        self.control = self.tables[CONTROL].row(((0, 1),))
        self.agents = {name: index for index, name in enumerate(geometry.agent_names)}
        # The agents that come after each one.
        self.followers = {
            name: [i for i, a in enumerate(geometry.agents) if name in a.get("after", ())]
            for name in geometry.agent_names
        }
        self._work: dict[tuple[int, int, int], list[Work]] = {}
        self._traces: dict[tuple[int, int, int], Trace | None] = {}
        self._batch: dict[int, int] = {}
        self._fitting: dict[int, Mapping[str, Any]] = {}

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs of a rank are known to be those of the program: see :meth:`fit`."""
        return self._fitting.get(id(inputs)) is inputs

    def fit(self, inputs: Mapping[str, Any]) -> None:
        """The inputs of a rank have been looked at, and are those of the program."""
        self._fitting[id(inputs)] = inputs

    def trace(
        self, rank: int, agent: str, op: Op, number: int = 0, tiles: tuple[Tile, ...] = ()
    ) -> Trace | None:
        """The trace of the block of ``op``, at position ``number`` of its queue; None if values rule it."""
        key = (rank, id(op), number)
        if key in self._traces:
            return self._traces[key]
        blocks = self.blocks
        name = (rank, agent, id(op), number)
        found = blocks.traces.get(name)
        if found is None and name not in blocks.traces:
            blocks.hold(op)
            found = blocks.traces[name] = self._traced(rank, agent, op, number, tiles)
        self.dynamic |= found is None
        self._traces[key] = found
        return found

    def _traced(
        self, rank: int, agent: str, op: Op, number: int, tiles: tuple[Tile, ...]
    ) -> Trace | None:
        tracer = self.tracer(rank, agent, op, number, tiles, self.geometry.env(rank), {}, False)
        try:
            ops = tuple(tracer.block(op.body))
        except KeyError:
            return None
        effects = tuple(
            i
            for i in ops
            if not isinstance(i, Set | Copy | Param | Pure) and not self._is_private(i)
        )
        return Trace(tracer.place, ops, effects)

    def work(self, rank: int, launch: Op, worker: int) -> list[Work]:
        """What worker ``worker`` of a launch does, in order."""
        key = (rank, id(launch), worker)
        found = self._work.get(key)
        if found is not None:
            return found
        found, geometry = [], self.geometry
        for position, stage in enumerate(launch.body):
            if stage.name == "flush":
                found.append(Work(stage, position, [], 0, 0, False))
            if stage.name != "stage":
                continue
            lo, hi = geometry.worker_range(launch, stage)
            if not lo <= worker < hi:
                continue
            queue = geometry.queue(stage, geometry.env(rank))
            dynamic = stage.get("queue", "static") == "dynamic"
            first = geometry.first_position(stage, worker, lo, hi)
            word = stage.get("counter") if dynamic else None
            counter = None
            if word is not None:
                counter = (word.symbol, geometry.flat(word, geometry.env(rank))[0])
            found.append(Work(stage, position, queue, first, hi - lo, dynamic, counter))
        self._work[key] = found
        return found

    def prepare(self) -> bool:
        """Trace every block, in program order, so that all numbers are the same in every run; whether
        the course of some block depends on values."""
        if self._prepared:
            return self.dynamic
        self._prepared = True
        geometry = self.geometry
        for rank in range(geometry.world):
            for agent, name in zip(geometry.agents, geometry.agent_names, strict=True):
                for op in agent.body if agent.name == "launch" else (agent,):
                    queue: list[tuple[Tile, ...]] = [()]
                    if op.name == "stage":
                        queue = geometry.queue(op, geometry.env(rank))
                    for number, tiles in enumerate(queue):
                        # A mistake belongs to the task that comes to it, if one does.
                        with suppress(TilelinkError):
                            self.trace(rank, name, op, number, tiles)
        return self.dynamic

    def tracer(
        self,
        rank: int,
        agent: str,
        op: Op,
        number: int,
        tiles: tuple[Tile, ...],
        env: Env,
        values: dict[str, Any],
        live: bool,
    ) -> Tracer:
        """Traces the block of ``op``; with ``live``, in step with its execution on ``env`` and ``values``."""
        if op.name == "stage":
            place = Place(rank, agent, op.symbol, op, tiles)
        else:
            place = Place(rank, agent, "finish" if op.name == "finish" else "")
        bind_args(op.args, tiles, env, values)
        return Tracer(self, place, (rank, id(op), number), env, values, live)

    def _is_private(self, instruction: Instruction) -> bool:
        """A read of what nothing writes."""
        return isinstance(instruction, Load) and all(p.row < 0 for p in instruction.parts)

    def batch(self, op: Op) -> int:
        """By how much the tiles of the loop ``op`` may grow without a change of meaning."""
        found = self._batch.get(id(op))
        if found is None:
            found = self._batch[id(op)] = BATCH if may_batch(op) else 1
        return found


class Tracer:
    """Turns ops into instructions, in order."""

    def __init__(
        self,
        traces: Traces,
        place: Place,
        key: tuple[int, int, int],
        env: Env,
        values: dict[str, Any],
        live: bool,
    ) -> None:
        self.traces, self.geometry = traces, traces.geometry
        self.place, self.key = place, key
        self.env, self.values, self.live = env, values, live
        self._number = 0
        self._iterations = 0

    def block(self, ops: tuple[Op, ...]) -> Generator[Instruction, None, tuple[str, ...]]:
        """The instructions of ``ops``; returns the names that a final ``yield`` gives on."""
        for op in ops:
            name = op.name
            if name == "yield":
                return tuple(v.name for v in op.operands)
            if name in ("for_tiles", "for_range"):
                yield from self._loop(op)
            elif name in ("wait", "notify", "transfer"):
                condition = op.get("if")
                if condition is None or self.geometry.value(condition, self.env):
                    yield self._sync(op)
            elif name == "store":
                yield self._store(op)
            elif name in ("load", "load_sum"):
                yield self._load(op)
            else:
                yield self._pure(op)
        return ()

    # Control and values.

    def _count(self, op: Op, iterations: int) -> None:
        """TooLarge where the loops of this block have more iterations than a trace can be kept of."""
        self._iterations += max(0, iterations)
        if self._iterations > MAX_ITERATIONS:
            raise TooLarge(
                op.span,
                what=f"with this loop of `{op.args[0].name}` a task comes to {self._iterations:,} iterations",
                most=MAX_ITERATIONS,
                unit="iterations of a simulated task",
                advice="take larger tiles, or smaller extents",
            )

    def _loop(self, op: Op) -> Generator[Instruction, None, None]:
        carried_from = 0
        positions: list[tuple[Tile, ...]]
        if op.name == "for_range":
            lo, hi = (self.geometry.value(op[k], self.env) for k in ("lo", "hi"))
            self._count(op, hi - lo)
            positions = [(Tile(i, i + 1, i),) for i in range(lo, hi)]
        elif op.get("bounds"):
            lo, hi = (int(self.values[v.name]) for v in op.operands[:2])
            carried_from = 2
            size = int(op.get("tile", (1,))[0]) * self.traces.batch(op)
            self._count(op, -(-(hi - lo) // size))
            positions = self.geometry.bounded(op, lo, hi, self.traces.batch(op))
        else:
            positions = self.geometry.queue(op, self.env, self.traces.batch(op))
            self._count(op, len(positions))
        carried = tuple(v.name for v in op.operands[carried_from:])
        loop_args = op.args[: len(op.args) - len(carried)]
        names = tuple(a.name for a in op.args[len(loop_args) :])
        counted = [a.name for a in loop_args if not a.type.is_tile]
        for tiles in positions:
            bind_args(loop_args, tiles, self.env, self.values)
            for name in counted:
                yield Set(name, self.values[name])
            if names:
                yield self._copy(names, carried)
            carried = yield from self.block(op.body)
        if op.results:
            yield self._copy(tuple(r.name for r in op.results), carried)

    def _copy(self, to: tuple[str, ...], source: tuple[str, ...]) -> Copy:
        if not self.live:
            known = [self.values.get(name) for name in source]
            for name, value in zip(to, known, strict=True):
                self._know(name, value)
        return Copy(to, source)

    def _know(self, name: str, value: Any) -> None:
        """Keep what is known of a scalar without the values of tiles."""
        if isinstance(value, int):
            self.env[name] = self.values[name] = value
        elif not self.live:
            self.env.pop(name, None)
            self.values.pop(name, None)

    def _pure(self, op: Op) -> Instruction:
        result = op.results[0]
        if op.name == "param":
            self._know(result.name, None)
            return Param(result.name, op.symbol)
        known: Any = None
        shape: tuple[int, ...] = ()
        if op.name in ("zeros", "full", "reshape"):
            shape = self.geometry.shape(result, self.env)
        if op.name == "constant":
            known = op["value"]
        elif op.name == "bound":
            known = self.env[f"{op.operands[0].name}.{op['which']}"]
        elif op.name == "index":
            tile = op.operands[0].name
            lo, hi = self.env[f"{tile}.start"], self.env[f"{tile}.stop"]
            return Set(result.name, torch.arange(lo, hi, dtype=TORCH_DTYPES[result.type.dtype]))
        elif not result.type.shape and op.operands:
            given = [self.values.get(v.name) for v in op.operands]
            if all(isinstance(g, int) for g in given):
                known = apply(op, [g for g in given if g is not None]).item()
        self._know(result.name, known)
        if known is not None:
            return Set(result.name, known)
        return Pure(op, tuple(v.name for v in op.operands), shape)

    # Memory.

    def _uid(self, op: Op) -> int:
        self._number += 1
        return self.traces.uid((*self.key, self._number), op, self.place)

    def _region(self, op: Op, ref: Ref) -> Region:
        decl = self.geometry.decls[ref.symbol]
        key, box = self.geometry.region(ref, self.env, self.values)
        empty = any(lo >= hi for lo, hi in box)
        if prod(decl.shape) > NARROW and not empty and not op.get("wide"):
            last = 0
            for (_, hi), size in zip(box, decl.shape, strict=True):
                last = last * size + hi - 1
            if last > NARROW:
                detail = f"element {last} lies past 2^31 - 1 and the access is not `wide`"
                raise BoundsError(op.span, symbol=ref.symbol, detail=detail)
        mask = tuple(k.numpy() if isinstance(k, torch.Tensor) else k for k in key)
        shape: tuple[int, ...] | None = None
        if not any(isinstance(k, torch.Tensor) for k in key):
            shape = _shape(key, decl.shape)
        home = self.geometry.home(ref.symbol)
        table = self.traces.tables.get(home)
        row = -1 if empty or table is None else table.row(box)
        return Region(home, key, mask, box, row, shape)

    def _load(self, op: Op) -> Load:
        assert op.ref is not None
        own, result = op.get("own"), op.results[0]
        homes: tuple[int, ...] = ()
        if op.name == "load":
            when = op.get("when")
            there = when is not None and self.geometry.value(when, self.env)
            refs = [own if there else op.ref]
        else:
            sources = [
                source
                for source in range(self.geometry.world)
                if not op.operands or source != self.place.rank
            ]
            refs = [
                own
                if own is not None and source == self.place.rank
                else Ref(op.ref.symbol, (Expr.const(source), *op.ref.index[1:]))
                for source in sources
            ]
            if op.get("remote"):
                homes, refs = tuple(sources), [op.ref] * len(sources)
        parts = tuple(self._region(op, ref) for ref in refs)
        shape = self.geometry.shape(result, self.env)
        for part in parts if op.name == "load" or homes else ():
            check_shape(op, op.symbol, part.shape, shape)
        if not result.type.shape:
            self._know(result.name, None)
        tma = op.get("via") == "tma"
        mine = op.operands[0].name if op.operands else ""
        words = self._is_words(op.ref)
        empty = bool(op.get("empty"))
        uid = self._uid(op)
        return Load(op, self.place, uid, parts, shape, tma, mine, words, empty, homes)

    def _is_words(self, ref: Ref) -> bool:
        return bool(self.geometry.decls[ref.symbol].op.get("words"))

    def _store(self, op: Op) -> Store:
        assert op.ref is not None
        region, value, peer = self._region(op, op.ref), op.operands[0], op.get("peer")
        shape = self.geometry.shape(value, self.env)
        if shape and region.shape is not None and shape != region.shape:
            _misfit(op, op.symbol, shape, region.shape)
        rank = self.place.rank if peer is None else self._peer(op, peer)
        tma = op.get("via") == "tma"
        uid, remote = self._uid(op), peer is not None
        words = self._is_words(op.ref)
        return Store(op, self.place, uid, rank, region, value.name, tma, remote, words)

    def _sync(self, op: Op) -> Transfer | Wait | Notify:
        assert op.ref is not None
        geometry, env = self.geometry, self.env
        peer = op.get("peer")
        rank = self.place.rank if peer is None else self._peer(op, peer)
        if op.name == "transfer":
            source, target = self._region(op, op.ref), self._region(op, op["to"])
            known = source.shape is not None and target.shape is not None
            if known and source.shape and source.shape != target.shape:
                _misfit(op, target.symbol, source.shape, target.shape)
            return Transfer(op, self.place, self._uid(op), rank, source, target)
        elements = geometry.flat(op.ref, env)
        counter = geometry.decls[op.symbol].kind == "counter"
        carried = geometry.decls[op.symbol].op.get("carried") is not None
        relaxed, gpu = op.get("order") == "relaxed", op.get("scope") == "gpu"
        if op.name == "wait":
            need = geometry.value(op.get("count", 1) if counter else op.get("epoch", 0), env)
            equal, proxy = op.get("compare") == "equal", bool(op.get("proxy"))
            return Wait(
                op, self.place, op.symbol, elements, need, counter, equal, relaxed, gpu, proxy,
                carried,
            )  # fmt: skip
        count, through = geometry.value(op.get("count", 1), env), op.get("through")
        if count > 1 and through is None and not counter and not carried:
            raise InternalError(op.span, detail="a counted notify without a counter (`through`)")
        slot = None
        if through is not None:
            slot = (through.symbol, geometry.flat(through, env)[0])
        relaxed |= op.get("barrier") is False
        drain, delay = bool(op.get("drain")), bool(op.get("delay"))
        return Notify(
            op, self.place, op.symbol, elements, self.place.rank if counter else rank, count,
            slot, counter, relaxed, gpu, drain, delay, carried,
        )  # fmt: skip

    def _peer(self, op: Op, expr: Any) -> int:
        peer = self.geometry.value(expr, self.env)
        if not 0 <= peer < self.geometry.world:
            detail = f"peer {peer} of {self.geometry.world} ranks"
            raise BoundsError(op.span, symbol=op.symbol, detail=detail)
        return peer


def check_shape(
    op: Op, symbol: str, found: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    """BoundsError where a load does not have the shape that its type says."""
    if found is not None and found != expected:
        detail = f"a load of shape {list(found)} where its type says {list(expected)}"
        raise BoundsError(op.span, symbol=symbol, detail=detail)


def _misfit(op: Op, symbol: str, value: Any, region: Any) -> None:
    detail = f"a value of shape {list(value)} into a region of {list(region)}"
    raise BoundsError(op.span, symbol=symbol, detail=detail)


def _shape(key: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a key of whole numbers, slices and new axes picks."""
    axes = iter(sizes)
    shape = []
    for k in key:
        size = 1 if k is None else next(axes)
        if isinstance(k, slice) and k.start is not None:
            size = k.stop - k.start
        if not isinstance(k, int):
            shape.append(size)
    return tuple(shape)


def _written_symbols(geometry: Geometry) -> frozenset[str]:
    written = {d.name for d in geometry.decls.values() if d.kind == "buffer"}
    for op in geometry.program.walk():
        if op.name == "store" and op.ref is not None:
            written.add(op.ref.symbol)
        elif op.name in ("transfer", "collective") and isinstance(op.get("to"), Ref):
            written.add(op["to"].symbol)
    return frozenset({CONTROL} | {geometry.home(symbol) for symbol in written})
