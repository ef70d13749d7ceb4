"""Ranks that get no memory: an error of all of them, and nobody waits. Threads stand for ranks, lists for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

import tilelink
from tests.unit.test_runtime_dynamic import Driver, Launched, State, matrix, rank
from tilelink import kernels
from tilelink.backend.runtime import arena, cuda, symmetric
from tilelink.backend.runtime.errors import AgreementError, OutOfMemory, Unavailable
from tilelink.backend.runtime.state import GroupState
from tilelink.schedules import Move, Schedule

__all__ = ["rank"]  # the fixture

WORLD = 3
FULL = (
    "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which "
    "1.00 MiB is free. Including non-PyTorch memory, this process has 139.00 GiB memory in use."
)


class Memory(arena.Arena):
    """Memory that a test may refuse, at either step."""

    refuses: Callable[[int, str], None]
    met: list[int]

    def __init__(self, rank: int, world: int, device: torch.device, size: int) -> None:
        self.refuses(rank, "take")
        self.size, self.rank, self.world = size, rank, world

    def map(self, name: str) -> None:
        self.met.append(self.rank)
        self.refuses(self.rank, "map")
        self.views = [torch.zeros(self.size, dtype=torch.uint8) for _ in range(self.world)]
        self.addresses = [view.data_ptr() for view in self.views]


class Rank(arena.CudaState):
    """A state of a group without its GPU."""

    def __init__(self, number: int, store: Any) -> None:
        self.device, self._meeting = torch.device("cpu"), None
        GroupState.__init__(self, None, number, WORLD, store)

    def tend(self) -> None:
        return

    def idle(self) -> bool:
        return True

    def control(self, arena: Any, rank: int) -> list[int]:
        return [0] * 512

    def check_usable(self) -> None:
        return


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    monkeypatch.setattr(arena, "Arena", Memory)
    monkeypatch.setattr(arena, "_meeting", lambda *_: object())
    monkeypatch.setattr(symmetric, "_blocks", {})
    monkeypatch.setattr(Memory, "met", [], raising=False)
    monkeypatch.setattr(Memory, "refuses", lambda *_: None, raising=False)
    monkeypatch.setenv("TILELINK_ARRIVAL_TIMEOUT", "20")
    monkeypatch.setenv("TILELINK_ARENA_MB", "2")
    store = HashStore()
    return [Rank(number, store) for number in range(WORLD)]


def of_all(ranks: list[Rank], step: Callable[[Rank], Any]) -> list[Any]:
    """What a step gives on each rank, or its error."""

    def one(state: Rank) -> Any:
        try:
            return step(state)
        except Exception as problem:
            return problem

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(one, ranks))


def arena_of(state: Rank) -> Any:
    state.agree("gemm", {}, None)
    return state.arena_for(100)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, step: str, problem: Exception) -> None:
    def refuses(_: Memory, rank: int, at: str) -> None:
        if (rank, at) == (number, step):
            raise problem

    monkeypatch.setattr(Memory, "refuses", refuses)


@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError(FULL), RuntimeError("CUDA driver error: out of memory")]
)
def test_a_rank_without_memory_for_the_arena_is_an_error_of_all_and_nobody_meets_it(
    problem: Exception, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, 1, "take", problem)
    found = of_all(ranks, arena_of)
    assert Memory.met == []
    assert isinstance(found[1], OutOfMemory)
    for error in found:
        assert "rank 1 has no 2.0 MiB of GPU memory for symmetric memory: CUDA" in str(error)
        assert "torch.cuda.empty_cache()" in str(error)
        assert "Including" not in str(error)
    for error in (found[0], found[2]):
        assert isinstance(error, AgreementError) and "rank 1 cannot run it" in str(error)
    # With some memory freed the same ranks go on.
    monkeypatch.setattr(Memory, "refuses", lambda *_: None)
    found = of_all(ranks, arena_of)
    assert [made.size for made in found] == [2 << 20] * WORLD and sorted(Memory.met) == [0, 1, 2]
    assert [state.arenas for state in ranks] == [[made] for made in found]


def test_a_gpu_that_cannot_be_reached_is_an_error_of_all(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, 2, "map", RuntimeError("no peer access\nsecond line"))
    found = of_all(ranks, arena_of)
    assert isinstance(found[2], Unavailable) and "second line" not in str(found[2])
    for error in found:
        assert "the cuda backend cannot run here: symmetric memory: no peer access" in str(error)
    assert [type(error) for error in found[:2]] == [AgreementError] * 2


def test_ranks_that_ask_for_different_sizes_are_told(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in of_all(ranks, lambda state: state.block(1024 << (state.rank == 2))):
        assert isinstance(error, AgreementError)
        assert "its bytes differ: ranks 0, 1: 1024; rank 2: 2048" in str(error)
    assert Memory.met == []


def test_a_rank_without_memory_for_a_tensor_is_an_error_of_all(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "state_of", lambda group: group)
    refuse(monkeypatch, 0, "take", torch.OutOfMemoryError(FULL))
    found = of_all(ranks, lambda state: tilelink.empty(1 << 20, 128, group=state))
    assert isinstance(found[0], OutOfMemory)
    assert all("rank 0 has no 256.0 MiB of GPU memory" in str(error) for error in found)
    assert Memory.met == []
    monkeypatch.setattr(Memory, "refuses", lambda *_: None)
    made = of_all(ranks, lambda state: tilelink.empty(4, 4, group=state))
    assert [tuple(tensor.shape) for tensor in made] == [(4, 4)] * WORLD


def test_a_rank_without_memory_for_a_programs_own_tensors_tells_the_others(
    rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(cuda.Program, "allocate", allocate)
    call = kernels.gemm_ar.on(schedule=Schedule(moves=(("C", Move()),)))
    with pytest.raises(OutOfMemory, match=r"rank 0 has no 0\.2 MiB of GPU memory for `gemm_ar`"):
        call(matrix(256, 32), matrix(32, 256))
    assert [type(error) for error in rank[0].errors] == [OutOfMemory]


def placed(ranks: list[Rank], hosts: list[str]) -> None:
    of_all(ranks, lambda state: state.agree("gemm", {}, None))
    for state in ranks:
        assert state.roster is not None
        processes = [replace(p, host=h) for p, h in zip(state.roster.processes, hosts, strict=True)]
        state.roster = replace(state.roster, processes=tuple(processes))


def test_ranks_on_several_hosts_are_an_error_of_all_before_any_of_them_waits(
    ranks: list[Rank],
) -> None:
    placed(ranks, ["boot pid:[1]", "other pid:[1]", "boot pid:[2]"])
    for error in of_all(ranks, lambda state: state.arena_for(100)):
        assert isinstance(error, Unavailable)
        assert "must be on one host, and they are on 2: ranks 0, 2; 1" in str(error)
    assert Memory.met == []


@pytest.mark.parametrize("hosts", [["a p", "a q", "a r"], ["token", "other", "third"]])
def test_spaces_of_process_numbers_are_no_hosts_nor_is_what_is_not_known(
    hosts: list[str], ranks: list[Rank]
) -> None:
    placed(ranks, hosts)
    made = of_all(ranks, lambda state: state.arena_for(100))
    assert [one.size for one in made] == [2 << 20] * WORLD
