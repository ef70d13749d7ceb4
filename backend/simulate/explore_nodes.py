"""What the explorer runs: synchronisation ops as nodes, and which accesses conflict.

A *process* is a head, a stream, a collective, one worker of a launch, a `finish` or the user of a rank,
in one call. It walks a list of nodes. The accesses that it makes between two nodes are a *segment* and
hang on the node before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from tilelink.backend.simulate.geometry import Box
from tilelink.ir import Op, op_line

WAIT, ADD, SET, HOLD, PERFORM, TAKE, FOLLOW, CLEAR, SLOT, RETURN, END, NONE = range(12)

# Words of the explorer itself.
PSEUDO = "<order of agents>"

# What a release is good for: made by a kernel of the rank that has the word (`sys`, `gpu` scope), by
# anyone else with `sys` scope, by a stream of the rank with `gpu` scope, or for nobody.
KERNEL, KERNEL_GPU, OTHER, STREAM_GPU, NOBODY = range(5)
# What a wait takes: nothing, or the releases above by place and scope of the waiter.
TAKES_NOTHING, IN_KERNEL, IN_KERNEL_GPU, IN_STREAM, IN_STREAM_GPU = range(5)
TAKES: tuple[tuple[int, ...], ...] = (
    (),
    (KERNEL, KERNEL_GPU, OTHER, STREAM_GPU),
    (KERNEL, KERNEL_GPU),
    (KERNEL, OTHER),
    (KERNEL,),
)

# Kinds of accesses: by generic loads and stores, peers and copy engines; and through the async proxy.
READ, WRITE, ASYNC_READ, ASYNC_WRITE = range(4)
Touch: TypeAlias = tuple[int, str, Box, int]  # rank, symbol, elements, kind


class Unsupported(Exception):
    """A program that cannot be explored: an index or a bound that only values know."""


@dataclass(slots=True)
class Node:
    """One step of a process; ``accesses`` are made behind it."""

    kind: int
    op: Op | None = None
    where: str = ""
    next: int = -1
    elements: tuple[int, ...] = ()
    need: int = 0  # of a wait: the value; of a set: the epoch
    equal: bool = False
    mode: int = IN_KERNEL  # of a wait: what it takes; of a notify: what it is good for
    proxy: bool = False
    drain: bool = False
    # The counter of a counted notify. Of a take, the word that says, counted from 1, which task was drawn; of a
    # follow, which waits for such a word, that of the queue.
    slot: int = -1
    count: int = 1
    late: tuple[int, ...] = ()  # of an end: raised with the writes through the async proxy too
    tasks: tuple[int, ...] = ()
    again: int = -1  # of a take or a follow: where its task returns to, if not to itself
    checks: tuple[tuple[int, int], ...] = ()  # counters and their values when a call has ended
    accesses: list[Touch] = field(default_factory=list)
    visible: bool = False
    # Bits of the segment, and of the segments that it must be ordered behind.
    bit: int = 0
    async_bit: int = 0
    behind: int = 0
    behind_async: int = 0
    broken: str = ""  # a conflict inside the segment
    call: int = -1
    queue: bool = (
        False  # a wait for the hardware queue, which agents with queues of their own do not make
    )
    # Of a store of words: itself. It hands on no more (`own`) than that, and of what its process knows what was
    # over when the call began (`kept`).
    carry: tuple[Node, ...] | None = None
    own: int = 0
    kept: int = 0

    def text(self) -> str:
        """The op and who runs it."""
        line = op_line(self.op) if self.op is not None else "task" if self.kind == TAKE else "step"
        return f"{self.where}: {line}"


class Held(NamedTuple):
    """A notify that a process holds back; ``need`` is 0 for a counter, the epoch for a flag."""

    element: int
    mode: int
    drain: bool
    slot: int
    wanted: int  # how many of a counted notify raise the flag
    need: int

    @staticmethod
    def of(node: Node) -> Held:
        """What a node holds back."""
        return Held(node.elements[0], node.mode, node.drain, node.slot, node.count, node.need)


def meets(one: Box, other: Box) -> bool:
    """Whether two boxes share an element."""
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


class _Place:
    """The segments that touch one box of one object."""

    __slots__ = ("async_reads", "async_writes", "reads", "writes")

    def __init__(self) -> None:
        self.reads: list[Node] = []
        self.writes: list[Node] = []
        self.async_reads: list[Node] = []
        self.async_writes: list[Node] = []


def find_conflicts(nodes: list[Node]) -> list[str]:
    """Give every segment that conflicts with another its bits, and what it must be ordered behind.

    The result names the bits. A later access is ordered behind an earlier one of another segment if the
    bit of the earlier one is in the clock of the process; a read through the async proxy behind a
    generic write if the bit was there at the last proxy fence; and anything behind a write through the
    async proxy if its own bit, which only a drain or the end of the launch hands on, is in the clock.
    """
    objects: dict[tuple[int, str], dict[Box, _Place]] = {}
    for node in nodes:
        node.broken = _conflict_inside(node)
        for rank, symbol, box, kind in dict.fromkeys(node.accesses):
            if any(lo >= hi for lo, hi in box):
                continue
            place = objects.setdefault((rank, symbol), {}).setdefault(box, _Place())
            lists = (place.reads, place.writes, place.async_reads, place.async_writes)
            lists[kind].append(node)
    pairs: list[tuple[_Place, _Place]] = []
    for boxes in objects.values():
        items = list(boxes.items())
        for number, (box, place) in enumerate(items):
            for other_box, other in items[number:]:
                if meets(box, other_box):
                    pairs.append((place, other))
    names = _number(nodes, pairs)
    for node in nodes:
        if node.carry is not None:
            node.own = sum({n.bit for n in node.carry})
            node.kept = sum({n.bit | n.async_bit for n in nodes if n.call < node.call})
    for place, other in pairs:
        _order(place, other)
        if place is not other:
            _order(other, place)
    for node in nodes:
        # A segment precedes itself; what is inside was looked at above.
        node.behind &= ~(node.bit | node.async_bit)
        node.behind_async &= ~node.bit
    return names


def _conflict_inside(node: Node) -> str:
    for number, (rank, symbol, box, kind) in enumerate(node.accesses):
        for other_rank, other_symbol, other_box, other in node.accesses[:number]:
            unordered = other == ASYNC_WRITE or (other == WRITE and kind == ASYNC_READ)
            if unordered and (rank, symbol) == (other_rank, other_symbol) and meets(box, other_box):
                return f"@{symbol} on rank {rank}: an access through the async proxy and another"
    return ""


def _number(nodes: list[Node], pairs: list[tuple[_Place, _Place]]) -> list[str]:
    wanted: set[int] = set()
    wanted_async: set[int] = set()
    for place, other in pairs:
        if place.writes or other.writes or place.async_writes or other.async_writes:
            for one in (place, other):
                for node in (*one.reads, *one.writes, *one.async_reads):
                    wanted.add(id(node))
                for node in one.async_writes:
                    wanted_async.add(id(node))
    names: list[str] = []
    for node in nodes:
        if id(node) in wanted:
            node.bit = 1 << len(names)
            names.append(node.where)
        if id(node) in wanted_async:
            node.async_bit = 1 << len(names)
            names.append(node.where)
    return names


def _order(earlier: _Place, later: _Place) -> None:
    """What the segments of ``later`` must be behind, for they conflict with those of ``earlier``."""
    reads = writes = drained = 0
    for node in (*earlier.reads, *earlier.async_reads):
        reads |= node.bit
    for node in earlier.writes:
        writes |= node.bit
    for node in earlier.async_writes:
        drained |= node.async_bit
    for node in (*later.writes, *later.async_writes):
        node.behind |= reads | writes | drained
    for node in later.reads:
        node.behind |= writes | drained
    for node in later.async_reads:
        node.behind |= writes | drained
        node.behind_async |= writes
