"""Memory of the reference executor, and what each communication statement does to it.

Every rank holds every tensor at its global shape. Of a tensor that a rank holds only a part of, the
rest is NaN, so that a read of what is not there shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tilelink.backend.dtypes import TORCH_DTYPES, sum_dtype
from tilelink.backend.reference_plan import GATHERED, SUMMED, InputError, Plan
from tilelink.errors import TilelinkError
from tilelink.frontend.owners import shard_indices
from tilelink.ir import Expr, Op

Memory = list[dict[str, torch.Tensor]]


class CapacityExceeded(TilelinkError):
    """More rows than an exchange's result has room for."""

    code = "capacity-exceeded"
    message = "{count} rows are sent to rank {rank}, but `{tensor}` has room for {capacity}"
    hint = "give the extent of `{tensor}` a capacity that no routing exceeds"


class TableRange(TilelinkError):
    """A table entry that is no rank."""

    code = "table-range"
    message = "`{table}[{row}, {column}]` of rank {rank} is {value}, but the ranks are 0 to {last}"
    hint = "every entry of an exchange's table is the rank that the copy goes to"


class TablesDiffer(TilelinkError):
    """An owner map's table that is not the same on all ranks."""

    code = "tables-differ"
    message = "`{table}`, which says who owns what, is not the same on ranks 0 and {rank}"
    hint = "an owner map is one function of the element's index, the same on every rank"


def dims_of(tensor: Op, extents: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's global shape."""
    return tuple(
        int(dim.evaluate(extents)) if isinstance(dim, Expr) else int(dim) for dim in tensor["dims"]
    )


def _nothing(shape: Sequence[int], dtype: str) -> torch.Tensor:
    fill = float("nan") if TORCH_DTYPES[dtype].is_floating_point else 0
    return torch.full(tuple(shape), fill, dtype=TORCH_DTYPES[dtype])


def owned_indices(
    plan: Plan, extents: Mapping[str, int], inputs: Sequence[Mapping[str, torch.Tensor | float]]
) -> dict[str, list[npt.NDArray[np.int64]]]:
    """For every tensor with ``over``, the global indices along it that each rank holds."""
    world = extents["WORLD"]
    own: dict[str, list[npt.NDArray[np.int64]]] = {}
    for name, tensor in plan.tensors.items():
        if tensor.get("over") is None:
            continue
        names: dict[str, object] = dict(extents)
        owner = Expr.of(tensor["owner"])
        for table in sorted(owner.names & set(plan.tensors)):
            given = [_table(each, table) for each in inputs]
            for rank, other in enumerate(given):
                if not np.array_equal(other, given[0]):
                    raise TablesDiffer(tensor.span, table=table, rank=rank)
            names[table] = given[0]
        extent = dims_of(tensor, extents)[int(tensor["over"])]
        own[name] = shard_indices(owner, extent, world, names, tensor.span)
    return own


def _table(inputs: Mapping[str, torch.Tensor | float], name: str) -> npt.NDArray[np.int64]:
    given = inputs.get(name)
    if not isinstance(given, torch.Tensor):
        raise InputError(detail=f"`{name}`, which an owner map reads, is not among the inputs")
    return given.cpu().numpy().astype(np.int64)


def initial_storage(
    kernel: Op,
    plan: Plan,
    extents: Mapping[str, int],
    inputs: Sequence[Mapping[str, torch.Tensor | float]],
) -> Memory:
    """The tensors of every rank when the kernel starts: inputs gathered or placed, the rest NaN."""
    own = owned_indices(plan, extents, inputs)
    memory: Memory = [{} for _ in inputs]
    for scalar in kernel.find("scalar"):
        for rank, given in enumerate(inputs):
            if scalar.symbol not in given:
                raise InputError(scalar.span, detail=f"rank {rank} has no `{scalar.symbol}`")
    for name, tensor in plan.tensors.items():
        shape, dtype = dims_of(tensor, extents), str(tensor["dtype"])
        for rank in range(len(inputs)):
            memory[rank][name] = _nothing(shape, dtype)
        if tensor["role"] not in ("in", "inout"):
            continue
        axis = int(tensor.get("over", 0))
        for rank, given in enumerate(inputs):
            mine = torch.from_numpy(own[name][rank]) if name in own else None
            held = list(shape)
            if mine is not None:
                held[axis] = len(mine)
            value = _checked(given.get(name), name, rank, held, dtype)
            everywhere = tensor["move"] in GATHERED
            for other in range(len(inputs)) if everywhere else (rank,):
                if mine is None:
                    memory[other][name].copy_(value)
                else:
                    memory[other][name].index_copy_(axis, mine, value)
    return memory


def _checked(
    value: torch.Tensor | float | None, name: str, rank: int, shape: list[int], dtype: str
) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(detail=f"rank {rank} has no tensor `{name}`")
    if list(value.shape) != shape:
        raise InputError(
            detail=f"`{name}` of rank {rank} has shape {list(value.shape)}, expected {shape}"
        )
    if value.dtype != TORCH_DTYPES[dtype]:
        raise InputError(detail=f"`{name}` of rank {rank} holds {value.dtype}, expected {dtype}")
    return value.detach().cpu()


class Moves:
    """The memory of all ranks, and the moves between them.

    ``memory`` is what a rank itself wrote or was given; ``moved`` is what a moved tensor holds once it
    has moved: the sum, or the gathered whole. ``dirty`` names the moves whose source changed since.
    """

    def __init__(self, kernel: Op, plan: Plan, extents: Mapping[str, int], memory: Memory) -> None:
        self.plan = plan
        self.extents = extents
        self.memory = memory
        self.world = extents["WORLD"]
        self.own = owned_indices(plan, extents, memory)
        self.moved: Memory = [{} for _ in memory]
        stored = {op.symbol for op in kernel.walk() if op.name == "store"}
        moves = [
            name
            for name, tensor in plan.tensors.items()
            if tensor["move"] in SUMMED | {"exchange", "combine"}
            or (tensor["move"] in GATHERED and name in stored)
        ]
        # A combine needs the routes of its exchange, whatever the order of declaration.
        self.order = sorted(moves, key=lambda name: plan.tensors[name]["move"] != "exchange")
        self.dirty = set(moves)

    def read(self, name: str, rank: int, *, summed: bool) -> torch.Tensor:
        """The memory that a load reads; ``summed`` asks for what has moved."""
        return (self.moved if summed else self.memory)[rank][name]

    def write(self, name: str, rank: int) -> torch.Tensor:
        """The memory that a store writes; moves that depend on it are due again."""
        for moved in self.order:
            if name in (moved, self.plan.tensors[moved].get("table")):
                self.dirty.add(moved)
        return self.memory[rank][name]

    def run(self, names: Iterable[str]) -> None:
        """Do the moves among ``names`` that are due."""
        wanted = frozenset(names)
        for name in self.order:
            if name in wanted and name in self.dirty:
                move = self.plan.tensors[name]["move"]
                action = {"exchange": self._exchange, "combine": self._combine}.get(move)
                if action is not None:
                    action(name)
                elif move in GATHERED:
                    self._gather(name)
                else:
                    self._sum(name)
                self.dirty.discard(name)

    def outputs(self) -> list[dict[str, torch.Tensor]]:
        """The ``out`` and ``inout`` tensors of every rank, shards of those with ``over``."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.memory]
        for name, tensor in self.plan.tensors.items():
            if tensor["role"] not in ("out", "inout"):
                continue
            for rank in range(self.world):
                whole = self.moved[rank].get(name, self.memory[rank][name])
                if name in self.own:
                    mine = torch.from_numpy(self.own[name][rank])
                    whole = whole.index_select(int(tensor["over"]), mine)
                found[rank][name] = whole.clone()
        return found

    # --- the statements ------------------------------------------------------------------------

    def _sum(self, name: str) -> None:
        """Contributions, already rounded to the tensor's type, added in rank order in fp32; integers as such."""
        tensor = self.plan.tensors[name]
        wide = sum_dtype(TORCH_DTYPES[tensor["dtype"]])
        total = torch.zeros_like(self.memory[0][name], dtype=wide)
        for rank in range(self.world):
            total = total + self.memory[rank][name].to(wide)
        rounded = total.to(TORCH_DTYPES[tensor["dtype"]])
        for rank in range(self.world):
            if tensor["move"] == "reduce":
                self.moved[rank][name] = rounded.clone()
                continue
            part = _nothing(rounded.shape, tensor["dtype"])
            axis, mine = int(tensor["over"]), torch.from_numpy(self.own[name][rank])
            self.moved[rank][name] = part.index_copy_(axis, mine, rounded.index_select(axis, mine))

    def _gather(self, name: str) -> None:
        """Every rank's own part, everywhere."""
        axis = int(self.plan.tensors[name]["over"])
        whole = self.memory[0][name].clone()
        for rank in range(self.world):
            mine = torch.from_numpy(self.own[name][rank])
            whole.index_copy_(axis, mine, self.memory[rank][name].index_select(axis, mine))
        for rank in range(self.world):
            self.moved[rank][name] = whole.clone()

    def _routes(self, name: str) -> list[list[tuple[int, int, int]]]:
        """For each rank the (source, t, j) of the rows that it receives, in their order."""
        tensor = self.plan.tensors[name]
        routes: list[list[tuple[int, int, int]]] = [[] for _ in range(self.world)]
        for source in range(self.world):
            for t, row in enumerate(self.memory[source][tensor["table"]].tolist()):
                for j, to in enumerate(row):
                    if not 0 <= to < self.world:
                        raise TableRange(
                            tensor.span, table=tensor["table"], row=t, column=j, rank=source,
                            value=to, last=self.world - 1,
                        )  # fmt: skip
                    routes[to].append((source, t, j))
        return routes

    def _exchange(self, name: str) -> None:
        """Copy j of row t of every rank goes to the rank that the table names."""
        tensor = self.plan.tensors[name]
        for rank, routes in enumerate(self._routes(name)):
            into, offsets = self.memory[rank][tensor["into"]], self.memory[rank][tensor["offsets"]]
            if len(routes) > len(into):
                raise CapacityExceeded(
                    tensor.span, count=len(routes), rank=rank, tensor=tensor["into"],
                    capacity=len(into),
                )  # fmt: skip
            into.zero_()
            for place, (source, t, _) in enumerate(routes):
                into[place] = self.memory[source][name][t].to(into.dtype)
            for source in range(self.world + 1):
                offsets[source] = sum(origin < source for origin, _, _ in routes)

    def _combine(self, name: str) -> None:
        """Row i of every rank goes back to the (t, j) that the exchange took row i from."""
        tensor = self.plan.tensors[name]
        exchange = next(
            n for n, op in self.plan.tensors.items()
            if op["move"] == "exchange" and op["into"] == tensor["source"]
        )  # fmt: skip
        for rank, routes in enumerate(self._routes(exchange)):
            for place, (source, t, j) in enumerate(routes):
                into = self.memory[source][tensor["into"]]
                into[t, j] = self.memory[rank][name][place].to(into.dtype)
