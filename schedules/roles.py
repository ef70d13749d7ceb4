"""Which tiles two groups of warps can share: limits of kernels whose warps have roles."""

from __future__ import annotations

GROUP_ROWS = 64  # rows of a tile that a warp group multiplies at a time
GROUP_FP32 = 128 * 128  # accumulators that the registers of one warp group hold
PRODUCT_WARPS = 8  # two warp groups multiply
LEAST_ROOM = 32  # columns of the narrowest piece in which a group's tile leaves
# Bytes of a box in which a tile leaves for other ranks, 16 rows of 64 elements of two bytes; and of its rows, at
# most: longer ones do not lie in one piece in shared memory. An SM's TMA unit takes copies in their order, and
# stores over the link hold it up, so loads of the other group's main loop stand behind what has been asked for
# before them: a box is asked for when the one before has been read from shared memory. On four H200, GEMM +
# reduce-scatter of 8192 x 1376 x 4096 took 229.6 us with 128 rows as one box, 224.5 with 32 and 222.5 with 16,
# and 223.9 with two boxes of 16 under way (short runs, whose samples are not kept).
SENT_BYTES, SENT_ROW = 2_048, 128
SHARED_BYTES = 232_448  # of shared memory that a CTA of sm_90 can have
SHARED_RESERVE = 1_024  # of it: barriers, and what the compiler keeps beside them
# Boxes of the ring that parts of a sum land in: of fewer, the next is not under way while one is added; of more,
# parts are on their way long before they are added.
LEAST_LANDING, MOST_LANDING = 2, 6
# Boxes of what workers copy beside products that leave while the next one lands; the ring has more slots.
LEAVING = 2
TURNS, HALVES = "turns", "halves"


def roles_of(rows: int, columns: int, sums: int) -> str | None:
    """``turns`` where a group's registers hold a tile's ``sums`` products, ``halves`` where those of two do.

    None where neither does. CUTLASS calls these ping-pong and cooperative.
    """
    held = rows * columns * sums
    if rows % GROUP_ROWS == 0 and held <= GROUP_FP32:
        return TURNS
    return HALVES if rows % (2 * GROUP_ROWS) == 0 and held <= 2 * GROUP_FP32 else None


def fitting_tile(rows: int, columns: int, sums: int) -> tuple[int, int]:
    """Rows and columns of a tile that two groups can share, near to one that they cannot; powers of two."""
    rows = max(rows, GROUP_ROWS)
    while roles_of(rows, columns, sums) is None:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return rows, columns


def room_bytes(rows: int, roles: str, item: int) -> int:
    """Bytes of shared memory by way of which the tiles of both groups leave, at least."""
    return 2 * (rows // 2 if roles == HALVES else rows) * LEAST_ROOM * item


def sent_box(room: tuple[int, int], item: int) -> tuple[int, int]:
    """Rows and columns of the boxes in which a tile leaves for other ranks by way of ``room``, rows and columns.

    ``item``: bytes of an element. All are powers of two, so boxes come out even. What leaves for this rank's own
    memory is not held up, and leaves as one box.
    """
    columns = min(room[1], SENT_ROW // item)
    return min(room[0], SENT_BYTES // (columns * item)), columns


def landing_slots(
    stages: int, tile: tuple[int, int, int], sums: int, item: int, extra: int = 0
) -> int:
    """How many boxes a ring of its own has for the parts of a sum over ranks: 2 to 6, or 0 where there is none.

    It is what shared memory leaves beside a ring of ``stages`` steps of ``sums`` products, the room by way of
    which the tiles of both groups leave, and ``extra`` bytes in which tiles change their layout. The room is as
    wide as a box, or narrower where only so two boxes fit. ``tile``: rows, columns and depth of a step, of
    elements of ``item`` bytes; a box has the rows of a tile and the columns of a step. Only groups that take
    turns have such a ring.
    """
    rows, columns, depth = tile
    if roles_of(rows, columns, sums) != TURNS:
        return 0
    ring = stages * (rows * depth + sums * depth * columns) * item
    box, left = rows * depth * item, SHARED_BYTES - SHARED_RESERVE - ring - extra
    width = depth
    while width >= LEAST_ROOM:
        found = (left - 2 * rows * width * item) // box
        if found >= LEAST_LANDING:
            return min(found, MOST_LANDING)
        width //= 2
    return 0
