"""Tables from raw measurements: the fastest schedule of each cell of a benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.schedules import Schedule
from tilelink.schedules.tables import Entry, Run, Table
from tilelink.tuning.problem import READY_MADE, Problem

OURS = "tilelink"
# Parts of a baseline, measured alone: nothing that computes the whole result.
PARTS = ("cublas", "nccl")
ALONE = "gemm"  # the kernel of which the library's product is the whole


class BadHarvest(TilelinkError):
    """Raw measurements of which no table can be made."""

    code = "bad-harvest"
    message = "{source}: {detail}"
    hint = "give the raw JSON of bench/run.py"


def harvest(text: str, source: str, known: Iterable[Table] = ()) -> list[Table]:
    """The tables ``known``, with an entry for each cell of the raw JSON ``text`` in which one of ours ran.

    ``source`` is the name under which the raw data lies in the repository. Of eager calls and replays of the
    same the faster ones count, of ours and of the baseline: a repeated call is a replay.
    """
    try:
        data = json.loads(text)
        run = Run(source, data["date"][:10], dict(data["versions"]))
        cells = [(case, _entry(case)) for case in data["cases"]]
        device = data["hardware"]["gpu"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadHarvest(source=source, detail=f"{type(error).__name__}: {error}") from None
    tables = {(t.key, t.world, t.device): t for t in known}
    new: dict[tuple[str, int, str], list[Entry]] = {}
    for case, entry in cells:
        if entry is None:
            continue
        problem = Problem(READY_MADE, case["kind"], entry.extents, int(case["world"]))
        empty = problem.table(device)
        key = empty.key, empty.world, empty.device
        tables.setdefault(key, empty)
        new.setdefault(key, []).append(entry)
    return [
        table.with_entries(new[key], run) if key in new else table for key, table in tables.items()
    ]


def _entry(case: Mapping[str, Any]) -> Entry | None:
    """The fastest of ours in one cell, or None."""
    timed: dict[str, float] = {}
    ours: dict[str, tuple[float, str]] = {}
    for candidate in case["candidates"]:
        if candidate["failed"] or not candidate["samples_us"]:
            continue
        us = statistics.median(candidate["samples_us"])
        name = candidate["name"].removesuffix(" graph")
        if candidate["family"] == OURS:
            if candidate["schedule"]:
                made = us, json.dumps(candidate["schedule"])
                ours[name] = min(made, ours.get(name, made))
        elif candidate["family"] not in (*PARTS, OURS) or case["kind"] == ALONE:
            timed[name] = min(us, timed.get(name, us))
    if not ours:
        return None
    us, schedule = min(ours.values())
    baseline = min(timed, key=timed.__getitem__, default=None)
    return Entry(
        extents={"M": case["m"], "K": case["k"], "N": case["n"]},
        schedule=Schedule.from_json(schedule),
        us=us,
        baseline_us=None if baseline is None else timed[baseline],
        baseline=baseline,
    )
