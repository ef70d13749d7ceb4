"""The synchronisation of a program without its values: what each agent waits for, does and notifies.

The virtual clock runs on these events, and a deadlock is explained with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any, TypeAlias

from tilelink.backend.endless import endless_inputs
from tilelink.backend.simulate.geometry import (
    Env,
    Function,
    Geometry,
    Tile,
    bind_args,
    keep_scalar,
)
from tilelink.ir import DTYPES, Op, Ref, Value
from tilelink.ir.layout import ENCODINGS, PAYLOAD
from tilelink.ir.limits import check_rows
from tilelink.schedules.costs import LINE_BYTES, cache_share

Element: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work uses: flops by dtype of a dot, in ``steps`` of ``rows`` by ``columns``,
    elementwise operations, bytes of memory; ``sums``: bytes of parts that are added to a product behind it,
    ``landed``: the same of parts that a loader has fetched by then; ``filled``: lines of the cache's length that
    TMA fills in for rows past the end of a tensor.

    A product of a short tile computes the whole tile, so its flops are those of the whole one; but for the
    library's.
    """

    flops: float = 0.0
    dtype: str = "bf16"
    steps: float = 0.0
    rows: int = 0
    columns: int = 0
    elementwise: float = 0.0
    bytes: float = 0.0
    sums: float = 0.0
    landed: float = 0.0
    filled: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            other.dtype if other.flops else self.dtype,
            self.steps + other.steps,
            other.rows or self.rows,
            other.columns or self.columns,
            self.elementwise + other.elementwise,
            self.bytes + other.bytes,
            self.sums + other.sums,
            self.landed + other.landed,
            self.filled + other.filled,
        )

    def times(self, tiles: int, full: float) -> Cost:
        """This work in a loop over ``tiles``, which hold as much as ``full`` whole ones."""
        return replace(
            self,
            flops=self.flops * tiles,
            steps=self.steps * tiles,
            elementwise=self.elementwise * full,
            bytes=self.bytes * full,
            filled=self.filled * tiles,
        )


@dataclass(slots=True)
class Work:
    """Computing and memory traffic on this rank."""

    cost: Cost


@dataclass(slots=True)
class Wait:
    """Until every element of a channel on this rank is set (flag) or has reached ``count``."""

    op: Op
    symbol: str
    elements: list[Element]
    count: int | None


@dataclass(slots=True)
class Notify:
    """Set a flag element on ``peer`` (after ``count`` of these), or add one to a local counter."""

    op: Op
    symbol: str
    elements: list[Element]
    peer: int
    count: int
    through: tuple[str, Element] | None


@dataclass(slots=True)
class Move:
    """Bytes to memory of ``peer``: a transfer, or the stores of a tile (``store``)."""

    op: Op
    bytes: int
    peer: int
    store: bool


@dataclass(slots=True)
class Read:
    """Bytes from memory of all other ranks, as much from each."""

    op: Op
    bytes: int


Event: TypeAlias = "Work | Wait | Notify | Move | Read"

_NOTHING = Cost()


@dataclass(slots=True)
class _Run:
    """Neighbours in a block without events: their work by the ``lengths`` of the tiles that it depends on, and by
    whether loads that have a ``choice`` read the caller's tensor.

    None where it depends on scalars, or some are made.
    """

    ops: tuple[Op, ...]
    lengths: tuple[tuple[str, str], ...] | None
    choices: tuple[Function, ...] = ()
    known: dict[tuple[int, ...], Work] = field(default_factory=dict)


@dataclass(slots=True)
class _Sync:
    """A wait, notify or transfer: its attributes as functions of the environment."""

    op: Op
    symbol: str
    condition: Function | None
    peer: Function | None
    count: Function
    counter: bool
    through: Ref | None

    def off(self, env: Env) -> bool:
        """Whether it does not happen now."""
        return self.condition is not None and not self.condition(env)


_Part: TypeAlias = "_Run | _Sync | Op"


class Walker:
    """Walks the agents of one rank; ``tables`` gives integer tensors by name for dynamic maps.

    Without ``sums``, adding the parts of other ranks costs nothing.
    """

    def __init__(
        self, geometry: Geometry, rank: int, tables: Env | None = None, sums: bool = True
    ) -> None:
        self._sums = sums
        self.geometry = geometry
        self.rank = rank
        self.env: Env = {**geometry.env(rank), **(tables or {})}
        self.values: dict[str, Any] = {}
        self._costs: dict[tuple[Any, ...], Cost] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._endless = endless_inputs(geometry.program)
        # Products of the library, which are of as many rows as there are.
        self._cut_short = {
            id(op)
            for launch in geometry.program.find("launch")
            if launch.get("emitter") == "library"
            for op in launch.walk()
            if op.name == "dot"
        }
        self._choices: dict[int, tuple[Function, ...]] = {}
        self._eventful: dict[int, bool] = {}
        self._parts: dict[int, tuple[tuple[Op, ...], list[_Part]]] = {}
        self._syncs: dict[int, _Sync] = {}
        self._tiles: set[str] = set()
        # Of a tile variable, the length of a whole tile.
        self._whole: dict[str, int] = {}
        for op in geometry.program.walk():
            self._tiles.update(a.name for block in op.blocks for a in block.args)
            sizes = op.get("tile") if op.name in ("stage", "for_tiles") else None
            if sizes is not None:
                given = zip(op.args, sizes, strict=False)
                self._whole |= {a.name: geometry.value(t, self.env) for a, t in given}

    def block(self, ops: tuple[Op, ...]) -> list[Event]:
        """The events of ``ops`` in order; work between two synchronisations is one event."""
        found: list[Event] = []
        self._walk(ops, found)
        return found

    def _walk(self, ops: tuple[Op, ...], found: list[Event]) -> None:
        work: Work | None = None
        for part in self._parts_of(ops):
            if isinstance(part, _Run):
                work = self._work(part, work)
                continue
            if isinstance(part, _Sync) and part.off(self.env):
                continue
            if work is not None:
                found.append(work)
                work = None
            if isinstance(part, _Sync):
                found.append(self._event(part))
            elif part.name in ("for_tiles", "for_range"):
                for tiles in self._positions(part):
                    bind_args(part.args[: len(tiles)], tiles, self.env, self.values)
                    self._walk(part.body, found)
            else:
                assert part.ref is not None
                size = self._bytes(part.ref)
                if part.name == "load_sum":
                    found.append(Read(part, size * (self.geometry.world - 1)))
                    cost = self.cost(part)
                    work = None if cost is _NOTHING else Work(cost)
                    continue
                peer = self.geometry.value(part["peer"], self.env)
                found.append(Move(part, size, peer, True))
        if work is not None:
            found.append(work)

    def _parts_of(self, ops: tuple[Op, ...]) -> list[_Part]:
        """What a block consists of: synchronisation, ops with events inside, and runs of all others."""
        known = self._parts.get(id(ops))
        if known is not None:
            return known[1]
        parts: list[_Part] = []
        run: list[Op] = []
        for op in ops:
            sync = op.name in ("wait", "notify", "transfer")
            loop = op.name in ("for_tiles", "for_range") and self._is_eventful(op)
            if not (sync or loop or _is_remote(op)):
                run.append(op)
                continue
            if run:
                parts.append(self._run(tuple(run)))
                run = []
            parts.append(self._prepared(op) if sync else op)
        if run:
            parts.append(self._run(tuple(run)))
        self._parts[id(ops)] = ops, parts
        return parts

    def _run(self, ops: tuple[Op, ...]) -> _Run:
        names = sorted({name for op in ops for name in self._names_of(op)})
        scalars = any(op.results and not op.results[0].type.shape for op in ops)
        if scalars or any(name[0] == "%" for name in names):
            return _Run(ops, None)
        lengths = tuple((f"{name}.stop", f"{name}.start") for name in names)
        return _Run(ops, lengths, tuple(c for op in ops for c in self._choices_of(op)))

    def _work(self, run: _Run, before: Work | None) -> Work:
        """What is worked in ``run``, and before it."""
        if before is not None or run.lengths is None:
            cost = _NOTHING if before is None else before.cost
            for op in run.ops:
                keep_scalar(op, self.values, self.env)
                cost = cost + self.cost(op)
            return Work(cost)
        get = self.env.get
        key = tuple([get(stop, 0) - get(start, 0) for stop, start in run.lengths])
        if run.choices:
            key = (*key, *(int(choice(self.env)) for choice in run.choices))
        work = run.known.get(key)
        if work is None:
            cost = _NOTHING
            for op in run.ops:
                cost = cost + self.cost(op)
            work = run.known[key] = Work(cost)
        return work

    def notify(self, op: Op) -> Notify:
        """The signal of ``op`` at the values that names have now."""
        event = self._event(self._prepared(op))
        assert isinstance(event, Notify)
        return event

    def _is_eventful(self, op: Op) -> bool:
        found = self._eventful.get(id(op))
        if found is None:
            found = self.geometry.has_sync(op) or any(_is_remote(o) for o in op.walk())
            self._eventful[id(op)] = found
        return found

    def _positions(self, op: Op) -> list[tuple[Tile, ...]]:
        if op.name == "for_range":
            lo, hi = (self.geometry.value(op[k], self.env) for k in ("lo", "hi"))
            check_rows(hi - lo, f"this loop of `{op.args[0].name}`", op.span)
            return [(Tile(i, i + 1, i),) for i in range(lo, hi)]
        if op.get("bounds"):
            low, high = (self.values.get(v.name) for v in op.operands[:2])
            if not (isinstance(low, int) and isinstance(high, int)):
                return []
            return self.geometry.bounded(op, low, high)
        return self.geometry.queue(op, self.env)

    def _prepared(self, op: Op) -> _Sync:
        known = self._syncs.get(id(op))
        if known is None:
            geometry, peer, condition = self.geometry, op.get("peer"), op.get("if")
            known = self._syncs[id(op)] = _Sync(
                op,
                op.symbol,
                None if condition is None else geometry.bound(condition),
                None if peer is None else geometry.bound(peer),
                geometry.bound(op.get("count", 1)),
                op.name != "transfer" and geometry.decls[op.symbol].kind == "counter",
                op.get("through"),
            )
        return known

    def _event(self, sync: _Sync) -> Event:
        op, env = sync.op, self.env
        assert op.ref is not None
        rank = self.rank if sync.peer is None else sync.peer(env)
        if op.name == "transfer":
            return Move(op, self._bytes(op["to"]), rank, False)
        elements = self.geometry.elements(op.ref, env)
        count = sync.count(env)
        if op.name == "wait":
            return Wait(op, sync.symbol, elements, count if sync.counter else None)
        slot = None
        if sync.through is not None:
            slot = (sync.through.symbol, self.geometry.elements(sync.through, env)[0])
        return Notify(op, sync.symbol, elements, rank, count, slot)

    def _bytes(self, ref: Ref) -> int:
        decl = self.geometry.decls[ref.symbol]
        try:
            _, box = self.geometry.region(ref, self.env, self.values)
        except KeyError:  # an index that only values know
            return prod(decl.shape) * DTYPES[decl.dtype]
        # A word that signals itself may be longer than its data.
        words = decl.op.get("words")
        size = DTYPES[decl.dtype] * (ENCODINGS[words].bytes // PAYLOAD if words else 1)
        return prod(hi - lo for lo, hi in box) * size

    def cost(self, op: Op) -> Cost:
        """What ``op`` and all inside it uses, at the lengths that tiles have now."""
        names = self._names_of(op)
        env = self.env
        lengths = [
            self.values.get(n[1:])
            if n[0] == "%"
            else env.get(f"{n}.stop", 0) - env.get(f"{n}.start", 0)
            for n in names
        ]
        key = (id(op), *lengths, *(choice(env) for choice in self._choices_of(op)))
        known = self._costs.get(key)
        if known is None:
            known = self._costs[key] = self._cost(op)
        return known

    def _choices_of(self, op: Op) -> tuple[Function, ...]:
        """Whether each load in ``op`` that may read the caller's tensor instead of a buffer does."""
        found = self._choices.get(id(op))
        if found is None:
            loads = [o for o in op.walk() if o.name == "load" and o.get("own") is not None]
            found = self._choices[id(op)] = tuple(self.geometry.bound(o["when"]) for o in loads)
        return found

    def _names_of(self, op: Op) -> tuple[str, ...]:
        """What the cost of ``op`` depends on: tiles, of which the length counts, and ``%``, scalars."""
        names = self._names.get(id(op))
        if names is None:
            found = {v.name for o in op.walk() for v in o.operands if v.type.is_tile}
            for inner in op.walk():
                for value in (*inner.operands, *inner.results):
                    found.update(value.type.shape)
            bound = {v.name for o in op.walk() if o.get("bounds") for v in o.operands[:2]}
            names = (*sorted(found & self._tiles), *(f"%{b}" for b in sorted(bound)))
            self._names[id(op)] = names
        return names

    def _cost(self, op: Op) -> Cost:
        if op.name in ("for_tiles", "for_range"):
            positions = self._positions(op)
            if not positions:
                return _NOTHING
            total = _NOTHING
            # A short last tile costs its share, so one full tile stands for all.
            bind_args(op.args[: len(positions[0])], positions[0], self.env, self.values)
            for inner in op.body:
                keep_scalar(inner, self.values, self.env)
                total = total + self.cost(inner)
            return total.times(len(positions), _weight(positions))
        if op.name == "load_sum" and not self._sums:
            return _NOTHING
        if op.name in ("load", "store", "load_sum"):
            value = op.operands[0] if op.name == "store" else op.results[0]
            copies = self.geometry.world if op.name == "load_sum" else 1
            copies -= len(op.operands) if op.name == "load_sum" else 0
            size = prod(self.geometry.shape(value, self.env)) * DTYPES[value.type.dtype] * copies
            if op.name == "load_sum" and op.operands:
                # Parts that a loader fetches are there when the product is done; what remains is to add them.
                if op.get("via") == "tma":
                    return Cost(landed=size, elementwise=size / 2)
                if op.get("remote"):  # they come over the link
                    return Cost(elementwise=size / 2)
                return Cost(sums=size, elementwise=size / 2)
            if op.get("remote"):
                size //= copies
                return Cost(bytes=size, elementwise=size * copies / 2)
            # What a load empties it stores, too.
            touched = size * (2 if op.get("empty") else 1) * self._across_lines(op, value)
            filled = self._filled(op, value) if op.name == "load" else 0.0
            adding = size / 2 if op.name == "load_sum" else 0.0
            return Cost(bytes=touched, elementwise=adding, filled=filled)
        if op.name == "dot":
            if id(op) in self._cut_short:
                a, b = (self.geometry.shape(v, self.env) for v in op.operands[:2])
            else:
                a, b = (self._whole_shape(v) for v in op.operands[:2])
            dtype = op.operands[0].type.dtype
            return Cost(2.0 * prod(a) * b[-1], dtype, 1.0, a[-2], b[-1])
        if not op.results or op.name in ("zeros", "full", "transpose", "expand", "reshape"):
            return _NOTHING
        return Cost(elementwise=float(prod(self.geometry.shape(op.results[0], self.env))))

    def _across_lines(self, op: Op, value: Value) -> float:
        """By how much longer the cache is busy with the rows of a load than by their bytes."""
        if op.name != "load" or op.ref is None:
            return 1.0
        decl = self.geometry.decls[op.symbol]
        size, shape = DTYPES[decl.dtype], self.geometry.shape(value, self.env)
        if len(decl.shape) < 2 or not shape:
            return 1.0
        return cache_share(decl.shape[-1] * size, max(1, shape[-1] * size))

    def _filled(self, op: Op, value: Value) -> float:
        """Lines that TMA fills in for the rows of a tile that a tensor has not.

        Buffers have room for them, and behind some inputs kernels read on.
        """
        assert op.ref is not None
        if op.get("via") != "tma" or len(value.type.shape) != 2:
            return 0.0
        own = op.get("own") is not None and bool(self._choices_of(op)[0](self.env))
        source = op["own"].symbol if own else op.symbol
        if self.geometry.decls[source].op.name != "tensor" or source in self._endless:
            return 0.0
        rows, columns = self._whole_shape(value)
        missing = rows - self.geometry.shape(value, self.env)[0]
        return missing * ceil(columns * DTYPES[value.type.dtype] / LINE_BYTES)

    def _whole_shape(self, value: Value) -> tuple[int, ...]:
        """The shape of ``value`` where no tile is short."""
        return tuple(
            self._whole.get(dim) or self.geometry.length(dim, self.env) for dim in value.type.shape
        )


def _weight(positions: list[tuple[Tile, ...]]) -> float:
    """How many full tiles the positions of a loop make."""
    full = prod(t.stop - t.start for t in positions[0])
    return sum(prod(t.stop - t.start for t in tiles) for tiles in positions) / full


def _is_remote(op: Op) -> bool:
    return (op.name == "store" and op.get("peer") is not None) or bool(op.get("remote"))
