"""How well the model predicts: its error over measured cells, and the schedules it would have picked."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.schedules import Schedule
from tilelink.schedules.machine import Machine
from tilelink.tuning.predict import predicted_us
from tilelink.tuning.problem import READY_MADE, Problem

CLOSE = 1.07  # of the best measured time: a pick within it counts as good


class BadScoreFile(TilelinkError):
    """A file to score the model by that holds no measured schedules."""

    code = "bad-score-file"
    message = "{path} holds no measured schedules: {detail}"
    hint = "give raw JSON of bench/run.py, or the log of `tilelink tune`"


@dataclass(frozen=True, slots=True)
class Point:
    """A schedule that was measured on a problem, microseconds."""

    problem: Problem
    schedule: Schedule
    us: float


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
class Score:
    """All points, by cell."""

    cells: dict[str, tuple[Scored, ...]]

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return statistics.median(abs(s.error) for some in self.cells.values() for s in some)

    @property
    def choices(self) -> dict[str, float]:
        """Of each cell with a choice, the measured time of the predicted best over that of the best."""
        return {
            cell: min(some, key=lambda s: s.predicted_us).point.us / min(s.point.us for s in some)
            for cell, some in self.cells.items()
            if len(some) > 1
        }

    @property
    def good_share(self) -> float:
        """The share of cells in which the pick is within ``CLOSE`` of the best; 1 without a choice."""
        ratios = self.choices.values()
        return sum(r <= CLOSE for r in ratios) / len(ratios) if ratios else 1.0

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


def _class(schedule: Schedule) -> str:
    resources = "+".join(move.resource for _, move in schedule.moves) or "alone"
    return f"{schedule.emitter} {resources}"


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
            yield Point(problem, Schedule.from_json(text), us)


def _of_log(text: str, path: str) -> Iterable[Point]:
    problems: dict[str, Problem] = {}
    longest: dict[tuple[str, str], tuple[int, float]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            if "problem" in entry:
                problems[entry["cell"]] = Problem.from_json(json.dumps(entry["problem"]))
            elif entry.get("us") is not None:
                key = entry["cell"], json.dumps(entry["schedule"])
                longest[key] = max(longest.get(key, (0, 0.0)), (entry["samples"], entry["us"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadScoreFile(path=path, detail=f"line {number}: {error}") from None
    for (cell, schedule), (_, us) in longest.items():
        if cell in problems:
            yield Point(problems[cell], Schedule.from_json(schedule), us)


def score(points: Sequence[Point], machine: str | None = None) -> Score:
    """Predictions for all points, on ``machine`` (a name) or on the default one at each point's world."""
    cells: dict[str, list[Scored]] = {}
    for point in points:
        name = machine or f"h200x{point.problem.world}"
        us = predicted_us(point.problem.build(), point.schedule, Machine.load(name))
        cells.setdefault(point.problem.cell, []).append(Scored(point, us))
    return Score({cell: tuple(some) for cell, some in cells.items()})
