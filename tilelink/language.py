"""The vocabulary of kernel bodies, imported as ``import tilelink.language as tk``.

The names stand for operations: the body of a kernel is parsed, never executed, so calling one outside
a kernel raises. Tiles are values of shape ``[m, n]``; ``m`` and ``n`` are tile variables of a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "abs",
    "bfloat16",
    "bool_",
    "cast",
    "cos",
    "dot",
    "empty",
    "erf",
    "exp",
    "exp2",
    "float16",
    "float32",
    "full",
    "gelu",
    "int32",
    "int64",
    "log",
    "log2",
    "max",
    "maximum",
    "min",
    "minimum",
    "range",
    "rsqrt",
    "sigmoid",
    "silu",
    "sin",
    "sqrt",
    "sum",
    "tanh",
    "tiles",
    "trans",
    "where",
    "zeros",
]

Function = TypeVar("Function", bound=Callable[..., Any])

# Every operation of the language, by its function, to the name that the front end knows it by.
BUILTINS: dict[Callable[..., Any], str] = {}


@dataclass(frozen=True, slots=True)
class DType:
    """An element type; ``name`` is its spelling in the IR."""

    name: str


bfloat16 = DType("bf16")
float16 = DType("fp16")
float32 = DType("fp32")
int32 = DType("int32")
int64 = DType("int64")
bool_ = DType("bool")


def _operation(function: Function) -> Function:
    BUILTINS[function] = function.__name__
    return function


def _outside(name: str) -> RuntimeError:
    return RuntimeError(f"tk.{name} has a meaning only in the body of a @tilelink.kernel function")


@_operation
def tiles(*extents: Any) -> Any:
    """Loop over all tiles of the extents, or with ``tiles(lo, hi)`` of the bounds ``[lo, hi)``.

    One extent gives a tile variable, several give a tuple of them. Bounds are integers known when the
    kernel runs (scalars, ``m.start``, ``m.stop``, entries of an integer tensor) and may be empty.
    A tile variable has ``index`` (int32 vector of global indices), ``start``, ``stop`` and ``size``.
    """
    raise _outside("tiles")


@_operation
def range(first: Any, last: Any = None) -> Any:
    """Loop over the integers ``0..first``, or ``first..last``: heads, batches, experts."""
    raise _outside("range")


@_operation
def empty(shape: Any, dtype: Any) -> Any:
    """An intermediate tensor of extents ``shape``; the mapping may name it."""
    raise _outside("empty")


@_operation
def zeros(shape: Any, dtype: Any = float32) -> Any:
    """A tile of zeros; ``shape`` lists tile variables, extents or integers."""
    raise _outside("zeros")


@_operation
def full(shape: Any, value: Any, dtype: Any = float32) -> Any:
    """A tile whose elements are all ``value``, a number known when the kernel is compiled."""
    raise _outside("full")


@_operation
def dot(a: Any, b: Any, acc: Any = None) -> Any:
    """Matrix product ``a @ b``, plus ``acc`` where given: fp32 ``[m, n]`` from ``[m, k]`` and ``[k, n]``."""
    raise _outside("dot")


@_operation
def cast(x: Any, dtype: Any) -> Any:
    """``x`` as ``dtype``, rounded to nearest even; ``x.to(dtype)`` is the same."""
    raise _outside("cast")


@_operation
def trans(x: Any) -> Any:
    """The transpose of a matrix; ``x.T`` is the same."""
    raise _outside("trans")


@_operation
def where(condition: Any, x: Any, y: Any) -> Any:
    """``x`` where ``condition`` (bool) holds, else ``y``."""
    raise _outside("where")


@_operation
def maximum(x: Any, y: Any) -> Any:
    """The larger of two, element by element."""
    raise _outside("maximum")


@_operation
def minimum(x: Any, y: Any) -> Any:
    """The smaller of two, element by element."""
    raise _outside("minimum")


@_operation
def sum(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """The sum along ``axis``; ``keepdims`` keeps the axis with length 1."""
    raise _outside("sum")


@_operation
def max(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """The largest element along ``axis``."""
    raise _outside("max")


@_operation
def min(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """The smallest element along ``axis``."""
    raise _outside("min")


@_operation
def abs(x: Any) -> Any:
    """The magnitude of each element."""
    raise _outside("abs")


@_operation
def exp(x: Any) -> Any:
    """e to the power of each element."""
    raise _outside("exp")


@_operation
def exp2(x: Any) -> Any:
    """2 to the power of each element."""
    raise _outside("exp2")


@_operation
def log(x: Any) -> Any:
    """The natural logarithm of each element."""
    raise _outside("log")


@_operation
def log2(x: Any) -> Any:
    """The logarithm of base 2 of each element."""
    raise _outside("log2")


@_operation
def sqrt(x: Any) -> Any:
    """The square root of each element."""
    raise _outside("sqrt")


@_operation
def rsqrt(x: Any) -> Any:
    """One over the square root of each element."""
    raise _outside("rsqrt")


@_operation
def sin(x: Any) -> Any:
    """The sine of each element, in radians."""
    raise _outside("sin")


@_operation
def cos(x: Any) -> Any:
    """The cosine of each element, in radians."""
    raise _outside("cos")


@_operation
def tanh(x: Any) -> Any:
    """The hyperbolic tangent of each element."""
    raise _outside("tanh")


@_operation
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))`` of each element."""
    raise _outside("sigmoid")


@_operation
def silu(x: Any) -> Any:
    """``x * sigmoid(x)`` of each element."""
    raise _outside("silu")


@_operation
def gelu(x: Any) -> Any:
    """``x * (1 + erf(x / sqrt(2))) / 2`` of each element."""
    raise _outside("gelu")


@_operation
def erf(x: Any) -> Any:
    """The error function of each element."""
    raise _outside("erf")
