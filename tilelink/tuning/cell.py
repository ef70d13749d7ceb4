"""One problem on the GPUs: candidates are loaded, checked against a reference, and timed together."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tilelink.backend.accuracy import TOLERANCE, row_error
from tilelink.schedules import Schedule
from tilelink.schedules.search import CHECKED, STARTED, Measured
from tilelink.schedules.space import product_of
from tilelink.tuning.inputs import Sets, in_turn, make_sets, plain, reference
from tilelink.tuning.prepare import Prepared
from tilelink.tuning.problem import Problem
from tilelink.tuning.ranks import Part, Watchdog
from tilelink.tuning.timing import Rounds, Run, calls_in_a_row, capture, survivable

WARMUP = 2  # untimed rounds before the timed ones
IN_TURN, ALONE = "in_turn", "cublas"  # names of the baseline, of a product alone
COMPARED = 2  # input sets that are compared with the reference


class Cell:
    """The candidates of one problem on the ranks of a part. All methods are collective.

    What fails on one rank fails on all of them, with the error of the lowest rank that met it. ``mark`` is told
    of a candidate before and after it first runs. Where the library has no reference, results must agree with
    those of the schedule ``trusted``.
    """

    def __init__(
        self,
        part: Part,
        problem: Problem,
        prepared: Mapping[str, Prepared],
        watchdog: Watchdog,
        mark: Callable[[Schedule, str], None] = lambda *_: None,
        trusted: Schedule | None = None,
        seed: int = 0,
    ) -> None:
        self.part, self.problem, self.watchdog = part, problem, watchdog
        self.prepared = dict(prepared)
        self._mark = mark
        watchdog.beat(f"inputs of {problem.cell}")
        self.sets: Sets = make_sets(problem.build(), part, seed)
        self.rounds = Rounds(part, seed, _calls(problem))
        self.baseline: dict[str, float] = {}
        self._runs: dict[str, Run] = {}
        self._failed: dict[str, str] = {}
        self._expected: list[torch.Tensor] = []
        if plain(problem):
            self._expected = [reference(problem, part, self.sets.of(i)) for i in range(COMPARED)]
            self._add(IN_TURN, partial(in_turn, problem, part, self.sets))
        elif trusted is not None:
            text = trusted.to_json()
            self._add(text, partial(self._loaded, self._path(text)))

    def measure(self, schedules: Sequence[Schedule], samples: int) -> list[Measured]:
        """Times schedules and the baseline, interleaved; see :data:`tilelink.schedules.search.Measure`."""
        texts = [schedule.to_json() for schedule in schedules]
        for schedule, text in zip(schedules, texts, strict=True):
            if text not in self._runs and text not in self._failed:
                self._mark(schedule, STARTED)
                self._add(text, partial(self._loaded, self._path(text)))
                self._mark(schedule, CHECKED)
        while True:
            names = [t for t in texts if t in self._runs]
            if not names:
                break
            runs = {name: self._runs[name] for name in (*names, IN_TURN) if name in self._runs}
            self.watchdog.beat(f"{len(names)} candidates of {self.problem.cell}")
            taken, errors = self.rounds.sample(runs, WARMUP, samples)
            if not errors:
                if IN_TURN in taken:
                    name = ALONE if self.problem.kernel == "gemm" else IN_TURN
                    self.baseline[name] = statistics.median(taken[IN_TURN])
                return [
                    Measured(tuple(taken[t])) if t in taken else Measured(failed=self._failed[t])
                    for t in texts
                ]
            for name, error in errors.items():
                self._drop(name, error)
            self._recover(texts)
        return [Measured(failed=self._failed[t]) for t in texts]

    def close(self) -> None:
        """Frees inputs, graphs and outputs."""
        torch.cuda.synchronize()
        self._runs.clear()
        self._expected.clear()
        self.sets.tensors.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _path(self, text: str) -> str | None:
        found = self.prepared.get(text)
        return found.path if found is not None else None

    def _loaded(self, path: str | None) -> Run:
        """The emitted module at ``path`` as a function of the input set."""
        from tilelink.backend.runtime import load_module, run_module

        if path is None:
            raise RuntimeError("it was not prepared")
        module = load_module(path)
        sets, group, scalars = self.sets, self.part.group, dict(self.sets.scalars)

        def run(i: int) -> torch.Tensor:
            tensors = sets.of(i)
            run_module(module.TEXT, module.host, tensors, group, scalars)
            return tensors[sets.outputs[0]]

        return run

    def _add(self, name: str, build: Callable[[], Run]) -> None:
        """Builds a function, checks its results, and captures it in graphs, one an input set."""
        self.watchdog.beat(f"build {name[:80]} of {self.problem.cell}")
        run: Run | None = None
        results: list[torch.Tensor] = []
        mine: dict[str, str] = {}
        try:
            run = build()
            for i in range(len(self.sets.tensors)):
                run(i)
            self.part.settle()
            results = self._results(run)
            self.part.settle()
        except Exception as problem:
            mine[name] = survivable(problem)
        if not self._agreed(mine) or run is None:
            self._recover([])
            return
        # The first that runs is the reference where there is no other.
        self._expected = self._expected or [result.float() for result in results]
        errors = [row_error(r, e) for r, e in zip(results, self._expected, strict=True)]
        largest = float(self.part.largest(torch.stack(errors).max()))
        limit = TOLERANCE.get(self.problem.dtype, 0.0)
        if not largest <= limit:
            self._drop(name, f"wrong result: relative error {largest:.3g}, limit {limit:.0e}")
            return
        graphs: Run | None = None
        try:
            graphs = capture(run, len(self.sets.tensors))
            for i in range(len(self.sets.tensors)):
                graphs(i)
            self.part.settle()
        except Exception as problem:
            mine[name] = f"in a CUDA graph: {survivable(problem)}"
        if self._agreed(mine) and graphs is not None:
            self._runs[name] = graphs

    def _results(self, run: Run) -> list[torch.Tensor]:
        """The output for the first input sets; it is NaN before each call."""
        results = []
        for i in range(COMPARED):
            out = run(i)
            assert out is not None
            out.fill_(float("nan"))
            out = run(i)
            assert out is not None
            results.append(out.clone())
        return results

    def _agreed(self, mine: dict[str, str]) -> bool:
        errors = self.part.agreement.errors(mine)
        for name, text in errors.items():
            self._drop(name, text)
        return not errors

    def _drop(self, name: str, reason: str) -> None:
        self._failed[name] = reason
        self._runs.pop(name, None)

    def _recover(self, wanted: Sequence[str]) -> None:
        """A new generation of the group's memory where a call timed out, and all functions on it anew."""
        import tilelink

        try:
            self.part.settle()
            usable = True
        except Exception as problem:
            survivable(problem)
            usable = False
        try:
            from tilelink.backend.runtime.arena import state_of

            state_of(self.part.group).check_usable()
        except Exception:
            usable = False
        if all(self.part.agreement.gather(usable)):
            return
        kept = [name for name in self._runs if name != IN_TURN]
        self._runs = {n: r for n, r in self._runs.items() if n == IN_TURN}
        tilelink.recover(self.part.group)
        for name in kept:
            self._add(name, partial(self._loaded, self._path(name)))
        for name in wanted:
            if name not in self._runs:
                self._failed.setdefault(name, "not measured after another one's time-out")


def _calls(problem: Problem) -> int:
    """How many calls make one sample."""
    product = product_of(problem.build())
    if product is None:
        return 1
    m, n, k = product.extent
    return calls_in_a_row(m, k, n * product.dots)
