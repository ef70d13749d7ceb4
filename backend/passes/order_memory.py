"""``order-memory``: the path, the scope and the fences of every access and every signal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tilelink.backend.copying import copies_of
from tilelink.backend.expand import environment, evaluate
from tilelink.backend.passes.bind_emitter import Unfit, split_product
from tilelink.backend.passes.common import tasks_of_stage
from tilelink.ir import DTYPES, All, At, Expr, Index, Op, Range, Ref, Value, dynamic_extents
from tilelink.ir.node import DECLARATIONS

_PURE = frozenset({"zeros", "full", "constant", "param"})
_TMA_DTYPES = ("bf16", "fp16", "fp32")
_TMA_BYTES = 16  # rows, and the starts of rows, are multiples of it
_TMA_BLOCK = 256  # elements of a TMA box along one axis, at most
_INT32_ELEMENTS = 1 << 31
# Columns of parts that the loader fetches at a time: a step of the product's depth, which a group can add.
_LANDED = (32, 64)
_WHOLE_TILE = frozenset({"bound", "reshape", "sum", "max", "min"})


def order_memory(program: Op) -> Op:
    """Write down by which path memory is accessed, and what every signal orders.

    Before::

        launch @main {…} do {
          stage @gemm {flatten = true, …} do (%m: tile, %n: tile) {
            … %a = load @A[%m, %k] …
            store @C.partial[%m, %n] (%out)
            notify @C.done[…]
          }
          stage @sum {…} do (%m: tile, %n: tile) { wait @C.ready[…] … }
        }

    After::

        launch @main {…} do {
          stage @gemm {flatten = true, …} do (%m: tile, %n: tile) {
            … %a = load @A[%m, %k] {via = "tma"} …
            store @C.partial[%m, %n] (%out) {via = "tma"}
            notify @C.done[…] {delay = 1, drain = true, scope = "gpu"}
          }
          flush {drain = true}
          stage @sum {…} do (%m: tile, %n: tile) { wait @C.ready[…] … }
        }

    ``scope = "gpu"`` where no stream waits for the counter; ``wide`` where a symbol has 2^31 elements or
    more; ``proxy`` on the waits of a launch that loads through TMA what the program writes. Invariants:
    a store that a notify releases goes through TMA only if the notify drains; every load through TMA
    of what another worker, a peer or a copy engine writes has the proxy fence behind its wait; a notify
    that is held back has a flush behind its stage. A second run changes nothing.
    """
    system = streamed(program)
    ops = [
        op if op.name != "launch" else _launch(program, op, system) for op in _widened(program).body
    ]
    return program.with_ops(tuple(ops))


def streamed(program: Op) -> frozenset[str]:
    """The counters for which a stream waits: their notifies must reach beyond the GPU."""
    return frozenset(
        op.symbol
        for stream in program.find("stream")
        for op in stream.walk()
        if op.name == "wait" and op.ref is not None
    )


def can_flatten(program: Op, stage: Op) -> bool:
    """Whether ``stage`` asks for the flattened form and has the shape for it.

    Its body: constants, one tile loop that carries values and multiplies, then the epilogue; no waits,
    and one notify at most, in the epilogue. Where words carry it, a worker must have several tiles: of one, the
    loop has nothing to gain.
    """
    if main_loop(program, stage) is None:
        return False
    inside = list(stage.walk())[1:]
    if any(op.name in ("wait", "transfer") or op.get("own") is not None for op in inside):
        return False
    signals = [op for op in inside if op.name == "notify"]
    if any(_carried(program, op) for op in signals) and not _several(program, stage):
        return False
    kept = all(op in stage.body and op.get("if") is None for op in signals)
    return kept and len(signals) <= 1


def _several(program: Op, stage: Op) -> bool:
    """Whether some worker has more than one task of ``stage``. A program with words has one launch."""
    tasks = tasks_of_stage(program, stage)
    return not isinstance(tasks, int) or tasks > int(program.find("launch")[0]["workers"])


def main_loop(program: Op, stage: Op) -> Op | None:
    """The one loop of ``stage``, of products, if the stage asks for the flattened form and could have it.

    Before it stand constants and waits alone.
    """
    if not stage.get("flatten") or stage.get("queue", "static") != "static":
        return None
    loops = [i for i, op in enumerate(stage.body) if op.name in ("for_tiles", "for_range")]
    if len(loops) != 1:
        return None
    loop, before = stage.body[loops[0]], stage.body[: loops[0]]
    extent = loop.get("extent")
    plain = loop.name == "for_tiles" and extent is not None and len(extent) == 1 and loop.results
    if not plain or loop.get("segment") is not None:
        return None
    if any(op.name not in _PURE and op.name != "wait" for op in before):
        return None
    dynamic = {op.symbol for op in dynamic_extents(program)}
    fixed = {op.symbol for op in program.find("extent")} - dynamic | {"WORLD"}
    if not Expr.of(extent[0]).names <= fixed or any(op.blocks for op in loop.body):
        return None
    return loop if any(op.name == "dot" for op in loop.body) else None


def touched(ops: tuple[Op, ...]) -> frozenset[str]:
    """Loads in tile loops whose value is anything but an operand of a product, as it is or transposed.

    Triton 3.6 pipelines such a loop wrongly when the load is a TMA load: the value goes through
    registers, and the next tile overwrites its shared memory before all warps have read it.
    """
    found: set[str] = set()
    for loop in (op for top in ops for op in top.walk() if op.name == "for_tiles"):
        loaded = {o.results[0].name for o in loop.body if o.name == "load"}
        turned = {o.results[0].name: o.operands[0].name for o in loop.body if o.name == "transpose"}
        for op in (inner for child in loop.body for inner in child.walk()):
            if op.name == "transpose":
                continue
            plain = {v.name for v in op.operands[:2]} if op.name == "dot" else set()
            for value in op.operands:
                name = turned.get(value.name, value.name)
                if name in loaded and value.name not in plain:
                    found.add(name)
    return frozenset(found)


def _library(launch: Op) -> Op:
    """The library may take every path. Between its kernels stand those that wait and notify: the start
    of a kernel is a proxy fence, and at its end all of its stores are complete."""

    def mark(op: Op) -> Op:
        if op.name in ("load", "store"):
            return op.with_attrs(via="tma")
        if op.name == "wait":
            return op.with_attrs(proxy=True)
        return op.with_attrs(drain=True) if op.name == "notify" else op

    return rewrite(launch, mark)


def _launch(program: Op, launch: Op, system: frozenset[str]) -> Op:
    if launch.get("emitter") == "library":
        return _library(launch)
    roles = launch.get("roles") is not None
    # With roles, operands stay in shared memory.
    through_registers = frozenset[str]() if roles else touched(launch.body)
    children: list[Op] = []
    copied = roles and any(copies_of(child) for child in launch.body if child.name == "stage")
    undrained = False  # whether TMA stores of stages so far may be under way, none of which signals
    for number, child in enumerate(launch.body):
        if child.name == "stage":
            child, held = _stage(program, child, through_registers, roles, undrained, copied)
            children.append(child)
            undrained |= not _signals(child) and any(map(_leaves, child.walk()))
            behind = launch.body[number + 1 : number + 2]
            if held and not (behind and behind[0].name == "flush"):
                children.append(Op("flush", attrs=(("drain", True),), span=child.span))
        else:
            children.append(child)
    launch = launch.with_ops(tuple(children))
    written = {op.symbol for op in program.walk() if op.name == "store"}
    buffers = {op.symbol for op in program.find("buffer")}
    fenced = any(
        op.name in ("load", "load_sum")
        and op.get("via") == "tma"
        and op.symbol in buffers | written
        for op in launch.walk()
    )

    def signal(op: Op) -> Op:
        if op.name == "wait" and fenced:
            return op.with_attrs(proxy=True)
        if op.name == "notify" and program.declared(op.symbol).name == "counter":
            return op if op.symbol in system else op.with_attrs(scope="gpu")
        return op

    return rewrite(launch, signal)


@dataclass(frozen=True, slots=True)
class _Form:
    """What decides the paths of a stage's accesses.

    ``held``: it holds a notify back. ``signals``: it has one that words do not carry. ``sums``: in its epilogue.
    ``copied``: it copies. ``multiplies``; ``hands``: it only hands tiles on. ``roles``: its warps have them.
    ``landed``: its loader can fetch the parts of its sum.
    """

    held: bool
    signals: bool
    sums: bool
    copied: bool
    multiplies: bool
    hands: bool
    roles: bool
    landed: bool


def _form(program: Op, stage: Op, roles: bool, awaited: bool) -> _Form:
    """With ``roles`` a group holds back its own: its next tile, and not the worker's, comes in between. Not so
    where workers of the same launch wait for it (``awaited``), to copy it."""
    signals = any(op.name == "notify" and not _carried(program, op) for op in stage.walk())
    # A stage that sums in its epilogue is written with nested loops, and tells all ranks.
    sums = any(op.name == "load_sum" and op.operands for op in stage.walk())
    static = stage.get("queue", "static") == "static"
    tells = sums and static and all(_tells(op) for op in stage.body if _signals(op))
    held = signals and _ends(stage) and (can_flatten(program, stage) or (tells and not roles))
    held = held and not awaited
    return _Form(
        held=held,
        signals=signals,
        sums=sums,
        copied=bool(copies_of(stage)),
        multiplies=any(op.name == "dot" for op in stage.walk()),
        hands=_hands_on(stage),
        roles=roles,
        landed=roles and not held and _lands(program, stage),
    )


def _worth(program: Op, form: _Form, op: Op) -> bool:
    """Whether an access is worth the way through TMA, where a descriptor can have it.

    In two slots lie small sums as well, on whose way every fence and every wait for TMA counts: what goes through
    it there is what is copied or multiplied. Stores to a peer are worth it only where their release is held back,
    or behind a product. What is small enough for words is not worth waiting for the end of TMA.
    """
    if op.name == "load_sum":
        return bool(op.operands) and form.landed
    if op.name not in ("load", "store") or form.hands:
        return False
    slots = program.get("slots") is not None
    twice = slots and program.declared(op.symbol).get("space") == "symmetric"
    if twice and not (form.copied or (form.multiplies and op.name == "load")):
        return False
    if op.name == "load":
        return True
    if any(buffer.get("words") for buffer in program.find("buffer")):
        return False
    if form.held:
        return True
    if op.get("peer") is None:
        return not form.signals or form.roles
    return (form.sums or form.copied) and (form.copied or not form.roles)


def _stage(
    program: Op,
    stage: Op,
    through_registers: frozenset[str],
    roles: bool,
    undrained: bool,
    awaited: bool,
) -> tuple[Op, bool]:
    """The stage with its paths, and whether it holds a notify back; ``undrained``: stores of an earlier one are.

    With roles, what it does not hold back it drains at once: the warps that store are not those that load the next
    tile. So too where workers of the same launch wait for it (``awaited``), to copy it: it is stored to this GPU's
    memory, and that the other group multiplies meanwhile hides what the drain takes.
    """
    form = _form(program, stage, roles, awaited)
    blocks, starts = _blocks(program, stage), starts_of(program, stage)

    def possible(op: Op) -> bool:
        pieces = form.copied
        if op.name == "load_sum":
            return True  # what lands has the form of the loader's boxes
        if op.name == "load":
            sides = [r for r in (op.ref, op.get("own")) if r is not None]
            plain = op.results[0].name not in through_registers
            return plain and all(_boxed(program, r, blocks, starts, pieces=pieces) for r in sides)
        assert op.ref is not None
        peer = op.get("peer") is not None
        return _boxed(program, op.ref, blocks, starts, store=True, peer=peer, pieces=pieces)

    def mark(op: Op) -> Op:
        if op.name == "notify" and form.held:
            return op.with_attrs(delay=1, drain=True)
        return op.with_attrs(via="tma") if _worth(program, form, op) and possible(op) else op

    def drain(op: Op) -> Op:
        return op.with_attrs(drain=True) if op.name == "notify" else op

    stage = rewrite(stage, mark)
    stores = any(map(_leaves, stage.walk()))
    drains = undrained or ((roles or form.sums or form.copied) and stores)
    return (rewrite(stage, drain) if drains else stage), form.held


def _hands_on(stage: Op) -> bool:
    """Whether a stage does nothing but wait for tiles and copy them within this rank's memory.

    By addresses all threads ask for all of a tile, 16 bytes each time, and the next task's wait begins while it is
    still being stored. Through TMA a tile would be waited for, go through shared memory twice, and be waited for
    again: no loop with a wait in it is pipelined.
    """
    loaded = {op.results[0].name for op in stage.body if op.name == "load"}
    for op in stage.body:
        if op.name not in ("wait", "load", "store"):
            return False
        if op.name == "store" and (op.get("peer") is not None or op.operands[0].name not in loaded):
            return False
    return any(op.name == "wait" for op in stage.body)


def _ends(stage: Op) -> bool:
    """Whether no access of a task stands behind a notify of it: what is held back releases all of them."""
    first = next((n for n, op in enumerate(stage.body) if _signals(op)), len(stage.body))
    behind = (op for after in stage.body[first:] for op in after.walk())
    return not any(op.name in ("load", "load_sum", "store", "transfer") for op in behind)


def _leaves(op: Op) -> bool:
    """Whether an op stores through TMA."""
    return op.name == "store" and op.get("via") == "tma"


def _lands(program: Op, stage: Op) -> bool:
    """Whether the loader of a stage with roles can fetch the parts of its folded sum into its ring.

    A box of them is a slot of the product's left operand: rows of a tile by a step of the depth. So tiles are
    whole, and what follows the sum is done for some columns after the other. Where rows are dynamic, parts have
    the room of the capacity, and the rest of a tile holds nothing that is stored.
    """
    sums = [op for op in stage.body if op.name == "load_sum" and op.operands]
    # A descriptor has one place, and what lies in two slots has two.
    if len(sums) != 1 or program.get("slots") is not None:
        return False
    (total,) = sums
    assert total.ref is not None
    remote = bool(total.get("remote"))
    try:
        marked = [op.with_attrs(via="tma") if op is total else op for op in stage.body]
        product = split_product(stage.with_ops(tuple(marked)))
    except Unfit:
        return False
    declared, fixed = program.declared(total.symbol), _fixed(program)
    (rows, columns), depth = stage.args, product.loop.args[0]
    high, wide = (int(n) for n in stage["tile"])
    deep = int(product.loop["tile"][0])
    left = [
        op
        for op in product.loads
        if op.results[0].type.shape == (rows.name, depth.name)
        and op.results[0].type.dtype == declared["dtype"]
    ]
    if not left or not _by_tile(total, rows, columns):
        return False
    sizes = (high, wide, deep)
    if deep not in _LANDED or wide % deep or any(n & (n - 1) for n in sizes) or high > _TMA_BLOCK:
        return False
    extents = [Expr.of(extent) for extent in stage["extent"]]
    lengths = [Expr.of(stage.get("segment", extents[0])), extents[1]]
    if int(stage.get("axis", 0)) != 0 or len(declared["dims"]) != (2 if remote else 3):
        return False
    width = Expr.of(declared["dims"][-1])
    if any(not e.names <= fixed.keys() for e in (extents[1], width)):
        return False
    whole = all(
        int(evaluate(length, environment(program), stage)) % size == 0
        for length, size in zip(lengths, (high, wide), strict=True)
    )
    fits = int(evaluate(width, fixed, declared)) * DTYPES[declared["dtype"]] % _TMA_BYTES == 0
    return whole and fits and _by_columns(total, stage.body[stage.body.index(total) + 1 :])


def _by_tile(total: Op, rows: Value, columns: Value) -> bool:
    """Whether a sum is of the parts of its own tile: each as far from the first row as any other."""
    assert total.ref is not None
    index = total.ref.index
    if not total.get("remote"):
        if len(index) != 3 or index[0] != All():
            return False
        index = index[1:]
    if len(index) != 2 or index[1] != columns:
        return False
    return index[0] == rows or (isinstance(index[0], At) and index[0].value == rows)


def _by_columns(total: Op, behind: tuple[Op, ...]) -> bool:
    """Whether what stands behind a sum does the same to each part of its columns, of nothing from before it."""
    made = {total.results[0].name}
    signals = False
    for op in behind:
        told = op.name == "notify" or (bool(op.blocks) and _tells(op))
        sent = op.name == "for_range" and all(o.name == "store" for o in op.body)
        if (signals and not told) or op.name in _WHOLE_TILE:
            return False
        if op.blocks and not (told or sent):
            return False
        signals |= told
        for inner in op.walk():
            if inner.name == "store" and inner.symbol == total.symbol:
                return False
            if any(v.type.shape and v.name not in made for v in inner.operands):
                return False
            made |= {value.name for value in inner.results}
    return True


def _signals(op: Op) -> bool:
    """Whether there is a notify in an op."""
    return any(o.name == "notify" for o in op.walk())


def _tells(op: Op) -> bool:
    """Whether an op is a loop that does nothing but notify."""
    return op.name == "for_range" and all(o.name == "notify" for o in op.body)


def _carried(program: Op, op: Op) -> bool:
    """Whether a wait or notify is of a flag that words carry: it is nothing by itself."""
    return program.declared(op.symbol).get("carried") is not None


def _blocks(program: Op, stage: Op) -> dict[str, int]:
    """The block of every tile variable of a stage: a power of two, at least 16 in a product."""
    dotted = {
        dim
        for op in program.walk()
        if op.name == "dot"
        for operand in op.operands
        for dim in operand.type.shape
    }
    found: dict[str, int] = {}
    for op in stage.walk():
        if op.name in ("stage", "for_tiles") and op.get("tile") is not None:
            tiles = [a for a in op.args if a.type.is_tile]
            sizes = tuple(op["tile"])
            if len(sizes) > len(tiles):  # sizes of scalar variables stand among them
                sizes = tuple(s for a, s in zip(op.args, sizes, strict=False) if a.type.is_tile)
            for variable, size in zip(tiles, sizes, strict=False):
                least = 16 if variable.name in dotted else 1
                found[variable.name] = max(least, 1 << max(0, int(size) - 1).bit_length())
    return found


def _fixed(program: Op) -> dict[str, int]:
    """The names of an environment that have the same value in every call."""
    dynamic = {op.symbol for op in dynamic_extents(program)}
    return {k: v for k, v in environment(program).items() if k not in dynamic}


def starts_of(program: Op, stage: Op) -> dict[str, int]:
    """A number that divides the first index of every tile of each tile variable of a stage."""
    env = _fixed(program)
    found: dict[str, int] = {}
    for op in stage.walk():
        if op.name not in ("stage", "for_tiles") or op.get("tile") is None:
            continue
        tiles = [a for a in op.args if a.type.is_tile]
        sizes = tuple(op["tile"])
        if len(sizes) > len(tiles):  # sizes of scalar variables stand among them
            sizes = tuple(s for a, s in zip(op.args, sizes, strict=False) if a.type.is_tile)
        axis, segment = int(op.get("axis") or 0), op.get("segment")
        for variable, size in zip(tiles, sizes, strict=False):
            step = 1 if op.get("bounds") else int(size)
            if segment is not None and op.args[axis] == variable:
                step = math.gcd(step, divisor(Expr.of(segment).substitute(env), found))
            found[variable.name] = step
    return found


def divisor(expr: Expr, starts: Mapping[str, int]) -> int:
    """A number that divides every value of ``expr``; 0 of zero, 1 where nothing is known.

    ``starts``: the same of each tile variable's first index.
    """
    if expr.value is not None:
        return abs(expr.value)
    if expr.op == "name":
        base, _, part = str(expr.args[0]).rpartition(".")
        return starts.get(base, 1) if part == "start" else 1
    if expr.op not in ("+", "-", "*", "%", "min", "max"):
        return 1
    left, right = (divisor(Expr.of(side), starts) for side in expr.args)
    return left * right if expr.op == "*" else math.gcd(left, right)


def _boxed(
    program: Op,
    ref: Ref,
    blocks: Mapping[str, int],
    starts: Mapping[str, int],
    store: bool = False,
    peer: bool = False,
    pieces: bool = False,
) -> bool:
    """Whether a region is a box of two axes that a TMA descriptor can have, wherever its tiles begin.

    ``peer``: in memory of a peer, there maybe behind an axis of ranks, of which it is the part of this one.
    ``pieces``: it may be several such boxes side by side.
    A box that begins inside of 16 bytes of a row is an illegal instruction on sm_90.
    """
    declared = program.declared(ref.symbol)
    if declared.get("words"):
        return False
    dims = declared["dims"]
    index: tuple[Index, ...] = ref.index or tuple(All() for _ in dims)
    if peer and len(index) == 3:
        if index[0] != Expr.name("RANK"):
            return False
        dims, index = dims[1:], index[1:]
    if declared["dtype"] not in _TMA_DTYPES or len(dims) != 2 or len(index) != 2:
        return False
    size = DTYPES[declared["dtype"]]
    fixed = _fixed(program)
    inner = Expr.of(dims[1])
    if not inner.names <= fixed.keys():
        return False
    length = int(evaluate(inner, fixed, declared))
    if declared.name == "tensor" and declared.get("over") == 1 and declared["role"] != "temp":
        length //= int(program["world"])
    if length * size % _TMA_BYTES:
        return False
    lengths: list[int | None] = []
    for item in index:
        if isinstance(item, At):
            lengths.append(blocks.get(item.value.name))
        elif isinstance(item, Value) and item.type.is_tile:
            lengths.append(blocks.get(item.name))
        elif isinstance(item, Range | All):
            lengths.append(None)  # the emitter knows the block
        else:
            return False
    first = index[1]
    if isinstance(first, At | Range):
        place = divisor(
            (first.start if isinstance(first, At) else first.lo).substitute(fixed), starts
        )
    else:
        place = starts.get(first.name, 1) if isinstance(first, Value) else 0
    if place * size % _TMA_BYTES:
        return False
    rows, columns = lengths
    if store and rows is not None and columns is not None and columns >= 256 and rows >= 64:
        columns //= 2  # a wide tile leaves in two halves
    if pieces and columns is not None:
        columns = math.gcd(columns, _TMA_BLOCK)
    if columns is not None and columns * size < _TMA_BYTES:
        return False
    return all(n is None or n <= _TMA_BLOCK for n in (rows, columns))


def _widened(program: Op) -> Op:
    """``wide`` on every access of a symbol that has 2^31 elements or more."""
    env = environment(program)
    large: set[str] = set()
    for op in program.body:
        if op.name in DECLARATIONS and op.name in ("tensor", "buffer"):
            count = 1
            for axis, dim in enumerate(op["dims"]):
                length = int(evaluate(dim, env, op))
                shard = op.name == "tensor" and op["role"] != "temp" and op.get("over") == axis
                count *= length // int(program["world"]) if shard else length
            if count >= _INT32_ELEMENTS:
                large.add(op.symbol)

    def mark(op: Op) -> Op:
        if op.name not in ("load", "store", "load_sum", "transfer"):
            return op
        refs = (op.ref, op.get("own"), op.get("to"))
        return op.with_attrs(wide=True) if any(r and r.symbol in large for r in refs) else op

    return rewrite(program, mark) if large else program


def rewrite(op: Op, change: Callable[[Op], Op]) -> Op:
    """``op`` with ``change`` applied to every op inside of it, and to itself last."""
    if op.blocks:
        blocks = tuple(
            replace(b, ops=tuple(rewrite(inner, change) for inner in b.ops)) for b in op.blocks
        )
        op = replace(op, blocks=blocks)
    return change(op)
