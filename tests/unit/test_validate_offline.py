"""What the compiler makes of emitted text: drains before releases, widths of addresses, with controls."""

from __future__ import annotations

import re
from dataclasses import replace

from tests.strategies import move_of
from tilelink.backend.emit.offline import Compiled, compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import run_passes
from tilelink.kernels import gemm_rs
from tilelink.schedules import default_schedule


def compiled(resource: str, m: int, n: int, tile: int) -> Compiled:
    """``gemm_rs`` on two ranks; not proven, which takes long for the large shape."""
    op = gemm_rs.build({"M": m, "N": n, "K": 64}, {}, 2)
    schedule = default_schedule(op).with_tiles(M=tile, N=tile, K=32)
    moves = tuple((name, move_of(resource)) for name, _ in schedule.moves)
    program = run_passes(op, replace(schedule, moves=moves))
    (kernel,) = compile_offline(emit(program), program)
    return kernel


def spoilt(kernel: Compiled, ttgir: str) -> list[str]:
    """The lint of a kernel with other TTGIR."""
    return lint(replace(kernel, stages={**kernel.stages, "ttgir": ttgir}))


def test_releases_stand_behind_drained_stores() -> None:
    kernel = compiled("copy_engine", 256, 128, 64)
    assert kernel.read_back, "the partial products leave by TMA"
    assert lint(kernel) == []
    ttgir = kernel.stages["ttgir"]
    read_only = ttgir.replace("cp.async.bulk.wait_group 0", "cp.async.bulk.wait_group.read 0")
    assert any("drained" in p for p in spoilt(kernel, read_only))


def test_offsets_of_large_buffers_have_64_bits() -> None:
    kernel = compiled("epilogue", 65_528, 65_528, 64)
    assert kernel.wide_arena
    assert lint(kernel) == []
    ttgir = kernel.stages["ttgir"]
    narrow = re.sub(r"(tt\.addptr %C_parts\w*, .* : !tt\.ptr<bf16>), i64", r"\1, i32", ttgir)
    assert narrow != ttgir
    assert any("32 bits" in p for p in spoilt(kernel, narrow))
