"""Names of extents: which are equal, and their values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tilelink.ir import Expr

# Stands in for an extent whose value is not given, until the error that names it.
UNKNOWN = 16


@dataclass(slots=True)
class Extents:
    """Extent names with values, merged as uses show that two are one.

    A name is *rigid* where the mapping writes it: two rigid names never merge, whatever their values.
    ``labels`` holds what errors call a name that no user wrote.
    """

    values: dict[str, int]
    world: int
    rigid: frozenset[str]
    dynamic: frozenset[str] = frozenset()
    labels: dict[str, str] = field(default_factory=dict)
    version: int = 0
    _parent: dict[str, str] = field(default_factory=dict)
    _apart: list[tuple[str, str]] = field(default_factory=list)

    def find(self, name: str) -> str:
        """The name that stands for ``name`` and all that are equal to it."""
        while name in self._parent:
            name = self._parent[name]
        return name

    def canonical(self, expr: Expr) -> Expr:
        """``expr`` over the names that stand for their equals."""
        return expr.substitute({name: self.find(name) for name in sorted(expr.names)})

    def keep_apart(self, names: Iterable[str]) -> None:
        """Declares that different names among ``names`` (of one tensor) are never merged."""
        listed = list(names)
        pairs = [(a, b) for i, a in enumerate(listed) for b in listed[i + 1 :] if a != b]
        self._apart += [pair for pair in pairs if pair not in self._apart]

    def is_static(self, expr: Expr) -> bool:
        """Whether ``expr`` is known when the kernel is compiled, given the extents."""
        return all(name == "WORLD" or self.is_extent(name) for name in expr.names) and not any(
            self.find(name) in self.dynamic for name in expr.names
        )

    def is_extent(self, name: str) -> bool:
        """Whether ``name`` is known as an extent."""
        return name in self.values or name in self.rigid or name in self.labels

    def introduce(self, name: str, label: str) -> None:
        """Makes ``name`` an extent; ``label`` is what errors call it."""
        if name not in self.labels:
            self.labels[name] = label
            self.version += 1

    def is_placeholder(self, expr: Expr) -> bool:
        """Whether ``expr`` is an extent that no user has named."""
        name = expr.args[0] if expr.op == "name" else ""
        return self.labels.get(name, name) != name

    def lookup(self, name: str) -> int | None:
        """The value of an extent, or None."""
        return self.world if name == "WORLD" else self.values.get(self.find(name))

    def known(self, expr: Expr) -> int | None:
        """The value of ``expr`` where all its names have one."""
        env = {name: self.lookup(name) for name in expr.names}
        return None if None in env.values() else int(expr.evaluate(env))

    def value(self, expr: Expr) -> int:
        """The value of ``expr``, with a stand-in for extents that have none."""
        env = {name: self.lookup(name) for name in expr.names}
        return int(expr.evaluate({k: UNKNOWN if v is None else v for k, v in env.items()}))

    def agree(self, left: Expr, right: Expr) -> bool:
        """Whether two extents are equal; merges two names that may be."""
        a, b = self.canonical(left), self.canonical(right)
        if a == b:
            return True
        if a.op == b.op == "name":
            return self._merge(a.args[0], b.args[0])
        if a.op == "name" and self.lookup(a.args[0]) is None:
            value = self.known(b)
            if value is not None:
                self.values[a.args[0]] = value
                self.version += 1
            return True
        if b.op == "name" and self.lookup(b.args[0]) is None:
            return self.agree(b, a)
        x, y = self.known(a), self.known(b)
        return x is None or y is None or x == y

    def _merge(self, a: str, b: str) -> bool:
        if a in self.rigid and b in self.rigid:
            return False
        if any({self.find(x), self.find(y)} == {a, b} for x, y in self._apart):
            return False
        x, y = self.lookup(a), self.lookup(b)
        if x is not None and y is not None and x != y:
            return False
        keep, drop = (a, b) if self._rank(a) <= self._rank(b) else (b, a)
        self._parent[drop] = keep
        if x is not None or y is not None:
            self.values[keep] = x if x is not None else int(y or 0)
        self.version += 1
        return True

    def _rank(self, name: str) -> tuple[int, int]:
        order = list(self.labels)
        kind = 0 if name in self.rigid else 2 if self.is_placeholder(Expr.name(name)) else 1
        return kind, order.index(name) if name in order else -1

    def show(self, expr: Expr) -> str:
        """``expr`` for an error, with its value."""
        expr = self.canonical(expr)
        plain = expr.args[0] if expr.op == "name" else ""
        label = self.labels.get(plain, plain)
        text = label if plain and label != plain else f"`{expr}`"
        value = self.known(expr)
        return text if value is None or expr.op == "const" else f"{text} (= {value})"
