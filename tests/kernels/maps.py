"""Kernels whose mappings give the three maps themselves."""

from __future__ import annotations

from typing import Any

import tilelink
import tilelink.language as tk

EXAMPLE = {"M": 64, "N": 48, "K": 32}


@tilelink.kernel("gather A[M, K] over M { owner m / 4 % WORLD }", example=EXAMPLE)
def ag_cyclic(A: Any, B: Any, C: Any) -> None:
    """All-gather + GEMM with blocks of four rows dealt out in turn."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel(
    "gather A[M, K] over M { owner min(m / (M / (2 * WORLD)), 2 * WORLD - 1 - m / (M / (2 * WORLD))) }",
    example=EXAMPLE,
)
def ag_zigzag(A: Any, B: Any, C: Any) -> None:
    """All-gather + GEMM with the zigzag owners of causal context parallelism."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("scatter C[M, N] over M sum { owner m / 4 % WORLD }", example=EXAMPLE)
def rs_cyclic(A: Any, B: Any, C: Any) -> None:
    """GEMM + reduce-scatter to owners of blocks of four rows in turn."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M { tile 4 x K  signal t / 2 }", example=EXAMPLE)
def ag_signals(A: Any, B: Any, C: Any) -> None:
    """All-gather + GEMM with communication tiles of four rows, two of which share a flag."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[K, M] over K", example=EXAMPLE)
def ag_over_depth(A: Any, B: Any, C: Any) -> None:
    """The gathered axis is the one that the product sums over."""
    K, M = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[k, m].T, B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over K", example=EXAMPLE)
def ag_inner(A: Any, B: Any, C: Any) -> None:
    """The same, of rows that are cut: a shard's are shorter than those of the whole."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather B[K, N] over N", example=EXAMPLE)
def ag_columns(A: Any, B: Any, C: Any) -> None:
    """The gathered axis is the second tile variable."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M; scatter C[M, N] over M sum", example=EXAMPLE)
def ag_gemm_rs(A: Any, B: Any, C: Any) -> None:
    """Gather and reduce-scatter around one product."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "N": 48, "K": 32, "H": 24})
def mlp(A: Any, B: Any, D: Any, C: Any) -> None:
    """Two products in one launch through an intermediate of the rank's own."""
    M, K = A.shape
    H = B.shape[1]
    N = D.shape[1]
    P = tk.empty([M, H], tk.bfloat16)
    for m, h in tk.tiles(M, H):
        acc = tk.zeros([m, h], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, h], acc)
        P[m, h] = tk.silu(acc)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for h in tk.tiles(H):
            acc = tk.dot(P[m, h], D[h, n], acc)
        C[m, n] = acc


@tilelink.kernel("reduce P[M, N] sum", example=EXAMPLE)
def ar_norm(A: Any, B: Any, R: Any, C: Any) -> None:
    """GEMM + all-reduce + residual + RMSNorm."""
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m in tk.tiles(M):
        x = P[m, :].to(tk.float32) + R[m, :].to(tk.float32)
        mean = tk.sum(x * x, axis=1, keepdims=True) / N
        C[m, :] = x * tk.rsqrt(mean + 1e-6)


@tilelink.kernel("reduce P[M, N] sum; reduce Q[M, N] sum", example=EXAMPLE)
def ar_gate(A: Any, B: Any, D: Any, C: Any) -> None:
    """Two all-reduces of one loop nest, and the product of their sums."""
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    Q = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        left = tk.zeros([m, n], tk.float32)
        right = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            left = tk.dot(A[m, k], B[k, n], left)
            right = tk.dot(A[m, k], D[k, n], right)
        P[m, n] = left
        Q[m, n] = right
    for m, n in tk.tiles(M, N):
        C[m, n] = tk.sigmoid(P[m, n]) * Q[m, n].to(tk.float32)


@tilelink.kernel(
    "gather K[S, D] over S; gather V[S, D] over S; shard Q[S, D] over S; shard O[S, D] over S",
    example={"S": 64, "D": 16},
)
def softmax_rows(Q: Any, K: Any, V: Any, O: Any) -> None:  # noqa: E741
    """Attention of all keys, whose shards come in another order on each rank; queries are read for each."""
    S, D = Q.shape
    for q in tk.tiles(S):
        top = tk.full([q], float("-inf"), tk.float32)
        total = tk.zeros([q], tk.float32)
        acc = tk.zeros([q, D], tk.float32)
        for s in tk.tiles(S):
            x = tk.dot(Q[q, :], K[s, :].T)
            new = tk.maximum(top, tk.max(x, axis=1))
            p = tk.exp(x - new[:, None])
            scale = tk.exp(top - new)
            total = total * scale + tk.sum(p, axis=1)
            acc = acc * scale[:, None] + tk.dot(p.to(Q.dtype), V[s, :])
            top = new
        O[q, :] = acc / total[:, None]


@tilelink.kernel("reduce P[M, N] sum", example=EXAMPLE)
def ar_both(A: Any, B: Any, C: Any, D: Any) -> None:
    """GEMM + all-reduce, whose sum is read by two loop nests."""
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        C[m, n] = tk.silu(P[m, n].to(tk.float32))
    for m, n in tk.tiles(M, N):
        D[m, n] = P[m, n].to(tk.float32) + 1.0


@tilelink.kernel("reduce C[M, N] sum\nreduce D[M, N] sum", example=EXAMPLE)
def ar_two(A: Any, B: Any, C: Any, D: Any) -> None:
    """Two sums of one product."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
        D[m, n] = tk.silu(acc)
