"""Sums of the parts of all ranks: ``load_sum``, from memory into registers."""

from __future__ import annotations

from tilelink.backend.emit.access import (
    Axis,
    axes,
    base,
    lifted,
    mask_of,
    plus,
    strides,
    times,
    token_of,
)
from tilelink.backend.emit.scope import TL_DTYPE, Scope, item_bytes, refuse
from tilelink.ir import INTEGERS, Expr, Op


def load_sum(scope: Scope, op: Op) -> None:
    """``load_sum``: parts added in rank order in fp32, or integers as such; this rank's own read where it lies."""
    value, ref, own = op.results[0], op.ref, op.get("own")
    assert ref is not None
    name = scope.define(value)
    if op.get("remote"):
        _remote_sum(scope, op, name)
        return
    steps = strides(scope, ref.symbol)
    count = scope.program.constant(scope.program.shape(ref.symbol)[0])
    if count is None:
        raise refuse(op, "a sum over a number of parts known only at run time")
    if op.operands:
        _folded_sum(scope, op, steps[0])
        return
    found = [a for a in axes(scope, op, ref)[1:] if a is not None]
    offsets, mask = _relative(scope, name, found)
    far = _corner(scope, base(scope, ref.symbol), found, token_of(scope, ref.symbol))
    size = item_bytes(str(scope.program.symbols[ref.symbol]["dtype"]))
    aligned = _aligned(found, steps[0], size)
    total, part, there, here, chosen = (
        f"{name}_{s}" for s in ("total", "part", "parts", "own", "from")
    )
    scope.used.update((total, there, here))
    apart = ""
    scope.writer.line(f"{there} = {far[0]}")
    for term in far[1:]:
        scope.writer.line(f"{there} += {term}")
    if own is not None:
        near = [a for a in axes(scope, op, own) if a is not None]
        token = token_of(scope, own.symbol)
        local = _corner(scope, base(scope, own.symbol), near, token)
        scope.writer.line(f"{here} = {local[0]}")
        for term in local[1:]:
            scope.writer.line(f"{here} += {term}")
        aligned = aligned and _aligned(near, 0, size)
        # A part of columns lies closer together where it lands than in the whole.
        if strides(scope, own.symbol) != steps[1:]:
            apart, _ = _relative(scope, f"{name}_own", near)
    # Said of where parts begin: of the first part's place, which lies no further, it would get lost.
    for begin in ([there] + [here] * (own is not None)) * aligned:
        scope.writer.line(f"{begin} = tl.multiple_of({begin}, 16)")
    # All loads stand before the first addition, so that they are under way together.
    masked = [f"mask={mask}", "other=0"] if mask else []
    for source in range(count):
        scope.used.update((f"{chosen}{source}", f"{part}{source}"))
        shift = scope.expr(Expr.of(steps[0]) * source)
        scope.writer.line(f"{chosen}{source} = {there} + tl.cast({shift}, tl.int64)")
        if own is not None and not apart:
            choice = f"tl.where(rank == {source}, {here}, {chosen}{source})"
            scope.writer.line(f"{chosen}{source} = {choice}")
        places = f"{chosen}{source} + {offsets}"
        if apart:
            args = [f"rank == {source}", f"{here} + {apart}", places]
            scope.writer.call(f"{chosen}{source} = tl.where(", args)
            places = f"{chosen}{source}"
        args = [places, *masked, 'eviction_policy="evict_first"']
        scope.writer.call(f"{part}{source} = tl.load(", args)
    _added(scope, op, name, count)


def _added(scope: Scope, op: Op, name: str, count: int) -> None:
    """Write the sum of the parts that have been loaded, in rank order."""
    total, part, dtype = f"{name}_total", f"{name}_part", op.results[0].type.dtype
    parts = str(scope.program.symbols[op.symbol]["dtype"])
    wide = parts if parts in INTEGERS else "fp32"
    scope.writer.line(f"{total} = {part}0.to({TL_DTYPE[wide]})")
    for source in range(1, count):
        scope.writer.line(f"{total} += {part}{source}.to({TL_DTYPE[wide]})")
    scope.writer.line(f"{name} = {total}" + (f".to({TL_DTYPE[dtype]})" if dtype != wide else ""))


def _remote_sum(scope: Scope, op: Op, name: str) -> None:
    """A ``load_sum`` of what all ranks have put at one place of their own memories: loads over the link."""
    if op.operands:
        _folded_sum(scope, op, 0)
        return
    _, place, corner, offsets, mask, aligned = _everywhere(scope, op, name)
    scope.used.add(f"{name}_total")
    masked = [f"mask={mask}", "other=0"] if mask != "None" else []
    for source in range(scope.program.world):
        chosen, part = f"{name}_from{source}", f"{name}_part{source}"
        scope.used.update((chosen, part))
        dtype = TL_DTYPE[scope.program.symbols[op.symbol]["dtype"]]
        args = ["peers", str(source), place, corner, dtype, aligned]
        scope.writer.call(f"{chosen} = device.remote_tile(", args)
        args = [f"{chosen} + {offsets}", *masked, 'eviction_policy="evict_first"']
        scope.writer.call(f"{part} = tl.load(", args)
    _added(scope, op, name, scope.program.world)


def _folded_sum(scope: Scope, op: Op, step: int | Expr) -> None:
    """A ``load_sum`` whose term of this rank is a value: the primitive adds it in its place."""
    value = op.results[0]
    name, own = scope.names[value.name], scope.names[op.operands[0].name]
    dtype, world = value.type.dtype, str(scope.program.world)
    if op.operands[0].type.dtype in INTEGERS:
        # Said once more, for whoever reads the text: parts are added in the type of this one.
        own = f"{own}.to({TL_DTYPE[op.operands[0].type.dtype]})"
    rounded = f".to({TL_DTYPE[dtype]})" if dtype != "fp32" else ""
    if scope.arrived:
        scope.writer.call(f"{name} = roles.add_parts(", [own, scope.arrived, "rank", world])
        if rounded:
            scope.writer.line(f"{name} = {name}{rounded}")
        return
    tail = f"){rounded}"
    if op.get("remote"):
        primitive = "roles.sum_remote" if scope.grid[0] else "device.tile_sum_remote"
        scope.writer.call(f"{name} = {primitive}(", [own, *_there(scope, op, name)], tail)
        return
    primitive = "roles.sum_parts" if scope.grid[0] else "device.tile_sum_parts"
    scope.writer.call(f"{name} = {primitive}(", [own, *_arriving(scope, op, name, step)], tail)


def read_parts(scope: Scope, op: Op) -> str:
    """Ask for the parts that a ``load_sum`` behind a main loop with roles will add; the name of what comes."""
    value, ref = op.results[0], op.ref
    assert ref is not None
    name = scope.define(value)
    arrived = scope.fresh(f"{name}_arrived")
    if op.get("remote"):
        dtype = TL_DTYPE[scope.program.symbols[ref.symbol]["dtype"]]
        args = [*_there(scope, op, name), dtype]
        scope.writer.call(f"{arrived} = roles.read_remote(", args)
        return arrived
    step = strides(scope, ref.symbol)[0]
    scope.writer.call(f"{arrived} = roles.read_parts(", _arriving(scope, op, name, step))
    return arrived


def _arriving(scope: Scope, op: Op, name: str, step: int | Expr) -> list[str]:
    """Write where the parts of a folded sum lie; what the primitives that read them are told of that."""
    ref = op.ref
    assert ref is not None
    found = [a for a in axes(scope, op, ref)[1:] if a is not None]
    offsets, mask = _relative(scope, name, found)
    parts = f"{name}_parts"
    scope.used.add(parts)
    first, *rest = _corner(scope, base(scope, ref.symbol), found, token_of(scope, ref.symbol))
    scope.writer.line(f"{parts} = {first}")
    for term in rest:
        scope.writer.line(f"{parts} += {term}")
    if _aligned(found, step, item_bytes(str(scope.program.symbols[ref.symbol]["dtype"]))):
        scope.writer.line(f"{parts} = tl.multiple_of({parts}, 16)")
    return [
        f"{parts} + {offsets}",
        scope.expr(step),
        mask or "None",
        "rank",
        str(scope.program.world),
    ]


def _there(scope: Scope, op: Op, name: str) -> list[str]:
    """What the primitives that add the parts of other ranks' memories are told of a folded sum."""
    peers, place, corner, offsets, mask, aligned = _everywhere(scope, op, name)
    return [peers, place, corner, offsets, mask, "rank", str(scope.program.world), aligned]


def _everywhere(scope: Scope, op: Op, name: str) -> tuple[str, str, str, str, str, str]:
    """Write where a tile lies in the memory of every rank: the table of arenas, the byte at which the buffer
    begins, the tile's first element from there, offsets of the others from it, their mask, and whether each
    row of it begins at a multiple of 16 bytes."""
    ref = op.ref
    assert ref is not None
    decl = scope.program.symbols[ref.symbol]
    found = [a for a in axes(scope, op, ref) if a is not None]
    offsets, mask = _relative(scope, name, found)
    corner = f"{name}_at"
    scope.used.add(corner)
    first, *rest = _corner(scope, "", found, token_of(scope, ref.symbol)) or [
        "tl.cast(0, tl.int64)"
    ]
    scope.writer.line(f"{corner} = {first}")
    for term in rest:
        scope.writer.line(f"{corner} += {term}")
    aligned = str(_aligned(found, 0, item_bytes(str(decl["dtype"]))))
    return "peers", scope.program.offset(decl), corner, offsets, mask or "None", aligned


def _corner(scope: Scope, pointer: str, found: list[Axis], token: str) -> list[str]:
    """The terms of a pointer to the first element of a tile."""
    terms = [
        times(f"tl.cast({plus(axis.start)}, tl.int64)", scope.expr(axis.stride, 5))
        if axis.start != "0"
        else "0"
        for axis in found
    ]
    return [t for t in (pointer, *terms, token) if t not in ("", "0")]


def _aligned(found: list[Axis], step: int | Expr, size: int) -> bool:
    """Whether the first element of a tile always lies at a multiple of 16 bytes.

    Along the innermost axis it is what divides all starts of tiles that decides, along the others the stride too.
    """
    if not isinstance(step, int) or step * size % 16:
        return False
    for axis in found:
        if axis.start == "0":
            continue
        if not isinstance(axis.stride, int):
            return False
        if axis.stride * axis.unit * size % 16:
            return False
    return True


def _relative(scope: Scope, label: str, found: list[Axis]) -> tuple[str, str]:
    """Offsets of a tile's elements from its first, and the mask (empty: none)."""
    live = [a for a in found if a.dim is not None]
    vectors: list[str] = []
    masks: list[str] = []
    for position, axis in enumerate(live):
        assert axis.dim is not None
        lanes = scope.lanes(axis.name, axis.dim.block, position, len(live))
        lift = lifted(position, len(live))
        vectors.append(times(f"{lanes}{lift}", scope.expr(axis.stride, 5)))
        if not axis.dim.exact:
            # One number for all tiles where there is one: neighbours are in or out together, and are read at once.
            one = axis.own_start and axis.dim.bound
            inside = f"{plus(axis.start, lanes)} < {one}" if one else f"{lanes} < {axis.dim.length}"
            masks.append(f"({inside}){lift}")
    offsets = scope.writer.let(f"{label}_offsets", plus(*vectors))
    scope.used.add(offsets)
    return offsets, mask_of(scope, label, masks)
