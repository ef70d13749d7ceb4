"""The tables behind `tilelink.ir.check`: kinds of attributes, shapes of ops, what stands inside what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tilelink.errors import TilelinkError
from tilelink.ir.expr import Expr
from tilelink.ir.layout import ENCODINGS
from tilelink.ir.node import DECLARATIONS, Op, Ref
from tilelink.ir.types import DTYPES

MAX_WORKERS = 2**13
ALIGN_BYTES = 16  # of buffers: what one vector access takes
DOCS = "docs/ir.md says what every op takes"

# Kinds of attributes, as `KINDS` checks them.
ATTRIBUTES = {
    "exprs": "dims extent tile",
    "expr": "hi lo peer owner signal visit if when epoch segment segments live first tasks_across",
    "count": "world value:extent workers:launch resident warps stages landing group block channel_rows "
    "task_columns task_rows delay least shots slots",
    "arrivals": "count",
    "whole": "offset bytes workspace over axis flatten_axis part_axis channel_axis",
    "bool": "dynamic cleared bounds keep wide barrier drain proxy in_place final folded interleave relay "
    "empty pulled remote ends closed by_owner",
    "text": "file kernel schedule into offsets source table",
    "texts": "after",
    "ref": "alias carried own to through counter",
    "number": "value:full",
    "scalar": "value:constant",
    "pair": "workers:stage positions",
}
KIND_OF = {word: kind for kind, words in ATTRIBUTES.items() for word in words.split()}
CHOICES = {
    "dtype": tuple(DTYPES),
    "role": ("in", "out", "inout", "temp"),
    "move": ("local", "gather", "scatter", "reduce", "shard", "ring", "exchange", "combine"),
    "space": ("symmetric", "local"),
    "queue": ("static", "dynamic"),
    "which": ("start", "stop"),
    "op": ("all_gather", "reduce_scatter", "all_reduce"),
    "order": ("relaxed",),
    "scope": ("gpu", "sys"),
    "compare": ("equal",),
    "via": ("tma",),
    "emitter": ("gluon", "library"),
    "roles": ("turns", "halves"),
    "words": tuple(ENCODINGS),
    "polled": tuple(ENCODINGS),
}
SPOKEN = {
    "exprs": "a list of expressions, `[M, 64]`",
    "expr": "an expression",
    "count": "a whole number from 1",
    "arrivals": "a whole number from 1 or an expression",
    "whole": "a whole number from 0",
    "bool": "`true` or `false`",
    "text": 'a string, `"A"`',
    "texts": 'a list of strings, `["head"]`',
    "ref": "a symbol, `@A[…]`",
    "number": "a number",
    "scalar": "a number, a truth value or an expression",
    "pair": "two numbers, `[0, 4]`",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


KINDS: dict[str, Callable[[Any], bool]] = {
    "expr": lambda v: isinstance(v, Expr) or _is_int(v),
    "exprs": lambda v: isinstance(v, tuple) and all(isinstance(x, Expr) or _is_int(x) for x in v),
    "count": lambda v: _is_int(v) and v >= 1,
    "arrivals": lambda v: isinstance(v, Expr) or (_is_int(v) and v >= 1),
    "whole": lambda v: _is_int(v) and v >= 0,
    "bool": lambda v: isinstance(v, bool),
    "text": lambda v: isinstance(v, str),
    "texts": lambda v: isinstance(v, tuple) and all(isinstance(x, str) for x in v),
    "ref": lambda v: isinstance(v, Ref),
    "number": lambda v: isinstance(v, int | float),
    "scalar": lambda v: isinstance(v, int | float | Expr),
    "pair": lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_int, v)),
}

BINARY = frozenset(
    ["add", "sub", "mul", "div", "floordiv", "mod", "maximum", "minimum", "pow", "and", "or"]
)
COMPARE = frozenset(["lt", "le", "gt", "ge", "eq", "ne"])
UNARY = frozenset(
    "neg not abs exp exp2 log log2 sqrt rsqrt sin cos tanh sigmoid silu gelu erf".split()  # noqa: SIM905
)
REDUCE = frozenset({"sum", "max", "min"})
_COMPUTE = (
    BINARY
    | COMPARE
    | UNARY
    | REDUCE
    | frozenset(
        [
            "zeros",
            "full",
            "constant",
            "index",
            "bound",
            "dot",
            "transpose",
            "cast",
            "expand",
            "reshape",
            "where",
            "param",
            "load",
        ]
    )
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Numbers of operands, results and blocks of an op, and whether it names a symbol."""

    operands: tuple[int, int] = (0, 0)
    results: tuple[int, int] = (0, 0)
    ref: bool = False
    blocks: tuple[int, int] = (0, 0)


MANY = 10_000
_BLOCK = (1, 1)
SHAPES = {
    **{n: _Shape((2, 2), (1, 1)) for n in BINARY | COMPARE},
    **{n: _Shape((1, 1), (1, 1)) for n in UNARY | REDUCE},
    **{
        n: _Shape((1, 1), (1, 1))
        for n in ("index", "bound", "transpose", "cast", "expand", "reshape")
    },
    **{n: _Shape((0, 0), (1, 1)) for n in ("zeros", "full", "constant")},
    "dot": _Shape((2, 3), (1, 1)),
    "where": _Shape((3, 3), (1, 1)),
    "param": _Shape((0, 0), (1, 1), True),
    "load": _Shape((0, 0), (1, 1), True),
    "load_sum": _Shape((0, 1), (1, 1), True),
    "store": _Shape((1, 1), (0, 0), True),
    "wait": _Shape(ref=True),
    "notify": _Shape(ref=True),
    "transfer": _Shape(ref=True),
    "collective": _Shape(ref=True),
    **{n: _Shape(ref=True) for n in DECLARATIONS},
    "yield": _Shape((1, MANY)),
    "for_tiles": _Shape((0, MANY), (0, MANY), blocks=_BLOCK),
    "for_range": _Shape((0, MANY), (0, MANY), blocks=_BLOCK),
    "head": _Shape(blocks=_BLOCK),
    "finish": _Shape(blocks=_BLOCK),
    "flush": _Shape(),
    "stream": _Shape(ref=True, blocks=_BLOCK),
    "launch": _Shape(ref=True, blocks=_BLOCK),
    "stage": _Shape(ref=True, blocks=_BLOCK),
    "kernel": _Shape(ref=True, blocks=_BLOCK),
    "program": _Shape(ref=True, blocks=_BLOCK),
}

LOOPS = frozenset({"for_tiles", "for_range"})
_SYNC = frozenset({"wait", "notify", "transfer", "load_sum"})
_BODY = _COMPUTE | LOOPS | {"store", "yield"}
# What may stand directly inside of what.
INSIDE = {
    "kernel": _BODY | {"extent", "tensor", "scalar"},
    "program": DECLARATIONS | {"head", "stream", "launch", "collective"},
    "launch": frozenset({"stage", "finish", "flush"}),
    "head": _SYNC | LOOPS,
    "stream": _SYNC | LOOPS,
    "finish": _BODY | _SYNC | {"flush"},
    "stage": _BODY | _SYNC,
}


class IRTypeError(TilelinkError):
    """IR text whose words are known but do not fit together: a type, a shape, a kind of attribute."""

    code: ClassVar[str] = "ir-type"
    message: ClassVar[str] = "{what}"
    hint: ClassVar[str] = "{advice}"


def error(op: Op, what: str, advice: str = DOCS) -> IRTypeError:
    return IRTypeError(op.span, what=what, advice=advice)
