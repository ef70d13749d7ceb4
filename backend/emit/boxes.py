"""A ``launch`` that copies alone, as a Gluon kernel: boxes of a tile go through shared memory, loaded once.

The text of queues, decoding, waits and notifies is that of the Triton emitter; loads and stores are those of
:mod:`tilelink.device.boxes`.
"""

from __future__ import annotations

from tilelink.backend.emit import access, body
from tilelink.backend.emit.kernel import Kernel, heading, leave, parameters_of
from tilelink.backend.emit.loops import Walk, decode, total
from tilelink.backend.emit.scope import ANOTHER_SCHEDULE, Program, Scope, item_bytes, origin, refuse
from tilelink.backend.emit.text import Writer
from tilelink.ir import Op

BOX_COLUMNS = 128  # 16-bit elements of a box along a row: two lines of shared memory
ROOM = 200 * 1024  # bytes of shared memory that a tile may take


class Boxes:
    """Writes the stages of one launch."""

    def __init__(self, program: Program, launch: Op) -> None:
        self.scope = scope = Scope(program, Writer(), warps=int(launch["warps"]))
        scope.used |= {"ctx", "arena", "peers", "rank", "token", "q", "room", "landed", "turn"}
        scope.over = {"load": self._load, "store": self._store}
        scope.writer.depth = 1
        self.shared: list[str] = []
        self.block: tuple[int, ...] = ()
        (stage,) = (op for op in launch.body if op.name == "stage")
        self._stage(stage)

    def _stage(self, stage: Op) -> None:
        scope, writer = self.scope, self.scope.writer
        writer.line("turn = 0")
        writer.line()
        title = stage.symbol if stage.ref is not None else "stage"
        writer.line(f"# Stage {title}.{origin(stage.span).replace('  # ', ' ')}")
        count = total(scope, stage, stage.args, Walk.of(stage))
        with writer.block(f"for q in tl.range(tl.program_id(0), {count}, tl.num_programs(0)):"):
            scope.tokens.clear()
            scope.tile = "q"
            decode(scope, stage, stage.args, Walk.of(stage), "q")
            if any(op.name == "wait" for op in stage.walk()):
                writer.line("token = 0")
                scope.tokens.append("token")
            body.ops(scope, stage.body)
            writer.line("turn += 1")
        scope.tile = "0"

    def _box(self, op: Op, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """The box of a descriptor for a tile of ``shape``, as many of which make the tile."""
        columns = min(shape[1], BOX_COLUMNS * 2 // item_bytes(dtype))
        if len(shape) != 2 or shape[1] % columns:
            raise refuse(op, f"a copy of a tile of shape {shape} in boxes", ANOTHER_SCHEDULE)
        return shape[0], columns

    def _load(self, scope: Scope, op: Op) -> None:
        assert op.ref is not None
        shape, dtype = scope.blocks(op.results[0].type), op.results[0].type.dtype
        block = self._box(op, shape, dtype)
        place = access.corner(scope, op, op.ref)
        if op.get("via") != "tma" or op.get("own") is not None or place is None or self.block:
            raise refuse(op, "a copy of boxes of another form than TMA's")
        count = shape[1] // block[1]
        if count * block[0] * block[1] * item_bytes(dtype) > ROOM:
            detail = f"a copy of a tile of shape {shape}: shared memory does not hold it"
            raise refuse(op, detail, ANOTHER_SCHEDULE)
        self.block = block
        name = access.descriptor(scope, op.symbol, block)
        self.shared = [f"room = boxes.room({name}, {count})", f"landed = boxes.landing({count})"]
        scope.names[op.results[0].name] = "room"
        scope.writer.call("boxes.load(", [name, *place, "room", "landed"])

    def _store(self, scope: Scope, op: Op) -> None:
        assert op.ref is not None
        place = access.corner(scope, op, op.ref)
        if op.get("via") != "tma" or op.get("peer") is None or place is None or not self.block:
            raise refuse(op, "a copy of boxes of another form than TMA's")
        peers = range(scope.program.world)
        names = [access.descriptor(scope, op.symbol, self.block, p) for p in peers]
        several = f"({', '.join(names)}{',' * (len(names) == 1)})"
        args = [several, scope.expr(op["peer"]), *place, "room", "landed", "turn"]
        scope.writer.call("boxes.send(", args)


def emit_boxes(program: Program, launch: Op, name: str, system: frozenset[str]) -> Kernel:
    """The kernel of ``launch``, which copies; ``system`` names the counters that streams wait for."""
    boxes = Boxes(program, launch)
    scope = boxes.scope
    leave(scope, program, launch, system)
    scope.writer.prune()
    parameters = parameters_of(scope)
    head = heading(scope, launch, "gluon.jit", name, parameters)
    head.lines += [f"    {line}" for line in boxes.shared] + scope.writer.lines
    return Kernel(
        name, head.text(), parameters, int(launch["workers"]), boxes.scope.warps, 1, "gluon"
    )
