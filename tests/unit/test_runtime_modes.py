"""Calls in PyTorch's inference mode and out of it, one behind the other: what is kept serves both."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.collectives import Group
from tests.unit.test_runtime_dynamic import Driver, Launched, State, rank
from tilelink import kernels
from tilelink.backend.runtime import arena, plan, symmetric
from tilelink.schedules import Move, Schedule

__all__ = ["rank"]  # the fixture

ALONE = Schedule(emitter="library", moves=(("C", Move("none")),))


def scatter(target: torch.Tensor, source: torch.Tensor) -> None:
    """Of two ranks whose inputs are the same."""
    target.copy_(2 * source.chunk(2)[0])


def modes(order: str) -> list[AbstractContextManager[Any]]:
    made = {"i": torch.inference_mode, "n": torch.no_grad, "g": torch.enable_grad}
    return [made[letter]() for letter in order]


@pytest.mark.parametrize("order", ["in", "ni", "ig", "gi", "inin"])
@pytest.mark.parametrize("given", [False, True])
def test_the_library_serves_calls_of_every_mode(
    order: str,
    given: bool,
    rank: tuple[State, Driver, Launched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tensors made in the mode of their call, and with those of inference mode in all of them."""
    monkeypatch.setattr(rank[0], "group", Group(scatter=scatter))
    call = kernels.gemm_rs.on(schedule=ALONE)
    with torch.inference_mode():
        kept = torch.randint(-3, 4, (2, 16, 16)).bfloat16()
    for mode in modes(order):
        with mode:
            for a, b in (torch.randint(-3, 4, (2, 16, 16)).bfloat16(), kept):
                out = (torch.empty(8, 16, dtype=torch.bfloat16),) if given else ()
                assert torch.equal(call(a, b, *out), 2 * (a @ b)[:8])
    assert len(rank[0].images) == 1


@pytest.mark.parametrize("order", ["in", "ni"])
@pytest.mark.parametrize("resource", ["copy_engine", "none"])
def test_what_the_library_writes_to_the_arena_and_the_workspace_is_the_runtimes_own(
    order: str,
    resource: str,
    rank: tuple[State, Driver, Launched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, _, _ = rank
    memory = {
        "arena": torch.zeros(1 << 20, dtype=torch.uint8),
        "workspace": torch.zeros(1 << 20, dtype=torch.uint8),
    }
    addresses = [memory["arena"].data_ptr()] * 2
    made = SimpleNamespace(
        views=[memory["arena"]] * 2, addresses=addresses, peers=torch.tensor(addresses)
    )
    monkeypatch.setattr(state, "arena_for", lambda *_: made)
    monkeypatch.setattr(state, "workspace_for", lambda _: memory["workspace"])
    monkeypatch.setattr(state, "group", Group(scatter=scatter))
    monkeypatch.setenv("TILELINK_GRAPHS", "0")
    schedule = Schedule(emitter="library", moves=(("C", Move(resource)),))
    call = kernels.gemm_rs.on(schedule=schedule)
    for mode in modes(order):
        with mode:
            call(torch.zeros(16, 16).bfloat16(), torch.zeros(16, 16).bfloat16())


def bare_state() -> Any:
    state: Any = object.__new__(arena.CudaState)
    state.device, state.rank, state.world, state.roster = torch.device("cpu"), 0, 1, None
    state.workspaces, state.arenas = [], []
    return state


def test_memory_that_is_kept_is_made_outside_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(symmetric, "_blocks", {})
    state = bare_state()
    state.check_usable = state.agree = lambda *_: None
    monkeypatch.setattr(symmetric, "state_of", lambda group: state)
    with torch.inference_mode():
        made = state.allocate(1 << 20)
        kept = [state.workspace_for(64), *made.views, made.peers]
        kept += arena.NoArena(2, torch.device("cpu")).views
        mine = symmetric.empty(4, 4)
        kept += [mine, *symmetric.peers(mine)]
    assert [tensor.is_inference() for tensor in kept] == [False] * len(kept)
    mine.zero_()  # a view that was made in inference mode can be written to in no other


def test_a_graph_that_pytorch_captures_is_begun_outside_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What of the call's tensors is written meanwhile may have been made in that mode."""
    seen: list[tuple[str, bool]] = []

    class Graph:
        def capture_begin(self, capture_error_mode: str) -> None:
            seen.append(("begin", torch.is_inference_mode_enabled()))

        def capture_end(self) -> None:
            return

        def replay(self) -> None:
            return

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    recorded = plan.Plan()
    recorded.by_torch = True
    recorded.add(lambda *_: seen.append(("product", torch.is_inference_mode_enabled())))
    recorded.close()
    with torch.inference_mode():
        spare: Any = SimpleNamespace(cuda_stream=5)
        recorded._capture(spare, {})
    assert seen == [("begin", False), ("product", True)]
