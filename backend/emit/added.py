"""The end of a task that adds the parts which other tasks have of its depth, some columns after the other.

A tile's own part and one that is added to it do not fit the registers of a thread together. Left to itself, the
assembler asks for the next piece before it has added the last, and spills; so each piece is stored before the next
is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from tilelink.backend.emit import body
from tilelink.backend.emit.columns import by_addresses, divisible, halves, tells, to_owners
from tilelink.backend.emit.scope import Dim, Program, Scope
from tilelink.ir import Op

# Elements of a tile that a thread adds at a time, beside 128 of its own: with twice as many some kernels spill.
EACH = 32
# The least columns of a piece: 64 bytes of a row of parts are whole sectors in every layout.
COLUMNS = 16


def part_of_sum(program: Program, op: Op) -> bool:
    """Whether a load or store is of a part of a sum: a tile in fp32 of a buffer that no other rank sees."""
    if op.name not in ("load", "store") or op.ref is None:
        return False
    declared = program.symbols[op.symbol]
    value = op.operands[0] if op.name == "store" else op.results[0]
    local = declared.name == "buffer" and declared["space"] == "local"
    return local and declared["dtype"] == value.type.dtype == "fp32" and len(value.type.shape) == 2


def begins(scope: Scope, task: tuple[Op, ...]) -> int | None:
    """Where the sums of parts begin behind the main loop of ``task``; None where there are none."""
    loops = [n for n, op in enumerate(task) if op.name == "for_tiles"]
    behind = range(loops[-1] + 1, len(task)) if loops else range(0)
    if not loops and scope.grid[0]:
        behind = range(len(task))  # with roles the main loop is written apart
    return next(
        (n for n in behind if task[n].name == "load" and part_of_sum(scope.program, task[n])), None
    )


def width_of(rows: int, columns: int, warps: int) -> int:
    """Columns of a piece of a tile of ``rows`` x ``columns`` that ``warps`` hold."""
    width = columns
    while width > COLUMNS and rows * width > EACH * 32 * warps:
        width //= 2
    return width


def ops(scope: Scope, tail: tuple[Op, ...]) -> bool:
    """Write ``tail``, which begins with sums of parts; false where it is no matter of columns alone."""
    count = next(
        (
            n
            for n, op in enumerate(tail)
            if op.name not in ("load", "add")
            or (op.name == "load" and not part_of_sum(scope.program, op))
        ),
        len(tail),
    )
    sums, rest = tail[:count], tail[count:]
    made = {v.name for op in sums for v in op.results}
    owns = list(dict.fromkeys(v for op in sums for v in op.operands if v.name not in made))
    used = {v.name for top in rest for op in top.walk() for v in op.operands}
    totals = [v for op in sums for v in op.results if v.name in used]
    if not owns or not totals or not divisible(scope, rest, *totals):
        return False
    variable = owns[0].type.shape[1]
    whole, rows = scope.dims[variable], scope.blocks(owns[0].type)[0]
    width = width_of(rows * len(owns), whole.block, scope.warps)
    at = next((n for n, op in enumerate(rest) if tells(op)), len(rest))
    rest, told = rest[:at], rest[at:]
    if not whole.exact:
        rest = to_owners(scope, by_addresses(rest), variable)
    kept = {v.name: scope.names[v.name] for v in owns}
    pieces: dict[str, list[str]] = {}
    for own in owns:
        names, wide = [kept[own.name]], whole.block
        while wide > width:
            wide //= 2
            names = [half for name in names for half in halves(scope, name, rows, wide)]
        if scope.grid[0] and width < whole.block:
            for name in names:
                scope.writer.line(f"{name} = roles.piece({name}, {width})")
        pieces[own.name] = names
    places: list[Dim] = []
    for number in range(whole.block // width):
        start = whole.start
        if number:
            start = scope.fresh(f"{variable}_part")
            scope.writer.let(start, f"{whole.start} + {number * width}")
        length = str(width) if whole.exact else f"({whole.stop} - {start})"
        places.append(
            replace(whole, block=width, length=length, start=start, unit=gcd(whole.unit, width))
        )
    scope.folded = not scope.grid[0]
    for number, dim in enumerate(places):
        scope.dims[variable] = dim
        for own in owns:
            scope.names[own.name] = pieces[own.name][number]
        body.ops(scope, (*sums, *rest))
    scope.folded = False
    scope.dims[variable] = whole
    scope.names.update(kept)
    body.ops(scope, told)
    return True
