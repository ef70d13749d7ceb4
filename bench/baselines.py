"""What people have today: the library's parts alone and in turn, and torch's fused operators.

Nothing here uses NVLink multicast. Signatures are those of torch 2.11, ``torch.ops.symm_mem``:
``fused_all_gather_matmul(A, Bs, gather_dim, group_name, *, return_A)``,
``fused_matmul_reduce_scatter(A, B, reduce_op, scatter_dim, group_name)``,
``one_shot_all_reduce(input, reduce_op, group_name)``, ``two_shot_all_reduce_(input, reduce_op, group_name)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines the fused operators

from bench import stats
from bench.candidates import Candidate, Inputs, eager_and_graph
from bench.cases import AG_GEMM, GEMM, GEMM_AR, GEMM_RS, Case
from bench.cluster import Part
from tilelink.tuning.timing import Run

# A one-shot all-reduce reads the whole tensor of every peer. Above this many bytes it takes more than
# twice the time of the others (bf16, 8 ranks: 485 us with its product at 16 MiB, NCCL 212).
ONE_SHOT_BYTES = 16 << 20
NATIVE = "TORCH_SYMM_MEM_ENABLE_NATIVE_ASYNC_TP"


def baselines(part: Part, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    """All baselines of ``case``. Collective: buffers are filled, symmetric memory is met."""
    yield from _MAKERS[case.kind](part, case, inputs)


def _all_gather(part: Part, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    whole = inputs.a(0).new_empty(case.m, case.k)
    product = whole.new_empty(case.m, case.n)
    # The product alone is timed on real data.
    dist.all_gather_into_tensor(whole, inputs.a(0), group=part.group)

    def cublas(i: int) -> None:
        torch.mm(whole, inputs.b(i), out=product)

    def nccl(i: int) -> None:
        dist.all_gather_into_tensor(whole, inputs.a(i), group=part.group)

    def in_turn(i: int) -> torch.Tensor:
        dist.all_gather_into_tensor(whole, inputs.a(i), group=part.group)
        return torch.mm(whole, inputs.b(i), out=product)

    def async_tp(i: int) -> torch.Tensor:
        # `return_A` stays on: without it torch may take its multicast kernel.
        fused = torch.ops.symm_mem.fused_all_gather_matmul
        out: torch.Tensor = fused(inputs.a(i), [inputs.b(i)], 0, part.group_name)[1][0]
        return out

    def native(i: int) -> torch.Tensor:
        with _variable(NATIVE, "1"):
            return async_tp(i)

    yield from _alone(cublas, nccl)
    yield from eager_and_graph(stats.IN_TURN, stats.IN_TURN, lambda: in_turn)
    yield from eager_and_graph(stats.ASYNC_TP, stats.ASYNC_TP, lambda: async_tp)
    if native_applies(case, part.world):
        yield from eager_and_graph(f"{stats.ASYNC_TP} native", stats.ASYNC_TP, lambda: native)


def native_applies(case: Case, world: int) -> bool:
    """Whether torch's second setting of async-TP changes anything: it falls back elsewhere."""
    return case.kind == AG_GEMM and 2048 < case.m <= 4096 and (case.m // world) % world == 0


def _reduce_scatter(part: Part, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    product = inputs.a(0).new_empty(case.m, case.n)
    mine = product.new_empty(case.rows_out(part.world), case.n)
    torch.mm(inputs.a(0), inputs.b(0), out=product)

    def cublas(i: int) -> None:
        torch.mm(inputs.a(i), inputs.b(i), out=product)

    def nccl(i: int) -> None:
        dist.reduce_scatter_tensor(mine, product, group=part.group)

    def in_turn(i: int) -> torch.Tensor:
        torch.mm(inputs.a(i), inputs.b(i), out=product)
        dist.reduce_scatter_tensor(mine, product, group=part.group)
        return mine

    def async_tp(i: int) -> torch.Tensor:
        scatter = torch.ops.symm_mem.fused_matmul_reduce_scatter
        out: torch.Tensor = scatter(inputs.a(i), inputs.b(i), "sum", 0, part.group_name)
        return out

    yield from _alone(cublas, nccl)
    yield from eager_and_graph(stats.IN_TURN, stats.IN_TURN, lambda: in_turn)
    yield from eager_and_graph(stats.ASYNC_TP, stats.ASYNC_TP, lambda: async_tp)


def _all_reduce(part: Part, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    product = inputs.a(0).new_empty(case.m, case.n)
    # The collective alone works on this: its values grow with each call, which changes no time.
    alone = torch.mm(inputs.a(0), inputs.b(0))

    def cublas(i: int) -> None:
        torch.mm(inputs.a(i), inputs.b(i), out=product)

    def nccl(i: int) -> None:
        dist.all_reduce(alone, group=part.group)

    def in_turn(i: int) -> torch.Tensor:
        torch.mm(inputs.a(i), inputs.b(i), out=product)
        dist.all_reduce(product, group=part.group)
        return product

    def one_shot() -> Run:
        shared = part.symmetric(case.m, case.n)

        def run(i: int) -> torch.Tensor:
            torch.mm(inputs.a(i), inputs.b(i), out=shared)
            add = torch.ops.symm_mem.one_shot_all_reduce
            out: torch.Tensor = add(shared, "sum", part.group_name)
            return out

        return run

    def two_shot() -> Run:
        shared = part.symmetric(case.m, case.n)

        def run(i: int) -> torch.Tensor:
            torch.mm(inputs.a(i), inputs.b(i), out=shared)
            add = torch.ops.symm_mem.two_shot_all_reduce_
            out: torch.Tensor = add(shared, "sum", part.group_name)
            return out

        return run

    yield from _alone(cublas, nccl)
    yield from eager_and_graph(stats.IN_TURN, stats.IN_TURN, lambda: in_turn)
    if one_shot_applies(case):
        yield from eager_and_graph(stats.ONE_SHOT, stats.ONE_SHOT, one_shot)
    yield from eager_and_graph(stats.TWO_SHOT, stats.TWO_SHOT, two_shot)


def one_shot_applies(case: Case) -> bool:
    """Whether a one-shot all-reduce is worth a measurement."""
    return case.output_bytes <= ONE_SHOT_BYTES


def _product(part: Part, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    product = inputs.a(0).new_empty(case.m, case.n)

    def cublas(i: int) -> torch.Tensor:
        return torch.mm(inputs.a(i), inputs.b(i), out=product)

    yield from eager_and_graph(stats.CUBLAS, stats.CUBLAS, lambda: cublas)


_MAKERS: dict[str, Callable[[Part, Case, Inputs], Iterator[Candidate]]] = {
    AG_GEMM: _all_gather,
    GEMM_RS: _reduce_scatter,
    GEMM_AR: _all_reduce,
    GEMM: _product,
}


def _alone(cublas: Run, nccl: Run) -> Iterator[Candidate]:
    yield Candidate(stats.CUBLAS, stats.CUBLAS, lambda: cublas, compared=False)
    yield Candidate(stats.NCCL, stats.NCCL, lambda: nccl, compared=False)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
