"""The simulator as an adversary: one program, several hostile schedules, every oracle.

Every read must see the same write in all of the schedules. Each value is a function of the values read,
so equal versions are equal numbers (see ``versions.py``), and it is enough to compute the numbers in
one schedule, the third, which has fewer programs left to look at than the first. Programs whose course depends on
values are executed in full each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.backend.simulate.command import reproduce
from tilelink.backend.simulate.errors import (
    BalanceError,
    BoundsError,
    DeadlockError,
    InputError,
    NumbersError,
    RaceError,
    RunError,
    StepsError,
    VersionError,
)
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Inputs, Options, Scheduler, steps_of
from tilelink.backend.simulate.shared import Shared
from tilelink.backend.simulate.trace import Traces
from tilelink.backend.simulate.versions import Versions
from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import Op

Outputs = Sequence[Sequence[Mapping[str, torch.Tensor]]]
"""A list over calls of a list over ranks of output name to tensor."""

NUMBERED = 2  # the schedule whose numbers are computed
MARGIN = 8  # times the steps that the program should take

ORACLES: dict[type[TilelinkError], str] = {
    RaceError: "happens-before",
    DeadlockError: "deadlock",
    BalanceError: "balance",
    VersionError: "version",
    BoundsError: "bounds",
    StepsError: "steps",
    NumbersError: "numbers",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What an attack found: ``oracle`` is one of ``happens-before``, ``deadlock``, ``balance``,
    ``version``, ``bounds``, ``steps``, ``numbers`` and ``execution``; ``schedule`` counts from 0; ``error``
    says what happened, and ends with the command that makes the run again."""

    oracle: str
    schedule: int
    seed: int
    error: TilelinkError

    def __str__(self) -> str:
        return f"{self.oracle}, schedule {self.schedule}: {self.error}"


def attack(
    program: Op,
    inputs_of_calls: Sequence[Inputs],
    expected: Outputs | None,
    schedules: int = 20,
    seed: int = 0,
    workers: int | None = None,
    explain: bool = False,
    shared: Shared | None = None,
) -> Failure | None:
    """Run ``program`` under up to ``schedules`` hostile schedules; the first failure, or None.

    ``inputs_of_calls`` is what :func:`tilelink.backend.simulate.run_calls` takes; ``expected`` the
    outputs of the reference, call by call, or None to leave the numbers to the caller. Schedule i is
    the one that ``run_calls`` makes of seed ``seed + i``. ``explain`` adds the chain of waits to a
    deadlock. ``shared`` saves work where programs that differ little are attacked one after the other.
    InputError where the inputs are not those of the program.
    """
    calls = len(inputs_of_calls)

    def failure(error: TilelinkError, number: int) -> Failure:
        if isinstance(error, RunError):
            error.command = reproduce(program, seed + number, calls, workers, text=True)
        oracle = next((name for kind, name in ORACLES.items() if isinstance(error, kind)), None)
        # A traceback would keep all that the run held.
        return Failure(oracle or "execution", number, seed + number, error.with_traceback(None))

    try:
        traces = Traces(Geometry(program, workers), shared)
        steps = MARGIN * calls * steps_of(traces) + 10_000
        versions = Versions(traces)
        dynamic = traces.prepare()
    except TilelinkError as error:
        return failure(error, 0)
    for number in range(schedules):
        values = dynamic or number == min(NUMBERED, schedules - 1)
        options = Options(values, explain, steps, versions)
        try:
            outputs = Scheduler(traces, inputs_of_calls, seed + number, options).run()
            if values and expected is not None:
                _compare(program, outputs, expected)
        except InputError:
            raise
        except TilelinkError as error:
            return failure(error, number)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A program that an edit has made senseless: an index of the wrong rank, say.
            return failure(InternalError(detail=f"{type(error).__name__}: {error}"), number)
    return None


def _compare(program: Op, outputs: Outputs, expected: Outputs) -> None:
    """NumbersError where an output is not the one expected."""
    for call, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        for rank, (mine, right) in enumerate(zip(found, wanted, strict=True)):
            for name, tensor in right.items():
                error = relative_error(mine[name], tensor)
                limit = TOLERANCE.get(program.declared(name)["dtype"], 0.0)
                if not error <= limit:
                    raise NumbersError(
                        program.declared(name).span,
                        symbol=name,
                        rank=rank,
                        call=call,
                        error=error,
                        limit=limit,
                    )
