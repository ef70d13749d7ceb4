"""meaning: the stages compute, op for op, what the kernel says, on each point of its loops once.

The kernel (Tile IR, before any pass) is sequential: nests of loops, one behind the other, whose bodies
load tiles of whole tensors, compute and store. A stage must be one of these nests: the same ops with the
same attributes on the same values, every buffer standing for the tensor that it serves. Tiles and their
order are free, since the language leaves them open; two stages may share the tiles of a nest, of which the
second goes on, on the tiles of this rank's own part, with what the kernel does to the sum of what the nest
stores last (`shared`), and some tiles of a product may be cut along its depth (`in_parts`). Where a tensor moves,
the place along the moved axis is that of *dataflow*, which follows contents; this rule says which variable it
is that the place belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from tilelink.backend.copying import copies_of
from tilelink.backend.expand import Tile, environment, evaluate, loop_tiles, owner_order
from tilelink.backend.expand_rows import Expansion, Phase
from tilelink.backend.verify.dataflow import summed_symbols
from tilelink.backend.verify.depth import divided, sums_of
from tilelink.backend.verify.errors import DataflowError
from tilelink.backend.verify.grid import Ownership, others, partition_fault, parts_of
from tilelink.backend.verify.sameness import Names, padded
from tilelink.backend.verify.tail import (
    Tail,
    apart,
    last_body,
    length_of,
    loop_of,
    part_body,
    same_tiles,
    stored_at,
    tail_of,
    together,
    with_tails,
)
from tilelink.errors import Span
from tilelink.ir import (
    TILE,
    All,
    At,
    Block,
    Expr,
    Op,
    Ref,
    Type,
    Value,
    dynamic_extents,
    make,
    op_line,
)

CONTRIBUTED = ("scatter", "reduce")
# Attributes that say how and when, never what; other rules hold them against the program.
FREE = {
    "load": {"empty", "own", "when", "via", "wide"},
    "load_sum": {"empty", "own", "remote", "via", "wide"},
    "store": {"peer", "via", "wide", "final"},
    "for_tiles": {"tile", "segment", "segments", "visit", "part", "part_axis", "part_of", "extent"},
    "for_range": {"lo", "hi"},
}
ORDERING = ("wait", "notify", "transfer")


def check_meaning(out: Expansion, kernel: Op) -> None:
    """Raise DataflowError for the first op of a stage that is not the kernel's."""
    _Meaning(out, with_tails(divided(kernel, out), out)).check()


@dataclass(frozen=True, slots=True)
class _Loops:
    """The outer loops of a nest of the kernel: variables, lengths, whose part each is, and what is inside."""

    args: tuple[Value, ...]
    lengths: list[int]
    owned: list[Ownership]
    body: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """The op at which ``stage`` goes on with the next nest: its number, and its names of the variables."""

    op: Op
    stage: Op
    args: tuple[Value, ...]
    number: int
    final: bool
    relay: bool


class _Meaning:
    def __init__(self, out: Expansion, kernel: Op) -> None:
        self.out = out
        self.kernel = kernel
        self.env = environment(kernel)
        self.tensors = {op.symbol: op for op in kernel.find("tensor")}
        self.prelude = tuple(
            op
            for op in kernel.body
            if op.name not in ("extent", "tensor", "scalar") and not op.blocks
        )
        self.nests = tuple(op for op in kernel.body if op.blocks)
        self.summed = summed_symbols(out)
        self.last_store = {
            op.symbol: number
            for number, nest in enumerate(self.nests)
            for op in nest.walk()
            if op.name == "store" and op.ref is not None
        }
        self.number = 0  # of the nest that is compared
        self.final = False  # whether it is the delivery of an output's sum
        self.relay = False  # whether it sums parts and hands them on
        self.names = Names(self.env)
        self.turn: _Turn | None = None
        self.dynamic = {op.symbol for op in dynamic_extents(kernel)}

    def check(self) -> None:
        self.declarations()
        stored = set(self.last_store)
        for op in self.prelude:
            if op.name == "load" and op.ref is not None and op.symbol in stored:
                self.fail(op, "the kernel reads it between its loops, and stores it in one")
        done, at = 0, 0
        computing = self.computing()
        while at < len(computing):
            stage, tiles = computing[at].op, computing[at].tiles
            makers, adders = self.sharers(computing[at:])
            if adders:
                done = self.shared(makers, adders, done)
                at += len(makers) + len(adders)
                continue
            tail = tail_of(computing[at:], self.kernel, self.out)
            if tail is not None:
                self.in_parts(tail, done)
                at, done = at + tail.count, done + 1
                continue
            at += 1
            relayed = self.relays(stage)
            self.relay = relayed is not None
            if relayed is not None:
                if self.last_store.get(relayed, -1) >= done:
                    self.fail(stage, f"`{relayed}` is still stored behind it")
                self.number = len(self.nests)
                self.stage(stage, tiles, self.delivery(relayed), ())
                continue
            delivered = self.delivers(stage)
            self.final = delivered is not None
            if delivered is not None:
                if self.last_store.get(delivered, -1) >= done:
                    self.fail(stage, f"`{delivered}` is still stored behind it")
                self.number = len(self.nests)
                self.stage(stage, tiles, self.delivery(delivered), ())
            elif done == len(self.nests):
                self.fail(stage, "the kernel has no such loop")
            else:
                self.number = done
                self.stage(stage, tiles, self.nests[done], self.prelude)
                done += 1
        if done < len(self.nests):
            missing = self.nests[done]
            self.fail(self.out.program, f"no stage is the kernel's loop {self.loop_text(missing)}")

    def computing(self) -> list[Phase]:
        """The stages that load or store, and do more than copy; no other part of an agent does."""
        found: list[Phase] = []
        for phase in self.out.phases:
            accesses = [op for op in phase.op.walk() if op.name in ("load", "load_sum", "store")]
            if phase.kind == "stage" and accesses and not copies_of(phase.op):
                found.append(phase)
            elif phase.kind == "stage":
                self.moves_only(phase.op)
            elif phase.kind != "collective" and accesses:
                self.fail(accesses[0], "the kernel has no such access")
        return found

    # Declarations -----------------------------------------------------------------------------

    def declarations(self) -> None:
        program, out = self.out.program, self.out
        if environment(program) != self.env:
            self.fail(program, "its extents or its world are not those of the kernel")
        scalars = [
            {op.symbol: op["dtype"] for op in p.find("scalar")} for p in (program, self.kernel)
        ]
        if scalars[0] != scalars[1]:
            self.fail(program, "its scalars are not those of the kernel")
        for op in program.find("tensor"):
            if op.symbol not in self.tensors:
                self.fail(op, "the kernel has no such tensor")
        for name, tensor in self.tensors.items():
            held = [op for s, op in out.declarations.items() if out.base(s) == name]
            for op in held:
                if op.name in ("tensor", "buffer") and op["dtype"] != tensor["dtype"]:
                    self.fail(op, f"`{name}` is {tensor['dtype']}")
            mine = out.declarations.get(name)
            if mine is None or mine is tensor:
                continue
            keys = ["role"] if mine.name == "tensor" else []
            if out.world > 1 and mine.name == "tensor":
                keys += ["move", "over"]
            same = all(mine.get(key) == tensor.get(key) for key in keys)
            if mine.name == "buffer":
                same = tensor["role"] == "temp" and mine["space"] == "local"
            dims = [[int(evaluate(d, self.env, op)) for d in op["dims"]] for op in (mine, tensor)]
            if same and out.world > 1 and tensor.get("over") is not None:
                owners = [owner_order(op, self.env)[0] for op in (mine, tensor)]
                same = bool((owners[0] == owners[1]).all()) if dims[0] == dims[1] else False
            if not same or dims[0] != dims[1]:
                self.fail(mine, f"the kernel declares `{name}` otherwise")

    def moved(self, name: str) -> str:
        """How a tensor moves; on one rank none does."""
        return str(self.tensors[name]["move"]) if self.out.world > 1 else "local"

    def axis(self, name: str) -> int | None:
        """The axis along which ranks hold parts of a tensor."""
        over = self.tensors[name].get("over")
        return int(over) if over is not None and self.out.world > 1 else None

    # Stages -----------------------------------------------------------------------------------

    def moves_only(self, stage: Op) -> None:
        """A stage of transfers or copies computes nothing: what it puts where, *dataflow* follows."""
        for op in stage.walk():
            if op.name == "collective":
                self.fail(op, "it cannot stand in a stage")

    def relays(self, stage: Op) -> str | None:
        """The reduced tensor whose parts a stage sums into a buffer of sums, or None.

        Who sums which part is free: what a read finds at a place was put there for that place, which
        *dataflow* follows, and *cover* holds that something was.
        """
        stores = [op.symbol for op in stage.walk() if op.name == "store" and op.ref is not None]
        name = self.out.base(stores[0]) if stores else ""
        if name not in self.tensors or self.moved(name) != "reduce" or name in stores:
            return None
        return name if set(stores) <= self.summed else None

    def delivers(self, stage: Op) -> str | None:
        """The output whose sum a stage brings into the user's tensor and does nothing else, or None."""
        stores = [op for op in stage.walk() if op.name == "store" and op.ref is not None]
        name = stores[0].symbol if stores else None
        if name in self.tensors and self.moved(name) in CONTRIBUTED:
            return name
        return None

    def sums_own(self, stage: Op) -> bool:
        """Whether a stage adds a contribution that it holds in registers to those of the other ranks."""
        return any(op.name == "load_sum" and op.operands for op in stage.walk())

    def sharers(self, phases: list[Phase]) -> tuple[list[Phase], list[Phase]]:
        """The stages at the head of ``phases`` that may share one nest: those that store what is summed, of which
        the first is one, and those behind it that add it to what they hold. None of either otherwise.

        Their order is no matter of what they compute, where none reads what one in front of it changes for the
        next nest (see :meth:`shared`): *cover* and *progress* hold what is read when.
        """
        stored = _stored(phases[0].op)
        makers: list[Phase] = []
        adders: list[Phase] = []
        for phase in phases:
            if makers and self.sums_own(phase.op):
                adders.append(phase)
            elif not self.sums_own(phase.op) and _stored(phase.op) == stored:
                makers.append(phase)
            else:
                break
        return (makers, adders) if adders else ([], [])

    def shared(self, makers: list[Phase], adders: list[Phase], done: int) -> int:
        """Stages that share the tiles of nest ``done``; the number of nests that are done with them.

        Those that add do not store their contribution to X. In place of the store, which comes last, stands
        all that the kernel does next to the sum of X on the same tile: the next nest, or the delivery of
        an output, or where X is summed in two shots that the sum is handed on. The tiles of all are the
        nest's, those of the stages that add this rank's part.
        """
        first, second = makers[0], adders[0]
        phases = self.out.phases
        late = [p for p in makers if phases.index(p) > phases.index(second)]
        changed = {self.out.base(name) for adder in adders for name in _stored(adder.op)}
        for op in (op for phase in late for op in phase.op.walk() if op.name == "load"):
            if self.out.base(op.symbol) in changed:
                self.fail(op, "a stage in front of it, which goes on with the next loop, stores it")
        if done == len(self.nests):
            self.fail(first.op, "the kernel has no such loop")
        nest = self.nests[done]
        (sum_, *more) = [op for op in second.op.walk() if op.name == "load_sum" and op.operands]
        name = self.out.base(sum_.symbol)
        stores = [
            op for n in self.nests for op in n.walk() if op.name == "store" and op.symbol == name
        ]
        made = self.loops(first.op, nest)
        last = made.body[-1] if made.body else nest
        whole = last.name == "store" and last.ref is not None and last.ref.index == made.args
        if more or self.moved(name) not in CONTRIBUTED or stores != [last] or not whole:
            detail = f"the kernel's loop does not end with its only store of `{name}`, by its tiles"
            self.fail(sum_, detail)
        relayed = self.moved(name) == "reduce"
        if relayed and self.relays(second.op) != name:
            self.fail(sum_, f"this rank alone gets the sum of `{name}`")
        delivered = relayed or self.tensors[name]["role"] != "temp"
        if not delivered and done + 1 == len(self.nests):
            self.fail(sum_, "the kernel has no loop behind it")
        reader = self.delivery(name) if delivered else self.nests[done + 1]
        read = self.loops(second.op, reader)
        if read.lengths != made.lengths:
            self.fail(sum_, f"the kernel's next loop is {self.loop_text(reader)}")
        tail = (*(() if delivered else self.prelude), *read.body)
        sums = [n for n, op in enumerate(tail) if op.name == "load" and op.symbol == name]
        again = [op for op in reader.walk() if op.name == "load" and op.symbol == name]
        if len(sums) != 1 or len(again) != 1 or tail[sums[0]].ref != Ref(name, read.args):
            self.fail(sum_, f"the kernel does not read the sum of `{name}` once, by its tiles")
        tail = tuple(
            replace(op, operands=last.operands if n == sums[0] else op.operands)
            for n, op in enumerate(tail)
        )
        number = len(self.nests) if delivered else done + 1
        for maker in makers:
            self.number, self.final = done, False
            loops = self.loops(maker.op, nest)
            self.compare(maker.op, loops, (*self.prelude, *made.body))
        for adder in adders:
            self.number, self.final = done, False
            loops = self.loops(adder.op, nest)
            final = delivered and not relayed
            self.turn = _Turn(tail[0], adder.op, read.args, number, final, relayed)
            self.compare(adder.op, loops, (*self.prelude, *made.body[:-1], *tail))
            self.relay = False
        grids = [_together(phases) for phases in (makers, adders)]
        # Who sums which part is free, as where a stage of its own does.
        mine = parts_of(grids[1], read.lengths) if relayed else read.owned
        fault = partition_fault(grids[1], read.lengths, mine)
        if all(part is None for part in mine) or made.owned != [None] * len(made.owned):
            fault = "are not those of all ranks' parts and of this one's"
        # The first visits what is of other ranks, on a grid of its own: it may be the library's.
        rest = [None if part is None else others(part, self.out.world) for part in mine]
        fault = fault or partition_fault(grids[0], made.lengths, rest)
        if fault:
            self.fail(second.op, f"its tasks, and those of the stages beside it, {fault}")
        return done + (1 if delivered else 2)

    def in_parts(self, tail: Tail, done: int) -> None:
        """Stages that share nest ``done``: of whole tiles, of parts of the others' depth, and of what adds those.

        Parts are stored, but for the first, which is in registers where the others are added to it, in order.
        """
        last = tail.last.op
        if done == len(self.nests):
            self.fail(last, "the kernel has no such loop")
        nest = self.nests[done]
        totals = sums_of(nest)
        if not totals:
            self.fail(last, "the kernel's loop is no sum of products that may be taken in parts")
        names, row = stored_at(tail.parts[0].op)
        if len(set(names)) != len(totals) or len(names) != len(totals) or row is None:
            self.fail(tail.parts[0].op, "it does not store one part of each sum")
        buffers = [self.tensors.get(name) for name in names]
        if any(b is None or b["dims"][0] != len(tail.parts) for b in buffers):
            self.fail(tail.parts[0].op, f"its buffers are not of {len(tail.parts)} parts of sums")
        lengths = [length_of(phase.op, self.out) for phase in (tail.last, *tail.parts)]
        whole = int(evaluate(Expr.of(loop_of(nest)["extent"][0]), self.env, nest))
        if min(lengths) < 1 or sum(lengths) != whole:
            self.fail(last, f"{' + '.join(map(str, lengths))} of a depth of {whole} are multiplied")
        for phase in tail.parts:
            if not apart(phase, stored_at(phase.op)[1] or row, self.out):
                self.fail(phase.op, "two of its tiles lie in one place")
            if not same_tiles(phase, tail.last):
                self.fail(phase.op, "its tiles are not those of the stage that adds its parts")
        # Where a tile lies, in the kernel's names of the variables.
        if isinstance(row, At):
            told = Names(self.env)
            for one, other in zip(tail.parts[0].op.args, nest.args, strict=True):
                told.add(one.name, other.name)
            row = At(nest.args[0], told.expr(row.start))
        else:
            row = nest.args[0]
        self.number, self.final, self.relay = done, False, False
        if tail.whole is not None:
            loops = self.loops(tail.whole.op, nest)
            self.compare(tail.whole.op, loops, (*self.prelude, *loops.body))
        begin = lengths[0]
        for number, phase in enumerate(tail.parts, 1):
            body = part_body(nest, names, number, row, begin, lengths[number])
            self.compare(phase.op, self.loops(phase.op, nest), (*self.prelude, *body))
            begin += lengths[number]
        loops = self.loops(last, nest)
        body = last_body(nest, names, len(lengths), row, lengths[0])
        self.compare(last, loops, (*self.prelude, *body))
        fault = partition_fault(together(tail), loops.lengths, loops.owned)
        if fault:
            self.fail(last, f"its tasks, and those of the stages before it, {fault}")

    def delivery(self, name: str) -> Op:
        """What the mapping says of an output: each tile of this rank's part is the sum."""
        tensor = self.tensors[name]
        letters = tuple(Value(f"tile.{n}", TILE) for n in range(len(tensor["dims"])))
        value = Value("the.sum", Type(tensor["dtype"], tuple(v.name for v in letters)))
        ref = Ref(name, letters)
        body = (
            make("load", results=(value,), ref=ref),
            make("store", ref=ref, operands=(value,)),
        )
        own = {"part": "own", "part_axis": tensor.get("over"), "part_of": name}
        attrs = own if tensor.get("over") is not None else {}
        blocks = (Block(letters, body),)
        return make("for_tiles", extent=tensor["dims"], blocks=blocks, **attrs)

    def stage(
        self, stage: Op, tiles: tuple[tuple[str, Tile], ...], nest: Op, prelude: tuple[Op, ...]
    ) -> None:
        """``stage`` is ``nest``: its outer loops are the queue, what is inside them the body."""
        loops = self.loops(stage, nest)
        self.compare(stage, loops, (*prelude, *loops.body))
        if self.relay:
            return  # who sums which part is free
        fault = partition_fault([tile for _, tile in tiles], loops.lengths, loops.owned)
        if fault:
            self.fail(stage, f"its tasks {fault}")

    def loops(self, stage: Op, nest: Op) -> _Loops:
        """The outer loops of ``nest`` that the queue of ``stage`` stands for."""
        args: list[Value] = []
        extents: list[Expr | int] = []
        owned: list[Ownership] = []
        body: tuple[Op, ...] = (nest,)
        while len(args) < len(stage.args):
            loop = body[0]
            if len(body) != 1 or not self.parallel(loop):
                self.fail(stage, "its queue has other variables than the kernel's loops")
            args += loop.args
            bounds = loop["extent"] if loop.name == "for_tiles" else [loop["hi"]]
            owned += self.owned(loop, len(bounds))
            extents += bounds
            body = loop.body
        if len(args) != len(stage.args) or len(stage["extent"]) != len(args):
            self.fail(stage, "its queue has other variables than the kernel's loops")
        lengths = [int(evaluate(e, self.env, nest)) for e in extents]
        if [int(evaluate(e, self.env, stage)) for e in stage["extent"]] != lengths:
            self.fail(stage, f"the kernel's loop is {self.loop_text(nest)}")
        return _Loops(tuple(args), lengths, owned, body)

    def compare(self, stage: Op, loops: _Loops, ops: tuple[Op, ...]) -> None:
        """The body of ``stage`` is ``ops``, its variables those of ``loops``."""
        self.names = Names(self.env)
        self.bind(stage, stage.args, loops.args)
        self.block(stage, stage.body, ops)

    def parallel(self, loop: Op) -> bool:
        if loop.results:
            return False
        if loop.name == "for_range":
            return bool(Expr.of(loop.get("lo", 0)).value == 0)
        return loop.name == "for_tiles" and loop.get("extent") is not None

    def owned(self, loop: Op, count: int) -> list[Ownership]:
        """For each variable of a loop: which indices are this rank's part, or None for all."""
        found: list[Ownership] = [None] * count
        if loop.get("part") == "own" and self.out.world > 1:
            found[int(loop.get("part_axis", 0))] = owner_order(
                self.tensors[loop["part_of"]], self.env
            )[0]
        return found

    # Ops --------------------------------------------------------------------------------------

    def block(self, parent: Op, mine: tuple[Op, ...], theirs: tuple[Op, ...]) -> None:
        """The ops of a block are the kernel's, in its order; synchronisation stands between them."""
        left = [op for op in mine if not _ordering_only(op)]
        before: Op | None = None
        for op in theirs:
            while before is not None and left and self.again(left[0], before):
                left.pop(0)
            if self.turn is not None and op is self.turn.op:
                # From here on the tiles are those of the kernel's next loop.
                self.number, self.final = self.turn.number, self.turn.final
                self.relay = self.turn.relay
                self.bind(self.turn.stage, self.turn.stage.args, self.turn.args)
                self.turn = None
            if not left:
                self.fail(parent, f"the kernel's `{op.name}` is not in it", theirs=op)
            if op.name == "store":
                self.deliver(left.pop(0), op)
            else:
                self.op(left.pop(0), op)
            before = op if op.name == "store" else None
        while before is not None and left and self.again(left[0], before):
            left.pop(0)
        if left:
            self.fail(left[0], "the kernel has no such op there")

    def again(self, mine: Op, theirs: Op) -> bool:
        """Whether ``mine`` stores once more what was stored last, such as into another rank."""
        if mine.name != "store" or mine.get("peer") is None:
            return False
        return [self.names.value(v) for v in mine.operands] == [v.name for v in theirs.operands]

    def deliver(self, mine: Op, theirs: Op) -> None:
        """A store of the kernel: a store, or a loop over peers that stores the same into each."""
        if mine.name != "for_range" or mine.results:
            self.op(mine, theirs)
            return
        inside = [op for op in mine.body if not _ordering_only(op)]
        if not inside:
            self.fail(mine, "the kernel has no such loop there")
        for op in inside:
            self.deliver(op, theirs)

    def op(self, mine: Op, theirs: Op) -> None:
        wanted = ("load", "load_sum") if theirs.name == "load" else (theirs.name,)
        if mine.name not in wanted:
            self.fail(mine, f"the kernel has `{theirs.name}` there", theirs=theirs)
        if [self.names.value(v) for v in mine.operands] != [v.name for v in theirs.operands]:
            self.fail(mine, "its operands are other values than the kernel's", theirs=theirs)
        if len(mine.blocks) != len(theirs.blocks) or len(mine.results) != len(theirs.results):
            self.fail(mine, "it is of another shape than the kernel's", theirs=theirs)
        self.attributes(mine, theirs)
        if theirs.name in ("load", "store"):
            self.memory(mine, theirs)
        elif mine.ref != theirs.ref:
            self.fail(mine, f"the kernel names {theirs.ref}", theirs=theirs)
        for one, other in zip(mine.blocks, theirs.blocks, strict=True):
            self.bind(mine, one.args, other.args)
            self.block(mine, one.ops, other.ops)
        self.bind(mine, mine.results, theirs.results)

    def bind(self, op: Op, mine: tuple[Value, ...], theirs: tuple[Value, ...]) -> None:
        if len(mine) != len(theirs):
            self.fail(op, "it has other variables than the kernel's", theirs=None)
        for one, other in zip(mine, theirs, strict=True):
            self.names.add(one.name, other.name)
        for one, other in zip(mine, theirs, strict=True):
            if self.names.type(one.type) != self.names.plain(other.type):
                self.fail(op, f"`%{one.name}` is {one.type}, in the kernel {other.type}")

    def attributes(self, mine: Op, theirs: Op) -> None:
        free = FREE.get(mine.name, set()) | FREE.get(theirs.name, set())
        one = {k: self.names.attribute(v) for k, v in mine.attrs if k not in free}
        other = {k: self.names.same(v) for k, v in theirs.attrs if k not in free}
        # Compared as text: a NaN is not equal to itself, and 1 is not 1.0 or true.
        if {k: repr(v) for k, v in one.items()} != {k: repr(v) for k, v in other.items()}:
            self.fail(mine, "its attributes are not the kernel's", theirs=theirs)
        if theirs.name == "for_range":
            for key in ("lo", "hi"):
                if self.names.attribute(mine.get(key, 0)) != self.names.same(theirs.get(key, 0)):
                    self.fail(mine, f"`{key}` is not the kernel's", theirs=theirs)
        elif theirs.name == "for_tiles":
            self.loop(mine, theirs)

    def loop(self, mine: Op, theirs: Op) -> None:
        """A loop over tiles visits each point of the kernel's loop once, in any order."""
        extent = theirs.get("extent")
        segmented = any(mine.get(key) is not None for key in ("segment", "segments", "visit"))
        if extent is None:
            if mine.get("extent") is not None or segmented:
                self.fail(mine, "it walks another range than the kernel's", theirs=theirs)
            return
        lengths = [int(evaluate(e, self.env, theirs)) for e in extent]
        given = [int(evaluate(e, self.env, mine)) for e in mine.get("extent", ())]
        if given != lengths:
            self.fail(mine, f"the kernel's loop is {self.loop_text(theirs)}", theirs=theirs)
        ranks = np.arange(self.out.world, dtype=np.int64)
        tiles = loop_tiles(mine, {**self.env, "RANK": ranks}, len(ranks))
        fault = partition_fault(tiles, lengths, self.owned(theirs, len(lengths)))
        if fault:
            self.fail(mine, f"its tiles {fault}", theirs=theirs)

    # Memory -----------------------------------------------------------------------------------

    def memory(self, mine: Op, theirs: Op) -> None:
        """An access is of the tensor that the kernel accesses, in its right form, at the same tile."""
        assert mine.ref is not None and theirs.ref is not None
        name = theirs.ref.symbol
        kind = self.moved(name)
        if self.out.base(mine.ref.symbol) != name:
            self.fail(mine, f"the kernel accesses `{name}` there", theirs=theirs)
        buffered = mine.ref.symbol != name
        stacked = len(self.out.dims[mine.ref.symbol]) - len(self.tensors[name]["dims"])
        contributed = kind in CONTRIBUTED
        later = self.number <= self.last_store.get(name, -1)
        total = mine.ref.symbol in self.summed
        if theirs.name == "store":
            partial = contributed and not self.final
            fits = buffered and not total if partial else not buffered
            if self.relay:
                fits = buffered and total and stacked == 0
        elif contributed and later:
            fits = mine.name == "load" and buffered and not total and stacked == 0
        elif contributed:
            # Parts lie one behind the other, or each on the rank that made it.
            parts = 0 if mine.get("remote") else 1
            fits = (mine.name == "load_sum" and buffered and not total and stacked == parts) or (
                mine.name == "load" and total and stacked == 0
            )
        elif kind == "gather":
            fits = mine.name == "load" and stacked == 0
        else:
            fits = mine.name == "load" and not buffered
        if not fits:
            what = f"a {mine.name} of `{mine.ref.symbol}` is not"
            self.fail(mine, f"{what} what the kernel's {theirs.name} of `{name}` means")
        index = padded(mine.ref.index, len(self.out.dims[mine.ref.symbol]))
        lead = index[:stacked]
        index = index[stacked:]
        right = Expr.name("RANK") if theirs.name == "store" else All()
        if stacked > 1 or (stacked == 1 and lead[0] != right):
            self.fail(mine, "its first index is not the rank that contributes", theirs=theirs)
        self.index(mine, index, theirs)
        own = mine.get("own")
        if isinstance(own, Ref):
            here = own.symbol == name if kind == "gather" else own.symbol not in self.summed
            if (
                self.out.base(own.symbol) != name
                or not here
                or (contributed and own.symbol == name)
            ):
                self.fail(mine, f"its own part is not that of `{name}`", theirs=theirs)
            self.index(mine, padded(own.index, len(self.out.dims[own.symbol])), theirs)

    def index(self, mine: Op, index: tuple[object, ...], theirs: Op) -> None:
        assert theirs.ref is not None
        name = theirs.ref.symbol
        wanted = padded(theirs.ref.index, len(self.tensors[name]["dims"]))
        if len(index) != len(wanted):
            self.fail(mine, f"the kernel's index is {theirs.ref}", theirs=theirs)
        axis = self.axis(name)
        at = 0
        for one, other in zip(index, wanted, strict=True):
            # The parts of a sum in two shots are cut along any axis.
            moves = at == axis or self.moved(name) == "reduce"
            if moves and isinstance(one, At) and isinstance(other, Value):
                # Where the tile lies in a shard or a buffer is what dataflow follows.
                assert isinstance(one, At)
                one = one.value
            elif isinstance(one, At) and self.stays(one, self.tensors[name]["dims"][at]):
                one = one.value
            if self.names.element(one) != self.names.same(other):
                self.fail(mine, f"the kernel's index is {theirs.ref}", theirs=theirs)
            elif isinstance(one, At) and isinstance(other, At):
                self.out.meant.add((id(mine), at))
            at += str(other) != "+"

    def stays(self, item: At, length: Expr | int) -> bool:
        """Whether a tile is placed where it begins, wherever that is: at a dynamic extent's capacity."""
        start = f"{item.value.name}.start"
        if not item.start.names <= {start, *self.env} or not item.start.names & self.dynamic:
            return False
        places = np.arange(int(evaluate(length, self.env)), dtype=np.int64)
        at = evaluate(item.start, {**self.env, start: places})
        return bool(np.all(np.broadcast_to(at, places.shape) == places))

    # Words ------------------------------------------------------------------------------------

    def loop_text(self, loop: Op) -> str:
        bounds = loop.get("extent") or (loop.get("hi"),)
        names = ", ".join(v.name for v in loop.args[: len(bounds)])
        return f"{names} over {', '.join(map(str, bounds))}"

    def fail(self, op: Op, detail: str, *, theirs: Op | None = None) -> NoReturn:
        symbol = op.symbol if op.ref is not None else op.name
        span: Span | None = op.span
        notes = () if theirs is None else (f"in the kernel: {op_line(theirs)}",)
        raise DataflowError(span, symbol=symbol, detail=detail, notes=notes)


def _stored(stage: Op) -> set[str]:
    """What a stage stores to."""
    return {op.symbol for op in stage.walk() if op.name == "store" and op.ref is not None}


def _together(phases: list[Phase]) -> list[Tile]:
    """The tiles of several stages of the same loops as those of one."""
    return [
        Tile(*(np.concatenate(side, axis=1) for side in zip(*each, strict=True)))
        for each in zip(
            *([(t.start, t.stop, t.tile) for _, t in phase.tiles] for phase in phases), strict=True
        )
    ]


def _ordering_only(op: Op) -> bool:
    """Whether an op, or a loop with all in it, only waits, notifies or transfers."""
    if op.blocks:
        return not op.results and op.name == "for_range" and all(map(_ordering_only, op.body))
    return op.name in ORDERING
