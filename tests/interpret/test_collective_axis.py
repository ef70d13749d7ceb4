"""Collectives along an axis that is not the first, on the interpreter and in what a plan enqueues."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.collectives import Group
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, plan
from tilelink.backend.runtime.views import spread_axis
from tilelink.ir import Op
from tilelink.schedules import Move, Schedule


@tilelink.kernel("gather A[M, K] over K")
def gathered(A, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]


@tilelink.kernel("scatter C[M, N] over N sum")
def scattered(A, C):  # type: ignore[no-untyped-def]
    M, N = A.shape
    for m, n in tk.tiles(M, N):
        C[m, n] = A[m, n]


def fused(kernel: Any, moved: str, **extents: int) -> Op:
    op = kernel.build(extents, world=2)
    return compile_kernel(op, Schedule(workers=1, moves=((moved, Move("none")),)))


def test_a_gather_over_columns() -> None:
    shards = [torch.arange(32.0).view(4, 8).bfloat16() + 100 * r for r in range(2)]
    program = fused(gathered, "A", M=4, K=16)
    for found in interpret.run(program, [{"A": s} for s in shards], emit=emit):
        assert torch.equal(found["C"], torch.cat(shards, dim=1))


def test_a_scatter_over_columns() -> None:
    parts = [torch.arange(64.0).view(4, 16).bfloat16() * (r + 1) for r in range(2)]
    program = fused(scattered, "C", M=4, N=16)
    found = interpret.run(program, [{"A": p} for p in parts], emit=emit)
    whole = (parts[0] + parts[1]).chunk(2, dim=1)
    for rank in range(2):
        assert torch.equal(found[rank]["C"], whole[rank])


@pytest.mark.parametrize("axis", [0, 1])
def test_plans_hand_the_library_its_own_layout(axis: int) -> None:
    shards = [torch.arange(32.0).view(4, 8) + 100 * r for r in range(2)]
    whole = torch.cat(shards, dim=axis)

    def all_gather(target: torch.Tensor, source: torch.Tensor) -> None:
        assert torch.equal(source.view(-1), shards[1].view(-1))
        target.view(-1).copy_(torch.cat([s.view(-1) for s in shards]))

    def reduce_scatter(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.chunk(2)[1].view(target.shape) * 2)

    recorder: Any = object.__new__(plan.Recorder)
    recorder.plan, recorder.world, recorder._agents = plan.Plan(), 2, {}
    recorder._group = Group(gather=all_gather, scatter=reduce_scatter)
    recorder.tensors = {}
    gathered_to, sum_of_mine = torch.zeros_like(whole), torch.zeros_like(shards[1])
    plan.Recorder.collective(recorder, "all_gather", shards[1], gathered_to, (), "a")
    plan.Recorder.collective(recorder, "reduce_scatter", whole, sum_of_mine, (), "b")
    recorder.plan.close()
    recorder.plan.enqueue(0)
    assert torch.equal(gathered_to, whole)
    assert torch.equal(sum_of_mine, shards[1] * 2)


def test_the_axis_of_one_rank_is_the_first() -> None:
    assert spread_axis((4, 8), (4, 8)) == 0 and spread_axis((4, 8), (4, 16)) == 1
