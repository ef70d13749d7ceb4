"""A small part of `python -m tests.assurance.mutants`, and how mutants are judged."""

import json

import pytest

from tests.assurance import mutants as assurance
from tests.assurance.grid import Sample, prepared
from tilelink.backend.mutate import mutants
from tilelink.backend.mutate.judge import (
    DIFFERENT,
    EQUIVALENT,
    UNDECIDED,
    Truth,
    Verdict,
    decide,
    judge,
    prove,
    simulate,
)
from tilelink.ir import Op, parse_ir, print_ir

GATHER = Sample("ag_gemm", "A", "copy_engine", 2, 4)


def edited(program: Op, old: str, new: str) -> Op:
    text = print_ir(program)
    assert old in text
    return parse_ir(text.replace(old, new))


def test_intact_program_is_accepted_by_all() -> None:
    program, trial = prepared(GATHER)
    assert prove(program) == "" and simulate(program, trial) == ""
    assert decide(program, trial).word == EQUIVALENT


def test_exploration_tells_equivalent_from_different() -> None:
    program, trial = prepared(GATHER)
    # More than what is needed: everybody acks, in the order of ranks or shifted by one.
    assert decide(
        edited(program, "{peer = ack.p}", "{peer = (ack.p + 1) % WORLD}"), trial
    ).word == (EQUIVALENT)
    # A loop over the ranks that leaves one out: its next call never starts, or overtakes.
    lost = edited(program, "for_range {hi = WORLD, lo = 0}", "for_range {hi = WORLD, lo = 1}")
    assert decide(lost, trial).word == DIFFERENT
    # Ordered, but the wrong numbers.
    rolled = edited(program, "store @C[%m, %n]", "store @C[%m at (m.start + 8) % M, %n]")
    truth = decide(rolled, trial)
    assert truth.word == DIFFERENT and "relative error" in truth.why


def test_too_many_states_are_undecided_and_survive_but_nobody_missed_them() -> None:
    sample = Sample("ag_gemm", "A", "sm:1", 2, 4)
    program, trial = prepared(sample)
    assert decide(program, trial, limit=3).word == UNDECIDED
    mutant = next(iter(mutants(program)))
    verdict = Verdict(mutant, "", "race", Truth(UNDECIDED, ""))
    assert verdict.survivors == ("proof",) and verdict.missed == ()
    assert Verdict(mutant, "", "", Truth(EQUIVALENT, "")).survivors == ()
    different = Verdict(mutant, "", "", Truth(DIFFERENT, ""))
    assert different.survivors == different.missed == ("proof", "simulator")


def test_judging_leaves_the_inputs_alone() -> None:
    program, trial = prepared(Sample("gemm_rs", "C", "copy_engine", 2, 4))
    before = [[{n: v.clone() for n, v in rank.items()} for rank in call] for call in trial.inputs]
    chosen = [m for m in mutants(program) if m.name == "wrong-operand" and "@A" in m.description]
    assert chosen
    for mutant in chosen:
        judge(mutant, trial)
    for call, kept in zip(trial.inputs, before, strict=True):
        for rank, same in zip(call, kept, strict=True):
            assert all((rank[name] == value).all() for name, value in same.items())


@pytest.mark.parametrize("oracle", ["simulator", "proof"])
def test_assurance_on_a_part_of_the_grid(oracle: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--programs", "2", "--step", "9", "--intact", "4", "--oracle", oracle]
    code = assurance.main([*options, "--processes", "1"])
    result = json.loads(capsys.readouterr().out)
    part = result[oracle]
    assert part["mutants"] == part["found"] + part["equivalent"] + part["missed"] > 15
    assert part["intact_alarms"] == []
    assert code == (0 if part["missed"] == 0 else 1)
    assert part["found"] > part["missed"] * 10


def test_assurance_counts_a_blind_oracle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assurance, "prove", lambda *_: "")
    options = ["--programs", "1", "--step", "9", "--intact", "2", "--oracle", "proof"]
    assert assurance.main([*options, "--processes", "1"]) == 1
    part = json.loads(capsys.readouterr().out)["proof"]
    assert part["found"] == 0 and part["different"] > 5
