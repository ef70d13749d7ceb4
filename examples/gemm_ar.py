"""GEMM + all-reduce: every rank has a slice of K, and gets the whole sum.

Run it simulated, which needs no GPU, or on the GPUs of this machine:

    python examples/gemm_ar.py
    torchrun --nproc-per-node 8 examples/gemm_ar.py
"""

from __future__ import annotations

import os

import tilelink
import tilelink.language as tk


@tilelink.kernel("reduce C[M, N] sum", example={"M": 512, "N": 256, "K": 128})
def gemm_ar(A, B, C):
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

    inputs = [torch.randn(M, K, dtype=torch.bfloat16) for _ in range(world)]
    weights = [torch.randn(K, N, dtype=torch.bfloat16) for _ in range(world)]
    outputs = gemm_ar.on("simulate", world=world)(inputs, weights)
    whole = sum(a.float() @ b.float() for a, b in zip(inputs, weights, strict=True))
    for rank, output in enumerate(outputs):
        error = relative_error(output, whole)
        print(f"rank {rank}: {tuple(output.shape)}, relative error {error:.1e}")


def on_gpus(M=8192, N=8192, K=3584):
    """This process is one rank of torchrun's, with a GPU of its own."""
    import torch
    import torch.distributed as dist

    from tilelink.backend.accuracy import relative_error

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    a = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    weight = torch.randn(K, N, device=device, dtype=torch.bfloat16)
    output = gemm_ar(a, weight)
    whole = a.float() @ weight.float()
    dist.all_reduce(whole)
    error = relative_error(output, whole)
    if rank == 0:
        print(f"{world} GPUs, M, N, K = {M}, {N}, {K}: relative error {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        on_gpus()
    else:
        simulated()
