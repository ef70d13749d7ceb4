"""Copies of tiles by way of shared memory, in Gluon: boxes that TMA loads once and stores into several ranks.

A worker copies tile after tile. All boxes of a tile are loaded at once, each behind an mbarrier of its own, and
leave as they land. The next tile's loads may begin when the stores of the last have been read from shared
memory: a worker drains them (``device.drain_tma_stores``) before it tells that they have arrived.
"""

from __future__ import annotations

import sys

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tilelink.device import keys


@gluon.jit
def room(descriptor, count: gl.constexpr):
    """Shared memory for a tile of ``count`` boxes of ``descriptor``, side by side."""
    shape: gl.constexpr = [count] + descriptor.block_type.shape  # noqa: RUF005 - no `*` in a kernel
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def landing(count: gl.constexpr):
    """One mbarrier for each box of a tile."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(count):
        mbarrier.init(made.index(number), count=1)
    return made


@gluon.jit
def load(descriptor, row, column, room, landing):
    """Begin to load the tile at (``row``, ``column``) of ``descriptor``, box by box, into ``room``."""
    count: gl.constexpr = room.shape[0]
    width: gl.constexpr = room.shape[2]
    for number in gl.static_range(count):
        mbarrier.expect(landing.index(number), descriptor.block_type.nbytes)
        place = [row, column + number * width]
        tma.async_copy_global_to_shared(
            descriptor, place, landing.index(number), room.index(number)
        )


@gluon.jit
def send(descriptors, number, row, column, room, landing, turn):
    """Store the tile in ``room`` at (``row``, ``column``) of ``descriptors[number]``, each box when it has landed.

    ``turn`` counts the tiles of this worker from 0. Every descriptor, a parameter of the kernel, is named where
    it is used: a choice among them beforehand would keep all of them in registers.
    """
    count: gl.constexpr = room.shape[0]
    width: gl.constexpr = room.shape[2]
    for box in gl.static_range(count):
        mbarrier.wait(landing.index(box), turn & 1)
        place = [row, column + box * width]
        for one in tl.static_range(len(descriptors)):
            if number == one:
                tma.async_copy_shared_to_global(descriptors[one], place, room.index(box))


keys.settle(sys.modules[__name__])
