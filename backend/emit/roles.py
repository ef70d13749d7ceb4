"""One ``launch`` with roles as a warp-specialised Gluon kernel: a loader, and two groups that multiply.

What stands before the main loop, its waits, and the loads of the loop are the loader's; the products, the
epilogue, its waits and notifies are those of the warp groups. They share a ring of slots
(:mod:`tilelink.device.roles`). The text of decoding, waits, epilogue and signals is that of the Triton
emitter; here is what roles make different: who does what, and in which layout tiles are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from tilelink.backend.emit import access, added, body, epilogue, sums
from tilelink.backend.emit.held import Held
from tilelink.backend.emit.kernel import among, turned
from tilelink.backend.emit.loops import (
    Walk,
    announce,
    ceildiv,
    decode,
    place_tile,
    total,
)
from tilelink.backend.emit.scope import (
    TL_DTYPE,
    Dim,
    Program,
    Scope,
    item_bytes,
    origin,
    refuse_roles,
)
from tilelink.backend.emit.text import Writer, identifier
from tilelink.backend.passes.bind_emitter import Product, Unfit, split_product
from tilelink.ir import At, Expr, Op, Value
from tilelink.schedules.roles import HALVES, LEAST_ROOM

SHARED_LIMIT = 232_448  # bytes of shared memory a CTA of sm_90 can have
_BARRIERS = 1024  # of mbarriers and what the compiler keeps beside them
GROUP_WARPS = 4
REGISTERS = (232, 40)


@dataclass(slots=True)
class _Ring:
    """The tiles of one step: name, descriptor's block and bytes, in the order of the loads."""

    names: list[str]
    blocks: list[tuple[tuple[int, ...], str]]
    holders: list[str]  # a descriptor of each, which the host gives its layout

    @property
    def bytes(self) -> int:
        """Bytes of one step."""
        return sum(_volume(block) * item_bytes(dtype) for block, dtype in self.blocks)


def _volume(block: tuple[int, ...]) -> int:
    count = 1
    for length in block:
        count *= length
    return count


class Roles:
    """Writes the functions of one launch; ``scopes`` share the kernel's parameters."""

    def __init__(self, program: Program, launch: Op, name: str) -> None:
        self.program, self.launch, self.name = program, launch, name
        self.halves = launch["roles"] == HALVES
        self.slots = int(launch["stages"])
        self.loader = Scope(program, Writer(), stages=self.slots)
        self.loader.used |= {"ctx", "token", "q", "step", "slot", "ring", "rank", "role", "number"}
        self.loader.used |= {"turns", "pair", "room", "met", "at", "last"}
        self.loader.contracted = access.contracted(launch.body)
        self.ring: _Ring | None = None
        self.room: tuple[tuple[int, ...], str] | None = None
        self.room_of = ""
        self.landing: dict[int, str] = {}  # the tiles of the ring that parts land in, by their sum
        # The rows of the whole tile, where a group has half of them.
        self.rows: tuple[str, Dim] | None = None
        self.pieces = 0  # of a tile whose parts land there, still to be added up
        self.direct: set[int] = set()  # stores that can leave through TMA, by their identity
        stages = launch.find("stage")
        try:
            self.products = [(stage, split_product(stage)) for stage in stages]
        except Unfit as unfit:
            raise refuse_roles(unfit.op, unfit.detail) from None
        self.multiply = replace(
            self.loader,
            writer=Writer(),
            names={},
            dims={},
            dirty={},
            literals=set(),
            tokens=[],
            chosen={},
            used=set(self.loader.used),
            over=self._overrides(),
            warps=GROUP_WARPS,
        )

    def functions(self) -> list[tuple[str, list[str]]]:
        """The bodies of the loader and of the groups that multiply, by the function's name."""
        self.loader.writer.depth = self.multiply.writer.depth = 1
        self.loader.writer.line("step = 0")
        for stage, product in self.products:
            self._load_stage(stage, product)
        self.loader.writer.prune()
        self.multiply.used |= set(self.loader.descriptors.values())
        self.multiply.used |= {*self.loader.pointers.values(), *self.loader.buffers.values()}
        self._make_room()
        self._check_flushes()
        writer = self.multiply.writer
        writer.line("step = 0")
        if not self.halves:
            writer.line("number = 0")
        writer.let("met", "0")
        for stage, product in self.products:
            self._multiply_stage(stage, product, self._flushed(stage))
        writer.prune()
        return [
            (f"{self.name}_load", self.loader.writer.lines),
            (f"{self.name}_multiply", writer.lines),
        ]

    # The loader -------------------------------------------------------------------------------

    def _queue(self, scope: Scope, stage: Op) -> str:
        """The head of the loop over a stage's tasks."""
        title = stage.symbol if stage.ref is not None else "stage"
        scope.writer.line()
        scope.writer.line(f"# Stage {title}.{origin(stage.span).replace('  # ', ' ')}")
        count = total(scope, stage, stage.args, Walk.of(stage))
        worker, first = "tl.program_id(0)", int(stage.get("first", 0))
        workers = int(self.launch["workers"])
        low, high = (int(w) for w in stage.get("workers", (0, workers)))
        step = "tl.num_programs(0)"
        name = f"{identifier(title)}_worker"
        if (low, high) != (0, workers):
            step, many = str(high - low), high - low
            turn = f"tl.program_id(0) + {(many - low - first) % many}"
            # A worker that has no part in the queue comes behind its end.
            inside = among(low, high, workers)
            scope.writer.line(f"{name} = tl.where({inside}, ({turn}) % {many}, {count})")
            worker = name
        elif first:
            scope.writer.line(f"{name} = {turned(first)}")
            worker = name
        # Behind a main loop that adds parts, what is the same for every tile stays inside of the loop: kept in
        # registers over the main loop, it would not fit. Nor would the addresses of other ranks' parts fit the few
        # registers of a loader.
        multiplies = scope is self.multiply
        adds = any(
            op.get("remote")
            or (multiplies and (op.name == "load_sum" or added.part_of_sum(self.program, op)))
            for op in stage.walk()
        )
        tail = ", disable_licm=True" if adds else ""
        return f"for q in tl.range({worker}, {count}, {step}{tail}):"

    def _load_stage(self, stage: Op, product: Product) -> None:
        scope, writer = self.loader, self.loader.writer
        with writer.block(self._queue(scope, stage)):
            scope.tokens.clear()
            scope.tile = "q"
            decode(scope, stage, stage.args, Walk.of(stage), "q")
            waits = tuple(op for op in product.before if op.name == "wait")
            if waits:
                writer.line("token = 0")
                scope.tokens.append("token")
            body.ops(scope, waits)
            self._main_loop(product)
            if product.landed is not None:
                self._land(stage, product, product.landed)
        self._forget(scope)

    def _land(self, stage: Op, product: Product, total: Op) -> None:
        """The loader waits for the parts that a tile's sum adds, and fetches them into steps of their own.

        All operands of the worker's tiles so far are on their way by then: nothing that a rank waits for
        comes from a later tile of this worker, so what the loader does not load meanwhile delays nobody.
        """
        scope, writer = self.loader, self.loader.writer
        assert total.ref is not None
        block, name = self._slot(stage, product, total)
        self.landing[id(total)] = name
        width, variable = block[1], total.results[0].type.shape[1]
        if not scope.tokens:
            writer.line("token = 0")
            scope.tokens.append("token")
        body.ops(scope, tuple(op for op in product.epilogue if op.name == "wait"))
        dim = scope.dims[variable]
        start = scope.fresh(f"{variable}_part")
        count = str(self.program.world)
        with writer.block(f"for {start} in tl.range({dim.start}, {dim.stop}, {width}):"):
            scope.dims[variable] = replace(dim, block=width, start=start)
            row, column = (a.start for a in access.axes(scope, total, total.ref)[-2:] if a)
            row = "token" if row == "0" else f"{row} + token"
            if total.get("remote"):
                ranks = range(self.program.world)
                each = [access.descriptor(scope, total.symbol, block, rank) for rank in ranks]
                args = ["ring", "step", f"({', '.join(each)})", row, column, name, "rank", count]
                writer.call("roles.fetch_remote(", args)
            else:
                # One matrix of all parts, the second rank's rows below the first's.
                parts = access.descriptor(scope, total.symbol, block)
                height = scope.expr(self.program.shape(total.symbol)[1])
                args = ["ring", "step", parts, height, row, column, name, "rank", count]
                writer.call("roles.fetch_parts(", args)
            writer.line(f"step += {self.program.world - 1}")
        scope.dims[variable] = dim

    def _slot(self, stage: Op, product: Product, total: Op) -> tuple[tuple[int, ...], str]:
        """Which tile of the ring a box of parts fits into: its block and its name."""
        assert self.ring is not None
        rows, columns = (self.loader.dims[v] for v in total.results[0].type.shape)
        dtype = str(self.program.symbols[total.symbol]["dtype"])
        depth = product.loop.args[0].name
        for number, op in enumerate(product.loads):
            block, held = self.ring.blocks[number]
            if op.results[0].type.shape != (stage.args[0].name, depth) or held != dtype:
                continue
            if rows.exact and columns.exact and columns.block % block[1] == 0:
                return block, self.ring.names[number]
        raise refuse_roles(total, "parts of a sum that are no slots of the ring")

    def _main_loop(self, product: Product) -> None:
        scope, writer = self.loader, self.loader.writer
        loop = product.loop
        ahead = announce(scope, loop)
        for op in product.loads:
            scope.define(op.results[0])
            if op.get("own") is not None:
                access.choose(scope, op)
        for dim in ahead:
            del scope.dims[dim]
        with self._steps(scope, loop):
            fetches = [access.box(scope, op) for op in product.loads]
            ring = self._shared(product, [(f.block, f.dtype) for f in fetches])
            ring.holders = ring.holders or [f.holder for f in fetches]
            writer.call("slot = roles.claim(", ["ring", "step", str(ring.bytes)])
            for fetch, name in zip(fetches, ring.names, strict=True):
                args = ["ring", "slot", fetch.source, fetch.row, fetch.column, name]
                writer.call("roles.fetch(", args)
            writer.line("step += 1")
        scope.dims.pop(loop.args[0].name, None)

    def _shared(self, product: Product, blocks: list[tuple[tuple[int, ...], str]]) -> _Ring:
        """The ring's tiles, which all stages of the launch share."""
        if self.ring is None:
            names = [self.loader.fresh(f"{op.results[0].name}_ring") for op in product.loads]
            self.ring = _Ring(names, blocks, [])
        elif self.ring.blocks != blocks:
            raise refuse_roles(
                product.loop, "stages of one launch that load tiles of different shapes"
            )
        return self.ring

    def _steps(self, scope: Scope, loop: Op):  # type: ignore[no-untyped-def]
        """The loop over the steps of a product, its variable placed."""
        variable, size, extent = loop.args[0], int(loop["tile"][0]), loop["extent"][0]
        start = f"{identifier(variable.name)}_start"
        head = f"for {start} in tl.range(0, {scope.expr(extent)}, {size}):"
        opened = scope.writer.block(head)

        class _Opened:
            def __enter__(self) -> None:
                opened.__enter__()
                place_tile(scope, variable, f"{start} // {size}", start, size, extent)

            def __exit__(self, *error: object) -> None:
                opened.__exit__(*error)  # type: ignore[arg-type]

        return _Opened()

    def _forget(self, scope: Scope) -> None:
        scope.tokens.clear()
        scope.tile = "0"
        scope.dims.clear()

    # Groups that multiply ---------------------------------------------------------------------

    def _flushed(self, stage: Op) -> bool:
        """Whether a flush stands behind a stage, where what its groups hold back is made."""
        place = self.launch.body.index(stage) + 1
        flush = self.launch.body[place] if place < len(self.launch.body) else stage
        return flush.name == "flush"

    def _check_flushes(self) -> None:
        """Raises CannotEmit for a flush that does not stand right behind the stage that holds back."""
        for place, op in enumerate(self.launch.body):
            if op.name != "flush":
                continue
            before = self.launch.body[place - 1] if place else op
            if not any(o.get("delay") for o in before.walk()):
                detail = "a flush that does not stand right behind the stage that holds back"
                raise refuse_roles(op, detail)

    def _multiply_stage(self, stage: Op, product: Product, flushed: bool) -> None:
        scope, writer = self.multiply, self.multiply.writer
        loop = product.loop
        steps = ceildiv(scope, loop["extent"][0], int(loop["tile"][0]))
        held = self._held(stage, product)
        with writer.block(self._queue(scope, stage)):
            if self.halves:
                self._tile(stage, product, held)
            else:
                with writer.block("if number % 2 == role:"):
                    self._tile(stage, product, held)
                writer.line("number += 1")
            writer.line(f"step += {steps}{self._landing_steps(stage, product)}")
        if held is not None and flushed:
            self._release(held)
        self._forget(scope)

    def _landing_steps(self, stage: Op, product: Product) -> str:
        """The steps that the parts of a tile's sum take beside those of its product."""
        if product.landed is None:
            return ""
        pieces = int(stage["tile"][1]) // int(product.loop["tile"][0])
        return f" + {pieces * (self.program.world - 1)}"

    def _held(self, stage: Op, product: Product) -> Held | None:
        """What a group keeps of the notify that it holds back; nothing is held back yet."""
        found = [op for op in product.epilogue if op.name == "notify" and op.get("delay")]
        if not found:
            return None
        if len(found) > 1 or found[0].get("if") is not None:
            raise refuse_roles(found[0], "more than one notify of a tile that is held back")
        held = Held.of(self.multiply, found[0])
        title = stage.symbol if stage.ref is not None else "stage"
        self.multiply.writer.line()
        self.multiply.writer.line(f"# What a group holds back of stage {title}.")
        held.begin(self.multiply)
        return held

    def _release(self, held: Held) -> None:
        """A group makes what it holds back; of two with half a tile each the first does, for both."""
        writer = self.multiply.writer
        if not self.halves:
            held.release(self.multiply, "roles")
            return
        writer.line("device.drain_tma_stores()")
        writer.line("roles.meet(pair, met)")
        writer.line("met += 1")
        with writer.block("if role == 0:"):
            held.release(self.multiply, "roles")

    def _tile(self, stage: Op, product: Product, held: Held | None) -> None:
        scope, writer = self.multiply, self.multiply.writer
        scope.tile = "q"
        decode(scope, stage, stage.args, Walk.of(stage), "q")
        self._halve(stage, product)
        if not self.halves:
            writer.line("roles.turn(turns, number)")
        self._products(stage, product)
        landed = product.landed
        if landed is not None:
            scope.landed = int(product.loop["tile"][0])
            self.pieces = int(stage["tile"][1]) // scope.landed
        kept = tuple(op for op in product.epilogue if not op.get("delay"))
        if landed is not None:  # it is the loader that waits
            kept = tuple(op for op in kept if op.name != "wait")
        if any(op.name == "wait" for top in kept for op in top.walk()):
            writer.line("token = 0")
            scope.tokens.append("token")
        if held is not None:
            self._release(held)
        epilogue.ops(scope, kept)
        scope.landed = 0
        if held is not None:
            held.keep(scope)
        scope.tokens.clear()
        scope.as_memory = False

    def _halve(self, stage: Op, product: Product) -> None:
        """From here on the rows of the tile are those of this group."""
        variable, columns = stage.args
        scope = self.multiply
        scope.grid = (variable.name, columns.name)
        if not self.halves:
            return
        dim = scope.dims[variable.name]
        self.rows = (variable.name, dim)
        block = dim.block // 2
        # Parts of a sum are masked wherever they lie: of a half without rows there is none.
        placed = (o for o in product.epilogue if not added.part_of_sum(self.program, o))
        if not dim.exact and any(_places(op, variable) for op in placed):
            raise refuse_roles(
                stage, "a tile with fewer rows in some places, whose halves go elsewhere"
            )
        start, stop = f"{identifier(variable.name)}_half", dim.stop
        scope.used.add(start)
        scope.writer.let(start, f"{dim.start} + role * {block}")
        length = str(block) if dim.exact else f"({stop} - {start})"
        stop = f"{start} + {block}" if dim.exact else stop
        scope.dims[variable.name] = Dim(block, length, dim.exact, start, stop, dim.ends)

    def _products(self, stage: Op, product: Product) -> None:
        """The main loop: products under way while the next step's tiles are waited for."""
        scope, writer, loop = self.multiply, self.multiply.writer, product.loop
        assert self.ring is not None
        rows = scope.dims[stage.args[0].name].block
        body.ops(scope, tuple(op for op in product.before if op.name != "wait"))
        writer.line("at = step")
        body.carry_in(scope, loop, 0)
        sums = [scope.names[r.name] for r in loop.results]
        dots = [op for op in loop.body if op.name == "dot"]
        with self._steps(scope, loop):
            start = f"{identifier(loop.args[0].name)}_start"
            writer.line("slot = roles.take(ring, at)")
            for op, name in zip(product.loads, self.ring.names, strict=True):
                scope.names[op.results[0].name] = text = scope.fresh(op.results[0].name)
                writer.line(f"{text} = {name}.index(slot)")
                scope.used.discard(text)
            for op in dots:
                self._dot(product, op, rows)
            made = ", ".join(scope.names[v.name] for v in loop.body[-1].operands)
            wait = f"hopper.warpgroup_mma_wait({len(dots)}, deps=[{made}])"
            writer.line(f"{', '.join(sums)} = {wait}", origin(dots[0].span))
            writer.line(f"roles.give(ring, at - 1, {start} > 0)")
            writer.line("at += 1")
        scope.dims.pop(loop.args[0].name, None)
        if not self.halves and product.landed is None:
            writer.line("roles.pass_turn(turns, number)")
        done = ", ".join(sums)
        writer.line(f"{done} = hopper.warpgroup_mma_wait(0, deps=[{done}])")
        writer.line("roles.give(ring, at - 1)")

    def _dot(self, product: Product, op: Op, rows: int) -> None:
        scope = self.multiply
        texts = []
        for number, value in enumerate(op.operands[:2]):
            load, turned = product.load_of(value)
            text = scope.names[load.results[0].name]
            if self.halves and number == 0:
                text += f".slice(role * {rows}, {rows}{', dim=1' if turned else ''})"
            texts.append(text + (".permute((1, 0))" if turned else ""))
        total_of = scope.names[op.operands[2].name]
        result = op.results[0]
        scope.names[result.name] = total_of
        args = [*texts, total_of, "is_async=True"]
        scope.writer.call(f"{total_of} = hopper.warpgroup_mma(", args)

    # The epilogue -----------------------------------------------------------------------------

    def _overrides(self) -> dict[str, Callable[[Scope, Op], None]]:
        return {
            "load": self._load,
            "load_sum": self._load_sum,
            "store": self._store,
            "notify": self._notify,
            "for_range": self._range,
            "zeros": self._fill,
            "full": self._fill,
        }

    def _fill(self, scope: Scope, op: Op) -> None:
        type_ = op.results[0].type
        blocks = scope.blocks(type_)
        if len(blocks) != 2:
            raise refuse_roles(op, "a constant tile that is no matrix")
        if op.name == "zeros" and type_.dtype == "fp32":
            body.assign(scope, op, f"roles.zeros({blocks[0]}, {blocks[1]})", frozenset())
            return
        value = body.number(op.get("value", 0))
        args = [str(b) for b in blocks] + [value]
        if type_.dtype != "fp32":
            args.append(TL_DTYPE[type_.dtype])
        body.assign(scope, op, f"roles.full({', '.join(args)})")

    def _load(self, scope: Scope, op: Op) -> None:
        """A tile of a tensor by addresses; matrices are laid out anew."""
        if op.get("own") is not None:
            raise refuse_roles(op, "a choice between two places behind the main loop")
        if added.part_of_sum(self.program, op) and not scope.as_memory:
            scope.as_products = True
            access.load(scope, op.with_attrs(wide=True))
            scope.as_products = False
            return
        access.load(scope, op.with_attrs(via=None) if op.get("via") else op)
        blocks = scope.blocks(op.results[0].type)
        if len(blocks) == 2 and not scope.as_memory:
            name = scope.names[op.results[0].name]
            scope.writer.line(f"{name} = roles.from_memory({name}, {blocks[1]})")

    def _load_sum(self, scope: Scope, op: Op) -> None:
        """A sum over ranks; from here on tiles lie as the parts in memory are loaded."""
        if not op.operands:
            raise refuse_roles(op, "a sum behind the main loop whose own part is not the product")
        own = op.operands[0]
        if any(len(v.type.shape) for v in self._made_before(op) if v.name != own.name):
            raise refuse_roles(op, "tiles from before a sum that are used behind it")
        if scope.landed:
            self._sum_landed(scope, op)
            return
        name = scope.fresh(f"{scope.names[own.name]}_out")
        width = scope.blocks(own.type)[1]
        scope.writer.line(f"{name} = roles.to_memory({scope.names[own.name]}, {width})")
        kept, scope.names[own.name] = scope.names[own.name], name
        scope.as_memory = True
        sums.load_sum(scope, op)
        scope.names[own.name] = kept

    def _sum_landed(self, scope: Scope, op: Op) -> None:
        """A sum of parts that lie in the ring: some columns of it, of which the tile has several pieces.

        Where the result leaves by addresses, it is laid out for that once.
        """
        value, own = op.results[0], scope.names[op.operands[0].name]
        scope.as_memory = False
        name = scope.define(value)
        dtype, world = value.type.dtype, self.program.world
        rows, width = scope.blocks(op.operands[0].type)
        half = f"role * {rows}" if self.halves else "0"
        args = [own, "ring", "at", self.landing[id(op)], half, "rank", str(world)]
        scope.writer.call(f"{name} = roles.sum_landed(", args)
        if dtype != "fp32":
            scope.writer.line(f"{name} = {name}.to({TL_DTYPE[dtype]})")
        scope.writer.line(f"at += {world - 1}")
        self.pieces -= 1
        if not self.pieces and not self.halves:
            scope.writer.line("roles.pass_turn(turns, number)")
        if not self._boxed(op):
            scope.writer.line(f"{name} = roles.to_memory({name}, {width})")
            scope.as_memory = True

    def _boxed(self, total: Op) -> bool:
        """Whether all that is stored behind a sum leaves through TMA by way of the room."""
        for _, product in self.products:
            if total in product.epilogue:
                stores = (o for top in product.epilogue for o in top.walk() if o.name == "store")
                return all(self._leaves(op) for op in stores)
        return False

    def _leaves(self, op: Op) -> bool:
        """Whether a store can leave through TMA by way of the room that the role has."""
        dtype = self.program.symbols[op.symbol]["dtype"]
        return id(op) in self.direct and self.room is not None and self.room[1] == dtype

    def _made_before(self, op: Op) -> list[Value]:
        """Values that are used behind ``op`` and made in front of it, in the epilogue or before."""
        for _, product in self.products:
            if op in product.epilogue:
                behind = product.epilogue[product.epilogue.index(op) + 1 :]
                made = {v.name for top in (op, *behind) for o in top.walk() for v in o.results}
                used = (v for top in behind for o in top.walk() for v in o.operands)
                return [v for v in used if v.name not in made]
        raise refuse_roles(op, "a sum inside of a loop behind the main loop")

    def _make_room(self) -> None:
        """Shared memory by way of which tiles leave, as wide as the ring leaves space for.

        Where it leaves too little, sums over ranks are made of smaller pieces of a tile.
        """
        for stage, product in self.products:
            self._direct(stage, product)
        each = epilogue.role_each(self.program.world)
        left = self._room_for(each)
        while left < 0 and each > epilogue.LEAST_ROLE_EACH:
            each //= 2
            left = self._room_for(each)
        self.multiply.each = each
        if left < 0:
            need = SHARED_LIMIT - left
            detail = (
                f"{self.slots} stages, which take {need} bytes of {SHARED_LIMIT} of shared memory"
            )
            raise refuse_roles(self.launch, detail)

    def _direct(self, stage: Op, product: Product) -> None:
        """Note the stores of a stage that can leave through TMA, for the tiles that it has."""
        scope = self.multiply
        kept = scope.writer, set(scope.used)
        scope.writer = Writer()
        decode(scope, stage, stage.args, Walk.of(stage), "q")
        self._halve(stage, product)
        stores = (o for top in product.epilogue for o in top.walk() if o.name == "store")
        self.direct |= {id(op) for op in stores if access.target(scope, op) is not None}
        scope.writer, scope.used = kept
        self._forget(scope)

    def _room_for(self, each: int) -> int:
        """Chooses the room beside sums of ``each`` elements a thread; the bytes that are left over."""
        assert self.ring is not None
        left = SHARED_LIMIT - _BARRIERS - self.slots * self.ring.bytes
        found: set[tuple[int, int, str]] = set()
        behind: set[tuple[int, int, str]] = set()  # stores of sums whose parts land in the ring
        extra, most = 0, 256  # columns of the room
        for stage, product in self.products:
            rows, columns = (int(n) for n in stage["tile"])
            rows //= 2 if self.halves else 1
            ops = [o for top in product.epilogue for o in top.walk()]
            # Behind a sum over ranks, tiles are worked on part by part.
            summed = any(op.name == "load_sum" for op in ops)
            part = rows * columns
            if any(o.name == "load" and added.part_of_sum(self.program, o) for o in ops):
                width = added.width_of(rows * len(product.loop.results), columns, GROUP_WARPS)
                most = min(most, width)
            if product.landed is not None:
                part = rows * int(product.loop["tile"][0])
                most = min(most, int(product.loop["tile"][0]))
            elif summed:
                part = min(part, each * 32 * GROUP_WARPS)
            for op in ops:
                if op.name not in ("store", "load", "load_sum") or op.ref is None:
                    continue
                dtype = str(self.program.symbols[op.symbol]["dtype"])
                value = op.operands[0] if op.name == "store" else op.results[0]
                if id(op) in self.direct and product.landed is not None:
                    behind.add((rows, columns, dtype))
                elif id(op) in self.direct and not summed:
                    found.add((rows, columns, dtype))
                elif op is product.landed or added.part_of_sum(self.program, op):
                    continue
                elif len(value.type.shape) > 1:
                    extra = max(extra, part * item_bytes(dtype))
        if not found and len(behind) == 1:
            found = behind
        elif behind - found:  # such a piece changes its layout instead
            extra = max(extra, *(r * most * item_bytes(d) for r, _, d in behind - found))
        if len(found) > 1:
            raise refuse_roles(self.launch, "stores of tiles of different shapes or types")
        left -= extra  # half of a tile each, in which it changes its layout
        if found:
            ((rows, columns, dtype),) = found
            width = min(columns, most)
            while 2 * rows * width * item_bytes(dtype) > left and width > LEAST_ROOM:
                width //= 2
            self.room = ((rows, width), dtype)
            left -= 2 * rows * width * item_bytes(dtype)
        return left

    def _store(self, scope: Scope, op: Op) -> None:
        value, ref, peer = op.operands[0], op.ref, op.get("peer")
        assert ref is not None
        decl = scope.program.symbols[ref.symbol]
        text = scope.names[value.name]
        if decl["dtype"] != value.type.dtype:
            text = f"{text}.to({TL_DTYPE[decl['dtype']]})"
        block = scope.blocks(value.type)
        if added.part_of_sum(self.program, op) and not scope.as_memory:
            # As products leave tiles, 32 bytes of a row are a sector, and no shared memory is needed. In 64 bits a
            # thread has an address a row: columns are constants in the instruction.
            scope.as_products = True
            access.scatter(scope, op.with_attrs(wide=True), text)
            scope.as_products = False
            return
        direct = self.room is not None and self.room[1] == decl["dtype"] and not scope.as_memory
        where = access.target(scope, op) if direct else None
        if where is not None and self.room is not None:
            peers = [None] if peer is None else range(scope.program.world)
            names = [access.descriptor(scope, ref.symbol, self.room[0], p) for p in peers]
            self.room_of = self.room_of or names[0]
            args = [where[0], where[1], text, "room.index(role)"]
            if peer is None:
                scope.writer.call("roles.store(", [names[0], *args])
                return
            several = f"({', '.join(names)}{',' * (len(names) == 1)})"
            scope.writer.call("roles.send(", [several, scope.expr(peer), *args])
            return
        if len(block) == 2 and not scope.as_memory:
            name = scope.fresh(f"{scope.names[value.name]}_out")
            scope.writer.line(f"{name} = roles.to_memory({text}, {block[1]})")
            text = name
        access.scatter(scope, op, text)

    def _notify(self, scope: Scope, op: Op) -> None:
        """A notify; of two groups with half a tile each the first makes it, for both."""
        if not self.halves:
            body.notify(scope, op)
            return
        self._first(scope, op, lambda: body.notify(scope, op.with_attrs(drain=None)))

    def _range(self, scope: Scope, op: Op) -> None:
        """A loop; one that tells ranks does so of the whole tile, and at once is a notify too."""
        if not self.halves or not all(o.name == "notify" for o in op.body):
            body.for_range(scope, op)
            return
        assert self.rows is not None
        name, whole = self.rows
        half, scope.dims[name] = scope.dims[name], whole
        if body.tells_ranks(scope, op):
            self._first(scope, op.body[0], lambda: body.tell_ranks(scope, op))
        else:
            body.for_range(scope, op)
        scope.dims[name] = half

    def _first(self, scope: Scope, notify: Op, tell: Callable[[], None]) -> None:
        """What the first of two groups tells, when both have stored their half of the tile."""
        writer = scope.writer
        if notify.get("drain"):
            writer.line("device.drain_tma_stores()")
        writer.line("roles.meet(pair, met)")
        writer.line("met += 1")
        with writer.block("if role == 0:"):
            tell()

    # The kernel -------------------------------------------------------------------------------

    def shared(self) -> list[str]:
        """The statements that allocate what the roles share."""
        assert self.ring is not None
        lines = [f"ring = roles.ring({self.slots}, {2 if self.halves else 1})"]
        if not self.halves:
            lines.append("turns = roles.turns()")
        elif any("roles.meet(" in line for line in self.multiply.writer.lines):
            lines.append("pair = roles.pair()")
        for name, holder in zip(self.ring.names, self.ring.holders, strict=True):
            lines.append(f"{name} = roles.tiles({holder}, {self.slots})")
        if self.room_of:
            lines.append(f"room = roles.tiles({self.room_of}, 2)")
        return lines


def _places(op: Op, variable: Value) -> bool:
    """Whether an op, or one inside, says where things are by the place of a tile's rows."""
    for inner in op.walk():
        for item in inner.ref.index if inner.ref is not None else ():
            if isinstance(item, At) and item.value.name == variable.name:
                return True
            if isinstance(item, Expr) and any(n.split(".")[0] == variable.name for n in item.names):
                return True
        for _, value in inner.attrs:
            if isinstance(value, Expr) and any(
                n.split(".")[0] == variable.name for n in value.names
            ):
                return True
    return False


def names_in(lines: list[str]) -> set[str]:
    """Words of some lines of code, without their comments."""
    return {word for text in lines for word in re.findall(r"\w+", text.split("#")[0])}
