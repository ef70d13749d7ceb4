"""Tables of results: one row a case, columns by kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.cases import AG_GEMM, GEMM, GEMM_AR, GEMM_RS
from bench.stats import (
    ASYNC_TP,
    CUBLAS,
    IN_TURN,
    NCCL,
    ONE_SHOT,
    OURS,
    TWO_SHOT,
    CaseResult,
    short_name,
)

Column = tuple[str, Callable[[CaseResult], str]]

KINDS = (AG_GEMM, GEMM_RS, GEMM_AR, GEMM)


def columns(kind: str) -> list[Column]:
    """Titles and cells of a kind's table, without the case's name; times in ms."""
    cublas = _alone("cuBLAS", CUBLAS)
    nccl = _alone("NCCL", NCCL)
    ours: list[Column] = [
        ("tilelink", lambda case: milliseconds(case.ours_us)),
        ("schedule", _schedule),
    ]
    if kind == GEMM:
        return [cublas, *ours, ("over cuBLAS [95 %]", _over_baseline)]
    families = [("in turn", IN_TURN)]
    if kind == GEMM_AR:
        families += [("one-shot", ONE_SHOT), ("two-shot", TWO_SHOT)]
    else:
        families += [("async-TP", ASYNC_TP)]
    return [
        cublas,
        nccl,
        ("bound", lambda case: milliseconds(case.bound_us)),
        *(_variant(title, family) for title, family in families),
        *ours,
        ("over in turn", lambda case: number(case.speedup, 2)),
        ("best of them", _best_baseline),
        ("over it [95 %]", _over_baseline),
        ("efficiency", lambda case: number(case.efficiency, 3)),
    ]


def header(kind: str) -> list[str]:
    """The titles of a kind's table."""
    return ["M x K x N", *(title for title, _ in columns(kind))]


def rows(results: Sequence[CaseResult]) -> list[list[str]]:
    """One row a case, under the header of its kind."""
    return [_row(case) for case in results]


def _row(case: CaseResult) -> list[str]:
    shape = f"{case.m} x {case.k} x {case.n}"
    cells = columns(case.kind)
    if case.skipped is not None:
        return [shape, *["-"] * (len(cells) - 1), f"skipped: {case.skipped}"]
    return [shape, *(make(case) for _, make in cells)]


def by_kind(results: Sequence[CaseResult]) -> list[tuple[str, int, list[CaseResult]]]:
    """Kind, number of ranks, and their results in the order measured; in a fixed order."""
    groups: dict[tuple[str, int], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.kind, result.world), []).append(result)
    order = sorted(groups, key=lambda key: (_place(key[0]), key))
    return [(*key, groups[key]) for key in order]


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def text(results: Sequence[CaseResult]) -> str:
    """All results as plain text tables, one a kind and number of ranks."""
    parts = [
        f"{kind}, {gpus(world)}\n{render(header(kind), rows(chosen))}"
        for kind, world, chosen in by_kind(results)
    ]
    return "\n\n".join(parts)


def gpus(count: int) -> str:
    """``1 GPU``, ``8 GPUs``."""
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def render(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A plain text table, two spaces between columns."""
    lines = [list(titles), *map(list, cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)


def milliseconds(us: float | None) -> str:
    """``1.234`` from 1234 microseconds, ``-`` from None."""
    return number(None if us is None else us / 1000, 3)


def number(value: float | None, digits: int) -> str:
    """``value`` with ``digits`` decimals, ``-`` from None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _alone(title: str, family: str) -> Column:
    return title, lambda case: milliseconds(case.time_us(family))


def _variant(title: str, family: str) -> Column:
    def cell(case: CaseResult) -> str:
        best = case.best(family)
        if best is None:
            return "-"
        return f"{milliseconds(best.median_us)} {short_name(best.name, family)}".strip()

    return title, cell


def _schedule(case: CaseResult) -> str:
    return "failed" if case.ours is None else short_name(case.ours.name, OURS)


def _best_baseline(case: CaseResult) -> str:
    return "-" if case.best_baseline is None else case.best_baseline.name


def _over_baseline(case: CaseResult) -> str:
    return "-" if case.over_baseline is None else str(case.over_baseline)
