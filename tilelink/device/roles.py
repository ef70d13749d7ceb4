"""Roles of a warp-specialised Gluon kernel: a ring of shared memory between loader and product warps.

A *step* is one turn of the main loop; the worker numbers its steps from 0, over all of its tiles. The
loader fills step after step, each into slot ``step % slots``; the warps that multiply take the steps in
the same order and give each back once they have read it. An mbarrier tells two phases apart, not more,
so each side may be at most one lap behind the other: the loader is held back by the slots that were not
given back, and warps that take turns at the ring wait for their turn. Parts of sums may have a second ring, with
steps and turns of its own, which a fetcher fills: the steps of the worker's tiles that add parts, in their order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tilelink.device import keys
from tilelink.device.data import remote_tile, sum_type, tile_sum_parts, tile_sum_remote
from tilelink.device.signal import (
    counted_tile_notify,
    drain_tma_stores,
    peer_tile_notify,
    producer_tile_notify,
)


class Ring(NamedTuple):
    """``full`` and ``free`` are mbarriers, one a slot; ``slots`` is a constant."""

    full: object
    free: object
    slots: object


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(count):
        mbarrier.init(made.index(number), count=arrivals)
    return made


@gluon.jit
def ring(slots: gl.constexpr, readers: gl.constexpr):
    """A ring of ``slots`` slots, each of which ``readers`` roles take and give back in every lap."""
    return Ring(_barriers(slots, 1), _barriers(slots, readers), slots)


@gluon.jit
def turns():
    """Turns of two roles that take steps from one ring: one reads a tile's steps, then the other."""
    return _barriers(2, 1)


@gluon.jit
def claim(ring, step, bytes: gl.constexpr):
    """Wait until the slot of ``step`` is free; its loads are ``bytes`` together. Returns the slot."""
    slot = step % ring.slots
    mbarrier.wait(ring.free.index(slot), ((step // ring.slots) & 1) ^ 1)
    mbarrier.expect(ring.full.index(slot), bytes)
    return slot


@gluon.jit
def fetch(ring, slot, descriptor, row, column, tiles):
    """Load the box at (``row``, ``column``) of ``descriptor`` into ``tiles[slot]`` through TMA."""
    barrier = ring.full.index(slot)
    tma.async_copy_global_to_shared(descriptor, [row, column], barrier, tiles.index(slot))


@gluon.jit
def fetch_parts(
    ring, step, parts, rows: gl.constexpr, row, column, tiles, rank, world: gl.constexpr
):
    """Load a box of the part of every other rank, in rank order, into steps of their own from ``step`` on.

    ``parts``: descriptor of the parts of all ranks, one below the other, ``rows`` each. ``row``, ``column``:
    where the box lies in each of them. Takes ``world - 1`` steps; :func:`sum_landed` takes them.
    """
    for number in tl.static_range(world - 1):
        source = tl.where(rank <= number, number + 1, number)
        slot = claim(
            ring, step + number, tiles.dtype.primitive_bitwidth // 8 * parts.block_type.numel
        )
        fetch(ring, slot, parts, source * rows + row, column, tiles)


@gluon.jit
def fetch_remote(ring, step, parts, row, column, tiles, rank, world: gl.constexpr):
    """:func:`fetch_parts` of parts that lie at the same place of every rank's arena: loads over the link.

    ``parts``: a descriptor a rank, of its arena. Each is named where it is used, as :func:`send` does.
    """
    for number in tl.static_range(world - 1):
        slot = claim(
            ring, step + number, tiles.dtype.primitive_bitwidth // 8 * parts[0].block_type.numel
        )
        if rank <= number:
            fetch(ring, slot, parts[number + 1], row, column, tiles)
        else:
            fetch(ring, slot, parts[number], row, column, tiles)


@gluon.jit
def take(ring, step):
    """Wait until all loads of ``step`` have landed. Returns the slot."""
    slot = step % ring.slots
    mbarrier.wait(ring.full.index(slot), (step // ring.slots) & 1)
    return slot


@gluon.jit
def give(ring, step, some=True):
    """Give back the slot of ``step``, which this role has read; nothing where ``some`` is false."""
    mbarrier.arrive(ring.free.index(step % ring.slots), count=1, pred=some)


@gluon.jit
def turn(turns, number):
    """Wait until the steps of this worker's tile before ``number`` (from 0) have all been taken."""
    mbarrier.wait(turns.index(number % 2), (number // 2 + 1 - number % 2) & 1)


@gluon.jit
def pass_turn(turns, number):
    """All steps of this worker's tile ``number`` have been taken."""
    mbarrier.arrive(turns.index((number + 1) % 2), count=1)


class Orders(NamedTuple):
    """``ring``: a ring of places in a queue, each of which both groups read; ``places``: what it holds."""

    ring: object
    places: object


# How far the loader is ahead of the slower group, in tiles that it has drawn.
ORDERS: tl.constexpr = tl.constexpr(4)
# Boxes that leave while the next ones land: of fewer, the link waits for shared memory.
LEAVING: tl.constexpr = tl.constexpr(2)


@gluon.jit
def orders():
    """What the loader of a worker that copies hands to its groups: where in the queue each tile stands."""
    places = gl.allocate_shared_memory(gl.int32, [ORDERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Orders(ring(ORDERS, 2), places)


@gluon.jit
def order(orders, number, place):
    """The loader has drawn ``place`` of the queue as tile ``number`` of its worker; at last one behind the end."""
    slot = number % orders.ring.slots
    mbarrier.wait(orders.ring.free.index(slot), ((number // orders.ring.slots) & 1) ^ 1)
    orders.places.index(slot).store(
        gl.full([1], place, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    )
    mbarrier.arrive(orders.ring.full.index(slot), count=1)


@gluon.jit
def ordered(orders, number):
    """The place in the queue of tile ``number`` of this worker, as soon as it has been drawn; by both groups."""
    slot = take(orders.ring, number)
    place = gl.max(orders.places.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
    gl.thread_barrier()
    give(orders.ring, number)
    return place


@gluon.jit
def forward(descriptors, number, row, column, tile):
    """Store what lies in ``tile``, of a slot that was taken, at (``row``, ``column``) of ``descriptors[number]``.

    Every descriptor is named where it is used, as :func:`send` does.
    """
    for one in tl.static_range(len(descriptors)):
        if number == one:
            tma.async_copy_shared_to_global(descriptors[one], [row, column], tile)


@gluon.jit
def forwarded(ring, step, first, stores: gl.constexpr):
    """What lies in the slot of ``step`` is on its way, by ``stores`` stores: give back that of ``LEAVING`` before.

    Its stores have been read from shared memory then. ``first`` is the tile's first step.
    """
    tma.store_wait(pendings=LEAVING * stores)
    gl.thread_barrier()  # whichever thread has asked for the stores
    give(ring, step - LEAVING, step - LEAVING >= first)


@gluon.jit
def all_forwarded(ring, step, first):
    """Behind the last box of a tile, of steps from ``first`` up to ``step``: give back what is left."""
    tma.store_wait(pendings=0)
    gl.thread_barrier()
    for back in tl.static_range(LEAVING):
        give(ring, step - LEAVING + back, step - LEAVING + back >= first)


@gluon.jit
def pair():
    """Where two roles meet that each have half of a tile."""
    return _barriers(1, 2)


@gluon.jit
def meet(pair, number):
    """Wait until both roles have come here; ``number`` counts the meetings of a worker from 0.

    What either did before, the other may release behind it.
    """
    mbarrier.arrive(pair.index(0), count=1)
    mbarrier.wait(pair.index(0), number & 1)


@gluon.jit
def delayed_tile_notify(ctx, pending, system: gl.constexpr = False):
    """Release: ``device.producer_tile_notify`` of the counter ``pending`` for this role's tile before.

    Nothing if ``pending`` is negative. The tile's TMA stores have completed behind it, not only been
    read; a tile later there is nothing left to wait for. The barrier is the role's own.
    """
    if pending >= 0:
        drain_tma_stores()
        producer_tile_notify(ctx, pending, system)


@gluon.jit
def delayed_peer_notify(ctx, pending, peer):
    """Release: ``device.peer_tile_notify`` of flag ``pending``; see :func:`delayed_tile_notify`."""
    if pending >= 0:
        drain_tma_stores()
        peer_tile_notify(ctx, pending, peer)


@gluon.jit
def delayed_counted_notify(ctx, pending, peer, through, count):
    """Release: ``device.counted_tile_notify`` of flag ``pending``; see :func:`delayed_tile_notify`."""
    if pending >= 0:
        drain_tma_stores()
        counted_tile_notify(ctx, pending, peer, through, count)


def descriptor_layout(block: Sequence[int], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """How a box of ``block`` elements lies in shared memory, which a descriptor of roles must say."""
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


@gluon.jit
def tiles(descriptor, count: gl.constexpr):
    """Shared memory for ``count`` boxes of ``descriptor``."""
    shape: gl.constexpr = [count] + descriptor.block_type.shape  # noqa: RUF005 - no `*` in a kernel
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.constexpr_function
def _product(columns: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def _memory(columns: int):
    # 16 bytes a thread, whole rows a warp.
    across = min(32, max(1, columns // 8))
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def full(rows: gl.constexpr, columns: gl.constexpr, value, dtype: gl.constexpr = gl.float32):
    """A tile as products leave it, every element ``value``; the role has four warps."""
    return gl.full((rows, columns), value, dtype, _product(columns))


@gluon.jit
def zeros(rows: gl.constexpr, columns: gl.constexpr):
    """Sums of products before the first: an fp32 tile of zeros; the role has four warps."""
    return gl.full((rows, columns), 0, gl.float32, _product(columns))


@gluon.jit
def row_index(rows: gl.constexpr, columns: gl.constexpr, memory: gl.constexpr = False):
    """0, 1, … along the rows of a tile, as products leave it or as ``memory`` is accessed."""
    if memory:
        return gl.arange(0, rows, gl.SliceLayout(1, _memory(columns)))
    else:
        return gl.arange(0, rows, gl.SliceLayout(1, _product(columns)))


@gluon.jit
def column_index(columns: gl.constexpr, memory: gl.constexpr = False):
    """0, 1, … along the columns of a tile, as products leave it or as ``memory`` is accessed."""
    if memory:
        return gl.arange(0, columns, gl.SliceLayout(0, _memory(columns)))
    else:
        return gl.arange(0, columns, gl.SliceLayout(0, _product(columns)))


@gluon.jit
def from_memory(value, columns: gl.constexpr):
    """A tile that was loaded by addresses, laid out as products leave it."""
    return gl.convert_layout(value, _product(columns))


@gluon.jit
def piece(value, columns: gl.constexpr):
    """Some columns of a tile of sums, laid out as products leave a tile that has no more of them."""
    return gl.convert_layout(value, _product(columns))


@gluon.jit
def to_memory(value, columns: gl.constexpr):
    """A tile laid out to be stored by addresses, 16 bytes a thread."""
    return gl.convert_layout(value, _memory(columns))


@gluon.jit
def _arrived(parts, number: gl.constexpr, step, inside, rank):
    # The part of the ``number``-th rank that is not this one.
    source = tl.where(rank <= number, number + 1, number)
    place = parts + tl.cast(source, tl.int64) * step
    if inside is None:
        return tl.load(place, eviction_policy="evict_first")
    else:
        return tl.load(place, mask=inside, other=0, eviction_policy="evict_first")


@gluon.jit
def read_parts(parts, step, inside, rank, world: gl.constexpr):
    """A tile of the parts of all other ranks, in rank order: loads that are all under way at once.

    ``parts``: pointers to the tile of rank 0's part; that of rank r lies r times ``step`` elements further.
    ``inside``: their mask, or None. :func:`add_parts` adds them up, then or after more of them were asked for.
    """
    arrived = ()
    for number in tl.static_range(world - 1):
        one = _arrived(parts, number, step, inside, rank)
        arrived = arrived + (one,)  # type: ignore[assignment]  # noqa: RUF005
    return arrived


@gluon.jit
def read_remote(
    peers,
    place,
    corner,
    offsets,
    inside,
    rank,
    world: gl.constexpr,
    aligned: gl.constexpr,
    dtype: gl.constexpr,
):
    """:func:`read_parts` of parts that each lie at the same place of the arena of the rank that made them.

    The arguments are those of ``device.tile_sum_remote``.
    """
    arrived = ()
    for number in tl.static_range(world - 1):
        source = tl.where(rank <= number, number + 1, number)
        pointers = remote_tile(peers, source, place, corner, dtype, aligned) + offsets
        if inside is None:
            one = tl.load(pointers, eviction_policy="evict_first")
        else:
            one = tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")
        arrived = arrived + (one,)  # type: ignore[assignment]  # noqa: RUF005
    return arrived


@gluon.jit
def add_parts(own, arrived, rank, world: gl.constexpr):
    """The sum over all ranks, in :func:`sum_type`, in rank order: ``own``, this rank's, and what has ``arrived``.

    They have one element type. What is not needed takes no registers: so a role sums larger pieces of a tile.
    """
    # Minus zero is what changes no first term.
    total = gl.full(own.shape, -0.0, gl.float32, own.type.layout).to(sum_type(own.dtype))
    for number in tl.static_range(world - 1):
        if rank == number:
            total += own.to(total.dtype)
        total += arrived[number].to(total.dtype)
    if rank == world - 1:
        total += own.to(total.dtype)
    return total


@gluon.jit
def sum_landed(own, ring, step, tiles, first, rank, world: gl.constexpr):
    """The sum over all ranks, in :func:`sum_type`, in rank order: ``own``, and what :func:`fetch_parts` loaded.

    Of each part this role has the rows from ``first`` on, as many as ``own`` has. Takes and gives back
    ``world - 1`` steps from ``step`` on. Laid out as products leave tiles.
    """
    layout: gl.constexpr = _product(own.shape[1])
    mine = gl.convert_layout(own, layout)
    # Minus zero is what changes no first term.
    total = gl.full(own.shape, -0.0, gl.float32, layout).to(sum_type(own.dtype))
    for number in tl.range(0, world - 1):
        if rank == number:
            total += mine.to(total.dtype)
        slot = take(ring, step + number)
        part = tiles.index(slot).slice(first, own.shape[0]).load(layout)
        # All threads have read it, before what the loader does next through the async proxy.
        fence_async_shared()
        gl.thread_barrier()
        give(ring, step + number)
        total += part.to(total.dtype)
    if rank == world - 1:
        total += mine.to(total.dtype)
    return total


@gluon.jit
def sum_parts(own, parts, step, inside, rank, world: gl.constexpr):
    """The sum over all ranks, in :func:`sum_type`: ``device.tile_sum_parts`` for a role of four warps.

    The parts of more than four ranks do not fit the registers at once beside 64 rows of 256 columns, and those
    of more than eight beside nothing that a role has.
    """
    if world > 8 or (world > 4 and own.shape[0] <= 64):
        return tile_sum_parts(own, parts, step, inside, rank, world)
    else:
        return add_parts(own, read_parts(parts, step, inside, rank, world), rank, world)


@gluon.jit
def sum_remote(
    own, peers, place, corner, offsets, inside, rank, world: gl.constexpr, aligned: gl.constexpr
):
    """The sum over all ranks, in :func:`sum_type`: ``device.tile_sum_remote`` for a role of four warps."""
    if world > 8 or (world > 4 and own.shape[0] <= 64):
        return tile_sum_remote(own, peers, place, corner, offsets, inside, rank, world, aligned)
    else:
        arrived = read_remote(
            peers, place, corner, offsets, inside, rank, world, aligned, own.dtype
        )
        return add_parts(own, arrived, rank, world)


@gluon.jit
def room(descriptor, rows: gl.constexpr, columns: gl.constexpr):
    """Shared memory by way of which tiles of two roles leave, ``rows`` x ``columns`` for each.

    It lies as a box of ``descriptor`` does, which is as large or a part of it.
    """
    return gl.allocate_shared_memory(descriptor.dtype, [2, rows, columns], descriptor.layout)


@gluon.jit
def _leave(descriptor, row, column, room):
    # From here on TMA reads the room: as one box, or box behind box.
    rows: gl.constexpr = descriptor.block_type.shape[0]
    columns: gl.constexpr = descriptor.block_type.shape[1]
    down: gl.constexpr = room.shape[0] // rows
    count: gl.constexpr = down * (room.shape[1] // columns)
    if count == 1:
        tma.async_copy_shared_to_global(descriptor, [row, column], room)
    else:
        # The columns of a box lie with all of their rows below each other.
        boxes = room._reinterpret(room.dtype, [count, rows, columns], room.layout)
        # The grid has one axis, which neither compiler knows. Turns of a constant number are written out, and
        # addresses of all boxes for all ranks do not fit the uniform registers.
        for box in tl.range(0, count, tl.num_programs(2)):
            place = [row + box % down * rows, column + box // down * columns]
            tma.async_copy_shared_to_global(descriptor, place, boxes.index(box))
            tma.store_wait(pendings=0)


@gluon.jit
def send(descriptors, number, row, column, value, room):
    """Store a tile at (``row``, ``column``) of ``descriptors[number]`` through TMA, by way of shared memory.

    A tile wider than ``room`` leaves in pieces, one behind the other. A box of the descriptors is as large as
    ``room`` or a part of it; then each box leaves when the one before has been read from shared memory, so that
    what the SM loads meanwhile does not stand behind a whole piece. What is the last to leave has been read, not
    more, when the next store of this role begins: see ``device.drain_tma_stores``.

    Every descriptor, a parameter of the kernel, is named where it is used: a choice among them beforehand
    would keep all of them in registers.
    """
    if value.shape[1] > room.shape[1]:
        wide: gl.constexpr = value.shape[1] // 2
        parts = gl.permute(gl.reshape(value, (value.shape[0], 2, wide)), (0, 2, 1))
        low, high = gl.split(parts)
        send(descriptors, number, row, column, low, room)
        send(descriptors, number, row, column + wide, high, room)
    else:
        tma.store_wait(pendings=0)
        gl.thread_barrier()
        room.store(value)
        fence_async_shared()
        gl.thread_barrier()
        for one in tl.static_range(len(descriptors)):
            if number == one:
                _leave(descriptors[one], row, column, room)


@gluon.jit
def store(descriptor, row, column, value, room):
    """:func:`send` by the one ``descriptor``."""
    send((descriptor,), 0, row, column, value, room)


keys.settle(sys.modules[__name__])
