"""Random arguments of a kernel, from its IR alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilelink.backend.expand import dims_of, environment, evaluate
from tilelink.ir import FLOATS, Broadcast, Op, Value
from tilelink.ir.limits import TooLarge

if TYPE_CHECKING:
    import torch


def random_inputs(op: Op, seed: int) -> list[dict[str, Any]]:
    """For each rank, a CPU tensor for every ``in`` and ``inout`` tensor and a number for every scalar.

    ``op`` is a kernel or a fused program. Every rank draws its own. Floats are standard normal; a
    scalar float is 1e-5, small enough for an epsilon, a scalar integer 1. An integer table that bounds
    a loop rises from 0 to the extent that the loop walks; one that indexes an axis lies inside it; any
    other lies in ``[0, world)``, or in ``[1, world]`` where something is divided by it. Raises TooLarge
    where they do not fit in memory.
    """
    import torch

    from tilelink.backend.dtypes import TORCH_DTYPES

    check_memory(op)
    generator = torch.Generator().manual_seed(seed)
    bounds, indices = table_uses(op)
    divisors = divided_by(op)
    ranks: list[dict[str, Any]] = [{} for _ in range(int(op["world"]))]
    for child in op.body:
        name = child.symbol if child.ref is not None else ""
        if child.name == "tensor" and child["role"] in ("in", "inout"):
            shape, dtype = dims_of(child, environment(op)), TORCH_DTYPES[child["dtype"]]
            for rank in ranks:
                if child["dtype"] in FLOATS:
                    value = torch.randn(shape, generator=generator)
                elif name in bounds:
                    value = _rising(shape, bounds[name], generator)
                else:
                    least = int(name in divisors and name not in indices)
                    limit = indices.get(name, len(ranks)) + least
                    value = torch.randint(least, limit, shape, generator=generator)
                rank[name] = value.to(dtype)
        elif child.name == "scalar":
            for rank in ranks:
                rank[name] = 1e-5 if child["dtype"] in FLOATS else 1
    return ranks


def check_memory(op: Op) -> None:
    """TooLarge where the tensors of all ranks do not fit in the memory of this machine.

    Each is counted twice in fp32: what is computed, and what it is compared with.
    """
    env = environment(op)
    elements = sum(math.prod(dims_of(tensor, env)) for tensor in op.find("tensor"))
    need = 8 * int(op["world"]) * elements
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > most:
        raise TooLarge(
            op.span,
            what=f"the tensors of all ranks of `{op.symbol}` take {need:,} bytes here",
            most=most,
            unit="bytes, the memory of this machine",
            advice="run it with smaller extents: `--set M=512`",
        )


def table_uses(op: Op) -> tuple[dict[str, int], dict[str, int]]:
    """The tables that bound loops, and those that index axes, each with the extent concerned."""
    env = environment(op)
    tensors = {child.symbol: child for child in op.find("tensor")}
    read: dict[str, str] = {}
    walked: dict[str, list[str]] = {}
    for inner in op.walk():
        if inner.name == "load" and inner.symbol in tensors:
            if tensors[inner.symbol]["dtype"] not in FLOATS:
                read[inner.results[0].name] = inner.symbol
        elif inner.name == "for_tiles" and inner.get("bounds"):
            found = [read[v.name] for v in inner.operands[:2] if v.name in read]
            walked[inner.args[0].name] = found
    bounds: dict[str, int] = {}
    indices: dict[str, int] = {}
    for inner in op.walk():
        for value, dim in _indexed(inner, tensors):
            extent = int(evaluate(dim, env, inner))
            for table in walked.get(value.name, ()):
                bounds[table] = min(extent, bounds.get(table, extent))
            if value.name in read:
                table = read[value.name]
                indices[table] = min(extent, indices.get(table, extent))
    return bounds, indices


def divided_by(op: Op) -> frozenset[str]:
    """The tensors of whose elements an integer division has one as its divisor, as it was read or put in shape."""
    read: dict[str, str] = {}
    found: set[str] = set()
    for inner in op.walk():
        if inner.name == "load":
            read[inner.results[0].name] = inner.symbol
        elif inner.name in ("expand", "transpose", "cast", "reshape") and inner.results:
            read[inner.results[0].name] = read.get(inner.operands[0].name, "")
        elif inner.name in ("floordiv", "mod"):
            found.add(read.get(inner.operands[1].name, ""))
    return frozenset(found - {""})


def _indexed(op: Op, tensors: dict[str, Op]) -> Iterator[tuple[Value, Any]]:
    """The values that ``op`` indexes a tensor with, each with the extent of its axis."""
    if op.ref is not None and op.ref.symbol in tensors and op.name in ("load", "store"):
        axes = [item for item in op.ref.index if not isinstance(item, Broadcast)]
        for item, dim in zip(axes, tensors[op.ref.symbol]["dims"], strict=False):
            if isinstance(item, Value):
                yield item, dim


def _rising(shape: tuple[int, ...], last: int, generator: torch.Generator) -> torch.Tensor:
    """Integers that rise along the last axis from 0 to ``last``."""
    import torch

    table = torch.randint(0, last + 1, shape, generator=generator).sort(dim=-1).values
    table[..., 0], table[..., -1] = 0, last
    return table
