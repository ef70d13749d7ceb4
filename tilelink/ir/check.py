"""The types of IR text: what each op takes and gives, and how its attributes are to be written.

`vocabulary` knows the words; this knows how they go together. Text that was edited by hand is held
against both before anything reads it, so that a mistake is named at its line and not met later as
something else. `check_tables` lists the attributes' kinds, and the ops' shapes, `check_ops` their types.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilelink.errors import choices
from tilelink.ir.check_ops import TYPES, nothing
from tilelink.ir.check_tables import (
    ALIGN_BYTES,
    CHOICES,
    INSIDE,
    KIND_OF,
    KINDS,
    LOOPS,
    MANY,
    MAX_WORKERS,
    SHAPES,
    SPOKEN,
    IRTypeError,
    error,
)
from tilelink.ir.expr import Expr
from tilelink.ir.layout import MAX_WORLD
from tilelink.ir.limits import MAX_EXTENT
from tilelink.ir.node import DECLARATIONS, All, At, Broadcast, Op, Range, Ref, Value
from tilelink.ir.text import parse_expr
from tilelink.ir.types import DTYPES, INTEGERS, Type


def check_types(top: Op) -> None:
    """Raises IRTypeError at the first op of a kernel or program that is not as docs/ir.md says.

    `vocabulary.check_names` comes first: it knows which words there are.
    """
    if top.name not in ("kernel", "program"):
        raise error(top, f"`{top.name}` is no `kernel` and no `program`")
    Checker(top).run()


class Checker:
    def __init__(self, top: Op) -> None:
        self.top = top
        self.declared: dict[str, Op] = {}
        self.sizes: dict[str, int] = {}
        self.defined: set[str] = set()
        self.scope: dict[str, Value] = {}

    def run(self) -> None:
        self.attributes(self.top)
        self.shape(self.top)
        world = self.top["world"]
        if world > MAX_WORLD:
            raise error(self.top, f"`world` is {world}, but there are at most {MAX_WORLD} ranks")
        self.sizes["WORLD"] = world
        self.declarations()
        moved = any(op.get("move") == "exchange" for op in self.top.find("tensor"))
        if not moved and all(op.name in DECLARATIONS for op in self.top.body):
            raise error(self.top, f"`@{self.top.symbol}` has no ops")
        self.agents()
        self.block(self.top, self.top.name)

    # --- what is declared ----------------------------------------------------------------------

    def declarations(self) -> None:
        for op in self.top.body:
            if op.name not in DECLARATIONS:
                continue
            self.attributes(op)
            self.shape(op)
            symbol = op.symbol
            if symbol in self.declared or symbol in ("WORLD", "RANK"):
                raise error(op, f"`@{symbol}` is declared twice", "give each its own name")
            self.declared[symbol] = op
            if op.name == "extent":
                if op["value"] > MAX_EXTENT:
                    raise error(op, f"`value` of `@{symbol}` is more than {MAX_EXTENT}")
                self.sizes[symbol] = op["value"]
        for op in self.declared.values():
            self.dims(op)
            unit = ALIGN_BYTES if op.name == "buffer" else 4
            if op.get("offset", 0) % unit:
                raise error(op, f"`offset` of `@{op.symbol}` is no multiple of {unit} bytes")
            if op.name == "tensor":
                self.tensor(op)

    def dims(self, op: Op) -> None:
        for dim in op.get("dims", ()):
            size = self.known(op, Expr.of(dim), "dims")
            if size is None:
                raise error(
                    op,
                    f"`{dim}` in `dims` of `@{op.symbol}` is not made of extents",
                    f"known here: {', '.join(sorted(self.sizes))}",
                )
            if not 1 <= size <= MAX_EXTENT:
                raise error(
                    op, f"`{dim}` in `dims` of `@{op.symbol}` is {size}", "lengths start at 1"
                )

    def tensor(self, op: Op) -> None:
        rank = len(op["dims"])
        over = op.get("over")
        if over is not None and over >= rank:
            raise error(op, f"`over` is axis {over}, but `@{op.symbol}` has {rank} axes")
        if op["move"] in ("gather", "scatter", "ring", "shard") and (
            over is None or op.get("owner") is None
        ):
            raise error(op, f"`@{op.symbol}` moves by `{op['move']}` and lacks `over` or `owner`")
        if op.get("tile") is not None and len(op["tile"]) != rank:
            raise error(op, f"`tile` has {len(op['tile'])} lengths, `@{op.symbol}` has {rank} axes")
        for key in ("into", "offsets", "source", "table"):
            name = op.get(key)
            if name is not None and getattr(self.declared.get(name), "name", "") != "tensor":
                raise error(op, f"`{key}` names `{name}`, which is no tensor")
        for key, variable in (("owner", "e"), ("signal", "t")):
            if op.get(key) is not None:
                self.names(op, Expr.of(op[key]), key, {variable})

    def agents(self) -> None:
        seen: list[str] = []
        for op in self.top.body:
            if op.name not in ("head", "stream", "launch", "collective"):
                continue
            name = op.symbol if op.ref is not None else op.name
            for before in op.get("after", ()):
                if before not in seen:
                    raise error(
                        op,
                        f"`{name}` comes after `{before}`, which stands behind it or is itself",
                        "agents stand in the order in which the host enqueues them",
                    )
            if op.get("workers", 1) > MAX_WORKERS:
                raise error(op, f"`workers` is {op['workers']}", f"use 1 to {MAX_WORKERS}")
            warps = op.get("warps", 1)
            if warps > 32 or warps & (warps - 1):
                raise error(op, f"`warps` is {warps}", "use 1, 2, 4, 8, 16 or 32")
            if name in seen:
                raise error(op, f"there are two agents `{name}`", "give each its own name")
            seen.append(name)

    # --- ops -----------------------------------------------------------------------------------

    def block(self, parent: Op, inside: str) -> None:
        allowed = INSIDE[inside]
        for number, op in enumerate(parent.body):
            if op.name not in allowed:
                raise error(op, f"`{op.name}` cannot stand inside `{inside}`")
            if op.name == "yield" and (number + 1 < len(parent.body) or parent.name not in LOOPS):
                raise error(op, "`yield` is not the last op of a loop")
            if op.name not in DECLARATIONS:
                self.attributes(op)
                self.shape(op)
                self.op(op, inside)

    def op(self, op: Op, inside: str) -> None:
        for value in op.operands:
            self.visible(op, value)
        if op.ref is not None and op.name not in ("stream", "launch", "stage", "collective"):
            self.reference(op, op.ref)
        for key, value in op.attrs:
            if isinstance(value, Ref):
                self.reference(op, value)
            elif isinstance(value, Expr):
                self.names(op, value, key, {"i"} if key == "visit" else set())
            elif isinstance(value, tuple) and key in ("extent", "tile"):
                for item in value:
                    self.names(op, Expr.of(item), key, set())
        before = dict(self.scope)
        if op.blocks:
            self.region(op, inside if op.name in LOOPS else op.name)
        self.scope = before
        for result in op.results:
            self.define(op, result)
        TYPES.get(op.name, nothing)(self, op)

    def region(self, op: Op, inside: str) -> None:
        for argument in op.args:
            self.define(op, argument)
        if op.name == "stage":
            self.stage(op)
        elif op.name in LOOPS:
            self.loop(op)
        self.block(op, inside)

    def stage(self, op: Op) -> None:
        count = len(op["extent"])
        if len(op["tile"]) != count or len(op.args) != count:
            raise error(
                op,
                f"`stage` has {count} extents, {len(op['tile'])} tile lengths and "
                f"{len(op.args)} arguments",
                "give one of each for every axis",
            )
        self.lengths(op)
        if any(a.type.dtype not in ("tile", "int32") for a in op.args):
            raise error(op, "an argument of `stage` is neither `tile` nor `int32`")
        if op.get("axis", 0) >= count:
            raise error(op, f"`axis` is {op['axis']}, but the stage has {count} axes")
        low, high = op.get("workers", (0, 1))
        if not 0 <= low < high:
            raise error(op, f"`workers` is the empty range [{low}, {high}]")
        low, high = op.get("positions", (0, 1))
        if not 0 <= low < high:
            raise error(op, f"`positions` is the empty range [{low}, {high}]")

    def loop(self, op: Op) -> None:
        own = 1
        carried = op.operands
        if op.name == "for_tiles" and op.get("bounds"):
            if len(op.operands) < 2:
                raise error(op, "`for_tiles {bounds = true}` needs its two bounds as operands")
            if any(v.type.shape or v.type.dtype not in INTEGERS for v in op.operands[:2]):
                raise error(op, "the bounds of `for_tiles` are not integers")
            carried = op.operands[2:]
        elif op.name == "for_tiles":
            if op.get("extent") is None:
                raise error(op, "`for_tiles` has neither `extent` nor `bounds`")
            own = len(op["extent"])
        kind = "tile" if op.name == "for_tiles" else "int32"
        self.lengths(op)
        if len(op.args) != own + len(carried):
            raise error(
                op,
                f"`{op.name}` has {len(op.args)} arguments, but {own} loop variables and "
                f"{len(carried)} carried values",
            )
        for argument in op.args[:own]:
            if argument.type != Type(kind):
                raise error(op, f"the loop variable `{argument}` is no `{kind}`")
        last = op.body[-1] if op.body else None
        given = last.operands if last is not None and last.name == "yield" else ()
        lists = (("results", op.results), ("carried arguments", op.args[own:]), ("`yield`", given))
        for what, values in lists:
            if len(values) != len(carried):
                raise error(
                    op, f"`{op.name}` carries {len(carried)} values, but {what}: {len(values)}"
                )
            for left, right in zip(carried, values, strict=True):
                self.same(op, left.type, right.type, f"{left} and {right}, one carried value,")

    def lengths(self, op: Op) -> None:
        for key in ("extent", "tile", "segment", "segments"):
            given = op.get(key)
            for item in given if isinstance(given, tuple) else () if given is None else (given,):
                size = self.known(op, Expr.of(item), key)
                if size is not None and (size < 0 or (key != "extent" and size == 0)):
                    raise error(op, f"`{item}` in `{key}` of `{op.name}` is {size}")
        extent, tile = op.get("extent"), op.get("tile")
        if extent is not None and tile is not None and len(tile) != len(extent):
            raise error(op, f"`{op.name}` has {len(extent)} extents and {len(tile)} tile lengths")

    def attributes(self, op: Op) -> None:
        for key, value in op.attrs:
            if key in CHOICES and key in ("op",) and op.name != "collective":
                continue
            if key in CHOICES:
                if value not in CHOICES[key]:
                    raise error(
                        op,
                        f"`{key}` of `{op.name}` is {value!r}",
                        choices(value, CHOICES[key], "use one of"),
                    )
                continue
            kind = KIND_OF.get(f"{key}:{op.name}", KIND_OF.get(key))
            if kind is not None and not KINDS[kind](value):
                raise error(
                    op, f"`{key}` of `{op.name}` is not {SPOKEN[kind]}", f"write {SPOKEN[kind]}"
                )

    def shape(self, op: Op) -> None:
        shape = SHAPES[op.name]
        counts = (
            ("operands", len(op.operands), shape.operands),
            ("results", len(op.results), shape.results),
            ("blocks", len(op.blocks), shape.blocks),
        )
        for what, count, (least, most) in counts:
            if not least <= count <= most:
                wanted = str(least) if least == most else f"{least} or more"
                wanted = f"{least} to {most}" if least < most < MANY else wanted
                raise error(op, f"`{op.name}` has {count} {what} instead of {wanted}")
        if shape.ref and op.ref is None:
            raise error(op, f"`{op.name}` names no symbol", "write `@` and a name behind it")

    # --- names, values, references -----------------------------------------------------------------

    def define(self, op: Op, value: Value) -> None:
        if value.name in self.defined:
            raise error(op, f"`{value}` is defined twice", "give each value its own name")
        type_ = value.type
        if type_.dtype not in DTYPES and not type_.is_tile:
            raise error(
                op,
                f"`{value}` has the unknown type `{type_}`",
                choices(type_.dtype, [*DTYPES, "tile"], "use one of"),
            )
        if type_.is_tile and (type_.shape or op.name not in ("stage", "for_tiles")):
            raise error(op, f"`{value}` cannot be a `tile`: only loop variables are")
        self.defined.add(value.name)
        self.scope[value.name] = value
        for dim in type_.shape:
            if not dim.isdigit() and not self.is_tile(dim):
                self.names(op, parse_expr(dim), f"the type of {value}", set())

    def is_tile(self, name: str) -> bool:
        return name in self.scope and self.scope[name].type.is_tile

    def visible(self, op: Op, value: Value) -> None:
        if value.name not in self.scope:
            raise error(
                op, f"`{value}` is not defined here", "it was defined inside a block that has ended"
            )

    def names(self, op: Op, expr: Expr, key: str, extra: set[str]) -> None:
        """Every name of an expression must stand for something where the op is."""
        for name in sorted(expr.names):
            base, _, part = name.rpartition(".")
            known = (
                name in self.sizes
                or name in extra
                or name == "RANK"
                or (self.is_tile(base) and part in ("start", "stop", "tile"))
                or (name in self.scope and not self.scope[name].type.shape)
                or getattr(self.declared.get(name), "name", "") in ("tensor", "scalar")
            )
            if not known:
                raise error(op, f"`{name}` in `{key}` of `{op.name}` stands for nothing")
        self.known(op, expr, key)

    def known(self, op: Op, expr: Expr, key: str) -> int | None:
        """The value of an expression over extents, None where it reads anything else."""
        if not expr.names <= set(self.sizes):
            return None
        try:
            return int(expr.evaluate(self.sizes))
        except ZeroDivisionError:
            raise error(op, f"`{expr}` in `{key}` of `{op.name}` divides by zero") from None

    def reference(self, op: Op, ref: Ref) -> None:
        place = self.declared.get(ref.symbol)
        if place is None:
            raise error(op, f"there is no `@{ref.symbol}`")
        axes = [item for item in ref.index if not isinstance(item, Broadcast)]
        rank = len(place.get("dims", ()))
        if ref.index and len(axes) != rank:
            raise error(
                op,
                f"`@{ref.symbol}` has {rank} axes, but {len(axes)} are indexed",
                "give one index an axis; `:` takes a whole axis",
            )
        for item in ref.index:
            for part in _expressions(item):
                self.names(op, part, f"@{ref.symbol}", set())
            if isinstance(item, Range):
                length = self.known(op, item.hi - item.lo, f"@{ref.symbol}")
                if length is not None and length < 0:
                    raise error(op, f"the range `{item}` of `@{ref.symbol}` ends before it starts")
            value = item.value if isinstance(item, At) else item
            if isinstance(value, Value):
                self.visible(op, value)
                if not value.type.is_tile and value.type.dtype not in INTEGERS:
                    raise error(
                        op,
                        f"`@{ref.symbol}` is indexed with `{value}`, which is {value.type}",
                        "an index is a loop tile, an integer or a tile of integers",
                    )

    # --- types -----------------------------------------------------------------------------------

    def equal(self, left: str, right: str) -> bool:
        """Whether two dimensions may be of one length: what is not known may."""
        if left == right:
            return True
        tiles = self.is_tile(left), self.is_tile(right)
        if all(tiles):
            return False
        if any(tiles):
            return True
        names = set(self.sizes)
        a, b = parse_expr(left), parse_expr(right)
        if not (a.names <= names and b.names <= names):
            return True
        return bool(a.evaluate(self.sizes) == b.evaluate(self.sizes))

    def same(self, op: Op, left: Type, right: Type, what: str) -> None:
        if left.dtype != right.dtype or not self.shapes_agree(left.shape, right.shape):
            raise error(op, f"{what} have types {left} and {right}", "they have to be equal")

    def shapes_agree(self, left: tuple[str, ...], right: tuple[str, ...]) -> bool:
        return len(left) == len(right) and all(map(self.equal, left, right))

    def result(self, op: Op, dtype: str | None, shape: tuple[str, ...] | None) -> None:
        """The type of the only result must be this; None: any."""
        found = op.results[0].type
        if dtype is not None and found.dtype != dtype:
            raise error(op, f"`{op.name}` gives {dtype} here, not {found.dtype}", "change the type")
        if shape is not None and not self.shapes_agree(found.shape, shape):
            text = ", ".join(shape)
            raise error(
                op, f"`{op.name}` gives the shape [{text}] here, not {found}", "change the type"
            )

    def data(self, op: Op) -> list[Type]:
        for value in op.operands:
            if value.type.is_tile:
                raise error(
                    op, f"`{op.name}` takes data, and `{value}` is a loop tile", "use `index` of it"
                )
        return [value.type for value in op.operands]

    def broadcast(self, op: Op, types: list[Type]) -> tuple[str, ...]:
        rank = max(len(t.shape) for t in types)
        out = ["1"] * rank
        for type_ in types:
            for axis, dim in enumerate(type_.shape, rank - len(type_.shape)):
                if out[axis] == "1":
                    out[axis] = dim
                elif dim != "1" and not self.equal(out[axis], dim):
                    texts = " and ".join(map(str, types))
                    raise error(op, f"{texts} do not broadcast", "shapes broadcast as in NumPy")
        return tuple(out)

    def indexed(self, ref: Ref) -> tuple[str, ...] | None:
        """The shape of what a reference reads; None where the text does not tell."""
        dims = [str(d) for d in self.declared[ref.symbol].get("dims", ())]
        if not ref.index:
            return None
        shape: list[str] = []
        axis = 0
        for item in ref.index:
            if isinstance(item, Broadcast):
                shape.append("1")
                continue
            value = item.value if isinstance(item, At) else item
            if isinstance(item, All):
                if self.declared[ref.symbol].get("over") == axis:
                    return None  # the shard of a rank or the whole, as the op has it
                shape.append(dims[axis])
            elif isinstance(item, Range):
                shape.append(str(item.hi - item.lo))
            elif isinstance(value, Value) and value.type.is_tile:
                shape.append(value.name)
            elif isinstance(value, Value):
                if len(value.type.shape) > 1:
                    return None
                shape += value.type.shape
            axis += 1
        return tuple(shape)


def _expressions(item: object) -> Iterator[Expr]:
    if isinstance(item, Range):
        yield from (item.lo, item.hi)
    elif isinstance(item, At):
        yield item.start
    elif isinstance(item, Expr):
        yield item


__all__ = ["IRTypeError", "check_types"]
