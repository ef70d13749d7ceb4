"""How well the model predicts: its error over measured cells, and the schedules it would have picked.

Only what was measured can be judged: the pick of a cell is the schedule that is predicted to be the fastest of
those that were. Files of several runs are scored together; of a schedule that several measured, the newest
counts. What was measured of a form whose code has changed since can be left out by rules (:class:`Change`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.schedules import Move, Schedule
from tilelink.schedules.machine import Machine
from tilelink.tuning.predict import predicted_us
from tilelink.tuning.problem import READY_MADE, Problem

CLOSE = 1.07  # of the best measured time: a pick within it counts as good
FEW_ROWS = 1024  # up to which a call is as much latency as work


class BadScoreFile(TilelinkError):
    """A file to score the model by that holds no measured schedules."""

    code = "bad-score-file"
    message = "{path} holds no measured schedules: {detail}"
    hint = "give raw JSON of bench/run.py, or the log of `tilelink tune`"


class BadChangesFile(TilelinkError):
    """A file of rules about measurements that are no longer of today's code, with one that is none."""

    code = "bad-changes-file"
    message = "{path} holds no rules: {detail}"
    hint = "a list of objects with `before`, `why`, and `kernels`, `schedule` or `move`; docs/tuning.md has them"


@dataclass(frozen=True, slots=True)
class Point:
    """A schedule that was measured on a problem, microseconds; ``date`` (ISO 8601), where the file says it."""

    problem: Problem
    schedule: Schedule
    us: float
    date: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A form whose code has changed: what was measured of it earlier than ``before`` is of other code.

    It is of the form where its kernel is one of ``kernels`` (None: any) and all the fields of ``schedule``, and
    those of ``move`` in one of its moves, have the values that are given.
    """

    before: str
    why: str
    kernels: tuple[str, ...] | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    move: Mapping[str, Any] = field(default_factory=dict)

    def outdates(self, point: Point) -> bool:
        """Whether ``point`` was measured with the code of before; points without a date were."""
        if self.kernels is not None and point.problem.kernel not in self.kernels:
            return False
        if any(getattr(point.schedule, name) != value for name, value in self.schedule.items()):
            return False
        moves = [move for _, move in point.schedule.moves]
        fits = any(
            all(getattr(m, name) == value for name, value in self.move.items()) for m in moves
        )
        return point.date < self.before and (fits or not self.move)


@dataclass(frozen=True, slots=True)
class Scored:
    """A point with its prediction."""

    point: Point
    predicted_us: float

    @property
    def error(self) -> float:
        """Relative: 0.1 where the prediction is a tenth too long."""
        return self.predicted_us / self.point.us - 1.0


@dataclass(frozen=True, slots=True)
class Pick:
    """What the model would take of a cell's schedules, and what was the fastest of them."""

    picked: Scored
    best: Scored

    @property
    def ratio(self) -> float:
        """The measured time of the pick over that of the best: 1 where the model is right."""
        return self.picked.point.us / self.best.point.us

    @property
    def close(self) -> bool:
        """Whether it is good enough (:data:`CLOSE`)."""
        return self.ratio <= CLOSE


@dataclass(frozen=True, slots=True)
class Score:
    """All points, by cell."""

    cells: dict[str, tuple[Scored, ...]]

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return statistics.median(abs(s.error) for some in self.cells.values() for s in some)

    @property
    def picks(self) -> dict[str, Pick]:
        """Of each cell with a choice, the predicted best and the measured best."""
        return {
            cell: Pick(min(some, key=lambda s: s.predicted_us), min(some, key=lambda s: s.point.us))
            for cell, some in self.cells.items()
            if len(some) > 1
        }

    @property
    def good_share(self) -> float:
        """The share of cells in which the pick is within ``CLOSE`` of the best; 1 without a choice."""
        picks = self.picks.values()
        return sum(pick.close for pick in picks) / len(picks) if picks else 1.0

    def of(self, cells: Iterable[str]) -> Score:
        """The score of some of the cells."""
        return Score({cell: self.cells[cell] for cell in cells})

    def by_rows(self) -> dict[str, Score]:
        """By kernel and whether a rank has few rows of what it gathers or sums (:data:`FEW_ROWS`)."""
        groups: dict[str, list[str]] = {}
        for cell, some in sorted(self.cells.items()):
            groups.setdefault(_rows_class(some[0].point.problem), []).append(cell)
        return {name: self.of(cells) for name, cells in sorted(groups.items())}

    def classes(self) -> dict[str, tuple[int, float, float]]:
        """By resource and emitter: points, median absolute error and median error."""
        found: dict[str, list[float]] = {}
        for some in self.cells.values():
            for scored in some:
                found.setdefault(_class(scored.point.schedule), []).append(scored.error)
        return {
            name: (len(e), statistics.median(map(abs, e)), statistics.median(e))
            for name, e in sorted(found.items())
        }


def in_words(schedule: Schedule) -> str:
    """A schedule on a line: emitter, tiles of the first extents by name, and what is not as usual."""
    sparse = schedule.to_sparse()
    tiles = "x".join(str(length) for _, length in _mnk(schedule))
    usual = Schedule()
    words = [schedule.emitter]
    if schedule.emitter != "library":
        words += [tiles, f"stages={schedule.stages}"] if tiles else [f"stages={schedule.stages}"]
    hidden = ("emitter", "tiles", "stages", "moves")
    words += [
        f"{name}={value}"
        for name, value in sparse.items()
        if name not in hidden and value != getattr(usual, name)
    ]
    for _, move in schedule.moves:
        words.append(move.resource)
        others = ((f.name, getattr(move, f.name)) for f in fields(Move) if f.name != "resource")
        words += [f"{n}={v}" for n, v in others if v != getattr(Move(), n)]
    return " ".join(words)


def _mnk(schedule: Schedule) -> list[tuple[str, int]]:
    """The tiles, those of M, N and K first where the extents have these names."""
    order = {name: place for place, name in enumerate("MNK")}
    return sorted(schedule.tiles, key=lambda pair: (order.get(pair[0], len(order)), pair[0]))


def _class(schedule: Schedule) -> str:
    resources = "+".join(move.resource for _, move in schedule.moves) or "alone"
    return f"{schedule.emitter} {resources}"


def _rows_class(problem: Problem) -> str:
    rows = problem.extents.get("M")
    if rows is None:
        return problem.kernel
    return f"{problem.kernel}, {'up to' if rows <= FEW_ROWS else 'more than'} {FEW_ROWS} rows"


def points_of(text: str, path: str) -> list[Point]:
    """The measured schedules of a file: raw JSON of the benchmarks, or a log of trials (JSON lines).

    Where a schedule was measured eagerly and in a graph, the replays count: they have no host in them.
    """
    try:
        found = list(_of_bench(json.loads(text)))
    except ValueError:
        found = list(_of_log(text, path))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadScoreFile(path=path, detail=f"{type(error).__name__}: {error}") from None
    if not found:
        raise BadScoreFile(path=path, detail="it lists none with a schedule and a time")
    return found


def newest(points: Iterable[Point], changes: Sequence[Change] = ()) -> list[Point]:
    """Of each cell and schedule the point of the latest date, of equal ones the last; none that is outdated."""
    found: dict[tuple[str, Schedule], Point] = {}
    for point in points:
        if any(change.outdates(point) for change in changes):
            continue
        key = point.problem.cell, point.schedule
        if key not in found or found[key].date <= point.date:
            found[key] = point
    return list(found.values())


def changes_of(text: str, path: str) -> list[Change]:
    """The rules of a file: a JSON list of objects with the fields of :class:`Change`; BadChangesFile else."""
    try:
        found = []
        for data in json.loads(text):
            kernels = data.pop("kernels", None)
            rule = Change(kernels=None if kernels is None else tuple(kernels), **data)
            unknown = {*rule.schedule} - {f.name for f in fields(Schedule)}
            unknown |= {*rule.move} - {f.name for f in fields(Move)}
            if unknown:
                raise ValueError(f"no field is called {', '.join(sorted(unknown))}")
            if not (isinstance(rule.before, str) and rule.why):
                raise ValueError("`before` is a date, `why` a text")
            found.append(rule)
    except (ValueError, TypeError, AttributeError) as error:
        raise BadChangesFile(path=path, detail=str(error)) from None
    return found


def _of_bench(data: dict[str, Any]) -> Iterable[Point]:
    for case in data["cases"]:
        extents = {"M": case["m"], "K": case["k"], "N": case["n"]}
        problem = Problem(READY_MADE, case["kind"], extents, case["world"])
        best: dict[str, tuple[bool, float]] = {}
        for candidate in case["candidates"]:
            if not candidate.get("schedule") or candidate["failed"] or not candidate["samples_us"]:
                continue
            text = json.dumps(candidate["schedule"], sort_keys=True)
            graph = candidate["name"].endswith(" graph")
            if text not in best or graph:
                best[text] = graph, statistics.median(candidate["samples_us"])
        for text, (_, us) in best.items():
            yield Point(problem, Schedule.from_json(text), us, data.get("date", ""))


def _of_log(text: str, path: str) -> Iterable[Point]:
    problems: dict[str, Problem] = {}
    longest: dict[tuple[str, str], tuple[int, float]] = {}
    dates: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            if "problem" in entry:
                problems[entry["cell"]] = Problem.from_json(json.dumps(entry["problem"]))
                dates[entry["cell"]] = entry.get("date", "")
            elif entry.get("us") is not None:
                key = entry["cell"], json.dumps(entry["schedule"])
                longest[key] = max(longest.get(key, (0, 0.0)), (entry["samples"], entry["us"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadScoreFile(path=path, detail=f"line {number}: {error}") from None
    for (cell, schedule), (_, us) in longest.items():
        if cell in problems:
            yield Point(problems[cell], Schedule.from_json(schedule), us, dates[cell])


def score(points: Sequence[Point], machine: str | None = None) -> Score:
    """Predictions for all points, on ``machine`` (a name) or on the default one at each point's world."""
    cells: dict[str, list[Scored]] = {}
    for point in points:
        name = machine or f"h200x{point.problem.world}"
        us = predicted_us(point.problem.build(), point.schedule, Machine.load(name))
        cells.setdefault(point.problem.cell, []).append(Scored(point, us))
    return Score({cell: tuple(some) for cell, some in cells.items()})
