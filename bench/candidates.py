"""What is measured on a case: the library's parts, the library in turn, torch's async-TP, and ours.

A candidate is a function of a number i that works on input set i modulo the number of sets and
returns the output tensor, or None where there is nothing to compare.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench import stats
from bench.cases import AG_GEMM, Case
from bench.cluster import Cluster

Run = Callable[[int], torch.Tensor | None]

L2_BYTES = 60 << 20
MOVED = {AG_GEMM: ("A", "gather"), "gemm_rs": ("C", "scatter")}


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """``sets`` of (A of this rank, weight of this rank, fp32 reference of this rank's output)."""

    sets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def a(self, i: int) -> torch.Tensor:
        """A of set i modulo the number of sets."""
        return self.sets[i % len(self.sets)][0]

    def b(self, i: int) -> torch.Tensor:
        """The weight of set i."""
        return self.sets[i % len(self.sets)][1]

    def reference(self, i: int) -> torch.Tensor:
        """The fp32 output of set i."""
        return self.sets[i % len(self.sets)][2]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """``build`` gives the function to time; ``graph`` asks for replays."""

    name: str
    family: str
    build: Callable[[], Run]
    schedule: dict[str, Any] | None = None
    compared: bool = True
    graph: bool = False


def set_count(case: Case) -> int:
    """How many input sets keep weights out of the L2 cache: two, more where they are small."""
    return min(12, max(2, -(-2 * L2_BYTES // case.weight_bytes)))


def make_inputs(cluster: Cluster, case: Case, seed: int) -> Inputs:
    """Random bf16 inputs, different on every rank, with their references. Collective."""
    generator = torch.Generator(cluster.device).manual_seed(1000 * seed + cluster.rank)
    rows = case.m // cluster.world if case.kind == AG_GEMM else case.m

    def draw(*shape: int) -> torch.Tensor:
        tile = torch.empty(shape, dtype=torch.bfloat16, device=cluster.device)
        return tile.normal_(generator=generator)

    sets = []
    for index in range(set_count(case)):
        a, b = draw(rows, case.k), draw(case.k, case.n)
        b.mul_(case.k**-0.5)
        # Two references are enough: further sets only keep the cache cold.
        sets.append((a, b, _reference(cluster, case, a, b) if index < 2 else torch.empty(0)))
    return Inputs(sets)


def _reference(cluster: Cluster, case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The output of this rank in fp32 throughout."""
    if case.kind == AG_GEMM:
        whole = a.new_empty(case.m, case.k)
        dist.all_gather_into_tensor(whole, a)
        return whole.float() @ b.float()
    partial = a.float() @ b.float()
    mine = partial.new_empty(case.m // cluster.world, case.n)
    dist.reduce_scatter_tensor(mine, partial)
    return mine


def baselines(cluster: Cluster, case: Case, inputs: Inputs) -> Iterator[Candidate]:
    """cuBLAS alone, NCCL alone; both in turn and torch's async-TP, eager and in CUDA graphs."""
    gathers = case.kind == AG_GEMM
    a = inputs.a(0)
    whole = a.new_empty(case.m, case.k) if gathers else a.new_empty(0)
    product = a.new_empty(case.m, case.n)
    mine = a.new_empty(case.m // cluster.world, case.n)
    if gathers:
        # The product alone is timed on real data.
        dist.all_gather_into_tensor(whole, a)
    else:
        torch.mm(a, inputs.b(0), out=product)

    def cublas(i: int) -> None:
        torch.mm(whole if gathers else inputs.a(i), inputs.b(i), out=product)

    def nccl(i: int) -> None:
        if gathers:
            dist.all_gather_into_tensor(whole, inputs.a(i))
        else:
            dist.reduce_scatter_tensor(mine, product)

    def in_turn(i: int) -> torch.Tensor:
        if gathers:
            dist.all_gather_into_tensor(whole, inputs.a(i))
            return torch.mm(whole, inputs.b(i), out=product)
        torch.mm(inputs.a(i), inputs.b(i), out=product)
        dist.reduce_scatter_tensor(mine, product)
        return mine

    def async_tp(i: int) -> torch.Tensor:
        if gathers:
            # `return_A` stays on: without it torch may take its multicast kernel.
            fused = torch.ops.symm_mem.fused_all_gather_matmul
            out: torch.Tensor = fused(inputs.a(i), [inputs.b(i)], 0, cluster.group_name)[1][0]
            return out
        scatter = torch.ops.symm_mem.fused_matmul_reduce_scatter
        out = scatter(inputs.a(i), inputs.b(i), "sum", 0, cluster.group_name)
        return out

    def native(i: int) -> torch.Tensor:
        with _variable("TORCH_SYMM_MEM_ENABLE_NATIVE_ASYNC_TP", "1"):
            return async_tp(i)

    yield Candidate(stats.CUBLAS, stats.CUBLAS, lambda: cublas, compared=False)
    yield Candidate(stats.NCCL, stats.NCCL, lambda: nccl, compared=False)
    yield from _twice(stats.IN_TURN, stats.IN_TURN, lambda: in_turn)
    yield from _twice(stats.ASYNC_TP, stats.ASYNC_TP, lambda: async_tp)
    if gathers and 2048 < case.m <= 4096:
        yield from _twice(f"{stats.ASYNC_TP} native", stats.ASYNC_TP, lambda: native)


def ours(
    cluster: Cluster, case: Case, inputs: Inputs, specs: list[str], graphs: bool
) -> Iterator[Candidate]:
    """Our kernel with each schedule of ``specs``: a resource, ``default``, or a JSON file."""
    from tilelink.kernels import ag_gemm, gemm_rs

    gathers = case.kind == AG_GEMM
    kernel = ag_gemm if gathers else gemm_rs
    rows = case.m if gathers else case.m // cluster.world
    out = inputs.a(0).new_empty(rows, case.n)

    def builder(schedule: Any) -> Callable[[], Run]:
        def build() -> Run:
            call = kernel.on(group=cluster.group, schedule=schedule)

            def run(i: int) -> torch.Tensor:
                call(inputs.a(i), inputs.b(i), out)
                return out

            return run

        return build

    for spec in specs:
        if spec == "epilogue" and gathers:
            continue
        label = Path(spec).stem if spec.endswith(".json") else spec
        name = f"{stats.OURS} {label}"
        try:
            schedule = schedule_of(kernel, case, cluster.world, spec)
        except Exception as error:
            yield Candidate(name, stats.OURS, _raising(error))
            continue
        shown = None if schedule is None else json.loads(schedule.to_json())
        made = _twice(name, stats.OURS, builder(schedule), shown)
        yield from made if graphs else [next(made)]


def schedule_of(kernel: Any, case: Case, world: int, spec: str) -> Any:
    """The schedule that ``spec`` names for ``case``; None leaves the choice to the compiler."""
    from tilelink.schedules import Schedule, default_schedule

    if spec == "default":
        return None
    if spec.endswith(".json"):
        return Schedule.from_json(Path(spec).read_text(encoding="utf-8"))
    tensor, _ = MOVED[case.kind]
    built = kernel.build({"M": case.m, "K": case.k, "N": case.n}, {}, world)
    base = default_schedule(built)
    move = dataclasses.replace(base.move(tensor), resource=spec)
    known = {field.name for field in dataclasses.fields(Schedule)}
    extra: dict[str, Any] = {}
    if spec.startswith("sm:") and "queue" in known:
        # Workers that join late are balanced only by a queue that hands out tiles on demand.
        extra["queue"] = "dynamic"
    return dataclasses.replace(base, moves=((tensor, move),), **extra)


def capture(run: Run, count: int) -> Run:
    """``run`` captured in one CUDA graph an input set; it must have run on each before."""
    pool = torch.cuda.graph_pool_handle()
    graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = []
    side: Any = torch.cuda.Stream
    torch.cuda.synchronize()
    # Not `torch.cuda.graph`: it collects garbage and empties the allocator's cache each time.
    with torch.cuda.stream(side()):
        for index in range(count):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = run(index)
            finally:
                graph.capture_end()
            graphs.append((graph, out))

    def replay(i: int) -> torch.Tensor | None:
        graph, out = graphs[i % count]
        graph.replay()
        return out

    return replay


def _twice(
    name: str, family: str, build: Callable[[], Run], schedule: dict[str, Any] | None = None
) -> Iterator[Candidate]:
    yield Candidate(name, family, build, schedule)
    yield Candidate(f"{name} graph", family, build, schedule, graph=True)


def _raising(error: Exception) -> Callable[[], Run]:
    def build() -> Run:
        raise error

    return build


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
