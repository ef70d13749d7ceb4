"""The stage that copies the sums of all ranks: its tiles, its paths, its text and what it costs."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch

from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate.clock import predict
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import gemm_ar
from tilelink.schedules import Move, Schedule
from tilelink.schedules.machine import Machine


def schedule(tile: tuple[int, int, int], emitter: str = "triton", **fields: object) -> Schedule:
    """A schedule of tiles of so many rows, columns and depth."""
    names = ("own", "signal", "slots", "sum")
    given: dict[str, object] = {key: fields.pop(key) for key in names if key in fields}
    moved: dict[str, object] = {"shots": 2, "sum": "epilogue", **given}
    move = Move("epilogue", **moved)  # type: ignore[arg-type]
    tiles = tuple(zip(("M", "N", "K"), tile, strict=True))
    made: dict[str, object] = {"stages": 4, "order": "interleave", **fields}
    return Schedule(tiles=tiles, emitter=emitter, moves=(("C", move),), **made)  # type: ignore[arg-type]


def program(world: int, shape: tuple[int, int, int], given: Schedule) -> Op:
    return run_passes(gemm_ar.build(dict(zip("MKN", shape, strict=True)), {}, world), given)


@cache
def large(world: int, rows: int, emitter: str = "triton", own: str = "last") -> Op:
    """The product (rows, 3584) x (3584, 8192) of a rank."""
    columns = 256 if emitter == "triton" else 128
    return program(world, (rows, 3584, 8192), schedule((128, columns, 64), emitter, own=own))


def copying(fused: Op) -> Op:
    """The stage that copies the sums."""
    found = [s for op in fused.find("launch") for s in op.find("stage") if s.symbol == "C.sum"]
    (stage,) = found
    return stage


@pytest.mark.parametrize("own", ["last", "beside"])
@pytest.mark.parametrize("emitter", ["triton", "gluon"])
@pytest.mark.parametrize(("world", "rows"), [(2, 4096), (4, 1024), (4, 4096), (8, 4096)])
def test_a_tile_lies_in_one_channel_and_tiles_come_in_whole_waves(
    world: int, rows: int, emitter: str, own: str
) -> None:
    fused = large(world, rows, emitter, own)
    stage, tensor = copying(fused), fused.declared("C")
    tile = stage["tile"]
    assert math.prod(tile) <= 65536
    assert tile[int(tensor.get("channel_axis", 0))] <= tensor["channel_rows"]
    (wait,) = (op for op in stage.body if op.name == "wait")
    assert ".." not in str(wait.ref)
    tasks = rows * 8192 // math.prod(tile)
    assert tasks >= 0.95 * 132 * -(-tasks // 132)


def test_it_is_read_and_stored_by_addresses_and_behind_no_fence() -> None:
    fused = large(4, 4096)
    stage = copying(fused)
    assert [op.name for op in stage.body] == ["wait", "load", "store"]
    assert all(op.get("via") is None and op.get("proxy") is None for op in stage.body)
    text = emit(fused)
    body = text[text.index("# Stage C.sum.") : text.index("# The last worker to leave")]
    assert body.count("tl.load(") == body.count("tl.store(") == 1
    assert "tl.split(" not in body and ".load([" not in body and ".store([" not in body
    # A copy that waits for nothing, or whose sum is in words, has the paths that it had.
    words = program(2, (64, 32, 256), schedule((16, 16, 16), sum="stage", signal="word", slots=2))
    assert math.prod(copying(words)["tile"]) <= 16384


@pytest.mark.parametrize(
    ("world", "rows", "emitter", "own"),
    [
        (4, 4096, "triton", "last"),
        (4, 4096, "triton", "beside"),
        (4, 4096, "gluon", "last"),
        (8, 4096, "gluon", "beside"),
    ],
)
def test_as_much_as_registers_hold_does_not_spill(
    world: int, rows: int, emitter: str, own: str
) -> None:
    fused = large(world, rows, emitter, own)
    *_, kernel = compile_offline(emit(fused), fused)
    assert lint(kernel) == [] and kernel.spills == 0
    if emitter == "gluon":
        assert (
            kernel.shared < 1024
        )  # a kernel of its own, which nothing goes through shared memory in


def test_more_warps_than_share_the_registers_hold_less() -> None:
    made = schedule((128, 256, 64), warps=16)
    assert math.prod(copying(program(4, (4096, 3584, 8192), made))["tile"]) <= 65536


@pytest.mark.parametrize("emitter", ["triton", "gluon"])
def test_the_clock_sees_fewer_looks(emitter: str) -> None:
    machine, fused = Machine.load("h200x4"), large(4, 4096, emitter)
    small = print_ir(fused)
    tile = copying(fused)["tile"]
    before = (64, 256) if emitter == "triton" else (128, 128)
    assert f"tile = [{tile[0]}, {tile[1]}]" in small
    small = small.replace(f"tile = [{tile[0]}, {tile[1]}]", f"tile = [{before[0]}, {before[1]}]")
    assert predict(fused, machine) < predict(parse_ir(small), machine) - 10


WIDE = ((256, 32, 1024), (64, 64, 16))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r" *wait @C\.summed[^\n]*\n", ""),
        (r"(wait @C\.summed\[)m\.C\.0\.start / 128", r"\1RANK"),
        # Rows of two channels behind the signal of one.
        (r"(@C\.sum .*tile = \[)64", r"\g<1>128"),
    ],
)
def test_the_proof_refuses_a_tile_that_is_not_waited_for(pattern: str, text: str) -> None:
    shape, tile = WIDE
    op = gemm_ar.build(dict(zip("MKN", shape, strict=True)), {}, 2)
    fused = compile_kernel(op, schedule(tile, workers=3))
    printed = print_ir(fused)
    wrong = re.sub(pattern, text, printed, count=1)
    assert wrong != printed
    with pytest.raises(VerifyError):
        verify(parse_ir(wrong), op)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("C_sum_rows = m_C_0_start + token + ", "C_sum_rows = m_C_0_start + "),
        ("C_sum_cols = n_C_1_start + tl.arange(0, 512)", "C_sum_cols = tl.arange(0, 512)"),
        ("C_to_rows = m_C_0_start + ", "C_to_rows = 64 + m_C_0_start + "),
        ("C_to_rows[:, None] * 1024", "C_to_rows[:, None] * 512"),
    ],
)
def test_its_text_is_read_back(old: str, new: str) -> None:
    shape, tile = WIDE
    fused = program(2, shape, schedule(tile, workers=3))
    text = emit(fused)
    validate(read_module(Source("emitted.py", text)), fused)
    assert old in text, text[text.index("# Stage C.sum.") :]
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", text.replace(old, new, 1))), fused)


@pytest.mark.parametrize(
    ("backend", "world", "workers"),
    [
        ("simulate", 2, 3),
        ("simulate", 4, 5),
        ("simulate", 8, 8),
        ("interpret", 2, 3),
        ("interpret", 4, 5),
    ],
)
def test_integers_are_summed_exactly(backend: str, world: int, workers: int) -> None:
    given = schedule((32, 64, 16), workers=workers)
    run = gemm_ar.on(backend, world=world, schedule=given)
    for call in range(2):
        seed = torch.Generator().manual_seed(call)
        a, b = (
            [torch.randint(-2, 3, s, generator=seed).bfloat16() for _ in range(world)]
            for s in ((256, 32), (32, 512))
        )
        whole = sum(x.float() @ y.float() for x, y in zip(a, b, strict=True))
        for output in run(a, b):
            assert torch.equal(output.float(), whole.bfloat16().float())  # type: ignore[union-attr]
