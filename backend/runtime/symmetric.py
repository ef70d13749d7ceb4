"""Tensors of users in symmetric memory: what kernels written by hand reach on other ranks.

Memory is taken in blocks that every rank maps, and given back with all else that is kept for a group, by
`tilelink.release` alone: a tensor of another rank's memory does not hold it. Kernels of this package do not need
it: they push from any tensor, and read the rank's own shard where it lies.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilelink import knobs
from tilelink.backend.runtime import release
from tilelink.backend.runtime.arena import Arena, CudaState, state_of
from tilelink.backend.runtime.errors import BadArgument
from tilelink.backend.runtime.views import lasting

ALIGN = 1024  # bytes between tensors: what TMA and wide accesses ask for, and more


class Blocks:
    """The symmetric memory of one process group: blocks of it, the last one filled up to ``used`` bytes."""

    def __init__(self, state: CudaState) -> None:
        self.state = state
        self.blocks: list[Arena] = []
        self.used = 0

    def take(self, size: int) -> tuple[Arena, int]:
        """A block with ``size`` bytes left, the same on every rank, and where they begin; collective."""
        if not self.blocks or self.used + size > self.blocks[-1].size:
            least = knobs.ARENA_MB.get() << 20
            self.blocks.append(self.state.block(max(least, _up(size))))
            self.used = 0
        start, self.used = self.used, self.used + _up(size)
        return self.blocks[-1], start

    def find(self, tensor: torch.Tensor) -> tuple[Arena, int] | None:
        """The block that a tensor begins in, and where; None where it is in none."""
        for block in self.blocks:
            start = tensor.data_ptr() - block.addresses[self.state.rank]
            if start >= 0 and start + tensor.nbytes <= block.size:
                return block, start
        return None


_blocks: dict[int, Blocks] = {}


def _forget(state: Any) -> None:
    _blocks.pop(id(state), None)


release.forgetting.append(_forget)


def _blocks_of(state: CudaState) -> Blocks:
    found = _blocks.get(id(state))
    if found is None:
        found = _blocks[id(state)] = Blocks(state)
    return found


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, group: Any = None) -> torch.Tensor:
    """A tensor that the other ranks of ``group`` can reach: at the same place in memory that all of them map.

    Contiguous, on the current device, not initialised, kept until :func:`tilelink.release` of the group.
    Collective: every rank of the group (None: the default one) calls it, in the same order, with the same
    ``shape`` and ``dtype``. :func:`peers` gives the tensors of all ranks. A kernel takes it like any other tensor.

    Errors: BadArgument for a shape that is none, AgreementError where ranks ask for different tensors or one has
    no memory for its own (OutOfMemory there), Unavailable without a GPU.
    """
    if not all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in shape):
        raise BadArgument(
            name="shape", detail=f"is {list(shape)}", help="give whole numbers: empty(1024, 4096)"
        )
    state = state_of(group)
    state.check_usable()
    facts = {"shapes": str(list(shape)), "dtypes": str(dtype)}
    state.agree("tilelink.empty", facts, None)
    size = math.prod(shape) * dtype.itemsize
    block, start = _blocks_of(state).take(size)
    state.held = True
    return _view(block, state.rank, start, shape, dtype)


def peers(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The tensor of each rank that lies where ``tensor``, one of :func:`empty` or a part of it, lies here.

    Element r is that of rank r, mapped by this process; this rank's own is ``tensor`` again. Their addresses are
    what the functions of `tilelink.device` take as memory of a peer. Whoever reads or writes them orders that
    with the other rank, by signals of their own.

    Errors: BadArgument where ``tensor`` is not in symmetric memory of the group, or not contiguous.
    """
    state = state_of(group)
    found = _blocks_of(state).find(tensor)
    if found is None or not tensor.is_contiguous():
        raise BadArgument(
            name="tensor",
            detail="is not in symmetric memory of this group" if found is None else "has gaps",
            help="make it with tilelink.empty(…), of the same group, on every rank",
        )
    block, start = found
    return [_view(block, rank, start, tensor.shape, tensor.dtype) for rank in range(state.world)]


@lasting()
def _view(
    block: Arena, rank: int, start: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    return block.views[rank][start : start + size].view(dtype).view(shape)
