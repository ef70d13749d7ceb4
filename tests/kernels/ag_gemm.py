# mypy: allow-untyped-defs, allow-untyped-calls
"""All-gather + GEMM, plain and gated."""

import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def ag_gemm(A, B, C):
    """C = all-gather(A) @ B."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def ag_gemm_silu(A, gate, up, C):
    """C = silu(all-gather(A) @ gate) * (all-gather(A) @ up)."""
    M, K = A.shape
    N = gate.shape[1]
    for m, n in tk.tiles(M, N):
        g = tk.zeros([m, n], tk.float32)
        u = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            a = A[m, k]
            g = tk.dot(a, gate[k, n], g)
            u = tk.dot(a, up[k, n], u)
        C[m, n] = tk.silu(g) * u


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def ag_gemm_nk(A, weight, C):
    """C = all-gather(A) @ weight.T, the weight stored (N, K)."""
    M, K = A.shape
    N = weight.shape[0]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc += tk.dot(A[m, k], weight[n, k].T)
        C[m, n] = acc
