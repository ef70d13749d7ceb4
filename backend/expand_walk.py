"""From a fused program to its rows: every op of every task, evaluated over arrays.

A loop that neither waits nor notifies is not unrolled: its accesses become one row that covers the
whole loop, provided its variables only place tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tilelink.backend.expand import (
    Env,
    Ints,
    Tile,
    dims_of,
    environment,
    evaluate,
    loop_text,
    loop_tiles,
    owner_order,
    tile_sizes,
)
from tilelink.backend.expand_rows import Access, Expansion, Phase, Sync, boxes, ragged
from tilelink.ir import All, At, Broadcast, Expr, Index, Op, Range, Ref, Value
from tilelink.ir.limits import check_rows

SYNC = frozenset({"wait", "notify", "transfer"})


@dataclass(slots=True)
class _Rows:
    env: dict[str, Any]
    task: Ints
    rank: Ints
    seq: Ints

    def __len__(self) -> int:
        return len(self.task)

    def take(self, which: Any) -> _Rows:
        env = {k: v[which] if isinstance(v, np.ndarray) else v for k, v in self.env.items()}
        return _Rows(env, self.task[which], self.rank[which], self.seq[which])


def expand(program: Op, kernel: Op | None = None) -> Expansion:
    """All rows of ``program``. Raises UnknownExtent where an index or a bound has no value.

    ``kernel``, where it is known, declares the intermediates that only buffers of the program serve.
    """
    env = environment(program)
    declarations = {
        op.symbol: op
        for op in program.body
        if op.name in ("tensor", "buffer", "flag", "counter") and op.ref is not None
    }
    agents = tuple(
        op for op in program.body if op.name in ("head", "stream", "launch", "collective")
    )
    for tensor in kernel.find("tensor") if kernel is not None else ():
        declarations.setdefault(tensor.symbol, tensor)
    dims = {name: dims_of(op, env) for name, op in declarations.items()}
    found = Expansion(program, env, agents, declarations, dims)
    for name, op in declarations.items():
        if op.name == "tensor" and op.get("over") is not None:
            found.owners[name] = owner_order(op, env)
    _Walker(found).run()
    return found


class _Walker:
    def __init__(self, out: Expansion) -> None:
        self.out = out
        self.world = out.world
        # A loop over channels of the capacity says how many there are itself.
        ends = (op["hi"] for op in out.program.walk() if op.name == "for_range")
        self.largest = max([1, *out.env.values(), *(end for end in ends if isinstance(end, int))])
        self.ranks: list[Ints] = []
        self.kinds: list[Ints] = []
        self.next = 0
        self.pairs = 0
        self.wholes: dict[int, bool] = {}
        self.permuted = frozenset(
            name
            for name, (owner, place) in out.owners.items()
            if len(owner)
            and not np.array_equal(
                owner * (len(owner) // self.world) + place, np.arange(len(owner))
            )
        )

    def run(self) -> None:
        for number, agent in enumerate(self.out.agents):
            if agent.name in ("head", "stream"):
                self.phase(agent.name, number, agent, agent.body)
            elif agent.name == "collective":
                self.phase("collective", number, agent, (agent,))
            else:
                for child in agent.body:
                    if child.name == "stage":
                        self.stage(number, child)
                    elif child.name == "flush":
                        self.out.phases.append(Phase("flush", number, child, self.next, 0))
                    else:
                        self.phase("finish", number, child, child.body)
        if self.ranks:
            self.out.task_rank = np.concatenate(self.ranks)
            self.out.task_phase = np.concatenate(self.kinds)

    def open(
        self,
        kind: str,
        agent: int,
        op: Op,
        count: int,
        tiles: tuple[tuple[str, Tile], ...] = (),
    ) -> _Rows:
        total = count * self.world
        self.out.phases.append(Phase(kind, agent, op, self.next, count, tiles))
        task = np.arange(self.next, self.next + total, dtype=np.int64)
        rank = np.repeat(np.arange(self.world, dtype=np.int64), count)
        self.next += total
        self.ranks.append(rank)
        self.kinds.append(np.full(total, len(self.out.phases) - 1, dtype=np.int64))
        env = {**self.out.env, "RANK": rank}
        return _Rows(env, task, rank, np.zeros(total, dtype=np.int64))

    def phase(self, kind: str, agent: int, op: Op, body: Sequence[Op]) -> None:
        self.block(body, self.open(kind, agent, op, 1))

    def stage(self, agent: int, op: Op) -> None:
        env = {**self.out.env, "RANK": np.arange(self.world, dtype=np.int64)}
        tiles = loop_tiles(op, env, self.world)
        named = tuple((v.name, t) for v, t in zip(op.args, tiles, strict=False))
        count = tiles[0].start.shape[1] if tiles else 1
        lo, hi = op.get("positions", (0, count))
        if hi - lo != count:
            self.out.problems.append((op, f"its order of tiles has no positions {lo}..{hi}"))
        rows = self.open("stage", agent, op, count, named)
        for name, tile in named:
            _bind(rows.env, name, tile)
        self.block(op.body, rows)

    # Programs order: a loop takes as many numbers as its trips times its body.
    def width(self, ops: Sequence[Op]) -> int:
        return sum(self.span(op) for op in ops)

    def span(self, op: Op) -> int:
        if op.name not in ("for_tiles", "for_range") or self.whole(op):
            return 1 if not op.blocks else max(1, self.width(op.body))
        return self.trips(op) * self.width(op.body) + 1

    def trips(self, op: Op) -> int:
        if op.name == "for_tiles" and op.get("extent") is not None:
            sizes = tile_sizes(op, self.out.env)
            extents = [int(evaluate(extent, self.out.env, op)) for extent in op["extent"]]
            counts = [n // max(1, size) + 1 for n, size in zip(extents, sizes, strict=True)]
            if op.get("segment") is None:
                return prod(counts)
            axis, segment = int(op.get("axis", 0)), int(evaluate(op["segment"], self.out.env, op))
            # Tiles end at segments, of which there are many where owners' blocks are short.
            short = (extents[axis] // max(1, segment) + 1) * (segment // max(1, sizes[axis]) + 1)
            others = prod(counts) // counts[axis]
            return others * max(counts[axis] * (self.world + 2), short)
        return self.largest + 1

    def whole(self, op: Op) -> bool:
        """Whether the loop may be one row: no synchronisation, and only plain uses of its variables."""
        known = self.wholes.get(id(op))
        if known is None:
            known = self.wholes[id(op)] = self.is_whole(op)
        return known

    def is_whole(self, op: Op) -> bool:
        inner = [child for child in op.walk() if child is not op]
        if any(child.name in SYNC for child in inner):
            return False
        if any(c.ref is not None and self.out.base(c.symbol) in self.permuted for c in inner):
            return False
        if not self.merges(op, inner):
            return False
        count = len(op["extent"]) if op.get("extent") is not None else 1
        return all(_plain(inner, value) for value in op.args[:count])

    def merges(self, op: Op, inner: Sequence[Op]) -> bool:
        """Whether one row says of the loop's stores what they are: all of a box, and read by nobody in it."""
        stored = [c.symbol for c in inner if c.name == "store" and c.ref is not None]
        if not stored:
            return True
        if any(op.get(key) is not None for key in ("segment", "segments", "visit")):
            return False
        touched = [r.symbol for c in inner for r in (c.ref, c.get("own")) if isinstance(r, Ref)]
        if any(touched.count(symbol) > 1 for symbol in stored):
            return False
        for child in inner:
            if child.name == "store" and child.ref is not None:
                used = [
                    i.value if isinstance(i, At) else i
                    for i in child.ref.index
                    if isinstance(i, At | Value)
                ]
                if any(used.count(v) > 1 or v not in used for v in self.own_variables(op)):
                    return False
        return True

    def own_variables(self, op: Op) -> Sequence[Value]:
        return op.args[: len(op["extent"])] if op.get("extent") is not None else op.args[:1]

    def block(self, ops: Sequence[Op], rows: _Rows) -> None:
        offset = 0
        for op in ops:
            if len(rows) == 0:
                return
            here = _Rows(rows.env, rows.task, rows.rank, rows.seq + offset)
            if op.name in ("for_tiles", "for_range"):
                self.loop(op, here)
            else:
                self.leaf(op, here, rows.env)
            offset += self.span(op)

    def loop(self, op: Op, rows: _Rows) -> None:
        n = len(rows)
        env = dict(rows.env)
        if op.name == "for_tiles" and op.get("extent") is not None:
            names = [v.name for v in op.args[: len(op["extent"])]]
            if self.whole(op):
                for name, extent in zip(names, op["extent"], strict=True):
                    stop = np.full(n, int(evaluate(extent, self.out.env, op)), dtype=np.int64)
                    _bind(env, name, Tile(np.zeros_like(stop), stop, np.zeros_like(stop)), False)
                self.block(op.body, _Rows(env, rows.task, rows.rank, rows.seq))
                return
            tiles = loop_tiles(op, env, n)
            trips = np.full(n, tiles[0].start.shape[1], dtype=np.int64)
            values = [Tile(t.start.ravel(), t.stop.ravel(), t.tile.ravel()) for t in tiles]
        else:
            name = op.args[0].name
            names = [name]
            bounds = self.bounds(op, env, n)
            if bounds is None:
                self.out.assumptions.append(
                    f"the bounds of `{name}` are known at run time only: its accesses count as whole axes"
                )
                if any(child.name in SYNC for child in op.walk()):
                    text = f"the bounds of `{name}` are known at run time only, but it synchronises"
                    self.out.problems.append((op, text))
                self.block(op.body, rows)
                return
            lo, hi = bounds
            size = tile_sizes(op, self.out.env)[0] if op.name == "for_tiles" else 1
            if self.whole(op):
                some = hi > lo
                _bind(env, name, Tile(lo, hi, np.zeros_like(lo)), False)
                inner = _Rows(env, rows.task, rows.rank, rows.seq).take(some)
                self.block(op.body, inner)
                return
            trips = np.maximum(0, -(-(hi - lo) // size))
            check_rows(int(trips.sum()), loop_text(op), op.span)
            which = ragged(trips)
            start = np.repeat(lo, trips) + which * size
            values = [Tile(start, np.minimum(start + size, np.repeat(hi, trips)), which)]
        if len(trips) and int(trips.max()) > self.trips(op):
            # The numbers of its rows would run into those of the ops behind it.
            self.out.problems.append((op, f"this loop has {int(trips.max())} iterations"))
        which = ragged(trips)
        outer = np.repeat(np.arange(n), trips)
        inner = _Rows(env, rows.task, rows.rank, rows.seq).take(outer)
        inner.seq = inner.seq + which * self.width(op.body)
        for name, tile in zip(names, values, strict=True):
            _bind(inner.env, name, tile)
        self.block(op.body, inner)

    def bounds(self, op: Op, env: Env, n: int) -> tuple[Ints, Ints] | None:
        if op.name == "for_range":
            lo, hi = evaluate(op.get("lo", 0), env, op), evaluate(op["hi"], env, op)
        else:
            lo, hi = (env.get(v.name) for v in op.operands[:2])
            if lo is None or hi is None:
                return None
        wide = (np.broadcast_to(np.asarray(x, dtype=np.int64), (n,)) for x in (lo, hi))
        first, last = wide
        return first, last

    def leaf(self, op: Op, rows: _Rows, env: dict[str, Any]) -> None:
        if op.name in ("wait", "notify", "transfer") and op.get("if") is not None:
            keep = np.broadcast_to(np.asarray(evaluate(op["if"], rows.env, op)) != 0, (len(rows),))
            rows = rows.take(keep)
            if len(rows) == 0:
                return
        if op.name in ("wait", "notify"):
            self.sync(op, rows)
        elif op.name in ("load", "load_sum"):
            self.read(op, rows)
        elif op.name == "store":
            assert op.ref is not None
            self.access(op, op.ref, True, rows, self.peer(op, rows))
        elif op.name == "transfer":
            assert op.ref is not None
            self.access(op, op.ref, False, rows, rows.rank, pair=self.pairs)
            self.access(op, op["to"], True, rows, self.peer(op, rows), pair=self.pairs)
            self.pairs += 1
        elif op.name == "collective":
            assert op.ref is not None
            self.collective(op, rows)
        elif op.results and len(op.results) == 1 and not op.results[0].type.shape:
            value = _scalar(op, rows.env)
            if value is not None:
                env[op.results[0].name] = value

    def collective(self, op: Op, rows: _Rows) -> None:
        assert op.ref is not None
        self.access(op, op.ref, False, rows, rows.rank)
        into: Ref = op["to"]
        if op.get("op") != "all_gather":
            self.access(op, into, True, rows, rows.rank)
            return
        # One row a source rank, stacked or concatenated along the axis that grows by WORLD.
        small, large = self.out.dims[op.ref.symbol], self.out.dims[into.symbol]
        axis = 0
        if len(small) == len(large):
            axis = next((j for j, (a, b) in enumerate(zip(small, large, strict=True)) if a != b), 0)
        part = large[axis] // self.world
        for source in range(self.world):
            lo = Expr.const(source * part)
            index = tuple(Range(lo, lo + part) if j == axis else All() for j in range(len(large)))
            origin = np.full(len(rows), source, dtype=np.int64)
            self.access(op, Ref(into.symbol, index), True, rows, rows.rank, origin=origin)

    def peer(self, op: Op, rows: _Rows) -> Ints:
        value = evaluate(op.get("peer", Expr.name("RANK")), rows.env, op)
        return np.broadcast_to(np.asarray(value, dtype=np.int64), (len(rows),))

    def read(self, op: Op, rows: _Rows) -> None:
        assert op.ref is not None
        own = op.get("own")
        if op.get("remote"):
            self.everywhere(op, rows)
            return
        if own is None and not op.operands:
            self.access(op, op.ref, False, rows, rows.rank)
            return
        if op.name == "load":
            when = evaluate(op.get("when", 0), rows.env, op)
            here = np.broadcast_to(np.asarray(when) != 0, (len(rows),))
            self.access(op, op.ref, False, rows.take(~here), rows.rank[~here])
            self.access(op, own, False, rows.take(here), rows.rank[here], own=True)
            return
        if own is not None:
            self.access(op, own, False, rows, rows.rank, own=True)
        self.access(op, op.ref, False, rows, rows.rank, below=True)
        self.access(op, op.ref, False, rows, rows.rank, above=True)

    def everywhere(self, op: Op, rows: _Rows) -> None:
        """The same region in the memory of every rank; of this one's not what a value stands for."""
        assert op.ref is not None
        count = len(rows)
        home = np.tile(np.arange(self.world, dtype=np.int64), count)
        rows = rows.take(np.repeat(np.arange(count), self.world))
        if op.operands:
            there = np.flatnonzero(home != rows.rank)
            rows, home = rows.take(there), home[there]
        self.access(op, op.ref, False, rows, home)

    def access(
        self,
        op: Op,
        ref: Ref,
        write: bool,
        rows: _Rows,
        home: Ints,
        *,
        pair: int = -1,
        own: bool = False,
        below: bool = False,
        above: bool = False,
        origin: Ints | None = None,
    ) -> None:
        if ref.symbol not in self.out.dims:
            self.out.problems.append((op, f"nothing declares `@{ref.symbol}`"))
            return
        if len(rows) == 0:
            return
        dims = self.out.dims[ref.symbol]
        lo, hi, want, placed, exact = self.region(op, ref.index, dims, rows)
        if below:
            hi[:, 0] = np.minimum(hi[:, 0], rows.rank)
        if above:
            lo[:, 0] = np.maximum(lo[:, 0], rows.rank + 1)
            want[:, 0] = lo[:, 0]
        full = np.all(hi > lo, axis=1)
        if not full.all():
            rows, home, lo, hi, want = rows.take(full), home[full], lo[full], hi[full], want[full]
            if len(rows) == 0:
                return
        self.out.accesses.append(
            Access(
                op,
                ref.symbol,
                write,
                rows.task,
                rows.seq,
                rows.rank,
                home,
                lo,
                hi,
                want,
                placed,
                exact,
                pair,
                own,
                origin,
                op.get("via") == "tma",
                bool(op.get("wide", False)),
                bool(op.get("remote", False)),
            )
        )

    def region(
        self, op: Op, index: tuple[Index, ...], dims: tuple[int, ...], rows: _Rows
    ) -> tuple[Ints, Ints, Ints, tuple[bool, ...], bool]:
        n, axis, exact = len(rows), 0, True
        if sum(not isinstance(item, Broadcast) for item in index) > len(dims):
            self.out.problems.append((op, f"more indices than the {len(dims)} axes there are"))
        lo = np.zeros((n, len(dims)), dtype=np.int64)
        hi = np.broadcast_to(np.array(dims, dtype=np.int64), (n, len(dims))).copy()
        want = np.zeros((n, len(dims)), dtype=np.int64)
        placed = [False] * len(dims)
        for item in index:
            if isinstance(item, Broadcast) or axis >= len(dims):
                continue
            value = item.value if isinstance(item, At) else item
            if isinstance(item, Expr) and item.op == "name" and item.args[0] not in rows.env:
                exact = False
            elif isinstance(item, Expr):
                if _tabled(item):
                    exact = False
                else:
                    lo[:, axis] = evaluate(item, rows.env, op)
                    hi[:, axis] = lo[:, axis] + 1
                    want[:, axis] = lo[:, axis]
            elif isinstance(item, Range):
                if _tabled(item.lo) or _tabled(item.hi):
                    exact = False
                else:
                    lo[:, axis] = evaluate(item.lo, rows.env, op)
                    hi[:, axis] = evaluate(item.hi, rows.env, op)
                    want[:, axis] = lo[:, axis]
            elif isinstance(value, Value):
                start = rows.env.get(f"{value.name}.start", rows.env.get(value.name))
                stop = rows.env.get(f"{value.name}.stop")
                if start is None:
                    exact = False
                elif isinstance(item, At):
                    placed[axis] = True
                    lo[:, axis] = evaluate(item.start, rows.env, op)
                    hi[:, axis] = lo[:, axis] + (stop - start)
                    want[:, axis] = start
                else:
                    placed[axis] = True
                    lo[:, axis], want[:, axis] = start, start
                    hi[:, axis] = start + 1 if stop is None else stop
            axis += 1
        return lo, hi, want, tuple(placed), exact

    def sync(self, op: Op, rows: _Rows) -> None:
        assert op.ref is not None
        symbol = op.ref.symbol
        if symbol not in self.out.dims:
            self.out.problems.append((op, f"nothing declares `@{symbol}`"))
            return
        dims = self.out.dims[symbol]
        wait = op.name == "wait"
        home = rows.rank if wait else self.peer(op, rows)
        bound = np.broadcast_to(
            np.asarray(evaluate(op.get("count", 1), rows.env, op), dtype=np.int64), (len(rows),)
        )
        through = np.full(len(rows), -1, dtype=np.int64)
        via = op.get("through")
        if via is not None and via.symbol in self.out.dims:
            cell, end, _, _, known = self.region(op, via.index, self.out.dims[via.symbol], rows)
            fits = np.all((cell >= 0) & (end <= np.array(self.out.dims[via.symbol])), axis=1)
            through = np.where(fits, _flat(cell, self.out.dims[via.symbol]), -2)
            if not known or (end - cell != 1).any():
                self.out.problems.append((op, "`through` is not one element"))
        elif via is not None:
            self.out.problems.append((op, f"nothing declares `@{via.symbol}`"))
        lo, hi, _, _, known = self.region(op, op.ref.index, dims, rows)
        if not known:
            self.out.problems.append((op, "its elements are known at run time only"))
        shape = np.maximum(hi - lo, 0)
        which, inner = boxes(shape)
        flat_index = lo[which] + inner
        inside = np.all((flat_index >= 0) & (flat_index < np.array(dims)), axis=1)
        self.out.syncs.append(
            Sync(
                op,
                symbol,
                wait,
                rows.task[which],
                rows.seq[which],
                rows.rank[which],
                home[which],
                _flat(flat_index, dims),
                bound[which],
                int(evaluate(op.get("epoch", 0), self.out.env, op)),
                through[which],
                inside,
                via.symbol if via is not None else "",
                op.get("order") == "relaxed" or op.get("barrier") is False,
                op.get("scope") == "gpu",
                bool(op.get("proxy", False)),
                bool(op.get("drain", False)),
                op.get("delay") is not None,
                op.get("compare") == "equal",
            )
        )


def _flat(index: Ints, dims: Sequence[int]) -> Ints:
    out = np.zeros(len(index), dtype=np.int64)
    for axis, extent in enumerate(dims):
        out = out * extent + index[:, axis]
    return out


def _bind(env: dict[str, Any], name: str, tile: Tile, single: bool = True) -> None:
    start, stop, number = tile.start.ravel(), tile.stop.ravel(), tile.tile.ravel()
    env[f"{name}.start"], env[f"{name}.stop"], env[f"{name}.tile"] = start, stop, number
    if single:
        env[name] = start
    else:
        env.pop(name, None)


def _tabled(expr: Expr) -> bool:
    return expr.op == "table" or any(_tabled(a) for a in expr.args if isinstance(a, Expr))


def _names(value: Any) -> Iterable[str]:
    if isinstance(value, Expr):
        yield from value.names
    elif isinstance(value, Range):
        yield from value.lo.names | value.hi.names
    elif isinstance(value, At):
        yield from value.start.names
    elif isinstance(value, Ref):
        for item in value.index:
            yield from _names(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _names(item)


def _plain(ops: Sequence[Op], value: Value) -> bool:
    """Whether ``value`` only indexes directly, or placed at a constant distance from its start."""
    mine = {value.name, *(f"{value.name}.{f}" for f in ("start", "stop", "tile"))}
    for op in ops:
        if op.name in ("bound", "for_tiles") and value in op.operands:
            return False
        refs = [r for r in (op.ref, *(a for _, a in op.attrs)) if isinstance(r, Ref)]
        for ref in refs:
            for item in ref.index:
                if isinstance(item, At) and item.value == value:
                    if not _shifted(item.start, f"{value.name}.start"):
                        return False
                elif not isinstance(item, All | Broadcast | Value) and mine & set(_names(item)):
                    return False
        others = (a for _, a in op.attrs if not isinstance(a, Ref))
        if any(mine & set(_names(a)) for a in others):
            return False
    return True


def _shifted(expr: Expr, name: str) -> bool:
    if expr.op == "name":
        return bool(expr.args[0] == name)
    if expr.op not in ("+", "-"):
        return False
    left, right = expr.args
    if name not in right.names:
        return _shifted(left, name)
    return expr.op == "+" and name not in left.names and _shifted(right, name)


_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "/",
    "mod": "%",
    "maximum": "max",
    "minimum": "min",
}


def _scalar(op: Op, env: Env) -> Any:
    """The value of an integer scalar op, or None where it is known only at run time."""
    if op.name == "constant" and isinstance(op.get("value"), int | Expr):
        return evaluate(op["value"], env, op)
    if op.name == "bound":
        return env.get(f"{op.operands[0].name}.{op['which']}")
    if op.name == "cast" and op.results[0].type.dtype in ("int32", "int64"):
        return env.get(op.operands[0].name)
    if op.name in _BINARY and all(env.get(v.name) is not None for v in op.operands):
        left, right = (env[v.name] for v in op.operands)
        pair = {"left": left, "right": right}
        return Expr(_BINARY[op.name], (Expr.name("left"), Expr.name("right"))).evaluate(pair)
    return None
