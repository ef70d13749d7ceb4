"""Long runs on GPUs that nothing may fail, and broken kernels that must be caught.

    torchrun --nproc-per-node 4 -m tests.gpu.reliability --out DIR [soak] [replays] [occupancy] \\
        [shapes] [cost] [mutants]

Every element of every call is compared on the device with what cuBLAS computes from inputs that the rank
draws itself (`tests.gpu.integers`). Each test appends its rows to DIR/reliability.json as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tilelink
import tilelink.kernels
from bench import environment
from bench.cluster import Cluster, Watchdog, describe_error, run_all_or_none
from tests.gpu.integers import Problem, emitted, with_jitter
from tests.gpu.text_mutants import MUTANTS, TextMutant
from tilelink.errors import TilelinkError
from tilelink.schedules import default_schedule
from tilelink.schedules.tables import lookup
from tilelink.tuning.prepare import make_pool, prepare
from tilelink.tuning.problem import Problem as Cell

Row = dict[str, Any]
MOST_NS = 60_000  # the longest delay of a rank before a call; a CTA's is 4 µs
GRAPH = 20  # calls in a graph of the soak
# What is soaked, and its share of the calls of its kernel. Words behind a resource: how what is stored says that
# it is there (`word`, `sentinel`); copies of `boxes`; `folded` sums; `roles` of warps.
SOAKED = (
    ("ag_gemm", "copy_engine", 0.3),
    ("ag_gemm", "copy_engine roles", 0.2),
    ("ag_gemm", "sm:8", 0.2),
    ("ag_gemm", "sm:8 boxes", 0.3),
    ("ag_gemm", "sm:4 boxes roles", 0.2),
    ("gemm_rs", "copy_engine", 0.15),
    ("gemm_rs", "copy_engine folded roles", 0.25),
    ("gemm_rs", "sm:8", 0.1),
    ("gemm_rs", "epilogue", 0.15),
    ("gemm_rs", "epilogue folded roles", 0.15),
    ("gemm_rs", "sm:4 boxes folded roles", 0.2),
    ("gemm_rs", "epilogue sentinel", 0.2),
    ("gemm_ar", "epilogue word", 0.1),
    ("gemm_ar", "epilogue sentinel", 0.2),
)


def small(world: int) -> dict[str, int]:
    """Extents of the soak: small, with a tile of 128 rows on every rank."""
    return {"M": max(512, 128 * world), "K": 256, "N": 512}


@dataclass(slots=True)
class Run:
    """What every test is given."""

    cluster: Cluster
    watchdog: Watchdog
    options: argparse.Namespace
    write: Callable[[Row], None]

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.cluster.world

    def total(self, value: torch.Tensor | int) -> int:
        """The sum over the ranks of a number, through the store: no collective on the GPU."""
        return sum(self.cluster.agreement.gather(int(value)))

    def wants(self, kind: str, resource: str) -> bool:
        """Whether the command asks for the kernel under this resource."""
        return any(text in f"{kind} {resource}" for text in self.options.only.split(","))

    def late(self, since: float, limit: float) -> bool:
        """Whether rank 0 finds that ``limit`` seconds have passed; the same on all ranks."""
        return bool(self.cluster.agreement.first(time.monotonic() - since > limit))


def schedule_of(op: Any, resource: str, tiles: dict[str, int] | None = None) -> Any:
    """The default schedule with ``resource`` and small tiles, so that small shapes fill a grid."""
    resource, *words = resource.split()
    chosen = default_schedule(op).with_resource(resource)
    changes: dict[str, Any] = {}
    for signal in {"word", "sentinel"} & set(words):
        changes |= {"slots": 2, "sum": "stage", "signal": signal}
    if "boxes" in words:
        changes["copies"] = "boxes"
    if "folded" in words:
        changes["sum"] = "epilogue"
    chosen = replace(chosen, moves=tuple((n, replace(m, **changes)) for n, m in chosen.moves))
    if "roles" in words:
        tiles = {"M": 128, "N": 128, "K": 64}
        chosen = replace(chosen, emitter="gluon", workers=6, warps=8, stages=3)
    if tiles is None:
        # Several tiles a worker, so that the order of the queue and delayed notifies matter.
        chosen, tiles = replace(chosen, workers=24), {"M": 64, "N": 64, "K": 64}
    return replace(chosen, tiles=tuple(sorted(tiles.items())))


def problem(
    run: Run,
    kind: str,
    resource: str,
    extents: dict[str, int],
    edit: Callable[[str], str] | None = None,
    group: Any = None,
    tiles: dict[str, int] | None = None,
    dtype: str = "bf16",
) -> Problem:
    """A problem whose call is an emitted module, its text edited by ``edit``."""
    kernel = getattr(tilelink.kernels, kind)
    op = kernel.build(extents, world=run.world, dtype=dtype)
    schedule = schedule_of(op, resource, tiles)
    module = emitted(kernel, extents, run.world, schedule, dtype, edit)

    def call(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        module(a, b, out, group=group)

    m, k, n = (extents[name] for name in "MKN")
    return Problem(kind, m, k, n, dtype, run.cluster.rank, run.world, call)


def soak(run: Run) -> None:
    """Many calls with delays of ranks and CTAs, most from graphs, inputs that change every call."""
    for kind, resource, share in SOAKED:
        if not run.wants(kind, resource):
            continue
        calls = int(run.options.calls * share)
        run.watchdog.beat(f"soak of {kind} {resource}")
        found = problem(run, kind, resource, small(run.world), with_jitter)
        for _ in range(10):
            found.call(8, MOST_NS)
        run.cluster.settle()
        graph = found.capture(GRAPH, 8, MOST_NS)
        begin, made, eager = time.monotonic(), 10, 10
        while made < calls and not run.late(begin, run.options.budget * share):
            for number in range(100):
                graph.replay()
                made += GRAPH
                if number % 10 == 0:
                    found.call(8, MOST_NS)
                    made += 1
                    eager += 1
            run.cluster.settle()
            run.watchdog.beat(f"call {made} of {kind} {resource}")
        seconds = time.monotonic() - begin
        wrong = run.total(found.wrong)
        control = run.total(found.control())
        run.write(
            {
                "test": "soak",
                "kernel": kind,
                "resource": resource,
                **small(run.world),
                "calls": made,
                "eager_calls": eager,
                "elements_a_call": found.out.numel() * run.world,
                "wrong_elements": wrong,
                "control_wrong_elements": control,
                "us_a_call": round(seconds / made * 1e6, 1),
                "seconds": round(seconds, 1),
                "ok": wrong == 0 and control > 0 and made >= calls,
            }
        )


def replays(run: Run) -> None:
    """A captured graph of one call, replayed many times with eager calls in between."""
    for kind in ("ag_gemm", "gemm_rs"):
        run.watchdog.beat(f"replays of {kind}")
        found = problem(run, kind, "copy_engine", small(run.world))
        found.call()
        run.cluster.settle()
        graph = found.capture(1, 8, MOST_NS // 4)
        begin, made, eager = time.monotonic(), 0, 1
        while made < run.options.replays and not run.late(begin, run.options.budget / 4):
            for number in range(1000):
                graph.replay()
                if number % 25 == 0:
                    found.call()
                    eager += 1
            made += 1000
            run.cluster.settle()
            run.watchdog.beat(f"replay {made} of {kind}")
        wrong = run.total(found.wrong)
        run.write(
            {
                "test": "replays",
                "kernel": kind,
                "resource": "copy_engine",
                **small(run.world),
                "replays": made,
                "eager_calls": eager,
                "wrong_elements": wrong,
                "control_wrong_elements": run.total(found.control()),
                "seconds": round(time.monotonic() - begin, 1),
                "ok": wrong == 0 and made >= run.options.replays,
            }
        )


_OCCUPY = r"""
extern "C" __global__ void occupy(long long length) {
    extern __shared__ char held[];
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); held[threadIdx.x] = (char)now; }
    while ((long long)(now - begin) < length);
}
"""


# One CTA of a full grid an SM.
FULL = {"M": 2048, "K": 512, "N": 2048}
FULL_TILES = {"M": 128, "K": 64, "N": 256}
HELD_S = 2.0


def occupancy(run: Run) -> None:
    """Calls while another kernel holds 0, 32, 100 or all 132 SMs of one rank or of all, for two seconds.

    At last the SMs are held for longer than the time limit of a wait: the call may end in a named error.
    """
    import cupy  # type: ignore[import-not-found]

    occupy = cupy.RawKernel(_OCCUPY, "occupy")
    occupy.max_dynamic_shared_size_bytes = 200 * 1024
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside = cupy.cuda.Stream.from_external(stream)

    def hold(found: Problem, sms: int, mine: bool, length: float) -> tuple[float, list[str]]:
        """The seconds until the call had ended on every rank, and the errors that it ended in."""
        run.total(0)
        if sms and mine:
            with beside:
                occupy((sms,), (128,), (int(length * 1e9),), shared_mem=200 * 1024)
        time.sleep(0.05)  # the other kernel is there first
        begin, error = time.monotonic(), ""
        found.call()
        torch.cuda.current_stream().synchronize()
        seconds = time.monotonic() - begin
        try:
            tilelink.synchronize()
        except TilelinkError as problem_:
            error = describe_error(problem_)
        stream.synchronize()
        seconds = max(run.cluster.agreement.gather(seconds))
        run.watchdog.beat(f"{sms} SMs held")
        return seconds, [e for e in run.cluster.agreement.gather(error) if e]

    for kind, resource, _ in SOAKED:
        if " " in resource:
            continue  # the sums are too large for words
        run.watchdog.beat(f"occupancy of {kind} {resource}")
        found = problem(run, kind, resource, FULL, tiles=FULL_TILES)
        found.call()
        run.cluster.settle()
        # Longer than the limit: a group of its own, since it takes no calls after a time-out.
        limit = os.environ.get("TILELINK_TIMEOUT")
        os.environ["TILELINK_TIMEOUT"] = "1"
        group = dist.new_group(list(range(run.world)))
        short = problem(run, kind, resource, FULL, tiles=FULL_TILES, group=group)
        short.call()
        run.cluster.settle()
        os.environ["TILELINK_TIMEOUT"] = limit or "10"
        plans = [
            (found, held, ranks, HELD_S) for ranks in ("one", "all") for held in (0, 32, 100, 132)
        ]
        plans += [(short, 132, "one", 3.0)]
        for it, held, ranks, length in plans:
            mine = ranks == "all" or run.cluster.rank == 0
            seconds, errors = hold(it, held, mine, length)
            wrong = run.total(it.wrong)
            limited = it is short
            row = {
                "test": "occupancy",
                "kernel": kind,
                "resource": resource,
                "held_sms": held,
                "on_ranks": ranks,
                "held_seconds": length,
                "limit_seconds": 1.0 if limited else None,
                "seconds": round(seconds, 4),
                "errors": errors,
                "wrong_elements": wrong,
            }
            named = all("Timeout" in e for e in errors)
            # What a call that timed out left in its output is NaN, and counted.
            right = wrong == 0 if not errors else named and limited
            run.write({**row, "ok": right and seconds < length + 1.0})


@dataclass(frozen=True, slots=True)
class Drawn:
    """One random problem of the shapes test."""

    kind: str
    resource: str
    dtype: str
    extents: tuple[int, int, int]
    tiles: tuple[int, int, int]

    def extent_map(self) -> dict[str, int]:
        """Extents by name."""
        return dict(zip("MKN", self.extents, strict=True))

    def tile_map(self) -> dict[str, int]:
        """Tile lengths by extent."""
        return dict(zip("MKN", self.tiles, strict=True))


def drawn(world: int, count: int, seed: int) -> Iterator[Drawn]:
    """``count`` random problems, the large ones first: tensors of more than 2^31 elements."""
    yield Drawn("ag_gemm", "copy_engine", "bf16", (32768, 64, 65552), (128, 64, 256))
    yield Drawn("gemm_rs", "copy_engine", "bf16", (32768, 64, 65552), (128, 64, 256))
    yield Drawn("ag_gemm", "sm:8", "bf16", (1 << 20, 2056, 16), (128, 64, 16))
    draw = random.Random(seed)
    for _ in range(count - 3):
        kind = draw.choice(("ag_gemm", "gemm_rs", "gemm_ar"))
        resources = ["copy_engine", "sm:2", "sm:8", "none"] + ["epilogue"] * (kind != "ag_gemm")
        dtype = draw.choice(("bf16", "bf16", "fp16", "fp32"))
        m = draw.randrange(1, 160) * (world if kind != "gemm_ar" else 1)
        k, n = draw.randrange(1, 65) * 8, draw.randrange(1, 97) * 8
        small = dtype == "fp32"
        tiles = (
            draw.choice((32, 64) if small else (64, 128)),
            draw.choice((32,) if small else (32, 64)),
            draw.choice((32, 64) if small else (64, 128)),
        )
        yield Drawn(kind, draw.choice(resources), dtype, (m, k, n), tiles)


def _warm(run: Run, problems: list[Drawn]) -> list[str]:
    """Compiles this rank's part of ``problems`` in processes of their own; what failed."""
    mine = problems[run.cluster.rank :: run.world]
    workers = max(1, min(14, (os.cpu_count() or 1) // run.world - 2))
    texts = []
    for item in mine:
        extents = item.extent_map()
        op = getattr(tilelink.kernels, item.kind).build(extents, world=run.world, dtype=item.dtype)
        schedule = schedule_of(op, item.resource, item.tile_map())
        cell = Cell("tilelink.kernels", item.kind, extents, run.world, item.dtype)
        texts.append((cell.to_json(), schedule.to_json()))
    with make_pool(workers) as pool:
        done = list(pool.map(prepare, *zip(*texts, strict=True)))
    return [
        f"{item}: {one.failed}" for item, one in zip(mine, done, strict=True) if one.path is None
    ]


def shapes(run: Run) -> None:
    """Random shapes, tiles, types and resources, two calls each; every element exact."""
    begin, wrong, exact, failed = time.monotonic(), 0, 0, []
    problems = list(drawn(run.world, run.options.shapes, run.options.seed))
    big: list[Row] = []
    trouble = _warm(run, problems[3:]) if run.options.warm else []
    trouble = [text for texts in run.cluster.agreement.gather(trouble) for text in texts]
    warmed = time.monotonic() - begin
    for number, item in enumerate(problems):
        run.watchdog.beat(f"shape {number}: {item}")
        if run.late(begin, run.options.budget):
            break
        found = problem(
            run,
            item.kind,
            item.resource,
            item.extent_map(),
            tiles=item.tile_map(),
            dtype=item.dtype,
        )
        for _ in range(2):
            found.call()
        run.cluster.settle()
        off = run.total(found.wrong)
        wrong += off
        exact += off == 0
        if off:
            failed.append({"problem": str(item), "wrong_elements": off})
        if number < 3:
            sizes = [item.extents[0] * item.extents[2], item.extents[0] * item.extents[1]]
            big.append({"problem": str(item), "largest_tensor": max(sizes), "wrong": off})
        del found
        if number < 3:
            torch.cuda.empty_cache()
    run.write(
        {
            "test": "shapes",
            "shapes": exact + len(failed),
            "exact": exact,
            "wrong_elements": wrong,
            "failed": failed,
            "past_2_31": big,
            "not_warmed": trouble[:5],
            "compile_seconds": round(warmed, 1),
            "seconds": round(time.monotonic() - begin, 1),
            "ok": exact == len(problems),
        }
    )


def cost(run: Run) -> None:
    """Bounded waits and error records against waits without limit, side by side.

    What ends a call stays, a kernel of its own behind streams: beside that, it looks at one word for errors.
    """

    def unbounded(source: str) -> str:
        return source.replace(
            "from tilelink import device\n", "from tests.gpu import unbounded as device\n"
        )

    shapes_ = (
        ("ag_gemm", (8192, 8192, 7168)),
        ("ag_gemm", (8192, 4096, 1376)),
        ("gemm_rs", (8192, 3584, 8192)),
        ("gemm_rs", (8192, 1376, 4096)),
    )
    device = torch.cuda.get_device_name()
    timed = []
    for kind, (m, k, n) in shapes_:
        extents = {"M": m, "K": k, "N": n}
        op = getattr(tilelink.kernels, kind).build(extents, world=run.world)
        tuned = lookup(op, device)
        timed.append((kind, extents, "default", default_schedule(op)))
        if tuned is not None:
            timed.append((kind, extents, "tuned", tuned.schedule))
    for kind, extents, origin, schedule in timed:
        run.watchdog.beat(f"cost of {kind}")
        kernel = getattr(tilelink.kernels, kind)
        runs = []
        for edit in (None, unbounded):
            call = emitted(kernel, extents, run.world, schedule, "bf16", edit)
            m, k, n = (extents[name] for name in "MKN")
            found = Problem(kind, m, k, n, "bf16", run.cluster.rank, run.world, call)
            found.run(found.a.normal_(), found.b.normal_(), found.out)
            run.cluster.settle()
            runs.append(found)
        times: list[list[torch.Tensor]] = [[], []]
        for number in range(run.options.rounds):
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                start, stop = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
                run.cluster.meet()
                start.record()
                runs[which].run(runs[which].a, runs[which].b, runs[which].out)
                stop.record()
                torch.cuda.synchronize()
                times[which].append(torch.tensor(start.elapsed_time(stop)))
            run.watchdog.beat(f"cost of {kind}")
        tables = []
        for side in times:
            both = run.cluster.largest(torch.stack(side).cuda())
            tables.append(both[len(both) // 10 :].tolist())
        bounded, plain = (statistics.median(t) for t in tables)
        ratios = sorted(a / b for a, b in zip(*tables, strict=True))
        run.write(
            {
                "test": "cost",
                "kernel": kind,
                "schedule": origin,
                "resource": dict(schedule.moves)["A" if kind == "ag_gemm" else "C"].resource,
                "emitter": schedule.emitter,
                **extents,
                "bounded_ms": round(bounded, 4),
                "unbounded_ms": round(plain, 4),
                "ratio_of_medians": round(bounded / plain, 4),
                "median_of_ratios": round(statistics.median(ratios), 4),
                "rounds": len(ratios),
                "ok": statistics.median(ratios) <= 1.01,
            }
        )


def mutants(run: Run) -> None:
    """Broken kernels: each must give a wrong element or a time-out, with the soak's delays."""
    for mutant in MUTANTS:
        if not run.wants(mutant.kernel, mutant.resource):
            continue
        run.watchdog.beat(f"mutant {mutant.kernel} {mutant.resource}: {mutant.name}")
        # A group of its own: one that timed out takes no further calls.
        group = dist.new_group(list(range(run.world)))
        begin = time.monotonic()
        caught, made, wrong, message = _attack(run, mutant, group)
        run.write(
            {
                "test": "mutants",
                "kind": mutant.kind,
                "kernel": mutant.kernel,
                "resource": mutant.resource,
                "name": mutant.name,
                "caught": caught,
                "calls": made,
                "wrong_elements": wrong,
                "message": message,
                "seconds": round(time.monotonic() - begin, 2),
                "ok": bool(caught),
            }
        )


def _attack(run: Run, mutant: TextMutant, group: Any) -> tuple[str, int, int, str]:
    """How a mutant was caught (``value``, ``time-out`` or nothing), after how many calls."""

    def edit(source: str) -> str:
        return mutant.edit(with_jitter(source))

    found = problem(run, mutant.kernel, mutant.resource, small(run.world), edit, group)
    made = 0
    for _ in range(40):
        message = ""
        try:
            for _ in range(50):
                found.call(3, 4 * MOST_NS)
            torch.cuda.synchronize()
            tilelink.synchronize()
        except TilelinkError as error:
            message = describe_error(error)
        made += 50
        run.watchdog.beat(f"mutant {mutant.name}, call {made}")
        torch.cuda.synchronize()
        messages = [m for m in run.cluster.agreement.gather(message) if m]
        wrong = run.total(found.wrong)
        if messages:
            named = next((m for m in messages if m.startswith("WaitTimeout")), messages[0])
            return "time-out", made, wrong, named
        if wrong:
            return "value", made, wrong, ""
    return "", made, 0, ""


TESTS: dict[str, Callable[[Run], None]] = {
    "soak": soak,
    "replays": replays,
    "occupancy": occupancy,
    "shapes": shapes,
    "cost": cost,
    "mutants": mutants,
}


def main() -> int:
    """Run what was asked for; 1 where a row is not ok."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--calls", type=int, default=1_000_000, help="of the soak, a kernel")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXTS",
        help="soak and mutants: only of such kernels and resources, by comma",
    )
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=60, help="of the cost")
    parser.add_argument("--budget", type=float, default=240, help="seconds a test, about")
    parser.add_argument("--watchdog", type=float, default=60)
    parser.add_argument("--warm", action="store_true", help="compile shapes in parallel first")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name in options.tests:
        if name not in TESTS:
            parser.error(f"no test `{name}`; there are {', '.join(TESTS)}")
    environment.prepare()
    cluster = Cluster()
    rows: list[Row] = []
    name = "_".join(options.tests) if len(options.tests) < len(TESTS) else "all"
    path = options.out / f"reliability_{name}.json"
    data = {"kind": "reliability", **environment.describe(cluster.world)}

    def write(row: Row | None = None, stopped: str | None = None) -> None:
        if row is not None:
            rows.append(row)
        if cluster.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**data, "rows": rows, "stopped": stopped}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")
            if row is not None:
                print(json.dumps(row), flush=True)

    watchdog = Watchdog(options.watchdog, lambda why: write(stopped=why))
    for test in options.tests:
        TESTS[test](Run(cluster, watchdog, options, write))
    cluster.agreement.gather(None)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    run_all_or_none(main)
