"""Calls in emitted kernels: ``tl`` functions, as far as they reach addresses, masks and tiles."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.validate import tiles
from tilelink.backend.validate.layout import TL_NAMES
from tilelink.backend.validate.machine import Machine
from tilelink.backend.validate.values import (
    Choice,
    Data,
    Descriptor,
    Flow,
    Inside,
    Key,
    Lattice,
    Mask,
    Name,
    Num,
    Pointer,
    full,
    options,
    select,
)
from tilelink.errors import Source

DTYPES = frozenset(TL_NAMES.values())
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "int64": 8, "int1": 1}
UNARY = frozenset(
    ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "sigmoid", "floor")
)


class TileCalls(Machine):
    """What ``tl`` functions and methods of tiles mean. Loads and stores are left to subclasses."""

    def __init__(self, source: Source, lanes: int) -> None:
        super().__init__(source, lanes)
        self.loose: set[tiles.Site] = (
            set()
        )  # loads of products whose order the program's rows decide

    def free(self, node: ast.Name) -> Any:
        """Built-in functions of kernels."""
        if node.id in ("range", "float"):
            return Name(node.id)
        return super().free(node)

    def call(self, node: ast.Call) -> Any:
        """A call by its dotted name, or of a method."""
        function = self.eval(node.func)
        if not isinstance(function, Name):
            self.unclear("a call of a value", node)
        args = [self.eval(a) for a in node.args]
        options_ = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.unclear("`**` in a call", node)
            options_[keyword.arg] = self.eval(keyword.value)
        if function.of is not None:
            return self.method(function.of, function.path, args, options_, node)
        name = function.path
        short = name.removeprefix("tl.")
        if name.startswith("tl.") and short in UNARY and len(args) == 1 and not options_:
            return self.each(args[0], lambda v: self.plain(v))
        handler = getattr(self, "on_" + name.replace(".", "_"), None)
        if handler is None:
            self.unclear(f"a call of `{name}`", node)
        try:
            return handler(*args, **options_)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            self.unclear(f"the arguments of `{name}`", node)

    def method(
        self, value: Any, name: str, args: list[Any], options_: dict[str, Any], node: ast.Call
    ) -> Any:
        """A method of a tile, a pointer or a descriptor."""
        if name == "to" and len(args) == 1 and set(options_) <= {"bitcast"}:
            return self.each(value, lambda v: self.converted(v, args[0]))
        if name == "load" and len(args) == 1 and not options_:
            return self.fetch(value, args[0])
        if name == "store" and len(args) == 2 and not options_:
            return self.put(value, args[0], args[1])
        self.unclear(f"a call of the method `{name}`", node)

    def fetch(self, value: Any, at: Any) -> Any:
        """``descriptor.load``."""
        self.unclear("a load")

    def put(self, value: Any, at: Any, data: Any) -> Any:
        """``descriptor.store``."""
        self.unclear("a store")

    def data(self, value: Any) -> Data:
        """A tile of numbers; integers and masks are numbers of their own."""
        if isinstance(value, Data):
            return value
        if isinstance(value, bool | int | float):
            return Data(())
        if isinstance(value, Num):
            return Data(())
        if isinstance(value, Lattice | Inside):
            return Data(value.shape)
        self.unclear("this is no tile")

    def plain(self, value: Any) -> Data:
        """A function of each element."""
        tile = self.data(value)
        return Data(tile.shape, tile.flows)

    def other(self, op: type[ast.operator], a: Any, b: Any, node: ast.AST) -> Any:
        """Arithmetic of tiles."""
        x, y = self.data(a), self.data(b)
        goes_on = self.summing(op, x, y)
        shape = tiles.shared(x.shape, y.shape)
        made = tiles.merged(
            [tiles.lifted(x, shape), tiles.lifted(y, shape)], shape, self.on, self.loose
        )
        # Only a sum from the left keeps its order of additions.
        if goes_on and op is ast.Add and x.terms and y.terms and len(y.terms) == 1:
            sums = None
            for side in (x.sums, y.sums):
                sums = side if sums is None else sums & side if side is not None else sums
            return replace(made, terms=x.terms + y.terms, single=x.single and y.single, sums=sums)
        return made

    def summing(self, op: type[ast.operator], x: Data, y: Data) -> bool:
        """Called with the operands of every operator; whether a sum of them is one sum from the left."""
        return True

    def compared(self, op: type[ast.cmpop], a: Any, b: Any, node: ast.AST) -> Any:
        """A comparison of tiles."""
        if isinstance(a, Inside) and isinstance(b, Num):
            self.unclear("a mask compared with a number", node)
        return self.other(ast.Sub, a, b, node)

    def dtype(self, value: Any) -> str:
        """The name of an element type."""
        if isinstance(value, Name) and value.path.removeprefix("tl.") in DTYPES:
            return value.path.removeprefix("tl.")
        self.unclear("this is no element type")

    def converted(self, value: Any, to: Any) -> Any:
        """``value.to(type)``: of a pointer another unit, of numbers another precision."""
        if isinstance(value, Pointer):
            if not isinstance(to, Name) or not to.path.startswith("*"):
                self.unclear("a pointer turned into a number")
            unit = SIZES[to.path[1:]]
            if value.shape:
                self.unclear("a tile of pointers of another type")
            return replace(value, unit=unit)
        if isinstance(value, Num):
            return self.on_tl_cast(value, to)
        return self.rounded(self.data(value), self.dtype(to))

    def rounded(self, tile: Data, name: str) -> Data:
        """A tile that is converted to an element type; it is ``single`` in that in which sums are taken."""
        wide = tile.rounded if tile.rounded in ("int32", "int64") else "float32"
        return replace(tile, single=name == wide, rounded=name)

    def shape(self, value: Any) -> tuple[int, ...]:
        """A tuple of constants."""
        if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
            return value
        self.unclear("a shape that is not constant")

    # tl ---------------------------------------------------------------------------------------

    def on_float(self, text: Any) -> Any:
        """``float("inf")``."""
        if text not in ("inf", "-inf", "nan"):
            self.unclear("a number")
        return float(text)

    def on_tl_cast(self, value: Any, to: Any) -> Any:
        """``tl.cast``."""
        name = self.dtype(to)
        if isinstance(value, int):
            value = Num(value)
        if isinstance(value, Num | Lattice):
            if name == "int64":
                return replace(value, wide=True)
            if name == "int32" and isinstance(value, Num):
                self.fits(value.v, False, None)
                return replace(value, wide=False)
        return self.rounded(self.data(value), name)

    def on_tl_arange(self, lo: Any, hi: Any) -> Lattice:
        """``tl.arange``."""
        if lo != 0 or not isinstance(hi, int) or hi < 1 or hi & (hi - 1):
            self.unclear("a range of indices that is not 0 to a power of two")
        return Lattice(0, (hi,), (1,))

    def on_tl_zeros(self, shape: Any, dtype: Any) -> Any:
        """``tl.zeros``."""
        self.dtype(dtype)
        return Data(self.shape(shape))

    def on_tl_full(self, shape: Any, value: Any, dtype: Any) -> Any:
        """``tl.full``: an integer where it has no shape and is one."""
        name, sizes = self.dtype(dtype), self.shape(shape)
        if not sizes and name in ("int32", "int64") and isinstance(value, int | Num):
            made = Num(value) if isinstance(value, int) else value
            return replace(made, wide=name == "int64")
        return Data(sizes)

    def on_tl_minimum(self, a: Any, b: Any) -> Any:
        """``tl.minimum``."""
        return self.extremum(np.minimum, a, b)

    def on_tl_maximum(self, a: Any, b: Any) -> Any:
        """``tl.maximum``."""
        return self.extremum(np.maximum, a, b)

    def extremum(self, function: Any, a: Any, b: Any) -> Any:
        """The smaller or larger of two values."""
        x = Num(a) if isinstance(a, int) else a
        y = Num(b) if isinstance(b, int) else b
        if isinstance(x, Num) and isinstance(y, Num):
            return Num(function(x.v, y.v), x.wide or y.wide)
        return self.other(ast.Sub, a, b, self.node or ast.Pass())

    def on_tl_cdiv(self, a: Any, b: Any) -> Num:
        """``tl.cdiv``: the ceiling of a quotient; of nothing or less it is not positive."""
        x, y = (Num(v) if isinstance(v, int) else v for v in (a, b))
        if not isinstance(x, Num) or not isinstance(y, Num):
            self.unclear("a quotient of tiles")
        if np.any(full(y.v, self.lanes)[self.on] <= 0):
            self.unclear("a division by zero or less")
        top = np.asarray(x.v) + np.asarray(y.v) - 1
        # The device rounds towards zero.
        quotient = np.sign(top) * (np.abs(top) // np.where(np.asarray(y.v) == 0, 1, y.v))
        return Num(quotient, x.wide or y.wide)

    def on_tl_where(self, mask: Any, a: Any, b: Any) -> Any:
        """``tl.where``: a choice a lane where the condition is one truth value, else a blend."""
        if isinstance(mask, Num):
            lanes = full(mask.v, self.lanes) != 0
            return select(lanes, a, b)
        if isinstance(mask, Inside) and isinstance(a, Data) and isinstance(b, int | float):
            if len(mask.shape) != len(a.shape):
                self.unclear("a mask of another shape")
            limits = [
                full(limit, self.lanes) if size == extent else np.full(self.lanes, extent)
                for limit, size, extent in zip(mask.limits, mask.shape, a.shape, strict=True)
            ]
            return Data(a.shape, {k: tiles.limited(f, limits) for k, f in a.flows.items()})
        parts = [self.data(v) for v in (mask, a, b)]
        shape = tiles.shared(parts[0].shape, tiles.shared(parts[1].shape, parts[2].shape))
        wide = [tiles.lifted(p, shape) for p in parts]
        return tiles.merged(wide, shape, self.on, self.loose)

    def on_tl_multiple_of(self, value: Any, by: Any) -> Any:
        """``tl.multiple_of``: a promise on an address or a number, which is checked."""
        if not isinstance(by, int):
            self.unclear("an alignment that is not constant")
        for mask, part in options(self.on, value):
            if isinstance(part, Num):
                if np.any(full(part.v, self.lanes)[self.on & mask] % by):
                    self.hazard(f"the number is not a multiple of {by} in every worker")
                continue
            if not isinstance(part, Pointer) or part.shape:
                self.unclear("an alignment of something that is no address")
            # Everything starts at a multiple of 16 bytes.
            if by > 16 or np.any(full(part.base, self.lanes)[self.on & mask] % by):
                self.hazard(f"the address is not a multiple of {by} bytes in every worker")
        return value

    def on_tl_pointer_type(self, dtype: Any) -> Name:
        """``tl.pointer_type``."""
        return Name("*" + self.dtype(dtype))

    def on_tl_dot(self, a: Any, b: Any, acc: Any = None, input_precision: Any = None) -> Data:
        """``tl.dot``."""
        if input_precision not in (None, "ieee"):
            self.unclear("a precision of products")
        total = None if acc is None else self.data(acc)
        return tiles.product(self.data(a), self.data(b), total, self.on, self.paired, self.loose)

    def paired(
        self, left: Key, one: Flow, i: int, right: Key, two: Flow, j: int, both: Mask
    ) -> bool:
        """Whether the places of two regions that a product sums over are compared later."""
        return False

    def on_tl_trans(self, value: Any) -> Data:
        """``tl.trans`` of a matrix."""
        tile = self.data(value)
        if len(tile.shape) != 2:
            self.unclear("a transposition of something that is no matrix")
        return tiles.mapped(tile, tile.shape[::-1], lambda f: f.axes[::-1])

    def on_tl_sum(self, value: Any, axis: Any, keep_dims: Any = False) -> Data:
        """A reduction along an axis."""
        tile = self.data(value)
        if not isinstance(axis, int) or not 0 <= axis < len(tile.shape):
            self.unclear("the axis of a reduction")

        def kept(sizes: tuple[int, ...], blank: int) -> tuple[int, ...]:
            return sizes[:axis] + ((blank,) if keep_dims else ()) + sizes[axis + 1 :]

        made = tiles.mapped(tile, kept(tile.shape, 1), lambda f: kept(f.axes, -1))
        return replace(made, terms=None)

    on_tl_max = on_tl_sum
    on_tl_min = on_tl_sum

    def on_device_tanh(self, value: Any) -> Data:
        """``device.tanh``."""
        return self.plain(value)

    def on_device_power(self, a: Any, b: Any) -> Any:
        """``device.power``."""
        return self.other(ast.Pow, a, b, self.node or ast.Pass())

    def on_device_integer_power(self, a: Any, b: Any, to: Any) -> Any:
        """``device.integer_power``."""
        self.dtype(to)
        return self.plain(self.on_device_power(a, b))

    def on_device_floordiv(self, a: Any, b: Any) -> Any:
        """``device.floordiv``."""
        return self.floored(ast.FloorDiv, a, b)

    def on_device_floormod(self, a: Any, b: Any) -> Any:
        """``device.floormod``."""
        return self.floored(ast.Mod, a, b)

    def floored(self, op: type[ast.operator], a: Any, b: Any) -> Any:
        """A division that rounds down: of numbers exactly, of tiles what flows into it."""
        if isinstance(a, Data | Lattice) or isinstance(b, Data | Lattice):
            return self.other(op, a, b, self.node or ast.Pass())
        before, self.floor = self.floor, True
        try:
            return self.binary(op, a, b, self.node or ast.Pass())
        finally:
            self.floor = before

    def on_tl_reshape(self, value: Any, shape: Any) -> Data:
        """``tl.reshape`` of a matrix to (rows, 2, half): the first step of splitting it."""
        tile, sizes = self.data(value), self.shape(shape)
        if not tile.flows and not tile.form:
            return Data(sizes)
        if len(tile.shape) == 2 and sizes == (tile.shape[0], 2, tile.shape[1] // 2):
            return replace(tile, form="halves")
        self.unclear("a reshape")

    def on_tl_permute(self, value: Any, order: Any) -> Data:
        """``tl.permute`` of such a tile: the second step."""
        if isinstance(value, Data) and value.form == "halves" and order == (0, 2, 1):
            return replace(value, form="pairs")
        self.unclear("a permutation")

    def on_tl_split(self, value: Any) -> tuple[Data, Data]:
        """``tl.split``: the left and the right half of the columns."""
        if isinstance(value, Data) and value.form == "pairs":
            return tiles.halves(replace(value, form=""))
        self.unclear("a split")

    # Indices ----------------------------------------------------------------------------------

    def subscript(self, value: Any, node: ast.Subscript) -> Any:
        """``tile[:, None]`` and the like: new axes of length one."""
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        order: list[bool] = []
        for part in parts:
            whole = isinstance(part, ast.Slice) and not (part.lower or part.upper or part.step)
            if not whole and not (isinstance(part, ast.Constant) and part.value is None):
                self.unclear("an index", node)
            order.append(whole)
        shape = getattr(value, "shape", None)
        if shape is None or sum(order) != len(shape) or isinstance(value, Choice | Descriptor):
            self.unclear("an index", node)

        def spread(items: tuple[Any, ...], blank: Any) -> tuple[Any, ...]:
            rest = iter(items)
            return tuple(next(rest) if keep else blank for keep in order)

        sizes = spread(shape, 1)
        if isinstance(value, Lattice):
            return replace(value, shape=sizes, steps=spread(value.steps, 0))
        if isinstance(value, Inside):
            return Inside(sizes, spread(value.limits, np.ones(self.lanes, dtype=np.int64)))
        if isinstance(value, Data):
            return tiles.mapped(value, sizes, lambda f: spread(f.axes, -1))
        self.unclear("an index", node)
