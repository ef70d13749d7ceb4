"""What each pure tile op computes, in PyTorch on the CPU: one table for all that runs fused programs.

The reference has a table of its own (`reference_ops`): a mistake in this one shows when the two are compared.
Two 16-bit floats compute in fp32 and round once to the result's dtype; a matrix product and a sum
accumulate in fp32. Nothing here knows about ranks, memory or tiles of loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from tilelink.backend.division import check_divisor
from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.errors import InternalError
from tilelink.ir import FLOATS, Op, promote

Scalar: TypeAlias = "int | float | bool"
Operand: TypeAlias = "torch.Tensor | Scalar"

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "erf": torch.erf,
}
_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}
_LOGICAL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "and": torch.logical_and,
    "or": torch.logical_or,
}
_SHAPED = ("zeros", "full", "reshape")

PURE_OPS = frozenset(
    {*_UNARY, *_BINARY, *_LOGICAL, *_SHAPED}
    | {"not", "dot", "transpose", "cast", "expand", "where", "sum", "max", "min"}
)
"""Names of the ops that :func:`apply` computes."""


def apply(op: Op, operands: Sequence[Operand], shape: tuple[int, ...] = ()) -> torch.Tensor:
    """The value of the pure tile op ``op`` on ``operands``, of the dtype of its result's type.

    Operands are tensors of their values' shapes, or Python scalars. ``shape`` is the concrete shape
    of the result, read by ``zeros``, ``full`` and ``reshape`` only. InternalError for another op.
    """
    out = TORCH_DTYPES[op.results[0].type.dtype]
    name = op.name
    if name == "dot":
        a, b = (torch.as_tensor(x).float() for x in operands[:2])
        if len(operands) == 2:
            return (a @ b).to(out)
        acc = torch.as_tensor(operands[2]).float()
        return (torch.addmm(acc, a, b) if a.dim() == 2 and acc.dim() == 2 else acc + a @ b).to(out)
    if name == "zeros":
        return torch.zeros(shape, dtype=out)
    if name == "full":
        return torch.full(shape, op["value"], dtype=out)
    values = [_tensor(op, i, x) for i, x in enumerate(operands)]
    if name == "cast":
        return values[0].to(out)
    if name == "transpose":
        return values[0].transpose(-1, -2)
    if name == "expand":
        return values[0].unsqueeze(int(op["axis"]))
    if name == "reshape":
        return values[0].reshape(shape)
    if name == "where":
        return torch.where(values[0].bool(), values[1].to(out), values[2].to(out))
    if name == "not":
        return torch.logical_not(values[0])
    if name in _LOGICAL:
        return _LOGICAL[name](*values)
    if name in ("sum", "max", "min"):
        return _reduce(op, values[0]).to(out)
    wide = [v.to(_compute_dtype(op)) for v in values]
    if name in _UNARY:
        return _UNARY[name](wide[0]).to(out)
    if name in _BINARY:
        check_divisor(op, wide[1])
        return _BINARY[name](wide[0], wide[1]).to(out)
    raise InternalError(op.span, detail=f"`{name}` is not a pure tile op")


def _tensor(op: Op, number: int, operand: Operand) -> torch.Tensor:
    if isinstance(operand, torch.Tensor):
        return operand
    return torch.tensor(operand, dtype=TORCH_DTYPES[op.operands[number].type.dtype])


def _compute_dtype(op: Op) -> torch.dtype:
    """The dtype arithmetic runs in: fp32 for floats of 16 bits and for integers that give a float."""
    common = op.operands[0].type.dtype
    for operand in op.operands[1:]:
        common = promote(common, operand.type.dtype)
    if common in FLOATS or op.results[0].type.dtype in FLOATS:
        return torch.float32
    return TORCH_DTYPES[common]


def _reduce(op: Op, x: torch.Tensor) -> torch.Tensor:
    axis, keep = int(op["axis"]), bool(op.get("keep", False))
    if op.name == "sum":
        wide = x.float() if x.is_floating_point() else x.long()
        return wide.sum(dim=axis, keepdim=keep)
    function = torch.amax if op.name == "max" else torch.amin
    return function(x, dim=axis, keepdim=keep)
