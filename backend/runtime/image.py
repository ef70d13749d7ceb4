"""What the runtime needs to know of a fused program: shapes, and where things lie in the arena."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilelink.backend.endless import endless_inputs
from tilelink.errors import Span
from tilelink.ir import DTYPES, At, Expr, Index, Op, Ref, Value, layout


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor, or a region of the arena: dimensions, dtype name, byte offset (0 for a tensor)."""

    name: str
    dims: tuple[int, ...]
    dtype: str
    offset: int = 0
    role: str = ""
    local: bool = False  # in this rank's workspace, not in the arena
    alias: str = ""  # the tensor or buffer whose memory it is; then it has no place of its own
    encoding: str = ""  # of words that signal themselves

    @property
    def bytes(self) -> int:
        """Its size."""
        size = math.prod(self.dims) * DTYPES[self.dtype]
        if not self.encoding:
            return size
        return -(-size // layout.PAYLOAD) * layout.ENCODINGS[self.encoding].bytes

    @property
    def word(self) -> int:
        """The number of its first word in the arena."""
        return self.offset // layout.WORD

    @property
    def words(self) -> int:
        """Its length in words."""
        return math.prod(self.dims)

    def element(self, index: tuple[int, ...]) -> int:
        """The word number of one element of a flag or counter; IndexError if it lies outside."""
        flat = 0
        for i, d in zip(index, self.dims, strict=True):
            if not 0 <= i < d:
                raise IndexError(f"{self.name}{list(index)} of {list(self.dims)}")
            flat = flat * d + i
        return self.word + flat


@dataclass(frozen=True, slots=True)
class Wait:
    """A ``wait`` of the program: the text of the flag waited for, and its place in the source."""

    symbol: str
    span: Span | None


@dataclass(frozen=True, slots=True)
class Image:
    """A program as the runtime sees it; dictionaries are in declaration order.

    ``dynamic``: run-time extents with their capacities, which ``tensors`` have, ``least`` their smallest
    values; ``endless``: inputs behind which kernels may read; ``launches`` (of emitted kernels) and
    ``collectives``: their symbols. ``bare``: everything is the library's, there is no kernel and no stream.
    Places of ``slots`` are those of even calls. ``ended``: the one launch ends the call, and nothing is left
    for a guard to do. ``folded``: launches do what a head does.
    """

    name: str
    world: int
    tensors: dict[str, Slot]
    scalars: dict[str, str]
    buffers: dict[str, Slot]
    flags: dict[str, Slot]
    counters: dict[str, Slot]
    waits: tuple[Wait, ...]
    dynamic: dict[str, int]
    least: dict[str, int]
    launches: tuple[str, ...]
    collectives: tuple[str, ...]
    declared: tuple[Op, ...]
    endless: tuple[str, ...]
    varying: dict[str, Op]
    extents: dict[str, int]
    bare: bool = False
    slots: int = 1
    ended: bool = False
    folded: bool = False

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """Tensors that the program writes and the user sees, in parameter order."""
        return tuple(t for t in self.tensors.values() if t.role in ("out", "inout"))

    def at(self, dynamic: Mapping[str, int]) -> dict[str, Slot]:
        """The tensors where run-time extents have these values."""
        return _tensors(self.declared, {**self.extents, **dynamic}, self.world)

    def buffer_at(self, name: str, dynamic: Mapping[str, int]) -> Slot:
        """The buffer ``name`` where run-time extents have these values: its place does not depend on them."""
        declared = self.varying.get(name)
        if declared is None:
            return self.buffers[name]
        return replace(self.buffers[name], dims=_dims(declared, {**self.extents, **dynamic}))

    def extents_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The values of the run-time extents, read off the shapes of a call's tensors.

        A tensor's axis tells if it is as long as the extent, or as its part of one. Others are compared
        later: an extent that no tensor tells has its capacity.
        """
        found = dict(self.dynamic)
        for op in self.declared:
            for axis, dim in enumerate(op["dims"] if op.symbol in shapes else ()):
                name = str(dim)
                if name in found and axis < len(shapes[op.symbol]):
                    part = op.get("over") == axis and op["role"] != "temp"
                    found[name] = shapes[op.symbol][axis] * (self.world if part else 1)
        return found

    @property
    def quiet(self) -> bool:
        """Whether nothing waits and nothing is signalled: no epoch is taken, and nothing can run out."""
        return not (self.waits or self.flags or self.counters)

    @property
    def apart(self) -> bool:
        """Whether its ranks meet in the library's collectives alone: nothing of an arena is read or written.

        A program with slots takes an epoch of its arena, whatever else it does.
        """
        return self.quiet and not self.places and self.slots == 1

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena that the program needs."""
        need = max((last for _, last, _ in self.places), default=layout.DATA)
        return layout.SLOT_ARENA if self.slots == 2 else need

    @property
    def places(self) -> tuple[tuple[int, int, str], ...]:
        """The bytes [first, last) of the arena that buffers lie in, of all slots, and their encoding."""
        found: list[tuple[int, int, str]] = []
        for slot in self.buffers.values():
            if slot.local or slot.alias:
                continue
            area, step = 0, layout.SLOT_BYTES
            if slot.encoding:
                _, area, step = layout.ENCODINGS[slot.encoding]
            if self.slots == 2 and slot.offset + slot.bytes > area + step:
                raise ValueError(f"@{slot.name} does not end in its slot of {step} bytes")
            for number in range(self.slots):
                first = slot.offset + number * step
                found.append((first, first + slot.bytes, slot.encoding))
        return tuple(found)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of this rank's own memory that the program needs."""
        own = [b for b in self.buffers.values() if b.local and not b.alias]
        return max((b.offset + b.bytes for b in own), default=0)

    @property
    def counter_words(self) -> tuple[int, int]:
        """The counter words [first, last), which are 0 when a call begins and are left so."""
        first = min((c.word for c in self.counters.values()), default=0)
        return first, max((c.word + c.words for c in self.counters.values()), default=0)

    @property
    def ack_word(self) -> int:
        """The first word of the acknowledgement flags."""
        return self.flags["ack"].word if "ack" in self.flags else layout.ACK

    def describe_word(self, word: int) -> str:
        """The flag or counter element that word ``word`` of the arena is, as the IR writes it."""
        first = layout.FLAGS // layout.WORD
        if self.slots == 2 and first <= word < layout.COUNTERS // layout.WORD:
            word = first + (word - first) % (layout.SLOT_FLAGS // layout.WORD)
        for slot in (*self.flags.values(), *self.counters.values()):
            if slot.word <= word < slot.word + slot.words:
                flat, index = word - slot.word, []
                for d in reversed(slot.dims):
                    index.append(flat % d)
                    flat //= d
                return f"@{slot.name}[{', '.join(map(str, reversed(index)))}]"
        return f"word {word}"

    def wait_for(self, word: int) -> Wait | None:
        """The first wait of the program on the flag or counter that holds ``word``."""
        name = self.describe_word(word).lstrip("@").partition("[")[0]
        return next((w for w in self.waits if w.symbol == name), None)


def image_of(program: Op) -> Image:
    """The :class:`Image` of a fused program."""
    world = int(program["world"])
    names: dict[str, int] = {op.symbol: int(op["value"]) for op in program.find("extent")}
    names["WORLD"] = world

    def regions(kind: str) -> dict[str, Slot]:
        return {
            op.symbol: Slot(
                op.symbol,
                _dims(op, names),
                op.get("dtype", "int32"),
                int(op["offset"]) if op.get("alias") is None else 0,
                local=op.get("space") == "local",
                alias=op["alias"].symbol if op.get("alias") is not None else "",
                encoding=op.get("words", ""),
            )
            for op in program.find(kind)
        }

    emitted = [op for op in program.find("launch") if op.get("emitter") != "library"]
    dynamic = {op.symbol: int(op["value"]) for op in program.find("extent") if op.get("dynamic")}
    return Image(
        name=program.symbol,
        world=world,
        tensors=_tensors(tuple(program.find("tensor")), names, world),
        scalars={op.symbol: op["dtype"] for op in program.find("scalar")},
        buffers=regions("buffer"),
        flags=regions("flag"),
        counters=regions("counter"),
        waits=tuple(Wait(op.symbol, op.span) for op in program.walk() if op.name == "wait"),
        dynamic=dynamic,
        least={
            op.symbol: int(op.get("least", 1)) for op in program.find("extent") if op.get("dynamic")
        },
        launches=tuple(op.symbol for op in emitted),
        collectives=tuple(op.symbol for op in program.find("collective")),
        bare=not (emitted or program.find("head") or program.find("stream")),
        declared=tuple(program.find("tensor")),
        endless=tuple(sorted(endless_inputs(program))),
        varying={op.symbol: op for op in program.find("buffer") if _varies(op, dynamic)},
        extents=names,
        slots=int(program.get("slots", 1)),
        ended=program.get("slots") is not None
        or any(op.get("ends") for op in program.find("launch")),
        folded=any(op.get("folded") for op in program.find("head")),
    )


def _varies(op: Op, dynamic: Mapping[str, int]) -> bool:
    return any(isinstance(d, Expr) and d.names & dynamic.keys() for d in op["dims"])


def _dims(op: Op, names: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else int(d.evaluate(names)) for d in op["dims"])


def _tensors(declared: tuple[Op, ...], names: Mapping[str, int], world: int) -> dict[str, Slot]:
    """What a rank holds of each tensor."""
    found: dict[str, Slot] = {}
    for op in declared:
        shape = list(_dims(op, names))
        axis = op.get("over")
        if axis is not None and op.get("role") != "temp":
            shape[axis] //= world
        role = op.get("role", "temp")
        found[op.symbol] = Slot(op.symbol, tuple(shape), op["dtype"], role=role)
    return found


def one_worker(program: Op) -> Op:
    """``launch {workers = 132} … stage {workers = [0, 16]}`` -> ``launch {workers = 1} … stage``.

    The plan of a single worker a rank, which takes every stage in program order; what *progress*
    proves is that it cannot hang.
    """
    op = _map_blocks(program, one_worker)
    if op.name == "launch":
        return op.with_attrs(workers=1)
    return op.with_attrs(workers=None) if op.name == "stage" else op


def without_roles(program: Op) -> Op:
    """``launch {emitter = "gluon", roles = "turns"}`` -> ``launch``: the same stages, emitted by Triton.

    What the library multiplies stays with it.
    """
    op = _map_blocks(program, without_roles)
    gluon = op.name == "launch" and op.get("emitter") == "gluon"
    return op.with_attrs(emitter=None, roles=None, landing=None) if gluon else op


def has_roles(program: Op) -> bool:
    """Whether some launch of ``program`` is a kernel of Gluon, which has no interpreter."""
    return any(op.get("emitter") == "gluon" for op in program.find("launch"))


def widen(program: Op, narrow: str = "bf16", wide: str = "fp32") -> Op:
    """Every dtype ``narrow`` -> ``wide``, buffers moved apart so that they still fit.

    The distance of each buffer from the start of its area is multiplied by the ratio of the two
    sizes, so regions that did not overlap still do not.
    """
    ratio = DTYPES[wide] // DTYPES[narrow]

    def value(v: Value) -> Value:
        return replace(v, type=replace(v.type, dtype=wide)) if v.type.dtype == narrow else v

    def index(i: Index) -> Index:
        if isinstance(i, At):
            return replace(i, value=value(i.value))
        return value(i) if isinstance(i, Value) else i

    def attribute(a: Any) -> Any:
        return replace(a, index=tuple(map(index, a.index))) if isinstance(a, Ref) else a

    def change(op: Op) -> Op:
        op = _map_blocks(op, change)
        attrs = {k: attribute(v) for k, v in op.attrs}
        if attrs.get("dtype") == narrow:
            attrs["dtype"] = wide
        if op.name == "buffer" and op.get("alias") is None:
            start = 0 if op.get("space") == "local" else layout.DATA
            start = layout.ENCODINGS[op["words"]].area if op.get("words") else start
            attrs["offset"] = start + (int(op["offset"]) - start) * ratio
        return replace(
            op,
            results=tuple(map(value, op.results)),
            ref=attribute(op.ref),
            operands=tuple(map(value, op.operands)),
            attrs=tuple(sorted(attrs.items())),
            blocks=tuple(replace(b, args=tuple(map(value, b.args))) for b in op.blocks),
        )

    return change(program)


def uses(program: Op, dtype: str) -> bool:
    """Whether ``dtype`` occurs in the program."""
    return any(
        op.get("dtype") == dtype or any(r.type.dtype == dtype for r in op.results)
        for op in program.walk()
    )


def _map_blocks(op: Op, function: Callable[[Op], Op]) -> Op:
    blocks = tuple(replace(b, ops=tuple(map(function, b.ops))) for b in op.blocks)
    return replace(op, blocks=blocks)


def shared_bytes(world: int, stride: int) -> int:
    """Bytes that the ranks of the interpreter share: an arena and a scratch area a rank, and a page."""
    return 2 * world * stride + 4096
