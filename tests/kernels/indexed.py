# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="name-defined"
"""Reads of a tensor that moves by indices that are data, or one at a time."""

import tilelink
import tilelink.language as tk


@tilelink.kernel("gather E[V, D] over V", example={"V": 48, "D": 16, "T": 20})
def embed(E, ids, Y):
    """Y[t] = E[ids[t]]."""
    T = ids.shape[0]
    for t in tk.tiles(T):
        Y[t, :] = E[ids[t], :]


@tilelink.kernel("gather A[T, H] over T", example={"T": 48, "H": 16, "F": 24, "P": 32})
def expert_up(A, order, W, Y):
    """Y[p] = A[order[p]] @ W: the rows of one expert."""
    H, F = W.shape
    P = order.shape[0]
    for p, f in tk.tiles(P, F):
        rows = order[p]
        acc = tk.zeros([p, f], tk.float32)
        for k in tk.tiles(H):
            acc = tk.dot(A[rows, k], W[k, f], acc)
        Y[p, f] = acc


@tilelink.kernel("reduce P[M, N] sum", example={"M": 48, "N": 16})
def permuted_sum(A, order, Y):
    """Y[m] = (sum over ranks of A)[order[m]]."""
    M, N = A.shape
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        P[m, n] = A[m, n]
    for m, n in tk.tiles(M, N):
        Y[m, n] = P[order[m], n]


@tilelink.kernel("gather E[V, D] over V", example={"V": 48, "D": 16})
def one_row(E, Y):
    """Y = E[5]."""
    D = E.shape[1]
    for d in tk.tiles(D):
        Y[d] = E[5, d]


@tilelink.kernel("gather A[M, K] over M", example={"M": 48, "K": 16})
def banded(A, Y):
    """Y is A within a band about its diagonal, 0 elsewhere."""
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        away = m.index[:, None] - k.index[None, :]
        Y[m, k] = tk.where(away < 10, A[m, k], 0)
