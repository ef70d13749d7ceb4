"""Emits ops of a kernel: names, types, constants, arithmetic with promotion and broadcasting."""

from __future__ import annotations

from typing import Any

from tilelink.errors import Span
from tilelink.frontend.errors import DtypeMismatch, ShapeMismatch, UnsupportedSyntax
from tilelink.frontend.extents import Extents
from tilelink.frontend.values import Num, describe
from tilelink.ir import FLOATS, INTEGERS, Block, Expr, Op, Ref, Type, Value, make, promote

_SCALAR_OPS = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "floordiv",
    "%": "mod",
    "min": "minimum",
    "max": "maximum",
}
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


class Builder:
    """Ops under construction: a stack of op lists, unique value names, scalars by name."""

    def __init__(self, extents: Extents, reserved: frozenset[str]) -> None:
        self.extents = extents
        self.reserved = reserved
        self.stack: list[list[Op]] = [[]]
        self.scalars: dict[str, Value] = {}
        self.dims: dict[str, Expr] = {}
        # The tensors that an integer value may come from, to learn which hold indices.
        self.origin: dict[str, frozenset[str]] = {}
        self.indices: set[str] = set()
        # Scalars of loops from 0, to the extent they run to.
        self.ranges: dict[str, Expr] = {}
        self._names: dict[str, int] = {}

    def used_as_index(self, value: Value) -> None:
        """Notes that ``value`` serves as an index, a bound or an integer, and so what it was read from."""
        self.indices |= self.origin.get(value.name, frozenset())

    def unique(self, base: str) -> str:
        """A value name not used yet: ``base``, or ``base.1`` and so on."""
        count = self._names.get(base, -1)
        while True:
            count += 1
            name = base if count == 0 else f"{base}.{count}"
            if name not in self.reserved:
                self._names[base] = count
                return name

    def names(self) -> dict[str, int]:
        """A snapshot of the names used, for `restore`."""
        return dict(self._names)

    def restore(self, names: dict[str, int]) -> None:
        """Forgets the names made since the snapshot."""
        self._names = names

    def append(self, op: Op) -> None:
        """Adds ``op`` to the innermost block."""
        self.stack[-1].append(op)

    def emit(
        self,
        name: str,
        operands: tuple[Value, ...],
        type_: Type,
        span: Span | None,
        hint: str | None = None,
        ref: Ref | None = None,
        blocks: tuple[Block, ...] = (),
        **attrs: Any,
    ) -> Value:
        """Adds an op with one result and returns the result."""
        result = Value(self.unique(hint or name), type_)
        self.append(
            make(
                name,
                results=(result,),
                ref=ref,
                operands=operands,
                blocks=blocks,
                span=span,
                **attrs,
            )
        )
        if name != "dot":
            origins = (self.origin.get(x.name, frozenset[str]()) for x in operands)
            self.origin[result.name] = frozenset[str]().union(*origins)
        if type_.dtype in INTEGERS and not type_.shape:
            self.scalars[result.name] = result
        return result

    def dim(self, expr: Expr) -> str:
        """The dimension of a type that is as long as the extent ``expr``."""
        canonical = self.extents.canonical(expr)
        text = str(canonical)
        self.dims[text] = canonical
        return text

    def same_dim(self, a: str, b: str) -> bool:
        """Whether two dimensions of types are equal; merges extents that may be."""
        if a == b:
            return True
        return a in self.dims and b in self.dims and self.extents.agree(self.dims[a], self.dims[b])

    def constant(self, value: Any, dtype: str, span: Span | None, hint: str = "c") -> Value:
        """A scalar constant of element type ``dtype``."""
        if dtype in FLOATS:
            value = float(value)
        elif dtype == "bool":
            value = bool(value)
        elif not isinstance(value, Expr):
            value = int(value)
        return self.emit("constant", (), Type(dtype), span, hint, value=value)

    def scalar(self, expr: Expr, span: Span | None, hint: str | None = None) -> Value:
        """The integer ``expr`` as a value."""
        if expr.op == "name" and expr.args[0] in self.scalars:
            return self.scalars[expr.args[0]]
        if self.extents.is_static(expr):
            return self.constant(self.extents.value(expr), "int32", span, hint or "c")
        if all(self.extents.is_extent(name) for name in expr.names):
            return self.constant(expr, "int32", span, hint or "c")
        if expr.op == "name":
            name, _, which = expr.args[0].rpartition(".")
            tile = self.scalars[name]
            return self.emit("bound", (tile,), Type("int32"), span, hint or which, which=which)
        left, right = (self.scalar(a, span) for a in expr.args)
        return self.emit(_SCALAR_OPS[expr.op], (left, right), Type("int32"), span, hint)

    def literal(self, value: Any) -> Any:
        """A compile-time number of ``value``, or ``value`` itself where it is none."""
        if isinstance(value, Num) and self.extents.is_static(value.expr):
            return self.extents.value(value.expr)
        return value

    def data(
        self, value: Any, span: Span, like: str | None = None, hint: str | None = None
    ) -> Value:
        """``value`` as an IR value; literals take the element type ``like`` where it can hold them."""
        if isinstance(value, Value):
            return value
        value = self.literal(value)
        if isinstance(value, Num):
            return self.scalar(value.expr, span, hint)
        if isinstance(value, bool):
            return self.constant(value, "bool", span, hint or "c")
        if isinstance(value, int):
            dtype = like if like is not None and like != "bool" else "int32"
            return self.constant(value, dtype, span, hint or "c")
        if isinstance(value, float):
            return self.constant(value, like if like in FLOATS else "fp32", span, hint or "c")
        if isinstance(value, tuple):
            raise UnsupportedSyntax(
                span,
                what=f"a tuple of {len(value)}, where one value is needed,",
                advice="write one value; a store takes one tile",
            )
        advice = "read a tile of a tensor with `A[m, k]`, global indices of a tile with `m.index`"
        if value is None:
            advice = "an argument that was left out is None, and so is what a function without `return` gives"
        raise UnsupportedSyntax(span, what=f"{describe(value)} as a number", advice=advice)

    def cast(self, x: Value, dtype: str, span: Span | None, hint: str | None = None) -> Value:
        """``x`` as ``dtype``; nothing is emitted where it is that already."""
        if x.type.dtype == dtype:
            return x
        return self.emit("cast", (x,), Type(dtype, x.type.shape), span, hint)

    def pair(self, left: Any, right: Any, span: Span) -> tuple[Value, Value]:
        """Two operands of arithmetic as values; a literal takes the other's element type."""
        left, right = self.literal(left), self.literal(right)
        if isinstance(left, Num):
            left = self.scalar(left.expr, span)
        if isinstance(right, Num):
            right = self.scalar(right.expr, span)
        a = self.data(left, span, right.type.dtype if isinstance(right, Value) else None)
        return a, self.data(right, span, a.type.dtype)

    def broadcast(self, shapes: list[tuple[str, ...]], span: Span) -> tuple[str, ...]:
        """The shape that all of ``shapes`` broadcast to, as in NumPy."""
        rank = max(len(shape) for shape in shapes)
        result = ["1"] * rank
        for shape in shapes:
            for axis, dim in enumerate(shape, rank - len(shape)):
                if result[axis] == "1":
                    result[axis] = dim
                elif dim != "1" and not self.same_dim(result[axis], dim):
                    texts = [f"a tile of shape `[{', '.join(s)}]`" for s in shapes if s]
                    raise ShapeMismatch(
                        span,
                        left=texts[0],
                        right=texts[-1],
                        advice="shapes broadcast as in NumPy: add axes with `x[:, None]` or `x[None, :]`",
                    )
        return tuple(result)

    def arithmetic(self, name: str, left: Any, right: Any, span: Span, hint: str | None) -> Value:
        """A binary op on two operands, at least one of them an IR value."""
        a, b = self.pair(left, right, span)
        shape = self.broadcast([a.type.shape, b.type.shape], span)
        dtype = promote(a.type.dtype, b.type.dtype)
        if name in ("and", "or") and dtype != "bool":
            self.reject(span, name, dtype, "compare first: `&` and `|` join conditions")
        if name in ("floordiv", "mod") and dtype not in INTEGERS:
            self.used_as_index(a)
            self.used_as_index(b)
            self.reject(span, name, dtype, "`//` and `%` take integers; divide floats with `/`")
        if name == "div" and dtype not in FLOATS:
            a, b, dtype = self.cast(a, "fp32", span), self.cast(b, "fp32", span), "fp32"
        if dtype == "bool" and name not in ("and", "or", *COMPARISONS):
            a, b, dtype = self.cast(a, "int32", span), self.cast(b, "int32", span), "int32"
        result = "bool" if name in COMPARISONS else dtype
        return self.emit(name, (a, b), Type(result, shape), span, hint)

    def reject(self, span: Span, name: str, dtype: str, advice: str) -> None:
        """Raises DtypeMismatch for an op on an element type that it does not take."""
        raise DtypeMismatch(span, what=f"`{name}` does not take {dtype}", advice=advice)

    def tile(self, name: str, value: Value) -> None:
        """Makes a tile variable known to `scalar`."""
        self.scalars[name] = value
