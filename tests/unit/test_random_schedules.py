"""Schedules at random over all fields: refused by name, or a program that is proven and emitted as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilelink import kernels
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import run_passes
from tilelink.backend.validate import read_module, validate
from tilelink.backend.verify import verify
from tilelink.errors import InternalError, Source, TilelinkError
from tilelink.ir import parse_ir, print_ir
from tilelink.schedules import Move, Schedule
from tilelink.schedules.schedule import COPIES, EMITTERS, ORDERS, OWNS, SIGNALS, SUMS

MOVED = {
    "ag_gemm": "A",
    "ag_gemm_swiglu": "A",
    "gemm": None,
    "gemm_ar": "C",
    "gemm_ar_add": "P",
    "gemm_rs": "C",
    "gemm_rs_add": "P",
}


@st.composite
def schedules(draw: Any, tensor: str | None) -> Schedule:
    """Any schedule of the ready-made kernels; ScheduleError where its fields do not go together."""
    resource = draw(st.sampled_from(("copy_engine", "sm:1", "sm:2", "epilogue", "none")))
    move = Move(
        resource,
        tile=draw(st.sampled_from((None, None, 1, 8, 64))),
        channels=draw(st.sampled_from((None, 1, 2, 3, 7))),
        sum=draw(st.sampled_from(SUMS)),
        shots=draw(st.sampled_from((None, 1, 2))),
        slots=draw(st.sampled_from((1, 2))) if resource[0] in "se" else 1,
        streams=draw(st.sampled_from((1, 1, 2, 3))) if resource == "copy_engine" else 1,
        copies=draw(st.sampled_from(COPIES)) if resource[:2] == "sm" else "rows",
        spans=draw(st.sampled_from((False, False, True))),
    )
    if move.resource == "epilogue":
        move = replace(move, direction=draw(st.sampled_from(("push", "push", "pull"))))
    order = draw(st.sampled_from(ORDERS))
    emitter = draw(st.sampled_from(EMITTERS))
    own_tiles = (move.resource, move.direction, move.sum) == ("epilogue", "push", "epilogue")
    if order == "interleave" and own_tiles:
        move = replace(move, own=draw(st.sampled_from(OWNS[:2] if emitter == "gluon" else OWNS)))
    place = move.resource, move.direction, move.slots, move.sum
    if place == ("epilogue", "push", 2, "stage"):
        move = replace(move, signal=draw(st.sampled_from(SIGNALS)))
    large = emitter == "gluon"
    sizes = {
        "K": (64,) if large else (8, 32),
        "M": (64, 128) if large else (8, 16, 64),
        "N": (64, 128, 256) if large else (8, 16, 64),
    }
    split = draw(st.sampled_from((1, 1, 2, 3))) if emitter == "triton" else 1
    return Schedule(
        tiles=tuple((name, draw(st.sampled_from(sizes[name]))) for name in "KMN"),
        order=order,
        group=draw(st.sampled_from((1, 3, 8))),
        workers=draw(st.sampled_from((3, 5, 9, 132))),
        warps=8 if large else draw(st.sampled_from((1, 4, 8))),
        stages=draw(st.sampled_from((1, 2, 4))),
        emitter=emitter,
        flatten=draw(st.booleans()),
        split=split,
        tail=draw(st.sampled_from((1, 1, 2, 3))) if split == 1 and emitter != "library" else 1,
        moves=((tensor, move),) if tensor else (),
    )


def test_what_is_not_refused_is_proven_emitted_and_read_back() -> None:
    read_back = 0

    @given(data=st.data())
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    def one(data: st.DataObject) -> None:
        nonlocal read_back
        draw = data.draw
        name = draw(st.sampled_from(sorted(MOVED)))
        kernel, tensor = getattr(kernels, name), MOVED[name]
        world = draw(st.integers(2, 4))
        chosen = draw(schedules(tensor))
        rows = draw(st.sampled_from((1, 5, 16, 24)))
        many = 64 if chosen.emitter == "gluon" else 1
        extents = {
            "M": world * rows * many,
            "N": draw(st.sampled_from((world, 4 * world, 40, 144))),
            "K": draw(st.sampled_from((8, 10, 48))),
        }
        op = kernel.build(
            extents,
            world=world,
            dtype=draw(st.sampled_from(("bf16", "fp32"))),
            present=[p for p in kernel.params if p in kernel.signature.tensors],
            dynamic=("M",) if draw(st.booleans()) else (),
        )
        try:
            program = run_passes(op, chosen)
        except InternalError:
            raise
        except TilelinkError:
            return  # refused by name; the proof refuses nothing that the passes make
        verify(program, op)
        assert parse_ir(print_ir(program)) == program
        try:
            text = emit(program)
        except CannotEmit:
            return
        validate(read_module(Source("emitted.py", text)), program)
        read_back += 1

    one()
    # Most are refused, about a quarter is not.
    assert read_back >= 4
