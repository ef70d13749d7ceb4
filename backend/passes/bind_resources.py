"""``bind-resources``: the agents that move the bytes: streams, worker stages, collectives."""

from __future__ import annotations

from collections.abc import Callable

from tilelink.backend.copying import copies_of
from tilelink.backend.passes.common import (
    MOVED,
    RANK,
    WORLD,
    Moved,
    accesses,
    add_declarations,
    copied_beside,
    copied_region,
    drawn,
    moved,
    schedule_of,
    tasks_of_stage,
    tensors_of,
)
from tilelink.backend.passes.worker_copies import copying_stage, own_rows
from tilelink.ir import (
    INDEX,
    Block,
    Expr,
    Op,
    Range,
    Ref,
    Value,
    binary,
    make,
    minimum,
)
from tilelink.schedules import ScheduleError

# Warps of a kernel that copies alone: it waits, and one thread of it issues the copies.
COPY_WARPS = 4


# Workers that copy a rank's own rows: taken to be enough to use the memory of an H200.
OWN_WORKERS = 128


def bind_resources(program: Op) -> Op:
    """Add what carries each moved tensor, by the resource that its schedule names.

    Before::

        launch @f {after = ["head"]} do {…}

    After, for a gather by copy engine::

        stream @A.copy {after = ["head"]} do {
          for_range {lo = 1, hi = WORLD} do (%s: int32) {
            transfer @A[:, :] {to = @A.all[RANK * 1024..RANK * 1024 + 1024, :], peer = (RANK + s) % WORLD}
            notify @A.ready[RANK, 0] {peer = (RANK + s) % WORLD}

    With ``streams = 2`` there are ``@A.copy0`` and ``@A.copy1``, which take turns at channels or at peers;
    ``sm:N`` adds a stage run by the first N workers, ``none`` a collective. Where own rows are not read in place,
    the launch ``@A.own`` in front of the reading one copies them to where the others land. Invariant: an agent
    that a spinning kernel waits for is enqueued before it, or needs no CTA slot.
    """
    for name, tensor in tensors_of(program).items():
        if tensor["move"] not in MOVED:
            continue
        info = moved(program, name)
        if info.resource == "copy_engine":
            program = _by_copy_engine(program, info)
        elif info.resource.startswith("sm:"):
            program = _by_workers(program, info)
        elif info.resource == "none":
            program = _by_collective(program, info)
    return program


def _before_launches(program: Op, *new: Op) -> Op:
    """``new`` put before the first launch."""
    at = next(i for i, op in enumerate(program.body) if op.name == "launch")
    return program.with_ops((*program.body[:at], *new, *program.body[at:]))


def _shift(base: Expr, part: Range) -> Range:
    return Range(base + part.lo, base + part.hi)


def _channel(info: Moved, number: Expr) -> Range:
    """The local elements of channel ``number``."""
    lo = number * info.channel_rows
    hi = lo + info.channel_rows
    if info.dynamic is not None:
        return Range(lo, Expr.of(info.live) if info.channels == 1 else minimum(hi, info.live))
    return Range(lo, hi if info.shard % info.channel_rows == 0 else minimum(hi, info.shard))


def _there(info: Moved, number: Expr) -> Expr | None:
    """The condition that some element of channel ``number`` is there; None where one always is."""
    if info.dynamic is None or info.channels == 1:
        return None
    return binary("<", number * info.channel_rows, info.live)


def _loop(variable: Value, lo: int, hi: Expr | int, body: tuple[Op, ...]) -> Op:
    return make("for_range", lo=lo, hi=hi, blocks=(Block((variable,), body),))


def _each_channel(
    info: Moved, body: Callable[[Expr], tuple[Op, ...]], of: tuple[int, int], stream: str
) -> tuple[Op, ...]:
    """``body(channel)`` once, or in a loop over channels: from ``of[0]`` on every ``of[1]``-th.

    ``stream`` tells the variables of several streams apart.
    """
    first, step = of
    if info.channels == step:
        return body(Expr.const(first))
    variable = Value(f"{info.name}.c{stream}", INDEX)
    channel = Expr.name(variable.name)
    channel = channel * step + first if step > 1 else channel
    return (_loop(variable, 0, info.channels // step, body(channel)),)


def _by_copy_engine(program: Op, info: Moved) -> Op:
    """Side streams of transfers: one, or some that take turns at channels, or at peers."""
    count = schedule_of(program).move(info.name).streams
    by_channel = count > 1 and info.channels % count == 0
    own = _own_by_engine(program, info)
    peers = int(program["world"]) - (0 if own else 1)
    made = []
    for number in range(count if by_channel else min(count, peers)):
        which = str(number) if count > 1 else ""
        shared = (1, count) if by_channel else (count, 1)
        body = _copies(program, info, number, *shared, which)
        name = f"{info.name}.copy{which}"
        made.append(make("stream", ref=Ref(name), after=("head",), blocks=(Block((), body),)))
    if info.kind == "gather":
        if not (own or info.in_place):
            workers = min(OWN_WORKERS, schedule_of(program).workers)
            program = _ahead(program, info, own_rows(program, info), workers, "own")
        return _before_launches(program, *made)
    # A copy that waits for the kernel stands behind it: with one hardware queue it would block it.
    stored = [any(accesses(op, f"{info.name}.partial", "store")) for op in program.body]
    at = max(n for n, found in enumerate(stored) if found) + 1
    return program.with_ops((*program.body[:at], *made, *program.body[at:]))


def _own_by_engine(program: Op, info: Moved) -> bool:
    """Whether a stream also copies this rank's rows to itself.

    Within a GPU that takes SMs, whoever asks for it. Kernels of the library leave them; those that wait for the
    rows, and have all registers of all SMs, would wait for ever.
    """
    if info.kind != "gather" or info.in_place:
        return False
    reading = (op for op in program.find("launch") if any(accesses(op, f"{info.name}.all", "load")))
    return all(op.get("emitter") == "library" for op in reading)


def _copies(
    program: Op, info: Moved, number: int, by_peer: int, by_channel: int, stream: str
) -> tuple[Op, ...]:
    """What stream ``number`` does of all copies: every ``by_peer``-th peer, ``by_channel``-th channel."""
    step = Value(f"{info.name}.s{stream}", INDEX)
    turn = Expr.name(step.name)
    first = 0 if _own_by_engine(program, info) else 1
    if by_peer > 1:
        turn = turn * by_peer + (first + number)
        turns: tuple[int, Expr | int] = (0, -(-(int(program["world"]) - first - number) // by_peer))
    else:
        turns = (first, WORLD)
    peer = (RANK + turn) % WORLD
    span = program.declared(info.name).span

    def send(channel: Expr) -> tuple[Op, ...]:
        local, when = _channel(info, channel), {"if": _there(info, channel)}
        if info.kind == "gather":
            source = Ref(info.name, copied_region(program, info, local))
            target = Ref(
                f"{info.name}.all", copied_region(program, info, _shift(RANK * info.pitch, local))
            )
        else:
            base = peer * info.shard if info.spread else Expr.const(0)
            source = Ref(f"{info.name}.partial", copied_region(program, info, _shift(base, local)))
            target = Ref(f"{info.name}.parts", (RANK, *copied_region(program, info, local)))
        return (
            make("transfer", ref=source, to=target, peer=peer, span=span).with_attrs(**when),
            make(
                "notify", ref=Ref(f"{info.name}.ready", (RANK, channel)), peer=peer, span=span
            ).with_attrs(**when),
        )

    def finished(channel: Expr) -> Op:
        index = (peer, channel) if info.spread else (channel,)
        count = info.tasks_of(channel)
        wait = make("wait", ref=Ref(f"{info.name}.done", index), count=count, span=span)
        return wait.with_attrs(**{"if": _there(info, channel)})

    channels = (number if by_peer == 1 else 0, by_channel)
    if info.kind == "gather":
        return (_loop(step, *turns, _each_channel(info, send, channels, stream)),)
    if info.spread:
        made = _each_channel(info, lambda c: (finished(c), *send(c)), channels, stream)
        return (_loop(step, *turns, made),)
    return _each_channel(
        info, lambda c: (finished(c), _loop(step, *turns, send(c))), channels, stream
    )


def _by_workers(program: Op, info: Moved) -> Op:
    """A stage of copies run by the first N workers, which then join the rest.

    Where warps have roles they do nothing else, and draw tiles from a queue: they are not all as fast, since those
    of one part of the device share its way to the links. Where kernels that multiply are not ours, or tiles that
    span shards wait for all copies, what gathers is a launch of its own before them, and a call is no single
    kernel: ScheduleError with two slots.
    """
    schedule = schedule_of(program)
    beside = copied_beside(program, info.name)
    alone = info.kind == "gather" and schedule.emitter != "triton" and not beside
    if alone and schedule.move(info.name).slots != 1:
        raise ScheduleError(
            program.declared(info.name).span,
            field=f"moves.{info.name}.slots",
            detail="2 slots, where one kernel begins and ends a call, but copies are a kernel of their own "
            f"with `{schedule.emitter}`",
            help="use 1 slot, or the emitter triton",
        )
    workers = schedule.move(info.name).sm_workers
    stage = copying_stage(program, info, shared=alone or beside)
    if alone:
        return _ahead(program, info, stage.with_attrs(workers=None), workers)
    ops: list[Op] = []
    counters: list[Op] = []
    copied = False
    for op in program.body:
        read = any(accesses(op, f"{info.name}.all", "load"))
        if op.name == "launch" and (info.kind != "gather" or (read and not copied)):
            # What is gathered is pushed once: in front of its first reader.
            copied = read
            if beside:
                op, new = _beside(program, op, info, stage, workers)
            else:
                op, new = _join(op, info, stage, workers)
            counters += new
        ops.append(op)
    return add_declarations(program.with_ops(tuple(ops)), *counters)


def _ahead(program: Op, info: Moved, stage: Op, workers: int, name: str = "copy") -> Op:
    """A launch of the copies of a gathered tensor, in front of the first that reads it.

    What every task of the library's waits for first, the copying kernel waits for when it has told all: in front
    of the library's, a wait would be one kernel more.
    """
    schedule, boxes = schedule_of(program), bool(copies_of(stage))
    ops: list[Op] = []
    done = False
    for op in program.body:
        if op.name == "launch" and not done and any(accesses(op, f"{info.name}.all", "load")):
            done, after = True, tuple(op.get("after", ()))
            waits: tuple[Op, ...] = ()
            if op.get("emitter") == "library":
                op, waits = _without_waits(op, info)
            told = [make("finish", blocks=(Block((), waits),))] if waits else []
            copies = make(
                "launch",
                ref=Ref(f"{info.name}.{name}"),
                after=after or None,
                emitter="gluon" if boxes else None,
                stages=1 if boxes else schedule.stages,
                warps=COPY_WARPS if boxes else schedule.warps,
                workers=workers,
                blocks=(Block((), (stage, *told)),),
                span=stage.span,
            )
            ops.append(copies)
            op = op.with_attrs(after=(*after, copies.symbol))
        ops.append(op)
    return program.with_ops(tuple(ops))


def _without_waits(launch: Op, info: Moved) -> tuple[Op, tuple[Op, ...]]:
    """``launch`` without the waits for all of a gathered tensor, and these waits."""

    def whole(op: Op) -> bool:
        everything = (Range(Expr.const(0), WORLD), Range(Expr.const(0), Expr.const(info.channels)))
        return op.name == "wait" and op.ref == Ref(f"{info.name}.ready", everything)

    waits = tuple(dict.fromkeys(op for stage in launch.body for op in stage.body if whole(op)))
    kept = (s.with_ops(tuple(op for op in s.body if not whole(op))) for s in launch.body)
    return launch.with_ops(tuple(kept)), waits


def _join(launch: Op, info: Moved, stage: Op, workers: int) -> tuple[Op, list[Op]]:
    """Put the transfers where their data is ready, and give the other work to those who are free."""
    stages = list(launch.body)
    if info.kind == "gather":
        users = [
            i
            for i, s in enumerate(stages)
            if any(True for _ in accesses(s, f"{info.name}.all", "load"))
        ]
        counters = []
        for i in users:
            if stages[i].get("queue") is None:
                stages[i], counter = drawn(stages[i])
                counters.append(counter)
        return launch.with_ops((stage, *stages)), counters
    at = _last_partial(launch, info)
    if at is None:
        return launch, []
    total = int(launch["workers"])
    stages[at] = stages[at].with_attrs(workers=(workers, total))
    counters = []
    for i, own in enumerate(stages[at + 1 :], at + 1):
        # Own tiles are computed while others push still: whoever is free takes the next.
        folded = any(op.operands for op in accesses(own, f"{info.name}.parts", "load_sum"))
        if folded and own.get("queue") is None:
            stages[i], counter = drawn(own)
            counters.append(counter)
    stages.insert(at + 1, stage)
    return launch.with_ops(tuple(stages)), counters


def _last_partial(launch: Op, info: Moved) -> int | None:
    """The last stage of ``launch`` that stores contributions; None where none does."""
    name = f"{info.name}.partial"
    stored = [n for n, op in enumerate(launch.body) if any(accesses(op, name, "store"))]
    return stored[-1] if stored else None


def _beside(program: Op, launch: Op, info: Moved, stage: Op, workers: int) -> tuple[Op, list[Op]]:
    """Copies drawn from a queue by the first workers, all of whose time they take; the others do the rest."""
    last = -1 if info.kind == "gather" else _last_partial(launch, info)
    if last is None:
        return launch, []
    at = last + 1
    total = int(launch["workers"])
    rest: list[Op] = []
    taken: Expr | int = 0
    for op in launch.body:
        if op.name == "stage":
            # Each queue goes on where the one before it ended.
            turn = taken % (total - workers) if isinstance(taken, int) else 0
            first = turn if op.get("first") is not None else None
            op = op.with_attrs(workers=(workers, total), first=first or None)
            taken = tasks_of_stage(program, op)
        rest.append(op)
    copies, counter = drawn(stage)
    return launch.with_ops((*rest[:at], copies, *rest[at:])), [counter]


def _by_collective(program: Op, info: Moved) -> Op:
    """The library's collective between launches."""
    if info.kind == "gather":
        collective = make(
            "collective",
            ref=Ref(info.name),
            op="all_gather",
            to=Ref(f"{info.name}.all"),
            span=program.declared(info.name).span,
        )
        return _before_launches(_depend(program, info.name), collective)
    total = any(op.name == "buffer" and op.symbol == f"{info.name}.total" for op in program.body)
    collective = make(
        "collective",
        ref=Ref(f"{info.name}.partial"),
        op="reduce_scatter" if info.kind == "scatter" else "all_reduce",
        to=Ref(f"{info.name}.total" if total else info.name),
        span=program.declared(info.name).span,
    )
    launches = program.find("launch")
    last = max(n for n, op in enumerate(launches) if any(accesses(op, collective.symbol, "store")))
    ops: list[Op] = []
    for op in program.body:
        if op is launches[last]:
            ops += _split(program, op, info, collective, total)
        elif op in launches[last + 1 :]:
            _follow(ops, op, info, collective, total)
        else:
            ops.append(op)
    return program.with_ops(tuple(ops))


def _follow(ops: list[Op], launch: Op, info: Moved, collective: Op, total: bool) -> None:
    """A launch behind the one that the collective follows: without the sum where the library makes it."""
    stages = launch.body
    if not total:
        stages = tuple(s for s in stages if s.ref != Ref(f"{info.name}.sum"))
    at = max(n for n, op in enumerate(ops) if op.name == "launch")
    if any(op.name == "stage" for op in stages):
        known = {op.symbol for op in ops if op.ref is not None} | {"head"}
        names = [name for name in launch.get("after", ()) if name in known]
        names += [ops[at].symbol, collective.symbol]
        ops.append(launch.with_ops(stages).with_attrs(after=tuple(dict.fromkeys(names))))
        return
    # What is left of it ends the launch before.
    ops[at] = ops[at].with_ops((*ops[at].body, *stages))


def _depend(program: Op, agent: str) -> Op:
    """Let the first launch wait for ``agent``."""
    first = next(op for op in program.body if op.name == "launch")
    new = first.with_attrs(after=(*first.get("after", ()), agent))
    return program.with_ops(tuple(new if op is first else op for op in program.body))


def _split(program: Op, launch: Op, info: Moved, collective: Op, total: bool) -> list[Op]:
    """The launch up to the last contribution, the collective, and the rest as a second launch."""
    stages = launch.body
    last = max(
        i
        for i, s in enumerate(stages)
        if any(True for _ in accesses(s, f"{info.name}.partial", "store"))
    )
    rest = stages[last + 1 :]
    if not total:
        rest = tuple(s for s in rest if s.ref != Ref(f"{info.name}.sum"))
    collective = collective.with_attrs(after=(launch.symbol,))
    compute = [s for s in rest if s.name == "stage"]
    if not compute:
        return [launch.with_ops((*stages[: last + 1], *rest)), collective]
    after = (*launch.get("after", ()), collective.symbol)
    number = 1 + max(int(op.get("part", 1)) for op in program.find("launch"))
    name = launch.symbol.rsplit(".part", 1)[0] + f".part{number}"
    second = make(
        "launch",
        ref=Ref(name),
        workers=launch["workers"],
        warps=launch["warps"],
        stages=launch["stages"],
        after=after,
        part=number,
        blocks=(Block((), rest),),
    )
    return [launch.with_ops(stages[: last + 1]), collective, second]
