"""Which measured runs the pages show as what users get, and which compare schedules, or are earlier or partial.

A *suite* measures what a plain call chooses, or the resources by name, beside the baselines; its figures are held
against the limits of :mod:`bench.claims`. A *comparison* measures schedules out of files, or has no baselines: it
says which of them is faster, and nothing about what a user gets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench import claims, stats

Run = dict[str, Any]
Named = tuple[str, Run]
PLAIN = "tilelink tuned"  # the candidate that is what a plain call does
# Schedules that a run asks for by name; others are files.
_BY_NAME = re.compile(r"tuned|default|library|copy_engine|sm:\d+|epilogue|collective|none")


def suites(runs: Sequence[Named]) -> list[Named]:
    """The runs that are held against limits."""
    return [e for e in runs if e[1].get("kind") == "bench" and not is_comparison(e[1])]


def comparisons(runs: Sequence[Named]) -> list[Named]:
    """The runs that say which of several schedules is the fastest."""
    return [e for e in runs if e[1].get("kind") == "bench" and is_comparison(e[1])]


def is_comparison(run: Run) -> bool:
    """Whether a run compares schedules out of files, or has no baselines at all."""
    results = claims.results_of(run)
    own = {c.name for r in results for c in r.candidates if c.family == stats.OURS}
    labels = {stats.short_name(name, stats.OURS).removesuffix("graph").strip() for name in own}
    return not has_baselines(results) or not any(_BY_NAME.fullmatch(name) for name in labels)


def has_baselines(results: Iterable[stats.CaseResult]) -> bool:
    """Whether something else than ours was timed that gives the same result."""
    return any(result.best_baseline is not None for result in results)


def is_partial(run: Run) -> bool:
    """Whether the run was asked for some cells of its suite only, or had no time for the others."""
    return "--only" in run["command"] or bool(run["not_measured"])


def leading(suites: Sequence[Named]) -> list[Named]:
    """For each number of GPUs the run of the grid that the summary shows, most GPUs first.

    The newest that was asked for all cells; where there is none, the one of most cells.
    """
    grids = [entry for entry in suites if entry[1]["suite"] == "grid"]

    def rank(entry: Named) -> tuple[bool, int, str, str]:
        whole = not is_partial(entry[1])
        return whole, 0 if whole else len(entry[1]["cases"]), entry[1]["date"], entry[0]

    worlds = sorted({run["world"] for _, run in grids}, reverse=True)
    return [max((e for e in grids if e[1]["world"] == world), key=rank) for world in worlds]


def renewed(entry: Named, suites: Sequence[Named]) -> tuple[Run, list[str]]:
    """A run of the grid in which cells that plain calls were measured at since, on as many GPUs of the same name,
    stand as measured then, beside baselines; and the files of those, newest first."""
    _, run = entry
    cells = {case["name"]: (case, "") for case in run["cases"]}
    newer = [
        (name, later)
        for name, later in suites
        if (later["suite"], later["world"]) == ("grid", run["world"])
        and later["hardware"]["gpu"] == run["hardware"]["gpu"]
        and later["date"] > run["date"]
        and "--no-baselines" not in later["command"]
    ]
    for name, later in sorted(newer, key=lambda e: (e[1]["date"], e[0])):
        for case in later["cases"]:
            plain = [c for c in case["candidates"] if c["name"] == PLAIN and not c["failed"]]
            if plain and case["skipped"] is None:
                cells[case["name"]] = case, name
    order = [name for name, _ in sorted(newer, key=lambda e: e[1]["date"], reverse=True)]
    used = {source for _, source in cells.values()}
    missing = [name for name in run["not_measured"] if name not in cells]
    merged = {**run, "cases": [case for case, _ in cells.values()], "not_measured": missing}
    return merged, [name for name in order if name in used]


def current(found: Sequence[Named]) -> list[Named]:
    """Of suites: the :func:`leading` runs, and behind them the newest whole one of every other suite, number of
    GPUs and kind of GPU, most GPUs first."""
    first = leading(found)
    newest: dict[tuple[str, int, str], Named] = {}
    for entry in sorted(found, key=newest_first):
        run = entry[1]
        if run["suite"] != "grid" and not is_partial(run):
            newest[run["suite"], run["world"], run["hardware"]["gpu"]] = entry
    return [*first, *sorted(newest.values(), key=newest_first, reverse=True)]


def newest_first(entry: Named) -> tuple[int, str, str]:
    """A key: most GPUs last, and of as many the newest."""
    return entry[1]["world"], entry[1]["date"], entry[0]
