"""Memory of the ranks, and the vector clocks that find unordered accesses to it.

The detector is FastTrack-like (Flanagan and Freund, PLDI 2009) over boxes of elements: an access is
stamped with its agent's component and clock, and is ordered before another when the other's vector
has seen that clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tilelink.backend.simulate.errors import RaceError
from tilelink.backend.simulate.geometry import Box
from tilelink.backend.tile_ops import TORCH_DTYPES
from tilelink.ir import Op

Clock: TypeAlias = NDArray[np.int32]

# Patterns that no program computes by accident.
_GARBAGE = {"int32": -0x5A5A5A5B, "int64": -0x5A5A5A5A5A5A5A5B, "bool": True}


def garbage(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Memory that nobody has written: NaN, or a pattern for integers."""
    return torch.full(shape, _GARBAGE.get(dtype, float("nan")), dtype=TORCH_DTYPES[dtype])


@dataclass(frozen=True, slots=True)
class Access:
    """Who touched memory, and with which op."""

    op: Op
    write: bool
    who: Callable[[], str]

    def __str__(self) -> str:
        where = f" ({self.op.span})" if self.op.span is not None else ""
        return f"the {'write' if self.write else 'read'} `{self.op.name}`{where} by {self.who()}"


class Tracker:
    """The accesses to one object on one rank that a later access could still race with."""

    def __init__(self, symbol: str, rank: int, axes: int) -> None:
        self.symbol = symbol
        self.rank = rank
        self._rows: dict[Box, int] = {}
        self._lo = np.zeros((16, axes), dtype=np.int64)
        self._hi = np.zeros((16, axes), dtype=np.int64)
        self._reads: list[dict[int, tuple[int, Access]]] = []
        self._writes: list[dict[int, tuple[int, Access]]] = []

    def touch(self, box: Box, access: Access, component: int, clock: Clock) -> None:
        """Record an access; RaceError if an earlier one that conflicts is not ordered before it."""
        if any(lo >= hi for lo, hi in box):
            return
        row = self._row(box)
        lo, hi = self._lo[row], self._hi[row]
        used = len(self._reads)
        meets = ((self._lo[:used] < hi) & (self._hi[:used] > lo)).all(axis=1)
        for other in np.flatnonzero(meets):
            self._check(self._writes[other], access, clock)
            if access.write:
                self._check(self._reads[other], access, clock)
        stamp = (int(clock[component]), access)
        if not access.write:
            self._reads[row][component] = stamp
            return
        # What this write covers is ordered before it, so a later access races with it through this one.
        covered = meets & (self._lo[:used] >= lo).all(axis=1) & (self._hi[:used] <= hi).all(axis=1)
        for other in np.flatnonzero(covered):
            self._reads[other].clear()
            self._writes[other].clear()
        self._writes[row][component] = stamp

    def _row(self, box: Box) -> int:
        row = self._rows.get(box)
        if row is None:
            row = len(self._rows)
            if row == len(self._lo):
                self._lo = np.concatenate([self._lo, np.zeros_like(self._lo)])
                self._hi = np.concatenate([self._hi, np.zeros_like(self._hi)])
            self._rows[box] = row
            self._lo[row] = [lo for lo, _ in box]
            self._hi[row] = [hi for _, hi in box]
            self._reads.append({})
            self._writes.append({})
        return row

    def _check(self, earlier: dict[int, tuple[int, Access]], access: Access, clock: Clock) -> None:
        for component, (stamp, first) in earlier.items():
            if stamp > clock[component]:
                raise RaceError(
                    access.op.span,
                    symbol=self.symbol,
                    rank=self.rank,
                    first=first,
                    second=access,
                    notes=(f"first: {first}", f"second: {access}"),
                )


class Channel:
    """One flag or counter array on one rank: values, and what their last releases carry."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.values: NDArray[np.int32] = np.zeros(shape, dtype=np.int32)
        self.released: dict[tuple[int, ...], Clock] = {}
        # Largest epoch or count that a wait asked for, and that a notify set, an element.
        self.asked: dict[tuple[int, ...], int] = {}
        self.notified: dict[tuple[int, ...], int] = {}


class Memory:
    """One rank's arena and user tensors."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.epoch = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.trackers: dict[str, Tracker] = {}
        self.channels: dict[str, Channel] = {}
        self.scalars: dict[str, Any] = {}
