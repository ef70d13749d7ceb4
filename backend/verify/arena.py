"""reuse, beyond the same program twice: the next program on the arena, the words of flags and counters.

All programs of a group share an arena, those with slots one of their own. Another program may push to a rank
as soon as its `head` has passed, and that waits for the acknowledgements of the call before, and nothing else.
So everything that a program does to memory which peers reach must be acknowledged to every peer that could
overwrite it.
"""

from __future__ import annotations

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Access, Expansion, Sync
from tilelink.backend.verify.cover import weak
from tilelink.backend.verify.errors import MatchError, ReuseError
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.order import Elements, Order, ancestors
from tilelink.errors import Span
from tilelink.ir import Op
from tilelink.ir.layout import ACK, MAX_WORLD, WORD


def check_words(out: Expansion, words: Elements, order: Order) -> None:
    """Raise where a cleared or uncleared word, or a wait for an exact value, can go wrong."""
    raised = np.zeros(words.words, dtype=bool)
    for sync in out.syncs:
        if not sync.wait:
            raised[words.number(sync)] = True
    used = {s.symbol for s in out.syncs} | {s.via for s in out.syncs if s.via}
    for symbol, op in out.declarations.items():
        if op.name == "counter" and op.get("cleared") is False and symbol in used:
            sync = next(s for s in out.syncs if symbol in (s.symbol, s.via))
            raise MatchError(
                guarded(out, sync),
                element=f"@{symbol}",
                detail="it is not cleared: the second call starts at what the first one left",
                notes=(_row(out, sync, 0),) if len(sync.task) else (),
            )
        if op.name == "flag" and op.get("cleared"):
            _cleared(out, words, order, symbol)
    for sync in out.syncs:
        if sync.wait and sync.equal and out.declarations[sync.symbol].name == "flag":
            _equal(out, words, order, sync)


def _cleared(out: Expansion, words: Elements, order: Order, symbol: str) -> None:
    """A flag that `head` sets to 0 must be raised behind that, on whatever rank the notify is made."""
    heads = {t.rank: t for t in order.threads if out.phases[t.phase].kind == "head"}
    for sync in out.syncs:
        if sync.symbol != symbol or not len(sync.task):
            continue
        if sync.wait and sync.epoch < 0:
            raise MatchError(
                guarded(out, sync),
                element=words.name(int(words.number(sync)[0])),
                detail="`head` clears the flag, and with it the epoch of the call before",
                notes=(_row(out, sync, 0),),
            )
        if sync.wait:
            continue
        nodes = order.sync_node(sync)
        for row, (home, node) in enumerate(zip(sync.home.tolist(), nodes.tolist(), strict=True)):
            head = heads.get(home)
            if head is None or not order.before(head.node, node):
                raise MatchError(
                    guarded(out, sync),
                    element=words.name(int(words.number(sync)[row])),
                    detail=f"`head` on rank {home} clears it, and a notify that comes first is lost",
                    notes=(_row(out, sync, row), "nothing orders it behind that head"),
                )


def _equal(out: Expansion, words: Elements, order: Order, wait: Sync) -> None:
    """A flag may be compared for equality only while nobody can have raised it once more."""
    if not len(wait.task):
        return
    if wait.epoch < 0:
        detail = (
            "it is compared for equality with the epoch of the call before, which may have been "
            "of a program that does not raise it"
        )
        raise MatchError(
            guarded(out, wait), element=words.name(int(words.number(wait)[0])), detail=detail
        )
    at = words.number(wait)
    after = order.sync_node(wait) + 1
    for notify in out.syncs:
        if notify.wait or notify.symbol != wait.symbol or not len(notify.task):
            continue
        made, nodes = words.number(notify), order.sync_node(notify)
        by = np.argsort(made, kind="stable")
        begin = np.searchsorted(made[by], at, side="left")
        end = np.searchsorted(made[by], at, side="right")
        for row, (lo, hi) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
            for other in by[lo:hi].tolist():
                if order.before(int(after[row]), int(nodes[other]), call=1):
                    continue
                raise MatchError(
                    guarded(out, wait),
                    element=words.name(int(at[row])),
                    detail="it is compared for equality, but may have been raised by the next call",
                    notes=(_row(out, wait, row), f"the next call: {_row(out, notify, other)}"),
                )


def check_arena(out: Expansion, words: Elements, order: Order) -> None:
    """Raise ReuseError for what a push of the next program on the arena could meet, whichever it is."""
    shared = [
        a
        for a in out.accesses
        if out.declarations[a.symbol].name == "buffer"
        and out.declarations[a.symbol].get("space") != "local"
    ]
    flags = [s for s in out.syncs if out.declarations[s.symbol].name == "flag" and not s.wait]
    declared = [op for op in out.declarations.values() if op.name == "flag"]
    if out.world == 1:
        return
    if out.program.get("slots") is not None:
        _heard_by_all(out, words, order)
        return
    if not (shared or flags or declared):
        return
    ack = _acks(out)
    _ack_writers(out, words, ack)
    if declared:
        _everyone_hears(out, declared[0], ack)
    for access in shared:
        _behind_head(out, access)
    heard = [0] * out.world  # what rank s knows when the head of its next call has passed
    for sync in out.syncs:
        phase = out.phases[int(out.task_phase[sync.task[0]])] if len(sync.task) else None
        if sync.symbol != ack or not sync.wait or phase is None or phase.kind != "head":
            continue
        kept = order.takes(sync)
        for rank, element, takes in zip(
            sync.rank.tolist(), words.number(sync).tolist(), kept.tolist(), strict=True
        ):
            if sync.epoch == -1 and takes:
                heard[rank] |= order.reached[0][element]
    for access in shared:
        release = order.release_node(access)
        for rank in range(out.world):
            _acknowledged(out, order, access, release, rank, heard[rank], access.home)
    for sync in flags:
        if sync.symbol == ack:
            continue
        pairs = words.number(sync) * out.world + sync.rank
        _, rows = np.unique(pairs, return_index=True)
        for row in rows.tolist():
            element, writer = divmod(int(pairs[row]), out.world)
            for rank in range(out.world):
                if rank != writer and not heard[rank] >> element & 1:
                    raise ReuseError(
                        guarded(out, sync),
                        symbol=sync.symbol,
                        notes=(
                            f"the next program may use {words.name(element)} for another signal of "
                            f"rank {rank}, and this notify may land behind that one",
                            _row(out, sync, row),
                            *weak(words),
                        ),
                    )


def _heard_by_all(out: Expansion, words: Elements, order: Order) -> None:
    """In an arena of slots each rank knows, when it has ended a call, that all ranks have begun it.

    So they have ended the call before. That is asked of every program there, also of one that shares nothing: it
    takes an epoch, by which the slots of the others alternate. What a program writes on peers it writes two calls
    after whoever used the place last, with one such call in between, of whichever program: all that was done
    there is over. Only programs of this kind use the arena.
    """
    for rank in range(out.world):
        known = order.reached[0][words.call("end", rank)]
        for other in range(out.world):
            if not known >> words.call("start", other) & 1:
                flags = (s.symbol for s in out.syncs if out.declarations[s.symbol].name == "flag")
                raise ReuseError(
                    out.program.span,
                    symbol=next(flags, out.program.symbol),
                    notes=(
                        f"rank {rank} may end the call before rank {other} has begun it, and write two "
                        f"calls later what rank {other} still reads",
                        *weak(words),
                    ),
                )


def _everyone_hears(out: Expansion, flag: Op, ack: str) -> None:
    """A program with flags advances the epoch, and the head of the next program on the arena waits until
    every rank has acknowledged it: each must, to all, and each head waits for all."""
    everyone = {(home, k) for home in range(out.world) for k in range(out.world)}
    made: set[tuple[int, int]] = set()
    awaited: set[tuple[int, int]] = set()
    for sync in out.syncs:
        if sync.symbol != ack or not len(sync.task):
            continue
        pairs = set(zip(sync.home.tolist(), sync.flat.tolist(), strict=True))
        if not sync.wait:
            made |= pairs
        elif sync.epoch == -1:
            awaited |= pairs
    for found, what in ((made, "no notify acknowledges"), (awaited, "`head` does not wait for")):
        for home, k in sorted(everyone - found):
            note = f"{what} the call of rank {k} on rank {home}"
            why = "a program with flags advances the epoch, which the next program on the arena awaits"
            raise ReuseError(flag.span, symbol=ack or flag.symbol, notes=(note, why))


def _acks(out: Expansion) -> str:
    """The flag array that `head` waits for, at the acknowledgement words of the arena; "" if none."""
    for symbol, op in out.declarations.items():
        if (
            op.name == "flag"
            and op.get("offset") == ACK * WORD
            and out.dims[symbol] == (out.world,)
        ):
            return symbol
    return ""


def _ack_writers(out: Expansion, words: Elements, ack: str) -> None:
    """Word k of the acknowledgements is rank k's, in every program; nothing else lies there."""
    for symbol, op in out.declarations.items():
        offset = op.get("offset")
        inside = offset is not None and ACK * WORD <= int(offset) < (ACK + MAX_WORLD) * WORD
        if op.name == "flag" and inside and symbol != ack:
            raise ReuseError(
                op.span, symbol=symbol, notes=("its words are those of the acknowledgements",)
            )
    for sync in out.syncs:
        if sync.wait or sync.symbol != ack:
            continue
        wrong = np.flatnonzero(sync.flat != sync.rank)
        if len(wrong):
            row = int(wrong[0])
            element = words.name(int(words.number(sync)[row]))
            notes = (f"{element} belongs to rank {int(sync.flat[row])}", _row(out, sync, row))
            raise ReuseError(guarded(out, sync), symbol=ack, notes=notes)


def _behind_head(out: Expansion, access: Access) -> None:
    """Writes come after `head`: before it, a peer may still read what the call before left there.

    So does this rank's own memory, which peers may read as well as write.
    """
    if not access.write:
        return
    heads = {n for n, a in enumerate(out.agents) if a.name == "head"}
    after = ancestors(out)
    for number in np.unique(out.task_phase[access.task]).tolist():
        phase = out.phases[number]
        if phase.kind != "head" and not after[phase.agent] & heads:
            row = int(np.flatnonzero(out.task_phase[access.task] == number)[0])
            _refuse(out, access, row, "its agent does not come after `head`", access.op.span)


def _acknowledged(
    out: Expansion,
    order: Order,
    access: Access,
    release: Ints,
    rank: int,
    heard: int,
    home: Ints,
) -> None:
    """What others do to memory that ``rank`` could push to is known to its next head; to its own, at its end.

    What others read of its own memory is known to its next head too: behind that it writes there again. What
    ``rank`` does itself comes before its next call.
    """
    other = np.flatnonzero((home != rank) & (access.rank != rank))
    for node in np.unique(release[other]).tolist():
        if not order.releases[node] & heard:
            row = int(other[np.flatnonzero(release[other] == node)[0]])
            detail = f"rank {rank} has no acknowledgement of it when it begins the next call"
            _refuse(out, access, row, detail, access.op.span, weak(order.words))
    mine = np.flatnonzero((home == rank) & (access.rank != rank))
    ended = order.reached[0][order.words.call("end", rank)] if access.write else heard
    for node in np.unique(release[mine]).tolist():
        if not order.releases[node] & ended:
            row = int(mine[np.flatnonzero(release[mine] == node)[0]])
            detail = f"it may land when rank {rank} has ended the call already"
            if not access.write:
                detail = f"rank {rank} has no acknowledgement of it when it begins the next call"
            _refuse(out, access, row, detail, access.op.span, weak(order.words))


def _refuse(
    out: Expansion,
    access: Access,
    row: int,
    detail: str,
    span: Span | None,
    more: tuple[str, ...] = (),
) -> None:
    region = ", ".join(
        f"{a}..{b}" for a, b in zip(access.lo[row].tolist(), access.hi[row].tolist(), strict=True)
    )
    place = f"@{access.symbol}[{region}] of rank {int(access.home[row])}"
    raise ReuseError(
        span,
        symbol=access.symbol,
        notes=(f"{place}: {out.describe(int(access.task[row]))}", detail, *more),
    )


def _row(out: Expansion, sync: Sync, row: int) -> str:
    line = f" ({sync.op.span})" if sync.op.span is not None else ""
    return f"`{sync.op.name}` by {out.describe(int(sync.task[row]))}{line}"
