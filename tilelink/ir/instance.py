"""A program or kernel at other values of its dynamic extents."""

from __future__ import annotations

from collections.abc import Mapping

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
