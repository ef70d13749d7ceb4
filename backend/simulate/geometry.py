"""The static side of a fused program: expressions, shapes, queue order and indices, made concrete.

Written from ``docs/ir.md`` alone and shared with no other stage, so that a run checks the expansion
that the proof uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from tilelink.backend.simulate.errors import BoundsError
from tilelink.ir import DTYPES, All, At, Broadcast, Expr, Op, Range, Ref, Value, parse_ir
from tilelink.ir.layout import ACK, WORD
from tilelink.ir.limits import check_rows

Env: TypeAlias = dict[str, Any]
"""Names of expressions: extents, WORLD, RANK, scalars, fields of tiles (``m.start``), tables."""
Function: TypeAlias = Callable[[Mapping[str, Any]], int]
Box: TypeAlias = tuple[tuple[int, int], ...]

AGENTS = ("head", "stream", "launch", "collective")
SYNC = frozenset({"wait", "notify", "transfer"})


class Tile(NamedTuple):
    """A range of an axis and its number."""

    start: int
    stop: int
    number: int


@dataclass(frozen=True, slots=True)
class Decl:
    """A tensor, buffer, flag or counter: its shape on one rank, in elements."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    op: Op


def _source(expr: Expr) -> str:
    if expr.op == "const":
        return f"({expr.args[0]})"
    if expr.op == "name":
        return f"e[{expr.args[0]!r}]"
    if expr.op == "table":
        return f"int(e[{expr.args[0]!r}][{', '.join(_source(a) for a in expr.args[1:])},])"
    left, right = (_source(a) for a in expr.args)
    if expr.op in ("min", "max"):
        return f"{expr.op}({left}, {right})"
    if expr.op in ("and", "or"):
        return f"int(bool({left}) {expr.op} bool({right}))"
    if expr.op in ("==", "!=", "<", "<=", ">", ">="):
        return f"int({left} {expr.op} {right})"
    return f"({left} {'//' if expr.op == '/' else expr.op} {right})"


# The same expressions stand in many programs of a family: compiled once.
@lru_cache(maxsize=4096)
def _compiled(source: str) -> Function:
    function: Function = eval(f"lambda e: {source}")
    return function


@lru_cache(maxsize=4096)
def _dimension(dim: str) -> Function:
    return _compiled(_source(Expr.of(parse_ir(f"dim {{value = {dim}}}")["value"])))


class Geometry:
    """A fused program with its extents bound; everything a rank needs to walk it."""

    def __init__(self, program: Op, workers: int | None = None) -> None:
        self.program = program
        self.world = int(program["world"])
        self.extents: dict[str, int] = {}
        self.decls: dict[str, Decl] = {}
        self._functions: dict[int, tuple[Expr, Function]] = {}
        self._queues: dict[tuple[Any, ...], list[tuple[Tile, ...]]] = {}
        self._sync: dict[int, bool] = {}
        self._points: dict[int, tuple[Ref, tuple[tuple[Function, int], ...] | None]] = {}
        for op in program.find("extent"):
            self.extents[op.symbol] = self.value(op["value"], self.env(0))
        env = self.env(0)
        for op in program.body:
            if op.name in ("tensor", "buffer", "flag", "counter"):
                self.decls[op.symbol] = self._declare(op, env)
        self._aliases: dict[str, str] = {
            name: decl.op["alias"].symbol
            for name, decl in self.decls.items()
            if decl.op.get("alias")
        }
        self.agents = tuple(op for op in program.body if op.name in AGENTS)
        self.agent_names = tuple("head" if a.name == "head" else a.symbol for a in self.agents)
        self.workers = {
            a.symbol: int(a["workers"]) if workers is None else max(1, workers)
            for a in self.agents
            if a.name == "launch"
        }
        self._check_memory()
        shared = [d.name for d in self.decls.values() if d.op.get("space") == "symmetric"]
        flags = [d.name for d in self.decls.values() if d.kind == "flag"]
        self.slotted = frozenset([*shared, *flags] if program.get("slots") is not None else [])

    @cached_property
    def slack(self) -> dict[str, int]:
        """How many epochs behind the call's a wait for a flag may be content with, at most."""
        found: dict[str, int] = {}
        for op in self.program.walk():
            if op.name == "wait" and self.decls[op.symbol].kind == "flag":
                found[op.symbol] = max(found.get(op.symbol, 0), -int(op.get("epoch", 0)))
        return found

    @cached_property
    def places(self) -> tuple[dict[str, str], dict[str, str]]:
        """What each symbol is called in even and in odd calls: see :meth:`slot`."""
        return {s: s for s in self.decls}, {s: self.slot(s, 1) for s in self.decls}

    def slot(self, symbol: str, call: int) -> str:
        """What ``symbol`` is called in call ``call``: with slots, odd calls have another place for it."""
        return f"{symbol} of odd calls" if call % 2 and symbol in self.slotted else symbol

    def env(self, rank: int) -> Env:
        """The names that every expression on ``rank`` may use."""
        return {**self.extents, "WORLD": self.world, "RANK": rank}

    def _declare(self, op: Op, env: Env) -> Decl:
        shape = [self.value(d, env) for d in op["dims"]]
        if op.name == "tensor" and op.get("over") is not None and op["role"] != "temp":
            shape[int(op["over"])] //= self.world
        return Decl(op.name, op.symbol, tuple(shape), op.get("dtype", "int32"), op)

    def home(self, symbol: str) -> str:
        """Whose memory a tensor or buffer is: its own, or what it is an alias of."""
        return self._aliases.get(symbol, symbol)

    def _check_memory(self) -> None:
        """BoundsError where two things of the arena share bytes, or one lies outside of it.

        All lie behind the words that the arena keeps for itself, flags and counters on words. An alias
        is as large as what it is an alias of.
        """
        for alias, target in self._aliases.items():
            mine, whose = self.decls[alias], self.decls.get(target)
            alike = whose is not None and (whose.shape, whose.dtype) == (mine.shape, mine.dtype)
            if not alike or target in self._aliases:
                detail = f"is an alias of `{target}`, which is another kind of memory"
                raise BoundsError(mine.op.span, symbol=alias, detail=detail)
        placed = sorted(
            (
                d.op.get("space") == "local",
                int(d.op["offset"]),
                prod(d.shape) * DTYPES[d.dtype],
                d.name,
            )
            for d in self.decls.values()
            if d.kind != "tensor" and d.op.get("offset") is not None
        )
        for local, at, size, name in placed:
            words = self.decls[name].kind != "buffer"
            if at < (0 if local else ACK * WORD) or (words and at % WORD):
                detail = f"begins at byte {at}: on the arena's own words, or on no word"
                raise BoundsError(self.decls[name].op.span, symbol=name, detail=detail)
            end = self.program.get("workspace" if local else "bytes")
            if end is not None and at + size > int(end):
                detail = f"ends at byte {at + size} of memory of {end}"
                raise BoundsError(self.decls[name].op.span, symbol=name, detail=detail)
        for (place, at, size, name), (space, other_at, _, other) in itertools.pairwise(placed):
            if place == space and at + size > other_at:
                detail = f"shares bytes of the arena with `{other}`"
                raise BoundsError(self.decls[name].op.span, symbol=name, detail=detail)

    def value(self, expr: Any, env: Mapping[str, Any]) -> int:
        """The integer that an attribute, an int or an expression, has under ``env``."""
        return expr if isinstance(expr, int) else self.function(expr)(env)

    def function(self, expr: Expr) -> Function:
        """``expr`` compiled once to a Python function of the environment."""
        found = self._functions.get(id(expr))
        if found is None:
            found = self._functions[id(expr)] = (expr, _compiled(_source(expr)))
        return found[1]

    def bound(self, attribute: Any) -> Function:
        """:meth:`value` of an attribute as a function of the environment."""
        if isinstance(attribute, int):
            return lambda env: attribute
        return self.function(attribute)

    def length(self, dim: str, env: Mapping[str, Any]) -> int:
        """The length that a dimension of a type has: a tile's, an extent expression's or a number's."""
        start = env.get(f"{dim}.start")
        if start is not None:
            return int(env[f"{dim}.stop"] - start)
        if dim.isdigit():
            return int(dim)
        return _dimension(dim)(env)

    def shape(self, value: Value, env: Mapping[str, Any]) -> tuple[int, ...]:
        """The concrete shape of ``value``."""
        return tuple(self.length(dim, env) for dim in value.type.shape)

    def has_sync(self, op: Op) -> bool:
        """Whether a wait, notify or transfer stands inside ``op``."""
        found = self._sync.get(id(op))
        if found is None:
            found = any(o.name in SYNC for o in op.walk())
            self._sync[id(op)] = found
        return found

    def queue(self, op: Op, env: Mapping[str, Any], factor: int = 1) -> list[tuple[Tile, ...]]:
        """The tiles of a stage or of a loop over extents, in order of positions.

        ``factor`` multiplies the tile sizes. The last axes are the block's tile variables, so a loop
        with carried values has as many as its extents.
        """
        key = (id(op), env["RANK"], factor)
        if key in self._queues:
            return self._queues[key]
        extents = [self.value(x, env) for x in op["extent"]]
        sizes = op.get("tile", (1,) * len(extents))
        tiles = [
            self.value(t, env) * factor if arg.type.is_tile else 1
            for t, arg in zip(sizes, op.args[: len(extents)], strict=True)
        ]
        count = prod(
            -(-extent // max(1, tile)) for extent, tile in zip(extents, tiles, strict=True)
        )
        check_rows(count, "this queue or loop of tiles", op.span)
        found = list(self._order(op, env, extents, tiles))
        if op.get("positions") is not None:
            lo, hi = op["positions"]
            if not 0 <= lo < hi <= len(found):
                detail = f"positions {lo}..{hi} of a queue of {len(found)}"
                raise BoundsError(op.span, symbol=op.symbol, detail=detail)
            found = found[lo:hi]
        self._queues[key] = found
        return found

    def _order(
        self, op: Op, env: Mapping[str, Any], extents: list[int], tiles: list[int]
    ) -> Iterator[tuple[Tile, ...]]:
        if 0 in extents:
            return
        axis = int(op.get("axis", 0))
        segment = self.value(op.get("segment", extents[axis]), env)
        segments = self.value(op.get("segments", extents[axis] // segment), env)
        visit, group = op.get("visit"), int(op.get("group", 1))
        live = self.value(op.get("live", segment), env)
        per, whole = -(-live // tiles[axis]), -(-segment // tiles[axis])
        others = [
            [
                Tile(lo, min(lo + size, extent), number)
                for number, lo in enumerate(range(0, extent, size))
            ]
            for i, (extent, size) in enumerate(zip(extents, tiles, strict=True))
            if i != axis
        ]
        combinations = list(itertools.product(*others))
        nb = len(combinations)
        visited = [
            position if visit is None else self.value(visit, {**env, "i": position})
            for position in range(segments)
        ]
        for q in range(segments * per * nb):
            if op.get("interleave"):
                r, turn = divmod(q, segments)
            else:
                turn, r = divmod(q, per * nb)
            seg = visited[turn]
            base, end = seg * segment, seg * segment + live
            width = group * nb
            first = r // width * group
            rows = min(per - first, group)
            a = first + r % width % rows
            b = r % width // rows
            lo = base + a * tiles[axis]
            mine = Tile(lo, min(lo + tiles[axis], end), seg * whole + a)
            rest = combinations[b]
            yield (*rest[:axis], mine, *rest[axis:])

    def bounded(self, op: Op, lo: int, hi: int, factor: int = 1) -> list[tuple[Tile, ...]]:
        """The tiles of a loop between two scalars, cut at every multiple of ``segment`` if it has one."""
        size = int(op.get("tile", (1,))[0]) * factor
        segment = int(op.get("segment", 0))
        found: list[tuple[Tile, ...]] = []
        while lo < hi:
            end = min(lo + size, hi)
            if segment:
                end = min(end, (lo // segment + 1) * segment)
            found.append((Tile(lo, end, len(found)),))
            lo = end
        return found

    def worker_range(self, launch: Op, stage: Op) -> tuple[int, int]:
        """The workers [lo, hi) that run ``stage``, scaled where the number of workers was overridden."""
        total, own = int(launch["workers"]), self.workers[launch.symbol]
        lo, hi = (int(x) for x in stage.get("workers", (0, total)))
        low = min(lo * own // total, own - 1)
        return low, max(low + 1, -(-hi * own // total))

    def first_position(self, stage: Op, worker: int, lo: int, hi: int) -> int:
        """The first position that ``worker`` of the range takes of a static queue; then every (hi - lo)-th."""
        first = self.value(stage.get("first", 0), self.env(0))
        return (worker - lo - first) % (hi - lo)

    def elements(self, ref: Ref, env: Mapping[str, Any]) -> list[tuple[int, ...]]:
        """The elements of a flag or counter that ``ref`` names; BoundsError outside of it."""
        known = self._points.get(id(ref))
        if known is None:
            known = self._points[id(ref)] = ref, self._point(ref)
        if known[1] is not None:
            element = tuple([at(env) for at, _ in known[1]])
            if all(0 <= at < size for at, (_, size) in zip(element, known[1], strict=True)):
                return [element]
        decl = self.decls[ref.symbol]
        index = ref.index or tuple(All() for _ in decl.shape)
        axes: list[range] = []
        for item, size in zip(index, decl.shape, strict=True):
            if isinstance(item, All):
                axes.append(range(size))
            elif isinstance(item, Range):
                axes.append(range(self.value(item.lo, env), self.value(item.hi, env)))
            elif isinstance(item, Expr):
                at = self.value(item, env)
                axes.append(range(at, at + 1))
            else:
                at = env[str(item)[1:]]
                axes.append(range(at, at + 1))
            if len(axes[-1]) and not 0 <= axes[-1][0] <= axes[-1][-1] < size:
                detail = f"element {axes[-1][0]}..{axes[-1][-1] + 1} of an axis of length {size}"
                raise BoundsError(decl.op.span, symbol=ref.symbol, detail=detail)
        return list(itertools.product(*axes))

    def _point(self, ref: Ref) -> tuple[tuple[Function, int], ...] | None:
        """Of a reference to one element, its place on each axis and the axis's length."""
        shape = self.decls[ref.symbol].shape
        if len(ref.index) != len(shape) or any(isinstance(i, All | Range) for i in ref.index):
            return None
        places = (
            self.function(i) if isinstance(i, Expr) else itemgetter(str(i)[1:]) for i in ref.index
        )
        return tuple(zip(places, shape, strict=True))

    def flat(self, ref: Ref, env: Mapping[str, Any]) -> tuple[int, ...]:
        """Like :meth:`elements`, as numbers in row-major order."""
        shape, found = self.decls[ref.symbol].shape, []
        for element in self.elements(ref, env):
            number = 0
            for at, size in zip(element, shape, strict=True):
                number = number * size + at
            found.append(number)
        return tuple(found)

    def element(self, symbol: str, number: int) -> tuple[int, ...]:
        """The index of element ``number`` of a flag or counter."""
        index = []
        for size in reversed(self.decls[symbol].shape):
            number, at = divmod(number, size)
            index.append(at)
        return tuple(reversed(index))

    def channel(self, symbol: str, number: int) -> str:
        """An element of a flag or counter in words: ``A.ready[1, 0]``."""
        return f"{symbol}[{', '.join(map(str, self.element(symbol, number)))}]"

    def region(
        self, ref: Ref, env: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Box]:
        """How to index the tensor with PyTorch, and the box of elements that covers the access.

        ``values`` gives scalars and integer tiles by name. BoundsError outside of the tensor.
        """
        decl = self.decls[ref.symbol]
        key: list[Any] = []
        box: list[tuple[int, int]] = []
        for item in ref.index or tuple(All() for _ in decl.shape):
            if isinstance(item, Broadcast):
                key.append(None)
                continue
            size = decl.shape[len(box)] if len(box) < len(decl.shape) else -1
            lo, hi, at = self._axis(item, size, env, values)
            if not (0 <= lo <= hi <= size):
                detail = f"index {lo}..{hi} of axis {len(box)}, whose length is {size}"
                raise BoundsError(decl.op.span, symbol=ref.symbol, detail=detail)
            key.append(at)
            box.append((lo, hi))
        if len(box) != len(decl.shape):
            detail = f"{len(box)} indices for {len(decl.shape)} axes"
            raise BoundsError(decl.op.span, symbol=ref.symbol, detail=detail)
        return tuple(key), tuple(box)

    def _axis(
        self, item: Any, size: int, env: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[int, int, Any]:
        if isinstance(item, All):
            return 0, size, slice(None)
        if isinstance(item, Range):
            lo, hi = self.value(item.lo, env), self.value(item.hi, env)
            return lo, hi, slice(lo, hi)
        if isinstance(item, Expr):
            lo = self.value(item, env)
            return lo, lo + 1, lo
        if isinstance(item, At):
            name, lo = item.value.name, self.value(item.start, env)
            if not item.value.type.is_tile:
                return lo, lo + 1, lo
            hi = lo + env[f"{name}.stop"] - env[f"{name}.start"]
            return lo, hi, slice(lo, hi)
        name = item.name
        if item.type.is_tile:
            lo, hi = env[f"{name}.start"], env[f"{name}.stop"]
            return lo, hi, slice(lo, hi)
        value = values[name]
        if isinstance(value, int):
            return value, value + 1, value
        if value.numel() == 0:
            return 0, 0, value.long()
        return int(value.min()), int(value.max()) + 1, value.long()


def bind_tile(env: Env, name: str, tile: Tile) -> None:
    """Set the fields of the tile variable ``name``."""
    env[f"{name}.start"], env[f"{name}.stop"], env[f"{name}.tile"] = tile


def bind_args(args: tuple[Value, ...], tiles: tuple[Tile, ...], env: Env, values: Env) -> None:
    """Set tile variables, and scalars that count up, from one position of a queue."""
    for arg, tile in zip(args, tiles, strict=False):
        if arg.type.is_tile:
            bind_tile(env, arg.name, tile)
        else:
            env[arg.name] = values[arg.name] = tile.start


_INTEGER: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "minimum": min,
    "maximum": max,
}


def keep_scalar(op: Op, values: dict[str, Any], env: dict[str, Any]) -> None:
    """Keep the integers that bounds and indices are made of: what ``op`` yields, if it is a scalar."""
    if not op.results or op.results[0].type.shape:
        return
    name, value = op.results[0].name, None
    if op.name == "constant":
        value = op["value"]
    elif op.name == "bound":
        value = env[f"{op.operands[0].name}.{op['which']}"]
    elif op.name in _INTEGER:
        left, right = (values.get(v.name) for v in op.operands)
        if isinstance(left, int) and isinstance(right, int):
            value = _INTEGER[op.name](left, right)
    if isinstance(value, int):
        values[name] = env[name] = value
    else:
        values.pop(name, None)
