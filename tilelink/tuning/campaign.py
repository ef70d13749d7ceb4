"""A tuning run over many problems: plan all by the model, compile ahead, then measure one after the other.

Nothing here touches a GPU: what does is behind :class:`Lab`. Every rank runs this; rank 0 plans, keeps the
log and the time, and its decisions are everybody's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.search import RUNGS, Log, Measured, NothingRuns, Result, Rung, Trial, search
from tilelink.schedules.tables import Entry, Run, Table, parse_table
from tilelink.tuning.errors import CannotMakeInputs
from tilelink.tuning.prepare import Prepared
from tilelink.tuning.problem import Problem


class CellOnRanks(Protocol):
    """A problem opened for measuring, on all ranks."""

    baseline: dict[str, float]

    def measure(self, schedules: Sequence[Schedule], samples: int) -> list[Measured]:
        """See :data:`tilelink.schedules.search.Measure`."""

    def close(self) -> None:
        """Frees what it holds."""


class Lab(Protocol):
    """Where a campaign runs: agreement between ranks, and what compiles and measures."""

    rank: int

    def first(self, value: Any) -> Any:
        """The value of rank 0 (JSON), on every rank."""

    def plan(self, problems: Sequence[Problem], keep: int, effort: int) -> list[list[Plan]]:
        """Rank 0: the candidates of every problem."""

    def submit(self, problem: Problem, schedules: Sequence[Schedule]) -> None:
        """Rank 0: starts to compile candidates."""

    def ready(self, problem: Problem) -> dict[str, Prepared]:
        """Rank 0: waits for them; by JSON of the schedule."""

    def open(
        self,
        problem: Problem,
        prepared: Mapping[str, Prepared],
        mark: Callable[[Schedule, str], None],
        trusted: Schedule | None,
    ) -> CellOnRanks:
        """All ranks: inputs, and what is needed to measure."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A candidate and its predicted time, microseconds."""

    schedule: str
    predicted_us: float


@dataclass(frozen=True, slots=True)
class Settings:
    """``budget``: seconds for all measuring. ``keep``: candidates a problem; ``effort``: see `prune`."""

    budget: float = 300.0
    keep: int = 8
    effort: int = 128
    rungs: tuple[Rung, ...] = RUNGS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a problem: its result, or why there is none, and the baseline's times."""

    problem: Problem
    result: Result | None
    skipped: str | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)

    def entry(self) -> Entry | None:
        """Its line in a table."""
        if self.result is None or not math.isfinite(self.result.best.us):
            return None
        name = min(self.baseline, key=self.baseline.__getitem__, default=None)
        return Entry(
            extents=self.problem.extents,
            schedule=self.result.best.schedule,
            us=self.result.best.us,
            baseline_us=None if name is None else self.baseline[name],
            baseline=name,
        )


def campaign(
    problems: Sequence[Problem],
    lab: Lab,
    settings: Settings,
    log: Path | None,
    progress: Callable[[str], None],
    finished: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Tunes every problem; ``finished`` hears of each one on every rank.

    What an earlier run with the same log has measured is not measured again, and a candidate during whose
    first run it ended counts as failed. When the budget is spent, problems not begun are skipped.
    """
    say = progress if lab.rank == 0 else lambda _: None
    say(f"planning {len(problems)} problems")
    plans = lab.plan(problems, settings.keep, settings.effort) if lab.rank == 0 else []
    shared = lab.first([[[p.schedule, _plain(p.predicted_us)] for p in some] for some in plans])
    trials = [
        [Trial(Schedule.from_json(text), us if us is not None else math.inf) for text, us in some]
        for some in shared
    ]
    if lab.rank == 0:
        for problem, some in zip(problems, trials, strict=True):
            lab.submit(problem, [_trusted(problem), *(t.schedule for t in some)])
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for number, (problem, some) in enumerate(zip(problems, trials, strict=True)):
        # A share of what is left for each problem that is left: a slow one does not starve the rest.
        left = settings.budget - (time.monotonic() - start)
        until = time.monotonic() + max(0.0, left) / (len(problems) - number)
        if lab.first(left <= 0):
            outcome = Outcome(problem, None, f"out of time, {settings.budget:.0f} s")
        else:
            outcome = _tune(problem, some, lab, settings, log, until, say)
        say(_line(outcome, number + 1, len(problems), time.monotonic() - start))
        finished(outcome)
        outcomes.append(outcome)
    return outcomes


def _tune(
    problem: Problem,
    trials: list[Trial],
    lab: Lab,
    settings: Settings,
    path: Path | None,
    until: float,
    say: Callable[[str], None],
) -> Outcome:
    log = _open_log(problem, lab, path)
    ready = lab.ready(problem) if lab.rank == 0 else {}
    shared = lab.first({text: [p.path, p.failed] for text, p in ready.items()})
    prepared = {text: Prepared(file, failed) for text, (file, failed) in shared.items()}
    runnable = []
    for trial in trials:
        failed = prepared[trial.schedule.to_json()].failed
        if failed is None:
            runnable.append(trial)
        else:
            trial.rungs[0] = Measured(failed=failed)
            log.add(trial, 0)

    trusted = _trusted(problem)
    usable = prepared.get(trusted.to_json(), Prepared(None, "")).failed is None
    try:
        cell = lab.open(problem, prepared, log.mark, trusted if usable else None)
        try:
            result = search(
                runnable,
                cell.measure,
                log,
                lambda: bool(lab.first(time.monotonic() > until)),
                settings.rungs,
                say,
                problem.cell,
            )
        finally:
            cell.close()
    except (NothingRuns, CannotMakeInputs) as error:
        return Outcome(problem, None, str(error).splitlines()[0])
    failures = [t for t in trials if t not in runnable]
    return Outcome(
        problem, Result((*result.trials, *failures), result.stopped), None, dict(cell.baseline)
    )


def _trusted(problem: Problem) -> Schedule:
    """The schedule that leaves most to the library: nothing overlaps."""
    return default_schedule(problem.build()).with_resource("none")


def _open_log(problem: Problem, lab: Lab, path: Path | None) -> Log:
    """The log as rank 0 has it, on every rank; only rank 0 writes."""
    log = Log(path if lab.rank == 0 else None, problem.cell)
    mine = [
        [text, samples, list(m.samples_us), m.failed] for (text, samples), m in log.known.items()
    ]
    known, lost = lab.first([mine, sorted(log.lost)])
    for text, samples, times, failed in known:
        log.known[text, samples] = Measured(tuple(times), failed)
    log.lost = set(lost)
    log.write(cell=problem.cell, problem=json.loads(problem.to_json()), date=_now())
    return log


def _now() -> str:
    """The time, as benchmarks write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def _line(outcome: Outcome, number: int, total: int, seconds: float) -> str:
    head = f"[{seconds:6.1f} s] {number}/{total} "
    if outcome.result is None:
        return f"{head}{outcome.problem.cell}: {outcome.skipped}"
    text = head + outcome.result.summary(outcome.problem.cell)
    for name, us in outcome.baseline.items():
        text += f"; {name} {us:.1f} us, {us / outcome.result.best.us:.3f}x"
    return text


def _plain(us: float) -> float | None:
    return us if math.isfinite(us) else None


def store(outcomes: Sequence[Outcome], device: str, run: Run, folder: Path) -> list[Path]:
    """Puts what was found into the tables of ``folder``; the files that changed."""
    by_table: dict[str, tuple[Table, list[Entry]]] = {}
    for outcome in outcomes:
        entry = outcome.entry()
        if entry is None:
            continue
        empty = outcome.problem.table(device)
        by_table.setdefault(empty.file_name, (empty, []))[1].append(entry)
    changed = []
    for name, (empty, entries) in sorted(by_table.items()):
        path = folder / name
        known = parse_table(path.read_text(encoding="utf-8"), name) if path.exists() else empty
        # Times of another computation say nothing about this one.
        table = known if known.key == empty.key else empty
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table.with_entries(entries, run).to_json(), encoding="utf-8")
        changed.append(path)
    return changed
