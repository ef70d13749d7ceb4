"""Loop nests beside the usual ones: proven, and exact on reference, simulator and interpreter against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.edits import check
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes import UnsupportedProgram
from tilelink.backend.pipeline import compile_kernel
from tilelink.schedules import Move, Schedule

# mypy: disable-error-code="no-untyped-def"


@tilelink.kernel("shard X[M, N] over M; reduce S[N] sum")
def column_sums(X, S):
    M, N = X.shape
    for n in tk.tiles(N):
        acc = tk.zeros([n])
        for m in tk.tiles(M):
            acc += tk.sum(X[m, n].to(tk.float32), axis=0)
        S[n] = acc


@tilelink.kernel("shard X[M, K] over M; shard Y[M, N] over M; reduce G[K, N] sum")
def weight_gradient(X, Y, G):
    M, K = X.shape
    N = Y.shape[1]
    for k, n in tk.tiles(K, N):
        acc = tk.zeros([k, n])
        for m in tk.tiles(M):
            acc = tk.dot(X[m, k].T, Y[m, n], acc)
        G[k, n] = acc


@tilelink.kernel(
    "shard X[M, N] over M { owner m / 4 % WORLD }; gather A[M, N] over M; reduce S[N] sum"
)
def own_of_gathered(X, A, S):
    M, N = X.shape
    for n in tk.tiles(N):
        acc = tk.zeros([n])
        for m in tk.tiles(M):
            acc += tk.sum(X[m, n].to(tk.float32) * A[m, n].to(tk.float32), axis=0)
        S[n] = acc


@tilelink.kernel("shard X[M, N] over M; gather A[M, N] over M { owner m % WORLD }; reduce S[N] sum")
def smaller_blocks(X, A, S):
    M, N = X.shape
    for n in tk.tiles(N):
        acc = tk.zeros([n])
        for m in tk.tiles(M):
            acc += tk.sum(X[m, n].to(tk.float32) * A[m, n].to(tk.float32), axis=0)
        S[n] = acc


@tilelink.kernel("shard X[M, N] over M; shard Y[M, N] over M")
def inner_of_two(X, Y, Z):
    M, N = X.shape
    for i in tk.tiles(N):
        Z[i] = 1.0
        for m, n in tk.tiles(M, N):
            Y[m, n] = X[m, n]


@tilelink.kernel("gather A[M, K] over M; reduce P[M, N] sum")
def sum_declared_first(P, A, B, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n])
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        C[m, n] = P[m, n] * 2


@tilelink.kernel("gather A[M, K] over M; reduce P[M, K] sum")
def read_behind_the_sum(P, A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        P[m, k] = A[m, k]
    for m, k in tk.tiles(M, K):
        C[m, k] = P[m, k] + A[m, k]


@tilelink.kernel("reduce P[M, N] sum")
def residual_first(A, R, C):
    M, N = A.shape
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        P[m, n] = A[m, n] * 2
    for m, n in tk.tiles(M, N):
        C[m, n] = R[m, n] + P[m, n]


@tilelink.kernel("reduce P[M, N] sum")
def weighted_rows(A, R, C):
    M, N = A.shape
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        P[m, n] = A[m, n] * 2
    for m in tk.tiles(M):
        acc = tk.zeros([m])
        for n in tk.tiles(N):
            acc += tk.sum(R[m, n].to(tk.float32) * P[m, n].to(tk.float32), axis=1)
        C[m] = acc


@tilelink.kernel("gather G[E, N] over E")
def every_expert(X, G, Y):
    M, N = X.shape
    E = G.shape[0]
    for e in tk.range(E):
        for m, n in tk.tiles(M, N):
            Y[e, m, n] = X[m, n] * G[e, n][None, :]


@tilelink.kernel("scatter Y[E, N] over E sum")
def sums_of_experts(X, Y):
    E, _, N = X.shape
    for e in tk.range(E):
        for n in tk.tiles(N):
            Y[e, n] = tk.sum(X[e, :, n].to(tk.float32), axis=0)


@tilelink.kernel(
    "shard X[E, N] over E { owner e % WORLD }; shard Y[E, N] over E { owner e % WORLD }"
)
def own_experts(X, Z, Y):
    E, N = X.shape
    for e in tk.range(E):
        for n in tk.tiles(N):
            Y[e, n] = X[e, n] + Z[e, n]


@tilelink.kernel("scatter P[E, N] over E sum; shard Y[E, N] over E")
def read_of_experts(X, Y):
    E, N = X.shape
    P = tk.empty([E, N], X.dtype)
    for e in tk.range(E):
        for n in tk.tiles(N):
            P[e, n] = X[e, n] * 2
    for e in tk.range(E):
        for n in tk.tiles(N):
            Y[e, n] = P[e, n] + 1


@tilelink.kernel("gather A[M, K] over M; scatter C[M, N] over N sum")
def spanned_and_cut(A, W, C):
    M, K = A.shape
    N = W.shape[0]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n])
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], W[n, k].T, acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M; shard C[M, K] over M")
def own_rows(A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k] * 2


@tilelink.kernel("gather X[B, H, S, D] over S")
def batches_and_heads(X, Y):
    B, H, S, D = X.shape
    for b in tk.range(B):
        for h in tk.range(H):
            for s, d in tk.tiles(S, D):
                Y[b, h, s, d] = X[b, h, s, d] * 2


def cyclic(shards: list[torch.Tensor], rows: int) -> torch.Tensor:
    """The whole of which each rank has every ``world``-th block of ``rows``."""
    return torch.stack([s.view(-1, rows, s.shape[1]) for s in shards], 1).view(
        -1, shards[0].shape[1]
    )


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0)


Ranks = list[torch.Tensor]


@dataclass(frozen=True)
class Form:
    """A kernel, the shapes of one rank's inputs in a world, what all ranks get, and how its tensors move."""

    kernel: Any
    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    expected: Callable[..., list[Ranks]]
    moves: dict[str, Move]


def _column_sums(x: Ranks) -> list[Ranks]:
    return [[torch.cat(x).sum(0)] * len(x)]


def _weight_gradient(x: Ranks, y: Ranks) -> list[Ranks]:
    return [[torch.cat(x).T @ torch.cat(y)] * len(x)]


def _own_of_gathered(x: Ranks, a: Ranks) -> list[Ranks]:
    return [[(cyclic(x, 4) * torch.cat(a)).sum(0)] * len(x)]


def _sum_declared_first(a: Ranks, b: Ranks) -> list[Ranks]:
    product = total([torch.cat(a) @ each for each in b])
    return [[product] * len(a), [product * 2] * len(a)]


def _read_behind_the_sum(a: Ranks) -> list[Ranks]:
    rows = torch.cat(a)
    return [[rows * len(a)] * len(a), [rows * (len(a) + 1)] * len(a)]


def _residual_first(a: Ranks, r: Ranks) -> list[Ranks]:
    return [[each + total(a) * 2 for each in r]]


def _weighted_rows(a: Ranks, r: Ranks) -> list[Ranks]:
    return [[(each * total(a) * 2).sum(1) for each in r]]


def _every_expert(x: Ranks, g: Ranks) -> list[Ranks]:
    return [[each[None] * torch.cat(g)[:, None] for each in x]]


def _sums_of_experts(x: Ranks) -> list[Ranks]:
    return [list(total(x).sum(1).chunk(len(x)))]


def _own_experts(x: Ranks, z: Ranks) -> list[Ranks]:
    return [
        [mine + each[rank :: len(x)] for rank, (mine, each) in enumerate(zip(x, z, strict=True))]
    ]


def _read_of_experts(x: Ranks) -> list[Ranks]:
    return [list((total(x) * 2 + 1).chunk(len(x)))]


def _spanned_and_cut(a: Ranks, w: Ranks) -> list[Ranks]:
    return [list(total([torch.cat(a) @ each.T for each in w]).chunk(len(a), 1))]


def _own_rows(a: Ranks) -> list[Ranks]:
    return [[each * 2 for each in a]]


def _batches_and_heads(x: Ranks) -> list[Ranks]:
    return [[torch.cat(x, 2) * 2] * len(x)]


NONE, COPY, WORKER = Move("none"), Move("copy_engine"), Move("sm:1")
FORMS: dict[str, Form] = {}
for _way in (Move("epilogue"), NONE):
    FORMS |= {
        f"column sums {_way.resource}": Form(
            column_sums, lambda w: {"X": (40 // w, 24)}, _column_sums, {"S": _way}
        ),
        f"weight gradient {_way.resource}": Form(
            weight_gradient,
            lambda w: {"X": (64 // w, 32), "Y": (64 // w, 16)},
            _weight_gradient,
            {"G": _way},
        ),
    }
for _way in (COPY, WORKER, NONE):
    FORMS |= {
        f"batches and heads {_way.resource}": Form(
            batches_and_heads,
            lambda w: {"X": (2, 3, 16 // w, 16)},
            _batches_and_heads,
            {"X": _way},
        ),
        f"own rows {_way.resource}": Form(
            own_rows, lambda w: {"A": (32 // w, 32)}, _own_rows, {"A": _way}
        ),
        f"own rows of a gather {_way.resource}": Form(
            own_of_gathered,
            lambda w: {"X": (32 // w, 16), "A": (32 // w, 16)},
            _own_of_gathered,
            {"A": _way},
        ),
        f"sum declared first {_way.resource}": Form(
            sum_declared_first,
            lambda w: {"A": (32 // w, 32), "B": (32, 16)},
            _sum_declared_first,
            {"A": _way, "P": NONE},
        ),
        f"read behind the sum {_way.resource}": Form(
            read_behind_the_sum,
            lambda w: {"A": (32 // w, 32)},
            _read_behind_the_sum,
            {"A": _way, "P": NONE},
        ),
    }
    FORMS |= {
        f"every expert {_way.resource}": Form(
            every_expert, lambda w: {"X": (16, 24), "G": (8 // w, 24)}, _every_expert, {"G": _way}
        ),
    }
for _way in (Move("epilogue"), COPY, WORKER, NONE):
    FORMS |= {
        f"sums of experts {_way.resource}": Form(
            sums_of_experts, lambda w: {"X": (8, 16, 24)}, _sums_of_experts, {"Y": _way}
        ),
        f"read of experts {_way.resource}": Form(
            read_of_experts, lambda w: {"X": (8, 24)}, _read_of_experts, {"P": _way}
        ),
    }
FORMS["own experts"] = Form(
    own_experts, lambda w: {"X": (8 // w, 24), "Z": (8, 24)}, _own_experts, {}
)
for _way in (COPY, WORKER):
    FORMS[f"spanned and cut {_way.resource}"] = Form(
        spanned_and_cut,
        lambda w: {"A": (32 // w, 32), "W": (32, 32)},
        _spanned_and_cut,
        {"A": Move(_way.resource, spans=True)},
    )
for _signal in ("word", "sentinel"):
    FORMS[f"residual first {_signal}"] = Form(
        residual_first,
        lambda w: {"A": (32, 32), "R": (32, 32)},
        _residual_first,
        {"P": Move("epilogue", slots=2, signal=_signal)},
    )
FORMS["weighted rows word"] = Form(
    weighted_rows,
    lambda w: {"A": (32, 32), "R": (32, 32)},
    _weighted_rows,
    {"P": Move("epilogue", slots=2, signal="word")},
)


def exact(form: Form, backend: str, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    inputs = {
        name: [torch.randint(-1, 2, shape, generator=generator).bfloat16() for _ in range(world)]
        for name, shape in form.shapes(world).items()
    }
    moves = tuple(form.moves.items()) if world > 1 else ()
    chosen = Schedule(tiles=tuple((name, 16) for name in "EKMNS"), workers=3, moves=moves)
    schedule = None if backend == "reference" else chosen
    got = form.kernel.on(backend, world=world, schedule=schedule)(**inputs)
    outputs = [got] if isinstance(got, list) else got
    right = form.expected(*([rank.float() for rank in ranks] for ranks in inputs.values()))
    for mine, theirs in zip(outputs, right, strict=True):
        for rank, one in enumerate(theirs):
            assert torch.equal(mine[rank].float(), one)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_reference_and_simulator_are_exact(name: str, world: int) -> None:
    for backend in ("reference", "simulate"):
        exact(FORMS[name], backend, world)


@pytest.mark.parametrize("name", FORMS)
def test_the_emitted_text_is_exact(name: str) -> None:
    """The interpreter runs what was emitted."""
    exact(FORMS[name], "interpret", 2)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(smaller_blocks, "have different owner blocks"), (inner_of_two, "a loop for each axis")],
)
def test_inner_loops_over_own_rows_that_cannot_be_cut_are_refused(kernel: Any, said: str) -> None:
    with pytest.raises(UnsupportedProgram, match=said):
        compile_kernel(kernel.build({"M": 32, "N": 16}, world=2))


def test_own_rows_of_a_gather_in_two_slots_are_refused() -> None:
    chosen = Schedule(moves=(("A", Move("sm:1", slots=2)),))
    with pytest.raises(UnsupportedProgram, match="declare it `shard`"):
        compile_kernel(own_rows.build({"M": 32, "K": 32}, world=2), chosen)


@pytest.mark.parametrize("way", [COPY, WORKER])
def test_axes_that_lie_behind_each_other_are_copied_as_one(way: Move) -> None:
    op = batches_and_heads.build({"B": 2, "H": 3, "S": 16, "D": 16}, world=2)
    program = compile_kernel(op, Schedule(moves=(("X", way),)))
    check(program, emit(program))
