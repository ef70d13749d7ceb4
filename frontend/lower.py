"""Statements of a kernel body: assignments, loops with carried values, functions lowered in place."""

from __future__ import annotations

import ast
import contextlib
import inspect
from dataclasses import replace
from typing import Any

from tilelink.errors import Span
from tilelink.frontend.builder import Builder
from tilelink.frontend.calls import Calls
from tilelink.frontend.errors import (
    BadCall,
    EmptyLoop,
    IdleLoop,
    LoopCarried,
    NotAnExtent,
    ShapeMismatch,
    UnusedValue,
)
from tilelink.frontend.expressions import Scope
from tilelink.frontend.source import FunctionSource, read_function
from tilelink.frontend.tensors import Tensors
from tilelink.frontend.values import Method, Num, TensorRef, TileVar, describe
from tilelink.frontend.variables import assigned_names, exposed_names
from tilelink.ir import INTEGERS, TILE, Block, Expr, Op, Type, Value, make

MAX_DEPTH = 32


class _Returned(Exception):
    """Leaves a function's body with its result."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Lowerer(Calls):
    """Lowers the statements of one kernel into the builder."""

    def __init__(self, builder: Builder, tensors: Tensors) -> None:
        super().__init__(builder, tensors)
        self.temps: dict[str, tuple[tuple[Expr, ...], str, Span]] = {}
        self._loops = 0
        self._idle: list[IdleLoop] = []

    def kernel(self, source: FunctionSource, names: dict[str, Any]) -> None:
        """Lowers the whole body of a kernel; ``names`` binds its parameters. IdleLoop where one is idle."""
        scope = Scope(source, names)
        with contextlib.suppress(_Returned):
            self.statements(source.node.body, scope)
        if self._idle:
            raise self._idle[0]

    def statements(self, body: list[ast.stmt], scope: Scope) -> None:
        """Lowers statements in order."""
        for node in body:
            self.statement(node, scope)

    def statement(self, node: ast.stmt, scope: Scope) -> None:
        """Lowers one statement."""
        span = scope.source.span(node)
        match node:
            case ast.Assign():
                if len(node.targets) != 1:
                    raise self.unsupported(
                        span, "an assignment to several targets", "write one a line"
                    )
                self._assign(node.targets[0], node.value, scope)
            case ast.AnnAssign() if node.value is not None:
                self._assign(node.target, node.value, scope)
            case ast.AugAssign():
                self._augment(node, scope, span)
            case ast.For():
                self._for(node, scope)
            case ast.If():
                self.statements(
                    node.body if self.condition(node.test, scope) else node.orelse, scope
                )
            case ast.Return():
                if self._loops:
                    raise self.unsupported(span, "`return` inside a loop", "return after the loop")
                if node.value is not None and not scope.depth:
                    raise self.unsupported(
                        span,
                        "a result of the kernel",
                        "store results in a parameter: `C[m, n] = x`",
                    )
                raise _Returned(None if node.value is None else self.value(node.value, scope))
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                return
            case ast.Expr():
                self.value(node.value, scope)
                if not self._calls_function(node.value, scope):
                    raise _unused(node.value, span)
            case _:
                words = {
                    ast.While: "`while`",
                    ast.With: "`with`",
                    ast.Try: "`try`",
                    ast.Raise: "`raise`",
                    ast.Assert: "`assert`",
                    ast.Delete: "`del`",
                    ast.Import: "`import`",
                    ast.ImportFrom: "`import`",
                    ast.FunctionDef: "a function inside a kernel",
                    ast.ClassDef: "a class",
                    ast.Break: "`break`",
                    ast.Continue: "`continue`",
                    ast.Global: "`global`",
                    ast.Nonlocal: "`nonlocal`",
                }
                raise self.unsupported(
                    span,
                    words.get(type(node), f"`{ast.unparse(node).splitlines()[0]}`"),
                    "kernels are made of assignments, `for` over tk.tiles and tk.range, and "
                    "`if` on what is known when the kernel is compiled",
                )

    def _calls_function(self, node: ast.expr, scope: Scope) -> bool:
        """Whether a statement calls a function of the user's, which may store to tensors."""
        if not isinstance(node, ast.Call):
            return False
        root = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name) or root.id in scope.names:
            return False
        return self.builtin(self.value(node.func, scope)) is None

    # --- assignments ---------------------------------------------------------------------------

    def _assign(self, target: ast.expr, value: ast.expr, scope: Scope) -> None:
        span = scope.source.span(target)
        if isinstance(target, ast.Subscript):
            self._store(target, self.value(value, scope), scope)
            return
        if isinstance(target, ast.Name):
            if self._is_empty_call(value, scope):
                assert isinstance(value, ast.Call)
                self._declare(target.id, value, scope)
                return
            self.bind(target, self.value(value, scope, target.id), scope)
            return
        if isinstance(target, ast.Tuple | ast.List):
            self._unpack(target.elts, self.value(value, scope), scope, span, ast.unparse(value))
            return
        raise self.unsupported(
            span, f"an assignment to `{ast.unparse(target)}`", "assign to names and to `C[m, n]`"
        )

    def _unpack(
        self, targets: list[ast.expr], value: Any, scope: Scope, span: Span, what: str
    ) -> None:
        if isinstance(value, Method) and value.name == "shape":
            dims = self.tensors.facts.set_rank(value.owner.name, len(targets))
            value = tuple(Num(dim) for dim in dims)
        if not isinstance(value, tuple):
            raise self.unsupported(span, f"unpacking {describe(value)}", "unpack shapes and tuples")
        if len(value) != len(targets):
            raise ShapeMismatch(
                span,
                left=f"the number of names, {len(targets)},",
                right=f"the {len(value)} axes of `{what}`",
                advice="name every axis of a shape; `_` for those that are not needed",
            )
        if all(isinstance(v, Num) for v in value) and not scope.depth:
            names = [t.id for t in targets if isinstance(t, ast.Name) and t.id != "_"]
            self.extents.keep_apart(names)
        for target, item in zip(targets, value, strict=True):
            self.bind(target, item, scope)

    def bind(self, target: ast.expr, value: Any, scope: Scope) -> None:
        """Gives a local name a value."""
        span = scope.source.span(target)
        if not isinstance(target, ast.Name):
            raise self.unsupported(
                span, f"an assignment to `{ast.unparse(target)}`", "unpack into names"
            )
        name = target.id
        if isinstance(scope.names.get(name), TensorRef) and not isinstance(value, TensorRef):
            raise self.unsupported(
                span,
                f"`{name}`, the name of a tensor, for something else",
                "store to it with `C[m, n] = …`",
            )
        if isinstance(value, Num) and not scope.depth and name != "_":
            self._name_extent(name, value.expr, span)
        scope.names[name] = value
        scope.lost.pop(name, None)

    def _name_extent(self, name: str, expr: Expr, span: Span) -> None:
        """Lets a shape's axis go by the name that the kernel unpacks it into."""
        if not self.extents.is_placeholder(self.extents.canonical(expr)):
            return
        self.extents.introduce(name, name)
        if not self.extents.agree(Expr.name(name), expr):
            raise ShapeMismatch(
                span,
                left=self.extents.show(expr),
                right=self.extents.show(Expr.name(name)),
                advice=f"`{name}` names one extent; give another one another name",
            )

    def _augment(self, node: ast.AugAssign, scope: Scope, span: Span) -> None:
        kind = type(node.op)
        if isinstance(node.target, ast.Name):
            old = self.name(
                ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target), scope
            )
            new = self.value(node.value, scope)
            self.bind(node.target, self.binary(kind, old, new, span, node.target.id), scope)
        elif isinstance(node.target, ast.Subscript):
            read = ast.copy_location(
                ast.Subscript(node.target.value, node.target.slice, ast.Load()), node.target
            )
            old = self.value(read, scope)
            self._store(
                node.target,
                self.binary(kind, old, self.value(node.value, scope), span, None),
                scope,
            )
        else:
            raise self.unsupported(
                span, f"an assignment to `{ast.unparse(node.target)}`", "assign to names"
            )

    def _store(self, target: ast.Subscript, value: Any, scope: Scope) -> None:
        span = scope.source.span(target)
        owner = self.value(target.value, scope)
        if not isinstance(owner, TensorRef):
            raise self.unsupported(
                span, f"a store to {describe(owner)}", "store to a tensor: `C[m, n] = x`"
            )
        self.tensors.store(owner.name, self.index(target.slice, scope), value, span)

    def _is_empty_call(self, node: ast.expr, scope: Scope) -> bool:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            return False
        if ast.unparse(node.func).rpartition(".")[2] != "empty":
            return False
        return self.builtin(self.value(node.func, scope)) == "empty"

    def _declare(self, name: str, node: ast.Call, scope: Scope) -> None:
        """``P = tk.empty([M, N], dtype)``: an intermediate tensor."""
        span = scope.source.span(node)
        words = {str(k.arg): k.value for k in node.keywords}
        parts = dict(zip(("shape", "dtype"), node.args, strict=False)) | words
        if set(parts) != {"shape", "dtype"}:
            raise BadCall(
                span,
                what="`tk.empty` takes a shape and a dtype",
                advice="`tk.empty([M, N], A.dtype)`",
            )
        if len(self.builder.stack) > 1:
            raise self.unsupported(
                span, "`tk.empty` inside a loop", "declare intermediates before the loops"
            )
        shape = self.value(parts["shape"], scope)
        dims = []
        for item in shape if isinstance(shape, tuple) else (shape,):
            if not isinstance(item, Num | int):
                raise NotAnExtent(span, what=describe(item))
            dims.append(Expr.const(item) if isinstance(item, int) else item.expr)
        dtype = self.element_type(self.value(parts["dtype"], scope), span)
        symbol = name
        while symbol in self.temps or symbol in self.tensors.dtypes:
            symbol += "_"
        self.temps[symbol] = (tuple(dims), dtype, span)
        self.tensors.dtypes[symbol] = dtype
        placed = self.tensors.statements.get(symbol)
        if placed is None:
            self.tensors.facts.dims[symbol] = dims
        else:
            self._check_temp(symbol, dims, span)
        scope.names[name] = TensorRef(symbol)

    def _check_temp(self, name: str, dims: list[Expr], span: Span) -> None:
        mapped = self.tensors.facts.dims[name]
        agree = len(mapped) == len(dims) and all(map(self.extents.agree, mapped, dims))
        if not agree:
            raise ShapeMismatch(
                span,
                left=f"the shape `[{', '.join(map(str, dims))}]`",
                right=f"`{name}[{', '.join(map(str, mapped))}]` of the mapping",
                advice="give the extents of the mapping",
            )

    # --- loops ---------------------------------------------------------------------------------

    def _for(self, node: ast.For, scope: Scope) -> None:
        span = scope.source.span(node.iter)
        call = node.iter
        name = None
        if isinstance(call, ast.Call):
            name = self.builtin(self.value(call.func, scope))
        if name not in ("tiles", "range") or not isinstance(call, ast.Call):
            raise self.unsupported(
                span,
                f"a loop over `{ast.unparse(call)}`",
                "loop with `tk.tiles` (tiles) or `tk.range` (scalars)",
            )
        if node.orelse:
            raise self.unsupported(span, "`else` of a loop", "write it after the loop")
        args = [self.value(a, scope) for a in call.args]
        if call.keywords or not args:
            raise BadCall(
                span, what=f"`tk.{name}` takes extents", advice="tk.tiles(M, N), tk.range(E)"
            )
        empty = self._is_empty(name, args, node, span)
        saved = dict(scope.names)
        assigned = assigned_names(node.body)
        exposed = exposed_names(node.body)
        carried = [n for n in assigned if self._is_carried(n, scope, exposed)]
        dropped: set[str] = set()
        initial: dict[str, str] = {}
        ops, names, accesses = (
            len(self.builder.stack[-1]),
            self.builder.names(),
            len(self.tensors.accesses),
        )
        while True:
            keep = [n for n in carried if n not in dropped]
            retry = self._loop(node, name, args, keep, exposed, initial, scope, span)
            if retry is None:
                break
            variable, dtype = retry
            if dtype is None:
                dropped.add(variable)
            else:
                initial[variable] = dtype
            del self.builder.stack[-1][ops:]
            del self.tensors.accesses[accesses:]
            self.builder.restore(names)
        outermost = len(self.builder.stack) == 1
        if outermost and not empty:
            empty = self._is_idle(self.builder.stack[-1][ops:], span)
        if empty:
            dead = [replace(a, dead=True) for a in self.tensors.accesses[accesses:]]
            self.tensors.accesses[accesses:] = dead
        if empty and outermost:
            # A stage of no tasks. Its body was checked; what it carries keeps the value from before.
            del self.builder.stack[-1][ops:]
            scope.names = {n: saved[n] for n in scope.names if n in saved}

    def _is_idle(self, ops: list[Op], span: Span) -> bool:
        """Whether an outermost loop, the last of ``ops``, does nothing; noted where it reads tensors for that."""
        inner = list(ops[-1].walk())
        if ops[-1].results or any(op.name == "store" for op in inner):
            return False
        read = sorted({f"`{op.symbol}`" for op in inner if op.name == "load"})
        if read:
            self._idle.append(IdleLoop(span, tensors=" and ".join(read)))
        return True

    def _is_empty(self, name: str, args: list[Any], node: ast.For, span: Span) -> bool:
        """Whether a loop over bounds is known to run no iteration.

        EmptyLoop where both bounds are numbers in the source, the last before the first: extents may be
        too small for a loop, but such numbers never have a meaning.
        """
        pair = len(args) == 2 and isinstance(node.target, ast.Name)
        if name == "range":
            pair = len(args) in (1, 2)
        if not pair or not all(isinstance(a, Num | int) for a in args):
            return False
        lo, hi = args if len(args) == 2 else (0, args[0])
        if isinstance(lo, int) and isinstance(hi, int) and hi < lo:
            raise EmptyLoop(
                span,
                name=name,
                bounds=", ".join(map(str, args)),
                advice="give the first index, then one past the last",
            )
        values = [
            bound if isinstance(bound, int) else self._known(bound.expr) for bound in (lo, hi)
        ]
        first, last = values
        return first is not None and last is not None and last <= first

    def _known(self, expr: Expr) -> int | None:
        """The value of an expression over extents that are known when the kernel is compiled."""
        try:
            return self.extents.known(expr) if self.extents.is_static(expr) else None
        except ZeroDivisionError:
            return None

    def _is_carried(self, name: str, scope: Scope, exposed: set[str]) -> bool:
        value = scope.names.get(name)
        return isinstance(value, Value) or (
            name in exposed and isinstance(value, Num | int | float)
        )

    def _loop(
        self,
        node: ast.For,
        kind: str,
        args: list[Any],
        carried: list[str],
        exposed: set[str],
        initial: dict[str, str],
        scope: Scope,
        span: Span,
    ) -> tuple[str, str | None] | None:
        """Lowers a loop; a name to try again without (or with another initial type) where it changes type."""
        saved = dict(scope.names)
        literal = {n for n in carried if not isinstance(saved[n], Value)}
        inits = []
        for name in carried:
            value = self.builder.data(saved[name], span, initial.get(name), name)
            inits.append(self.builder.cast(value, initial.get(name, value.type.dtype), span, name))
        attrs, bounds, variables = self._header(node, kind, args, scope, span)
        self.builder.stack.append([])
        self._loops += 1
        inner = []
        for name, value in zip(carried, inits, strict=True):
            argument = Value(self.builder.unique(name), value.type)
            if value.type.dtype in INTEGERS and not value.type.shape:
                self.builder.scalars[argument.name] = argument
            inner.append(argument)
            scope.names[name] = argument
        self.statements(node.body, scope)
        yields = []
        for name, value in zip(carried, inits, strict=True):
            after = scope.names[name]
            result = (
                self.builder.data(after, span, value.type.dtype)
                if isinstance(after, Value | Num | int | float)
                else None
            )
            same = result is not None and self._same_type(result.type, value.type)
            if not same:
                self._leave()
                scope.names = saved
                if name not in exposed:
                    return name, None
                scalar = result is not None and not result.type.shape and not value.type.shape
                if result is not None and scalar and name in literal and name not in initial:
                    return name, result.type.dtype
                raise LoopCarried(
                    span,
                    name=name,
                    before=describe(Value(name, value.type)),
                    after=describe(after),
                )
            assert result is not None
            yields.append(result)
        if yields:
            self.builder.append(make("yield", operands=tuple(yields), span=span))
        body = self._leave()
        attrs |= self._part(variables)
        results = tuple(
            Value(self.builder.unique(n), v.type) for n, v in zip(carried, inits, strict=True)
        )
        block = Block((*variables, *inner), tuple(body))
        self.builder.append(
            make(
                "for_tiles" if kind == "tiles" else "for_range",
                results=results,
                operands=(*bounds, *inits),
                blocks=(block,),
                span=span,
                **attrs,
            )
        )
        gone = [n for n in scope.names if n not in saved] + assigned_names(node.body)
        for name in (n for n in gone if n not in carried):
            scope.lost[name] = f"give `{name}` a value before the loop: it may run no iteration"
            if isinstance(saved.get(name), Value):
                scope.lost[name] = (
                    f"`{name}` has another type before the loop than in it: make them one"
                )
        scope.names = {n: v for n, v in saved.items() if n not in scope.lost or n in carried}
        for name, value in zip(carried, results, strict=True):
            scope.names[name] = value
            scope.lost.pop(name, None)
            if value.type.dtype in INTEGERS and not value.type.shape:
                self.builder.scalars[value.name] = value
        return None

    def _leave(self) -> list[Op]:
        self._loops -= 1
        return self.builder.stack.pop()

    def _same_type(self, a: Type, b: Type) -> bool:
        return (
            a.dtype == b.dtype
            and len(a.shape) == len(b.shape)
            and all(map(self.builder.same_dim, a.shape, b.shape))
        )

    def _header(
        self, node: ast.For, kind: str, args: list[Any], scope: Scope, span: Span
    ) -> tuple[dict[str, Any], tuple[Value, ...], list[Value]]:
        """Attributes, bound operands and loop variables; binds the variables."""
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        if not all(isinstance(t, ast.Name) for t in targets):
            raise self.unsupported(
                scope.source.span(node.target), "this loop target", "name the loop variables"
            )
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if kind == "range":
            if len(args) > 2 or len(names) != 1:
                raise BadCall(
                    span,
                    what="`tk.range` takes one or two integers",
                    advice="for e in tk.range(E):",
                )
            bounds = [self._bound(a, span) for a in ([0, *args] if len(args) == 1 else args)]
            variable = Value(self.builder.unique(names[0]), Type("int32"))
            self.builder.scalars[variable.name] = variable
            scope.names[names[0]] = Num(Expr.name(variable.name))
            scope.lost.pop(names[0], None)
            if bounds[0].value == 0 and self._extent(Num(bounds[1])) is not None:
                self.builder.ranges[variable.name] = bounds[1]
            return {"lo": bounds[0], "hi": bounds[1]}, (), [variable]
        extents = [self._extent(a) for a in args]
        if (len(args) == 2 and len(names) == 1) or any(e is None for e in extents):
            if len(args) != 2 or len(names) != 1:
                culprit = next(a for a, e in zip(args, extents, strict=True) if e is None)
                raise NotAnExtent(span, what=describe(culprit))
            bounds_ = tuple(self._bound_value(a, span) for a in args)
            tile = self._tile(names[0], None, scope)
            return {"bounds": True}, bounds_, [tile]
        if len(names) != len(args):
            raise BadCall(
                span,
                what=f"`tk.tiles` gives {len(args)} tile variables here, but there are {len(names)} names",
                advice="for m, n in tk.tiles(M, N):",
            )
        tiles = [self._tile(n, e, scope) for n, e in zip(names, extents, strict=True)]
        return {"extent": [self.extents.canonical(e) for e in extents if e is not None]}, (), tiles

    def _tile(self, name: str, extent: Expr | None, scope: Scope) -> Value:
        value = Value(self.builder.unique(name), TILE)
        self.builder.tile(value.name, value)
        scope.names[name] = TileVar(value, extent)
        scope.lost.pop(name, None)
        return value

    def _extent(self, value: Any) -> Expr | None:
        if not isinstance(value, Num) or value.expr.op == "const":
            return None
        known = all(n == "WORLD" or self.extents.is_extent(n) for n in value.expr.names)
        return value.expr if known else None

    def _bound(self, value: Any, span: Span) -> Expr:
        value = self.builder.literal(value) if not isinstance(value, Num) else value
        if isinstance(value, Num):
            return self.extents.canonical(value.expr)
        if isinstance(value, int) and not isinstance(value, bool):
            return Expr.const(value)
        return Expr.name(self._bound_value(value, span).name)

    def _bound_value(self, value: Any, span: Span) -> Value:
        if not isinstance(value, Value | Num | int) or isinstance(value, bool):
            raise NotAnExtent(span, what=describe(value))
        found = self.builder.data(value, span)
        self.builder.used_as_index(found)
        if found.type.shape or found.type.dtype not in INTEGERS:
            raise NotAnExtent(span, what=describe(found))
        return found

    def _part(self, variables: list[Value]) -> dict[str, Any]:
        """Marks a loop of which each rank runs its own part."""
        for axis, variable in enumerate(variables):
            if variable.name in self.tensors.own:
                return {
                    "part": "own",
                    "part_axis": axis if len(variables) > 1 else None,
                    "part_of": self.tensors.own[variable.name][0],
                }
        return {}

    # --- functions -----------------------------------------------------------------------------

    def inline(
        self, function: Any, args: list[Any], kwargs: dict[str, Any], span: Span, scope: Scope
    ) -> Any:
        source = read_function(function, span)
        if scope.depth >= MAX_DEPTH:
            raise self.unsupported(span, f"recursion in `{source.name}`", "use a loop")
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise BadCall(
                span,
                what=f"`{source.name}`: {error}",
                advice=f"{source.name}{inspect.signature(function)}",
            ) from None
        bound.apply_defaults()
        inner = Scope(source, dict(bound.arguments), depth=scope.depth + 1)
        loops, self._loops = self._loops, 0
        try:
            self.statements(source.node.body, inner)
        except _Returned as returned:
            return returned.value
        finally:
            self._loops = loops
        return None


def _unused(node: ast.expr, span: Span) -> UnusedValue:
    """The error for an expression that is a statement, with what was probably meant."""
    text = ast.unparse(node)
    advice = "take it out, or give its value a name"
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        advice = f"`==` compares; write `{left} = {right}`"
    elif isinstance(node, ast.Call):
        last = node.args[-1] if node.args else None
        name = last.id if isinstance(last, ast.Name) else "x"
        advice = f"operations change nothing and give a new value: `{name} = {text}`"
    return UnusedValue(span, text=text, advice=advice)
