"""``fold-head``: what a call begins with is done by the workers of its launches, not by a kernel of its own."""

from __future__ import annotations

from tilelink.ir import Op

_ENQUEUED = frozenset({"head", "launch", "stream", "collective"})


def fold_head(program: Op) -> Op:
    """Have launches do what ``head`` does, and one that is alone what ends a call.

    Before::

        head do {
          wait @ack[0..WORLD] {epoch = (0 - 1)}
        }
        launch @f {after = ["head"], …} do {… finish do {…}}

    After::

        head {folded = true} do {
          wait @ack[0..WORLD] {epoch = (0 - 1)}
        }
        launch @f {after = ["head"], ends = true, …} do {… finish do {…}}

    Every worker takes the number of calls that have ended plus one for its epoch; those of the first launch wait
    themselves, and other launches come behind it in the main stream. Streams wait
    until the first launch says that it has, and therefore come behind it: where there is one hardware queue, they
    would hold it up otherwise. Counters are 0 when a call begins because they are cleared when one ends: by the
    last worker, where the launch ``ends`` the call (before its ``finish``, which may use none), or by the guard
    behind streams and other launches. Invariant:
    what each agent comes after is what it was. The value of a dynamic extent, which ``head`` tells the peers, is
    told and compared by the first launch. A program keeps its head if the library computes in it (which reads no
    epoch), or if roles load parts of sums by addresses: they have no registers left.
    """
    head = next(iter(program.find("head")), None)
    if head is None or head.get("folded"):
        return program
    agents = [op for op in program.body if op.name in _ENQUEUED]
    launches = [op for op in agents if op.name == "launch"]
    kinds = {op.name for op in agents}
    library = any(op.get("emitter") == "library" for op in launches)
    if not launches or library or not kinds <= {"head", "launch", "stream"}:
        return program
    if "stream" in kinds and not head.body:
        return program
    if any(_by_addresses(op) for op in launches):
        return program
    alone = len(agents) == 2 and _only_flags(program, launches[0].find("finish"))
    early = [op for op in agents[: agents.index(launches[0])] if op.name == "stream"]
    moved = {id(op) for op in early}
    ops: list[Op] = []
    for op in program.body:
        if op is head:
            ops.append(op.with_attrs(folded=True))
        elif op is launches[0]:
            ops += [op.with_attrs(ends=True) if alone else op, *early]
        elif id(op) not in moved:
            ops.append(op)
    return program.with_ops(tuple(ops))


def _only_flags(program: Op, finish: tuple[Op, ...]) -> bool:
    """Whether there is a ``finish`` that neither waits for a counter nor counts."""
    inner = [op for one in finish for op in one.walk() if op.ref is not None]
    if any(op.get("through") is not None for op in inner):
        return False
    return bool(finish) and all(program.declared(op.symbol).name != "counter" for op in inner)


def _by_addresses(launch: Op) -> bool:
    """Whether warps with roles load the parts of a sum themselves."""
    sums = (op for op in launch.walk() if op.name == "load_sum" and op.operands)
    return launch.get("roles") is not None and any(op.get("via") is None for op in sums)
