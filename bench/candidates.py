"""What the candidates of a case share: inputs with references, the function to time, graph capture.

A candidate is a function of a number i that works on input set i modulo the number of sets and
returns the output tensor, or None where there is nothing to compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.cases import AG_GEMM, GEMM, GEMM_RS, Case
from bench.cluster import Part
from tilelink.tuning.timing import Run

L2_BYTES = 60 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """``sets`` of (A of this rank, weight of this rank, fp32 reference of this rank's output)."""

    sets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def a(self, i: int) -> torch.Tensor:
        """A of set i modulo the number of sets."""
        return self.sets[i % len(self.sets)][0]

    def b(self, i: int) -> torch.Tensor:
        """The weight of set i."""
        return self.sets[i % len(self.sets)][1]

    def reference(self, i: int) -> torch.Tensor:
        """The fp32 output of set i."""
        return self.sets[i % len(self.sets)][2]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """``build`` gives the function to time; ``graph`` asks for replays. ``origin``: of the schedule."""

    name: str
    family: str
    build: Callable[[], Run]
    schedule: dict[str, Any] | None = None
    compared: bool = True
    graph: bool = False
    origin: str | None = None


def set_count(case: Case) -> int:
    """How many input sets keep weights out of the L2 cache: two, more where they are small.

    All candidates of a case walk through the sets together, so all other weights are read between two
    uses of one. They are twice as large as the cache in all: a weight of 58.7 MB, which nearly fits it,
    comes back after 117 MB of others.
    """
    return min(12, max(2, -(-2 * L2_BYTES // case.weight_bytes)))


def make_inputs(part: Part, case: Case, seed: int) -> Inputs:
    """Random bf16 inputs, different on every rank, with their references. Collective.

    The same seed gives the same values in every process with as many ranks on GPUs of one kind.
    """
    generator = torch.Generator(part.device).manual_seed(1000 * seed + part.rank)

    def draw(*shape: int) -> torch.Tensor:
        tile = torch.empty(shape, dtype=torch.bfloat16, device=part.device)
        return tile.normal_(generator=generator)

    sets = []
    for index in range(set_count(case)):
        a, b = draw(case.rows_in(part.world), case.k), draw(case.k, case.n)
        b.mul_(case.k**-0.5)
        # Two references are enough: further sets only keep the cache cold.
        sets.append((a, b, _reference(part, case, a, b) if index < 2 else torch.empty(0)))
    return Inputs(sets)


def _reference(part: Part, case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The output of this rank in fp32 throughout."""
    if case.kind == AG_GEMM:
        whole = a.new_empty(case.m, case.k)
        dist.all_gather_into_tensor(whole, a, group=part.group)
        return whole.float() @ b.float()
    partial = a.float() @ b.float()
    if case.kind == GEMM:
        return partial
    if case.kind == GEMM_RS:
        mine = partial.new_empty(case.rows_out(part.world), case.n)
        dist.reduce_scatter_tensor(mine, partial, group=part.group)
        return mine
    dist.all_reduce(partial, group=part.group)
    return partial


def eager_and_graph(
    name: str,
    family: str,
    build: Callable[[], Run],
    schedule: dict[str, Any] | None = None,
    origin: str | None = None,
) -> Iterator[Candidate]:
    """The same function twice: called, and captured in CUDA graphs."""
    yield Candidate(name, family, build, schedule, origin=origin)
    yield Candidate(f"{name} graph", family, build, schedule, graph=True, origin=origin)
