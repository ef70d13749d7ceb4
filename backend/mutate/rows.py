"""Mistakes of programs with a dynamic extent: its value taken for the capacity, at one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tilelink.backend.mutate.sites import Mutant, mutant, sites
from tilelink.ir import At, Expr, Op, Range, Ref, dynamic_extents


def frozen_rows(program: Op) -> Iterator[Mutant]:
    """An expression of the dynamic extent -> its value at the capacity, in one index or attribute of one op."""
    for extent in dynamic_extents(program):
        values = {extent.symbol: int(extent["value"])}
        names = ("buffer", "stage", "load", "store", "transfer", "wait", "notify")
        for site in sites(program, *names):
            for changed in _changes(site.op, values):
                what = f"{extent.symbol} as at the capacity"
                yield mutant(program, site, "frozen-rows", what, changed)


def _changes(op: Op, values: dict[str, int]) -> Iterator[Op]:
    if op.ref is not None:
        for ref in _refs(op.ref, values):
            yield replace(op, ref=ref)
    yield from _attributes(op, values)


def _attributes(op: Op, values: dict[str, int]) -> Iterator[Op]:
    for number, (key, value) in enumerate(op.attrs):
        # Where segments and their number are given, the extent of a queue says nothing; and which worker has the
        # first place of it says nothing of what is computed.
        if (key == "extent" and op.get("live") is not None) or key == "first":
            continue
        for other in _values(value, values):
            attrs = (*op.attrs[:number], (key, other), *op.attrs[number + 1 :])
            yield replace(op, attrs=attrs)


def _values(value: Any, values: dict[str, int]) -> Iterator[Any]:
    """``value`` with each of its expressions that names the extent frozen, one at a time."""
    if isinstance(value, Expr):
        if value.names & values.keys():
            frozen = value.substitute(values)
            yield frozen if frozen.value is None else frozen.value
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            for other in _values(item, values):
                yield (*value[:number], other, *value[number + 1 :])
    elif isinstance(value, Ref):
        yield from _refs(value, values)


def _refs(ref: Ref, values: dict[str, int]) -> Iterator[Ref]:
    for number, item in enumerate(ref.index):
        parts: list[Any] = []
        if isinstance(item, At):
            parts = [replace(item, start=Expr.of(e)) for e in _values(item.start, values)]
        elif isinstance(item, Range):
            parts = [replace(item, hi=Expr.of(e)) for e in _values(item.hi, values)]
            parts += [replace(item, lo=Expr.of(e)) for e in _values(item.lo, values)]
        elif isinstance(item, Expr):
            parts = [Expr.of(e) for e in _values(item, values)]
        for part in parts:
            yield replace(ref, index=(*ref.index[:number], part, *ref.index[number + 1 :]))
