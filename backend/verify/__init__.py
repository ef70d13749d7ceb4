"""The proof that a fused program cannot hang, race, or read the wrong data, for its extents and world.

One module a rule: ``bounds`` (and release/acquire), ``cover``, ``dataflow``, ``reuse``, ``match``,
``progress``, and ``meaning``, which holds the program against its kernel. They share happens-before
(``order``) and the meeting of accesses (``memory``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tilelink.backend.expand import bytes_of
from tilelink.backend.expand_rows import Expansion
from tilelink.backend.expand_walk import expand
from tilelink.backend.verify.alias import check_alias
from tilelink.backend.verify.arena import check_arena, check_words
from tilelink.backend.verify.bounds import check_bounds, check_fences
from tilelink.backend.verify.cover import check_cover, check_written
from tilelink.backend.verify.dataflow import Dataflow
from tilelink.backend.verify.errors import (
    BoundsError,
    CoverError,
    DataflowError,
    FenceError,
    MatchError,
    ProgressError,
    RaceError,
    ReuseError,
    RowsError,
    UndecidedError,
    VerifyError,
)
from tilelink.backend.verify.form import check_form
from tilelink.backend.verify.match import check_match, check_words_of
from tilelink.backend.verify.meaning import check_meaning
from tilelink.backend.verify.memory import Meeting, meet
from tilelink.backend.verify.order import Elements, elements, order
from tilelink.backend.verify.progress import (
    check_progress,
    check_workers,
    resident_of,
    spins,
    workers_of,
)
from tilelink.backend.verify.residency import check_residency
from tilelink.backend.verify.reuse import check_reuse
from tilelink.backend.verify.rows import check_rows, smaller
from tilelink.backend.verify.words import check_polls
from tilelink.ir import Op, dynamic_extents, parse_ir
from tilelink.ir.check import check_types
from tilelink.ir.vocabulary import check_names

__all__ = [
    "BoundsError",
    "CoverError",
    "DataflowError",
    "FenceError",
    "MatchError",
    "ProgressError",
    "RaceError",
    "Report",
    "ReuseError",
    "RowsError",
    "UndecidedError",
    "VerifyError",
    "carried",
    "prove",
    "smaller",
    "verify",
]

RULES = (
    "bounds",
    "release-acquire",
    "cover",
    "dataflow",
    "meaning",
    "reuse",
    "match",
    "progress",
    "residency",
)

UNKNOWN = "the stages compute what their kernel says"


@dataclass(frozen=True, slots=True)
class Report:
    """What was proven of a program. Counts are over all ranks and one call; bytes are on one rank.

    ``channels`` counts the flag and counter elements that are used; ``pairs`` the pairs of accesses to
    the same place, of which at least one writes, that were shown to be ordered.
    """

    program: str
    world: int
    rules: tuple[str, ...]
    tiles: int
    tasks: int
    channels: int
    waits: int
    notifies: int
    transfers: int
    pairs: int
    workspace_bytes: int
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"@{self.program} on {self.world} ranks: proven {', '.join(self.rules)}",
            f"  {self.tiles} tiles, {self.channels} channels, {self.waits} waits, "
            f"{self.notifies} notifies, {self.transfers} transfers, {self.pairs} ordered pairs",
            f"  {self.workspace_bytes} bytes of workspace a rank",
            *(f"  assumes: {text}" for text in self.assumptions),
        ]
        return "\n".join(lines)


def verify(program: Op, kernel: Op | None = None) -> Report:
    """Prove ``program`` for its extents and world, or raise a subclass of VerifyError.

    ``kernel`` is the Tile IR that its stages must compute, by default what the program carries as
    `kernel_text`; where there is neither, the report says that this is assumed.

    Errors point at the access concerned and carry the tile, the channel and the rank in their notes,
    with a witness: two accesses in no order, or the cycle of waits.
    """
    check_names(program)
    check_form(program)
    meaning = kernel if kernel is not None else carried(program)
    out = expand(program, meaning)
    _enumerated(out)
    if meaning is not None:
        check_meaning(out, meaning)
    report = prove(out, known=meaning is not None)
    # What no rule looks at may still be nothing that an executor runs, such as an op behind a `yield`.
    check_types(program)
    check_rows(out, meaning, lambda small: prove(small, contents=False), check_bounds)
    if dynamic_extents(program):
        return replace(report, rules=(*report.rules, "rows"))
    return report


def carried(program: Op) -> Op | None:
    """The kernel that a program carries in its own text, or None."""
    text = program.get("kernel_text")
    if text is None:
        return None
    kernel = parse_ir(str(text), f"kernel_text of @{program.symbol}")
    check_names(kernel)
    return kernel


def prove(out: Expansion, *, known: bool = False, contents: bool = True) -> Report:
    """Prove what ``out`` holds, wherever its rows come from; see :func:`verify`.

    ``contents`` false leaves out the rule of what each read finds, dataflow. ``known``: the ops of its stages
    have been held against a kernel. Otherwise the report assumes it.
    Beside the rows, the rules read: of ``out.program`` its symbol, and, for which symbols hold sums over
    ranks, the ops of its bodies; of ``out.agents`` names, `after`, `workers` and `resident`, and their
    stages' `workers`, `first`, `queue` and `counter`; of ``out.declarations`` all attributes.
    """
    _enumerated(out)
    _idle_waits(out)
    if not known:
        out.assumptions.append(UNKNOWN)
    check_bounds(out)
    check_alias(out)
    check_fences(out)
    check_workers(out)
    words = elements(out)
    check_words_of(out, words)
    ordering = order(out, words)
    if ordering.stuck:
        check_match(out, words)
        check_progress(out, words)
        raise ProgressError(out.program.span, detail="the waits of a call go in a circle")
    written = dict.fromkeys(a.symbol for a in out.accesses if a.write)
    meetings = {symbol: meet(out, ordering, symbol) for symbol in written}
    _dark(out)
    for symbol in meetings:
        check_cover(out, ordering, meetings[symbol])
        check_polls(out, ordering, meetings[symbol])
    if contents:
        Dataflow(out, meetings).check()
    for symbol, meeting in meetings.items():
        inexact = any(a.write and not a.exact for a in meeting.accesses)
        if out.declarations[symbol].get("role") == "out" and not inexact:
            check_written(meeting)
    for symbol in meetings:
        check_reuse(out, ordering, meetings[symbol])
    check_words(out, words, ordering)
    check_arena(out, words, ordering)
    check_match(out, words)
    check_progress(out, words)
    check_residency(out, words)
    return _report(out, words, meetings, known)


def _idle_waits(out: Expansion) -> None:
    """A wait that is the same for every task stands before a stage's loop, where no task is needed."""
    for phase in out.phases:
        if phase.kind == "stage" and phase.count == 0:
            wait = next((op for op in phase.op.walk() if op.name == "wait"), None)
            if wait is not None:
                detail = "a wait in a stage without tasks, where workers may wait all the same"
                raise UndecidedError(wait.span or phase.op.span, name="wait", detail=detail)


def _enumerated(out: Expansion) -> None:
    """Refuse what the expansion could not take in full."""
    for op, text in out.problems:
        raise UndecidedError(op.span, name=op.name, detail=text)
    longest = max((int(a.seq.max()) for a in out.accesses), default=0)
    longest = max([longest, *(int(s.seq.max()) for s in out.syncs if len(s.seq))])
    if (longest + 2) * (len(out.task_rank) + 1) >= 1 << 62:
        raise UndecidedError(
            out.program.span, name=out.program.name, detail="its loops have too many iterations"
        )


def _dark(out: Expansion) -> None:
    """Refuse reads of what nothing writes and nobody gives; outputs that nothing writes."""
    written = {a.symbol for a in out.accesses if a.write}
    for access in out.accesses:
        declared = out.declarations[access.symbol]
        given = declared.name == "tensor" and declared.get("role") in ("in", "inout")
        if not access.write and access.symbol not in written and not given:
            raise DataflowError(
                access.op.span,
                symbol=access.symbol,
                detail="nothing writes it",
                notes=(out.describe(int(access.task[0])),),
            )
    for symbol, declared in out.declarations.items():
        if declared.get("role") == "out" and symbol not in written:
            raise DataflowError(declared.span, symbol=symbol, detail="nothing writes this output")


def _buffers(out: Expansion) -> list[Op]:
    """The buffers that take memory."""
    found = [op for op in out.declarations.values() if op.name == "buffer"]
    return [op for op in found if op.get("alias") is None]


def _report(out: Expansion, words: Elements, meetings: dict[str, Meeting], known: bool) -> Report:
    agents = [a.name for a in out.agents]
    assumptions = list(dict.fromkeys(out.assumptions))
    if any(p.kind == "stage" and p.op.get("queue") == "dynamic" for p in out.phases):
        assumptions.append("each position of a dynamic queue is taken once")
    if "stream" in agents:
        assumptions.append(
            "copies of a side stream get through beside a spinning kernel; agents of a rank share one "
            "hardware queue, in program order"
        )
    if "collective" in agents:
        assumptions.append("the library's collective ends once every rank has started it")
    if any(op.get("emitter") == "library" for op in out.agents):
        assumptions.append("a product of the library is what the ops of its launch say")
    if any(not a.exact for a in out.accesses):
        assumptions.append("accesses through run-time tables stay inside their tensors")
    for op in dynamic_extents(out.program):
        most = out.env[op.symbol]
        assumptions.append(f"{op.symbol} is at most {most} in a call, and the same on all ranks")
    if any(a.write and not a.exact for a in out.accesses):
        assumptions.append("what is written through run-time tables is all that is read of it")
    for number, agent in enumerate(out.agents):
        if agent.name == "launch" and spins(out, number):
            fit = min(workers_of(agent), resident_of(agent))
            assumptions.append(f"{fit} workers of @{agent.symbol} can be resident at once")
    assumptions.append(
        "every rank runs this program, and calls on an arena are chained on each rank"
    )
    used = np.zeros(words.words, dtype=bool)
    for sync in out.syncs:
        used[words.number(sync)] = True
    stages = [p for p in out.phases if p.kind == "stage"]
    return Report(
        out.program.symbol if out.program.ref is not None else "",
        out.world,
        RULES if known else tuple(rule for rule in RULES if rule != "meaning"),
        sum(p.count for p in stages) * out.world,
        len(out.task_rank),
        int(used.sum()),
        sum(len(s.task) for s in out.syncs if s.wait),
        sum(len(s.task) for s in out.syncs if not s.wait),
        sum(len(a.task) for a in out.accesses if a.write and a.op.name == "transfer"),
        sum(len(m.pair_order) + len(m.both_order) for m in meetings.values()),
        sum(bytes_of(op, out.env) for op in _buffers(out)),
        tuple(assumptions),
    )
