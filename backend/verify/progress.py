"""progress: one worker a launch, in queue order, on all ranks at once, never comes to a halt.

Every assignment of a queue to more workers keeps a suborder of that order, so it makes progress too,
as long as all workers that spin are resident (``residency`` takes the launches where they are not). A
notify that is held back comes at the latest with its worker's flush: it is taken there. Agents of a rank
go through one hardware queue in the order in which the host enqueues them: a kernel leaves the queue once
it starts (``residency``: once all its workers have), a stream once its last wait has passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tilelink.backend.expand import Ints
from tilelink.backend.expand_rows import Expansion, Sync
from tilelink.backend.verify.errors import ProgressError
from tilelink.backend.verify.match import guarded
from tilelink.backend.verify.order import Elements, ancestors, numbers
from tilelink.errors import Span
from tilelink.ir import Op

RESIDENT = 132  # SMs of the target, one CTA on each
LIBRARY = 32  # CTAs a library collective may take


@dataclass(slots=True)
class _Agent:
    rank: int
    number: int
    events: list[tuple[bool, int, tuple[int, int], Sync, int]] = field(default_factory=list)
    at: int = 0
    started: bool = False
    ended: bool = False


def workers_of(launch: Op) -> int:
    """How many workers a launch has."""
    return int(launch.get("workers", RESIDENT))


def resident_of(launch: Op) -> int:
    """How many of a launch's workers can be on the device at once."""
    return int(launch.get("resident", RESIDENT))


def spins(out: Expansion, number: int) -> bool:
    """Whether an agent has a kernel that waits."""
    if out.agents[number].name == "collective":
        return True
    if out.agents[number].name == "stream":
        return False
    phase_agent = np.array([p.agent for p in out.phases], dtype=np.int64)
    return any(
        s.wait and bool((phase_agent[out.task_phase[s.task]] == number).any()) for s in out.syncs
    )


def check_workers(out: Expansion) -> None:
    """Raise ProgressError for agents that cannot be told apart, and for kernels without room.

    Kernels that may run at once, one of which waits, must all fit: each takes its share of the device,
    its workers by what can be resident of it.
    """
    _names(out)
    share: dict[int, float] = {}
    waiting = [spins(out, number) for number in range(len(out.agents))]
    for number, agent in enumerate(out.agents):
        if agent.name == "collective":
            share[number] = LIBRARY / RESIDENT
        elif agent.name == "head":
            share[number] = 1 / RESIDENT
        if agent.name != "launch":
            continue
        workers, resident = workers_of(agent), resident_of(agent)
        if workers < 1 or resident < 1:
            raise ProgressError(
                agent.span, detail=f"{workers} workers, of which {resident} can be resident"
            )
        # A kernel that never waits needs one place: its workers leave it in turn.
        share[number] = (min(workers, resident) if waiting[number] else 1) / resident
        for stage in agent.find("stage"):
            lo, hi = (int(w) for w in stage.get("workers", (0, workers)))
            if not 0 <= lo < hi <= workers:
                raise ProgressError(
                    stage.span, detail=f"no worker of {workers} is in the range {lo} to {hi}"
                )
    after = ancestors(out)
    for number in share:
        beside = [
            n for n in share if n != number and n not in after[number] and number not in after[n]
        ]
        if not beside or not waiting[number]:
            continue
        # The library runs one collective at a time.
        library = [n for n in (number, *beside) if out.agents[n].name == "collective"]
        need = sum(share[n] for n in (number, *beside) if n not in library[1:])
        if need > 1 + 1e-9 and len(library) <= len(beside):
            names = ", ".join(_label(out, n) for n in (number, *beside))
            raise ProgressError(
                out.agents[max(number, *beside)].span,
                detail=f"kernels that may run at once need {need * RESIDENT:.0f} CTAs of {RESIDENT}",
                notes=(f"nothing orders {names}, and one of them waits while it runs (all ranks)",),
            )


def _names(out: Expansion) -> None:
    """Agents are told apart by name, and `after` names agents."""
    seen: set[str] = set()
    for agent in out.agents:
        name = agent.ref.symbol if agent.ref is not None else "head"
        if agent.ref is None and agent.name != "head":
            raise ProgressError(agent.span, detail=f"a {agent.name} without a name")
        if name in seen or (agent.name == "head") != (name == "head"):
            raise ProgressError(agent.span, detail=f"a second agent is named `{name}`")
        seen.add(name)
    for agent in out.agents:
        for name in agent.get("after", ()):
            if name not in seen:
                raise ProgressError(agent.span, detail=f"there is no agent `{name}` to come after")


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
    _witness(out, words, agents, named)


def _agents(out: Expansion, words: Elements) -> list[_Agent]:
    """All agents, rank-major, with the first wait and the last notify of each element in queue order."""
    agents = [_Agent(r, n) for r in range(out.world) for n in range(len(out.agents))]
    count = len(out.agents)
    agent_of = np.array([p.agent for p in out.phases], dtype=np.int64)
    flushes = _flushes(out)
    for wait in (True, False):
        some = [
            s for s in out.syncs if s.wait == wait and len(s.task) and not (wait and s.epoch < 0)
        ]
        if not some:
            continue
        task = np.concatenate([s.task for s in some])
        late = np.concatenate([np.full(len(s.task), s.delay) for s in some])
        place = np.where(late, flushes[out.task_phase[task]], task)
        seq = np.where(late, _LATE, np.concatenate([s.seq for s in some]))
        element = np.concatenate([words.number(s) for s in some])
        source = np.concatenate([np.full(len(s.task), n) for n, s in enumerate(some)])
        owner = out.task_rank[task] * count + agent_of[out.task_phase[task]]
        by = np.lexsort((seq, place, element, owner))
        key = owner[by] * words.total + element[by]
        edge = np.ones(len(by), dtype=bool)
        if wait:
            edge[1:] = key[1:] != key[:-1]
        else:
            edge[:-1] = key[1:] != key[:-1]
        keep = by[edge]
        columns = (owner[keep], place[keep], seq[keep], element[keep], source[keep], task[keep])
        for o, p, q, e, n, t in zip(*(c.tolist() for c in columns), strict=True):
            agents[o].events.append((wait, e, (p, q), some[n], t))
    for agent in agents:
        agent.events.sort(key=lambda event: (event[2], not event[0]))
    return agents


_LATE = 1 << 62


def _flushes(out: Expansion) -> Ints:
    """For each phase the last task in front of the flush behind it; all tasks where there is none."""
    found = np.full(len(out.phases), len(out.task_rank), dtype=np.int64)
    next_flush: dict[int, int] = {}
    for number in reversed(range(len(out.phases))):
        phase = out.phases[number]
        if phase.kind == "flush":
            next_flush[phase.agent] = phase.first - 1
        elif phase.agent in next_flush:
            found[number] = next_flush[phase.agent]
    return found


def _notifiers(agents: list[_Agent], words: Elements) -> list[int]:
    missing = [0] * words.words
    for agent in agents:
        for wait, element, *_ in agent.events:
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
        # All but side streams share the main stream, which runs one after the other.
        main = not stream and out.agents[agent.number].name != "stream"
        if not earlier.started or ((stream or main) and not earlier.ended):
            why = "its place in the main stream" if main else "its place in the one hardware queue"
            found.append((earlier, why))
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
        wait, element, *_ = agent.events[agent.at]
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
        _, element, _, sync, task = agent.events[agent.at]
        line = f" ({sync.op.span})" if sync.op.span is not None else ""
        notes.append(f"{out.describe(task)} waits for {words.name(element)}{line}")
        spans.append(guarded(out, sync))
        blocker = next(
            other
            for other in agents
            if any(not x[0] and x[1] == element for x in other.events[other.at :])
        )
        event = next(x for x in blocker.events[blocker.at :] if not x[0] and x[1] == element)
        notes[-1] += f", which {out.describe(event[4])} notifies"
        if event[3].delay:
            notes[-1] += " with its flush, where it is held back until then"
        agent = blocker
    first = seen[agent.rank, agent.number]
    raise ProgressError(
        next((s for s in spans[first:] if s is not None), None),
        detail="its waits go in a circle, even with one worker a launch in queue order",
        notes=(*notes[first:], "and so round"),
    )


def _name(out: Expansion, agent: _Agent) -> str:
    return f"{_label(out, agent.number)} on rank {agent.rank}"


def _label(out: Expansion, number: int) -> str:
    op = out.agents[number]
    return f"{op.name} @{op.ref.symbol}" if op.ref is not None else op.name
