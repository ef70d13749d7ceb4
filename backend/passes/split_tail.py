"""``split-tail``: the last, incomplete wave of a product's tiles is computed in parts of the depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from tilelink.backend.expand import environment, evaluate, loop_tiles
from tilelink.backend.passes.common import (
    MOVED,
    add_declarations,
    dynamic_extent,
    schedule_of,
    start_of,
    substitute,
    tasks_of_stage,
    tensors_of,
)
from tilelink.backend.passes.split_depth import Nest, placed, plain_nest
from tilelink.ir import At, Block, Expr, Op, Ref, Value, make
from tilelink.schedules import ScheduleError

_PURE = frozenset({"constant", "full", "param"})


def split_tail(program: Op) -> Op:
    """Cut the tiles that make no whole wave in parts, with ``tail`` in the schedule: each part is a task.

    Before, with ``tail = 2``, 704 tiles and 132 workers, of which 44 would have one tile more::

        stage @C.gemm {extent = [M, N], …} do (%m: tile, %n: tile) {
          %acc = zeros : fp32[m, n]
          %acc.3 = for_tiles (%acc) {extent = [K], tile = [64]} … do (%k: tile, …) {… load @A[%m, %k] … dot …}
          %c = cast (%acc.3) : bf16[m, n]
          store @C[%m, %n] (%c)
        }

    After::

        tensor @tail.C {dims = [1, 1024, N], dtype = "fp32", move = "local", role = "temp"}
        stage @C.gemm {…, positions = [0, 660]} …
        stage @C.part1 {…, positions = [660, 704]} do (%m.p1: tile, %n.p1: tile) {
          … for_tiles … {extent = [2048], tile = [64]} … {… load @A[%m.p1, %k.p1 at k.p1.start + 2048] …}
          store @tail.C[0, %m.p1 at m.p1.start - 7168, %n.p1] (%acc.3.p1)
        }
        stage @C.tail {…, first = 44, positions = [660, 704]} do (%m.t: tile, %n.t: tile) {
          … for_tiles … {extent = [2048], tile = [64]} …
          %acc.3.at1.t = load @tail.C[0, %m.t at m.t.start - 7168, %n.t] {late = true}
          %acc.3.t = add (%acc.3.at0.t, %acc.3.at1.t) : fp32[m.t, n.t]
          %c.t = cast (%acc.3.t) : bf16[m.t, n.t]
          store @C[%m.t, %n.t] (%c.t)
        }

    A part is of whole steps of the depth. Who has the first part of a tile adds the others, in order, behind its
    main loop, so that the bits do not depend on timing; these tasks come last in every queue. Where there is no
    whole wave, all tiles are cut. Invariant: together the first stage and the last visit every tile once, and
    each stage of parts visits those of the last. Errors: ScheduleError where a stage multiplies and is none of
    plain products over one depth, or its queue is drawn from.
    """
    schedule = schedule_of(program)
    if schedule.tail == 1:
        return program
    dynamic = dynamic_extent(program)
    if dynamic is not None:
        _refuse(program, f"parts of tiles, but `{dynamic}` is known at run time only")
    for name, tensor in tensors_of(program).items():
        move = schedule.move(name)
        if tensor["move"] not in MOVED:
            continue
        if move.sm_workers:
            _refuse(tensor, f"`{name}` is copied by workers that join the queue when they are done")
        if move.signal != "flag":
            _refuse(tensor, f"`{name}` travels as words: such products have few rows")
    if not any(op.name == "dot" for op in program.walk()):
        _refuse(program, f"`{program.symbol}` multiplies no matrices")
    declared: list[Op] = []
    ops: list[Op] = []
    for op in program.body:
        if op.name == "launch":
            op, tensors = _launch(program, op, schedule.tail)
            declared += tensors
        ops.append(op)
    return add_declarations(program.with_ops(tuple(ops)), *declared)


def _refuse(op: Op, detail: str) -> NoReturn:
    raise ScheduleError(op.span, field="tail", detail=detail, help="use `tail = 1`")


def _launch(program: Op, launch: Op, parts: int) -> tuple[Op, list[Op]]:
    """The launch with its products' last tiles in parts, and the tensors of parts."""
    workers = int(launch["workers"])
    stages: list[Op] = []
    tensors: list[Op] = []
    for stage in launch.body:
        tasks = tasks_of_stage(program, stage)
        assert isinstance(tasks, int)
        left = tasks % workers
        if not left or not any(op.name == "dot" for op in stage.walk()):
            stages.append(stage)
            continue
        cut = _Cut(program, stage, parts, (tasks - left, tasks), len(tensors))
        stages += cut.stages(workers)
        tensors += cut.tensors
    return launch.with_ops(tuple(stages)), tensors


@dataclass(frozen=True, slots=True)
class _Depth:
    """One part of the depth: elements ``begin``, and ``length`` of them."""

    begin: int
    length: int


class _Cut:
    """The tiles ``tasks`` of one stage in ``parts`` parts; ``taken`` tensors of parts are there already."""

    def __init__(
        self, program: Op, stage: Op, parts: int, tasks: tuple[int, int], taken: int
    ) -> None:
        self.program, self.stage, self.tasks = program, stage, tasks
        self.prelude, self.found = _look(program, stage)
        self.parts = self._depths(parts)
        self.place, rows = self._place()
        stored = [op.symbol for op in stage.walk() if op.name == "store"]
        head = "tail"
        while head in tensors_of(program):
            head += "_"
        self.tensors: list[Op] = []
        for number, total in enumerate(self.found.loop.results):
            if total.type.dtype != "fp32" or total.type.shape != tuple(v.name for v in stage.args):
                _refuse(self.found.loop, f"a sum of {total.type} over the depth")
            several = f".{taken + number}" if taken + number else ""
            name = f"{head}.{stored[-1] if stored else program.symbol}{several}"
            dims = (parts - 1, rows, stage["extent"][1])
            made = make("tensor", ref=Ref(name), dims=dims, dtype="fp32", move="local", role="temp")
            self.tensors.append(replace(made, span=self.found.loop.span))

    def _depths(self, parts: int) -> list[_Depth]:
        """Parts of whole steps. The first, of the tasks that wait for the others, has a step more if one has."""
        loop = self.found.loop
        length = int(evaluate(Expr.of(loop["extent"][0]), environment(self.program), loop))
        step = int(loop["tile"][0])
        steps = -(-length // step)
        if steps < parts:
            _refuse(loop, f"{parts} parts of a depth of {steps} steps")
        found: list[_Depth] = []
        begin = 0
        for number in range(parts):
            end = begin + (steps // parts + (number < steps % parts)) * step
            found.append(_Depth(begin, min(end, length) - begin))
            begin = end
        return found

    def _place(self) -> tuple[Expr, int]:
        """Where the rows of a tile (its variable is the stage's) lie in the tensor of parts, and its rows."""
        stage, world = self.stage, int(self.program["world"])
        env = {**environment(self.program), "RANK": np.arange(world, dtype=np.int64)}
        (rows, _) = loop_tiles(stage.with_attrs(positions=self.tasks), env, world)
        start = start_of(stage.args[0])
        segment = stage.get("segment")
        if segment is None or int(stage.get("axis", 0)) != 0:
            low, high = int(rows.start.min()), int(rows.stop.max())
            return start - low, high - low
        which = rows.start // int(segment)
        inside = rows.start - which * int(segment)
        if (which != which[:, :1]).any():
            return start, int(evaluate(Expr.of(stage["extent"][0]), env, stage))
        low = int(inside.min())
        return start % int(segment) - low, int((inside + rows.stop - rows.start).max()) - low

    def stages(self, workers: int) -> list[Op]:
        """The whole tiles, the parts, and the tasks that add them."""
        stage = self.stage
        lo, hi = self.tasks
        first = int(stage.get("first", 0)) + lo
        found = [stage.with_attrs(positions=(0, lo))] if lo else []
        for number in range(1, len(self.parts)):
            found.append(self._part(number).with_attrs(first=first % workers or None))
            first += hi - lo
        found.append(self._last().with_attrs(first=first % workers or None))
        return found

    def _part(self, number: int) -> Op:
        stores = tuple(
            self._access("store", tensor.symbol, number, total)
            for tensor, total in zip(self.tensors, self.found.loop.results, strict=True)
        )
        body = (*self.prelude, *self.found.before, self._loop(number), *stores)
        return self._named(f"part{number}", f"p{number}", body)

    def _last(self) -> Op:
        """What has the first part of the depth, adds the others and goes on as the stage does."""
        loop = self._loop(0)
        totals = loop.results
        own = tuple(Value(f"{v.name}.at0", v.type) for v in totals)
        sums: list[Op] = []
        for tensor, total, so_far in zip(self.tensors, totals, own, strict=True):
            for number in range(1, len(self.parts)):
                part = Value(f"{total.name}.at{number}", total.type)
                load = self._access("load", tensor.symbol, number, part)
                last = number == len(self.parts) - 1
                after = total if last else Value(f"{total.name}.to{number}", total.type)
                pair = (so_far, part)
                add = make("add", results=(after,), operands=pair, span=loop.span)
                sums += [load.with_attrs(late=True), add]
                so_far = after
        begin = (*self.prelude, *self.found.before, replace(loop, results=own))
        return self._named("tail", "t", (*begin, *sums, *self.found.behind))

    def _loop(self, number: int) -> Op:
        """The loop over one part of the depth."""
        loop, part = self.found.loop, self.parts[number]
        start = start_of(loop.args[0]) + part.begin
        body = loop.body
        if part.begin:
            body = tuple(placed(self.program, op, loop.args[0], start, _refuse) for op in body)
        return loop.with_ops(body).with_attrs(extent=(part.length,))

    def _access(self, kind: str, name: str, number: int, value: Value) -> Op:
        """A load or store of ``value`` as one part of a sum."""
        rows, columns = self.stage.args
        row = rows if self.place == start_of(rows) else At(rows, self.place)
        ref, span = Ref(name, (Expr.const(number - 1), row, columns)), self.found.loop.span
        if kind == "store":
            return make(kind, ref=ref, operands=(value,), span=span)
        return make(kind, ref=ref, results=(value,), span=span)

    def _named(self, label: str, suffix: str, body: tuple[Op, ...]) -> Op:
        """A stage of the same queue with another body, its values under names of their own."""
        stage = replace(self.stage, blocks=(Block(self.stage.args, body),))
        renamed = {
            v.name: Value(f"{v.name}.{suffix}", v.type)
            for op in stage.walk()
            for v in (*op.results, *op.args)
        }
        name = label.join(stage.symbol.rsplit("gemm", 1))
        return replace(substitute(stage, renamed), ref=Ref(name)).with_attrs(positions=self.tasks)


def _look(program: Op, stage: Op) -> tuple[tuple[Op, ...], Nest]:
    """What a stage repeats of the kernel's beginning, and its product; ScheduleError where it is none."""
    for op in stage.walk():
        if op.name == "load_sum":
            _refuse(op, f"`{op.symbol}` is summed over the ranks in the same epilogue")
    if len(stage.args) != 2 or not all(v.type.is_tile for v in stage.args):
        _refuse(stage, "a product that is not over the tiles of rows and columns alone")
    at = next((n for n, op in enumerate(stage.body) if op.name not in _PURE), 0)
    nest = plain_nest(program, stage.with_ops(stage.body[at:]), _refuse)
    if nest.loop.get("segment") is not None:
        _refuse(nest.loop, "a depth that is walked shard by shard")
    return stage.body[:at], nest
