"""The value ops of Tile IR in PyTorch: the slow and plain meaning of each.

What runs fused programs has a table of its own (`tile_ops`), and the reference shares none of it: what judges
others must not repeat their mistakes.

Integers are held as int64, whatever their declared width; those of 32 bits wrap around. Arithmetic of 16-bit
floats is done in fp32 and rounded once to the type of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tilelink.backend.division import check_divisor
from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.ir import FLOATS, Op, promote

# Element types of values in flight.
HELD: dict[str, torch.dtype] = {**TORCH_DTYPES, "int32": torch.int64}


def _pow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.pow(a, b)


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": _pow,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
}

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": lambda x: -x,
    "not": torch.logical_not,
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

_REDUCE: dict[str, Callable[[torch.Tensor, int, bool], torch.Tensor]] = {
    "sum": lambda x, axis, keep: x.sum(axis, keepdim=keep),
    "max": lambda x, axis, keep: x.amax(axis, keepdim=keep),
    "min": lambda x, axis, keep: x.amin(axis, keepdim=keep),
}

COMPUTED = frozenset(
    {"dot", "transpose", "cast", "expand", "where", *BINARY, *UNARY, *_REDUCE},
)


def compute(op: Op, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The result of a value op; ``operands`` have the types that the IR declares, ints as int64."""
    out = op.results[0].type.dtype
    kinds = [operand.type.dtype for operand in op.operands]
    if op.name == "dot":
        result = operands[0].float() @ operands[1].float()
        if len(operands) == 3:
            result = operands[2].float() + result
    elif op.name == "transpose":
        result = operands[0].mT
    elif op.name == "expand":
        result = operands[0].unsqueeze(int(op["axis"]))
    elif op.name == "cast":
        result = _cast(operands[0], out)
    elif op.name == "where":
        result = torch.where(operands[0], _lift(operands[1], out), _lift(operands[2], out))
    elif op.name in _REDUCE:
        result = _REDUCE[op.name](_lift(operands[0], out), int(op["axis"]), bool(op.get("keep")))
    elif op.name in BINARY:
        # A comparison's result is bool: its operands meet in the type they promote to.
        meet = promote(*kinds) if out == "bool" else out
        check_divisor(op, operands[1])
        result = BINARY[op.name](*(_lift(x, meet) for x in operands))
    else:
        result = UNARY[op.name](_lift(operands[0], kinds[0] if out == "bool" else out))
    return result.to(TORCH_DTYPES[out]).to(HELD[out])


def _lift(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The operand in the type that an op with results of ``dtype`` computes in."""
    return x.to(torch.float32 if dtype in FLOATS else HELD[dtype])


def _cast(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """``x`` as ``dtype``; floats become integers by truncation, numbers bools by comparison with 0."""
    return (x != 0) if dtype == "bool" else x.to(HELD[dtype])
