"""Mistakes of number: counts, epochs, equality, and the bytes of the arena."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tilelink.backend.mutate.sites import (
    SYNCHRONISATION,
    Mutant,
    declared,
    mutant,
    number,
    sites,
    with_attr,
)
from tilelink.ir import Expr, Op, Ref


def wrong_count(program: Op) -> Iterator[Mutant]:
    """``count`` -> one more, one less; the counter -> another one of as many axes."""
    kinds = declared(program)
    for site in sites(program, *SYNCHRONISATION):
        kind = kinds[site.op.symbol].name
        counted = kind == "counter" if site.op.name == "wait" else "count" in dict(site.op.attrs)
        if counted:
            count = number(site.op.get("count"), 1)
            for by in (1, -1):
                if (count + by).value != 0 or site.op.name == "wait":
                    op = with_attr(site.op, "count", count + by)
                    yield mutant(program, site, "wrong-count", f"count {count + by}", op)
        ref = site.op.ref
        for name in _others(ref, kinds, kind):
            op = replace(site.op, ref=Ref(name, ref.index)) if ref is not None else site.op
            yield mutant(program, site, "wrong-count", f"at @{name}", op)
    for site in sites(program, "notify"):
        through = site.op.get("through")
        for name in _others(through, kinds, "counter"):
            op = with_attr(site.op, "through", Ref(name, through.index))
            yield mutant(program, site, "wrong-count", f"through @{name}", op)


def _others(ref: Ref | None, kinds: dict[str, Op], kind: str) -> list[str]:
    """Flags or counters other than that of ``ref``, with as many axes."""
    if ref is None:
        return []
    fit = [n for n, op in kinds.items() if op.name == kind and len(op["dims"]) == len(ref.index)]
    return [name for name in fit if name != ref.symbol]


def stale(program: Op) -> Iterator[Mutant]:
    """The epoch that a wait asks for -> of the call before, of the call after."""
    kinds = declared(program)
    for site in sites(program, "wait"):
        if kinds[site.op.symbol].name == "flag":
            epoch = number(site.op.get("epoch"), 0)
            for by in (-1, 1):
                value = epoch + by
                op = with_attr(site.op, "epoch", None if value.value == 0 else value)
                yield mutant(program, site, "stale", f"epoch {by:+}", op)


def equality(program: Op) -> Iterator[Mutant]:
    """``wait`` -> until the word is exactly this; of a count, exactly one less."""
    kinds = declared(program)
    for site in sites(program, "wait"):
        if site.op.get("compare") is not None:
            continue
        op = with_attr(site.op, "compare", "equal")
        yield mutant(program, site, "equality", "exactly", op)
        if kinds[site.op.symbol].name == "counter":
            fewer = with_attr(op, "count", number(site.op.get("count"), 1) - 1)
            yield mutant(program, site, "equality", "exactly one less", fewer)


def memory(program: Op) -> Iterator[Mutant]:
    """Two things in one place, a buffer, flag or counter that is too small, an arena that is."""
    kinds = {name: op for name, op in declared(program).items() if op.name != "tensor"}
    for site in sites(program, "buffer", "flag", "counter"):
        mine = site.op
        for name, other in kinds.items():
            alike = other.name == mine.name and other.get("space") == mine.get("space")
            placed = mine.get("offset") is not None and other.get("offset") is not None
            if (
                alike
                and placed
                and name != mine.symbol
                and other.get("offset") != mine.get("offset")
            ):
                op = with_attr(mine, "offset", other["offset"])
                yield mutant(program, site, "memory", f"at the offset of @{name}", op)
        if mine.name == "buffer" and mine.get("space") == "local":
            for name, other in declared(program).items():
                same = other.get("dims") == mine["dims"] and other.get("dtype") == mine["dtype"]
                if same and name != mine.symbol and mine.get("alias") != Ref(name):
                    op = with_attr(with_attr(mine, "offset", None), "alias", Ref(name))
                    yield mutant(program, site, "memory", f"in the memory of @{name}", op)
        sizes = tuple(mine["dims"])
        for axis, size in enumerate(sizes):
            less = Expr.of(size) - 1
            if less.value is None or less.value > 0:
                op = with_attr(mine, "dims", (*sizes[:axis], less, *sizes[axis + 1 :]))
                yield mutant(program, site, "memory", f"axis {axis} one short", op)
    for key in ("bytes", "workspace"):
        if program.get(key):
            short = with_attr(program, key, int(program[key]) // 2)
            yield Mutant("memory", f"{key} halved", program.span, short)
