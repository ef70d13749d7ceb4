"""Measures the numbers of a machine model: products, memory, copies, signals, collectives, launches.

A few seconds on all GPUs of a host. What no microbenchmark here can tell apart (costs of single waits,
contention, the shares of a tile's time) is taken over from the model that the calibration starts with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from tilelink.schedules.machine import Emitter, Machine
from tilelink.tuning.ranks import Part
from tilelink.tuning.timing import Rounds, capture

CALLS = 20
WARMUP = 5
# Short calls are timed so many in a row, so that what ranks differ by behind a barrier does not count.
IN_A_ROW = 10
# (M, K, N) of products: one that ends before power limits act, one that lasts for milliseconds.
SHORT, LONG = (4096, 4096, 4096), (16384, 8192, 8192)
COPY_SIZES = (1 << 20, 128 << 20)
COLLECTIVE_SIZES = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 128 << 20)
STREAM_BYTES = 1 << 30
# Of our own products: the tile, and two depths.
TILE = (128, 256, 64)
DEPTHS = (2048, 8192)


def calibrate(part: Part, base: Machine, name: str) -> tuple[Machine, list[str]]:
    """The model of this host, called ``name``, and a line for each number measured; collective.

    ``base`` gives what is not measured. All times are medians of the largest over the ranks.
    """
    device = torch.cuda.get_device_properties(part.device)
    found: dict[str, Any] = {
        "name": name,
        "description": f"{part.world} x {device.name}, calibrated",
        "device": device.name,
        "world": part.world,
        "sms": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
    }
    found |= products(part, base)
    found["launch_us"] = launch(part)
    found["emitters"] = emitters(part, replace(base, **found))
    found["hbm_gbps"] = memory(part)
    if part.world > 1:
        found |= copies(part, base)
        found["collective_gbps"] = collectives(part, base)
    machine = replace(base, **found)
    measured = sorted(set(found) - {"name", "description", "device", "world"})
    return machine, [
        f"{key} = {_shown(found[key])} (was {_shown(getattr(base, key))})" for key in measured
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_shown(v)}" for k, v in value.items())
    if isinstance(value, Emitter):
        return f"step {value.step_us:.4g}, tile {value.tile_us:.4g}, flat {value.flat_us:.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed_us(part: Part, call: Callable[[], Any], times: int = 1) -> float:
    """Microseconds of one call of ``times`` in a row, the median over samples of the largest over the ranks.

    Replays of a graph: what the host takes to enqueue a call is no number of the machine's GPUs.
    """

    def run(_: int) -> None:
        for _ in range(times):
            call()

    run(0)
    torch.cuda.synchronize()
    samples, errors = Rounds(part).sample({"call": capture(run, 1)}, WARMUP, CALLS)
    if errors:
        raise RuntimeError(errors["call"])
    return float(statistics.median(samples["call"])) / times


def products(part: Part, base: Machine) -> dict[str, Any]:
    """Sustained rate of bf16 products, and how much faster a short one is; TFLOP/s by the library."""
    rates = []
    for m, k, n in (SHORT, LONG):
        a = torch.randn(m, k, device=part.device).bfloat16()
        b = torch.randn(k, n, device=part.device).bfloat16()
        out = a.new_empty(m, n)
        us = timed_us(part, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        rates.append(2e-6 * m * k * n / us)
    short, long = rates
    # The long one begins as fast as the short one: its mean lies above the rate that it ends with.
    tflops = {**base.tflops, "bf16": long, "fp16": long}
    return {"tflops": MappingProxyType(tflops), "burst": max(0.0, short / long - 1.0)}


def emitters(part: Part, machine: Machine) -> Any:
    """What our own products cost beside the tensor cores' work, by emitter: a step, and a tile.

    Of two depths at full waves of tiles, the slope is the time of a step and the rest that of a tile.
    """
    from tilelink.kernels import gemm
    from tilelink.schedules import EMITTERS, default_schedule

    found = dict(machine.emitters)
    m, n, k = TILE
    rows, columns = m * machine.sms // 4, 16 * n
    tiles = -(-rows // m) * 16 / machine.sms
    for emitter in (e for e in EMITTERS if e != "library"):
        times = []
        for depth in DEPTHS:
            kernel = gemm.build({"M": rows, "K": depth, "N": columns}, {}, part.world)
            schedule = default_schedule(kernel).with_tiles(M=m, N=n, K=k)
            call = gemm.on(group=part.group, schedule=replace(schedule, emitter=emitter))
            a = torch.randn(rows, depth, device=part.device).bfloat16()
            b = torch.randn(depth, columns, device=part.device).bfloat16()
            out = a.new_empty(rows, columns)
            us = timed_us(part, lambda c=call, x=(a, b, out): c(*x))  # type: ignore[misc]
            times.append((us - machine.launch_us) / tiles)
        step = (times[1] - times[0]) / ((DEPTHS[1] - DEPTHS[0]) / k)
        dot = machine.dot_us(2.0 * m * n * k, "bf16", 0.0) * machine.sms
        rest = times[0] - step * DEPTHS[0] / k
        before = machine.emitter(emitter)
        flat = max(0.1, rest)
        more = max(0.0, before.tile_us - before.flat_us)
        found[emitter] = Emitter(max(0.0, step - dot), flat + more, flat, before.issue)
    return MappingProxyType(found)


def memory(part: Part) -> float:
    """Bandwidth of memory, GB/s: a copy reads and writes."""
    source = torch.empty(STREAM_BYTES, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    us: float = timed_us(part, lambda: target.copy_(source))
    return 2.0 * STREAM_BYTES / us * 1e-3


def launch(part: Part) -> float:
    """What a further kernel costs on a stream, microseconds."""
    word = torch.zeros(1, device=part.device)

    def some(count: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                word.add_(1.0)

        return call

    few, many = (timed_us(part, some(count)) for count in (10, 110))
    return max(0.5, (many - few) / 100.0)


def copies(part: Part, base: Machine) -> dict[str, Any]:
    """Bandwidth of a push to the next rank, the fixed cost of a copy, and that of a four-byte one behind it."""
    largest = max(COPY_SIZES)
    memory_ = symm_mem.empty(largest, dtype=torch.uint8, device=part.device)
    handle = symm_mem.rendezvous(memory_, part.group_name)
    peer = handle.get_buffer((part.rank + 1) % part.world, (largest,), torch.uint8)
    source = torch.empty(largest, dtype=torch.uint8, device=part.device)

    def push(size: int, signals: int = 0) -> Callable[[], None]:
        def call() -> None:
            peer[:size].copy_(source[:size])
            for _ in range(signals):
                peer[:4].copy_(source[:4])

        return call

    small, large = COPY_SIZES
    slow, fast = timed_us(part, push(small), IN_A_ROW), timed_us(part, push(large))
    rate = (large - small) / (fast - slow)
    fixed = max(0.5, slow - small / rate - base.link_latency_us)
    behind = timed_us(part, push(small, signals=4), IN_A_ROW)
    return {
        "link_gbps": rate * 1e-3,
        "copy_us": fixed,
        "copy_signal_us": max(0.5, (behind - slow) / 4.0),
    }


def collectives(part: Part, base: Machine) -> Any:
    """Bus bandwidth of the library's collectives at this number of ranks, beside what ``base`` has."""
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    largest = max(COLLECTIVE_SIZES) // 2
    whole = torch.zeros(largest, dtype=torch.bfloat16, device=part.device)
    mine = torch.zeros(largest // part.world, dtype=torch.bfloat16, device=part.device)
    for op in ("all_gather", "reduce_scatter", "all_reduce"):
        share = (part.world - 1) / part.world * (2.0 if op == "all_reduce" else 1.0)
        points = []
        for size in COLLECTIVE_SIZES:
            count = size // 2 // part.world * part.world
            all_, part_ = whole[:count], mine[: count // part.world]
            us = timed_us(part, _collective(op, all_, part_, part.group), IN_A_ROW)
            points.append((float(size), round(size * share / us * 1e-3, 1)))
        curves[op] = tuple(points)
    return MappingProxyType({**base.collective_gbps, part.world: MappingProxyType(curves)})


def _collective(op: str, whole: torch.Tensor, mine: torch.Tensor, group: Any) -> Callable[[], Any]:
    if op == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, mine, group=group)
    if op == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(mine, whole, group=group)
    return lambda: dist.all_reduce(whole, group=group)
