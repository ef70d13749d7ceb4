"""The end of a task behind a folded sum, some columns after the other.

A tile's own part, its sum in fp32 and the parts that are added would not fit the registers of a CTA
together. What follows the sum is arithmetic on each element, so it can be done for a part of the columns
at a time: the same ops are written again, with the tile's last variable standing for another part.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from tilelink.backend.emit import added, body, sums
from tilelink.backend.emit.columns import by_addresses, divisible, halves, tells, to_owners
from tilelink.backend.emit.scope import Dim, Scope, refuse_roles
from tilelink.ir import DTYPES, Op, Value
from tilelink.schedules.roles import GROUP_ROWS

# The least columns of a tile that are added up at a time: 64 bytes of a row.
COLUMNS = 32
# With roles a thread holds twice as much of a tile: of less of it, 32 bytes of a row are a sector still. It adds
# as much as makes 64 elements of arrived parts, 128 bytes that are under way.
LEAST_ROLE_EACH, ROLE_COLUMNS, _ROLE_ARRIVED = 16, 16, 64
# Bytes that a thread of a role holds of a sum and of arrived parts, those of several pieces of its tile: what its
# registers have room for beside its own part of 128 x 128 elements; and beside that of 64 x 256, or the masks of
# rows that are not all there.
_ROLE_HELD, _LESS_HELD = 384, 256


def role_each(world: int) -> int:
    """Elements of a tile that one thread of a role adds up at a time, over ``world`` ranks."""
    each = LEAST_ROLE_EACH
    while 2 * each * (world - 1) <= _ROLE_ARRIVED and each < _ROLE_ARRIVED:
        each *= 2
    return each


def ops(scope: Scope, task: tuple[Op, ...]) -> None:
    """The ops of a task; those from a sum on, over ranks or of parts, some columns after the other."""
    at = next((n for n, op in enumerate(task) if op.name == "load_sum" and op.operands), len(task))
    parts = added.begins(scope, task)
    if parts is not None and parts < at:
        body.ops(scope, task[:parts])
        if not added.ops(scope, task[parts:]):
            body.ops(scope, task[parts:])
        return
    body.ops(scope, task[:at])
    if at < len(task):
        scope.folded = True
        _tail(scope, task[at:])
        scope.folded = False


def _tail(scope: Scope, tail: tuple[Op, ...]) -> None:
    if not divisible(scope, tail, tail[0].operands[0]):
        if scope.landed:
            raise refuse_roles(
                tail[0], "parts that land in the ring behind what is no matter of columns"
            )
        body.ops(scope, tail)
        return
    own = tail[0].operands[0]
    variable = own.type.shape[1]
    whole = scope.dims[variable]
    name, rows = scope.names[own.name], scope.blocks(own.type)[0]
    # Signals come once, behind the stores of all parts.
    at = next((n for n, op in enumerate(tail) if tells(op)), len(tail))
    tail, signals = tail[:at], tail[at:]
    parts, width = [name], whole.block
    least, each = (ROLE_COLUMNS if scope.grid[0] else COLUMNS), scope.each
    if scope.grid[0] and _ragged(scope, own):
        each = max(LEAST_ROLE_EACH, each // 2)
    widest = scope.landed or max(least, each * 32 * scope.warps // rows)
    while width > widest:
        width //= 2
        parts = [half for part in parts for half in halves(scope, part, rows, width)]
    if not whole.exact:
        tail = to_owners(scope, by_addresses(tail), variable)
    places: list[tuple[str, Dim]] = []
    for number, part in enumerate(parts):
        start = whole.start
        if number:
            start = scope.fresh(f"{variable}_part")
            scope.writer.let(start, f"{whole.start} + {number * width}")
        length = str(width) if whole.exact else f"({whole.stop} - {start})"
        places.append(
            (
                part,
                replace(
                    whole, block=width, length=length, start=start, unit=gcd(whole.unit, width)
                ),
            )
        )
    if scope.landed:
        places = _landed(scope, tail, places)
        own, tail = tail[0].results[0], tail[1:]
        name = places[-1][0]
    several = len(parts) > 1 and whole.exact and not scope.landed
    ahead = _ahead(scope, own, rows, width) if several else 1
    for first in range(0, len(places), ahead):
        together = places[first : first + ahead]
        arrived = [""] * len(together)
        for number, (_, dim) in enumerate(together):
            if ahead > 1:
                scope.dims[variable] = dim
                arrived[number] = sums.read_parts(scope, tail[0])
        for (part, dim), scope.arrived in zip(together, arrived, strict=True):
            scope.dims[variable], scope.names[own.name] = dim, part
            body.ops(scope, tail)
    scope.arrived = ""
    scope.dims[variable], scope.names[own.name] = whole, name
    body.ops(scope, signals)


def _landed(
    scope: Scope, tail: tuple[Op, ...], places: list[tuple[str, Dim]]
) -> list[tuple[str, Dim]]:
    """Add up all pieces before the first is stored: so the ring is free, and the other group's turn comes."""
    own, total = tail[0].operands[0], tail[0].results[0]
    found: list[tuple[str, Dim]] = []
    for part, dim in places:
        scope.dims[own.type.shape[1]], scope.names[own.name] = dim, part
        scope.names.pop(total.name, None)
        body.ops(scope, tail[:1])
        found.append((scope.names[total.name], dim))
    return found


def _ragged(scope: Scope, own: Value) -> bool:
    """Whether some tiles have fewer rows than others, so that what is read and stored of each is masked."""
    return not scope.dims[own.type.shape[0]].exact


def _ahead(scope: Scope, own: Value, rows: int, width: int) -> int:
    """How many pieces of a tile a role asks for before it adds up the first; each has ``rows`` x ``width``."""
    if not scope.grid[0]:
        return 1
    each = -(-rows * width // (32 * scope.warps))
    part = each * (scope.program.world - 1) * DTYPES[own.type.dtype]
    held = _ROLE_HELD if rows > GROUP_ROWS and not _ragged(scope, own) else _LESS_HELD
    return max(1, (held - 4 * each) // part)
