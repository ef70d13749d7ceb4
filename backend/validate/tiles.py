"""Operations on tiles of numbers, as far as it matters where their content comes from."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

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


Site: TypeAlias = tuple[int, int, str]  # a key without its part


def merged(
    parts: Sequence[Data], shape: tuple[int, ...], on: Mask, loose: Container[Site] = ()
) -> Data:
    """A tile that all ``parts`` flow into. ``loose``: loads whose turns may come in any order here."""
    flows: dict[Key, Flow] = {}
    for part in parts:
        if part.form:
            raise Misfit("arithmetic on a tile that is being split")
        for key, flow in part.flows.items():
            gather(flows, key, flow, on, key[:3] in loose)
    return Data(shape, flows)


def gather(flows: dict[Key, Flow], key: Key, flow: Flow, on: Mask, loose: bool) -> None:
    """Adds a region to what flows in from the same load.

    What it holds, is held by or continues becomes one box with it. With ``loose``, where the tile does not follow
    the axis (a sum has been taken over it), boxes may come in any order and lie apart: then each is a part of
    its own. In lanes of ``on`` any other two regions are refused. What flows in along other axes stays apart, so
    that places are known where one of two operands follows them; see :func:`collapsed`.
    """
    parts = [part for part in _parts(flows, key) if flows[part].axes == flow.axes]
    axes = flow.axes
    summed = np.ones(flow.lo.shape[1], dtype=bool)
    summed[[axis for axis in axes if axis >= 0]] = False
    lo, hi, left = flow.lo, flow.hi, flow.have
    grown = True
    while grown:
        grown = False
        for part in parts:
            held_flow = flows[part]
            meets = left & held_flow.have
            if not meets.any():
                continue
            first, last = held_flow.lo, held_flow.hi
            apart = (first != lo) | (last != hi)
            count = apart.sum(axis=1)
            over = (~apart | summed).all(axis=1)
            equal = count == 0
            holds = equal | (over & ((first <= lo) & (hi <= last)).all(axis=1))
            held_by = over & ((lo <= first) & (last <= hi)).all(axis=1)
            follows = (count == 1) & ((last == lo) | ~apart).all(axis=1)
            leads = over & (count == 1) & ((hi == first) | ~apart).all(axis=1)
            clear = over & ((last <= lo) | (hi <= first)).any(axis=1)
            home = held_flow.home == flow.home
            known = (holds | held_by | follows | ((leads | clear) & loose)) & home
            if (meets & on & ~known).any():
                raise Misfit(
                    f"parts of @{flow.symbol} that do not follow one another flow into one tile"
                )
            joined = meets & home & (holds | held_by | follows | leads)
            if not joined.any():
                continue
            # The box that both make; it may continue another part in turn.
            wide = joined[:, None]
            more = (joined & (follows | leads)).any()
            lo = np.where(wide, np.minimum(lo, first), lo)
            hi = np.where(wide, np.maximum(hi, last), hi)
            flows[part] = replace(held_flow, have=held_flow.have & ~joined)
            grown = grown or bool(more)
    _keep(flows, key, replace(flow, lo=lo, hi=hi))


def _parts(flows: Mapping[Key, Flow], key: Key) -> list[Key]:
    found: list[Key] = []
    while (*key[:3], len(found)) in flows:
        found.append((*key[:3], len(found)))
    return found


def _keep(flows: dict[Key, Flow], key: Key, flow: Flow) -> None:
    """Puts a region into the first part that is free in each lane."""
    left = flow.have
    for part in _parts(flows, key):
        held = flows[part]
        if held.axes != flow.axes:
            continue
        free = left & ~held.have
        wide = free[:, None]
        flows[part] = Flow(
            held.symbol,
            held.have | free,
            np.where(free, flow.home, held.home),
            np.where(wide, flow.lo, held.lo),
            np.where(wide, flow.hi, held.hi),
            held.axes,
        )
        left = left & ~free
    parts = _parts(flows, key)
    if left.any() or not parts:
        flows[(*key[:3], len(parts))] = replace(flow, have=left)


def collapsed(
    flows: Mapping[Key, Flow], on: Mask, loose: Container[Site] = ()
) -> Mapping[Key, Flow]:
    """The same regions, each once: of a load that flows in along several axes no place is known any more."""
    axes: dict[Site, tuple[int, ...]] = {}
    several = False
    for key, flow in flows.items():
        held = axes.setdefault(key[:3], flow.axes)
        several = several or held != flow.axes
        axes[key[:3]] = tuple(x if x == y else -1 for x, y in zip(held, flow.axes, strict=False))
    if not several:
        return flows
    found: dict[Key, Flow] = {}
    for key, flow in flows.items():
        gather(found, key, replace(flow, axes=axes[key[:3]]), on, key[:3] in loose)
    return found


def _fresh(flows: Mapping[Key, Flow], key: Key, flow: Flow) -> Mask:
    """The lanes in which a region shares nothing with what has come from the same load."""
    found = flow.have
    for part in _parts(flows, key):
        held = flows[part]
        shared_ = ((held.lo < flow.hi) & (flow.lo < held.hi)).all(axis=1)
        found = found & ~(held.have & (held.home == flow.home) & shared_)
    return found


Pairs: TypeAlias = Callable[[Key, Flow, int, Key, Flow, int, Mask], bool]


def product(
    a: Data,
    b: Data,
    acc: Data | None,
    on: Mask,
    later: Pairs | None = None,
    loose: Container[Site] = (),
) -> Data:
    """``dot``: rows of ``a``, columns of ``b``; what is summed over must be the same on both sides.

    ``later`` may take two regions and the axes that are summed over, to compare their places when they are known;
    it says whether it did.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise Misfit(f"a product of tiles of shapes {a.shape} and {b.shape}")
    shape = (a.shape[0], b.shape[1])
    if acc is not None and acc.shape != shape:
        raise Misfit(f"a product of shape {shape} added to a tile of shape {acc.shape}")
    for left_key, one in a.flows.items():
        for right_key, two in b.flows.items():
            i, j = one.axes[1], two.axes[0]
            if i < 0 or j < 0:
                continue
            both = one.have & two.have & on
            wrong = (one.hi[:, i] - one.lo[:, i]) != (two.hi[:, j] - two.lo[:, j])
            if later is None or not later(left_key, one, i, right_key, two, j, both):
                wrong |= one.lo[:, i] != two.lo[:, j]
            if (both & wrong).any():
                raise Misfit(
                    f"a product of parts of @{one.symbol} and @{two.symbol} that do not belong together"
                )
    if acc is not None:
        _once(a, b, acc, on)
    left = mapped(a, shape, lambda f: (f.axes[0], -1))
    right = mapped(b, shape, lambda f: (-1, f.axes[1]))
    parts = [replace(left, terms=None), replace(right, terms=None)]
    if acc is None:
        return merged(parts, shape, on, loose)
    for part, crossed in zip(parts, (1, 0), strict=True):
        for key, flow in part.flows.items():
            for held in (acc.flows[k] for k in _parts(acc.flows, key)):
                # Along the columns of the left operand, or the rows of the right one, nothing varies.
                if held.axes[crossed] >= 0 and (held.have & flow.have & on).any():
                    raise Misfit(f"parts of @{flow.symbol} are added along other axes than before")
    return merged([acc, *parts], shape, on, loose)


def _once(a: Data, b: Data, acc: Data, on: Mask) -> None:
    """Refuses a product that has been added before.

    What is summed over must be new in an operand that has been loaded. In one that was computed, with which the
    sum so far may have been scaled, it may be known, if it is new in the other one. What does not follow that
    axis comes again in each product.
    """
    lanes = len(on)
    added, new = np.zeros(lanes, dtype=bool), np.zeros(lanes, dtype=bool)
    for tile, axis in ((a, 1), (b, 0)):
        along = {key: flow for key, flow in tile.flows.items() if flow.axes[axis] >= 0}
        for key, flow in (along or tile.flows).items():
            fresh = _fresh(acc.flows, key, flow)
            if tile.terms is not None and (on & flow.have & ~fresh).any():
                raise Misfit(f"a part of @{flow.symbol} is added twice")
            added, new = added | flow.have, new | fresh
    if (on & added & ~new).any():
        raise Misfit("a product of the same parts is added twice")


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
