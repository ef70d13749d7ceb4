"""Places in a program, and programs with one place changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilelink.errors import Span
from tilelink.ir import Expr, Index, Op, Ref, binary, op_line
from tilelink.ir.node import normalise

SYNCHRONISATION = ("wait", "notify")
AGENTS = ("head", "stream", "launch", "collective")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A program with one mistake in it.

    ``name`` is the class of the mistake, ``description`` what was done to which op, ``span`` where the op
    that was changed comes from.
    """

    name: str
    description: str
    span: Span | None
    program: Op


@dataclass(frozen=True, slots=True)
class Site:
    """An op and where it stands: ``path`` holds (block, position) pairs from the program down.

    ``above`` holds the ops around it, the program first.
    """

    path: tuple[tuple[int, int], ...]
    op: Op
    above: tuple[Op, ...]

    @property
    def agent(self) -> Op | None:
        """The agent that the op stands in."""
        return self.above[1] if len(self.above) > 1 and self.above[1].name in AGENTS else None

    @property
    def stage(self) -> Op | None:
        """The stage that the op stands in."""
        return next((op for op in self.above if op.name == "stage"), None)

    @property
    def in_ack(self) -> bool:
        """Whether it is part of the agreement that a rank has finished its reads: head or finish."""
        return any(op.name in ("head", "finish") for op in self.above)

    @property
    def siblings(self) -> tuple[Op, ...]:
        """The ops of the block that it stands in."""
        return self.above[-1].blocks[self.path[-1][0]].ops

    @property
    def position(self) -> int:
        """Its number among its siblings."""
        return self.path[-1][1]


def sites(program: Op, *names: str) -> Iterator[Site]:
    """Every op inside ``program`` in program order, of the given names where there are any."""
    stack: list[Site] = [Site((), program, ())]
    while stack:
        site = stack.pop()
        if site.path and (not names or site.op.name in names):
            yield site
        inner = [
            Site((*site.path, (b, n)), op, (*site.above, site.op))
            for b, block in enumerate(site.op.blocks)
            for n, op in enumerate(block.ops)
        ]
        stack.extend(reversed(inner))


def replaced(program: Op, path: tuple[tuple[int, int], ...], *ops: Op) -> Op:
    """``program`` with the op at ``path`` replaced by ``ops`` (none: removed)."""
    (block, position), rest = path[0], path[1:]
    old = program.blocks[block].ops
    new = (replaced(old[position], rest, *ops),) if rest else ops
    return program.with_ops((*old[:position], *new, *old[position + 1 :]), block)


def reordered(program: Op, site: Site, ops: tuple[Op, ...]) -> Op:
    """``program`` with ``ops`` in place of the block that ``site`` stands in."""
    block = site.path[-1][0]
    if len(site.path) == 1:
        return program.with_ops(ops, block)
    return replaced(program, site.path[:-1], site.above[-1].with_ops(ops, block))


def mutant(program: Op, site: Site, name: str, what: str, *ops: Op) -> Mutant:
    """The mutant in which ``ops`` stand in place of ``site``."""
    return Mutant(
        name, f"{what}: {line(site.op)}", site.op.span, replaced(program, site.path, *ops)
    )


def line(op: Op) -> str:
    """The op on one line, its blocks left out."""
    return op_line(op)


def declared(program: Op) -> dict[str, Op]:
    """Tensors, buffers, flags and counters by symbol, in program order."""
    kinds = ("tensor", "buffer", "flag", "counter")
    return {op.symbol: op for op in program.body if op.name in kinds}


def dims(op: Op) -> tuple[Expr, ...]:
    """The extents of a declaration, as expressions."""
    return tuple(Expr.of(size) for size in op["dims"])


def with_index(ref: Ref, axis: int, element: Index) -> Ref:
    """``ref`` with element ``axis`` of its index replaced."""
    return replace(ref, index=(*ref.index[:axis], element, *ref.index[axis + 1 :]))


def with_attr(op: Op, key: str, value: Any) -> Op:
    """``op`` with the attribute ``key`` set; None removes it."""
    attrs = {**dict(op.attrs), key: normalise(value)}
    return replace(op, attrs=tuple(sorted((k, v) for k, v in attrs.items() if v is not None)))


def modulo(value: Expr, by: int, size: Expr) -> Expr:
    """``(value + by) % size`` for a value in 0..size, written so that no operand is negative."""
    step = Expr.of(by) if by >= 0 else size + by
    return (value + step) % size


def number(value: Any, default: int) -> Expr:
    """An attribute that is a number or an expression, as an expression; ``default`` where absent."""
    return Expr.of(default) if value is None else Expr.of(value)


def negated(condition: Expr) -> Expr:
    """The expression that holds where ``condition`` does not."""
    return binary("==", condition, 0)
