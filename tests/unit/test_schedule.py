"""Schedules are data: they round-trip, and a bad one is a typed error that names the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelink.schedules import ORDERS, Move, Schedule, ScheduleError

moves = st.builds(
    lambda ways, **rest: Move(resource=ways[0], slots=ways[1], **rest),
    ways=st.sampled_from(
        (("copy_engine", 1), ("sm:4", 2), ("sm:4", 1), ("epilogue", 2), ("none", 1))
    ),
    tile=st.none() | st.integers(1, 999),
    channels=st.none() | st.integers(1, 99),
    sum=st.sampled_from(("stage", "epilogue")),
    shots=st.sampled_from((None, 1, 2)),
)
schedules = st.builds(
    Schedule,
    tiles=st.dictionaries(st.sampled_from("MNK"), st.sampled_from((16, 64, 256))).map(
        lambda d: tuple(sorted(d.items()))
    ),
    order=st.sampled_from(ORDERS),
    group=st.integers(1, 16),
    workers=st.integers(5, 200),
    warps=st.sampled_from((1, 4, 8)),
    stages=st.integers(1, 7),
    flatten=st.booleans(),
    split=st.integers(1, 16),
    tail=st.just(1),
    moves=st.dictionaries(st.sampled_from("ABC"), moves).map(lambda d: tuple(sorted(d.items()))),
)


@given(schedules)
def test_json_round_trips(schedule: Schedule) -> None:
    text = schedule.to_json()
    assert Schedule.from_json(text) == schedule
    assert Schedule.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[]", "(all)"),
        ("{", "(all)"),
        ('{"tile": 3}', "tile"),
        ('{"tiles": {"M": 100}}', "tiles.M"),
        ('{"tiles": {"M": "64"}}', "tiles.M"),
        ('{"tiles": 5}', "tiles"),
        ('{"warps": 3}', "warps"),
        ('{"warps": true}', "warps"),
        ('{"order": "random"}', "order"),
        ('{"workers": 0}', "workers"),
        ('{"emitter": "cuda"}', "emitter"),
        ('{"split": 0}', "split"),
        ('{"split": 17}', "split"),
        ('{"split": 2, "emitter": "gluon"}', "split"),
        ('{"tail": 0}', "tail"),
        ('{"tail": 9}', "tail"),
        ('{"tail": 2, "split": 2}', "tail"),
        ('{"tail": 2, "emitter": "library"}', "tail"),
        ('{"moves": {"A": {"resource": "dma"}}}', "moves.A.resource"),
        ('{"moves": {"A": {"resource": "sm:0"}}}', "moves.A.resource"),
        ('{"moves": {"A": {"resource": "sm:132"}}}', "moves.A.resource"),
        ('{"moves": {"A": {"channel": 2}}}', "moves.A.channel"),
        ('{"moves": {"A": {"channels": 0}}}', "moves.A.channels"),
        ('{"moves": {"A": {"shots": 3}}}', "moves.A.shots"),
        ('{"moves": {"A": {"shots": true}}}', "moves.A.shots"),
        ('{"moves": {"A": {"shots": 2.0}}}', "moves.A.shots"),
        ('{"moves": {"A": {"slots": 2}}}', "moves.A.slots"),
        ('{"moves": {"A": {"resource": "epilogue", "slots": 2.0}}}', "moves.A.slots"),
        ('{"moves": {"A": {"resource": "epilogue", "slots": 3}}}', "moves.A.slots"),
        ('{"moves": {"A": 7}}', "moves.A"),
    ],
)
def test_a_bad_schedule_names_the_field(text: str, field: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(text)
    assert caught.value.values["field"] == field
    assert "help" in str(caught.value)
