"""Agreement between ranks, with threads for ranks and an in-memory store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from tilelink.backend.runtime.agree import Absent, agree, greet, join
from tilelink.backend.runtime.errors import AgreementError, RecoveryFailed
from tilelink.backend.runtime.recover import elect
from tilelink.backend.runtime.roster import Roster, this_process
from tilelink.backend.runtime.state import GroupState

WORLD = 3


def meet(
    facts: list[dict[str, str]],
    errors: dict[int, Exception] | None = None,
    absent: int | None = None,
    elsewhere: Callable[[], list[int]] = list,
    lost: Callable[[], list[int]] = list,
) -> list[Exception | None]:
    store = HashStore()

    def rank(number: int) -> Exception | None:
        try:
            error = (errors or {}).get(number)
            agree(store, number, WORLD, "key", "gemm", facts[number], error, 2.0, elsewhere, lost)
        except AgreementError as problem:
            return problem
        return None

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(rank, [r for r in range(WORLD) if r != absent]))


def test_equal_facts_agree() -> None:
    assert meet([{"shapes": "A[4]"}] * WORLD) == [None] * WORLD


def test_difference_is_an_error_on_every_rank_and_says_who_has_what() -> None:
    results = meet([{"shapes": "A[4]"}, {"shapes": "A[8]"}, {"shapes": "A[4]"}])
    for result in results:
        assert isinstance(result, AgreementError)
        assert "`gemm`: its shapes differ: ranks 0, 2: A[4]; rank 1: A[8]" in str(result)


def test_first_difference_is_named_with_the_source_last() -> None:
    order = ("kernel", "shapes", "dtypes", "schedule", "versions", "emitted source", "program")
    for first, key in enumerate(order):
        # From `key` on all facts differ; they are given in an order of their own.
        facts = [
            {k: f"{k} {r}" if order.index(k) >= first else "same" for k in sorted(order)}
            for r in range(WORLD)
        ]
        for result in meet(facts):
            assert f"its {key} differ" in str(result)
            assert f"rank 0: {key} 0; rank 1: {key} 1; rank 2: {key} 2" in str(result)


def test_fact_that_one_rank_does_not_have_differs() -> None:
    for result in meet([{"compiled": "yes"}, {"compiled": "yes"}, {"shapes": "A[4]"}]):
        assert "its shapes differ: ranks 0, 1: nothing; rank 2: A[4]" in str(result)


def test_error_of_one_rank_reaches_the_others() -> None:
    results = meet([{"shapes": "A[4]"}] * WORLD, errors={1: ValueError("A is on the CPU")})
    assert results[1] is None
    for result in (results[0], results[2]):
        assert "rank 1 cannot run it" in str(result)
        assert "A is on the CPU" in str(result)


def test_absent_rank_is_named_in_time() -> None:
    started = time.monotonic()
    results = meet([{}] * WORLD, absent=2)
    assert time.monotonic() - started < 4
    assert all(isinstance(r, Absent) and "rank 2 did not come" in str(r) for r in results)


def test_rank_in_another_call_is_named_before_the_time_limit() -> None:
    started = time.monotonic()
    results = meet([{}] * WORLD, absent=2, elsewhere=lambda: [2])
    assert time.monotonic() - started < 1.9
    assert all("rank 2 runs another program" in str(r) for r in results)


def test_rank_that_is_dead_is_named_before_the_time_limit() -> None:
    started = time.monotonic()
    results = meet([{}] * WORLD, absent=2, lost=lambda: [2])
    assert time.monotonic() - started < 1.9
    assert all("the process of rank 2 has ended" in str(r) for r in results)


def joined(store: Any, absent: int | None = None, timeout: float = 5.0) -> list[Roster | Exception]:
    def rank(number: int) -> Roster | Exception:
        try:
            return join(greet(store, number, WORLD), "gemm", timeout, 0.5)
        except AgreementError as problem:
            return problem

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(rank, [r for r in range(WORLD) if r != absent]))


def test_ranks_that_join_have_one_roster_and_each_meeting_another() -> None:
    store = HashStore()
    first, second = joined(store), joined(store)
    for rosters in (first, second):
        assert all(isinstance(r, Roster) and r == rosters[0] for r in rosters)
    assert isinstance(first[0], Roster) and isinstance(second[0], Roster)
    # What the first meeting left in the store was not taken for the second one.
    assert first[0].name != second[0].name
    assert first[0].lost() == []


def test_entries_of_an_earlier_meeting_do_not_stand_for_a_rank_that_is_not_there() -> None:
    store = HashStore()
    joined(store)
    for result in joined(store, absent=1, timeout=1.0):
        assert isinstance(result, Absent) and "rank 1 did not come" in str(result)


def test_rank_whose_process_has_ended_does_not_keep_the_others_waiting() -> None:
    store = HashStore()
    # The number of a process that began at another time: it was given anew.
    entry = {**this_process().text(), "began": "0", "seen": {}}
    store.set("tilelink/hello/2", json.dumps(entry))
    started = time.monotonic()
    for result in joined(store, absent=2, timeout=30.0):
        assert isinstance(result, Absent) and "process of rank 2 has ended" in str(result)
    assert time.monotonic() - started < 10


class Quiet(GroupState):
    """A group without memory, of which no call ever runs."""

    allocate = control = set_abort = host = None  # type: ignore[assignment]

    def idle(self) -> bool:
        return True


def test_a_rank_that_ends_between_its_first_call_and_the_agreement_is_named(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        # What a first call does before it compiles; nothing is agreed on yet.
        Quiet(None, 2, WORLD, FileStore(str(tmp_path / "store"), WORLD))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store = FileStore(str(tmp_path / "store"), WORLD)
    started = time.monotonic()
    for result in joined(store, absent=2, timeout=30.0):
        assert isinstance(result, Absent) and "process of rank 2 has ended" in str(result)
    assert time.monotonic() - started < 10


class Members:
    """What an election asks of a group."""

    def __init__(self, rank: int, dead: list[int]) -> None:
        self.rank, self.world, self._dead = rank, WORLD, dead

    def lost(self) -> list[int]:
        return self._dead


def elected(
    store: Any, ranks: list[int], dead: list[int], limit: float = 10.0
) -> list[tuple[list[int], str] | Exception]:
    def rank(number: int) -> tuple[list[int], str] | Exception:
        state: Any = Members(number, dead)
        try:
            return elect(store, state, limit)
        except RecoveryFailed as problem:
            return problem

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(rank, ranks))


def test_live_ranks_elect_themselves_alike_and_anew_each_time() -> None:
    store = HashStore()
    names = set()
    for ranks, dead in (([0, 1, 2], []), ([0, 2], [1]), ([1], [0, 2]), ([0, 1, 2], [])):
        results = elected(store, ranks, dead)
        assert all(r == results[0] for r in results)
        assert isinstance(results[0], tuple) and results[0][0] == ranks
        names.add(results[0][1])
    assert len(names) == 4


def test_rank_that_does_not_come_is_left_out_and_told_when_it_does() -> None:
    store = HashStore()
    started = time.monotonic()
    for result in elected(store, [0, 1], [], limit=1.0):
        assert isinstance(result, tuple) and result[0] == [0, 1]
    assert 0.9 < time.monotonic() - started < 5
    (late,) = elected(store, [2], [])
    assert isinstance(late, RecoveryFailed) and "ranks 0, 1 went on without it" in str(late)


class Alone(GroupState):
    """A group's state without memory."""

    def allocate(self, size: int) -> Any:
        """No test asks for an arena."""
        raise AssertionError(size)

    def idle(self) -> bool:
        """Nothing runs."""
        return True

    control = set_abort = allocate  # type: ignore[assignment]

    @property
    def host(self) -> Any:
        """Where nothing is written."""
        return SimpleNamespace(aborted=False)


def in_turns(monkeypatch: pytest.MonkeyPatch, *scripts: Sequence[str]) -> list[list[str]]:
    """What becomes of ranks that each do one thing after another.

    ``bad`` is a call that is refused, ``know K`` one of a program that all know, ``meet K`` an agreement on a
    new one.
    """
    monkeypatch.setenv("TILELINK_ARRIVAL_TIMEOUT", "6")
    store = HashStore()

    def rank(number: int) -> list[str]:
        state, found = Alone(None, number, len(scripts), store), []
        for step in scripts[number]:
            do, _, kernel = step.partition(" ")
            try:
                if do == "wait":
                    time.sleep(0.6)
                    continue
                state.check_usable()
                if do == "bad":
                    state.refuse("K", ValueError("A is on cpu"))
                elif do == "meet":
                    state.agree(kernel, {"kernel": kernel}, None)
                found.append("fine")
            except AgreementError as problem:
                found.append(str(problem))
        return found

    with ThreadPoolExecutor(len(scripts)) as threads:
        return list(threads.map(rank, range(len(scripts))))


def test_a_call_that_one_rank_refuses_is_an_error_on_ranks_that_meet_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before in ((), ("meet A",)):
        found = in_turns(
            monkeypatch, [*before, "bad", "wait", "meet L"], *[[*before, "meet K", "meet L"]] * 2
        )
        done = ["fine"] * len(before)
        assert found[0] == [*done, "fine", "fine"]
        for other in found[1:]:
            assert other[:-2] == done and "A is on cpu" in other[-2] and other[-1] == "fine"


def test_a_call_that_one_rank_refuses_and_the_others_know_leaves_agreements_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank may try again; what it refused is no part of any later agreement."""
    found = in_turns(
        monkeypatch,
        ["meet K", "bad", "know K", "wait", "meet L", "meet M"],
        *[["meet K", "know K", "meet L", "meet M"]] * 2,
    )
    assert found == [["fine"] * 5, *[["fine"] * 4] * 2]


def test_ranks_that_gave_an_agreement_up_all_raise_and_meet_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them comes when the rank that refused is there again: the store has decided before."""
    found = in_turns(
        monkeypatch,
        ["meet A", "bad", "wait", "wait", "meet L"],
        ["meet A", "meet K", "meet L"],
        ["meet A", "wait", "wait", "wait", "meet K", "meet L"],
    )
    assert found[0] == ["fine"] * 3
    for other in found[1:]:
        assert other[0] == other[2] == "fine" and "A is on cpu" in other[1]
