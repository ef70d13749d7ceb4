"""What programs that differ in few blocks have in common: the boxes of their memory and the traces of blocks.

Ops are immutable, and a program that is an edit of another shares with it all blocks that the edit left alone. A
block that is the same object, in programs with the same extents, declarations and written memory, does the
same: it is traced once for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilelink.backend.simulate.boxes import BoxTable
from tilelink.backend.simulate.geometry import Geometry
from tilelink.ir import Op

if TYPE_CHECKING:
    from tilelink.backend.simulate.trace import Place, Trace

KINDS = 4  # of memory, of which blocks are kept
BLOCKS = 8192  # traces that are kept for each


class Blocks:
    """Traced blocks of programs with the same memory, and the numbers of their reads and writes.

    ``tables``: the boxes of each tensor and buffer that is written. ``sources``: what each number stands for.
    """

    def __init__(self, geometry: Geometry, written: frozenset[str]) -> None:
        self.memory = _memory(geometry, written)
        self.tables = {name: BoxTable() for name in sorted(written)}
        self.uids: dict[tuple[Any, ...], int] = {}
        self.sources: list[tuple[Op, Place]] = []
        self.traces: dict[tuple[int, str, int, int], Trace | None] = {}
        self._ops: dict[int, Op] = {}

    def uid(self, key: tuple[Any, ...], op: Op, place: Place) -> int:
        """The number of the read or write that ``key`` names."""
        found = self.uids.get(key)
        if found is None:
            found = self.uids[key] = len(self.sources)
            self.sources.append((op, place))
        return found

    def hold(self, op: Op) -> None:
        """Keys hold the identity of ``op``, which must stay its own."""
        self._ops[id(op)] = op

    def full(self) -> bool:
        """Whether so much is kept that the next program had better begin anew."""
        return len(self.traces) >= BLOCKS


class Shared:
    """The blocks of programs that are run one after the other."""

    def __init__(self) -> None:
        self._kept: list[Blocks] = []

    def blocks(self, geometry: Geometry, written: frozenset[str]) -> Blocks:
        """Those of programs with the memory of ``geometry``, of which ``written`` is written."""
        memory = _memory(geometry, written)
        found = next((b for b in self._kept if b.memory == memory), None)
        if found is not None:
            self._kept.remove(found)
        if found is None or found.full():
            found = Blocks(geometry, written)
        self._kept = [found, *self._kept[: KINDS - 1]]
        return found


def _memory(geometry: Geometry, written: frozenset[str]) -> tuple[object, ...]:
    """All that a block means besides its own text: equal where the same block does the same."""
    return geometry.world, geometry.extents, geometry.decls, geometry.slotted, written
