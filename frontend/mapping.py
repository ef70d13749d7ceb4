"""The mapping language: text to statements, checked as far as the text alone allows.

The grammar (``mapping.lark``) is the reference of the syntax. Here are the rules that a grammar
cannot say, and the canonical form: the owner map in ``e``, the signal map in ``t``, an absent owner
map spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lark import Token, Tree

from tilelink.errors import Source, Span, choices
from tilelink.frontend import mapping_errors as errors
from tilelink.frontend.mapping_syntax import Locator, parse_tree
from tilelink.ir import Expr, binary

_OPERATORS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "mod": "%",
    "min": "min",
    "max": "max",
}
_WITH_OVER = frozenset({"gather", "scatter", "ring", "shard"})


@dataclass(frozen=True, slots=True)
class Statement:
    """One placed tensor.

    ``kind`` is the statement's word. ``dims`` are the global extents; those of an exchange and a
    combine are a rank's own. ``over`` is the extent that the ranks divide. ``owner`` maps ``e``,
    the element's index along it, to a rank; ``tile`` holds one length an axis; ``signal`` maps
    ``t``, the tile's number among its owner's, to a channel. Maps that were not given are None,
    but ``owner`` has its default.

    ``extra`` of an exchange: ``table``, ``table_dims``, ``into``, ``into_dims``, ``offsets``,
    ``offsets_dims``; of a combine: ``source``, ``into``, ``into_dims``.
    """

    kind: str
    tensor: str
    dims: tuple[Expr, ...]
    over: str | None
    owner: Expr | None
    tile: tuple[Expr, ...] | None
    signal: Expr | None
    extra: tuple[tuple[str, Any], ...]
    span: Span

    def get(self, key: str) -> Any:
        """The entry ``key`` of ``extra``, or None."""
        return dict(self.extra).get(key)

    @property
    def axis(self) -> int | None:
        """The number of the ``over`` axis."""
        return None if self.over is None else self.dims.index(Expr.name(self.over))


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping text: its statements in order, and the extents marked ``dynamic``."""

    statements: tuple[Statement, ...]
    dynamic: frozenset[str]
    source: Source

    def get(self, tensor: str) -> Statement | None:
        """The statement that places ``tensor``, or None."""
        return next((s for s in self.statements if s.tensor == tensor), None)


def parse_mapping(
    text: str,
    name: str = "<mapping>",
    *,
    host: Source | None = None,
    line_offset: int = 0,
    column_offset: int = 0,
    extents: Iterable[str] = (),
) -> Mapping:
    """The mapping that ``text`` describes; a MappingError with its place where there is a mistake.

    ``host`` is the file that holds the text as a string literal whose first character stands in
    line ``line_offset + 1``, column ``column_offset + 1``: places then point into that file (into
    the text alone, where the literal's escapes make the two differ). ``extents`` are names known
    from elsewhere that maps may use beside the extents of the statements.
    """
    locator = Locator(text, name, host, line_offset, column_offset)
    trees = [tree for tree in parse_tree(text, locator).children if isinstance(tree, Tree)]
    checker = _Checker(locator, frozenset(extents))
    for tree in trees:
        checker.collect_extents(tree)
    statements = tuple(checker.statement(tree) for tree in trees)
    checker.check_exchanges(statements)
    return Mapping(statements, frozenset(checker.dynamic), locator.source)


def _children(tree: Tree[Token], *names: str) -> list[Tree[Token]]:
    return [c for c in tree.children if isinstance(c, Tree) and c.data in names]


def _tokens(tree: Tree[Token]) -> list[Token]:
    return [c for c in tree.children if isinstance(c, Token)]


def _text(dims: Iterable[Expr]) -> str:
    return ", ".join(map(str, dims))


class _Checker:
    """Statements from trees; remembers what earlier statements placed."""

    def __init__(self, locator: Locator, extents: frozenset[str]) -> None:
        self.locator = locator
        self.extents = set(extents)
        self.dynamic: set[str] = set()
        self.placed: dict[str, Span] = {}
        self.dim_spans: dict[str, Span] = {}

    # --- what is known -------------------------------------------------------------------------

    def collect_extents(self, tree: Tree[Token]) -> None:
        """Add every name in the shapes of a statement to the extents."""
        for tensor in tree.find_data("tensor"):
            for name in tensor.find_data("name"):
                token = _tokens(name)[0]
                if token not in ("WORLD", "RANK"):
                    self.extents.add(str(token))

    def place(self, token: Token) -> str:
        """Record that a statement places the tensor ``token``."""
        span = self.locator.span(token)
        if token in self.placed:
            raise errors.TensorTwice(span, tensor=token, line=self.placed[token].line)
        self.check_tensor_name(token)
        self.placed[str(token)] = span
        return str(token)

    def check_tensor_name(self, token: Token) -> None:
        if token in ("WORLD", "RANK") or token in self.extents:
            raise errors.ReservedName(
                self.locator.span(token),
                name=token,
                what="a tensor",
                reason="the name stands for a number: an extent, WORLD or RANK",
            )

    # --- statements ----------------------------------------------------------------------------

    def statement(self, tree: Tree[Token]) -> Statement:
        kind = str(tree.data)
        first = _tokens(tree)[0]
        tensors = _children(tree, "tensor")
        token = _tokens(tensors[0])[0]
        tensor, dims = self.place(token), self.shape(tensors[0])
        over = self.over(tree, tensor, dims) if kind in _WITH_OVER else None
        extra = self.extra(tree, kind, tensors)
        self.marks(tree, [dims, *(v for k, v in extra if k.endswith("dims"))])
        maps = self.maps(tree, kind)
        owner = self.owner(maps.get("owner"), over)
        tile = self.tile(maps.get("tile"), tensor, dims)
        signal = self.signal(maps.get("signal"))
        span = self.locator.span(first, _last_token(tree, first.line or 1) or token)
        return Statement(kind, tensor, dims, over, owner, tile, signal, extra, span)

    def shape(self, tree: Tree[Token]) -> tuple[Expr, ...]:
        allowed = {"WORLD": "", **dict.fromkeys(self.extents, "")}
        name = _tokens(tree)[0]
        dims = tuple(self.expr(c, allowed, "shape") for c in tree.children if isinstance(c, Tree))
        self.dim_spans[str(name)] = self.locator.shape_span(name, _last_token(tree) or name)
        return dims

    def over(self, tree: Tree[Token], tensor: str, dims: tuple[Expr, ...]) -> str:
        token = _tokens(_children(tree, "over")[0])[0]
        span = self.locator.span(token)
        count = dims.count(Expr.name(str(token)))
        if token == "WORLD":
            raise errors.ReservedName(
                span,
                name=token,
                what="the axis that the ranks divide",
                reason="WORLD is their number; give the extent a name of its own: `A[M, K] over M`",
            )
        if count == 0:
            choices = [f"`{d}`" for d in dims if d.op == "name" and str(d) != "WORLD"]
            raise errors.OverNotADimension(
                span,
                over=token,
                tensor=tensor,
                dims=_text(dims),
                choices=", ".join(choices) or "none",
            )
        if count > 1:
            raise errors.OverTwice(span, over=token, tensor=tensor, dims=_text(dims))
        return str(token)

    def extra(
        self, tree: Tree[Token], kind: str, tensors: list[Tree[Token]]
    ) -> tuple[tuple[str, Any], ...]:
        if kind == "exchange":
            table, into, offsets = tensors[1:]
            self.check_tensor_name(_tokens(table)[0])
            return (
                ("table", str(_tokens(table)[0])),
                ("table_dims", self.shape(table)),
                ("into", self.place(_tokens(into)[0])),
                ("into_dims", self.shape(into)),
                ("offsets", self.place(_tokens(offsets)[0])),
                ("offsets_dims", self.shape(offsets)),
            )
        if kind == "combine":
            source = _tokens(tree)[1]
            result = self.place(_tokens(tensors[1])[0])
            self.dim_spans[f"from {result}"] = self.locator.span(source)
            shape = self.shape(tensors[1])
            return (("source", str(source)), ("into", result), ("into_dims", shape))
        return ()

    def marks(self, tree: Tree[Token], shapes: list[tuple[Expr, ...]]) -> None:
        names = sorted({n for dims in shapes for d in dims for n in d.names} - {"WORLD"})
        for mark in _children(_children(tree, "marks")[0], "mark"):
            token = _tokens(mark)[0]
            if token not in names:
                choices = ", ".join(f"`{n}`" for n in names) or "this one has none"
                raise errors.DynamicNotADimension(
                    self.locator.span(token), name=token, choices=choices
                )
            self.dynamic.add(str(token))

    # --- maps ----------------------------------------------------------------------------------

    def maps(self, tree: Tree[Token], kind: str) -> dict[str, Tree[Token]]:
        found: dict[str, Tree[Token]] = {}
        for block in _children(tree, "block"):
            for entry in _children(block, "owner", "tile", "signal"):
                word = _tokens(entry)[0]
                span = self.locator.span(word)
                if word == "owner" and kind not in _WITH_OVER:
                    reason = (
                        "an exchange goes where its table says, a combine the same way back"
                        if kind != "reduce"
                        else "every rank ends with all of the sum"
                    )
                    raise errors.MapNotHere(span, map=word, kind=kind, reason=reason)
                if word != "owner" and kind == "shard":
                    reason = "a shard has no traffic, so it has no tiles to send and no flags"
                    raise errors.MapNotHere(span, map=word, kind=kind, reason=reason)
                if word in found:
                    raise errors.MapTwice(span, map=word)
                found[str(word)] = entry
        return found

    def owner(self, tree: Tree[Token] | None, over: str | None) -> Expr | None:
        if over is None:
            return None
        element = Expr.name("e")
        if tree is None:
            return element // (Expr.name(over) // Expr.name("WORLD"))
        # An extent that is lower case already keeps its name; the element is then `e`.
        variable = over.lower() if over.lower() != over else "e"
        self.check_reserved(tree, "e", variable)
        return self.expr(_children_of_map(tree)[0], self.scope(variable, "e"), "owner map")

    def tile(
        self, tree: Tree[Token] | None, tensor: str, dims: tuple[Expr, ...]
    ) -> tuple[Expr, ...] | None:
        if tree is None:
            return None
        sizes = _children_of_map(tree)
        if len(sizes) != len(dims):
            first, last = _tokens(tree)[0], _last_token(tree)
            raise errors.TileRank(
                self.locator.span(first, last or first),
                given=len(sizes),
                tensor=tensor,
                dims=_text(dims),
                expected=len(dims),
            )
        return tuple(self.expr(size, self.scope(None, ""), "tile") for size in sizes)

    def signal(self, tree: Tree[Token] | None) -> Expr | None:
        if tree is None:
            return None
        self.check_reserved(tree, "t", "t")
        scope = {**self.scope("t", "t"), "RANK": ""}
        return self.expr(_children_of_map(tree)[0], scope, "signal map")

    def check_reserved(self, tree: Tree[Token], canonical: str, variable: str) -> None:
        """Refuse an extent that has the name of the map's variable, where the map uses the name."""
        used = [_tokens(name)[0] for name in tree.find_data("name")]
        for token in used:
            if token in (canonical, variable) and token in self.extents:
                raise errors.ReservedName(
                    self.locator.span(token),
                    name=token,
                    what="an extent here",
                    reason=f"in this map `{token}` is the variable; write extents in capitals",
                )

    def scope(self, variable: str | None, canonical: str) -> dict[str, str]:
        """The names a map may use, each with the name it becomes ("" for itself)."""
        names = {"WORLD": "", **dict.fromkeys(self.extents, "")}
        if variable is not None:
            names[variable] = canonical
        return names

    # --- expressions ---------------------------------------------------------------------------

    def expr(self, node: Any, scope: dict[str, str], where: str) -> Expr:
        tree: Tree[Token] = node
        tokens = _tokens(tree)
        if tree.data == "number":
            return Expr.const(int(tokens[0]))
        if tree.data == "name":
            return self.name(tokens[0], scope, where)
        operands = [self.expr(c, scope, where) for c in tree.children if isinstance(c, Tree)]
        if tree.data == "table":
            return self.table(tokens[0], operands, scope, where)
        left, right = operands
        if tree.data in ("div", "mod") and right.value == 0:
            last = _last_token(tree)
            raise errors.ConstantDivisionByZero(self.locator.span(last) if last else None)
        return binary(_OPERATORS[str(tree.data)], left, right)

    def name(self, token: Token, scope: dict[str, str], where: str) -> Expr:
        if token in scope:
            return Expr.name(scope[str(token)] or str(token))
        span = self.locator.span(token)
        if token == "RANK":
            raise errors.RankInOwner(span, where=where)
        if token in self.placed:
            suggestion = f"`{token}` is a tensor; read an element of a table with `{token}[i]`"
        else:
            suggestion = choices(token, sorted(scope), "known here")
        raise errors.UnknownName(span, name=token, where=where, suggestion=suggestion)

    def table(self, token: Token, index: list[Expr], scope: dict[str, str], where: str) -> Expr:
        span = self.locator.span(token)
        if token in scope or token == "RANK":
            raise errors.NotATable(span, name=token)
        if where == "shape":
            raise errors.UnknownName(
                span, name=token, where=where, suggestion="an extent cannot be read from a table"
            )
        return Expr("table", (str(token), *index))

    # --- exchanges -----------------------------------------------------------------------------

    def check_exchanges(self, statements: tuple[Statement, ...]) -> None:
        """Hold the shapes of every exchange and combine against each other."""
        exchanges = {s.get("into"): s for s in statements if s.kind == "exchange"}
        for s in statements:
            if s.kind == "exchange":
                rows, rest = s.dims[0], s.dims[1:]
                capacity = s.get("into_dims")[:1]
                copies = s.get("table_dims")[1:2] or (Expr.name("k"),)
                why = f"row t of `{s.tensor}` goes to the ranks in row t of `{s.get('table')}`"
                self.expect(s.get("table"), s.get("table_dims"), (rows, *copies), why)
                why = f"`{s.get('into')}` holds rows of `{s.tensor}`"
                self.expect(s.get("into"), s.get("into_dims"), (*capacity, *rest), why)
                why = "it holds where the rows of each rank begin, and the number of all rows"
                self.expect(s.get("offsets"), s.get("offsets_dims"), (Expr.name("WORLD") + 1,), why)
            elif s.kind == "combine":
                source = exchanges.get(s.get("source"))
                if source is None:
                    span = self.dim_spans[f"from {s.get('into')}"]
                    raise errors.UnknownExchange(span, source=s.get("source"))
                capacity = source.get("into_dims")[:1]
                why = f"row i of `{s.tensor}` goes where row i of `{s.get('source')}` came from"
                self.expect(s.tensor, s.dims, (*capacity, *s.dims[1:]), why)
                why = f"copy j of row t of `{source.tensor}` comes back to `{s.get('into')}[t, j]`"
                expected = (*source.get("table_dims"), *s.dims[1:])
                self.expect(s.get("into"), s.get("into_dims"), expected, why)

    def expect(
        self, tensor: str, dims: tuple[Expr, ...], expected: tuple[Expr, ...], reason: str
    ) -> None:
        if dims != expected:
            raise errors.ShapeMismatch(
                self.dim_spans[tensor],
                tensor=tensor,
                dims=_text(dims),
                expected=_text(expected),
                reason=reason,
            )


def _children_of_map(tree: Tree[Token]) -> list[Tree[Token]]:
    return [c for c in tree.children if isinstance(c, Tree)]


def _last_token(tree: Tree[Token], line: int | None = None) -> Token | None:
    """The last token of a tree, or the last one in line ``line``."""
    tokens = list(tree.scan_values(lambda v: isinstance(v, Token)))
    found = [t for t in tokens if line is None or t.line == line]
    return max(found, key=lambda t: t.start_pos or 0, default=None)
