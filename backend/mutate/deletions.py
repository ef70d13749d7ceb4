"""Programs with one synchronisation removed: positive controls of the proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tilelink.ir import Op, op_line

SYNCHRONISATION = ("wait", "notify")


def deletions(program: Op) -> Iterator[tuple[str, Op]]:
    """Each single deletion of a `wait` or `notify` line of ``program``: (what was deleted, the rest)."""
    count = sum(op.name in SYNCHRONISATION for op in program.walk())
    for number in range(count):
        _, line, mutant = _without(program, number, 0)
        yield line, mutant


def _without(op: Op, number: int, seen: int) -> tuple[int, str, Op]:
    """``op`` without its synchronisation op ``number``: (how many were passed, its line, the copy)."""
    line = ""
    blocks = []
    for block in op.blocks:
        kept = []
        for child in block.ops:
            if child.name in SYNCHRONISATION:
                seen += 1
                if seen - 1 == number:
                    where = f" ({child.span})" if child.span is not None else ""
                    line = op_line(child) + where
                    continue
            seen, inner, copy = _without(child, number, seen)
            line = line or inner
            kept.append(copy)
        blocks.append(replace(block, ops=tuple(kept)))
    return seen, line, replace(op, blocks=tuple(blocks)) if op.blocks else op
