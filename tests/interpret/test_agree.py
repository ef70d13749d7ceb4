"""Agreement between ranks, with threads for ranks and an in-memory store."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore  # type: ignore[attr-defined]

from tilelink.backend.runtime.agree import Absent, agree
from tilelink.backend.runtime.errors import AgreementError

WORLD = 3


def meet(
    facts: list[dict[str, str]],
    errors: dict[int, Exception] | None = None,
    absent: int | None = None,
    elsewhere: Callable[[], list[int]] = list,
) -> list[Exception | None]:
    store = HashStore()

    def rank(number: int) -> Exception | None:
        try:
            error = (errors or {}).get(number)
            agree(store, number, WORLD, 0, "gemm", facts[number], error, 2.0, elsewhere)
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
