"""The stages in which workers of ``sm:N`` copy a moved tensor: by rows, or by boxes."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod

from tilelink.backend.expand import environment
from tilelink.backend.passes.choose_channels import box_length
from tilelink.backend.passes.common import (
    RANK,
    WORLD,
    Moved,
    copied_beside,
    copied_region,
    global_dims,
    schedule_of,
)
from tilelink.ir import (
    DTYPES,
    INDEX,
    TILE,
    At,
    Block,
    Expr,
    Index,
    Op,
    Ref,
    Type,
    Value,
    binary,
    make,
)
from tilelink.schedules import ScheduleError

# Bytes of a box: a worker has it in flight at once, and holds it in registers while it leaves.
BOX_BYTES = 16 * 1024
BOX_COLUMNS = 256
# Bytes of a tile of boxes that a worker has in flight at once by way of shared memory.
TILE_BYTES = 128 * 1024
# Bytes of this rank's rows that a worker copies at a time where the copy engine has the others.
OWN_BYTES = 64 * 1024
# Bytes of the columns of a box below which memory is not read in whole lines.
LEAST_COLUMNS = 32


def copying_stage(program: Op, info: Moved, shared: bool = False) -> Op:
    """The stage of ``@A.push``: tasks of the first N workers, which copy and signal.

    ``shared``: boxes go by way of shared memory, so that those of a tile need not fit registers.
    """
    if schedule_of(program).move(info.name).copies == "boxes":
        return _boxes(program, info, shared)
    return _rows(program, info)


def _stage(
    program: Op, info: Moved, order: tuple[tuple[Expr | int, Value, int], ...], body: list[Op]
) -> Op:
    """The stage of tasks over ``order``: extent, variable and tile length of each, outermost first."""
    return make(
        "stage",
        ref=Ref(f"{info.name}.push"),
        extent=tuple(extent for extent, _, _ in order),
        tile=tuple(length for _, _, length in order),
        workers=(0, schedule_of(program).move(info.name).sm_workers),
        blocks=(Block(tuple(value for _, value, _ in order), tuple(body)),),
        span=program.declared(info.name).span,
    )


def own_rows(program: Op, info: Moved) -> Op:
    """The stage of ``@A.own``: workers put this rank's rows where the copy engine puts those of the others.

    ::

        stage @A.own {extent = [M / WORLD], tile = [8], …} do (%t: tile) {
          transfer @A[%t, :] {to = @A.all[%t at RANK * 64 + t.start, :], peer = RANK}
          notify @A.ready[RANK, t.start / 32] {peer = RANK, count = 4, through = @A.arrived[RANK, t.start / 32]}
        }
    """
    tensor = program.declared(info.name)
    size = DTYPES[str(tensor["dtype"])]
    across = [
        n for axis, n in enumerate(global_dims(tensor, environment(program))) if axis != info.axis
    ]
    rows = max(1, min(OWN_BYTES // (size * prod(across)), info.channel_rows))
    if info.channels > 1 or info.axis:
        # Of one channel each, and along an inner axis all of one length.
        both = gcd(info.channel_rows, info.shard)
        rows = next(n for n in range(rows, 0, -1) if both % n == 0)
    return _rows(program, replace(info, tile=rows), own=True)


def _rows(program: Op, info: Moved, own: bool = False) -> Op:
    """Whole rows, by loads and stores: a task copies a tile to one peer, or (``own``) to this rank.

    ::

        stage @A.push {extent = [WORLD - 1, M / WORLD], tile = [1, 8], …} do (%s: int32, %t: tile) {
          transfer @A[%t, :] {to = @A.all[%t at RANK * 64 + t.start, :], peer = (RANK + s + 1) % WORLD}
          notify @A.ready[RANK, t.start / 8] {peer = (RANK + s + 1) % WORLD}
        }
    """
    step, tile = Value(f"{info.name}.s", INDEX), Value(f"{info.name}.t", TILE)
    skip = 0 if info.kind == "gather" and not info.in_place else 1
    peer = RANK if own else (RANK + Expr.name(step.name) + skip) % WORLD
    start = Expr.name(f"{tile.name}.start")
    span = program.declared(info.name).span
    channel = info.channel_of(start)
    body: list[Op] = []
    if info.kind == "gather":
        source = Ref(info.name, copied_region(program, info, tile))
        target = Ref(
            f"{info.name}.all", copied_region(program, info, At(tile, RANK * info.pitch + start))
        )
    else:
        body.append(_finished(program, info, peer, channel))
        base = peer * info.shard + start if info.spread else start
        moved_tile: Index = At(tile, base) if info.spread else tile
        source = Ref(f"{info.name}.partial", copied_region(program, info, moved_tile))
        target = Ref(f"{info.name}.parts", (RANK, *copied_region(program, info, tile)))
    body.append(make("transfer", ref=source, to=target, peer=peer, span=span))
    body.append(_arrived(program, info, peer, channel, info.tiles_of(channel)))
    ranks, rows = (WORLD - skip, step, 1), (Expr.of(info.live), tile, info.tile)
    if own:
        stage = _stage(program, info, (rows,), body).with_attrs(workers=None)
        return replace(stage, ref=Ref(f"{info.name}.own"))
    return _stage(program, info, (ranks, rows) if info.spread else (rows, ranks), body)


def _boxes(program: Op, info: Moved, shared: bool) -> Op:
    """Boxes of rows and columns, which TMA can copy: a task loads one, and stores it into all peers.

    ::

        stage @A.push {extent = [M / WORLD, K], tile = [64, 256], …} do (%t: tile, %c: tile) {
          %box = load @A[%t, %c]
          for_range {lo = 1, hi = WORLD} do (%s: int32) {
            store @A.all[%t at RANK * 64 + t.start, %c] (%box) {peer = (RANK + s) % WORLD}
          }
          for_range {lo = 0, hi = WORLD} do (%p: int32) {
            notify @A.ready[RANK, 0] {peer = p, if = p != RANK, count = 32, through = @A.arrived[p, 0]}
          }
        }

    Rows that are not read in place go to this rank too, last. The contributions of a scatter differ from peer to
    peer, so there a task is of one; those of a sum that is not spread go to all other ranks. Beside products, what
    is gathered goes to one peer after the other too: in the order in which they read it, not to all of them at a
    third of the links each.
    """
    name, span = info.name, program.declared(info.name).span
    lengths = global_dims(program.declared(name), environment(program))
    if len(lengths) != 2 or info.dynamic is not None:
        why = "its rows are known at run time only" if info.dynamic else f"{len(lengths)} axes"
        raise _unfit(program, info, why)
    across = 1 - info.axis
    size = DTYPES[str(program.declared(name)["dtype"])]
    most = min(BOX_COLUMNS, max(1, BOX_BYTES // (info.tile * size)))
    columns = box_length(lengths[across], most)
    rows = info.tile
    if shared:
        columns = _widened(program, info, lengths[across], columns, rows * size)
    if min(rows if info.axis else columns, 1 << 20) * size < LEAST_COLUMNS:
        box = f"{columns} x {rows}" if info.axis else f"{rows} x {columns}"
        detail = f"a box of {box} has rows of fewer than {LEAST_COLUMNS} bytes"
        raise _unfit(program, info, detail)
    step, last = Value(f"{name}.s", INDEX), Value(f"{name}.p", INDEX)
    tile, column = Value(f"{name}.t", TILE), Value(f"{name}.c", TILE)
    shape = [tile, column] if info.axis == 0 else [column, tile]
    loaded = Value(f"{name}.box", Type(str(program.declared(name)["dtype"]), _names(shape)))
    start = Expr.name(f"{tile.name}.start")
    channel = info.channel_of(start)
    count = info.tiles_of(channel) * (lengths[across] // columns)

    def at(element: Index) -> tuple[Index, ...]:
        return tuple(element if axis == info.axis else column for axis in range(2))

    moved_rows = (Expr.of(info.live), tile, rows)
    across_rows = (lengths[across], column, columns)
    peer = (RANK + 1 + Expr.name(step.name)) % WORLD
    if info.kind == "gather":
        source = Ref(name, at(tile))
        target = Ref(f"{name}.all", at(At(tile, RANK * info.shard + start)))
    else:
        base = peer * info.shard + start if info.spread else start
        source = Ref(f"{name}.partial", at(At(tile, base) if info.spread else tile))
        target = Ref(f"{name}.parts", (RANK, *at(tile)))
    load = make("load", results=(loaded,), ref=source, span=span)
    store = make("store", ref=target, operands=(loaded,), peer=peer, span=span)
    here = info.kind == "gather" and not info.in_place
    gathers = info.kind == "gather"
    if copied_beside(program, name) if gathers else info.spread:
        body = [] if gathers else [_finished(program, info, peer, channel)]
        body += [load, store, _arrived(program, info, peer, channel, count)]
        ranks = WORLD - (0 if here else 1)
        return _stage(program, info, ((ranks, step, 1), moved_rows, across_rows), body)
    told = _arrived(program, info, Expr.name(last.name), channel, count)
    if not here:
        told = told.with_attrs(**{"if": binary("!=", Expr.name(last.name), RANK)})
    body = [] if info.kind == "gather" else [_finished(program, info, peer, channel)]
    body += [load, _loop(step, WORLD - (0 if here else 1), store), _loop(last, WORLD, told)]
    return _stage(program, info, (moved_rows, across_rows), body)


def _widened(program: Op, info: Moved, length: int, columns: int, bytes_of: int) -> int:
    """Columns of a tile of several boxes, as long as all workers still have one; ``bytes_of`` a column."""
    workers = schedule_of(program).move(info.name).sm_workers
    tall = -(-info.shard // info.tile)
    while (
        length % (2 * columns) == 0
        and 2 * columns * bytes_of <= TILE_BYTES
        and tall * (length // (2 * columns)) >= workers
    ):
        columns *= 2
    return columns


def _names(values: list[Value]) -> tuple[str, ...]:
    return tuple(value.name for value in values)


def _loop(variable: Value, hi: Expr, op: Op) -> Op:
    return make("for_range", lo=0, hi=hi, blocks=(Block((variable,), (op,)),), span=op.span)


def _finished(program: Op, info: Moved, peer: Expr, channel: Expr) -> Op:
    """The wait until the tiles of a channel are all there to be copied."""
    return make(
        "wait",
        ref=Ref(f"{info.name}.done", (peer, channel) if info.spread else (channel,)),
        count=info.tasks_of(channel),
        span=program.declared(info.name).span,
    )


def _arrived(program: Op, info: Moved, peer: Expr, channel: Expr, count: Expr | int) -> Op:
    """The notify of ``peer`` that this rank's copies of a channel have arrived, ``count`` of them."""
    once = count == 1
    return make(
        "notify",
        ref=Ref(f"{info.name}.ready", (RANK, channel)),
        peer=peer,
        count=None if once else count,
        through=None if once else Ref(f"{info.name}.arrived", (peer, channel)),
        span=program.declared(info.name).span,
    )


def _unfit(program: Op, info: Moved, detail: str) -> ScheduleError:
    return ScheduleError(
        program.declared(info.name).span,
        field=f"moves.{info.name}.copies",
        detail=f"`{info.name}` in boxes, but {detail}",
        help="use the copies `rows`",
    )
