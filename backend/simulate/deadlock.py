"""Explains why no task can run: follows each wait to the notify that it needs, until that closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilelink.backend.simulate.errors import DeadlockError
from tilelink.backend.simulate.execute import Machine, Task
from tilelink.backend.simulate.geometry import Geometry, bind_args
from tilelink.backend.simulate.roles import is_inside
from tilelink.backend.simulate.trace import Traces, tile_text
from tilelink.backend.simulate.walk import Element, Event, Notify, Walker
from tilelink.ir import Op, op_line


@dataclass(frozen=True, slots=True)
class Source:
    """A notify that the program holds, and who would make it."""

    rank: int
    agent: str
    worker: int | None
    place: str
    op: Op


class Sources:
    """Every notify of one call on all ranks, by target rank, channel and element.

    ``made`` are those that have been made, each with its call, place and target.
    """

    def __init__(self, geometry: Geometry, machine: Machine) -> None:
        self.geometry = geometry
        self.found: dict[tuple[int, str, Element], list[Source]] = {}
        self.made = {
            (
                call,
                place.rank,
                place.agent,
                place.text,
                id(op),
                rank,
                geometry.element(op.symbol, e),
            )
            for call, place, op, rank, elements in machine.made
            for e in elements
        }
        for rank in range(geometry.world):
            memory = machine.memories[rank]
            tables = {
                d.name: memory.tensor(d)
                for d in geometry.decls.values()
                if d.kind in ("tensor", "buffer") and d.dtype in ("int32", "int64", "bool")
            }
            walker = Walker(geometry, rank, tables)
            for agent, name in zip(geometry.agents, geometry.agent_names, strict=True):
                if agent.name == "launch":
                    self._launch(walker, agent)
                else:
                    for event in walker.block(agent.body):
                        self._add(event, rank, name, None, "")

    def _launch(self, walker: Walker, launch: Op) -> None:
        rank, name = walker.rank, launch.symbol
        for stage in launch.body:
            if stage.name != "stage":
                for event in walker.block(stage.body):
                    self._add(event, rank, name, -1, " finish")
                continue
            lo, hi = self.geometry.worker_range(launch, stage)
            dynamic = stage.get("queue", "static") == "dynamic"
            first = self.geometry.value(stage.get("first", 0), walker.env)
            for q, tiles in enumerate(self.geometry.queue(stage, walker.env)):
                bind_args(stage.args, tiles, walker.env, walker.values)
                turn = (q + first) % (hi - lo)
                worker = None if dynamic else lo + turn
                place = f" stage @{stage.symbol} tile {tile_text(stage, tiles)}"
                for event in walker.block(stage.body):
                    self._add(event, rank, name, worker, place)

    def _add(self, event: Event, rank: int, agent: str, worker: int | None, place: str) -> None:
        if not isinstance(event, Notify):
            return
        source = Source(rank, agent, worker, place, event.op)
        for element in event.elements:
            self.found.setdefault((event.peer, event.symbol, element), []).append(source)


def explain(
    traces: Traces, machine: Machine, tasks: Sequence[Task], calls: Sequence[int]
) -> DeadlockError:
    """The error for a run whose unfinished ``tasks`` are all blocked; ``calls``: each rank's call."""
    sources = Sources(traces.geometry, machine)
    order = sorted(tasks, key=lambda t: (t.call, t.rank, t.component))
    best: tuple[list[str], Task] | None = None
    for start in order[:64]:
        lines, closed = _chain(sources, machine, order, start, calls)
        if best is None or closed:
            best = (lines, start)
        if closed:
            break
    assert best is not None
    lines, first = best
    span = first.blocked.op.span if first.blocked is not None else None
    return DeadlockError(span, blocked=len(tasks), notes=tuple(lines))


def _chain(
    sources: Sources, machine: Machine, tasks: list[Task], start: Task, calls: Sequence[int]
) -> tuple[list[str], bool]:
    lines: list[str] = []
    seen: list[Task] = []
    task = start
    while True:
        assert task.blocked is not None
        blocked = task.blocked
        missing = machine.missing(task.rank, blocked) if blocked.elements else []
        where = f" ({blocked.op.span})" if blocked.op.span is not None else ""
        if is_inside(blocked.symbol):
            # A group of a worker, whose loader stands before the same wait as any other worker would.
            same = [t for t in tasks if (t.rank, t.agent) == (task.rank, task.agent)]
            same = [t for t in same if t.worker == task.worker and t.blocked is not None]
            loaders = [t for t in same if t.blocked is not None and t.blocked.elements]
            lines.append(f"{task.describe()} waits for what its loader has not loaded{where}")
            if not loaders:
                return lines, False
            task = loaders[0]
            continue
        if blocked.polled:
            lines.append(
                f"{task.describe()} polls at `{op_line(blocked.op)}`{where}: "
                f"words of call {task.call} are missing in @{blocked.symbol}"
            )
            return lines, False
        if not missing:
            lines.append(f"{task.describe()} waits at `{op_line(blocked.op)}`{where}")
            lines.append("not every rank reaches the collective")
            return lines, False
        channel = sources.geometry.channel(blocked.symbol, missing[0])
        element = sources.geometry.element(blocked.symbol, missing[0])
        value = machine.memories[task.rank].channels[blocked.place].values[missing[0]]
        lines.append(
            f"{task.describe()} waits at `{op_line(blocked.op)}`{where}"
            f" for {channel}, which is {value} and must be {blocked.need}"
        )
        if task in seen:
            cut = seen.index(task)
            return [*lines[cut:-1], f"and that is the first of these: {task.describe()}"], True
        seen.append(task)
        found = sources.found.get((task.rank, blocked.symbol, element), [])
        # A flag's value is the number of the epoch, and the first call has epoch 1.
        flag = sources.geometry.decls[blocked.symbol].kind == "flag"
        call = blocked.need - 1 if flag else task.call
        left = [s for s in found if not _is_made(sources, s, call, task.rank, element)]
        step = _next(left, tasks, calls, call)
        if step is None:
            if not found:
                lines.append(f"no notify of the program reaches {channel} of rank {task.rank}")
            else:
                lines.append(
                    f"every notify that reaches {channel} of rank {task.rank} has been made"
                    f" ({len(found)} a call)"
                )
            return lines, False
        source, task = step
        span = f" ({source.op.span})" if source.op.span is not None else ""
        lines[-1] += (
            f"; `{op_line(source.op)}`{span} by rank {source.rank} @{source.agent}{source.place}"
            " would set it"
        )


def _next(
    found: list[Source], tasks: list[Task], calls: Sequence[int], call: int
) -> tuple[Source, Task] | None:
    """The unfinished task that stands in the way of one of the notifies."""
    for source in found:
        if calls[source.rank] > call:
            continue
        here = [t for t in tasks if t.rank == source.rank]
        same = [t for t in here if t.agent == source.agent]
        exact = [t for t in same if source.worker is None or t.worker == source.worker]
        # A worker that is gone has made its notifies; `finish` waits for every worker, and an agent
        # that has not started for the others.
        if exact:
            return source, exact[0]
        if same and source.worker == -1:
            return source, same[0]
        if here and not same:
            return source, here[0]
    return None


def _is_made(sources: Sources, source: Source, call: int, rank: int, element: Element) -> bool:
    """Whether ``source`` has notified ``element`` of ``rank`` in ``call``."""
    by = (call, source.rank, source.agent, source.place)
    return (*by, id(source.op), rank, element) in sources.made
