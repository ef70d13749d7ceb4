"""Tensors of a kernel: their extents as uses show them, and loads and stores of them."""

from __future__ import annotations

from collections.abc import Mapping as Map
from dataclasses import dataclass, field
from typing import Any

from tilelink.errors import Span
from tilelink.frontend.builder import Builder
from tilelink.frontend.errors import (
    DtypeMismatch,
    GatheredStore,
    IndexPastEnd,
    NeverStored,
    PartialStore,
    ShapeMismatch,
    StoreAfterSum,
    UnmappedRead,
    UnsupportedSyntax,
    WrongRank,
)
from tilelink.frontend.extents import Extents
from tilelink.frontend.mapping import Mapping, Statement
from tilelink.frontend.values import MovedTile, Num, TileVar, describe
from tilelink.ir import INTEGERS, All, At, Expr, Index, Range, Ref, Type, Value, make

MOVED = {
    "gather": "gathered",
    "ring": "gathered along a ring",
    "scatter": "scattered",
    "reduce": "reduced",
    "shard": "sharded",
    "exchange": "exchanged",
    "combine": "combined",
}
# Reading one of these gives the sum of what all ranks stored.
SUMMED = ("scatter", "reduce")


def mapping_extents(mapping: Mapping) -> frozenset[str]:
    """The names of all extents that a mapping writes in shapes."""
    shapes = [
        dims
        for s in mapping.statements
        for dims in (s.dims, *(v for k, v in s.extra if k.endswith("_dims")))
    ]
    return frozenset(n for dims in shapes for dim in dims for n in dim.names) - {"WORLD", "RANK"}


def map_tables(statement: Statement) -> list[tuple[str, tuple[Expr, ...]]]:
    """The integer tensors that the maps of a statement read, with their indices."""
    found: list[tuple[str, tuple[Expr, ...]]] = []

    def visit(expr: Expr) -> None:
        if expr.op == "table":
            found.append((str(expr.args[0]), tuple(expr.args[1:])))
        for part in expr.args:
            if isinstance(part, Expr):
                visit(part)

    for expr in (statement.owner, statement.signal):
        if expr is not None:
            visit(expr)
    return found


@dataclass(slots=True)
class Facts:
    """What one round of lowering learns for the next: extents, dims, element types.

    ``version`` grows with every new fact; the kernel is final once a round learns nothing.
    """

    extents: Extents
    dims: dict[str, list[Expr]] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)
    learned: int = 0

    @property
    def version(self) -> int:
        """Grows with every fact."""
        return self.learned + self.extents.version

    def set_rank(self, name: str, rank: int) -> list[Expr]:
        """The dims of tensor ``name``, made up of placeholders where nothing is known yet."""
        if name not in self.dims:
            self.dims[name] = [self.placeholder(name, axis) for axis in range(rank)]
            self.learned += 1
        return self.dims[name]

    def placeholder(self, name: str, axis: int) -> Expr:
        """The extent of an axis that has no name yet."""
        extent = f"{name}_{axis}"
        self.extents.introduce(extent, f"axis {axis} of `{name}`")
        return Expr.name(extent)


@dataclass(frozen=True, slots=True)
class Access:
    """One load or store: ``order`` counts the kernel's outermost ops before it; ``dead``: it never runs."""

    tensor: str
    is_store: bool
    order: int
    span: Span
    dead: bool = False


class Tensors:
    """Loads and stores of one round of lowering."""

    def __init__(
        self, builder: Builder, facts: Facts, statements: Map[str, Statement], dtypes: Map[str, str]
    ) -> None:
        self.builder = builder
        self.facts = facts
        self.statements = statements
        self.dtypes = dict(dtypes)
        self.temps: set[str] = set()
        self.accesses: list[Access] = []
        # Loops of which each rank runs its own part: variable to (tensor, axis's extent).
        self.own: dict[str, tuple[str, Expr]] = {}
        self._walked: dict[str, Expr] = {}
        self._partial: list[tuple[str, str, Span]] = []

    def kind(self, name: str) -> str:
        """How the tensor moves."""
        statement = self.statements.get(name)
        return "local" if statement is None else statement.kind

    def dtype(self, name: str) -> str:
        """The element type of a tensor."""
        return "int32" if name in self.facts.integers else self.dtypes[name]

    def over(self, name: str) -> int | None:
        """The number of the axis that is shared out among the ranks, or None."""
        statement = self.statements.get(name)
        if statement is None or statement.over is None:
            return None
        return statement.dims.index(Expr.name(statement.over))

    def load(self, name: str, index: list[Any], span: Span, hint: str | None) -> Value:
        """Emits a load of ``name[index]``; None in ``index`` adds an axis."""
        places = [item for item in index if item is not None]
        elements, shape = self._index(name, places, span, "read")
        self._note(name, False, span)
        type_ = Type(self.dtype(name), shape)
        ref = Ref(name, elements)
        value = self.builder.emit("load", (), type_, span, hint or name.lower(), ref)
        self.builder.origin[value.name] = frozenset((name,))
        return self.expand(value, index, elements, span)

    def expand(
        self, value: Value, index: list[Any], elements: tuple[Index, ...], span: Span
    ) -> Value:
        """``value`` with the axes that None in ``index`` adds."""
        axis, rest = 0, iter(elements)
        for item in index:
            if item is None:
                shape = list(value.type.shape)
                shape.insert(axis, "1")
                type_ = Type(value.type.dtype, tuple(shape))
                value = self.builder.emit(
                    "expand", (value,), type_, span, value.name.split(".")[0], axis=axis
                )
                axis += 1
            elif not _drops_axis(next(rest)):
                axis += 1
        return value

    def store(self, name: str, index: list[Any], value: Any, span: Span) -> None:
        """Emits a store of ``value`` to ``name[index]``, rounded to the tensor's element type."""
        elements, shape = self._index(name, index, span, "store")
        dtype = self.dtype(name)
        value = self.builder.literal(value)
        if isinstance(value, int | float) and shape:
            type_ = Type(dtype, shape)
            if value == 0:
                value = self.builder.emit("zeros", (), type_, span)
            else:
                value = self.builder.emit("full", (), type_, span, value=float(value))
        stored = self.builder.data(value, span, dtype)
        same = len(stored.type.shape) == len(shape) and all(
            self.builder.same_dim(a, b) for a, b in zip(stored.type.shape, shape, strict=True)
        )
        if not same:
            raise ShapeMismatch(
                span,
                left=f"a value of shape `[{', '.join(stored.type.shape)}]`",
                right=f"this tile of `{name}`, of shape `[{', '.join(shape)}]`",
                advice="store a value of the shape of the indexed tile",
            )
        stored = self.builder.cast(stored, dtype, span, name.lower())
        self._note(name, True, span)
        ref = Ref(name, elements)
        self.builder.append(make("store", ref=ref, operands=(stored,), span=span))

    def _note(self, name: str, is_store: bool, span: Span) -> None:
        self.accesses.append(Access(name, is_store, len(self.builder.stack[0]), span))

    def _index(
        self, name: str, index: list[Any], span: Span, access: str
    ) -> tuple[tuple[Index, ...], tuple[str, ...]]:
        dims = self.facts.set_rank(name, len(index))
        if len(dims) != len(index):
            raise WrongRank(
                span,
                tensor=name,
                rank=len(dims),
                axes="axis" if len(dims) == 1 else "axes",
                given=len(index),
                are="is" if len(index) == 1 else "are",
            )
        over = self.over(name)
        elements: list[Index] = []
        shape: list[str] = []
        for axis, (item, dim) in enumerate(zip(index, dims, strict=True)):
            element, length = self._element(name, axis, item, dim, span, access)
            elements.append(element)
            if length is not None:
                shape.append(length)
            self._check_part(name, axis, over, item, dim, span, access)
        if sum(isinstance(e, Value) and bool(e.type.shape) for e in elements) > 1:
            raise UnsupportedSyntax(
                span,
                what="more than one integer tile in an index",
                advice="join them in one index: `rows * N + columns` into a flat tensor",
            )
        return tuple(elements), tuple(shape)

    def _element(
        self, name: str, axis: int, item: Any, dim: Expr, span: Span, access: str
    ) -> tuple[Index, str | None]:
        """The IR form of one index, and the dimension it gives (None: the axis goes)."""
        builder = self.builder
        if isinstance(item, TileVar):
            self._check_extent(name, item, dim, span)
            return item.value, item.value.name
        if isinstance(item, MovedTile):
            if self.kind(name) in MOVED:
                self._refuse(
                    name,
                    span,
                    access,
                    "index it with the loop tile itself, not with arithmetic on it",
                )
            if item.start is None:
                raise UnsupportedSyntax(
                    span,
                    what=f"a stepped tile `{item.tile.value.name}` in an index",
                    advice="shift a tile with `m + 128`, or index with `2 * m.index`",
                )
            return At(item.tile.value, item.start), item.tile.value.name
        if isinstance(item, slice):
            return self._slice(name, axis, item, dim, span, access)
        item = item if isinstance(item, Num | Value) else builder.literal(item)
        if (
            isinstance(item, Num)
            and item.expr.op == "name"
            and item.expr.args[0] in builder.scalars
        ):
            item = builder.scalar(item.expr, span)
            self._size_by_loop(item, dim)
        if isinstance(item, Num):
            return builder.extents.canonical(item.expr), None
        if isinstance(item, int) and not isinstance(item, bool):
            if item < 0:
                raise UnsupportedSyntax(
                    span,
                    what=f"the negative index `{item}`",
                    advice="count from the start of the axis",
                )
            self._check_inside(name, axis, item, item + 1, f"index {item}", dim, span)
            return Expr.const(item), None
        if isinstance(item, Value):
            builder.used_as_index(item)
            if item.type.dtype not in INTEGERS:
                self._refuse_dtype(item, span)
            if len(item.type.shape) > 1:
                raise UnsupportedSyntax(
                    span,
                    what=f"an index tile of shape `[{', '.join(item.type.shape)}]`",
                    advice="index with a vector: `rows = table[m]`, then `A[rows, k]`",
                )
            return item, item.type.shape[0] if item.type.shape else None
        raise UnsupportedSyntax(
            span,
            what=f"{describe(item)} as an index",
            advice="index with tile variables, integers, integer tiles or `:`",
        )

    def _check_inside(
        self, name: str, axis: int, lo: int, hi: int, part: str, dim: Expr, span: Span
    ) -> None:
        """IndexPastEnd where the known interval [lo, hi) is empty or leaves an axis of known length."""
        length = self.facts.extents.known(dim)
        if lo < 0 or hi <= lo or (length is not None and hi > length):
            fault = f"is past the end: it has {length} elements"
            if hi <= lo or lo < 0:
                fault = "is empty" if hi <= lo else "begins before the first element"
            raise IndexPastEnd(
                span,
                part=part,
                axis=axis,
                tensor=name,
                fault=fault,
                advice="indices start at 0, and a slice `lo:hi` takes at least one element",
            )

    def _slice(
        self, name: str, axis: int, item: slice, dim: Expr, span: Span, access: str
    ) -> tuple[Index, str]:
        if item.step is not None:
            if self.kind(name) in MOVED:
                self._refuse(
                    name, span, access, "take every element of the axis; a step is not a tile"
                )
            raise UnsupportedSyntax(
                span,
                what="a slice with a step",
                advice="index with an integer tile such as `2 * m.index`",
            )
        if item.start is None and item.stop is None:
            return All(), self.builder.dim(dim)
        bounds = [
            Expr.const(bound)
            if isinstance(bound, int)
            else bound.expr
            if isinstance(bound, Num)
            else None
            for bound in (
                0 if item.start is None else item.start,
                dim.value or Num(dim) if item.stop is None else item.stop,
            )
        ]
        lo, hi = bounds
        if lo is None or hi is None:
            raise UnsupportedSyntax(
                span,
                what="a slice whose bounds are known only when the kernel runs",
                advice="loop over it: `for s in tk.tiles(lo, hi)`",
            )
        lo, hi = self.facts.extents.canonical(lo), self.facts.extents.canonical(hi)
        try:
            first, last = self.facts.extents.known(lo), self.facts.extents.known(hi)
        except ZeroDivisionError:
            raise UnsupportedSyntax(
                span,
                what=f"the slice `{lo}:{hi}`, which divides by zero for these extents,",
                advice="correct the bounds, or the extents",
            ) from None
        if first is not None and last is not None:
            self._check_inside(name, axis, first, last, f"the slice `{first}:{last}`", dim, span)
        return Range(lo, hi), self.builder.dim(hi - lo)

    def _size_by_loop(self, scalar: Value, dim: Expr) -> None:
        """An axis that nothing else sizes is as long as the loop whose scalar indexes it."""
        extents = self.facts.extents
        length = self.builder.ranges.get(scalar.name)
        unsized = extents.known(dim) is None and extents.is_placeholder(extents.canonical(dim))
        if length is not None and unsized:
            extents.agree(length, dim)

    def _check_extent(self, name: str, tile: TileVar, dim: Expr, span: Span) -> None:
        extents = self.facts.extents
        if tile.extent is None:
            # Bounds say no extent: an axis that nothing else sizes is as long as the first one indexed.
            first = self._walked.setdefault(tile.value.name, dim)
            if extents.known(dim) is None and extents.is_placeholder(extents.canonical(dim)):
                extents.agree(first, dim)
            return
        if extents.agree(tile.extent, dim):
            return
        walked, whole = extents.known(tile.extent), extents.known(dim)
        if (
            extents.canonical(dim).op != "name"
            and walked is not None
            and whole is not None
            and walked <= whole
        ):
            return
        raise ShapeMismatch(
            span,
            left=f"{extents.show(tile.extent)}, which `{tile.value.name}` walks,",
            right=f"{extents.show(dim)}, the extent of this axis of `{name}`",
            advice="index an axis with a tile of its own extent",
        )

    def _check_part(
        self, name: str, axis: int, over: int | None, item: Any, dim: Expr, span: Span, access: str
    ) -> None:
        """Notes loops that run this rank's part only, and outputs that are stored in such a loop."""
        kind = self.kind(name)
        variable = item.value.name if isinstance(item, TileVar) else None
        if variable is None and isinstance(item, Num) and item.expr.op == "name":
            variable = item.expr.args[0]
        if access == "store" and variable is not None and (axis != over or kind == "scatter"):
            self._partial.append((name, variable, span))
        if axis != over:
            return
        owned = kind == "shard" or (access == "read" and kind == "scatter")
        owned = owned or (access == "store" and kind in ("gather", "ring"))
        if not owned:
            return
        if variable is None or (isinstance(item, TileVar) and item.extent is None):
            self._refuse(
                name,
                span,
                access,
                f"each rank holds its part of `{dim}` only: index that axis with a tile of `tk.tiles({dim})`",
            )
        else:
            self.own.setdefault(variable, (name, dim))

    def check(self, outputs: frozenset[str]) -> None:
        """Checks the order of stores and sums, and outputs written in part, once all is lowered."""
        for name in sorted(self.statements):
            if self.kind(name) in SUMMED:
                self._check_sums(name)
        for name in sorted(outputs):
            stores = [a for a in self.accesses if a.tensor == name and a.is_store]
            if stores and all(a.dead for a in stores):
                raise NeverStored(stores[0].span, tensor=name)
        for access in self.accesses:
            kind = self.kind(access.tensor)
            if access.is_store and access.tensor in outputs and kind in ("gather", "ring"):
                raise GatheredStore(access.span, tensor=access.tensor, moved=MOVED[kind])
        for name, variable, span in self._partial:
            # What is summed is whole on each rank too: its contribution to all of the sum.
            whole = self.kind(name) in SUMMED or (name in outputs and self.over(name) is None)
            if variable in self.own and whole:
                extent = self.own[variable][1]
                dims = ", ".join(self.builder.dim(d) for d in self.facts.dims[name])
                raise PartialStore(span, tensor=name, extent=str(extent), dims=dims)

    def _check_sums(self, name: str) -> None:
        stores = [a for a in self.accesses if a.tensor == name and a.is_store]
        for load in (a for a in self.accesses if a.tensor == name and not a.is_store):
            late = [store for store in stores if store.order >= load.order]
            if late:
                inside = late[0].order == load.order and bool(self.builder.stack)
                where = (
                    f"in the same loop, on line {load.span.line}"
                    if inside
                    else f"before, on line {load.span.line}"
                )
                raise StoreAfterSum(late[-1].span, tensor=name, where=where)
            if not stores:
                self._refuse(
                    name, load.span, "read", f"store every rank's contribution to `{name}` first"
                )

    def _refuse(self, name: str, span: Span, access: str, advice: str) -> None:
        raise UnmappedRead(
            span, tensor=name, moved=MOVED[self.kind(name)], access=access, advice=advice
        )

    def _refuse_dtype(self, item: Value, span: Span) -> None:
        raise DtypeMismatch(
            span,
            what=f"an index is an integer, but this one is {item.type.dtype}",
            advice="index with int32 or int64 tiles",
        )


def _drops_axis(element: Index) -> bool:
    return isinstance(element, Expr) or (
        isinstance(element, Value) and not element.type.is_tile and not element.type.shape
    )
