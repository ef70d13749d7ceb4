"""The order `interleave`: the tiles of all ranks take turns."""

from __future__ import annotations

import pytest
import torch

from tilelink.backend.emit.triton import emit
from tilelink.backend.expand import stage_tiles
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.validate import read_module, validate
from tilelink.backend.verify import verify
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.kernels import gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule

WORLD = 3
EXTENTS = {"M": 96 * WORLD, "K": 64, "N": 160}


def program(resource: str, sum: str = "stage", shots: int | None = None) -> Op:
    kernel = gemm_rs if shots is None else gemm_ar
    schedule = Schedule(
        tiles=(("K", 32), ("M", 32), ("N", 64)),
        order="interleave",
        group=2,
        workers=5,
        moves=(("C", Move(resource=resource, sum=sum, shots=shots)),),
    )
    return compile_kernel(kernel.build(EXTENTS, world=WORLD, dtype="bf16"), schedule)


@pytest.mark.parametrize("sum", ["stage", "epilogue"])
def test_tiles_that_follow_each_other_are_those_of_different_ranks(sum: str) -> None:
    fused = program("epilogue", sum)
    geometry = Geometry(fused)
    stage = next(s for s in fused.walk() if s.name == "stage" and s.get("interleave"))
    ranks = WORLD if sum == "stage" else WORLD - 1
    for rank in range(WORLD):
        tiles = geometry.queue(stage, geometry.env(rank))
        assert len(tiles) == ranks * 3 * 3  # of each slice 3 x 3
        owners = [rows.start // 96 for rows, _ in tiles]
        for at in range(0, len(owners), ranks):
            assert len(set(owners[at : at + ranks])) == ranks
            # The same tile of every slice, the next rank's first.
            assert len({(r.start % 96, c.start) for r, c in tiles[at : at + ranks]}) == 1
            assert owners[at] == (rank + 1) % WORLD
        first = [(r.start % 96 // 32, c.start // 64) for r, c in tiles[::ranks]]
        if sum == "stage":  # two rows of tiles are walked together
            rows_of_two = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
            assert first == [*rows_of_two, (2, 0), (2, 1), (2, 2)]
        else:  # one, which is a channel
            assert first == sorted(first)
        # The proof walks the same queue by code of its own.
        walked = stage_tiles(stage, geometry.env(rank), rank)
        rows, columns = (walked[v.name] for v in stage.args)
        assert [r.start for r, _ in tiles] == rows.start.tolist()
        assert [r.stop for r, _ in tiles] == rows.stop.tolist()
        assert [r.number for r, _ in tiles] == rows.tile.tolist()
        assert [c.start for _, c in tiles] == columns.start.tolist()


@pytest.mark.parametrize(
    ("resource", "sum", "shots"),
    [
        ("epilogue", "stage", None),
        ("epilogue", "epilogue", None),
        ("copy_engine", "stage", None),
        ("sm:1", "epilogue", None),
        ("epilogue", "stage", 2),
        ("epilogue", "epilogue", 2),
    ],
)
@pytest.mark.parametrize("backend", ["simulate", "interpret"])
def test_programs_are_proven_and_right(
    resource: str, sum: str, shots: int | None, backend: str
) -> None:
    fused = program(resource, sum, shots)
    assert any(s.get("interleave") for s in fused.walk())
    verify(fused)
    text = emit(fused)
    validate(read_module(Source("emitted.py", text)), fused)
    kernel = gemm_rs if shots is None else gemm_ar
    generator = torch.Generator().manual_seed(5)
    a, b = (
        [torch.randint(-2, 3, shape, generator=generator).bfloat16() for _ in range(WORLD)]
        for shape in ((EXTENTS["M"], EXTENTS["K"]), (EXTENTS["K"], EXTENTS["N"]))
    )
    moves = (("C", Move(resource=resource, sum=sum, shots=shots)),)
    schedule = Schedule(
        tiles=(("K", 32), ("M", 32), ("N", 64)), order="interleave", workers=5, moves=moves
    )
    got = kernel.on(backend, world=WORLD, schedule=schedule)(a, b)
    want = kernel.on("reference", world=WORLD)(a, b)
    for mine, right in zip(got, want, strict=True):
        assert torch.equal(mine, right)
