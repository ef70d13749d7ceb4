"""All-gather + GEMM: each rank holds a row slice of A, and multiplies all of A by its own weight.

The first layer of a tensor-parallel MLP or attention block under sequence parallelism. A is (M, K), of
which a rank passes its M / WORLD rows; the weights, the bias (N,) and C (M, N) are the rank's own.
Weights are (K, N), or (N, K) with ``nk=True``, as ``torch.nn.Linear`` keeps them. Operands are bf16,
fp16 or fp32, accumulated in fp32; C has A's dtype unless it is given.
"""

from __future__ import annotations

from typing import Any

import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 512, "N": 256, "K": 128})
def ag_gemm(A: Any, B: Any, C: Any, bias: Any = None, *, nk: bool = False) -> None:
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


@tilelink.kernel("gather A[M, K] over M", example={"M": 512, "N": 256, "K": 128})
def ag_gemm_swiglu(A: Any, Wg: Any, Wu: Any, C: Any, *, nk: bool = False) -> None:
    """``C = silu(A @ Wg) * (A @ Wu)``: gate and up of an MLP, fp32 until C is rounded."""
    M, K = A.shape
    N = Wg.shape[0] if nk else Wg.shape[1]
    for m, n in tk.tiles(M, N):
        gate = tk.zeros([m, n], tk.float32)
        up = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            gate = tk.dot(A[m, k], Wg[n, k].T if nk else Wg[k, n], gate)
            up = tk.dot(A[m, k], Wu[n, k].T if nk else Wu[k, n], up)
        C[m, n] = tk.silu(gate) * up
