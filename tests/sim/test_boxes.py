"""Copies of boxes by workers, and tiles that span shards: the same values, and what the passes make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.test_shots import whole_numbers
from tilelink import kernels
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.verify import verify
from tilelink.backend.verify.errors import VerifyError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.check import check_types
from tilelink.schedules import Move, Schedule, ScheduleError

TENSOR = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}


def schedule(kernel: str, size: int = 16, emitter: str = "triton", **move: Any) -> Schedule:
    """Tiles of ``size``, and a move by two workers that copy boxes."""
    made = Move(**{"resource": "sm:2", "copies": "boxes", **move})
    tiles = tuple((name, size) for name in "KMN")
    return Schedule(tiles=tiles, workers=5, emitter=emitter, moves=((TENSOR[kernel], made),))


def fused(kernel: str, m: int, chosen: Schedule, world: int = 4, **extents: int) -> Op:
    """The proven program of a kernel of ``m`` rows."""
    sizes = {"M": m, "K": 32, "N": 32, **extents}
    return compile_kernel(getattr(kernels, kernel).build(sizes, world=world), chosen)


@pytest.mark.parametrize("backend", ["simulate", "interpret"])
@given(data=st.data())
@settings(max_examples=8, suppress_health_check=list(HealthCheck), deadline=None)
def test_boxes_give_the_bits_of_the_reference(backend: str, data: st.DataObject) -> None:
    # Processes that wait for each other are slow on few cores.
    world = data.draw(st.sampled_from((2, 3) if backend == "interpret" else (2, 3, 4)))
    kernel = data.draw(st.sampled_from(sorted(TENSOR)))
    gathers = kernel == "ag_gemm"
    emitter = data.draw(st.sampled_from(("triton", "library"))) if gathers else "triton"
    move: dict[str, Any] = {
        "channels": data.draw(st.sampled_from((None, 1, 2, 3))),
        "tile": data.draw(st.sampled_from((None, 4, 16))),
        "slots": data.draw(st.sampled_from((1, 2))) if emitter == "triton" else 1,
        "spans": gathers and data.draw(st.booleans()),
        "sum": "stage" if gathers else data.draw(st.sampled_from(("stage", "epilogue"))),
    }
    # The parts of a sum in two shots may be columns: 16 elements of a row at least.
    m, n = world * data.draw(st.integers(1, 24)), 16 * world * data.draw(st.integers(1, 3))
    a, b = whole_numbers(world, m // world if gathers else m, 48, n)
    one = getattr(kernels, kernel)
    chosen = schedule(kernel, emitter=emitter, **move)
    got = one.on(backend, world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, one.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@given(data=st.data())
@settings(max_examples=8, suppress_health_check=list(HealthCheck), deadline=None)
def test_tiles_that_span_shards_give_the_bits_of_the_reference(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from((2, 3, 4)))
    resource = data.draw(st.sampled_from(("copy_engine", "sm:2")))
    m, n = world * data.draw(st.integers(1, 24)), data.draw(st.integers(1, 40))
    a, b = whole_numbers(world, m // world, 24, n)
    move: dict[str, Any] = {"resource": resource, "copies": "rows", "spans": True}
    chosen = schedule("ag_gemm", data.draw(st.sampled_from((8, 32))), **move)
    got = kernels.ag_gemm.on("simulate", world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, kernels.ag_gemm.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kernel", sorted(TENSOR))
def test_boxes_go_through_tma_both_ways_and_are_drained(kernel: str, slots: int) -> None:
    program = fused(kernel, 64, schedule(kernel, slots=slots))
    check_types(program)
    assert parse_ir(print_ir(program)) == program
    push = next(op for op in program.walk() if op.name == "stage" and op.symbol.endswith(".push"))
    moved = [op for op in push.walk() if op.name in ("load", "store")]
    assert [op.get("via") for op in moved] == ["tma", "tma"]
    assert all(op.get("drain") for op in push.walk() if op.name == "notify")
    # One load serves all ranks, but for contributions, which differ from rank to rank.
    assert len([op for op in moved if op.name == "load"]) == 1
    assert len(push["extent"]) == (3 if kernel == "gemm_rs" else 2)


def test_a_box_is_a_part_of_a_channel_and_of_a_row() -> None:
    program = fused("ag_gemm", 512, schedule("ag_gemm"), K=8192)
    push = next(op for op in program.walk() if op.name == "stage" and op.symbol == "A.push")
    assert push["tile"] == (64, 128)
    assert program.declared("A.ready")["dims"][1] == 2
    notify = next(op for op in push.walk() if op.name == "notify")
    assert notify["count"] == 64


def test_who_waits_for_all_shards_has_one_channel_a_rank_and_whole_tiles() -> None:
    program = fused("ag_gemm", 64, schedule("ag_gemm", 64, spans=True))
    stage = next(op for op in program.walk() if op.name == "stage" and op.symbol == "C.gemm")
    assert stage.get("segment") is None and stage["tile"] == (64, 32)
    assert program.declared("A.ready")["dims"][1] == 1
    assert not program.declared("A")["in_place"]
    waits = [op for op in stage.walk() if op.name == "wait"]
    assert [str(op.ref) for op in waits] == ["@A.ready[0..WORLD, 0..1]"]


@pytest.mark.parametrize("emitter", ["library", "gluon"])
def test_a_kernel_of_its_own_copies_in_front_of_one_that_is_not_ours(emitter: str) -> None:
    op = kernels.ag_gemm.build({"M": 256, "K": 512, "N": 256}, world=4)
    move = Move(resource="sm:4", copies="boxes", spans=True)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    chosen = Schedule(tiles=tiles, emitter=emitter, moves=(("A", move),))
    copy, product = compile_kernel(op, chosen).find("launch")
    assert (copy.symbol, copy["emitter"], copy["workers"]) == ("A.copy", "gluon", 4)
    assert product["emitter"] == emitter and "A.copy" in product["after"]
    # All workers have a tile, of as many boxes as that leaves.
    assert copy.body[0]["tile"] == (64, 128)
    rows = Schedule(tiles=tiles, emitter=emitter, moves=(("A", Move(resource="sm:4")),))
    copy, _ = compile_kernel(op, rows).find("launch")
    assert copy.get("emitter") is None


def test_copies_of_another_place_are_refused() -> None:
    """Each edit moves a box elsewhere, or takes it from elsewhere."""
    text = print_ir(fused("ag_gemm", 64, schedule("ag_gemm"), K=512))
    kernel = kernels.ag_gemm.build({"M": 64, "K": 512, "N": 32}, world=4)
    verify(parse_ir(text), kernel)
    for old, new in (
        ("%A.t at RANK * 16 + A.t.start", "%A.t at (RANK + 1) % WORLD * 16 + A.t.start"),
        ("load @A[%A.t, %A.c]", "load @A[%A.t, %A.c at (A.c.start + 256) % 512]"),
        ("%A.t at RANK * 16 + A.t.start, %A.c]", "%A.t at RANK * 16 + A.t.start, %A.c at 0]"),
        ("peer = (RANK + 1 + A.s) % WORLD", "peer = (RANK + A.s) % WORLD"),
        ("hi = WORLD - 1, lo = 0", "hi = WORLD - 1, lo = 1"),
        ("{count = 2, drain = true", "{count = 1, drain = true"),
    ):
        edited = text.replace(old, new, 1)
        assert edited != text, old
        with pytest.raises(VerifyError):
            verify(parse_ir(edited), kernel)


DONE = "  counter @C.done {dims = [1], offset = 132096}\n  head {folded = true} do {"
STORED = 'store @C[%m, %n] (%c) {via = "tma"}\n'
BEHIND = """    stage @C.again {extent = [16, 32], tile = [16, 32], workers = [4, 5]} do (%x: tile, %y: tile) {
      wait @C.done[0] {count = 8, proxy = true}
      OPS
    }
    finish do {"""


@pytest.mark.parametrize(
    "ops",
    [
        "%z = load @C[%x, %y] : bf16[x, y]\n      store @C[%x at 16 + x.start, %y] (%z) {peer = RANK}",
        "transfer @C[%x, %y] {peer = RANK, to = @C[%x at 16 + x.start, %y]}",
    ],
)
def test_nothing_is_copied_over_what_a_stage_computes(ops: str) -> None:
    """Reads of the user's output state nothing that a copy could be held against."""
    op = kernels.ag_gemm.build({"M": 64, "K": 64, "N": 32}, world=2)
    text = print_ir(compile_kernel(op, schedule("ag_gemm")))
    for old, new in (
        ("  head {folded = true} do {", DONE),
        (STORED, STORED + "      notify @C.done[0] {drain = true}\n"),
        ("    finish do {", BEHIND.replace("OPS", ops)),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    with pytest.raises(VerifyError, match="copied over what"):
        verify(parse_ir(text), op)


def test_a_task_that_copies_loads_its_tile_once() -> None:
    """What a loop loads in turn from several places is not what its first turn has loaded."""
    op = kernels.ag_gemm.build({"M": 96, "K": 64, "N": 32}, world=3)
    text = print_ir(compile_kernel(op, schedule("ag_gemm", tile=16)))
    load = '      %A.box = load @A[%A.t, %A.c] {via = "tma"} : bf16[A.t, A.c]\n'
    loop = "      for_range {hi = WORLD - 1, lo = 0} do (%A.s: int32) {\n"
    turn = load.replace("%A.t, %A.c]", "%A.t at (A.t.start + A.s * 16) % 32, %A.c]")
    assert text.count(load + loop) == 1
    with pytest.raises(VerifyError):
        verify(parse_ir(text.replace(load + loop, loop + turn)), op)


REFUSED = [
    ("gemm_rs", {"resource": "copy_engine", "copies": "rows", "spans": True}, "spans", "gather"),
    ("ag_gemm", {"tile": 1}, "copies", "32 bytes"),
]


@pytest.mark.parametrize(("kernel", "move", "field", "said"), REFUSED)
def test_what_has_no_boxes_or_spans_nothing_is_refused_at_its_field(
    kernel: str, move: dict[str, Any], field: str, said: str
) -> None:
    extents = {"M": 64, "K": 8 if field == "copies" else 32, "N": 32}
    op = getattr(kernels, kernel).build(extents, world=4)
    with pytest.raises(ScheduleError, match=said) as caught:
        run_passes(op, schedule(kernel, **move))
    assert f"`moves.{TENSOR[kernel]}.{field}`" in str(caught.value)
    assert caught.value.span is not None


def test_a_box_is_told_as_it_lies_in_its_tensor() -> None:
    op = kernels.gemm_ar.build({"M": 6, "K": 32, "N": 16}, world=4)  # parts are columns
    with pytest.raises(ScheduleError, match="a box of 2 x 4 has rows of fewer than 32 bytes"):
        run_passes(op, schedule("gemm_ar", shots=2))


def test_rows_known_at_run_time_have_no_boxes_and_tiles_that_span_them_one_channel() -> None:
    op = kernels.ag_gemm.build({"M": 64, "K": 32, "N": 32}, world=4, dynamic=("M",))
    with pytest.raises(ScheduleError, match="run time"):
        run_passes(op, schedule("ag_gemm"))
    run_passes(op, schedule("ag_gemm", copies="rows", spans=True, channels=1))
    with pytest.raises(ScheduleError, match="2, but tiles wait for all"):
        run_passes(op, schedule("ag_gemm", copies="rows", spans=True, channels=2))
    op = kernels.gemm_rs.build({"M": 64, "K": 32, "N": 32}, world=4, dynamic=("M",))
    move = Move("epilogue", spans=True, direction="pull")
    run_passes(op, Schedule(moves=(("C", move),)))
    with pytest.raises(ScheduleError, match="fewer rows than `C` can have"):
        run_passes(op, Schedule(moves=(("C", move),), tiles=(("M", 32),)))
