"""A kernel whose sums of products are taken in parts: the same sums, in another association.

What a program makes of the depth is seen from the buffers that it declares: a local one of the shape (rows,
parts, columns) that serves no tensor of the kernel can only hold parts of sums. The kernel that such a
program is held against is derived here, from the kernel alone and from the number of parts; nothing is shared
with the pass that cuts.
"""

from __future__ import annotations

from dataclasses import replace

from tilelink.backend.expand import environment, evaluate
from tilelink.backend.expand_rows import Expansion
from tilelink.ir import INDEX, At, Block, Expr, Op, Range, Ref, Value, make


def divided(kernel: Op, out: Expansion) -> Op:
    """``kernel`` as a program with buffers of parts computes it; ``kernel`` itself where there are none.

    A loop nest ``for m, n: sum over k of all`` becomes ``for m, n: for s: P[m, s, n] = sum over k of part s``
    and ``for m, n: P[m, 0, n] + P[m, 1, n] + …``, if that is the same but for rounding: each sum begins at zero,
    gains one product a step, and is read behind the loop alone; products are of loaded tiles whose place along
    the depth is the step's; and the nest stores nothing that its loop loads. A nest of another form stays, and
    so does one whose depth is no multiple of the parts: then the program is not this kernel's.
    """
    spare = spare_buffers(kernel, out)
    if not spare:
        return kernel
    ops: list[Op] = []
    tensors: list[Op] = []
    for op in kernel.body:
        sums = sums_of(op)
        held, rest = spare[: len(sums)], spare[len(sums) :]
        parts = {int(evaluate(b["dims"][1], out.env, b)) for b in held}
        if not sums or len(held) < len(sums) or len(parts) != 1:
            ops.append(op)
            continue
        (count,) = parts
        loop = next(inner for inner in op.body if inner.name != "zeros")
        if count < 2 or int(evaluate(loop["extent"][0], environment(kernel), loop)) % count:
            ops.append(op)
            continue
        spare = rest
        rows, columns = op["extent"]
        names = [buffer.symbol for buffer in held]
        tensors += [
            make(
                "tensor",
                ref=Ref(name),
                dims=(rows, count, columns),
                dtype="fp32",
                move="local",
                role="temp",
            )
            for name in names
        ]
        ops += [_parts(op, loop, names, count), _whole(op, loop, names, count)]
    return kernel.with_ops((*tensors, *ops))


def spare_buffers(kernel: Op, out: Expansion, tails: bool = False) -> list[Op]:
    """Local buffers of three axes, in fp32, that serve no tensor of the kernel: they can only hold parts of sums.

    Those with ``tails`` that a stage reads which multiplies, else those that none does.
    """
    known = {op.symbol for op in kernel.body if op.ref is not None and op.get("role") != "temp"}
    known |= {
        op.symbol for op in kernel.walk() if op.name in ("load", "store") and op.ref is not None
    }
    added = {
        op.symbol
        for stage in out.program.walk()
        if stage.name == "stage" and any(op.name == "dot" for op in stage.walk())
        for op in stage.walk()
        if op.name == "load" and op.ref is not None
    }
    return [
        op
        for op in out.declarations.values()
        if op.symbol not in known
        and out.base(op.symbol) == op.symbol
        and (op.get("space") == "local" or op.get("role") == "temp")
        and op.get("dtype") == "fp32"
        and len(op["dims"]) == 3
        and (op.symbol in added) == tails
    ]


def sums_of(nest: Op) -> tuple[Value, ...]:
    """The sums over the depth of a nest that may be taken in parts; none where it may not."""
    if nest.name != "for_tiles" or nest.get("extent") is None or len(nest.args) != 2:
        return ()
    at = next((n for n, op in enumerate(nest.body) if op.name != "zeros"), len(nest.body))
    loop = nest.body[at] if at < len(nest.body) else nest
    if nest.get("part") is not None or loop.name != "for_tiles" or not loop.results:
        return ()
    if len(loop.get("extent", ())) != 1:
        return ()
    zeros = {op.results[0].name for op in nest.body[:at]}
    shape = tuple(v.name for v in nest.args)
    carried, added = loop.args[1:], loop.body[-1].operands
    made = {op.results[0].name: op for op in loop.body if op.results}
    for start, one, after, total in zip(loop.operands, carried, added, loop.results, strict=True):
        product = made.get(after.name)
        if product is None or product.name != "dot" or product.operands[2:] != (one,):
            return ()
        if start.name not in zeros or (total.type.dtype, total.type.shape) != ("fp32", shape):
            return ()
        # Begins the loop, and nothing else; is added to, once; is handed on, and read by nothing in it.
        if [_reads(nest, start), _reads(loop, one), _reads(loop, after)] != [1, 1, 1]:
            return ()
    stored = {op.symbol for op in nest.walk() if op.name == "store"}
    for op in loop.body:
        if op.name not in ("load", "transpose", "dot", "yield"):
            return ()
        if op.name == "dot" and op.results[0] not in added:
            return ()
        if op.name == "load" and not _plain(op, loop.args[0], stored):
            return ()
    return loop.results


def _reads(op: Op, value: Value) -> int:
    """How often ops inside ``op`` take ``value`` as an operand."""
    inside = [inner for inner in op.walk() if inner is not op]
    return sum(v.name == value.name for inner in inside for v in inner.operands)


def _plain(load: Op, step: Value, stored: set[str]) -> bool:
    """Whether a load is of what the nest does not store, and uses the step of the depth as a whole index."""
    if load.ref is None or load.symbol in stored or load.attrs or load.operands:
        return False
    for item in load.ref.index:
        if item == step:
            continue
        if isinstance(item, At) and item.value == step:
            return False
        parts = [item.start] if isinstance(item, At) else [item]
        if isinstance(item, Range):
            parts = [item.lo, item.hi]
        names = {n for part in parts if isinstance(part, Expr) for n in part.names}
        if any(n == step.name or n.startswith(f"{step.name}.") for n in names):
            return False
    return True


def _parts(nest: Op, loop: Op, names: list[str], count: int) -> Op:
    """The nest that stores the parts."""
    rows, columns = nest.args
    step, part = loop.args[0], Value("the.part", INDEX)
    length = Expr.of(loop["extent"][0]) // count
    place = At(step, Expr.name(part.name) * length + Expr.name(f"{step.name}.start"))
    body = tuple(
        replace(op, ref=Ref(op.symbol, tuple(place if i == step else i for i in op.ref.index)))
        if op.ref is not None
        else op
        for op in loop.body
    )
    before = nest.body[: nest.body.index(loop)]
    stores = tuple(
        make("store", ref=Ref(name, (rows, Expr.name(part.name), columns)), operands=(total,))
        for name, total in zip(names, loop.results, strict=True)
    )
    short = loop.with_ops(body).with_attrs(extent=(length,))
    inside = make("for_range", lo=0, hi=count, blocks=(Block((part,), (*before, short, *stores)),))
    return nest.with_ops((inside,))


def _whole(nest: Op, loop: Op, names: list[str], count: int) -> Op:
    """The nest that adds the parts, in order, and goes on."""
    rows, columns = nest.args
    ops: list[Op] = []
    for name, total in zip(names, loop.results, strict=True):
        parts = [Value(f"{total.name}.the.{number}", total.type) for number in range(count)]
        ops += [
            make("load", ref=Ref(name, (rows, Expr.const(number), columns)), results=(part,))
            for number, part in enumerate(parts)
        ]
        last = parts[0]
        for number, part in enumerate(parts[1:], 1):
            after = Value(f"{total.name}.sum.{number}", total.type) if number < count - 1 else total
            ops.append(make("add", operands=(last, part), results=(after,)))
            last = after
    return nest.with_ops((*ops, *nest.body[nest.body.index(loop) + 1 :]))
