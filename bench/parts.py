"""Parts of the page of performance that are no suite: host and compile time, graphs, structures, tests, links."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench import environment, stats, tables, varying_m
from bench.graph_check import passed


def provenance(name: str, run: dict[str, Any]) -> str:
    """What a run was made on, by which command, and where its raw JSON is."""
    command = " ".join(run["command"][1:])
    return (
        f"{environment.hardware_line(run)}. {run['date']}.\n\n"
        f"    torchrun --nproc-per-node {run['world']} {command}\n\n"
        f"Raw data: `{name}`.\n"
    )


def _compile_times(name: str, run: dict[str, Any]) -> str:
    names = list(dict.fromkeys(step for row in run["cases"] for step in row.get("steps_s", {})))
    header = ["case", "schedule", "cold, s", "from cache, s", *(f"{step}, ms" for step in names)]
    rows = [_compile_row(row, names) for row in run["cases"]]
    text = (
        "From the decorator to the end of the first call, the most of all ranks: with empty caches, and "
        "with the binaries in Triton's. The columns behind are the steps that need no GPU, timed apart. "
        f"The first kernel of a process took {tables.number(run['first_s'], 2)} s cold.\n"
    )
    title = f"## Compile time, {tables.gpus(run['world'])}\n"
    return "\n".join([title, provenance(name, run), text, tables.markdown(header, rows), ""])


def _compile_row(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    if "failed" in row:
        return [row["name"], row["spec"], f"failed: {row['failed']}", *["-"] * (1 + len(names))]
    steps = [tables.number(1000 * row["steps_s"][step], 0) for step in names]
    times = [tables.number(row[key], 2) for key in ("cold_s", "cached_s")]
    return [row["name"], row["spec"], *times, *steps]


_WAYS = ("same", "allocated", "rotated", "in_turn", "fresh")

_STEPS = {
    "in_turn": "in turn",
    "backend": "by the backend",
    "exact": "sums in fp32",
    "same": "a whole call",
    "mm alone": "product alone",
    "backend alone": "collective alone",
}
_STEPS_TEXT = (
    "What the library's schedule consists of, microseconds: PyTorch's own two calls; with the collective of the "
    "group's backend, which leaves out what `torch.distributed` does in front; with a product whose sums are in "
    "fp32 whatever the process allows; and the kernel as it is called. Of the last two columns each is of a loop "
    "of its own, where the caches of the CPU are warmer.\n"
)


def _host_costs(name: str, run: dict[str, Any]) -> str:
    header = ("case", "schedule", *(f"{way.replace('_', ' ')}, us" for way in _WAYS))
    rows = [
        [row["name"], row["schedule"], f"failed: {row['failed']}", *["-"] * (len(_WAYS) - 1)]
        if "failed" in row
        else [*(row["name"], row["schedule"]), *(_median(row, way) for way in _WAYS)]
        for row in run["cases"]
    ]
    text = (
        "Microseconds that the host spends in an eager call, without synchronising: the median over calls, of "
        "the slowest rank. The same tensors each time and the output given; allocated by the call; eight sets "
        "of inputs in turn; PyTorch's own two calls, product and collective; tensors that no call has seen "
        "before.\n"
    )
    title = f"## Host time of a call, {tables.gpus(run['world'])}\n"
    lines = [title, provenance(name, run), text, tables.markdown(header, rows), ""]
    parts = [row for row in run["cases"] if "backend" in row]
    if parts:
        cells = [[row["name"], *(_median(row, step) for step in _STEPS)] for row in parts]
        lines += [_STEPS_TEXT, tables.markdown(("case", *_STEPS.values()), cells), ""]
    return "\n".join(lines)


def _median(row: dict[str, Any], way: str) -> str:
    return tables.number(row[way]["median_us"], 1) if way in row else "-"


def _structures(name: str, run: dict[str, Any]) -> str:
    """Products of one GPU: cuBLAS time over ours by structure, and the best of each shape."""
    facts = run["environment"]
    names = [n for n in run["cases"][0]["median_us"] if n != stats.CUBLAS]
    rows, best = [], []
    for case in run["cases"]:
        times = case["median_us"]
        ratios = {n: times[stats.CUBLAS] / times[n] for n in names if n in times}
        best.append(max(ratios.values()))
        cells = [f"{ratios[n]:.3f}" if n in ratios else "-" for n in names]
        shape = " x ".join(map(str, case["shape"]))
        rows.append([shape, tables.number(times[stats.CUBLAS], 1), *cells, f"{best[-1]:.3f}"])
    text = (
        "Time of cuBLAS over ours, structure by structure (tile and stages behind its name): `turns`, two warp "
        "groups on alternating tiles; `halves`, each group half the rows of all; `triton`, the flattened loop. "
        f"The best of each shape: geometric mean {statistics.geometric_mean(best):.3f}, least "
        f"{min(best):.3f}; it is the fastest of several in one run, so it leans high.\n"
    )
    head = f"{environment.hardware_line(facts)}. {facts['date']}.\n\n    python -m bench.gluon --out FILE\n"
    table = tables.markdown(("M x K x N", "cuBLAS, us", *names, "best"), rows)
    title = "## Structures of products, one GPU\n"
    return "\n".join([title, head, f"Raw data: `{name}`.\n", text, table, ""])


def _tests(name: str, run: dict[str, Any]) -> str:
    rows = run["rows"]
    right = sum(bool(row["ok"]) for row in rows)
    world, count = run["world"], run.get("gpus", run["world"])
    where = tables.gpus(count) if count == world else f"{world} ranks on {tables.gpus(count)}"
    share = "" if count == world else f" --world {world} --share"
    stopped = [str(row.get("test", row.get("kernel"))) for row in rows if not row["ok"]]
    failed = f" Not: {', '.join(stopped)}." if stopped else ""
    return (
        f"## GPU tests, {where}\n\n"
        f"{run['gpu']}, torch {run['torch']}: {right} of {len(rows)} passed.{failed}\n\n"
        f"    python -m tests.gpu.run_all --out DIR{share}\n\n"
        f"Raw data: `{name}`.\n"
    )


def _graphs(name: str, run: dict[str, Any]) -> str:
    header = (
        "case",
        "schedule",
        "replays",
        "mismatched",
        "eager calls",
        "mismatched",
        "control",
        "",
    )
    rows = [_graph_row(case) for case in run["cases"]]
    text = (
        "Every replay has fresh random inputs, and every element of every output is compared; "
        "the control compares with the result of other inputs and must mismatch.\n"
    )
    lines = [
        f"## Replays of CUDA graphs, {tables.gpus(run['world'])}\n",
        provenance(name, run),
        text,
    ]
    return "\n".join([*lines, tables.markdown(header, rows), ""])


def _graph_row(case: dict[str, Any]) -> list[str]:
    if "failed" in case:
        return [case["name"], case["schedule"], *["-"] * 5, f"failed: {case['failed']}"]
    counts = ("replays", "mismatched_elements", "eager_calls", "eager_mismatched_elements")
    cells = [f"{case[key]:,}" for key in (*counts, "control_mismatched_elements")]
    return [case["name"], case["schedule"], *cells, "passed" if passed(case) else "FAILED"]


_PATTERNS = {
    "pair": "one sends to one",
    "both": "two send to each other",
    "shift": "all to the next, then the one behind",
    "exchange": "all in pairs, one pair after the other",
    "mix": "all to all by turns",
}
_LINKS_TEXT = (
    "GB/s that leave a rank: the copy engine with one copy of 16 MiB a peer, on one stream or (copies) on one for "
    "each peer; N CTAs with TMA boxes of 128 x 64 elements; N CTAs with loads and stores by addresses. Behind the "
    "stroke: while cuBLAS multiplies on the same GPU. CTAs then wait for SMs too.\n"
)


def _links(name: str, run: dict[str, Any]) -> str:
    rates: dict[tuple[str, str], dict[bool, float]] = {}
    for row in run["rows"]:
        found = rates.setdefault((row["pattern"], row["mover"]), {})
        found[bool(row["beside_product"])] = row["gb_per_s"]
    movers = list(dict.fromkeys(row["mover"] for row in run["rows"]))
    patterns = [p for p in _PATTERNS if any(row["pattern"] == p for row in run["rows"])]

    def cell(pattern: str, mover: str) -> str:
        found = rates.get((pattern, mover))
        if not found:
            return "-"
        return " / ".join(tables.number(found[beside], 0) for beside in sorted(found))

    rows = [[mover, *(cell(p, mover) for p in patterns)] for mover in movers]
    table = tables.markdown(["mover", *(_PATTERNS[p] for p in patterns)], rows)
    title = f"## Links, {tables.gpus(run['world'])}\n"
    return "\n".join([title, provenance(name, run), _LINKS_TEXT, table, ""])


def _varying(name: str, run: dict[str, Any]) -> str:
    """Calls with a dynamic number of rows, a step of a trace at a time."""
    ours, alone, turn = varying_m.DYNAMIC, stats.TUNED, stats.IN_TURN
    rows, words = [], []
    for kind, found in run["traces"].items():
        steps = sorted(found["steps"], key=lambda step: int(step["m"]))
        better = either = 0
        for step in steps:
            times = step["median_us"]
            mine, others = times.get(ours), [times[n] for n in (alone, turn) if times.get(n)]
            cells = [
                tables.number(times[n], 1) if times.get(n) else "-" for n in (ours, alone, turn)
            ]
            ratio = "failed" if mine is None or not others else f"{mine / min(others):.3f}"
            rows.append([kind, str(step["m"]), *cells, ratio])
            if mine is not None and others:
                better += mine <= varying_m.MARGIN * min(others)
                either += mine <= varying_m.MARGIN * max(others)
        programs = max(int(step["programs"]) for step in steps)
        words.append(
            f"{kind}: {programs} programs for {len(steps)} steps; within {varying_m.MARGIN:.2f} of one of the "
            f"two in {either}, of the faster of them in {better}."
        )
    text = (
        "One kernel with a dynamic M through a trace of serving, in each step beside the kernel that a plain call "
        "compiles for this M alone and beside NCCL and cuBLAS in turn; microseconds, and the time over the "
        f"lesser of the other two. {' '.join(words)}\n"
    )
    header = (
        "kernel",
        "M",
        "dynamic, us",
        "for this M alone, us",
        "in turn, us",
        "over the lesser",
    )
    title = f"## Rows that vary, {tables.gpus(run['world'])}\n"
    return "\n".join([title, provenance(name, run), text, tables.markdown(header, rows), ""])


def _rows_behind(name: str, run: dict[str, Any]) -> str:
    """What filling in rows takes, against reading on behind a matrix."""
    rows = [
        [row["schedule"], str(row["rows"]), str(row["behind"])]
        + [tables.number(row[key], 1) for key in ("ends_us", "behind_us")]
        for row in run["rows"]
    ]
    if not rows:
        return ""
    text = (
        "Products of few rows, K = 8192 and N = 7168, under schedules by emitter and rows of a tile; "
        "microseconds. Where the descriptor of the left operand ends with its rows, TMA fills in zeros for those "
        "that a tile has beyond; where it reaches on into what lies behind in the same allocation, as kernels "
        "of dynamic rows do, they are read. *Behind*: how many rows there were. The results have the same bits.\n"
    )
    header = ("schedule", "rows", "behind", "ends, us", "reads on, us")
    title = f"## Rows behind a matrix, {tables.gpus(run['world'])}\n"
    return "\n".join([title, provenance(name, run), text, tables.markdown(header, rows), ""])


PARTS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "host_cost": _host_costs,
    "gluon_gemm": _structures,
    "gpu_tests": _tests,
    "graph_check": _graphs,
    "compile_time": _compile_times,
    "links": _links,
    "varying_m": _varying,
    "rows_behind": _rows_behind,
}
