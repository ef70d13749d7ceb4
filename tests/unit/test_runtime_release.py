"""The end of a process group: what is kept for it goes, and nothing of it is looked at again."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

import tilelink
from tests.collectives import Group
from tests.unit.test_runtime_dynamic import Driver, Launched, State, matrix, rank
from tests.unit.test_runtime_guards import Fake, record_of, two_programs
from tilelink import kernels
from tilelink.backend.runtime import arena, cuda, groups, release, symmetric, watch
from tilelink.backend.runtime.errors import PeerTimeout, Unavailable, WaitTimeout
from tilelink.schedules import Move, Schedule

__all__ = ["rank"]  # the fixture

numbers = itertools.count()


class Lived(Fake):
    """A rank of a process group, with a table of states of its own."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, self._registry = group, groups.registry_of(group)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(release, "tables", [known])
    monkeypatch.setattr(watch, "_watched", weakref.WeakSet())
    monkeypatch.setattr(watch, "PERIOD", 0.02)
    return known


@pytest.fixture
def group() -> Iterator[Any]:
    """A group that torch.distributed knows."""
    made = new_group()
    yield made
    if groups.registry_of(made) is not None:
        dist.destroy_process_group(made)


def new_group() -> Any:
    # Each under a name of its own.
    return groups.make_group(HashStore(), f"release-{next(numbers)}", 0, 1, "cpu", 5.0, [0])


def test_peers_that_leave_a_destroyed_group_are_no_errors_of_other_groups(
    group: Any, table: dict[Any, Any]
) -> None:
    state = table[group] = Lived(group)
    state.collectives, state.dead = True, [1, 2]
    with pytest.raises(PeerTimeout, match="the process of rank 1, 2 has ended"):
        tilelink.synchronize()
    state = table[group] = Lived(group)
    dist.destroy_process_group(group)
    state.collectives, state.dead = True, [1, 2]
    tilelink.synchronize()
    assert table == {}


def test_the_watchdog_leaves_a_destroyed_group_alone(
    group: Any, table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tended: list[int] = []
    monkeypatch.setattr(Lived, "tend", lambda self: tended.append(1))
    state = table[group] = Lived(group)
    groups.found[group, 0] = state
    while not tended:
        time.sleep(0.01)
    dist.destroy_process_group(group)
    deadline = time.monotonic() + 5.0
    while groups.found and time.monotonic() < deadline:
        time.sleep(0.01)
    # Nor does a call find it without a look at its end. Its memory is for a thread of the user's.
    assert groups.found == {} and state not in watch._watched and table == {group: state}
    del tended[:]
    time.sleep(0.1)
    assert tended == []


@pytest.mark.parametrize("why", ["busy", "held", "capturing", "capturing elsewhere"])
def test_memory_that_may_be_in_use_outlives_its_group(
    why: str, group: Any, table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = table[group] = Lived(group)
    state.busy, state.held = why == "busy", why == "held"
    if why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if why == "capturing elsewhere":

        def rest(_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(Lived, "rest", rest)
    dist.destroy_process_group(group)
    release.sweep()
    assert table == {group: state} and state.arenas
    monkeypatch.undo()
    state.busy = state.held = False
    monkeypatch.setattr(release, "tables", [table])
    release.sweep()
    assert table == {} and not state.arenas


def test_a_group_is_released_behind_its_calls(group: Any, table: dict[Any, Any]) -> None:
    state, other = Lived(group), Lived(None)
    table.update({(group, 0): state, (None, 0): other})
    looks: list[int] = []

    def idle() -> bool:
        assert state.arenas
        looks.append(1)
        return len(looks) > 3

    state.idle = idle  # type: ignore[method-assign]
    tilelink.release(group)
    assert len(looks) == 4 and table == {(None, 0): other} and other.arenas
    assert not state.arenas and state not in watch._watched and other in watch._watched
    tilelink.release(group)  # nothing is kept any more
    tilelink.release()
    assert table == {}


def test_a_call_that_cannot_end_keeps_its_memory(
    group: Any, table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILELINK_TIMEOUT", "0.1")
    monkeypatch.setattr("tilelink.backend.runtime.state.GRACE", 0.1)
    state = table[group] = Lived(group)
    state.busy = True
    state.give_up("rank 1 gave up")
    with pytest.raises(PeerTimeout, match="held up by other work"):
        tilelink.release(group)
    assert table == {group: state} and state.arenas
    state.busy = False
    tilelink.release(group)
    assert table == {}


def test_an_error_that_nobody_was_told_of_is_raised_once_all_is_given_back(
    group: Any, table: dict[Any, Any]
) -> None:
    state = table[group] = Lived(group)
    state.images = two_programs()
    state.record[1:] = record_of(state.images[0], 1, watch.PROGRESS)
    state.record[0] = 1
    # A peer that was done and left is none, whatever collectives it took part in.
    state.collectives, state.dead = True, [2]
    with pytest.raises(WaitTimeout, match="waited in vain for rank 1"):
        tilelink.release(group)
    assert table == {} and not state.arenas


def test_nothing_is_released_in_a_capture(
    group: Any, table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table[group] = state = Lived(group)
    with pytest.raises(Unavailable, match="while a graph is captured"):
        tilelink.release(group)
    assert table == {group: state} and state.arenas


def test_generations_go_with_the_group_and_calls_go_to_none_that_was_destroyed(
    group: Any, table: dict[Any, Any]
) -> None:
    new = new_group()
    groups.succeed(group, new)
    table.update({group: Lived(group), new: Lived(new)})
    assert groups.standing_for(group) is new
    tilelink.release(group)
    assert table == {} and groups.standing_for(group) is new
    dist.destroy_process_group(new)
    tilelink.synchronize()
    assert groups.standing_for(group) is group


def test_a_destroyed_group_whose_memory_is_held_takes_no_calls(
    group: Any, table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(arena, "_states", table)
    state: Any = Lived(group)
    state.held, table[group, 0] = True, state
    assert arena.state_of(group) is state
    dist.destroy_process_group(group)
    watch.check_all()
    with pytest.raises(Unavailable, match="its process group was destroyed"):
        arena.state_of(group)


class Kept(State):
    """What a call asks of a state, and what its end does."""

    held = False

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.memory = torch.zeros(1)

    def arena_for(self, size: int, slots: int) -> Any:
        made = super().arena_for(size, slots)
        made.memory = self.memory
        return made

    def rest(self) -> None:
        return

    def untold(self) -> None:
        return

    def close(self) -> None:
        del self.memory

    def destroyed(self) -> bool:
        return False

    def block(self, size: int) -> Any:
        views = [torch.zeros(size, dtype=torch.uint8) for _ in range(self.world)]
        addresses = [view.data_ptr() for view in views]
        return SimpleNamespace(size=size, views=views, addresses=addresses)


@pytest.mark.parametrize("moved", ["copy_engine", "none"])
def test_programs_routes_and_blocks_go_and_the_next_call_is_a_first_one(
    moved: str,
    rank: tuple[State, Driver, Launched],
    table: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def enter() -> Kept:
        state = Kept(rank[1])
        group: Any = Group(scatter=lambda *_: None)
        state.group = group
        for module in (cuda, symmetric):
            monkeypatch.setattr(module, "state_of", lambda group: state)
        monkeypatch.setattr("tilelink.backend.runtime.site.state_of", lambda group: state)
        table[state.group, 0] = state
        return state

    monkeypatch.setattr(symmetric, "_blocks", {})
    monkeypatch.setenv("TILELINK_ARENA_MB", "1")
    emitter = "library" if moved == "none" else "triton"
    call = kernels.gemm_rs.on(schedule=Schedule(emitter=emitter, moves=(("C", Move(moved)),)))
    a, b, out = matrix(64, 64), matrix(64, 64), matrix(32, 64)
    text = """
program @local {world = 2} do {
  extent @M {value = 16}
  tensor @X {dims = [M], dtype = "fp32", move = "local", role = "in"}
  head do { }
}
"""

    def host(recorder: Any) -> None:
        recorder.head()

    state = enter()
    call(a, b, out)
    call(a, b)
    cuda.run_program(text, host, [torch.zeros(16)], {})
    tilelink.empty(4, 4)
    assert state.held and cuda._kernels and cuda._programs and symmetric._blocks
    programs = [weakref.ref(known.program) for known in cuda._kernels.values()]
    memory = weakref.ref(state.memory)
    first = len(state.agreed)
    tilelink.release(state.group)
    gc.collect()
    assert not (cuda._kernels or cuda._programs or symmetric._blocks or table)
    assert [program() for program in programs] == [None] * len(programs) and memory() is None
    second = enter()
    call(a, b, out)
    call(a, b)
    cuda.run_program(text, host, [torch.zeros(16)], {})
    tilelink.empty(4, 4)
    assert len(second.agreed) == first
