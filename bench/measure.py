"""One case: build every candidate, check it, then time all of them in interleaved rounds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.candidates import Candidate, Inputs, Run, capture
from bench.cluster import Cluster, Watchdog, describe_error, fatal
from bench.stats import TOLERANCE, Measured


@dataclass(frozen=True, slots=True)
class Settings:
    """``rounds`` timed and ``warmup`` untimed passes over all candidates; ``seed`` of the data."""

    rounds: int = 25
    warmup: int = 3
    seed: int = 0


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The largest over rows of ‖row − reference‖ / ‖reference row‖; infinite where it is NaN."""
    worst = torch.zeros((), device=out.device)
    # In slices of rows: whole fp32 copies of large outputs would double the memory in use.
    for first in range(0, out.shape[0], 2048):
        rows, wanted = out[first : first + 2048], reference[first : first + 2048]
        error = (rows.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
        worst = torch.maximum(worst, error.nan_to_num(nan=float("inf")).max())
    return worst


def check(cluster: Cluster, run: Run, inputs: Inputs) -> torch.Tensor:
    """The largest relative error of this rank over two input sets; outputs are NaN before.

    Each input set is used once first: plans and graphs are uploaded when they are first seen.
    """
    for i in range(len(inputs.sets)):
        run(i)
    worst = torch.zeros((), device=cluster.device)
    for i in range(2):
        out = run(i)
        assert out is not None
        out.fill_(float("nan"))
        # A freshly allocated output takes the poisoned block again.
        del out
        out = run(i)
        assert out is not None
        worst = torch.maximum(worst, relative_error(out, inputs.reference(i)))
    return worst


class Bench:
    """The candidates of one case: those that still run, and what is known of all."""

    def __init__(self, cluster: Cluster, inputs: Inputs, watchdog: Watchdog) -> None:
        self.cluster = cluster
        self.inputs = inputs
        self.watchdog = watchdog
        self.runs: dict[str, Run] = {}
        self.results: dict[str, Measured] = {}
        self.calls = 0

    def add(self, candidate: Candidate) -> None:
        """Build ``candidate`` and check it on all ranks; a failure is recorded, the same on all."""
        name = candidate.name
        result = Measured(name, candidate.family, candidate.schedule)
        self.results[name] = result
        self.watchdog.beat(f"build {name}")
        start = time.perf_counter()
        base = name.removesuffix(" graph")
        if candidate.graph and base not in self.runs:
            result.failed = f"not captured: {base} failed"
            return
        run = self._build(candidate, self.runs.get(base) if candidate.graph else None)
        if run is None:
            return
        self.runs[name] = run
        if candidate.compared:
            result.error = self._checked(name, run)
        else:
            for i in range(len(self.inputs.sets)):
                run(i)
        result.setup_s = round(time.perf_counter() - start, 3)

    def _build(self, candidate: Candidate, base: Run | None) -> Run | None:
        run: Run | None = None
        mine: dict[str, str] = {}
        try:
            run = candidate.build() if base is None else capture(base, len(self.inputs.sets))
        except Exception as error:
            mine[candidate.name] = _survivable(error)
        return run if self._agreed(mine) else None

    def _checked(self, name: str, run: Run) -> float | None:
        self.watchdog.beat(f"check {name}")
        mine: dict[str, str] = {}
        error: torch.Tensor | None = None
        try:
            error = check(self.cluster, run, self.inputs)
            self.cluster.settle()
        except Exception as failure:
            mine[name] = _survivable(failure)
        if not self._agreed(mine) or error is None:
            return None
        largest = float(self.cluster.largest(error))
        if not largest < TOLERANCE:
            self._drop(name, f"wrong result: relative error {largest:.3g}")
        return largest

    def time(self, settings: Settings) -> None:
        """Interleaved rounds in a new order each; samples go into the results."""
        random_order = random.Random(settings.seed)
        samples: dict[str, list[float]] = {name: [] for name in self.runs}
        for number in range(-settings.warmup, settings.rounds):
            names = list(self.runs)
            random_order.shuffle(names)
            self.watchdog.beat(f"round {number} of {', '.join(names)}")
            taken, mine = self._round(names, number)
            if not self._agreed(mine):
                continue
            if number >= 0:
                for name, value in taken.items():
                    samples[name].append(value)
        self._record(samples)

    def _round(self, names: Sequence[str], number: int) -> tuple[dict[str, float], dict[str, str]]:
        """Microseconds of each candidate on this rank.

        Before each sample comes one call that is not timed, so that the host runs ahead as it does
        in a program of many layers, and a barrier of all ranks on the stream.
        """
        events: dict[str, tuple[Any, Any]] = {}
        mine: dict[str, str] = {}
        now = ""
        try:
            for now in names:
                run = self.runs[now]
                begin, end = _event(), _event()
                run(self.calls)
                self.cluster.meet()
                begin.record()
                run(self.calls + 1)
                end.record()
                # Counted over all candidates, so that none finds the weights of the one before it.
                self.calls += 2
                if number < 0:
                    # An error must be met before the next candidate would take the blame.
                    self.cluster.settle()
                events[now] = (begin, end)
            self.cluster.settle()
            return {n: 1000 * b.elapsed_time(e) for n, (b, e) in events.items()}, mine
        except Exception as error:
            mine[now] = _survivable(error)
            return {}, mine

    def _record(self, samples: dict[str, list[float]]) -> None:
        """Largest over the ranks for each sample; the median of each rank beside it."""
        by_rank = self.cluster.agreement.gather(
            {name: [round(value, 2) for value in values] for name, values in samples.items()}
        )
        for name in self.runs:
            result = self.results[name]
            ranks = [values[name] for values in by_rank]
            result.samples_us = [max(sample) for sample in zip(*ranks, strict=True)]
            result.rank_median_us = [sorted(values)[len(values) // 2] for values in ranks]

    def recheck(self) -> None:
        """Check all again: back-to-back calls may break what a single call does well."""
        for name in [n for n, r in self.results.items() if r.error is not None and n in self.runs]:
            again = self._checked(name, self.runs[name])
            result = self.results[name]
            if again is not None and result.error is not None:
                result.error = max(result.error, again)

    def close(self) -> None:
        """Free graphs and buffers of the case."""
        torch.cuda.synchronize()
        self.runs.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _agreed(self, mine: dict[str, str]) -> bool:
        """Whether no rank met an error; candidates with one are dropped on all ranks."""
        errors = self.cluster.agreement.errors(mine)
        for name, text in errors.items():
            self._drop(name, text)
        return not errors

    def _drop(self, name: str, reason: str) -> None:
        self.results[name].failed = reason
        self.runs.pop(name, None)


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def _survivable(error: Exception) -> str:
    """The error in words; raised again where the CUDA context is lost with it."""
    if fatal(error):
        raise error
    return describe_error(error)
