"""Own rows not read in place: a copy within a GPU takes SMs, and whoever waits for it may have all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.validate import read_module, validate
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

TESTS = Path(__file__).parents[1] / "kernels"


def spanning(emitter: str, channels: int | None = None, dynamic: tuple[str, ...] = ()) -> Op:
    op = kernels.ag_gemm.build({"M": 256, "K": 64, "N": 64}, {}, 2, dtype="bf16", dynamic=dynamic)
    move = Move("copy_engine", spans=True, channels=channels)
    tiles = (("K", 32), ("M", 128), ("N", 64))
    schedule = Schedule(tiles=tiles, stages=3, workers=5, emitter=emitter, moves=(("A", move),))
    return compile_kernel(op, schedule)


def to_itself(program: Op) -> list[str]:
    """Streams that copy from a rank to itself."""
    found = []
    for stream in program.find("stream"):
        (peers,) = stream.body
        assert peers.name == "for_range" and any(op.name == "transfer" for op in peers.walk())
        found += [stream.symbol] if peers["lo"] == 0 else []
    return found


@pytest.mark.parametrize(
    ("emitter", "channels", "dynamic"),
    [("triton", None, ()), ("triton", 3, ()), ("gluon", None, ()), ("gluon", None, ("M",))],
)
def test_a_launch_in_front_copies_them(
    emitter: str, channels: int | None, dynamic: tuple[str, ...]
) -> None:
    program = spanning(emitter, channels, dynamic)
    assert not to_itself(program)
    own, product = program.find("launch")
    assert (own.symbol, product["after"][-1]) == ("A.own", "A.own")
    text = emit(program)
    validate(read_module(Source("f.py", text)), program)
    assert text.count("open_call(") == 1 and "device.finish_arrive" in text


def test_kernels_of_the_library_leave_sms_to_the_stream() -> None:
    program = spanning("library")
    assert to_itself(program) == ["A.copy"] and len(program.find("launch")) == 1


@pytest.mark.parametrize(
    ("file", "name", "gathered"), [("attention", "attention", "KV"), ("moe", "moe_up", "A")]
)
def test_so_it_is_of_what_is_read_whole(file: str, name: str, gathered: str) -> None:
    kernel = load_kernels(TESTS / f"{file}.py")[name]
    program = run_passes(kernel.build(dict(kernel.example or {}), {}, 4))
    assert not to_itself(program)
    assert [op.symbol for op in program.find("launch")][:-1] == [f"{n}.own" for n in gathered]
