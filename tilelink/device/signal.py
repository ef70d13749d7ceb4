"""Signals: bounded waits and releases on 32-bit words of an arena.

A flag between ranks holds an epoch and is compared cyclically; a counter is local to a rank. A wait
polls with an acquiring atomic, which one thread makes and the CTA receives, so all control flow here
is uniform. Plain loads would not be: each thread could see another value, and CTA barriers diverge.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tilelink.device.dialect import axis, threads
from tilelink.ir import layout

# The interpreter has no inline assembly and no clock.
CUDA = tl.constexpr(not triton.knobs.runtime.interpret)
EPOCH = tl.constexpr(layout.EPOCH)
ABORT = tl.constexpr(layout.ABORT)
RECORD = tl.constexpr(layout.RECORD)
CLAIM = tl.constexpr(layout.RECORD + layout.RECORD_WORDS - 1)
ARRIVED = tl.constexpr(layout.ARRIVED)
PROGRAM = tl.constexpr(layout.PROGRAM)
LOST = tl.constexpr(layout.LOST)
# Ranks over which the compiler may write out all turns of a loop that ends a wait. Those of more would stand at
# every wait, and what they need would not fit the uniform registers: there the step is the length of the grid's
# third axis, of which it does not know that it is one.
WRITTEN_OUT = tl.constexpr(4)
LOOK = tl.constexpr(256 if CUDA.value else 16)
FIRST_LOOK = tl.constexpr(
    16 if CUDA.value else 4
)  # polls before the clock and the abort word are first looked at
MAX_WORLD = tl.constexpr(layout.MAX_WORLD)
# Polls of several flags at once before they are waited for one after the other, with a limit: about 4 ms.
TOGETHER = tl.constexpr(4096 if CUDA.value else 4)
POLL_NS = tl.constexpr(16_000)  # one poll of the interpreter, about


class Context(NamedTuple):
    """What every primitive needs to know of the running call.

    ``arena`` is this rank's arena (int32 words), ``peers`` the int64 table of all arenas' addresses,
    ``rank`` and ``epoch`` int32, ``world`` a constant, ``progress_ns`` and ``arrival_ns`` the two
    limits of a wait in nanoseconds (int64).
    """

    arena: object
    peers: object
    rank: object
    epoch: object
    world: object
    progress_ns: object
    arrival_ns: object


@triton.jit
def context(arena, peers, rank, world: tl.constexpr, progress_ns, arrival_ns):
    """The :class:`Context` of this call; the epoch is what ``head`` left in the arena."""
    epoch = tl.load(arena + EPOCH)
    return Context(arena, peers, rank, epoch, world, progress_ns, arrival_ns)


@triton.jit
def _word(peers, rank, word):
    address = tl.load(peers + rank) + word * 4
    return address.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _clock(polls):
    # Each thread reads its own timer, so the largest is taken: control flow must be uniform.
    if CUDA:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;",
            "=l,r",
            [threads()],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
        return tl.max(now, axis=0)
    else:
        return tl.cast(polls, tl.int64) * POLL_NS


@triton.jit
def _fence_proxy(token):
    # What a peer wrote through the generic proxy is read by TMA, through the async proxy.
    if CUDA:
        return tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, $1;",
            "=r,r",
            [token],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return token


@triton.jit
def drain_tma_stores():
    """Wait until every TMA store of this CTA has completed, not only been read from shared memory."""
    if CUDA:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _stop_all(ctx):
    # This rank last: whoever stops waiting here signals tiles that are not there, and the peer that
    # gets such a signal must find its own abort word set.
    for step in tl.range(1, ctx.world + 1, tl.num_programs(2) if ctx.world > WRITTEN_OUT else 1):
        peer = (ctx.rank + step) % ctx.world
        tl.atomic_xchg(_word(ctx.peers, peer, ABORT), 1, sem="release", scope="sys")
    # Words of this CTA that are not what they should be come after that, by whichever thread.
    tl.debug_barrier()


@triton.jit
def _claim(ctx, word, expected, seen, producer, tile, wait, kind):
    # One record a rank: the first wait that runs out claims it.
    if tl.atomic_cas(ctx.arena + CLAIM, 0, 1, sem="acq_rel", scope="sys") == 0:
        record = ctx.arena + RECORD
        tl.store(record + 1, ctx.rank)
        tl.store(record + 2, tl.program_id(0))
        tl.store(record + 3, tile)
        tl.store(record + 4, word)
        tl.store(record + 5, expected)
        tl.store(record + 6, seen)
        tl.store(record + 7, producer)
        tl.store(record + 8, wait)
        tl.store(record + 9, kind)
        tl.store(record + 10, tl.load(ctx.arena + PROGRAM))
        tl.store(record + 11, ctx.epoch)
        tl.debug_barrier()
        tl.atomic_xchg(record, 1, sem="release", scope="sys")


@triton.jit
def _abort(ctx, word, expected, seen, producer, tile, wait, kind):
    _claim(ctx, word, expected, seen, producer, tile, wait, kind)
    _stop_all(ctx)


@triton.jit
def _absent(ctx, arrival):
    """A rank that has not started call ``arrival``, or -1."""
    found = tl.cast(-1, tl.int32)
    for peer in tl.range(0, ctx.world, tl.num_programs(2) if ctx.world > WRITTEN_OUT else 1):
        there = tl.atomic_add(ctx.arena + ARRIVED + peer, 0, sem="relaxed", scope="sys")
        found = tl.where(there - arrival < 0, peer, found)
    return found


@triton.jit
def overdue(
    ctx,
    polls,
    started,
    was_here,
    stuck,
    arrival,
    producer,
    word,
    expected,
    seen,
    tile,
    wait,
):
    """Look at the clock and at the abort word amid a wait; uniform in the CTA.

    Returns whether the wait goes on, and what the next look needs: when the limit began to count, whether the
    producer was here, and whether it is known to be held up itself (0 or 1 each); 0 before the first one. Where
    the limit is over, the error record is written and all ranks are told to stop; where this one was told, it
    tells them too. ``arrival``: the call that ``producer`` must have begun; the others go into the record.
    """
    stop = tl.atomic_add(ctx.arena + ABORT, 0, sem="acquire", scope="sys")
    going = stop != 1
    if going:
        now = _clock(polls)
        there = tl.atomic_add(ctx.arena + ARRIVED + producer, 0, sem="relaxed", scope="sys")
        here = (there - arrival >= 0).to(tl.int32)
        late = producer
        if stuck != 0:
            absent = _absent(ctx, arrival)
            here = (absent < 0).to(tl.int32)
            late = tl.where(absent < 0, producer, absent)
        if (started == 0) | (here != was_here):
            started = now
        was_here = here
        limit = tl.where(here != 0, ctx.progress_ns, ctx.arrival_ns)
        if (now - started > limit) | (stop != 0):
            if (here != 0) & (stuck == 0) & (stop == 0):
                # The producer is here, but may itself wait for a rank that is not.
                stuck = tl.cast(1, tl.int32)
            else:
                # The host has seen a rank die: it is the one that this call lacks.
                late = tl.where(stop != 0, stop - LOST, late)
                kind = tl.where(stop != 0, 3, 2 - here)
                _claim(ctx, word, expected, seen, late, tile, wait, kind)
                going = stop != stop
    if going == 0:
        # Also where this rank was told: who told it may not have come to the peers that it goes on to signal.
        _stop_all(ctx)
    return going, started, was_here, stuck


@triton.jit
def _wait(ctx, word, expected, arrival, producer, tile, wait, fence: tl.constexpr):
    flag = ctx.arena + word
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    polls = tl.cast(0, tl.int32)
    started = tl.cast(0, tl.int64)
    was_here = tl.cast(0, tl.int32)
    stuck = tl.cast(0, tl.int32)
    spinning = seen - expected < 0
    while spinning:
        # Of their bits: a long wait counts past the largest int32.
        if (polls & (LOOK - 1)) == FIRST_LOOK:
            spinning, started, was_here, stuck = overdue(
                ctx,
                polls,
                started,
                was_here,
                stuck,
                arrival,
                producer,
                word,
                expected,
                seen,
                tile,
                wait,
            )
        if spinning:
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            spinning = seen - expected < 0
        polls += 1
    # Zero whatever was seen, but the compiler does not know: loads that add it stay below the wait.
    token = tl.where(seen - expected < 0, 0, (seen - expected) >> 31)
    if fence:
        token = _fence_proxy(token)
    return token


@triton.jit
def peer_tile_wait(ctx, word, epoch, producer, tile, wait, fence: tl.constexpr = False):
    """Acquire: until flag ``word`` (a word number of the arena) has reached ``epoch`` on this rank.

    ``producer`` is the rank that raises it; ``tile`` and ``wait`` go into the error record. ``fence``
    is set where TMA reads the data. Returns a token, zero, to be added to offsets of dependent loads.
    """
    return _wait(ctx, word, epoch, epoch, producer, tile, wait, fence)


@triton.jit
def consumer_tile_wait(ctx, word, count, tile, wait, fence: tl.constexpr = False):
    """Acquire: until the local counter ``word`` has reached ``count``; returns a token like
    :func:`peer_tile_wait`."""
    return _wait(ctx, word, count, ctx.epoch, ctx.rank, tile, wait, fence)


@triton.jit
def producer_tile_notify(ctx, word, system: tl.constexpr = False):
    """Release: add 1 to the local counter ``word`` after every thread's stores.

    ``system`` is set where a stream or a copy engine reads the data, not only this kernel.
    """
    tl.debug_barrier()
    if system:
        tl.atomic_add(ctx.arena + word, 1, sem="release", scope="sys")
    else:
        tl.atomic_add(ctx.arena + word, 1, sem="release", scope="gpu")


@triton.jit
def _stored(pending):
    if CUDA:
        return tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; fence.proxy.async.global; bar.sync 0; mov.b32 $0, $1;",
            "=r,r",
            [pending],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return pending


@triton.jit
def delayed_tile_notify(ctx, pending, system: tl.constexpr = False):
    """Release: add 1 to the local counter ``pending``, a word number, for a tile stored one tile ago.

    Nothing if ``pending`` is negative. The tile's TMA stores are drained first; by now they have long
    completed. The barrier is written in assembly, because Triton stops pipelining a loop that holds
    one of its own.
    """
    if pending >= 0:
        word = _stored(pending)
        if system:
            tl.atomic_add(ctx.arena + word, 1, sem="release", scope="sys")
        else:
            tl.atomic_add(ctx.arena + word, 1, sem="release", scope="gpu")


@triton.jit
def delayed_peer_notify(ctx, pending, peer):
    """Release: as :func:`peer_tile_notify`, of flag ``pending`` of ``peer`` for a tile stored one tile ago.

    Nothing if ``pending`` is negative. A release behind stores to a peer waits until the link has taken
    them; a tile later it finds nothing to wait for.
    """
    if pending >= 0:
        word = _stored(pending)
        tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="release", scope="sys")


@triton.jit
def delayed_counted_notify(ctx, pending, peer, through, count):
    """Release: as :func:`counted_tile_notify`, for a tile stored one tile ago; see
    :func:`delayed_peer_notify`."""
    if pending >= 0:
        word = _stored(pending)
        if tl.atomic_add(ctx.arena + through, 1, sem="acq_rel", scope="gpu") == count - 1:
            tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="release", scope="sys")


@triton.jit
def peer_tile_notify(ctx, word, peer):
    """Release: flag ``word`` of ``peer`` becomes this call's epoch, after every thread's stores."""
    tl.debug_barrier()
    tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="release", scope="sys")


@triton.jit
def counted_tile_notify(ctx, word, peer, through, count):
    """Release: as :func:`peer_tile_notify`, by the ``count``-th caller of this call, counted by the
    local counter ``through``. Whoever counts last also releases what the others stored.

    All that count are on this GPU, so its scope will do for the count: causality order is transitive over
    scopes (PTX ISA, memory consistency model), and only the flag, which a peer reads, needs the system's.
    Measured: counting at system scope costs a worker 2 to 3 microseconds more a tile.
    """
    tl.debug_barrier()
    if tl.atomic_add(ctx.arena + through, 1, sem="acq_rel", scope="gpu") == count - 1:
        tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="release", scope="sys")


@triton.jit
def _words(peers, world, word):
    # Word ``word`` of every rank's arena, one element a rank, and which elements are ranks: one thread
    # a rank sends its signal, and no round trip over the link waits for another.
    ranks = axis(MAX_WORLD)
    addresses = tl.load(peers + ranks, mask=ranks < world, other=0) + word * 4
    return addresses.to(tl.pointer_type(tl.int32), bitcast=True), ranks < world


@triton.jit
def all_tile_notify(ctx, word, others: tl.constexpr = False, low=None, high=None):
    """Release: flag ``word`` of every rank becomes this call's epoch, after every thread's stores.

    ``others``: of every rank but this one. ``low``, ``high``: of the ranks from ``low`` to ``high`` (half open).
    """
    tl.debug_barrier()
    _tell_all(ctx, word, others, low, high)


@triton.jit
def counted_all_tile_notify(
    ctx, word, through, step, count, others: tl.constexpr = False, low=None, high=None
):
    """Release: as :func:`all_tile_notify`, by the ``count``-th caller of this call.

    The local counters ``through``, ``through + step``, … count for one rank each. Whoever counts last
    also releases what the others stored.
    """
    tl.debug_barrier()
    _tell_all_counted(ctx, word, through, step, count, others, low, high)


@triton.jit
def delayed_all_notify(ctx, pending):
    """Release: as :func:`all_tile_notify`, of flags ``pending`` for a tile stored one tile ago; see
    :func:`delayed_peer_notify`."""
    if pending >= 0:
        word = _stored(pending)
        _tell_all(ctx, word, False, None, None)


@triton.jit
def delayed_counted_all_notify(ctx, pending, through, count, step):
    """Release: as :func:`counted_all_tile_notify`, for a tile stored one tile ago; see
    :func:`delayed_peer_notify`."""
    if pending >= 0:
        word = _stored(pending)
        _tell_all_counted(ctx, word, through, step, count, False, None, None)


@triton.jit
def _told(inside, rank, others: tl.constexpr, low, high):
    # Of the ranks that are ``inside``, those that a notify tells.
    ranks = axis(MAX_WORLD)
    if others:
        inside = inside & (ranks != rank)
    if low is not None:
        inside = inside & (ranks >= low) & (ranks < high)
    return inside


@triton.jit
def _tell_all(ctx, word, others: tl.constexpr, low, high):
    flags, inside = _words(ctx.peers, ctx.world, word)
    inside = _told(inside, ctx.rank, others, low, high)
    value = inside.to(tl.int32) * 0 + ctx.epoch
    tl.atomic_xchg(flags, value, mask=inside, sem="release", scope="sys")


@triton.jit
def _tell_all_counted(ctx, word, through, step, count, others: tl.constexpr, low, high):
    ranks = axis(MAX_WORLD)
    one = ranks * 0 + 1
    counters = ctx.arena + through + ranks * step
    flags, inside = _words(ctx.peers, ctx.world, word)
    inside = _told(inside, ctx.rank, others, low, high)
    before = tl.atomic_add(counters, one, mask=inside, sem="acq_rel", scope="gpu")
    value = inside.to(tl.int32) * 0 + ctx.epoch
    last = inside & (before == count - 1)
    tl.atomic_xchg(flags, value, mask=last, sem="release", scope="sys")


@triton.jit
def rank_notify(ctx, word):
    """Release: flag ``word + rank`` of every rank becomes this call's epoch."""
    all_tile_notify(ctx, word + ctx.rank)


@triton.jit
def peer_tiles_wait(ctx, word, step, low, high, epoch, tile, wait, fence: tl.constexpr = False):
    """Acquire: until the flags of ranks ``low`` to ``high`` (half open) have all reached ``epoch``.

    Rank r raises flag ``word + r * step``. Returns a token like :func:`peer_tile_wait`.
    """
    ranks = axis(MAX_WORLD)
    inside = (ranks >= low) & (ranks < high)
    nothing = ranks * 0
    flags = ctx.arena + word + ranks * step
    seen = tl.atomic_add(flags, nothing, mask=inside, sem="acquire", scope="sys")
    behind = tl.sum((inside & (seen - epoch < 0)).to(tl.int32), axis=0)
    polls = tl.cast(0, tl.int32)
    while (behind != 0) & (polls < TOGETHER):
        seen = tl.atomic_add(flags, nothing, mask=inside, sem="acquire", scope="sys")
        behind = tl.sum((inside & (seen - epoch < 0)).to(tl.int32), axis=0)
        polls += 1
    token = behind >> 31
    # All flags at once; one after the other, with a limit, only where some rank is late.
    if behind != 0:
        for peer in range(low, high):
            token += peer_tile_wait(ctx, word + peer * step, epoch, peer, tile, wait)
    if fence:
        token = _fence_proxy(token)
    return token


@triton.jit
def rank_wait(ctx, word, epoch, wait, fence: tl.constexpr = False):
    """Acquire: until flags ``word`` to ``word + world`` have all reached ``epoch``; returns a token."""
    return peer_tiles_wait(ctx, word, 1, 0, ctx.world, epoch, 0, wait, fence)
