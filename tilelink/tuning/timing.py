"""How one call is timed on GPUs: replays of CUDA graphs, in interleaved rounds, after a barrier."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tilelink.tuning.ranks import Part, describe_error, fatal

Run = Callable[[int], torch.Tensor | None]
"""Works on input set i modulo the number of sets, and returns its output."""


# Microseconds that a sample takes at least, and the most calls in a row for that. Where a call takes no longer
# than a few times what ranks differ by behind a barrier, that difference would be most of what is timed.
SAMPLE_US, MOST_CALLS = 160.0, 8
# Rates by which a product's time is known well enough for that: FLOP and bytes of weights a microsecond.
_FLOPS_A_US, _BYTES_A_US = 7e8, 4e6


def calls_in_a_row(m: int, k: int, n: int) -> int:
    """How many calls make one sample of a 16-bit product of these extents: one of those that take long."""
    us = max(2.0 * m * k * n / _FLOPS_A_US, 2.0 * k * n / _BYTES_A_US)
    return max(1, min(MOST_CALLS, int(SAMPLE_US // us)))


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


def survivable(error: Exception) -> str:
    """The error in words; raised again where the CUDA context is lost with it."""
    if fatal(error):
        raise error
    return describe_error(error)


class Rounds:
    """Times several functions in turn, each round in another order, the same on all ranks of a part.

    A sample is the mean of ``calls`` calls in a row.
    """

    def __init__(self, part: Part, seed: int = 0, calls: int = 1) -> None:
        self.part = part
        self.calls = calls
        self._order = random.Random(seed)
        self._calls = 0

    def sample(
        self, runs: Mapping[str, Run], warmup: int, samples: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Microseconds by name, each sample the largest over the ranks; and errors by name.

        After an error on any rank no further round is made, and no times are given.
        """
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(-warmup, samples):
            names = sorted(runs)
            self._order.shuffle(names)
            found, mine = self._round(runs, names)
            errors = self.part.agreement.errors(mine)
            if errors:
                return {}, errors
            if number >= 0:
                for name, us in found.items():
                    taken[name].append(us)
        by_rank = self.part.agreement.gather(
            {name: [round(us, 2) for us in values] for name, values in taken.items()}
        )
        return {
            name: [max(some) for some in zip(*(r[name] for r in by_rank), strict=True)]
            for name in runs
        }, {}

    def _round(
        self, runs: Mapping[str, Run], names: list[str]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Microseconds of each function on this rank, or the error of the one that met it.

        A call that is not timed lets the host run ahead, as in a program of many layers; a barrier of all
        ranks on the stream starts them together.
        """
        make: Any = torch.cuda.Event
        events: dict[str, tuple[Any, Any]] = {}
        now = ""
        try:
            for now in names:
                begin, end = make(enable_timing=True), make(enable_timing=True)
                runs[now](self._calls)
                self.part.meet()
                begin.record()
                for number in range(self.calls):
                    runs[now](self._calls + 1 + number)
                end.record()
                # Counted over all, so that none finds the weights of the one before it in the cache.
                self._calls += 1 + self.calls
                events[now] = begin, end
            self.part.settle()
            each = 1000.0 / self.calls
            return {n: each * b.elapsed_time(e) for n, (b, e) in events.items()}, {}
        except Exception as error:
            return {}, {now: survivable(error)}
