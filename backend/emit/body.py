"""The ops of tile bodies: arithmetic, loops with carried values, waits and notifies."""

from __future__ import annotations

from collections.abc import Callable

from tilelink.backend.emit import access, sums, transfers, words
from tilelink.backend.emit.loops import Walk, announce, enter_tiles
from tilelink.backend.emit.scope import TL_DTYPE, CannotEmit, Program, Scope, origin, refuse
from tilelink.backend.emit.text import condition, one_call
from tilelink.ir import INTEGERS, All, At, Expr, Op, Range, Value
from tilelink.ir.layout import SLOT_FLAGS, WORD

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
}
_CALLS = {
    "abs": "tl.abs({})",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log2": "tl.log2({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "erf": "tl.erf({})",
    "tanh": "device.tanh({})",
    "sigmoid": "tl.sigmoid({})",
    "silu": "{0} * tl.sigmoid({0})",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "neg": "-{}",
}
_DEVICE = {"pow": "device.power", "floordiv": "device.floordiv", "mod": "device.floormod"}
# Where no operand is negative, Triton's operators round as they should.
_NATURAL = {"floordiv": "//", "mod": "%"}
_NEUTRAL = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
_SYNC = frozenset({"wait", "notify", "transfer"})


def ops(scope: Scope, body: tuple[Op, ...]) -> None:
    """The ops of one block."""
    emptied = len(scope.emptied)
    for op in body:
        handler = scope.over.get(op.name) or _OPS.get(op.name, _elementwise)
        try:
            handler(scope, op)
        except CannotEmit as error:
            error.span = error.span or op.span
            raise
    words.empty(scope, emptied)


def assign(scope: Scope, op: Op, text: str, dirty: frozenset[str] | None = None) -> None:
    """Gives the result of ``op`` a name and ``text`` for its value; ``dirty``: where it may be short."""
    value = op.results[0]
    name = scope.define(value)
    scope.natural.discard(value.name)
    scope.writer.assign(name, text, origin(op.span))
    scope.dirty[value.name] = scope.loose(value.type) if dirty is None else dirty


def _operand_dirt(scope: Scope, op: Op) -> frozenset[str]:
    return frozenset[str]().union(*(scope.stray(v) for v in op.operands))


def _elementwise(scope: Scope, op: Op) -> None:
    if len(op.results) != 1:
        raise refuse(op, f"the op `{op.name}`")
    type_ = op.results[0].type
    narrow, natural = type_.dtype in ("bf16", "fp16"), False
    if op.name in ("maximum", "minimum", *_DEVICE) or op.name in _INFIX:
        if len(op.operands) != 2:
            raise refuse(op, f"`{op.name}` of {len(op.operands)} operands")
        left, right = (scope.wide(v, len(type_.shape)) for v in op.operands)
        if op.name in ("div", "pow") and type_.dtype in ("bf16", "fp16", "fp32"):
            left, right = (_floating(v, t) for v, t in zip(op.operands, (left, right), strict=True))
        natural = all(v.name in scope.natural for v in op.operands)
        infix = _INFIX.get(op.name) or (_NATURAL.get(op.name) if natural else None)
        if infix is not None:
            text = f"{left} {infix} {right}"
        elif op.name == "pow" and type_.dtype in INTEGERS:
            text = f"device.integer_power({left}, {right}, {TL_DTYPE[type_.dtype]})"
        else:
            text = f"{_DEVICE.get(op.name, f'tl.{op.name}')}({left}, {right})"
    elif op.name in _CALLS:
        text = _CALLS[op.name].format(scope.wide(op.operands[0]))
    elif op.name == "not":
        text = f"{scope.names[op.operands[0].name]} == 0"
    elif op.name == "where":
        chosen, *sides = op.operands
        left, right = (scope.wide(v, len(type_.shape)) for v in sides)
        text = f"tl.where({scope.names[chosen.name]}, {left}, {right})"
    else:
        raise refuse(op, f"the op `{op.name}`")
    if narrow:
        text = f"{text if text.endswith(')') and one_call(text) else f'({text})'}"
        text += f".to({TL_DTYPE[type_.dtype]})"
    assign(scope, op, text)
    if natural and op.name in ("add", "mul", "maximum", "minimum", *_NATURAL):
        scope.natural.add(op.results[0].name)


def _floating(value: Value, text: str) -> str:
    return text if value.type.dtype in ("bf16", "fp16", "fp32") else f"tl.cast({text}, tl.float32)"


def _cast(scope: Scope, op: Op) -> None:
    source, target = op.operands[0], op.results[0].type.dtype
    name = scope.names[source.name]
    text = name if source.type.dtype == target else f"tl.cast({name}, {TL_DTYPE[target]})"
    if source.type.shape and source.type.dtype != target:
        text = f"{name}.to({TL_DTYPE[target]})"
    assign(scope, op, text, scope.stray(source))


def _fill(scope: Scope, op: Op) -> None:
    type_ = op.results[0].type
    dtype = TL_DTYPE[type_.dtype]
    value = op.get("value", 0)
    blocks = scope.blocks(type_)
    shape = f"({', '.join(map(str, blocks))}{',' * (len(blocks) == 1)})"
    if op.name == "zeros":
        assign(scope, op, f"tl.zeros({shape}, {dtype})", frozenset())
    else:
        dirty = None if value else frozenset[str]()
        assign(scope, op, f"tl.full({shape}, {number(value)}, {dtype})", dirty)


def number(value: object) -> str:
    """A constant as Python."""
    text = repr(value).replace("e+", "e")
    return f'float("{text}")' if text in ("inf", "-inf", "nan") else text


def _constant(scope: Scope, op: Op) -> None:
    scope.names[op.results[0].name] = number(op["value"])
    scope.natural.discard(op.results[0].name)
    if isinstance(op["value"], int) and op["value"] >= 0:
        scope.natural.add(op.results[0].name)
    scope.literals.add(op.results[0].name)


def _param(scope: Scope, op: Op) -> None:
    assert op.ref is not None
    text = scope.scalars.setdefault(op.ref.symbol, op.ref.symbol)
    scope.natural.discard(op.results[0].name)
    scope.names[op.results[0].name] = text
    scope.literals.add(op.results[0].name)


def _index(scope: Scope, op: Op) -> None:
    dim = scope.dims[op.operands[0].name]
    start = "" if dim.start == "0" else f"{dim.start} + "
    assign(scope, op, f"{start}{scope.lanes(op.operands[0].name, dim.block)}")
    scope.natural.add(op.results[0].name)


def _bound(scope: Scope, op: Op) -> None:
    dim = scope.dims[op.operands[0].name]
    assign(scope, op, dim.start if op["which"] == "start" else dim.stop)
    scope.natural.add(op.results[0].name)


def _clean(scope: Scope, value: Value, axis: int, neutral: str = "0.0") -> str:
    """The name of ``value`` with stray elements along ``axis`` replaced by ``neutral``."""
    name = scope.names[value.name]
    dim = scope.dim(value.type.shape[axis])
    rank = len(value.type.shape)
    lift = ", ".join(":" if i == axis else "None" for i in range(rank))
    mask = f"{scope.lanes(value.type.shape[axis], dim.block)} < {dim.length}"
    lifted = f"({mask})[{lift}]" if rank > 1 else mask
    if value.type.dtype in ("int32", "int64"):
        neutral = {"0.0": "0", 'float("-inf")': "-2147483648"}.get(neutral, "2147483647")
    inside = scope.writer.let(f"{name}_inside{axis}", lifted)
    clean = f"{name}_whole"
    scope.used.update((inside, clean))
    convert = f".to({TL_DTYPE[value.type.dtype]})" if value.type.dtype in ("bf16", "fp16") else ""
    scope.writer.line(f"{clean} = tl.where({inside}, {name}, {neutral}){convert}")
    return clean


def _dot(scope: Scope, op: Op) -> None:
    left, right = op.operands[:2]
    result = op.results[0].type
    texts = [scope.names[left.name], scope.names[right.name]]
    for number, (value, axis) in enumerate(((left, -1), (right, -2))):
        where = axis % len(value.type.shape)
        if value.type.shape[where] in scope.stray(value):
            texts[number] = _clean(scope, value, where)
    if len(op.operands) == 3:
        texts.append(scope.names[op.operands[2].name])
    if "fp32" in (left.type.dtype, right.type.dtype):
        texts.append('input_precision="ieee"')
    inner = frozenset({left.type.shape[-1]})
    dirty = _operand_dirt(scope, op) - inner
    text = f"tl.dot({', '.join(texts)})"
    if result.dtype != "fp32":
        text += f".to({TL_DTYPE[result.dtype]})"
    assign(scope, op, text, dirty)


def _transpose(scope: Scope, op: Op) -> None:
    assign(scope, op, f"tl.trans({scope.names[op.operands[0].name]})", _operand_dirt(scope, op))


def _expand(scope: Scope, op: Op) -> None:
    rank = len(op.results[0].type.shape)
    axis = int(op["axis"]) % rank
    lift = ", ".join("None" if i == axis else ":" for i in range(rank))
    assign(scope, op, f"{scope.names[op.operands[0].name]}[{lift}]", _operand_dirt(scope, op))


def _reshape(scope: Scope, op: Op) -> None:
    value, type_ = op.operands[0], op.results[0].type
    if scope.loose(value.type) or scope.loose(type_):
        advice = "tiles whose lengths divide their extents are whole"
        raise refuse(op, "a reshape of a tile that may be short", advice)
    shape = ", ".join(map(str, scope.blocks(type_)))
    assign(scope, op, f"tl.reshape({scope.names[value.name]}, ({shape},))", frozenset())


def _reduce(scope: Scope, op: Op) -> None:
    value, type_ = op.operands[0], op.results[0].type
    axis = int(op["axis"]) % len(value.type.shape)
    name = value.type.shape[axis]
    text = scope.wide(value)
    short = not scope.dim(name).exact
    if short and (op.name != "sum" or name in scope.stray(value)):
        text = _clean(scope, value, axis, _NEUTRAL[op.name])
        text += ".to(tl.float32)" if value.type.dtype in ("bf16", "fp16") else ""
    keep = ", keep_dims=True" if op.get("keep") else ""
    text = f"tl.{op.name}({text}, axis={axis}{keep})"
    if type_.dtype in ("bf16", "fp16"):
        text += f".to({TL_DTYPE[type_.dtype]})"
    assign(scope, op, text)


def _guarded(scope: Scope, op: Op, write: Callable[[], None]) -> None:
    guard = op.get("if")
    if guard is None:
        write()
        return
    if isinstance(guard, Expr):
        guard = guard.substitute(scope.program.env)
    with scope.writer.block(f"if {condition(guard, scope.lookup)}:"):
        write()


def word(scope: Scope, symbol: str, index: tuple[Expr, ...]) -> str:
    """The text of the arena word of one element of a flag or counter."""
    return scope.expr(word_of(scope, symbol, index))


def word_of(scope: Scope, symbol: str, index: tuple[Expr, ...]) -> Expr:
    """The arena word of one element of a flag or counter."""
    found: Expr = Expr.of(int(scope.program.symbols[symbol]["offset"]) // 4)
    for item, step in zip(index, access.strides(scope, symbol), strict=True):
        found = found + item * step
    if scope.program.slots and scope.program.symbols[symbol].name == "flag":
        found = found + Expr.name("slot") * (SLOT_FLAGS // WORD)
    return found


def element(op: Op, index: tuple[object, ...]) -> tuple[Expr, ...]:
    """An index all of whose parts are expressions."""
    found: list[Expr] = []
    for item in index:
        if isinstance(item, Value) and not item.type.shape:
            found.append(Expr.name(item.name))
        elif isinstance(item, Expr):
            found.append(item)
        else:
            raise refuse(op, "a flag index that is not one element")
    return tuple(found)


def _wait(scope: Scope, op: Op) -> None:
    assert op.ref is not None
    plain_wait(op)
    symbol = op.ref.symbol
    if scope.program.carried(op):
        words.wait(scope, op)
        return
    decl = scope.program.symbols[symbol]
    shape = scope.program.shape(symbol)

    def write() -> None:
        assert op.ref is not None
        index: list[Expr] = []
        opened = 0
        sources: Range | None = None
        from_rank = scope.program.constant(shape[0]) == scope.program.world
        for item, whole in zip(op.ref.index or tuple(All() for _ in shape), shape, strict=True):
            if isinstance(item, All):
                item = Range(Expr.const(0), Expr.of(whole))
            if isinstance(item, Range) and not index and from_rank and decl.name == "flag":
                sources = item
                index.append(Expr.const(0))
            elif isinstance(item, Range):
                name = scope.fresh("source" if not index else "part")
                scope.names[name] = name
                low, high = scope.expr(item.lo), scope.expr(item.hi)
                scope.writer.line(f"for {name} in range({low}, {high}):")
                scope.writer.depth += 1
                opened += 1
                index.append(Expr.name(name))
            else:
                index.extend(element(op, (item,)))
        where = word(scope, symbol, tuple(index))
        fence = ["True"] if op.get("proxy") else []
        ident = scope.program.wait_id(op)
        if decl.name == "counter":
            count = scope.expr(op.get("count", 1))
            args = ["ctx", where, count, scope.tile, str(ident)]
            scope.writer.call("token += device.consumer_tile_wait(", [*args, *fence])
        else:
            shift = op.get("epoch", 0)
            epoch = "ctx.epoch" if shift == 0 else f"ctx.epoch + {scope.expr(shift, 5)}"
            if sources is not None:
                step = scope.expr(access.strides(scope, symbol)[0])
                ranks = (scope.expr(sources.lo), scope.expr(sources.hi))
                args = ["ctx", where, step, *ranks, epoch, scope.tile, str(ident)]
                scope.writer.call("token += device.peer_tiles_wait(", [*args, *fence])
                scope.writer.depth -= opened
                return
            producer = scope.expr(index[0]) if from_rank else "rank"
            args = ["ctx", where, epoch, producer, scope.tile, str(ident)]
            scope.writer.call("token += device.peer_tile_wait(", [*args, *fence])
        scope.writer.depth -= opened

    _guarded(scope, op, write)


def plain_wait(op: Op) -> None:
    """Raises CannotEmit for a wait that no primitive makes; all of them acquire at system scope."""
    if op.get("order") is not None:
        raise refuse(op, f"a wait with `order = {op['order']}`")
    if op.get("compare") is not None:
        raise refuse(op, f"a wait with `compare = {op['compare']}`")
    if op.get("scope", "sys") != "sys":
        raise refuse(op, f"a wait of scope `{op['scope']}`")


def plain_notify(program: Program, op: Op) -> None:
    """Raises CannotEmit for a notify that no primitive makes; all of them release behind a barrier."""
    if op.get("order") is not None:
        raise refuse(op, f"a notify with `order = {op['order']}`")
    if not op.get("barrier", True):
        raise refuse(op, "a notify without the barrier before it")
    counter = program.symbols[op.symbol].name == "counter"
    if op.get("scope", "sys") != "sys" and not counter:
        raise refuse(op, "a flag between ranks that is raised for this GPU only")


def reach(op: Op) -> list[str]:
    """The last argument of a counter's notify: whether it releases beyond the GPU."""
    return [] if op.get("scope") == "gpu" else ["True"]


def notify(scope: Scope, op: Op) -> None:
    """``notify``, by the primitive that makes it."""
    assert op.ref is not None
    symbol = op.ref.symbol
    plain_notify(scope.program, op)
    if scope.program.carried(op):
        return  # by the words themselves
    if op.get("delay"):
        raise refuse(
            op, "a notify that is held back, but not as the last of a queue that is static"
        )
    where = word(scope, symbol, element(op, op.ref.index))

    def write() -> None:
        if op.get("drain"):
            scope.writer.line("device.drain_tma_stores()")
        if scope.program.symbols[symbol].name == "counter":
            args = ["ctx", where, *reach(op)]
            scope.writer.call("device.producer_tile_notify(", args)
            return
        peer = scope.expr(op["peer"])
        count = op.get("count", 1)
        if count == 1:
            scope.writer.call("device.peer_tile_notify(", ["ctx", where, peer])
            return
        through = op["through"]
        counter = word(scope, through.symbol, element(op, through.index))
        args = ["ctx", where, peer, counter, scope.expr(count)]
        scope.writer.call("device.counted_tile_notify(", args)

    _guarded(scope, op, write)


def _transfer(scope: Scope, op: Op) -> None:
    _guarded(scope, op, lambda: transfers.transfer(scope, op))


def tells_everyone(scope: Scope, op: Op) -> bool:
    """Whether a loop over all ranks only notifies them, or all but this one, which one call does for all."""
    return _whole(scope.program, op) and tells_ranks(scope, op)


def _whole(program: Program, op: Op) -> bool:
    return (program.constant(op["lo"]), program.constant(op["hi"])) == (0, program.world)


def tells_ranks(scope: Scope, op: Op) -> bool:
    """The same of a loop over some ranks, one behind the other."""
    notify = op.body[0] if len(op.body) == 1 else None
    if notify is None or notify.name != "notify" or notify.ref is None or op.results:
        return False
    program, d = scope.program, op.args[0].name
    own = program.symbols[notify.symbol].name == "flag" and str(notify.get("peer")) == d
    free = all(isinstance(i, Expr) and d not in i.names for i in notify.ref.index)
    count, through = Expr.of(notify.get("count", 1)), notify.get("through")
    guard = notify.get("if")
    if not (own and free) or d in count.names:
        return False
    if guard is not None and not _but_this_rank(guard, d):
        return False
    if through is not None:
        first, *rest = through.index
        if str(first) != d or any(not isinstance(i, Expr) or d in i.names for i in rest):
            return False
    return not notify.get("delay") and (program.constant(count) == 1 or through is not None)


def _but_this_rank(guard: Expr | int, variable: str) -> bool:
    """Whether a condition is that ``variable`` is another rank than this one."""
    return str(guard) in (f"{variable} != RANK", f"RANK != {variable}")


def tell_ranks(scope: Scope, op: Op) -> None:
    """The call for such a loop, behind what was stored."""
    program, (notify,) = scope.program, op.body
    assert notify.ref is not None
    plain_notify(program, notify)
    args = ["ctx", word(scope, notify.symbol, element(notify, notify.ref.index))]
    count, through = notify.get("count", 1), notify.get("through")
    told = ["others=True"] if notify.get("if") is not None else []
    if not _whole(program, op):
        told += [f"low={scope.expr(op['lo'])}", f"high={scope.expr(op['hi'])}"]
    if program.constant(count) == 1:
        scope.writer.call("device.all_tile_notify(", [*args, *told])
        return
    first = (Expr.const(0), *through.index[1:])
    counter = word(scope, through.symbol, element(notify, first))
    step = scope.expr(access.strides(scope, through.symbol)[0])
    args += [counter, step, scope.expr(count), *told]
    scope.writer.call("device.counted_all_tile_notify(", args)


def for_range(scope: Scope, op: Op) -> None:
    """A loop over numbers."""
    if all(o.name == "notify" and scope.program.carried(o) for o in op.body):
        return
    if tells_ranks(scope, op):
        if op.body[0].get("drain"):
            scope.writer.line("device.drain_tma_stores()")
        tell_ranks(scope, op)
        return
    variable, *_ = op.args
    name = scope.define(variable)
    carry_in(scope, op, 0)
    low, high = scope.expr(op["lo"]), scope.expr(op["hi"])
    with scope.writer.block(f"for {name} in range({low}, {high}):"):
        loop_body(scope, op)


def _for_tiles(scope: Scope, op: Op) -> None:
    carry_in(scope, op, 2 if op.get("bounds") else 0)
    for load in op.walk():
        own = load.get("own") if load.name == "load" else None
        if own is not None and id(load) not in scope.chosen and _early(scope, load):
            ahead = announce(scope, op)
            access.choose(scope, load)
            for name in ahead:
                del scope.dims[name]
    _tile_loop(scope, op)


def _early(scope: Scope, load: Op) -> bool:
    """Whether a load's choice between buffer and local shard can be made where its loop begins."""
    own = load["own"]
    if load.ref is None or not _settled(scope, load["when"]):
        return False
    for far, near in zip(load.ref.index, own.index, strict=True):
        if far == near:
            continue
        for item in (far, near):
            names = (
                [item.value] if isinstance(item, At) else [item] if isinstance(item, Value) else []
            )
            if any(v.type.is_tile and v.name not in scope.dims for v in names):
                return False
            if isinstance(item, At) and not _settled(scope, item.start):
                return False
            if isinstance(item, Expr) and not _settled(scope, item):
                return False
    return True


def _settled(scope: Scope, when: Expr | int) -> bool:
    """Whether a condition depends only on what is known where the loop begins."""
    if isinstance(when, int):
        return True
    for name in when.names:
        known = name in scope.names or name in scope.program.env or name == "RANK"
        if not known and name.rpartition(".")[0] not in scope.dims:
            return False
    return True


def _tile_loop(scope: Scope, op: Op) -> None:
    multiplies = any(o.name == "dot" for o in op.walk())
    signals = any(o.name in _SYNC for o in op.walk())
    loops = any(o is not op and o.name in ("for_tiles", "for_range") for o in op.walk())
    stages = scope.stages if multiplies and not signals and not loops else 1
    tiles = tuple(a for a in op.args if a.type.is_tile or not _is_carried(op, a))
    bounds = None
    if op.get("bounds"):
        bounds = (scope.names[op.operands[0].name], scope.names[op.operands[1].name])
    suffix = f", num_stages={stages}" if multiplies or stages > 1 else ""
    before = (scope.tile, list(scope.tokens))
    known = set(scope.dims)
    with enter_tiles(scope, op, tiles, Walk.of(op), suffix, bounds):
        loop_body(scope, op)
    scope.tile, scope.tokens = before
    for name in [d for d in scope.dims if d not in known]:
        del scope.dims[name]


def _is_carried(op: Op, arg: Value) -> bool:
    return arg in op.args[len(op.args) - len(op.results) :] if op.results else False


def carry_in(scope: Scope, op: Op, skip: int) -> None:
    """Name what a loop carries and give it its initial values; ``skip`` operands are bounds."""
    inits = op.operands[skip:]
    carried = op.args[len(op.args) - len(inits) :] if inits else ()
    for init, arg, result in zip(inits, carried, op.results, strict=True):
        source = scope.names[init.name]
        lone = init.name not in scope.literals and _uses(scope, init) == 1
        name = source if lone else scope.fresh(result.name)
        if not lone:
            text = source
            if init.name in scope.literals:
                text = f"tl.full((), {source}, {TL_DTYPE[arg.type.dtype]})"
            scope.writer.line(f"{name} = {text}")
        scope.names[arg.name] = scope.names[result.name] = name
        dirty = scope.loose(arg.type) if op.name == "for_range" else scope.stray(init)
        scope.dirty[arg.name] = scope.dirty[result.name] = dirty | scope.loose(arg.type)


def _uses(scope: Scope, value: Value) -> int:
    return sum(v.name == value.name for op in scope.program.op.walk() for v in op.operands)


def loop_body(scope: Scope, op: Op) -> None:
    """The ops of a loop's block, what they yield assigned to what is carried."""
    carried = op.args[len(op.args) - len(op.results) :] if op.results else ()
    body = op.body
    last = body[-1] if body and body[-1].name == "yield" else None
    if last is None or not carried:
        ops(scope, body)
        return
    # The value yielded by the op right before takes the carried name at once.
    if len(carried) == 1 and len(body) > 1 and body[-2].results == last.operands:
        made = body[-2].results[0]
        if _uses(scope, made) == 1:
            scope.names[made.name] = scope.names[carried[0].name]
    ops(scope, body[:-1])
    pairs = [
        (scope.names[arg.name], scope.names[value.name])
        for arg, value in zip(carried, last.operands, strict=True)
    ]
    moves = [(target, source) for target, source in pairs if target != source]
    swapped = {target for target, _ in moves} & {source for _, source in moves}
    if swapped:
        targets, sources = (", ".join(side) for side in zip(*moves, strict=True))
        scope.writer.line(f"{targets} = {sources}")
    else:
        for target, source in moves:
            scope.writer.line(f"{target} = {source}")


def _load(scope: Scope, op: Op) -> None:
    (words if words.holds(scope, op) else access).load(scope, op)


def _store(scope: Scope, op: Op) -> None:
    (words if words.holds(scope, op) else access).store(scope, op)


def _load_sum(scope: Scope, op: Op) -> None:
    (words if words.holds(scope, op) else sums).load_sum(scope, op)


_OPS: dict[str, Callable[[Scope, Op], None]] = {
    "load": _load,
    "store": _store,
    "load_sum": _load_sum,
    "transfer": _transfer,
    "wait": _wait,
    "notify": notify,
    "for_tiles": _for_tiles,
    "for_range": for_range,
    "cast": _cast,
    "zeros": _fill,
    "full": _fill,
    "constant": _constant,
    "param": _param,
    "index": _index,
    "bound": _bound,
    "dot": _dot,
    "transpose": _transpose,
    "expand": _expand,
    "reshape": _reshape,
    "sum": _reduce,
    "max": _reduce,
    "min": _reduce,
}
