"""The flattened persistent form: one loop over tiles and steps of the main loop.

The next tile's loads are under way while the last tile is stored, which nested loops do not reach.
Only for stages that wait for nothing: Triton stops pipelining where a wait stands in such a loop.
"""

from __future__ import annotations

import re

from tilelink.backend.emit import body
from tilelink.backend.emit.loops import Walk, decode, place_tile
from tilelink.backend.emit.scope import Scope
from tilelink.backend.emit.text import Writer
from tilelink.ir import Op

_PURE = frozenset({"zeros", "full", "constant", "param"})


def can_flatten(scope: Scope, stage: Op) -> bool:
    """Whether ``stage`` asks for the flattened form and has the shape for it.

    Its body: constants, one tile loop that carries values and multiplies, then the epilogue; no waits,
    and notifies of local counters alone, in the epilogue.
    """
    if not stage.get("flatten") or stage.get("queue", "static") != "static":
        return False
    loops = [i for i, op in enumerate(stage.body) if op.name in ("for_tiles", "for_range")]
    if len(loops) != 1:
        return False
    loop, before = stage.body[loops[0]], stage.body[: loops[0]]
    extent = loop.get("extent")
    plain = loop.name == "for_tiles" and extent is not None and len(extent) == 1 and loop.results
    if not plain or loop.get("segment") is not None or any(op.name not in _PURE for op in before):
        return False
    if scope.program.constant(extent[0]) is None or any(op.blocks for op in loop.body):
        return False
    inside = list(stage.walk())[1:]
    if any(op.name in ("wait", "transfer") or op.get("own") is not None for op in inside):
        return False
    signals = [op for op in inside if op.name == "notify"]
    kept = all(
        op in stage.body
        and op.get("if") is None
        and scope.program.symbols[op.symbol].name == "counter"
        for op in signals
    )
    return kept and len(signals) <= 1 and any(op.name == "dot" for op in loop.body)


def flat_stage(
    scope: Scope, stage: Op, worker: str, step: str, count: str, system: frozenset[str]
) -> None:
    """Write ``stage`` as one loop; ``worker`` takes positions worker, worker + step, … below ``count``."""
    writer = scope.writer
    at = next(i for i, op in enumerate(stage.body) if op.name == "for_tiles")
    loop, epilogue = stage.body[at], stage.body[at + 1 :]
    variable, size = loop.args[0], int(loop["tile"][0])
    length = scope.program.constant(loop["extent"][0])
    assert length is not None
    steps = -(-length // size)
    notify = next((op for op in epilogue if op.name == "notify"), None)
    turn, pending = scope.fresh(f"{variable.name}_at"), scope.fresh("pending")
    scope.delayed = notify is not None
    writer.line(f"q = {worker} - {step}")
    writer.line(f"{turn} = tl.full((), {steps - 1}, tl.int32)")
    if notify is not None:
        writer.line(f"{pending} = tl.full((), -1, tl.int32)")
    for name in _decoded(scope, stage):
        writer.let(name, "0")
    first = len(writer.lines)
    body.ops(scope, stage.body[:at], system)
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
        body.loop_body(scope, loop, system)
        with writer.block(f"if {turn} == {steps - 1}:"):
            if notify is not None:
                _release(scope, pending, notify, system)
            body.ops(scope, tuple(op for op in epilogue if op is not notify), system)
            if notify is not None:
                assert notify.ref is not None
                index = body.element(notify, notify.ref.index)
                word = body.word(scope, notify, notify.symbol, index)
                writer.line(f"{pending} = {word}")
            for line in begin:
                writer.line(line)
    if notify is not None:
        _release(scope, pending, notify, system)
    scope.dims.pop(variable.name, None)
    scope.delayed = False


def _release(scope: Scope, pending: str, notify: Op, system: frozenset[str]) -> None:
    """The last tile's notify, held back until its stores have long completed."""
    args = ["ctx", pending] + (["True"] if notify.symbol in system else [])
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
