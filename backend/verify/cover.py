"""cover: every read comes after the write of what it reads, and no two accesses of a call race."""

from __future__ import annotations

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Expansion
from tilelink.backend.verify.errors import CoverError, DataflowError, RaceError
from tilelink.backend.verify.memory import Meeting
from tilelink.backend.verify.order import (
    CARRY,
    IDLE,
    MUTE,
    NOTIFY,
    VOID,
    WAIT,
    Elements,
    Order,
    blind,
    silent,
)


def where(out: Expansion, meeting: Meeting, row: int) -> str:
    """An access row in words: op, region, task, and source line."""
    access, inner = meeting.access(row)
    region = ", ".join(
        f"{a}..{b}"
        for a, b in zip(access.lo[inner].tolist(), access.hi[inner].tolist(), strict=True)
    )
    place = f"@{access.symbol}[{region}] of rank {int(access.home[inner])}"
    line = f" ({access.op.span})" if access.op.span is not None else ""
    verb = "writes" if access.write else "reads"
    return f"`{access.op.name}` {verb} {place}: {out.describe(int(access.task[inner]))}{line}"


def channels(order: Order, meeting: Meeting, row: int, *, waits: bool) -> str:
    """The elements raised after (or waited for before) an access row by its task."""
    thread = order.threads[int(order.thread_of[meeting.task[row]])]
    slot = int(meeting.node[row]) - thread.node
    if waits:
        events = [e for e in thread.events[:slot] if e[0] in (WAIT, VOID, IDLE)]
    else:
        events = [e for e in thread.events[slot:] if e[0] in (NOTIFY, MUTE, CARRY)]
    names = [order.words.name(e) + _WEAK.get(kind, "") for kind, e in events[:4]]
    return ", ".join(names) + (", …" if len(events) > 4 else "") if names else "nothing"


_WEAK = {
    VOID: " (which its notifies do not add up to)",
    MUTE: " (relaxed, without its barrier or of too small a scope: it releases nothing)",
    IDLE: " (relaxed or of too small a scope: it acquires nothing)",
    CARRY: " (carried by words: it releases nothing but them)",
}


def proxies(meeting: Meeting, first: int, second: int) -> tuple[str, ...]:
    """What the async proxy has to do with two access rows in no order; nothing where neither uses it."""
    notes = []
    if meeting.tma[first] and meeting.write[first]:
        notes.append("the store goes through TMA: it is released by a notify with `drain` only")
    if meeting.tma[second] and meeting.write[first] and not meeting.tma[first]:
        notes.append(
            "the later access goes through TMA: it sees what was acquired by the last "
            "`wait {proxy = true}` before it"
        )
    return tuple(notes)


def weak(words: Elements) -> tuple[str, ...]:
    """The synchronisation of the program that carries nothing: a missing order is likely to be there."""
    notes = []
    for sync in words.out.syncs:
        idle = len(sync.task) and (blind(words, sync) if sync.wait else silent(words, sync)).any()
        if idle:
            line = f" ({sync.op.span})" if sync.op.span is not None else ""
            what = "acquires" if sync.wait else "releases"
            why = "relaxed, or without its barrier" if sync.relaxed else "of too small a scope"
            if not sync.relaxed and not sync.gpu:
                why = "together with a weaker one"
            notes.append(f"a `{sync.op.name}` of @{sync.symbol} is {why}: it {what} nothing{line}")
    return tuple(notes[:3])


def check_cover(out: Expansion, order: Order, meeting: Meeting) -> None:
    """Raise CoverError, RaceError or (a read of what nobody writes) DataflowError."""
    access_of = meeting.source
    initial = out.declarations[meeting.symbol].get("role") in ("in", "inout")
    good = np.zeros(len(meeting.read_row), dtype=np.int64)
    np.add.at(good, meeting.pair_read[meeting.pair_order == 1], 1)
    bad = np.flatnonzero(good == 0)
    if len(bad) and not initial:
        number = _earliest(access_of, meeting.read_row, bad)
        row = int(meeting.read_row[number])
        access, _ = meeting.access(row)
        pairs = np.flatnonzero(meeting.pair_read == number)
        if len(pairs) == 0:
            raise DataflowError(
                access.op.span,
                symbol=meeting.symbol,
                detail="no rank writes it in this call",
                notes=(where(out, meeting, row), _cell(meeting, meeting.read_cell, number)),
            )
        loose = pairs[meeting.pair_order[pairs] == 0]
        writer = int(meeting.write_row[meeting.pair_write[(loose if len(loose) else pairs)[0]]])
        raise CoverError(
            access.op.span,
            symbol=meeting.symbol,
            notes=(
                where(out, meeting, row),
                where(out, meeting, writer),
                f"the channel: after the write its task notifies {channels(order, meeting, writer, waits=False)}",
                f"before the read its task waits for {channels(order, meeting, row, waits=True)}",
                *proxies(meeting, writer, row),
                *weak(order.words),
            ),
        )
    for first, second, orders in (
        (
            meeting.write_row[meeting.pair_write],
            meeting.read_row[meeting.pair_read],
            meeting.pair_order,
        ),
        (
            meeting.write_row[meeting.both_first],
            meeting.write_row[meeting.both_second],
            meeting.both_order,
        ),
    ):
        loose = np.flatnonzero(orders == 0)
        if len(loose):
            a, b = int(first[loose[0]]), int(second[loose[0]])
            raise RaceError(
                meeting.access(b)[0].op.span,
                symbol=meeting.symbol,
                notes=(
                    where(out, meeting, b),
                    where(out, meeting, a),
                    *proxies(meeting, a, b),
                    *proxies(meeting, b, a),
                    *weak(order.words),
                ),
            )


def check_written(meeting: Meeting) -> None:
    """Raise DataflowError where an output is not written everywhere on every rank."""
    seen = np.zeros(meeting.cells, dtype=bool)
    seen[meeting.write_cell] = True
    missing = np.flatnonzero(~seen)
    if len(missing) == 0:
        return
    access = next(a for a in meeting.accesses if a.write)
    place = meeting.place(missing[:1])[0].tolist()
    raise DataflowError(
        access.op.span,
        symbol=meeting.symbol,
        detail="a part of this output is never written",
        notes=(f"on rank {place[0]}, from index [{', '.join(map(str, place[1:]))}] on",),
    )


def _earliest(source: Ints, rows: Ints, bad: Ints) -> int:
    """The incidence whose access comes first in the program, then the first row."""
    return int(bad[np.lexsort((rows[bad], source[rows[bad]]))[0]])


def _cell(meeting: Meeting, cells: Ints, number: int) -> str:
    place = meeting.place(cells[number : number + 1])[0].tolist()
    index = ", ".join(map(str, place[1:]))
    return f"nothing is written at @{meeting.symbol}[{index}] of rank {place[0]}"
