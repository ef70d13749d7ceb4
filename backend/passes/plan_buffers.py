"""``plan-buffers``: where tiles land and wait, and every access turned to it."""

from __future__ import annotations

from dataclasses import replace

from tilelink.backend.passes.common import (
    RANK,
    Moved,
    UnsupportedProgram,
    accesses,
    add_declarations,
    at_capacity,
    dynamic_extent,
    moved,
    stages_of,
    start_of,
    tensors_of,
)
from tilelink.ir import All, At, Expr, Op, Ref, Value, binary, make


def plan_buffers(program: Op) -> Op:
    """Declare landing and staging buffers and rewrite loads and stores of moved tensors.

    Before::

        %a = load @A[%m, %k]
        store @C[%m, %n] (%c)
        %s = load @C[%m, %n]

    After::

        %a = load @A.all[%m, %k] {own = @A[%m at m.start % 1024, %k], when = m.start / 1024 == RANK}
        store @C.partial[%m, %n] (%c)
        %s = load_sum @C.parts[:, %m at m.start % 1024, %n] {own = @C.partial[%m, %n]}

    Contributions that are pulled stay in a symmetric ``C.partial``, and the sum reads it on every rank::

        %s = load_sum @C.partial[%m, %n] {remote = true}

    Shards lie one behind the other in rank order in a landing buffer. The sums of a reduce in two shots
    land in a buffer of their own, where every later read finds them. What peers write is a buffer of words where
    these signal themselves; what says so by a sentinel is emptied by the load that reads it. Where rows are
    dynamic, buffers have those of the capacity, except for what a collective of the library fills or empties and
    what tiles that span shards read, while the user's tensors hold live rows alone: a segment of theirs begins
    where the live rows of the one before end. Invariant: no access names a tensor at an index that this rank does
    not hold.
    """
    buffers: list[Op] = []
    for name, tensor in tensors_of(program).items():
        kind = tensor["move"]
        if kind in ("gather", "scatter", "reduce"):
            buffers += _buffers(program, tensor, moved(program, name))
        elif tensor["role"] == "temp":
            buffers.append(
                make(
                    "buffer",
                    ref=Ref(name),
                    dims=at_capacity(program, tensor["dims"]),
                    dtype=tensor["dtype"],
                    space="local",
                )
            )
            program = program.with_ops(tuple(op for op in program.body if op is not tensor))
    infos = {
        name: moved(program, name)
        for name, tensor in tensors_of(program).items()
        if tensor["move"] in ("gather", "scatter", "reduce", "shard")
    }
    cut = _cut_tiles(program)
    program = _closed_up(program)
    program = program.with_ops(tuple(_rewrite(op, infos, cut) for op in program.body))
    return add_declarations(program, *buffers)


def _buffers(program: Op, tensor: Op, info: Moved) -> list[Op]:
    def buffer(suffix: str, dims: tuple[object, ...], space: str, alias: str = "") -> Op:
        return make(
            "buffer",
            words=(space == "symmetric" and info.words) or None,
            ref=Ref(f"{info.name}.{suffix}"),
            dims=dims,
            dtype=tensor["dtype"],
            space=space,
            alias=Ref(alias) if alias else None,
        )

    # What the library's collectives touch is as long as there are rows: they take it whole.
    apart = info.resource == "none"
    dims = tuple(tensor["dims"]) if apart else at_capacity(program, tensor["dims"])
    if info.kind == "gather":
        landing = tuple(tensor["dims"]) if info.closed else dims
        return [buffer("all", landing, "local" if apart else "symmetric")]
    length = info.live if apart else info.shard
    held = tuple(length if axis == info.axis else d for axis, d in enumerate(dims))
    if info.resource == "none":
        read = any(
            not _final_pair(stage, info.name)
            for stage in stages_of(program)
            if _reads(stage, info.name)
        )
        # The library sums over all ranks in place.
        inside = info.kind == "reduce" and tensor["role"] != "inout"
        return [
            buffer("partial", dims, "local", info.name if inside and not read else ""),
            *([buffer("total", held, "local", f"{info.name}.partial" if inside else "")] * read),
        ]
    if info.pulled:
        landing = tuple(tensor["dims"]) if info.closed else dims
        planned = [buffer("partial", landing, "symmetric")]
        return [*planned, buffer("all", dims, "symmetric")] if info.shots == 2 else planned
    planned = [] if info.resource == "epilogue" else [buffer("partial", dims, "local")]
    planned.append(buffer("parts", (Expr.name("WORLD"), *held), "symmetric"))
    return [*planned, buffer("all", dims, "symmetric")] if info.shots == 2 else planned


def _reads(stage: Op, name: str) -> bool:
    return any(True for _ in accesses(stage, name, "load"))


def _final_pair(stage: Op, name: str) -> bool:
    """Whether ``stage`` does nothing but bring the sum of ``name`` into the user's tensor."""
    return any(op.get("final") for op in accesses(stage, name, "store"))


def _closed_up(program: Op) -> Op:
    """Whole tensors of the user read and written where their live rows lie, segment behind segment."""
    name = dynamic_extent(program)
    if name is None:
        return program
    tall = {
        symbol: tensor["move"]
        for symbol, tensor in tensors_of(program).items()
        if tensor["move"] in ("local", "reduce") and name in Expr.of(tensor["dims"][0]).names
    }

    def whole(op: Op) -> bool:
        # Of a sum, the user's tensor is what its last stage stores to.
        assert op.ref is not None
        return tall.get(op.ref.symbol) == "local" or (
            op.ref.symbol in tall and bool(op.get("final"))
        )

    def place(op: Op, row: Value, start: Expr) -> Op:
        blocks = tuple(
            replace(b, ops=tuple(place(o, row, start) for o in b.ops)) for b in op.blocks
        )
        op = replace(op, blocks=blocks)
        if op.name in ("load", "store") and op.ref is not None and whole(op):
            index = op.ref.index
            if index and index[0] == row:
                return replace(op, ref=Ref(op.ref.symbol, (At(row, start), *index[1:])))
        return op

    ops: list[Op] = []
    for op in program.body:
        if op.name == "launch":
            stages: list[Op] = []
            for stage in op.body:
                if stage.get("live") is not None:
                    row = stage.args[int(stage.get("axis", 0))]
                    gap = stage["segment"] - Expr.of(stage["live"])
                    start = start_of(row) - start_of(row) // stage["segment"] * gap
                    stage = place(stage, row, start)
                stages.append(stage)
            op = op.with_ops(tuple(stages))
        ops.append(op)
    return program.with_ops(tuple(ops))


def _cut_tiles(program: Op) -> frozenset[Value]:
    """The tiles that lie inside one owner's block each, since their loop is walked in segments."""
    return frozenset(
        op.args[int(op.get("axis", 0))]
        for stage in stages_of(program)
        for op in stage.walk()
        if op.get("segment") is not None
    )


def _rewrite(op: Op, infos: dict[str, Moved], cut: frozenset[Value]) -> Op:
    blocks = tuple(replace(b, ops=tuple(_rewrite(o, infos, cut) for o in b.ops)) for b in op.blocks)
    op = replace(op, blocks=blocks)
    if op.ref is None or op.ref.symbol not in infos:
        return op
    info = infos[op.ref.symbol]
    if op.name == "load_sum" and info.pulled:
        return _pulled(op, info)
    if op.name == "load_sum":
        local = _at(info, op.ref.index, "local")
        return replace(op, ref=Ref(f"{info.name}.parts", (All(), *local)))  # type: ignore[arg-type]
    if op.name not in ("load", "store"):
        return op
    if op.name == "load" and info.kind == "gather":
        return _gathered(op, info, cut)
    if op.name == "load":
        return _held(op, info) if info.kind == "shard" else _sum(op, info)
    if op.get("final") and info.kind == "reduce":
        return op.with_attrs(final=None)
    if info.kind == "shard" or op.get("final"):
        return _held(op, info).with_attrs(final=None)
    if op.get("relay"):
        return replace(op, ref=Ref(f"{info.name}.all", op.ref.index)).with_attrs(relay=None)
    return _contribution(op, info)


def _at(info: Moved, index: tuple[object, ...], place: str) -> tuple[object, ...]:
    """``index`` with the moved axis placed by ``local_of`` or ``landing_of``."""
    element = index[info.axis]
    if isinstance(element, Value):
        start = start_of(element)
        moved_to = info.local_of(start) if place == "local" else info.landing_of(start)
        element = element if moved_to == start else At(element, moved_to)
    elif isinstance(element, Expr):
        element = info.local_of(element) if place == "local" else info.landing_of(element)
    return tuple(element if axis == info.axis else i for axis, i in enumerate(index))


def _gathered(op: Op, info: Moved, cut: frozenset[Value]) -> Op:
    assert op.ref is not None
    index = op.ref.index
    placed = index[info.axis] if index else All()
    if isinstance(placed, Value) and placed not in cut and info.block != info.shard:
        raise UnsupportedProgram(
            op.span,
            detail=f"`{info.name}` is read by a tile that may cross the blocks of its owner map",
            help="read it by a tile of its whole extent, or let each rank own one block",
        )
    whole = Ref(f"{info.name}.all", _at(info, index, "landing"))  # type: ignore[arg-type]
    element = index[info.axis] if index else All()
    if not info.in_place or not isinstance(element, Value):
        return replace(op, ref=whole)
    own = Ref(info.name, _at(info, index, "local"))  # type: ignore[arg-type]
    here = binary("==", info.owner_of(start_of(element)), RANK)
    return replace(op, ref=whole).with_attrs(own=own, when=here)


def _sum(op: Op, info: Moved) -> Op:
    assert op.ref is not None
    index = op.ref.index
    if info.words == "sentinel":
        op = op.with_attrs(empty=True)
    if info.shots == 2 and not op.get("relay"):
        return replace(op, ref=Ref(f"{info.name}.all", index))
    op = op.with_attrs(relay=None)
    local = _at(info, index, "local")
    if info.resource == "none":
        return replace(op, ref=Ref(f"{info.name}.total", local))  # type: ignore[arg-type]
    if info.pulled:
        return _pulled(op, info)
    own = None
    if info.resource != "epilogue":
        own = Ref(f"{info.name}.partial", _at(info, index, "landing"))  # type: ignore[arg-type]
    parts = Ref(f"{info.name}.parts", (All(), *local))  # type: ignore[arg-type]
    return replace(op, name="load_sum", ref=parts).with_attrs(own=own)


def _pulled(op: Op, info: Moved) -> Op:
    """The sum of what all ranks have put at the same place of their own memory."""
    assert op.ref is not None
    index = _at(info, op.ref.index, "landing")
    row = index[info.axis]
    if info.closed and isinstance(row, Value):
        # A slice is walked where it would lie at the capacity, and lies behind as many rows as there are.
        closer = start_of(row) - start_of(row) // info.shard * (info.shard - Expr.of(info.live))
        index = tuple(At(row, closer) if n == info.axis else item for n, item in enumerate(index))
    place = Ref(f"{info.name}.partial", index)  # type: ignore[arg-type]
    return replace(op, name="load_sum", ref=place).with_attrs(remote=True)


def _held(op: Op, info: Moved) -> Op:
    assert op.ref is not None
    return replace(op, ref=Ref(info.name, _at(info, op.ref.index, "local")))  # type: ignore[arg-type]


def _contribution(op: Op, info: Moved) -> Op:
    assert op.ref is not None
    if info.resource == "epilogue" and not info.pulled:
        local = _at(info, op.ref.index, "local")
        return replace(op, ref=Ref(f"{info.name}.parts", (RANK, *local)))  # type: ignore[arg-type]
    return replace(op, ref=Ref(f"{info.name}.partial", _at(info, op.ref.index, "landing")))  # type: ignore[arg-type]
