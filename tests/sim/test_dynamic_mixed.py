"""Dynamic rows of several tensors in one kernel: what is cut by owner in one nest is so wherever it is read."""

# What stands under `@tilelink.kernel` is read, not called.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.verify import RowsError, verify
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Move, Schedule, ScheduleError

K, H, N = 16, 24, 16
EXAMPLE = {"M": 24, "K": K, "H": H, "N": N}


def product(A, B, m, n, K):
    acc = tk.zeros([m, n], tk.float32)
    for k in tk.tiles(K):
        acc = tk.dot(A[m, k], B[k, n], acc)
    return acc


@tilelink.kernel("gather A[M, K] over M", example=EXAMPLE)
def two_layers(A, B, D, C):
    M, K = A.shape
    H, N = D.shape
    P = tk.empty([M, H], tk.float32)
    for m, h in tk.tiles(M, H):
        P[m, h] = tk.maximum(product(A, B, m, h, K), 0.0)
    for m, n in tk.tiles(M, N):
        C[m, n] = product(P, D, m, n, H)


@tilelink.kernel("gather A[M, K] over M; reduce P[M, N] sum", example=EXAMPLE)
def summed_layers(A, B, D, P):
    M, K = A.shape
    H, N = D.shape
    Z = tk.empty([M, H], tk.float32)
    for m, h in tk.tiles(M, H):
        Z[m, h] = tk.maximum(product(A, B, m, h, K), 0.0)
    for m, n in tk.tiles(M, N):
        P[m, n] = product(Z, D, m, n, H)


@tilelink.kernel("gather A[M, K] over M; reduce P[M, N] sum", example=EXAMPLE)
def summed_residual(A, B, R, C):
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], tk.float32)
    for m, n in tk.tiles(M, N):
        P[m, n] = product(A, B, m, n, K)
    for m, n in tk.tiles(M, N):
        C[m, n] = P[m, n] + R[m, n]


@tilelink.kernel("scatter P[M, N] over M sum; reduce Q[M, N] sum", example=EXAMPLE)
def both_sums(A, B, D, P, Q):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        P[m, n] = product(A, B, m, n, K)
        Q[m, n] = product(A, D, m, n, K)


def inputs(name: str, rows: int, world: int) -> tuple[list[Any], list[list[torch.Tensor]]]:
    """The arguments of all ranks, and each output of each: integers, so that all sums are exact."""
    torch.manual_seed(rows)

    def draw(*shape: int) -> list[torch.Tensor]:
        return [torch.randint(-1, 2, shape).float() for _ in range(world)]

    shard = rows // world
    if name == "both_sums":
        a, b, d = draw(rows, K), draw(K, N), draw(K, N)
        p, q = (torch.stack([x @ y for x, y in zip(a, w, strict=True)]).sum(0) for w in (b, d))
        return [a, b, d], [list(p.chunk(world)), [q] * world]
    a = draw(shard, K)
    whole = torch.cat(a)
    if name == "summed_residual":
        b, r = draw(K, N), draw(rows, N)
        total = torch.stack([whole @ y for y in b]).sum(0)
        return [a, b, r], [[total + x for x in r]]
    b, d = draw(K, H), draw(H, N)
    each = [(whole @ x).clamp(min=0) @ y for x, y in zip(b, d, strict=True)]
    return [a, b, d], [each if name == "two_layers" else [torch.stack(each).sum(0)] * world]


KERNELS = {k.name: k for k in (two_layers, summed_layers, summed_residual, both_sums)}


def check(backend: str, name: str, world: int, rows: int, schedule: Schedule | None = None) -> None:
    arguments, wanted = inputs(name, rows, world)
    call = KERNELS[name].on(backend, world=world, schedule=schedule, dynamic={"M": (24, 72)})
    found = call(*arguments)
    outputs = found if len(wanted) > 1 else (found,)
    for output, want in zip(outputs, wanted, strict=True):
        for one, other in zip(output, want, strict=True):
            assert torch.equal(one.float(), other)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_rows_below_the_capacity_are_right(name: str, world: int) -> None:
    for rows in (6, 12, 18, 24, 30, 66, 72):
        check("simulate", name, world, rows)


@pytest.mark.parametrize("name", KERNELS)
def test_so_they_are_in_what_is_emitted(name: str) -> None:
    for rows in (6, 24, 42):
        check("interpret", name, 2, rows)


@pytest.mark.parametrize("resource", ["copy_engine", "sm:1", "none"])
def test_a_sum_beside_a_gather_has_no_range_of_rows_to_copy(resource: str) -> None:
    with pytest.raises(ScheduleError, match=r"moves.P.resource"):
        check("simulate", "summed_layers", 3, 6, Schedule(moves=(("P", Move(resource)),)))


@pytest.mark.parametrize("name", ["two_layers", "summed_layers", "summed_residual", "both_sums"])
def test_the_proof_refuses_tasks_that_take_rows_to_lie_otherwise(name: str) -> None:
    """A stage that walks all rows side by side where others walk them by owner, or the reverse."""
    kernel = KERNELS[name].build(EXAMPLE, world=2, dtype="fp32", dynamic=("M",))
    program = compile_kernel(kernel)
    verify(program)
    stages = [s for s in program.walk() if s.name == "stage" and s.get("live") is not None]
    refused = 0
    for stage in stages:
        whole = stage.with_attrs(segment=None, live=None, visit=None, segments=None, axis=None)

        def swap(op: Op, old: Op = stage, new: Op = whole) -> Op:
            if op is old:
                return new
            return (
                op.with_ops(tuple(swap(o) for o in op.body))
                if op.name in ("program", "launch")
                else op
            )

        with pytest.raises(TilelinkError):
            verify(swap(program))
        try:
            verify(swap(program))
        except RowsError as error:
            refused += "side by side" in str(error)
        except TilelinkError:
            pass
    assert stages
    assert refused or name == "both_sums"
