"""Tensors in symmetric memory, with the memory of all ranks in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tilelink
from tilelink.backend.runtime import symmetric
from tilelink.backend.runtime.errors import BadArgument


class State:
    """One of three ranks; ``shared`` holds the memory of all, by the name of a block."""

    def __init__(self, rank: int, shared: dict[str, list[torch.Tensor]]) -> None:
        self.rank, self.world, self.shared = rank, 3, shared
        self.agreed: list[dict[str, str]] = []
        self.blocks = 0

    def check_usable(self) -> None:
        return

    def agree(self, kernel: str, facts: dict[str, str], error: Any) -> None:
        assert kernel == "tilelink.empty" and error is None
        self.agreed.append(facts)

    def block(self, size: int) -> Any:
        name = f"symmetric/{self.blocks}"
        self.blocks += 1
        views = self.shared.setdefault(
            name, [torch.zeros(size, dtype=torch.uint8) for _ in range(self.world)]
        )
        assert [len(v) for v in views] == [size] * self.world
        return SimpleNamespace(size=size, views=views, addresses=[v.data_ptr() for v in views])


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    shared: dict[str, list[torch.Tensor]] = {}
    states = [State(rank, shared) for rank in range(3)]
    monkeypatch.setattr(symmetric, "state_of", lambda group: states[group])
    monkeypatch.setattr(symmetric, "_blocks", {})
    monkeypatch.setenv("TILELINK_ARENA_MB", "1")
    return states


def test_tensors_lie_at_the_same_place_on_every_rank(ranks: list[State]) -> None:
    made = [
        [tilelink.empty(5, 7, dtype=torch.float32, group=r), tilelink.empty(3, group=r)]
        for r in range(3)
    ]
    for rank, (first, second) in enumerate(made):
        assert first.shape == (5, 7) and second.dtype == torch.bfloat16
        first.fill_(rank)
        second.fill_(10 + rank)
    for rank in range(3):
        seen = tilelink.peers(made[rank][0], group=rank)
        assert [float(t[4, 6]) for t in seen] == [0.0, 1.0, 2.0]
        assert seen[rank].data_ptr() == made[rank][0].data_ptr()
        part = tilelink.peers(made[rank][0][2:4], group=rank)
        assert [t.data_ptr() - s.data_ptr() for t, s in zip(part, seen, strict=True)] == [56] * 3
        assert [float(t[0]) for t in tilelink.peers(made[rank][1], group=rank)] == [
            10.0,
            11.0,
            12.0,
        ]
    assert all(state.agreed == ranks[0].agreed and len(state.agreed) == 2 for state in ranks)


def test_memory_grows_by_blocks_and_tensors_stay_apart(ranks: list[State]) -> None:
    made = [tilelink.empty(300_000, dtype=torch.uint8, group=0) for _ in range(5)]
    made.append(tilelink.empty(3 << 20, dtype=torch.uint8, group=0))
    made.append(tilelink.empty(0, 4, group=0))
    assert sorted(ranks[0].shared) == ["symmetric/0", "symmetric/1", "symmetric/2"]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in made)


def test_what_is_no_symmetric_tensor_is_refused(ranks: list[State]) -> None:
    with pytest.raises(BadArgument, match="is not in symmetric memory"):
        tilelink.peers(torch.zeros(4), group=0)
    matrix = tilelink.empty(4, 4, group=0)
    with pytest.raises(BadArgument, match="has gaps"):
        tilelink.peers(matrix[:, :2], group=0)
    with pytest.raises(BadArgument, match="is not in symmetric memory"):
        tilelink.peers(matrix, group=1)
    for shape in ((-1,), (2.0,), (True, 2)):
        with pytest.raises(BadArgument, match="`shape`"):
            tilelink.empty(*shape, group=0)
