"""Capacities of dynamic extents: a call with any number of rows runs the program of the next capacity.

A handful of programs serves all lengths: capacities of 16, 128 and from there on doubling, to 8192, are eight.
Below 128 rows weights are all that counts, except for the few rows that take a product of their own form. A
program is proven for the values from the capacity before its own on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, count
from typing import Any, TypeAlias

from tilelink.errors import choices
from tilelink.frontend.build import Request
from tilelink.frontend.errors import BadCall, NotDivisible
from tilelink.frontend.mapping import Mapping as TileMapping
from tilelink.frontend.mapping import Statement
from tilelink.ir import Expr, Op

LEAST = (16, 128)

# For each dynamic extent its capacities in increasing order; none: LEAST, and doubling from the last of them on.
Capacities: TypeAlias = "Mapping[str, tuple[int, ...]]"


def read_capacities(kernel: str, mapping: TileMapping, given: Any) -> dict[str, tuple[int, ...]]:
    """The dynamic extents of a kernel: those that the mapping marks, and those ``given``.

    ``given``: names, or a dict of name to capacities. BadCall where it is neither, or the mapping does not
    have such an extent.
    """
    found: dict[str, tuple[int, ...]] = dict.fromkeys(sorted(mapping.dynamic), ())
    if given is None:
        return found
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise BadCall(
            what=f"`dynamic` is a {type(given).__name__}", advice='name extents: dynamic=("M",)'
        )
    known = {
        str(dim)
        for statement in mapping.statements
        for dim in statement.dims
        if dim.op == "name" and str(dim) != "WORLD"
    }
    for name in names:
        named = given[name] if isinstance(given, Mapping) else ()
        several = isinstance(named, Iterable) and not isinstance(named, str)
        sizes = tuple(named) if several else (named,)
        if name not in known:
            raise BadCall(
                what=f"`{name}` is no extent of the mapping of `{kernel}`",
                advice=choices(name, sorted(known), "its extents"),
            )
        whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)
        if not whole or list(sizes) != sorted(set(sizes)):
            raise BadCall(
                what=f"the capacities of `{name}` are {list(sizes)}",
                advice="give whole numbers in increasing order",
            )
        found[name] = sizes
    return found


def unit_of(statements: Iterable[Statement], name: str, world: int) -> int:
    """What an extent is a multiple of: the number of ranks where they hold parts along it."""
    return world if any(s.over == name for s in statements) else 1


def capacity_of(name: str, value: int, unit: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(least value, capacity) of the program that serves ``value``.

    NotDivisible where it is no multiple of ``unit``, BadCall above the largest of ``sizes``.
    """
    if value % unit:
        raise NotDivisible(
            what=f"the extent `{name}`, {value},",
            unit=f"{unit}, the number of ranks",
            advice="each rank holds as many rows",
        )
    before = 0
    for size in sizes:
        up = -(-size // unit) * unit
        if value <= up:
            return before + unit, up
        before = up
    if sizes:
        raise BadCall(
            what=f"`{name}` is {value}, its largest capacity {before}",
            advice=f"give larger ones: dynamic={{{name!r}: (…, {value})}}",
        )
    for size in chain(LEAST, (LEAST[-1] << n for n in count(1))):
        up = -(-size // unit) * unit
        if value <= up:
            return before + unit, up
        before = up
    raise AssertionError("capacities without end")


def tied_to(kernel: Op, name: str) -> frozenset[str]:
    """The names that stand for the axes of arguments that are as long as extent ``name``, but not named so."""
    return frozenset(
        f"{tensor.symbol}_{axis}"
        for tensor in kernel.find("tensor")
        for axis, dim in enumerate(tensor["dims"])
        if dim == Expr.name(name)
    )


def at_capacity(
    request: Request,
    mapping: TileMapping,
    capacities: Capacities,
    tied: Mapping[str, frozenset[str]],
) -> tuple[Request, dict[str, int]]:
    """The request of the program that serves ``request``, and the values of its dynamic extents.

    In the program they have the next capacity. ``tied``: see :func:`tied_to`, for each of them.
    """
    extents, least = dict(request.extents), dict(request.least)
    found: dict[str, int] = {}
    for name, sizes in capacities.items():
        unit = unit_of(mapping.statements, name, request.world)
        names = {name, *tied[name]} & extents.keys()
        values = {extents[n] for n in names}
        if len(values) != 1:
            continue  # what is wrong with the arguments is found where the kernel is built
        (found[name],) = values
        low, capacity = capacity_of(name, found[name], unit, sizes)
        extents.update(dict.fromkeys(names, capacity))
        least[name] = low
    dynamic = request.dynamic | frozenset(capacities)
    return replace(request, extents=extents, least=least, dynamic=dynamic), found
