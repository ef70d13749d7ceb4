"""``fold-sums``: the sum of a scatter, or of a reduce in two shots, moves into the epilogue of own tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import (
    RANK,
    WORLD,
    Moved,
    accesses,
    moved,
    schedule_of,
    substitute,
    tasks_of_stage,
    tensors_of,
)
from tilelink.ir import Block, Expr, Op, Ref, Value
from tilelink.schedules import ScheduleError

# What may stand behind a sum in the same epilogue: each element on its own.
_WHOLE_TILE = frozenset({"dot", "transpose", "reshape", "sum", "max", "min"})


def fold_sums(program: Op) -> Op:
    """Split the stage that makes a tensor with ``sum = "epilogue"``, and join the sum to the own part.

    Before::

        stage @C.gemm {extent = [M, N], segment = 128, visit = (RANK + 1 + i) % WORLD, …}
            do (%m: tile, %n: tile) {… store @C[%m, %n] (%c)}
        stage @C.sum {…} do (%p: tile, %q: tile) {
          %s = load @C[%p, %q]
          store @C[%p, %q] (%s)
        }

    After::

        stage @C.gemm {…, segments = WORLD - 1} do (%m: tile, %n: tile) {… store @C[%m, %n] (%c)}
        stage @C.own {…, segments = 1, visit = RANK, first = 76} do (%m.own: tile, %n.own: tile) {
          … %s = load_sum @C[%m.own, %n.own] (%c.own)
          store @C[%m.own, %n.own] (%s)
        }

    What reads the sum of a reduce in two shots first is the stage that hands it on to every rank: its place
    is in the epilogue then, and the stages behind it stay. Invariants: together the two stages visit every
    tile once; the contribution of this rank to its own slice never touches memory; the first tile of the
    second queue goes to the worker behind the one that had the last tile of the first.
    """
    for name, tensor in tensors_of(program).items():
        move = schedule_of(program).move(name)
        if move.sum != "epilogue" or program["world"] == 1:
            continue
        if move.resource == "none":
            _refuse(tensor, f"`{name}` is summed by the library's collective")
        if tensor["move"] != "scatter" and tensor.get("shots") != 2:
            _refuse(
                tensor,
                f"`{name}` is neither a scatter nor summed in two shots: no rank sums a part",
            )
        ops = [_fold(program, op, name) if op.name == "launch" else op for op in program.body]
        program = program.with_ops(tuple(ops))
    return program


def _refuse(op: Op, detail: str) -> NoReturn:
    raise ScheduleError(
        op.span, field="sum", detail=f"epilogue: {detail}", help='use `"sum": "stage"`'
    )


def _fold(program: Op, launch: Op, name: str) -> Op:
    stages = launch.body
    storing = [
        i
        for i, s in enumerate(stages)
        if any(not (op.get("final") or op.get("relay")) for op in accesses(s, name, "store"))
    ]
    # In two shots the parts are read to be handed on; what comes then are reads of the sum.
    relayed = program.declared(name).get("shots") == 2
    reading = [
        i
        for i, s in enumerate(stages)
        if any(bool(op.get("relay")) == relayed for op in accesses(s, name, "load"))
    ]
    if len(storing) != 1:
        _refuse(launch, f"{len(storing)} loops store `{name}`")
    if len(reading) != 1 or reading[0] <= storing[0]:
        _refuse(launch, f"not one loop behind that which makes `{name}` reads its sum")
    maker, reader = stages[storing[0]], stages[reading[0]]
    delivery = any(op.get("final") for op in accesses(reader, name, "store"))
    if reading[0] != storing[0] + 1 and not delivery:
        _refuse(reader, f"between it and the loop that makes `{name}` stands another")
    info = moved(program, name)
    remote = _remote(program, maker, info)
    own = _own(program, maker, reader, info)
    taken = tasks_of_stage(program, remote) % int(launch["workers"])
    own = own.with_attrs(first=taken or None)
    rest = (s for i, s in enumerate(stages) if i > storing[0] and i != reading[0])
    return launch.with_ops((*stages[: storing[0]], remote, own, *rest))


def _remote(program: Op, maker: Op, info: Moved) -> Op:
    """The tiles of all other ranks' slices, in the order that the stage had, as far as own ones go."""
    if maker.get("segment") != info.block:
        _refuse(maker, f"its tiles are not cut at the blocks of `{info.name}`")
    i = Expr.name("i")
    departure = info.block_of((RANK + 1 + i // info.blocks) % WORLD, i % info.blocks)
    visit = maker.get("visit")
    place = None if visit is None else _own_place(program, visit, info)
    if place == "first":
        visit = visit.substitute({"i": i + info.blocks})
    elif place != "last":
        visit = departure
    return maker.with_attrs(segments=(info.world - 1) * info.blocks, visit=visit)


def _own_place(program: Op, visit: Expr, info: Moved) -> str | None:
    """Whether an order of blocks visits the own ones ``first``, ``last``, or in between (None)."""
    i = np.arange(info.world * info.blocks)
    found = set()
    for rank in range(info.world):
        env = {**environment(program), "RANK": rank, "i": i}
        start = np.broadcast_to(visit.evaluate(env), i.shape) * info.block
        mine = info.owner_of(Expr.name("e")).evaluate({**env, "e": start}) == rank
        own = np.flatnonzero(mine)
        first = np.array_equal(own, i[: info.blocks])
        last = np.array_equal(own, i[-info.blocks :])
        found.add("first" if first else "last" if last else None)
    return found.pop() if len(found) == 1 else None


def _own(program: Op, maker: Op, reader: Op, info: Moved) -> Op:
    """The own tiles: what ``maker`` computes, the sum with the arrived parts, what ``reader`` does with it."""
    name = info.name
    last = maker.body[-1]
    stores = [op for op in maker.walk() if op.name == "store"]
    if last.name != "store" or last.symbol != name or len(stores) != 1:
        _refuse(maker, f"`{name}` is not all that is stored there, and stored last")
    assert last.ref is not None
    if last.ref.index != maker.args or not all(arg.type.is_tile for arg in maker.args):
        _refuse(maker, f"`{name}` is not stored by the tiles of the loop")
    (stored,) = last.operands
    if stored.type.dtype != program.declared(name)["dtype"]:
        _refuse(last, f"what is stored is no {program.declared(name)['dtype']} yet")
    same = len(reader.args) == len(maker.args) and tuple(reader["extent"]) == tuple(maker["extent"])
    for op in reader.walk():
        if (op.blocks and op is not reader) or op.name in _WHOLE_TILE:
            _refuse(op, "behind the sum there is more than arithmetic on each element")
    for load in accesses(reader, name, "load"):
        assert load.ref is not None
        if not same or load.ref.index != reader.args:
            _refuse(load, f"the sum of `{name}` is not read by the tiles that it is stored by")
    if sum(1 for _ in accesses(reader, name, "load")) != 1:
        _refuse(reader, f"the sum of `{name}` is read more than once")
    renamed = {
        value.name: Value(f"{value.name}.own", value.type)
        for op in maker.walk()
        for value in (*op.results, *op.args)
    }
    body = tuple(substitute(op, renamed) for op in maker.body[:-1])
    args = tuple(renamed[arg.name] for arg in maker.args)
    tail = {old.name: new for old, new in zip(reader.args, args, strict=True)}
    own = substitute(Op("store", operands=(stored,)), renamed).operands

    def joined(op: Op) -> Op:
        op = substitute(op, tail)
        if op.name != "load" or op.ref is None or op.ref.symbol != name:
            return op
        return replace(op, name="load_sum", operands=own).with_attrs(relay=None)

    body += tuple(joined(op) for op in reader.body)
    return replace(maker, ref=Ref(f"{name}.own"), blocks=(Block(args, body),)).with_attrs(
        segments=info.blocks, visit=info.block_of(RANK, Expr.name("i")), interleave=None
    )
