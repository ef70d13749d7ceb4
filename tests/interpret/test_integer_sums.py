"""Sums of integers over ranks are exact and wrap around as torch's do, by every resource and in every executor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.edits import changed
from tilelink.backend import reference, simulate
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule, ScheduleError

TEXT = """import tilelink
import tilelink.language as tk


@tilelink.kernel("reduce C[M, N] sum")
def reduced(X, C):
    M, N = X.shape
    for m, n in tk.tiles(M, N):
        C[m, n] = X[m, n] * 2 + 1


@tilelink.kernel("scatter C[M, N] over M sum")
def scattered(X, C):
    M, N = X.shape
    for m, n in tk.tiles(M, N):
        C[m, n] = X[m, n] * 2 + 1
"""
M, N = 32, 24
PULL: dict[str, Any] = {"direction": "pull", "slots": 2}
# Resource and further fields of a move; where a reduce is summed in the epilogue it takes two shots.
MOVES: list[dict[str, Any]] = [
    {"resource": "none"},
    {"resource": "copy_engine"},
    {"resource": "sm:2"},
    {"resource": "epilogue"},
    {"resource": "copy_engine", "sum": "epilogue"},
    {"resource": "epilogue", "sum": "epilogue"},
    {"resource": "epilogue", "sum": "epilogue", "slots": 2},
    {"resource": "epilogue", **PULL},
    {"resource": "epilogue", "sum": "epilogue", **PULL},
]


def build(tmp_path: Path, name: str, dtype: str, world: int) -> Op:
    path = tmp_path / "kernels.py"
    path.write_text(TEXT)
    return load_kernels(path)[name].build(
        {"M": M, "N": N}, world=world, dtypes={"X": dtype, "C": dtype}
    )


def schedule(move: dict[str, Any], name: str) -> Schedule:
    pulled = move.get("direction") == "pull" and name == "reduced"
    chosen = Move(**{**move, **({"shots": 2} if pulled else {})})
    return Schedule(tiles=(("M", 8), ("N", 16)), workers=3, moves=(("C", chosen),))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: "-".join(str(v) for v in move.values()))
@pytest.mark.parametrize("name", ["reduced", "scattered"])
def test_sums_are_those_of_torch(
    tmp_path: Path, name: str, move: dict[str, Any], dtype: torch.dtype
) -> None:
    world = 2
    kernel = build(tmp_path, name, str(dtype).removeprefix("torch."), world)
    program = compile_kernel(kernel, schedule(move, name))
    validate(read_module(Source("emitted.py", emit(program))), program)
    torch.manual_seed(0)
    large = torch.iinfo(dtype).max
    given = [torch.randint(-large, large, (M, N)).to(dtype) for _ in range(world)]
    given[0][0, :2], given[1][0, :2] = 1 << 24, 0
    total = sum((x * 2 + 1 for x in given), torch.zeros(M, N, dtype=dtype))
    inputs = [{"X": x} for x in given]
    for outputs in (
        reference.run(kernel, inputs),
        simulate.run(program, inputs),
        interpret.run(program, inputs, timeout=120.0),
    ):
        for rank, got in enumerate(outputs):
            want = total if name == "reduced" else total.chunk(world)[rank]
            assert got["C"].dtype == dtype
            assert torch.equal(got["C"], want)


def test_parts_that_are_added_in_fp32_are_no_sum_of_integers(tmp_path: Path) -> None:
    move = {"resource": "copy_engine"}
    program = compile_kernel(build(tmp_path, "reduced", "int32", 2), schedule(move, "reduced"))
    text = changed(emit(program), r"(part\d)\.to\(tl\.int32\)", r"\1.to(tl.float32)")
    with pytest.raises(EmittedError, match="integers as such"):
        validate(read_module(Source("emitted.py", text)), program)


@pytest.mark.parametrize("signal", ["word", "sentinel"])
def test_integers_may_be_what_no_word_holds(tmp_path: Path, signal: str) -> None:
    """-1 has the bits of a word that is empty."""
    move = {"resource": "epilogue", "slots": 2, "signal": signal}
    with pytest.raises(ScheduleError, match="its elements are int32"):
        compile_kernel(build(tmp_path, "reduced", "int32", 2), schedule(move, "reduced"))
