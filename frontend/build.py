"""From a kernel's source and mapping to its Tile IR, for given extents and element types."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping as Map
from dataclasses import dataclass, field
from typing import Any

from tilelink.errors import InternalError, Span, choices, did_you_mean
from tilelink.frontend.builder import Builder
from tilelink.frontend.errors import (
    BadCall,
    DtypeMismatch,
    MissingExtent,
    NoOutput,
    NotAnExtent,
    NotDivisible,
    UnknownName,
    WrongRank,
)
from tilelink.frontend.extents import Extents
from tilelink.frontend.lower import Lowerer
from tilelink.frontend.mapping import Mapping, Statement
from tilelink.frontend.source import FunctionSource
from tilelink.frontend.tensors import Facts, Tensors, map_tables
from tilelink.frontend.validate import check_extents, check_kernel, check_world
from tilelink.frontend.values import Num, TensorRef
from tilelink.ir import DTYPES, INTEGERS, Block, Expr, Op, Ref, Type, make

ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Request:
    """What a kernel is built for.

    ``present`` names the tensor parameters that are given; ``constants`` are compile-time arguments;
    ``scalars`` maps the run-time scalar parameters to their element types; ``ranks`` gives numbers of
    axes that are known from arguments. ``dtype`` is that of tensors that ``dtypes`` does not name, but
    those that are ``stored`` to: they have the first one's.
    ``dynamic`` are extents whose values here are capacities, beside those that the mapping marks; ``least``
    gives the smallest values that they will have, 1 where there is none.
    """

    extents: Map[str, int]
    dtypes: Map[str, str]
    world: int
    present: frozenset[str]
    constants: Map[str, Any] = field(default_factory=dict)
    scalars: Map[str, str] = field(default_factory=dict)
    ranks: Map[str, int] = field(default_factory=dict)
    dtype: str = "bf16"
    dynamic: frozenset[str] = frozenset()
    least: Map[str, int] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()


def build_kernel(source: FunctionSource, mapping: Mapping, request: Request) -> Op:
    """The typed kernel; an error of `tilelink.frontend.errors` where the source is wrong.

    Lowering is repeated until a round learns nothing new about extents, axes and element types: a tensor
    that the mapping does not place shows its axes only where it is indexed.
    """
    check_world(request.world)
    check_extents(request.extents)
    statements = _place(mapping, source, request)
    facts = _initial_facts(mapping, statements, request)
    for _ in range(ROUNDS):
        before = facts.version
        result = _Round(source, mapping, statements, facts, request)
        result.lower()
        if facts.version == before:
            kernel = result.finish()
            if not any(op["role"] in ("out", "inout") for op in kernel.find("tensor")):
                raise NoOutput(kernel.span, kernel=source.name)
            check_kernel(kernel)
            return kernel
    raise InternalError(source.span(source.node), detail="the extents of a kernel do not settle")


def _place(mapping: Mapping, source: FunctionSource, request: Request) -> dict[str, Statement]:
    """The statements by tensor, without those of optional tensors that are absent."""
    params = inspect.signature(source.function).parameters
    return {
        s.tensor: s
        for s in mapping.statements
        if s.tensor not in params or s.tensor in request.present
    }


def _initial_facts(mapping: Mapping, statements: dict[str, Statement], request: Request) -> Facts:
    rigid: dict[str, None] = {}
    dims: dict[str, list[Expr]] = {}
    integers: set[str] = set()
    for statement in statements.values():
        dims[statement.tensor] = list(statement.dims)
        extra = dict(statement.extra)
        for key in ("table", "into", "offsets"):
            if key in extra and f"{key}_dims" in extra:
                dims.setdefault(str(extra[key]), list(extra[f"{key}_dims"]))
        integers |= {str(extra[key]) for key in ("offsets",) if key in extra}
        if "table" in extra and extra["table"] not in request.dtypes:
            integers.add(str(extra["table"]))
    for shape in dims.values():
        for name in sorted(
            frozenset[str]().union(*(dim.names for dim in shape)) - {"WORLD", "RANK"}
        ):
            rigid.setdefault(name)
    dynamic = mapping.dynamic | request.dynamic
    extents = Extents(dict(request.extents), request.world, frozenset(rigid), dynamic)
    for name in rigid:
        extents.introduce(name, name)
    facts = Facts(extents, dims, integers)
    for name, rank in request.ranks.items():
        if name in dims and len(dims[name]) != rank:
            placed = statements.get(name)
            raise WrongRank(
                None if placed is None else placed.span,
                tensor=name,
                rank=len(dims[name]),
                axes="axes",
                given=rank,
                are="are",
            )
        facts.set_rank(name, rank)
    for statement in statements.values():
        for table, index in map_tables(statement):
            _place_table(facts, statement, table, index, request)
    return facts


def _place_table(
    facts: Facts, statement: Statement, table: str, index: tuple[Expr, ...], request: Request
) -> None:
    """Gives an integer tensor that a map reads its axes: one that `e` indexes is as long as `over`."""
    dims = facts.set_rank(table, len(index))
    if table not in request.dtypes:
        facts.integers.add(table)
    for dim, item in zip(dims, index, strict=False):
        if item == Expr.name("e") and statement.over is not None:
            facts.extents.agree(Expr.name(statement.over), dim)


class _Round:
    """One lowering of the whole kernel."""

    def __init__(
        self,
        source: FunctionSource,
        mapping: Mapping,
        statements: dict[str, Statement],
        facts: Facts,
        request: Request,
    ) -> None:
        self.source = source
        self.mapping = mapping
        self.statements = statements
        self.facts = facts
        self.request = request
        self.parameters = inspect.signature(source.function).parameters
        reserved = {"WORLD", "RANK", *facts.extents.labels, *facts.extents.values}
        self.builder = Builder(facts.extents, frozenset(reserved))
        self.tensors = Tensors(self.builder, facts, statements, self._dtypes())
        self.lowerer = Lowerer(self.builder, self.tensors)

    def _dtypes(self) -> dict[str, str]:
        """Element types of parameters and of what exchanges fill."""
        given = self.request.dtypes
        for name in sorted(given):
            if given[name] not in DTYPES:
                raise DtypeMismatch(
                    what=f"`{name}` is {given[name]}, which kernels do not know",
                    advice=choices(given[name], DTYPES, "use one of"),
                )
        tensors = [n for n in self.parameters if n in self.request.present]
        default, stored = self.request.dtype, self.request.stored
        first = next(
            (given.get(n, default) for n in tensors if n in given or n not in stored), default
        )
        dtypes = {n: given.get(n, first if n in stored else default) for n in tensors}
        for statement in self.statements.values():
            extra = dict(statement.extra)
            if "into" in extra:
                moved = dtypes.get(statement.tensor, first)
                dtypes[extra["into"]] = given.get(extra["into"], moved)
            if "offsets" in extra:
                dtypes[extra["offsets"]] = "int32"
            if "table" in extra and extra["table"] not in given:
                dtypes[extra["table"]] = "int32"
        return dtypes

    def lower(self) -> None:
        """Lowers the body, and learns which tensors hold integers."""
        names: dict[str, Any] = {}
        for name in self.parameters:
            if name in self.request.present:
                names[name] = TensorRef(name)
            elif name in self.facts.extents.rigid:
                names[name] = Num(Expr.name(name))
            elif name in self.request.constants:
                names[name] = self.request.constants[name]
            elif name in self.request.scalars:
                names[name] = self._scalar(name, self.request.scalars[name])
            else:
                names[name] = None
        for statement in self.statements.values():
            extra = dict(statement.extra)
            for key in ("into", "offsets", "table"):
                if key in extra and extra[key] not in names:
                    names[extra[key]] = TensorRef(str(extra[key]))
        try:
            self.lowerer.kernel(self.source, names)
        except (DtypeMismatch, NotAnExtent):
            if not self._learn_integers():
                raise
        else:
            self._learn_integers()

    def _scalar(self, name: str, dtype: str) -> Any:
        span = self.source.span(self.source.node)
        value = self.builder.emit("param", (), Type(dtype), span, name, Ref(name))
        return Num(Expr.name(value.name)) if dtype in INTEGERS else value

    def _learn_integers(self) -> bool:
        """Whether a tensor of no given element type turns out to be read as an index."""
        found = self.builder.indices - self.facts.integers - set(self.request.dtypes)
        found &= set(self.tensors.dtypes)
        if found:
            self.facts.integers |= found
            self.facts.learned += 1
        return bool(found)

    # --- the kernel op -------------------------------------------------------------------------

    def finish(self) -> Op:
        """The kernel, once no fact changes any more."""
        roles = self._roles()
        self._check_names(roles)
        outputs = frozenset(n for n, role in roles.items() if role in ("out", "inout"))
        self.tensors.check(outputs)
        tensors = [self._tensor(name, roles[name]) for name in roles]
        scalars = [
            make("scalar", ref=Ref(n), dtype=self.request.scalars[n])
            for n in self.parameters
            if n in self.request.scalars and n not in self.request.present
        ]
        body = (*self._extents(roles), *tensors, *scalars, *self.builder.stack[0])
        return make(
            "kernel",
            ref=Ref(self.source.name),
            blocks=(Block((), body),),
            span=self.source.span(self.source.node),
            world=self.request.world,
            file=self.source.source.name,
        )

    def _roles(self) -> dict[str, str]:
        """Every tensor in order of declaration, with its role."""
        filled = {
            str(value): s
            for s in self.statements.values()
            for key, value in s.extra
            if key in ("into", "offsets")
        }
        roles: dict[str, str] = {}
        for name in self.parameters:
            if name in self.request.present:
                roles[name] = "out" if name in filled else self._parameter_role(name)
        for name in (*self.lowerer.temps, *filled):
            roles.setdefault(name, "temp")
        return roles

    def _parameter_role(self, name: str) -> str:
        accesses = [a for a in self.tensors.accesses if a.tensor == name]
        if not any(a.is_store for a in accesses):
            return "in"
        return "out" if accesses[0].is_store else "inout"

    def _check_names(self, roles: dict[str, str]) -> None:
        for statement in self.statements.values():
            extra = dict(statement.extra)
            for name in (statement.tensor, *(extra[k] for k in ("table",) if k in extra)):
                if name not in roles:
                    raise UnknownName(
                        statement.span,
                        name=name,
                        where=f" in kernel `{self.source.name}`",
                        advice=did_you_mean(name, roles)
                        or f"a mapping names parameters of `{self.source.name}` and tensors of `tk.empty`",
                    )
        for name in roles:
            if name not in self.facts.dims:
                raise BadCall(
                    self.source.span(_argument(self.source.node, name)),
                    what=f"the parameter `{name}` is never indexed, so its shape is not known",
                    advice=f"remove it, or declare it in the mapping: `local {name}[...]`",
                )

    def _dims(self, name: str) -> list[Expr]:
        return [self.facts.extents.canonical(dim) for dim in self.facts.dims[name]]

    def _extents(self, roles: dict[str, str]) -> list[Op]:
        """Declarations of the extents in order of first use; MissingExtent where one has no value."""
        names: dict[str, None] = {}
        exprs = [dim for name in roles for dim in self._dims(name)]
        exprs += [
            extent if isinstance(extent, Expr) else Expr.const(extent)
            for op in self.builder.stack[0]
            for inner in op.walk()
            for extent in inner.get("extent", ())
        ]
        exprs += [s.owner for s in self.statements.values() if s.owner is not None]
        extents = self.facts.extents
        for expr in exprs:
            for name in _in_order(expr):
                if extents.is_extent(name) and extents.find(name) != "WORLD":
                    names.setdefault(extents.find(name))
        missing = [n for n in names if extents.lookup(n) is None]
        if missing:
            raise MissingExtent(
                self.source.span(self.source.node),
                names=", ".join(
                    extents.labels[n] if extents.is_placeholder(Expr.name(n)) else f"`{n}`"
                    for n in missing
                ),
                first=missing[0],
                kernel=self.source.name,
            )
        return [
            make(
                "extent",
                ref=Ref(n),
                value=extents.values[n],
                dynamic=True if n in extents.dynamic else None,
                least=self.request.least.get(n) if n in extents.dynamic else None,
            )
            for n in names
        ]

    def _tensor(self, name: str, role: str) -> Op:
        statement = self.statements.get(name)
        dims = tuple(self._dims(name))
        attrs: dict[str, Any] = {"dims": dims, "dtype": self.tensors.dtype(name), "role": role}
        span: Span | None = None
        attrs["move"] = "local" if statement is None else statement.kind
        if statement is not None:
            span = statement.span
            extra = dict(statement.extra)
            attrs |= {
                k: str(extra[k]) for k in ("table", "into", "offsets", "source") if k in extra
            }
            over = self.tensors.over(name)
            if over is not None:
                self._check_shares(name, dims[over], statement)
                attrs["over"] = over
                owner = statement.owner or Expr.name("e") // (dims[over] // Expr.name("WORLD"))
                attrs["owner"] = self.facts.extents.canonical(owner)
            attrs["tile"] = statement.tile and tuple(
                map(self.facts.extents.canonical, statement.tile)
            )
            attrs["signal"] = statement.signal
        elif name in self.lowerer.temps:
            span = self.lowerer.temps[name][2]
        elif name not in self.parameters:
            span = next(
                (s.span for s in self.statements.values() if name in dict(s.extra).values()), None
            )
        else:
            span = self.source.span(_argument(self.source.node, name))
        return make("tensor", ref=Ref(name), span=span, **attrs)

    def _check_shares(self, name: str, dim: Expr, statement: Statement) -> None:
        value = self.facts.extents.known(dim)
        if value is not None and value % self.request.world:
            raise NotDivisible(
                statement.span,
                what=f"{self.facts.extents.show(dim)}, which the ranks share out,",
                unit=f"the number of ranks, {self.request.world}",
                advice=f"pad `{name}` so that every rank holds the same number of elements",
            )


def _argument(node: ast.FunctionDef, name: str) -> ast.AST:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return next((a for a in every if a.arg == name), node)


def _in_order(expr: Expr) -> list[str]:
    """The names of ``expr`` from left to right."""
    if expr.op == "const":
        return []
    if expr.op == "name":
        return [str(expr.args[0])]
    return [name for part in expr.args if isinstance(part, Expr) for name in _in_order(part)]
