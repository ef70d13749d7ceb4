"""GEMM + reduce-scatter: every rank multiplies its K slice, and ends with a row slice of the sum.

The second layer of a tensor-parallel MLP or attention block under sequence parallelism. A is this
rank's (M, K), B its (K, N), or (N, K) with ``nk=True``, as ``torch.nn.Linear`` keeps it. C and the
residual are the rank's M / WORLD rows of (M, N); the bias is (N,), the same on every rank. Operands are
bf16, fp16 or fp32. Partial products travel in A's dtype and are added in rank order in fp32.
"""

from __future__ import annotations

from typing import Any

import tilelink
import tilelink.language as tk


@tilelink.kernel("scatter C[M, N] over M sum", example={"M": 512, "N": 256, "K": 128})
def gemm_rs(A: Any, B: Any, C: Any, *, nk: bool = False) -> None:
    """``C = sum of A @ B``, rows scattered over the ranks."""
    M, K = A.shape
    N = B.shape[0] if nk else B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[n, k].T if nk else B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel(
    """
    scatter P[M, N] over M sum
    shard residual[M, N] over M
    shard C[M, N] over M
    """,
    example={"M": 512, "N": 256, "K": 128},
)
def gemm_rs_add(
    A: Any, B: Any, C: Any, bias: Any = None, residual: Any = None, *, nk: bool = False
) -> None:
    """``C = (sum of A @ B) + bias + residual``, rows scattered over the ranks.

    Both are optional. The sum is rounded to A's dtype; they are added to it in fp32.
    """
    M, K = A.shape
    N = B.shape[0] if nk else B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[n, k].T if nk else B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        out = tk.cast(P[m, n], tk.float32)
        if bias is not None:
            out = out + bias[n]
        if residual is not None:
            out = out + residual[m, n]
        C[m, n] = out
