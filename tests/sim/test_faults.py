"""Faults on the virtual clock: named errors in time, lags survived."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from tests.assurance import faults_simulated
from tests.sim.programs import error, expected, inputs_of, sample
from tilelink.backend.simulate import (
    Corrupt,
    Delay,
    Drop,
    Fault,
    Kill,
    Limits,
    Outcome,
    WaitRanOut,
    run,
    run_calls,
    survive,
)
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.trace import Traces

NAME = "gemm_rs.copy_engine"


@cache
def subject() -> tuple[Traces, list[list[dict[str, torch.Tensor]]]]:
    """The sample, and inputs of two calls."""
    program = sample(NAME)
    return Traces(Geometry(program)), [inputs_of(program, number) for number in range(2)]


def struck(*faults: Fault, limits: Limits | None = None, seed: int = 0) -> Outcome:
    traces, calls = subject()
    return survive(traces, calls, faults, seed, limits)


def test_a_dead_rank_is_named_by_those_that_wait_for_it() -> None:
    outcome = struck(Kill(2, 30))
    assert outcome.dead == {2} and set(outcome.errors) == {0, 1, 3}
    first = next(iter(outcome.errors.values()))
    assert first.code == "wait-timeout" and first.values["producer"] == 2
    assert {"rank", "worker", "tile", "channel", "expected", "seen", "limit"} <= set(first.values)
    assert first.span is not None and "wait" in first.span.source.line(first.span.line)
    others = [e.code for e in outcome.errors.values()]
    assert set(others) <= {"wait-timeout", "peer-timeout"}
    assert all(10.0 <= t <= 11.0 for t in outcome.ended.values())
    for rank in (0, 1, 3):
        assert outcome.outputs[0][rank]["C"].isnan().all()


def test_a_rank_that_has_not_started_has_the_longer_limit() -> None:
    outcome = struck(Kill(1, 0), limits=Limits(progress=2.0, arrival=50.0))
    assert all(50.0 <= t <= 51.0 for t in outcome.ended.values())
    first = next(iter(outcome.errors.values()))
    assert "has not started the call" in str(first) and first.values["limit"] == 50.0


@pytest.mark.parametrize("seconds", [1.0, 9.5])
def test_a_lag_below_the_limit_is_survived_with_right_numbers(seconds: float) -> None:
    program = sample(NAME)
    for seed, agent in enumerate((None, "head", "copy", "gemm_rs")):
        outcome = struck(Delay(1, 3, seconds, agent), seed=seed)
        assert not outcome.errors and max(outcome.ended.values()) >= seconds
        for call in range(2):
            right = expected(program, inputs_of(program, call))
            for found, want in zip(outcome.outputs[call], right, strict=True):
                assert error(found["C"], want) < 0.005


def test_a_late_start_is_survived_up_to_the_arrival_limit() -> None:
    assert not struck(Delay(3, 0, 599.0)).errors
    outcome = struck(Delay(3, 0, 601.0))
    # The late rank is told when it comes.
    assert set(outcome.errors) == {0, 1, 2, 3}
    assert outcome.errors[3].code == "peer-timeout"


def test_a_lost_signal_is_named() -> None:
    outcome = struck(Drop(0, 0))
    first = next(iter(outcome.errors.values()))
    assert first.code == "wait-timeout" and first.values["producer"] == 0


def test_words_that_go_bad() -> None:
    # Taken back to the past: whoever still waits for it runs out.
    named = [struck(Corrupt(0, step, -5, "C.ready", 1)).errors for step in range(0, 120, 4)]
    assert any(named) and all(
        e.code in ("wait-timeout", "peer-timeout") for errors in named for e in errors.values()
    )
    outcome = struck(Corrupt(1, 8, 1))
    assert outcome.errors


def test_run_raises_the_error_of_the_first_rank() -> None:
    program = sample(NAME)
    inputs = inputs_of(program)
    with pytest.raises(WaitRanOut, match="waited in vain for rank 2"):
        run(program, inputs, faults=[Kill(2, 30)])
    with pytest.raises(WaitRanOut, match=r"limit of 0\.5 s"):
        run_calls(program, [inputs] * 2, faults=[Kill(2, 30)], limits=Limits(0.5, 5.0))
    for found, want in zip(
        run(program, inputs, limits=Limits()), expected(program, inputs), strict=True
    ):
        assert error(found["C"], want) < 0.005


def test_one_seed_makes_one_outcome() -> None:
    first, second = (struck(Kill(2, 30), Delay(1, 4, 3.0), seed=5) for _ in range(2))
    assert first.ended == second.ended
    assert [str(e) for e in first.errors.values()] == [str(e) for e in second.errors.values()]


def test_many_faults(capsys: pytest.CaptureFixture[str]) -> None:
    """The assurance command on every kernel, resource and kind of fault."""
    seeds = len(faults_simulated.PAIRS) * len(faults_simulated.KINDS)
    assert faults_simulated.main(["--seeds", str(seeds)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"] == seeds and report["hangs"] == 0
    assert report["max_over_timeout_s"] < 1.0
    assert report["named_errors"] > 20 and report["survived_delays"] == 3 * len(
        faults_simulated.PAIRS
    )
