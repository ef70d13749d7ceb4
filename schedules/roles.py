"""Which tiles two groups of warps can share: limits of kernels whose warps have roles."""

from __future__ import annotations

GROUP_ROWS = 64  # rows of a tile that a warp group multiplies at a time
GROUP_FP32 = 128 * 128  # accumulators that the registers of one warp group hold
PRODUCT_WARPS = 8  # two warp groups multiply
LEAST_ROOM = 32  # columns of the narrowest piece in which a group's tile leaves
TURNS, HALVES = "turns", "halves"


def roles_of(rows: int, columns: int, sums: int) -> str | None:
    """``turns`` where a group's registers hold a tile's ``sums`` products, ``halves`` where those of two do.

    None where neither does.
    """
    held = rows * columns * sums
    if rows % GROUP_ROWS == 0 and held <= GROUP_FP32:
        return TURNS
    return HALVES if rows % (2 * GROUP_ROWS) == 0 and held <= 2 * GROUP_FP32 else None


def room_bytes(rows: int, roles: str, item: int) -> int:
    """Bytes of shared memory by way of which the tiles of both groups leave, at least."""
    return 2 * (rows // 2 if roles == HALVES else rows) * LEAST_ROOM * item
