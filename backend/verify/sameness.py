"""Names of a program's values in terms of the kernel's: for comparing types, indices and attributes."""

from __future__ import annotations

import re
from typing import Any

from tilelink.ir import All, At, Broadcast, Expr, Index, Range, Type, Value
from tilelink.ir.node import normalise
from tilelink.ir.text import parse_expr

_FIELDS = ("", ".start", ".stop", ".tile")
_PLAIN = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")


class Names:
    """Which value of the kernel each value of the program is. Extents and WORLD are their numbers."""

    def __init__(self, env: dict[str, int]) -> None:
        self.env = env
        self.values: dict[str, str] = {}
        self.exprs: dict[str, Expr] = {}

    def add(self, mine: str, theirs: str) -> None:
        """``%mine`` is the kernel's ``%theirs``. Both are marked, so that no extent is taken for one."""
        self.values[mine] = theirs
        for field in _FIELDS:
            self.exprs[mine + field] = Expr.name(f"{theirs}{field}")

    def value(self, value: Value) -> str:
        """The kernel's name of a value; one that is not the kernel's equals none of its names."""
        return self.values.get(value.name, f"%{value.name}")

    def expr(self, value: Expr) -> Expr:
        """An expression of the program in the kernel's names."""
        unknown = {n: Expr.name(f"%{n}") for n in value.names if not self.known(n)}
        constants = {n: Expr.const(v) for n, v in self.env.items() if n not in self.exprs}
        return value.substitute({**constants, **unknown, **self.exprs})

    def known(self, name: str) -> bool:
        """Whether a name of an expression stands for the same in the kernel: else it is a local one."""
        return name in self.exprs or name in self.env or name == "RANK"

    def type(self, kind: Type) -> tuple[str, tuple[str, ...]]:
        """A type of the program, its dimensions in the kernel's names."""
        return kind.dtype, tuple(str(self.expr(_dimension(d))) for d in kind.shape)

    def plain(self, kind: Type) -> tuple[str, tuple[str, ...]]:
        """A type of the kernel, comparable with :meth:`type`."""
        return kind.dtype, tuple(str(self.own(_dimension(d))) for d in kind.shape)

    def own(self, value: Expr) -> Expr:
        """An expression of the kernel with extents as numbers."""
        shadowed = set(self.values.values())
        return value.substitute(
            {n: Expr.const(v) for n, v in self.env.items() if n not in shadowed}
        )

    def element(self, item: Any) -> Any:
        """An index element of the program in the kernel's names."""
        if isinstance(item, Value):
            return self.value(item)
        if isinstance(item, At):
            return (self.value(item.value), normalise(self.expr(item.start)))
        if isinstance(item, Range):
            return ("range", normalise(self.expr(item.lo)), normalise(self.expr(item.hi)))
        return self.attribute(item)

    def attribute(self, value: Any) -> Any:
        """An attribute of the program in the kernel's names."""
        if isinstance(value, Expr):
            return normalise(self.expr(value))
        if isinstance(value, tuple):
            return tuple(self.attribute(v) for v in value)
        return value

    def same(self, value: Any) -> Any:
        """An attribute or index element of the kernel, comparable with the other two."""
        if isinstance(value, Value):
            return value.name
        if isinstance(value, At):
            return (value.value.name, normalise(self.own(value.start)))
        if isinstance(value, Range):
            return ("range", normalise(self.own(value.lo)), normalise(self.own(value.hi)))
        if isinstance(value, Expr):
            return normalise(self.own(value))
        if isinstance(value, tuple):
            return tuple(self.same(v) for v in value)
        return value


def padded(index: tuple[Index, ...], axes: int) -> tuple[Index, ...]:
    """``index`` with axes that it leaves out written as whole."""
    missing = axes - sum(not isinstance(item, Broadcast) for item in index)
    return (*index, *(All() for _ in range(missing)))


def _dimension(text: str) -> Expr:
    if text.isdigit():
        return Expr.const(int(text))
    return Expr.name(text) if _PLAIN.fullmatch(text) else parse_expr(text)
