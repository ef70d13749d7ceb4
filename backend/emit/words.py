"""Loads and stores of buffers whose words signal themselves: a load polls all that it reads.

The pointer's type says to the primitives how words say that they are there.

Waits and notifies of the flags that such words carry make no code. A load takes from the wait in front of it what
an error record says of it.
"""

from __future__ import annotations

from tilelink.backend.emit import access
from tilelink.backend.emit.scope import TL_DTYPE, Scope, item_bytes, refuse
from tilelink.backend.passes.common import stages_of
from tilelink.backend.passes.order_memory import divisor, starts_of
from tilelink.ir import At, Expr, Index, Op, Range, Ref, Value
from tilelink.ir.layout import ENCODINGS, PAYLOAD, POLLED

# Bytes of words that are read and written at once where rows begin and end at multiples of them.
VECTOR = 16


def holds(scope: Scope, op: Op) -> bool:
    """Whether an access is of a buffer of words."""
    decl = scope.program.symbols.get(op.symbol) if op.ref is not None else None
    return decl is not None and bool(decl.get("words"))


def wait(scope: Scope, op: Op) -> None:
    """Note the wait for the load of its words, which makes it."""
    if op.get("if") is not None or op.get("epoch", 0) != 0:
        raise refuse(op, "a wait for words of another call, or under a condition")
    scope.polled[scope.program.symbols[op.symbol]["carried"].symbol] = op


def store(scope: Scope, op: Op) -> None:
    """``store`` of a tile as words of this call."""
    value, ref = op.operands[0], op.ref
    assert ref is not None
    if len(value.type.shape) != 2 or op.get("via") is not None:
        raise refuse(op, "a store of words that is no tile of two axes, or goes through TMA")
    decl = scope.program.symbols[ref.symbol]
    peer = op.get("peer")
    where = access.base(
        scope, ref.symbol, scope.expr(peer if peer is not None else Expr.name("RANK"))
    )
    name = scope.writer.let(f"{access.identifier_of(ref.symbol)}_peer", where)
    scope.used.add(name)
    text = scope.names[value.name]
    if decl["dtype"] != value.type.dtype:
        text = f"{text}.to({TL_DTYPE[decl['dtype']]})"
    start, step, height, width, vector = _tile(scope, op, ref)
    epoch = "ctx.epoch" if decl["words"] == "epoch" else "None"
    args = [name, epoch, text, start, step, height, width, str(vector)]
    scope.writer.call("device.store_words(", args)


def load(scope: Scope, op: Op) -> None:
    """``load`` of a tile of words."""
    value, ref = op.results[0], op.ref
    assert ref is not None
    if op.get("own") is not None:
        raise refuse(op, "a load of words, or of a local shard")
    index, ident = _wait_of(scope, op)
    # Where words of several ranks are read, an error record names the first that it can be.
    producer = index[0].lo if isinstance(index[0], Range) else index[0]
    assert isinstance(producer, Expr)
    name = scope.define(value)
    where, dtype, shape = _common(scope, op, value)
    place = _place(scope, op, ref, shape, dtype)
    _note_empty(scope, op, [where, *place, "1", "0"])
    args = ["ctx", where, *place]
    args += [_flag(scope, op, index), scope.expr(producer), scope.tile, str(ident)]
    tail = "" if dtype == TL_DTYPE[value.type.dtype] else f".to({TL_DTYPE[value.type.dtype]})"
    scope.writer.call(f"{name} = device.load_words(", args, f"){tail}")


def load_sum(scope: Scope, op: Op) -> None:
    """``load_sum`` over tiles of words of all ranks."""
    value, ref = op.results[0], op.ref
    assert ref is not None
    if op.get("own") is not None or op.operands:
        raise refuse(op, "a sum of words and of a part that lies elsewhere")
    if scope.program.world > POLLED:
        raise refuse(op, f"a sum of words of more than {POLLED} ranks")
    index, ident = _wait_of(scope, op)
    name = scope.define(value)
    where, dtype, shape = _common(scope, op, value)
    apart = scope.expr(access.strides(scope, ref.symbol)[0])
    flag_step = scope.expr(access.strides(scope, scope.polled[ref.symbol].symbol)[0])
    first = Ref(ref.symbol, (Expr.const(0), *ref.index[1:]))
    place = [*_place(scope, op, first, shape, dtype), str(scope.program.world), apart]
    _note_empty(scope, op, [where, *place])
    args = ["ctx", where, *place, TL_DTYPE[value.type.dtype]]
    args += [_flag(scope, op, (Expr.const(0), *index[1:])), flag_step, scope.tile, str(ident)]
    scope.writer.call(f"{name} = device.sum_words(", args)


def _note_empty(scope: Scope, op: Op, args: list[str]) -> None:
    """Have the words that a load empties emptied at the end of its block, behind what others wait for."""
    if op.get("empty"):
        scope.emptied.append(args)


def empty(scope: Scope, first: int) -> None:
    """The words that loads of a block have read, from number ``first`` on."""
    for args in scope.emptied[first:]:
        scope.writer.call("device.empty_words(", args)
    del scope.emptied[first:]


def _wait_of(scope: Scope, op: Op) -> tuple[tuple[Index, ...], int]:
    """The index and the number of the wait in front of a load of words."""
    found = scope.polled.get(op.symbol)
    if found is None or found.ref is None:
        raise refuse(op, "a load of words with no wait for them before it")
    return found.ref.index, scope.program.wait_id(found)


def _flag(scope: Scope, op: Op, index: tuple[Index, ...]) -> str:
    """The word that stands for the tile in an error record: the first that its wait names."""
    from tilelink.backend.emit.body import element, word_of

    first = tuple(i.lo if isinstance(i, Range) else i for i in index)
    return scope.expr(word_of(scope, scope.polled[op.symbol].symbol, element(op, first)))


def _common(scope: Scope, op: Op, value: Value) -> tuple[str, str, tuple[int, ...]]:
    """The pointer to this rank's buffer, its element type, and the block of the tile."""
    if len(value.type.shape) != 2:
        raise refuse(op, "a load of words that is no tile of two axes")
    dtype = TL_DTYPE[scope.program.symbols[op.symbol]["dtype"]]
    return access.base(scope, op.symbol), dtype, scope.blocks(value.type)


def _place(scope: Scope, op: Op, ref: Ref, shape: tuple[int, ...], dtype: str) -> list[str]:
    start, step, height, width, vector = _tile(scope, op, ref)
    return [start, step, f"({shape[0]}, {shape[1]})", dtype, height, width, str(vector)]


def _tile(scope: Scope, op: Op, ref: Ref) -> tuple[str, str, str, str, bool]:
    """First element, elements from row to row, rows and columns that are there, and whether in whole
    vectors of words."""
    found = [a for a in access.axes(scope, op, ref) if a is not None]
    live = [a for a in found if a.dim is not None]
    inner = found[-1]
    if len(live) != 2 or live[1] is not inner or any(a.vector for a in live):
        raise refuse(op, "words of a region that is no box of rows")
    terms = [access.times(a.start, scope.expr(a.stride, 5)) for a in found]
    start = " + ".join(t for t in terms if t != "0") or "0"
    limits = ["None" if a.dim is None or a.dim.exact else a.dim.length for a in live]
    decl = scope.program.symbols[ref.symbol]
    payload = VECTOR // ENCODINGS[decl["words"]].bytes * PAYLOAD
    unit = payload // item_bytes(str(decl["dtype"]))
    return start, scope.expr(live[0].stride), limits[0], limits[1], _even(scope, ref, inner, unit)


def _even(scope: Scope, ref: Ref, inner: access.Axis, unit: int) -> bool:
    """Whether every row of a tile begins and ends at a multiple of ``unit`` elements.

    Tiles end with their segment or with the axis, where they do not end with a block.
    """
    assert inner.dim is not None
    whole = scope.program.constant(scope.program.shape(ref.symbol)[-1])
    item = ref.index[-1]
    variable = item.value if isinstance(item, At) else item
    if whole is None or whole % unit or inner.dim.block % unit:
        return False
    if not isinstance(variable, Value):
        return inner.start.isdigit() and int(inner.start) % unit == 0
    starts = {
        k: v for s in stages_of(scope.program.op) for k, v in starts_of(scope.program.op, s).items()
    }
    begin = item.start if isinstance(item, At) else Expr.name(f"{variable.name}.start")
    return divisor(begin.substitute(scope.program.env), starts) % unit == 0
