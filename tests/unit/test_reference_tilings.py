"""Kernels whose meaning depends on the lengths of tiles are found; the others are left alone."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from tilelink.backend import reference
from tilelink.backend.accuracy import TOLERANCE
from tilelink.backend.reference_tilings import TileDependentError, apart, check_tilings
from tilelink.backend.simulate.batch import may_batch
from tilelink.cli.inputs import random_inputs
from tilelink.cli.run import error_of, limit_of
from tilelink.ir import Op
from tilelink.kernel import load_kernels

ROOT = Path(__file__).parents[2]
HEAD = "import tilelink\nimport tilelink.language as tk\n\n\n"
GEMM = """@tilelink.kernel("gather A[M, K] over M; local B[K, N]")
def f(A, B, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n])
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
"""
STEP = "acc = tk.dot(A[m, k], B[k, n], acc)"
STORE = "C[m, n] = acc"
EXTENTS = {"M": 32, "N": 24, "K": 40}


def build(
    tmp_path: Path,
    text: str,
    world: int = 2,
    dtype: str = "fp32",
    extents: Mapping[str, int] = MappingProxyType(EXTENTS),
) -> Op:
    path = tmp_path / "kernels.py"
    path.write_text(HEAD + text)
    return load_kernels(path)["f"].build(extents, world=world, dtype=dtype)


def check(kernel: Op) -> None:
    inputs = random_inputs(kernel, 0)
    check_tilings(kernel, inputs, reference.run(kernel, inputs), limit_of)


def inner_loop(kernel: Op) -> Op:
    return [op for op in kernel.walk() if op.name == "for_tiles"][-1]


# A body that depends on tiles, and the variable whose tiles matter.
DEPENDENT = [
    (STEP, "acc = tk.dot(A[m, k], B[k, n])", "k"),
    (STEP, "acc = tk.dot(A[m, k], B[k, n], acc * 0.5)", "k"),
    (STEP, f"{STEP} + 1.0", "k"),
    (STEP, "acc = tk.dot(tk.abs(A[m, k]), B[k, n], acc) + k.start", "k"),
    (STEP, "acc = tk.maximum(acc, tk.dot(A[m, k], B[k, n]))", "k"),
    (STORE, "C[m, n] = acc - tk.max(acc, axis=1, keepdims=True)", "n"),
    (STORE, "C[m, n] = acc * m.size", "m"),
    (STORE, "C[m, n] = acc + m.start", "m"),
]


@pytest.mark.parametrize(("old", "new", "variable"), DEPENDENT)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_kernel_that_depends_on_tiles(
    tmp_path: Path, old: str, new: str, variable: str, dtype: str
) -> None:
    kernel = build(tmp_path, GEMM.replace(old, new), dtype=dtype)
    with pytest.raises(TileDependentError, match=f"tiles of `{variable}`") as caught:
        check(kernel)
    span = caught.value.span
    assert span is not None
    line = span.source.line(span.line)
    assert line.split(" in ")[0].split("for ")[1].replace(" ", "").split(",").count(variable) == 1


# What carries one value through the loop over `k`, and whether larger tiles give the same.
CARRIED = [
    (STEP, STEP, True),
    (STEP, "acc += A[m, k] @ B[k, n]", True),
    (STEP, "acc = tk.dot(tk.exp(A[m, k]), B[k, n] * 2, acc)", True),
    (STEP, "acc += tk.sum(A[m, k].to(tk.float32), axis=1, keepdims=True)", True),
    (STEP, "acc = tk.maximum(acc, tk.max(A[m, k].to(tk.float32), axis=1, keepdims=True))", True),
    (STEP, "acc = tk.maximum(acc, tk.sum(A[m, k].to(tk.float32), axis=1, keepdims=True))", False),
    (STEP, "acc += tk.max(A[m, k].to(tk.float32), axis=1, keepdims=True)", False),
    (STEP, "acc = tk.dot(A[m, k] - tk.max(A[m, k], axis=1, keepdims=True), B[k, n], acc)", False),
    (STEP, f"{STEP}\n            {STEP}", False),
    (STEP, f"{STEP} + k.size", False),
    *[(old, new, False) for old, new, variable in DEPENDENT if variable == "k"],
]


@pytest.mark.parametrize(("old", "new", "same"), CARRIED)
def test_a_loop_is_simulated_in_larger_tiles_where_it_adds_up(
    tmp_path: Path, old: str, new: str, same: bool
) -> None:
    kernel = build(tmp_path, GEMM.replace(old, new))
    assert may_batch(inner_loop(kernel)) is same
    inputs = random_inputs(kernel, 0)
    whole, cut = reference.run(kernel, inputs), reference.run(kernel, inputs, {"k": 8})
    error = max(error_of(a["C"], b["C"]) for a, b in zip(whole, cut, strict=True))
    assert error <= TOLERANCE["fp32"] or not same


@pytest.mark.parametrize("name", ["ag_gemm", "gemm_rs", "attention", "misc"])
def test_the_kernels_of_the_tests_do_not_depend_on_tiles(name: str) -> None:
    kernels = load_kernels(ROOT / "tests" / "kernels" / f"{name}.py")
    tried = [k.build(k.example, world=2) for k in kernels.values() if k.example]
    assert tried
    for kernel in tried:
        check(kernel)


def test_a_kernel_that_depends_on_the_order_of_tiles(tmp_path: Path) -> None:
    """The last positive element of a row: tiles in increasing order find it, whatever their length."""
    text = """@tilelink.kernel("gather A[M, K] over K; local C[M]")
def f(A, C):
    M, K = A.shape
    for m in tk.tiles(M):
        last = tk.full([m], -1.0)
        for k in tk.tiles(K):
            here = tk.max(tk.where(A[m, k] > 0, k.index[None, :].to(tk.float32), -1.0), axis=1)
            last = {}
        C[m] = last
"""
    wrong = build(tmp_path, text.format("tk.where(here >= 0, here, last)"))
    inputs = random_inputs(wrong, 0)
    whole, cut = reference.run(wrong, inputs), reference.run(wrong, inputs, {"k": 8})
    assert all(torch.equal(a["C"], b["C"]) for a, b in zip(whole, cut, strict=True))
    with pytest.raises(TileDependentError, match="tiles of `k`"):
        check(wrong)
    check(build(tmp_path, text.format("tk.maximum(here, last)")))


def test_the_limit_of_an_output_is_that_of_what_is_rounded_on_the_way(tmp_path: Path) -> None:
    assert limit_of(build(tmp_path, GEMM), "C") == TOLERANCE["fp32"]
    cast = GEMM.replace(STORE, "C[m, n] = acc.to(tk.bfloat16)")
    assert limit_of(build(tmp_path, cast), "C") == TOLERANCE["bf16"]
    text = """@tilelink.kernel("reduce P[M, N] sum")
def f(A, C):
    M, N = A.shape
    P = tk.empty([M, N], tk.float16)
    for m, n in tk.tiles(M, N):
        P[m, n] = A[m, n]
    for m, n in tk.tiles(M, N):
        C[m, n] = P[m, n]
"""
    assert limit_of(build(tmp_path, text), "C") == TOLERANCE["fp16"]
    product = """@tilelink.kernel("gather A[M] over M; gather B[M] over M")
def f(A, B, C):
    for m in tk.tiles(A.shape[0]):
        C[m] = A[m] * B[m]
"""
    types = {"A": "bf16", "B": "bf16", "C": "fp32"}
    for text, limit in (
        (product, "bf16"),
        (product.replace("A[m] * B[m]", "tk.maximum(A[m], -B[m])"), "fp32"),
    ):
        (tmp_path / "kernels.py").write_text(HEAD + text)
        kernel = load_kernels(tmp_path / "kernels.py")["f"].build({"M": 32}, types)
        assert limit_of(kernel, "C") == TOLERANCE[limit], text


def test_a_row_of_one_small_number_is_no_mistake(tmp_path: Path) -> None:
    """gelu of a large negative number is the difference of two that are nearly equal."""
    kernel = build(
        tmp_path,
        GEMM.replace(STORE, "C[m, n] = tk.gelu(acc)"),
        extents={"M": 8192, "N": 1, "K": 64},
    )
    # So many rows that some sums are rounded otherwise when they are cut, in whatever order a CPU adds.
    inputs = random_inputs(kernel, 0)
    whole, cut = reference.run(kernel, inputs), reference.run(kernel, inputs, {"k": 32})
    assert error_of(cut[0]["C"], whole[0]["C"]) > TOLERANCE["fp32"]
    check_tilings(kernel, inputs, whole, limit_of)


def test_how_far_tensors_are_apart() -> None:
    one = torch.tensor([[3.0, 4.0], [0.0, 1e-6], [float("nan"), 1.0]])
    assert apart(one.clone(), one) == 0.0
    assert apart(one + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]), one) == pytest.approx(
        0.1
    )
    assert apart(one + torch.tensor([[0.0, 0.0], [0.0, 1e-6], [0.0, 0.0]]), one) < 1e-6
    assert apart(one.nan_to_num(), one) == apart(one, one.nan_to_num()) == float("inf")
    assert apart(torch.zeros(2, 0), torch.zeros(2, 0)) == 0.0
    assert apart(torch.ones(2), torch.zeros(2)) > 1.0


def test_a_shard_is_cut_in_every_rank(tmp_path: Path) -> None:
    text = """@tilelink.kernel("shard A[M, K] over M; shard C[M, K] over M")
def f(A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k] - tk.max(A[m, k], axis=0, keepdims=True)
"""
    with pytest.raises(TileDependentError, match="tiles of `m`"):
        check(build(tmp_path, text, world=4))
