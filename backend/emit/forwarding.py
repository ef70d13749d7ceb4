"""A stage that copies beside products, in a kernel whose warps have roles: tiles go on by way of the ring.

The loader of a worker draws the next tile from the queue, hands its place to the groups, waits for the tile and
loads it, box by box, into slots of the ring. The groups have every other tile each: they send the boxes on as they
land, give a slot back when what leaves from it has been read, and tell when all has arrived, while the other
group's tile leaves. See :mod:`tilelink.device.roles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tilelink.backend.emit import access, body
from tilelink.backend.emit.kernel import among
from tilelink.backend.emit.loops import Walk, decode, total
from tilelink.backend.emit.scope import Dim, Program, Scope, item_bytes, origin, refuse_roles
from tilelink.backend.emit.text import identifier
from tilelink.backend.passes.bind_emitter import Copies
from tilelink.ir import Op

Tile = tuple[str, tuple[int, ...], str]
"""What a box lies in, in the ring: the tile's name, its block and its element type."""


def load_stage(scope: Scope, launch: Op, stage: Op, copies: Copies, ring: list[Tile]) -> None:
    """The loader's share: tiles are drawn, handed on, waited for and loaded."""
    writer, taken = scope.writer, "taken"
    counter = stage["counter"]
    with _queue(scope, launch, stage):
        where = body.word(scope, counter.symbol, body.element(stage, counter.index))

        def draw() -> None:
            writer.line(f"{taken} = device.queue_next(ctx, {where})")
            writer.line(f"roles.order(orders, number, {taken})")

        draw()
        with writer.block(f"while {taken} < {total(scope, stage, stage.args, Walk.of(stage))}:"):
            _begin(scope, stage, taken)
            if copies.before:
                writer.line("token = 0")
                scope.tokens.append("token")
            body.ops(scope, copies.before)
            scope.define(copies.load.results[0])
            name, block, _ = _tile_of(scope, stage, copies, ring)
            with _boxes(scope, copies, block):
                box = access.box(scope, copies.load)
                size = block[0] * block[1] * item_bytes(copies.load.results[0].type.dtype)
                writer.call("slot = roles.claim(", ["ring", "step", str(size)])
                writer.call("roles.fetch(", ["ring", "slot", box.source, box.row, box.column, name])
                writer.line("step += 1")
            writer.line("number += 1")
            draw()


def forward_stage(scope: Scope, launch: Op, stage: Op, copies: Copies, ring: list[Tile]) -> None:
    """A group's share: boxes are stored where they are needed, and what has arrived is told."""
    writer, taken = scope.writer, "taken"
    with _queue(scope, launch, stage):
        writer.line(f"{taken} = roles.ordered(orders, number)")
        with writer.block(f"while {taken} < {total(scope, stage, stage.args, Walk.of(stage))}:"):
            with writer.block("if number % 2 == role:"):
                _begin(scope, stage, taken)
                count = _forward(scope, stage, copies, ring)
            writer.line("number += 1")
            writer.line(f"step += {count}")
            writer.line(f"{taken} = roles.ordered(orders, number)")


def _forward(scope: Scope, stage: Op, copies: Copies, ring: list[Tile]) -> int:
    """One tile; how many boxes it has."""
    writer = scope.writer
    name, block, _ = _tile_of(scope, stage, copies, ring)
    stores = tuple(op for op in copies.after if any(o.name == "store" for o in op.walk()))
    told = tuple(op for op in copies.after if op not in stores)
    width = scope.dims[copies.load.results[0].type.shape[1]].block
    before, scope.over = scope.over, {**scope.over, "store": _store}
    writer.line("roles.turn(turns, number)")
    writer.line("at = step")
    with _boxes(scope, copies, block):
        writer.line("slot = roles.take(ring, at)")
        scope.names[copies.load.results[0].name] = f"{name}.index(slot)"
        body.ops(scope, stores)
        each = sum(_times(scope.program, op) for op in stores)
        writer.line(f"roles.forwarded(ring, at, step, {each})")
        writer.line("at += 1")
    writer.line("roles.pass_turn(turns, number)")
    writer.line("roles.all_forwarded(ring, at, step)")
    scope.over = before
    body.ops(scope, told)
    return width // block[1]


def _store(scope: Scope, op: Op) -> None:
    """One box to a rank by name."""
    assert op.ref is not None
    place = access.corner(scope, op, op.ref)
    if op.get("via") != "tma" or place is None:
        raise refuse_roles(op, "a copy of boxes of another form than TMA's")
    block = scope.blocks(op.operands[0].type)
    names = [access.descriptor(scope, op.symbol, block, p) for p in range(scope.program.world)]
    several = f"({', '.join(names)}{',' * (len(names) == 1)})"
    args = [several, scope.expr(op["peer"]), *place, scope.names[op.operands[0].name]]
    scope.writer.call("roles.forward(", args)


def _times(program: Program, op: Op) -> int:
    """How many stores of a box an op is: one, or one a rank of a loop."""
    if op.name == "store":
        return 1
    ends = program.constant(op["lo"]), program.constant(op["hi"])
    if op.name != "for_range" or None in ends or len(op.body) != 1:
        raise refuse_roles(op, "a copy to a number of ranks that is known at run time only")
    return (int(ends[1]) - int(ends[0])) * _times(program, op.body[0])  # type: ignore[arg-type]


def _tile_of(scope: Scope, stage: Op, copies: Copies, ring: list[Tile]) -> Tile:
    """The tile of a slot that a box of what is copied lies in: of as many rows, and columns that come out even."""
    loaded = copies.load.results[0].type
    dims = [scope.dims[name] for name in loaded.shape]
    for name, block, dtype in ring:
        fits = dims[0].block == block[0] and dims[1].block % block[1] == 0
        if fits and dtype == loaded.dtype and all(dim.exact for dim in dims):
            return name, block, dtype
    raise refuse_roles(stage, "copies of tiles that are no slots of the ring")


@contextmanager
def _queue(scope: Scope, launch: Op, stage: Op) -> Iterator[None]:
    """The tasks of a stage, by its workers."""
    writer = scope.writer
    title = stage.symbol if stage.ref is not None else "stage"
    writer.line()
    writer.line(f"# Stage {title}.{origin(stage.span).replace('  # ', ' ')}")
    low, high = (int(w) for w in stage["workers"])
    with writer.block(f"if {among(low, high, int(launch['workers']))}:"):
        yield


def _begin(scope: Scope, stage: Op, taken: str) -> None:
    scope.tokens.clear()
    scope.tile = taken
    decode(scope, stage, stage.args, Walk.of(stage), taken)


@contextmanager
def _boxes(scope: Scope, copies: Copies, block: tuple[int, ...]) -> Iterator[None]:
    """The loop over the boxes of a tile, side by side."""
    variable = copies.load.results[0].type.shape[1]
    dim: Dim = scope.dims[variable]
    start = f"{identifier(variable)}_part"
    with scope.writer.block(f"for {start} in tl.range({dim.start}, {dim.stop}, {block[1]}):"):
        scope.dims[variable] = replace(dim, block=block[1], start=start)
        yield
    scope.dims[variable] = dim
