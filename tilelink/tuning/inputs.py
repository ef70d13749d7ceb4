"""Inputs of a problem on one GPU, what the library makes of them, and what the result has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.expand import dims_of, environment
from tilelink.ir import FLOATS, Op
from tilelink.tuning.errors import CannotMakeInputs
from tilelink.tuning.problem import READY_MADE, Problem
from tilelink.tuning.ranks import Part
from tilelink.tuning.timing import Run

MOST_SETS = 12
# Kernels whose result the library gives: an independent reference, and the baseline.
LIBRARY = ("ag_gemm", "gemm_rs", "gemm_ar", "gemm")


@dataclass(frozen=True, slots=True)
class Sets:
    """``tensors``: for each input set, tensors by name on this rank; ``scalars``: by name."""

    op: Op
    tensors: list[dict[str, torch.Tensor]]
    scalars: dict[str, float]
    outputs: tuple[str, ...]

    def of(self, i: int) -> dict[str, torch.Tensor]:
        """The tensors of set i modulo the number of sets."""
        return self.tensors[i % len(self.tensors)]


def make_sets(op: Op, part: Part, seed: int) -> Sets:
    """Standard normal inputs, other ones on every rank; enough sets that weights do not stay in the cache."""
    environment_ = environment(op)
    generator = torch.Generator(part.device).manual_seed(1000 * seed + part.rank)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    outputs: list[str] = []
    for tensor in op.find("tensor"):
        if tensor["role"] == "temp":
            continue
        if tensor["dtype"] not in FLOATS:
            raise CannotMakeInputs(
                kernel=op.symbol, tensor=tensor.symbol, dtype=str(tensor["dtype"])
            )
        dtype = TORCH_DTYPES[tensor["dtype"]]
        if tensor["role"] == "out":
            outputs.append(tensor.symbol)
        else:
            shapes[tensor.symbol] = dims_of(tensor, environment_), dtype
    kept = [
        torch.Size(shape).numel() * dtype.itemsize
        for name, (shape, dtype) in shapes.items()
        if op.declared(name)["move"] == "local"
    ]
    cache = torch.cuda.get_device_properties(part.device).L2_cache_size
    count = min(MOST_SETS, max(2, -(-2 * cache // max(1, sum(kept)))))
    sets = [
        {
            name: torch.empty(shape, dtype=dtype, device=part.device).normal_(generator=generator)
            for name, (shape, dtype) in shapes.items()
        }
        for _ in range(count)
    ]
    scalars = {op_.symbol: 1.0 for op_ in op.find("scalar")}
    # One output for all sets: what is measured is not read again.
    for name in outputs:
        declared = op.declared(name)
        out = torch.empty(
            dims_of(declared, environment_),
            dtype=TORCH_DTYPES[declared["dtype"]],
            device=part.device,
        )
        for some in sets:
            some[name] = out
    return Sets(op, sets, scalars, tuple(outputs))


def plain(problem: Problem) -> bool:
    """Whether the library computes a problem: a ready-made product and collective without extras."""
    usual = problem.present is None and not problem.constants
    return problem.file == READY_MADE and problem.kernel in LIBRARY and usual


def reference(problem: Problem, part: Part, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The result of a plain problem in fp32 throughout; collective."""
    a, b = tensors["A"], tensors["B"]
    if problem.kernel == "ag_gemm":
        whole = a.new_empty(a.shape[0] * part.world, a.shape[1])
        dist.all_gather_into_tensor(whole, a, group=part.group)
        return whole.float() @ b.float()
    partial = a.float() @ b.float()
    if problem.kernel == "gemm_rs":
        mine = partial.new_empty(partial.shape[0] // part.world, partial.shape[1])
        dist.reduce_scatter_tensor(mine, partial, group=part.group)
        return mine
    if problem.kernel == "gemm_ar":
        dist.all_reduce(partial, group=part.group)
    return partial


def in_turn(problem: Problem, part: Part, sets: Sets) -> Run:
    """A plain problem as the library does it: the product and the collective, one after the other."""
    first = sets.of(0)
    a, b = first["A"], first["B"]
    group: Any = part.group
    if problem.kernel == "ag_gemm":
        whole = a.new_empty(a.shape[0] * part.world, a.shape[1])
        product = a.new_empty(whole.shape[0], b.shape[1])

        def gather(i: int) -> torch.Tensor:
            dist.all_gather_into_tensor(whole, sets.of(i)["A"], group=group)
            return torch.mm(whole, sets.of(i)["B"], out=product)

        return gather
    product = a.new_empty(a.shape[0], b.shape[1])
    mine = a.new_empty(a.shape[0] // part.world, b.shape[1])
    after: dict[str, Callable[[], Any]] = {
        "gemm_rs": lambda: dist.reduce_scatter_tensor(mine, product, group=group),
        "gemm_ar": lambda: dist.all_reduce(product, group=group),
        "gemm": lambda: None,
    }
    collective = after[problem.kernel]

    def multiply(i: int) -> torch.Tensor:
        torch.mm(sets.of(i)["A"], sets.of(i)["B"], out=product)
        collective()
        return mine if problem.kernel == "gemm_rs" else product

    return multiply
