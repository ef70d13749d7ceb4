"""One rank of a gloo group: operators and their gradients against plain PyTorch on whole tensors.

Run as ``python -m tests.unit.ops_rank RANK WORLD FILE``; FILE is where the ranks meet. Exits with an error
where a rank is off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tilelink import ops
from tilelink.errors import TilelinkError

M, K, N = 12, 16, 8


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every rank."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).requires_grad_()


def turned(b: torch.Tensor, nk: bool) -> torch.Tensor:
    return (b.t() if nk else b).detach().clone(memory_format=torch.contiguous_format)


class Ranks:
    """What the ranks pass, and what plain PyTorch makes of all of it in one process."""

    def __init__(self, name: str, world: int, dtype: torch.dtype) -> None:
        gathers = name == "ag_gemm"
        rows = M // world if gathers else M
        self.a = [drawn(r, rows, K, dtype=dtype) for r in range(world)]
        self.b = [drawn(10 + r, K, N, dtype=dtype) for r in range(world)]
        self.bias = [drawn(20 + r, N, dtype=dtype) for r in range(world)] if gathers else []
        wide = [[t.float() for t in ts] for ts in (self.a, self.b, self.bias)]
        if gathers:
            whole = torch.cat(wide[0])
            self.out = [whole @ b + bias for b, bias in zip(*wide[1:], strict=True)]
            self.grads = [drawn(30 + r, M, N).detach() for r in range(world)]
            loss = [(c * g).sum() for c, g in zip(self.out, self.grads, strict=True)]
        else:
            total: Any = sum(a @ b for a, b in zip(*wide[:2], strict=True))
            grad = drawn(30, M, N).detach()
            scattered = name == "gemm_rs"
            self.out = list(total.chunk(world)) if scattered else [total] * world
            self.grads = list(grad.chunk(world)) if scattered else [grad] * world
            loss = [(total * grad).sum()]
        torch.autograd.backward(torch.stack(loss).sum())


def close(name: str, mine: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 if mine.dtype == torch.float32 else 2e-2
    error = (mine.float() - expected.float()).norm() / expected.float().norm()
    assert error < limit, f"{name}: relative error {error:.1e}"


def check(name: str, rank: int, world: int, group: Any, nk: bool, dtype: Any, wants: str) -> None:
    """One operator; ``wants`` names what requires a gradient."""
    ranks, operator = Ranks(name, world, dtype), getattr(ops, name)
    a = ranks.a[rank].detach().clone().requires_grad_("a" in wants)
    b = turned(ranks.b[rank], nk).requires_grad_("b" in wants)
    args = [a, b]
    if ranks.bias:
        args.append(ranks.bias[rank].detach().clone().requires_grad_("bias" in wants))

    def call(*args: torch.Tensor) -> torch.Tensor:
        return operator(*args, nk=nk, group=group) * 1.0  # type: ignore[no-any-return]

    runs: list[Callable[..., torch.Tensor]] = [call]
    if wants == "a b bias":
        torch._dynamo.reset()
        runs.append(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for run in runs:
        for given in args:
            given.grad = None
        out = run(*args)
        close(name, out, ranks.out[rank])
        torch.autograd.backward(out, ranks.grads[rank].to(out.dtype))
        known = [ranks.a[rank].grad, turned_grad(ranks.b[rank], nk)]
        known += [ranks.bias[rank].grad] if ranks.bias else []
        for given, expected in zip(args, known, strict=True):
            assert (given.grad is not None) == given.requires_grad
            if given.grad is not None and expected is not None:
                close(f"{name}: gradient", given.grad, expected)


def turned_grad(b: torch.Tensor, nk: bool) -> torch.Tensor:
    assert b.grad is not None
    return b.grad.t() if nk else b.grad


def axes(rank: int, world: int) -> None:
    """Rows with axes of their own: (tokens, batch, K), tokens spread over the ranks."""
    x, b = drawn(1, M, 2, K).detach(), drawn(2, K, N).detach()
    mine = x.chunk(world)[rank]
    close("axes", ops.ag_gemm(mine, b), x @ b)
    close("axes", ops.gemm_rs(x, b / world), mine @ b)
    close("axes", ops.gemm_ar(x, b / world), x @ b)
    try:
        ops.gemm_rs(drawn(1, M + 1, world, K).detach(), b)
    except TilelinkError as error:
        assert "`a`" in str(error) and str(world) in str(error)
    else:
        raise AssertionError("rows that no rank could have as many of as the others")


def main() -> None:
    """All operators on this rank."""
    rank, world, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{place}")
    other = dist.new_group(list(range(world)))
    groups: tuple[Any, ...] = (None, other, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    for name in ("ag_gemm", "gemm_rs", "gemm_ar"):
        for number, wants in enumerate(("a b bias", "a", "b")):
            for nk in (False, True):
                check(name, rank, world, groups[number], nk, torch.float32, wants)
        check(name, rank, world, other, True, torch.bfloat16, "a b bias")
    axes(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
