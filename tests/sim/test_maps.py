"""Owner, tile and signal maps, other axes, intermediates: simulated against the reference, and proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

KERNELS = load_kernels(str(Path(__file__).parents[1] / "kernels" / "maps.py"))
GATHERS = ("copy_engine", "sm:2", "none")
SUMS = (*GATHERS, "epilogue")
# Kernel, shapes of one rank's tensors (a function of the world), resources.
CASES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "ag_cyclic": (lambda w: [(64 // w, 32), (32, 48)], GATHERS, ("A",)),
    "ag_zigzag": (lambda w: [(64 // w, 32), (32, 48)], GATHERS, ("A",)),
    "rs_cyclic": (lambda w: [(64, 32), (32, 48)], SUMS, ("C",)),
    "ag_signals": (lambda w: [(64 // w, 32), (32, 48)], GATHERS, ("A",)),
    "ag_over_depth": (lambda w: [(32 // w, 64), (32, 48)], GATHERS, ("A",)),
    "ag_inner": (lambda w: [(32, 64 // w), (64, 48)], GATHERS, ("A",)),
    "ag_columns": (lambda w: [(64, 32), (32, 64 // w)], GATHERS, ("B",)),
    "ag_gemm_rs": (lambda w: [(64 // w, 32), (32, 48)], GATHERS, ("A", "C")),
    "mlp": (lambda w: [(64 // w, 32), (32, 24), (24, 48)], GATHERS, ("A",)),
    "ar_norm": (lambda w: [(20, 32), (32, 48), (20, 48)], SUMS, ("P",)),
    "ar_gate": (lambda w: [(20, 32), (32, 48), (32, 48)], SUMS, ("P", "Q")),
    "softmax_rows": (lambda w: [(64 // w, 16)] * 3, GATHERS, ("K", "V")),
}
RUNS = [(name, resource) for name, (_, resources, _) in CASES.items() for resource in resources]


def run(name: str, resource: str, backend: str, world: int, seed: int) -> float:
    """The largest relative error of any rank against the reference."""
    shapes, _, moved = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    args = [
        [torch.randn(shape, generator=generator).bfloat16() for _ in range(world)]
        for shape in shapes(world)
    ]
    if name == "ar_norm":
        args[2] = [args[2][0]] * world
    moves = tuple((tensor, Move(resource=resource)) for tensor in moved)
    tiles = (("H", 16), ("K", 16), ("M", 16), ("N", 32), ("S", 16))
    schedule = Schedule(tiles=tiles, workers=4, group=2, moves=moves)
    kernel = KERNELS[name]
    got = kernel.on(backend, world=world, schedule=schedule, seed=seed)(*args)
    expected = kernel.on("reference", world=world)(*args)
    return max(relative_error(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("world", (1, 2, 4))
@pytest.mark.parametrize(("name", "resource"), RUNS)
def test_simulator_agrees_with_the_reference(name: str, resource: str, world: int) -> None:
    assert run(name, resource, "simulate", world, seed=world) < TOLERANCE["bf16"]
