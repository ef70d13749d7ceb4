"""``order-tiles``: loop nests become stages of one persistent launch, in a chosen order of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tilelink.backend.expand import environment
from tilelink.backend.passes.choose_shots import last_store
from tilelink.backend.passes.common import (
    RANK,
    WORLD,
    Moved,
    UnsupportedProgram,
    accesses,
    dynamic_extent,
    global_dims,
    moved,
    replace_declaration,
    schedule_of,
    substitute,
    tensors_of,
)
from tilelink.frontend.owners import uniform_block
from tilelink.ir import DTYPES, TILE, All, Block, Expr, Op, Ref, Type, Value, make
from tilelink.schedules import Schedule, ScheduleError

# Elements of a tile that a stage without a matrix product keeps in registers.
ELEMENTWISE_TILE = 8192
# Bytes of data in words, over all ranks, that one thread polls for a tile of a sum.
POLLED = 256
# Elements of the smallest tile of a sum: 16 bytes of 16-bit elements for each of 128 threads.
LEAST_SUM = 1024
DECLARATIONS = ("extent", "tensor", "scalar")


def order_tiles(program: Op) -> Op:
    """Turn every top-level loop nest into a ``stage``; add the stage that sums a stored scatter or reduce.

    Before::

        for_tiles {extent = [M, N]} do (%m: tile, %n: tile) {
          %acc = for_tiles (%z) {extent = [K]} do (%k: tile, …) {…}

    After::

        launch @f {…} do {
          stage @f {extent = [M, N], tile = [128, 256], segment = 1024, visit = (RANK + WORLD - i) % WORLD}
              do (%m: tile, %n: tile) {
            %acc = for_tiles (%z) {extent = [K], tile = [64]} do (%k: tile, …) {…}

    A reduce in two shots gets a stage behind the last that stores it, in which each rank sums its part.
    Invariant: a stage visits every tile once; no tile crosses the boundary of two owners' blocks, unless the
    schedule lets it span them: of a gather what is read, of a pulled scatter what is stored. Where the
    moved extent is dynamic, segments are those of its capacity, and ``live`` says how much of each is there.
    """
    schedule = schedule_of(program)
    program = _localise(program) if program["world"] == 1 else _measure_blocks(program)
    _check_dynamic(program)
    declarations = tuple(op for op in program.body if op.name in DECLARATIONS)
    prelude = tuple(op for op in program.body if op.name not in DECLARATIONS and not op.blocks)
    nests = tuple(op for op in program.body if op.blocks)
    stages: list[Op] = []
    for number, nest in enumerate(nests):
        if nest.name not in ("for_tiles", "for_range") or nest.results:
            raise UnsupportedProgram(
                nest.span,
                detail="a loop that carries values stands outermost",
                help="put it inside a loop over output tiles, which can run in parallel",
            )
        stages.append(_stage(program, schedule, nest, prelude, number))
        stages += [
            _relay_stage(program, schedule, name)
            for name, tensor in tensors_of(program).items()
            if tensor.get("shots") == 2 and last_store(nests, name) == number
        ]
    for name, tensor in tensors_of(program).items():
        if tensor["move"] in ("scatter", "reduce") and tensor["role"] != "temp":
            stage = _sum_stage(program, schedule, name)
            few = schedule.move(name).signal != "flag" or schedule.move(name).spans
            if tensor["move"] == "scatter" and few:
                stage = stage.with_attrs(tile=_spread(program, schedule, stage))
            stages.append(stage)
    launch = make(
        "launch",
        ref=Ref(program.symbol),
        workers=schedule.workers,
        warps=schedule.warps,
        stages=schedule.stages,
        blocks=(Block((), tuple(stages)),),
    )
    return program.with_ops((*declarations, launch))


def _localise(program: Op) -> Op:
    """On one rank nothing moves."""
    for tensor in program.find("tensor"):
        if tensor["move"] in ("gather", "scatter", "reduce", "shard"):
            local = tensor.with_attrs(move="local", owner=None, over=None)
            program = replace_declaration(program, local)
    return program


def _measure_blocks(program: Op) -> Op:
    """Record the block length of every owner map."""
    names = environment(program)
    for tensor in program.find("tensor"):
        if tensor["move"] not in ("gather", "scatter", "shard"):
            if tensor["move"] not in ("local", "reduce"):
                raise UnsupportedProgram(
                    tensor.span,
                    detail=f"`{tensor.symbol}` moves by `{tensor['move']}`, which only the reference runs",
                    help='`tilelink run FILE --backend reference` or .on("reference", world=…) runs it; '
                    "gather, scatter, reduce and shard are fused",
                )
            continue
        extent = global_dims(tensor, names)[tensor["over"]]
        block = uniform_block(Expr.of(tensor["owner"]), extent, names["WORLD"], names)
        program = replace_declaration(program, tensor.with_attrs(block=block))
        if moved(program, tensor.symbol).block_of(Expr.name("o"), Expr.name("j")) is None:
            raise UnsupportedProgram(
                tensor.span,
                detail=f"the owner map `{tensor['owner']}` of `{tensor.symbol}` has no closed form",
                help="block, cyclic and zigzag owner maps can be fused",
            )
    return program


def _check_dynamic(program: Op) -> None:
    """UnsupportedProgram unless a dynamic extent is the first axis of all that has it, in rank order."""
    name = dynamic_extent(program)
    if name is None:
        return
    for tensor in program.find("tensor"):
        dims = [Expr.of(d) for d in tensor["dims"]]
        if not any(name in d.names for d in dims):
            continue
        first = dims[0] == Expr.name(name) and not any(name in d.names for d in dims[1:])
        info = moved(program, tensor.symbol)
        if not first:
            raise UnsupportedProgram(
                tensor.span,
                detail=f"the dynamic extent `{name}` is not the first axis of `{tensor.symbol}`",
                help=f"only rows can be many or few from call to call: let `{name}` be the first axis of all "
                "tensors that have it, and of no tensor another one",
            )
        if tensor["move"] not in ("local", "reduce") and info.axis != 0:
            raise UnsupportedProgram(
                tensor.span,
                detail=f"`{tensor.symbol}` has the dynamic extent `{name}`, and moves over another axis",
                help=f"move it over `{name}`, or compile the kernel for each extent",
            )
        if tensor["move"] not in ("local", "reduce") and info.block != info.shard:
            raise UnsupportedProgram(
                tensor.span,
                detail=f"`{tensor.symbol}` has a dynamic extent and an owner map of several blocks",
                help="let each rank own one block",
            )


def _stage(program: Op, schedule: Schedule, nest: Op, prelude: tuple[Op, ...], number: int) -> Op:
    variables: list[Value] = []
    extents: list[Expr | int] = []
    own = False
    body: tuple[Op, ...] = (nest,)
    while len(body) == 1 and _parallel(body[0]):
        loop = body[0]
        own |= loop.get("part") == "own"
        variables += loop.args
        extents += loop["extent"] if loop.name == "for_tiles" else [loop["hi"]]
        body = loop.body
    names = environment(program)
    body = _own_names((*prelude, *body), prelude, number)
    body = tuple(_tile_inner(program, schedule, op) for op in body)
    probe = Op("stage", blocks=(Block(tuple(variables), body),), span=nest.span)
    tiles = _tile_sizes(schedule, variables, extents, probe, names, dynamic_extent(program))
    attrs = _segments(program, probe, variables, own, schedule)
    if not attrs:
        attrs = _as_others(program, schedule, extents, probe)
    label = _label(probe, program.symbol, number)
    group = 1 if schedule.order == "row" or len(variables) != 2 else schedule.group
    axis = int(attrs.get("axis") or 0)  # type: ignore[call-overload]
    if variables and _single(attrs.get("segment", extents[axis]), tiles[axis], names):
        group = 1  # there is nothing to walk together
    if schedule.flatten and any(op.name == "dot" for op in probe.walk()):
        attrs["flatten"] = True
    return make(
        "stage",
        ref=Ref(label),
        extent=extents,
        tile=tiles,
        group=None if group == 1 else group,
        blocks=probe.blocks,
        span=nest.span,
    ).with_attrs(**attrs)


def _single(length: Any, tile: int, names: dict[str, int]) -> bool:
    """Whether one tile holds ``length`` elements."""
    return (length if isinstance(length, int) else int(Expr.of(length).evaluate(names))) <= tile


def _parallel(loop: Op) -> bool:
    """Whether a loop's iterations are independent tasks of a queue: nothing carried, plain extents."""
    if loop.name == "for_range":
        return not loop.results and loop.get("lo", 0) == 0
    return loop.name == "for_tiles" and not loop.results and loop.get("extent") is not None


def _label(probe: Op, kernel: str, number: int) -> str:
    stored = [op.symbol for op in probe.walk() if op.name == "store"]
    kind = "gemm" if any(op.name == "dot" for op in probe.walk()) else "tiles"
    return f"{stored[-1] if stored else kernel}.{kind}" + (f".{number}" if number else "")


def _own_names(body: tuple[Op, ...], prelude: tuple[Op, ...], number: int) -> tuple[Op, ...]:
    """``body`` with the results of ``prelude``, which every stage repeats, under names of this stage."""
    if number == 0:
        return body
    renamed = {
        result.name: Value(f"{result.name}.s{number}", result.type)
        for op in prelude
        for result in op.results
    }
    return tuple(substitute(op, renamed) for op in body)


def _tile_inner(program: Op, schedule: Schedule, op: Op) -> Op:
    """Give every loop inside a body its tile length, and segments where it walks a gathered axis."""
    blocks = tuple(
        replace(block, ops=tuple(_tile_inner(program, schedule, inner) for inner in block.ops))
        for block in op.blocks
    )
    op = replace(op, blocks=blocks)
    if op.name != "for_tiles":
        return op
    if op.get("extent") is None:
        return op.with_attrs(tile=(64,))
    names = environment(program)
    tiles = tuple(_clip(schedule.tile(_whole(e), 64), e, names) for e in op["extent"])
    op = op.with_attrs(tile=tiles)
    return _cut_inner(program, schedule, op) if program["world"] > 1 else op


def _cut_inner(program: Op, schedule: Schedule, op: Op) -> Op:
    """Segments of an inner loop over a moved axis: of a gather all, of a shard this rank's."""
    own = op.get("part") == "own"
    if len(op["extent"]) > 1:
        if own:
            raise UnsupportedProgram(
                op.span,
                detail=f"an inner loop has several axes, and each rank runs its part of one, that of "
                f"`{op['part_of']}`",
                help="write a loop for each axis, one inside the other",
            )
        return op
    walked = [
        m
        for m, _ in _moved_accesses(program, op, list(op.args))
        if m.kind in ("gather", "shard") and (own or not _spans(program, schedule, m))
    ]
    if own:
        owner = moved(program, op["part_of"])
        for other in walked:
            if other.block % owner.block:
                raise UnsupportedProgram(
                    op.span,
                    detail=f"`{owner.name}` and `{other.name}` meet in one inner loop, and have different owner "
                    "blocks",
                    help="give them the same owner map",
                )
        visit = owner.block_of(RANK, Expr.name("i"))
        return op.with_attrs(segment=owner.block, segments=owner.blocks, visit=visit)
    if walked:
        owner = min(walked, key=lambda m: m.block)
        op = op.with_attrs(segment=owner.block, visit=_arrival(owner))
    return op


def _whole(extent: Expr | int) -> str:
    """The extent that a schedule names: that of which ``extent`` is one of several equal parts."""
    if isinstance(extent, Expr) and extent.op == "/" and len(extent.names) == 1:
        return min(extent.names)
    return str(extent)


def _clip(size: int, extent: Expr | int, names: dict[str, int]) -> int:
    length = extent if isinstance(extent, int) else int(extent.evaluate(names))
    return min(size, max(16, 1 << max(0, length - 1).bit_length()))


def _tile_sizes(
    schedule: Schedule,
    variables: list[Value],
    extents: list[Expr | int],
    probe: Op,
    names: dict[str, int],
    dynamic: str | None,
) -> tuple[int, ...]:
    tiles = [
        _clip(schedule.tile(str(e), 128), e, names) if v.type.is_tile else 1
        for v, e in zip(variables, extents, strict=True)
    ]
    # A loop over bounds is no extent: its stage is one task.
    if not tiles or any(op.name == "dot" for op in probe.walk()):
        return tuple(tiles)
    # No matrix product: as many rows as fit the registers beside the longest whole axis.
    widest = max((_width(op, {v.name for v in variables}, names) for op in probe.walk()), default=1)
    columns = math.prod(tiles[1:]) * widest
    if dynamic in Expr.of(extents[0]).names and len(tiles) > 1:
        # All stages cut dynamic rows alike: the fewer tiles there can be, the fewer cases are proven.
        while tiles[0] * columns > ELEMENTWISE_TILE and tiles[-1] > 16:
            tiles[-1] //= 2
            columns //= 2
    tiles[0] = max(1, min(tiles[0], ELEMENTWISE_TILE // max(1, columns)))
    return tuple(tiles)


def _width(op: Op, variables: set[str], names: dict[str, int]) -> int:
    """Elements of the largest result of ``op`` along dimensions that no tile variable cuts."""
    size = 1
    for result in op.results:
        whole = [
            d
            for d in result.type.shape
            if d not in variables and not d.endswith((".start", ".stop"))
        ]
        size = max(size, math.prod(int(d) if d.isdigit() else names.get(d, 1) for d in whole))
    return size


def apart(schedule: Schedule, name: str) -> bool:
    """Whether a tensor moves in one piece, before or behind all that computes."""
    return schedule.move(name).resource == "none"


def _spans(program: Op, schedule: Schedule, info: Moved) -> bool:
    """Whether tiles of a gather that are read, or of a pulled scatter that are stored, may be of rows of several
    ranks; ScheduleError where none can."""
    move = schedule.move(info.name)
    if info.kind == "shard" or not move.spans:
        return False
    detail, advice = "", "use false"
    if info.kind == "reduce":
        detail = f"`{info.name}` is neither a gather nor a scatter"
    elif info.kind == "scatter" and move.direction != "pull":
        detail = f"`{info.name}` is no gather: its tiles are stored, each at the rank that owns it"
        advice = "use false, or the direction `pull`"
    elif info.kind == "scatter" and move.sum != "stage":
        detail = f"`{info.name}` is summed in the epilogue of tiles that this rank owns"
        advice = "use false, or the sum `stage`"
    elif info.block != info.shard:
        detail = f"the shards of `{info.name}` do not lie one behind the other"
    if detail:
        raise ScheduleError(
            program.declared(info.name).span,
            field=f"moves.{info.name}.spans",
            detail=detail,
            help=advice,
        )
    return True


@dataclass(frozen=True, slots=True)
class _Demand:
    axis: int
    moved: Moved
    order: str


def _moved_accesses(program: Op, body: Op, variables: list[Value]) -> list[tuple[Moved, int]]:
    found: list[tuple[Moved, int]] = []
    for name, tensor in tensors_of(program).items():
        if tensor["move"] in ("gather", "scatter", "shard") or tensor.get("shots") == 2:
            info = moved(program, name)
            for kind in ("load", "store"):
                for access in accesses(body, name, kind):
                    assert access.ref is not None
                    element = access.ref.index[info.axis] if access.ref.index else All()
                    if element in variables:
                        found.append((info, variables.index(element)))
    return found


def _segments(
    program: Op, probe: Op, variables: list[Value], own: bool, schedule: Schedule
) -> dict[str, object]:
    """The stage attributes that cut tiles at owners' blocks and say in which order to visit them."""
    demands: list[_Demand] = []
    for info, axis in _moved_accesses(program, probe, variables):
        stored = any(True for _ in accesses(probe, info.name, "store"))
        read = any(True for _ in accesses(probe, info.name, "load"))
        order = "arrival" if info.kind == "gather" else "departure"
        if (stored or info.kind == "gather") and _spans(program, schedule, info):
            continue
        if info.kind == "shard" or (info.kind == "scatter" and read and not stored):
            order = "own"
        if info.dynamic is not None and order != "own" and apart(schedule, info.name):
            continue  # the library's collective leaves rows side by side, as many as there are
        if info.kind == "reduce" and not stored:
            # Sums of all parts are read, in the order in which their ranks are likely to send them.
            order = "arrival"
        demands.append(_Demand(axis, info, order))
    if len({(d.axis, d.moved.block) for d in demands}) > 1:
        # What others own cuts the loop; a sum that is read there waits for all of its parts.
        read_only = [d for d in demands if d.moved.kind == "reduce" and d.order == "arrival"]
        demands = [d for d in demands if d not in read_only] or read_only[:1]
    if not demands:
        return {}
    axes = sorted({d.axis for d in demands})
    if len(axes) > 1:
        raise UnsupportedProgram(
            probe.span,
            detail=f"{_met(demands)} in one loop nest, moved over different axes of it",
            help=_parted(probe, demands),
        )
    demands.sort(key=lambda d: (("own", "arrival", "departure").index(d.order), d.moved.block))
    first = demands[0]
    segment = math.gcd(*(d.moved.block for d in demands))
    if segment != first.moved.block:
        raise UnsupportedProgram(
            probe.span,
            detail=f"{_met(demands)} in one loop nest, and have different owner blocks",
            help=f"give them the same owner map, or {_parted(probe, demands)}",
        )
    info = first.moved
    attrs: dict[str, object] = {"segment": segment, "axis": first.axis or None}
    if info.dynamic is not None:
        attrs["live"] = info.live
    if own or first.order == "own":
        attrs["segments"] = info.blocks
        attrs["visit"] = info.block_of(RANK, Expr.name("i"))
    else:
        attrs |= _all_segments(info)
    order = first.order if schedule.order == "auto" else schedule.order
    if not own and first.order != "own" and order in ("arrival", "departure", "interleave"):
        attrs["visit"] = _arrival(info) if order == "arrival" else _departure(info)
        attrs["interleave"] = True if order == "interleave" else None
    return attrs


def _as_others(
    program: Op, schedule: Schedule, extents: list[Expr | int], body: Op
) -> dict[str, object]:
    """The cuts of a nest over dynamic rows that meets no owner's, where other nests of the program meet some: what
    one writes and another reads lies by owner in both. But tiles that span shards, and what the library moves, lie
    side by side."""
    name = dynamic_extent(program)
    moving = {op.symbol for op in body.walk() if op.name in ("load", "store")}
    moving &= {s for s, t in tensors_of(program).items() if t["move"] in ("gather", "scatter")}
    if moving:
        return {}
    whole = [n for n, extent in enumerate(extents) if Expr.of(extent) == Expr.name(name or "")]
    for symbol, tensor in tensors_of(program).items() if name and whole else ():
        if tensor["move"] in ("gather", "scatter", "shard") or tensor.get("shots") == 2:
            info = moved(program, symbol)
            if info.dynamic is None or apart(schedule, symbol) or _spans(program, schedule, info):
                continue
            cut = {"segment": info.block, "axis": whole[0] or None, "live": info.live}
            return cut | _all_segments(info)
    return {}


def _met(demands: list[_Demand]) -> str:
    """The tensors of ``demands``, and that they meet, as a text says it."""
    *others, last = dict.fromkeys(f"`{d.moved.name}`" for d in demands)
    return f"{', '.join(others)} and {last} meet" if others else f"{last} meets itself"


def _parted(probe: Op, demands: list[_Demand]) -> str:
    """What makes two loop nests of ``probe``, each of which meets one of the tensors of ``demands``."""
    stored = [d.moved.name for d in demands if any(accesses(probe, d.moved.name, "store"))]
    if stored:
        return (
            f"store into a tensor of its own (`tk.empty`) in place of `{stored[-1]}`, and copy that to "
            f"`{stored[-1]}` in a loop nest behind it"
        )
    read = demands[-1].moved.name
    return f"copy `{read}` to a tensor of its own (`tk.empty`) in a loop nest in front of it, and read that"


def _all_segments(info: Moved) -> dict[str, object]:
    """The number of segments, where the extent does not tell."""
    return {} if info.dynamic is None else {"segments": info.world}


def _arrival(info: Moved) -> Expr:
    """Own blocks first, then those of the rank before, as a ring of pushes to the next rank brings them."""
    i = Expr.name("i")
    form = info.block_of((RANK + WORLD - i // info.blocks) % WORLD, i % info.blocks)
    assert form is not None
    return form


def _departure(info: Moved) -> Expr:
    """The next rank's blocks first, the own last."""
    i = Expr.name("i")
    form = info.block_of((RANK + 1 + i // info.blocks) % WORLD, i % info.blocks)
    assert form is not None
    return form


def _relay_stage(program: Op, schedule: Schedule, name: str) -> Op:
    """The stage in which this rank sums its part of a reduce and hands the sum to every rank."""
    stage = _sum_stage(program, schedule, name)
    info = moved(program, name)
    values = {v.name: Value(f"{v.name}.part", v.type) for v in stage.args}
    values[f"{name}.sum"] = Value(f"{name}.part", stage.body[0].results[0].type)
    stage = substitute(replace(stage, ref=Ref(f"{name}.relay")), values)
    stage = stage.with_ops(tuple(op.with_attrs(relay=True, final=None) for op in stage.body))
    stage = stage.with_attrs(segment=info.block, segments=1, visit=RANK, axis=info.axis or None)
    return stage.with_attrs(tile=_spread(program, schedule, stage))


def _spread(program: Op, schedule: Schedule, stage: Op) -> tuple[int, ...]:
    """Tiles of a stage that sums this rank's part, with fewer rows where workers would have none.

    A worker that stores to peers waits for round trips over the link, and one that polls has so many places under
    way: the more of them share the part, the sooner it is there.
    """
    names = environment(program)
    tiles = list(stage["tile"])
    axis = int(stage.get("axis") or 0)
    lengths = [int(Expr.of(e).evaluate(names)) for e in stage["extent"]]
    lengths[axis] = int(stage["segment"]) * int(stage["segments"])
    if schedule.move(stage.body[0].symbol).spans:
        # Tiles of the product are longer than what a rank owns; those of its sum end with that.
        tiles[axis] = _clip(tiles[axis], int(stage["segment"]), names)

    def tasks() -> int:
        return math.prod(-(-n // t) for n, t in zip(lengths, tiles, strict=True))

    while 2 * tasks() <= schedule.workers and math.prod(tiles) >= 2 * LEAST_SUM and tiles[0] > 1:
        tiles[0] //= 2
    return tuple(tiles)


def _sum_stage(program: Op, schedule: Schedule, name: str) -> Op:
    """The stage that brings the sum of an output into the user's tensor."""
    tensor = program.declared(name)
    names = environment(program)
    letters = [
        f"{str(d).lower() if not isinstance(d, int) else 'd'}.{name}.{i}"
        for i, d in enumerate(tensor["dims"])
    ]
    variables = [Value(letter, TILE) for letter in letters]
    result = Value(f"{name}.sum", Type(tensor["dtype"], tuple(letters)))
    body = (
        make("load", results=(result,), ref=Ref(name, tuple(variables)), span=tensor.span),
        make(
            "store",
            ref=Ref(name, tuple(variables)),
            operands=(result,),
            final=True,
            span=tensor.span,
        ),
    )
    probe = Op("stage", blocks=(Block(tuple(variables), body),))
    tiles = _tile_sizes(
        schedule, variables, list(tensor["dims"]), probe, names, dynamic_extent(program)
    )
    attrs: dict[str, object] = {}
    info = moved(program, name)
    if schedule.move(name).signal != "flag" and len(tiles) == 2:
        most = POLLED * 32 * schedule.warps // (info.world * DTYPES[tensor["dtype"]])
        tiles = (max(1, min(tiles[0], most // tiles[1])), tiles[1])
    if tensor["move"] == "scatter":
        attrs = {
            "segment": info.block,
            "segments": info.blocks,
            "visit": info.block_of(RANK, Expr.name("i")),
            "axis": info.axis or None,
        }
        if info.dynamic is not None:
            attrs["live"] = info.live
    elif info.spread:
        attrs = {"segment": info.block, "visit": _arrival(info), "axis": info.axis or None}
    else:
        attrs = _as_others(program, schedule, list(tensor["dims"]), probe)
    return make(
        "stage",
        ref=Ref(f"{name}.sum"),
        extent=tensor["dims"],
        tile=tiles,
        blocks=probe.blocks,
        span=tensor.span,
    ).with_attrs(**attrs)
