"""From the arguments of a call to extents and element types, with errors that name the argument."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping as Map
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tilelink.errors import Span
from tilelink.frontend.build import Request
from tilelink.frontend.errors import (
    BadCall,
    DtypeMismatch,
    NotContiguous,
    NotDivisible,
    ShapeMismatch,
)
from tilelink.frontend.expressions import TORCH_DTYPES
from tilelink.frontend.mapping import Mapping
from tilelink.frontend.source import FunctionSource, read_function
from tilelink.frontend.tensors import map_tables, mapping_extents
from tilelink.frontend.validate import check_extents
from tilelink.ir import DTYPES, Expr

ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a kernel.

    ``tensors`` are those that the body uses as tensors; ``stored`` those that it stores to or that an
    exchange fills: where a call leaves one out, it is allocated. ``keywords`` are keyword-only;
    ``constants`` those of them that are known when the kernel is compiled. ``extents`` are those that
    the mapping uses as an extent, such as a capacity that no argument's shape tells.
    """

    names: tuple[str, ...]
    tensors: frozenset[str]
    stored: frozenset[str]
    keywords: frozenset[str]
    constants: frozenset[str]
    extents: frozenset[str]
    defaults: Map[str, Any]


def read_signature(source: FunctionSource, mapping: Mapping) -> Signature:
    """The parameters of a kernel, by how its body and its mapping use them."""
    parameters = inspect.signature(source.function).parameters
    variadic = [p.name for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if variadic:
        raise BadCall(
            source.span(source.node.args),
            what=f"`*{variadic[0]}` cannot be a parameter of a kernel",
            advice="name every parameter",
        )
    used, stored = _uses(source, frozenset(parameters), 0)
    for statement in mapping.statements:
        extra = dict(statement.extra)
        filled = {str(extra[k]) for k in ("into", "offsets") if k in extra}
        used |= {statement.tensor, *filled, *(str(extra[k]) for k in ("table",) if k in extra)}
        used |= {name for name, _ in map_tables(statement)}
        stored |= filled
    for name in sorted(used & set(parameters)):
        default = parameters[name].default
        if isinstance(default, int | float | str):
            raise BadCall(
                source.span(_default_of(source, name)),
                what=f"the default of `{name}` is {default!r}, but `{source.name}` uses `{name}` as a tensor",
                advice=f"an optional tensor is None where it is left out: `{name}=None`",
            )
    keywords = frozenset(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
    sized = mapping_extents(mapping) & frozenset(parameters) - used
    return Signature(
        tuple(parameters),
        frozenset(used & set(parameters)),
        frozenset(stored & set(parameters)),
        keywords,
        keywords - sized,
        sized,
        {p.name: p.default for p in parameters.values() if p.default is not p.empty},
    )


def _default_of(source: FunctionSource, name: str) -> ast.AST:
    """The default of a parameter, as it is written."""
    args = source.node.args
    plain = [*args.posonlyargs, *args.args]
    pairs: list[tuple[ast.arg, ast.expr | None]] = [
        *zip(plain[len(plain) - len(args.defaults) :], args.defaults, strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    return next((d for a, d in pairs if a.arg == name and d is not None), source.node.args)


def _uses(source: FunctionSource, names: frozenset[str], depth: int) -> tuple[set[str], set[str]]:
    """(names used as tensors, names stored to), through the functions that the body calls."""
    used: set[str] = set()
    stored: set[str] = set()
    for node in ast.walk(source.node):
        base = node.value if isinstance(node, ast.Subscript | ast.Attribute) else None
        if isinstance(base, ast.Name) and base.id in names:
            used.add(base.id)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                stored.add(base.id)
        if isinstance(node, ast.Call) and depth < 8:
            callee = _callee(source, node.func)
            if (
                inspect.isfunction(inspect.unwrap(callee))
                and callee.__module__ != "tilelink.language"
            ):
                inner, written = _callee_uses(
                    inspect.unwrap(callee), node, names, depth, source.span(node)
                )
                used |= inner
                stored |= written
    return used, stored


def _callee(source: FunctionSource, node: ast.expr) -> Any:
    """What a call's function stands for: a name, or an attribute of a module."""
    if isinstance(node, ast.Name):
        return source.outer(node.id)
    if isinstance(node, ast.Attribute):
        owner = _callee(source, node.value)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


def _callee_uses(
    function: Any, node: ast.Call, names: frozenset[str], depth: int, span: Span
) -> tuple[set[str], set[str]]:
    inner = read_function(function, span)
    parameters = list(inspect.signature(function).parameters)
    passed = dict(zip(parameters, node.args, strict=False)) | {
        k.arg: k.value for k in node.keywords if k.arg is not None
    }
    outer = {p: a.id for p, a in passed.items() if isinstance(a, ast.Name) and a.id in names}
    used, stored = _uses(inner, frozenset(outer), depth + 1)
    return {outer[p] for p in used}, {outer[p] for p in stored}


@dataclass(frozen=True, slots=True)
class Bound:
    """A call: the request that builds its kernel, and its arguments by name.

    ``tensors`` holds every tensor parameter, None where the kernel allocates it.
    """

    request: Request
    tensors: Map[str, Any]
    scalars: Map[str, Any]


def is_tensor(value: Any) -> bool:
    """Whether ``value`` has what is needed of a tensor: a shape and an element type."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def element_type(name: str, value: Any) -> str:
    """The IR name of a tensor argument's element type; DtypeMismatch where there is none."""
    text = str(value.dtype)
    kind = type(value)
    if kind.__module__.split(".")[0] == "numpy":
        raise BadCall(
            what=f"argument `{name}` is a {kind.__module__}.{kind.__name__}, not a tensor",
            advice=f"pass torch.from_numpy({name})",
        )
    found = TORCH_DTYPES.get(text, text if text in DTYPES else None)
    if found is None:
        raise DtypeMismatch(
            what=f"argument `{name}` has element type {text}, which kernels do not know",
            advice=f"convert it to one of {', '.join(TORCH_DTYPES)}",
        )
    return found


def match_arguments(
    kernel: str, signature: Signature, args: tuple[Any, ...], kwargs: Map[str, Any]
) -> dict[str, Any]:
    """Every parameter's argument; None for optional tensors and outputs that are left out."""
    names = [n for n in signature.names if n not in signature.keywords]
    if len(args) > len(names):
        raise BadCall(
            what=f"`{kernel}` takes {len(names)} arguments, {len(args)} were given",
            advice=f"{kernel}({', '.join(signature.names)})",
        )
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in signature.names or name in given:
            what = "was given twice" if name in given else f"is no parameter of `{kernel}`"
            raise BadCall(
                what=f"argument `{name}` {what}", advice=f"{kernel}({', '.join(signature.names)})"
            )
        given[name] = value
    result: dict[str, Any] = {}
    for name in signature.names:
        value = given.get(name, signature.defaults.get(name))
        required = name not in signature.stored and name not in signature.defaults
        if value is None and required:
            raise BadCall(
                what=f"`{kernel}` needs the argument `{name}`",
                advice=f"{kernel}({', '.join(signature.names)})",
            )
        result[name] = value
    return result


def bind_arguments(
    kernel: str,
    signature: Signature,
    mapping: Mapping,
    arguments: Map[str, Any],
    world: int,
    *,
    strict: bool = True,
) -> Bound:
    """Extents and element types of a call.

    ``arguments`` are one rank's: shards where a tensor has `over`. ``strict`` also asks for what a GPU
    needs: contiguous memory, and innermost extents of 16-bit tensors that fill 16 bytes.
    """
    extents: dict[str, int] = {}
    origin: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    ranks: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    compound: list[tuple[str, int, Expr, int]] = []
    for name, value in arguments.items():
        if name in signature.extents:
            if not isinstance(value, int) or isinstance(value, bool):
                raise BadCall(
                    what=f"argument `{name}` is a {type(value).__name__}, but it is an extent of the mapping",
                    advice="pass an integer",
                )
            _set_extent(extents, origin, name, value, name, None)
        elif name in signature.constants:
            constants[name] = value
        elif is_tensor(value):
            tensors[name] = value
            dtypes[name] = element_type(name, value)
            ranks[name] = len(value.shape)
            for axis, length in enumerate(value.shape):
                check_extents({f"axis {axis} of {name}": int(length)})
            shape = _global_shape(name, value, mapping, world)
            for axis, (dim, size) in enumerate(
                zip(_dims(name, mapping, len(shape)), shape, strict=True)
            ):
                if dim.op == "name" and dim.args[0] not in ("WORLD", "RANK"):
                    _set_extent(extents, origin, str(dim.args[0]), size, name, axis)
                else:
                    compound.append((name, axis, dim, size))
            if strict:
                _check_memory(name, value, dtypes[name])
        elif name in signature.tensors:
            if value is not None:
                raise BadCall(
                    what=f"argument `{name}` is a {type(value).__name__}, but `{kernel}` uses it as a tensor",
                    advice="pass a tensor",
                )
            if name in signature.stored:
                tensors[name] = None
        elif isinstance(value, bool | str) or value is None:
            constants[name] = value
        elif isinstance(value, int | float):
            scalars[name] = value
        else:
            raise BadCall(
                what=f"argument `{name}` is a {type(value).__name__}",
                advice="pass tensors, numbers or None",
            )
    for name, axis, dim, size in compound:
        _check_compound(name, axis, dim, size, extents, world)
    request = Request(
        extents=extents,
        dtypes=dtypes,
        world=world,
        present=frozenset(tensors),
        constants=constants,
        scalars={n: "fp32" if isinstance(v, float) else "int32" for n, v in scalars.items()},
        ranks=ranks,
        stored=signature.stored,
    )
    return Bound(request, tensors, scalars)


def _dims(name: str, mapping: Mapping, rank: int) -> list[Expr]:
    for statement in mapping.statements:
        extra = dict(statement.extra)
        if statement.tensor == name:
            return list(statement.dims)
        for key in ("table", "into", "offsets"):
            if extra.get(key) == name and f"{key}_dims" in extra:
                return list(extra[f"{key}_dims"])
    return [Expr.name(f"{name}_{axis}") for axis in range(rank)]


def _global_shape(name: str, value: Any, mapping: Mapping, world: int) -> list[int]:
    shape = [int(size) for size in value.shape]
    dims = _dims(name, mapping, len(shape))
    if len(dims) != len(shape):
        raise ShapeMismatch(
            left=f"argument `{name}` of shape {list(shape)}",
            right=f"`{name}[{', '.join(map(str, dims))}]` of the mapping",
            advice=f"pass a tensor of {len(dims)} axes",
        )
    for statement in mapping.statements:
        if statement.tensor == name and statement.over is not None:
            shape[statement.dims.index(Expr.name(statement.over))] *= world
    return shape


def _set_extent(
    extents: dict[str, int],
    origin: dict[str, str],
    name: str,
    size: int,
    tensor: str,
    axis: int | None,
) -> None:
    place = f"argument `{tensor}`" if axis is None else f"axis {axis} of argument `{tensor}`"
    if extents.setdefault(name, size) != size:
        raise ShapeMismatch(
            left=f"{place}, which makes `{name}` {size},",
            right=f"{origin[name]}, which makes it {extents[name]}",
            advice=f"`{name}` is one extent: pass tensors that agree in it "
            "(a rank passes its shard of a tensor that has `over`)",
        )
    origin.setdefault(name, place)


def _check_compound(
    name: str, axis: int, dim: Expr, size: int, extents: Map[str, int], world: int
) -> None:
    if not dim.names <= {*extents, "WORLD"}:
        return
    expected = dim.evaluate({**extents, "WORLD": world})
    if expected != size:
        raise ShapeMismatch(
            left=f"axis {axis} of argument `{name}` (= {size})",
            right=f"`{dim}` (= {expected}) of the mapping",
            advice="pass a tensor of that shape",
        )


def _check_memory(name: str, value: Any, dtype: str) -> None:
    shape = [int(size) for size in value.shape]
    inner = shape[-1] if shape else 0
    if hasattr(value, "is_contiguous") and not value.is_contiguous():
        if len(shape) != 2 or not value.T.is_contiguous():
            raise NotContiguous(name=name)
        inner = shape[0]
    if hasattr(value, "data_ptr") and value.data_ptr() % ALIGN_BYTES:
        raise NotDivisible(
            what=f"the address of argument `{name}`",
            unit=f"{ALIGN_BYTES} bytes",
            advice=f"pass a copy: {name}.clone()",
        )
    unit = ALIGN_BYTES // DTYPES[dtype]
    if DTYPES[dtype] == 2 and len(shape) > 1 and inner % unit:
        raise NotDivisible(
            what=f"the innermost extent of argument `{name}`, {inner},",
            unit=f"{unit}, which {dtype} needs",
            advice="pad it: rows of a matrix start at multiples of 16 bytes",
        )
