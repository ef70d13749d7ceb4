"""match: in every call, what is notified to an element is what is waited for, and the other way round."""

from __future__ import annotations

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Expansion, Sync
from tilelink.backend.verify.errors import FenceError, MatchError
from tilelink.backend.verify.order import Elements, carrier, sound
from tilelink.errors import Span
from tilelink.ir import Op


def guarded(out: Expansion, sync: Sync) -> Span | None:
    """The access that a wait is for, or that a notify follows; the op's own span where there is none."""
    ops = list(out.program.walk())
    at = next((i for i, op in enumerate(ops) if op is sync.op), None)
    if at is None:
        return sync.op.span
    names = ("load", "load_sum", "store", "transfer", "collective")
    order: list[Op] = ops[at + 1 :] if sync.wait else ops[:at][::-1]
    near = next((op for op in order if op.name in names and op.span is not None), None)
    return near.span if near is not None else sync.op.span


def check_match(out: Expansion, words: Elements) -> None:
    """Raise MatchError for an element whose notifies and waits differ, FenceError for a bad counter."""
    waited = np.zeros(words.words, dtype=np.int64)
    for sync in out.syncs:
        if sync.wait:
            np.add.at(waited, words.number(sync), 1)
    for sync in out.syncs:
        if sync.wait:
            _wait(out, words, sync)
    through: dict[int, int] = {}
    for sync in out.syncs:
        if sync.wait:
            continue
        _counted(out, words, sync, through)
        idle = np.flatnonzero(waited[words.number(sync)] == 0)
        if len(idle):
            row = int(idle[0])
            _fail(out, words, sync, row, "it is notified, but nothing waits for it")


def check_words_of(out: Expansion, words: Elements) -> None:
    """Raise for waits for epochs that nothing raises, and for notifies that are held back for ever."""
    for sync in out.syncs:
        if sync.wait and len(sync.task):
            _epoch(out, words, sync)
        if sync.wait or not sync.delay or not len(sync.task):
            continue
        numbers = np.unique(out.task_phase[sync.task]).tolist()
        if any(out.phases[n].kind != "stage" for n in numbers):
            raise FenceError(
                guarded(out, sync),
                symbol=sync.symbol,
                detail="only a notify in a stage can be held back",
                notes=(out.describe(int(sync.task[0])),),
            )
        for number in numbers:
            agent = out.phases[number].agent
            behind = out.phases[number + 1 :]
            if not any(p.kind == "flush" and p.agent == agent for p in behind):
                row = int(np.flatnonzero(out.task_phase[sync.task] == number)[0])
                detail = (
                    "a notify is held back (`delay`) and lost: no flush stands between its stage "
                    "and the end of the launch"
                )
                _fail(out, words, sync, row, detail)


def _epoch(out: Expansion, words: Elements, sync: Sync) -> None:
    if sync.epoch not in (0, -1):
        detail = f"a wait for epoch {sync.epoch:+d}; waits are for this call's or the one before"
        _fail(out, words, sync, 0, detail)
    kinds = {out.phases[int(out.task_phase[t])].kind for t in sync.task[:1]}
    if sync.epoch and out.declarations[sync.symbol].name == "flag" and kinds - {"head"}:
        detail = "only `head` may wait for the call before, which may have been another program's"
        _fail(out, words, sync, 0, detail)
    if sync.epoch and out.declarations[sync.symbol].name == "counter":
        _fail(out, words, sync, 0, "a counter has no epoch: it counts one call")


def _wait(out: Expansion, words: Elements, sync: Sync) -> None:
    bad = np.flatnonzero(~sound(words, sync))
    if len(bad) == 0:
        return
    row = int(bad[0])
    element = int(words.number(sync)[row])
    raised, bound = int(words.raised[element]), int(sync.bound[row])
    counter = out.declarations[sync.symbol].name == "counter"
    if raised == 0:
        _fail(out, words, sync, row, "it is waited for, but never notified")
    if not counter and words.low[element] != words.high[element]:
        low, high = int(words.low[element]), int(words.high[element])
        _fail(
            out, words, sync, row, f"ranks {low} and {high} notify it; a flag has one writing rank"
        )
    need = bound if counter else int(words.most[element])
    _fail(out, words, sync, row, f"{raised} notifies reach it in a call, but the count is {need}")


def _counted(out: Expansion, words: Elements, sync: Sync, through: dict[int, int]) -> None:
    counter = out.declarations[sync.symbol].name == "counter"
    if counter:
        remote = np.flatnonzero(sync.home != sync.rank)
        if len(remote):
            raise FenceError(
                sync.op.span,
                symbol=sync.symbol,
                detail="a counter is local to its rank; between ranks a flag is notified",
            )
        return
    if not sync.via:
        # Words are polled one by one: nobody counts those who store them.
        if (sync.bound > 1).any() and not carrier(out, sync.symbol):
            raise FenceError(
                guarded(out, sync),
                symbol=sync.symbol,
                detail="a count above 1 needs a `through` counter",
            )
        return
    at = words.number(sync)
    cells: Ints = words.base[sync.via] + sync.rank * words.size[sync.via] + sync.through
    pairs = np.unique(np.column_stack((cells, at)), axis=0)
    for cell, element in pairs.tolist():
        if through.setdefault(cell, element) != element or words.raised[cell]:
            row = int(np.flatnonzero(at == element)[0])
            _fail(out, words, sync, row, f"{words.name(cell)} counts for more than this element")


def _fail(out: Expansion, words: Elements, sync: Sync, row: int, detail: str) -> None:
    element = int(words.number(sync)[row])
    raise MatchError(
        guarded(out, sync),
        element=words.name(element),
        detail=detail,
        notes=(
            f"`{sync.op.name}` by {out.describe(int(sync.task[row]))}"
            + (f" ({sync.op.span})" if sync.op.span is not None else ""),
        ),
    )
