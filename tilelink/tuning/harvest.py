"""Tables from raw measurements: the fastest schedule of each cell of a benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.schedules import Schedule
from tilelink.schedules.tables import Entry, Run, Table
from tilelink.tuning.problem import READY_MADE, Problem

OURS = "tilelink"
# Parts of a baseline, measured alone: nothing that computes the whole result.
PARTS = ("cublas", "nccl")
ALONE = "gemm"  # the kernel of which the library's product is the whole
# By how much another schedule has to be faster than that of the table, in one run, to take its place: less is
# noise, and what is not changed needs no new code.
GAIN = 0.01
# Microseconds of the host that an eager call may take: 60, and a tenth more, by which they differ between runs.
HOST_US = 66.0


class BadHarvest(TilelinkError):
    """Raw measurements of which no table can be made."""

    code = "bad-harvest"
    message = "{source}: {detail}"
    hint = "give the raw JSON of bench/run.py"


def harvest(
    text: str,
    source: str,
    known: Iterable[Table] = (),
    fault: Callable[[Problem, Schedule, str], str] = lambda *_: "",
) -> list[Table]:
    """The tables ``known``, with an entry for each cell of the raw JSON ``text`` in which one of ours ran.

    ``source`` is the name under which the raw data lies in the repository. Of eager calls and replays of the
    same the faster ones count, of ours and of the baseline: a repeated call is a replay. Times of several runs
    are not compared: a schedule that the run measured too, and of which none is faster by more than ``GAIN``,
    stays, with its new time. A new one whose eager call keeps the host busy for more than ``HOST_US`` is none:
    many channels by copy engine are many nodes of a graph. ``fault`` says of a problem, a schedule and a device
    why that may be no entry, empty if it may: the next fastest is taken then. What a table holds already is not
    asked about.
    """
    try:
        data = json.loads(text)
        run = Run(source, data["date"][:10], dict(data["versions"]))
        cells = [(case, _measured(case)) for case in data["cases"]]
        device = data["hardware"]["gpu"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadHarvest(source=source, detail=f"{type(error).__name__}: {error}") from None
    tables = {(t.key, t.world, t.device): t for t in known}
    new: dict[tuple[str, int, str], list[Entry]] = {}
    for case, measured in cells:
        if not measured:
            continue
        extents = measured[0].extents
        problem = Problem(READY_MADE, case["kind"], extents, int(case["world"]))
        empty = problem.table(device)
        key = empty.key, empty.world, empty.device
        kept = {e.schedule for e in tables.get(key, empty).entries if e.extents == extents}
        busy = _busy(case)
        sound = (
            e
            for e in measured
            if e.schedule in kept
            or (e.schedule not in busy and not fault(problem, e.schedule, device))
        )
        best = next(sound, None)
        if best is None:
            continue
        near = (e for e in measured if e.us <= (1.0 + GAIN) * best.us)
        tables.setdefault(key, empty)
        new.setdefault(key, []).append(next((e for e in near if e.schedule in kept), best))
    return [
        table.with_entries(new[key], run) if key in new else table for key, table in tables.items()
    ]


def _busy(case: Mapping[str, Any]) -> set[Schedule]:
    """The schedules of one cell that take too much of the host's time."""
    return {
        Schedule.from_json(json.dumps(candidate["schedule"]))
        for candidate in case["candidates"]
        if candidate["schedule"] and (candidate.get("host_us") or 0.0) > HOST_US
    }


def _measured(case: Mapping[str, Any]) -> list[Entry]:
    """What was measured of ours in one cell, the fastest first."""
    timed: dict[str, float] = {}
    ours: dict[str, float] = {}
    for candidate in case["candidates"]:
        if candidate["failed"] or not candidate["samples_us"]:
            continue
        us = statistics.median(candidate["samples_us"])
        if candidate["family"] == OURS:
            if candidate["schedule"]:
                made = json.dumps(candidate["schedule"])
                ours[made] = min(us, ours.get(made, us))
        elif candidate["family"] not in (*PARTS, OURS) or case["kind"] == ALONE:
            name = candidate["name"].removesuffix(" graph")
            timed[name] = min(us, timed.get(name, us))
    baseline = min(timed, key=timed.__getitem__, default=None)
    return [
        Entry(
            extents={"M": case["m"], "K": case["k"], "N": case["n"]},
            schedule=Schedule.from_json(schedule),
            us=us,
            baseline_us=None if baseline is None else timed[baseline],
            baseline=baseline,
        )
        for us, schedule in sorted((us, schedule) for schedule, us in ours.items())
    ]
