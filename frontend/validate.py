"""What holds of every kernel, whether it comes from Python or from IR text: sizes, owners, tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelink.errors import Span
from tilelink.frontend.errors import BadExtent, NeverUsed, NotDivisible
from tilelink.frontend.mapping_errors import ConstantDivisionByZero
from tilelink.frontend.owners import shard_indices
from tilelink.ir import Expr, Op
from tilelink.ir.layout import MAX_WORLD
from tilelink.ir.limits import MAX_EXTENT, check_shared

_MOVES = {
    "gather": ("gathered", "reads", "load"),
    "ring": ("held by a ring", "reads", "load"),
    "scatter": ("scattered", "stores to", "store"),
    "reduce": ("reduced", "stores to", "store"),
}


def check_world(world: object, span: Span | None = None) -> None:
    """BadExtent unless ``world`` is a number of ranks that an arena has room for."""
    if not isinstance(world, int) or isinstance(world, bool) or not 1 <= world <= MAX_WORLD:
        raise BadExtent(
            span,
            name="world",
            value=world,
            what="the number of ranks",
            most=MAX_WORLD,
            advice="give the number of GPUs that run the kernel",
        )


def check_extents(extents: Mapping[str, Any], span: Span | None = None) -> None:
    """BadExtent unless each extent is a length that int32 indices reach."""
    for name, value in extents.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_EXTENT:
            raise BadExtent(
                span,
                name=name,
                value=value,
                what="an extent",
                most=MAX_EXTENT,
                advice="an extent is the length of an axis in elements",
            )


def check_kernel(kernel: Op) -> None:
    """The rules for sizes and maps of a kernel whose extents are all known.

    Errors: BadExtent, TooLarge, NotDivisible, OwnerRangeError, UnevenOwnerError, ConstantDivisionByZero and
    NeverUsed, at the statement of the tensor concerned.
    """
    world = kernel["world"]
    check_world(world, kernel.span)
    for extent in kernel.find("extent"):
        check_extents({extent.symbol: extent["value"]}, extent.span or kernel.span)
    names = {op.symbol: op["value"] for op in kernel.find("extent")}
    for tensor in kernel.find("tensor"):
        dims = [_value(Expr.of(dim), {**names, "WORLD": world}, tensor) for dim in tensor["dims"]]
        check_extents({f"axis {n} of {tensor.symbol}": d for n, d in enumerate(dims)}, tensor.span)
        _check_maps(tensor, dims, names, world)
        _check_used(kernel, tensor)


def _check_maps(tensor: Op, dims: list[int], names: dict[str, int], world: int) -> None:
    known = {**names, "WORLD": world}
    for length in tensor.get("tile") or ():
        check_extents({"tile": _value(Expr.of(length), known, tensor)}, tensor.span)
    owner, over = tensor.get("owner"), tensor.get("over")
    if over is not None:
        check_shared(dims[over], tensor.symbol, over, tensor.span)
    if owner is None or over is None:
        return
    if dims[over] % world:
        raise NotDivisible(
            tensor.span,
            what=f"axis {over} of `{tensor.symbol}` (= {dims[over]}), which the ranks share out,",
            unit=f"the number of ranks, {world}",
            advice=f"pad `{tensor.symbol}` so that every rank holds the same number of elements",
        )
    owner = Expr.of(owner)
    if owner.names <= {*known, "e"}:
        shard_indices(owner, dims[over], world, names, tensor.span)


def _value(expr: Expr, names: Mapping[str, int], tensor: Op) -> int:
    try:
        return int(expr.evaluate(names))
    except ZeroDivisionError:
        raise ConstantDivisionByZero(tensor.span) from None


def _check_used(kernel: Op, tensor: Op) -> None:
    if tensor["move"] not in _MOVES:
        return
    moved, does, name = _MOVES[tensor["move"]]
    # A reduction of what the caller fills in has no store, but a read.
    if any(op.name in (name, "load") and op.symbol == tensor.symbol for op in kernel.walk()):
        return
    raise NeverUsed(
        tensor.span,
        tensor=tensor.symbol,
        moved=moved,
        does=does,
        advice="use it in the body, or take its statement out of the mapping",
    )
