"""Owner maps as arrays: which elements of an axis each rank holds, and in blocks of what length.

An owner map is an expression in ``e``, the element's index along the ``over`` axis, over extents,
``WORLD`` and integer tables. It is the rank map f_R of the tile-centric mappings of TileLink (Zheng
et al., MLSys 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tilelink.errors import Span, TilelinkError
from tilelink.frontend.mapping_errors import ConstantDivisionByZero
from tilelink.ir import Expr

IntArray = npt.NDArray[np.int64]


class OwnerRangeError(TilelinkError):
    """An owner map that names a rank outside the world."""

    code = "owner-range"
    message = "the owner of element {element} is rank {rank}, but the ranks are 0 to {last}"
    hint = "an owner map gives a rank for every element: `m / (M / WORLD)`, or `m / 64 % WORLD`"


class UnevenOwnerError(TilelinkError):
    """An owner map under which the ranks hold different numbers of elements."""

    code = "uneven-owner"
    message = "the {extent} elements are not divided evenly: the ranks own {counts}"
    hint = "every rank owns the same number of elements, so the extent is a multiple of WORLD"


def owner_array(
    owner: Expr, extent: int, world: int, names: Mapping[str, Any], span: Span | None = None
) -> IntArray:
    """The rank of every element: int64 of shape ``[extent]``, each in ``[0, world)``.

    ``names`` binds the extents and tables (integer arrays) that the map reads; ``WORLD`` and ``e``
    are bound here. Raises OwnerRangeError where a rank is out of range, ConstantDivisionByZero where
    the map divides by zero.
    """
    elements = np.arange(extent, dtype=np.int64)
    try:
        with np.errstate(divide="raise"):
            value = owner.evaluate({**names, "WORLD": world, "e": elements})
    except ArithmeticError:
        raise ConstantDivisionByZero(span) from None
    ranks: IntArray = np.broadcast_to(np.asarray(value, dtype=np.int64), (extent,))
    outside = np.flatnonzero((ranks < 0) | (ranks >= world))
    if outside.size:
        first = int(outside[0])
        raise OwnerRangeError(span, element=first, rank=int(ranks[first]), last=world - 1)
    return ranks


def shard_indices(
    owner: Expr, extent: int, world: int, names: Mapping[str, Any], span: Span | None = None
) -> list[IntArray]:
    """For each rank the global indices of its shard, increasing (int64, ``[extent / world]``).

    Raises UnevenOwnerError where the ranks own different numbers, OwnerRangeError as `owner_array`.
    """
    ranks = owner_array(owner, extent, world, names, span)
    counts = np.bincount(ranks, minlength=world)
    if extent and (counts != counts[0]).any():
        raise UnevenOwnerError(span, extent=extent, counts=", ".join(map(str, counts.tolist())))
    return [np.flatnonzero(ranks == rank).astype(np.int64) for rank in range(world)]


def uniform_block(
    owner: Expr, extent: int, world: int, names: Mapping[str, Any], span: Span | None = None
) -> int:
    """The largest L that divides ``extent`` with one owner for each block ``[i * L, (i + 1) * L)``.

    The blocks of M rows over W ranks by ``e / (M / WORLD)`` have L = M / W. An empty axis gives 1.
    """
    ranks = owner_array(owner, extent, world, names, span)
    changes = np.flatnonzero(np.diff(ranks)) + 1
    return max(1, math.gcd(extent, *map(int, changes)))
