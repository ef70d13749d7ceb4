"""Mistakes of target: another rank, flag, tile, buffer or condition than the right one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tilelink.backend.mutate.sites import (
    SYNCHRONISATION,
    Mutant,
    Site,
    declared,
    dims,
    modulo,
    mutant,
    negated,
    sites,
    with_attr,
    with_index,
)
from tilelink.ir import At, Broadcast, Expr, Index, Op, Range, Ref, Value

_WORLD, _RANK = Expr.name("WORLD"), Expr.name("RANK")
_DATA = ("transfer", "store", "load", "load_sum")


def wrong_peer(program: Op) -> Iterator[Mutant]:
    """``peer`` of a notify, transfer or store -> the next rank, the rank itself."""
    for site in sites(program, "notify", "transfer", "store"):
        peer = site.op.get("peer")
        if peer is None:
            continue
        for what, other in (
            ("to the next rank", modulo(Expr.of(peer), 1, _WORLD)),
            ("to the own rank", _RANK),
        ):
            yield mutant(program, site, "re-target", what, with_attr(site.op, "peer", other))


def wrong_flag(program: Op) -> Iterator[Mutant]:
    """An element of the index of a wait, a notify or its ``through`` -> the next one."""
    kinds = declared(program)
    for site in sites(program, *SYNCHRONISATION):
        assert site.op.ref is not None
        for ref in _neighbours(site.op.ref, kinds[site.op.symbol]):
            op = replace(site.op, ref=ref)
            yield mutant(program, site, "re-target", f"at {ref}", op)
        through = site.op.get("through")
        for ref in _neighbours(through, kinds[through.symbol]) if through is not None else ():
            op = with_attr(site.op, "through", ref)
            yield mutant(program, site, "re-target", f"through {ref}", op)


def _neighbours(ref: Ref, declaration: Op) -> Iterator[Ref]:
    """References to the next element of each axis, and ranges that lack an end."""
    for axis, (element, size) in enumerate(zip(ref.index, dims(declaration), strict=False)):
        if isinstance(element, Expr):
            yield with_index(ref, axis, modulo(element, 1, size))
        elif isinstance(element, Range):
            yield with_index(ref, axis, Range(element.lo + 1, element.hi))
            yield with_index(ref, axis, Range(element.lo, element.hi - 1))


def wrong_tile(program: Op) -> Iterator[Mutant]:
    """A region that is read, written, sent or landed in -> the neighbouring one of the same size."""
    kinds = declared(program)
    for site in sites(program, *_DATA):
        assert site.op.ref is not None
        for ref in _shifted(site.op.ref, kinds, site, program):
            name = _class_of(site, kinds, "re-target")
            yield mutant(program, site, name, f"at {ref}", replace(site.op, ref=ref))
        for key in ("to", "own"):
            found = site.op.get(key)
            for ref in _shifted(found, kinds, site, program) if found is not None else ():
                op = with_attr(site.op, key, ref)
                yield mutant(program, site, "re-target", f"{key} {ref}", op)


def _class_of(site: Site, kinds: dict[str, Op], name: str) -> str:
    """The class of a change to what ``site`` accesses: local operands are nobody's communication."""
    declaration = kinds[site.op.symbol]
    local = declaration.name == "tensor" and declaration["move"] in ("local", "shard")
    return "wrong-operand" if local and site.op.name != "transfer" else name


def _shifted(ref: Ref, kinds: dict[str, Op], site: Site, program: Op) -> Iterator[Ref]:
    """References to the next tile, range or element along each axis, wrapping at its end."""
    declaration = kinds[ref.symbol]
    sizes = list(dims(declaration))
    if declaration.name == "tensor" and declaration.get("over") is not None:
        sizes[int(declaration["over"])] = sizes[int(declaration["over"])] // _WORLD
    places = [n for n, element in enumerate(ref.index) if not isinstance(element, Broadcast)]
    for place, size in zip(places, sizes, strict=False):
        other = _next(ref.index[place], size, site, program)
        if other is not None:
            yield with_index(ref, place, other)


def _next(element: Index, size: Expr, site: Site, program: Op) -> Index | None:
    """The neighbour of one element of an index on an axis of ``size`` elements; None: there is none."""
    if isinstance(element, Range):
        length = element.hi - element.lo
        known = _constant(length, program)
        if known is None or known == _constant(size, program):
            return None
        start = (element.lo + known) % size
        return Range(start, start + known)
    if isinstance(element, Value | At):
        value = element if isinstance(element, Value) else element.value
        if value.type.dtype == "int32":
            return modulo(Expr.name(value.name), 1, size)
        tile = _tile_length(value, site)
        start = Expr.name(f"{value.name}.start") if isinstance(element, Value) else element.start
        if tile is None or tile >= (_constant(size, program) or 0):
            return None  # it is the only tile
        return At(value, (start + tile) % size)
    return modulo(element, 1, size) if isinstance(element, Expr) else None


def _tile_length(value: Value, site: Site) -> int | None:
    """The tile length of a loop tile, from the loop that defines it."""
    for op in site.above:
        tiles = op.get("tile")
        for number, arg in enumerate(op.args):
            if arg == value and tiles is not None and number < len(tiles):
                return int(tiles[number])
    return None


def _constant(value: Expr, program: Op) -> int | None:
    """The value of an expression that is the same on every rank and in every task, else None."""
    env = {op.symbol: int(op["value"]) for op in program.find("extent")}
    env["WORLD"] = int(program["world"])
    found = set()
    for rank in range(env["WORLD"]):
        # Names of loops are given two values: what depends on one of them differs or is not known.
        others = value.names - env.keys() - {"RANK"}
        for trial in (0, 7):
            bound = {**env, "RANK": rank, **dict.fromkeys(others, trial)}
            found.add(int(value.evaluate(bound)))
    return found.pop() if len(found) == 1 else None


def wrong_buffer(program: Op) -> Iterator[Mutant]:
    """Another symbol of the same shape; ``own`` and ``when`` dropped or changed."""
    kinds = declared(program)
    for site in sites(program, *_DATA):
        assert site.op.ref is not None
        for ref in _same_shape(site.op.ref, kinds):
            name = _class_of(site, kinds, "wrong-buffer")
            yield mutant(program, site, name, f"{ref}", replace(site.op, ref=ref))
        target = site.op.get("to")
        for ref in _same_shape(target, kinds) if target is not None else ():
            op = with_attr(site.op, "to", ref)
            yield mutant(program, site, "wrong-buffer", f"to {ref}", op)
        if site.op.get("own") is not None:
            op = with_attr(with_attr(site.op, "own", None), "when", None)
            yield mutant(program, site, "wrong-buffer", "own data from the buffer", op)
        if site.op.name == "load_sum" and site.op.operands:
            op = replace(site.op, operands=())
            yield mutant(program, site, "wrong-buffer", "own part from the buffer", op)
        when = site.op.get("when")
        if isinstance(when, Expr):
            for what, other in (("inverted", negated(when)), ("next rank", _next_rank(when))):
                op = with_attr(site.op, "when", other)
                yield mutant(program, site, "wrong-buffer", f"when {what}", op)
    for site in sites(program, "collective"):
        ref = site.op["to"]
        for other_ref in _same_shape(ref, kinds):
            op = with_attr(site.op, "to", other_ref)
            yield mutant(program, site, "wrong-buffer", f"to {other_ref}", op)
        for kind in ("all_gather", "all_reduce", "reduce_scatter"):
            if kind != site.op["op"]:
                op = with_attr(site.op, "op", kind)
                yield mutant(program, site, "wrong-buffer", kind, op)


def _same_shape(ref: Ref, kinds: dict[str, Op]) -> Iterator[Ref]:
    """The same index of other tensors and buffers with as many axes of the same element type."""
    mine = kinds[ref.symbol]
    for name, other in kinds.items():
        alike = other.name in ("tensor", "buffer") and other.get("dtype") == mine.get("dtype")
        if alike and name != ref.symbol and len(other["dims"]) == len(mine["dims"]):
            yield Ref(name, ref.index)


def _next_rank(condition: Expr) -> Expr:
    return condition.substitute({"RANK": modulo(_RANK, 1, _WORLD)})


def wrong_tasks(program: Op) -> Iterator[Mutant]:
    """A stage of some blocks -> one more or less, those of the next rank; of some tasks -> one more or less."""
    for site in sites(program, "stage"):
        if site.op.get("positions") is not None:
            lo, hi = site.op["positions"]
            for first, last in ((lo - 1, hi), (lo + 1, hi), (lo, hi - 1), (lo, hi + 1)):
                if 0 <= first < last:
                    op = with_attr(site.op, "positions", (first, last))
                    yield mutant(program, site, "wrong-tasks", f"{first} to {last}", op)
        segments, visit = site.op.get("segments"), site.op.get("visit")
        if segments is None:
            continue
        for by in (-1, 1):
            if int(segments) + by > 0:
                op = with_attr(site.op, "segments", int(segments) + by)
                yield mutant(program, site, "wrong-tasks", f"segments {by:+}", op)
        if isinstance(visit, Expr):
            other = visit.substitute({"RANK": modulo(_RANK, 1, _WORLD)})
            op = with_attr(site.op, "visit", other)
            yield mutant(program, site, "wrong-tasks", "blocks of the next rank", op)


def guard(program: Op) -> Iterator[Mutant]:
    """``if`` inverted, of the next rank, dropped; a loop over ranks that begins or ends elsewhere."""
    for site in sites(program, *SYNCHRONISATION, "transfer"):
        condition = site.op.get("if")
        if isinstance(condition, Expr):
            for what, other in (
                ("if inverted", negated(condition)),
                ("if of the next rank", _next_rank(condition)),
                ("unconditional", None),
            ):
                yield mutant(program, site, "guard", what, with_attr(site.op, "if", other))
    for site in sites(program, "for_range"):
        if any(op.name == "finish" for op in site.above):
            continue
        lo, hi = Expr.of(site.op["lo"]), Expr.of(site.op["hi"])
        for key, other in (("lo", lo - 1), ("lo", lo + 1), ("hi", hi - 1), ("hi", hi + 1)):
            value = other.value
            if value is None or value >= 0:
                op = with_attr(site.op, key, other)
                yield mutant(program, site, "guard", f"{key} = {other}", op)
