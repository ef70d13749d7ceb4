"""Ranks, events and results without a GPU, for the tests of the benchmark."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from bench import cluster, stats
from bench.cases import AG_GEMM


class Store:
    """A key-value store whose `get` blocks until the key is there."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, text: str) -> None:
        with self.changed:
            assert key not in self.values, "a key is written once"
            self.values[key] = text.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=10)
            return self.values[key]


def ranks(world: int, body: Any) -> list[Any]:
    """``body(agreement)`` on a thread a rank."""
    store = Store()
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        results[rank] = body(cluster.Agreement(store, rank, world))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def measured(name: str, family: str, *samples: float, failed: str | None = None) -> stats.Measured:
    return stats.Measured(name, family, samples_us=list(samples), failed=failed)


def case_result(*candidates: stats.Measured, **changes: Any) -> stats.CaseResult:
    base: dict[str, Any] = {
        "kind": AG_GEMM,
        "m": 64,
        "k": 32,
        "n": 16,
        "origin": "a test",
        "world": 8,
    }
    return stats.CaseResult("ag_gemm 64x32x16", **(base | changes), candidates=list(candidates))


FULL = (
    measured("cublas", stats.CUBLAS, 900, 1000, 5000),
    measured("nccl", stats.NCCL, 400, 400, 401),
    measured("in_turn", stats.IN_TURN, 1500, 1500, 1500),
    measured("in_turn graph", stats.IN_TURN, 1400, 1400, 1400),
    measured("async_tp", stats.ASYNC_TP, 1300, 1300, 1300),
    measured("tilelink sm:16", stats.OURS, 1200, 1250, 1260),
    measured("tilelink copy_engine graph", stats.OURS, 1100, 1120, 1200),
    measured("tilelink epilogue", stats.OURS, 1, 1, failed="wrong result"),
)


class FakeCluster:
    """One of ``world`` ranks without a GPU; alone unless an agreement is given."""

    def __init__(self, agreement: cluster.Agreement | None = None) -> None:
        self.agreement = agreement or cluster.Agreement(Store(), 0, 1)
        self.rank, self.world = self.agreement.rank, self.agreement.world
        self.device = torch.device("cpu")
        self.group, self.group_name = None, "fake"
        self.asked: list[tuple[int, ...]] = []
        self.memory = torch.zeros(1 << 20, dtype=torch.bfloat16)

    def part(self, ranks: Sequence[int]) -> Any:
        """The ranks of a part agree through keys of their own, as the real ones do."""
        key = tuple(ranks)
        self.asked.append(key)
        if self.rank not in key:
            return None
        name = f"part {len(self.asked)} " + "-".join(map(str, key))
        store = self.agreement.store
        return FakeCluster(cluster.Agreement(store, key.index(self.rank), len(key), name))

    def symmetric(self, *shape: int) -> torch.Tensor:
        return self.memory[: math.prod(shape)].view(shape)

    def meet(self) -> None: ...

    def settle(self) -> None: ...

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return values


class FakeWatchdog:
    def __init__(self, *_: Any) -> None: ...

    def beat(self, doing: str) -> None: ...

    def pause(self) -> None: ...


class FakeEvent:
    """Reads a clock that the candidates advance, in milliseconds."""

    now = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def header() -> dict[str, Any]:
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "command": ["python", "bench/run.py", "--suite", "mlp"],
        "world": 8,
        "note": "NCCL without NVLink multicast",
        "suite": "mlp",
        "settings": {"rounds": 3, "warmup": 0, "seed": 0},
        "hardware": {"gpu": "A GPU", "gpus": 8, "driver": "1.2"},
        "versions": {"torch": "2", "cuda": "13", "triton": "3", "nccl": "2.28.9"},
    }
