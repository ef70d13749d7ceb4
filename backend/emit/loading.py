"""The roles of a kernel that load: the loader of operands, and a fetcher of parts that have a ring of their own.

The text of decoding and waits is that of the Triton emitter. Tiles go into shared memory through TMA, into slots
that a group gives back (:mod:`tilelink.device.roles`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilelink.backend.copying import copies_of
from tilelink.backend.emit import access, added, body, forwarding
from tilelink.backend.emit.kernel import among, turned
from tilelink.backend.emit.loops import Walk, announce, decode, place_tile, total
from tilelink.backend.emit.scope import Program, Scope, item_bytes, origin, refuse_roles
from tilelink.backend.emit.text import Writer, identifier
from tilelink.backend.passes.bind_emitter import (
    Copies,
    Product,
    Unfit,
    split_copies,
    split_product,
)
from tilelink.ir import Op
from tilelink.schedules.roles import HALVES


@dataclass(slots=True)
class Ring:
    """The tiles of one step: name, descriptor's block and bytes, in the order of the loads."""

    names: list[str]
    blocks: list[tuple[tuple[int, ...], str]]
    holders: list[str]  # a descriptor of each, which the host gives its layout

    @property
    def bytes(self) -> int:
        """Bytes of one step."""
        return sum(volume(block) * item_bytes(dtype) for block, dtype in self.blocks)


def volume(block: tuple[int, ...]) -> int:
    count = 1
    for length in block:
        count *= length
    return count


class Loading:
    """Writes the roles of one launch that load; all roles share the kernel's parameters."""

    def __init__(self, program: Program, launch: Op, name: str) -> None:
        self.program, self.launch, self.name = program, launch, name
        self.halves = launch["roles"] == HALVES
        self.slots = int(launch["stages"])
        self.loader = Scope(program, Writer(), stages=self.slots)
        self.loader.used |= {"ctx", "token", "q", "step", "slot", "ring", "rank", "role", "number"}
        self.loader.used |= {"turns", "pair", "room", "met", "at", "last", "landing", "sums", "own"}
        self.loader.used |= {"orders", "taken"}
        self.loader.contracted = access.contracted(launch.body)
        self.ring: Ring | None = None
        self.landing: dict[int, str] = {}  # the tiles of the ring that parts land in, by their sum
        # Of a ring that parts have for themselves: how many boxes it has, and the box.
        self.boxes = int(launch.get("landing", 0))
        self.box: tuple[tuple[int, ...], str] | None = None
        self.box_of = ""  # its descriptor
        # Of the stages, in their order, those that multiply, and those that copy beside them.
        self.products: list[tuple[Op, Product]] = []
        self.copies: dict[int, Copies] = {}
        try:
            for stage in launch.find("stage"):
                if copies_of(stage):
                    self.copies[id(stage)] = split_copies(stage)
                else:
                    self.products.append((stage, split_product(stage)))
        except Unfit as unfit:
            raise refuse_roles(unfit.op, unfit.detail) from None
        self.fetcher = self.another()

    def another(self, **changes: Any) -> Scope:
        """The scope of another role: it shares the parameters of the loader's."""
        return replace(
            self.loader,
            writer=Writer(),
            names={},
            dims={},
            dirty={},
            literals=set(),
            tokens=[],
            chosen={},
            used=set(self.loader.used),
            **changes,
        )

    def queue(self, scope: Scope, stage: Op) -> str:
        """The head of the loop over a stage's tasks."""
        title = stage.symbol if stage.ref is not None else "stage"
        scope.writer.line()
        scope.writer.line(f"# Stage {title}.{origin(stage.span).replace('  # ', ' ')}")
        count = total(scope, stage, stage.args, Walk.of(stage))
        worker, first = "tl.program_id(0)", stage.get("first", 0)
        workers = int(self.launch["workers"])
        low, high = (int(w) for w in stage.get("workers", (0, workers)))
        step = "tl.num_programs(0)"
        name = f"{identifier(title)}_worker"
        if (low, high) != (0, workers):
            step, many = str(high - low), high - low
            turn = f"tl.program_id(0) + {(many - low - int(first)) % many}"
            # A worker that has no part in the queue comes behind its end.
            inside = among(low, high, workers)
            scope.writer.line(f"{name} = tl.where({inside}, ({turn}) % {many}, {count})")
            worker = name
        elif first:
            scope.writer.line(f"{name} = {turned(scope, first)}")
            worker = name
        # Behind a main loop that adds parts, what is the same for every tile stays inside of the loop: kept in
        # registers over the main loop, it would not fit. Nor would the addresses of other ranks' parts fit the few
        # registers of a loader, or what its waits write if they end, where groups hand sums on to other ranks.
        multiplies = scope is not self.loader and scope is not self.fetcher
        fetches = scope is (self.fetcher if self.boxes else self.loader)
        hands_on = any(op.name == "store" and op.get("peer") is not None for op in stage.walk())
        adds = any(
            (op.get("remote") and (multiplies or fetches))
            or (op.name == "load_sum" and (multiplies or (fetches and hands_on)))
            or (multiplies and added.part_of_sum(self.program, op))
            for op in stage.walk()
        )
        tail = ", disable_licm=True" if adds else ""
        return f"for q in tl.range({worker}, {count}, {step}{tail}):"

    def load_stage(self, stage: Op, product: Product) -> None:
        scope, writer = self.loader, self.loader.writer
        with writer.block(self.queue(scope, stage)):
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
                block, name = self._slot(stage, product, product.landed)
                if self.boxes:
                    self.box = block, str(self.program.symbols[product.landed.symbol]["dtype"])
                else:
                    # All operands of the worker's tiles so far are on their way: nothing that a rank waits for
                    # comes from a later tile of this worker, so what the loader does not load meanwhile delays
                    # nobody but this worker.
                    self._land(scope, product, product.landed, (block, name))
        self.forget(scope)

    def in_order(self) -> Iterator[tuple[Op, Product | Copies]]:
        """The stages of the launch, each with its parts."""
        products = {id(stage): product for stage, product in self.products}
        for stage in self.launch.find("stage"):
            yield stage, products.get(id(stage)) or self.copies[id(stage)]

    def load_stages(self) -> None:
        """The loader: what it does of every stage."""
        self.loader.writer.line("step = 0")
        if self.copies:
            self.loader.writer.line("number = 0")
        for stage, parts in self.in_order():
            if isinstance(parts, Product):
                self.load_stage(stage, parts)
            else:
                forwarding.load_stage(self.loader, self.launch, stage, parts, self.tiles())
                self.forget(self.loader)
        self.loader.writer.prune()

    def tiles(self) -> list[forwarding.Tile]:
        """What a slot of the ring holds: in front of all products, what the first of these needs."""
        ring = self.ring or self._first_ring()
        return [(name, *of) for name, of in zip(ring.names, ring.blocks, strict=True)]

    def _first_ring(self) -> Ring:
        """The ring that the first product needs, before its loads are written."""
        writer, used = self.loader.writer, set(self.loader.used)
        self.loader.writer = Writer()
        self.load_stage(*self.products[0])
        ring = self.ring
        assert ring is not None
        self.loader.writer, self.loader.used = writer, used | set(ring.names)
        return ring

    def fetch_stages(self) -> None:
        """The fetcher: it goes through the tiles that have a sum of parts, in the order of the worker's queue.

        It waits for nobody but those that store the parts, and for the groups to give back what it has fetched:
        they add up the tiles in the same order.
        """
        if not self.boxes:
            return
        scope, writer = self.fetcher, self.fetcher.writer
        scope.used |= set(self.loader.descriptors.values())
        scope.used |= {*self.loader.pointers.values(), *self.loader.buffers.values()}
        writer.line("step = 0")
        name = ""
        for stage, product in self.products:
            total = product.landed
            if total is None:
                continue
            assert self.box is not None
            name = name or scope.fresh(f"{total.symbol}_landing")
            with writer.block(self.queue(scope, stage)):
                scope.tokens.clear()
                scope.tile = "q"
                decode(scope, stage, stage.args, Walk.of(stage), "q")
                self._land(scope, product, total, (self.box[0], name))
            self.forget(scope)
        writer.prune()

    def _land(
        self, scope: Scope, product: Product, total: Op, tiles: tuple[tuple[int, ...], str]
    ) -> None:
        """Wait for the parts that a tile's sum adds, and fetch them into steps of their own.

        ``tiles``: the box, and the tiles of the ring that it lands in.
        """
        writer, (block, name) = scope.writer, tiles
        assert total.ref is not None
        self.landing[id(total)] = name
        ring = "landing" if self.boxes else "ring"
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
                self.box_of = self.box_of or each[0]
                args = [ring, "step", f"({', '.join(each)})", row, column, name, "rank", count]
                writer.call("roles.fetch_remote(", args)
            else:
                # One matrix of all parts, the second rank's rows below the first's.
                parts = access.descriptor(scope, total.symbol, block)
                height = scope.expr(self.program.shape(total.symbol)[1])
                self.box_of = self.box_of or parts
                args = [ring, "step", parts, height, row, column, name, "rank", count]
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
            if (rows.exact or rows.held) and columns.exact and columns.block % block[1] == 0:
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
        with self.steps(scope, loop):
            fetches = [access.box(scope, op) for op in product.loads]
            ring = self._shared(product, [(f.block, f.dtype) for f in fetches])
            ring.holders = ring.holders or [f.holder for f in fetches]
            writer.call("slot = roles.claim(", ["ring", "step", str(ring.bytes)])
            for fetch, name in zip(fetches, ring.names, strict=True):
                args = ["ring", "slot", fetch.source, fetch.row, fetch.column, name]
                writer.call("roles.fetch(", args)
            writer.line("step += 1")
        scope.dims.pop(loop.args[0].name, None)

    def _shared(self, product: Product, blocks: list[tuple[tuple[int, ...], str]]) -> Ring:
        """The ring's tiles, which all stages of the launch share."""
        if self.ring is None:
            names = [self.loader.fresh(f"{op.results[0].name}_ring") for op in product.loads]
            self.ring = Ring(names, blocks, [])
        elif self.ring.blocks != blocks:
            raise refuse_roles(
                product.loop, "stages of one launch that load tiles of different shapes"
            )
        return self.ring

    def steps(self, scope: Scope, loop: Op):  # type: ignore[no-untyped-def]
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

    def forget(self, scope: Scope) -> None:
        scope.tokens.clear()
        scope.tile = "0"
        scope.dims.clear()
