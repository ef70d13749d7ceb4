"""One rank for all: what the other ranks of a symmetric program signal while the first one runs.

Every rank of a fused program runs the same agents, and its queues hold the same tasks relative to it. So
rank 0 alone is run on the clock, and each signal it gives stands for one that every rank gives at that
moment. Those that go to rank 0 are found by walking the same piece of the program as the other rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilelink.backend.simulate.geometry import Geometry, bind_args
from tilelink.backend.simulate.walk import Event, Notify, Walker
from tilelink.ir import Op

# Walks of tasks: several for each worker of each rank, whose tasks are under way at once.
KEPT = 4096


class Asymmetric(Exception):
    """Ranks do different things at one point of the program: one cannot stand for all."""


@dataclass(slots=True, eq=False)
class Piece:
    """What a list of events was walked from: the body of an agent, or of task ``position`` of a stage."""

    body: tuple[Op, ...]
    stage: Op | None = None
    position: int = 0


class Mirror:
    """The other ranks' side of what rank 0 does."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._walkers = [Walker(geometry, rank) for rank in range(geometry.world)]
        self._agents: dict[tuple[int, int], list[Event]] = {}
        self._tasks: dict[tuple[Piece, int], list[Event]] = {}

    def notify(self, piece: Piece, number: int, event: Notify, rank: int) -> Notify:
        """What ``rank`` signals where rank 0 does ``event``, the ``number``-th event of ``piece``.

        Asymmetric where that is no notify of the same op.
        """
        if rank == 0:
            return event
        walker = self._walkers[rank]
        stage = piece.stage
        if stage is not None:
            queue = self.geometry.queue(stage, walker.env)
            if piece.position >= len(queue):
                raise Asymmetric
            bind_args(stage.args, queue[piece.position], walker.env, walker.values)
            if any(op is event.op for op in piece.body):
                # Outside of inner loops its index depends on the task alone.
                return walker.notify(event.op)
            events = self._tasks.get((piece, rank), [])
            if not events:
                if len(self._tasks) >= KEPT:
                    self._tasks.clear()
                events = self._tasks[piece, rank] = walker.block(piece.body)
        else:
            key = (id(piece.body), rank)
            if key not in self._agents:
                self._agents[key] = walker.block(piece.body)
            events = self._agents[key]
        other = events[number] if number < len(events) else None
        if not isinstance(other, Notify) or other.op is not event.op:
            raise Asymmetric
        return other
