"""What every fused program has: its head, its queues and its way out."""

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device.dialect import axis, gluon
from tilelink.device.signal import (
    ABORT,
    ARRIVED,
    CUDA,
    EPOCH,
    MAX_WORLD,
    PROGRAM,
    RECORD,
    Context,
    _abort,
    _words,
    context,
    drain_tma_stores,
    peer_tile_wait,
    rank_notify,
    rank_wait,
)
from tilelink.ir import layout

BEGUN = tl.constexpr(layout.BEGUN)
ENDED = tl.constexpr(layout.ENDED)
EXITED = tl.constexpr(layout.EXITED)
SAID = tl.constexpr(layout.SAID)
NUMBERED = tl.constexpr(layout.NUMBERED)
RECORD_WORDS = tl.constexpr(layout.RECORD_WORDS)
ADVANCE = tl.constexpr(1 << 20)
LEAVING = tl.constexpr(layout.LEAVING)
WORDS = tl.constexpr(layout.WORDS // layout.WORD)
SLOT = tl.constexpr(layout.SLOT_WORDS // layout.WORD)
_AGE = tl.constexpr(layout.WORD_AGE)
_CLEAR = tl.constexpr(1024)


@triton.jit
def clear_words(arena, first, last):
    """Set the words [``first``, ``last``) of the arena to 0; no barrier."""
    for start in range(first, last, _CLEAR):
        words = start + axis(_CLEAR)
        tl.store(arena + words, words * 0, mask=words < last)


@triton.jit(
    do_not_specialize=["rank", "first", "last", "progress_ns", "arrival_ns", "program", "said"]
)
def head_kernel(
    arena,
    peers,
    rank,
    first,
    last,
    progress_ns,
    arrival_ns,
    ACK: tl.constexpr,
    WORLD: tl.constexpr,
    WAIT: tl.constexpr,
    SIGNALS: tl.constexpr = True,
    program=0,
    said=0,
):
    """Begin a call; one CTA. Launch ``head_kernel[(1,)](…)`` on the main stream.

    Advances the rank's epoch, tells all ranks that it has arrived, clears the counter words
    [``first``, ``last``) of the arena, and, where ``WAIT``, waits until every rank has acknowledged
    the previous epoch in the flags from word ``ACK``. ``arena``: int32 words; ``peers``: int64 table.
    ``program``: its number, for the error record. ``SIGNALS`` is false where the program has no flags:
    nobody acknowledges it, so it takes no epoch. Else ``program`` and ``said``, a number that all ranks call with,
    are left with every rank for :func:`tilelink.device.program.compare_calls`.
    """
    epoch = tl.load(arena + EPOCH)
    if SIGNALS:
        # The head alone writes both, and both alike.
        here = tl.load(arena + ARRIVED + rank)
        if here != epoch:
            lost = Context(arena, peers, rank, epoch, WORLD, progress_ns, arrival_ns)
            _abort(lost, EPOCH, here, epoch, rank, 0, 0, 4)
        epoch += 1
        tl.debug_barrier()
        tl.store(arena + EPOCH, epoch)
    tl.store(arena + EXITED, 0)
    tl.store(arena + PROGRAM, program)
    clear_words(arena, first, last)
    if SIGNALS:
        _say(peers, rank, WORLD, epoch, program, said)
    tl.debug_barrier()
    if SIGNALS:
        flags, inside = _words(peers, WORLD, ARRIVED + rank)
        value = tl.full((MAX_WORLD,), 0, tl.int32) + epoch
        tl.atomic_xchg(flags, value, mask=inside, sem="release", scope="sys")
    if WAIT:
        ctx = Context(arena, peers, rank, epoch, WORLD, progress_ns, arrival_ns)
        rank_wait(ctx, ACK, epoch - 1, 0)


@triton.jit(
    do_not_specialize=["rank", "word", "producer", "tile", "wait", "progress_ns", "arrival_ns"]
)
def wait_kernel(
    arena,
    peers,
    rank,
    word,
    producer,
    tile,
    wait,
    progress_ns,
    arrival_ns,
    WORLD: tl.constexpr,
):
    """Hold up the main stream until flag ``word`` has reached this call's epoch; one CTA.

    What stands behind it in the stream sees what ``producer`` released with the flag, by whatever path
    it reads: a kernel's start is a proxy fence. Arguments as those of :func:`head_kernel` and
    :func:`tilelink.device.peer_tile_wait`.
    """
    ctx = context(arena, peers, rank, WORLD, progress_ns, arrival_ns)
    peer_tile_wait(ctx, word, ctx.epoch, producer, tile, wait)


@triton.jit(do_not_specialize=["word"])
def notify_kernel(arena, word):
    """Release: add 1 to the local counter ``word`` behind all that the main stream has done; one CTA."""
    tl.atomic_add(arena + word, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=["rank"])
def acknowledge_kernel(arena, peers, rank, ACK: tl.constexpr, WORLD: tl.constexpr):
    """Release: flag ``ACK + rank`` of every rank becomes this call's epoch, behind all that the main
    stream has done; one CTA."""
    rank_notify(context(arena, peers, rank, WORLD, 0, 0), ACK)


@triton.jit
def _say(peers, rank, world: tl.constexpr, epoch, program, said):
    # One store a rank: whoever finds the epoch there finds the rest.
    ranks = axis(MAX_WORLD)
    slot = SAID + ((epoch & 1) * MAX_WORLD + rank) * 2
    addresses = tl.load(peers + ranks, mask=ranks < world, other=0) + slot * 4
    number = tl.cast(program * NUMBERED + said, tl.int64) & 0xFFFFFFFF
    value = (tl.cast(epoch, tl.int64) << 32) | number
    slots = addresses.to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(slots, (ranks * 0).to(tl.int64) + value, mask=ranks < world)


@triton.jit
def compare_calls(arena, peers, rank, world: tl.constexpr, epoch):
    """Stop the call where another rank is known to have begun call ``epoch``, or the one before it, as another
    program, or with another value of its dynamic extent; by any number of CTAs, at the end of the call.

    A rank that has sent all that this one waits for, yet whose word is still on its way, is found out by the next
    call. One that is a call ahead has left its next word in the slot of the other parity.
    """
    lanes = axis(2 * MAX_WORLD)
    ranks = lanes & (MAX_WORLD - 1)
    # The parity of this call and of the one before it.
    odd = lanes // MAX_WORLD
    began = epoch - ((odd ^ epoch) & 1)
    slots = (arena + SAID).to(tl.pointer_type(tl.int64), bitcast=True) + lanes
    # By atomics, of which all threads receive one result.
    nothing = (lanes * 0).to(tl.int64)
    words = tl.atomic_add(slots, nothing, mask=ranks < world, sem="relaxed", scope="sys")
    there = (ranks < world) & ((words >> 32).to(tl.int32) == began)
    numbers = words.to(tl.int32)
    own = there & (ranks == rank)
    even_number = tl.sum(tl.where(own & (odd == 0), numbers, 0), axis=0)
    odd_number = tl.sum(tl.where(own & (odd == 1), numbers, 0), axis=0)
    known = tl.sum(tl.where(own, 1 + odd, 0), axis=0)
    mine = tl.where(odd == 0, even_number, odd_number)
    compared = there & (((known >> odd) & 1) == 1)
    first = tl.min(tl.where(compared & (numbers != mine), lanes, 2 * MAX_WORLD), axis=0)
    if first < 2 * MAX_WORLD:
        seen = tl.sum(tl.where(lanes == first, numbers, 0), axis=0)
        expected = tl.where(first < MAX_WORLD, even_number, odd_number)
        ctx = Context(arena, peers, rank, epoch, world, 0, 0)
        _abort(ctx, EPOCH, expected, seen, first & (MAX_WORLD - 1), 0, 0, 5)


@triton.jit
def hear_call(ctx):
    """Wait until every rank has begun the call, by every CTA of a launch behind all that it does: so that what
    :func:`compare_calls` compares is there, where ranks that differ in it can end the call.

    The last CTA, which told the peers, waits. Those that the number keeps from leaving wait for nothing longer
    than their limit.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        rank_wait(ctx, ARRIVED, ctx.epoch, 0)


@triton.jit
def _arrive(ctx, program, said):
    # By one CTA of a call that has no head kernel.
    here = tl.load(ctx.arena + ARRIVED + ctx.rank)
    if here != ctx.epoch - 1:
        _abort(ctx, EPOCH, here, ctx.epoch - 1, ctx.rank, 0, 0, 4)
    flags, inside = _words(ctx.peers, ctx.world, ARRIVED + ctx.rank)
    value = axis(MAX_WORLD) * 0 + ctx.epoch
    if said is None:
        _say(ctx.peers, ctx.rank, ctx.world, ctx.epoch, program, 0)
        # It carries nothing: only a wait that has run out of time looks at it.
        tl.atomic_xchg(flags, value, mask=inside, sem="relaxed", scope="sys")
    else:
        _say(ctx.peers, ctx.rank, ctx.world, ctx.epoch, program, said)
        tl.debug_barrier()
        tl.atomic_xchg(flags, value, mask=inside, sem="release", scope="sys")


@triton.jit
def begin_call(
    arena, peers, rank, world: tl.constexpr, progress_ns, arrival_ns, program, said=None
):
    """The :class:`Context` of a call that has no head: by every CTA of the one launch of a program with slots.

    The epoch is the stored one plus one; :func:`end_call` stores it. The last CTA, which has the least to do,
    tells all ranks that this one has arrived. ``program``: its number. ``said``: a number that all ranks
    call with; where it is not None, they :func:`hear_call`.
    """
    before = tl.load(arena + EPOCH)
    ctx = Context(arena, peers, rank, before + 1, world, progress_ns, arrival_ns)
    _fetch_early(peers)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(arena + PROGRAM, program)
        _arrive(ctx, program, said)
    return ctx


@triton.jit
def call_context(
    arena, peers, rank, world: tl.constexpr, progress_ns, arrival_ns, SIGNALS: tl.constexpr = True
):
    """The :class:`Context` of a call that has no head kernel: in every CTA of every launch of the program.

    The epoch is that of the calls ended plus one; without flags (``SIGNALS`` is false) the call takes none.
    """
    epoch = tl.load(arena + ENDED)
    _fetch_early(peers)
    if SIGNALS:
        epoch += 1
    return Context(arena, peers, rank, epoch, world, progress_ns, arrival_ns)


@triton.jit
def open_call(
    ctx,
    program,
    ACK: tl.constexpr = None,
    STREAMS: tl.constexpr = False,
    said=None,
):
    """Do what ``head_kernel`` does: by every CTA of a call's first launch, or by a role that the others wait for.

    ``ctx``: a :func:`call_context`. Waits until every rank has acknowledged the call before in the flags from word
    ``ACK``; None where the program has no flags. The last CTA, which has the least to do, tells all ranks that
    this one has arrived, and then ``STREAMS``, if there are any, that the call has begun. Launches behind this one
    come behind it in the main stream. :func:`end_call`, or the guard behind the call, clears the counters and ends
    the epoch. ``program`` and ``said``: as in :func:`begin_call`.
    """
    _open(
        ctx.arena,
        ctx.peers,
        ctx.rank,
        ctx.epoch,
        ctx.progress_ns,
        ctx.arrival_ns,
        program,
        ctx.world,
        ACK,
        STREAMS,
        said,
    )


# A function of its own: inlined, it leaves the assembler fewer registers in kernels that need all of them.
@triton.jit(noinline=True)
def _open(
    arena,
    peers,
    rank,
    epoch,
    progress_ns,
    arrival_ns,
    program,
    world: tl.constexpr,
    ACK: tl.constexpr,
    STREAMS: tl.constexpr,
    said,
):
    ctx = Context(arena, peers, rank, epoch, world, progress_ns, arrival_ns)
    open_within(ctx, program, ACK, STREAMS, said)


@triton.jit
def open_within(ctx, program, ACK: tl.constexpr, STREAMS: tl.constexpr, said=None):
    """:func:`open_call` as a part of its caller: by a role, which has other warps than a function is made for."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(ctx.arena + PROGRAM, program)
        if ACK is not None:
            tl.store(ctx.arena + EPOCH, ctx.epoch)
            _arrive(ctx, program, said)
    if ACK is not None:
        rank_wait(ctx, ACK, ctx.epoch - 1, 0)
    if STREAMS and tl.program_id(0) == tl.num_programs(0) - 1:
        # Streams also copy the epoch, from where this CTA has stored it.
        tl.debug_barrier()
        tl.atomic_xchg(ctx.arena + BEGUN, 1, sem="release", scope="sys")


@triton.jit
def _fetch_early(peers):
    # Who has a tile to send looks up where to: the table is near by then.
    if CUDA:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [peers.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def slot(ctx):
    """The slot of this call: 0 in calls of an even epoch, 1 in those of an odd one."""
    return ctx.epoch & 1


@triton.jit
def of_slot(slot, even, odd):
    """The tensor descriptor of a call's ``slot``: that of calls of an even epoch, or of an odd one."""
    chosen = even
    if slot != 0:
        chosen = odd
    return chosen


# A function of its own, as :func:`_open` is.
@triton.jit(noinline=True)
def _compare(arena, peers, rank, world: tl.constexpr, epoch):
    compare_calls(arena, peers, rank, world, epoch)


@triton.jit
def end_call(ctx, first, last, SLOTS: tl.constexpr):
    """Leave the last stage of a call that its one launch began: by :func:`begin_call` in a program with ``SLOTS``,
    else by :func:`open_call`. The last CTA to do so clears the counter words [``first``, ``last``) and stores the
    epoch, so that the next call finds everything as this one did.

    True for that CTA, which acknowledges the call beside slots: it sees the work of all. The CTA of the highest
    number, which told the peers of the call, asks what they have told.
    """
    drain_tma_stores()
    if (ctx.world > 1) and (tl.program_id(0) == tl.num_programs(0) - 1):
        if gluon():
            # Beside roles the barriers of a function would wait for their warps too.
            compare_calls(ctx.arena, ctx.peers, ctx.rank, ctx.world, ctx.epoch)
        else:
            _compare(ctx.arena, ctx.peers, ctx.rank, ctx.world, ctx.epoch)
    tl.debug_barrier()
    # The word depends on the epoch: whoever has left has read it.
    leaving = ctx.arena + LEAVING + (ctx.epoch & 1) * 2
    if SLOTS and first >= last:
        # Nothing is cleared that others use, and nobody acknowledges: nobody waits for the stores of anybody.
        left = tl.atomic_add(leaving, 1, sem="relaxed", scope="gpu")
    else:
        left = tl.atomic_add(leaving, 1, sem="acq_rel", scope="gpu")
    final = left == tl.num_programs(0) - 1
    if left != tl.num_programs(0) - 1:
        # What this CTA stores must not land behind what the last one makes of it; see :func:`spoil`.
        tl.atomic_add(leaving + 1, 1, sem="release", scope="gpu")
    if final:
        clear_words(ctx.arena, first, last)
        tl.store(leaving, 0)
        # Of the call before, whose workers have ended.
        tl.store(ctx.arena + LEAVING + ((ctx.epoch + 1) & 1) * 2 + 1, 0)
        if SLOTS:
            tl.store(ctx.arena + EPOCH, ctx.epoch)
            if ((ctx.epoch - _AGE // 2) & (_AGE - 1)) < 2:
                _mark_words(ctx)
        else:
            tl.store(ctx.arena + ENDED, ctx.epoch)
    return final


@triton.jit
def _mark_words(ctx):
    # Of this slot, which all have read, and which nobody writes before this rank has begun the next call.
    words = (ctx.arena + WORDS + (ctx.epoch & 1) * SLOT).to(tl.pointer_type(tl.int64), bitcast=True)
    far = tl.cast(ctx.epoch ^ -2147483648, tl.int64) << 32
    for start in range(0, SLOT // 2, _CLEAR):
        tl.store(words + start + tl.arange(0, _CLEAR), tl.zeros((_CLEAR,), tl.int64) + far)


@triton.jit
def spoil(ctx, host, out, size):
    """By the last CTA, in place of a guard kernel: where this call was stopped, fills ``out``, ``size``
    elements, with NaN (-1 for integers), and writes 1 and the error record to pinned memory at ``host``
    (int64; 0: there is none)."""
    if tl.atomic_add(ctx.arena + ABORT, 0, sem="acquire", scope="sys") != 0:
        stored = ctx.arena + LEAVING + (ctx.epoch & 1) * 2 + 1
        missing = tl.num_programs(0) - 1
        while missing > 0:
            # All others have left, and wait for nothing.
            done = tl.atomic_add(stored, 0, sem="acquire", scope="gpu")
            missing = tl.num_programs(0) - 1 - done
        floating: tl.constexpr = out.dtype.element_ty.is_floating()
        value = float("nan") if floating else -1
        filled = (axis(_CLEAR) * 0).to(out.dtype.element_ty) + value
        filled = filled.to(out.dtype.element_ty)
        for start in range(tl.cast(0, tl.int64), size, _CLEAR):
            offsets = start + axis(_CLEAR)
            tl.store(out + offsets, filled, mask=offsets < size)
        if host != 0:
            record = host.to(tl.pointer_type(tl.int32), bitcast=True)
            words = axis(RECORD_WORDS)
            tl.store(record + 1 + words, tl.load(ctx.arena + RECORD + words))
            tl.debug_barrier()
            tl.store(record, 1)


@triton.jit
def grouped_tile(position, rows, columns, group):
    """Tile (row, column) at ``position`` of ``rows`` x ``columns`` tiles, ``group`` rows at a time."""
    width = group * columns
    first = (position // width) * group
    height = tl.minimum(rows - first, group)
    inside = position % width
    return first + inside % height, inside // height


@triton.jit
def queue_next(ctx, word):
    """The next position of the dynamic queue whose counter is ``word``, for the whole CTA."""
    return tl.atomic_add(ctx.arena + word, 1, sem="relaxed", scope="gpu")


@triton.jit
def finish_arrive(ctx):
    """Leave the last stage; true for the last CTA of the launch, which sees the work of all.

    All of them are on this GPU, so its scope will do, as for :func:`counted_tile_notify`: what that CTA then
    releases to a peer carries their work too, and none of them waits for its stores to be seen beyond this GPU.
    """
    tl.debug_barrier()
    left = tl.atomic_add(ctx.arena + EXITED, 1, sem="acq_rel", scope="gpu")
    last = left == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(ctx.arena + EXITED, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def finish_leave(ctx, first, last):
    """By the last CTA: after an abort, let streams go on that wait for counter words [first, last)."""
    if tl.atomic_add(ctx.arena + ABORT, 0, sem="relaxed", scope="sys") != 0:
        for word in range(first, last):
            tl.atomic_add(ctx.arena + word, ADVANCE, sem="release", scope="sys")
