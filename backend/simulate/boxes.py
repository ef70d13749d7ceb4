"""Boxes of elements, and which of them meet: worked out once for a program, used by every run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilelink.backend.simulate.geometry import Box

FEW = 48  # boxes up to which a loop is faster than arrays


class BoxTable:
    """The boxes in which one tensor or buffer is accessed.

    ``meets[row]`` are the rows of the boxes that share an element with box ``row``, itself among
    them, and ``covers[row]`` those that lie inside of it.
    """

    def __init__(self) -> None:
        self.meets: list[list[int]] = []
        self.covers: list[list[int]] = []
        self._rows: dict[Box, int] = {}
        self._bounds: NDArray[np.int64] | None = None  # [2, rows, axes]: lower and upper bounds

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, box: Box) -> int:
        """The row of ``box``, which is not empty; a new one where it is new."""
        row = self._rows.get(box)
        if row is not None:
            return row
        row = len(self._rows)
        self._rows[box] = row
        meeting, inside, around = self._few(box) if row < FEW else self._many(box, row)
        self.meets.append(meeting)
        self.covers.append(inside)
        for other in meeting[:-1]:
            self.meets[other].append(row)
        for other in around:
            if other != row:
                self.covers[other].append(row)
        return row

    def _few(self, box: Box) -> tuple[list[int], list[int], list[int]]:
        """The boxes that meet ``box``, lie inside of it and around it, one by one."""
        meeting, inside, around = [], [], []
        for other, at in self._rows.items():
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                meeting.append(at)
                if all(a <= c and d <= b for (a, b), (c, d) in zip(box, other, strict=True)):
                    inside.append(at)
                if all(c <= a and b <= d for (a, b), (c, d) in zip(box, other, strict=True)):
                    around.append(at)
        return meeting, inside, around

    def _many(self, box: Box, row: int) -> tuple[list[int], list[int], list[int]]:
        """Like :meth:`_few`, all at once."""
        bounds = self._bounds
        if bounds is None or row >= bounds.shape[1]:
            bounds = np.zeros((2, 2 * row, len(box)), dtype=np.int64)
            bounds[:, : row + 1] = np.array(list(self._rows), dtype=np.int64).transpose(2, 0, 1)
            self._bounds = bounds
        bounds[:, row] = np.array(box, dtype=np.int64).T
        lo, hi = bounds[0, : row + 1], bounds[1, : row + 1]
        meeting = ((lo < hi[row]) & (hi > lo[row])).all(axis=1)
        inside = ((lo >= lo[row]) & (hi <= hi[row])).all(axis=1)
        around = ((lo <= lo[row]) & (hi >= hi[row])).all(axis=1)
        found = [np.flatnonzero(mask).tolist() for mask in (meeting, inside, around)]
        return found[0], found[1], found[2]
