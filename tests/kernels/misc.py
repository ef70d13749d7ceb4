# mypy: allow-untyped-defs, allow-untyped-calls
"""Small kernels that use the rest of the language."""

import tilelink
import tilelink.language as tk


@tilelink.kernel("local A[M, K]", example={"M": 8, "K": 16})
def in_place(A):
    """A += 1."""
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        A[m, k] += 1


@tilelink.kernel(
    "gather K[G, S, D] over S; local Q[H, S, D]", example={"G": 2, "H": 4, "S": 32, "D": 16}
)
def grouped_scores(Q, K, O):  # noqa: E741
    """O[h] = Q[h] @ K[h // (H // G)].T: several query heads share one of keys."""
    H, S, _ = Q.shape
    G = K.shape[0]
    for h in tk.range(H):
        for q, s in tk.tiles(S, S):
            O[h, q, s] = tk.dot(Q[h, q, :], K[h // (H // G), s, :].T)


@tilelink.kernel("local A[M, K]", example={"M": 8, "K": 16})
def spread(A, C, alpha):
    """C[m] = (max - min)^2 / 3 + alpha * (elements of the first half in (0, 1])."""
    M, K = A.shape
    for m in tk.tiles(M):
        low = tk.full([m], float("inf"), tk.float32)
        high = -low
        for k in tk.tiles(K):
            a = A[m, k].to(tk.float32)
            low, high = tk.minimum(low, a.min(axis=1)), tk.maximum(high, a.max(axis=-1))
        count = tk.zeros([m], tk.int32)
        for k in tk.tiles(0, K // 2):
            count += ((A[m, k] > 0) & ~(A[m, k] > 1)).sum(axis=1)
        C[m] = (high - low) ** 2 / 3 + alpha * count


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def scaled_twice(A, B, C):
    """C = 6 (A @ B): two later loops change what earlier ones stored."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
    for m, n in tk.tiles(M, N):
        C[m, n] = C[m, n] * 2.0
    for m, n in tk.tiles(M, N):
        C[m, n] = C[m, n] * 3.0


@tilelink.kernel("reduce Y[M, N] sum", example={"M": 64, "N": 1024})
def doubled_rows(X, Y):
    """Y = the sum over ranks of 2 X, by whole rows: the longer they are, the fewer are a tile."""
    M, _ = X.shape
    for m in tk.tiles(M):
        Y[m, :] = X[m, :] * 2.0
