"""Calls of kernels under torch.compile and on tensors that stand for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from tilelink.frontend.arguments import check_tensor
from tilelink.frontend.errors import BadCall, NoStorage
from tilelink.kernels import gemm

REFERENCE = gemm.on("reference", world=1)


class Layer(torch.nn.Module):
    """A product by a kernel between operations of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = REFERENCE
        self.register_buffer("weight", torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.kernel(x * 2, self.weight)[0]
        return product + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_call_breaks_the_graph_and_nothing_else(backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(32, 16)
        assert torch.equal(compiled(x), layer(x))
    # What stands before the call, and what stands behind it; no frame of the compiler's own.
    assert counter.frame_count == 2


def test_one_graph_is_refused_with_what_to_do() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"tilelink\.ops has operators"):
        compiled(torch.randn(32, 16))


def test_an_error_of_a_traced_call_is_that_of_the_call() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: gemm.on("reference")(a, None), backend="eager")
    with pytest.raises(BadCall, match="needs the argument `B`"):
        compiled(torch.randn(32, 16))


def fake() -> torch.Tensor:
    """A tensor as torch.compile traces with it."""
    with FakeTensorMode():
        return torch.randn(16, 16)


def test_tensors_without_memory_are_refused() -> None:
    b = torch.randn(16, 16)
    for a, words in (
        (fake(), r"`A` is a FakeTensor(.|\n)*tilelink\.ops"),
        (torch.empty(16, 16, device="meta"), "`A` is on the meta device"),
    ):
        with pytest.raises(NoStorage, match=words):
            REFERENCE(a, b)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.vmap(f)(torch.randn(2, 16, 16)),
        lambda f: torch.func.grad(f)(torch.randn(16, 16)),
        lambda f: torch.func.jvp(f, (torch.randn(16, 16),), (torch.randn(16, 16),)),
        lambda f: torch.func.functionalize(f)(torch.randn(16, 16)),
    ],
)
def test_transforms_of_torch_func_are_refused(transform: Callable[[Any], Any]) -> None:
    b = torch.randn(16, 16)
    with pytest.raises(BadCall, match=r"`A` (is inside a transform|requires a gradient)"):
        transform(lambda a: REFERENCE(a, b)[0].sum())


def test_export_traces_no_kernel() -> None:
    """It runs the Python code with FakeTensors, and says that it is compiling."""
    with pytest.raises(NoStorage, match="FakeTensor"):
        torch.export.export(Layer(), (torch.randn(32, 16),), strict=False)


def test_distributed_tensors_are_refused_with_what_they_wrap() -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.testing._internal.two_tensor import TwoTensor

    plain = torch.randn(16, 16)
    with pytest.raises(NoStorage, match=r"pass `A\.wait\(\)`"):
        check_tensor("A", AsyncCollectiveTensor(plain), False)
    two: Any = TwoTensor
    with pytest.raises(NoStorage, match="is a TwoTensor"):
        check_tensor("A", two(plain, plain), False)
