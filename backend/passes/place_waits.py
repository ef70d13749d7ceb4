"""``place-waits``: a wait in front of every read of something that another rank or worker makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

from tilelink.backend.passes.common import (
    MOVED,
    RANK,
    WORLD,
    Moved,
    UnsupportedProgram,
    accesses,
    handed_on,
    moved,
    moved_axis,
    start_of,
    stop_of,
    tasks_of_stage,
    tensors_of,
)
from tilelink.ir import All, Expr, Op, Range, Ref, Value, binary, make

# Tensors that earlier stages store; of local ones, the element and the tasks of each stage that did.
Stored: TypeAlias = "dict[str, tuple[tuple[int, Expr | int], ...]]"


def place_waits(program: Op) -> Op:
    """Put waits at the outermost point where the channels are constant, before the first read.

    Before::

        stage … do (%m: tile, %n: tile) {
          %a = load @A[%m, %k]

    After::

        stage … do (%m: tile, %n: tile) {
          wait @A.ready[m.start / 1024, 0] {if = m.start / 1024 != RANK}
          %a = load @A[%m, %k]

    A read of a sum waits for every source; one that adds a contribution in registers (`load_sum` with
    an operand) does so right before it, behind the loop that made the contribution, and so does one that is
    `late`: of what other tasks have of a product's depth. A load of
    words that signal themselves has its waits directly in front of it. Invariant: every
    read of a moved or intermediate tensor is dominated by waits on all channels that its region meets.
    """
    stored: Stored = {}
    ops: list[Op] = []
    for op in program.body:
        if op.name == "launch":
            # What an earlier launch stored is there; only the parts of other ranks may be missing.
            stored = dict.fromkeys(stored, ())
            op = _launch(program, op, stored)
        ops.append(op)
    return program.with_ops(tuple(ops))


def _launch(program: Op, launch: Op, stored: Stored) -> Op:
    """The launch with its waits; ``stored`` is added to."""
    stages: list[Op] = []
    for number, stage in enumerate(launch.body):
        stages.append(_guard(program, stage, stored))
        for name in sorted({op.symbol for op in stage.walk() if op.name == "store"}):
            places, here = handed_on(program, name), (launch.symbol, number)
            stored.setdefault(name, ())
            if here in places:
                stored[name] += ((places.index(here), tasks_of_stage(program, stage)),)
    return launch.with_ops(tuple(stages))


def _guard(program: Op, loop: Op, stored: Stored) -> Op:
    """Waits for the tiles that ``loop`` itself defines, then those of the loops inside it."""
    waits: list[Op] = []
    polls: list[tuple[str, list[Op]]] = []
    for name, tensor in tensors_of(program).items():
        found: list[Op] = []
        loads = [
            op
            for op in _reads(loop, name, program)
            if (name in stored or tensor["move"] == "gather") and op.get("late") is None
        ]
        for load in loads:
            for wait in _waits(program, tensor, load, loop, stored):
                if wait not in waits:
                    found.append(wait)
        found = list(dict.fromkeys(found))
        if found and tensor["move"] in MOVED and moved(program, name).words:
            polls.append((name, found))
        else:
            waits += found
    late = _late_waits(program, loop, stored)
    body: list[Op] = []
    for op in loop.body:
        body += _folded_waits(program, op, loop)
        if op.get("late"):
            op = op.with_attrs(late=None)
            body += late
            late = []
        body.append(_guard_inner(program, op, stored))
    for name, found in polls:
        body = _before_load(body, name, found)
    return loop.with_ops((*waits, *body))


def _before_load(body: Sequence[Op], name: str, waits: list[Op]) -> list[Op]:
    """``body`` with ``waits`` in front of the first load of words, which itself waits: nothing stands between."""
    at = next((n for n, op in enumerate(body) if any(accesses(op, name, "load"))), len(body))
    if at == len(body) or body[at].name == "load":
        return [*body[:at], *waits, *body[at:]]
    inside = tuple(
        replace(b, ops=tuple(_before_load(b.ops, name, waits))) if name in _loaded(b.ops) else b
        for b in body[at].blocks
    )
    return [*body[:at], replace(body[at], blocks=inside), *body[at + 1 :]]


def _loaded(ops: Iterable[Op]) -> set[str]:
    """The tensors that ``ops`` load."""
    return {inner.symbol for op in ops for inner in op.walk() if inner.name == "load"}


def _late_waits(program: Op, loop: Op, stored: Stored) -> list[Op]:
    """The waits of loads of parts that stand behind a main loop, where they come."""
    waits: list[Op] = []
    for load in loop.body:
        if load.name == "load" and load.get("late"):
            waits += _waits(program, program.declared(load.symbol), load, loop, stored)
    return list(dict.fromkeys(waits))


def _folded_waits(program: Op, op: Op, loop: Op) -> list[Op]:
    """In front of a sum that adds its own part from registers: waits for the parts of all other ranks."""
    if op.name != "load_sum" or not op.operands:
        return []
    assert op.ref is not None
    info = moved(program, op.ref.symbol)
    tile = op.ref.index[info.along]
    assert isinstance(tile, Value)
    channels = _span(*info.channel_range(start_of(tile), stop_of(tile), _length(loop, tile)))
    ready = f"{info.name}.ready"
    return [
        make("wait", ref=Ref(ready, (ranks, channels)), span=op.span)
        for ranks in (Range(Expr.const(0), RANK), Range(RANK + 1, WORLD))
    ]


def _guard_inner(program: Op, op: Op, stored: Stored) -> Op:
    """Inner loops over a gathered axis wait tile by tile."""
    if op.name == "for_tiles" and op.get("segment") is not None:
        return _guard(program, op, stored)
    if not op.blocks:
        return op
    blocks = tuple(
        replace(b, ops=tuple(_guard_inner(program, o, stored) for o in b.ops)) for b in op.blocks
    )
    return replace(op, blocks=blocks)


def _reads(loop: Op, name: str, program: Op) -> list[Op]:
    """Loads of ``name`` that belong to ``loop``: indexed by its tile, or (at a stage) by no segmented tile."""
    tensor = program.declared(name)
    axis = moved_axis(tensor) if tensor["move"] in MOVED else 0
    inner = {
        arg
        for op in loop.walk()
        if op is not loop and op.name == "for_tiles" and op.get("segment") is not None
        for arg in op.args[:1]
    }
    found = []
    for load in accesses(loop, name, "load"):
        assert load.ref is not None
        element = load.ref.index[axis] if load.ref.index else All()
        if element in loop.args or (loop.name == "stage" and element not in inner):
            found.append(load)
    return found


def _waits(program: Op, tensor: Op, load: Op, loop: Op, stored: Stored) -> list[Op]:
    name = tensor.symbol
    if tensor["move"] not in MOVED:
        return [
            make("wait", ref=Ref(f"{name}.done", (Expr.const(n),)), count=tasks, span=load.span)
            for n, tasks in stored[name]
        ]
    info = moved(program, name)
    if info.resource == "none":
        return []
    assert load.ref is not None
    element = load.ref.index[info.axis] if load.ref.index else All()
    tile = element if isinstance(element, Value) and element in loop.args else None
    if info.kind == "gather":
        return _gather_waits(info, tile, load, loop)
    if info.shots == 2 and not load.get("relay"):
        return _total_waits(info, tile, load, loop)
    return _sum_waits(info, tile, load, loop)


def _gather_waits(info: Moved, tile: Value | None, load: Op, loop: Op) -> list[Op]:
    if not info.in_place or tile is None:
        everything = (Range(Expr.const(0), WORLD), Range(Expr.const(0), Expr.const(info.channels)))
        return [make("wait", ref=Ref(f"{info.name}.ready", everything), span=load.span)]
    owner = info.owner_of(start_of(tile))
    index = (owner, _span(*info.channel_range(start_of(tile), stop_of(tile), _length(loop, tile))))
    remote = binary("!=", owner, RANK)
    return [
        make("wait", ref=Ref(f"{info.name}.ready", index), span=load.span).with_attrs(
            **{"if": remote}
        )
    ]


def _total_waits(info: Moved, tile: Value | None, load: Op, loop: Op) -> list[Op]:
    """For the parts that other ranks have summed, and for this rank's own."""
    summed = f"{info.name}.summed"
    number = loop.args.index(tile) if tile is not None else -1
    if tile is None or loop.get("segment") is None or int(loop.get("axis", 0)) != number:
        everything = (Range(Expr.const(0), WORLD), Range(Expr.const(0), Expr.const(info.channels)))
        return [make("wait", ref=Ref(summed, everything), span=load.span)]
    assert load.ref is not None
    lo, hi = Expr.const(0), Expr.const(info.channels)
    along = load.ref.index[info.along]
    if isinstance(along, Value) and along in loop.args:
        lo, hi = info.channel_range(start_of(along), stop_of(along), _length(loop, along))
    index = (info.owner_of(start_of(tile)), _span(lo, hi))
    return [make("wait", ref=Ref(summed, index), span=load.span)]


def _sum_waits(info: Moved, tile: Value | None, load: Op, loop: Op) -> list[Op]:
    lo, hi = Expr.const(0), Expr.const(info.channels)
    if info.channel_axis is not None:
        assert load.ref is not None
        column = load.ref.index[info.channel_axis] if load.ref.index else All()
        tile = column if isinstance(column, Value) and column in loop.args else None
    if tile is not None:
        lo, hi = info.channel_range(start_of(tile), stop_of(tile), _length(loop, tile))
    ready = f"{info.name}.ready"
    if info.resource == "epilogue":
        index = (Range(Expr.const(0), WORLD), _span(lo, hi))
        return [make("wait", ref=Ref(ready, index), span=load.span)]
    here = (RANK, _span(lo, hi)) if info.spread else (_span(lo, hi),)
    if isinstance(here[-1], Range):
        # Channels of unequal size have unequal counts: one wait a channel.
        raise UnsupportedProgram(
            load.span,
            detail=f"a tile of the sum of `{info.name}` spans several channels",
            help="give it one channel, or a smaller tile after the sum",
        )
    channel = here[-1]
    return [
        make(
            "wait", ref=Ref(f"{info.name}.done", here), count=info.tasks_of(channel), span=load.span
        ),
        make("wait", ref=Ref(ready, (Range(Expr.const(0), RANK), channel)), span=load.span),
        make("wait", ref=Ref(ready, (Range(RANK + 1, WORLD), channel)), span=load.span),
    ]


def _length(loop: Op, tile: Value) -> int:
    return int(loop["tile"][loop.args.index(tile)])


def _span(lo: Expr, hi: Expr) -> Expr | Range:
    """One element where ``lo..hi`` holds a single one for certain."""
    return lo if binary("+", lo, 1) == hi else Range(lo, hi)
