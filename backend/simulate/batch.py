"""Which inner loops may run with larger tiles, so that a simulated run has fewer steps."""

from __future__ import annotations

from tilelink.ir import At, Expr, Op, Range, Ref

BATCH = 64  # an inner loop that nothing synchronises runs with tiles so many times larger


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
    """Meaning never depends on a tile size unless an op has an effect a tile, or names the tile's fields.

    A loop with a ``segment`` keeps its tiles inside of one owner's block whatever their size, so the
    start of a tile may be named there.
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
    return used <= starts
