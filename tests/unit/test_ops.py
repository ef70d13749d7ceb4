"""The operators of `tilelink.ops`: values, gradients, tracing; of one rank here, of more in processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounterWithBackend

from tilelink import kernels, ops
from tilelink.frontend.errors import BadCall, DtypeMismatch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ag_gemm", "gemm_rs", "gemm_ar")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Reproducible numbers that require a gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("nk", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_the_rules_of_pytorch(name: str, nk: bool) -> None:
    """Schema, FakeTensors, autograd and AOT dispatch, with static and with symbolic shapes."""
    operator = getattr(torch.ops.tilelink, name).default
    bias = (drawn(8),) if name == "ag_gemm" else ()
    args = (drawn(4, 16), drawn(8, 16) if nk else drawn(16, 8), *bias, nk, False, 1, "")
    torch.library.opcheck(operator, args)


def test_the_gather_of_gradients_keeps_the_rules_of_pytorch() -> None:
    torch.library.opcheck(torch.ops.tilelink.gather_rows.default, (drawn(4, 16).detach(), 1, ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_one_rank_computes_what_the_kernel_does(name: str, dtype: torch.dtype) -> None:
    a, b = drawn(4, 16, dtype=dtype), drawn(16, 8, dtype=dtype)
    out = getattr(ops, name)(a, b)
    with torch.no_grad():
        (expected,) = getattr(kernels, name).on("reference", world=1)(a, b)
    assert torch.equal(out, expected) and out.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """In fp32, as wide as kernels compute."""
    args = [drawn(4, 8), drawn(8, 8)] + ([drawn(8)] if name == "ag_gemm" else [])
    assert torch.autograd.gradcheck(getattr(ops, name), args, eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_agree_with_plain_pytorch(world: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.ops_rank"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


def test_a_model_is_one_graph_for_all_numbers_of_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def model(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return ops.gemm_rs(torch.relu(ops.ag_gemm(x * 2, up, nk=True)), down) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    up, down = drawn(32, 16), drawn(32, 16)
    for rows in (4, 6, 10):
        x = drawn(rows, 16)
        out, expected = compiled(x, up, down), model(x, up, down)
        assert torch.allclose(out, expected)
        mine = torch.autograd.grad(out.sum(), (x, up, down))
        theirs = torch.autograd.grad(expected.sum(), (x, up, down))
        assert all(torch.allclose(m, t, atol=1e-5) for m, t in zip(mine, theirs, strict=True))
    assert counter.frame_count == 1


def test_the_example_trains() -> None:
    torch._dynamo.reset()
    train = runpy.run_path(str(ROOT / "examples" / "training.py"))["train"]
    losses = train(steps=3)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_operators_are_exported_and_checkpointed() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return ops.ag_gemm(x, b)

    x, b = drawn(4, 16), drawn(16, 8)
    exported = torch.export.export(Layer(), (x.detach(), b.detach()))
    assert "tilelink.ag_gemm" in exported.graph_module.code
    out = torch.utils.checkpoint.checkpoint(ops.ag_gemm, x, b, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones(4, 8) @ b.t())


def test_a_second_derivative_by_a_weight_is_refused_and_not_zero() -> None:
    x, b = drawn(4, 16), drawn(16, 8)
    (first,) = torch.autograd.grad(ops.ag_gemm(x, b).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="gather_rows"):
        torch.autograd.grad(first.sum(), x)


def test_autocast_casts_what_it_casts_for_linear_layers() -> None:
    x, b, bias = drawn(4, 16), drawn(16, 8), drawn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.ag_gemm(x, b, bias)
        assert out.dtype == torch.bfloat16 == ops.gemm_rs(x, b).dtype == ops.gemm_ar(x, b).dtype
    torch.autograd.backward(out.sum())
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_mistakes_are_those_of_the_kernel() -> None:
    with pytest.raises(DtypeMismatch, match="`A` has element type"):
        ops.ag_gemm(drawn(4, 16).double(), drawn(16, 8).double())
    with pytest.raises(BadCall, match="for 4 ranks is run by 1"):
        torch.ops.tilelink.gemm_ar(drawn(4, 16), drawn(16, 8), False, False, 4, "")


def test_on_a_gpu_a_kernel_is_bound_once_and_its_tensors_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands for the GPU: a kernel that remembers what it is bound to and called with."""
    bound: list[Any] = []
    calls: list[Any] = []

    class Kernel:
        def on(self, **how: Any) -> Any:
            bound.append(how)
            return self.call

        def call(self, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return args[0]

    kernel: Any = Kernel()
    monkeypatch.setattr(ops, "_bound", {})
    a, b = drawn(4, 16).detach(), drawn(16, 8).detach()
    for dynamic in (False, False, True):
        ops._launch(kernel, a, b, {"nk": True}, None, dynamic)
    assert bound == [{"group": None, "dynamic": None}, {"group": None, "dynamic": ("M",)}]
    assert all(args == (a, b) and kwargs == {"nk": True} for args, kwargs in calls)
    memory = torch.zeros(65)
    ops._launch(kernel, memory[1:].view(4, 16), b.t(), {}, None, False)
    (given, weight), _ = calls[-1]
    assert given.data_ptr() % 16 == 0 and weight.is_contiguous()


def test_a_transposed_weight_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def interpret(kernel: Any, given: dict[str, Any], *_: Any) -> torch.Tensor:
        seen.append(given)
        return torch.empty(4, 8)

    monkeypatch.setattr(ops, "_interpret", interpret)
    a, weight = drawn(4, 16).detach(), drawn(8, 16).detach()
    ops.ag_gemm(a, weight.t())
    assert seen[0]["nk"] and seen[0]["B"].data_ptr() == weight.data_ptr()
    ops.ag_gemm(a, weight.t().contiguous().t(), nk=True)
    assert "nk" not in seen[1]
