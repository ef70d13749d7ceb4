"""The lab of this host: its GPUs, one process each, and its cores for planning and compiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.search import prune
from tilelink.schedules.space import Space
from tilelink.tuning.campaign import Plan
from tilelink.tuning.cell import Cell
from tilelink.tuning.predict import predictor
from tilelink.tuning.prepare import Prepared, make_pool, submit
from tilelink.tuning.problem import Problem
from tilelink.tuning.ranks import Part, Watchdog


class GpuLab:
    """See :class:`tilelink.tuning.campaign.Lab`. Rank 0 has the pool of processes; ``machine`` predicts."""

    def __init__(self, part: Part, machine: Machine, watchdog: Watchdog, seed: int = 0) -> None:
        self.part, self.machine, self.watchdog, self.seed = part, machine, watchdog, seed
        self.rank = part.rank
        self._pool: Executor | None = make_pool() if part.rank == 0 else None
        self._waiting: dict[str, dict[str, Future[Prepared]]] = {}

    def first(self, value: Any) -> Any:
        """The value of rank 0. Others wait for as long as it takes: rank 0 may be compiling."""
        if self.rank:
            self.watchdog.pause()
        found = self.part.agreement.first(value)
        self.watchdog.beat("between two problems")
        return found

    def plan(self, problems: Sequence[Problem], keep: int, effort: int) -> list[list[Plan]]:
        """Candidates of every problem, each planned in a process of its own."""
        assert self._pool is not None
        self.watchdog.pause()
        text = self.machine.to_json()
        futures = [
            self._pool.submit(plan_problem, p.to_json(), text, keep, effort) for p in problems
        ]
        return [future.result() for future in futures]

    def submit(self, problem: Problem, schedules: Sequence[Schedule]) -> None:
        """Starts compiling candidates, behind those submitted before."""
        assert self._pool is not None
        futures = submit(self._pool, problem, dict.fromkeys(schedules))
        self._waiting[problem.cell] = {s.to_json(): future for s, future in futures.items()}

    def ready(self, problem: Problem) -> dict[str, Prepared]:
        """Waits for the candidates of a problem."""
        self.watchdog.pause()
        waiting = self._waiting.pop(problem.cell)
        found = {}
        for text, future in waiting.items():
            try:
                found[text] = future.result()
            except Exception as error:  # a process that was killed takes its candidates with it
                found[text] = Prepared(None, f"{type(error).__name__}: {error}")
        self.watchdog.beat(f"candidates of {problem.cell}")
        return found

    def open(
        self,
        problem: Problem,
        prepared: Mapping[str, Prepared],
        mark: Callable[[Schedule, str], None],
        trusted: Schedule | None,
    ) -> Cell:
        """Inputs on this GPU, and the baseline."""
        return Cell(self.part, problem, prepared, self.watchdog, mark, trusted, self.seed)

    def close(self) -> None:
        """Ends the pool."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def plan_problem(problem: str, machine: str, keep: int, effort: int) -> list[Plan]:
    """The candidates of one problem (JSON texts), planned in this process."""
    kernel, model = Problem.from_json(problem).build(), Machine.from_json(machine)
    trials = prune(
        Space(kernel, model),
        predictor(kernel, model),
        keep,
        effort,
        usable=lambda schedule: has_code(kernel, schedule),
    )
    return [Plan(t.schedule.to_json(), t.predicted_us) for t in trials]


def has_code(kernel: Op, schedule: Schedule) -> bool:
    """Whether the emitter takes the fused program of ``kernel`` under ``schedule``."""
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import run_passes

    try:
        emit(run_passes(kernel, schedule))
    except TilelinkError:
        return False
    return True


def versions() -> dict[str, str]:
    """Versions that a table records. Needs a CUDA device."""
    import platform

    import torch
    import triton

    nccl: Any = torch.cuda.nccl
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "nccl": ".".join(str(part) for part in nccl.version()),
    }


def today() -> str:
    """The date, as tables have it."""
    return time.strftime("%Y-%m-%d", time.gmtime())
