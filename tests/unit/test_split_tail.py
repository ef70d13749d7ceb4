"""The last wave of a product's tiles in parts: the form, what is refused, what the proof sees, and the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.roles import CASES as ROLES
from tests.unit.test_split_depth import scaled
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.mutate.judge import EQUIVALENT, Trial, decide
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.reference import run as reference
from tilelink.backend.simulate import predict
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import DataflowError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.check import check_types
from tilelink.kernels import ag_gemm, ag_gemm_swiglu, gemm, gemm_ar, gemm_rs, gemm_rs_add
from tilelink.schedules import Move, Schedule, ScheduleError
from tilelink.schedules.machine import Machine
from tilelink.schedules.space import Space

WORLD = 2
MOVED = {
    "ag_gemm": "A",
    "ag_gemm_swiglu": "A",
    "gemm": "",
    "gemm_rs": "C",
    "gemm_rs_add": "P",
    "gemm_ar": "C",
}
CASES = [
    (gemm, Move()),
    (ag_gemm, Move("copy_engine")),
    (ag_gemm, Move("copy_engine", spans=True)),
    (ag_gemm, Move("none")),
    (ag_gemm_swiglu, Move("copy_engine")),
    (gemm_rs, Move("copy_engine")),
    (gemm_rs, Move("copy_engine", channels=2)),
    (gemm_rs, Move("epilogue")),
    (gemm_rs, Move("epilogue", slots=2)),
    (gemm_rs, Move("none")),
    (gemm_rs_add, Move("epilogue")),
    (gemm_ar, Move("copy_engine", shots=2)),
    (gemm_ar, Move("epilogue", shots=1)),
    (gemm_ar, Move("epilogue", shots=2)),
]
ids = pytest.mark.parametrize(
    ("kernel", "move"), CASES, ids=lambda v: getattr(v, "name", getattr(v, "resource", None))
)


def world_of(kernel: Any) -> int:
    """Plain products run on one rank."""
    return 1 if kernel is gemm else WORLD


def schedule(kernel: Any, move: Move = Move(), tail: int = 2, **fields: Any) -> Schedule:  # noqa: B008
    """Small tiles; of five workers some have a tile more than the others."""
    moved = MOVED[kernel.name]
    return Schedule(
        tiles=(("K", 16), ("M", 16), ("N", 32)),
        workers=fields.pop("workers", 5),
        warps=4,
        tail=tail,
        moves=((moved, move),) if moved else (),
        **fields,
    )


def fused(kernel: Any, move: Move = Move(), **fields: Any) -> Op:  # noqa: B008
    """The program of a small kernel, proven: of 16 or 18 tiles."""
    op = kernel.build(
        {"M": 96, "N": 96, "K": 80},
        world=world_of(kernel),
        present=[p for p in kernel.params if p in kernel.signature.tensors],
    )
    return compile_kernel(op, schedule(kernel, move, **fields))


def integers(count: int, *shape: int, seed: int) -> list[torch.Tensor]:
    """One tensor a rank whose products and sums are exact."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(-3, 4, shape, generator=made).to(torch.bfloat16) for _ in range(count)]


def arguments(kernel: Any, m: int = 96, n: int = 96, k: int = 80) -> Sequence[list[torch.Tensor]]:
    """Arguments of a call, without its output."""
    world = world_of(kernel)
    here = m // world if kernel.name.startswith("ag") else m
    weights = 2 if kernel is ag_gemm_swiglu else 1
    return [
        integers(world, here, k, seed=1),
        *(integers(world, k, n, seed=2 + number) for number in range(weights)),
    ]


def stages(program: Op) -> dict[str, Op]:
    """The stages of the first launch by name."""
    return {op.symbol: op for op in program.find("launch")[0].find("stage")}


# The form -----------------------------------------------------------------------------------------


def test_whole_tiles_then_parts_then_what_adds_them_in_order() -> None:
    found = stages(fused(gemm, tail=3, workers=7))
    assert list(found) == ["C.gemm", "C.part1", "C.part2", "C.tail"]
    assert [op["positions"] for op in found.values()] == [(0, 14), *[(14, 18)] * 3]
    # Each queue goes on at the worker where the one before it ended.
    assert [op.get("first") for op in found.values()] == [None, None, 4, 1]
    loops = [next(op for op in stage.body if op.blocks) for stage in found.values()]
    # Five steps of 16: two of them with the task that adds.
    assert [str(loop["extent"][0]) for loop in loops] == ["K", "32", "16", "32"]
    assert [op["tile"] for op in loops] == [(16,)] * 4
    placed = [str(op.ref) for op in loops[1].body if op.name == "load"]
    assert all("k.p1.start + 32" in text for text in placed)
    assert {op.name for op in found["C.part1"].body} == {"zeros", "for_tiles", "store", "notify"}
    names = [op.name for op in found["C.tail"].body]
    # Behind them stands what the kernel does to the sum: here it adds a bias.
    assert names[:8] == ["zeros", "for_tiles", *["wait"] * 2, *["load", "add"] * 2]
    assert names[8:] == ["load", "add", "cast", "store"]
    counts = [op["count"] for op in found["C.tail"].body if op.name == "wait"]
    assert counts == [4, 4]


def test_parts_lie_in_as_many_rows_as_the_tiles_have() -> None:
    (parts,) = (b for b in fused(gemm, tail=3, workers=7).find("buffer"))
    rows = [str(d) for d in parts["dims"]]
    assert parts["space"] == "local" and parts["dtype"] == "fp32" and rows[0] == "2"
    assert int(rows[1]) <= 96 and rows[2] == "N"
    # Of the last slice that a rank visits, whichever that is.
    (own,) = (b for b in fused(ag_gemm).find("buffer") if b.symbol.startswith("tail."))
    assert int(str(own["dims"][1])) <= 96 // WORLD


def test_of_several_sums_each_has_parts_of_its_own() -> None:
    program = fused(ag_gemm_swiglu, Move("copy_engine"))
    parts = [b.symbol for b in program.find("buffer") if b.symbol.startswith("tail.")]
    assert len(parts) == 2 and len(set(parts)) == 2


def test_where_there_are_fewer_tiles_than_workers_all_are_in_parts() -> None:
    found = stages(fused(gemm, workers=40))
    assert list(found) == ["C.part1", "C.tail"]
    assert [op["positions"] for op in found.values()] == [(0, 18)] * 2


def test_where_waves_are_full_nothing_is_cut() -> None:
    program = fused(gemm, workers=6)
    assert list(stages(program)) == ["C.gemm"] and not program.find("buffer")


def test_programs_round_trip() -> None:
    program = fused(gemm, tail=3, workers=7)
    assert parse_ir(print_ir(program)) == program


# What is refused ----------------------------------------------------------------------------------


@tilelink.kernel("gather A[M, K] over K")
def along(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M")
def copied(A, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]


@pytest.mark.parametrize(
    ("kernel", "move", "why"),
    [
        (scaled, None, "carries something else than sums of products"),
        (along, None, "walked shard by shard"),
        (copied, None, "multiplies no matrices"),
        (ag_gemm, Move("sm:2"), "workers that join the queue"),
        (gemm_rs, Move("epilogue", slots=2, signal="word"), "travels as words"),
        (gemm_rs, Move("epilogue", sum="epilogue"), "summed over the ranks in the same epilogue"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_no_plain_product_is_refused(kernel: Any, move: Move | None, why: str) -> None:
    names = {"copied": "MK"}.get(kernel.name, "MNK")
    op = kernel.build(dict.fromkeys(names, 96), world=WORLD)
    moves = () if move is None else ((MOVED[kernel.name], move),)
    with pytest.raises(ScheduleError, match=re.escape(why)):
        run_passes(op, Schedule(tail=2, workers=4, moves=moves))


def test_parts_are_of_whole_steps_and_of_rows_that_are_known() -> None:
    with pytest.raises(ScheduleError, match="8 parts of a depth of 5 steps"):
        fused(gemm, tail=8)
    op = gemm_ar.build({"M": 32, "N": 64, "K": 96}, world=WORLD, dynamic=("M",))
    with pytest.raises(ScheduleError, match="`M` is known at run time only"):
        run_passes(op, schedule(gemm_ar))


# What the proof sees ------------------------------------------------------------------------------

EDITS = [
    # A part of the depth twice and another never; a longer one; not all of it.
    ("%k.p1 at k.p1.start + 32", "%k.p1 at k.p1.start + 16"),
    ("%k.p2 at k.p2.start + 64", "%k.p2 at k.p2.start + 32"),
    ("{extent = [16], tile = [16]}", "{extent = [32], tile = [16]}"),
    ("for_tiles (%acc.t) {extent = [32]", "for_tiles (%acc.t) {extent = [16]"),
    # The parts in another order, one of them twice, none of them, something else than their sum.
    ("add (%acc.3.at0.t, %acc.3.at1.t)", "add (%acc.3.at1.t, %acc.3.at0.t)"),
    ("load @tail.C[1, ", "load @tail.C[0, "),
    ("store @tail.C[1, ", "store @tail.C[0, "),
    ("add (%acc.3.to1.t, %acc.3.at2.t)", "add (%acc.3.to1.t, %acc.3.to1.t)"),
    ("add (%acc.3.to1.t, %acc.3.at2.t)", "mul (%acc.3.to1.t, %acc.3.at2.t)"),
    ("%acc.p1 = zeros", "%acc.p1 = full {value = 1.0}"),
    # Other tiles: one less, one twice, another one's place.
    ("positions = [0, 14]", "positions = [0, 13]"),
    ("positions = [0, 14]", "positions = [0, 15]"),
    (
        "@C.part1 {extent = [M, N], group = 8, positions = [14, 18]",
        "@C.part1 {extent = [M, N], positions = [13, 17]",
    ),
    ("store @tail.C[0, %m.p1 at m.p1.start - ", "store @tail.C[0, %m.p1 at 0 * m.p1.start - 0 * "),
    ("load @tail.C[0, %m.t at m.t.start - ", "load @tail.C[0, %m.t at 64 - m.t.start + "),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_other_sums_are_refused(old: str, new: str) -> None:
    text = print_ir(fused(gemm, tail=3, workers=7, flatten=False))
    head, body = text.split("\n  head ", 1)
    assert old in body
    with pytest.raises(tilelink.TilelinkError):
        verify(parse_ir(f"{head}\n  head {body.replace(old, new)}"))


def test_positions_end_with_the_order() -> None:
    text = print_ir(fused(gemm, tail=3, workers=7, flatten=False))
    with pytest.raises(tilelink.TilelinkError, match=r"no positions 14\.\.19, of 18"):
        verify(parse_ir(text.replace("positions = [14, 18]", "positions = [14, 19]")))
    with pytest.raises(tilelink.TilelinkError, match="the empty range"):
        check_types(parse_ir(text.replace("positions = [14, 18]", "positions = [14, 14]")))


def test_no_kernel_but_a_sum_of_products_is_held_against_parts() -> None:
    other = scaled.build({"M": 96, "N": 96, "K": 80}, world=WORLD)
    with pytest.raises(DataflowError):
        verify(fused(gemm_ar, Move("copy_engine")), other)


def test_a_read_that_does_not_wait_for_all_parts_is_refused() -> None:
    text = print_ir(fused(gemm, tail=3, workers=7))
    with pytest.raises(tilelink.TilelinkError, match="may happen before its data is there"):
        verify(parse_ir(text.replace("{count = 4", "{count = 3")))


def test_no_interleaving_changes_what_is_computed() -> None:
    op = gemm.build({"M": 24, "N": 8, "K": 16}, world=1)
    tiles = tuple((name, 8) for name in "KMN")
    program = run_passes(op, Schedule(tiles=tiles, workers=2, tail=2))
    made = torch.Generator().manual_seed(3)
    inputs = [
        [{n: torch.randn(*s, generator=made).bfloat16() for n, s in (("A", (24, 16)), ("B", (16, 8)))}]
        for _ in range(2)
    ]  # fmt: skip
    trial = Trial(inputs, [reference(op, given) for given in inputs], op)
    assert decide(program, trial).word == EQUIVALENT


# Emitted, simulated, interpreted -------------------------------------------------------------------


@ids
@pytest.mark.parametrize("backend", ["simulate", "interpret"])
def test_numbers_are_those_of_the_reference(kernel: Any, move: Move, backend: str) -> None:
    given, world = arguments(kernel), world_of(kernel)
    wanted = kernel.on("reference", world=world)(*given)
    for tail, flatten in ((2, True), (3, False)):
        how = schedule(kernel, move, tail=tail, flatten=flatten)
        found = kernel.on(backend, world=world, schedule=how)(*given)
        if kernel is ag_gemm_swiglu:  # silu is no exact function
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two, rtol=2**-7, atol=0.0)  # an ulp of bf16
            continue
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(90, 72, 88), (100, 40, 136), (16, 32, 40)])
def test_tiles_and_steps_may_be_short(shape: tuple[int, int, int]) -> None:
    given = arguments(gemm, *shape)
    wanted = gemm.on("reference", world=1)(*given)
    for backend in ("simulate", "interpret"):
        found = gemm.on(backend, world=1, schedule=schedule(gemm))(*given)
        assert torch.equal(found[0], wanted[0])


def test_bits_do_not_depend_on_timing() -> None:
    made = torch.Generator().manual_seed(5)
    given = [
        [torch.randn(*shape, generator=made).bfloat16() for _ in range(WORLD)]
        for shape in ((96, 80), (80, 96))
    ]
    how = schedule(gemm_ar, Move("epilogue", shots=1), tail=3)
    seen = [gemm_ar.on("simulate", world=WORLD, seed=s, schedule=how)(*given) for s in range(4)]
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@tilelink.kernel("local A[M, K]")
def chained(A, B, D, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N, L = D.shape
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, e in tk.tiles(M, L):
        acc = tk.zeros([m, e], tk.float32)
        for n in tk.tiles(N):
            acc = tk.dot(P[m, n], D[n, e], acc)
        C[m, e] = acc


@pytest.mark.parametrize("workers", [4, 5, 9])
def test_each_product_of_a_kernel_has_a_last_wave(workers: int) -> None:
    # 18 tiles, then 6: with nine workers the first are two full waves, and all of the second are cut.
    op = chained.build({"M": 96, "K": 80, "N": 96, "L": 32}, world=1)
    tiles = tuple((name, 32 if name == "N" else 16) for name in "KMN")
    how = Schedule(tiles=(("L", 32), *tiles), workers=workers, tail=2, warps=4)
    program = compile_kernel(op, how)
    cut = [s.symbol for s in program.find("launch")[0].find("stage") if s.get("positions")]
    assert ("P.part1" in cut) == (workers != 9) and "C.part1.1" in cut
    validate(read_module(Source("emitted.py", emit(program))), program)
    given = [integers(1, *s, seed=n) for n, s in enumerate(((96, 80), (80, 96), (96, 32)))]
    wanted = chained.on("reference", world=1)(*given)
    for backend in ("simulate", "interpret"):
        found = chained.on(backend, world=1, schedule=how)(*given)
        assert torch.equal(found[0], wanted[0])


@ids
@pytest.mark.parametrize("flatten", [True, False])
def test_emitted_modules_are_read_back(kernel: Any, move: Move, flatten: bool) -> None:
    program = fused(kernel, move, flatten=flatten)
    validate(read_module(Source("emitted.py", emit(program))), program)


def large(shape: tuple[int, int, int], tile: tuple[int, int, int], tail: int, emitter: str) -> Op:
    """The program of a product as large as those that are tuned; ``tile``: rows, columns and stages."""
    m, k, n = shape
    op = gemm.build({"M": m, "N": n, "K": k}, world=1)
    tiles = (("K", 64), ("M", tile[0]), ("N", tile[1]))
    return compile_kernel(
        op, Schedule(tiles=tiles, stages=tile[2], emitter=emitter, tail=tail, warps=8)
    )


@pytest.mark.parametrize(
    ("shape", "tile", "tail", "emitter"),
    [
        ((8192, 4096, 1376), (128, 128, 5), 3, "gluon"),
        ((2048, 8192, 7168), (128, 256, 4), 2, "gluon"),
        ((2048, 8192, 7168), (256, 128, 4), 3, "gluon"),
        ((1024, 1376, 1304), (128, 128, 5), 2, "gluon"),
        ((2048, 8192, 7168), (128, 256, 3), 2, "triton"),
    ],
)
def test_kernels_compile_clean_for_sm_90(
    shape: tuple[int, int, int], tile: tuple[int, int, int], tail: int, emitter: str
) -> None:
    program = large(shape, tile, tail, emitter)
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == [] and kernel.spills == 0
    assert "HGMMA" in kernel.stages["sass"]


@pytest.mark.parametrize("columns", [24, 40, 72])
def test_a_part_of_a_short_tile_goes_to_the_owner_of_the_tile(columns: int) -> None:
    """Its first column may be one of the next slice, or of none."""
    given = Schedule(
        tiles=(("K", 16), ("M", 64), ("N", 32)),
        workers=5,
        warps=1,
        tail=2,
        moves=(("C", Move("epilogue", shots=2, channels=3)),),
    )
    program = compile_kernel(gemm_ar.build({"M": 192, "N": columns, "K": 80}, world=WORLD), given)
    text = emit(program)
    assert "n_t_part" in text and f"peer_pointer(peers, n_t_start // {columns // WORLD}," in text
    validate(read_module(Source("emitted.py", text)), program)


TURNS = next(c for c in ROLES if c.tail > 1 and c.name.startswith("ag"))
PARTS = [
    # Another part's place, another tile's, a piece of another tile; a tile of parts added to the wrong columns.
    (r"tail_C_to_rows = tl\.cast\((m_p1_start[^\n]*)", r"tail_C_to_rows = tl.cast(64 + \1"),
    (r"k_p1_start \+ 128", "k_p1_start + 64"),
    (r"consumer_tile_wait\(ctx, (\d+), (\d+),", r"consumer_tile_wait(ctx, \1, 1,"),
    (r"(acc_t_low_low = roles\.piece\()acc_t_low_low", r"\1acc_t_low_high"),
    (r"acc_3_t = acc_t_low_low \+ ", "acc_3_t = acc_t_high_low + "),
    (r"m_t_place = q \+ \d+", "m_t_place = q + 1"),
    (r"roles\.delayed_tile_notify\(ctx, pending\)|device\.producer_tile_notify\(ctx, 3[^\n]*", "pass"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), PARTS)
def test_a_module_that_adds_other_parts_is_refused(old: str, new: str) -> None:
    program = TURNS.fused()
    text = emit(program)
    assert re.search(old, text)
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", re.sub(old, new, text))), program)


# What is proposed ----------------------------------------------------------------------------------


def test_parts_are_proposed_where_the_last_wave_has_room() -> None:
    machine = Machine.load("h200x8")

    def tails(m: int, k: int, n: int) -> set[tuple[int, int, int]]:
        space = Space(gemm.build({"M": m, "N": n, "K": k}, world=1), machine)
        return {
            (dict(s.tiles)["M"], dict(s.tiles)["N"], s.tail)
            for s in space.computations()
            if s.emitter == "gluon" and s.tail > 1
        }

    found = tails(8192, 4096, 1376)
    assert (128, 128, 2) in found and (128, 128, 3) in found
    # 384 tiles are 2.91 waves: nobody would have anything else to do.
    assert not any(tile[:2] == (128, 256) for tile in found)
    assert not tails(8192, 512, 1376)


def test_the_model_sees_what_is_gained() -> None:
    machine = Machine.load("h200x8")
    whole, parts = (
        predict(large((1024, 8192, 7168), (128, 128, 5), tail, "gluon"), machine) for tail in (1, 2)
    )
    assert 0.8 * whole < parts < 0.95 * whole
    full, cut = (
        predict(large((1024, 3584, 8192), (128, 128, 5), tail, "gluon"), machine) for tail in (1, 2)
    )
    assert cut > full


def test_a_schedule_says_so() -> None:
    chosen = schedule(gemm, tail=3)
    assert Schedule.from_json(chosen.to_json()) == chosen
    assert replace(chosen, tail=1).to_sparse().get("tail") is None
