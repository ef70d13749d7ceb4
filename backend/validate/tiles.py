"""Operations on tiles of numbers, as far as it matters where their content comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tilelink.backend.validate.layout import Misfit
from tilelink.backend.validate.values import Data, Flow, Ints, Key, Mask


def shared(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The common shape of two tiles, as in NumPy."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    if any(x != y and 1 not in (x, y) for x, y in zip(left, right, strict=True)):
        raise Misfit(f"tiles of shapes {tuple(a)} and {tuple(b)} together")
    return tuple(max(x, y) for x, y in zip(left, right, strict=True))


def lifted(data: Data, shape: tuple[int, ...]) -> Data:
    """``data`` broadcast to ``shape``: an axis that is repeated follows no axis of a region."""
    lead = len(shape) - len(data.shape)

    def axes(flow: Flow) -> tuple[int, ...]:
        own = tuple(
            a if size == shape[lead + n] else -1
            for n, (a, size) in enumerate(zip(flow.axes, data.shape, strict=True))
        )
        return (-1,) * lead + own

    return mapped(data, shape, axes)


def mapped(data: Data, shape: tuple[int, ...], axes: Callable[[Flow], tuple[int, ...]]) -> Data:
    """``data`` in another shape, with the axes that ``axes`` gives each flow."""
    flows = {key: replace(flow, axes=axes(flow)) for key, flow in data.flows.items()}
    return Data(shape, flows, data.terms, data.form)


def merged(parts: Sequence[Data], shape: tuple[int, ...], on: Mask, *, once: bool) -> Data:
    """A tile that all ``parts`` flow into. ``once``: a region that flows in twice is refused."""
    flows: dict[Key, Flow] = {}
    for part in parts:
        if part.form:
            raise Misfit("arithmetic on a tile that is being split")
        for key, flow in part.flows.items():
            held = flows.get(key)
            flows[key] = flow if held is None else _union(held, flow, on, once)
    return Data(shape, flows)


def _union(a: Flow, b: Flow, on: Mask, once: bool) -> Flow:
    if a.axes != b.axes:
        # The same load along other axes: nothing can be said of places any more.
        axes = tuple(x if x == y else -1 for x, y in zip(a.axes, b.axes, strict=False))
        a, b = replace(a, axes=axes), replace(b, axes=axes)
    both = a.have & b.have
    apart = (a.lo != b.lo) | (a.hi != b.hi)
    count = apart.sum(axis=1)
    follows = (count == 1) & ((a.hi == b.lo) | ~apart).all(axis=1) & (a.home == b.home)
    same = (count == 0) & (a.home == b.home)
    inside = both & on
    if np.any(inside & ~follows & ~same):
        raise Misfit(f"parts of @{a.symbol} that do not follow one another flow into one tile")
    if once and np.any(inside & same):
        raise Misfit(f"a part of @{a.symbol} is added twice")
    grown = np.where((both & follows)[:, None], b.hi, a.hi)
    only = (~a.have)[:, None]
    return Flow(
        a.symbol,
        a.have | b.have,
        np.where(a.have, a.home, b.home),
        np.where(only, b.lo, a.lo),
        np.where(only, b.hi, grown),
        a.axes,
    )


def product(a: Data, b: Data, acc: Data | None, on: Mask) -> Data:
    """``dot``: rows of ``a``, columns of ``b``; what is summed over must be the same on both sides."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise Misfit(f"a product of tiles of shapes {a.shape} and {b.shape}")
    shape = (a.shape[0], b.shape[1])
    if acc is not None and acc.shape != shape:
        raise Misfit(f"a product of shape {shape} added to a tile of shape {acc.shape}")
    for one in a.flows.values():
        for two in b.flows.values():
            i, j = one.axes[1], two.axes[0]
            if i < 0 or j < 0:
                continue
            both = one.have & two.have & on
            wrong = (one.hi[:, i] - one.lo[:, i]) != (two.hi[:, j] - two.lo[:, j])
            wrong |= one.lo[:, i] != two.lo[:, j]
            if np.any(both & wrong):
                raise Misfit(
                    f"a product of parts of @{one.symbol} and @{two.symbol} that do not belong together"
                )
    left = mapped(a, shape, lambda f: (f.axes[0], -1))
    right = mapped(b, shape, lambda f: (-1, f.axes[1]))
    parts = [replace(left, terms=None), replace(right, terms=None)]
    if acc is not None:
        parts.insert(0, acc)
    return merged(parts, shape, on, once=True)


def limited(flow: Flow, limits: Sequence[Ints]) -> Flow:
    """What of a region reaches the first ``limits`` elements of the tile along each of its axes."""
    hi = flow.hi.copy()
    for axis, limit in zip(flow.axes, limits, strict=False):
        if axis >= 0:
            hi[:, axis] = np.minimum(hi[:, axis], flow.lo[:, axis] + limit)
    return replace(flow, hi=hi)


def halves(data: Data) -> tuple[Data, Data]:
    """The left and the right half of a tile's columns."""
    rows, width = data.shape
    half = width // 2
    low: dict[Key, Flow] = {}
    high: dict[Key, Flow] = {}
    for key, flow in data.flows.items():
        axis = flow.axes[1]
        if axis < 0:
            low[key] = high[key] = flow
            continue
        middle = flow.lo[:, axis] + half
        low[key] = _cut(flow, axis, flow.lo[:, axis], np.minimum(flow.hi[:, axis], middle))
        high[key] = _cut(flow, axis, middle, np.maximum(flow.hi[:, axis], middle))
    kind = data.rounded
    return Data((rows, half), low, rounded=kind), Data((rows, half), high, rounded=kind)


def _cut(flow: Flow, axis: int, lo: Ints, hi: Ints) -> Flow:
    first, last = flow.lo.copy(), flow.hi.copy()
    first[:, axis], last[:, axis] = lo, hi
    return replace(flow, lo=first, hi=last)
