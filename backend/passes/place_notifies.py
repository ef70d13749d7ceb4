"""``place-notifies``: a notify behind the last write of every channel, and the acknowledgement of a call."""

from __future__ import annotations

from dataclasses import replace

from tilelink.backend.passes.common import (
    MOVED,
    RANK,
    WORLD,
    Moved,
    UnsupportedProgram,
    accesses,
    handed_on,
    moved,
    stages_of,
    start_of,
    stop_of,
    tasks_across,
    tensors_of,
)
from tilelink.errors import Span
from tilelink.ir import INDEX, Block, Expr, Op, Range, Ref, Value, make


def place_notifies(program: Op) -> Op:
    """Announce stored tiles, and the end of a call's reads.

    Before::

        stage … do (%m: tile, %n: tile) {
          store @C[%m, %n] (%c)

    After, where the bytes leave later::

          store @C[%m, %n] (%c)
          notify @C.done[m.start / 1024, 0]

    and where the store itself goes to the peer::

          notify @C.ready[RANK, 0] {peer = m.start / 1024, count = 32, through = @C.arrived[m.start / 1024, 0]}

    What is pulled is stored here, and notified there; a tile that spans shards is stored once, and all who own
    some of it are notified::

          store @C[%m, %n] (%c)
          for_range {lo = m.start / 32, hi = (m.stop - 1) / 32 + 1} do (%d) {
            notify @C.ready[RANK, n.start / 64] {peer = d}
          }

    The head of a call waits until every rank has acknowledged the call before, and the last worker
    acknowledges this one, when all that peers push of a gather has landed, read or not. With two slots nobody
    does, and the head is folded into the launch. A notify of a flag that words carry has no counter. Invariant:
    one notify a task and channel, behind the task's last write.
    """
    slots = program.get("slots") is not None
    acked = bool(program.find("flag")) and not slots
    headed = acked or slots or bool(program.find("counter"))
    unread = _unread(program)
    if slots and unread:
        raise UnsupportedProgram(
            unread[0].span,
            detail="each rank reads its own part alone of what is gathered, and waits for no other rank",
            help="declare it `shard` in place of `gather`, or use 1 slot",
        )
    launches = program.find("launch")
    ops: list[Op] = []
    for op in program.body:
        if op.name == "launch":
            if headed and op is launches[0]:
                ops.append(_head(acked).with_attrs(folded=slots or None))
            stages = tuple(_announce(program, op, number) for number in range(len(op.body)))
            finish = (_finish(unread),) if acked and op is launches[-1] else ()
            after = (*(("head",) if headed else ()), *op.get("after", ()))
            op = op.with_ops((*stages, *finish)).with_attrs(after=after or None)
        ops.append(op)
    return program.with_ops(tuple(ops))


def _head(acked: bool) -> Op:
    """The acknowledgements of the call before come first: landing buffers are written again after them."""
    everyone = Range(Expr.const(0), WORLD)
    waits = (make("wait", ref=Ref("ack", (everyone,)), epoch=-1),) if acked else ()
    return make("head", blocks=(Block((), waits),))


def _unread(program: Op) -> tuple[Op, ...]:
    """Waits for gathered tensors of which each rank reads its own part: what lands must have, when a call ends."""
    waits: list[Op] = []
    for name, tensor in tensors_of(program).items():
        if tensor["move"] != "gather" or tensor["resource"] == "none":
            continue
        info, ready = moved(program, name), f"{name}.ready"
        loops = [
            loop
            for stage in stages_of(program)
            for loop in stage.walk()
            if any(op.name == "wait" and op.symbol == ready for op in loop.body)
        ]
        if loops and all(_own(loop, info) for loop in loops):
            channels = Range(Expr.const(0), Expr.const(info.channels))
            sources = [Range(Expr.const(0), WORLD)]
            if info.in_place:  # nobody sends own rows
                sources = [Range(Expr.const(0), RANK), Range(RANK + 1, WORLD)]
            waits += [
                make("wait", ref=Ref(ready, (s, channels)), span=tensor.span) for s in sources
            ]
    return tuple(waits)


def _own(loop: Op, info: Moved) -> bool:
    """Whether a loop walks, of a gathered tensor, the part of one rank alone."""
    segments = loop.get("segments")
    return segments is not None and int(segments) * int(loop["segment"]) < info.extent


def _finish(waits: tuple[Op, ...] = ()) -> Op:
    peer = Value("ack.p", INDEX)
    ack = make("notify", ref=Ref("ack", (RANK,)), peer=Expr.name("ack.p"))
    loop = make("for_range", lo=0, hi=WORLD, blocks=(Block((peer,), (ack,)),))
    return make("finish", blocks=(Block((), (*waits, loop)),))


def _announce(program: Op, launch: Op, number: int) -> Op:
    """Stage ``number`` of ``launch`` with the notifies of what its tasks store."""
    stage = launch.body[number]
    body: list[Op] = []
    for op in stage.body:
        body.append(op)
        for name, tensor in tensors_of(program).items():
            stores = [
                s
                for s in op.walk()
                if s.name == "store" and s.symbol == name and not s.get("final")
            ]
            if not stores:
                continue
            if stores[0].get("relay"):
                before = sum(_relays(s, name) for s in launch.body[:number])
                body[-1:] = _relayed(program, moved(program, name), stage, op, before)
                continue
            if tensor["move"] not in MOVED:
                places, here = handed_on(program, name), (launch.symbol, number)
                if here in places:
                    element = Expr.const(places.index(here))
                    span = stores[-1].span
                    body.append(make("notify", ref=Ref(f"{name}.done", (element,)), span=span))
                continue
            info = moved(program, name)
            if info.resource == "epilogue":
                suffix = _suffix(launch, number, name)
                spans = info.channel_axis is not None and stage.get("segment") is None
                body[-1:] = (_to_owners if spans else _to_peers)(info, op, suffix)
            elif info.resource != "none":
                body.append(_locally(info, stores[-1]))
    return stage.with_ops(tuple(body))


def _place(info: Moved, store: Op) -> tuple[Expr, Expr]:
    """Owner and channel of the tile that ``store`` writes."""
    assert store.ref is not None
    element, along = store.ref.index[info.axis], store.ref.index[info.along]
    assert isinstance(element, Value) and isinstance(along, Value)
    place = start_of(along) if info.channel_axis is not None else info.local_of(start_of(along))
    return info.owner_of(start_of(element)), info.channel_of(place)


def _locally(info: Moved, store: Op) -> Op:
    owner, channel = _place(info, store)
    index = (owner, channel) if info.spread else (channel,)
    return make("notify", ref=Ref(f"{info.name}.done", index), span=store.span)


def _suffix(launch: Op, number: int, name: str) -> str:
    """What makes names of stage ``number`` differ from those of an earlier one that sends tiles of ``name``."""
    earlier = (s for stage in launch.body[:number] for s in accesses(stage, name, "store"))
    return f".{number}" if any(not (s.get("final") or s.get("relay")) for s in earlier) else ""


def _to_peers(info: Moved, op: Op, suffix: str) -> tuple[Op, ...]:
    """The store of a tile followed by its notify: to the owner, or for a reduce to every rank."""
    store = next(s for s in op.walk() if s.name == "store" and s.symbol == info.name)
    owner, channel = _place(info, store)
    count = info.tasks_of(channel)
    if not info.spread:
        return _to_everyone(info, op, ("ready", "arrived"), channel, count, suffix)
    return (
        op if info.pulled else _with_peer(op, info.name, owner),
        _notify(info, ("ready", "arrived"), channel, count, owner, store.span),
    )


def _to_owners(info: Moved, op: Op, suffix: str) -> tuple[Op, ...]:
    """The store of a tile that spans shards, and a notify to every rank that owns some of its rows."""
    store = next(s for s in op.walk() if s.name == "store" and s.symbol == info.name)
    assert store.ref is not None and info.channel_axis is not None
    rows, columns = store.ref.index[info.axis], store.ref.index[info.channel_axis]
    assert isinstance(rows, Value) and isinstance(columns, Value)
    variable = Value(f"{info.name}.d{suffix}", INDEX)
    owner, channel = Expr.name(variable.name), info.channel_of(start_of(columns))
    lo, hi = info.owners_met(start_of(rows), stop_of(rows))
    count = info.tasks_meeting(owner, channel)
    told = _notify(info, ("ready", "arrived"), channel, count, owner, store.span)
    loop = make("for_range", lo=lo, hi=hi, blocks=(Block((variable,), (told,)),), span=store.span)
    return op, loop


def _relays(stage: Op, name: str) -> bool:
    """Whether a stage hands sums of a tensor on to every rank."""
    return any(s.get("relay") for s in accesses(stage, name, "store"))


def _relayed(program: Op, info: Moved, stage: Op, op: Op, before: int) -> tuple[Op, ...]:
    """The store of a part's sum into every rank, and its notifies; ``before``: stages that did that already."""
    store = next(s for s in op.walk() if s.name == "store" and s.symbol == info.name)
    _, channel = _place(info, store)
    element = store.ref.index[info.along]  # type: ignore[union-attr]
    variable = stage.args.index(element)
    across = tasks_across(program, stage, variable)
    rows = info.rows_of(channel)
    length = int(stage["tile"][variable])
    count = (rows + (length - 1)) // length * across
    return _to_everyone(info, op, ("summed", "added"), channel, count, str(before or ""))


def _to_everyone(
    info: Moved,
    op: Op,
    words: tuple[str, str],
    channel: Expr,
    count: Expr | int,
    suffix: str = "",
) -> tuple[Op, ...]:
    """A store into every rank, this one last, then the notifies of all: none waits for another one's store."""
    d, p = (Value(f"{info.name}.{letter}{suffix}", INDEX) for letter in "dp")
    store = next(s for s in op.walk() if s.name == "store" and s.symbol == info.name)
    peer = (RANK + 1 + Expr.name(d.name)) % WORLD
    sent = _with_peer(op, info.name, peer)
    told = _notify(info, words, channel, count, Expr.name(p.name), store.span)
    return tuple(
        make("for_range", lo=0, hi=WORLD, blocks=(Block((variable,), (one,)),), span=store.span)
        for variable, one in ((d, sent), (p, told))
    )


def _notify(
    info: Moved,
    words: tuple[str, str],
    channel: Expr,
    count: Expr | int,
    peer: Expr,
    span: Span | None,
) -> Op:
    """The notify of this rank's flag ``words[0]`` at ``peer``, where need be counted by ``words[1]``."""
    flag, counter = (f"{info.name}.{word}" for word in words)
    # Words are polled one by one: as many as they are, nothing counts them.
    once = count == 1
    return make(
        "notify",
        ref=Ref(flag, (RANK, channel)),
        peer=peer,
        count=None if once else count,
        through=None if once or info.words else Ref(counter, (peer, channel)),
        span=span,
    )


def _with_peer(op: Op, name: str, peer: Expr) -> Op:
    if op.name == "store" and op.symbol == name:
        return op.with_attrs(peer=peer)
    blocks = tuple(
        replace(b, ops=tuple(_with_peer(o, name, peer) for o in b.ops)) for b in op.blocks
    )
    return replace(op, blocks=blocks)
