"""Stages that copy: their tasks load tiles of a moved tensor, and store them where they are needed."""

from __future__ import annotations

from tilelink.ir import Op

_COPYING = frozenset({"wait", "load", "store", "notify", "for_range"})


def copies_of(stage: Op) -> dict[int, Op]:
    """The load behind each store, by the store's identity, of a stage that copies; empty of any other.

    A stage copies if nothing in it computes, and all that it stores are tiles of the same tensor that it has
    loaded, as they are, into memory of ranks by name: the shard into landing buffers, or the contributions of this
    rank into those of their owners. A task loads each tile once, from one place: no loop loads another one in
    turn, and no condition says from where.
    """
    ops = list(stage.walk())[1:]
    if any(op.name not in _COPYING or (op.results and op.name != "load") for op in ops):
        return {}
    loads = {op.results[0].name: op for op in stage.body if op.name == "load" and not op.get("own")}
    found: dict[int, Op] = {}
    for op in ops:
        if op.name != "store":
            continue
        load = loads.get(op.operands[0].name)
        if load is None or op.get("peer") is None or _tensor(load) != _tensor(op):
            return {}
        found[id(op)] = load
    return found


def _tensor(op: Op) -> str:
    """The tensor that what an op accesses is or serves."""
    return op.symbol.split(".")[0]
