"""The flattened persistent form: one loop over tiles and steps of the main loop.

The next tile's loads are under way while the last tile is stored, which nested loops do not reach.
Only for stages that wait for nothing: Triton stops pipelining where a wait stands in such a loop.
"""

from __future__ import annotations

import re

from tilelink.backend.emit import body
from tilelink.backend.emit.loops import Walk, decode, place_tile
from tilelink.backend.emit.scope import Scope, refuse
from tilelink.backend.emit.text import Writer
from tilelink.ir import Op


def flat_stage(scope: Scope, stage: Op, worker: str, step: str, count: str, flushed: bool) -> None:
    """Write ``stage`` as one loop; ``worker`` takes positions worker, worker + step, … below ``count``.

    A notify with ``delay`` waits for the next tile; ``flushed`` makes the last one behind the loop.
    """
    writer = scope.writer
    at = next(i for i, op in enumerate(stage.body) if op.name == "for_tiles")
    loop, epilogue = stage.body[at], stage.body[at + 1 :]
    variable, size = loop.args[0], int(loop["tile"][0])
    length = scope.program.constant(loop["extent"][0])
    assert length is not None
    steps = -(-length // size)
    notify = next((op for op in epilogue if op.name == "notify" and op.get("delay")), None)
    turn, pending = scope.fresh(f"{variable.name}_at"), scope.fresh("pending")
    if notify is not None:
        body.plain_notify(scope.program, notify)
        if not notify.get("drain"):
            raise refuse(notify, "a notify that is held back and drains nothing")
    writer.line(f"q = {worker} - {step}")
    writer.line(f"{turn} = tl.full((), {steps - 1}, tl.int32)")
    if notify is not None:
        writer.line(f"{pending} = tl.full((), -1, tl.int32)")
    for name in _decoded(scope, stage):
        writer.let(name, "0")
    first = len(writer.lines)
    body.ops(scope, stage.body[:at])
    body.carry_in(scope, loop, 0)
    begin = [line.strip() for line in writer.lines[first:]]
    first_one = worker if worker.endswith(")") else f"({worker})"
    turns = scope.fresh("steps")
    writer.line(f"{turns} = tl.cdiv({count} - {first_one}, {step}) * {steps}")
    with writer.block(f"for _ in tl.range(0, {turns}, num_stages={scope.stages}):"):
        writer.line(f"{turn} = tl.where({turn} == {steps - 1}, 0, {turn} + 1)")
        with writer.block(f"if {turn} == 0:"):
            writer.line(f"q += {step}")
            decode(scope, stage, stage.args, Walk.of(stage), "q")
        place_tile(scope, variable, turn, f"{turn} * {size}", size, loop["extent"][0])
        body.loop_body(scope, loop)
        with writer.block(f"if {turn} == {steps - 1}:"):
            if notify is not None:
                _release(scope, pending, notify)
            body.ops(scope, tuple(op for op in epilogue if op is not notify))
            if notify is not None:
                assert notify.ref is not None
                index = body.element(notify, notify.ref.index)
                word = body.word(scope, notify, notify.symbol, index)
                writer.line(f"{pending} = {word}")
            for line in begin:
                writer.line(line)
    if notify is not None and flushed:
        _release(scope, pending, notify)
    scope.dims.pop(variable.name, None)


def _release(scope: Scope, pending: str, notify: Op) -> None:
    """The last tile's notify, held back until its stores have long completed."""
    args = ["ctx", pending, *body.reach(notify)]
    scope.writer.call("device.delayed_tile_notify(", args)


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
