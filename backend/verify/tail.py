"""The tiles of a product of which several tasks have a part of the depth each: what those tasks must be.

A buffer that serves no tensor of the kernel, and that a stage reads which multiplies, can only hold parts of the
sums of that stage's tiles. What the tasks must be is derived here from the kernel's nest; where its depth is cut,
and where a tile's parts lie, the program says and the proof checks. Nothing is shared with the pass that cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tilelink.backend.expand import Ints, Tile, evaluate
from tilelink.backend.expand_rows import Expansion, Phase
from tilelink.backend.verify.depth import spare_buffers
from tilelink.ir import At, Expr, Index, Op, Ref, Value, make


def with_tails(kernel: Op, out: Expansion) -> Op:
    """``kernel`` with the tensors of parts that the program's stages hand to one another."""
    known = {op.symbol for op in kernel.body if op.ref is not None}
    found = [
        make(
            "tensor",
            ref=Ref(op.symbol),
            dims=tuple(op["dims"]),
            dtype="fp32",
            move="local",
            role="temp",
        )
        for op in spare_buffers(kernel, out, tails=True)
        if op.symbol not in known
    ]
    return kernel.with_ops((*found, *kernel.body)) if found else kernel


@dataclass(frozen=True, slots=True)
class Tail:
    """Stages of one nest: of ``whole`` tiles (None: all are cut), of ``parts``, and the ``last`` that adds."""

    whole: Phase | None
    parts: tuple[Phase, ...]
    last: Phase

    @property
    def count(self) -> int:
        """How many stages they are."""
        return len(self.parts) + 1 + (self.whole is not None)


def tail_of(phases: Sequence[Phase], kernel: Op, out: Expansion) -> Tail | None:
    """The tail that ``phases`` begin with; None where they begin with something else."""
    names = {op.symbol for op in spare_buffers(kernel, out, tails=True)}

    def touches(phase: Phase, kind: str) -> bool:
        return any(op.name == kind and op.symbol in names for op in phase.op.walk() if op.ref)

    if not phases:
        return None
    some = 0 if touches(phases[0], "store") else 1
    if some and phases[0].op.get("positions") is None:
        return None  # it has all tiles of its nest
    at = some
    while at < len(phases) and touches(phases[at], "store"):
        at += 1
    if at == some or at == len(phases) or not touches(phases[at], "load"):
        return None
    return Tail(phases[0] if some else None, tuple(phases[some:at]), phases[at])


def loop_of(nest: Op) -> Op:
    """The loop over the depth of a nest that :func:`sums_of` finds sums in."""
    return next(op for op in nest.body if op.name != "zeros")


def length_of(stage: Op, out: Expansion) -> int:
    """How much of the depth a stage multiplies; 0 where that is not to be seen."""
    loops = [op for op in stage.body if op.name == "for_tiles"]
    if len(loops) != 1 or len(loops[0].get("extent", ())) != 1:
        return 0
    extent = Expr.of(loops[0]["extent"][0])
    return int(evaluate(extent, out.env, loops[0])) if extent.names <= out.env.keys() else 0


def stored_at(stage: Op) -> tuple[list[str], Index | None]:
    """The buffers that a stage of parts stores to, in its order, and where along their rows its tile lies."""
    stores = [op for op in stage.body if op.name == "store" and op.ref is not None]
    first = stores[0].ref if stores else None
    item = first.index[1] if first is not None and len(first.index) == 3 else None
    return [op.symbol for op in stores], item


def _part(loop: Op, begin: int, length: int) -> Op:
    """The loop over ``length`` elements of the depth from ``begin`` on."""
    step = loop.args[0]
    place = At(step, Expr.name(f"{step.name}.start") + begin)
    body = tuple(
        replace(op, ref=Ref(op.symbol, tuple(place if i == step else i for i in op.ref.index)))
        if op.ref is not None and begin
        else op
        for op in loop.body
    )
    return loop.with_ops(body).with_attrs(extent=(length,))


def part_body(
    nest: Op, names: Sequence[str], number: int, row: Index, begin: int, length: int
) -> tuple[Op, ...]:
    """What the tasks of part ``number`` (from 1) do: it is stored where the buffers have it."""
    loop, columns = loop_of(nest), nest.args[1]
    before = nest.body[: nest.body.index(loop)]
    stores = tuple(
        make("store", ref=Ref(name, (Expr.const(number - 1), row, columns)), operands=(total,))
        for name, total in zip(names, loop.results, strict=True)
    )
    return (*before, _part(loop, begin, length), *stores)


def last_body(
    nest: Op, names: Sequence[str], parts: int, row: Index, length: int
) -> tuple[Op, ...]:
    """What the tasks do that have the first part: they add the others in order, and go on as the nest does."""
    loop, columns = loop_of(nest), nest.args[1]
    at = nest.body.index(loop)
    own = tuple(Value(f"{v.name}.own.part", v.type) for v in loop.results)
    sums: list[Op] = []
    for name, total, so_far in zip(names, loop.results, own, strict=True):
        for number in range(1, parts):
            part = Value(f"{total.name}.part.{number}", total.type)
            place = (Expr.const(number - 1), row, columns)
            after = (
                total if number == parts - 1 else Value(f"{total.name}.upto.{number}", total.type)
            )
            sums.append(make("load", ref=Ref(name, place), results=(part,)))
            sums.append(make("add", operands=(so_far, part), results=(after,)))
            so_far = after
    first = replace(_part(loop, 0, length), results=own)
    return (*nest.body[:at], first, *sums, *nest.body[at + 1 :])


def together(tail: Tail) -> list[Tile]:
    """The tiles of the whole ones and of those that are added, for each variable."""
    found = [tile for _, tile in tail.last.tiles]
    if tail.whole is None:
        return found
    first = [tile for _, tile in tail.whole.tiles]
    return [
        Tile(*(np.concatenate(pair, axis=1) for pair in zip(_arrays(a), _arrays(b), strict=True)))
        for a, b in zip(first, found, strict=True)
    ]


def _arrays(tile: Tile) -> tuple[Ints, Ints, Ints]:
    return tile.start, tile.stop, tile.tile


def same_tiles(one: Phase, other: Phase) -> bool:
    """Whether two stages visit the same tiles on each rank, in whatever order."""

    def listed(phase: Phase) -> Ints:
        bounds = [side for _, tile in phase.tiles for side in (tile.start, tile.stop)]
        rows = np.stack(bounds, axis=-1)
        order = [np.lexsort(rank.T[::-1]) for rank in rows]
        return np.stack([rank[by] for rank, by in zip(rows, order, strict=True)])

    first, second = listed(one), listed(other)
    return first.shape == second.shape and bool((first == second).all())


def apart(phase: Phase, row: Index, out: Expansion) -> bool:
    """Whether no two tiles of a stage of parts lie in one place, ``row`` along the rows of the buffers."""
    (_, rows), (_, columns) = phase.tiles
    start = rows.start
    if isinstance(row, At):
        ranks = np.arange(out.world, dtype=np.int64)[:, None]
        names = {f"{row.value.name}.start": rows.start, f"{row.value.name}.stop": rows.stop}
        env = {**out.env, "RANK": ranks, **names, f"{row.value.name}.tile": rows.tile}
        if not row.start.names <= env.keys():
            return False
        start = np.broadcast_to(evaluate(row.start, env, phase.op), rows.start.shape)
    stop = start + rows.stop - rows.start
    for rank in range(len(start)):
        sides = ((start[rank], stop[rank]), (columns.start[rank], columns.stop[rank]))
        places = np.stack([side[0] for side in sides])
        if np.unique(places, axis=1).shape[1] != places.shape[1]:
            return False
        for begin, end in sides:
            both = np.unique(np.stack([begin, end]), axis=1)
            if (both[0, 1:] < both[1, :-1]).any():
                return False
    return True
