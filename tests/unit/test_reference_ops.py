"""The reference's value ops against torch in fp64, against numbers of Python, and against the other table."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilelink.backend import tile_ops
from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.reference_ops import COMPUTED, HELD, compute
from tilelink.ir import Op, Type, Value, make

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("neg", "abs", "exp", "exp2", "log", "log2", "sqrt")},
    **{name: getattr(torch, name) for name in ("rsqrt", "sin", "cos", "tanh", "sigmoid", "erf")},
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)),
}
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "maximum": max,
    "minimum": min,
    "pow": operator.pow,
}
INTEGERS = sorted(set(ARITHMETIC) - {"div", "pow"})
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}
LOGIC = ("and", "or")


def op(name: str, result: str, *operands: str, **attrs: Any) -> Op:
    """An op whose operands have these dtypes."""
    values = tuple(Value(f"x{i}", Type(d, ("m",))) for i, d in enumerate(operands))
    return make(name, results=(Value("r", Type(result, ("m",))),), operands=values, **attrs)


def positive(seed: int, dtype: str = "fp32") -> torch.Tensor:
    """Positive numbers, for all functions; as they are held."""
    made = torch.rand(257, generator=torch.Generator().manual_seed(seed)) * 3 + 0.125
    return made.to(TORCH_DTYPES[dtype])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name: str) -> None:
    x = positive(0)
    found = compute(op(name, "fp32", "fp32"), [x])
    torch.testing.assert_close(found.double(), FUNCTIONS[name](x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ARITHMETIC))
def test_arithmetic(name: str) -> None:
    x, y = positive(0), positive(1)
    if name in ("floordiv", "mod"):
        x, y = (
            (x * 8).round(),
            (y * 2).round() + 1,
        )  # a quotient next to an integer rounds to either side
    found = compute(op(name, "fp32", "fp32", "fp32"), [x, y])
    wanted = [ARITHMETIC[name](a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    pairs = [(a, b) for a in (-7, -1, 0, 5, 2**31 - 1) for b in (-3, 2, 7)]
    x, y = (torch.tensor(side) for side in zip(*pairs, strict=True))
    exact = [ARITHMETIC[name](a, b) for a, b in pairs]
    assert compute(op(name, "int64", "int64", "int32"), [x, y]).tolist() == exact
    wrapped = compute(op(name, "int32", "int32", "int32"), [x, y])
    assert wrapped.dtype == torch.int64  # as all integers are held
    assert wrapped.tolist() == [(n + 2**31) % 2**32 - 2**31 for n in exact]


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_comparisons(name: str) -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])
    found = compute(op(name, "bool", "fp32", "bf16"), [x, y.bfloat16()])
    assert found.dtype == torch.bool
    assert found.tolist() == [COMPARISONS[name](n, 2.0) for n in (1.0, 2.0, 3.0)]
    # An integer meets a float as a float.
    assert compute(
        op("lt", "bool", "int32", "fp32"), [torch.tensor([2]), torch.tensor([2.5])]
    ).item()


def test_logic_and_selection() -> None:
    x, y = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert compute(op("and", "bool", "bool", "bool"), [x, y]).tolist() == [True, False, False]
    assert compute(op("or", "bool", "bool", "bool"), [x, y]).tolist() == [True, True, False]
    assert compute(op("not", "bool", "bool"), [x]).tolist() == [False, False, True]
    one, two = torch.ones(3).bfloat16(), torch.full((3,), 2.0)
    assert compute(op("where", "fp32", "bool", "bf16", "fp32"), [y, one, two]).tolist() == [1, 2, 2]


def test_floats_of_16_bits_compute_in_fp32_and_round_once() -> None:
    x = torch.tensor([1.0078125]).bfloat16()
    assert (
        compute(op("mul", "bf16", "bf16", "bf16"), [x, x]) == torch.tensor(1.0078125**2).bfloat16()
    )
    tiny = torch.tensor([2.0**-10]).half()
    assert compute(op("add", "fp32", "bf16", "fp16"), [x, tiny]).item() == 1.0078125 + 2.0**-10
    many = torch.ones(1, 4097).bfloat16()
    assert compute(op("sum", "fp32", "bf16", axis=1), [many]).item() == 4097
    assert compute(op("dot", "fp32", "bf16", "bf16"), [many, many.mT]).item() == 4097
    added = op("dot", "fp32", "bf16", "bf16", "fp32")
    assert compute(added, [many, many.mT, torch.full((1, 1), 0.5)]).item() == 4097.5


def test_reductions() -> None:
    x = torch.tensor([[1.0, 5.0], [7.0, 3.0]])
    assert compute(op("sum", "fp32", "fp32", axis=1), [x]).tolist() == [6.0, 10.0]
    assert compute(op("max", "fp32", "fp32", axis=0, keep=True), [x]).tolist() == [[7.0, 5.0]]
    assert compute(op("min", "fp32", "fp32", axis=1), [x]).tolist() == [1.0, 3.0]


def test_shapes_and_casts() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert compute(op("transpose", "fp32", "fp32"), [x]).tolist() == x.mT.tolist()
    assert compute(op("expand", "fp32", "fp32", axis=1), [x]).shape == (2, 1, 3)
    assert compute(op("cast", "bf16", "fp32"), [torch.tensor([1.00390625])]).item() == 1.0
    assert compute(op("cast", "int32", "fp32"), [torch.tensor([-1.75, 1.75])]).tolist() == [-1, 1]
    assert compute(op("cast", "int32", "int64"), [torch.tensor([2**32 + 5])]).tolist() == [5]
    assert compute(op("cast", "bool", "fp32"), [torch.tensor([0.0, 0.5])]).tolist() == [False, True]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_both_tables_give_the_same_bits(dtype: str) -> None:
    x, y = positive(0, dtype), positive(1, dtype)
    for name in FUNCTIONS:
        one = op(name, dtype, dtype)
        assert torch.equal(compute(one, [x]), tile_ops.apply(one, [x])), name
    for name in (*ARITHMETIC, *COMPARISONS):
        one = op(name, "bool" if name in COMPARISONS else dtype, dtype, dtype)
        assert torch.equal(compute(one, [x, y]), tile_ops.apply(one, [x, y])), name


def test_no_op_is_forgotten() -> None:
    tested = {*FUNCTIONS, *ARITHMETIC, *COMPARISONS, *LOGIC, "not", "where", "sum", "max", "min"}
    assert tested | {"dot", "transpose", "expand", "cast"} == COMPUTED
    assert TORCH_DTYPES | {"int32": torch.int64} == HELD
    assert {*COMPUTED, "zeros", "full", "reshape"} == tile_ops.PURE_OPS
