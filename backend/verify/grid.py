"""Whether the tiles of a loop, or the tasks of a queue, are each point of their domain once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tilelink.backend.expand import Ints, Tile

# For every index of a variable the rank whose part it is, or for every rank and index whether it is of that
# rank's part; None where each rank visits all.
Ownership: TypeAlias = "Ints | npt.NDArray[np.bool_] | None"


def others(owner: Ownership, ranks: int) -> Ownership:
    """What is of other ranks' parts."""
    assert owner is not None
    if owner.ndim == 2:
        return np.logical_not(owner)
    theirs: npt.NDArray[np.bool_] = owner[None, :] != np.arange(ranks)[:, None]
    return theirs


def parts_of(tiles: Sequence[Tile], extents: Sequence[int]) -> list[Ownership]:
    """Of which indices of each variable the boxes of ``tiles`` (arrays ``[ranks, n]``) are, on each rank.

    None of a variable that the boxes of every rank walk from end to end.
    """
    found: list[Ownership] = []
    for tile, extent in zip(tiles, extents, strict=True):
        mine = np.zeros((len(tile.start), extent), dtype=np.bool_)
        for rank, (starts, stops) in enumerate(zip(tile.start, tile.stop, strict=True)):
            for lo, hi in np.unique(np.stack([starts, stops], axis=1), axis=0).tolist():
                mine[rank, max(lo, 0) : hi] = True
        found.append(None if mine.all() else mine)
    return found


def partition_fault(
    tiles: Sequence[Tile], extents: Sequence[int], owned: Sequence[Ownership]
) -> str:
    """ "" where, on each rank, the boxes of ``tiles`` (arrays ``[ranks, n]``) cover the domain once.

    The domain is the product of ``0..extent``, of an owned variable only what is the rank's own. Tiles of
    one variable must be equal or disjoint, as those of a grid are.
    """
    if not tiles:
        return ""
    ranks, count = tiles[0].start.shape
    volume = np.ones((ranks, count), dtype=np.int64)
    domain = np.ones(ranks, dtype=np.int64)
    key = np.zeros((ranks, count), dtype=np.int64)
    for tile, extent, owner in zip(tiles, extents, owned, strict=True):
        length = tile.stop - tile.start
        if ((tile.start < 0) | (tile.stop > extent) | (length <= 0)).any():
            return "leave the extents of the loop"
        volume *= length
        key = key * extent + tile.start
        if owner is None:
            domain *= extent
        else:
            for rank in range(ranks):
                mine = owner == rank if owner.ndim == 1 else owner[rank]
                before = np.concatenate([[0], np.cumsum(mine)])
                if (before[tile.stop[rank]] - before[tile.start[rank]] != length[rank]).any():
                    return "are of another rank's part"
                domain[rank] *= before[-1]
        for rank in range(ranks):
            both = np.unique(np.stack([tile.start[rank], tile.stop[rank]]), axis=1)
            if (both[0, 1:] < both[1, :-1]).any():
                return "overlap"
    if (volume.sum(axis=1) != domain).any():
        return "do not cover the loop once"
    for rank in range(ranks):
        if len(np.unique(key[rank])) != count:
            return "are visited twice"
    return ""
