# mypy: allow-untyped-defs, allow-untyped-calls
"""Sequence-parallel causal attention over gathered keys, and over a ring."""

import math

import tilelink
import tilelink.language as tk

SHAPE = {"B": 2, "H": 2, "S": 64, "D": 16}


def softmax_step(qk, v, top, total, acc):
    """One step of the online softmax (Milakov and Gimelshein, 2018), in base 2."""
    new = tk.maximum(top, tk.max(qk, axis=1))
    p = tk.exp2(qk - new[:, None])
    scale = tk.exp2(top - new)
    total = total * scale + tk.sum(p, axis=1)
    acc = tk.dot(p.to(v.dtype), v, acc * scale[:, None])
    return new, total, acc


@tilelink.kernel(
    """
    gather K[B, H, S, D] over S
    gather V[B, H, S, D] over S
    shard Q[B, H, S, D] over S
    shard O[B, H, S, D] over S
    """,
    example=SHAPE,
)
def attention(Q, K, V, O, *, causal=True):  # noqa: E741
    """O = softmax(Q K^T / sqrt(D)) V for this rank's queries."""
    B, H, S, D = Q.shape
    scale = 1.0 / math.sqrt(D) * math.log2(math.e)
    for b in tk.range(B):
        for h in tk.range(H):
            for q in tk.tiles(S):
                top = tk.full([q], -math.inf, tk.float32)
                total = tk.zeros([q], tk.float32)
                acc = tk.zeros([q, D], tk.float32)
                queries = Q[b, h, q, :]
                for s in tk.tiles(0, q.stop if causal else S):
                    qk = tk.dot(queries, K[b, h, s, :].T) * scale
                    if causal:
                        qk = tk.where(q.index[:, None] >= s.index[None, :], qk, -math.inf)
                    top, total, acc = softmax_step(qk, V[b, h, s, :], top, total, acc)
                O[b, h, q, :] = acc / total[:, None]


@tilelink.kernel(
    """
    ring K[B, H, S, D] over S
    ring V[B, H, S, D] over S
    shard Q[B, H, S, D] over S
    shard O[B, H, S, D] over S
    """,
    example=SHAPE,
)
def ring_attention(Q, K, V, O):  # noqa: E741
    """The same without a mask, keys and values passing by."""
    B, H, S, D = Q.shape
    scale = 1.0 / math.sqrt(D) * math.log2(math.e)
    for b in tk.range(B):
        for h in tk.range(H):
            for q in tk.tiles(S):
                top = tk.full([q], -math.inf, tk.float32)
                total = tk.zeros([q], tk.float32)
                acc = tk.zeros([q, D], tk.float32)
                for s in tk.tiles(S):
                    qk = tk.dot(Q[b, h, q, :], K[b, h, s, :].T) * scale
                    top, total, acc = softmax_step(qk, V[b, h, s, :], top, total, acc)
                O[b, h, q, :] = acc / total[:, None]
