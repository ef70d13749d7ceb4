"""What a timed run shows: makespan, bounds, critical path, a text picture and a Chrome trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GROUPS = 4  # rows that the workers of one launch are drawn in
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Segment:
    """One thing an agent did, microseconds; ``cause`` is the track and time that a wait ended with."""

    start: float
    end: float
    kind: str  # work, wait, copy, signal, start
    label: str
    glyph: str = "#"
    cause: tuple[Track, float] | None = None


class Track:
    """What one agent, or one worker of a launch, did."""

    __slots__ = ("agent", "end", "kind", "rank", "segments", "worker")

    def __init__(self, rank: int, agent: str, kind: str, worker: int | None = None) -> None:
        self.rank = rank
        self.agent = agent
        self.kind = kind  # head, stream, launch, collective
        self.worker = worker
        self.segments: list[Segment] = []
        self.end = 0.0

    @property
    def name(self) -> str:
        """Rank, agent and worker."""
        agent = self.agent if self.kind == "head" else f"@{self.agent}"
        worker = "" if self.worker is None else f" worker {self.worker}"
        return f"rank {self.rank} {agent}{' finish' if self.worker == -1 else worker}"


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch of the critical path on one track, microseconds."""

    track: str
    start: float
    end: float
    parts: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {us:.1f}" for kind, us in self.parts)
        return f"{self.start:9.1f} .. {self.end:9.1f} us  {self.track}: {parts}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """A timed run of a fused program; all times are microseconds.

    ``compute`` is one rank's work with every wait satisfied and nothing moved, without the sums that
    belong to the communication; ``communication`` is the bytes of the busiest link at its bandwidth,
    and the collectives. ``tracks`` are all agents and workers of all ranks.
    """

    program: str
    machine: str
    world: int
    makespan: float
    compute: float
    communication: float
    tracks: tuple[Track, ...]

    @property
    def seconds(self) -> float:
        """The makespan in seconds."""
        return self.makespan * 1e-6

    @property
    def efficiency(self) -> float:
        """Overlap efficiency: the larger bound over the makespan; 1 is perfect."""
        return max(self.compute, self.communication) / self.makespan if self.makespan else 1.0

    def critical_path(self) -> tuple[Step, ...]:
        """From the start of the call to its end, always on the track that the next one waited for."""
        if not self.tracks:
            return ()
        track = max(self.tracks, key=lambda t: t.end)
        at, steps = track.end, []
        while True:
            parts: dict[str, float] = {}
            stop, cause = at, None
            for segment in reversed(track.segments):
                if segment.start >= stop:
                    continue
                if segment.cause is not None:
                    # The wait ended when the cause reached this track: the rest of it is the way.
                    other, sent = segment.cause
                    if segment.end > sent:
                        way = segment.label if segment.kind == "start" else "signal"
                        parts[way] = parts.get(way, 0.0) + segment.end - sent
                    at, cause = sent, other
                    break
                length = min(segment.end, stop) - segment.start
                parts[segment.label] = parts.get(segment.label, 0.0) + length
                at = segment.start
            steps.append(Step(track.name, at, stop, tuple(parts.items())))
            if cause is None or at <= 0.0 or len(steps) > 10_000:
                return tuple(reversed(steps))
            track = cause

    def critical_path_text(self, limit: int = 12) -> str:
        """The critical path, one stretch a line, the middle left out beyond ``limit`` lines."""
        steps = self.critical_path()
        if len(steps) <= limit:
            return "\n".join(map(str, steps))
        head, tail = steps[: limit // 2], steps[-(limit - limit // 2) :]
        between = f"{'...':>13}  {len(steps) - limit} more stretches"
        return "\n".join([*map(str, head), between, *map(str, tail)])

    def summary(self) -> str:
        """One line: makespan, bounds, efficiency."""
        return (
            f"{self.makespan:.1f} us on {self.machine} at world {self.world}: "
            f"compute alone {self.compute:.1f}, communication alone {self.communication:.1f}, "
            f"overlap efficiency {self.efficiency:.3f}"
        )

    def render(self, width: int = 100, rank: int = 0) -> str:
        """One row an agent or group of workers of ``rank`` over time, ``width`` columns in all.

        A digit is the block of rows that is computed, which is its rank where blocks are one a rank,
        or the rank to which bytes go; ``+`` sums, ``.`` waits.
        """
        margin = max([len(name) for name, _ in self._rows(rank)] + [4]) + 2
        columns = max(10, width - margin - 2)
        lines = [f"{f'rank {rank}':<{margin}}{self._axis(columns)}"]
        for name, glyphs in self.lanes(rank, columns):
            lines.append(f"{name:<{margin}}|{glyphs}|")
        legend = (
            "digit: block computed (of that rank), or rank sent to   #: compute   +: sum   .: wait"
        )
        return "\n".join([*lines, legend, self.summary()])

    def lanes(self, rank: int, columns: int) -> list[tuple[str, str]]:
        """The name of each agent or group of workers of ``rank``, and what it does: a character a column."""
        scale = columns / self.makespan if self.makespan else 0.0
        return [(name, _paint(tracks, columns, scale)) for name, tracks in self._rows(rank)]

    def _axis(self, columns: int) -> str:
        text = [" "] * (columns + 2)
        ticks = max(1, columns // 20)
        for tick in range(ticks + 1):
            label = f"{self.makespan * tick / ticks:.0f}" + (" us" if tick == ticks else "")
            at = columns * tick // ticks + 1
            at = min(at, columns + 2 - len(label))
            text[at : at + len(label)] = label
        return "".join(text)

    def _rows(self, rank: int) -> list[tuple[str, list[Track]]]:
        """Tracks of ``rank`` by row: agents in order, the workers of a launch in groups."""
        rows: list[tuple[str, list[Track]]] = []
        agents: dict[str, list[Track]] = {}
        for track in self.tracks:
            if track.rank == rank and track.worker != -1:
                agents.setdefault(track.agent, []).append(track)
        for agent, tracks in agents.items():
            if tracks[0].kind != "launch":
                rows.append((agent if tracks[0].kind == "head" else f"@{agent}", tracks))
                continue
            tracks.sort(key=lambda t: t.worker or 0)
            groups = min(GROUPS, len(tracks))
            for g in range(groups):
                lo, hi = g * len(tracks) // groups, (g + 1) * len(tracks) // groups
                name = f"@{agent} {lo}..{hi - 1}" if hi - lo > 1 else f"@{agent} {lo}"
                rows.append((name, tracks[lo:hi]))
        return rows

    def to_chrome(self) -> dict[str, Any]:
        """A trace for Perfetto or chrome://tracing: a process a rank, a thread a row.

        The thread of a group of workers shows its first worker.
        """
        events: list[dict[str, Any]] = []
        for rank in range(self.world):
            named = {"name": "process_name", "ph": "M", "pid": rank}
            events.append({**named, "args": {"name": f"rank {rank}"}})
            for thread, (name, tracks) in enumerate(self._rows(rank)):
                where = {"pid": rank, "tid": thread}
                events.append({"name": "thread_name", "ph": "M", **where, "args": {"name": name}})
                for segment in tracks[0].segments:
                    events.append(
                        {
                            "name": segment.label,
                            "cat": segment.kind,
                            "ph": "X",
                            "ts": round(segment.start, 3),
                            "dur": round(segment.end - segment.start, 3),
                            **where,
                        }
                    )
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _paint(tracks: list[Track], columns: int, scale: float) -> str:
    """In each column the glyph that takes the most time; blank where less than half is used."""
    shares: dict[str, Any] = {}
    for track in tracks:
        for segment in track.segments:
            glyph = "." if segment.kind == "wait" else segment.glyph
            share = shares.setdefault(glyph, np.zeros(columns))
            lo, hi = segment.start * scale, min(segment.end * scale, columns)
            first, last = int(lo), min(int(hi), columns - 1)
            if first >= columns:
                continue
            if first == last:
                share[first] += hi - lo
                continue
            share[first] += first + 1 - lo
            share[first + 1 : last] += 1.0
            share[last] += hi - last
    if not shares:
        return " " * columns
    glyphs = sorted(shares)
    table = np.stack([shares[g] for g in glyphs]) / len(tracks)
    best, used = table.argmax(axis=0), table.sum(axis=0)
    return "".join(glyphs[b] if u >= 0.34 else " " for b, u in zip(best, used, strict=True))


def digit(number: int) -> str:
    """One character for a rank."""
    return _DIGITS[number % len(_DIGITS)]


def number_of(glyph: str) -> int | None:
    """The rank, or the first of those, that a character stands for; None if it stands for none."""
    at = _DIGITS.find(glyph)
    return None if at < 0 else at
