"""The proof that a fused program cannot hang, race, or read the wrong data, for its extents and world.

One module a rule: ``bounds`` (and release/acquire), ``cover``, ``dataflow``, ``reuse``, ``match``,
``progress``. They share happens-before (``order``) and the meeting of accesses (``memory``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilelink.backend.expand import bytes_of
from tilelink.backend.expand_rows import Expansion
from tilelink.backend.expand_walk import expand
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
    VerifyError,
)
from tilelink.backend.verify.match import check_match
from tilelink.backend.verify.memory import Meeting, meet
from tilelink.backend.verify.mutants import mutants
from tilelink.backend.verify.order import Elements, elements, order
from tilelink.backend.verify.progress import check_progress, check_workers
from tilelink.backend.verify.reuse import check_reuse
from tilelink.ir import Op

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
    "VerifyError",
    "mutants",
    "verify",
]

RULES = ("bounds", "release-acquire", "cover", "dataflow", "reuse", "match", "progress")


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


def verify(program: Op) -> Report:
    """Prove ``program`` for its extents and world, or raise a subclass of VerifyError.

    Errors point at the access concerned and carry the tile, the channel and the rank in their notes,
    with a witness: two accesses in no order, or the cycle of waits.
    """
    out = expand(program)
    check_bounds(out)
    check_fences(out)
    check_workers(out)
    words = elements(out)
    ordering = order(out, words)
    if ordering.stuck:
        check_match(out, words)
        check_progress(out, words)
    written = dict.fromkeys(a.symbol for a in out.accesses if a.write)
    meetings = {symbol: meet(out, ordering, symbol) for symbol in written}
    _dark(out)
    for symbol in meetings:
        check_cover(out, ordering, meetings[symbol])
    Dataflow(out, meetings).check()
    for symbol, meeting in meetings.items():
        inexact = any(a.write and not a.exact for a in meeting.accesses)
        if out.declarations[symbol].get("role") == "out" and not inexact:
            check_written(out, meeting)
    for symbol in meetings:
        check_reuse(out, ordering, meetings[symbol])
    check_match(out, words)
    check_progress(out, words)
    return _report(out, words, meetings)


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


def _report(out: Expansion, words: Elements, meetings: dict[str, Meeting]) -> Report:
    agents = [a.name for a in out.agents]
    assumptions = list(dict.fromkeys(out.assumptions))
    if "stream" in agents:
        assumptions.append(
            "copies of a side stream get through beside a spinning kernel; agents of a rank share one "
            "hardware queue, in program order"
        )
    if "collective" in agents:
        assumptions.append("the library's collective ends once every rank has started it")
    if any(not a.exact for a in out.accesses):
        assumptions.append("accesses through run-time tables stay inside their tensors")
    if "launch" in agents:
        assumptions.append("all workers of a launch are resident at once")
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
        RULES,
        sum(p.count for p in stages) * out.world,
        len(out.task_rank),
        int(used.sum()),
        sum(len(s.task) for s in out.syncs if s.wait),
        sum(len(s.task) for s in out.syncs if not s.wait),
        sum(len(a.task) for a in out.accesses if a.write and a.op.name == "transfer"),
        sum(len(m.pair_order) + len(m.both_order) for m in meetings.values()),
        sum(bytes_of(op, out.env) for op in out.declarations.values() if op.name == "buffer"),
        tuple(assumptions),
    )
