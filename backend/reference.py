"""The reference executor: the living definition of a kernel, in PyTorch on the CPU.

Every rank interprets the kernel's ops in order, one tile an extent, on gathered tensors. Where a sum,
a gather of an intermediate, or an exchange must have happened before the next op, all ranks stop, the
tensors move (`reference_moves`), and the ranks go on. Nothing here is fast, and nothing is shared with
the passes that it judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tilelink.backend import reference_ops as ops
from tilelink.backend.reference_moves import Moves, initial_storage
from tilelink.backend.reference_plan import Plan, bind_extents, make_plan
from tilelink.errors import InternalError, Span, TilelinkError
from tilelink.ir import All, At, Broadcast, Expr, Index, Op, Range, Type, Value, parse_ir

Tensors = dict[str, torch.Tensor]
Barriers = Generator[frozenset[str], None, None]


class OutOfBounds(TilelinkError):
    """A read or a store past the edge of a tensor."""

    code = "out-of-bounds"
    message = "rank {rank} reaches {lo} to {hi} of axis {axis} of `{tensor}`, which has {length}"
    hint = "bounds and table entries must stay inside the tensor"


class UnequalPaths(TilelinkError):
    """Ranks that meet different exchanges, because a loop runs a different number of times."""

    code = "unequal-paths"
    message = "the ranks do not meet the same sums and exchanges: {detail}"
    hint = "keep the loop that a sum or an exchange is in independent of a rank's own data"


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a loop: ``[start, stop)`` of global indices, and its number in the loop."""

    start: int
    stop: int
    number: int


def run(
    kernel: Op,
    inputs: Sequence[Mapping[str, torch.Tensor | float]],
    tiles: Mapping[str, int] | None = None,
    *,
    backwards: bool = False,
) -> list[Tensors]:
    """The outputs of ``kernel`` on every rank.

    ``inputs`` holds, for each rank, a tensor for every ``in`` and ``inout`` tensor (its shard where the
    tensor has ``over``) and a number for every scalar. The result holds every ``out`` and ``inout``
    tensor, shards likewise, in new memory. ``tiles`` gives tile lengths by loop variable or by extent;
    the rest have one tile an extent. ``backwards``: tile loops begin with their last tile. Elements that
    the kernel never stores are NaN (0 in integers), rows of an exchange's result past the last arrived
    are 0.

    Raises InputError for inputs that do not fit, and the errors of `reference_moves` for tables and
    capacities that are not kept.
    """
    world = int(kernel["world"])
    extents = bind_extents(kernel, inputs)
    plan = make_plan(kernel)
    storage = initial_storage(kernel, plan, extents, inputs)
    moves = Moves(kernel, plan, extents, storage)
    ranks = [
        _Rank(plan, moves, extents, rank, dict(inputs[rank]), dict(tiles or {}), backwards)
        for rank in range(world)
    ]
    _lockstep([rank.block(kernel.body) for rank in ranks], moves)
    moves.run(moves.order)
    return moves.outputs()


def _lockstep(generators: list[Barriers], moves: Moves) -> None:
    """Run all ranks from one barrier to the next, and the moves that they wait for in between."""
    while True:
        reached = [next(generator, None) for generator in generators]
        if all(r is None for r in reached):
            return
        names = {None if r is None else tuple(sorted(r)) for r in reached}
        if len(names) != 1 or reached[0] is None:
            detail = "; ".join(
                f"rank {rank}: {'the end' if r is None else ', '.join(sorted(r))}"
                for rank, r in enumerate(reached)
            )
            raise UnequalPaths(detail=detail)
        moves.run(reached[0])


@dataclass(slots=True)
class _Rank:
    """The interpreter of one rank."""

    plan: Plan
    moves: Moves
    extents: dict[str, int]
    rank: int
    inputs: dict[str, torch.Tensor | float]
    tiles: dict[str, int]
    backwards: bool = False
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    loop_tiles: dict[str, Tile] = field(default_factory=dict)

    # --- control flow --------------------------------------------------------------------------

    def block(self, body: tuple[Op, ...]) -> Barriers:
        """Interpret ops in order; yields the moves that must happen before the next one."""
        for op in body:
            barrier = self.plan.barriers.get(id(op))
            if barrier:
                yield barrier
            if op.name in ("for_tiles", "for_range"):
                yield from self.loop(op)
            else:
                self.op(op)

    def loop(self, op: Op) -> Barriers:
        bounds = 2 if op.get("bounds") else 0
        count = len(op.args) - len(op.operands) + bounds
        variables, carried = op.args[:count], op.args[count:]
        state = [self.values[v.name] for v in op.operands[bounds:]]
        for point in self.points(op, variables):
            for variable, place in zip(variables, point, strict=True):
                if isinstance(place, Tile):
                    self.loop_tiles[variable.name] = place
                else:
                    self.values[variable.name] = torch.tensor(place)
            self.values.update(zip((c.name for c in carried), state, strict=True))
            yield from self.block(op.body)
            if carried:
                state = [self.values[v.name] for v in op.body[-1].operands]
        self.values.update(zip((r.name for r in op.results), state, strict=True))

    def points(self, op: Op, variables: Sequence[Value]) -> Iterator[tuple[Tile | int, ...]]:
        """The iterations of a loop, row-major; ``backwards``, tiles from the last one on."""
        if op.name == "for_range":
            lo, hi = self.number(op["lo"]), self.number(op["hi"])
            runs = self.runs(variables[0], lo, hi)
            return ((i,) for a, b in runs for i in range(a, b))
        if op.get("bounds"):
            lo, hi = (int(self.values[v.name]) for v in op.operands[:2])
            return ((tile,) for tile in self.axis_tiles(variables[0], lo, hi, None))
        spans = [self.number(extent) for extent in op["extent"]]
        axes = [
            self.axis_tiles(variable, 0, span, str(extent))
            for variable, span, extent in zip(variables, spans, op["extent"], strict=True)
        ]
        return itertools.product(*axes)

    def axis_tiles(self, variable: Value, lo: int, hi: int, extent: str | None) -> list[Tile]:
        """``[lo, hi)``, or this rank's blocks of it, cut into tiles."""
        keys = (variable.name, variable.name.split(".")[0], extent or "")
        size = next((self.tiles[key] for key in keys if key in self.tiles), max(1, hi - lo))
        runs = self.runs(variable, lo, hi)
        pieces = [(i, min(i + size, b)) for a, b in runs for i in range(a, b, size)]
        found = [Tile(a, b, number) for number, (a, b) in enumerate(pieces)]
        return found[::-1] if self.backwards else found

    def runs(self, variable: Value, lo: int, hi: int) -> list[tuple[int, int]]:
        """``[lo, hi)``, or what this rank owns of it where the loop walks its part only."""
        owned = self.plan.owned.get(variable.name)
        if owned is None:
            return [(lo, hi)]
        mine = self.moves.own[owned][self.rank]
        return _runs(mine[(mine >= lo) & (mine < hi)])

    # --- ops -----------------------------------------------------------------------------------

    def op(self, op: Op) -> None:
        if op.name == "store":
            self.store(op)
        elif op.name != "yield" and op.results:
            operands = () if op.name in ("index", "bound") else op.operands
            result = self.result(op, [self.values[v.name] for v in operands])
            self.values[op.results[0].name] = result

    def result(self, op: Op, operands: list[torch.Tensor]) -> torch.Tensor:
        type_ = op.results[0].type
        if op.name in ops.COMPUTED:
            return ops.compute(op, operands)
        if op.name == "load":
            return self.load(op)
        if op.name == "param":
            return torch.tensor(self.inputs[op.symbol], dtype=ops.HELD[type_.dtype])
        if op.name == "constant":
            return torch.tensor(op["value"], dtype=ops.HELD[type_.dtype])
        if op.name in ("zeros", "full"):
            fill = op.get("value", 0)
            return torch.full(self.shape(type_), fill, dtype=ops.HELD[type_.dtype])
        if op.name == "reshape":
            return operands[0].reshape(self.shape(type_))
        if op.name == "index":
            tile = self.loop_tiles[op.operands[0].name]
            return torch.arange(tile.start, tile.stop)
        if op.name == "bound":
            return torch.tensor(getattr(self.loop_tiles[op.operands[0].name], op["which"]))
        raise InternalError(op.span, detail=f"the reference executor does not know `{op.name}`")

    def load(self, op: Op) -> torch.Tensor:
        memory = self.moves.read(op.symbol, self.rank, summed=id(op) in self.plan.summed)
        view, index = self.place(op, memory)
        found = view[index].clone() if index else view.clone()
        return found.to(ops.HELD[op.results[0].type.dtype])

    def store(self, op: Op) -> None:
        memory = self.moves.write(op.symbol, self.rank)
        view, index = self.place(op, memory)
        value = self.values[op.operands[0].name].to(memory.dtype)
        if index:
            view[index] = value
        else:
            view.copy_(value)

    def place(self, op: Op, memory: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The part of a tensor that an op names: a view with scalar axes dropped, and the rest."""
        assert op.ref is not None
        view, axis = memory, 0
        index: list[slice | torch.Tensor | None] = []
        for element in op.ref.index:
            if isinstance(element, Broadcast):
                index.append(None)
                continue
            found = self.element(element, memory.shape[axis])
            self.check(op, memory, axis, found)
            dropped = memory.ndim - view.ndim
            if isinstance(found, int):
                view = view.select(axis - dropped, found)
            else:
                index.append(found)
            axis += 1
        return view, tuple(index)

    def element(self, element: Index, length: int) -> int | slice | torch.Tensor:
        if isinstance(element, All):
            return slice(0, length)
        if isinstance(element, Range):
            return slice(self.number(element.lo), self.number(element.hi))
        if isinstance(element, At):
            tile, start = self.loop_tiles[element.value.name], self.number(element.start)
            return slice(start, start + tile.stop - tile.start)
        if isinstance(element, Expr):
            return self.number(element)
        if isinstance(element, Value) and element.type.is_tile:
            tile = self.loop_tiles[element.name]
            return slice(tile.start, tile.stop)
        assert isinstance(element, Value)
        value = self.values[element.name]
        return int(value) if value.ndim == 0 else value

    def check(
        self, op: Op, memory: torch.Tensor, axis: int, found: int | slice | torch.Tensor
    ) -> None:
        if isinstance(found, int):
            lo, hi = found, found + 1
        elif isinstance(found, slice):
            lo, hi = found.start, found.stop
        else:
            lo, hi = (int(found.min()), int(found.max()) + 1) if found.numel() else (0, 0)
        length = memory.shape[axis]
        if lo < 0 or hi > length:
            span: Span | None = op.span
            tensor = op.symbol
            raise OutOfBounds(
                span, rank=self.rank, lo=lo, hi=hi, axis=axis, tensor=tensor, length=length
            )

    # --- expressions ---------------------------------------------------------------------------

    def number(self, expr: Expr | int) -> int:
        """An index expression's value on this rank, here and now."""
        return expr if isinstance(expr, int) else int(expr.evaluate(_Names(self)))

    def shape(self, type_: Type) -> tuple[int, ...]:
        """The lengths of a value's axes."""
        return tuple(self.length(dim) for dim in type_.shape)

    def length(self, dim: str) -> int:
        if dim in self.loop_tiles:
            tile = self.loop_tiles[dim]
            return tile.stop - tile.start
        return int(dim) if dim.isdigit() else self.number(parse_ir(f"x {{v = {dim}}}")["v"])


class _Names(Mapping[str, Any]):
    """What names in an expression stand for: extents, RANK, scalars, fields of tiles, tables."""

    def __init__(self, rank: _Rank) -> None:
        self.rank = rank

    def __getitem__(self, name: str) -> Any:
        rank = self.rank
        if name in rank.extents:
            return rank.extents[name]
        if name == "RANK":
            return rank.rank
        if name in rank.values:
            return int(rank.values[name])
        tile, _, which = name.rpartition(".")
        if tile in rank.loop_tiles:
            found = rank.loop_tiles[tile]
            return {"start": found.start, "stop": found.stop, "tile": found.number}[which]
        return rank.moves.read(name, rank.rank, summed=False).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.rank.extents)

    def __len__(self) -> int:
        return len(self.rank.extents)


def _runs(indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Increasing indices as maximal runs ``[lo, hi)`` of neighbours."""
    if not indices.size:
        return []
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, cuts)]
