"""``choose-emitter``: plain matrix products become launches of the library's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tilelink import language
from tilelink.backend.expand import environment, evaluate
from tilelink.backend.passes.common import (
    MOVED,
    Moved,
    accesses,
    moved,
    schedule_of,
    tensors_of,
)
from tilelink.backend.product import NotAProduct, product_of
from tilelink.ir import Block, Expr, Op, Ref, dynamic_extents, make
from tilelink.schedules import Schedule, ScheduleError

# Resources that move bytes without a kernel of ours.
APART = ("none", "copy_engine")
# Element types as a kernel writes them.
_WRITTEN = {t.name: name for name, t in vars(language).items() if isinstance(t, language.DType)}


def choose_emitter(program: Op) -> Op:
    """Give stages that are one plain matrix product to the library, where the schedule asks for it.

    Before::

        launch @f {workers = 132, …} do {
          stage @P.gemm {extent = [M, N], group = 8, tile = [128, 256]} do (%m: tile, %n: tile) {
            … for_tiles (%acc) {extent = [K], tile = [64]} …
          }
          stage @C.tiles {…} …
        }

    After::

        launch @f {emitter = "library", workers = 1} do {
          stage @P.gemm {extent = [M, N], tile = [8192, 4096]} do (%m: tile, %n: tile) {
            … for_tiles (%acc) {extent = [K], tile = [1376]} …
          }
        }
        launch @f.part2 {after = ["f"], part = 2, workers = 132, …} do {
          stage @C.tiles {…} …
        }

    A task is a product of whole matrices, or of the rows of one block where owners' blocks lie apart or
    come and go one by one.
    Invariant: stages keep their order; each launch comes after the one before.
    """
    schedule = schedule_of(program)
    if schedule.emitter != "library":
        return program
    (launch,) = program.find("launch")
    groups: list[list[Op]] = []
    for stage in launch.body:
        product = _multiplies(stage)
        if product:
            stage = _whole(program, schedule, stage)
        if product or not groups or _multiplies(groups[-1][0]):
            groups.append([])
        groups[-1].append(stage)
    launches = tuple(_launch(launch, group, number) for number, group in enumerate(groups, 1))
    return program.with_ops((*(op for op in program.body if op is not launch), *launches))


def _multiplies(stage: Op) -> bool:
    """Whether the library should multiply: not where a sum over ranks is folded into the epilogue."""
    names = {op.name for op in stage.walk()}
    return "dot" in names and "load_sum" not in names


def _launch(launch: Op, stages: list[Op], number: int) -> Op:
    """Launch ``number`` of those that ``launch`` is cut into."""
    names = [launch.symbol, *(f"{launch.symbol}.part{n}" for n in range(2, number + 1))]
    made = make("launch", ref=Ref(names[-1]), blocks=(Block((), tuple(stages)),))
    if number > 1:
        made = made.with_attrs(after=(names[-2],), part=number)
    if _multiplies(stages[0]):
        return made.with_attrs(emitter="library", workers=1)
    return made.with_attrs(**{key: launch[key] for key in ("workers", "warps", "stages")})


def _whole(program: Op, schedule: Schedule, stage: Op) -> Op:
    """``stage`` with the largest tiles that one product may have; ScheduleError where it is none."""
    try:
        product_of(stage)
    except NotAProduct as error:
        raise ScheduleError(
            error.op.span or stage.span,
            field="emitter",
            detail=f"`library` multiplies whole matrices and does no more: {error.detail}",
            help=f"use the emitter triton, or {error.advice.format(made=_made(stage))}",
        ) from None
    names = environment(program)
    axis, segment = int(stage.get("axis", 0)), stage.get("segment")
    met = list(_met(program, schedule, stage))
    apart = any(info.block != info.shard or info.resource != "none" for info in met)
    cut = segment is not None and (stage.get("segments") is not None or apart)
    tiles = [int(evaluate(extent, names, stage)) for extent in stage["extent"]]
    dynamic = {op.symbol for op in dynamic_extents(program)}
    varies = bool(Expr.of(stage["extent"][axis]).names & dynamic)
    if cut and varies and stage.get("live") is None:
        raise ScheduleError(
            stage.span,
            field="emitter",
            detail=f"the library multiplies whole slices, and `{stage['extent'][axis]}` is dynamic",
            help="use triton or the resource none, or give the extent as it is",
        )
    if cut:
        tiles[axis] = int(segment)
    else:
        stage = stage.with_attrs(axis=None, segment=None, segments=None, visit=None)
    body = tuple(_deep(program, op, met) if op.blocks else op for op in stage.body)
    return stage.with_ops(body).with_attrs(tile=tiles, group=None, flatten=None)


def _made(stage: Op) -> str:
    """The declaration of a tensor that the product of ``stage`` can be stored in."""
    dot = next(op for op in stage.walk() if op.name == "dot")
    extents = ", ".join(map(str, stage["extent"]))
    return f"`P = tk.empty([{extents}], tk.{_WRITTEN[dot.operands[0].type.dtype]})`"


def _met(program: Op, schedule: Schedule, stage: Op) -> Iterator[Moved]:
    """The moved tensors of a product, with the resource that the schedule asks for."""
    for name, tensor in tensors_of(program).items():
        if tensor["move"] not in (*MOVED, "shard"):
            continue
        if not any(any(accesses(stage, name, kind)) for kind in ("load", "store")):
            continue
        resource = "none" if tensor["move"] == "shard" else schedule.move(name).resource
        copied = tensor["move"] == "gather" and resource.startswith("sm:")
        if resource not in APART and not copied:
            raise ScheduleError(
                tensor.span,
                field=f"moves.{name}.resource",
                detail=f"`{resource}` needs a kernel of our own, and the library's multiplies",
                help=f"use {' or '.join(APART)} with the emitter `library`",
            )
        if tensor["move"] != "shard" and schedule.move(name).slots != 1:
            raise ScheduleError(
                tensor.span,
                field=f"moves.{name}.slots",
                detail="2 slots, where a call is one kernel, and the library has its own",
                help="use 1 slot with the emitter `library`",
            )
        yield replace(moved(program, name), resource=resource)


def _deep(program: Op, loop: Op, met: list[Moved]) -> Op:
    """The loop over K in one step."""
    length = int(evaluate(Expr.of(loop["extent"][0]), environment(program), loop))
    if loop.get("segment") is not None:
        for info in met:
            if info.block != info.shard or info.resource != "none":
                raise ScheduleError(
                    loop.span,
                    field="emitter",
                    detail=f"the library multiplies all of `{loop.args[0].name}` at once, and blocks of "
                    f"`{info.name}` lie apart",
                    help="use triton, or the resource none and one block a rank",
                )
    return loop.with_attrs(tile=(length,), segment=None, segments=None, visit=None)
