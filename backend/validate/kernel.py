"""Calls of device primitives in emitted kernels: what waits, notifies, queues and pushes mean."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.validate.accesses import AccessMachine
from tilelink.backend.validate.layout import TL_NAMES, constant
from tilelink.backend.validate.trace import FINISH, PREFIX, Signal
from tilelink.backend.validate.values import (
    Arrived,
    Context,
    Data,
    Descriptor,
    Flow,
    Ints,
    Key,
    Lattice,
    Mask,
    Name,
    Num,
    Pointer,
    Special,
    full,
)
from tilelink.ir.layout import ACK, COUNTERS, ENCODINGS, WORD

ALIGNED = 16  # bytes at a multiple of which the widest access begins


class KernelMachine(AccessMachine):
    """An emitted kernel, run by all workers of all ranks in step; see :mod:`accesses`."""

    def on_tl_program_id(self, axis: Any) -> Num:
        """``tl.program_id(0)``: the worker."""
        if axis != 0:
            self.unclear("a grid with more than one axis")
        return Num(self.worker)

    def on_tl_num_programs(self, axis: Any) -> Num:
        """``tl.num_programs(0)``."""
        if axis != 0:
            self.unclear("a grid with more than one axis")
        return Num(self.workers)

    def special(self, value: Any, name: str) -> None:
        """Refuses an argument that is not the parameter called ``name``."""
        if not isinstance(value, Special) or value.name != name:
            self.unclear(f"an argument where `{name}` belongs")

    def on_device_context(
        self, arena: Any, peers: Any, rank: Any, world: Any, progress: Any, arrival: Any
    ) -> Context:
        """``device.context``."""
        self.special(arena, "arena")
        self.special(peers, "peers")
        self.special(progress, "progress_ns")
        self.special(arrival, "arrival_ns")
        if world != self.layout.world:
            self.hazard(f"the context is for {world} ranks, the program for {self.layout.world}")
        if np.any(full(self.number(rank).v, self.lanes) != self.rank):
            self.hazard("the context is that of another rank")
        return Context()

    def _begins(self) -> None:
        """Refuses a call that some workers begin, or begin behind something else."""
        if self.begun or not self.all or self.stage != -1 or self.trace.step:
            self.hazard("not every worker begins the call, before anything else")
        self.begun = True

    def on_device_begin_call(
        self,
        arena: Any,
        peers: Any,
        rank: Any,
        world: Any,
        progress: Any,
        arrival: Any,
        program: Any,
        said: Any = None,
    ) -> Context:
        """``device.begin_call``: the context of a call that every worker of the launch begins."""
        self.special(program, "program")
        self._begins()
        self._tells(said)
        return self.on_device_context(arena, peers, rank, world, progress, arrival)

    def on_device_call_context(
        self,
        arena: Any,
        peers: Any,
        rank: Any,
        world: Any,
        progress: Any,
        arrival: Any,
        signals: Any,
    ) -> Context:
        """``device.call_context``: that of a call which every worker of every launch opens."""
        if not isinstance(signals, bool):
            self.unclear("an epoch that is taken in one way or another")
        self._begins()
        self.signals = signals
        return self.on_device_context(arena, peers, rank, world, progress, arrival)

    def _tells(self, said: Any) -> None:
        """Refuses any number for peers to compare but the value of the dynamic extent."""
        if said is not None:
            number = full(self.number(said).v, self.lanes)
            if not any(np.all(number == value) for value in self.layout.varying):
                self.hazard("the ranks compare something else than the dynamic extent")
            self.told = True

    def on_device_hear_call(self, ctx: Any) -> None:
        """``device.hear_call``: every worker, behind all that it does, waits until all peers have begun."""
        self.context(ctx)
        if not self.told or not self.all or self.agreed or self.left:
            self.hazard(
                "not every worker hears the dynamic extent of the others, once, before it leaves"
            )
        self.agreed = True

    def on_device_open_call(
        self, ctx: Any, program: Any, ack: Any, streams: Any, said: Any = None
    ) -> None:
        """``device.open_call``: every worker waits for the acknowledgements, before all that it does."""
        self.context(ctx)
        self.special(program, "program")
        if not isinstance(streams, bool):
            self.unclear("a call that opens in one way or another")
        if ack is not None and ack != ACK:
            self.hazard(f"the acknowledgements of the call before are no flags from word {ack} on")
        if not self.all or self.stage != -1 or self.trace.step or self.opened is not None:
            self.hazard("not every worker opens the call, once and before anything else")
        self.opened = (ack is not None, streams)
        self._tells(said)

    on_device_open_within = on_device_open_call

    def on_device_slot(self, ctx: Any) -> Num:
        """``device.slot``."""
        self.context(ctx)
        return Num(self.layout.SLOT)

    def on_device_of_slot(self, slot: Any, even: Any, odd: Any) -> Descriptor:
        """``device.of_slot``: of two descriptors that differ in their slot, that of the call."""
        called = isinstance(slot, Num) and not np.any(np.asarray(slot.v) != self.layout.SLOT)
        if not isinstance(even, Descriptor) or not isinstance(odd, Descriptor):
            self.unclear("a choice among what is no descriptor")
        if not called or (even.slot, odd.slot) != (0, 1):
            self.hazard("the descriptor is not chosen by the slot of the call")
        if replace(even, slot=None) != replace(odd, slot=None):
            self.hazard("descriptors of different places are taken for the two slots of one")
        return replace(even, slot=None)

    def on_device_spoil(self, ctx: Any, host: Any, out: Any, size: Any) -> None:
        """``device.spoil``: after an abort, by the last worker, all of an output."""
        self.context(ctx)
        self.special(host, "host_record")
        plain = isinstance(out, Pointer) and not out.shape and not np.any(out.base)
        if not plain or not self.ended:
            self.unclear("an output is spoiled before the call has ended, or from elsewhere")
        self.by_last("an output is spoiled, after an abort,")
        count = int(np.prod(self.layout.dims[out.symbol], dtype=np.int64))
        if np.any(full(self.number(size).v, self.lanes) != count):
            self.hazard(f"after an abort a part of @{out.symbol} is spoiled")
        self.spoiled.append(out.symbol)

    def on_device_end_call(self, ctx: Any, first: Any, last: Any, slots: Any) -> Num:
        """``device.end_call``: every worker leaves, and all counters of the program are cleared."""
        final = self.on_device_finish_arrive(ctx)
        if not self.begun or slots is not (self.opened is None):
            self.hazard("a call is ended that no worker has begun, or has begun in another way")
        if (first, last) != self.layout.counter_words:
            self.hazard(f"the end of the call clears other words than {self.layout.counter_words}")
        # With slots nobody acknowledges.
        self.stage = -1 if slots else FINISH
        self.ended = True
        return final

    def by_last(self, what: str) -> None:
        """Refuses what others do than the last worker of every rank to leave."""
        if not np.array_equal(self.on, self.worker == self.workers - 1):
            self.hazard(f"{what} by others than the last worker to leave, or not on every rank")

    def attribute(self, value: Any, node: ast.Attribute) -> Any:
        """``ctx.epoch``, or a dotted name."""
        if isinstance(value, Context):
            if node.attr != "epoch":
                self.unclear(f"`{node.attr}` of the context", node)
            return Name("epoch", Num(0))
        return super().attribute(value, node)

    def other(self, op: type[ast.operator], a: Any, b: Any, node: ast.AST) -> Any:
        """``ctx.epoch + n``, or arithmetic of tiles."""
        if isinstance(a, Name) and a.path == "epoch":
            shift = self.binary(op, a.of, b, node)
            if op in (ast.Add, ast.Sub) and isinstance(shift, Num):
                return Name("epoch", shift)
        if op is ast.Add and isinstance(a, Pointer) and not isinstance(b, Pointer | Name | Special):
            self.not_covered(
                "an address whose offset is data, as of rows that an index tensor names", node
            )
        if isinstance(a, Pointer | Name | Special) or isinstance(b, Pointer | Name | Special):
            self.unclear("arithmetic with an address", node)
        return super().other(op, a, b, node)

    def on_device_pointer(self, arena: Any, offset: Any, dtype: Any) -> Pointer:
        """``device.pointer``: a place in this rank's arena."""
        self.special(arena, "arena")
        return self.arena(self.rank, offset, dtype)

    def on_device_peer_pointer(self, peers: Any, rank: Any, offset: Any, dtype: Any) -> Pointer:
        """``device.peer_pointer``: a place in the arena of a peer."""
        self.special(peers, "peers")
        home = full(self.number(rank).v, self.lanes)
        self.peer(home)
        return self.arena(home, offset, dtype)

    def peer(self, home: Ints, on: Mask | None = None) -> None:
        """Refuses a rank that does not exist."""
        on = self.on if on is None else on
        if np.any((home[on] < 0) | (home[on] >= self.layout.world)):
            self.hazard("a rank that does not exist")

    def arena(self, home: Ints, offset: Any, dtype: Any) -> Pointer:
        """A pointer to a symmetric buffer."""
        place = constant(full(self.number(offset).v, self.lanes)[self.on])
        if place is None or place % 16:
            self.unclear("an offset in the arena that is not a constant multiple of 16")
        symbol, byte = self.layout.buffer(place, self.dtype(dtype))
        words = self.layout.declared[symbol].get("words")
        unit = ENCODINGS[words].bytes if words else self.layout.item[symbol]
        return Pointer(symbol, home, byte, unit)

    def context(self, ctx: Any) -> None:
        """Refuses anything but the context."""
        if not isinstance(ctx, Context):
            self.unclear("an argument where the context belongs")

    def element(self, word: Any, on: Mask) -> tuple[str, Ints]:
        """The flag or counter of a word, and the flat elements in all lanes."""
        (words,) = self.subset(on, self.number(word).v)
        symbol, flat = self.layout.word(words)
        return symbol, self.spread(on, flat)

    def signal(self, on: Mask, symbol: str, home: Ints, flat: Ints, **facts: Any) -> int:
        """Records a wait or notify; returns its number."""
        used = {self.layout.declared[s].name for s in (symbol, facts.get("through")) if s}
        if self.ended and "counter" in used:
            self.hazard("a counter is used behind the end of the call, which has cleared it")
        lane = np.flatnonzero(on)
        seq = self.trace.next()
        # In front of a flattened loop a signal is the first act of the next task.
        self.begin(on & self.between & ((self.segment == PREFIX) | self.dirty))
        bound = full(facts.pop("bound", 1), self.lanes)[lane]
        stage = facts.pop("stage", self.next_stage())
        segment = facts.pop("segment", self.segment)
        for name in ("through_flat", "producer"):
            if facts.get(name) is not None:
                facts[name] = facts[name][lane]
        wait = facts.pop("wait")
        facts["drained"] = not wait and not self.undrained(on)
        made = Signal(
            self.site, symbol, wait, lane, stage, segment[lane], seq,
            home[lane], flat[lane], bound, last=segment[lane].copy(), **facts,
        )  # fmt: skip
        self.trace.signals.append(made)
        if wait and np.any(on & self.between):
            self.ahead.append(made)
        self.trace.passed = self.trace.passed + on
        return seq

    def waited(
        self, on: Mask, symbol: str, flat: Ints, fence: bool, wait: Any, **facts: Any
    ) -> Num:
        """A wait; its token."""
        if not on.any():
            return Num(0)
        if isinstance(wait, int):
            self.wait_names.append(wait)
        else:
            self.unclear("the number of a wait that is not constant")
        seq = self.signal(on, symbol, self.rank, flat, wait=True, fence=fence, **facts)
        self.last_wait = np.where(on, seq, self.last_wait)
        lasting = self.stage == -1 or np.any(on & self.between)
        (self.outside if lasting else self.inside)[seq] = (on.copy(), fence)
        return Num(np.zeros(self.lanes, dtype=np.int64), tokens={seq: on.copy()})

    def fenced(self, fence: Any) -> bool:
        """A constant truth value."""
        if fence is True or fence is False:
            return bool(fence)
        self.unclear("a flag that is not constant")

    def on_device_peer_tile_wait(
        self,
        ctx: Any,
        word: Any,
        epoch: Any,
        producer: Any,
        tile: Any,
        wait: Any,
        fence: Any = False,
    ) -> Num:
        """``device.peer_tile_wait``."""
        self.context(ctx)
        self.number(tile)
        if not isinstance(epoch, Name) or epoch.path != "epoch":
            self.hazard("a flag is compared with a number that is no epoch")
        shift = constant(full(epoch.of.v, self.lanes)[self.on])
        if shift not in (0, -1):
            self.hazard(f"the epoch waited for is {shift} calls away")
        symbol, flat = self.element(word, self.on)
        if self.layout.declared[symbol].name != "flag":
            self.hazard(f"@{symbol} is a counter, and is waited for as a flag")
        named = full(self.number(producer).v, self.lanes)
        return self.waited(
            self.on, symbol, flat, self.fenced(fence), wait, epoch=shift, producer=named
        )

    def on_device_consumer_tile_wait(
        self, ctx: Any, word: Any, count: Any, tile: Any, wait: Any, fence: Any = False
    ) -> Num:
        """``device.consumer_tile_wait``."""
        self.context(ctx)
        self.number(tile)
        symbol, flat = self.element(word, self.on)
        if self.layout.declared[symbol].name != "counter":
            self.hazard(f"@{symbol} is a flag, and is waited for as a counter")
        bound = self.number(count).v
        return self.waited(self.on, symbol, flat, self.fenced(fence), wait, bound=bound)

    def on_device_peer_tiles_wait(
        self,
        ctx: Any,
        word: Any,
        step: Any,
        low: Any,
        high: Any,
        epoch: Any,
        tile: Any,
        wait: Any,
        fence: Any = False,
    ) -> Num:
        """``device.peer_tiles_wait``: one wait a rank of ``low``..``high``."""
        node = self.node or ast.Pass()
        first, last = (full(self.number(v).v, self.lanes) for v in (low, high))
        if np.any((first < 0)[self.on] | (last > self.layout.world)[self.on]):
            self.hazard("a wait for a rank that does not exist")
        total, before = Num(0), (self.on, self.all)
        for peer in range(self.layout.world):
            lanes = before[0] & (first <= peer) & (peer < last)
            if not lanes.any():
                continue
            self.on, self.all = lanes, bool(lanes.all())
            by = self.binary(ast.Mult, self.number(step), Num(peer), node)
            at = self.binary(ast.Add, self.number(word), by, node)
            one = self.on_device_peer_tile_wait(ctx, at, epoch, Num(peer), tile, wait, fence)
            self.on, self.all = before
            total = self.arithmetic(ast.Add, total, one, node)
        return total

    def on_device_rank_wait(
        self, ctx: Any, word: Any, epoch: Any, wait: Any, fence: Any = False
    ) -> Num:
        """``device.rank_wait``: one wait a rank."""
        world = self.layout.world
        return self.on_device_peer_tiles_wait(ctx, word, 1, 0, world, epoch, 0, wait, fence)

    def undrained(self, on: Mask) -> bool:
        """Whether TMA stores of some of these workers may still be under way."""
        return any(np.any(lanes & on) for lanes in self.tma.values())

    def released(self, on: Mask) -> None:
        """Refuses a release behind TMA stores that may still be under way."""
        for symbol, lanes in self.tma.items():
            if symbol in self.layout.read_back and np.any(lanes & on):
                self.hazard(f"TMA stores to @{symbol} are not drained before this release")

    def on_device_drain_tma_stores(self) -> None:
        """``device.drain_tma_stores``."""
        self.tma = {s: lanes & ~self.on for s, lanes in self.tma.items()}

    def counted(self, symbol: str, system: Any) -> bool:
        """The scope of a counter's notify: system where a stream waits for it."""
        if self.layout.declared[symbol].name != "counter":
            self.hazard(f"@{symbol} is a flag, and is notified as a counter")
        wide = self.fenced(system)
        if symbol in self.streamed and not wide:
            self.hazard(f"a stream waits for @{symbol}: its notifies need system scope")
        return wide

    def on_device_producer_tile_notify(self, ctx: Any, word: Any, system: Any = False) -> None:
        """``device.producer_tile_notify``."""
        self.context(ctx)
        symbol, flat = self.element(word, self.on)
        self.released(self.on)
        self.signal(
            self.on, symbol, self.rank, flat, wait=False, system=self.counted(symbol, system)
        )

    def on_device_delayed_tile_notify(self, ctx: Any, pending: Any, system: Any = False) -> None:
        """``device.delayed_tile_notify``: for the task whose stores came last."""
        on, facts = self.held_back(ctx, pending)
        if not on.any():
            return
        symbol, flat = self.element(pending, on)
        wide = self.counted(symbol, system)
        self.signal(on, symbol, self.rank, flat, wait=False, system=wide, **facts)

    def held_back(self, ctx: Any, pending: Any) -> tuple[Mask, dict[str, Any]]:
        """The workers that hold a notify back, and for which of their tasks it is made now."""
        self.context(ctx)
        words = full(self.number(pending).v, self.lanes)
        on: Mask = self.on & (words >= 0)
        if not on.any():
            return on, {}
        if self.ended:
            # Its count would come behind the clearing of the counters, which is the next call's start.
            self.hazard("what a worker holds back is performed behind the end of the call")
        if np.any(on & (self.last_wait > self.last_write)):
            self.hazard("a notify is held back while its worker waits")
        stages, segment = (full(part, self.lanes) for part in self.stored)
        stage = constant(stages[on])
        if stage is None:
            self.unclear("workers that make notifies of different stages at once")
        if stage < 0 or np.any(segment[on] < 0):
            self.hazard("a delayed notify that follows no stores")
        if stage != self.stage:
            self.trace.flushed.add(stage)
        self.tma = {s: lanes & ~on for s, lanes in self.tma.items()}
        return on, {"delayed": True, "stage": stage, "segment": segment}

    def on_device_delayed_peer_notify(self, ctx: Any, pending: Any, peer: Any) -> None:
        """``device.delayed_peer_notify``."""
        on, facts = self.held_back(ctx, pending)
        if on.any():
            self.flagged(pending, peer, on, **facts)

    def on_device_delayed_counted_notify(
        self, ctx: Any, pending: Any, peer: Any, through: Any, count: Any
    ) -> None:
        """``device.delayed_counted_notify``."""
        on, facts = self.held_back(ctx, pending)
        if on.any():
            self.counted_flag(pending, peer, through, count, on, **facts)

    def on_device_delayed_all_notify(self, ctx: Any, pending: Any) -> None:
        """``device.delayed_all_notify``: one notify a peer."""
        on, facts = self.held_back(ctx, pending)
        for peer in range(self.layout.world) if on.any() else ():
            self.flagged(pending, Num(peer), on, **facts)

    def on_device_delayed_counted_all_notify(
        self, ctx: Any, pending: Any, through: Any, count: Any, step: Any
    ) -> None:
        """``device.delayed_counted_all_notify``: one notify a peer, each counted by a counter of its own."""
        on, facts = self.held_back(ctx, pending)
        node = self.node or ast.Pass()
        for peer in range(self.layout.world) if on.any() else ():
            shift = self.arithmetic(ast.Mult, self.number(step), Num(peer), node)
            at = self.arithmetic(ast.Add, self.number(through), shift, node)
            self.counted_flag(pending, Num(peer), at, count, on, **facts)

    def flagged(self, word: Any, peer: Any, on: Mask | None = None, **facts: Any) -> None:
        """A notify of a peer's flag, in the lanes ``on`` (None: all that run)."""
        on = self.on if on is None else on
        symbol, flat = self.element(word, on)
        if self.layout.declared[symbol].name != "flag":
            self.hazard(f"@{symbol} is a counter, and is notified as a flag")
        home = full(self.number(peer).v, self.lanes)
        self.peer(home, on)
        self.released(on)
        self.signal(on, symbol, home, flat, wait=False, **facts)

    def on_device_peer_tile_notify(self, ctx: Any, word: Any, peer: Any) -> None:
        """``device.peer_tile_notify``."""
        self.context(ctx)
        self.flagged(word, peer)

    def on_device_counted_tile_notify(
        self, ctx: Any, word: Any, peer: Any, through: Any, count: Any
    ) -> None:
        """``device.counted_tile_notify``."""
        self.context(ctx)
        self.counted_flag(word, peer, through, count, self.on)

    def counted_flag(
        self, word: Any, peer: Any, through: Any, count: Any, on: Mask, **facts: Any
    ) -> None:
        """A notify of a peer's flag that a local counter counts."""
        symbol, flat = self.element(through, on)
        if self.layout.declared[symbol].name != "counter":
            self.hazard(f"@{symbol} is a flag, and counts notifies")
        bound = self.number(count).v
        self.flagged(word, peer, on, bound=bound, through=symbol, through_flat=flat, **facts)

    def on_device_rank_notify(self, ctx: Any, word: Any) -> None:
        """``device.rank_notify``: one notify a peer."""
        self.context(ctx)
        mine = self.binary(ast.Add, self.number(word), Num(self.rank), self.node or ast.Pass())
        self.on_device_all_tile_notify(ctx, mine)

    def on_device_all_tile_notify(
        self, ctx: Any, word: Any, others: Any = False, low: Any = None, high: Any = None
    ) -> None:
        """``device.all_tile_notify``: one notify a peer."""
        self.context(ctx)
        self.each_peer(others, low, high, lambda peer: self.flagged(word, Num(peer)))

    def each_peer(self, others: Any, low: Any, high: Any, tell: Callable[[int], None]) -> None:
        """``tell`` every rank, or those from ``low`` to ``high`` (half open); with ``others``, not this one."""
        if not isinstance(others, bool) or (low is None) != (high is None):
            self.unclear("which ranks are told")
        before = self.on, self.all
        for peer in range(self.layout.world):
            lanes = before[0] & (self.rank != peer) if others else before[0]
            if low is not None:
                lanes = lanes & (self.number(low).v <= peer) & (peer < self.number(high).v)
            if lanes.any():
                self.on, self.all = lanes, bool(lanes.all())
                tell(peer)
        self.on, self.all = before

    def on_device_counted_all_tile_notify(
        self,
        ctx: Any,
        word: Any,
        through: Any,
        step: Any,
        count: Any,
        others: Any = False,
        low: Any = None,
        high: Any = None,
    ) -> None:
        """``device.counted_all_tile_notify``: one notify a peer, each counted by a counter of its own."""
        node = self.node or ast.Pass()

        def tell(peer: int) -> None:
            shift = self.arithmetic(ast.Mult, self.number(step), Num(peer), node)
            at = self.arithmetic(ast.Add, self.number(through), shift, node)
            self.on_device_counted_tile_notify(ctx, word, Num(peer), at, count)

        self.each_peer(others, low, high, tell)

    def on_device_tile_sum_parts(
        self, own: Any, parts: Any, step: Any, inside: Any, rank: Any, world: Any
    ) -> Data:
        """``device.tile_sum_parts``: the parts of all other ranks, and a tile of this one."""
        arrived = self.arrived(parts, step, inside, rank, world)
        return self.added(own, arrived, rank, world)

    def on_device_remote_tile(
        self, peers: Any, rank: Any, place: Any, corner: Any, dtype: Any, aligned: Any
    ) -> Pointer:
        """``device.remote_tile``: a place in the arena of any rank."""
        return self.remote_tile(peers, rank, place, corner, self.dtype(dtype), aligned)

    def remote_tile(
        self, peers: Any, rank: Any, place: Any, corner: Any, dtype: str, aligned: Any
    ) -> Pointer:
        """A pointer to element ``corner`` of what lies at byte ``place`` of the arena of ``rank``."""
        self.special(peers, "peers")
        home = full(self.number(rank).v, self.lanes)
        self.peer(home)
        begin = self.arena(home, place, Name(f"tl.{dtype}"))
        found = self.moved(begin, self.number(corner), self.node or ast.Pass())
        if self.fenced(aligned) and np.any(full(found.base, self.lanes)[self.on] % ALIGNED):
            self.hazard(f"a tile that is taken to begin at a multiple of {ALIGNED} bytes")
        return found

    def on_device_tile_sum_remote(
        self,
        own: Any,
        peers: Any,
        place: Any,
        corner: Any,
        offsets: Any,
        inside: Any,
        rank: Any,
        world: Any,
        aligned: Any,
    ) -> Data:
        """``device.tile_sum_remote``: the parts in the memories of all other ranks, and a tile of this one."""
        dtype = Name(f"tl.{self.data(own).rounded or 'float32'}")
        arrived = self.on_remote(peers, place, corner, offsets, inside, rank, world, aligned, dtype)
        return self.added(own, arrived, rank, world)

    def on_remote(
        self,
        peers: Any,
        place: Any,
        corner: Any,
        offsets: Any,
        inside: Any,
        rank: Any,
        world: Any,
        aligned: Any,
        dtype: Any,
    ) -> Arrived:
        """The same tile of the memory of every other rank."""
        self.among(rank, world)
        kind = self.dtype(dtype)
        flows: dict[Key, Flow] = {}
        node, before = self.node or ast.Pass(), (self.on, self.all)
        for source in range(self.layout.world):
            lanes = before[0] & (self.rank != source)
            if not lanes.any():
                continue
            self.on, self.all = lanes, bool(lanes.all())
            first = self.remote_tile(peers, Num(source), place, corner, kind, aligned)
            if not isinstance(offsets, Lattice):
                self.unclear("a tile without its offsets")
            part = self.moved(first, offsets, node)
            lo, hi, axes = self.region(part, inside, lanes)
            lanes = lanes & np.all(hi > lo, axis=1)  # a part of columns past the end reads nothing
            home = np.full(self.lanes, source, dtype=np.int64)
            self.read(part.symbol, "generic", lanes, home, lo, hi, part.tokens)
            key = (self.site[0], self.site[1] + source, part.symbol, 0)
            flows[key] = Flow(part.symbol, lanes, home, lo, hi, axes)
            self.on, self.all = before
        return Arrived(part.shape, kind, flows)

    def added(self, own: Any, arrived: Any, rank: Any, world: Any) -> Data:
        """The sum of a tile of this rank and of those of all others that have ``arrived``."""
        mine = self.data(own)
        if not isinstance(arrived, Arrived) or mine.shape != arrived.shape or mine.form:
            self.unclear("a sum of parts of other shapes")
        self.among(rank, world)
        dtype = arrived.dtype
        if dtype != "float32" and mine.rounded != dtype:
            self.hazard(f"this rank's part is not rounded to {dtype}, as the others are")
        return Data(mine.shape, {**mine.flows, **arrived.flows}, single=True)

    def among(self, rank: Any, world: Any) -> None:
        """That a sum over ranks is told which one this is, and how many there are."""
        if world != self.layout.world or np.any(full(self.number(rank).v, self.lanes) != self.rank):
            self.hazard("the sum is that of another rank, or of another number of them")

    def arrived(self, parts: Any, step: Any, inside: Any, rank: Any, world: Any) -> Arrived:
        """The tile at ``parts`` of every other rank's part."""
        if not isinstance(parts, Pointer):
            self.unclear("a sum of parts that are no addresses")
        self.among(rank, world)
        flows: dict[Key, Flow] = {}
        node, before = self.node or ast.Pass(), (self.on, self.all)
        for source in range(self.layout.world):
            lanes = before[0] & (self.rank != source)
            if not lanes.any():
                continue
            by = self.binary(ast.Mult, self.number(step), Num(source, True), node)
            self.on, self.all = lanes, bool(lanes.all())
            part = self.moved(parts, by, node)
            lo, hi, axes = self.region(part, inside, lanes)
            if np.any(full(part.home, self.lanes)[lanes] != self.rank[lanes]):
                self.unclear("a read from memory of a peer")
            lanes = lanes & np.all(hi > lo, axis=1)  # a part of columns past the end reads nothing
            if np.any((lo[:, 0] != source)[lanes]):
                self.hazard(f"the part of rank {source} is read where another one's lies")
            self.read(parts.symbol, "generic", lanes, self.rank, lo, hi, part.tokens)
            key = (self.site[0], self.site[1] + source, parts.symbol, 0)
            flows[key] = Flow(parts.symbol, lanes, self.rank, lo, hi, axes)
            self.on, self.all = before
        dtype = TL_NAMES[str(self.layout.declared[parts.symbol]["dtype"])]
        return Arrived(parts.shape, dtype, flows)

    def on_device_tile_push_data(
        self,
        source: Any,
        target: Any,
        rows: Any,
        columns: Any,
        source_stride: Any,
        target_stride: Any,
    ) -> None:
        """``device.tile_push_data``: rows of columns from here to a peer."""
        if not isinstance(source, Pointer) or not isinstance(target, Pointer):
            self.unclear("a push between things that are no addresses")
        if source.shape or target.shape or source.unit != target.unit:
            self.unclear("a push between addresses of different kinds")
        sides = []
        for pointer, stride in ((source, source_stride), (target, target_stride)):
            numbers = [self.number(v).v for v in (rows, columns, stride)]
            height, width, step = self.subset(self.on, *numbers)
            (base,) = self.subset(self.on, pointer.base)
            if np.all((step == width) | (height == 1)):
                extents, steps = [height * width], [np.ones_like(width)]
            else:
                extents, steps = [height, width], [step, np.ones_like(width)]
            lo, hi, _ = self.layout.box(pointer.symbol, base, pointer.unit, extents, steps)
            home = full(pointer.home, self.lanes)
            sides.append((self.spread(self.on, lo), self.spread(self.on, hi), home))
        if np.any(sides[0][2][self.on] != self.rank[self.on]):
            self.unclear("a read from memory of a peer")
        pair = self.trace.next()
        # A copy of its own loops: the compiler moves no load of it above an acquiring atomic.
        lo, hi, _ = sides[0]
        self.read(source.symbol, "generic", self.on, self.rank, lo, hi, None, pair)
        self.write(target.symbol, "generic", self.on, sides[1][2], *sides[1][:2], {}, (), pair)
        self.trace.pairs[pair] = self.site

    def on_device_queue_next(self, ctx: Any, word: Any) -> Num:
        """``device.queue_next``: positions in the order in which workers ask."""
        self.context(ctx)
        symbol, flat = self.element(word, self.on)
        if self.layout.declared[symbol].name != "counter":
            self.hazard(f"@{symbol} is a flag, and is used as a queue")
        if constant(flat[self.on]) is None:
            self.unclear("workers of one queue that draw from different counters")
        number = int(flat[np.flatnonzero(self.on)[0]])
        key = (self.layout.declared[symbol]["offset"] + number * WORD - COUNTERS) // WORD
        taken = self.queues.setdefault(key, np.zeros(self.layout.world, dtype=np.int64))
        self.trace.queues.add((symbol, number))
        stage = self.next_stage()
        self.trace.drawers[stage] = self.trace.drawers.get(stage, np.zeros_like(self.on)) | self.on
        place = self.ticket.copy()
        for rank in range(self.layout.world):
            lanes = np.flatnonzero(self.on & (self.rank == rank))
            drawn = taken[rank] + np.arange(len(lanes))
            place[lanes] = drawn[::-1] if self.reverse else drawn
            taken[rank] += len(lanes)
        self.ticket = place
        return Num(place)

    def on_device_finish_arrive(self, ctx: Any) -> Num:
        """``device.finish_arrive``: true for the last worker of each rank."""
        self.context(ctx)
        if (
            not self.all
            or self.stage != -1
            or self.left
            or any(n not in self.trace.segments for n in range(len(self.loops)))
        ):
            self.hazard("not every worker leaves the launch once, behind its last stage")
        self.left, self.stage = True, FINISH
        self.segment = np.zeros(self.lanes, dtype=np.int64)
        # The last to leave has acquired what all others released on their way out.
        self.tma.clear()
        return Num((self.worker == self.workers - 1).astype(np.int64))

    def on_device_finish_leave(self, ctx: Any, first: Any, last: Any) -> None:
        """``device.finish_leave``: after an abort, frees streams that wait for counters."""
        self.context(ctx)
        if self.stage != FINISH or not isinstance(first, int) or not isinstance(last, int):
            self.unclear("streams are freed before the launch is left")
        self.by_last("streams are freed, after an abort,")
        self.trace.freed.append((first, last))

    def on_device_grouped_tile(self, position: Any, rows: Any, columns: Any, group: Any) -> Any:
        """``device.grouped_tile``: see its definition."""
        q, height, width, deep = (self.number(v) for v in (position, rows, columns, group))
        node = self.node or ast.Pass()
        across = self.arithmetic(ast.Mult, deep, width, node)
        first = self.arithmetic(ast.FloorDiv, q, across, node)
        first = self.arithmetic(ast.Mult, first, deep, node)
        tall = self.extremum(np.minimum, self.arithmetic(ast.Sub, height, first, node), deep)
        inside = self.arithmetic(ast.Mod, q, across, node)
        row = self.arithmetic(ast.Mod, inside, tall, node)
        return (
            self.arithmetic(ast.Add, first, row, node),
            self.arithmetic(ast.FloorDiv, inside, tall, node),
        )
