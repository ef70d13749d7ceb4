"""The plain matrix product of one GPU, as a kernel of ours: nothing moves."""

from __future__ import annotations

from typing import Any

import tilelink
import tilelink.language as tk


@tilelink.kernel("local A[M, K]", example={"M": 512, "N": 256, "K": 128})
def gemm(A: Any, B: Any, C: Any) -> None:
    """``C = A @ B``: A is (M, K), B (K, N), C (M, N)."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
