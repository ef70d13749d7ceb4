"""progress: one worker a launch, in queue order, on all ranks at once, never comes to a halt.

Every assignment of a queue to more workers keeps a suborder of that order, so it makes progress too,
as long as all workers that spin are resident. Agents of a rank go through one hardware queue in the
order in which the host enqueues them: a kernel leaves the queue once it starts, a stream once its last
wait has passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tilelink.backend.expand_rows import Expansion, Sync
from tilelink.backend.verify.errors import ProgressError
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.order import Elements, ancestors, numbers
from tilelink.errors import Span

RESIDENT = 132  # SMs of the target, one CTA on each
LIBRARY = 32  # CTAs a library collective may take


@dataclass(slots=True)
class _Agent:
    rank: int
    number: int
    events: list[tuple[bool, int, int, Sync]] = field(default_factory=list)
    at: int = 0
    started: bool = False
    ended: bool = False


def check_workers(out: Expansion) -> None:
    """Raise ProgressError for an empty range of workers, or more of them than can be resident."""
    spinning: list[tuple[int, int]] = []
    for number, agent in enumerate(out.agents):
        if agent.name == "collective":
            spinning.append((number, LIBRARY))
        if agent.name != "launch":
            continue
        workers = int(agent.get("workers", RESIDENT))
        resident = int(agent.get("resident", RESIDENT))
        spins = any(op.name == "wait" for op in agent.walk())
        if workers < 1 or (spins and workers > resident):
            raise ProgressError(
                agent.span, detail=f"{workers} workers spin, but {resident} can be resident"
            )
        if spins:
            spinning.append((number, workers))
        for stage in agent.find("stage"):
            lo, hi = (int(w) for w in stage.get("workers", (0, workers)))
            if not 0 <= lo < hi <= workers:
                raise ProgressError(
                    stage.span, detail=f"no worker of {workers} is in the range {lo} to {hi}"
                )
    after = ancestors(out)
    for place, (a, first) in enumerate(spinning):
        for b, second in spinning[place + 1 :]:
            both = {out.agents[a].name, out.agents[b].name}
            if a in after[b] or b in after[a] or both == {"collective"}:
                continue
            if first + second > RESIDENT:
                raise ProgressError(
                    out.agents[b].span,
                    detail=f"two kernels that may run at once need {first + second} CTAs of {RESIDENT}",
                )


def check_progress(out: Expansion, words: Elements) -> None:
    """Raise ProgressError with the wait-for cycle where the ranks come to a halt."""
    agents = _agents(out, words)
    missing = _notifiers(agents, words)
    named = numbers(out)
    moved = True
    while moved:
        moved = False
        for agent in agents:
            if not agent.ended:
                moved |= _step(out, agents, agent, missing, named)
    if all(agent.ended for agent in agents):
        return
    _witness(out, words, agents, missing, named)


def _agents(out: Expansion, words: Elements) -> list[_Agent]:
    """All agents, rank-major, with the first wait and the last notify of each element in queue order."""
    agents = [_Agent(r, n) for r in range(out.world) for n in range(len(out.agents))]
    count = len(out.agents)
    agent_of = np.array([p.agent for p in out.phases], dtype=np.int64)
    for wait in (True, False):
        some = [
            s for s in out.syncs if s.wait == wait and len(s.task) and not (wait and s.epoch < 0)
        ]
        if not some:
            continue
        task = np.concatenate([s.task for s in some])
        seq = np.concatenate([s.seq for s in some])
        element = np.concatenate([words.number(s) for s in some])
        source = np.concatenate([np.full(len(s.task), n) for n, s in enumerate(some)])
        owner = out.task_rank[task] * count + agent_of[out.task_phase[task]]
        by = np.lexsort((seq, task, element, owner))
        key = owner[by] * words.total + element[by]
        edge = np.ones(len(by), dtype=bool)
        if wait:
            edge[1:] = key[1:] != key[:-1]
        else:
            edge[:-1] = key[1:] != key[:-1]
        keep = by[edge]
        keep = keep[np.lexsort((seq[keep], task[keep], owner[keep]))]
        columns = (owner[keep], task[keep], seq[keep], element[keep], source[keep])
        for o, t, s, e, n in zip(*(c.tolist() for c in columns), strict=True):
            agents[o].events.append((wait, e, t * (1 << 32) + min(s, (1 << 32) - 1), some[n]))
    for agent in agents:
        agent.events.sort(key=lambda event: (event[2], not event[0]))
    return agents


def _notifiers(agents: list[_Agent], words: Elements) -> list[int]:
    missing = [0] * words.words
    for agent in agents:
        for wait, element, _, _ in agent.events:
            if not wait:
                missing[element] += 1
    return missing


def _blockers(
    out: Expansion, agents: list[_Agent], agent: _Agent, named: dict[str, int]
) -> list[tuple[_Agent, str]]:
    """What an agent that has not started waits for."""
    base = agent.rank * len(out.agents)
    found = [
        (agents[base + named[b]], "its `after`")
        for b in out.agents[agent.number].get("after", ())
        if b in named and not agents[base + named[b]].ended
    ]
    for earlier in agents[base : base + agent.number]:
        stream = out.agents[earlier.number].name == "stream"
        if not earlier.started or (stream and not earlier.ended):
            found.append((earlier, "its place in the one hardware queue"))
    return found


def _step(
    out: Expansion,
    agents: list[_Agent],
    agent: _Agent,
    missing: list[int],
    named: dict[str, int],
) -> bool:
    moved = False
    if not agent.started:
        if _blockers(out, agents, agent, named):
            return False
        agent.started = moved = True
    if out.agents[agent.number].name == "collective":
        peers = agents[agent.number :: len(out.agents)]
        if not all(p.started for p in peers):
            return moved
    while agent.at < len(agent.events):
        wait, element, _, _ = agent.events[agent.at]
        if wait and missing[element]:
            return moved
        if not wait:
            missing[element] -= 1
        agent.at += 1
        moved = True
    agent.ended = True
    return True


def _witness(
    out: Expansion,
    words: Elements,
    agents: list[_Agent],
    missing: list[int],
    named: dict[str, int],
) -> None:
    """Follow who waits for whom until an agent comes twice, and raise with that cycle."""
    agent = next(a for a in agents if not a.ended)
    seen: dict[tuple[int, int], int] = {}
    notes: list[str] = []
    spans: list[Span | None] = []
    while (agent.rank, agent.number) not in seen:
        seen[agent.rank, agent.number] = len(notes)
        name = _name(out, agent)
        if not agent.started:
            blocker, why = _blockers(out, agents, agent, named)[0]
            notes.append(f"{name} cannot start: {why} is behind {_name(out, blocker)}")
            spans.append(out.agents[agent.number].span)
            agent = blocker
            continue
        if agent.at >= len(agent.events):
            blocker = next(p for p in agents[agent.number :: len(out.agents)] if not p.started)
            notes.append(f"{name} waits for {_name(out, blocker)} to start")
            spans.append(out.agents[agent.number].span)
            agent = blocker
            continue
        _, element, key, sync = agent.events[agent.at]
        task = key >> 32
        line = f" ({sync.op.span})" if sync.op.span is not None else ""
        notes.append(f"{out.describe(task)} waits for {words.name(element)}{line}")
        spans.append(guarded(out, sync))
        blocker = next(
            other
            for other in agents
            if any(not w and e == element for w, e, _, _ in other.events[other.at :])
        )
        event = next(x for x in blocker.events[blocker.at :] if not x[0] and x[1] == element)
        notes[-1] += f", which {out.describe(event[2] >> 32)} notifies"
        agent = blocker
    first = seen[agent.rank, agent.number]
    raise ProgressError(
        next((s for s in spans[first:] if s is not None), None),
        detail="its waits go in a circle, even with one worker a launch in queue order",
        notes=(*notes[first:], "and so round"),
    )


def _name(out: Expansion, agent: _Agent) -> str:
    op = out.agents[agent.number]
    label = f"{op.name} @{op.ref.symbol}" if op.ref is not None else op.name
    return f"{label} on rank {agent.rank}"
