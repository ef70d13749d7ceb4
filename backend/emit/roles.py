"""One ``launch`` with roles as a warp-specialised Gluon kernel: a loader, and two groups that multiply.

What stands before the main loop, its waits, and the loads of the loop are the loader's; the products, the
epilogue, its waits and notifies are those of the warp groups. They share a ring of slots
(:mod:`tilelink.device.roles`). Where the parts of a sum have a ring of their own, a fetcher waits for them and
fills it. These two are written by :mod:`tilelink.backend.emit.loading`; here are the groups. The text of decoding,
waits, epilogue and signals is that of the Triton emitter; what roles make different is who does what, and in which
layout tiles are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import gcd

from tilelink.backend.emit import access, added, body, epilogue, forwarding, sums
from tilelink.backend.emit.held import Held
from tilelink.backend.emit.kernel import open_call
from tilelink.backend.emit.loading import Loading, volume
from tilelink.backend.emit.loops import (
    Walk,
    ceildiv,
    decode,
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
from tilelink.backend.passes.bind_emitter import Product
from tilelink.ir import At, Expr, Op, Value
from tilelink.schedules.roles import LEAST_ROOM, SHARED_BYTES, SHARED_RESERVE, sent_box

LEAST_DEPTH = 16  # elements of a step of a product
GROUP_WARPS = 4
REGISTERS = (232, 40)  # of a thread of a group, and of one that loads


class Roles(Loading):
    """Writes the functions of one launch."""

    def __init__(self, program: Program, launch: Op, name: str) -> None:
        super().__init__(program, launch, name)
        self.room: tuple[tuple[int, int], str] | None = None
        self.room_of = ""
        # The rows of the whole tile, where a group has half of them.
        self.rows: tuple[str, Dim] | None = None
        self.pieces = 0  # of a tile whose parts land in a ring, still to be added up
        self.parts = 0  # boxes of such a tile; 0 once the first are taken
        self.direct: set[int] = set()  # stores that can leave through TMA, by their identity
        self.multiply = self.another(over=self._overrides(), warps=GROUP_WARPS)

    def functions(self) -> list[tuple[str, list[str]]]:
        """The bodies of the loader, of the groups that multiply, and of a fetcher, by the function's name."""
        for scope in (self.loader, self.multiply, self.fetcher):
            scope.writer.depth = 1
        # It has registers to spare for this, and all that groups do comes behind its first step.
        open_call(self.loader, self.loader.writer, self.launch)
        self.load_stages()
        self.fetch_stages()
        self.multiply.used |= {*self.loader.descriptors.values(), *self.landing.values()}
        self.multiply.used |= {*self.loader.pointers.values(), *self.loader.buffers.values()}
        self._make_room()
        self._check_flushes()
        writer = self.multiply.writer
        writer.line("step = 0")
        if not self.halves:
            writer.line("number = 0")
        if self.boxes:
            writer.line("own = 0")
        writer.let("met", "0")
        for stage, parts in self.in_order():
            if isinstance(parts, Product):
                self._multiply_stage(stage, parts, self._flushed(stage))
            else:
                forwarding.forward_stage(self.multiply, self.launch, stage, parts, self.tiles())
                self.forget(self.multiply)
        if self.multiply.program.alone:
            writer.line("device.drain_tma_stores()")  # see `device.end_call`
        writer.prune()
        found = [
            (f"{self.name}_load", self.loader.writer.lines),
            (f"{self.name}_multiply", writer.lines),
        ]
        if self.boxes:
            found.append((f"{self.name}_fetch", self.fetcher.writer.lines))
        return found

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
        with writer.block(self.queue(scope, stage)):
            if self.halves:
                self._tile(stage, product, held)
            else:
                with writer.block("if number % 2 == role:"):
                    self._tile(stage, product, held)
                writer.line("number += 1")
            if self.boxes and product.landed is not None:
                writer.line("own += 1")
                writer.line(f"step += {steps}")
            else:
                writer.line(f"step += {steps}{self._landing_steps(stage, product)}")
        if held is not None and flushed:
            self._release(held)
        self.forget(scope)

    def _landing_steps(self, stage: Op, product: Product) -> str:
        """The steps that the parts of a tile's sum take beside those of its product."""
        return f" + {self._parts(stage, product)}" if product.landed is not None else ""

    def _parts(self, stage: Op, product: Product) -> int:
        """How many boxes the parts of a tile's sum are."""
        pieces = int(stage["tile"][1]) // int(product.loop["tile"][0])
        return pieces * (self.program.world - 1)

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
            self.parts = self._parts(stage, product)
        kept = tuple(op for op in product.epilogue if not op.get("delay"))
        if landed is not None:  # it is the loader that waits, or the fetcher
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
        # Where the capacity has room for the tile, it ends with a whole one: what places a half is of its segment.
        if not (dim.exact or dim.held) and any(_places(op, variable) for op in placed):
            raise refuse_roles(
                stage, "a tile with fewer rows in some places, whose halves go elsewhere"
            )
        start, stop = f"{identifier(variable.name)}_half", dim.stop
        scope.used.add(start)
        scope.writer.let(start, f"{dim.start} + role * {block}")
        length = str(block) if dim.exact else f"({stop} - {start})"
        stop = f"{start} + {block}" if dim.exact else stop
        half = Dim(block, length, dim.exact, start, stop, dim.ends, unit=gcd(dim.unit, block))
        if dim.held:
            # A tile that is not all there lies in one segment, and so do its halves.
            half = replace(half, fits=True, held=True, live=dim.live)
        scope.dims[variable.name] = half

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
        with self.steps(scope, loop):
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
        if not self.halves and (product.landed is None or self.boxes):
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
        ring, turns = ("landing", "sums, own") if self.boxes else ("ring", "turns, number")
        if self.boxes and self.parts:
            # The other group's tile comes before: a parity tells one lap of this ring from the next, not from
            # the one behind it. It has taken all of that tile's boxes, in the order in which they were fetched.
            scope.writer.line(f"roles.turn({turns})")
            scope.writer.line(f"at = own * {self.parts}")
            self.parts = 0
        args = [own, ring, "at", self.landing[id(op)], half, "rank", str(world)]
        scope.writer.call(f"{name} = roles.sum_landed(", args)
        if dtype != "fp32":
            scope.writer.line(f"{name} = {name}.to({TL_DTYPE[dtype]})")
        scope.writer.line(f"at += {world - 1}")
        self.pieces -= 1
        if not self.pieces and not self.halves:
            scope.writer.line(f"roles.pass_turn({turns})")
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
            need = SHARED_BYTES - left
            detail = (
                f"{self.slots} stages, which take {need} bytes of {SHARED_BYTES} of shared memory"
            )
            assert self.ring is not None
            fewer = self.slots + left // self.ring.bytes
            advice = f"{fewer} stages" if fewer > 1 else self._shorter(left)
            raise refuse_roles(self.launch, detail, advice)

    def _shorter(self, left: int) -> str:
        """A depth of the steps of which two or more fit, and how many; ``left`` bytes are left as it is."""
        assert self.ring is not None
        loop = self.products[0][1].loop
        whole, depth = self.slots * self.ring.bytes + left, int(loop["tile"][0])
        shorter = depth // 2
        while shorter >= LEAST_DEPTH:
            fit = whole * depth // (self.ring.bytes * shorter)
            if fit > 1:
                return f"`--tile {loop['extent'][0]}={shorter}` and {min(fit, self.slots)} stages"
            shorter //= 2
        return "smaller tiles"

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
        self.forget(scope)

    def _room_for(self, each: int) -> int:
        """Chooses the room beside sums of ``each`` elements a thread; the bytes that are left over."""
        assert self.ring is not None
        left = SHARED_BYTES - SHARED_RESERVE - self.slots * self.ring.bytes
        if self.box is not None:
            left -= self.boxes * volume(self.box[0]) * item_bytes(self.box[1])
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
            box = self.room[0]
            if peer is not None:
                box = sent_box(box, item_bytes(decl["dtype"]))
            peers = [None] if peer is None else range(scope.program.world)
            names = [access.descriptor(scope, ref.symbol, box, p) for p in peers]
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
        if self.boxes:
            lines.append(f"landing = roles.ring({self.boxes}, 1)")
            lines.append("sums = roles.turns()")
            (name,) = set(self.landing.values())
            lines.append(f"{name} = roles.tiles({self.box_of}, {self.boxes})")
        if self.copies:
            lines.append("orders = roles.orders()")
        if self.room is not None and self.room_of:
            (rows, columns), _ = self.room
            lines.append(f"room = roles.room({self.room_of}, {rows}, {columns})")
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
