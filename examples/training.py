"""A tensor-parallel MLP under sequence parallelism, trained a few steps with operators of `tilelink.ops`.

Tokens and weights are spread over the ranks. One process, several on this CPU (slow, interpreted), or GPUs:

    python examples/training.py
    torchrun --nproc-per-node 2 examples/training.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tilelink import ops


class MLP(torch.nn.Module):
    """``down(relu(up(x)))``: gathers the tokens in the first product, scatters the sum of the second."""

    def __init__(self, hidden, inner, world, **kind):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(inner // world, hidden, **kind) / hidden**0.5)
        self.down = torch.nn.Parameter(torch.randn(hidden, inner // world, **kind) / inner**0.5)

    def forward(self, x):
        return ops.gemm_rs(torch.relu(ops.ag_gemm(x, self.up, nk=True)), self.down, nk=True)


def train(steps=4, tokens=64, hidden=32, inner=64, rank=0, world=1, **kind):
    """The losses of ``steps`` steps towards the tokens themselves, summed over all ranks."""
    torch.manual_seed(rank)
    model = MLP(hidden, inner, world, **kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    x = torch.randn(tokens // world, hidden, **kind)
    losses = []
    for _ in range(steps):
        loss = (compiled(x) - x).float().square().sum() / (tokens * hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach()
        if world > 1:
            dist.all_reduce(whole)
        losses.append(whole.item())
    return losses


def main():
    """Trains on what there is; rank 0 prints."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sizes = {"device": "cpu"}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        sizes = {"tokens": 4096, "hidden": 4096, "inner": 8192, "device": "cuda"}
        sizes["dtype"] = torch.bfloat16
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    losses = train(rank=rank, world=world, **sizes)
    if rank == 0:
        print(f"{world} ranks: loss {' '.join(f'{loss:.4f}' for loss in losses)}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
