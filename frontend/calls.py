"""Calls in a kernel body: the language's operations, methods of values, Python's own on constants."""

from __future__ import annotations

import ast
import builtins
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from tilelink.errors import Span
from tilelink.frontend.errors import BadCall, DtypeMismatch, UnsupportedSyntax
from tilelink.frontend.expressions import Expressions, Scope, dtype_name
from tilelink.frontend.values import Method, Num, TensorRef, TileVar, describe
from tilelink.ir import FLOATS, Expr, Type, Value, binary, promote
from tilelink.language import BUILTINS

_UNARY = (
    "exp",
    "exp2",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "erf",
)
_BY_NAME = {name: function for function, name in BUILTINS.items()}
# Python functions that may be called on numbers known at compile time.
_FOLDED = (builtins.abs, builtins.float, builtins.int, builtins.bool, builtins.round, builtins.len)
_CONVERTED = {"float": "tk.float32", "int": "tk.int32", "bool": "tk.bool_"}


class Calls(Expressions):
    """Lowers calls; inlining of functions is left to the subclass."""

    @abstractmethod
    def inline(
        self, function: Any, args: list[Any], kwargs: dict[str, Any], span: Span, scope: Scope
    ) -> Any:
        """The result of a Python function's body, lowered in place."""

    def call(self, node: ast.Call, scope: Scope, hint: str | None) -> Any:
        span = scope.source.span(node)
        function = self.value(node.func, scope)
        if any(isinstance(a, ast.Starred) for a in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            raise self.unsupported(span, "`*` unpacking", "write the arguments out")
        args = [self.value(a, scope) for a in node.args]
        kwargs = {str(k.arg): self.value(k.value, scope) for k in node.keywords}
        if isinstance(function, Method):
            name, args = function.name, [function.owner, *args]
            return self.operation("cast" if name == "to" else name, args, kwargs, span, hint)
        name = self.builtin(function) or ""
        if name:
            return self.operation(name, args, kwargs, span, hint)
        if function in (builtins.min, builtins.max) and len(args) == 2 and not kwargs:
            return self._extreme(function.__name__, args, span, hint)
        if (
            function is builtins.abs
            and len(args) == 1
            and isinstance(self.builder.literal(args[0]), Value | Num)
        ):
            return self.operation("abs", args, kwargs, span, hint)
        if function in _FOLDED or getattr(function, "__module__", None) == "math":
            return self._fold(function, args, kwargs, span, ast.unparse(node.func))
        if inspect.isfunction(inspect.unwrap(function)):
            return self.inline(inspect.unwrap(function), args, kwargs, span, scope)
        raise self.unsupported(
            span,
            f"a call of `{ast.unparse(node.func)}`",
            "call the operations of tilelink.language, `math` on constants, or a function of your own",
        )

    def _extreme(self, name: str, args: list[Any], span: Span, hint: str | None) -> Any:
        a, b = args
        if isinstance(a, Num | int) and isinstance(b, Num | int):
            sides = [Expr.const(x) if isinstance(x, int) else x.expr for x in (a, b)]
            return Num(binary(name, *sides))
        if isinstance(a, Value) or isinstance(b, Value):
            return self.operation(f"{name}imum", args, {}, span, hint)
        function: Callable[..., Any] = builtins.min if name == "min" else builtins.max
        return self._fold(function, args, {}, span, name)

    def _fold(
        self, function: Any, args: list[Any], kwargs: dict[str, Any], span: Span, text: str
    ) -> Any:
        values = [self.builder.literal(a) for a in args]
        if kwargs or not all(isinstance(v, int | float | str | tuple) for v in values):
            name = text.rpartition(".")[2]
            advice = f"use `tk.{name}` on tiles" if name in _BY_NAME else ""
            if function in (builtins.float, builtins.int, builtins.bool):
                advice = f"convert tiles with `x.to({_CONVERTED[name]})`"
            if function is builtins.len:
                advice = "the length of an axis is its extent, `A.shape[0]`, of a tile `m.size`"
            raise self.unsupported(
                span,
                f"`{text}` of anything but numbers known when the kernel is compiled",
                advice or "tilelink.language has the operations on tiles",
            )
        try:
            return function(*values)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise self.unsupported(
                span, f"`{text}` here ({error})", "correct its arguments"
            ) from None

    def operation(
        self, name: str, args: list[Any], kwargs: dict[str, Any], span: Span, hint: str | None
    ) -> Any:
        """One operation of the language, with its type rule."""
        try:
            bound = inspect.signature(_BY_NAME[name]).bind(*args, **kwargs)
        except TypeError as error:
            raise BadCall(
                span,
                what=f"`tk.{name}`: {error}",
                advice=f"tk.{name}({', '.join(inspect.signature(_BY_NAME[name]).parameters)})",
            ) from None
        bound.apply_defaults()
        values = bound.arguments
        if name in _UNARY:
            return self._unary_math(name, values["x"], span, hint)
        match name:
            case "tiles" | "range":
                raise self.unsupported(
                    span, f"`tk.{name}` outside a loop", f"write `for m in tk.{name}(…):`"
                )
            case "empty":
                raise self.unsupported(
                    span,
                    "`tk.empty` inside an expression or a loop",
                    "assign it first: `P = tk.empty([M, N], dtype)`",
                )
            case "zeros" | "full":
                return self._filled(values, span, hint)
            case "dot":
                return self.dot(values["a"], values["b"], values["acc"], span, hint)
            case "cast":
                return self._cast(values["x"], values["dtype"], span, hint)
            case "trans":
                return self.transpose(values["x"], span, hint)
            case "where":
                return self._where(values, span, hint)
            case "maximum" | "minimum":
                x, y = values["x"], values["y"]
                if not isinstance(x, Value) and not isinstance(y, Value):
                    return self._extreme(name[:3], [x, y], span, hint)
                return self.builder.arithmetic(name, x, y, span, hint)
            case "abs":
                x = self.operand(values["x"], span)
                return self.builder.emit("abs", (x,), x.type, span, hint)
        return self._reduce(name, values["x"], values["axis"], values["keepdims"], span, hint)

    def element_type(self, dtype: Any, span: Span) -> str:
        """The IR name of an element type given as an argument."""
        name = dtype_name(dtype)
        if name is None:
            raise DtypeMismatch(
                span,
                what=f"{describe(dtype)} is no element type",
                advice="use `tk.float32`, `A.dtype`, …",
            )
        return name

    def _unary_math(self, name: str, x: Any, span: Span, hint: str | None) -> Value:
        value = self.operand(x, span)
        if value.type.dtype not in FLOATS:
            value = self.builder.cast(value, "fp32", span)
        return self.builder.emit(name, (value,), value.type, span, hint)

    def _filled(self, values: dict[str, Any], span: Span, hint: str | None) -> Value:
        shape = self._shape(values["shape"], span)
        dtype = self.element_type(values["dtype"], span)
        number = self.builder.literal(values.get("value", 0))
        if not isinstance(number, int | float):
            raise self.unsupported(
                span,
                f"`tk.full` of {describe(number)}",
                "`tk.full` takes a constant; add a value to `tk.zeros`",
            )
        if number == 0 and not math.copysign(1.0, number) < 0:
            return self.builder.emit("zeros", (), Type(dtype, shape), span, hint)
        constant = float(number) if dtype in FLOATS else int(number)
        return self.builder.emit("full", (), Type(dtype, shape), span, hint, value=constant)

    def _shape(self, shape: Any, span: Span) -> tuple[str, ...]:
        items = shape if isinstance(shape, tuple) else (shape,)
        dims: list[str] = []
        for item in items:
            if isinstance(item, TileVar):
                dims.append(item.value.name)
            elif isinstance(item, int) and not isinstance(item, bool):
                dims.append(str(item))
            elif isinstance(item, Num) and self.extents.is_static(item.expr):
                dims.append(self.builder.dim(item.expr))
            else:
                raise self.unsupported(
                    span,
                    f"{describe(item)} in a shape",
                    "a shape lists tile variables, extents and integers",
                )
        return tuple(dims)

    def _cast(self, x: Any, dtype: Any, span: Span, hint: str | None) -> Value:
        return self.builder.cast(self.operand(x, span), self.element_type(dtype, span), span, hint)

    def _where(self, values: dict[str, Any], span: Span, hint: str | None) -> Value:
        condition = self.operand(values["condition"], span)
        if condition.type.dtype != "bool":
            self.builder.reject(
                span,
                "where",
                condition.type.dtype,
                "the first argument is a comparison, as `mask[m] > 0`, or of a tensor of bools",
            )
        x, y = self.builder.pair(values["x"], values["y"], span)
        shape = self.builder.broadcast([condition.type.shape, x.type.shape, y.type.shape], span)
        type_ = Type(promote(x.type.dtype, y.type.dtype), shape)
        return self.builder.emit("where", (condition, x, y), type_, span, hint)

    def _reduce(
        self, name: str, x: Any, axis: Any, keep: Any, span: Span, hint: str | None
    ) -> Value:
        if isinstance(x, TensorRef):
            raise self.unsupported(
                span, f"`{name}` of the tensor `{x.name}`", "reduce tiles: `A[m, :].sum(axis=1)`"
            )
        value, axis = self.operand(x, span), self.builder.literal(axis)
        rank = len(value.type.shape)
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise UnsupportedSyntax(
                span,
                what=f"`{name}` without an axis"
                if axis is None
                else f"`{name}` along {describe(axis)}, of a value whose axes are {rank}, counted from 0,",
                advice=f"name the axis: `tk.{name}(x, axis={max(rank - 1, 0)})`",
            )
        axis %= rank
        if value.type.dtype == "bool":
            value = self.builder.cast(value, "int32", span)
        shape = list(value.type.shape)
        if keep:
            shape[axis] = "1"
        else:
            del shape[axis]
        type_ = Type(value.type.dtype, tuple(shape))
        return self.builder.emit(name, (value,), type_, span, hint, axis=axis, keep=bool(keep))
