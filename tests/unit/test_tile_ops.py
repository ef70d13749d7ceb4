"""Every pure tile op against Python's own arithmetic, and the rounding of 16-bit floats."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.tile_ops import PURE_OPS, apply
from tilelink.errors import InternalError
from tilelink.ir import Op, Type, Value, make


def op(name: str, result: str, *operands: str, **attrs: Any) -> Op:
    """An op whose operands have these dtypes."""
    values = tuple(Value(f"x{i}", Type(d, ("m",))) for i, d in enumerate(operands))
    return make(name, results=(Value("r", Type(result, ("m",))),), operands=values, **attrs)


POINTS = [0.25, 0.5, 1.0, 1.75, 3.0]
UNARY = {
    "neg": lambda x: -x,
    "abs": abs,
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "erf": math.erf,
}
BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "maximum": max,
    "minimum": min,
    "pow": lambda a, b: a**b,
}
COMPARE = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("name", sorted(UNARY))
def test_unary(name: str) -> None:
    found = apply(op(name, "fp32", "fp32"), [torch.tensor(POINTS)])
    assert found.tolist() == pytest.approx([UNARY[name](x) for x in POINTS], rel=1e-5)


@pytest.mark.parametrize("name", sorted(BINARY))
def test_binary(name: str) -> None:
    left, right = torch.tensor(POINTS), torch.tensor(POINTS[::-1])
    found = apply(op(name, "fp32", "fp32", "fp32"), [left, right])
    want = [BINARY[name](a, b) for a, b in zip(POINTS, POINTS[::-1], strict=True)]
    assert found.tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", sorted(COMPARE))
def test_compare(name: str) -> None:
    found = apply(op(name, "bool", "fp32", "fp32"), [torch.tensor(POINTS), 1.0])
    assert found.tolist() == [COMPARE[name](x, 1.0) for x in POINTS]
    assert found.dtype == torch.bool


def test_logic_and_selection() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert apply(op("and", "bool", "bool", "bool"), [a, b]).tolist() == [True, False, False]
    assert apply(op("or", "bool", "bool", "bool"), [a, b]).tolist() == [True, True, False]
    assert apply(op("not", "bool", "bool"), [a]).tolist() == [False, False, True]
    picked = apply(op("where", "fp32", "bool", "fp32", "fp32"), [a, torch.ones(3), -1.0])
    assert picked.tolist() == [1.0, 1.0, -1.0]


def test_integers_stay_exact() -> None:
    big = torch.tensor([2**40 + 1, -7])
    assert apply(op("add", "int64", "int64", "int32"), [big, 1]).tolist() == [2**40 + 2, -6]
    assert apply(op("floordiv", "int64", "int64", "int32"), [big, 2]).tolist() == [2**39, -4]
    assert apply(op("mod", "int64", "int64", "int32"), [big, 4]).tolist() == [1, 1]


def test_16_bit_floats_compute_in_fp32_and_round_once() -> None:
    # 1 + 2^-8 lies half way between two bf16 numbers; a product in bf16 steps would lose it.
    a = torch.tensor([1.0078125], dtype=torch.bfloat16)
    found = apply(op("mul", "bf16", "bf16", "bf16"), [a, a])
    assert found.item() == torch.tensor(1.0078125**2).bfloat16().item()
    mixed = apply(op("add", "fp32", "bf16", "fp16"), [a, torch.tensor([2.0**-10]).half()])
    assert mixed.item() == 1.0078125 + 2.0**-10
    wide = apply(op("sum", "fp32", "bf16", axis=0), [torch.full((4097,), 1.0).bfloat16()])
    assert wide.item() == 4097


def test_reductions() -> None:
    x = torch.tensor([[1.0, 5.0], [7.0, 3.0]])
    assert apply(op("sum", "fp32", "fp32", axis=1), [x]).tolist() == [6.0, 10.0]
    assert apply(op("max", "fp32", "fp32", axis=0, keep=True), [x]).tolist() == [[7.0, 5.0]]
    assert apply(op("min", "fp32", "fp32", axis=1), [x]).tolist() == [1.0, 3.0]


def test_dot_accumulates_in_fp32() -> None:
    ones = torch.ones(1, 4097).bfloat16()
    dot = op("dot", "fp32", "bf16", "bf16")
    assert apply(dot, [ones, ones.T]).item() == 4097
    added = op("dot", "fp32", "bf16", "bf16", "fp32")
    assert apply(added, [ones, ones.T, torch.full((1, 1), 0.5)]).item() == 4097.5


def test_shapes_and_casts() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert apply(op("transpose", "fp32", "fp32"), [x]).shape == (3, 2)
    assert apply(op("expand", "fp32", "fp32", axis=1), [x]).shape == (2, 1, 3)
    assert apply(op("reshape", "fp32", "fp32"), [x], (3, 2)).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert apply(op("zeros", "bf16"), [], (2, 2)).dtype == torch.bfloat16
    assert apply(op("full", "fp32", value=1.5), [], (2,)).tolist() == [1.5, 1.5]
    assert apply(op("cast", "bf16", "fp32"), [torch.tensor([1.00390625])]).item() == 1.0


def test_no_op_is_forgotten() -> None:
    tested = {*UNARY, *BINARY, *COMPARE, "and", "or", "not", "where", "sum", "max", "min"}
    tested |= {"dot", "transpose", "expand", "reshape", "zeros", "full", "cast"}
    assert tested == PURE_OPS
    assert set(TORCH_DTYPES) == {"bf16", "fp16", "fp32", "int32", "int64", "bool"}
    with pytest.raises(InternalError):
        apply(op("load", "fp32", "fp32"), [torch.ones(1)])
