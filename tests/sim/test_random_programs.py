"""A few random programs against the reference; ``tests.assurance.random_programs`` runs a thousand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.assurance import random_programs
from tests.assurance.random_programs import (
    BESIDE_ROLES,
    Mismatch,
    check,
    compare,
    copied_beside_roles,
    data,
    explore,
    kernel_op,
)
from tests.strategies import FAMILIES, Drawn, drawn_programs
from tilelink.backend import reference
from tilelink.backend.pipeline import compile_kernel
from tilelink.errors import TilelinkError
from tilelink.schedules import Move, Schedule


def test_random_programs_agree_with_the_reference() -> None:
    tally = explore(20, 1, interpreted=False)
    assert tally.mismatches == []
    assert tally.programs == 20
    assert sum(tally.refused.values()) <= 2
    assert tally.maps >= 2


def test_so_do_those_of_workers_that_copy_beside_roles() -> None:
    tally = explore(6, 1, beside=True)
    assert tally.mismatches == []
    assert tally.beside == tally.programs == 6


@pytest.mark.parametrize("family", sorted(BESIDE_ROLES))
@given(source=st.data())
@settings(max_examples=2, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
def test_workers_of_these_copy_beside_roles(family: str, source: st.DataObject) -> None:
    drawn = source.draw(drawn_programs().filter(lambda d: d.family.name == family))
    drawn = copied_beside_roles(drawn)
    (launch,) = compile_kernel(kernel_op(drawn), drawn.schedule).find("launch")
    assert launch["roles"] == "turns"
    stages = launch.find("stage")
    (copies,) = (stage for stage in stages if stage.get("queue") == "dynamic")
    products = [stage for stage in stages if stage is not copies]
    assert products and all(s["workers"][0] == copies["workers"][1] for s in products)


@given(drawn=drawn_programs())
@settings(max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
def test_a_program_is_read_back_from_what_a_mismatch_prints(drawn: Drawn) -> None:
    assert Drawn.from_json(drawn.to_json()) == drawn


PAIR = next(family for family in FAMILIES if family.name == "ag_gemm_rs")
SCHEDULE = Schedule(
    tiles=(("K", 16), ("M", 64), ("N", 64)),
    workers=7,
    moves=(("A", Move("sm:2", 4)), ("C", Move("copy_engine", 4))),
)
ZIGZAG = "min(m / (M / (2 * WORLD)), 2 * WORLD - 1 - m / (M / (2 * WORLD)))"


@pytest.mark.parametrize(
    ("owners", "tile", "said"),
    [
        # The tasks of a nest end at the smaller blocks of the two.
        (ZIGZAG, 64, ""),
        (ZIGZAG, 2, ""),
        (ZIGZAG, 16, ""),
        # Whole shards whose owners are not the ranks in order have no closed form.
        ("WORLD - 1 - m / (M / WORLD)", 64, "passes: cannot-fuse"),
        ("(m / (M / WORLD) + 1) % WORLD", 64, "passes: cannot-fuse"),
    ],
)
def test_two_owner_maps_in_one_nest(owners: str, tile: int, said: str) -> None:
    mapping = f"gather A[M, K] over M {{ owner {owners} }}; scatter C[M, N] over M sum"
    extents = (("K", 4), ("M", 72), ("N", 9))
    schedule = SCHEDULE.with_tiles(M=tile)
    drawn = Drawn(PAIR, mapping, 6, extents, "fp32", (), (), schedule, 5, 6, 2111)
    assert check(drawn) == said


def test_an_inner_loop_over_many_short_blocks_is_proven() -> None:
    family = next(family for family in FAMILIES if family.name == "ag_over_depth")
    mapping = "gather A[K, M] over K { owner k % WORLD }"
    extents = (("K", 60), ("M", 20), ("N", 9))
    schedule = Schedule(tiles=(("K", 16), ("M", 16), ("N", 16)), workers=2)
    assert check(Drawn(family, mapping, 3, extents, "fp32", (), (), schedule, 2, 1, 5)) == ""


def test_tiles_that_do_not_divide_the_smaller_blocks_are_refused() -> None:
    mapping = f"gather A[M, K] over M {{ owner {ZIGZAG} }}; scatter C[M, N] over M sum"
    extents = (("K", 4), ("M", 72), ("N", 9))
    drawn = Drawn(PAIR, mapping, 6, extents, "fp32", (), (), SCHEDULE.with_tiles(M=4), 5, 6, 1)
    assert check(drawn) == "passes: cannot-fuse"


class Refused(TilelinkError):
    """An error of this project that is no refusal of the front end, a pass or the emitter."""

    code = "refused"
    message = "no"
    hint = "none"


@pytest.mark.parametrize("place", ["verify", "run_calls"])
def test_an_error_of_the_proof_or_of_a_run_is_a_mismatch(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise Refused

    monkeypatch.setattr(random_programs, place, refuse)
    tally = explore(5, 1, interpreted=False)
    assert tally.programs == 0 and not tally.refused
    assert tally.mismatches and all("--replay '{" in text for text in tally.mismatches)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@given(source=st.data())
@settings(max_examples=1, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
def test_every_family_compiles(family: object, source: st.DataObject) -> None:
    # With its own maps: two of them drawn for one nest may not fit.
    own = drawn_programs().filter(lambda d: d.family == family and not d.mapping)
    drawn = source.draw(own)
    assert check(drawn) == ""


@given(drawn=drawn_programs(small=True))
@settings(max_examples=2, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
def test_a_wrong_element_is_seen(drawn: Drawn) -> None:
    op = kernel_op(drawn)
    inputs = data(drawn, compile_kernel(op, drawn.schedule))
    wanted = [reference.run(op, call) for call in inputs]
    wrong = [[{n: t.clone() for n, t in rank.items()} for rank in call] for call in wanted]
    compare(drawn, wrong, wanted, "copy")
    torch.select(next(iter(wrong[1][-1].values())).view(-1), 0, 0).add_(7)
    with pytest.raises(Mismatch, match="in call 1"):
        compare(drawn, wrong, wanted, "copy")
