# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="name-defined"
# ruff: noqa: F821
"""Mixture of experts: tensor-parallel halves, and expert-parallel dispatch and combine."""

import tilelink
import tilelink.language as tk


@tilelink.kernel(
    """
    gather A[T, H] over T
    local W[E, H, F]
    local order[P]
    local offs[E + 1]
    """,
    example={"T": 32, "H": 16, "E": 4, "F": 24, "P": 64},
)
def moe_up(A, W, order, offs, Y):
    """Y[p] = A[order[p]] @ W[e] for the slots p of expert e, `offs[e]` to `offs[e + 1]`."""
    H = A.shape[1]
    E, _, F = W.shape
    for e in tk.range(E):
        for f in tk.tiles(F):
            for p in tk.tiles(offs[e], offs[e + 1]):
                rows = order[p]
                acc = tk.zeros([p, f], tk.float32)
                for k in tk.tiles(H):
                    acc = tk.dot(A[rows, k], W[e, k, f], acc)
                Y[p, f] = acc


@tilelink.kernel(
    """
    scatter C[T, H] over T sum
    local W[E, F, H]
    local offs[E + 1]
    """,
    example={"T": 32, "H": 16, "E": 4, "F": 24, "P": 64, "TOPK": 2},
)
def moe_down(X, W, slot, weight, offs, C):
    """C = reduce-scatter of the weighted sum over each token's experts; `slot[t, j]` is its j-th row of X."""
    P, F = X.shape
    E, _, H = W.shape
    T, TOPK = slot.shape
    Z = tk.empty([P, H], X.dtype)
    for e in tk.range(E):
        for h in tk.tiles(H):
            for p in tk.tiles(offs[e], offs[e + 1]):
                acc = tk.zeros([p, h], tk.float32)
                for f in tk.tiles(F):
                    acc = tk.dot(X[p, f], W[e, f, h], acc)
                Z[p, h] = acc
    for t, h in tk.tiles(T, H):
        total = tk.zeros([t, h], tk.float32)
        for j in tk.range(TOPK):
            rows = slot[t, j]
            total += Z[rows, h] * weight[t, j][:, None]
        C[t, h] = total


EP = {"T": 8, "H": 16, "k": 2, "CAP": 64, "F": 24}


@tilelink.kernel("exchange X[T, H] by dest[T, k] into R[CAP, H], offs[WORLD + 1]", example=EP)
def ep_dispatch(X, dest, R, offs, *, CAP):
    """Sends row t of X to the ranks `dest[t, :]`; R holds what arrived, `offs` where each source starts."""


@tilelink.kernel(
    """
    exchange X[T, H] by dest[T, k] into R[CAP, H], offs[WORLD + 1]
    combine Z[CAP, H] from R into Y[T, k, H]
    """,
    example=EP,
)
def ep_moe(X, dest, weight, W, C, *, CAP):
    """C[t] = sum over j of weight[t, j] * (X[t] @ W of rank dest[t, j])."""
    T, H = X.shape
    K = dest.shape[1]
    ranks = offs.shape[0] - 1
    Z = tk.empty([CAP, H], X.dtype)
    for h in tk.tiles(H):
        for r in tk.tiles(0, offs[ranks]):
            acc = tk.zeros([r, h], tk.float32)
            for f in tk.tiles(H):
                acc = tk.dot(R[r, f], W[f, h], acc)
            Z[r, h] = acc
    for t, h in tk.tiles(T, H):
        total = tk.zeros([t, h], tk.float32)
        for j in tk.range(K):
            total += Y[t, j, h] * weight[t, j][:, None]
        C[t, h] = total
