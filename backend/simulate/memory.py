"""Memory of the ranks, and the vector clocks that find unordered accesses to it.

The detector is FastTrack-like (Flanagan and Freund, PLDI 2009) over boxes of elements: an access is
stamped with its agent's component and clock, and is ordered before another when the other's vector
has seen that clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.simulate.boxes import BoxTable
from tilelink.backend.simulate.errors import RaceError
from tilelink.backend.simulate.geometry import Decl
from tilelink.ir import Op

Clock: TypeAlias = NDArray[np.int32]

# Patterns that no program computes by accident.
_GARBAGE = {"int32": -0x5A5A5A5B, "int64": -0x5A5A5A5A5A5A5A5B, "bool": True}


def garbage(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Memory that nobody has written: NaN, or a pattern for integers."""
    return torch.full(shape, _GARBAGE.get(dtype, float("nan")), dtype=TORCH_DTYPES[dtype])


class Access(NamedTuple):
    """Who touched memory, and with which op; ``by`` and ``place`` say where in words when asked."""

    op: Op
    by: Any
    place: Any
    write: bool

    def __str__(self) -> str:
        where = f" ({self.op.span})" if self.op.span is not None else ""
        who = self.by.describe(self.place)
        return f"the {'write' if self.write else 'read'} `{self.op.name}`{where} by {who}"


@dataclass(slots=True)
class View:
    """What an agent has seen: its clock, and for the async proxy what it had seen at its last fence.

    Accesses that are themselves made through the async proxy (components in ``apart``) are seen with
    the clock alone.
    """

    component: int
    clock: Clock
    fenced: Clock | None = None
    apart: frozenset[int] = frozenset()

    def orders(self, component: int, stamp: int) -> bool:
        """Whether the access with this stamp comes before what the agent does next."""
        if self.fenced is None or component in self.apart:
            return bool(stamp <= self.clock[component])
        return bool(stamp <= self.fenced[component])


# By component: its clock at an access, and the fields of :class:`Access` but the last, which is made where it
# is told.
_Stamps: TypeAlias = dict[int, tuple[int, Op, Any, Any]]


class Tracker:
    """The accesses to one object on one rank that a later access could still race with.

    Without ``armed`` nothing is recorded and nothing found.
    """

    def __init__(self, symbol: str, rank: int, table: BoxTable, armed: bool = True) -> None:
        self.symbol = symbol
        self.rank = rank
        self._table = table
        self._armed = armed
        self._reads: dict[int, _Stamps] = {}
        self._writes: dict[int, _Stamps] = {}

    def read(self, row: int, op: Op, by: Any, place: Any, view: View, polled: int = -1) -> None:
        """Record a read with ``op``; RaceError if an earlier write is not ordered before it.

        ``by``, ``place``: see :class:`Access`. ``polled``: the call of which the words that are read have been
        found there, whoever wrote them.
        """
        if not self._armed:
            return
        writes, component, at = self._writes, view.component, view.clock.item
        if writes:
            # As :meth:`View.orders`, once a view.
            fenced, apart = None if view.fenced is None else view.fenced.item, view.apart
            for other in self._table.meets[row]:
                if other not in writes:
                    continue
                for one, first in writes[other].items():
                    seen = at if fenced is None or one in apart else fenced
                    if first[0] > seen(one) and first[2].call != polled:
                        raise self._race(first, True, Access(op, by, place, False))
        stamps = self._reads.get(row)
        if stamps is None:
            self._reads[row] = {component: (at(component), op, by, place)}
        else:
            stamps[component] = (at(component), op, by, place)

    def write(
        self,
        row: int,
        op: Op,
        by: Any,
        place: Any,
        view: View,
        stamp: tuple[int, int] | None = None,
        polled: int = -1,
    ) -> None:
        """Record a write, by component and clock ``stamp`` where it is not the agent's own; RaceError
        if an earlier access is not ordered before it.

        ``polled``: as for a read, of words that are emptied.
        """
        if not self._armed:
            return
        reads, writes, at = self._reads, self._writes, view.clock.item
        if reads or writes:
            # As :meth:`View.orders`, once a view.
            fenced, apart = None if view.fenced is None else view.fenced.item, view.apart
            for other in self._table.meets[row]:
                if other in writes:
                    for one, first in writes[other].items():
                        seen = at if fenced is None or one in apart else fenced
                        if first[0] > seen(one) and first[2].call != polled:
                            raise self._race(first, True, Access(op, by, place, True))
                if other in reads:
                    for one, first in reads[other].items():
                        seen = at if fenced is None or one in apart else fenced
                        if first[0] > seen(one):
                            raise self._race(first, False, Access(op, by, place, True))
            # What this write covers is ordered before it, so a later access races with it through this one.
            for other in self._table.covers[row]:
                if other in reads:
                    del reads[other]
                if other in writes:
                    del writes[other]
        component, clock = stamp or (view.component, at(view.component))
        writes[row] = {component: (clock, op, by, place)}

    def _race(self, earlier: tuple[int, Op, Any, Any], write: bool, second: Access) -> RaceError:
        first = Access(*earlier[1:], write)
        return RaceError(
            second.op.span,
            symbol=self.symbol,
            rank=self.rank,
            first=first,
            second=second,
            notes=(f"first: {first}", f"second: {second}"),
        )


class Released:
    """What the releases of one flag or counter element carry to whoever acquires it.

    ``gpu`` and ``system``: from kernels of this rank, to kernels of this rank and to anyone;
    ``others``: from streams and other ranks, to anyone.
    """

    __slots__ = ("gpu", "others", "system")

    def __init__(self) -> None:
        self.gpu: Clock | None = None
        self.system: Clock | None = None
        self.others: Clock | None = None

    def add(self, carried: Clock, kernel: bool, gpu: bool) -> None:
        """A release by a kernel of this rank, or by another agent; ``gpu``: not at system scope."""
        if kernel:
            self.gpu = _joined(self.gpu, carried)
            if not gpu:
                self.system = _joined(self.system, carried)
        elif not gpu:
            self.others = _joined(self.others, carried)

    def taken(self, kernel: bool, gpu: bool) -> list[Clock]:
        """What an acquire by a kernel of this rank or another agent takes."""
        found = [self.gpu if kernel else self.system, None if gpu else self.others]
        return [clock for clock in found if clock is not None]

    def acquire(self, clock: Clock, kernel: bool, gpu: bool) -> None:
        """Raise the clock of who acquires by what it takes: see :meth:`taken`."""
        here = self.gpu if kernel else self.system
        if here is not None:
            np.maximum(clock, here, out=clock)
        if not gpu and self.others is not None:
            np.maximum(clock, self.others, out=clock)


def _joined(before: Clock | None, clock: Clock) -> Clock:
    return clock if before is None else np.maximum(before, clock)


class Channel:
    """One flag or counter array on one rank: values by element number, and what releases carry."""

    __slots__ = ("asked", "carried", "notified", "released", "twice", "values")

    def __init__(self, size: int) -> None:
        self.values = [0] * size
        self.released: dict[int, Released] = {}
        # Largest epoch or count that a wait asked for, and that a notify set, an element.
        self.asked: dict[int, int] = {}
        self.notified: dict[int, int] = {}
        self.twice: dict[int, Op] = {}  # flag elements that were set a second time in one epoch
        # Of flags that words carry: the epoch of the last notifies of an element, and how many there were.
        self.carried: dict[int, tuple[int, int]] = {}

    def clear(self) -> None:
        """The head sets the words to 0."""
        self.values = [0] * len(self.values)
        self.released.clear()
        self.asked.clear()
        self.notified.clear()


class Memory:
    """One rank's arena and user tensors."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.epoch = 0
        self.trackers: dict[str, Tracker] = {}
        self.channels: dict[str, Channel] = {}
        self.scalars: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.versions: dict[str, NDArray[np.int64]] = {}
        # Of buffers of words: the epoch in which each word was written, 0 of an empty one, and by which rank.
        self.epochs: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def words(self, decl: Decl, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and writers of the words of the slot ``name`` of a buffer, an entry an element."""
        found = self.epochs.get(name)
        if found is None:
            blank = np.zeros(decl.shape, dtype=np.int64)
            found = self.epochs[name] = blank, blank.copy()
        return found

    def tensor(self, decl: Decl, name: str | None = None) -> torch.Tensor:
        """The values of a tensor or buffer; garbage until something is written.

        ``name``: that of the slot, where there are several.
        """
        name = name or decl.name
        found = self.tensors.get(name)
        if found is None:
            found = self.tensors[name] = garbage(decl.shape, decl.dtype)
        return found
