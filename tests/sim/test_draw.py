"""What tasks draw from memory, and what that does to what goes over the links meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import predict
from tilelink.backend.simulate.draw import Draw, draw_of
from tilelink.backend.simulate.geometry import Geometry
from tilelink.ir import Op
from tilelink.kernels import ag_gemm, gemm_rs
from tilelink.schedules import Move, Schedule, default_schedule
from tilelink.schedules.costs import cache_share
from tilelink.schedules.machine import Machine

WORLD, SIZE = 4, 2
H200 = Machine.load("h200x4")


def gathered(rows: int, depth: int, columns: int, spans: bool = False) -> Op:
    """All-gather and product in tiles of 64 x 128, copied by workers."""
    op = ag_gemm.build({"M": rows, "K": depth, "N": columns}, {}, WORLD)
    move = Move(resource="sm:4", spans=spans)
    tall = 256 if spans else 64
    schedule = replace(default_schedule(op).with_tiles(M=tall, N=128, K=64), moves=(("A", move),))
    return run_passes(op, schedule)


def drawn(program: Op, cache: int) -> tuple[Draw, int]:
    """Of a task of the product, and how many tasks there are."""
    geometry = Geometry(program)
    env = geometry.env(0)
    stage = next(
        s
        for launch in program.find("launch")
        for s in launch.find("stage")
        if any(op.name == "dot" for op in s.walk())
    )
    workers = 1 if any(op.get("emitter") == "library" for op in program.find("launch")) else 132
    return draw_of(stage, geometry, env, workers, cache), len(geometry.queue(stage, env))


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_blocks_of_rows_read_the_weight_again_as_far_as_the_cache_has_not_kept_it(
    kept: float,
) -> None:
    m, k, n = 256, 512, 1024
    weight = k * n * SIZE
    draw, tasks = drawn(gathered(m, k, n), int(kept * weight))
    # Four blocks of one row of tiles, one after the other; A and C are read and stored once.
    passes = 1 + (WORLD - 1) * (1 - kept)
    assert draw.memory * tasks == pytest.approx(passes * weight + (m * k + m * n) * SIZE)


def test_products_of_the_library_one_after_the_other_find_nothing_of_a_large_operand() -> None:
    m, k, n = 256, 512, 1024
    op = ag_gemm.build({"M": m, "K": k, "N": n}, {}, WORLD)
    program = run_passes(op, replace(default_schedule(op), emitter="library"))
    weight, rest = k * n * SIZE, (m * k + m * n) * SIZE
    draw, tasks = drawn(program, 2 * weight - 2)
    assert tasks == WORLD
    assert draw.memory * tasks == pytest.approx(WORLD * weight + rest)
    draw, tasks = drawn(program, 2 * weight)
    assert draw.memory * tasks == pytest.approx(weight + rest)


def test_tiles_of_all_rows_read_the_weight_once() -> None:
    m, k, n = 256, 512, 1024
    draw, tasks = drawn(gathered(m, k, n, spans=True), 0)
    assert draw.memory * tasks == pytest.approx((m * k + k * n + m * n) * SIZE)


def test_operands_stream_that_half_of_the_cache_cannot_hold() -> None:
    m, k, n = 256, 512, 1024
    weight, rows = k * n * SIZE, m * k * SIZE
    program = gathered(m, k, n)
    draw, tasks = drawn(program, 2 * weight)
    assert draw.streamed == 0.0
    draw, tasks = drawn(program, 2 * weight - 2)
    assert draw.streamed * tasks == pytest.approx(weight, rel=1e-4)
    draw, tasks = drawn(program, rows)
    assert draw.memory > draw.streamed > 0.0


@pytest.mark.parametrize("resource", ["copy_engine", "epilogue"])
def test_what_goes_over_the_link_takes_longer_where_operands_stream(resource: str) -> None:
    op = gemm_rs.build({"M": 1024, "K": 1024, "N": 2048}, {}, WORLD)
    # Few workers, so that there are products as long as anything is sent.
    program = run_passes(op, replace(default_schedule(op).with_resource(resource), workers=16))
    small = replace(H200, l2_bytes=1 << 20, link_gbps=20.0)
    free = replace(small, copy_drag=0.0, store_drag=0.0)
    ours = {"copy_engine": "copy_drag", "epilogue": "store_drag"}
    for name, model in (
        ("copy_drag", replace(free, copy_drag=3.0)),
        ("store_drag", replace(free, store_drag=3.0)),
    ):
        slower = predict(program, model) > 1.02 * predict(program, free)
        assert slower == (name == ours[resource])
    # What the cache holds, nothing streams.
    held = replace(free, l2_bytes=1 << 30)
    assert predict(program, replace(held, copy_drag=3.0, store_drag=3.0)) == predict(program, held)


@pytest.mark.parametrize(
    ("pitch", "width", "share"),
    [
        (14336, 128, 1.0),
        # A row in four begins at each quarter of a line; those at odd ones take three halves of lines for two.
        (7392, 128, 1.25),
        (7392, 256, 1.25),
        # Every second row is half a line off: as many halves as before.
        (14784, 128, 1.0),
        (2752, 64, 1.0),
        # A quarter off, half a line lies in two halves.
        (7392, 64, 1.5),
    ],
)
def test_rows_across_lines_keep_the_cache_busy(pitch: int, width: int, share: float) -> None:
    assert cache_share(pitch, width) == share


def test_a_pitch_that_is_no_multiple_of_a_line_counts_where_the_cache_is_what_bounds_a_product() -> (
    None
):
    """Both have as many tiles: the last of a row computes as long where it is short."""
    slow = replace(H200, l2_gbps=4000.0)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    schedule = Schedule(tiles=tiles, moves=(("A", Move(resource="copy_engine")),))
    whole, odd = (
        run_passes(ag_gemm.build({"M": 2048, "K": 2048, "N": n}, {}, WORLD), schedule)
        for n in (4096, 4080)
    )
    assert predict(odd, slow) > 1.05 * predict(whole, slow)
    fast = replace(H200, l2_gbps=1e6)
    assert predict(odd, fast) == pytest.approx(predict(whole, fast), rel=0.01)


def test_loads_stand_behind_the_tile_that_their_worker_has_stored_to_a_peer() -> None:
    op = gemm_rs.build({"M": 4096, "K": 2048, "N": 4096}, {}, WORLD)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    moves = {
        "stores": Move(resource="epilogue", sum="epilogue"),
        "copies": Move(resource="copy_engine", sum="epilogue"),
    }
    spent = {}
    for name, move in moves.items():
        program = run_passes(
            op, Schedule(tiles=tiles, stages=5, emitter="gluon", moves=(("C", move),))
        )
        free = predict(program, replace(H200, store_gbps=math.inf))
        spent[name] = predict(program, replace(H200, store_gbps=16.0)) - free
    assert spent["copies"] == 0.0
    # 1024 tiles of 132 workers, three of four for peers: each worker stores five or six of 32 KiB, and the
    # links are busy beside its products for as much longer.
    tile = 128 * 128 * SIZE / 16e3
    assert 5 * tile < spent["stores"] < 7 * tile
