"""Hazards in emitted text: proxies of memory accesses, wide offsets, inputs that peers still read."""

import re

import pytest

import tilelink
import tilelink.language as tk
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes import UnsupportedProgram
from tilelink.backend.pipeline import run_passes
from tilelink.frontend.errors import GatheredStore
from tilelink.ir import parse_ir, print_ir


@tilelink.kernel("local X[M, K]")
def stored_then_multiplied(X, W, C, D):  # type: ignore[no-untyped-def]
    M, K = X.shape
    N = W.shape[1]
    for m, k in tk.tiles(M, K):
        C[m, k] = X[m, k]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(C[m, k], W[k, n], acc)
        D[m, n] = acc


@tilelink.kernel("local X[V, H]")
def picked(X, T, Y):  # type: ignore[no-untyped-def]
    H = X.shape[1]
    (M,) = T.shape
    for m, h in tk.tiles(M, H):
        Y[m, h] = X[T[m], h]


@tilelink.kernel("gather A[M, K] over M")
def gathered_and_stored(A, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]
    for m, k in tk.tiles(M, K):
        A[m, k] = C[m, k] + 1.0


@tilelink.kernel("gather A[M, K] over M")
def gathered_and_copied(A, C, D):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]
    for m, k in tk.tiles(M, K):
        D[m, k] = C[m, k] + 1.0


def test_a_tensor_that_other_workers_stored_is_fenced_before_tma_reads_it() -> None:
    op = stored_then_multiplied.build({"M": 512, "K": 512, "N": 512}, world=2)
    source = emit(run_passes(op))
    assert re.search(r"\bC_\d+x\d+\.load\(", source)  # by TMA
    waits = re.findall(r"consumer_tile_wait\((.*)\)", source)
    assert waits and all(w.endswith(", True") for w in waits), waits


def test_indexed_rows_of_a_large_tensor_have_wide_offsets() -> None:
    op = picked.build({"V": 1 << 19, "H": 8192, "M": 512}, world=1, dtypes={"T": "int32"})
    source = emit(run_passes(op))
    rows = re.findall(r"(\w+)\[:, None\] \* 8192", source)
    assert rows
    assert all(f"{name} = tl.cast(" in source for name in rows if not name.startswith("Y")), source


def test_a_gathered_tensor_that_is_stored_is_refused_where_it_is_stored() -> None:
    with pytest.raises(GatheredStore) as caught:
        gathered_and_stored.build({"M": 512, "K": 64}, world=2)
    assert caught.value.span is not None and "A[m, k]" in str(caught.value)


def test_a_kernel_from_text_that_stores_what_it_gathers_is_refused() -> None:
    gathered = print_ir(gathered_and_copied.build({"M": 512, "K": 64}, world=2))
    text = gathered.replace("store @D[", "store @A[").replace("load @D[", "load @A[")
    assert text != gathered
    with pytest.raises(UnsupportedProgram, match="gathered, and stored"):
        run_passes(parse_ir(text))


@tilelink.kernel("gather A[M, K] over M")
def gram(A, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for i, j in tk.tiles(M, M):
        acc = tk.zeros([i, j])
        for k in tk.tiles(K):
            acc = tk.dot(A[i, k], A[j, k].T, acc)
        C[i, j] = acc


def test_a_tensor_that_meets_itself() -> None:
    with pytest.raises(UnsupportedProgram, match="`A` meets itself in one loop nest"):
        run_passes(gram.build({"M": 64, "K": 32}, world=2))
