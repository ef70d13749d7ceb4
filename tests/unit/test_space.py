"""The schedule space: deterministic, legal, and as wide as the schedule's fields."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.misc import in_place
from tilelink.backend.pipeline import run_passes
from tilelink.ir import Op
from tilelink.kernels import ag_gemm, ag_gemm_swiglu, gemm_ar, gemm_rs
from tilelink.schedules import EMITTERS, Schedule, default_schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.roles import SHARED_BYTES
from tilelink.schedules.schedule import SIGNALS
from tilelink.schedules.space import (
    BESIDE_CHANNELS,
    BESIDE_WORKERS,
    COPY_WORKERS,
    Space,
    class_of,
    estimate_us,
    lands_apart,
    legal,
    product_of,
)

H200 = Machine.load()


def build(kernel: object, m: int, k: int, n: int, world: int = 8, dtype: str = "bf16") -> Op:
    op: Op = kernel.build(  # type: ignore[attr-defined]
        {"M": m, "K": k, "N": n}, {}, world, dtype=dtype
    )
    return op


CASES = [
    pytest.param(ag_gemm, (8192, 8192, 7168), id="ag_gemm"),
    pytest.param(ag_gemm_swiglu, (8192, 4096, 2816), id="swiglu"),
    pytest.param(gemm_rs, (1024, 3584, 8192), id="gemm_rs"),
    pytest.param(gemm_ar, (16, 3584, 8192), id="gemm_ar"),
]


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_enumeration_is_the_same_each_time_and_has_nothing_twice(
    kernel: object, shape: tuple[int, int, int]
) -> None:
    op = build(kernel, *shape)
    first, second = Space(op, H200).computations(), Space(op, H200).computations()
    assert first == second
    assert len(set(first)) == len(first) > 50
    moves = Space(op, H200).moves(first[0])
    assert len(set(moves)) == len(moves) > 5


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_every_computation_fits_the_gpu(kernel: object, shape: tuple[int, int, int]) -> None:
    op = build(kernel, *shape)
    product = product_of(op)
    assert product is not None
    for schedule in Space(op, H200).computations():
        if schedule.emitter == "library":
            continue
        m, n, k = product.tile(schedule)
        if schedule.emitter == "gluon":
            # What leaves goes by way of a few columns at a time.
            assert schedule.stages * (m * k + product.dots * k * n) * 2 < SHARED_BYTES
        else:
            assert product.shared_bytes(schedule) < SHARED_BYTES
        assert m * n * product.dots <= schedule.warps * 32 * 128


def test_the_default_schedule_is_part_of_the_space() -> None:
    op = build(ag_gemm, 8192, 8192, 7168)
    base = default_schedule(op)
    space = Space(op, H200)
    assert legal(product_of(op), base)
    assert base in space.computations()
    assert base in space.moves(base)


def test_the_whole_space_is_the_product_of_its_halves() -> None:
    op = build(gemm_ar, 16, 256, 64, world=2)
    space = Space(op, H200)
    whole = list(space.schedules())
    assert len(whole) == sum(len(space.moves(c)) for c in space.computations())
    assert len(set(whole)) == len(whole)


def test_fp32_takes_smaller_tiles() -> None:
    wide, narrow = (build(ag_gemm, 2048, 2048, 2048, dtype=d) for d in ("bf16", "fp32"))
    largest = [
        max(p.shared_bytes(s) for s in Space(op, H200).computations() if s.emitter == "triton")
        for op in (wide, narrow)
        if (p := product_of(op)) is not None
    ]
    assert all(size <= SHARED_BYTES for size in largest)
    product = product_of(narrow)
    assert product is not None
    assert not legal(product, default_schedule(wide).with_tiles(M=128, N=256, K=128))


def test_tiles_hold_no_more_than_the_rows_of_one_rank_but_where_they_span_shards() -> None:
    op = build(ag_gemm, 128, 1024, 1024)
    space = Space(op, H200)
    made = [s for s in space.computations() if s.emitter == "triton"]
    tall = {dict(s.tiles)["M"]: s for s in made}
    assert sorted(tall) == [16, 32, 64, 128]
    for rows, schedule in tall.items():
        spans = {s.move("A").spans for s in space.moves(schedule) if s.tiles != space.base.tiles}
        assert spans <= {rows > 16}
    # Of a large tensor each shard is enough to compute with.
    large = Space(build(ag_gemm, 2048, 8192, 1024), H200).computations()
    assert {dict(s.tiles)["M"] for s in large if s.emitter == "triton"} == {16, 32, 64, 128, 256}
    assert not any(
        m.spans
        for s in Space(build(ag_gemm, 8192, 8192, 1024), H200).moves(large[0])
        for _, m in s.moves
    )


@pytest.mark.parametrize(
    ("depth", "columns", "channels"), [(3584, 8192, {2}), (1376, 4096, {2, 4, 8})]
)
def test_channels_of_few_rows_are_for_operands_that_the_cache_holds(
    depth: int, columns: int, channels: set[int]
) -> None:
    """Of the eight rows of tiles of a slice: four a channel, or one where the cache holds the operand."""
    space = Space(build(gemm_rs, 8192, columns, depth), H200)
    one = replace(space.base.with_tiles(M=128, N=128, K=64), emitter="gluon", warps=8, stages=4)
    assert {m.channels for s in space.moves(one) for _, m in s.moves if m.sm_workers} == channels


def test_workers_copy_beside_roles_in_the_one_form_that_scatters_have() -> None:
    space = Space(build(ag_gemm, 8192, 4096, 4096), H200)
    one = next(s for s in space.computations() if s.emitter == "gluon")
    assert {m.sm_workers for s in space.moves(one) for _, m in s.moves} >= set(COPY_WORKERS)
    op = build(gemm_rs, 8192, 4096, 4096)
    space = Space(op, H200)
    for columns, offered in ((128, True), (256, False)):
        one = replace(
            space.base.with_tiles(M=128, N=columns, K=64), emitter="gluon", warps=8, stages=4
        )
        found = [(s, m) for s in space.moves(one) for _, m in s.moves if m.sm_workers]
        assert bool(found) is offered  # of wider tiles each group has a half
        for schedule, move in found:
            assert (move.copies, move.sum, move.slots) == ("boxes", "epilogue", 1)
            assert move.sm_workers in BESIDE_WORKERS and move.channels in BESIDE_CHANNELS
            launch = run_passes(op, schedule).find("launch")[0]
            assert {s.get("queue") for s in launch.find("stage")} == {None, "dynamic"}
    # Triton kernels have workers that copy as before, and no others.
    workers = {m.sm_workers for s in space.moves(space.base) for _, m in s.moves if m.sm_workers}
    assert workers == set(COPY_WORKERS)
    space = Space(build(gemm_ar, 8192, 4096, 4096), H200)
    one = next(s for s in space.computations() if s.emitter == "gluon")
    assert not any(m.sm_workers for s in space.moves(one) for _, m in s.moves)
    # An all-reduce is not cut at ranks.
    op = build(gemm_ar, 128, 1024, 1024)
    assert {dict(s.tiles)["M"] for s in Space(op, H200).computations()} >= {16, 128}


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_moves_can_be_fused(kernel: object, shape: tuple[int, int, int]) -> None:
    m, k, n = (min(extent, 1024) for extent in shape)
    op = build(kernel, m, k, n, world=4)
    space = Space(op, H200)
    names = {class_of(s, space.product) for s in space.moves(space.base)}
    assert {name[2][0] for name in names} >= {"copy_engine", "sm", "none"}
    for schedule in space.moves(space.base)[:12]:
        run_passes(op, schedule)


def test_every_emitter_of_the_schedule_is_searched() -> None:
    op = build(ag_gemm, 8192, 8192, 7168)
    assert {s.emitter for s in Space(op, H200).computations()} == set(EMITTERS)


def test_estimates_prefer_tiles_that_keep_the_tensor_cores_busy() -> None:
    op = build(ag_gemm, 8192, 8192, 7168)
    product = product_of(op)
    base = default_schedule(op)

    def us(schedule: Schedule) -> float:
        return estimate_us(product, schedule, H200)

    assert us(base) < us(base.with_tiles(M=64, N=64)) / 1.3
    # Two waves of which the last is nearly empty, or three of half the length.
    odd = product_of(build(ag_gemm, 4480, 4096, 1024))
    half = replace(base.with_tiles(N=128), stages=5)
    assert estimate_us(odd, half, H200) < estimate_us(odd, base, H200)


def test_a_kernel_without_a_product_has_one_computation() -> None:
    op: Op = in_place.build({"M": 8, "K": 16})
    assert product_of(op) is None
    assert Space(op, H200).computations() == [default_schedule(op)]


def test_small_sums_may_travel_as_words() -> None:
    def signals(op: Op) -> set[tuple[str, int, str]]:
        found = Space(op, H200).moves(default_schedule(op))
        return {(m.resource, m.slots, m.signal) for s in found for _, m in s.moves}

    for kernel in (gemm_ar, gemm_rs):
        small = signals(build(kernel, 64, 3584, 8192))
        assert {signal for *move, signal in small if move == ["epilogue", 2]} == set(SIGNALS)
        assert {(r, s) for r, s, signal in small if signal != "flag"} == {("epilogue", 2)}
        large = signals(build(kernel, 1024, 3584, 8192))
        assert {signal for _, _, signal in large} == {"flag"}


def test_tiles_of_a_scatter_span_slices_of_few_rows() -> None:
    def found(rows: int) -> set[tuple[int, bool]]:
        space = Space(build(gemm_rs, rows, 1024, 1024, world=4), H200)
        return {
            (dict(s.tiles)["M"], m.spans)
            for c in space.computations()
            if c.emitter == "triton" and c.split == 1 and c.tiles != space.base.tiles
            for s in space.moves(c)
            for _, m in s.moves
        }

    # Taller than a slice of 32 rows by spanning alone, and never otherwise.
    assert found(128) == {(16, False), (32, False), (64, True), (128, True)}
    assert found(256) == {(16, False), (32, False), (64, False)}
    op = build(gemm_rs, 128, 1024, 1024, world=4)
    space = Space(op, H200)
    tall = next(c for c in space.computations() if dict(c.tiles)["M"] == 128 and c.split == 1)
    moves = [m for s in space.moves(tall) for _, m in s.moves]
    assert {(m.resource, m.direction, m.sum) for m in moves} == {("epilogue", "pull", "stage")}
    assert {m.slots for m in moves} == {1, 2}
    for schedule in space.moves(tall)[:4]:
        run_passes(op, schedule)


def test_parts_of_sums_land_apart_from_the_operands_where_fewer_stages_let_them() -> None:
    """Both are in the space, as schedules of two kinds."""
    space = Space(build(gemm_rs, 8192, 3584, 8192), H200)
    deep = replace(
        space.base.with_tiles(M=128, N=128, K=64), emitter="gluon", warps=8, stages=6
    ).with_resource("copy_engine")
    found = [s for s in space.moves(deep) if s.move("C").sum == "epilogue"]
    assert {s.stages for s in found} == {5, 6}
    assert {s.stages for s in found if lands_apart(space.product, s)} == {5}
    kinds = {class_of(s, space.product) for s in found if s.move("C").resource == "copy_engine"}
    assert len(kinds) == 2
    assert {s.stages for s in space.moves(deep) if s.move("C").sum == "stage"} == {6}
    wide = replace(deep.with_tiles(M=128, N=256, K=64), stages=4)
    assert {s.stages for s in space.moves(wide)} == {4}
