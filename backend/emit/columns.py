"""What is the same for each part of the columns of a tile, and the parts themselves."""

from __future__ import annotations

from tilelink.backend.emit.scope import Scope
from tilelink.ir import Expr, Op, Value

_WHOLE = frozenset({"bound", "dot", "transpose", "reshape", "sum", "max", "min"})


def tells(op: Op) -> bool:
    """Whether an op is a notify, or a loop of notifies."""
    return op.name == "notify" or (bool(op.blocks) and all(map(tells, op.body)))


def _sent(op: Op) -> bool:
    """Whether an op is a loop over peers that stores the same into each."""
    plain = op.name == "for_range" and not op.results
    return plain and all(inner.name == "store" for inner in op.body)


def by_addresses(tail: tuple[Op, ...]) -> tuple[Op, ...]:
    """The ops without TMA, whose blocks must begin inside: a part of a short tile may have no column."""

    def plain(op: Op) -> Op:
        op = op.with_ops(tuple(map(plain, op.body))) if op.blocks else op
        return op.with_attrs(via=None) if op.get("via") else op

    return tuple(map(plain, tail))


def to_owners(scope: Scope, tail: tuple[Op, ...], variable: str) -> tuple[Op, ...]:
    """The ops with the peer of the whole tile: a part of a short tile may begin where no rank owns anything."""
    whole = scope.dims[variable]
    names = {f"{variable}.{side}": f"{variable}.whole.{side}" for side in ("start", "stop")}
    scope.names |= {f"{variable}.whole.start": whole.start, f"{variable}.whole.stop": whole.stop}

    def owned(op: Op) -> Op:
        op = op.with_ops(tuple(map(owned, op.body))) if op.blocks else op
        peer = op.get("peer")
        if peer is None:
            return op
        kept = {old: Expr.name(new) for old, new in names.items()}
        return op.with_attrs(peer=Expr.of(peer).substitute(kept))

    return tuple(map(owned, tail))


def halves(scope: Scope, name: str, rows: int, width: int) -> tuple[str, str]:
    """Write the left and the right half of the columns of a tile, ``width`` each; their names."""
    low, high = scope.fresh(f"{name}_low"), scope.fresh(f"{name}_high")
    shaped = f"tl.reshape({name}, ({rows}, 2, {width}))"
    scope.writer.call(f"{low}, {high} = tl.split(", [f"tl.permute({shaped}, (0, 2, 1))"])
    return low, high


def divisible(scope: Scope, tail: tuple[Op, ...], own: Value, *more: Value) -> bool:
    """Whether ``tail`` does the same to each part of the columns of ``own``, and of tiles beside it."""
    if len(own.type.shape) != 2:
        return False
    signals = False
    for op in tail:
        if signals and not tells(op):
            return False
        signals |= tells(op)
        if op.name in _WHOLE or (op.blocks and not (_sent(op) or tells(op))):
            return False
    variable = own.type.shape[1]
    dim = scope.dims.get(variable)
    if dim is None or not (dim.exact or dim.stop):
        return False
    made = {value.name for op in tail for value in op.results}
    inside = (o for op in tail for o in op.walk())
    given: set[Value] = {v for op in inside for v in op.operands if v.name not in made}
    return all(v in (own, *more) or variable not in v.type.shape for v in given)
