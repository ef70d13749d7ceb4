"""Every access and every synchronisation of a fused program, as NumPy rows.

A *task* is what runs in one order on one rank: one position of a stage's queue, a stream, `head` or
`finish`. A row is one execution of one op by one task; ``seq`` orders the rows of a task.
:func:`tilelink.backend.expand_walk.expand` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tilelink.backend.expand import Ints, Tile
from tilelink.ir import Op


@dataclass(frozen=True, slots=True)
class Phase:
    """A static part of an agent: ``kind`` is head, stream, stage, finish, collective or flush.

    Tasks ``first`` .. ``first + count * WORLD`` are rank-major; ``agent`` numbers ``Expansion.agents``. A
    flush has no tasks (``count`` 0): its place among the phases of its launch says which notifies it
    performs. ``tiles`` holds the loop variables of each position, arrays ``[WORLD, count]``, for messages.
    """

    kind: str
    agent: int
    op: Op
    first: int
    count: int
    tiles: tuple[tuple[str, Tile], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """The rows of one read or write: boxes ``[lo, hi)`` of ``symbol`` in the memory of rank ``home``.

    ``want`` is, for each axis indexed by a loop variable (``placed``), the variable's own first index
    there: the global coordinate the body means; elsewhere it equals ``lo``. ``exact`` says that the
    box is precisely what is touched, not only a bound. ``pair`` ties the two sides of a transfer.
    ``own`` marks what is read from an ``own`` reference. ``origin`` is the rank whose data a collective
    puts there. ``tma``: the access may go through the async proxy. ``wide``: its element offsets are
    computed in 64 bits. ``remote``: a sum of what ranks have put at one place of their own memories. Of ``op``,
    rules read the name, the span and, of a collective, ``op``.
    """

    op: Op
    symbol: str
    write: bool
    task: Ints
    seq: Ints
    rank: Ints
    home: Ints
    lo: Ints
    hi: Ints
    want: Ints
    placed: tuple[bool, ...]
    exact: bool = True
    pair: int = -1
    own: bool = False
    origin: Ints | None = None
    tma: bool = False
    wide: bool = False
    remote: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sync:
    """The rows of one wait or notify: one row an element, ``flat`` its number in the array at ``home``.

    ``bound`` is the count of a counter wait or of a counted notify; ``epoch`` is -1 where a wait is for
    the previous call. ``through`` is the flat element of the counting counter ``via``, -1 where there is
    none and -2 where it lies outside.

    Memory order, as docs/ir.md has it: ``relaxed`` (also a notify without its barrier), ``gpu`` (scope),
    ``proxy`` (a wait with the proxy fence), ``drain`` and ``delay`` (a notify), ``equal`` (a wait). Of
    ``op``, rules read the name and the span.
    """

    op: Op
    symbol: str
    wait: bool
    task: Ints
    seq: Ints
    rank: Ints
    home: Ints
    flat: Ints
    bound: Ints
    epoch: int
    through: Ints
    inside: npt.NDArray[np.bool_]
    via: str = ""
    relaxed: bool = False
    gpu: bool = False
    proxy: bool = False
    drain: bool = False
    delay: bool = False
    equal: bool = False


@dataclass(slots=True)
class Expansion:
    """A program's rows for its extents and world. ``task_rank`` and ``task_phase`` describe each task.

    ``phases`` of an agent stand in the order in which its workers come to them. ``problems`` holds what
    could not be enumerated, with a sentence each: nothing is proven of such a program. ``assumptions``
    hold what was taken as a bound. ``meant`` has, by the identity of their op, accesses and axes at which the
    kernel itself places a tile elsewhere than at its own start: the coordinate meant there is the index.
    """

    program: Op
    env: dict[str, int]
    agents: tuple[Op, ...]
    declarations: dict[str, Op]
    dims: dict[str, tuple[int, ...]]
    phases: list[Phase] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    task_rank: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    task_phase: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    assumptions: list[str] = field(default_factory=list)
    problems: list[tuple[Op, str]] = field(default_factory=list)
    owners: dict[str, tuple[Ints, Ints]] = field(default_factory=dict)
    meant: set[tuple[int, int]] = field(default_factory=set)

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.env["WORLD"]

    def base(self, symbol: str) -> str:
        """The tensor that a buffer serves (``A`` for ``A.all``), or the symbol itself."""
        head = symbol.split(".")[0]
        return head if head in self.declarations else symbol

    def describe(self, task: int) -> str:
        """A task in words: its stage and tile, or its agent, and its rank."""
        phase = self.phases[int(self.task_phase[task])]
        rank = int(self.task_rank[task])
        position = (task - phase.first) % max(1, phase.count)
        if phase.kind != "stage":
            name = phase.op.ref.symbol if phase.op.ref is not None else ""
            label = f"{phase.kind} @{name}" if name else phase.kind
            return f"{label} on rank {rank}"
        tile = ", ".join(
            f"{name.split('.')[0]} = {int(t.start[rank, position])}..{int(t.stop[rank, position])}"
            for name, t in phase.tiles
        )
        return f"tile {tile} of stage @{phase.op.symbol} on rank {rank} (position {position})"


def boxes(shape: Ints) -> tuple[Ints, Ints]:
    """All points of boxes of the given shapes ``[n, axes]``: the box of each point, and its index in it."""
    size = np.prod(shape, axis=1, dtype=np.int64)
    which = np.repeat(np.arange(len(shape)), size)
    rest = ragged(size)
    inner = np.zeros((len(which), shape.shape[1]), dtype=np.int64)
    wide = np.flatnonzero((shape > 1).any(axis=0))
    for axis in wide[:0:-1]:
        rest, inner[:, axis] = np.divmod(rest, shape[which, axis])
    if len(wide):
        inner[:, wide[0]] = rest
    return which, inner


def ragged(counts: Ints) -> Ints:
    """``0..counts[0], 0..counts[1], …`` in one array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
