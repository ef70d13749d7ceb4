"""What type each op gives from the types it takes: one function a kind of op, for `tilelink.ir.check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilelink.ir.check_tables import BINARY, COMPARE, REDUCE, UNARY, error
from tilelink.ir.node import Op
from tilelink.ir.types import FLOATS, INTEGERS, promote

if TYPE_CHECKING:
    from tilelink.ir.check import Checker


def nothing(checker: Checker, op: Op) -> None:
    """An op of which `SHAPES` says all."""


def _binary(checker: Checker, op: Op) -> None:
    types = checker.data(op)
    shape = checker.broadcast(op, types)
    dtype = promote(types[0].dtype, types[1].dtype)
    if op.name in COMPARE:
        dtype = "bool"
    elif op.name in ("and", "or") and dtype != "bool":
        raise error(op, f"`{op.name}` joins conditions, not {dtype}", "compare first")
    elif op.name in ("floordiv", "mod") and dtype not in INTEGERS:
        raise error(op, f"`{op.name}` takes integers, not {dtype}", "`div` divides floats")
    elif op.name == "div" and dtype not in FLOATS:
        raise error(op, f"`div` takes floats, not {dtype}", "`floordiv` divides integers")
    checker.result(op, dtype, shape)


def _unary(checker: Checker, op: Op) -> None:
    (type_,) = checker.data(op)
    if (op.name == "not") != (type_.dtype == "bool"):
        raise error(
            op, f"`{op.name}` does not take {type_.dtype}", "`not` takes bool, no other does"
        )
    if op.name not in ("neg", "abs", "not") and type_.dtype not in FLOATS:
        raise error(op, f"`{op.name}` takes floats, not {type_.dtype}", "`cast` it first")
    checker.result(op, type_.dtype, type_.shape)


def _reduce(checker: Checker, op: Op) -> None:
    (type_,) = checker.data(op)
    axis = op["axis"]
    if not 0 <= axis < len(type_.shape):
        raise error(op, f"`axis` is {axis}, but {op.operands[0]} has {len(type_.shape)} axes")
    kept = ("1",) if op.get("keep") else ()
    checker.result(op, None, (*type_.shape[:axis], *kept, *type_.shape[axis + 1 :]))


def _expand(checker: Checker, op: Op) -> None:
    (type_,) = checker.data(op)
    axis = op["axis"]
    if not 0 <= axis <= len(type_.shape):
        raise error(op, f"`axis` is {axis}, but {op.operands[0]} has {len(type_.shape)} axes")
    checker.result(op, type_.dtype, (*type_.shape[:axis], "1", *type_.shape[axis:]))


def _dot(checker: Checker, op: Op) -> None:
    types = checker.data(op)
    a, b = types[:2]
    if len(a.shape) != 2 or len(b.shape) != 2 or not checker.equal(a.shape[1], b.shape[0]):
        raise error(op, f"`dot` of {a} with {b}", "it takes [m, k] and [k, n]")
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        raise error(op, f"`dot` of {a} with {b}", "it takes floats")
    shape = (a.shape[0], b.shape[1])
    if len(types) == 3 and not checker.shapes_agree(types[2].shape, shape):
        raise error(op, f"`dot` adds {a} times {b} to {types[2]}", "the shapes do not agree")
    checker.result(op, types[2].dtype if len(types) == 3 else None, shape)


def _transpose(checker: Checker, op: Op) -> None:
    (type_,) = checker.data(op)
    if len(type_.shape) != 2:
        raise error(op, f"`transpose` takes a matrix, not {type_}")
    checker.result(op, type_.dtype, type_.shape[::-1])


def _cast(checker: Checker, op: Op) -> None:
    (type_,) = checker.data(op)
    checker.result(op, None, type_.shape)


def _where(checker: Checker, op: Op) -> None:
    condition, x, y = checker.data(op)
    if condition.dtype != "bool":
        raise error(op, f"`where` asks for a condition, not {condition}", "compare first")
    checker.result(op, promote(x.dtype, y.dtype), checker.broadcast(op, [condition, x, y]))


def _index(checker: Checker, op: Op) -> None:
    value = op.operands[0]
    if not value.type.is_tile:
        raise error(op, f"`{op.name}` takes a loop tile, and `{value}` is {value.type}")
    checker.result(op, "int32", (value.name,) if op.name == "index" else ())


def _load(checker: Checker, op: Op) -> None:
    assert op.ref is not None
    checker.result(op, checker.declared[op.ref.symbol]["dtype"], checker.indexed(op.ref))


def _load_sum(checker: Checker, op: Op) -> None:
    if not op.operands:
        return
    (type_,) = checker.data(op)
    if op.get("own") is not None:
        raise error(
            op, "`load_sum` has an operand and `own`", "this rank's part comes from one place"
        )
    dtype = checker.declared[op.symbol]["dtype"]
    if type_.dtype != dtype:
        text = f"`load_sum` adds {type_} to parts of {dtype}"
        raise error(op, text, "a contribution is rounded to the parts' type first")
    checker.result(op, None, type_.shape)


def _store(checker: Checker, op: Op) -> None:
    assert op.ref is not None
    (type_,) = checker.data(op)
    shape = checker.indexed(op.ref)
    if shape is None:
        return
    text = f"`store` of {type_} to [{', '.join(shape)}] of `@{op.ref.symbol}`"
    if len(type_.shape) > len(shape):
        raise error(op, text, "the value has more axes than the place")
    rest = shape[len(shape) - len(type_.shape) :]
    if not all(d == "1" or checker.equal(d, s) for d, s in zip(type_.shape, rest, strict=True)):
        raise error(op, text, "the shapes do not agree")


def _param(checker: Checker, op: Op) -> None:
    checker.result(op, checker.declared[op.symbol]["dtype"], ())


TYPES: dict[str, Callable[[Checker, Op], None]] = {
    **dict.fromkeys(BINARY | COMPARE, _binary),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(REDUCE, _reduce),
    "expand": _expand,
    "dot": _dot,
    "transpose": _transpose,
    "cast": _cast,
    "where": _where,
    "index": _index,
    "bound": _index,
    "load": _load,
    "load_sum": _load_sum,
    "store": _store,
    "param": _param,
}
