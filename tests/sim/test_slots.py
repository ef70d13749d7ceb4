"""Two slots for what peers write: no acknowledgements, no head, and what the proof asks for in their place."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilelink
import tilelink.language as tk
from tests.edits import changed, check
from tests.sim.test_shots import TENSOR, agrees, schedule
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.image import image_of
from tilelink.backend.simulate.explore import explore
from tilelink.backend.validate import EmittedError
from tilelink.backend.verify import UndecidedError, VerifyError, verify
from tilelink.backend.verify.errors import ReuseError
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.schedules import Move, Schedule, ScheduleError

# Each rank writes into the next one alone, and hears from the one before.
RING = """
program @ring {bytes = 33818624, slots = 2, world = 3} do {
  extent @N {value = 16}
  tensor @A {dims = [N], dtype = "fp32", move = "local", role = "in"}
  tensor @C {dims = [N], dtype = "fp32", move = "local", role = "out"}
  buffer @B {dims = [N], dtype = "fp32", offset = 262144, space = "symmetric"}
  flag @B.ready {dims = [WORLD], offset = 4096}
  head {folded = true} do {
  }
  launch @ring {after = ["head"], workers = 1} do {
    stage @send {extent = [N], tile = [16]} do (%n: tile) {
      %a = load @A[%n] : fp32[n]
      store @B[%n] (%a) {peer = (RANK + 1) % WORLD}
      notify @B.ready[RANK] {peer = (RANK + 1) % WORLD}
    }
    stage @receive {extent = [N], tile = [16]} do (%m: tile) {
      wait @B.ready[(RANK + 2) % WORLD]
      %b = load @B[%m] : fp32[m]
      store @C[%m] (%b)
    }
  }
}
"""


# Touches nothing that another rank sees.
ALONE = """
program @alone {slots = 2, world = 2} do {
  extent @N {value = 16}
  tensor @A {dims = [N], dtype = "fp32", move = "local", role = "in"}
  tensor @C {dims = [N], dtype = "fp32", move = "local", role = "out"}
  tensor @E {dims = [N], dtype = "fp32", move = "local", role = "out"}
  counter @C.done {dims = [1], offset = 131072}
  head {folded = true} do {
  }
  launch @alone {after = ["head"], workers = 1} do {
    stage @copy {extent = [N], tile = [16]} do (%n: tile) {
      %a = load @A[%n] : fp32[n]
      store @C[%n] (%a)
      notify @C.done[0]
    }
    stage @again {extent = [N], tile = [16]} do (%m: tile) {
      wait @C.done[0] {count = 1}
      %b = load @C[%m] : fp32[m]
      store @E[%m] (%b)
    }
  }
}
"""


def compiled(n: int = 8, **move: Any) -> Op:
    """A program with slots, one tile of 8 a task."""
    op = kernels.gemm_ar.build({"M": 16, "K": 8, "N": n}, world=2)
    return compile_kernel(
        op, schedule("gemm_ar", 8, workers=2, resource="epilogue", slots=2, **move)
    )


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_slots_give_the_bits_of_the_reference(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from((2, 4)))
    kernel = data.draw(st.sampled_from(sorted(TENSOR)))
    resource = data.draw(st.sampled_from(("epilogue", "sm:2")))
    shots = data.draw(st.sampled_from((1, 2)))
    m, n = data.draw(st.integers(1, 40)), world * data.draw(st.integers(1, 20))
    chosen = schedule(kernel, resource=resource, shots=shots, slots=2)
    agrees(kernel, "simulate", world, m, n, chosen)


def test_there_is_no_acknowledgement_and_the_head_is_folded() -> None:
    program = compiled()
    assert program["slots"] == 2
    assert [op.name for op in program.body if op.blocks] == ["head", "launch"]
    assert next(iter(program.find("head"))).get("folded") is True
    assert "@ack" not in print_ir(program.with_attrs(kernel_text=None))
    text = emit(program)
    assert "call.head" not in text and text.count("device.begin_call(") == 1


def test_every_interleaving_of_three_calls_is_right() -> None:
    for shots in (1, 2):
        found = explore(compiled(shots=shots), 3)
        assert found.complete and found.bad is None, found


def test_a_program_that_shares_nothing_hears_from_all_ranks_too() -> None:
    """It takes an epoch: between two calls that use the same slot would stand none in which ranks meet."""
    with pytest.raises(ReuseError, match="before rank 1 has begun it"):
        verify(parse_ir(ALONE))
    waits = re.sub(r" *(counter|notify|wait) .*\n", "", ALONE)
    second = waits[waits.index("    stage @again") : waits.index("  }\n}")]
    lines = waits.replace(second, "").splitlines()
    silent = "\n".join(line for line in lines if "tensor @E" not in line)
    with pytest.raises(ReuseError):
        verify(parse_ir(silent))
    # On one rank it has an arena, which its epoch lies in.
    one = parse_ir(silent.replace("world = 2", "world = 1"))
    verify(one)
    assert not image_of(one).apart


def test_one_slot_without_acknowledgements_is_refused_and_found() -> None:
    program = compiled(shots=1)
    ops = tuple(op.with_attrs(folded=None) if op.name == "head" else op for op in program.body)
    single = program.with_ops(ops).with_attrs(slots=None)
    with pytest.raises(ReuseError):
        verify(single)
    assert explore(single, 2).bad is not None


def test_a_rank_that_does_not_hear_from_all_may_not_use_slots() -> None:
    ring = parse_ir(RING)
    with pytest.raises(ReuseError, match="two calls later: `store`"):
        verify(ring)
    assert explore(ring, 3).bad is not None
    # One that hears from itself alone is safe beside itself, and not beside other programs on the arena.
    alone = parse_ir(
        RING.replace("(RANK + 1) % WORLD", "RANK").replace("(RANK + 2) % WORLD", "RANK")
    )
    assert explore(alone, 3).bad is None
    with pytest.raises(ReuseError, match="may end the call before rank"):
        verify(alone)
    two = parse_ir(RING.replace("world = 3", "world = 2").replace("RANK + 2", "RANK + 1"))
    verify(two)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("slots = 2", "slots = 3"),
        ("head {folded = true}", "head"),
        ("head {folded = true}", "head {folded = false}"),
        (' {after = ["head"], workers = 1}', " {workers = 1}"),
        ("flag @B.ready {", "flag @B.ready {cleared = true, "),
    ],
)
def test_slots_and_a_folded_head_come_together(old: str, new: str) -> None:
    text = RING.replace("world = 3", "world = 2").replace("RANK + 2", "RANK + 1")
    verify(parse_ir(text))
    assert old in text
    with pytest.raises(UndecidedError):
        verify(parse_ir(text.replace(old, new, 1)))


def test_one_slot_needs_acknowledgements_with_a_folded_head_too() -> None:
    text = RING.replace("world = 3", "world = 2").replace("RANK + 2", "RANK + 1")
    with pytest.raises(ReuseError, match="in the next call"):
        verify(parse_ir(text.replace("slots = 2, ", "")))


@pytest.mark.parametrize("place", ("offset = 33554432", "offset = 33554416", "offset = 67584"))
def test_places_outside_of_a_slot_are_refused(place: str) -> None:
    text = RING.replace("world = 3", "world = 2").replace("RANK + 2", "RANK + 1")
    old = "offset = 4096" if place.endswith("67584") else "offset = 262144"
    with pytest.raises(VerifyError):
        verify(parse_ir(text.replace(old, place)))


@tilelink.kernel("gather A[M, K] over M")
def largest(A: Any, C: Any) -> None:
    """Nothing is multiplied, so all emitters write the same kernel."""
    M, K = A.shape
    for m in tk.tiles(M):
        top = tk.full([m], float("-inf"), tk.float32)
        for k in tk.tiles(K):
            top = tk.maximum(top, tk.max(A[m, k].to(tk.float32), axis=1))
        C[m] = top


@pytest.mark.parametrize("emitter", ["library", "gluon"])
def test_slots_beside_copies_that_are_a_kernel_of_their_own_are_refused(emitter: str) -> None:
    op = largest.build({"M": 64, "K": 32}, world=2)
    moves = (("A", Move("sm:2", slots=2)),)
    compile_kernel(op, Schedule(moves=moves))
    with pytest.raises(ScheduleError, match="copies are a kernel of their own") as caught:
        run_passes(op, Schedule(emitter=emitter, moves=moves))
    assert "`moves.A.slots`" in str(caught.value)


def test_slots_are_of_all_moved_tensors_and_of_workers_alone() -> None:
    op = kernels.gemm_ar.build({"M": 16, "K": 8, "N": 8}, world=2)
    for resource in ("copy_engine", "none"):
        with pytest.raises(ScheduleError, match="slots"):
            Move(resource=resource, slots=2)
        moved = Schedule(moves=(("C", Move(resource="sm:4", slots=2)),)).with_resource(resource)
        assert moved.move("C").slots == 1
        compile_kernel(op, moved)
    large = kernels.gemm_ar.build({"M": 1024, "K": 8, "N": 8192}, world=2)
    with pytest.raises(TilelinkError, match="do not fit a slot"):
        run_passes(large, Schedule(moves=(("C", Move(resource="epilogue", slots=2)),)))


EDITS = (
    r" \+ slot \* 15872",
    r" \+ slot \* 33554432",
    (r"slot \* 15872", "(slot + 1) * 15872"),
    (r"slot = device\.slot\(ctx\)", "slot = 0"),
    (r"slot = device\.slot\(ctx\)", "slot = 1"),
    (r"device\.end_call\(ctx, (\d+), \d+", r"device.end_call(ctx, \1, \1"),
    (r"if device\.end_call\(.*\):", "if rank == 0:"),
    (r"device\.spoil\(.*\)", "pass"),
    (r"(device\.spoil\(.*), \d+\)", r"\1, 1)"),
    (r"device\.spoil\(ctx, host_record, C_ptr", "device.spoil(ctx, host_record, A_ptr"),
    (r"    device\.spoil\(", "device.spoil("),
    (r"begin_call\(arena, (.*), program\)", r"context(arena, \1)"),
    (r"call\.launch\((.*)after=\(\)", r'call.launch(\1after=("head",)'),
    (r"rank = call\.rank", "rank = call.rank\n    call.head(ack_wait=False)"),
)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_text_is_refused(edit: str | tuple[str, str]) -> None:
    program = compiled(32, shots=2)
    text = emit(program)
    check(program, text)
    old, new = (edit, "") if isinstance(edit, str) else edit
    edited = changed(text, old, new)
    with pytest.raises(EmittedError):
        check(program, edited)
