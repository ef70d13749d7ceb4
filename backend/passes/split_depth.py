"""``split-depth``: the depth of a plain product is cut in parts that different workers multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from tilelink.backend.expand import environment, evaluate
from tilelink.backend.passes.common import (
    MOVED,
    add_declarations,
    dynamic_extent,
    schedule_of,
    start_of,
    substitute,
    tensors_of,
)
from tilelink.ir import INDEX, At, Block, Expr, Index, Op, Ref, Type, Value, make
from tilelink.schedules import ScheduleError
from tilelink.schedules.schedule import MAX_SPLIT

_INSIDE = frozenset({"load", "transpose", "dot", "yield"})


def split_depth(program: Op) -> Op:
    """Cut each loop nest that multiplies in two, with ``split`` in the schedule: parts of sums, and the rest.

    Before, with ``split = 2``::

        for_tiles {extent = [M, N]} do (%m: tile, %n: tile) {
          %acc = zeros : fp32[m, n]
          %acc.3 = for_tiles (%acc) {extent = [K]} … do (%k: tile, …) {… load @A[%m, %k] … dot …}
          %c = cast (%acc.3) : bf16[m, n]
          store @C[%m, %n] (%c)
        }

    After::

        tensor @depth.C {dims = [M, 2, N], dtype = "fp32", move = "local", role = "temp"}
        for_tiles {extent = [M, N]} do (%m.part: tile, %n.part: tile) {
          for_range {hi = 2, lo = 0} do (%s: int32) {
            %acc.part = zeros : fp32[m.part, n.part]
            %acc.3.part = for_tiles (%acc.part) {extent = [K / 2]} … do (%k.part: tile, …) {
              … load @A[%m.part, %k.part at s * (K / 2) + k.part.start] … dot …}
            store @depth.C[%m.part, s, %n.part] (%acc.3.part)
          }
        }
        for_tiles {extent = [M, N]} do (%m: tile, %n: tile) {
          %acc.p0 = load @depth.C[%m, 0, %n] : fp32[m, n]
          %acc.p1 = load @depth.C[%m, 1, %n] : fp32[m, n]
          %acc.3 = add (%acc.p0, %acc.p1) : fp32[m, n]
          %c = cast (%acc.3) : bf16[m, n]
          store @C[%m, %n] (%c)
        }

    Parts are added in order, so that the bits do not depend on timing. Invariant: what the second nest begins
    with is the sum over all of the depth, in another association. Errors: ScheduleError where a nest multiplies
    and is none of plain products over one depth, or the depth is not a multiple of the parts.
    """
    schedule = schedule_of(program)
    if schedule.split == 1:
        return program
    dynamic = dynamic_extent(program)
    if dynamic is not None:
        _refuse(program, f"parts of sums, but `{dynamic}` is known at run time only")
    declared: list[Op] = []
    ops: list[Op] = []
    for op in program.body:
        if not op.blocks or not any(inner.name == "dot" for inner in op.walk()):
            ops.append(op)
            continue
        tensors, nests = _Cut(program, op, schedule.split, len(declared)).made()
        declared += tensors
        ops += nests
    if not declared:
        _refuse(program, f"`{program.symbol}` multiplies no matrices")
    return add_declarations(program.with_ops(tuple(ops)), *declared)


def _refuse(op: Op, detail: str, help: str = "use `split = 1`") -> NoReturn:
    raise ScheduleError(op.span, field="split", detail=detail, help=help)


@dataclass(frozen=True, slots=True)
class Nest:
    """A loop over output tiles: its ops before, in and behind the loop over the depth."""

    before: tuple[Op, ...]
    loop: Op
    behind: tuple[Op, ...]


def plain_nest(program: Op, nest: Op, refuse: Callable[[Op, str], NoReturn]) -> Nest:
    """The form of a loop nest that is a plain product; ``refuse`` is told the op that is in the way, and why."""
    at = next((i for i, op in enumerate(nest.body) if op.name != "zeros"), len(nest.body))
    loop = nest.body[at] if at < len(nest.body) else nest
    if loop.name != "for_tiles" or len(loop.get("extent", ())) != 1:
        refuse(loop, f"`{loop.name}` in front of the loop over the depth")
    if loop.get("part") is not None and program["world"] > 1:
        refuse(loop, "a depth of which each rank has a part of its own")
    before, behind = nest.body[:at], nest.body[at + 1 :]
    zeros = {op.results[0].name for op in before}
    if not loop.results or {v.name for v in loop.operands} != zeros:
        refuse(loop, "a loop over the depth that does not carry sums from zeros, and those alone")
    made = {v.name: op for op in loop.body for v in op.results}
    sums = [made.get(v.name) for v in loop.body[-1].operands]
    for carried, result in zip(loop.args[1:], sums, strict=True):
        if result is None or result.name != "dot" or result.operands[2:] != (carried,):
            refuse(loop, "a loop over the depth that carries something else than sums of products")
    stored = {op.symbol for op in nest.walk() if op.name == "store"}
    held = {v.name for v in (*loop.args[1:], *loop.body[-1].operands)}
    for op in loop.body:
        if op.name not in _INSIDE or (op.name == "dot" and op not in sums):
            refuse(
                op,
                f"`{op.name}` in the loop over the depth, which loads and adds products alone",
            )
        read = op.operands[:2] if op in sums else op.operands
        if op.name != "yield" and held & {v.name for v in read}:
            refuse(op, "a sum that is read in the loop over the depth")
        if op.name == "load" and op.symbol in stored:
            refuse(op, f"`{op.symbol}` is stored in the loop nest that multiplies it")
    for top in behind:
        for op in top.walk():
            if op.name in ("dot", "for_tiles") or zeros & {v.name for v in op.operands}:
                refuse(op, f"`{op.name}` behind the loop over the depth")
    return Nest(before, loop, behind)


def placed(
    program: Op, op: Op, depth: Value, start: Expr, refuse: Callable[[Op, str], NoReturn]
) -> Op:
    """``op`` of a loop over the depth, whose steps begin at ``start``."""
    if op.name != "load":
        return op
    assert op.ref is not None
    tensor = tensors_of(program)[op.ref.symbol]
    index: list[Index] = []
    for axis, item in enumerate(op.ref.index):
        if item == depth:
            if tensor["move"] in MOVED and tensor.get("over") == axis:
                refuse(op, f"`{op.ref.symbol}` is spread over the ranks along the depth")
            index.append(At(depth, start))
            continue
        names = item.start.names if isinstance(item, At) else getattr(item, "names", ())
        if any(str(name).split(".")[0] == depth.name for name in names):
            refuse(op, "an index that computes with the tile of the depth")
        index.append(item)
    return replace(op, ref=Ref(op.ref.symbol, tuple(index)))


def _look(program: Op, nest: Op) -> Nest:
    """The form of a loop nest of the kernel; ScheduleError at the op that is in the way."""
    plain = nest.name == "for_tiles" and len(nest.args) == 2 and nest.get("extent") is not None
    if not plain or nest.get("part") is not None or nest.results:
        _refuse(nest, "a product that is not over the tiles of rows and columns alone")
    return plain_nest(program, nest, _refuse)


class _Cut:
    """One nest in ``parts`` parts; ``taken`` tensors of parts are there already."""

    def __init__(self, program: Op, nest: Op, parts: int, taken: int) -> None:
        self.program, self.nest, self.parts, self.taken = program, nest, parts, taken
        self.found = _look(program, nest)
        loop = self.found.loop
        self.depth = Expr.of(loop["extent"][0])
        length = int(evaluate(self.depth, environment(program), loop))
        if length % parts:
            even = ", ".join(str(n) for n in range(1, MAX_SPLIT + 1) if length % n == 0)
            detail = f"{length} elements of `{self.depth}` are no {parts} equal parts"
            _refuse(loop, detail, f"use one of {even}")

    def made(self) -> tuple[list[Op], list[Op]]:
        """The tensors of parts, and the two nests."""
        nest, found = self.nest, self.found
        rows, columns = nest.args
        dims = (nest["extent"][0], self.parts, nest["extent"][1])
        stored = next((op for op in nest.walk() if op.name == "store" and op.ref is not None), nest)
        head = "depth"
        while head in tensors_of(self.program):
            head += "_"
        tensors: list[Op] = []
        part = Value(f"s.{rows.name}", INDEX)
        multiply = [*found.before, self._loop(part)]
        add: list[Op] = []
        for number, total in enumerate(found.loop.results):
            if total.type.dtype != "fp32" or total.type.shape != (rows.name, columns.name):
                _refuse(found.loop, f"a sum of {total.type} over the depth")
            several = f".{self.taken + number}" if self.taken + number else ""
            name = f"{head}.{stored.symbol if stored is not nest else self.program.symbol}{several}"
            tensor = make(
                "tensor", ref=Ref(name), dims=dims, dtype="fp32", move="local", role="temp"
            )
            tensors.append(replace(tensor, span=found.loop.span))
            multiply.append(self._access("store", name, Expr.name(part.name), total))
            add += self._sum(name, total)
        renamed = {
            v.name: Value(f"{v.name}.part", v.type)
            for op in (nest, *(inner for top in multiply for inner in top.walk()))
            for v in (*op.results, *op.args)
        }
        renamed[part.name] = part
        inner = make("for_range", lo=0, hi=self.parts, blocks=(Block((part,), tuple(multiply)),))
        first = replace(nest, blocks=(Block(nest.args, (replace(inner, span=nest.span),)),))
        first = substitute(first, {k: _named(v, renamed) for k, v in renamed.items()})
        return tensors, [first, nest.with_ops((*add, *found.behind))]

    def _loop(self, part: Value) -> Op:
        """The loop over one part of the depth."""
        loop = self.found.loop
        length = self.depth // self.parts
        start = Expr.name(part.name) * length + start_of(loop.args[0])
        body = tuple(placed(self.program, op, loop.args[0], start, _refuse) for op in loop.body)
        return loop.with_ops(body).with_attrs(extent=(length,))

    def _access(self, kind: str, name: str, part: Expr, value: Value) -> Op:
        """A load or store of ``value`` as one part of a sum."""
        rows, columns = self.nest.args
        ref, span = Ref(name, (rows, part, columns)), self.found.loop.span
        if kind == "store":
            return make(kind, ref=ref, operands=(value,), span=span)
        return make(kind, ref=ref, results=(value,), span=span)

    def _sum(self, name: str, total: Value) -> list[Op]:
        """The parts of one sum, added in order."""
        loads = [Value(f"{total.name}.p{n}", total.type) for n in range(self.parts)]
        ops = [
            self._access("load", name, Expr.const(number), value)
            for number, value in enumerate(loads)
        ]
        so_far = loads[0]
        for number, value in enumerate(loads[1:], 1):
            last = number == self.parts - 1
            after = total if last else Value(f"{total.name}.to{number}", total.type)
            ops.append(
                make("add", results=(after,), operands=(so_far, value), span=self.found.loop.span)
            )
            so_far = after
        return ops


def _named(value: Value, renamed: dict[str, Value]) -> Value:
    """``value`` with the dimensions of its type renamed too."""
    shape = tuple(renamed[d].name if d in renamed else d for d in value.type.shape)
    return Value(value.name, Type(value.type.dtype, shape))
