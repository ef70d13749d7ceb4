"""The one node shape of the IR.

A program at every stage is a tree of :class:`Op`. An op has a name, results, an optional reference
(the tensor, buffer or flag it touches, with an index), operand values, attributes and blocks. All
parts are immutable; the span is carried but takes no part in equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tilelink.errors import Span
from tilelink.ir.expr import Expr
from tilelink.ir.types import Type


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: a name unique in its kernel or program, and its type."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class All:
    """The whole of an axis, printed ``:``."""

    def __str__(self) -> str:
        return ":"


@dataclass(frozen=True, slots=True)
class Range:
    """The half-open range ``lo..hi`` of an axis."""

    lo: Expr
    hi: Expr

    def __str__(self) -> str:
        return f"{self.lo}..{self.hi}"


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A new axis of length one in an index list, printed ``+``."""

    def __str__(self) -> str:
        return "+"


@dataclass(frozen=True, slots=True)
class At:
    """A tile placed at another start than its own, printed ``%m at m.start - 64``."""

    value: Value
    start: Expr

    def __str__(self) -> str:
        return f"{self.value} at {self.start}"


Index: TypeAlias = "Value | Expr | Range | All | Broadcast | At"


@dataclass(frozen=True, slots=True)
class Ref:
    """A named thing and where in it: ``@A[%m, 0..64, :]``; no index means all of it."""

    symbol: str
    index: tuple[Index, ...] = ()

    def __str__(self) -> str:
        return (
            f"@{self.symbol}[{', '.join(map(str, self.index))}]"
            if self.index
            else f"@{self.symbol}"
        )


@dataclass(frozen=True, slots=True)
class Block:
    """A region: block arguments and ops in order."""

    args: tuple[Value, ...] = ()
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. ``attrs`` is sorted by key; see ``docs/ir.md`` for every op and its attributes."""

    name: str
    results: tuple[Value, ...] = ()
    ref: Ref | None = None
    operands: tuple[Value, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    blocks: tuple[Block, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, key: str) -> Any:
        """The attribute ``key``; KeyError if there is none."""
        for name, value in self.attrs:
            if name == key:
                return value
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute ``key``, or ``default``."""
        for name, value in self.attrs:
            if name == key:
                return value
        return default

    def with_attrs(self, **attrs: Any) -> Op:
        """A copy with attributes set; a value of None removes one."""
        merged = {**dict(self.attrs), **{k: normalise(v) for k, v in attrs.items()}}
        return replace(
            self, attrs=tuple(sorted((k, v) for k, v in merged.items() if v is not None))
        )

    def with_ops(self, ops: tuple[Op, ...], block: int = 0) -> Op:
        """A copy whose block number ``block`` holds ``ops``."""
        blocks = list(self.blocks)
        blocks[block] = replace(blocks[block], ops=ops)
        return replace(self, blocks=tuple(blocks))

    @property
    def symbol(self) -> str:
        """The name of the thing referred to; KeyError if the op has no reference."""
        if self.ref is None:
            raise KeyError(self.name)
        return self.ref.symbol

    @property
    def body(self) -> tuple[Op, ...]:
        """The ops of the first block, or nothing."""
        return self.blocks[0].ops if self.blocks else ()

    @property
    def args(self) -> tuple[Value, ...]:
        """The arguments of the first block, or nothing."""
        return self.blocks[0].args if self.blocks else ()

    def walk(self) -> Iterator[Op]:
        """This op and every op inside it, in program order."""
        left = [self]
        while left:
            op = left.pop()
            yield op
            for block in reversed(op.blocks):
                left += reversed(block.ops)

    def find(self, name: str) -> tuple[Op, ...]:
        """The direct children named ``name``, in order."""
        return tuple(op for op in self.body if op.name == name)

    def declared(self, symbol: str) -> Op:
        """The direct child that declares ``symbol`` (tensor, buffer, flag, counter…); KeyError if none."""
        for op in self.body:
            if op.ref is not None and op.ref.symbol == symbol and op.name in DECLARATIONS:
                return op
        raise KeyError(symbol)


# Ops that bring a symbol into being.
DECLARATIONS = frozenset({"extent", "tensor", "scalar", "buffer", "flag", "counter"})


def normalise(value: Any) -> Any:
    """An attribute in its canonical form: lists become tuples, constant expressions ints."""
    if isinstance(value, list | tuple):
        return tuple(normalise(v) for v in value)
    if isinstance(value, Expr) and value.value is not None:
        return value.value
    return value


def make(
    name: str,
    *,
    results: tuple[Value, ...] = (),
    ref: Ref | None = None,
    operands: tuple[Value, ...] = (),
    blocks: tuple[Block, ...] = (),
    span: Span | None = None,
    **attrs: Any,
) -> Op:
    """An op with attributes given as keywords (None: absent), in canonical order."""
    canonical = tuple(sorted((k, normalise(v)) for k, v in attrs.items() if v is not None))
    return Op(name, results, ref, operands, canonical, blocks, span)


def rewrite(op: Op, function: Callable[[Op], tuple[Op, ...]]) -> Op:
    """``op`` with each op inside it, innermost first, replaced by ``function`` of it."""
    blocks = tuple(
        replace(
            block,
            ops=tuple(new for child in block.ops for new in function(rewrite(child, function))),
        )
        for block in op.blocks
    )
    return op if blocks == op.blocks else replace(op, blocks=blocks)
