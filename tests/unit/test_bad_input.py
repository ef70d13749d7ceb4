"""Bad input ends in a typed error that names the fault: the fast part of tests/assurance/bad_input.py."""

import pytest

pytest.importorskip("torch")

from tests.assurance.bad_case import Call, Case, Command, Outcome, outcome_of
from tests.assurance.bad_input import CASES


def is_fast(case: Case) -> bool:
    """Whether a case needs no process of its own; of the three CPU backends, one is enough here."""
    if isinstance(case, Command):
        return not case.process and not case.name.startswith(("large: run", "large: graph"))
    return not case.name.endswith(("[simulate]", "[interpret]"))


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", [case for case in CASES if is_fast(case)], ids=lambda c: c.name)
def test_bad_input_is_refused_by_name(case: Case) -> None:
    outcome = outcome_of(case)
    assert not outcome.fault, f"{outcome.fault}\n{outcome.text}"


def outcome(function: object, *words: str) -> Outcome:
    return outcome_of(Call("a case", function, words), limit=0.5)  # type: ignore[arg-type]


def test_the_judge_refuses_what_is_not_a_typed_error() -> None:
    def raw() -> None:
        raise KeyError("x")

    def hang() -> None:
        while True:
            pass

    assert outcome(raw).fault == "an error that is not typed"
    assert outcome(lambda: 3).fault == "accepted"
    assert outcome(hang).hang


def test_the_judge_asks_for_the_words_and_the_exit_code() -> None:
    missing = Command("a case", ("check", "nowhere.py"), ("nowhere.py",), code=2)
    assert not outcome_of(missing).fault
    other = Command("a case", ("check", "nowhere.py"), ("somewhere.py",), code=2)
    assert "somewhere.py" in outcome_of(other).fault
    assert "exit code" in outcome_of(Command("a case", ("check", "nowhere.py"), (), code=1)).fault


def test_the_interpreter_works_after_bad_inputs() -> None:
    from tests.assurance import bad_executors
    from tilelink.backend.accuracy import TOLERANCE, relative_error

    pytest.importorskip("triton")
    names = [f"executor: {name} [interpret]" for name in ("too few ranks", "integers")]
    chosen = [c for c in bad_executors.CASES if c.name in names]
    assert len(chosen) == len(names)
    for case in chosen:
        found = outcome_of(case)
        assert not found.fault, f"{case.name}: {found.fault}\n{found.text}"
    given = bad_executors.good()
    expected = sum(rank["A"].float() @ rank["B"].float() for rank in given)
    for rank in bad_executors.execute("interpret", given):
        assert relative_error(rank["C"], expected) < TOLERANCE["bf16"]
