"""Which form the emitter gives a stage: flattened or nested, TMA or pointers, waits inside or before."""

from __future__ import annotations

from typing import Any

import pytest

import tilelink
import tilelink.language as tk
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.schedules import Move, Schedule, default_schedule

COPIED = (("C", Move()),)
EXTENTS = {"M": 512, "N": 512, "K": 256}


@tilelink.kernel("scatter C[M, N] over M sum")
def scaled(A: Any, S: Any, B: Any, C: Any) -> None:
    """An operand that is changed on its way to the product."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k] * S[k], B[k, n], acc)
        C[m, n] = acc


def program(kernel: Any, **changes: Any) -> Op:
    """``kernel`` on four ranks at :data:`EXTENTS`, its default schedule with fields changed."""
    op = kernel.build(EXTENTS, world=4)
    data = {f: getattr(default_schedule(op), f) for f in Schedule.__dataclass_fields__}
    return compile_kernel(op, Schedule(**{**data, **changes}))


def stage(text: str, name: str) -> str:
    """The text of one stage of the only kernel."""
    return text.split(f"# Stage {name}.")[1].split("# Stage ")[0].split("# The last worker")[0]


def test_a_stage_that_waits_for_nothing_is_one_loop() -> None:
    text = stage(emit(program(kernels.gemm_rs, moves=COPIED)), "C.gemm")
    assert text.count("for ") == 1
    # Held back by a tile, so once inside the loop in front of the stores, and once behind it.
    inside, _, behind = text.rpartition("device.delayed_tile_notify(")
    assert inside.count("device.delayed_tile_notify(") == 1
    assert inside.index("device.delayed_tile_notify(") < inside.index(".store(")
    assert behind.count("\n") <= 2


@pytest.mark.parametrize("kernel", ("ag_gemm", "gemm_rs"))
def test_without_flatten_loops_are_nested(kernel: str) -> None:
    text = stage(emit(program(getattr(kernels, kernel), flatten=False)), "C.gemm")
    assert text.count("for ") == 2
    assert "delayed_tile_notify" not in text


def test_a_stage_that_waits_by_segment_is_flattened_in_each_segment() -> None:
    text = stage(emit(program(kernels.ag_gemm)), "C.gemm")
    assert text.count("for ") == 2
    wait, main = text.index("peer_tile_wait"), text.index("for _ in tl.range")
    assert text.index("for m_part in range") < wait < main
    assert "if " not in text[main : text.index("if k_at == 0")]
    # The token of the wait reaches the address of every load of what was waited for.
    assert "a_shift = token" in text[wait:main]
    assert "m_start + a_shift" in text[main:]


def test_a_stage_whose_waits_differ_inside_a_segment_is_nested() -> None:
    halves = (("A", Move("copy_engine", channels=2)),)
    tiles = (("K", 64), ("M", 64), ("N", 128))
    text = stage(emit(program(kernels.ag_gemm, moves=halves, tiles=tiles)), "C.gemm")
    assert text.count("for ") == 2
    assert text.index("for q") < text.index("peer_tile_wait") < text.index("for k_start")


def test_waits_that_are_the_same_for_all_tasks_stand_before_the_loop() -> None:
    text = stage(emit(program(kernels.gemm_rs)), "C.sum")
    assert text.rindex("_wait(") < text.index("for q in")
    assert "token = arrived" in text.split("for q in")[1]


def test_a_changed_operand_is_not_loaded_by_tma() -> None:
    text = stage(emit(program(scaled)), "C.gemm")
    first = text.split("a = ")[1].split("\n")[0]
    second = text.split("b = ")[1].split("\n")[0]
    assert first.startswith("tl.load(")
    assert ".load([" in second and not second.startswith("tl.load(")


@tilelink.kernel("gather A[M, K] over M; scatter C[M, N] over M sum")
def both(A: Any, B: Any, C: Any) -> None:
    """A gathered operand and a scattered product in one nest."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


def test_a_dynamic_queue_stays_within_its_workers() -> None:
    moves = (("A", Move(resource="sm:3")), ("C", Move(resource="sm:2")))
    text = stage(emit(program(both, moves=moves, workers=8)), "C.gemm")
    guard, _, rest = text.partition("if tl.program_id(0) >= 2:")
    assert "queue_next" not in guard and "queue_next" in rest


@pytest.mark.parametrize("resource", ["copy_engine", "sm:1"])
def test_a_wait_for_one_notify_need_not_say_so(resource: str) -> None:
    op = kernels.gemm_rs.build({"M": 64, "K": 32, "N": 32}, world=2, dtype="fp32")
    tiles = (("K", 32), ("M", 32), ("N", 32))
    moves = (("C", Move(resource=resource)),)
    said = compile_kernel(op, Schedule(tiles=tiles, workers=3, moves=moves))
    text = print_ir(said)
    assert " {count = 1}" in text
    unsaid = parse_ir(text.replace(" {count = 1}", ""))
    assert emit(unsaid).split('"""')[-1] == emit(said).split('"""')[-1]
