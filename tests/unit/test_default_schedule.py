"""The schedule that a kernel has where nobody gives one: tiles that fill a GPU, and how sums travel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.maps import ar_both, ar_two
from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.schedules import Schedule, ScheduleError, default_schedule


def chosen(kernel: str, m: int, k: int, n: int, world: int = 8, dtype: str = "bf16") -> Schedule:
    op = getattr(kernels, kernel).build({"M": m, "K": k, "N": n}, world=world, dtype=dtype)
    schedule = default_schedule(op)
    run_passes(op, schedule)  # the passes take it
    return schedule


@pytest.mark.parametrize("m", (1, 16, 32, 64, 128, 256, 1024))
@pytest.mark.parametrize("world", (4, 8))
def test_small_products_have_tiles_for_all_sms(m: int, world: int) -> None:
    schedule = chosen("gemm_ar", m, 3584, 8192, world)
    tiles = dict(schedule.tiles)
    assert -(-m // tiles["M"]) * (8192 // tiles["N"]) >= 100
    assert tiles["M"] <= max(16, 2 * m)
    move = schedule.move("C")
    assert move.resource == "epilogue"
    # 16 MiB land twice, which is more than a slot holds.
    assert move.slots == (1 if m == 1024 else 2)


def test_small_reduces_travel_as_words() -> None:
    for world in (2, 4, 8):
        for m, signal in ((1, "word"), (8, "word"), (16, "sentinel"), (256, "sentinel")):
            assert chosen("gemm_ar", m, 3584, 8192, world).move("C").signal == signal
            assert chosen("gemm_ar_add", m, 3584, 8192, world).move("P").signal == signal
        assert chosen("gemm_rs", 128, 3584, 8192, world).move("C").signal == "sentinel"
    assert chosen("gemm_rs", 1024, 3584, 8192).move("C").signal == "flag"
    assert chosen("gemm_ar", 16, 3584, 8192, 16).move("C").signal == "flag"
    assert chosen("gemm_ar", 16, 3584, 8184).move("C").signal == "flag"  # half a word a rank


def test_sums_that_are_read_twice_are_announced_by_words_or_flags() -> None:
    for m, signal in ((1, "word"), (32, "word"), (256, "flag")):
        op = ar_both.build({"M": m, "K": 3584, "N": 8192}, world=4)
        schedule = default_schedule(op)
        assert schedule.move("P").signal == signal
        run_passes(op, schedule)
        by_sentinels = replace(schedule.move("P"), signal="sentinel", slots=2, sum="stage")
        with pytest.raises(ScheduleError, match="its sum is read 2 times"):
            run_passes(op, replace(schedule, moves=(("P", by_sentinels),)))


def test_sums_that_do_not_fit_the_area_of_words_together_are_announced_by_flags() -> None:
    for m, signal in ((128, "sentinel"), (320, "flag")):
        op = ar_two.build({"M": m, "K": 3584, "N": 8192}, world=4)
        schedule = default_schedule(op)
        assert {move.signal for _, move in schedule.moves} == {signal}
        assert {move.slots for _, move in schedule.moves} == {2}
        run_passes(op, schedule)


def test_a_tile_does_not_reach_past_the_block_of_a_rank() -> None:
    for kernel in ("gemm_rs", "ag_gemm"):
        for m in (128, 256, 512, 1024):
            tiles = dict(chosen(kernel, m, 3584, 8192).tiles)
            assert tiles["M"] == min(128, m // 8)


def test_what_does_not_fill_a_gpu_keeps_large_tiles_and_one_slot() -> None:
    schedule = chosen("gemm_ar", 512, 128, 256, 4)
    assert dict(schedule.tiles) == {"K": 64, "M": 128, "N": 256}
    assert schedule.move("C").slots == 1


@pytest.mark.parametrize(
    ("m", "n", "world", "where"),
    [
        (1024, 8192, 4, "epilogue"),
        (4096, 8192, 8, "epilogue"),
        # One wave of tiles; parts that are no whole tiles of either axis; one shot.
        (256, 8192, 4, "stage"),
        (1000, 8200, 8, "stage"),
        (1024, 8192, 1, "stage"),
    ],
)
def test_a_reduce_of_several_waves_is_summed_in_its_epilogue(
    m: int, n: int, world: int, where: str
) -> None:
    for kernel, tensor in (("gemm_ar", "C"), ("gemm_ar_add", "P")):
        assert chosen(kernel, m, 3584, n, world).move(tensor).sum == where


def test_large_sums_go_by_copy_engine() -> None:
    assert chosen("gemm_ar", 8192, 3584, 8192).move("C").resource == "copy_engine"
    assert chosen("gemm_rs", 8192, 3584, 8192).move("C").resource == "copy_engine"
    assert chosen("gemm_rs", 1024, 3584, 8192).move("C").slots == 2
    assert chosen("ag_gemm", 1024, 8192, 7168).move("A").resource == "copy_engine"
