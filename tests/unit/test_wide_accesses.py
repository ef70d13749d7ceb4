"""Tiles with a ragged edge are read and written 16 bytes a thread, as whole ones are, where their rows allow it.

Left to itself Triton takes the smaller one of two numbers, and a remainder, for odd, and moves each element alone.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

import tilelink.kernels
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.validate import EmittedHazard, read_module, validate
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.schedules import Move, Schedule

SINGLE = re.compile(r"\b(?:LDG|STG)\.E\S*\.U16\b")


@cache
def built(
    kernel: str, world: int, m: int, n: int, emitter: str, move: Move, stages: int = 4
) -> tuple[Op, str]:
    """A program in tiles of 128 x 128, and its module."""
    op = getattr(tilelink.kernels, kernel).build({"M": m, "N": n, "K": 192}, {}, world)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    schedule = Schedule(tiles=tiles, stages=stages, emitter=emitter, moves=(("C", move),))
    program = compile_kernel(op, schedule)
    return program, emit(program)


@pytest.mark.parametrize(
    ("world", "m", "n"), [(2, 1004, 528), (2, 1004, 512), (2, 1024, 528), (4, 1004, 528)]
)
def test_parts_that_a_role_adds_neither_load_single_elements_nor_spill(
    world: int, m: int, n: int
) -> None:
    """Masks take registers too: of such tiles less is asked for at once."""
    move = Move(resource="epilogue", sum="epilogue")
    program, text = built("gemm_rs", world, m, n, "gluon", move, stages=6)
    (compiled,) = compile_offline(text, program)
    assert lint(compiled) == []
    loads = re.findall(r"\bLDG\.E\.EF\S*", compiled.stages["sass"])
    assert loads and all(op.endswith(".128") for op in loads)


@pytest.mark.parametrize("emitter", ["triton", "gluon"])
@pytest.mark.parametrize("n", [512, 528])
def test_parts_that_a_stage_of_its_own_adds_are_loaded_16_bytes_a_thread(
    n: int, emitter: str
) -> None:
    program, text = built("gemm_rs", 2, 1024, n, emitter, Move(resource="epilogue", sum="stage"))
    code = "".join(k.stages["sass"] for k in compile_offline(text, program))
    loads = re.findall(r"\bLDG\.E\.EF\S*", code)
    assert loads and all(op.endswith(".128") for op in loads)


@pytest.mark.parametrize("emitter", ["triton", "gluon"])
@pytest.mark.parametrize("total", ["epilogue", "stage"])
def test_slices_of_columns_that_no_tile_divides_move_no_single_elements(
    total: str, emitter: str
) -> None:
    """Slices of 360 columns: a tile may start behind a remainder, and end where a slice does."""
    move = Move(resource="epilogue", sum=total, shots=2)
    program, text = built("gemm_ar", 4, 100, 1440, emitter, move)
    code = "".join(k.stages["sass"] for k in compile_offline(text, program))
    assert SINGLE.findall(code) == []


def test_what_is_said_of_the_end_of_a_tile_is_checked() -> None:
    move = Move(resource="epilogue", sum="stage", shots=2)
    program, text = built("gemm_ar", 4, 100, 1440, "triton", move)
    validate(read_module(Source("emitted.py", text)), program)
    said = re.compile(r"(n_stop = tl\.multiple_of\(.*), 8\)")
    assert said.search(text)
    wrong = said.sub(r"\1, 16)", text)
    with pytest.raises(EmittedHazard, match="not a multiple of 16"):
        validate(read_module(Source("emitted.py", wrong)), program)
