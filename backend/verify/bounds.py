"""bounds: indices, peers, arrays and buffers fit; release/acquire: what the IR says of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tilelink.backend.expand import Ints, bytes_of, evaluate
from tilelink.backend.expand_rows import Access, Expansion
from tilelink.backend.verify.errors import BoundsError, FenceError
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.order import ancestors
from tilelink.ir import DTYPES, Op
from tilelink.ir.layout import (
    ACK,
    COUNTER_BYTES,
    COUNTERS,
    DATA,
    ENCODINGS,
    FLAG_BYTES,
    FLAGS,
    MAX_WORLD,
    PAYLOAD,
    SLOT_BYTES,
    SLOT_FLAGS,
    WORD,
)

TMA_BYTES = 16  # the boxes of a descriptor begin at a multiple of it in a row


def check_bounds(out: Expansion) -> None:
    """Raise BoundsError for an access, an element or an area that does not fit."""
    if not 1 <= out.world <= MAX_WORLD:
        raise BoundsError(
            out.program.span,
            symbol="WORLD",
            detail=f"{out.world} ranks; 1 to {MAX_WORLD} are allowed",
        )
    for access in out.accesses:
        _access(out, access)
    for sync in out.syncs:
        bad = np.flatnonzero(~sync.inside | (sync.home < 0) | (sync.home >= out.world))
        if len(bad):
            row = int(bad[0])
            raise BoundsError(
                sync.op.span,
                symbol=sync.symbol,
                detail=f"element {int(sync.flat[row])} at rank {int(sync.home[row])} does not exist",
                notes=(out.describe(int(sync.task[row])),),
            )
        outside = np.flatnonzero(sync.through == -2)
        if len(outside):
            raise BoundsError(
                sync.op.span,
                symbol=sync.via,
                detail="the element of `through` does not exist",
                notes=(out.describe(int(sync.task[int(outside[0])])),),
            )
    _areas(out)
    _queues(out)


def _access(out: Expansion, access: Access) -> None:
    dims = np.array(out.dims[access.symbol], dtype=np.int64)
    bad = np.any((access.lo < 0) | (access.hi > dims), axis=1)
    bad |= (access.home < 0) | (access.home >= out.world)
    declared = out.declarations[access.symbol]
    remote = access.home != access.rank
    detail = "it reaches past the end"
    shared = declared.name == "buffer" and declared.get("space") == "symmetric"
    if not bad.any() and not shared:
        bad, detail = remote, "a peer may touch symmetric buffers only"
    if not bad.any():
        if access.write and declared.get("role") == "in":
            bad, detail = (
                np.ones(len(access.task), dtype=bool),
                "it is an input, which nobody writes",
            )
        else:
            _offsets(out, access, dims)
            _places(out, access)
            _whole_words(out, access)
            if access.write and access.op.name == "transfer":
                _shapes(out, access)
            return
    row = int(np.flatnonzero(bad)[0])
    region = ", ".join(
        f"{a}..{b}" for a, b in zip(access.lo[row].tolist(), access.hi[row].tolist(), strict=True)
    )
    raise BoundsError(
        access.op.span,
        symbol=access.symbol,
        detail=f"{detail}: [{region}] of {tuple(dims.tolist())} on rank {int(access.home[row])}",
        notes=(out.describe(int(access.task[row])),),
    )


def _offsets(out: Expansion, access: Access, dims: Ints) -> None:
    """Elements from 2^31 on need offsets of 64 bits."""
    if access.wide or int(np.prod(dims, dtype=np.float64)) <= 1 << 31:
        return
    strides = np.ones(len(dims), dtype=np.int64)
    for axis in reversed(range(len(dims) - 1)):
        strides[axis] = strides[axis + 1] * dims[axis + 1]
    last = (access.hi - 1) @ strides
    row = int(np.argmax(last))
    if last[row] >= 1 << 31:
        raise BoundsError(
            access.op.span,
            symbol=access.symbol,
            detail=f"element {int(last[row])} is reached with offsets of 32 bits (`wide = true` is missing)",
            notes=(out.describe(int(access.task[row])),),
        )


def _places(out: Expansion, access: Access) -> None:
    """What goes through TMA begins at a multiple of 16 bytes of a row: the hardware takes nothing else.

    The library chooses a kernel for the operands that it is given, wherever they begin.
    """
    if not access.tma or not len(access.task):
        return
    agent = out.agents[out.phases[int(out.task_phase[access.task[0]])].agent]
    if agent.get("emitter") == "library":
        return
    begins = access.lo[:, -1] * DTYPES[out.declarations[access.symbol]["dtype"]]
    bad = np.flatnonzero(begins % TMA_BYTES)
    if len(bad):
        row = int(bad[0])
        raise BoundsError(
            access.op.span,
            symbol=access.symbol,
            detail=f"through TMA it begins {int(begins[row])} bytes into a row, no multiple of {TMA_BYTES}",
            notes=(out.describe(int(access.task[row])),),
        )


def _whole_words(out: Expansion, access: Access) -> None:
    """Words that signal themselves are written and read whole."""
    declared = out.declarations[access.symbol]
    if not declared.get("words"):
        return
    size = DTYPES[declared["dtype"]]
    length = out.dims[access.symbol][-1] * size
    if length % PAYLOAD:
        raise BoundsError(
            declared.span,
            symbol=access.symbol,
            detail=f"its rows, {length} bytes each, are not whole words",
        )
    ends = np.column_stack((access.lo[:, -1], access.hi[:, -1])) * size
    bad = np.flatnonzero((ends % PAYLOAD).any(axis=1))
    if len(bad):
        row = int(bad[0])
        raise BoundsError(
            access.op.span,
            symbol=access.symbol,
            detail=f"bytes {int(ends[row, 0])} to {int(ends[row, 1])} of a row are not whole words",
            notes=(out.describe(int(access.task[row])),),
        )


def _queues(out: Expansion) -> None:
    """A dynamic queue counts its positions on a cleared counter word of its own."""
    taken: dict[tuple[str | int, ...], Op] = {}
    after = ancestors(out)
    used = {s.symbol for s in out.syncs} | {s.via for s in out.syncs if s.via}
    for phase in out.phases:
        counter = phase.op.get("counter") if phase.kind == "stage" else None
        if counter is None:
            continue
        declared, dims = out.declarations.get(counter.symbol), out.dims.get(counter.symbol, ())
        place = [evaluate(i, out.env, phase.op) for i in counter.index]
        wrong = ""
        if declared is None or declared.name != "counter" or declared.get("cleared") is False:
            wrong = "a queue takes its positions from a counter that `head` clears"
        elif len(place) != len(dims) or any(
            not 0 <= int(i) < d for i, d in zip(place, dims, strict=True)
        ):
            wrong = "the queue's element does not exist"
        elif counter.symbol in used or (counter.symbol, *map(int, place)) in taken:
            wrong = "a queue's counter counts nothing else"
        elif not any(out.agents[n].name == "head" for n in after[phase.agent]):
            wrong = "its agent is not ordered after `head`, which clears the queue's counter"
        if wrong:
            raise BoundsError(phase.op.span, symbol=counter.symbol, detail=wrong)
        taken[counter.symbol, *map(int, place)] = phase.op


def _shapes(out: Expansion, into: Access) -> None:
    sources = [a for a in out.accesses if a.pair == into.pair and not a.write]
    source = sources[0] if sources else into
    if not sources or len(source.task) != len(into.task):
        raise BoundsError(
            into.op.span, symbol=into.symbol, detail="one side of the transfer is empty"
        )
    a, b = source.hi - source.lo, into.hi - into.lo
    few = min(a.shape[1], b.shape[1])
    tail = np.all(a[:, a.shape[1] - few :] == b[:, b.shape[1] - few :], axis=1)
    lead = np.all(a[:, : a.shape[1] - few] == 1, axis=1) & np.all(
        b[:, : b.shape[1] - few] == 1, axis=1
    )
    if not (tail & lead).all():
        row = int(np.flatnonzero(~(tail & lead))[0])
        raise BoundsError(
            into.op.span,
            symbol=into.symbol,
            detail=f"a transfer of {tuple(a[row].tolist())} into {tuple(b[row].tolist())}",
            notes=(out.describe(int(into.task[row])),),
        )
    first, last = out.declarations[source.symbol], out.declarations[into.symbol]
    if first["dtype"] != last["dtype"]:
        raise BoundsError(
            into.op.span,
            symbol=into.symbol,
            detail=f"a transfer of {first['dtype']} into {last['dtype']}",
        )


def _areas(out: Expansion) -> None:
    """Flags, counters and buffers lie in their areas, those of a slot in it, and do not overlap."""
    slots = out.program.get("slots") is not None
    taken: list[tuple[bool, int, int, Op]] = []
    for op in out.declarations.values():
        if op.name == "tensor" or op.get("offset") is None:
            continue
        begin, size = int(op["offset"]), bytes_of(op, out.env)
        end = begin + size
        if op.name == "flag" and slots:
            areas = [(FLAGS, FLAGS + SLOT_FLAGS)]
        elif op.name == "flag":
            areas = [
                (FLAGS, FLAGS + FLAG_BYTES),
                (ACK * WORD, (ACK + MAX_WORLD) * WORD),
            ]
        elif op.name == "counter":
            areas = [(COUNTERS, COUNTERS + COUNTER_BYTES)]
        elif op.get("words"):
            # Nothing but words of this encoding, lest other data be taken for an epoch, or for data that is there.
            _, area, slot = ENCODINGS[op["words"]]
            areas = [(area, area + slot)]
        else:
            shared = (DATA, SLOT_BYTES if slots else 1 << 62)
            areas = [(0, 1 << 62) if op.get("space") == "local" else shared]
        unit = 16 if op.name == "buffer" else WORD
        if begin % unit:
            raise BoundsError(
                op.span,
                symbol=op.symbol,
                detail=f"byte {begin} is not a multiple of {unit}, as the place of a {op.name} is",
            )
        if not any(lo <= begin and end <= hi for lo, hi in areas):
            raise BoundsError(
                op.span,
                symbol=op.symbol,
                detail=f"bytes {begin} to {end} are outside the area of a {op.name}",
            )
        local = op.get("space") == "local"
        room = out.program.get("workspace" if local else "bytes")
        if slots and not local and room is not None:
            # That of odd calls lies behind.
            words = op.get("words")
            room = int(room) - (ENCODINGS[words].slot if words else SLOT_BYTES)
        if op.name == "buffer" and room is not None and end > int(room):
            raise BoundsError(
                op.span,
                symbol=op.symbol,
                detail=f"it ends at byte {end} of the {int(room)} that the program asks for",
            )
        taken.append((local, begin, end, op))
    taken.sort(key=lambda t: (t[0], t[1], t[2], t[3].symbol))
    for (place, _, end, before), (other, begin, _, after) in pairwise(taken):
        if place == other and begin < end:
            raise BoundsError(
                after.span, symbol=after.symbol, detail=f"it overlaps @{before.symbol} in the arena"
            )


def check_fences(out: Expansion) -> None:
    """Raise FenceError where synchronisation cannot release or acquire as it is written.

    `head` advances the epoch and clears counters, so whatever uses either comes after it; a stream
    waits for local counters only, since no host constant carries an epoch.
    """
    after = ancestors(out)
    heads = [n for n, a in enumerate(out.agents) if a.name == "head"]
    for sync in out.syncs:
        phase = out.phases[int(out.task_phase[sync.task[0]])] if len(sync.task) else None
        if phase is None:
            continue
        if phase.kind != "head" and not (after[phase.agent] & set(heads)):
            raise FenceError(
                guarded(out, sync),
                symbol=sync.symbol,
                detail="its agent is not ordered after `head`, which sets the epoch and clears counters",
            )
        kind = out.declarations[sync.symbol].name
        if sync.wait and kind == "flag" and phase.kind == "stream":
            raise FenceError(
                guarded(out, sync), symbol=sync.symbol, detail="a stream cannot wait for an epoch"
            )
        if not sync.wait and phase.kind == "stream" and (sync.bound > 1).any():
            raise FenceError(
                guarded(out, sync), symbol=sync.symbol, detail="a stream cannot count notifies"
            )
