"""What the emitter knows while it writes one kernel: names, dimensions, parameters, tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tilelink.backend.emit.text import Writer, identifier, render
from tilelink.backend.endless import endless_inputs
from tilelink.errors import Span, TilelinkError
from tilelink.ir import DTYPES, At, Expr, Op, Type, Value, dynamic_extents
from tilelink.ir.layout import ENCODINGS, SLOT_BYTES, WORD

TL_DTYPE = {
    "bf16": "tl.bfloat16",
    "fp16": "tl.float16",
    "fp32": "tl.float32",
    "int32": "tl.int32",
    "int64": "tl.int64",
    "bool": "tl.int1",
}

# Elements of 16 bits that a thread loads or stores at once: 16 bytes.
LANES = 8


class CannotEmit(TilelinkError):
    """A fused program that an emitter has no code for."""

    code = "cannot-emit"
    message = "no code for this: {detail}"
    hint = "{advice}; `tilelink run FILE` runs every program, in the simulator"


# What would do instead: of what the passes write for some schedules, and of what they never write.
ANOTHER_SCHEDULE = "another schedule may avoid it"
AS_THE_PASSES = "no pass writes it so: `tilelink ir --fused` of a kernel shows what has code"


def refuse(op: Op, detail: str, advice: str = AS_THE_PASSES) -> CannotEmit:
    """The error for ``op``; ``advice``: what would do instead."""
    return CannotEmit(op.span, detail=detail, advice=advice)


class NoRoles(CannotEmit):
    """A launch that the emitter of kernels with roles has no code for."""

    code = "cannot-emit-roles"
    message = "no code with roles for this: {detail}"
    hint = "use {advice}, or the emitter triton, which runs every launch that multiplies"


def refuse_roles(op: Op, detail: str, advice: str = "tiles of other sizes") -> NoRoles:
    """The error for ``op`` in a launch with roles; ``advice``: what would do beside Triton."""
    return NoRoles(op.span, detail=detail, advice=advice)


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a tile: ``block`` elements (a power of two), of which the first ``length`` are real.

    ``exact`` says that all are; ``ends`` that what lies past them lies past the axis too, where TMA
    reads zeros. ``start`` is the text of the first index of a loop tile, ``stop`` one past its last. ``fits``
    says that a tile which is not short has no element past its end. ``bound``: a number that no element of a tile
    with ``fits`` reaches, but those past the end of a short one do; where there is none, it is empty. ``unit``
    divides the first index of every tile and one past the last. ``held`` says that buffers, which have the
    capacity of a dynamic extent, hold all elements of the tile: those past its end are of rows that are not
    there. ``live``: how many elements of the tile's segment are there, where a dynamic extent says so.
    """

    block: int
    length: str
    exact: bool
    start: str = "0"
    stop: str = ""
    ends: bool = False
    fits: bool = False
    bound: str = ""
    unit: int = 1
    held: bool = False
    live: Expr | None = None


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


class Program:
    """Read-only facts of a fused program: extents, symbols, waits."""

    def __init__(self, program: Op) -> None:
        self.op = program
        self.world = int(program["world"])
        self.dynamic = {d.symbol for d in dynamic_extents(program)}
        self.env: dict[str, int] = {"WORLD": self.world}
        for extent in program.find("extent"):
            if extent.symbol not in self.dynamic:
                self.env[extent.symbol] = int(extent["value"])
        self.symbols = {
            d.symbol: d
            for d in program.body
            if d.name in ("tensor", "scalar", "buffer", "flag", "counter")
        }
        self.waits = tuple(op for op in program.walk() if op.name == "wait")
        self._wait_ids = {id(op): number for number, op in enumerate(self.waits)}
        # Dimensions that a matrix product touches are at least 16 long.
        self.dotted = {
            dim
            for op in program.walk()
            if op.name == "dot"
            for operand in op.operands
            for dim in operand.type.shape
        }

        # Variables along which the elements of some symbol lie one behind the other.
        self.innermost = {
            last.value.name if isinstance(last, At) else last.name
            for op in program.walk()
            for ref in (op.ref, op.get("own"))
            for last in (ref.index[-1:] if ref is not None else ())
            if isinstance(last, (At, Value))
        }
        # Buffers and flags lie in two slots, and nobody acknowledges.
        self.slots = program.get("slots") is not None
        self.folded = any(op.get("folded") for op in program.find("head"))  # into the launches
        self.launches = program.find("launch")
        # Whether the launch is all of a call, and ends it too.
        self.alone = self.slots or any(op.get("ends") for op in self.launches)
        self.streams = bool(program.find("stream"))
        self._endless = endless_inputs(program)

    def offset(self, decl: Op) -> str:
        """The text of the byte at which a symmetric buffer begins in an arena."""
        text = str(decl["offset"])
        words = decl.get("words")
        step = ENCODINGS[words].slot if words else SLOT_BYTES
        return f"{text} + slot * {step}" if self.slots else text

    def closed(self, symbol: str) -> bool:
        """Whether a symbol is a symmetric buffer as long as there are rows, in memory for its capacity."""
        decl = self.symbols[symbol]
        names = {name for dim in decl.get("dims", ()) for name in Expr.of(dim).names}
        return decl.get("space") == "symmetric" and bool(names & self.dynamic)

    def endless(self, symbol: str) -> bool:
        """Whether a symbol is an input behind which a kernel may read."""
        return symbol in self._endless

    def slotted(self, symbol: str) -> bool:
        """Whether a symbol lies in two slots, of which a call uses one."""
        return self.slots and self.symbols[symbol].get("space") == "symmetric"

    def cell(self, decl: Op) -> str:
        """The element type by which a tensor or buffer is addressed: words that signal themselves are integers."""
        words = decl.get("words")
        return f"tl.int{8 * ENCODINGS[words].bytes}" if words else TL_DTYPE[decl["dtype"]]

    def carried(self, op: Op) -> bool:
        """Whether a wait or notify is of a flag that words carry: loads of the words wait themselves."""
        return self.symbols[op.symbol].get("carried") is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that the program writes and the user sees."""
        found = (d for d in self.symbols.values() if d.name == "tensor")
        return tuple(d.symbol for d in found if d["role"] in ("out", "inout"))

    @property
    def counter_words(self) -> tuple[int, int]:
        """The counter words [first, last) that a call leaves at 0."""
        spans = [
            (int(d["offset"]) // WORD, self.numel(name))
            for name, d in self.symbols.items()
            if d.name == "counter"
        ]
        return min((a for a, _ in spans), default=0), max((a + n for a, n in spans), default=0)

    @property
    def acknowledged(self) -> int | None:
        """The first word of the flags that a folded head waits for; None where it waits for none."""
        flags = [op.symbol for head in self.op.find("head") for op in head.body]
        return int(self.symbols[flags[0]]["offset"]) // WORD if flags else None

    @property
    def said(self) -> str | None:
        """The dynamic extent whose value the ranks compare in a call that launches begin; None where a head does,
        none is dynamic, or no rank hears of another."""
        told = self.folded and bool(self.op.find("flag"))
        return next(iter(sorted(self.dynamic)), None) if told else None

    def wait_id(self, op: Op) -> int:
        """The number of a wait, in program order."""
        return self._wait_ids[id(op)]

    def constant(self, expr: Expr | int | str) -> int | None:
        """The value of an expression over fixed extents and WORLD, else None."""
        if isinstance(expr, int):
            return expr
        if isinstance(expr, str):
            expr = parse_dimension(expr)
        return int(expr.evaluate(self.env)) if expr.names <= self.env.keys() else None

    def capacity(self, expr: Expr | int) -> int | None:
        """The value of an expression at the capacity of dynamic extents; None where a variable decides."""
        if isinstance(expr, int):
            return expr
        env = {**self.env, **{d: int(self.op.declared(d)["value"]) for d in self.dynamic}}
        return int(expr.evaluate(env)) if expr.names <= env.keys() else None

    def length(self, low: Expr, high: Expr) -> int | None:
        """``high - low`` where it is the same for every rank and variable, else None."""
        terms = linear((high - low).substitute(self.env))
        constant = terms.pop("", 0)
        return None if any(terms.values()) else constant

    def shape(self, symbol: str) -> tuple[Expr | int, ...]:
        """The dimensions a rank holds of a tensor, buffer, flag or counter."""
        op = self.symbols[symbol]
        dims = [d if isinstance(d, Expr | int) else parse_dimension(d) for d in op["dims"]]
        if op.name == "tensor" and op.get("over") is not None and op["role"] != "temp":
            axis = int(op["over"])
            dims[axis] = Expr.of(dims[axis]) // Expr.name("WORLD")
        return tuple(dims)

    def numel(self, symbol: str) -> int:
        """The greatest number of elements of a symbol."""
        env = dict(self.env)
        for extent in self.op.find("extent"):
            env[extent.symbol] = int(extent["value"])
        count = 1
        for dim in self.shape(symbol):
            count *= dim if isinstance(dim, int) else int(dim.evaluate(env))
        return count


def linear(expr: Expr) -> dict[str, int]:
    """Coefficients of the atoms of a sum, by their text; the constant under the empty text."""
    if expr.op == "const":
        return {"": int(expr.args[0])}
    if expr.op in ("+", "-"):
        left, right = (linear(side) for side in expr.args)
        sign = 1 if expr.op == "+" else -1
        return {k: left.get(k, 0) + sign * right.get(k, 0) for k in left | right}
    if expr.op == "*":
        for side, other in (expr.args, expr.args[::-1]):
            if side.value is not None:
                return {k: v * side.value for k, v in linear(other).items()}
    return {str(expr): 1}


def parse_dimension(text: str) -> Expr:
    """The expression of a type's dimension, which is text."""
    from tilelink.ir import parse_ir

    return Expr.of(dict(parse_ir(f"x {{d = {text}}}").attrs)["d"])


@dataclass
class Scope:
    """State of one kernel while it is written."""

    program: Program
    writer: Writer
    names: dict[str, str] = field(default_factory=dict)  # values and scalars, by IR name
    dims: dict[str, Dim] = field(default_factory=dict)  # tile variables, by IR name
    dirty: dict[str, frozenset[str]] = field(
        default_factory=dict
    )  # values: dims with stray elements
    literals: set[str] = field(default_factory=set)  # values that are Python numbers
    in_rows: set[str] = field(default_factory=set)  # values that were loaded by addresses
    natural: set[str] = field(default_factory=set)  # integers that are known not to be negative
    pointers: dict[str, str] = field(default_factory=dict)  # parameters: symbol to name
    # By symbol, block, and the peer whose memory it is of (None: this rank's).
    descriptors: dict[tuple[str, tuple[int, ...], int | None], str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)  # arena pointers: symbol to name
    scalars: dict[str, str] = field(default_factory=dict)
    extents: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    tokens: list[str] = field(default_factory=list)
    contracted: frozenset[str] = frozenset()  # dimensions that a product sums over
    hoisted: bool = False  # waits of the stage stand before its loop
    folded: bool = False  # in a task that ends with a folded sum, whose values lie in rows
    held: Any = None  # a notify that the stage before holds back, made behind the next main loop
    tile: str = "0"  # text of the tile number, for error records
    stages: int = 3
    warps: int = 4
    each: int = 32  # elements of a tile that one thread adds up at a time, of parts of all ranks
    chosen: dict[int, Any] = field(default_factory=dict)  # loads: where they read, settled before
    polled: dict[str, Op] = field(
        default_factory=dict
    )  # buffers of words: the wait in front of their load
    emptied: list[list[str]] = field(
        default_factory=list
    )  # words that were read and are to be empty
    # Of a kernel whose warps have roles: ops that are written otherwise, the stage's rows and columns,
    # and whether tiles lie as memory is accessed, no longer as products leave them.
    over: dict[str, Callable[[Scope, Op], None]] = field(default_factory=dict)
    grid: tuple[str, str] = ("", "")
    as_memory: bool = False
    as_products: bool = (
        False  # the next access is of tiles as products leave them, 8 bytes a thread
    )
    # The name of the parts that the next folded sum adds, where they have been asked for.
    arrived: str = ""
    landed: int = 0  # columns of the parts that a loader fetches at a time for a folded sum; 0 where it does not

    def fresh(self, name: str) -> str:
        """A Python name not used in this kernel, from ``name``."""
        base = identifier(name)
        text, number = base, 1
        while text in self.used:
            number += 1
            text = f"{base}_{number}"
        self.used.add(text)
        return text

    def lanes(self, name: str, block: int, position: int = 0, rank: int = 1) -> str:
        """The index vector 0 to ``block`` of dimension ``name``, axis ``position`` of a tile's ``rank``.

        With roles a vector has a layout: that of the products, or in two axes that of memory.
        """
        rows, columns = self.grid
        if not rows:
            return f"tl.arange(0, {block})"
        width = self.dims[columns].block
        if rank == 1 and name not in (rows, columns):
            raise NoRoles(
                None,
                detail=f"a vector along `{name}` behind the main loop",
                advice="vectors along the rows or columns of the tile",
            )
        row = name == rows if rank == 1 else position == 0
        memory = ", True" if (rank == 2 and not self.as_products) or self.as_memory else ""
        if row:
            return f"roles.row_index({block}, {width}{memory})"
        return f"roles.column_index({block}{memory})"

    def define(self, value: Value, prefer: str | None = None) -> str:
        """The Python name of a new value."""
        if value.name not in self.names:
            self.names[value.name] = prefer or self.fresh(value.name)
        return self.names[value.name]

    def lookup(self, name: str) -> str:
        """The Python text of a name in an expression."""
        if name == "RANK":
            return "rank"
        if name.endswith("[]"):
            raise CannotEmit(
                None, detail=f"the table `{name[:-2]}` inside an expression", advice=AS_THE_PASSES
            )
        if name in self.names:
            return self.names[name]
        if name in self.program.env:
            return str(self.program.env[name])
        if name in self.program.dynamic:
            return self.extents.setdefault(name, name)
        base, _, part = name.rpartition(".")
        if base in self.dims:
            dim = self.dims[base]
            return {"start": dim.start, "stop": dim.stop}.get(part) or self.names[f"{base}.tile"]
        raise CannotEmit(None, detail=f"the unknown name `{name}`", advice=AS_THE_PASSES)

    def expr(self, value: Expr | int | str, outer: int = 0) -> str:
        """An expression as Python text, folded over fixed extents."""
        if isinstance(value, str):
            value = parse_dimension(value)
        if isinstance(value, Expr):
            value = value.substitute(
                {k: v for k, v in self.program.env.items() if k in value.names}
            )
        return render(value, self.lookup, outer)

    def unit(self, name: str) -> int:
        """What divides every value of the variable ``name``."""
        base, _, part = name.rpartition(".")
        return self.dims[base].unit if part in ("start", "stop") and base in self.dims else 1

    def dim(self, text: str) -> Dim:
        """The dimension that a type names."""
        least = 16 if text in self.program.dotted else 1
        if text in self.dims:
            return self.dims[text]
        value = self.program.constant(text)
        if value is None:
            raise CannotEmit(
                None,
                detail=f"a value as long as the run-time extent `{text}`",
                advice=f"walk it by tiles of `tk.tiles({text})`",
            )
        block = max(least, power_of_two(value))
        return Dim(block, str(value), block == value)

    def blocks(self, type_: Type) -> tuple[int, ...]:
        """The block shape of a type."""
        return tuple(self.dim(d).block for d in type_.shape)

    def stray(self, value: Value) -> frozenset[str]:
        """Dimensions of a value past whose length elements may not be zero."""
        return self.dirty.get(value.name, frozenset())

    def loose(self, type_: Type) -> frozenset[str]:
        """Dimensions of a type that are longer in registers than in fact."""
        return frozenset(d for d in type_.shape if not self.dim(d).exact)

    def wide(self, value: Value, rank: int = 0) -> str:
        """The text of a value, 16-bit floats converted to fp32, for a result of ``rank`` axes.

        With roles, tiles of fewer axes get theirs: Gluon broadcasts along axes of length one alone.
        """
        text = self.names[value.name]
        if value.type.dtype in ("bf16", "fp16") and value.name not in self.literals:
            text = f"{text}.to(tl.float32)"
        fewer = 0 < len(value.type.shape) < rank
        return f"{text}[None, :]" if fewer and self.grid[0] else text


def item_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPES[dtype]


def origin(span: Span | None) -> str:
    """The origin comment ``  # ag_gemm.py:9`` of a span in Python source, or nothing.

    A span into IR text says nothing to the reader of a kernel.
    """
    if span is None or not span.source.name.endswith(".py"):
        return ""
    return f"  # {span.source.name.rsplit('/', 1)[-1]}:{span.line}"
