"""One ``launch`` as a persistent Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

from tilelink.backend.emit import access, body, epilogue
from tilelink.backend.emit.flat import flat_by_segment, flat_stage
from tilelink.backend.emit.held import Held
from tilelink.backend.emit.loops import Walk, decode, total
from tilelink.backend.emit.scope import TL_DTYPE, Program, Scope, origin, refuse
from tilelink.backend.emit.text import Writer, identifier
from tilelink.backend.passes.order_memory import can_flatten
from tilelink.ir import Expr, Op, Range, Value


@dataclass(frozen=True, slots=True)
class Parameter:
    """A kernel parameter and where the host gets its value.

    ``kind`` is ``pointer``, ``descriptor``, ``extent``, ``scalar``, or ``context`` for those that
    every kernel ends with; ``block`` is a descriptor's. With ``peer`` it is of a buffer of that peer,
    of the slice there that is this rank's where the buffer has one axis more than the block. ``slot``: of a
    buffer that lies in two slots, of which the kernel chooses that of its call.
    """

    name: str
    kind: str
    symbol: str
    block: tuple[int, ...] = ()
    peer: int | None = None
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's text and what it is launched with; ``warps`` are those that run all of it."""

    name: str
    source: str
    parameters: tuple[Parameter, ...]
    workers: int
    warps: int
    stages: int
    emitter: str = "triton"


_REGISTERS = 65536  # of a multiprocessor
_FULL = 8  # warps that use all registers if each thread has as many as it can


def compile_options(warps: int, stages: int, words: bool, opens: bool = False) -> dict[str, int]:
    """What Triton compiles the kernel of a launch with.

    ``words``: it polls words that signal themselves; ``opens``: it is a kernel of Triton that opens its call. One
    CTA is on a multiprocessor, for lack of shared memory, and has all registers to itself. Left alone, the
    assembler spills some of a kernel of few warps that polls, to make room for others; with eight, a thread may
    have as many as there are in any case.
    """
    found = {"num_warps": warps, "num_stages": stages}
    whole = words or (opens and warps < _FULL)
    return {**found, "maxnreg": min(255, _REGISTERS // (32 * warps))} if whole else found


CONTEXT = ("arena", "peers", "rank", "progress_ns", "arrival_ns")


def heading(
    scope: Scope, launch: Op, decorator: str, name: str, parameters: tuple[Parameter, ...]
) -> Writer:
    """The head of the kernel of ``launch``: decorator, parameters, the context and pointers into the arena."""
    head, program = Writer(), scope.program
    runtime = [p.name for p in parameters if p.kind == "extent"] + ["rank"]
    last = ("program",) if program.folded else ()
    fixed = (*last, "host_record") if program.alone else last
    names = ", ".join(f'"{n}"' for n in (*runtime, "progress_ns", "arrival_ns", *fixed))
    head.line(f"@{decorator}(do_not_specialize=[{names}])")
    head.call(f"def {name}(", [declare(scope, p) for p in parameters], "):")
    head.depth += 1
    given = ["arena", "peers", "rank", str(program.world), *CONTEXT[3:]]
    if program.slots:
        said = () if program.said is None else (scope.lookup(program.said),)
        head.call("ctx = device.begin_call(", [*given, "program", *said])
        head.line("slot = device.slot(ctx)")
    elif program.folded:
        signals = program.acknowledged is not None
        head.call("ctx = device.call_context(", [*given, str(signals)])
        if launch.get("roles") is None:
            open_call(scope, head, launch)
    else:
        head.call("ctx = device.context(", given)
    for symbol, pointer in sorted(scope.buffers.items()):
        decl = program.symbols[symbol]
        text = f"device.pointer(arena, {program.offset(decl)}, {program.cell(decl)})"
        head.line(f"{pointer} = {text}")
    for (symbol, _, _), name in scope.descriptors.items():
        if program.slotted(symbol):
            even, odd = slots_of(name)
            head.line(f"{name} = device.of_slot(slot, {even}, {odd})")
    return head


def open_call(scope: Scope, writer: Writer, launch: Op) -> None:
    """What a head does that is folded into a launch: arrival, its wait, and that streams may begin behind it.

    Launches behind the first one come behind it in the main stream.
    """
    program = scope.program
    if program.folded and not program.slots and launch is program.launches[0]:
        told = [str(program.acknowledged), str(program.streams)]
        if program.said is not None:
            told.append(scope.lookup(program.said))
        name = "open_call" if launch.get("emitter") is None else "open_within"
        writer.line(f"device.{name}(ctx, program, {', '.join(told)})")


def emit_kernel(program: Program, launch: Op, name: str, system: frozenset[str]) -> Kernel:
    """The kernel of ``launch``, named ``name``; ``system`` names the counters streams wait for."""
    scope = _write(program, launch, system)
    parameters = parameters_of(scope)
    head = heading(scope, launch, "triton.jit", name, parameters)
    head.lines += scope.writer.lines
    if not program.folded and not any("ctx" in line for line in scope.writer.lines):
        head.lines = [line for line in head.lines if not line.strip().startswith("ctx = ")]
    return Kernel(
        name,
        head.text(),
        parameters,
        int(launch.get("workers", 1)),
        int(launch.get("warps", 4)),
        int(launch.get("stages", 3)),
    )


def declare(scope: Scope, parameter: Parameter) -> str:
    """A parameter with its type."""
    if parameter.kind == "extent" or parameter.name in ("rank", "program"):
        return f"{parameter.name}: tl.int32"
    if parameter.name.endswith("_ns") or parameter.name == "host_record":
        return f"{parameter.name}: tl.int64"
    if parameter.kind == "scalar":
        dtype = str(scope.program.symbols[parameter.symbol]["dtype"])
        wide = "fp32" if dtype in ("bf16", "fp16") else dtype
        return f"{parameter.name}: {TL_DTYPE[wide]}"
    return parameter.name


def slots_of(name: str) -> tuple[str, str]:
    """The parameters among which a kernel chooses the descriptor ``name`` by the slot of its call."""
    return f"{name}_even", f"{name}_odd"


def parameters_of(scope: Scope) -> tuple[Parameter, ...]:
    """The parameters of a kernel in their order: memory, extents, scalars, context."""
    order = {symbol: number for number, symbol in enumerate(scope.program.symbols)}
    found = [
        *(((order[s], 0, (), -1), Parameter(n, "pointer", s)) for s, n in scope.pointers.items()),
        *(
            (
                (order[s], 1, block, -1 if p is None else p),
                Parameter(text, "descriptor", s, block, p, slot),
            )
            for (s, block, p), n in scope.descriptors.items()
            for text, slot in (
                zip(slots_of(n), (0, 1), strict=True) if scope.program.slotted(s) else ((n, None),)
            )
        ),
    ]
    data = [p for _, p in sorted(found, key=lambda item: item[0])]
    extents = [Parameter(n, "extent", s) for s, n in sorted(scope.extents.items())]
    scalars = [Parameter(n, "scalar", s) for s, n in sorted(scope.scalars.items())]
    context = (*CONTEXT, "program") if scope.program.folded else CONTEXT
    if scope.program.alone:
        context = (*context, "host_record")
    return (*data, *extents, *scalars, *(Parameter(n, "context", n) for n in context))


def _write(program: Program, launch: Op, system: frozenset[str]) -> Scope:
    stages, warps = int(launch.get("stages", 3)), int(launch.get("warps", 4))
    scope = Scope(program, Writer(), stages=stages, warps=warps)
    scope.used |= {
        "ctx",
        *CONTEXT,
        "token",
        "arrived",
        "q",
        "last",
        "program",
        "slot",
        "host_record",
    }
    scope.names["slot"] = "slot"
    scope.writer.depth = 1
    scope.contracted = access.contracted(launch.body)
    for number, op in enumerate(launch.body):
        behind = launch.body[number + 1] if number + 1 < len(launch.body) else None
        if op.name == "stage":
            flushed = behind is not None and behind.name == "flush"
            late = flushed and _goes_on(program, launch, number)
            held = _stage(scope, launch, op, flushed and not late)
            if scope.held is not None:
                scope.held.release(scope)
            scope.held = held if late else None
        elif op.name == "flush":
            _flush(scope, launch, number)
    leave(scope, program, launch, system)
    scope.writer.prune()
    return scope


def _flush(scope: Scope, launch: Op, number: int) -> None:
    """A flush makes what the stage before it holds back; that stage has written it behind its loop."""
    flush, before = launch.body[number], launch.body[:number]
    held = [n for n, op in enumerate(before) if _held(op)]
    flushed = [n for n in held if any(op.name == "flush" for op in before[n + 1 :])]
    for place in held:
        if place not in flushed and place != number - 1:
            raise refuse(
                flush, "a flush that does not stand right behind the stage that holds back"
            )
    drained = any(op.get("drain") for op in launch.body[number - 1].walk()) if number else False
    if flush.get("drain") and not (held and held[-1] == number - 1 and drained):
        scope.writer.line("device.drain_tma_stores()")


def _goes_on(program: Program, launch: Op, number: int) -> bool:
    """Whether the flush behind a stage can wait until workers have passed the next stage's main loop.

    A worker has to perform what it holds back before it waits, stores or notifies again. What it releases are
    stores to a peer: right behind them it would wait for the link, past another main loop it does not.
    """
    stage = launch.body[number]
    behind = launch.body[number + 2 : number + 3]
    if not behind or behind[0].name != "stage":
        return False
    after = behind[0]
    ours = [op for op in stage.walk() if op.name == "notify" and op.get("delay")]
    if not ours or any(program.symbols[op.symbol].name == "counter" for op in ours):
        return False
    if any(op.get("workers") is not None for op in (stage, after)):
        return False
    if can_flatten(program.op, after) or flat_by_segment(program, after):
        return False
    at = next((n for n, op in enumerate(after.body) if not _quiet(op)), 0)
    return any(o.name == "dot" for op in after.body[:at] for o in op.walk())


def _quiet(op: Op) -> bool:
    """Whether an op, and all inside, neither waits nor stores nor notifies."""
    return not any(o.name in ("wait", "notify", "store", "transfer") for o in op.walk())


def _delays(op: Op) -> bool:
    """Whether an op is a notify that is held back, or a loop of them."""
    return any(o.name == "notify" and o.get("delay") for o in op.walk())


def _held(stage: Op) -> bool:
    return _delays(stage)


def _stage(scope: Scope, launch: Op, stage: Op, flushed: bool) -> Held | None:
    """The tasks of all workers; returned is the notify that they hold back at the end."""
    writer = scope.writer
    title = stage.symbol if stage.ref is not None else "stage"
    writer.line()
    writer.line(f"# Stage {title}.{origin(stage.span).replace('  # ', ' ')}")
    walk, tiles = Walk.of(stage), stage.args
    count = total(scope, stage, tiles, walk)
    workers = int(launch.get("workers", 1))
    low, high = stage.get("workers") or (0, workers)
    low, high = int(low), int(high)
    first = stage.get("first", 0) if stage.get("queue", "static") == "static" else 0
    if (low, high) == (0, workers):
        worker, step = "tl.program_id(0)", "tl.num_programs(0)"
        if first:
            worker = scope.fresh(f"{title}_worker")
            writer.line(f"{worker} = {turned(scope, first)}")
        return _queue(scope, stage, worker, step, count, flushed)
    worker = "tl.program_id(0)" if low == 0 else f"tl.program_id(0) - {low}"
    if int(first) % (high - low):
        worker = f"({worker} + {high - low - first % (high - low)}) % {high - low}"
    with writer.block(f"if {among(low, high, workers)}:"):
        return _queue(scope, stage, worker, str(high - low), count, flushed)


def among(low: int, high: int, workers: int) -> str:
    """The condition that a worker, of so many, is one from ``low`` on and below ``high``."""
    inside = f"tl.program_id(0) < {high}"
    if low and high == workers:
        return f"tl.program_id(0) >= {low}"
    return f"(tl.program_id(0) >= {low}) & ({inside})" if low else inside


def turned(scope: Scope, first: Expr | int) -> str:
    """The worker that counts as this one where the worker ``first`` takes position 0 of a queue.

    Backwards by ``first``, written without negative numbers for any number of workers. Of tiles whose number is
    known at run time, ``first`` may be more than there are workers.
    """
    if isinstance(first, int):
        turn = f"{first} * (tl.num_programs(0) - 1)"
    else:
        turn = f"tl.num_programs(0) - {scope.expr(first, 5)} % tl.num_programs(0)"
    return f"(tl.program_id(0) + {turn}) % tl.num_programs(0)"


def _queue(
    scope: Scope, stage: Op, worker: str, step: str, count: str, flushed: bool
) -> Held | None:
    """The tasks of one worker: those at worker, worker + step, … of a static queue, or the next free."""
    if stage.get("queue", "static") == "dynamic":
        _dynamic(scope, stage, count)
    elif can_flatten(scope.program.op, stage) or flat_by_segment(scope.program, stage):
        return flat_stage(scope, stage, worker, step, count, flushed)
    else:
        stage = _hoist_waits(scope, stage)
        notify = next((op for op in stage.body if _delays(op)), None)
        held = None if notify is None else Held.of(scope, notify)
        if held is not None:
            held.begin(scope)
        head = f"for q in tl.range({worker}, {count}, {step}, num_stages=1):"
        with scope.writer.block(head):
            _task(scope, stage, "q", held)
        if held is not None and flushed:
            held.release(scope)
        return None if flushed else held
    return None


def _hoist_waits(scope: Scope, stage: Op) -> Op:
    """Write the waits that are the same for every task once, before the loop; the stage without them.

    A later task of the same worker is dominated by the first one's wait on the same element and count.
    """
    variables = {arg.name for arg in stage.args}
    fixed: list[Op] = []
    for op in stage.body:
        if op.name != "wait" or _names(op) & variables or scope.program.carried(op):
            break
        fixed.append(op)
    scope.hoisted = bool(fixed)
    if fixed:
        scope.tile = "tl.program_id(0)"
        scope.writer.line("token = 0")
        body.ops(scope, tuple(fixed))
        scope.tile = "0"
        scope.writer.line("arrived = token")
    return stage.with_ops(stage.body[len(fixed) :])


def _names(op: Op) -> set[str]:
    """The variables that a wait's index and attributes read, without their fields."""
    assert op.ref is not None
    found: set[str] = set()
    for item in (*op.ref.index, *(value for _, value in op.attrs)):
        parts = (item.lo, item.hi) if isinstance(item, Range) else (item,)
        for part in parts:
            if isinstance(part, Expr):
                found |= part.names
            elif isinstance(part, Value):
                found.add(part.name)
    return found | {name.rsplit(".", 1)[0] for name in found}


def _dynamic(scope: Scope, stage: Op, count: str) -> None:
    counter = stage.get("counter")
    if counter is None:
        raise refuse(stage, "a dynamic queue without a `counter`")
    where = body.word(scope, counter.symbol, body.element(stage, counter.index))
    taken = scope.fresh("taken")
    scope.writer.line(f"{taken} = device.queue_next(ctx, {where})")
    with scope.writer.block(f"while {taken} < {count}:"):
        _task(scope, stage, taken)
        scope.writer.line(f"{taken} = device.queue_next(ctx, {where})")


def _task(scope: Scope, stage: Op, q: str, held: Held | None = None) -> None:
    """One task. What is held back is made before it first waits, stores or notifies; its own is ``held``."""
    scope.tokens.clear()
    scope.tile = q
    decode(scope, stage, stage.args, Walk.of(stage), q)
    waits = (op for op in stage.walk() if op.name == "wait" and not scope.program.carried(op))
    if scope.hoisted or any(waits):
        scope.writer.line("token = arrived" if scope.hoisted else "token = 0")
        scope.tokens.append("token")
    ops = tuple(op for op in stage.body if held is None or not _delays(op))
    if scope.held is not None or held is not None:
        at = next((n for n, op in enumerate(ops) if not _quiet(op)), len(ops))
        body.ops(scope, ops[:at])
        ops = ops[at:]
        if scope.held is not None:
            scope.held.release(scope)
            scope.held.forget(scope)
        if held is not None:
            held.release(scope)
    epilogue.ops(scope, ops)
    if held is not None:
        held.keep(scope)
    scope.tokens.clear()
    scope.hoisted = False
    scope.tile = "0"


def leave(scope: Scope, program: Program, launch: Op, system: frozenset[str]) -> None:
    """The way out: the last CTA runs `finish` and, after an abort, frees streams that wait.

    In a call that is this launch alone it also makes everything ready for the next call, and after an abort spoils
    the outputs; behind others a guard does so.
    """
    finish = launch.find("finish")
    if program.said is not None and launch is program.launches[0]:
        scope.writer.line()
        scope.writer.line("device.hear_call(ctx)")
    if program.alone:
        first, last = program.counter_words
        scope.writer.line()
        scope.writer.line(
            "# The last worker to leave makes everything ready for the next call, and after an"
        )
        scope.writer.line("# abort spoils the outputs.")
        with scope.writer.block(f"if device.end_call(ctx, {first}, {last}, {program.slots}):"):
            for op in finish:
                _finish(scope, op)
            for symbol in program.outputs:
                args = ["ctx", "host_record", access.base(scope, symbol), _size(scope, symbol)]
                scope.writer.call("device.spoil(", args)
        return
    raised = {
        op.symbol for op in launch.walk() if op.name == "notify" and op.ref and op.symbol in system
    }
    if not finish and not raised:
        return
    scope.writer.line()
    scope.writer.line("# The last worker to leave sees the work of all.")
    with scope.writer.block("if device.finish_arrive(ctx):"):
        for symbol in sorted(raised):
            decl = program.symbols[symbol]
            first = int(decl["offset"]) // 4
            last = first + program.numel(symbol)
            scope.writer.line(f"device.finish_leave(ctx, {first}, {last})")
        for op in finish:
            _finish(scope, op)


def _size(scope: Scope, symbol: str) -> str:
    """The number of elements of an output."""
    program = scope.program
    dims = [program.constant(dim) for dim in program.shape(symbol)]
    if None not in dims:
        return str(program.numel(symbol))
    parts = [scope.expr(dim, 2) for dim in program.shape(symbol)]
    if program.numel(symbol) >= 2**31:
        parts[0] = f"tl.cast({parts[0]}, tl.int64)"
    return " * ".join(parts)


def _finish(scope: Scope, finish: Op) -> None:
    flags = acknowledged(finish, scope.program)
    if flags is not None:
        (notify,) = finish.body[0].body
        body.plain_notify(scope.program, notify)
        if notify.get("drain"):
            scope.writer.line("device.drain_tma_stores()")
        scope.writer.line(f"device.rank_notify(ctx, {flags})")
    else:
        if any(op.name == "wait" for op in finish.walk()):
            scope.writer.line("token = 0")
        body.ops(scope, finish.body)


def acknowledged(finish: Op, program: Program) -> int | None:
    """The first word of flag array F if ``finish`` only notifies F[RANK] of every peer, else None."""
    if len(finish.body) != 1 or finish.body[0].name != "for_range":
        return None
    loop = finish.body[0]
    if len(loop.body) != 1 or loop.body[0].name != "notify" or loop.body[0].ref is None:
        return None
    notify = loop.body[0]
    whole = (program.constant(loop["lo"]), program.constant(loop["hi"])) == (0, program.world)
    index = [str(i) for i in notify.ref.index]  # type: ignore[union-attr]
    plain = str(notify.get("peer")) == loop.args[0].name and not notify.get("count", 0)
    plain = plain and not notify.get("delay")
    if whole and index == ["RANK"] and plain and notify.get("if") is None:
        return int(program.symbols[notify.symbol]["offset"]) // 4
    return None


def kernel_name(launch: Op, taken: set[str]) -> str:
    """A function name for a launch, unique in its module."""
    base = identifier(launch.symbol if launch.ref is not None else "kernel")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name
