"""Programs of the emitter `library`, simulated: numbers, hostile schedules, broken programs, predicted time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assurance.grid import Sample, prepared
from tests.unit.test_library import cyclic_gather, library, mlp, schedule
from tilelink.backend.emit.triton import emit
from tilelink.backend.mutate import mutants
from tilelink.backend.mutate.judge import judge, simulate
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.simulate.clock import timeline
from tilelink.backend.validate import read_module, validate
from tilelink.errors import Source
from tilelink.kernel import load_kernels
from tilelink.kernels import ag_gemm, gemm_ar, gemm_ar_add, gemm_rs, gemm_rs_add
from tilelink.schedules import Move
from tilelink.schedules.machine import Machine

WORLD = 2
H200 = Machine.load("h200x8")


def draw(*shape: int, seed: int) -> list[torch.Tensor]:
    """A tensor a rank of integers from -1 to 1: bf16 holds their short sums of products exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-1, 2, shape, generator=generator).bfloat16() for _ in range(WORLD)]


ARGUMENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "ag_gemm": {"A": (16, 24), "B": (24, 16), "bias": (16,)},
    "cyclic_gather": {"A": (16, 24), "B": (24, 16)},
    "gemm_rs": {"A": (32, 24), "B": (24, 16)},
    "gemm_rs_add": {"A": (32, 24), "B": (24, 16), "bias": (16,), "residual": (16, 16)},
    "gemm_ar": {"A": (32, 24), "B": (24, 16)},
    "gemm_ar_add": {"A": (32, 24), "B": (24, 16), "residual": (32, 16)},
    "mlp": {"A": (16, 24), "B": (24, 32), "D": (32, 8)},
}


@pytest.mark.parametrize("resource", ["none", "copy_engine"])
@pytest.mark.parametrize(
    "kernel",
    [ag_gemm, cyclic_gather, gemm_rs, gemm_rs_add, gemm_ar, gemm_ar_add, mlp],
    ids=lambda kernel: str(kernel.name),
)
def test_numbers_are_those_of_the_reference(kernel: Any, resource: str) -> None:
    shapes = ARGUMENTS[kernel.name]
    given = {name: draw(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    rows = {"ag_gemm": 32, "cyclic_gather": 32, "mlp": 32}.get(kernel.name, shapes["A"][0])
    extents = {"M": rows, "K": 24, "N": shapes["B"][1]} | ({"H": 8} if kernel is mlp else {})
    plan = schedule(kernel.build(extents, world=WORLD, present=[*given, "C"]), resource)
    wanted = kernel.on("reference", world=WORLD)(**given)
    for seed in range(3):
        found = kernel.on("simulate", world=WORLD, schedule=plan, seed=seed)(**given)
        # Only the activation of `mlp` is no integer, and its sums over two ranks round once more.
        for one, two in zip(found, wanted, strict=True):
            assert torch.equal(one, two) if kernel is not mlp else torch.allclose(one, two, 1e-2)


def test_the_own_slice_may_add_what_has_arrived_in_its_epilogue() -> None:
    """The library multiplies the slices of other ranks, a kernel of ours the own one, with the sum."""
    given = {
        name: draw(*shape, seed=n) for n, (name, shape) in enumerate(ARGUMENTS["gemm_rs"].items())
    }
    op = gemm_rs.build({"M": 32, "K": 24, "N": 16}, world=WORLD)
    moves = (("C", Move("copy_engine", sum="epilogue")),)
    plan = replace(schedule(op), moves=moves)
    program = compile_kernel(op, plan)
    assert [(o.symbol, o.get("emitter")) for o in program.find("launch")] == [
        ("gemm_rs", "library"),
        ("gemm_rs.part2", None),
    ]
    validate(read_module(Source("emitted.py", emit(program))), program)
    wanted = gemm_rs.on("reference", world=WORLD)(**given)
    found = gemm_rs.on("simulate", world=WORLD, schedule=plan)(**given)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


SAMPLES = [
    Sample("ag_gemm", "A", "none", 2, 4, emitter="library"),
    Sample("gemm_rs", "C", "none", 2, 4, emitter="library"),
    Sample("gemm_rs_add", "P", "none", 2, 4, emitter="library"),
    Sample("gemm_ar", "C", "none", 2, 3, emitter="library"),
    Sample("gemm_ar_add", "P", "none", 2, 3, emitter="library"),
    Sample("ag_gemm", "A", "copy_engine", 2, 4, emitter="library"),
    Sample("gemm_rs", "C", "copy_engine", 2, 4, emitter="library"),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s.kernel}.{s.resource}")
def test_every_mutant_is_refused_by_both_or_equivalent(sample: Sample) -> None:
    program, trial = prepared(sample)
    assert simulate(program, trial) == ""
    found = [judge(mutant, trial) for mutant in mutants(program)]
    assert len(found) > 15
    for verdict in found:
        assert verdict.survivors == (), verdict.mutant.description


def test_a_sum_in_place_is_seen_as_one_memory() -> None:
    """Without the order that makes it right, the simulator sees the partial and the sum race."""
    program, trial = prepared(Sample("gemm_ar_add", "P", "none", 2, 3, emitter="library"))
    last = program.find("launch")[-1]
    early = last.with_attrs(after=tuple(n for n in last["after"] if n != "P.partial"))
    broken = program.with_ops(tuple(early if op is last else op for op in program.body))
    assert simulate(broken, trial) == "happens-before"


@pytest.mark.parametrize(
    ("kernel", "m", "k", "n", "measured"),
    [
        # In turn, measured on this machine with stock PyTorch, in microseconds.
        (ag_gemm, 8192, 8192, 7168, 1608),
        (ag_gemm, 8192, 4096, 2816, 474),
        (gemm_rs, 8192, 3584, 8192, 1030),
        (gemm_rs, 1024, 3584, 8192, 172),
        (gemm_ar, 1024, 3584, 8192, 212),
    ],
)
def test_predicted_time_is_that_of_both_in_turn(
    kernel: Any, m: int, k: int, n: int, measured: float
) -> None:
    found = timeline(library(kernel, {"M": m, "K": k, "N": n}, world=8), H200)
    assert found.makespan == pytest.approx(measured, rel=0.12)
    assert found.makespan == pytest.approx(found.compute + found.communication, rel=0.01)


def test_a_scalar_of_a_later_loop_is_in_no_product_s_way(tmp_path: Path) -> None:
    file = tmp_path / "scaled.py"
    file.write_text(
        "import tilelink\n"
        "import tilelink.language as tk\n\n\n"
        '@tilelink.kernel("reduce P[M, N] sum")\n'
        "def scaled(A, B, O, factor):\n"
        "    M, K = A.shape\n"
        "    N = B.shape[1]\n"
        "    P = tk.empty([M, N], A.dtype)\n"
        "    for m, n in tk.tiles(M, N):\n"
        "        acc = tk.zeros([m, n], tk.float32)\n"
        "        for k in tk.tiles(K):\n"
        "            acc = tk.dot(A[m, k], B[k, n], acc)\n"
        "        P[m, n] = acc\n"
        "    for m, n in tk.tiles(M, N):\n"
        "        O[m, n] = P[m, n] * factor\n"
    )
    kernel = load_kernels(file)["scaled"]
    given: dict[str, Any] = {"A": draw(32, 24, seed=1), "B": draw(24, 16, seed=2)}
    plan = schedule(kernel.build({"M": 32, "K": 24, "N": 16}, world=WORLD), "none")
    found = kernel.on("simulate", world=WORLD, schedule=plan)(**given, factor=2.0)
    for one, two in zip(
        found, kernel.on("reference", world=WORLD)(**given, factor=2.0), strict=True
    ):
        assert torch.equal(one, two)
