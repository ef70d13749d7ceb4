"""The ready-made kernels and the examples, against plain PyTorch arithmetic."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.misc import scaled_twice
from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.kernels import (
    ag_gemm,
    ag_gemm_swiglu,
    gemm,
    gemm_ar,
    gemm_ar_add,
    gemm_rs,
    gemm_rs_add,
)

WORLD, M, N, K = 4, 64, 48, 32
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Tensors = list[torch.Tensor]


def draw(*shape: int, count: int = WORLD, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(count)]


def wide(tensors: Sequence[torch.Tensor]) -> Tensors:
    return [tensor.float() for tensor in tensors]


def turned(tensors: Tensors, nk: bool) -> Tensors:
    return [tensor.T.contiguous() for tensor in tensors] if nk else tensors


def close(outputs: Tensors, wanted: Sequence[torch.Tensor]) -> None:
    assert len(outputs) == len(wanted)
    for output, expected in zip(outputs, wanted, strict=True):
        assert output.shape == expected.shape and output.dtype == torch.bfloat16
        assert relative_error(output, expected) < TOLERANCE["bf16"]


@pytest.fixture(params=["reference", "simulate"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["kn", "nk"])
def nk(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("world", [1, WORLD])
def test_gemm(backend: str, nk: bool, bias: bool, world: int) -> None:
    a, b, c = (draw(*s, count=world, seed=i) for i, s in enumerate(((M, K), (K, N), (N,))))
    given: dict[str, Any] = {"bias": c} if bias else {}
    outputs = gemm.on(backend, world=world)(a, turned(b, nk), nk=nk, **given)
    wanted = zip(wide(a), wide(b), wide(c), strict=True)
    close(outputs, [x @ y + z * bias for x, y, z in wanted])


@pytest.mark.parametrize("bias", [False, True])
def test_ag_gemm(backend: str, nk: bool, bias: bool) -> None:
    a, b, c = draw(M // WORLD, K, seed=1), draw(K, N, seed=2), draw(N, seed=3)
    given: dict[str, Any] = {"bias": c} if bias else {}
    outputs = ag_gemm.on(backend, world=WORLD)(a, turned(b, nk), nk=nk, **given)
    whole = torch.cat(wide(a))
    close(outputs, [whole @ x + y * bias for x, y in zip(wide(b), wide(c), strict=True)])


def test_ag_gemm_swiglu(backend: str, nk: bool) -> None:
    a, gate, up = draw(M // WORLD, K, seed=1), draw(K, N, seed=2), draw(K, N, seed=3)
    outputs = ag_gemm_swiglu.on(backend, world=WORLD)(a, turned(gate, nk), turned(up, nk), nk=nk)
    whole = torch.cat(wide(a))
    silu = torch.nn.functional.silu
    wanted = [silu(whole @ g) * (whole @ u) for g, u in zip(wide(gate), wide(up), strict=True)]
    close(outputs, wanted)


def summed(a: Tensors, b: Tensors) -> torch.Tensor:
    """The sum over the ranks of partial products as they travel: rounded to bf16."""
    pairs = zip(wide(a), wide(b), strict=True)
    return torch.stack([(x @ y).to(torch.bfloat16).float() for x, y in pairs]).sum(0)


def test_gemm_rs(backend: str, nk: bool) -> None:
    a, b = draw(M, K, seed=1), draw(K, N, seed=2)
    outputs = gemm_rs.on(backend, world=WORLD)(a, turned(b, nk), nk=nk)
    close(outputs, summed(a, b).chunk(WORLD))


def test_gemm_ar(backend: str, nk: bool) -> None:
    a, b = draw(M, K, seed=1), draw(K, N, seed=2)
    outputs = gemm_ar.on(backend, world=WORLD)(a, turned(b, nk), nk=nk)
    close(outputs, [summed(a, b)] * WORLD)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


ADDED = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("bias", "residual"), ADDED)
def test_gemm_rs_add(backend: str, nk: bool, bias: bool, residual: bool) -> None:
    a, b = draw(M, K, seed=1), draw(K, N, seed=2)
    shared, rows = draw(N, count=1, seed=3) * WORLD, draw(M // WORLD, N, seed=4)
    given: dict[str, Any] = {"bias": shared} if bias else {}
    given |= {"residual": rows} if residual else {}
    outputs = gemm_rs_add.on(backend, world=WORLD)(a, turned(b, nk), nk=nk, **given)
    slices = summed(a, b).chunk(WORLD)
    extra = [bias * shared[0].float() + residual * own for own in wide(rows)]
    close(outputs, [x + y for x, y in zip(slices, extra, strict=True)])


@pytest.mark.parametrize(("bias", "residual"), ADDED)
def test_gemm_ar_add(backend: str, nk: bool, bias: bool, residual: bool) -> None:
    a, b = draw(M, K, seed=1), draw(K, N, seed=2)
    shared, whole = draw(N, count=1, seed=3) * WORLD, draw(M, N, count=1, seed=4) * WORLD
    given: dict[str, Any] = {"bias": shared} if bias else {}
    given |= {"residual": whole} if residual else {}
    outputs = gemm_ar_add.on(backend, world=WORLD)(a, turned(b, nk), nk=nk, **given)
    extra = bias * shared[0].float() + residual * whole[0].float()
    close(outputs, [summed(a, b) + extra] * WORLD)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("name", ["ag_gemm", "gemm_rs", "gemm_ar"])
def test_examples_run_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.simulated(world=2, M=64, N=48, K=32)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        found = re.search(r"relative error (\S+)$", line)
        assert found is not None and 0 < float(found[1]) < TOLERANCE["bf16"]


def test_loops_that_change_what_earlier_ones_stored(backend: str) -> None:
    a, b = draw(M // WORLD, K, seed=1), draw(K, N, seed=2)
    outputs = scaled_twice.on(backend, world=WORLD)(a, b)
    whole = torch.cat(wide(a))
    close(outputs, [6 * (whole @ x) for x in wide(b)])
