"""``lay-out-memory``: byte offsets of flags, counters and buffers in the arena."""

from __future__ import annotations

from tilelink.backend.expand import bytes_of, environment
from tilelink.backend.passes.common import UnsupportedProgram
from tilelink.ir import Op, Ref
from tilelink.ir import layout as arena
from tilelink.ir.node import DECLARATIONS


def lay_out_memory(program: Op) -> Op:
    """Give every flag, counter and buffer its place; drop what nothing uses.

    Before::

        buffer @A.all {dims = [M, K], dtype = "bf16", space = "symmetric"}

    After::

        buffer @A.all {dims = [M, K], dtype = "bf16", offset = 262144, space = "symmetric"}

    The program's ``bytes`` attribute is the arena that it needs, ``workspace`` the local memory beside
    it: what no peer writes lies apart, so that the next program's pushes cannot reach it. Places in an
    arena of slots are those of even calls. Buffers of words lie in areas of their own, one an encoding; of words
    that hold epochs they take twice their size.
    Invariant: places do not overlap and each kind stays in its area.
    """
    env = environment(program)
    used = _used(program)
    flags, counters, data, workspace = arena.FLAGS, arena.COUNTERS, arena.DATA, 0
    words = {kind: encoding.area for kind, encoding in arena.ENCODINGS.items()}
    ops: list[Op] = []
    for op in program.body:
        if op.name == "tensor" and op["role"] == "temp":
            continue
        if op.name in ("flag", "counter", "buffer"):
            if op.symbol not in used:
                continue
            if op.get("alias") is not None:
                ops.append(op)
                continue
            size = bytes_of(op, env)
            if op.name == "flag" and op.get("offset") is None:
                op, flags = op.with_attrs(offset=flags), flags + _round(size, 64)
            elif op.name == "counter":
                op, counters = op.with_attrs(offset=counters), counters + _round(size, 64)
            elif op.name == "buffer" and op["space"] == "local":
                op, workspace = (
                    op.with_attrs(offset=workspace),
                    workspace + _round(size, arena.ALIGN),
                )
            elif op.name == "buffer" and op.get("words"):
                kind = op["words"]
                op, words[kind] = (
                    op.with_attrs(offset=words[kind]),
                    words[kind] + _round(size, arena.ALIGN),
                )
            elif op.name == "buffer":
                op, data = op.with_attrs(offset=data), data + _round(size, arena.ALIGN)
        ops.append(op)
    if flags > arena.FLAGS + arena.FLAG_BYTES or counters > arena.COUNTERS + arena.COUNTER_BYTES:
        raise UnsupportedProgram(
            detail="the program needs more flags than an arena has",
            help="use fewer channels in the schedule",
        )
    if program.get("slots") is not None:
        if flags > arena.FLAGS + arena.SLOT_FLAGS or data > arena.SLOT_BYTES:
            raise UnsupportedProgram(
                detail=f"{data - arena.DATA} bytes of buffers do not fit a slot of "
                f"{arena.SLOT_BYTES - arena.DATA}",
                help="use `slots = 1` in the schedule",
            )
        data += arena.SLOT_BYTES
        for kind, (_, area, slot) in arena.ENCODINGS.items():
            if words[kind] > area + slot:
                raise UnsupportedProgram(
                    detail=f"{words[kind] - area} bytes of words do not fit a slot of {slot}",
                    help='use `signal = "flag"` in the schedule, or two shots',
                )
            if words[kind] > area:
                data = words[kind] + slot
    return program.with_ops(tuple(ops)).with_attrs(bytes=data, workspace=workspace or None)


def _round(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _used(program: Op) -> set[str]:
    """Symbols that some op outside the declarations refers to."""
    found: set[str] = set()
    for top in program.body:
        if top.name in DECLARATIONS:
            continue
        for op in top.walk():
            if op.ref is not None:
                found.add(op.ref.symbol)
            found |= {value.symbol for _, value in op.attrs if isinstance(value, Ref)}
    return found
