"""Kernels that copy boxes, read back: intact ones pass, compile without spills, and edited ones do not."""

from __future__ import annotations

import functools

import pytest

from tests.edits import changed, check
from tilelink import kernels
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.validate import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    Unclear,
)
from tilelink.ir import Op
from tilelink.schedules import Move, Schedule

TENSOR = {"ag_gemm": "A", "gemm_rs": "C"}
CASES = [
    ("ag_gemm", "triton", 1, False),
    ("ag_gemm", "triton", 2, True),
    ("ag_gemm", "library", 1, True),
    ("ag_gemm", "gluon", 1, True),
    ("gemm_rs", "triton", 1, False),
    ("gemm_rs", "triton", 2, False),
]


@functools.cache
def emitted(kernel: str, emitter: str, slots: int, spans: bool, workers: int = 2) -> tuple[Op, str]:
    """A program whose copying workers have several tiles each, of several boxes, and its module."""
    op = getattr(kernels, kernel).build({"M": 512, "K": 2048, "N": 1024}, world=4)
    move = Move(resource=f"sm:{workers}", copies="boxes", slots=slots, spans=spans)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    schedule = Schedule(tiles=tiles, emitter=emitter, workers=9, moves=((TENSOR[kernel], move),))
    program = compile_kernel(op, schedule)
    return program, emit(program)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_that_copy_boxes_are_clean(case: tuple[str, str, int, bool]) -> None:
    program, text = emitted(*case)
    check(program, text)
    kernels = compile_offline(text, program)
    assert kernels
    for kernel in kernels:
        assert lint(kernel) == []
        assert "UTMALDG" in kernel.stages["sass"] and "UTMASTG" in kernel.stages["sass"]


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "triton"], ids=str)
def test_copying_workers_may_have_more_and_less_to_copy(
    case: tuple[str, str, int, bool],
) -> None:
    program, text = emitted(*case, workers=3)
    check(program, text)
    some = changed(text, r"( +)(boxes\.load\([^\n]*\))", r"\1if q < 3:\n\1    \2")
    with pytest.raises(EmittedHazard, match="not been waited for"):
        check(program, some)


GLUON, SLOTS = ("ag_gemm", "library", 1, True), ("ag_gemm", "triton", 2, True)
# One edit a rule: the case, what is replaced by what, and who objects.
EDITS = [
    (GLUON, r"landed,\s+turn,", "landed, turn + 1,", EmittedHazard),
    (GLUON, r"        device.drain_tma_stores\(\)\n", "", EmittedHazard),
    (GLUON, r"boxes.landing\(\d\)", "boxes.landing(1)", EmittedHazard),
    (GLUON, r"turn \+= 1", "turn += 2", EmittedHazard),
    (GLUON, r"(boxes.room\(A_64x128), \d", r"\1, 1", EmittedError),
    (GLUON, r"\(rank \+ 1 \+ A_s\) % 4,", "(rank + A_s) % 3,", EmittedDiffers),
    (GLUON, r"A_c_start, room", "A_c_start + 128, room", EmittedError),
    (GLUON, r"rank \* 128 \+ A_t_start", "rank * 128", EmittedDiffers),
    (GLUON, r"\(A_all_64x128_at0, A_all_64x128_at1", "(A_all_64x128_at1, A_all_64x128_at1", EmittedDiffers),
    (GLUON, r"range\(0, 4\):\n( +boxes)", r"range(0, 3):\n\1", EmittedDiffers),
    (GLUON, r"counted_all_tile_notify\(([^)]*)\)", r"counted_all_tile_notify(\1, others=True)", EmittedDiffers),
    (GLUON, r'call.buffer\("A.all", peer=1\)', 'call.buffer("A.all", peer=2)', EmittedDiffers),
    (GLUON, r"room = boxes", "other = boxes", Unclear),
    (SLOTS, r"(A_all_64x128_at1)_even, A_all_64x128_at1_odd", r"\1_odd, A_all_64x128_at1_even", EmittedHazard),
    (SLOTS, r"(slot, A_all_64x128_at1_even, A_all_64x128_at)1_odd", r"\g<1>2_odd", EmittedHazard),
    (SLOTS, r"of_slot\(slot, A_all_64x128_at1", "of_slot(0, A_all_64x128_at1", EmittedHazard),
    (SLOTS, r"A_all_to = A_all_64x128_at1\n", "A_all_to = A_all_64x128_at1_even\n", EmittedHazard),
    (SLOTS, r"peer=1, slot=1", "peer=1, slot=0", EmittedHazard),
    (SLOTS, r"peer=1, slot=1", "peer=1", EmittedHazard),
    (SLOTS, r"            device.drain_tma_stores\(\)\n", "", EmittedHazard),
    (("ag_gemm", "triton", 1, False), r", others=True", "", EmittedDiffers),
]  # fmt: skip


@pytest.mark.parametrize(("case", "old", "new", "error"), EDITS)
def test_an_edit_is_refused(
    case: tuple[str, str, int, bool], old: str, new: str, error: type[EmittedError]
) -> None:
    program, text = emitted(*case)
    with pytest.raises(error):
        check(program, changed(text, old, new))
