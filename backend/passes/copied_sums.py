"""The tiles of the stage that copies the sums of all ranks into the user's tensor."""

from __future__ import annotations

import math

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import Moved, schedule_of
from tilelink.ir import DTYPES, Expr, Op

# Bytes that a thread asks for before it stores the first, of a tile that is only copied: half of its registers.
THREAD_BYTES = 512
# Half of the registers of an SM, which more than eight warps share.
WORKER_BYTES = 128 * 1024
# Bytes in words that it polls for at once.
POLLED_BYTES = 128
# Elements that a worker copies in the time in which a task sees its signal and the first of its loads.
LATENCY = 16384


def sized_copies(program: Op, info: Moved) -> Op:
    """Cut the sums of a reduce in two shots, where they are copied, into the tiles that are soonest through.

    A task waits for one channel and for its loads before it stores. So tiles are large, as far as they lie in one
    channel and in registers, and as many as the workers take in whole waves.
    """
    if info.shots != 2:
        return program

    def sized(stage: Op) -> Op:
        names = [op.name for op in stage.body]
        copies = names == ["load", "store"] and all(op.symbol == info.name for op in stage.body)
        if stage.name != "stage" or not copies or stage.body[0].get("relay"):
            return stage
        return stage.with_attrs(tile=_tile(program, info, stage))

    launches = (
        op.with_ops(tuple(map(sized, op.body))) if op.name == "launch" else op
        for op in program.body
    )
    return program.with_ops(tuple(launches))


def _tile(program: Op, info: Moved, stage: Op) -> tuple[int, ...]:
    """The tile that is soonest through: of a first and a last axis, the first one's doubled or both."""
    schedule, names = schedule_of(program), environment(program)
    first = tuple(int(n) for n in stage["tile"])
    lengths = [int(Expr.of(e).evaluate(names)) for e in stage["extent"]]
    segments = lengths[info.axis] // int(stage["segment"])
    lengths[info.axis] = int(stage["segment"])
    polled = bool(info.words)
    size = DTYPES[str(program.declared(info.name)["dtype"])]
    each = (POLLED_BYTES if polled else THREAD_BYTES) * 32 * schedule.warps
    most = min(each, WORKER_BYTES) // size

    def cost(tile: tuple[int, ...]) -> int:
        tasks = segments * math.prod(-(-n // t) for n, t in zip(lengths, tile, strict=True))
        return -(-tasks // schedule.workers) * (math.prod(tile) + LATENCY)

    limits = list(lengths)
    limits[info.along] = min(limits[info.along], info.channel_rows)
    sides = [[n] for n in first]
    sides[0] = _doubled(first[0], limits[0])
    if len(first) == 2 and not polled:
        sides[1] = _doubled(first[1], limits[1])
    found = [
        tile
        for row in sides[0]
        for column in sides[-1]
        for tile in [(row, *first[1:-1], column) if len(first) > 1 else (row,)]
        if tile == first or math.prod(tile) <= most
    ]
    return min(found, key=lambda tile: (cost(tile), -tile[-1]))


def _doubled(first: int, most: int) -> list[int]:
    """``first``, and what comes of doubling it and divides ``most``: no tile is short, or of two channels."""
    powers = (first << n for n in range(1, most.bit_length()))
    return [first, *(n for n in powers if n <= most and most % n == 0)]
