"""An interpreter of emitted functions, for all workers of all ranks in step.

It runs the syntax tree; what a call means, subclasses say. Branches and loops run under a mask of the
lanes that take them. Whatever it does not know is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from tilelink.backend.validate.errors import EmittedHazard, NotCovered, Unclear
from tilelink.backend.validate.layout import Misfit
from tilelink.backend.validate.values import (
    LARGEST,
    Choice,
    Data,
    Inside,
    Lattice,
    Mask,
    Name,
    Num,
    Pointer,
    full,
    join,
    options,
    select,
)
from tilelink.errors import Source, Span

STEPS = 4_000_000  # statements after which the text is taken to run for ever

_COMPARE = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}


class Machine:
    """``lanes`` runs of a function; ``floor``: whether integers are Python's (the host) or the device's."""

    floor = False
    modules: frozenset[str] = frozenset({"tl", "device"})

    def __init__(self, source: Source, lanes: int) -> None:
        self.source = source
        self.lanes = lanes
        self.env: dict[str, Any] = {}
        self.on: Mask = np.ones(lanes, dtype=bool)
        self.all = True
        self.node: ast.AST | None = None
        self.done = 0

    # Refusals ---------------------------------------------------------------------------------

    def span(self, node: ast.AST | None = None) -> Span | None:
        """Where ``node`` (default: the current one) stands."""
        at = node if node is not None else self.node
        line, column = getattr(at, "lineno", 0), getattr(at, "col_offset", 0)
        if not line:
            return None
        end = getattr(at, "end_col_offset", column) if getattr(at, "end_lineno", 0) == line else 0
        return Span(self.source, line, column + 1, (end or len(self.source.line(line))) + 1)

    def unclear(self, detail: str, node: ast.AST | None = None) -> NoReturn:
        """Refuses what is not understood."""
        raise Unclear(self.span(node), detail=detail)

    def not_covered(self, form: str, node: ast.AST | None = None) -> NoReturn:
        """Refuses a form that the emitter writes and that is not followed here."""
        raise NotCovered(self.span(node), form=form)

    def hazard(self, detail: str, *notes: str) -> NoReturn:
        """Refuses what is understood and wrong."""
        raise EmittedHazard(self.span(), detail=detail, notes=notes)

    @property
    def site(self) -> tuple[int, int]:
        """The line and column of the current call."""
        return getattr(self.node, "lineno", 0), getattr(self.node, "col_offset", 0)

    # Statements -------------------------------------------------------------------------------

    def run(self, body: Iterable[ast.stmt]) -> None:
        """Statements in order."""
        for statement in body:
            self.done += 1
            if self.done > STEPS:
                self.unclear("it does not come to an end")
            before, self.node = self.node, statement
            try:
                self.statement(statement)
            except Misfit as misfit:
                self.hazard(str(misfit))
            self.node = before

    def under(self, mask: Mask, body: Iterable[ast.stmt]) -> None:
        """Statements in the lanes of ``mask`` alone."""
        if not mask.any():
            return
        before = self.on, self.all
        self.on, self.all = mask, bool(mask.all())
        self.run(body)
        self.on, self.all = before

    def statement(self, node: ast.stmt) -> None:
        """One statement."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self.assign(node.targets[0], self.eval(node.value))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            old = self.eval(ast.copy_location(ast.Name(node.target.id, ast.Load()), node))
            value = self.binary(type(node.op), old, self.eval(node.value), node)
            self.assign(node.target, value)
        elif isinstance(node, ast.Expr):
            if not isinstance(node.value, ast.Call | ast.Constant):
                self.unclear("an expression that is thrown away", node)
            self.eval(node.value)
        elif isinstance(node, ast.If):
            self.branch(node)
        elif isinstance(node, ast.For) and not node.orelse:
            self.loop(node)
        elif isinstance(node, ast.While) and not node.orelse:
            self.repeat(node)
        elif isinstance(node, ast.Pass):
            pass
        else:
            self.unclear(f"a statement of the kind {type(node).__name__}", node)

    def assign(self, target: ast.expr, value: Any) -> None:
        """Binds names in the lanes that are on."""
        if isinstance(target, ast.Tuple):
            if not isinstance(value, tuple) or len(value) != len(target.elts):
                self.unclear("an assignment to several names", target)
            for part, item in zip(target.elts, value, strict=True):
                self.assign(part, item)
            return
        if not isinstance(target, ast.Name):
            self.unclear("an assignment to something that is no name", target)
        if target.id in self.modules:
            self.unclear(f"`{target.id}` is bound again", target)
        if self.all:
            self.env[target.id] = value
        else:
            self.env[target.id] = select(self.on, value, self.env.get(target.id))

    def truth(self, node: ast.expr) -> Mask:
        """The lanes, of those that are on, in which a condition holds."""
        value = self.eval(node)
        if isinstance(value, bool | int):
            value = Num(int(value))
        if not isinstance(value, Num):
            self.unclear("a condition that is no integer", node)
        taken: Mask = self.on & (full(value.v, self.lanes) != 0)
        return taken

    def branch(self, node: ast.If) -> None:
        """``if``: each side in its lanes."""
        taken = self.truth(node.test)
        rest = self.on & ~taken
        self.under(taken, node.body)
        self.under(rest, node.orelse)

    def loop(self, node: ast.For) -> None:
        """``for`` over a range."""
        lo, hi, step = self.range(node.iter)
        if not isinstance(node.target, ast.Name):
            self.unclear("a loop over several names", node)
        at = full(lo.v, self.lanes)
        stop, by = full(hi.v, self.lanes), full(step.v, self.lanes)
        if np.any(by[self.on] <= 0):
            self.unclear("a loop with a step that is not positive", node)
        while True:
            mask = self.on & (at < stop)
            if not mask.any():
                return
            before = self.on, self.all
            self.on, self.all = mask, bool(mask.all())
            self.assign(node.target, Num(at, lo.wide or hi.wide, join(lo.tokens, step.tokens)))
            self.turn(node)
            self.run(node.body)
            self.on, self.all = before
            at = at + by

    def repeat(self, node: ast.While) -> None:
        """``while``: of what its condition reads something is bound again in each turn, or it has no end."""
        mask = self.on
        read = [name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)]
        while True:
            known = [self.env.get(name) for name in read]
            before = self.on, self.all
            self.on, self.all = mask, bool(mask.all())
            mask = self.truth(node.test)
            self.on, self.all = before
            if not mask.any():
                return
            self.on, self.all = mask, bool(mask.all())
            self.turn(node)
            self.run(node.body)
            self.on, self.all = before
            if all(self.env.get(name) is old for name, old in zip(read, known, strict=True)):
                self.unclear("a loop whose condition never changes", node)

    def turn(self, node: ast.stmt) -> None:
        """Called at the start of each turn of a loop."""

    def range(self, node: ast.expr) -> tuple[Num, Num, Num]:
        """The bounds and the step of a loop."""
        if not isinstance(node, ast.Call):
            self.unclear("a loop over something that is no range", node)
        name = ast.unparse(node.func)
        if name not in ("range", "tl.range") or (name == "tl.range" and self.floor):
            self.unclear(f"a loop over `{name}`", node)
        for keyword in node.keywords:
            known = keyword.arg in ("num_stages", "disable_licm")
            if not known or not isinstance(keyword.value, ast.Constant):
                self.unclear(f"the option `{keyword.arg}` of a loop", node)
        values = [self.integer(a) for a in node.args]
        if len(values) == 1:
            return Num(0), values[0], Num(1)
        if len(values) == 2:
            return values[0], values[1], Num(1)
        if len(values) == 3:
            return values[0], values[1], values[2]
        self.unclear("a range", node)

    # Expressions ------------------------------------------------------------------------------

    def integer(self, node: ast.expr) -> Num:
        """An expression that must be an integer."""
        value = self.eval(node)
        if isinstance(value, bool) or not isinstance(value, int | Num):
            self.unclear("this is no integer", node)
        return Num(value) if isinstance(value, int) else value

    def eval(self, node: ast.expr) -> Any:
        """The value of an expression."""
        before, self.node = self.node, node
        try:
            found = self._eval(node)
        except Misfit as misfit:
            self.hazard(str(misfit))
        self.node = before
        return found

    def _eval(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, int | float | str | bool) or node.value is None:
                return node.value
            self.unclear("a constant", node)
        if isinstance(node, ast.Name):
            if node.id in self.modules:
                return Name(node.id)
            if node.id not in self.env:
                return self.free(node)
            value = self.env[node.id]
            if isinstance(value, Choice):
                here = [part for part in value.parts if np.any(part[0] & self.on)]
                return here[0][1] if len(here) == 1 else Choice(tuple(here))
            return value
        if isinstance(node, ast.BinOp):
            return self.binary(type(node.op), self.eval(node.left), self.eval(node.right), node)
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.Compare):
            if len(node.ops) != 1:
                self.unclear("a chain of comparisons", node)
            left, right = self.eval(node.left), self.eval(node.comparators[0])
            return self.compare(type(node.ops[0]), left, right, node)
        if isinstance(node, ast.BoolOp):
            parts = [self.integer(v) for v in node.values]
            arrays = [full(p.v, self.lanes) != 0 for p in parts]
            both = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return Num(both.reduce(arrays).astype(np.int64))
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.eval(e) for e in node.elts)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.eval(node.value), node)
        if isinstance(node, ast.Subscript):
            return self.subscript(self.eval(node.value), node)
        if isinstance(node, ast.Call):
            return self.call(node)
        self.unclear(f"an expression of the kind {type(node).__name__}", node)

    def free(self, node: ast.Name) -> Any:
        """A name that nothing has bound."""
        self.unclear(f"the name `{node.id}`", node)

    def attribute(self, value: Any, node: ast.Attribute) -> Any:
        """``value.name``."""
        if isinstance(value, Name) and value.of is None:
            return Name(f"{value.path}.{node.attr}")
        return Name(node.attr, value)

    def subscript(self, value: Any, node: ast.Subscript) -> Any:
        """``value[…]``."""
        self.unclear("an index", node)

    def call(self, node: ast.Call) -> Any:
        """A call."""
        self.unclear("a call", node)

    def unary(self, node: ast.UnaryOp) -> Any:
        """``-x``."""
        value = self.eval(node.operand)
        if isinstance(node.op, ast.USub):
            if isinstance(value, int | float):
                return -value
            if isinstance(value, Num):
                return Num(-value.v, value.wide)
            if isinstance(value, Data):
                return Data(value.shape, value.flows)
        self.unclear("an operator", node)

    def each(self, value: Any, function: Any) -> Any:
        """``function`` of a value, of a Choice in each of its parts."""
        if not isinstance(value, Choice):
            return function(value)
        found: Any = None
        for mask, part in value.parts:
            found = select(mask, function(part), found)
        return found

    def binary(self, op: type[ast.operator], a: Any, b: Any, node: ast.AST) -> Any:
        """An operator of two values."""
        if isinstance(a, Choice) or isinstance(b, Choice):
            parts = [
                (m & n, self.binary(op, x, y, node))
                for m, x in options(self.on, a)
                for n, y in options(self.on, b)
                if (m & n).any()
            ]
            return Choice(tuple(parts))
        if isinstance(a, bool) or isinstance(b, bool):
            self.unclear("a truth value as a number", node)
        if isinstance(a, int) and isinstance(b, int):
            a = Num(a)
        if isinstance(a, int) and not isinstance(b, Data):
            a = Num(a)
        if isinstance(b, int) and not isinstance(a, Data):
            b = Num(b)
        if isinstance(a, Num) and isinstance(b, Num):
            return self.arithmetic(op, a, b, node)
        if isinstance(a, Pointer) and op is ast.Add and isinstance(b, Num | Lattice):
            return self.moved(a, b, node)
        if isinstance(a, Num | Lattice) and isinstance(b, Num | Lattice):
            return self.lattice(op, a, b, node)
        if isinstance(a, Inside) and isinstance(b, Inside) and op is ast.BitAnd:
            return self.both(a, b)
        return self.other(op, a, b, node)

    def other(self, op: type[ast.operator], a: Any, b: Any, node: ast.AST) -> Any:
        """An operator of values that are no integers."""
        self.unclear("an operator", node)

    def arithmetic(self, op: type[ast.operator], a: Num, b: Num, node: ast.AST) -> Num:
        """Integer arithmetic, a value a lane."""
        wide = a.wide or b.wide
        x, y = np.asarray(a.v, dtype=np.int64), np.asarray(b.v, dtype=np.int64)
        tokens = join(a.tokens, b.tokens) if op is ast.Add else {}
        if op is ast.Add:
            v = x + y
        elif op is ast.Sub:
            v, tokens = x - y, a.tokens
        elif op is ast.Mult:
            v = x * y
        elif op is ast.FloorDiv or op is ast.Mod:
            one, two = full(x, self.lanes)[self.on], full(y, self.lanes)[self.on]
            if (two <= 0).any() or (not self.floor and (one < 0).any()):
                self.unclear("a division with a negative number or by zero", node)
            safe = np.where(y == 0, 1, y)
            v = x // safe if op is ast.FloorDiv else x % safe
        elif op is ast.BitAnd or op is ast.BitOr:
            v = x & y if op is ast.BitAnd else x | y
        else:
            self.unclear("an operator of integers", node)
        self.fits(v, wide, node)
        return Num(v if v.ndim else int(v), wide, tokens)

    def fits(self, v: Any, wide: bool, node: ast.AST | None) -> None:
        """Refuses a 32-bit integer that wraps."""
        if wide or self.floor:
            return
        low, high = (v.min(), v.max()) if isinstance(v, np.ndarray) and v.ndim else (v, v)
        if low >= -LARGEST - 1 and high <= LARGEST:
            return  # so it is in every lane, those that are off too
        array = full(v, self.lanes)[self.on]
        if array.size and (array.max() > LARGEST or array.min() < -LARGEST - 1):
            self.node = node if node is not None else self.node
            self.hazard("32-bit arithmetic wraps: an offset past 2^31 needs 64 bits")

    def lattice(self, op: type[ast.operator], a: Any, b: Any, node: ast.AST) -> Lattice:
        """Arithmetic of integer tiles that stays affine."""
        x = a if isinstance(a, Lattice) else Lattice(a.v, (), (), a.wide, a.tokens)
        y = b if isinstance(b, Lattice) else Lattice(b.v, (), (), b.wide, b.tokens)
        wide = x.wide or y.wide
        if op is ast.Mult and not (x.shape and y.shape):
            tile, factor = (x, y) if x.shape else (y, x)
            # A multiple by a constant other than 0 depends on all that the tile does.
            scaled = isinstance(factor.base, int) and factor.base != 0
            made = Lattice(
                np.asarray(tile.base) * factor.base,
                tile.shape,
                tuple(np.asarray(s) * factor.base for s in tile.steps),
                wide,
                tile.tokens if scaled else {},
            )
        elif op in (ast.Add, ast.Sub):
            sign = 1 if op is ast.Add else -1
            shape = self.broadcast(x.shape, y.shape, node)
            left, right = _steps(x, len(shape)), _steps(y, len(shape))
            made = Lattice(
                np.asarray(x.base) + sign * np.asarray(y.base),
                shape,
                tuple(
                    np.asarray(s) + sign * np.asarray(t) for s, t in zip(left, right, strict=True)
                ),
                wide,
                join(x.tokens, y.tokens) if sign > 0 else x.tokens,
            )
        else:
            self.unclear("an operator of integer tiles", node)
        far = full(made.base, self.lanes)
        for extent, step in zip(made.shape, made.steps, strict=True):
            far = far + full(step, self.lanes) * (extent - 1)
        self.fits(far, wide, node)
        return made

    def broadcast(self, a: tuple[int, ...], b: tuple[int, ...], node: ast.AST) -> tuple[int, ...]:
        """The common shape of two tiles, as in NumPy."""
        if not a or not b:
            return a or b
        if len(a) != len(b) or any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
            self.unclear(f"tiles of shapes {a} and {b} together", node)
        return tuple(max(x, y) for x, y in zip(a, b, strict=True))

    def moved(self, pointer: Pointer, by: Num | Lattice, node: ast.AST) -> Pointer:
        """A pointer and an offset."""
        if isinstance(by, Num):
            base = np.asarray(pointer.base) + np.asarray(by.v) * pointer.unit
            tokens = join(pointer.tokens, by.tokens)
            return Pointer(
                pointer.symbol,
                pointer.home,
                base,
                pointer.unit,
                pointer.shape,
                pointer.steps,
                tokens,
            )
        whole = Lattice(0, pointer.shape, pointer.steps, True)
        shape = self.broadcast(whole.shape, by.shape, node)
        steps = tuple(
            np.asarray(s) + np.asarray(t)
            for s, t in zip(_steps(whole, len(shape)), _steps(by, len(shape)), strict=True)
        )
        base = np.asarray(pointer.base) + np.asarray(by.base) * pointer.unit
        tokens = join(pointer.tokens, by.tokens)
        return Pointer(pointer.symbol, pointer.home, base, pointer.unit, shape, steps, tokens)

    def both(self, a: Inside, b: Inside) -> Inside:
        """Where both masks hold."""
        shape = self.broadcast(a.shape, b.shape, self.node or ast.Pass())
        limits = []
        for axis, extent in enumerate(shape):
            sides = [
                full(m.limits[axis], self.lanes)
                if m.shape[axis] == extent
                else np.full(self.lanes, extent)
                for m in (a, b)
            ]
            for m in (a, b):
                # Along an axis of length one a mask is all or nothing.
                if m.shape[axis] == 1 and extent > 1:
                    sides.append(np.where(full(m.limits[axis], self.lanes) > 0, extent, 0))
            limits.append(np.minimum.reduce(sides))
        return Inside(shape, tuple(limits))

    def compare(self, op: type[ast.cmpop], a: Any, b: Any, node: ast.AST) -> Any:
        """A comparison: of integers a truth value a lane, of an integer tile a mask."""
        if isinstance(a, int):
            a = Num(int(a))
        if isinstance(b, int):
            b = Num(int(b))
        if op not in _COMPARE:
            self.unclear("a comparison", node)
        if isinstance(a, Num) and isinstance(b, Num):
            return Num(np.asarray(_COMPARE[op](a.v, b.v)).astype(np.int64))
        if isinstance(a, Lattice) and isinstance(b, Num) and op is ast.Lt:
            return self.below(a, b, node)
        return self.compared(op, a, b, node)

    def compared(self, op: type[ast.cmpop], a: Any, b: Any, node: ast.AST) -> Any:
        """A comparison of values that are no integers."""
        self.unclear("a comparison", node)

    def below(self, a: Lattice, b: Num, node: ast.AST) -> Inside:
        """``tile < bound`` where the tile grows by one along one axis."""
        live = [n for n, extent in enumerate(a.shape) if extent > 1]
        if len(live) > 1:
            self.not_covered("a mask over two axes at once", node)
        room = full(b.v, self.lanes) - full(a.base, self.lanes)
        limits: list[Any] = []
        for axis, (extent, step) in enumerate(zip(a.shape, a.steps, strict=True)):
            if axis in live and np.any(full(step, self.lanes)[self.on] != 1):
                self.unclear("a mask over a tile with steps", node)
            whole = axis in live or (not live and axis == 0)
            limits.append(np.clip(room, 0, extent) if whole else np.full(self.lanes, extent))
        return Inside(a.shape, tuple(limits))


def _steps(tile: Lattice, rank: int) -> tuple[Any, ...]:
    return tile.steps if tile.shape else (0,) * rank
