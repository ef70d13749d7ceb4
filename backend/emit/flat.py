"""The flattened persistent form: one loop over tiles and steps of the main loop.

The next tile's loads are under way while the last tile is stored, which nested loops do not reach.
Triton stops pipelining where a wait stands in such a loop. So a stage that waits is flattened only where
its waits are the same for all tiles of a segment: a loop over the segments waits, the flattened loop in it
takes the worker's tiles of that segment.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tilelink.backend.emit import access, body
from tilelink.backend.emit.held import Held
from tilelink.backend.emit.loops import (
    Walk,
    announce,
    decode,
    multiply,
    place_tile,
    segment_counts,
)
from tilelink.backend.emit.scope import Program, Scope
from tilelink.backend.emit.text import Writer
from tilelink.backend.passes.order_memory import main_loop
from tilelink.ir import At, Expr, Index, Op, Range, Value


def flat_stage(
    scope: Scope, stage: Op, worker: str, step: str, count: str, flushed: bool
) -> Held | None:
    """Write ``stage`` as one loop, or one a segment.

    ``worker`` takes positions worker, worker + step, … below ``count``. A notify
    with ``delay`` waits for the next tile; ``flushed`` makes the last one behind the loop. Returned is what
    is held back then.
    """
    writer = scope.writer
    at = next(i for i, op in enumerate(stage.body) if op.name == "for_tiles")
    loop, epilogue = stage.body[at], stage.body[at + 1 :]
    variable, size = loop.args[0], int(loop["tile"][0])
    length = scope.program.constant(loop["extent"][0])
    assert length is not None
    steps = -(-length // size)
    notify = next((op for op in epilogue if op.name == "notify" and op.get("delay")), None)
    turn = scope.fresh(f"{variable.name}_at")
    held = None if notify is None else Held.of(scope, notify)
    writer.line(f"q = {worker} - {step}")
    if held is not None:
        held.begin(scope)
    waits = tuple(op for op in stage.body[:at] if op.name == "wait")
    if waits:
        writer.line("token = 0")
    for name in _decoded(scope, stage):
        writer.let(name, "0")

    def tiles(turns: str) -> None:
        """The loop over as many steps as ``turns`` says, from the tile behind ``q``."""
        writer.line(f"{turn} = tl.full((), {steps - 1}, tl.int32)")
        first = len(writer.lines)
        body.ops(scope, tuple(op for op in stage.body[:at] if op.name != "wait"))
        body.carry_in(scope, loop, 0)
        begin = [line.strip() for line in writer.lines[first:]]
        with writer.block(f"for _ in tl.range(0, {turns}, num_stages={scope.stages}):"):
            writer.line(f"{turn} = tl.where({turn} == {steps - 1}, 0, {turn} + 1)")
            with writer.block(f"if {turn} == 0:"):
                writer.line(f"q += {step}")
                decode(scope, stage, stage.args, Walk.of(stage), "q")
            place_tile(scope, variable, turn, f"{turn} * {size}", size, loop["extent"][0])
            body.loop_body(scope, loop)
            with writer.block(f"if {turn} == {steps - 1}:"):
                if held is not None:
                    held.release(scope)
                body.ops(scope, tuple(op for op in epilogue if op is not notify))
                if held is not None:
                    held.keep(scope)
                for line in begin:
                    writer.line(line)

    turns = scope.fresh("steps")
    if waits:
        _segments(scope, stage, waits, loop, step, steps, turns, tiles)
    else:
        first_one = worker if worker.endswith(")") else f"({worker})"
        writer.line(f"{turns} = tl.cdiv({count} - {first_one}, {step}) * {steps}")
        tiles(turns)
    scope.dims.pop(variable.name, None)
    if held is not None and flushed:
        held.release(scope)
        return None
    return held


def _segments(
    scope: Scope,
    stage: Op,
    waits: tuple[Op, ...],
    loop: Op,
    step: str,
    steps: int,
    turns: str,
    tiles: Callable[[str], None],
) -> None:
    """The loop over the segments of a stage: its waits, and the choices of its loads, then its tiles."""
    writer, walk = scope.writer, Walk.of(stage)
    within, segments = segment_counts(scope, stage, stage.args, walk)
    variable = stage.args[walk.axis]
    number = scope.fresh(f"{variable.name}_part")
    with writer.block(f"for {number} in range(0, {segments}):"):
        dim = scope.dims[variable.name]
        outer = scope.names.get("i")
        scope.names["i"] = number
        visit = walk.visit if walk.visit is not None else Expr.name("i")
        writer.let(dim.start, scope.expr(visit * walk.segment))
        del scope.names["i"]
        if outer is not None:
            scope.names["i"] = outer
        end = multiply(f"({number} + 1)", within)
        if walk.positions is not None:
            end = f"tl.minimum({end}, {walk.positions[1]}) - {walk.begin}"
        left = scope.fresh("left")
        writer.line(f"{left} = tl.maximum({end} - q - {step}, 0)")
        writer.line(f"{turns} = tl.cdiv({left}, {step}) * {steps}")
        with writer.block(f"if {turns} > 0:"):
            # A worker without a tile in this segment waits for nothing.
            scope.tile = f"q + {step}"
            body.ops(scope, waits)
            scope.tile = "q"
            scope.tokens.append("token")
            chosen = [op for op in loop.walk() if op.name == "load" and op.get("own") is not None]
            ahead = announce(scope, loop)
            for load in chosen:
                access.choose(scope, load, base_start=dim.start)
            for name in ahead:
                del scope.dims[name]
            tiles(turns)
            scope.tokens.clear()
            scope.tile = "0"


def flat_by_segment(program: Program, stage: Op) -> bool:
    """Whether ``stage`` can be flattened a segment at a time: it waits in front of its main loop alone,
    signals nothing, and what it waits for and its loads' choices are those of a tile's segment.

    Evaluated for every start of a tile: a segment's first tile must speak for the others, and what a load
    reads from the local shard must lie at the same distance from the tile's start throughout.
    """
    loop = main_loop(program.op, stage)
    if loop is None or any(op.name in ("notify", "transfer") for op in stage.walk()):
        return False
    before = stage.body[: stage.body.index(loop)]
    waits = [op for op in stage.walk() if op.name == "wait"]
    if not waits or any(op not in before for op in waits):
        return False
    walk = Walk.of(stage)
    if walk.interleave:
        return False  # tiles of one segment do not follow each other
    segment = program.constant(walk.segment) if walk.segment is not None else None
    extent = program.capacity(walk.extent[walk.axis]) if walk.extent else None
    tiled = len(walk.tile) == len(stage.args) and stage.args[walk.axis].type.is_tile
    if segment is None or extent is None or not tiled:
        return False
    start = f"{stage.args[walk.axis].name}.start"
    tiles = np.arange(0, segment, int(walk.tile[walk.axis]), dtype=np.int64)
    first = np.repeat(np.arange(0, extent, segment, dtype=np.int64), len(tiles))
    at = first + np.tile(tiles, len(first) // len(tiles))

    def settled(item: Index | Expr | int, shift: bool = False) -> bool:
        if isinstance(item, Range):
            return settled(item.lo) and settled(item.hi)
        if isinstance(item, int):
            return True
        if not isinstance(item, Expr):
            return False
        expr = item.substitute(program.env)
        if not expr.names <= {start, "RANK"}:
            return False
        for rank in range(program.world):
            here, there = (expr.evaluate({start: x, "RANK": rank}) for x in (at, first))
            if np.any(here - there != (at - first if shift else 0)):
                return False
        return True

    for op in stage.walk():
        if op.name == "wait":
            assert op.ref is not None
            parts = [*op.ref.index, op.get("if", 1), op.get("epoch", 0), op.get("count", 0)]
            if not all(settled(part) for part in parts):
                return False
        elif op.name == "load" and op.get("own") is not None:
            assert op.ref is not None
            for far, near in zip(op.ref.index, op["own"].index, strict=True):
                if far == near and isinstance(far, Value):
                    continue
                for item in (far, near):
                    moved = isinstance(item, Value) and item == stage.args[walk.axis]
                    placed = isinstance(item, At) and item.value == stage.args[walk.axis]
                    if not moved and not (placed and settled(item.start, shift=True)):  # type: ignore[union-attr]
                        return False
            if not settled(op["when"]):
                return False
    return True


def _decoded(scope: Scope, stage: Op) -> list[str]:
    """The names that decoding a queue position assigns: they live on from step to step.

    What it says of dimensions stays, so that values can be made before the loop; decoding again
    finds the same names.
    """
    kept = scope.writer, set(scope.used)
    scope.writer = Writer()
    decode(scope, stage, stage.args, Walk.of(stage), "q")
    found: list[str] = []
    for line in scope.writer.lines:
        match = re.match(r"\s*(\w+(?:, \w+)*) = ", line)
        for name in match[1].split(", ") if match else ():
            if name not in found:
                found.append(name)
    scope.writer, scope.used = kept
    return found
