"""``choose-channels``: communication tiles, the flags that announce them, and who moves the bytes."""

from __future__ import annotations

import math

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import (
    MOVED,
    RANK,
    Moved,
    UnsupportedProgram,
    accesses,
    add_declarations,
    copied_beside,
    folded,
    global_dims,
    handed_on,
    moved,
    reading_rows,
    replace_declaration,
    schedule_of,
    stages_of,
    storing_stage,
    tasks_across,
    tensors_of,
)
from tilelink.backend.passes.copied_sums import sized_copies
from tilelink.ir import DTYPES, Expr, Op, Ref, Value, make
from tilelink.ir import layout as arena
from tilelink.schedules import Move, ScheduleError

# Bytes that one worker moves between two signals: long enough to fill a link, short enough to spread.
SM_TILE_BYTES = 128 * 1024
# Bytes of a copy that arrives while its destination computes: long beside its fixed cost of a few
# microseconds, short beside a tile.
COPY_BYTES = 8 << 20
# Such copies of a rank in all: each is three nodes of the call's graph, of which the host launches one in about
# 2.5 microseconds (bench/results/grid_h200x4.json), and the engine rests for as long as 3 MB take at each.
MOST_COPIES = 8
# Rows of a box that a worker copies at once, at most; its columns make BOX_BYTES of it.
BOX_ROWS = 64
# Channels of one source where stores or workers signal as they go.
FINE_CHANNELS = 8
# Tiles of a source up to which each has a channel of its own where it is stored straight to the peers: a
# signal that nothing has to count is the shorter way.
FINE_TILES = 256
# Channels of one source whose parts are pulled: the fewer tiles one has, the sooner who adds them can follow.
PULLED_CHANNELS = 32
# Rows of tiles of a slice up to which its channels are columns of tiles, where own tiles are computed beside the
# others: all rows of a wave of such columns lie in the cache, and a column is soon whole.
COLUMN_ROWS = 8
# How words say that they are there, by the signal of a move.
ENCODING = {"word": "epoch", "sentinel": "sentinel"}


def choose_channels(program: Op) -> Op:
    """Record on each moved tensor its communication tile and channels; declare its flags.

    Before::

        tensor @A {dims = [M, K], move = "gather", over = 0, …}

    After::

        tensor @A {…, resource = "copy_engine", comm_tile = 1024, channel_rows = 1024, in_place = true}
        flag @ack {dims = [WORLD]}
        flag @A.ready {dims = [WORLD, 1]}

    A program with two slots has no acknowledgements. Flags of a tensor whose words signal themselves are carried
    by them, `flag @C.ready {carried = @C.parts}`: nothing is raised, and nothing has to be counted. Invariant: a
    channel holds whole communication tiles and, of a stored tensor, whole compute tiles. Where these span the
    shards of several ranks, channels lie along another axis, ``channel_axis``, and each rank has all of them; so
    they do where own tiles do not come last and a slice has few rows: a column of it is complete early.
    What copies the sums of two shots gets its tiles here, each in one channel.
    """
    flags: list[Op] = []
    counters: list[Op] = []
    program = _slots(program)
    for name, tensor in tensors_of(program).items():
        if tensor["move"] not in MOVED:
            stages = len(handed_on(program, name))
            if stages:
                counters.append(make("counter", ref=Ref(f"{name}.done"), dims=(stages,)))
            continue
        program = _choose(program, name, tensor)
        info = moved(program, name)
        world = Expr.name("WORLD")
        if info.kind != "gather" and info.resource not in ("epilogue", "none"):
            sources: tuple[object, ...] = (
                (world, info.channels) if info.spread else (info.channels,)
            )
            counters.append(make("counter", ref=Ref(f"{name}.done"), dims=sources))
        if info.words:
            flags += [
                make(
                    "flag", ref=Ref(f"{name}.{flag}"), dims=(world, info.channels), carried=Ref(by)
                )
                for flag, by in (("ready", f"{name}.parts"), ("summed", f"{name}.all"))[
                    : info.shots
                ]
            ]
            continue
        if info.resource != "none":
            flags.append(make("flag", ref=Ref(f"{name}.ready"), dims=(world, info.channels)))
        # Own rows that the copy engine leaves to workers.
        own = info.kind == "gather" and info.resource == "copy_engine" and not info.in_place
        if own or info.resource == "epilogue" or info.resource.startswith("sm:"):
            counters.append(
                make("counter", ref=Ref(f"{name}.arrived"), dims=(world, info.channels))
            )
        if info.shots == 2:
            flags.append(make("flag", ref=Ref(f"{name}.summed"), dims=(world, info.channels)))
            counters.append(make("counter", ref=Ref(f"{name}.added"), dims=(world, info.channels)))
    if flags and program.get("slots") is None:
        ack = make(
            "flag", ref=Ref("ack"), dims=(Expr.name("WORLD"),), offset=arena.ACK * arena.WORD
        )
        flags.insert(0, ack)
    return add_declarations(program, *flags, *counters)


def _slots(program: Op) -> Op:
    """The program, with `slots = 2` where its schedule asks for that: of all moved tensors or of none."""
    schedule = schedule_of(program)
    moves = {n: schedule.move(n) for n, t in tensors_of(program).items() if t["move"] in MOVED}
    if not any(move.slots == 2 for move in moves.values()):
        return program
    for name, move in moves.items():
        if move.slots != 2:
            raise ScheduleError(
                program.declared(name).span,
                field=f"moves.{name}.slots",
                detail=f"`{name}` has 1, another moved tensor of the kernel 2",
                help="give all of them the same",
            )
    return program.with_attrs(slots=2)


def _choose(program: Op, name: str, tensor: Op) -> Op:
    move = schedule_of(program).move(name)
    if move.direction == "pull" and tensor["move"] != "gather":
        _check_pulled(tensor, moved(program, name))
        program = replace_declaration(program, tensor.with_attrs(pulled=True))
    info = moved(program, name)
    if info.kind == "gather" and move.resource == "epilogue":
        raise ScheduleError(
            tensor.span,
            field=f"moves.{name}.resource",
            detail=f"`{name}` is an input: no epilogue computes its tiles",
            help=f"use copy_engine, sm:N or none{_left_out(move)}",
        )
    if info.kind == "gather":
        for stage in stages_of(program):
            for store in accesses(stage, name, "store"):
                raise UnsupportedProgram(
                    store.span,
                    detail=f"`{name}` is gathered, and stored in the same kernel",
                    help="store into a tensor of its own: peers may still be reading this one",
                )
        tile, rows = _input_channels(program, tensor, info, move)
    else:
        if move.signal in ENCODING:
            _check_words(program, tensor, info)
        if move.signal == "sentinel":
            _check_emptied(program, tensor)
        spans = info.kind == "scatter" and move.spans
        program = (_count_spanning if spans else _count_tasks)(program, name)
        if move.own != "last":
            program = _count_columns(program, name)
        info = moved(program, name)
        if info.channel_axis is None:
            tile, rows = _output_channels(program, tensor, info, move)
            if _by_owner(program, info):
                wrong = "resource" if move.resource != "epilogue" else ""
                wrong = wrong or ("channels" if move.channels not in (None, 1) else "")
                if wrong:
                    raise ScheduleError(
                        tensor.span,
                        field=f"moves.{name}.{wrong}",
                        detail=f"`{name}` has dynamic rows, which lie by owner for another tensor's sake",
                        help="use the resource epilogue and one channel",
                    )
                tile = rows = info.extent
                tensor = program.declared(name).with_attrs(by_owner=True)
                program = replace_declaration(program, tensor)
        else:
            tile, rows = _column_channels(info, move)
    program = replace_declaration(
        program,
        program.declared(name).with_attrs(
            resource=move.resource,
            comm_tile=tile,
            channel_rows=rows,
            polled=ENCODING.get(move.signal),
            closed=(move.spans and info.dynamic is not None) or None,
            in_place=info.kind == "gather" and move.resource != "none" and _in_place(program, info),
        ),
    )
    program = sized_copies(program, moved(program, name))
    return _in_channel_order(program, name, rows) if folded(program, name) else program


def _by_owner(program: Op, info: Moved) -> bool:
    """Whether the rows of a sum in one shot, which has no owners, lie by those of another tensor: which channels
    have rows that are there then depends on the owner, so all rows are one channel."""
    if info.kind != "reduce" or info.spread or info.dynamic is None:
        return False
    stage, _ = storing_stage(program, info.name)
    return stage.get("live") is not None


def _left_out(move: Move) -> str:
    """The fields of ``move`` that not every resource has, as what to leave out."""
    fields = ("sum", "slots", "signal", "direction", "own")
    given = [f"`{name}`" for name in fields if getattr(move, name) != getattr(Move(), name)]
    return f", and leave out {' and '.join(given)}" if given else ""


def _check_pulled(tensor: Op, info: Moved) -> None:
    """ScheduleError unless each contribution to ``tensor`` is read by one other rank."""
    if not info.spread:
        raise ScheduleError(
            tensor.span,
            field=f"moves.{info.name}.direction",
            detail=f"`{info.name}` is reduced in one shot: every rank would read every contribution",
            help="use push, or two shots",
        )


def _check_words(program: Op, tensor: Op, info: Moved) -> None:
    """ScheduleError unless rows of tiles of ``tensor`` are of whole words, and all parts can be polled."""
    dims, size = global_dims(tensor, environment(program)), DTYPES[tensor["dtype"]]
    inner = info.block if info.axis == len(dims) - 1 else dims[-1]
    stage, _ = storing_stage(program, info.name)
    store = next(s for s in accesses(stage, info.name, "store") if not s.get("final"))
    assert store.ref is not None
    column = store.ref.index[-1]
    tile = int(stage["tile"][stage.args.index(column)]) if column in stage.args else 0
    wrong = ""
    if tensor["dtype"] not in ("bf16", "fp16", "fp32"):
        wrong = f"its elements are {tensor['dtype']}"
    elif len(dims) != 2 or len(store.ref.index) != 2:
        wrong = f"it has {len(dims)} axes, and words are stored in tiles of two"
    elif inner * size % arena.PAYLOAD or tile * size % arena.PAYLOAD or not tile:
        wrong = f"its rows, {inner} elements in tiles of {tile}, are not of whole words"
    elif program["world"] > arena.POLLED:
        wrong = f"a sum of {program['world']} parts, and at most {arena.POLLED} are polled together"
    if wrong:
        raise ScheduleError(
            tensor.span,
            field=f"moves.{info.name}.signal",
            detail=f"`{info.name}` as words, but {wrong}",
            help="use the signal `flag`",
        )


def _check_emptied(program: Op, tensor: Op) -> None:
    """ScheduleError unless every element of the sum of ``tensor`` is read once: that load empties its word."""
    loads = [
        (stage, load)
        for stage in stages_of(program)
        for load in accesses(stage, tensor.symbol, "load")
        if not load.get("relay")
    ]
    wrong = f"its sum is read {len(loads)} times"
    if len(loads) == 1:
        ((stage, load),) = loads
        assert load.ref is not None
        once = load in stage.body and set(load.ref.index) == set(stage.args)
        wrong = "" if once else "its sum is read by several tiles of the outer loops, or in a loop"
    if wrong:
        raise ScheduleError(
            tensor.span,
            field=f"moves.{tensor.symbol}.signal",
            detail=f"`{tensor.symbol}` by sentinels, but {wrong}",
            help="use the signal `word` or `flag`",
        )


def _in_channel_order(program: Op, name: str, channel_rows: int) -> Op:
    """Let the stages of a folded sum walk one channel after the other.

    Tiles that are walked together lie in one channel, so that the first channels leave, and are read,
    while the last are computed. Of columns, all rows are walked together, of all ranks in turn where sums are
    read.
    """

    columns = moved(program, name).channel_axis is not None

    def narrowed(stage: Op) -> Op:
        stored = any(not op.get("final") for op in accesses(stage, name, "store"))
        stored |= any(accesses(stage, name, "load_sum"))
        read = columns and any(accesses(stage, name, "load")) and stage.get("segment") is not None
        if stage.name != "stage" or not (stored or read):
            return stage
        axis = int(stage.get("axis", 0))
        length = int(stage["tile"][axis])
        if columns:
            group = -(-int(stage["segment"]) // length)
            if read:
                stage = stage.with_attrs(interleave=True)
        else:
            group = min(int(stage.get("group", 1)), max(1, channel_rows // length))
        return stage.with_attrs(group=None if group == 1 else group)

    launches = (
        op.with_ops(tuple(map(narrowed, op.body))) if op.name == "launch" else op
        for op in program.body
    )
    return program.with_ops(tuple(launches))


def _count_tasks(program: Op, name: str) -> Op:
    """Record how the tasks of the storing stage tile the tensor."""
    stage, variable = storing_stage(program, name)
    if variable is None:
        raise UnsupportedProgram(
            stage.span,
            detail=f"`{name}` is stored over an axis that is not a tile of the outer loops",
            help="index it with a tile of the outermost loop",
        )
    rows, across = int(stage["tile"][variable]), tasks_across(program, stage, variable)
    block, segment = moved(program, name).block, int(stage.get("segment", 0))
    if int(stage.get("axis", 0)) == variable and 0 < segment < block:
        # Another tensor of the nest has the smaller blocks: tasks end at those too.
        if rows > segment:
            rows = segment
        elif segment % rows:
            raise UnsupportedProgram(
                stage.span,
                detail=f"tiles of {rows} do not divide the blocks of {segment} that the nest is cut in, "
                f"which are smaller than those of `{name}`",
                help="use a tile that divides them, or give the tensors the same owner map",
            )
    tensor = program.declared(name).with_attrs(task_rows=rows, tasks_across=across)
    return replace_declaration(program, tensor)


def _count_spanning(program: Op, name: str) -> Op:
    """Record how tasks that span shards tile the tensor: along its moved axis, along another, and beside these."""
    tensor = program.declared(name)
    stage, variable = storing_stage(program, name)
    axis = _column_axis(program, name)
    detail, advice = "", "use false"
    if variable is None or axis is None:
        detail = f"no two axes of `{name}` are tiles of the outer loops"
    elif stage.get("segment") is not None:
        detail = f"the tiles that store `{name}` end with the shards of another tensor"
    elif _given(program, name):
        detail = f"the rows of `{name}` that share a signal are given"
    elif moved(program, name).dynamic is not None and not _of_all_rows(program, name):
        detail = f"tiles of fewer rows than `{name}` can have, which are known at run time only"
        most = moved(program, name).shard * moved(program, name).world
        advice = f"use false, or tiles of {most} rows, the capacity"
    if detail or axis is None:
        raise ScheduleError(tensor.span, field=f"moves.{name}.spans", detail=detail, help=advice)
    return _along_columns(program, name, axis)


def _of_all_rows(program: Op, name: str) -> bool:
    """Whether a task that stores a tensor stores all rows that there can be, and so some of every rank's."""
    stage, variable = storing_stage(program, name)
    info = moved(program, name)
    return variable is not None and int(stage["tile"][variable]) >= info.shard * info.world


def _count_columns(program: Op, name: str) -> Op:
    """The same of tasks that end with a shard and are computed beside own ones, of shards of few whole rows of
    tasks; channels of others are rows."""
    info, axis = moved(program, name), _column_axis(program, name)
    rows, rest = divmod(info.shard, info.task_rows)
    plain = info.block == info.shard and info.dynamic is None and not rest
    if axis is None or not plain or rows > COLUMN_ROWS or _given(program, name):
        return program
    return _along_columns(program, name, axis)


def _given(program: Op, name: str) -> bool:
    """Whether something says which rows of a tensor share a signal."""
    tensor, move = program.declared(name), schedule_of(program).move(name)
    return any(given is not None for given in (move.tile, tensor.get("tile"), tensor.get("signal")))


def _column_axis(program: Op, name: str) -> int | None:
    """The last axis, beside the moved one, that tasks which store a tensor cut; None where none do."""
    info, (stage, _) = moved(program, name), storing_stage(program, name)
    store = next(s for s in accesses(stage, name, "store") if not s.get("final"))
    assert store.ref is not None
    others = [
        axis
        for axis, item in enumerate(store.ref.index)
        if axis != info.axis and isinstance(item, Value) and item in stage.args
    ]
    return others[-1] if others else None


def _along_columns(program: Op, name: str, axis: int) -> Op:
    """Record that channels lie along ``axis``, and how tasks tile that and the moved one."""
    tensor, (stage, variable) = program.declared(name), storing_stage(program, name)
    store = next(s for s in accesses(stage, name, "store") if not s.get("final"))
    assert store.ref is not None and variable is not None
    column = stage.args.index(store.ref.index[axis])
    across = tasks_across(program, stage, variable, column)
    # What is known at run time only is rows, which are refused where tiles are made.
    assert isinstance(across, int)
    tensor = tensor.with_attrs(
        channel_axis=axis,
        task_rows=int(stage["tile"][variable]),
        task_columns=int(stage["tile"][column]),
        tasks_across=across,
    )
    return replace_declaration(program, tensor)


def _column_channels(info: Moved, move: Move) -> tuple[int, int]:
    """The communication tile of a tensor whose channels are columns, and the length of one along their axis."""
    units = -(-info.across // info.task_columns)
    alone = info.rows_meeting(RANK) == info.tasks_across == 1 or move.own != "last"
    channels = move.channels or (units if alone and units <= FINE_TILES else FINE_CHANNELS)
    wanted = info.task_columns * -(-units // min(channels, units))
    return info.shard, min(wanted, info.across)


def _row_bytes(program: Op, tensor: Op, info: Moved) -> int:
    size = DTYPES[tensor["dtype"]]
    for axis, length in enumerate(global_dims(tensor, environment(program))):
        size *= 1 if axis == info.axis else length
    return size


def _input_channels(program: Op, tensor: Op, info: Moved, move: Move) -> tuple[int, int]:
    """Communication tile and channel length of a gathered tensor, in elements of the moved axis."""
    if move.spans and info.dynamic is not None and (move.channels or 1) > 1:
        raise ScheduleError(
            tensor.span,
            field=f"moves.{info.name}.channels",
            detail=f"{move.channels}, but tiles wait for all of them, and few rows may leave some without any",
            help="use 1, or leave it out",
        )
    asked = move.tile or _asked_tile(program, tensor, info)
    if asked is None:
        asked = info.shard
        if move.channels is not None:
            asked = -(-info.shard // move.channels)
        elif move.copies == "boxes":
            asked = BOX_ROWS
        elif move.sm_workers:
            asked = max(1, SM_TILE_BYTES // _row_bytes(program, tensor, info))
            if move.spans and info.dynamic is not None:
                # Boxes share out columns; of whole rows, each worker has a few.
                asked = max(1, min(asked, info.shard * info.world // move.sm_workers))
    tile = min(asked, info.shard)
    if move.copies == "boxes":
        beside = copied_beside(program, info.name)
        most = reading_rows(program, info.name) if beside else min(asked, BOX_ROWS)
        tile = box_length(info.shard, most or BOX_ROWS)
    count = -(-info.shard // tile)
    per = _per_channel(program, tensor, count)
    if move.channels is not None:
        per = -(-count // move.channels)
    elif move.spans:
        per = count  # whoever waits for one waits for all
    elif per is None:
        per = -(-count // FINE_CHANNELS) if move.sm_workers else 1
    return tile, min(tile * per, info.shard)


def box_length(length: int, most: int) -> int:
    """The largest power of two that divides ``length`` and is ``most`` at most: boxes of it leave no rest."""
    found = 1
    while 2 * found <= most and length % (2 * found) == 0:
        found *= 2
    return found


def _output_channels(program: Op, tensor: Op, info: Moved, move: Move) -> tuple[int, int]:
    """The same of a stored tensor; a channel holds whole rows of compute tiles."""
    rows = info.task_rows
    unit = info.block
    if info.block == info.shard:
        # Tasks that are cut short still share a channel as far as a whole tile would reach: it is read by
        # tiles of that length.
        stage, variable = storing_stage(program, info.name)
        length = rows if variable is None else int(stage["tile"][variable])
        unit = max(rows, min(length, info.shard) // rows * rows)
    # Whoever sums a part to hand it on says so once a tile, to one channel.
    unit = math.lcm(unit, min(_relayed_rows(program, info), info.shard))
    if move.resource != "epilogue" and not info.pulled and info.block == info.shard:
        # What is copied is summed by tiles that wait for one channel each.
        unit = math.lcm(unit, min(reading_rows(program, info.name) or 1, info.shard))
    units = -(-info.shard // unit)
    asked = move.tile or _asked_tile(program, tensor, info)
    per = None
    if asked is not None:
        per = _per_channel(program, tensor, -(-info.shard // min(asked, info.shard)))
    channels = move.channels
    if channels is None:
        channels = 1 if move.resource in ("copy_engine", "none") else FINE_CHANNELS
        if move.resource == "epilogue" and info.tasks_across == 1 and units <= FINE_TILES:
            channels = units
        if info.pulled and units <= PULLED_CHANNELS:
            channels = units
        if move.resource == "copy_engine" and folded(program, info.name):
            pieces = info.shard * _row_bytes(program, tensor, info) // COPY_BYTES
            channels = max(1, min(pieces, MOST_COPIES // max(1, info.world - 1)))
    wanted = unit * -(-units // min(channels, units))
    if asked is not None and move.channels is None:
        wanted = -(-asked * (per or 1) // unit) * unit
    channel_rows = min(wanted, info.shard)
    tile = channel_rows
    if move.copies == "boxes":
        # Where warps have roles, boxes go by way of the ring of operands: of whole tiles' rows.
        most = rows if copied_beside(program, info.name) else BOX_ROWS
        tile = box_length(channel_rows, most)
    elif move.sm_workers:
        tile = max(1, min(channel_rows, SM_TILE_BYTES // _row_bytes(program, tensor, info)))
        # Along an inner axis a copy is of rows: its columns are as many in every copy.
        whole = info.shard if info.axis else 0
        tile = next(t for t in range(tile, 0, -1) if channel_rows % t == whole % t == 0)
    return tile, channel_rows


def _relayed_rows(program: Op, info: Moved) -> int:
    """Rows of a tile in which this rank sums its part of a reduce in two shots; 1 where there is none."""
    for stage in stages_of(program):
        if any(store.get("relay") for store in accesses(stage, info.name, "store")):
            return int(stage["tile"][info.axis])
    return 1


def _asked_tile(program: Op, tensor: Op, info: Moved) -> int | None:
    shape = tensor.get("tile")
    if shape is None:
        return None
    length = shape[info.axis]
    return int(length if isinstance(length, int) else length.evaluate(environment(program)))


def _per_channel(program: Op, tensor: Op, count: int) -> int | None:
    """Communication tiles a channel that the mapping's ``signal`` map asks for."""
    signal = tensor.get("signal")
    if signal is None:
        return None
    names = environment(program)
    found = [
        signal if isinstance(signal, int) else int(signal.evaluate({**names, "t": t}))
        for t in range(count)
    ]
    per = next((p for p in range(1, count + 1) if found == [t // p for t in range(count)]), None)
    if per is None:
        raise UnsupportedProgram(
            tensor.span,
            detail=f"the signal map `{signal}` of `{tensor.symbol}` does not share flags evenly among neighbours",
            help="write `signal t / n`",
        )
    return per


def _in_place(program: Op, info: Moved) -> bool:
    """Whether every read is by a tile of one owner, so that own rows are read where the user left them.

    Both are read the same way, with rows as long in the shard as in the whole: it is cut along its first axis.
    """
    if info.axis != 0:
        return False
    for stage in stages_of(program):
        tiles = {
            op.args[int(op.get("axis", 0))] for op in stage.walk() if op.get("segment") is not None
        }
        for load in accesses(stage, info.name, "load"):
            assert load.ref is not None
            if not load.ref.index or load.ref.index[info.axis] not in tiles:
                return False
    return True
