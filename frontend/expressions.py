"""Expressions of a kernel body: names, attributes, indexing, operators."""

from __future__ import annotations

import ast
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from tilelink import language
from tilelink.errors import Span, did_you_mean
from tilelink.frontend.builder import Builder
from tilelink.frontend.errors import (
    DtypeMismatch,
    NoSuchAxis,
    NotCompileTime,
    ShapeMismatch,
    UnknownName,
    UnsupportedSyntax,
)
from tilelink.frontend.source import FunctionSource
from tilelink.frontend.tensors import Tensors
from tilelink.frontend.values import Method, MovedTile, Num, TensorRef, TileVar, describe
from tilelink.frontend.variables import assigned_names
from tilelink.ir import DTYPES, FLOATS, Expr, Type, Value, binary
from tilelink.language import BUILTINS, DType

_ABSENT = object()
CONSTANTS = int | float | str | bool | None | DType

_BINARY: dict[type[ast.operator], tuple[str, str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", "add", operator.add),
    ast.Sub: ("-", "sub", operator.sub),
    ast.Mult: ("*", "mul", operator.mul),
    ast.Div: ("", "div", operator.truediv),
    ast.FloorDiv: ("/", "floordiv", operator.floordiv),
    ast.Mod: ("%", "mod", operator.mod),
    ast.Pow: ("", "pow", operator.pow),
    ast.BitAnd: ("", "and", operator.and_),
    ast.BitOr: ("", "or", operator.or_),
}
_COMPARE: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Lt: ("lt", operator.lt),
    ast.LtE: ("le", operator.le),
    ast.Gt: ("gt", operator.gt),
    ast.GtE: ("ge", operator.ge),
    ast.Eq: ("eq", operator.eq),
    ast.NotEq: ("ne", operator.ne),
}
_METHODS = ("to", "sum", "max", "min")
# What there is of tensors, tiles and values, by the kind of the owner.
_ATTRIBUTES = {
    TensorRef: ("shape", "dtype"),
    TileVar: ("index", "start", "stop", "size"),
    Value: ("T", "dtype", "shape", *_METHODS),
}
# Torch's own spelling of element types, as its objects print.
TORCH_DTYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.int32": "int32",
    "torch.int64": "int64",
    "torch.bool": "bool",
}


@dataclass(slots=True)
class Scope:
    """The local variables of a function being lowered; ``lost`` says why one is gone."""

    source: FunctionSource
    names: dict[str, Any]
    lost: dict[str, str] = field(default_factory=dict)
    depth: int = 0


def _use(function: ast.FunctionDef, name: ast.Name) -> ast.AST | None:
    """The call or the indexing that the name at this place is the head of."""
    place = (name.lineno, name.col_offset)
    for node in ast.walk(function):
        head: ast.AST | None = None
        if isinstance(node, ast.Call):
            head = node.func
        elif isinstance(node, ast.Subscript):
            head = node.value
        if isinstance(head, ast.Name) and (head.lineno, head.col_offset) == place:
            return node
    return None


def dtype_name(value: Any) -> str | None:
    """The IR name of an element type: one of the language, of torch, or a name; None for others."""
    if isinstance(value, DType):
        return value.name
    if isinstance(value, str):
        return value if value in DTYPES else None
    return TORCH_DTYPES.get(str(value))


class Expressions(ABC):
    """Lowers expressions; calls are left to the subclass."""

    def __init__(self, builder: Builder, tensors: Tensors) -> None:
        self.builder = builder
        self.tensors = tensors
        self.extents = builder.extents

    @abstractmethod
    def call(self, node: ast.Call, scope: Scope, hint: str | None) -> Any:
        """The value of a call."""

    def unsupported(self, span: Span, what: str, advice: str) -> UnsupportedSyntax:
        """The error for syntax outside the subset."""
        return UnsupportedSyntax(span, what=what, advice=advice)

    def value(self, node: ast.expr, scope: Scope, hint: str | None = None) -> Any:
        """What ``node`` stands for; ``hint`` names the value that it makes."""
        match node:
            case ast.Constant():
                return self._constant(node, scope)
            case ast.Name():
                return self.name(node, scope)
            case ast.Attribute():
                return self._attribute(node, scope, hint)
            case ast.Subscript():
                return self._subscript(node, scope, hint)
            case ast.BinOp():
                return self._binary(node, scope, hint)
            case ast.UnaryOp():
                return self._unary(node, scope, hint)
            case ast.Compare():
                return self._compare(node, scope, hint)
            case ast.BoolOp():
                return self._bool(node, scope)
            case ast.IfExp():
                chosen = node.body if self.condition(node.test, scope) else node.orelse
                return self.value(chosen, scope, hint)
            case ast.Tuple() | ast.List():
                return tuple(self.value(item, scope) for item in node.elts)
            case ast.Call():
                return self.call(node, scope, hint)
        names = {
            ast.Lambda: "a lambda",
            ast.JoinedStr: "an f-string",
            ast.ListComp: "a comprehension",
            ast.GeneratorExp: "a generator",
            ast.Dict: "a dictionary",
            ast.NamedExpr: "`:=`",
            ast.Starred: "`*` unpacking",
        }
        what = names.get(type(node), f"`{ast.unparse(node)}`")
        raise self.unsupported(
            scope.source.span(node), what, "docs/language.md lists what kernels are made of"
        )

    def _constant(self, node: ast.Constant, scope: Scope) -> Any:
        if isinstance(node.value, CONSTANTS):
            return node.value
        raise self.unsupported(
            scope.source.span(node), f"`{node.value!r}`", "kernels know int, float and bool"
        )

    def name(self, node: ast.Name, scope: Scope) -> Any:
        """What a name stands for: a local, else what it is bound to around the function."""
        if node.id in scope.names:
            return scope.names[node.id]
        span = scope.source.span(node)
        if node.id in scope.lost:
            raise UnknownName(
                span,
                name=node.id,
                where=" after the loop that assigns it",
                advice=scope.lost[node.id],
            )
        found = scope.source.outer(node.id, _ABSENT)
        if found is _ABSENT:
            raise UnknownName(
                span,
                name=node.id,
                where=f" in `{scope.source.name}`",
                advice=self._spelling(node, scope),
            )
        return self.check_outer(found, node.id, span)

    def _spelling(self, node: ast.Name, scope: Scope) -> str:
        """What may have been meant by a name that stands for nothing."""
        name = node.id
        extent = name.upper()
        if len(name) == 1 and name != extent and extent in scope.names:
            # By convention a tile of an extent: the one is not meant by the other.
            return f"no loop around this walks `{extent}` by `{name}`: `for …, {name} in tk.tiles(…, {extent})`"
        close = did_you_mean(name, scope.names)
        if close:
            return close
        if name == "tk":
            return "the file needs `import tilelink.language as tk`"
        if name in ("RANK", "WORLD"):
            return "a kernel names no rank: what each rank holds and gets is said by the mapping"
        if name in assigned_names(scope.source.node.body):
            return f"it is assigned further down: give `{name}` a value before this line"
        use = _use(scope.source.node, node)
        if isinstance(use, ast.Call):
            known = (
                f"`tk.{name}`" if hasattr(language, name) else "the operations are those of `tk`"
            )
            return f"{known}; functions of your own are defined at the top of a file, or imported"
        if isinstance(use, ast.Subscript):
            return f"tensors are parameters, or intermediates: `{name} = tk.empty([M, N], dtype)`"
        return "extents are named by unpacking a shape: `M, K = A.shape`"

    def check_outer(self, found: Any, name: str, span: Span) -> Any:
        """``found``, where a kernel may refer to it; UnsupportedSyntax otherwise."""
        known = isinstance(found, CONSTANTS | ModuleType | FunctionType) or callable(found)
        if known or dtype_name(found) is not None:
            return found
        if isinstance(found, tuple):
            return tuple(self.check_outer(item, name, span) for item in found)
        raise self.unsupported(
            span,
            f"`{name}`, a {type(found).__name__} from outside the kernel,",
            "kernels read numbers, element types and functions from outside; pass tensors as arguments",
        )

    def _attribute(self, node: ast.Attribute, scope: Scope, hint: str | None) -> Any:
        owner, span = self.value(node.value, scope), scope.source.span(node)
        name = node.attr
        if isinstance(owner, ModuleType):
            found = getattr(owner, name, _ABSENT)
            if found is _ABSENT:
                of = ast.unparse(node.value)
                raise UnknownName(
                    span,
                    name=f"{ast.unparse(node)}",
                    where="",
                    advice=did_you_mean(f"{of}.{name}", [f"{of}.{known}" for known in dir(owner)])
                    or f"see `dir({of})`",
                )
            return self.check_outer(found, ast.unparse(node), span)
        if isinstance(owner, TensorRef):
            if name == "shape":
                dims = self.tensors.facts.dims.get(owner.name)
                return Method(owner, "shape") if dims is None else tuple(Num(dim) for dim in dims)
            if name == "dtype":
                return DType(self.tensors.dtype(owner.name))
            if name == "ndim" and owner.name in self.tensors.facts.dims:
                return len(self.tensors.facts.dims[owner.name])
        if isinstance(owner, TileVar):
            if name == "index":
                type_ = Type("int32", (owner.value.name,))
                return self.builder.emit(
                    "index", (owner.value,), type_, span, hint or f"{owner.value.name}_index"
                )
            if name in ("start", "stop"):
                return Num(owner.start if name == "start" else owner.stop)
            if name == "size":
                return Num(owner.stop - owner.start)
        if isinstance(owner, Value):
            if name == "T":
                return self.transpose(owner, span, hint)
            if name == "dtype":
                return DType(owner.type.dtype)
            if name == "shape":
                return tuple(self._length(dim) for dim in owner.type.shape)
            if name in _METHODS:
                return Method(owner, name)
        advice = did_you_mean(name, _ATTRIBUTES.get(type(owner), ())) or {
            TensorRef: "a tensor has `shape` and `dtype`; read a tile of it with `A[m, k]`",
            TileVar: "a tile variable has `index`, `start`, `stop` and `size`",
            Value: "a value has `T`, `to`, `sum`, `max`, `min` and `dtype`",
        }.get(type(owner), "only tensors, tiles and values have attributes")
        whose = f"{describe(owner)}"
        if owner is None:
            whose = f"`{ast.unparse(node.value)}`, which is None here"
        raise self.unsupported(span, f"`.{name}` of {whose}", advice)

    def _length(self, dim: str) -> Any:
        """The length of a dimension of a type."""
        if dim in self.builder.dims:
            return Num(self.builder.dims[dim])
        return (
            int(dim) if dim.isdigit() else Num(Expr.name(f"{dim}.stop") - Expr.name(f"{dim}.start"))
        )

    def transpose(self, x: Any, span: Span, hint: str | None) -> Value:
        """``x.T`` of a matrix."""
        if not isinstance(x, Value) or len(x.type.shape) != 2:
            raise self.unsupported(
                span, f"the transpose of {describe(x)}", "transpose a tile of two axes"
            )
        shape = (x.type.shape[1], x.type.shape[0])
        return self.builder.emit("transpose", (x,), Type(x.type.dtype, shape), span, hint)

    def _subscript(self, node: ast.Subscript, scope: Scope, hint: str | None) -> Any:
        owner, span = self.value(node.value, scope), scope.source.span(node)
        if isinstance(owner, Method) and owner.name == "shape":
            axis = self.literal(node.slice, scope)
            if not isinstance(axis, int) or axis < 0:
                raise self.unsupported(
                    span,
                    f"axis {axis} of the shape of `{owner.owner.name}`, whose number of axes is not known,",
                    f"count from the first axis, or declare it in the mapping: `local {owner.owner.name}[...]`",
                )
            return Num(self.tensors.facts.placeholder(owner.owner.name, axis))
        if isinstance(owner, tuple):
            axis = self.literal(node.slice, scope)
            if not isinstance(axis, int) or not -len(owner) <= axis < len(owner):
                raise NoSuchAxis(
                    span,
                    shape=ast.unparse(node.value),
                    rank=len(owner),
                    axes="axis" if len(owner) == 1 else "axes",
                    axis=axis if isinstance(axis, int) else describe(axis),
                )
            return owner[axis]
        index = self.index(node.slice, scope)
        if isinstance(owner, TensorRef):
            return self.tensors.load(owner.name, index, span, hint)
        if isinstance(owner, Value):
            return self._new_axes(owner, index, span, hint)
        raise self.unsupported(
            span, f"indexing {describe(owner)}", "index tensors, shapes and values"
        )

    def _new_axes(self, value: Value, index: list[Any], span: Span, hint: str | None) -> Value:
        kept = [item for item in index if item is not None]
        whole = all(isinstance(item, slice) and item == slice(None) for item in kept)
        if not whole or len(kept) > len(value.type.shape):
            raise self.unsupported(
                span,
                "indexing a value other than with `:` and `None`",
                "`x[:, None]` adds an axis; parts of a tensor are read where it is indexed",
            )
        for axis, item in enumerate(index):
            if item is None:
                shape = list(value.type.shape)
                shape.insert(axis, "1")
                base = hint or value.name.split(".")[0]
                type_ = Type(value.type.dtype, tuple(shape))
                value = self.builder.emit("expand", (value,), type_, span, base, axis=axis)
        return value

    def index(self, node: ast.expr, scope: Scope) -> list[Any]:
        """The elements of an index list: values, slices, or None for a new axis."""
        items = node.elts if isinstance(node, ast.Tuple) else [node]
        return [self._index_item(item, scope) for item in items]

    def _index_item(self, node: ast.expr, scope: Scope) -> Any:
        if isinstance(node, ast.Slice):
            parts = [
                None if part is None else self.value(part, scope)
                for part in (node.lower, node.upper, node.step)
            ]
            return slice(*parts)
        if isinstance(node, ast.Constant) and node.value is Ellipsis:
            raise self.unsupported(scope.source.span(node), "`...`", "write one `:` an axis")
        return self.value(node, scope)

    def _binary(self, node: ast.BinOp, scope: Scope, hint: str | None) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return self.binary(type(node.op), left, right, scope.source.span(node), hint)

    def binary(
        self, kind: type[ast.operator], left: Any, right: Any, span: Span, hint: str | None
    ) -> Any:
        """``left kind right`` of values, tiles, expressions or constants."""
        if kind is ast.MatMult:
            return self.dot(left, right, None, span, hint)
        if kind not in _BINARY:
            raise self.unsupported(
                span, "this operator", "kernels know + - * / // % ** @ & | ~ and comparisons"
            )
        symbol, name, fold = _BINARY[kind]
        if isinstance(left, TileVar | MovedTile) or isinstance(right, TileVar | MovedTile):
            return self._shift(kind, left, right, span)
        if kind is ast.Add and isinstance(left, Value) and isinstance(right, Value):
            fused = self._add_to_dot(left, right, span, hint)
            if fused is not None:
                return fused
        if isinstance(left, Value) or isinstance(right, Value):
            return self.builder.arithmetic(name, left, right, span, hint)
        if isinstance(left, Num) or isinstance(right, Num):
            both = [
                Expr.const(x) if isinstance(x, int) else x.expr
                for x in (left, right)
                if isinstance(x, int | Num)
            ]
            if symbol in ("/", "%") and right == 0:
                raise self.unsupported(span, "a division by zero", "correct the constants")
            if symbol and len(both) == 2:
                return Num(binary(symbol, *both))
            a, b = self.builder.literal(left), self.builder.literal(right)
            if isinstance(a, Num) or isinstance(b, Num):
                return self.builder.arithmetic(name, a, b, span, hint)
            left, right = a, b
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            culprit = right if isinstance(left, int | float) else left
            raise self.unsupported(
                span, f"arithmetic on {describe(culprit)}", "read a tile first: `A[m, k]`"
            )
        try:
            return fold(left, right)
        except (ArithmeticError, TypeError) as error:
            raise self.unsupported(
                span, f"this arithmetic ({error})", "correct the constants"
            ) from None

    def _add_to_dot(self, left: Value, right: Value, span: Span, hint: str | None) -> Value | None:
        """``acc + dot(a, b)`` as ``dot(a, b, acc)``, where the product is the op just emitted."""
        ops = self.builder.stack[-1]
        if not ops or ops[-1].results != (right,) or left.type != right.type:
            return None
        if ops[-1].name != "dot" or len(ops[-1].operands) != 2:
            return None
        a, b = ops.pop().operands
        return self.builder.emit("dot", (a, b, left), right.type, span, hint)

    def _shift(self, kind: type[ast.operator], left: Any, right: Any, span: Span) -> MovedTile:
        tile, other = (left, right) if isinstance(left, TileVar | MovedTile) else (right, left)
        if isinstance(other, TileVar | MovedTile):
            raise self.unsupported(
                span, "arithmetic on two tile variables", "use their `index` or `start`"
            )
        start = tile.start
        base = tile.tile if isinstance(tile, MovedTile) else tile
        offset = (
            Expr.const(other)
            if isinstance(other, int)
            else other.expr
            if isinstance(other, Num)
            else None
        )
        if (
            start is None
            or offset is None
            or kind not in (ast.Add, ast.Sub)
            or (kind is ast.Sub and tile is right)
        ):
            return MovedTile(base, None)
        return MovedTile(base, start + offset if kind is ast.Add else start - offset)

    def _unary(self, node: ast.UnaryOp, scope: Scope, hint: str | None) -> Any:
        x, span = self.value(node.operand, scope), scope.source.span(node)
        if isinstance(node.op, ast.Not):
            return not self.truth(x, span)
        x = self.builder.literal(x)
        if isinstance(node.op, ast.UAdd):
            return x
        if isinstance(node.op, ast.USub):
            if isinstance(x, int | float):
                return -x
            if isinstance(x, Num):
                return Num(0 - x.expr)
            return self.builder.emit(
                "neg", (self.operand(x, span),), self.operand(x, span).type, span, hint
            )
        value = self.operand(x, span)
        if value.type.dtype != "bool":
            self.builder.reject(span, "~", value.type.dtype, "`~` negates a condition")
        return self.builder.emit("not", (value,), value.type, span, hint)

    def operand(self, x: Any, span: Span) -> Value:
        """``x`` as an IR value."""
        return self.builder.data(x, span)

    def _compare(self, node: ast.Compare, scope: Scope, hint: str | None) -> Any:
        span = scope.source.span(node)
        if len(node.ops) != 1:
            raise self.unsupported(span, "a chain of comparisons", "join two comparisons with `&`")
        left, right = self.value(node.left, scope), self.value(node.comparators[0], scope)
        op = node.ops[0]
        if isinstance(op, ast.Is | ast.IsNot):
            if left is not None and right is not None:
                raise self.unsupported(span, "`is` on anything but None", "compare with `==`")
            return (left is right) == isinstance(op, ast.Is)
        if type(op) not in _COMPARE:
            raise self.unsupported(span, "`in`", "compare with `==`, `<`, …")
        name, fold = _COMPARE[type(op)]
        left, right = self.builder.literal(left), self.builder.literal(right)
        if isinstance(left, Value | Num) or isinstance(right, Value | Num):
            return self.builder.arithmetic(name, left, right, span, hint)
        for side in (left, right):
            if isinstance(side, TileVar | TensorRef | MovedTile) and None not in (left, right):
                advice = "compare an element or a tile of it, `A[m, k] > 0`"
                if isinstance(side, TileVar):
                    advice = f"a tile is a range: compare `{side.value.name}.index` and choose by `tk.where`"
                raise self.unsupported(span, f"a comparison of {describe(side)}", advice)
        a, b = dtype_name(left) or left, dtype_name(right) or right
        return fold(a, b)

    def _bool(self, node: ast.BoolOp, scope: Scope) -> Any:
        result: Any = None
        for item in node.values:
            result = self.value(item, scope)
            if self.truth(result, scope.source.span(item)) != isinstance(node.op, ast.And):
                return result
        return result

    def condition(self, node: ast.expr, scope: Scope) -> bool:
        """The truth of a compile-time condition."""
        return self.truth(self.value(node, scope), scope.source.span(node))

    def truth(self, value: Any, span: Span) -> bool:
        """The truth of a compile-time value; NotCompileTime for any other."""
        value = self.builder.literal(value)
        if isinstance(value, Value | Num | TileVar | MovedTile):
            raise NotCompileTime(
                span,
                what=f"this condition on {describe(value)}",
                advice="choose values with `tk.where`, join conditions with `&`, `|` and `~`",
            )
        return bool(value)

    def literal(self, node: ast.expr, scope: Scope) -> Any:
        """The value of ``node`` as a Python constant where it is known at compile time."""
        return self.builder.literal(self.value(node, scope))

    def dot(self, a: Any, b: Any, acc: Any, span: Span, hint: str | None) -> Value:
        """A matrix product with its type rule."""
        for x in (a, b):
            if not isinstance(x, Value) or len(x.type.shape) != 2:
                whole = isinstance(x, TensorRef)
                advice = (
                    f"read a tile of it: `{x.name}[m, k]`"
                    if whole
                    else "it takes two tiles of two axes"
                )
                raise self.unsupported(span, f"`dot` of {describe(x)}", advice)
        if a.type.dtype != b.type.dtype or a.type.dtype not in FLOATS:
            raise DtypeMismatch(
                span,
                what=f"`dot` of {a.type.dtype} with {b.type.dtype}",
                advice="both sides have one floating-point type: convert with `x.to(tk.bfloat16)`",
            )
        (m, k), (k2, n) = a.type.shape, b.type.shape
        if not self.builder.same_dim(k, k2):
            self._no_product(a, b, span)
        operands: tuple[Value, ...] = (a, b)
        if acc is not None:
            acc = self.operand(acc, span)
            same = len(acc.type.shape) == 2 and all(
                map(self.builder.same_dim, acc.type.shape, (m, n))
            )
            if not same:
                raise ShapeMismatch(
                    span,
                    left=f"the accumulator, of shape `[{', '.join(acc.type.shape)}]`,",
                    right=f"the product, of shape `[{m}, {n}]`",
                    advice=f"start it with `tk.zeros([{m}, {n}], tk.float32)`",
                )
            if acc.type.dtype != "fp32":
                raise DtypeMismatch(
                    span,
                    what=f"`dot` adds in fp32, but its accumulator is {acc.type.dtype}",
                    advice=f"start it with `tk.zeros([{m}, {n}], tk.float32)` and convert after the loop",
                )
            operands += (acc,)
        return self.builder.emit("dot", operands, Type("fp32", (m, n)), span, hint)

    def _no_product(self, a: Value, b: Value, span: Span) -> None:
        raise ShapeMismatch(
            span,
            left=f"a tile of shape `[{', '.join(a.type.shape)}]`",
            right=f"a tile of shape `[{', '.join(b.type.shape)}]`",
            advice="`dot` multiplies [m, k] by [k, n]; transpose with `x.T`",
        )

    def builtin(self, function: Any) -> str | None:
        """The language's name of ``function``, or None where it is not of the language."""
        try:
            return BUILTINS.get(function)
        except TypeError:
            return None
