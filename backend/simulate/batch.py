"""Which inner loops may run with larger tiles, so that a simulated run has fewer steps."""

from __future__ import annotations

from tilelink.ir import At, Expr, Op, Range, Ref, Value

BATCH = 64  # an inner loop that adds up runs with tiles so many times larger
# What takes a reduction over the tiles of a loop along: the reduction of one larger tile is the same.
_TAKES = {"add": "sum", "maximum": "max", "minimum": "min"}


def _expressions(op: Op) -> list[Expr]:
    refs = [op.ref, *(v for _, v in op.attrs if isinstance(v, Ref))]
    found = [v for _, v in op.attrs if isinstance(v, Expr)]
    for ref in refs:
        for item in ref.index if ref is not None else ():
            if isinstance(item, Expr):
                found.append(item)
            elif isinstance(item, Range):
                found += [item.lo, item.hi]
            elif isinstance(item, At):
                found.append(item.start)
    return found


def may_batch(op: Op) -> bool:
    """Whether a loop gives the same with larger tiles, but for the order in which it adds.

    So it is where no op has an effect a tile or names the tile's fields, and where the loop adds up: see
    :func:`_adds_up`. A loop with a ``segment`` keeps its tiles inside of one owner's block whatever their
    size, so the start of a tile may be named there.
    """
    if any(o.name in ("wait", "notify", "transfer", "store") for o in op.walk()):
        return False
    mine = {a.name for a in op.args if a.type.is_tile}
    starts = {f"{name}.start" for name in mine} if op.get("segment") is not None else set()
    used = {
        name
        for inner in op.walk()
        if inner is not op
        for expr in _expressions(inner)
        for name in expr.names
        if name.rpartition(".")[0] in mine
    }
    return used <= starts and _adds_up(op)


def _adds_up(op: Op) -> bool:
    """Whether all that a loop over the tiles ``k`` carries are sums, largest or smallest elements over ``k``.

    Each is carried on by ``dot(a, b, carried)``, or by ``add``, ``maximum`` or ``minimum`` of it and a reduction
    along ``k``, once an iteration; neither it nor a reduction is used otherwise, and everything else works on each
    ``k`` by itself. An iteration that rescales what it carries, or keeps the last tile, is something else.
    """
    tiles = [a for a in op.args if a.type.is_tile]
    carried = op.args[len(tiles) :]
    if len(tiles) != 1 or not op.body or any(inner.blocks for inner in op.body):
        return False
    k = tiles[0].name
    # What stands for the tiles so far: a carried value, one carried on, or the reduction of this tile.
    before = {value.name for value in carried}
    after: dict[str, str] = {}
    reduced: dict[str, str] = {}
    for inner in op.body:
        if inner.name == "yield":
            continue
        names = [value.name for value in inner.operands]
        if inner.name == "bound" and k in names:
            return False
        whole = {n for n in names if n in before or n in after or n in reduced}
        along = _along(inner, k)
        if along and inner.name == "dot" and len(names) == 3:
            if whole != {names[2]} or names[2] not in before:
                return False
            before.discard(names[2])
            after[inner.results[0].name] = names[2]
        elif along:
            if whole:
                return False
            reduced[inner.results[0].name] = "sum" if inner.name == "dot" else inner.name
        elif whole:
            started = [n for n in names if n in before]
            taken = [n for n in names if n in reduced]
            if len(started) != 1 or len(taken) != 1:
                return False
            if _TAKES.get(inner.name) != reduced.pop(taken[0]):
                return False
            before.discard(started[0])
            after[inner.results[0].name] = started[0]
        elif inner.name == "reshape" and k in inner.operands[0].type.shape:
            return False
    ends = op.body[-1].operands if op.body[-1].name == "yield" else ()
    return all(
        end.name == start.name or after.get(end.name) == start.name
        for end, start in zip(ends, carried, strict=True)
    )


def _along(op: Op, k: str) -> bool:
    """Whether ``op`` reduces along ``k``: a product over it, or a reduction of that axis."""

    def length(value: Value, axis: int) -> str:
        return value.type.shape[axis]

    if op.name == "dot":
        return length(op.operands[0], -1) == k
    return op.name in ("sum", "max", "min") and length(op.operands[0], int(op["axis"])) == k
