# mypy: allow-untyped-defs, allow-untyped-calls
"""GEMM + reduce-scatter and GEMM + all-reduce, with what belongs after the sum."""

import tilelink
import tilelink.language as tk

GEMM = {"M": 64, "K": 32, "N": 48}


@tilelink.kernel("scatter C[M, N] over M sum", example=GEMM)
def gemm_rs(A, B, C):
    """C = reduce-scatter(A @ B)."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel(
    """
    scatter P[M, N] over M sum
    shard residual[M, N] over M
    shard C[M, N] over M
    """,
    example=GEMM,
)
def gemm_rs_bias(A, B, C, bias=None, residual=None):
    """C = reduce-scatter(A @ B) + bias + residual, both added once, after the sum."""
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        total = P[m, n].to(tk.float32)
        if bias is not None:
            total = total + bias[None, n]
        if residual is not None:
            total = total + residual[m, n]
        C[m, n] = total


@tilelink.kernel("reduce C[M, N] sum", example=GEMM)
def gemm_ar(A, B, C):
    """C = all-reduce(A @ B)."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


def rms_scale(x, eps):
    """1 / sqrt(mean of squares + eps) of each row, fp32 [m, 1]."""
    squares = x * x
    return tk.rsqrt(squares.sum(axis=1, keepdims=True) / N_OF(x) + eps)


def N_OF(x):
    """The number of columns, as the norm divides by it."""
    return x.shape[1]


@tilelink.kernel("reduce P[M, N] sum", example=GEMM)
def gemm_ar_norm(A, B, residual, weight, X, Y, eps=1e-6):
    """X = all-reduce(A @ B) + residual; Y = X / rms(X) * weight."""
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m in tk.tiles(M):
        row = P[m, :].to(tk.float32) + residual[m, :]
        X[m, :] = row
        Y[m, :] = row * rms_scale(row, eps) * weight[None, :]
