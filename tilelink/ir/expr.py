"""Integer expressions: index maps, extents, channel numbers.

An :class:`Expr` is immutable, prints as infix text, parses back to itself, and evaluates over Python
ints or NumPy integer arrays. ``/`` and ``%`` are floor division and its remainder. Comparisons and
``and``/``or`` give 0 or 1. Names are extents (``M``), ``WORLD``, ``RANK``, loop variables (``s``) or
fields of a tile (``m.start``, ``m.stop``, ``m.tile``). ``table[i, j]`` reads an integer tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, TypeAlias

import numpy as np

ExprLike: TypeAlias = "Expr | int | str"

# Binding strength of the printed form; higher binds tighter.
PRECEDENCE = {
    "or": 1,
    "and": 2,
    "==": 3,
    "!=": 3,
    "<": 3,
    "<=": 3,
    ">": 3,
    ">=": 3,
    "+": 4,
    "-": 4,
    "*": 5,
    "/": 5,
    "%": 5,
}
_ATOM = 9


def _floordiv(a: Any, b: Any) -> Any:
    return a // b


def _minimum(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


def _as_int(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def compare(a: Any, b: Any) -> Any:
        result = function(a, b)
        return result.astype(np.int64) if isinstance(result, np.ndarray) else int(result)

    return compare


_EVALUATE: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _floordiv,
    "%": operator.mod,
    "min": _minimum,
    "max": _maximum,
    "==": _as_int(operator.eq),
    "!=": _as_int(operator.ne),
    "<": _as_int(operator.lt),
    "<=": _as_int(operator.le),
    ">": _as_int(operator.gt),
    ">=": _as_int(operator.ge),
    "and": _as_int(lambda a, b: (a != 0) & (b != 0)),
    "or": _as_int(lambda a, b: (a != 0) | (b != 0)),
}


@dataclass(frozen=True, slots=True)
class Expr:
    """One node: ``op`` is ``const``, ``name``, ``table`` or a key of the operator table.

    ``args`` holds the int of a constant, the string of a name, the table's name and index
    expressions, or the two operands.
    """

    op: str
    args: tuple[Any, ...]

    @staticmethod
    def const(value: int) -> Expr:
        """The constant ``value``."""
        return Expr("const", (int(value),))

    @staticmethod
    def name(text: str) -> Expr:
        """The variable ``text``."""
        return Expr("name", (text,))

    @staticmethod
    def of(value: ExprLike) -> Expr:
        """An expression from an int, a variable name, or an expression."""
        if isinstance(value, Expr):
            return value
        return Expr.const(value) if isinstance(value, int) else Expr.name(value)

    def __add__(self, other: ExprLike) -> Expr:
        return binary("+", self, other)

    def __radd__(self, other: ExprLike) -> Expr:
        return binary("+", other, self)

    def __sub__(self, other: ExprLike) -> Expr:
        return binary("-", self, other)

    def __rsub__(self, other: ExprLike) -> Expr:
        return binary("-", other, self)

    def __mul__(self, other: ExprLike) -> Expr:
        return binary("*", self, other)

    def __rmul__(self, other: ExprLike) -> Expr:
        return binary("*", other, self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return binary("/", self, other)

    def __mod__(self, other: ExprLike) -> Expr:
        return binary("%", self, other)

    @property
    def value(self) -> int | None:
        """The int of a constant, else None."""
        return int(self.args[0]) if self.op == "const" else None

    @property
    def names(self) -> frozenset[str]:
        """Every variable and table that occurs."""
        if self.op == "const":
            return frozenset()
        if self.op == "name":
            return frozenset((self.args[0],))
        if self.op == "table":
            return frozenset((self.args[0],)).union(*(a.names for a in self.args[1:]))
        return frozenset().union(*(a.names for a in self.args))

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """The value under ``env`` (name to int, NumPy array, or for a table an array); KeyError if unbound."""
        if self.op == "const":
            return self.args[0]
        if self.op == "name":
            return env[self.args[0]]
        if self.op == "table":
            return env[self.args[0]][tuple(a.evaluate(env) for a in self.args[1:])]
        left, right = self.args
        return _EVALUATE[self.op](left.evaluate(env), right.evaluate(env))

    def divisor(self, of: Callable[[str], int]) -> int:
        """A number that divides every value, by what ``of`` says of each variable; 0 where the value is 0."""
        if self.op == "const":
            return abs(int(self.args[0]))
        if self.op == "name":
            return of(self.args[0])
        if self.op not in ("+", "-", "%", "*", "min", "max"):
            return 1
        left, right = (a.divisor(of) for a in self.args)
        return left * right if self.op == "*" else gcd(left, right)

    def substitute(self, env: Mapping[str, ExprLike]) -> Expr:
        """The expression with names replaced, folded where all is constant."""
        if self.op == "const":
            return self
        if self.op == "name":
            return Expr.of(env[self.args[0]]) if self.args[0] in env else self
        if self.op == "table":
            return Expr("table", (self.args[0], *(a.substitute(env) for a in self.args[1:])))
        return binary(self.op, self.args[0].substitute(env), self.args[1].substitute(env))

    def __str__(self) -> str:
        return self._render(0)

    def _render(self, outer: int) -> str:
        if self.op == "const":
            return str(self.args[0]) if self.args[0] >= 0 else f"(0 - {-self.args[0]})"
        if self.op == "name":
            return str(self.args[0])
        if self.op == "table":
            return f"{self.args[0]}[{', '.join(str(a) for a in self.args[1:])}]"
        if self.op in ("min", "max"):
            return f"{self.op}({self.args[0]}, {self.args[1]})"
        mine = PRECEDENCE[self.op]
        left, right = self.args
        # Comparisons do not chain, so both sides of one must bind tighter.
        text = f"{left._render(mine + (mine == 3))} {self.op} {right._render(mine + 1)}"
        return f"({text})" if mine < outer else text


def binary(op: str, left: ExprLike, right: ExprLike) -> Expr:
    """``left op right`` with constants folded and neutral elements dropped."""
    a, b = Expr.of(left), Expr.of(right)
    x, y = a.value, b.value
    if x is not None and y is not None and not (op in "/%" and y == 0):
        return Expr.const(_EVALUATE[op](x, y))
    if (op in ("+", "-") and y == 0) or (op in ("*", "/") and y == 1):
        return a
    if (op == "+" and x == 0) or (op == "*" and x == 1):
        return b
    if (op == "*" and 0 in (x, y)) or (op == "%" and y == 1):
        return Expr.const(0)
    return Expr(op, (a, b))


def minimum(left: ExprLike, right: ExprLike) -> Expr:
    """The smaller of two expressions."""
    return binary("min", left, right)
