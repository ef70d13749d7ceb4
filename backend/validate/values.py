"""What expressions of emitted text stand for, on many workers at once.

A *lane* is one worker of one rank (in the host function: one rank). Integers are exact, one a lane.
Tiles of numbers are not computed: a tile is known by the regions of memory that flow into it. Every
array here has a first axis of lanes; ``None`` in its place stands for "the same for all".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Tokens: TypeAlias = Mapping[int, Mask]

LARGEST = (1 << 31) - 1
NONE: Tokens = {}


@dataclass(frozen=True, slots=True, eq=False)
class Num:
    """An integer a lane. ``wide``: 64 bits. ``tokens``: by wait, the lanes in which its token is a term."""

    v: Any
    wide: bool = False
    tokens: Tokens = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """Integers of a tile, affine in its indices: ``base + sum of step * index``; a step a dimension."""

    base: Any
    shape: tuple[int, ...]
    steps: tuple[Any, ...]
    wide: bool = False
    tokens: Tokens = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """A boolean tile, true below ``limit`` indices along each dimension (the extent where all are)."""

    shape: tuple[int, ...]
    limits: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pointer:
    """An address: byte ``base`` behind the start of ``symbol`` in the memory of rank ``home``."""

    symbol: str
    home: Any
    base: Any
    unit: int
    shape: tuple[int, ...] = ()
    steps: tuple[Any, ...] = ()
    tokens: Tokens = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A TMA descriptor of all of ``symbol`` of this rank, in blocks of ``block`` elements.

    With ``peer``: in the memory of that peer, of all of it or, where the block has an axis less, of the slice
    that belongs to this rank by the first axis.
    ``flat``: of the symbol as a matrix, its first two axes as one.
    ``emitter``: of which kernels it can be an argument. ``slot``: in which of two slots it lies; a kernel can
    use it when it has chosen by the slot of its call. ``roomy``: of memory for the capacity of a dynamic extent,
    past the end of the symbol too: it is read there, and nothing of that is used.
    """

    symbol: str
    block: tuple[int, ...]
    peer: int | None = None
    emitter: str = "triton"
    slot: int | None = None
    flat: bool = False
    roomy: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Another value in different lanes: pairs of lanes and value."""

    parts: tuple[tuple[Mask, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """A region that flows into a tile, in the lanes ``have``; ``axes`` gives each axis of the tile its
    axis of the region, or -1."""

    symbol: str
    have: Mask
    home: Ints
    lo: Ints
    hi: Ints
    axes: tuple[int, ...]


# Line, column and symbol of a load, and which of its parts, where they do not lie side by side.
Key: TypeAlias = tuple[int, int, str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """A tile of numbers: its shape and the regions that flow into it. ``terms``: the loads of which it
    is the plain sum, first to last, in the lanes ``sums`` (None: all); None where it is anything else.
    ``form`` marks a tile on its way
    to being split in halves of columns, ``single`` one that was converted to fp32, of integers to their own type,
    ``rounded`` the element type that it was converted to last, and not computed with since."""

    shape: tuple[int, ...]
    flows: Mapping[Key, Flow] = field(default_factory=dict)
    terms: tuple[Key, ...] | None = None
    form: str = ""
    single: bool = False
    sums: Mask | None = None
    rounded: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A tile of the part of every other rank, not added yet: their shape, element type, and regions."""

    shape: tuple[int, ...]
    dtype: str
    flows: Mapping[Key, Flow]


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted name of a module (``tl.float32``, ``device.context``), or a method of a value."""

    path: str
    of: Any = None


@dataclass(frozen=True, slots=True)
class Context:
    """What ``device.context`` returns."""


@dataclass(frozen=True, slots=True)
class Special:
    """A parameter with a meaning of its own: ``arena``, ``peers``, ``progress_ns``, ``arrival_ns``."""

    name: str


def full(v: Any, lanes: int) -> Ints:
    """A value as an array ``[lanes]``, which is not to be written to."""
    if isinstance(v, int):
        return _same(v, lanes)
    if isinstance(v, np.ndarray) and v.shape == (lanes,) and v.dtype == np.int64:
        return v
    return np.broadcast_to(np.asarray(v, dtype=np.int64), (lanes,))


@lru_cache(maxsize=1024)
def _same(v: int, lanes: int) -> Ints:
    return np.broadcast_to(np.int64(v), (lanes,))


def join(a: Tokens, b: Tokens) -> Tokens:
    """The tokens of a sum."""
    if not a:
        return b
    if not b:
        return a
    found = dict(a)
    for wait, mask in b.items():
        found[wait] = found[wait] | mask if wait in found else mask
    return found


def chosen(mask: Mask, new: Tokens, old: Tokens) -> Tokens:
    """The tokens of a value taken from ``new`` where ``mask``, else from ``old``."""
    if not new and not old:
        return NONE
    found: dict[int, Mask] = {}
    none = np.zeros_like(mask)
    for wait in {**new, **old}:
        lanes = np.where(mask, new.get(wait, none), old.get(wait, none))
        if lanes.any():
            found[wait] = lanes
    return found


def select(mask: Mask, new: Any, old: Any) -> Any:
    """``new`` in the lanes of ``mask``, ``old`` in the others; ``old`` may be None (not bound yet)."""
    if old is None or new is old:
        return new
    if isinstance(new, int) and isinstance(old, Num):
        new = Num(new)
    if isinstance(old, int) and isinstance(new, Num):
        old = Num(old)
    if isinstance(new, Num) and isinstance(old, Num):
        return Num(
            np.where(mask, new.v, old.v),
            new.wide or old.wide,
            chosen(mask, new.tokens, old.tokens),
        )
    if isinstance(new, Data) and isinstance(old, Data) and new.shape == old.shape:
        return _select_data(mask, new, old)
    alike = getattr(new, "shape", None) == getattr(old, "shape", None)
    if isinstance(new, Pointer) and isinstance(old, Pointer) and alike and _same_memory(new, old):
        return Pointer(
            new.symbol,
            np.where(mask, new.home, old.home),
            np.where(mask, new.base, old.base),
            new.unit,
            new.shape,
            _each(mask, new.steps, old.steps),
            chosen(mask, new.tokens, old.tokens),
        )
    if isinstance(new, Lattice) and isinstance(old, Lattice) and alike:
        return Lattice(
            np.where(mask, new.base, old.base),
            new.shape,
            _each(mask, new.steps, old.steps),
            new.wide or old.wide,
            chosen(mask, new.tokens, old.tokens),
        )
    if isinstance(new, Inside) and isinstance(old, Inside) and alike:
        return Inside(new.shape, _each(mask, new.limits, old.limits))
    fixed = not isinstance(new, Choice | Pointer | Lattice | Inside)
    if type(new) is type(old) and fixed and new == old:
        return new
    parts = [(mask & m, v) for m, v in options(mask, new)]
    parts += [(~mask & m, v) for m, v in options(mask, old)]
    return Choice(tuple((m, v) for m, v in parts if m.any()))


def _same_memory(a: Pointer, b: Pointer) -> bool:
    return (a.symbol, a.unit) == (b.symbol, b.unit)


def _each(mask: Mask, new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(np.where(mask, a, b) for a, b in zip(new, old, strict=True))


def options(like: Mask, value: Any) -> tuple[tuple[Mask, Any], ...]:
    """The values of a Choice; any other value is the only one."""
    return value.parts if isinstance(value, Choice) else ((np.ones_like(like), value),)


def _select_data(mask: Mask, new: Data, old: Data) -> Data:
    flows: dict[Key, Flow] = {}
    for key in (*old.flows, *(k for k in new.flows if k not in old.flows)):
        a, b = new.flows.get(key), old.flows.get(key)
        if a is not None and b is not None and a.axes == b.axes:
            wide = mask[:, None]
            flows[key] = Flow(
                a.symbol,
                np.where(mask, a.have, b.have),
                np.where(mask, a.home, b.home),
                np.where(wide, a.lo, b.lo),
                np.where(wide, a.hi, b.hi),
                a.axes,
            )
            continue
        one, lanes = (a, mask) if a is not None else (b, ~mask)
        assert one is not None
        have = one.have & lanes
        if have.any():
            flows[key] = Flow(one.symbol, have, one.home, one.lo, one.hi, one.axes)
    # Where only some lanes run, the terms of the others are forgotten.
    sums = mask if new.sums is None else mask & new.sums
    if new.terms == old.terms and new.single == old.single:
        sums = np.where(
            mask, True if new.sums is None else new.sums, True if old.sums is None else old.sums
        )
    form = new.form if new.form == old.form else "?"
    rounded = new.rounded if new.rounded == old.rounded else ""
    return Data(new.shape, flows, new.terms, form, new.single, sums, rounded)
