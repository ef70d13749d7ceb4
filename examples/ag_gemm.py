"""All-gather + GEMM: rows of A are spread over the ranks, every rank needs all of them.

Run it simulated, which needs no GPU, or on the GPUs of this machine:

    python examples/ag_gemm.py
    torchrun --nproc-per-node 8 examples/ag_gemm.py
"""

from __future__ import annotations

import os

import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 512, "N": 256, "K": 128})
def ag_gemm(A, B, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


def simulated(world=4, M=512, N=256, K=128):
    """All ranks on this CPU: a list of one tensor a rank in, a list out."""
    import torch

    from tilelink.backend.accuracy import relative_error

    shards = [torch.randn(M // world, K, dtype=torch.bfloat16) for _ in range(world)]
    weights = [torch.randn(K, N, dtype=torch.bfloat16) for _ in range(world)]
    outputs = ag_gemm.on("simulate", world=world)(shards, weights)
    whole = torch.cat(shards).float()
    for rank, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        error = relative_error(output, whole @ weight.float())
        print(f"rank {rank}: {tuple(output.shape)}, relative error {error:.1e}")


def on_gpus(M=8192, N=7168, K=8192):
    """This process is one rank of torchrun's, with a GPU of its own."""
    import torch
    import torch.distributed as dist

    from tilelink.backend.accuracy import relative_error

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    shard = torch.randn(M // world, K, device=device, dtype=torch.bfloat16)
    weight = torch.randn(K, N, device=device, dtype=torch.bfloat16)
    output = ag_gemm(shard, weight)
    whole = shard.new_empty(M, K)
    dist.all_gather_into_tensor(whole, shard)
    error = relative_error(output, whole.float() @ weight.float())
    if rank == 0:
        print(f"{world} GPUs, M, N, K = {M}, {N}, {K}: relative error {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        on_gpus()
    else:
        simulated()
