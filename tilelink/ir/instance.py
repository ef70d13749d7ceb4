"""Dynamic extents: those of a program or kernel, and it at other values of them."""

from __future__ import annotations

from collections.abc import Mapping

from tilelink.ir.node import Op


def dynamic_extents(program: Op) -> tuple[Op, ...]:
    """The declarations of the extents whose values are known at run time only, up to their capacities."""
    return tuple(op for op in program.find("extent") if op.get("dynamic"))


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
