"""One case: build every candidate, check it, then time all of them in interleaved rounds."""

from __future__ import annotations

import gc
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.candidates import Candidate, Inputs
from bench.cluster import Part, Watchdog, describe_error, fatal
from bench.stats import IN_TURN, OURS, TOLERANCE, Measured
from tilelink.backend.accuracy import row_error
from tilelink.tuning.timing import Run, capture

# Calls of which the host's time is taken, between two waits for the device: few enough that the device's
# queue, about a thousand entries, does not fill.
HOST_CALLS = 6
HOST_BATCHES = 5
# Calls with the same tensors until nothing about them is new to the runtime.
SETTLED = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """``rounds`` timed and ``warmup`` untimed passes over all candidates; ``seed`` of the data."""

    rounds: int = 20
    warmup: int = 3
    seed: int = 0


def checksum(out: torch.Tensor) -> torch.Tensor:
    """A number on the device that depends on every bit of ``out`` and on its place."""
    bits = out.contiguous().view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=out.device)
    columns = torch.arange(bits.shape[-1], device=out.device) % 8191 + 1
    for first in range(0, bits.shape[0], 2048):
        rows = bits[first : first + 2048].to(torch.int64)
        places = torch.arange(first, first + rows.shape[0], device=out.device) % 65521 + 1
        total += (rows * columns).sum(dim=1).mul_(places).sum()
    return total


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`check` found on this rank: the largest relative error, whether calls with the same
    inputs gave the same bits, and a checksum of those bits."""

    error: torch.Tensor
    repeats: bool
    checksum: int


def check(part: Part, run: Run, inputs: Inputs) -> Verdict:
    """Two input sets, each called twice; before the second call the output is NaN.

    Each input set is used some times first: plans and graphs are made and uploaded when calls repeat.
    """
    for _ in range(SETTLED):
        for i in range(len(inputs.sets)):
            run(i)
    worst = torch.zeros((), device=part.device)
    bits: list[int] = []
    repeats = True
    for i in range(2):
        out = run(i)
        assert out is not None
        before = checksum(out)
        out.fill_(float("nan"))
        # A freshly allocated output takes the poisoned block again.
        del out
        out = run(i)
        assert out is not None
        after = int(checksum(out))
        repeats = repeats and int(before) == after
        bits.append(after)
        worst = torch.maximum(worst, row_error(out, inputs.reference(i)))
    return Verdict(worst, repeats, (bits[0] * 1_000_003 + bits[1]) % 2**64)


class Bench:
    """The candidates of one case: those that still run, and what is known of all.

    A sample is the mean of ``row`` calls in a row.
    """

    def __init__(self, part: Part, inputs: Inputs, watchdog: Watchdog, row: int = 1) -> None:
        self.part = part
        self.row = row
        self.inputs = inputs
        self.watchdog = watchdog
        self.runs: dict[str, Run] = {}
        self.results: dict[str, Measured] = {}
        self.calls = 0

    def add(self, candidate: Candidate) -> None:
        """Build ``candidate`` and check it on all ranks; a failure is recorded, the same on all."""
        name = candidate.name
        result = Measured(name, candidate.family, candidate.schedule, origin=candidate.origin)
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
            self._checked(name, run)
        else:
            self._warmed(name, run)
        result.setup_s = round(time.perf_counter() - start, 3)

    def _build(self, candidate: Candidate, base: Run | None) -> Run | None:
        run: Run | None = None
        mine: dict[str, str] = {}
        try:
            run = candidate.build() if base is None else capture(base, len(self.inputs.sets))
        except Exception as error:
            mine[candidate.name] = _survivable(error)
        return run if self._agreed(mine) else None

    def _checked(self, name: str, run: Run) -> bool:
        """Checks and records; a candidate that fails on any rank is dropped on all."""
        self.watchdog.beat(f"check {name}")
        mine: dict[str, str] = {}
        verdict: Verdict | None = None
        try:
            verdict = check(self.part, run, self.inputs)
            self.part.settle()
        except Exception as failure:
            mine[name] = _survivable(failure)
        if not self._agreed(mine) or verdict is None:
            return False
        result = self.results[name]
        largest = float(self.part.largest(verdict.error))
        found = self.part.agreement.gather([verdict.repeats, verdict.checksum])
        bits = hashlib.sha256(repr([checksum for _, checksum in found]).encode()).hexdigest()[:16]
        repeats = all(same for same, _ in found) and result.checksum in (None, bits)
        result.repeats = repeats and result.repeats is not False
        result.checksum = result.checksum or bits
        result.error = max(largest, result.error or 0.0)
        if not largest < TOLERANCE:
            self._drop(name, f"wrong result: relative error {largest:.3g}")
            return False
        return True

    def _warmed(self, name: str, run: Run) -> None:
        """Calls what has no result to compare once an input set."""
        mine: dict[str, str] = {}
        try:
            for i in range(len(self.inputs.sets)):
                run(i)
            self.part.settle()
        except Exception as failure:
            mine[name] = _survivable(failure)
        self._agreed(mine)

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
                self.part.meet()
                begin.record()
                for place in range(self.row):
                    run(self.calls + 1 + place)
                end.record()
                # Counted over all candidates, so that none finds the weights of the one before it.
                self.calls += 1 + self.row
                if number < 0:
                    # An error must be met before the next candidate would take the blame.
                    self.part.settle()
                events[now] = (begin, end)
            self.part.settle()
            each = 1000 / self.row
            return {n: each * b.elapsed_time(e) for n, (b, e) in events.items()}, mine
        except Exception as error:
            mine[now] = _survivable(error)
            return {}, mine

    def _record(self, samples: dict[str, list[float]]) -> None:
        """Largest over the ranks for each sample; the median of each rank beside it."""
        by_rank = self.part.agreement.gather(
            {name: [round(value, 2) for value in values] for name, values in samples.items()}
        )
        for name in self.runs:
            result = self.results[name]
            ranks = [values[name] for values in by_rank]
            result.samples_us = [max(sample) for sample in zip(*ranks, strict=True)]
            result.rank_median_us = [sorted(values)[len(values) // 2] for values in ranks]

    def host(self) -> None:
        """Times what the host spends in calls of ours, and in those in turn, without synchronising."""
        for name in [n for n, r in self.results.items() if r.family in (OURS, IN_TURN)]:
            if name not in self.runs:
                continue
            self.watchdog.beat(f"host time of {name}")
            mine: dict[str, str] = {}
            taken: list[list[float]] = []
            try:
                taken = host_times(self.runs[name], self.part.settle)
            except Exception as error:
                mine[name] = _survivable(error)
            if not self._agreed(mine):
                continue
            us, full = host_figures(taken)
            by_rank = self.part.agreement.gather([us, full])
            self.results[name].host_us = round(max(us for us, _ in by_rank), 1)
            self.results[name].queue_full = any(full for _, full in by_rank)

    def recheck(self) -> None:
        """Check all again: back-to-back calls may break what a single call does well."""
        for name in [n for n, r in self.results.items() if r.error is not None and n in self.runs]:
            self._checked(name, self.runs[name])

    def close(self) -> None:
        """Free graphs and buffers of the case."""
        torch.cuda.synchronize()
        self.runs.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _agreed(self, mine: dict[str, str]) -> bool:
        """Whether no rank met an error; candidates with one are dropped on all ranks."""
        errors = self.part.agreement.errors(mine)
        for name, text in errors.items():
            self._drop(name, text)
        return not errors

    def _drop(self, name: str, reason: str) -> None:
        self.results[name].failed = reason
        self.runs.pop(name, None)


def host_times(run: Run, settle: Callable[[], None]) -> list[list[float]]:
    """Microseconds of the host in each call of each batch; the device is idle before a batch."""
    batches = []
    for _ in range(HOST_BATCHES):
        settle()
        taken = []
        for i in range(HOST_CALLS):
            start = time.perf_counter()
            run(i)
            taken.append(1e6 * (time.perf_counter() - start))
        batches.append(taken)
    settle()
    return batches


def host_figures(batches: Sequence[Sequence[float]]) -> tuple[float, bool]:
    """The median over all calls, and whether the last calls of a batch took twice the time of the first.

    The first call of a batch is left out: it finds the device idle, and caches of the host cold.
    """
    places = [statistics.median(column) for column in zip(*batches, strict=True)][1:]
    median = statistics.median([us for batch in batches for us in batch[1:]])
    return median, min(places[-2:]) > 2 * min(places[:2])


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def _survivable(error: Exception) -> str:
    """The error in words; raised again where the CUDA context is lost with it."""
    if fatal(error):
        raise error
    return describe_error(error)
