"""The words of the text form: which ops there are, which attributes each takes, what a symbol may name.

The parser takes any word, since the text form is one shape for every op. A program that was edited by
hand is held against this table before anything is concluded from it: a misspelt ``load`` would otherwise
be an access that the proof does not see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from tilelink.errors import TilelinkError, did_you_mean
from tilelink.ir.node import DECLARATIONS, Op, Ref

# Attributes by op; `!` marks those that must be there. docs/ir.md says what they mean.
_TABLE = {
    "kernel": "world! file",
    "program": "world! bytes file kernel kernel_text schedule slots workspace",
    "extent": "value! dynamic least",
    "tensor": "dims! dtype! move! role! block by_owner channel_axis channel_rows closed comm_tile in_place into "
    "offsets over owner part_axis polled pulled resource shots signal source table task_columns task_rows "
    "tasks_across tile",
    "scalar": "dtype!",
    "buffer": "dims! dtype! space! alias offset words",
    "flag": "dims! carried cleared offset",
    "counter": "dims! cleared offset",
    "head": "folded",
    "stream": "after",
    "launch": "after emitter ends landing part resident roles stages warps workers!",
    "collective": "op! to! after",
    "finish": "",
    "flush": "drain",
    "stage": "extent! tile! axis counter first flatten group interleave live positions queue segment segments "
    "visit workers",
    "for_tiles": "bounds extent part part_axis part_of segment segments tile visit",
    "for_range": "hi! lo!",
    "yield": "",
    "load": "empty late own relay via when wide",
    "load_sum": "empty own remote via wide",
    "store": "final peer relay via wide",
    "wait": "compare count epoch if order proxy scope",
    "notify": "barrier count delay drain if order peer scope through",
    "transfer": "peer! to! if wide",
    "param": "",
    "zeros": "",
    "full": "value!",
    "constant": "value!",
    "index": "",
    "bound": "which!",
    "expand": "axis!",
    "sum": "axis! keep",
    "max": "axis! keep",
    "min": "axis! keep",
}
_PLAIN = (
    "dot transpose cast reshape where add sub mul div floordiv mod maximum minimum pow lt le gt ge eq "
    "ne and or neg not abs exp exp2 log log2 sqrt rsqrt sin cos tanh sigmoid silu gelu erf"
)
_ATTRIBUTES = {name: tuple(text.split()) for name, text in _TABLE.items()}
_ATTRIBUTES.update(dict.fromkeys(_PLAIN.split(), ()))
OPS = tuple(sorted(_ATTRIBUTES))

# What the symbol of an op, and that of an attribute, may have been declared as.
_MEMORY = ("tensor", "buffer")
_SIGNALS = ("flag", "counter")
_REFERS = {
    "load": _MEMORY,
    "load_sum": _MEMORY,
    "store": _MEMORY,
    "transfer": _MEMORY,
    "collective": _MEMORY,
    "wait": _SIGNALS,
    "notify": _SIGNALS,
    "param": ("scalar",),
}
_ATTRIBUTE_REFERS = {
    "alias": _MEMORY,
    "carried": ("buffer",),
    "own": _MEMORY,
    "to": _MEMORY,
    "through": ("counter",),
    "counter": ("counter",),
}
_WHOLE = (
    "world",
    "workers",
    "resident",
    "warps",
    "stages",
    "landing",
    "offset",
    "bytes",
    "workspace",
    "slots",
)
# Of each op: its attributes, and those of them that it must have.
_KNOWN = {
    op: ([n.rstrip("!") for n in names], [n[:-1] for n in names if n.endswith("!")])
    for op, names in _ATTRIBUTES.items()
}
_AGENTS = ("head", "stream", "launch", "collective")


class IRNameError(TilelinkError):
    """A word of IR text that stands for nothing: an op, an attribute, a symbol or an agent."""

    code: ClassVar[str] = "ir-name"
    message: ClassVar[str] = "{what}"
    hint: ClassVar[str] = "{advice}"


def check_names(top: Op) -> None:
    """Raises IRNameError at the first word of a kernel or program that docs/ir.md does not know."""
    declared = {op.symbol: op.name for op in top.body if op.name in DECLARATIONS}
    agents = ["head", *(op.symbol for op in top.body if op.name in _AGENTS and op.ref is not None)]
    for op in top.walk():
        _check_op(op)
        if op.name in _REFERS and op.ref is not None:
            _check_ref(op, op.ref, declared, _REFERS[op.name])
        for key, value in op.attrs:
            if isinstance(value, Ref) and key in _ATTRIBUTE_REFERS:
                _check_ref(op, value, declared, _ATTRIBUTE_REFERS[key])
        for name in op.get("after", ()) if op.name in _AGENTS else ():
            if name not in agents:
                _fail(op, f"there is no agent `{name}` to come after", name, agents)


def _check_op(op: Op) -> None:
    if op.name not in _ATTRIBUTES:
        _fail(op, f"there is no op `{op.name}`", op.name, OPS)
    known, needed = _KNOWN[op.name]
    for key, value in op.attrs:
        if key not in known:
            _fail(op, f"`{op.name}` has no attribute `{key}`", key, known)
        # The workers of a stage are a range of the launch's.
        whole = (op.name, key) == ("extent", "value") or (key in _WHOLE and op.name != "stage")
        if whole and not isinstance(value, int):
            raise IRNameError(
                op.span,
                what=f"`{key}` of `{op.name}` is not a whole number",
                advice="write a whole number",
            )
    given = dict(op.attrs) if needed else {}
    for name in needed:
        if name not in given:
            raise IRNameError(
                op.span,
                what=f"`{op.name}` lacks its attribute `{name}`",
                advice="docs/ir.md lists the attributes of every op",
            )


def _check_ref(op: Op, ref: Ref, declared: dict[str, str], kinds: tuple[str, ...]) -> None:
    if declared.get(ref.symbol) not in kinds:
        names = [f"@{name}" for name, kind in declared.items() if kind in kinds]
        what = f"there is no {' or '.join(kinds)} `@{ref.symbol}`"
        _fail(op, what, f"@{ref.symbol}", names)


def _fail(op: Op, what: str, word: str, known: Iterable[str]) -> None:
    known = list(known)
    advice = did_you_mean(word, known)
    if not advice and known and len(known) <= 12:
        advice = "known here: " + ", ".join(f"`{name}`" for name in known)
    elif not advice:
        advice = "docs/ir.md lists the ops and their attributes"
    raise IRNameError(op.span, what=what, advice=advice)
