"""Words that signal themselves, in emitted kernels: what their primitives read, write and poll.

Waits and notifies of the flags that words carry stand in no text: the loads are the waits, the stores the
notifies. :func:`stand_ins` puts them where the module's own loads and stores are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.expand_rows import Access, Expansion, Sync
from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.layout import TL_NAMES
from tilelink.backend.validate.trace import Poll, Trace
from tilelink.backend.validate.values import Data, Flow, Ints, Key, Name, Pointer, full
from tilelink.ir.layout import ENCODINGS, PAYLOAD

VECTOR = 16  # bytes of words that are stored and loaded at once where a call says so


class WordMachine(KernelMachine):
    """A kernel that may store and poll words; see :mod:`kernel`."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.full: list[
            tuple[object, ...]
        ] = []  # what was read and says by itself that it is there

    def on_device_store_words(
        self,
        words: Any,
        epoch: Any,
        value: Any,
        start: Any,
        step: Any,
        height: Any,
        width: Any,
        vector: Any,
    ) -> None:
        """``device.store_words``."""
        symbol, home = self.tagged(words)
        if self.layout.declared[symbol]["words"] == "epoch":
            shift = epoch.of.v if isinstance(epoch, Name) and epoch.path == "epoch" else None
            if shift is None or np.any(full(shift, self.lanes)[self.on]):
                self.hazard("words are stored with another number than the epoch of the call")
        elif epoch is not None:
            self.unclear("words of four bytes that are stored with a number")
        tile = self.data(value)
        dtype = TL_NAMES[str(self.layout.declared[symbol]["dtype"])]
        if tile.rounded != dtype and (tile.rounded or dtype != "float32"):
            self.hazard(f"the tile is not converted to {dtype}, which the words of @{symbol} hold")
        if tile.form or len(tile.shape) != 2:
            self.unclear("a store of words that is no tile of two axes")
        lo, hi, axes = self.box(
            symbol, self.number(start).v, step, tile.shape, height, width, vector
        )
        self.write(symbol, "generic", self.on, home, lo, hi, tile.flows, axes)
        self.trace.next()  # a notify that these words carry stands here

    def on_device_load_words(
        self,
        ctx: Any,
        words: Any,
        start: Any,
        step: Any,
        shape: Any,
        dtype: Any,
        height: Any,
        width: Any,
        vector: Any,
        flag: Any,
        producer: Any,
        tile: Any,
        wait: Any,
    ) -> Data:
        """``device.load_words``."""
        symbol = self.polled(ctx, words, dtype, tile, wait)
        sizes = self.shape(shape)
        box = self.box(symbol, self.number(start).v, step, sizes, height, width, vector)
        self.trace.next()  # a wait that these words carry stands here
        flow = self.part(symbol, box, flag, full(self.number(producer).v, self.lanes))
        key = (*self.site, symbol, 0)
        return Data(sizes, {key: flow}, (key,), rounded=self.dtype(dtype))

    def on_device_sum_words(
        self,
        ctx: Any,
        words: Any,
        start: Any,
        step: Any,
        shape: Any,
        dtype: Any,
        height: Any,
        width: Any,
        vector: Any,
        parts: Any,
        apart: Any,
        result: Any,
        flag: Any,
        flag_step: Any,
        tile: Any,
        wait: Any,
    ) -> Data:
        """``device.sum_words``: parts of all ranks in rank order."""
        symbol = self.polled(ctx, words, dtype, tile, wait)
        sizes = self.shape(shape)
        if parts != self.layout.world:
            self.hazard(f"a sum of {parts} parts of {self.layout.world} ranks")
        first, by = self.number(start).v, self.number(apart).v
        word, word_by = self.number(flag), self.number(flag_step).v
        self.trace.next()  # a wait that these words carry stands here
        flows: dict[Key, Flow] = {}
        for source in range(self.layout.world):
            at = np.asarray(first, dtype=np.int64) + source * np.asarray(by, dtype=np.int64)
            box = self.box(symbol, at, step, sizes, height, width, vector)
            shifted = replace(word, v=np.asarray(word.v) + source * np.asarray(word_by))
            flow = self.part(symbol, box, shifted, np.full(self.lanes, source, dtype=np.int64))
            if np.any((flow.lo[:, 0] != source)[flow.have]):
                self.hazard(f"the part of rank {source} is read where another one's lies")
            flows[self.site[0], self.site[1] + source, symbol, 0] = flow
        rounded = self.dtype(result)
        return Data(sizes, flows, single=rounded == "float32", rounded=rounded)

    def part(
        self, symbol: str, box: tuple[Ints, Ints, tuple[int, ...]], flag: Any, producer: Ints
    ) -> Flow:
        """One tile of words that is polled: what comes of it, named in an error record as it should be."""
        lo, hi, axes = box
        if self.layout.declared[symbol]["words"] == "sentinel":
            self.full.append(self.held(symbol, lo, hi))
        self.named(symbol, flag, producer)
        self.read(symbol, "generic", self.on, self.rank, lo, hi, None)
        return Flow(symbol, self.on & np.all(hi > lo, axis=1), self.rank, lo, hi, axes)

    def on_device_empty_words(
        self,
        words: Any,
        start: Any,
        step: Any,
        shape: Any,
        dtype: Any,
        height: Any,
        width: Any,
        vector: Any,
        parts: Any,
        apart: Any,
    ) -> None:
        """``device.empty_words``: of what loads of the same task have read, each once."""
        symbol, home = self.tagged(words)
        if self.layout.declared[symbol]["words"] != "sentinel":
            self.hazard(f"words of @{symbol} hold epochs, which nothing empties")
        if np.any((home != self.rank)[self.on]):
            self.hazard("words in memory of a peer are emptied")
        if self.dtype(dtype) != TL_NAMES[str(self.layout.declared[symbol]["dtype"])]:
            self.hazard(f"@{symbol} holds {self.layout.declared[symbol]['dtype']}")
        if not isinstance(parts, int):
            self.unclear("a number of parts that is not constant")
        sizes, first = self.shape(shape), self.number(start).v
        by = self.number(apart).v
        for part in range(parts):
            at = np.asarray(first, dtype=np.int64) + part * np.asarray(by, dtype=np.int64)
            lo, hi, _ = self.box(symbol, at, step, sizes, height, width, vector)
            held = self.held(symbol, lo, hi)
            if held not in self.full:
                self.hazard(f"words of @{symbol} are emptied that this task has not read before")
            self.full.remove(held)

    def held(self, symbol: str, lo: Ints, hi: Ints) -> tuple[object, ...]:
        """What a task has read and not emptied: the task in each lane, and the box."""
        rows = (self.on, self.segment[self.on], lo[self.on], hi[self.on])
        return (symbol, self.stage, *(row.tobytes() for row in rows))

    def start(self, arguments: Mapping[str, Any]) -> Trace:
        """As :meth:`AccessMachine.start`; what sentinels announced is empty again when the kernel ends."""
        trace = super().start(arguments)
        if self.full:
            self.hazard(f"words of @{self.full[0][0]} are read and not emptied")
        return trace

    def tagged(self, words: Any) -> tuple[str, Ints]:
        """The buffer of words that a pointer is to the first of, and whose memory it is in."""
        plain = isinstance(words, Pointer) and not words.shape and not words.tokens
        if not plain or not self.layout.declared[words.symbol].get("words"):
            self.unclear("a pointer to something that is no buffer of words")
        unit = ENCODINGS[self.layout.declared[words.symbol]["words"]].bytes
        if words.unit != unit or np.any(full(words.base, self.lanes)[self.on]):
            self.unclear("a pointer to words that is not to the first")
        return words.symbol, full(words.home, self.lanes)

    def polled(self, ctx: Any, words: Any, dtype: Any, tile: Any, wait: Any) -> str:
        """The buffer that a load polls; what it gives an error record is checked too."""
        self.context(ctx)
        self.number(tile)
        symbol, home = self.tagged(words)
        if np.any((home != self.rank)[self.on]):
            self.unclear("a read from memory of a peer")
        if self.dtype(dtype) != TL_NAMES[str(self.layout.declared[symbol]["dtype"])]:
            self.hazard(f"@{symbol} holds {self.layout.declared[symbol]['dtype']}")
        if not isinstance(wait, int):
            self.unclear("the number of a wait that is not constant")
        self.wait_names.append(wait)
        return symbol

    def named(self, symbol: str, flag: Any, producer: Ints) -> None:
        """The flag and the rank that an error record would name for a tile of words."""
        name, flat = self.element(flag, self.on)
        carried = self.layout.declared[name].get("carried")
        if carried is None or carried.symbol != symbol:
            self.hazard(
                f"words of @{symbol} are polled in the name of @{name}, which they do not carry"
            )
        lane = np.flatnonzero(self.on)
        poll = Poll(self.site, name, self.rank[lane], flat[lane], producer[lane])
        self.trace.polls.append(poll)

    def box(
        self,
        symbol: str,
        start: Any,
        step: Any,
        shape: tuple[int, ...],
        height: Any,
        width: Any,
        vector: Any,
    ) -> tuple[Ints, Ints, tuple[int, ...]]:
        """The elements of a tile of words, in all lanes: whole words, or whole pairs of them."""
        if vector not in (True, False) or len(shape) != 2:
            self.unclear("words of another form")
        item, on = self.layout.item[symbol], self.on
        (first, by) = self.subset(on, start, self.number(step).v)
        extents = []
        for size, limit in zip(shape, (height, width), strict=True):
            whole = np.full(len(first), size, dtype=np.int64)
            if limit is not None:
                (some,) = self.subset(on, self.number(limit).v)
                whole = np.clip(some, 0, whole)
            extents.append(whole)
        words = ENCODINGS[self.layout.declared[symbol]["words"]].bytes
        unit = PAYLOAD * (VECTOR // words if vector else 1)
        ends = (first * item % unit, extents[1] * item % unit, (extents[0] > 1) * by * item % unit)
        if any(np.any(e[(extents[0] > 0) & (extents[1] > 0)]) for e in ends):
            self.hazard(
                f"rows of this tile are not of whole {'vectors of ' if vector else ''}words"
            )
        steps = [by, np.ones_like(by)]
        lo, hi, axes = self.layout.box(symbol, first * item, item, extents, steps)
        live = [a for a in axes if a >= 0]
        if live != sorted(live):
            self.unclear("a tile of words across its axes")
        return self.spread(on, lo), self.spread(on, hi), axes


def stand_ins(
    expected: Expansion, accesses: list[Access], at: Callable[[Access | Sync], bool]
) -> list[Sync]:
    """The waits and notifies of an agent that words carry, in the places of the module's loads and stores.

    ``accesses``: those of the module, each with the op of the program that it was found to be. A wait stands in
    front of the load that comes next behind it in the program, a notify behind the store that comes before it.
    One that has none is left out, and missed by whoever compares.
    """
    found: list[Sync] = []
    for sync in expected.syncs:
        carried = expected.declarations[sync.symbol].get("carried")
        if carried is None or not at(sync):
            continue
        places: dict[tuple[int, int, int], int] = {}
        for access in accesses:
            if access.symbol != carried.symbol or access.write == sync.wait or not at(access):
                continue
            rows = zip(access.task.tolist(), access.home.tolist(), access.seq.tolist(), strict=True)
            for task, home, seq in rows:
                key = (task, home, id(access.op))
                better = min if sync.wait else max
                places[key] = better(places.get(key, seq), seq)
        mine: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for access in expected.accesses:
            if access.symbol == carried.symbol and access.write != sync.wait and at(access):
                rows = zip(
                    access.task.tolist(), access.home.tolist(), access.seq.tolist(), strict=True
                )
                for task, home, seq in rows:
                    mine.setdefault((task, home), []).append((seq, id(access.op)))
        kept, seqs = [], []
        rows = zip(sync.task.tolist(), sync.home.tolist(), sync.seq.tolist(), strict=True)
        for row, (task, home, seq) in enumerate(rows):
            near = sorted(mine.get((task, home), ()), reverse=not sync.wait)
            op = next((o for s, o in near if (s > seq) == sync.wait), None)
            place = places.get((task, home, op)) if op is not None else None
            if place is not None:
                kept.append(row)
                seqs.append(place + (-1 if sync.wait else 1))
        some = np.array(kept, dtype=np.int64)
        found.append(
            replace(
                sync,
                seq=np.array(seqs, dtype=np.int64),
                **{
                    name: getattr(sync, name)[some]
                    for name in ("task", "rank", "home", "flat", "bound", "through", "inside")
                },
            )
        )
    return found
