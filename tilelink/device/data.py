"""Pointers into arenas of peers, and copies between them."""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK = tl.constexpr(4096)


@triton.jit
def peer_pointer(peers, rank, offset, dtype: tl.constexpr):
    """A pointer to ``dtype`` at byte ``offset`` of the arena of ``rank``.

    ``peers`` is the int64 table of arena addresses, one a rank. Addresses read from memory carry no
    alignment, so it is stated here: ``offset`` must be a multiple of 16, or stores split into bytes.
    """
    address = tl.load(peers + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype), bitcast=True), 16)


@triton.jit
def pointer(arena, offset, dtype: tl.constexpr):
    """A pointer to ``dtype`` at byte ``offset`` (a multiple of 16) of this rank's ``arena`` (int32)."""
    return tl.multiple_of((arena + offset // 4).to(tl.pointer_type(dtype), bitcast=True), 16)


@triton.jit
def _copy(source, target, rows, columns, source_stride, target_stride):
    # Rows that lie one behind the other are one long row. A block is under way while the one before it
    # is stored: a worker alone moves what it has in flight, over the latency of memory.
    whole = (source_stride == columns) & (target_stride == columns)
    lines = tl.where(whole, tl.minimum(rows, 1), rows)
    width = tl.where(whole, tl.cast(rows, tl.int64) * columns, columns)
    lanes = tl.arange(0, _BLOCK)
    for row in range(0, lines):
        source_row = source + tl.cast(row, tl.int64) * source_stride
        target_row = target + tl.cast(row, tl.int64) * target_stride
        held = tl.load(source_row + lanes, mask=lanes < width)
        for start in range(0, width, _BLOCK):
            offsets = start + lanes
            following = offsets + _BLOCK
            loaded = tl.load(source_row + following, mask=following < width)
            tl.store(target_row + offsets, held, mask=offsets < width)
            held = loaded


@triton.jit
def tile_push_data(source, target, rows, columns, source_stride, target_stride):
    """Write ``rows`` x ``columns`` elements of this rank to ``target``, memory of a peer.

    Strides are in elements; one CTA copies all of it. With 8-byte elements and strides that are even
    numbers every access is 16 bytes wide. A notify must follow before the peer may read.
    """
    _copy(source, target, rows, columns, source_stride, target_stride)


@triton.jit
def tile_pull_data(source, target, rows, columns, source_stride, target_stride):
    """Read ``rows`` x ``columns`` elements from ``source``, memory of a peer, into ``target``."""
    _copy(source, target, rows, columns, source_stride, target_stride)


@triton.jit
def _part(parts, source, step, inside, rank, world: tl.constexpr):
    there = (rank != source) & (source < world)
    if inside is not None:
        there = inside & there
    place = parts + source * tl.cast(step, tl.int64)
    return tl.load(place, mask=there, other=0, eviction_policy="evict_first")


@triton.constexpr_function
def sum_type(dtype):
    """The type in which parts of ``dtype`` are added: fp32, of integers their own, in which they wrap around."""
    return dtype if dtype in (tl.int32, tl.int64) else tl.float32


@triton.jit
def tile_sum_parts(own, parts, step, inside, rank, world: tl.constexpr):
    """The sum of a tile over all ranks, as :func:`sum_type` has it: one part a rank, added in rank order.

    ``own``: the part of this rank, a tile in registers, of the element type of the others. ``parts``:
    pointers to the tile of rank 0's part; that of rank r lies r times ``step`` elements further.
    ``inside``: their mask, or None. Where the part of ``rank`` itself would lie nothing is read.
    """
    # Three parts are under way while a fourth is added; all at once would not fit the registers. Minus
    # zero is what changes no first term; written so that it lies in registers as ``own`` does.
    total = (tl.where(own == own, 0.0, 0.0) * -1.0).to(sum_type(own.dtype))
    first = _part(parts, 0, step, inside, rank, world)
    second = _part(parts, 1, step, inside, rank, world)
    third = _part(parts, 2, step, inside, rank, world)
    for source in tl.range(0, world, num_stages=1):
        fourth = _part(parts, source + 3, step, inside, rank, world)
        total += tl.where(rank == source, own, first).to(total.dtype)
        first = second
        second = third
        third = fourth
    return total


@triton.jit
def remote_tile(peers, rank, place, corner, dtype: tl.constexpr, aligned: tl.constexpr):
    """A pointer to element ``corner`` (int64) of what lies at byte ``place`` of the arena of ``rank``.

    ``aligned``: it is a multiple of 16 bytes. Loads through it go over the link unless ``rank`` is this one; a
    wait for that rank must come first.
    """
    pointer = peer_pointer(peers, rank, place, dtype) + corner
    if aligned:
        return tl.multiple_of(pointer, 16)
    else:
        return pointer


@triton.jit
def _remote_part(
    peers,
    source,
    place,
    corner,
    offsets,
    inside,
    rank,
    world: tl.constexpr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
):
    there = (rank != source) & (source < world)
    # Where nothing is read, the address is one that there is.
    known = tl.where(there, source, rank)
    if inside is not None:
        there = inside & there
    pointers = remote_tile(peers, known, place, corner, dtype, aligned) + offsets
    return tl.load(pointers, mask=there, other=0, eviction_policy="evict_first")


@triton.jit
def tile_sum_remote(
    own, peers, place, corner, offsets, inside, rank, world: tl.constexpr, aligned: tl.constexpr
):
    """:func:`tile_sum_parts` of parts that each lie at the same place of the arena of the rank that made them.

    ``peers``: the table of arenas; the tile's first element is ``corner`` elements behind byte ``place`` of each,
    its others ``offsets`` from there.
    """
    dtype: tl.constexpr = own.dtype
    total = (tl.where(own == own, 0.0, 0.0) * -1.0).to(sum_type(own.dtype))
    first = _remote_part(peers, 0, place, corner, offsets, inside, rank, world, dtype, aligned)
    second = _remote_part(peers, 1, place, corner, offsets, inside, rank, world, dtype, aligned)
    third = _remote_part(peers, 2, place, corner, offsets, inside, rank, world, dtype, aligned)
    for source in tl.range(0, world, num_stages=1):
        fourth = _remote_part(
            peers, source + 3, place, corner, offsets, inside, rank, world, dtype, aligned
        )
        total += tl.where(rank == source, own, first).to(total.dtype)
        first = second
        second = third
        third = fourth
    return total


@triton.jit
def rank_copy_data(source, target, count):
    """Copy ``count`` elements by all CTAs of the grid together, each a part of its own."""
    # In 64 bits from the start: the step behind the last element may pass 2^31 before any element does.
    step = tl.cast(tl.num_programs(0), tl.int64) * _BLOCK
    for start in range(tl.cast(tl.program_id(0), tl.int64) * _BLOCK, count, step):
        offsets = start + tl.arange(0, _BLOCK)
        inside = offsets < count
        tl.store(target + offsets, tl.load(source + offsets, mask=inside), mask=inside)
