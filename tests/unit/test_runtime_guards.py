"""What the CUDA runtime refuses or stops, without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.backend.runtime import arena
from tilelink.backend.runtime.cuda import _check_apart
from tilelink.backend.runtime.errors import BadArgument, WaitTimeout
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.views import Views
from tilelink.ir import layout, parse_ir

FLAGLESS = """
program @local {world = 2} do {
  extent @M {value = 16}
  tensor @X {dims = [M], dtype = "fp32", move = "local", role = "in"}
  counter @P.done {dims = [1], offset = 131072}
  head do { }
}
"""


def test_an_output_that_overlaps_another_tensor_is_refused() -> None:
    image = image_of(run_passes(kernels.ag_gemm.build({"M": 32, "K": 16, "N": 16}, world=2)))
    memory = torch.zeros(32 * 16 + 16 * 16, dtype=torch.bfloat16)
    apart = {
        "A": torch.zeros(16, 16, dtype=torch.bfloat16),
        "B": memory[-256:].view(16, 16),
        "C": memory[:512].view(32, 16),
    }
    _check_apart(image, apart)
    _check_apart(image, {**apart, "A": apart["B"]})  # inputs may be the same
    with pytest.raises(BadArgument, match="shares memory with `B`"):
        _check_apart(image, {**apart, "C": memory[8:520].view(32, 16)})


@pytest.mark.parametrize("flags", [False, True])
def test_only_a_program_with_flags_takes_an_epoch(flags: bool) -> None:
    ag_gemm = run_passes(kernels.ag_gemm.build({"M": 32, "K": 16, "N": 16}, world=2))
    image = image_of(ag_gemm if flags else parse_ir(FLAGLESS))
    arenas = [torch.zeros(layout.DATA, dtype=torch.uint8) for _ in range(2)]
    views = Views(image, 0, arenas, torch.zeros(2, dtype=torch.int64), 1.0, 1.0)
    assert views.head_arguments(flags)[-2:] == (flags, flags)


@pytest.mark.parametrize("count", [1, 2])
def test_a_time_out_stops_what_peers_run_on_other_arenas(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    words: dict[tuple[int, int], torch.Tensor] = {}

    def fake(number: int) -> Any:
        return SimpleNamespace(
            word=lambda rank, word: words.setdefault(
                (number, rank), torch.zeros(1, dtype=torch.int32)
            )
        )

    state: Any = object.__new__(arena.GroupState)
    state.arenas, state.world = [fake(n) for n in range(count)], 3
    state.host, state._reported = SimpleNamespace(aborted=True), False
    state.stream = lambda _: None
    error = WaitTimeout.__new__(WaitTimeout)
    state._error = lambda: error
    with pytest.raises(WaitTimeout):
        state.check()
    # The kernel itself has stopped the arena that it ran on.
    assert sorted(words) == ([(n, r) for n in range(2) for r in range(3)] if count == 2 else [])
    assert all(int(w) == 1 for w in words.values())
    state.check()  # reported once
