"""cover, of words that signal themselves: a load waits for all that it reads, and a wait stands for its load.

A load polls all words that it reads. Where each holds the epoch of the call that wrote it, what it reads is what
this call wrote there, provided that one store did. Where words say by a sentinel that nothing is there yet, every
word that a call writes must be empty before, and the same load that reads it, of the same call, empties it: a word
that is not there when it is read would be one of two calls before, one that is read twice would be waited for in
vain. Waits and notifies of the flags that such words carry are not
performed: the other rules read them as if they were, which holds if each of them stands for polls and stores
that are there. What passing such a wait tells is little, since nothing is released: that the rank that stored
the words has begun the call, and so that all that it did in the calls before has landed.
"""

from __future__ import annotations

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Expansion, Sync
from tilelink.backend.verify.cover import where
from tilelink.backend.verify.errors import (
    CoverError,
    MatchError,
    RaceError,
    ReuseError,
    UndecidedError,
)
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.memory import Meeting
from tilelink.backend.verify.order import Order, carrier, carries


def check_polls(out: Expansion, order: Order, meeting: Meeting) -> None:
    """Raise for what a buffer of words cannot be used for; nothing for any other symbol."""
    if not out.declarations[meeting.symbol].get("words"):
        return
    for access in meeting.accesses:
        if not access.exact:
            detail = "which words it touches is known at run time only"
            raise UndecidedError(access.op.span, name=access.op.name, detail=detail)
    if len(meeting.both_first):
        # Whoever polls takes the first for both.
        a, b = (
            int(meeting.write_row[side[0]]) for side in (meeting.both_first, meeting.both_second)
        )
        raise RaceError(
            meeting.access(b)[0].op.span,
            symbol=meeting.symbol,
            notes=(
                where(out, meeting, b),
                where(out, meeting, a),
                "a word is written once in a call: its reader waits for no more than one store",
            ),
        )
    if out.declarations[meeting.symbol]["words"] == "sentinel":
        _emptied(out, meeting)
    seen = _polled(order, meeting)
    others = _others(out)
    for sync in out.syncs:
        if sync.wait and carrier(out, sync.symbol) == meeting.symbol:
            _stands_for_polls(out, order, sync, seen, others)


def _emptied(out: Expansion, meeting: Meeting) -> None:
    """Every word that is written is read by one load, which empties it."""
    cells = meeting.read_cell
    twice = np.flatnonzero(cells[1:] == cells[:-1])
    if len(twice):
        first, second = (int(meeting.read_row[int(twice[0]) + n]) for n in (0, 1))
        raise RaceError(
            meeting.access(second)[0].op.span,
            symbol=meeting.symbol,
            notes=(
                where(out, meeting, second),
                where(out, meeting, first),
                "a word that says by a sentinel that it is there is read once: whoever reads it first empties it",
            ),
        )
    leaves = np.array([not a.op.get("empty") for a in meeting.accesses])
    left = np.flatnonzero(leaves[meeting.source[meeting.read_row]])
    if len(left):
        row = int(meeting.read_row[left[0]])
        detail = "it reads words and leaves them there: two calls later they are taken for new ones"
        raise ReuseError(
            meeting.access(row)[0].op.span,
            symbol=meeting.symbol,
            notes=(where(out, meeting, row), detail),
        )
    unread = np.flatnonzero(~np.isin(meeting.write_cell, cells))
    if len(unread):
        row = int(meeting.write_row[unread[0]])
        detail = "nobody reads it, so nobody empties it: two calls later it is taken for new data"
        raise ReuseError(
            meeting.access(row)[0].op.span,
            symbol=meeting.symbol,
            notes=(where(out, meeting, row), detail),
        )


def _polled(order: Order, meeting: Meeting) -> dict[tuple[int, int], int]:
    """By task and element: the first place in the task at which words are polled that whoever notifies the element
    has stored before."""
    told, asked = carries(order, meeting.symbol)
    reads = meeting.read_row[meeting.pair_read]
    writes = meeting.write_row[meeting.pair_write]
    seq = np.concatenate([a.seq for a in meeting.accesses])
    rows = np.column_stack(
        (meeting.node[writes], meeting.node[reads], meeting.task[reads], seq[reads])
    )
    found: dict[tuple[int, int], int] = {}
    for x, y, task, place in np.unique(rows, axis=0).tolist():
        mask = told[x] & asked[y]
        while mask:
            element = (mask & -mask).bit_length() - 1
            mask &= mask - 1
            found[task, element] = min(found.get((task, element), place), place)
    return found


def _others(out: Expansion) -> tuple[Ints, int]:
    """What tasks do beside waits and loads of words, as sorted numbers ``task * stride + place``."""
    loads = [a for a in out.accesses if not a.write and out.declarations[a.symbol].get("words")]
    acts = [(a.task, a.seq) for a in out.accesses if a not in loads]
    acts += [(s.task, s.seq) for s in out.syncs if not s.wait]
    task, seq = (np.concatenate([pair[n] for pair in acts]) for n in (0, 1))
    stride = int(max(seq.max(), *(int(s.seq.max(initial=0)) for s in out.syncs))) + 2
    return np.sort(task * stride + seq), stride


def _stands_for_polls(
    out: Expansion,
    order: Order,
    sync: Sync,
    seen: dict[tuple[int, int], int],
    others: tuple[Ints, int],
) -> None:
    acts, stride = others
    at = order.words.number(sync).tolist()
    for task, place, element in zip(sync.task.tolist(), sync.seq.tolist(), at, strict=True):
        polled = seen.get((task, element))
        note = f"`{sync.op.name}` by {out.describe(task)}"
        if polled is None:
            raise MatchError(
                guarded(out, sync),
                element=order.words.name(element),
                detail="words carry it, but no load behind this wait reads a word that its notify stands for",
                notes=(note,),
            )
        first, last = (task * stride + n for n in (place, polled))
        if np.searchsorted(acts, last, "left") > np.searchsorted(acts, first, "right"):
            raise CoverError(
                guarded(out, sync),
                symbol=carrier(out, sync.symbol),
                notes=(
                    note,
                    f"{order.words.name(element)} is carried by words: only the load of these waits",
                    "something stands between the wait and that load, and would not wait",
                ),
            )
