"""What the reference executor reads off a kernel before it runs: extents, moves, barriers, own loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tilelink.errors import TilelinkError
from tilelink.ir import At, Broadcast, Expr, Op, Range, Value, dynamic_extents
from tilelink.ir.node import DECLARATIONS

SUMMED = frozenset({"scatter", "reduce"})
GATHERED = frozenset({"gather", "ring"})
Path = tuple[int, ...]


class InputError(TilelinkError):
    """An input that does not fit the kernel."""

    code = "bad-input"
    message = "{detail}"
    hint = "give each rank its own shard of every moved tensor, and a number for every scalar"


class ReadBeforeExchange(TilelinkError):
    """A read of an exchange's result before its source is complete."""

    code = "read-before-exchange"
    message = "`{tensor}` is read here, but `{source}`, which it comes from, is stored later"
    hint = "read what an exchange delivers after the last store of what it sends"


class OwnersDiffer(TilelinkError):
    """A loop over each rank's part of two tensors whose parts are not the same."""

    code = "owners-differ"
    message = "`{tensor}` is not shared out among the ranks as `{other}` is, in the same loop"
    hint = "give both the same `over` extent and the same `owner`"


@dataclass(frozen=True, slots=True)
class Plan:
    """``tensors``: declarations by name. ``barriers``: the moves that must happen before an op (by id).
    ``summed``: the loads (by id) that see the moved tensor, not this rank's own contribution.
    ``owned``: loop variables that walk this rank's part only, with the tensor whose part it is."""

    tensors: dict[str, Op]
    barriers: dict[int, frozenset[str]]
    summed: frozenset[int]
    owned: dict[str, str]


def make_plan(kernel: Op) -> Plan:
    """The plan of ``kernel``."""
    tensors = {op.symbol: op for op in kernel.find("tensor")}
    stores: dict[str, Path] = {}
    for path, op in _walk(kernel, ()):
        if op.name == "store":
            stores[op.symbol] = path
    waits: dict[Path, set[str]] = {}
    summed: set[int] = set()
    for path, op in _walk(kernel, ()):
        if op.name in DECLARATIONS:
            continue
        for symbol in _reads(op, tensors):
            for moved, sources in _moves_behind(symbol, tensors, stores):
                last = max((stores[s] for s in sources if s in stores), default=None)
                if moved == symbol:
                    if last is None or path < last:
                        continue
                    summed.add(id(op))
                elif last is not None and path < last:
                    raise ReadBeforeExchange(op.span, tensor=symbol, source=moved)
                shared = 0 if last is None else _common(path, last)
                waits.setdefault(path[: shared + 1], set()).add(moved)
    barriers = {id(op): frozenset(waits[path]) for path, op in _walk(kernel, ()) if path in waits}
    owned = _owned_variables(kernel, tensors, summed)
    return Plan(tensors, barriers, frozenset(summed), owned)


def _walk(op: Op, path: Path) -> Iterator[tuple[Path, Op]]:
    for number, child in enumerate(op.body):
        here = (*path, number)
        yield here, child
        yield from _walk(child, here)


def _reads(op: Op, tensors: Mapping[str, Op]) -> list[str]:
    """The tensors that an op itself reads: what it loads, and the tables of its expressions."""
    found = {op.symbol} if op.name == "load" else set()
    index = op.ref.index if op.ref is not None else ()
    values = [*index, *(v for _, value in op.attrs for v in _flat(value))]
    for value in values:
        if isinstance(value, At | Expr | Range):
            found |= _names(value) & set(tensors)
    return sorted(found)


def _flat(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _names(value: At | Expr | Range) -> frozenset[str]:
    if isinstance(value, Range):
        return value.lo.names | value.hi.names
    return (value.start if isinstance(value, At) else value).names


def _common(a: Path, b: Path) -> int:
    """How many loops two ops share."""
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return shared


def _moves_behind(
    symbol: str, tensors: Mapping[str, Op], stores: Mapping[str, Path]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The moved tensors that must have moved for ``symbol`` to be read, with what they depend on."""
    declared = tensors[symbol]
    move = declared.get("move", "local")
    if move in SUMMED or (move in GATHERED and symbol in stores):
        yield symbol, (symbol,)
    for name, tensor in tensors.items():
        if tensor.get("move") == "exchange" and symbol in (tensor["into"], tensor["offsets"]):
            yield name, (name, str(tensor["table"]))
        if tensor.get("move") == "combine" and symbol == tensor["into"]:
            yield name, (name,)


def _owned_variables(kernel: Op, tensors: Mapping[str, Op], summed: set[int]) -> dict[str, str]:
    """Loop variables of which each rank walks its own part, with the tensor whose part it is.

    Marked by the front end (`part`), or seen from use: the variable indexes the ``over`` axis of a
    tensor of which a rank touches its part only.
    """
    owned: dict[str, str] = {}
    loops: dict[str, Op] = {}
    for _, op in _walk(kernel, ()):
        if op.name in ("for_tiles", "for_range"):
            loops.update((variable.name, op) for variable in op.args)
            if op.get("part") == "own" and op.get("part_of") is not None:
                owned[op.args[int(op.get("part_axis", 0))].name] = str(op["part_of"])
    for _, op in _walk(kernel, ()):
        if op.name not in ("load", "store") or op.ref is None:
            continue
        declared = tensors[op.symbol]
        move = declared.get("move", "local")
        part = move == "shard" or (move == "scatter" and id(op) in summed)
        if not part and not (move in GATHERED and op.name == "store"):
            continue
        places = [i for i in op.ref.index if not isinstance(i, Broadcast)]
        variable = _variable(places[int(declared["over"])])
        if variable not in loops:
            continue
        other = tensors[owned.setdefault(variable, op.symbol)]
        if _part(declared) != _part(other):
            raise OwnersDiffer(op.span, tensor=op.symbol, other=other.symbol)
    return owned


def _variable(element: object) -> str:
    """The name of the loop variable that an index is, or an empty string."""
    if isinstance(element, Value):
        return element.name
    return str(element) if isinstance(element, Expr) and element.op == "name" else ""


def _part(tensor: Op) -> tuple[object, object]:
    return tensor["dims"][int(tensor["over"])], tensor["owner"]


def bind_extents(
    kernel: Op, inputs: Sequence[Mapping[str, torch.Tensor | float]]
) -> dict[str, int]:
    """Every extent's value, and WORLD; those of dynamic extents are read off the inputs' shapes."""
    world = int(kernel["world"])
    if len(inputs) != world:
        raise InputError(
            detail=f"the kernel is for {world} ranks, but there are {len(inputs)} inputs"
        )
    extents = {"WORLD": world}
    extents |= {op.symbol: int(op["value"]) for op in kernel.find("extent")}
    dynamic = {op.symbol for op in dynamic_extents(kernel)}
    for op in kernel.find("tensor"):
        given = inputs[0].get(op.symbol)
        if op["role"] == "temp" or not isinstance(given, torch.Tensor):
            continue
        for axis, dim in enumerate(op["dims"]):
            if isinstance(dim, Expr) and dim.op == "name" and dim.args[0] in dynamic:
                scale = world if op.get("over") == axis else 1
                value, capacity = given.shape[axis] * scale, extents[dim.args[0]]
                if value > capacity:
                    raise InputError(
                        op.span,
                        detail=f"`{dim}` is {value} here, more than its capacity {capacity}",
                    )
                extents[dim.args[0]] = value
                dynamic.discard(dim.args[0])
    return extents
