"""Search of a schedule space: prune by a model, then measure in rounds that halve the field.

Pure: what predicts and what measures are functions that are passed in. Successive halving after Jamieson
and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization" (AISTATS 2016).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.schedules.schedule import Schedule
from tilelink.schedules.space import Space, by_class, class_of, estimate_us

Predict = Callable[[Sequence[Schedule]], list[float]]
"""Microseconds of each schedule; infinity for one that cannot be compiled."""


# How much slower than the best a class may be predicted and still be measured.
WORTH = 1.6
# The same of a further schedule of a class.
NEAR = 1.15
STARTED, CHECKED = "started", "checked"


class NothingRuns(TilelinkError):
    """A search in which every candidate failed."""

    code = "nothing-runs"
    message = "none of {count} schedules of `{kernel}` runs"
    hint = "the log names each one's error"


class BadLog(TilelinkError):
    """A log of trials with a line that is none."""

    code = "bad-log"
    message = "{path}:{line} is no trial: {detail}"
    hint = "remove the line, or the file to start afresh"


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of measuring one schedule: microseconds of each sample, or why there are none."""

    samples_us: tuple[float, ...] = ()
    failed: str | None = None

    @property
    def us(self) -> float:
        """The median sample; infinity where it failed."""
        return statistics.median(self.samples_us) if self.samples_us else math.inf


Measure = Callable[[Sequence[Schedule], int], list[Measured]]
"""Measures each schedule this many times, all in turn in each round."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One round of a search: samples a candidate, and how many candidates go on to the next."""

    samples: int
    keep: int


RUNGS = (Rung(5, 4), Rung(10, 2), Rung(20, 1))


@dataclass(slots=True)
class Trial:
    """One schedule in a search. ``rungs``: what was measured, by number of samples asked for."""

    schedule: Schedule
    predicted_us: float
    rungs: dict[int, Measured] = field(default_factory=dict)

    @property
    def last(self) -> Measured | None:
        """The measurement with the most samples."""
        return self.rungs[max(self.rungs)] if self.rungs else None

    @property
    def us(self) -> float:
        """The median of the last measurement; infinity where there is none."""
        return self.last.us if self.last is not None else math.inf

    @property
    def failed(self) -> str | None:
        """Why it has no time."""
        return next((m.failed for m in self.rungs.values() if m.failed is not None), None)


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a search: all trials, the best first; ``stopped`` if the time ran out."""

    trials: tuple[Trial, ...]
    stopped: str | None = None

    @property
    def best(self) -> Trial:
        """The fastest."""
        return self.trials[0]

    @property
    def failures(self) -> tuple[Trial, ...]:
        """The trials that failed."""
        return tuple(t for t in self.trials if t.failed is not None)

    def summary(self, kernel: str) -> str:
        """One line: how many ran and failed, the best and what was predicted."""
        best = self.best
        text = (
            f"{kernel}: {len(self.trials)} schedules, {len(self.failures)} failed, best "
            f"{best.us:.1f} us (predicted {best.predicted_us:.1f})"
        )
        return text + (f", stopped: {self.stopped}" if self.stopped else "")


class Log:
    """Every trial of a search as a line of JSON, so that an interrupted one goes on.

    ``cell`` names the problem; one file may hold many. With no path nothing is kept.
    """

    def __init__(self, path: Path | None, cell: str) -> None:
        self.path, self.cell = path, cell
        self.known: dict[tuple[str, int], Measured] = {}
        # Schedules during whose first call an earlier run ended.
        self.lost: set[str] = set()
        if path is not None and path.exists():
            self.load(path.read_text(encoding="utf-8").splitlines(), str(path))

    def load(self, lines: Iterable[str], name: str) -> None:
        """Takes over the trials of this cell; BadLog for a line that is none, but a torn last one."""
        every = list(lines)
        for number, line in enumerate(every, 1):
            try:
                entry = json.loads(line)
                if entry.get("cell") != self.cell or "schedule" not in entry:
                    continue
                text = Schedule.from_json(json.dumps(entry["schedule"])).to_json()
                if "state" in entry:
                    (self.lost.add if entry["state"] == STARTED else self.lost.discard)(text)
                    continue
                measured = Measured(tuple(entry["samples_us"]), entry["failed"])
                self.known[text, int(entry["samples"])] = measured
                self.lost.discard(text)
            except (ValueError, KeyError, TypeError, AttributeError, TilelinkError) as error:
                # An interrupted run may leave half a line at the end.
                if number == len(every):
                    return
                raise BadLog(path=name, line=number, detail=str(error).splitlines()[0]) from None

    def add(self, trial: Trial, samples: int) -> None:
        """Keeps what was just measured."""
        measured = trial.rungs[samples]
        self.known[trial.schedule.to_json(), samples] = measured
        us = None if measured.failed is not None else round(measured.us, 3)
        self.write(
            cell=self.cell,
            schedule=trial.schedule.to_sparse(),
            predicted_us=_finite(trial.predicted_us),
            samples=samples,
            us=us,
            samples_us=[round(s, 3) for s in measured.samples_us],
            failed=measured.failed,
        )

    def mark(self, schedule: Schedule, state: str) -> None:
        """Keeps that a schedule's first call is about to be made (``STARTED``), or is over (``CHECKED``)."""
        self.write(cell=self.cell, schedule=schedule.to_sparse(), state=state)

    def write(self, **entry: Any) -> None:
        """Appends one line."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def prune(
    space: Space,
    predict: Predict,
    keep: int,
    effort: int = 64,
    first: Sequence[Schedule] = (),
    usable: Callable[[Schedule], bool] = lambda _: True,
) -> list[Trial]:
    """The ``keep`` most promising schedules by ``predict``, with the default and ``first`` among them.

    So is what does not overlap, the library's collective and its product one after the other, however slow it
    is expected to be: what a user has without us must be measured, and taken where nothing beats it.
    ``effort`` bounds the predictions; what is not ``usable`` is passed over. The best computations of each
    emitter and form of roles, by an estimate of the product alone, are combined with every way to move; the
    best classes of these with more computations, and with what their first member left open. The best of every
    class (:func:`class_of`) comes before the second of any, as long as it is not ``WORTH`` times as slow as the
    best of all: the model may be wrong about a class as a whole. Of schedules that it cannot tell apart one
    stands for all.
    """
    base = space.base

    def kind(schedule: Schedule) -> tuple[Any, ...]:
        return class_of(schedule, space.product)

    computations = _computations(space, max(2, effort // 16))
    # What a computation is decides how tensors may move beside it, so that one of each form is a seed.
    seeds = _first_of(
        computations,
        lambda s: (kind(s)[:2], s.split > 1, s.tail > 1, space.cuts(s)),
    )
    moved = [space.moves(seed) for seed in seeds]
    apart = next((s for s in _apart(space) if usable(s)), base)
    # Of every class one before a second of any, in case that there is no effort for all; of all seeds by turns.
    firsts = _first_of(_turns([_first_of(some, kind) for some in moved]), kind)
    wanted = [*first, base, apart, *firsts, *_turns(moved)]
    predicted = _predicted(wanted, predict, effort + len(first))
    ways = _first_of(sorted(predicted, key=predicted.__getitem__), kind)[: max(2, effort // 16)]
    classes = {kind(way) for way in ways}
    # Of the best classes other numbers of channels and of workers that copy, and other computations.
    more = _turns(
        [
            [s for s in _turns(moved) if kind(s) in classes],
            [
                replace(computation, moves=way.moves, order=way.order)
                for way in ways
                for computation in computations
                if kind(computation)[:2] == kind(way)[:2]
            ],
        ]
    )
    known = set(predicted)
    predicted |= _predicted([s for s in more if s not in known], predict, effort)
    ordered = sorted(predicted, key=predicted.__getitem__)
    best = predicted[ordered[0]]
    worth = [s for s in _first_of(ordered, kind) if predicted[s] <= WORTH * best]
    # Others that differ in what the model is sure of before those that it can hardly tell apart.
    near = [s for s in ordered if predicted[s] <= NEAR * best]

    def shape(schedule: Schedule) -> tuple[Any, ...]:
        return kind(schedule), schedule.tiles, schedule.warps

    others = _first_of(near, shape)
    kin = [s for s in near if shape(s) == shape(ordered[0])][1:2]
    most = max(1, keep * 2 // 3)
    chosen: list[Trial] = []
    seen: set[Any] = set()
    for schedule in dict.fromkeys(
        [*first, base, apart, *worth[:most], *kin, *others, *near, *ordered]
    ):
        us = predicted[schedule]
        same = kind(schedule), schedule.tiles, schedule.warps, schedule.stages, us
        if len(chosen) == keep or same in seen or not math.isfinite(us) or not usable(schedule):
            continue
        seen.add(same)
        chosen.append(Trial(schedule, us))
    return sorted(chosen, key=lambda t: t.predicted_us)


def _apart(space: Space) -> list[Schedule]:
    """Schedules that overlap nothing: by the library alone, else with our own product."""
    if space.kernel["world"] == 1:
        return []
    ours = space.base.with_resource("none")
    return [replace(ours, emitter="library"), ours]


def _computations(space: Space, keep: int) -> list[Schedule]:
    """Of each emitter the best of ``keep`` tile shapes, then the best few of all, by the estimate alone.

    So for sums of the whole depth, for those in parts, and where the last wave is in parts.
    """

    def estimate(schedule: Schedule) -> float:
        return estimate_us(space.product, schedule, space.machine)

    ordered = sorted(space.computations(), key=estimate)
    shapes = _first_of(ordered, lambda s: (s.emitter, s.split, s.tail, s.tiles, s.warps))
    diverse: list[Schedule] = []
    for parted in ((False, False), (True, False), (False, True)):
        for some, many in ((shapes, keep), (ordered, max(2, keep // 2))):
            fit = [s for s in some if (s.split > 1, s.tail > 1) == parted]
            diverse += by_class(fit, estimate, many, space.product)
    return sorted(dict.fromkeys(diverse), key=estimate)


def _predicted(
    schedules: Iterable[Schedule], predict: Predict, limit: int
) -> dict[Schedule, float]:
    unique = list(dict.fromkeys(schedules))[:limit]
    return dict(zip(unique, predict(unique), strict=True))


def _turns(lists: Sequence[Sequence[Schedule]]) -> list[Schedule]:
    """The first of every list, then the second of every list, and so on."""
    rows = zip_longest(*lists)
    return [one for row in rows for one in row if one is not None]


def _first_of(schedules: Iterable[Schedule], key: Callable[[Schedule], Any]) -> list[Schedule]:
    """The first schedule of each value of ``key``."""
    found: dict[Any, Schedule] = {}
    for schedule in schedules:
        found.setdefault(key(schedule), schedule)
    return list(found.values())


def search(
    trials: Sequence[Trial],
    measure: Measure,
    log: Log,
    out_of_time: Callable[[], bool],
    rungs: Sequence[Rung] = RUNGS,
    progress: Callable[[str], None] = lambda _: None,
    kernel: str = "kernel",
) -> Result:
    """Measures ``trials``, fewer and more precisely from rung to rung; the fastest of the last one wins.

    What the log holds is not measured again. ``out_of_time`` is asked between rungs; all ranks of a
    measurement must get the same answer. NothingRuns where every schedule failed.
    """
    field_ = list(trials)
    stopped = None
    for number, rung in enumerate(rungs, 1):
        if number > 1 and out_of_time():
            stopped = f"out of time before round {number}"
            break
        progress(f"{kernel}: round {number} of {len(rungs)}, {len(field_)} schedules")
        _measure_rung(field_, rung.samples, measure, log)
        running = [t for t in field_ if t.failed is None]
        if not running:
            raise NothingRuns(
                kernel=kernel,
                count=len(trials),
                notes=tuple(f"{t.schedule.to_json()}: {t.failed}" for t in trials[:8]),
            )
        running.sort(key=lambda t: t.us)
        field_ = running[: rung.keep] if number < len(rungs) else running
        progress(f"{kernel}: best {running[0].us:.1f} us, {_failed(trials)} failed")
    rest = [t for t in trials if t not in field_]
    # What was measured longest stands first: its time is the one that decided.
    rest.sort(key=lambda t: (t.failed is not None, -len(t.rungs), t.us))
    result = Result((*field_, *rest), stopped)
    return result


def _measure_rung(trials: Sequence[Trial], samples: int, measure: Measure, log: Log) -> None:
    missing = []
    for trial in trials:
        text = trial.schedule.to_json()
        known = log.known.get((text, samples))
        if text in log.lost:
            trial.rungs[samples] = Measured(failed="an earlier run ended during its first call")
        elif known is None:
            missing.append(trial)
        else:
            trial.rungs[samples] = known
    if not missing:
        return
    measured = measure([t.schedule for t in missing], samples)
    for trial, found in zip(missing, measured, strict=True):
        trial.rungs[samples] = found
        log.add(trial, samples)


def _failed(trials: Sequence[Trial]) -> int:
    return sum(t.failed is not None for t in trials)


def as_json(trial: Trial) -> dict[str, Any]:
    """A trial as JSON data."""
    return {
        "schedule": trial.schedule.to_sparse(),
        "predicted_us": _finite(trial.predicted_us),
        "rungs": {str(samples): asdict(found) for samples, found in trial.rungs.items()},
    }
