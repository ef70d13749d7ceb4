"""Loads, stores and copies of tiles: TMA where it fits, else masked pointers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tilelink.backend.emit.scope import (
    LANES,
    TL_DTYPE,
    Dim,
    Scope,
    item_bytes,
    refuse,
    refuse_roles,
)
from tilelink.backend.emit.text import condition
from tilelink.ir import All, At, Broadcast, Expr, Index, Op, Range, Ref, Type, Value

_TMA_BLOCK = 256  # elements of a TMA box along one axis, at most


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an access: where it starts, and the tile dimension that runs along it, if any."""

    start: str
    dim: Dim | None = None
    name: str = ""  # the dimension's name in types
    vector: str = ""  # index vector, where the tile is not a range
    own_start: bool = True  # starts where the loop tile does
    stride: int | Expr = 1
    to_end: bool = False  # starts elsewhere, but the last tile of the loop ends with the axis
    unit: int = 1  # divides every start
    held: bool = False  # memory has room for all of the tile, past its end too


def strides(scope: Scope, symbol: str) -> list[int | Expr]:
    """Element strides of a contiguous symbol."""
    found: list[int | Expr] = []
    step: int | Expr = 1
    for dim in reversed(scope.program.shape(symbol)):
        found.append(step)
        value = scope.program.constant(dim)
        factor: int | Expr = dim if value is None else value
        step = product(step, factor)
    return found[::-1]


def product(left: int | Expr, right: int | Expr) -> int | Expr:
    """``left * right``, a number where both are."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    return Expr.of(left) * right


def axes(scope: Scope, op: Op, ref: Ref) -> list[Axis | None]:
    """The axes of ``ref`` in order; None stands for a new axis of length one."""
    shape = scope.program.shape(ref.symbol)
    steps = strides(scope, ref.symbol)
    index: tuple[Index, ...] = ref.index or tuple(All() for _ in shape)
    found: list[Axis | None] = []
    axis = 0
    for item in index:
        if isinstance(item, Broadcast):
            found.append(None)
            continue
        step, whole = steps[axis], shape[axis]
        axis += 1
        place = _axis(scope, op, item, whole, step)
        found.append(replace(place, held=_held(scope, ref.symbol, place, whole)))
    return found


def _held(scope: Scope, symbol: str, axis: Axis, whole: Expr | int) -> bool:
    """Whether a tile that is short for want of rows lies in a buffer that has them: nobody reads those."""
    decl = scope.program.symbols[symbol]
    fixed = decl.name == "buffer" and not decl.get("words")
    fixed = fixed and scope.program.constant(whole) is not None
    return fixed and axis.dim is not None and axis.dim.held and not axis.vector


def _axis(scope: Scope, op: Op, item: Index, whole: Expr | int, step: int | Expr) -> Axis:
    if isinstance(item, At) and not item.value.type.is_tile:
        return Axis(scope.expr(item.start), stride=step)
    if isinstance(item, At):
        name = item.value.name
        dim, length = scope.dims[name], scope.program.constant(whole)
        shift = scope.program.length(Expr.name(f"{name}.start"), item.start)
        to_end = bool(dim.bound) and shift is not None and int(dim.bound) + shift == length
        if dim.live is not None and dim.fits and dim.live == Expr.of(whole):
            # Its segment begins where the axis does, which is as long as there are rows.
            to_end = item.start.op == "%" and item.start.args[0] == Expr.name(f"{name}.start")
        unit = item.start.substitute(scope.program.env).divisor(scope.unit)
        return Axis(scope.expr(item.start), dim, name, "", False, step, to_end, unit)
    if isinstance(item, Value) and item.type.is_tile:
        dim = scope.dims[item.name]
        return Axis(dim.start, dim, item.name, "", True, step, unit=dim.unit)
    if isinstance(item, Value):
        text = scope.names[item.name]
        if not item.type.shape:
            return Axis(text, stride=step)
        if len(item.type.shape) != 1:
            raise refuse(op, "an index of more than one axis")
        name = item.type.shape[0]
        return Axis("0", scope.dim(name), name, text, False, step)
    if isinstance(item, Expr):
        return Axis(scope.expr(item), stride=step)
    if isinstance(item, Range):
        length = scope.program.length(item.lo, item.hi)
        if length is None:
            raise refuse(op, f"a range `{item}` of a length known only at run time")
        return Axis(scope.expr(item.lo), scope.dim(str(length)), str(length), "", False, step)
    name = str(whole)
    return Axis("0", scope.dim(name), name, "", True, step)


def times(start: str, stride: str) -> str:
    """``start * stride`` as text."""
    if start == "0" or stride == "0":
        return "0"
    if stride == "1":
        return start
    if start == "1":
        return stride
    simple = start.replace("_", "").replace(".", "").isalnum() or start.endswith("]")
    simple = simple or (start.startswith("tl.cast(") and start.endswith(", tl.int64)"))
    return f"{start if simple else f'({start})'} * {stride}"


def plus(*terms: str) -> str:
    return " + ".join(t for t in terms if t not in ("", "0")) or "0"


@dataclass(frozen=True, slots=True)
class Place:
    """A tile in memory: text of its pointers and of its mask (empty: none)."""

    pointers: str
    mask: str


def place(
    scope: Scope,
    op: Op,
    label: str,
    base: str,
    ref: Ref,
    token: str = "",
    choice: Choice | None = None,
) -> Place:
    """Index vectors and mask of a tile at ``base``, written out under names that begin with ``label``.

    Scalar axes move the base pointer. ``choice`` gives starts of its own.
    """
    found = axes(scope, op, ref)
    if choice is not None:
        found = [
            replace(a, start=choice.starts[n], own_start=False)
            if a is not None and n in choice.starts
            else a
            for n, a in enumerate(found)
        ]
    rank = sum(1 for a in found if a is None or a.dim is not None)
    big = bool(op.get("wide"))
    names = ("rows", "cols") if rank == 2 else tuple(f"x{i}" for i in range(rank))
    vectors: list[str] = []
    masks: list[str] = []
    scalars: list[str] = []
    position = 0
    for axis in found:
        if axis is None:
            position += 1
            continue
        stride = scope.expr(axis.stride, 5)
        if axis.dim is None:
            wide = f"tl.cast({axis.start}, tl.int64)" if big and axis.start != "0" else axis.start
            scalars.append(times(wide, stride))
            continue
        name = f"{label}_{names[position]}"
        scope.used.add(name)
        first = axis.start
        if axis.stride == 1 and "%" in first and axis.unit % LANES == 0:
            # Of a remainder Triton does not know what divides it.
            first = scope.fresh(f"{name}_start")
            scope.writer.let(first, f"tl.multiple_of({axis.start}, {LANES})")
        start = plus(first, token)
        token = ""
        text = axis.vector or scope.lanes(axis.name, axis.dim.block, position, rank)
        if start != "0":
            text = f"{start} + {text}"
        if big and not scope.writer.fits(f"{name} = tl.cast({text}, tl.int64)"):
            text = scope.writer.let(name, text)
        if big:
            text = f"tl.cast({text}, tl.int64)"
        scope.writer.let(name, text)
        lift = lifted(position, rank)
        vectors.append(f"{name}{lift}" if stride == "1" else f"{name}{lift} * {stride}")
        if not axis.dim.exact:
            if axis.vector:
                lanes = scope.lanes(axis.name, axis.dim.block, position, rank)
                mask = f"{lanes} < {axis.dim.length}"
            elif axis.own_start and axis.dim.bound:
                # One number for all tiles: neighbours are in or out together, as far as it can be divided.
                mask = f"{name} < {axis.dim.bound}"
            elif axis.own_start and axis.dim.stop:
                mask = f"{name} < {axis.dim.stop}"
            else:
                limit = plus(first, axis.dim.length)
                if not scope.writer.fits(f"{label}_mask0 = ({name} < {limit}){lift}"):
                    limit = scope.writer.let(scope.fresh(f"{name}_end"), limit)
                mask = f"{name} < {limit}"
            masks.append(f"({mask}){lift}" if lift else mask)
        position += 1
    pointer = base
    if token:
        scalars.append(token)
    shift = plus(*scalars)
    if shift != "0":
        pointer = scope.writer.let(f"{label}_base", f"{base} + {shift}")
        scope.used.add(pointer)
    pointers = f"{pointer} + ({' + '.join(vectors)})" if vectors else pointer
    if len(vectors) == 1 and "*" not in vectors[0]:
        pointers = f"{pointer} + {vectors[0]}"
    if len(pointers) > 48 and " + (" in pointers:
        offsets = scope.writer.let(f"{label}_offsets", " + ".join(vectors))
        scope.used.add(offsets)
        pointers = f"{pointer} + {offsets}"
    return Place(pointers, mask_of(scope, label, masks))


def mask_of(scope: Scope, label: str, masks: list[str]) -> str:
    """The text of the conjunction of ``masks``, named where it is long; empty where there is none."""
    if len(masks) > 1:
        for number, text in enumerate(masks):
            masks[number] = scope.writer.let(f"{label}_mask{number}", text)
            scope.used.add(masks[number])
    mask = " & ".join(masks)
    if len(mask) > 30:
        mask = scope.writer.let(f"{label}_mask", mask)
        scope.used.add(mask)
    return mask


def lifted(position: int, rank: int) -> str:
    if rank <= 1:
        return ""
    return f"[{', '.join(':' if i == position else 'None' for i in range(rank))}]"


def base(scope: Scope, symbol: str, peer: str | None = None) -> str:
    """The text of a pointer to the start of a tensor or of a buffer, on this rank or on ``peer``."""
    decl = scope.program.symbols[symbol]
    if decl.name == "tensor" or (decl.get("space") == "local" and peer is None):
        return scope.pointers.setdefault(symbol, _parameter(scope, symbol, "_ptr"))
    if peer is not None:
        place = scope.program.offset(decl)
        return f"device.peer_pointer(peers, {peer}, {place}, {scope.program.cell(decl)})"
    return scope.buffers.setdefault(symbol, _parameter(scope, symbol, ""))


def _parameter(scope: Scope, symbol: str, suffix: str) -> str:
    return scope.fresh(symbol + suffix)


def _tma(scope: Scope, op: Op, ref: Ref, block: tuple[int, ...]) -> list[Axis] | None:
    """The two axes of an access that may go through TMA and that has a box with ``block``, else None."""
    if op.get("via") != "tma":
        return None
    decl = scope.program.symbols[ref.symbol]
    size = item_bytes(decl["dtype"])
    found = axes(scope, op, ref)
    plain = [a for a in found if a is not None and a.dim is not None and not a.vector]
    if len(plain) != 2 or len(found) != 2 or decl["dtype"] not in ("bf16", "fp16", "fp32"):
        return None
    inner = scope.program.constant(scope.program.shape(ref.symbol)[1])
    if inner is None or inner * size % 16 or block[1] * size < 16 or max(block) > _TMA_BLOCK:
        return None
    return plain


def descriptor(scope: Scope, symbol: str, block: tuple[int, ...], peer: int | None = None) -> str:
    """The parameter that holds the TMA descriptor of a symbol with this block, here or on ``peer``."""
    key = (symbol, block, peer)
    if key not in scope.descriptors:
        name = f"{symbol}_{'x'.join(map(str, block))}"
        scope.descriptors[key] = scope.fresh(name if peer is None else f"{name}_at{peer}")
    return scope.descriptors[key]


def load(scope: Scope, op: Op) -> None:
    """``load``: a tile in registers, zero past its length where the index is masked."""
    value = op.results[0]
    name = scope.define(value)
    assert op.ref is not None
    if op.get("own") is not None and id(op) not in scope.chosen:
        choose(scope, op)
    _load(scope, op, name, value.type, scope.chosen.pop(id(op), None))


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a load that may read the local shard takes its tile from, settled before its loop."""

    source: str
    starts: dict[int, str]  # axis number to the text of its start


def choose(scope: Scope, op: Op, base_start: str = "") -> None:
    """Write the choice between the buffer and the local shard of a ``load {own, when}``.

    Both have the same strides, so a source and the starts that differ say all. With ``base_start``, the
    text of a start that goes on to change, it is the distance from it that is settled here.
    """
    ref, own = op.ref, op["own"]
    assert ref is not None
    label = scope.names.get(op.results[0].name) or scope.define(op.results[0])
    if strides(scope, ref.symbol) != strides(scope, own.symbol):
        raise refuse(op, "a local shard whose rows are not as long as the buffer's")
    token = token_of(scope, ref.symbol)
    block = scope.blocks(op.results[0].type)
    there, here = axes(scope, op, ref), axes(scope, op, own)
    source = f"{label}_from"
    starts: dict[int, tuple[str, str]] = {}
    for number, (far, near) in enumerate(zip(there, here, strict=True)):
        if far is None or near is None:
            continue
        moved = plus(far.start, token if number == 0 else "")
        if moved != near.start:
            starts[number] = (near.start, moved)
    names = {n: f"{label}_{'row' if n == 0 else f'at{n}'}" for n in starts}
    if base_start:
        names = {n: f"{label}_shift{'' if n == 0 else n}" for n in starts}
        starts = {
            n: tuple(_distance(text, base_start) for text in pair)  # type: ignore[misc]
            for n, pair in starts.items()
        }
    placed = {n: f"{base_start} + {name}" if base_start else name for n, name in names.items()}
    scope.used.update((source, *names.values()))
    # Both sides are read the same way.
    tma = all(_tma_load(scope, op, side, block, placed) is not None for side in (ref, own))
    sides = (own.symbol, ref.symbol)
    texts = [descriptor(scope, symbol, block) if tma else base(scope, symbol) for symbol in sides]
    test = condition(_fold(scope, op["when"]), scope.lookup)
    for number, head in enumerate((f"if {test}:", "else:")):
        with scope.writer.block(head):
            scope.writer.line(f"{source} = {texts[number]}")
            for axis, pair in sorted(starts.items()):
                scope.writer.line(f"{names[axis]} = {pair[number]}")
    scope.chosen[id(op)] = Choice(source, placed)


def _distance(start: str, base_start: str) -> str:
    """``start - base_start`` as text."""
    if start == base_start:
        return "0"
    rest = start.removeprefix(f"{base_start} + ")
    return rest if rest != start else f"{start} - {base_start}"


def token_of(scope: Scope, symbol: str) -> str:
    """The token of the waits so far, for what is read from a buffer."""
    return "token" if scope.tokens and scope.program.symbols[symbol].name == "buffer" else ""


def _fold(scope: Scope, expr: Expr | int) -> Expr | int:
    return expr if isinstance(expr, int) else expr.substitute(scope.program.env)


def _load(scope: Scope, op: Op, name: str, type_: Type, choice: Choice | None) -> None:
    ref = op.ref
    assert ref is not None
    decl = scope.program.symbols[ref.symbol]
    token = "" if choice is not None else token_of(scope, ref.symbol)
    block = scope.blocks(type_)
    convert = "" if decl["dtype"] == type_.dtype else f".to({TL_DTYPE[type_.dtype]})"
    placed = choice.starts if choice is not None else {}
    sides = (ref,) if choice is None else (ref, op["own"])
    pairs = [_tma_load(scope, op, side, block, placed) for side in sides]
    pair = pairs[0] if all(p is not None for p in pairs) else None
    if pair is not None:
        rows, cols = pair
        first, second = plus(rows.start, token), cols.start
        if choice is not None:
            first, second = choice.starts.get(0, first), choice.starts.get(1, second)
        source = choice.source if choice is not None else descriptor(scope, ref.symbol, block)
        scope.writer.line(f"{name} = {source}.load([{first}, {second}]){convert}")
    else:
        start = choice.source if choice is not None else base(scope, ref.symbol)
        at = place(scope, op, name, start, ref, token, choice=choice)
        args = [at.pointers]
        if at.mask:
            args += [f"mask={at.mask}", "other=0"]
        scope.writer.call(f"{name} = tl.load(", args, f"){convert}")
        scope.in_rows.add(op.results[0].name)
    dirt = _strays(pair, placed) if pair is not None else frozenset[str]()
    scope.dirty[op.results[0].name] = dirt


def _tma_load(
    scope: Scope, op: Op, ref: Ref, block: tuple[int, ...], placed: Mapping[int, str]
) -> list[Axis] | None:
    """The two axes of a load that TMA can make and that a pipelined product can use, else None."""
    pair = _tma(scope, op, ref, block)
    if pair is None or _strays(pair, placed) & scope.contracted:
        return None
    return pair


def _strays(pair: list[Axis], placed: Mapping[int, str]) -> frozenset[str]:
    """Dimensions along which a TMA load brings elements past the tile's end that are not zero.

    TMA fills with zeros past the end of the tensor, not past the end of a segment inside of it.
    ``placed``: axes on which the tile does not lie at its own start.
    """
    found = set()
    for number, axis in enumerate(pair):
        assert axis.dim is not None
        whole = axis.dim.ends and (axis.own_start or axis.to_end) and number not in placed
        if not axis.dim.exact and not whole:
            found.add(axis.name)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Box:
    """A TMA load of a main loop as text: a descriptor and where in it; the block and its element type.

    ``holder`` is a descriptor with the same block, whichever is read.
    """

    source: str
    row: str
    column: str
    block: tuple[int, ...]
    dtype: str
    holder: str


def box(scope: Scope, op: Op) -> Box:
    """The box that a load of a main loop reads; CannotEmit where TMA cannot read it."""
    ref, type_ = op.ref, op.results[0].type
    assert ref is not None
    choice: Choice | None = scope.chosen.pop(id(op), None)
    block = scope.blocks(type_)
    placed = choice.starts if choice is not None else {}
    sides = (ref,) if choice is None else (ref, op["own"])
    pairs = [_tma_load(scope, op, side, block, placed) for side in sides]
    if pairs[0] is None or None in pairs:
        if max(block) > _TMA_BLOCK:
            raise refuse_roles(
                op,
                f"a load of {' x '.join(map(str, block))} elements in a main loop, which TMA cannot make",
                f"tiles of at most {_TMA_BLOCK} along each axis",
            )
        raise refuse_roles(
            op,
            "a load of a main loop that TMA cannot make",
            "extents whose rows are a multiple of 16 bytes long and end with a tile",
        )
    if scope.program.symbols[ref.symbol]["dtype"] != type_.dtype:
        raise refuse(op, "a load of a main loop with roles that converts")
    rows, cols = pairs[0]
    holder = descriptor(scope, ref.symbol, block)
    token = "" if choice is not None else token_of(scope, ref.symbol)
    row, column, source = plus(rows.start, token), cols.start, holder
    if choice is not None:
        row, column = choice.starts.get(0, row), choice.starts.get(1, column)
        source = choice.source
    return Box(source, row, column, block, type_.dtype, holder)


def target(scope: Scope, op: Op) -> tuple[str, str] | None:
    """Row and column at which a tile is stored through TMA; None where it must go by addresses.

    Past the end of the tensor TMA writes nothing; past the end of a segment inside of it, it would. At a
    peer it is a place in this rank's slice of a buffer, and the tile is whole.
    """
    ref = op.ref
    assert ref is not None
    block = scope.blocks(op.operands[0].type)
    if op.get("peer") is not None:
        if not _boxed_at_peer(scope, op, ref, block):
            return None
        rows, cols = axes(scope, op, ref)[1:]
        assert rows is not None and cols is not None
        return rows.start, cols.start
    pair = _tma(scope, op, ref, block)
    if pair is None:
        return None
    for axis in pair:
        assert axis.dim is not None
        # A run-time extent may end before the memory does, but not before the user's.
        ends = axis.dim.ends and axis.own_start and (axis.dim.live is None or _given(scope, ref))
        ends |= axis.to_end and axis.dim.live is not None
        if not (axis.dim.exact or ends or axis.held):
            return None
    return pair[0].start, pair[1].start


def _given(scope: Scope, ref: Ref) -> bool:
    """Whether memory is the user's, with as many rows as there are."""
    return scope.program.symbols[ref.symbol].name == "tensor"


def corner(scope: Scope, op: Op, ref: Ref) -> tuple[str, str] | None:
    """Where a whole tile begins that a TMA descriptor can have, here or in this rank's slice at a peer.

    None of any other access.
    """
    found = axes(scope, op, ref)[-2:]
    shape = scope.program.shape(ref.symbol)
    inner = scope.program.constant(shape[-1])
    size = item_bytes(str(scope.program.symbols[ref.symbol]["dtype"]))
    if len(shape) == 3 and ref.index[0] != Expr.name("RANK"):
        return None
    whole = all(a is not None and a.dim is not None and a.dim.exact and not a.vector for a in found)
    if not whole or len(found) != 2 or inner is None or inner * size % 16:
        return None
    rows, cols = found
    assert rows is not None and cols is not None
    return plus(rows.start, token_of(scope, ref.symbol) if op.name == "load" else ""), cols.start


def scatter(scope: Scope, op: Op, text: str) -> None:
    """``store`` of the tile ``text`` by addresses, masked where the tile may be short."""
    ref = op.ref
    assert ref is not None
    label = f"{identifier_of(ref.symbol)}_to"
    at = place(scope, op, label, _there(scope, op) or base(scope, ref.symbol), ref)
    args = [at.pointers, text]
    if at.mask:
        args.append(f"mask={at.mask}")
    scope.writer.call("tl.store(", args)


def _there(scope: Scope, op: Op) -> str:
    """The name of a pointer to the peer's copy of what is stored to; empty for this rank's."""
    peer = op.get("peer")
    if peer is None:
        return ""
    assert op.ref is not None
    far = base(scope, op.symbol, scope.expr(peer))
    name = scope.writer.let(f"{identifier_of(op.symbol)}_peer", far)
    scope.used.add(name)
    return name


def contracted(ops: tuple[Op, ...]) -> frozenset[str]:
    """Dimensions that some product sums over: an element past the end would count."""
    dots = (op for top in ops for op in top.walk() if op.name == "dot")
    return frozenset(op.operands[0].type.shape[-1] for op in dots)


def store(scope: Scope, op: Op) -> None:
    """``store``: a tile to memory of this rank or of a peer, rounded to the tensor's dtype.

    A TMA store is used only where the program allows it and the tile is whole, and not where the tile
    lies in rows already. A wide tile leaves in two halves, which frees registers early.
    """
    value, ref = op.operands[0], op.ref
    assert ref is not None
    decl = scope.program.symbols[ref.symbol]
    text = scope.names[value.name]
    peer = op.get("peer")
    block = scope.blocks(value.type)
    if peer is not None and _boxed_at_peer(scope, op, ref, block):
        _store_to_peer(scope, op, ref, block)
        return
    where = _there(scope, op)
    if decl["dtype"] != value.type.dtype and value.name not in scope.literals:
        text = f"{text}.to({TL_DTYPE[decl['dtype']]})"
    if not value.type.shape:
        where = where or base(scope, ref.symbol)
        at = place(scope, op, f"{identifier_of(ref.symbol)}_at", where, ref)
        scope.writer.call("tl.store(", [at.pointers, text])
        return
    found = [a for a in axes(scope, op, ref) if a is not None and a.dim is not None]
    halves = _in_halves(block) and not found[1].vector and value.name not in scope.in_rows
    if not halves:
        _store(scope, op, ref, where, text, block, peer is None, 0, found)
        return
    low, high = _split(scope, scope.names[value.name], text, block)
    half = (block[0], block[1] // 2)
    _store(scope, op, ref, where, low, half, peer is None, 0, found)
    _store(scope, op, ref, where, high, half, peer is None, half[1], found)


def _split(scope: Scope, label: str, text: str, block: tuple[int, ...]) -> tuple[str, str]:
    """Write the left and the right half of a tile; their names."""
    shaped = f"tl.reshape({text}, ({block[0]}, 2, {block[1] // 2}))"
    low, high = f"{label}_low", f"{label}_high"
    scope.used.update((low, high))
    scope.writer.call(f"{low}, {high} = tl.split(", [f"tl.permute({shaped}, (0, 2, 1))"])
    return low, high


def _boxed_at_peer(scope: Scope, op: Op, ref: Ref, block: tuple[int, ...]) -> bool:
    """Whether a store to a peer goes through TMA: whole tiles of a buffer there, or of this rank's slice."""
    shape = scope.program.shape(ref.symbol)
    if op.get("via") != "tma" or len(shape) not in (2, 3) or len(block) != 2:
        return False
    if len(shape) == 3 and ref.index[0] != Expr.name("RANK"):
        return False
    decl = scope.program.symbols[ref.symbol]
    size = item_bytes(decl["dtype"])
    inner = scope.program.constant(shape[-1])
    found = axes(scope, op, ref)[-2:]
    whole = all(
        a is not None and a.dim is not None and (a.dim.exact or a.held) and not a.vector
        for a in found
    )
    columns = block[1] // 2 if _in_halves(block) else block[1]
    fits = inner is not None and inner * size % 16 == 0 and columns * size >= 16
    return whole and fits and max(block[0], columns) <= _TMA_BLOCK


def _in_halves(block: tuple[int, ...]) -> bool:
    return len(block) == 2 and block[1] >= 256 and block[0] >= 64


def _store_to_peer(scope: Scope, op: Op, ref: Ref, block: tuple[int, ...]) -> None:
    """A tile through TMA to the peer whose descriptor is chosen among those of all ranks."""
    value = op.operands[0]
    decl = scope.program.symbols[ref.symbol]
    text = scope.names[value.name]
    if decl["dtype"] != value.type.dtype:
        text = f"{text}.to({TL_DTYPE[decl['dtype']]})"
    rows, cols = axes(scope, op, ref)[-2:]
    assert rows is not None and cols is not None
    part = (block[0], block[1] // 2) if _in_halves(block) else block
    label = identifier_of(ref.symbol)
    number, target = f"{label}_peer", f"{label}_to"
    scope.used.update((number, target))
    scope.writer.line(f"{number} = {scope.expr(op['peer'])}")
    scope.writer.line(f"{target} = {descriptor(scope, ref.symbol, part, 0)}")
    for peer in range(1, scope.program.world):
        with scope.writer.block(f"if {number} == {peer}:"):
            scope.writer.line(f"{target} = {descriptor(scope, ref.symbol, part, peer)}")
    tiles = (text,) if part == block else _split(scope, scope.names[value.name], text, block)
    for place, tile in enumerate(tiles):
        at_column = plus(cols.start, str(place * part[1]))
        scope.writer.line(f"{target}.store([{rows.start}, {at_column}], {tile})")


def identifier_of(symbol: str) -> str:
    """The Python name that begins the names of a symbol's temporaries."""
    return symbol.replace(".", "_")


def _store(
    scope: Scope,
    op: Op,
    ref: Ref,
    where: str,
    text: str,
    block: tuple[int, ...],
    local: bool,
    shift: int,
    found: list[Axis],
) -> None:
    whole = all(a.dim is not None and (a.dim.exact or a.held) for a in found)
    short = not whole and _rows_end(scope, found)
    pair = _tma(scope, op, ref, block) if local and (whole or short) and not scope.folded else None
    if pair is not None:
        rows, cols = pair
        target = descriptor(scope, ref.symbol, block)
        at_column = plus(cols.start, str(shift))
        line = f"{target}.store([{rows.start}, {at_column}], {text})"
        if whole:
            scope.writer.line(line)
            return
        assert rows.dim is not None
        with scope.writer.block(f"if {rows.dim.length} == {rows.dim.block}:"):
            scope.writer.line(line)
        with scope.writer.block("else:"):
            _store(scope, op, ref, where, text, block, False, shift, found)
        return
    where = where or base(scope, ref.symbol)
    label = f"{identifier_of(ref.symbol)}_{'high' if shift else 'to'}"
    if len(found) == 2 and block[1] != (found[1].dim.block if found[1].dim else 0):
        at = _half(scope, op, label, where, ref, block, shift, found[1])
    else:
        at = place(scope, op, label, where, ref)
    args = [at.pointers, text]
    if at.mask:
        args.append(f"mask={at.mask}")
    scope.writer.call("tl.store(", args)


def _rows_end(scope: Scope, found: list[Axis]) -> bool:
    """Whether a tile is whole but where rows whose number is known at run time only come to an end."""
    if not scope.program.dynamic or len(found) != 2:
        return False
    rows, cols = (a.dim for a in found)
    return rows is not None and cols is not None and cols.exact and rows.fits and not rows.exact


def _half(
    scope: Scope,
    op: Op,
    label: str,
    where: str,
    ref: Ref,
    block: tuple[int, ...],
    shift: int,
    cols: Axis,
) -> Place:
    """The place of the left or right half of a tile: its columns stand in for a narrower dimension."""
    assert cols.dim is not None
    part = scope.fresh(f"{cols.name}_part")
    stop = cols.dim.stop if cols.own_start else plus(cols.start, cols.dim.length)
    scope.dims[part] = replace(
        cols.dim, block=block[1], start=plus(cols.start, str(shift)), stop=stop or cols.dim.length
    )
    tile = Value(part, Type("tile"))
    index = list(ref.index or tuple(All() for _ in scope.program.shape(ref.symbol)))
    index[-1] = tile
    return place(scope, op, label, where, Ref(ref.symbol, tuple(index)))
