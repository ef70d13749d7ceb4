"""A program or kernel at other values of its dynamic extents."""

from __future__ import annotations

from collections.abc import Mapping

from tilelink.ir.expr import Expr
from tilelink.ir.node import Op


def at_extents(program: Op, values: Mapping[str, int], *, fixed: bool = False) -> Op:
    """``extent @M {dynamic = true, value = 512}`` -> ``extent @M {dynamic = true, value = 96}``.

    The text of a program with a dynamic extent is the same for every value: memory, segments and channels are
    those of the capacity, and what depends on the value names the extent. ``fixed`` takes the mark away: a kernel
    for this value alone.
    """
    ops = tuple(
        op.with_attrs(
            value=values[op.symbol], **({"dynamic": None, "least": None} if fixed else {})
        )
        if op.name == "extent" and op.symbol in values
        else op
        for op in program.body
    )
    return program.with_ops(ops)


def endless_inputs(program: Op) -> frozenset[str]:
    """The inputs with as many rows as there are in a call: behind them, kernels may read what lies in memory.

    No row of a result depends on another one, so nobody looks at it.
    """
    dynamic = {op.symbol for op in program.find("extent") if op.get("dynamic")}

    def varies(dim: Expr | int | str) -> bool:
        return bool(Expr.of(dim).names & dynamic)

    return frozenset(
        op.symbol
        for op in program.find("tensor")
        if op["role"] == "in" and [varies(dim) for dim in op["dims"]] == [True, False]
    )
