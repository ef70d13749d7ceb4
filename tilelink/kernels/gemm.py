"""GEMM on every rank alone: nothing moves.

A is (M, K), B (K, N), or (N, K) with ``nk=True``, as ``torch.nn.Linear`` keeps it; C is (M, N), the bias
(N,). Operands are bf16, fp16 or fp32, accumulated in fp32; C has A's dtype unless it is given. It runs
without torch.distributed too, and is what an overlapped kernel's product costs by itself.
"""

from __future__ import annotations

from typing import Any

import tilelink
import tilelink.language as tk


@tilelink.kernel("local A[M, K]", example={"M": 512, "N": 256, "K": 128})
def gemm(A: Any, B: Any, C: Any, bias: Any = None, *, nk: bool = False) -> None:
    """``C = A @ B + bias``; the bias is optional and is added before C is rounded."""
    M, K = A.shape
    N = B.shape[0] if nk else B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[n, k].T if nk else B[k, n], acc)
        if bias is not None:
            acc = acc + bias[n]
        C[m, n] = acc
