"""Sums of products in parts: the form, what is refused, what the proof sees, and the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.validate import read_module, validate
from tilelink.backend.verify import DataflowError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import ag_gemm, ag_gemm_swiglu, gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError

WORLD = 2
STORED = Move("epilogue")
MOVED = {"ag_gemm": "A", "ag_gemm_swiglu": "A", "gemm_rs": "C", "gemm_ar": "C"}
CASES = [
    (ag_gemm, Move("copy_engine")),
    (ag_gemm, Move("sm:2")),
    (ag_gemm, Move("none")),
    (ag_gemm_swiglu, Move("copy_engine")),
    (gemm_rs, Move("copy_engine")),
    (gemm_rs, Move("epilogue", slots=2)),
    (gemm_rs, Move("epilogue", sum="epilogue")),
    (gemm_ar, Move("sm:1")),
    (gemm_ar, Move("epilogue", shots=2)),
    (gemm_ar, Move("none")),
]


def schedule(kernel: Any, move: Move = STORED, split: int = 2, **fields: Any) -> Schedule:
    """Small tiles, a few workers, sums in parts."""
    return Schedule(
        tiles=(("K", 16), ("M", 16), ("N", 32)),
        workers=fields.pop("workers", 5),
        warps=4,
        split=split,
        moves=((MOVED[kernel.name], move),),
        **fields,
    )


def fused(kernel: Any, move: Move = STORED, **fields: Any) -> Op:
    """The program of a small kernel, proven."""
    op = kernel.build({"M": 32, "N": 64, "K": 96}, world=WORLD)
    return compile_kernel(op, schedule(kernel, move, **fields))


def integers(*shape: int, seed: int) -> list[torch.Tensor]:
    """One tensor a rank whose products and sums are exact."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(-3, 4, shape, generator=made).to(torch.bfloat16) for _ in range(WORLD)]


def arguments(kernel: Any, rows: int = 32, depth: int = 96) -> Sequence[list[torch.Tensor]]:
    """Arguments of a call, without its output."""
    here = rows // WORLD if kernel.name.startswith("ag") else rows
    weights = 2 if kernel is ag_gemm_swiglu else 1
    return [
        integers(here, depth, seed=1),
        *(integers(depth, 64, seed=2 + n) for n in range(weights)),
    ]


def stages(program: Op) -> list[Op]:
    """The stages of the first launch."""
    return list(program.find("launch")[0].find("stage"))


# The form -----------------------------------------------------------------------------------------


def test_a_stage_of_parts_and_one_that_adds_them_in_order() -> None:
    first, second, *_ = stages(fused(gemm_ar, split=3))
    assert [str(e) for e in first["extent"]] == ["M", "N", "3"]
    loop = next(op for op in first.body if op.blocks)
    assert str(loop["extent"][0]) == "K / 3" and loop["tile"] == (16,)
    loads = [op for op in loop.body if op.name == "load"]
    assert all("s.m * (K / 3) + k.part.start" in str(op.ref) for op in loads)
    # Nothing that the kernel rounds or moves is in it.
    assert {op.name for op in first.body} == {"zeros", "for_tiles", "store", "notify"}
    names = [op.name for op in second.body]
    assert names[:6] == ["wait", "load", "load", "load", "add", "add"]
    assert [str(op.ref) for op in second.body[1:4]] == [
        f"@depth.C[%m, {number}, %n]" for number in range(3)
    ]
    adds = [op for op in second.body if op.name == "add"]
    assert adds[0].operands == tuple(op.results[0] for op in second.body[1:3])
    assert adds[1].operands == (adds[0].results[0], second.body[3].results[0])
    (counted,) = [op for op in second.body if op.name == "wait"]
    assert counted["count"] == 2 * 2 * 3


def test_of_several_sums_each_has_parts_of_its_own() -> None:
    program = fused(ag_gemm_swiglu, Move("copy_engine"))
    parts = [b for b in program.find("buffer") if b.symbol.startswith("depth.")]
    assert len(parts) == 2 and len({b.symbol for b in parts}) == 2
    assert {(b["dtype"], b["space"]) for b in parts} == {("fp32", "local")}
    assert sum(op.name == "dot" for op in stages(program)[0].walk()) == 2


def test_the_parts_are_one_flattened_loop_through_tma() -> None:
    text = emit(fused(gemm_ar))
    stage = text[text.index("# Stage depth.C.gemm") : text.index("# Stage C.tiles")]
    assert stage.count("for ") == 1 and "delayed_tile_notify" in stage
    assert len(re.findall(r"\.load\(\[", stage)) == 2


def test_a_tensor_called_depth_keeps_its_name() -> None:
    @tilelink.kernel("reduce C[M, N] sum")
    def named(depth, B, C):  # type: ignore[no-untyped-def]
        M, K = depth.shape
        N = B.shape[1]
        for m, n in tk.tiles(M, N):
            acc = tk.zeros([m, n], tk.float32)
            for k in tk.tiles(K):
                acc = tk.dot(depth[m, k], B[k, n], acc)
            C[m, n] = acc

    op = named.build({"M": 32, "N": 64, "K": 96}, world=WORLD)
    program = compile_kernel(op, Schedule(split=2, workers=4))
    assert "depth_.C" in {b.symbol for b in program.find("buffer")}


# What is refused ----------------------------------------------------------------------------------


@tilelink.kernel("reduce C[M, N] sum")
def scaled(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc * 0.5)
        C[m, n] = acc


@tilelink.kernel("reduce C[M, N] sum")
def masked(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            kept = tk.where(k.index[None, :] < 5, A[m, k], 0.0)
            acc = tk.dot(tk.cast(kept, tk.bfloat16), B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("reduce C[M, N] sum")
def chained(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("local A[M, M]")
def in_place(A, B):  # type: ignore[no-untyped-def]
    M = A.shape[0]
    for m, n in tk.tiles(M, M):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(M):
            acc = tk.dot(A[m, k], B[k, n], acc)
        A[m, n] = acc


@tilelink.kernel("gather A[M, K] over M")
def copied(A, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]


@tilelink.kernel("gather A[M, K] over K")
def along(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("shard A[M, K] over K\nreduce C[M, N] sum")
def sharded(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (scaled, "carries something else than sums of products"),
        (masked, "in the loop over the depth, which loads and adds products alone"),
        (chained, "carries something else than sums of products"),
        (in_place, "`A` is stored in the loop nest that multiplies it"),
        (copied, "multiplies no matrices"),
        (along, "`A` is spread over the ranks along the depth"),
        (sharded, "a depth of which each rank has a part of its own"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_no_plain_product_is_refused(kernel: Any, why: str) -> None:
    names = {"in_place": "M", "copied": "MK"}.get(kernel.name, "MNK")
    op = kernel.build({n: {"M": 32, "N": 64, "K": 96}[n] for n in names}, world=WORLD)
    with pytest.raises(ScheduleError, match=re.escape(why)):
        run_passes(op, Schedule(split=2, workers=4))


def test_parts_are_equal_and_of_a_depth_that_is_known() -> None:
    op = gemm_ar.build({"M": 32, "N": 64, "K": 100}, world=WORLD)
    with pytest.raises(ScheduleError, match="100 elements of `K` are no 3 equal parts"):
        run_passes(op, schedule(gemm_ar, split=3))
    op = gemm_ar.build({"M": 32, "N": 64, "K": 96}, world=WORLD, dynamic=("M",))
    with pytest.raises(ScheduleError, match="`M` is known at run time only"):
        run_passes(op, schedule(gemm_ar))


# What the proof sees ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # A part twice and another never; the parts in another order; only some of them.
        ("%k.part at s.m * (K / 2) + k.part.start, %n", "%k.part, %n"),
        (
            "%k.part at s.m * (K / 2) + k.part.start, %n",
            "%k.part at k.part.start + 48 - s.m * 48, %n",
        ),
        ("add (%acc.3.p0, %acc.3.p1)", "add (%acc.3.p1, %acc.3.p0)"),
        ("add (%acc.3.p0, %acc.3.p1)", "add (%acc.3.p0, %acc.3.p0)"),
        ("load @depth.C[%m, 1, %n]", "load @depth.C[%m, 0, %n]"),
        ("store @depth.C[%m.part, s.m, %n.part]", "store @depth.C[%m.part, 1 - s.m, %n.part]"),
        ("extent = [M, N, 2]", "extent = [M, N, 1]"),
        ("{extent = [K / 2], tile", "{extent = [K / 4], tile"),
        ("add (%acc.3.p0, %acc.3.p1)", "mul (%acc.3.p0, %acc.3.p1)"),
        ("%acc.part = zeros", "%acc.part = full {value = 1.0}"),
    ],
)
def test_other_sums_are_refused(old: str, new: str) -> None:
    text = print_ir(fused(gemm_ar, flatten=False))
    head, body = text.split("\n  head ", 1)
    assert old in body
    with pytest.raises(DataflowError):
        verify(parse_ir(f"{head}\n  head {body.replace(old, new)}"))


@pytest.mark.parametrize("kernel", [scaled, masked, chained], ids=lambda k: str(k.name))
def test_no_kernel_but_a_sum_of_products_is_held_against_parts(kernel: Any) -> None:
    other = kernel.build({"M": 32, "N": 64, "K": 96}, world=WORLD)
    with pytest.raises(DataflowError):
        verify(fused(gemm_ar), other)


def test_a_read_that_does_not_wait_for_all_parts_is_refused() -> None:
    text = print_ir(fused(gemm_ar))
    with pytest.raises(tilelink.TilelinkError, match="may happen before its data is there"):
        verify(parse_ir(text.replace("{count = 8}", "{count = 7}")))


# Emitted, simulated, interpreted -------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "move"), CASES, ids=lambda v: getattr(v, "name", None))
@pytest.mark.parametrize("backend", ["simulate", "interpret"])
def test_numbers_are_those_of_the_reference(kernel: Any, move: Move, backend: str) -> None:
    given = arguments(kernel)
    wanted = kernel.on("reference", world=WORLD)(*given)
    found = kernel.on(backend, world=WORLD, schedule=schedule(kernel, move))(*given)
    if kernel is ag_gemm_swiglu:  # silu is no exact function
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=2**-7, atol=0.0)  # an ulp of bf16
        return
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("depth", "split"), [(96, 4), (80, 2), (48, 3)])
def test_steps_end_with_their_part(depth: int, split: int) -> None:
    given = arguments(gemm_ar, rows=20, depth=depth)
    wanted = gemm_ar.on("reference", world=WORLD)(*given)
    found = gemm_ar.on("interpret", world=WORLD, schedule=schedule(gemm_ar, split=split))(*given)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_bits_do_not_depend_on_workers_or_on_timing() -> None:
    made = torch.Generator().manual_seed(5)
    given = [
        [torch.randn(*shape, generator=made).bfloat16() for _ in range(WORLD)]
        for shape in ((32, 96), (96, 64))
    ]
    seen = [
        gemm_ar.on("simulate", world=WORLD, seed=seed, schedule=schedule(gemm_ar, workers=workers))(
            *given
        )
        for seed, workers in ((0, 3), (1, 5), (2, 8))
    ]
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(("kernel", "move"), CASES, ids=lambda v: getattr(v, "name", None))
def test_emitted_modules_are_read_back(kernel: Any, move: Move) -> None:
    program = fused(kernel, move)
    validate(read_module(Source("emitted.py", emit(program))), program)


def test_where_a_part_ends_inside_of_a_tile_both_places_of_a_shard_are_read_by_addresses() -> None:
    # Past the end of a part lie elements of the next, and no zeros as past the end of a tensor.
    op = ag_gemm.build({"M": 32, "N": 16, "K": 48}, world=2, dtype="bf16")
    tiles = (("K", 32), ("M", 16), ("N", 16))
    program = compile_kernel(op, Schedule(tiles=tiles, split=2, workers=4))
    text = emit(program)
    assert "a_part_from = A_ptr" in text
    validate(read_module(Source("emitted.py", text)), program)
    a, b = torch.randint(-2, 3, (2, 16, 48)).bfloat16(), torch.randint(-2, 3, (48, 16)).bfloat16()
    chosen = Schedule(tiles=tiles, split=2, workers=4)
    got = ag_gemm.on("interpret", world=2, schedule=chosen)(list(a), [b, b])
    for mine in got:
        assert torch.equal(mine, (a.reshape(32, 48).float() @ b.float()).bfloat16())


def test_an_emitted_module_compiles_and_lints() -> None:
    op = gemm_ar.build({"M": 16, "N": 1024, "K": 4096}, world=8)
    chosen = Schedule(
        tiles=(("K", 128), ("M", 16), ("N", 64)),
        warps=4,
        stages=4,
        split=8,
        moves=(("C", Move("epilogue")),),
    )
    program = compile_kernel(op, chosen)
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == [] and kernel.spills == 0
