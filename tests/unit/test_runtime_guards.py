"""What the runtime of GPUs refuses or stops, without a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.backend.runtime import arena, watch
from tilelink.backend.runtime.cuda import _check_apart
from tilelink.backend.runtime.errors import (
    BadArgument,
    CallsDiffer,
    EpochOverwritten,
    ExtentsDiffer,
    PeerLost,
    PeerTimeout,
    WaitTimeout,
)
from tilelink.backend.runtime.image import Image, image_of
from tilelink.backend.runtime.state import CONTROL_WORDS, GroupState
from tilelink.backend.runtime.views import Views
from tilelink.ir import layout, parse_ir
from tilelink.schedules import Move, Schedule

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
    views.program = 7
    assert views.head_arguments(flags)[-4:] == (flags, flags, 7, 0)


class Fake(GroupState):
    """A group of three ranks, this one rank 0, whose arenas are lists of words."""

    def __init__(self, arenas: int = 1) -> None:
        self.record: Any = (ctypes.c_int32 * (1 + layout.RECORD_WORDS))()
        self.busy = False
        self.dead: list[int] = []
        super().__init__(None, 0, 3, None)
        self.arenas = [[[0] * CONTROL_WORDS for _ in range(3)] for _ in range(arenas)]
        self.ended: list[bool] = []

    def stop_collectives(self) -> None:
        self.ended.append(True)

    def allocate(self, size: int) -> Any:
        raise AssertionError(f"{size} bytes: no test asks for an arena")

    @property
    def host(self) -> watch.HostRecord:
        return watch.HostRecord(ctypes.addressof(self.record), len(self.record))

    def idle(self) -> bool:
        return not self.busy

    def control(self, arena: Any, rank: int) -> list[int]:
        return list(arena[rank])

    def set_abort(self, arena: Any, rank: int, value: int) -> None:
        arena[rank][layout.ABORT] = value

    def lost(self) -> list[int]:
        return self.dead

    def stopped(self) -> list[list[int]]:
        return [[words[layout.ABORT] for words in arena] for arena in self.arenas]


def two_programs() -> list[Image]:
    kernels_ = (kernels.ag_gemm, kernels.gemm_ar)
    return [image_of(run_passes(k.build({"M": 48, "K": 16, "N": 16}, world=3))) for k in kernels_]


def record_of(image: Image, program: int, kind: int) -> list[int]:
    """What rank 0 leaves when it waits in vain for rank 1 in the last wait of a program."""
    number = len(image.waits) - 1
    word = image.flags[image.waits[number].symbol].word + 1
    return [1, 0, 0, 7, word, 5, 4, 1, number, kind, program, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_a_time_out_stops_what_peers_run_on_other_arenas(count: int) -> None:
    state = Fake(count)
    state.images = two_programs()
    state.record[1:] = record_of(state.images[0], 1, watch.PROGRESS)
    state.record[0] = 1
    with pytest.raises(WaitTimeout):
        state.check()
    # The kernel itself has stopped the arena that it ran on.
    assert state.stopped() == ([[1, 1, 1]] * 2 if count == 2 else [[0, 0, 0]])
    state.check()  # raised once
    with pytest.raises(PeerTimeout, match=r"given up: .*waited in vain for rank 1"):
        state.check_usable()


@pytest.mark.parametrize("number", [1, 2])
def test_a_record_is_read_with_the_program_that_left_it(number: int) -> None:
    state = Fake()
    state.images = two_programs()
    image = state.images[number - 1]
    state.record[1:] = record_of(image, number, watch.PROGRESS)
    state.record[0] = 1
    with pytest.raises(WaitTimeout) as caught:
        state.check()
    symbol = image.waits[-1].symbol
    assert caught.value.values["kernel"] == image.name
    assert str(caught.value.values["channel"]).startswith(f"@{symbol}[")
    assert caught.value.span == image.waits[-1].span


def test_a_rank_that_was_told_to_stop_repeats_what_the_first_one_says() -> None:
    state = Fake()
    state.images = two_programs()
    record = record_of(state.images[1], 2, watch.PROGRESS)
    state.arenas[0][2][layout.RECORD : layout.RECORD + len(record)] = [*record[:1], 2, *record[2:]]
    state.record[0] = 1
    with pytest.raises(PeerTimeout, match="rank 2 waited in vain for rank 1") as caught:
        state.check()
    assert caught.value.span == state.images[1].waits[-1].span


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (watch.ARRIVAL, WaitTimeout, "has not started the call within"),
        (watch.DEATH, PeerLost, "its process has ended"),
        (watch.OVERWRITTEN, EpochOverwritten, "the epoch of its arena is 4"),
        (watch.DIFFERENT, ExtentsDiffer, "rank 0 called `ag_gemm` with M = 5, rank 1 with 4"),
    ],
)
def test_each_kind_of_record_has_its_error(kind: int, error: type[WaitTimeout], text: str) -> None:
    image = replace(two_programs()[0], dynamic={"M": 48})
    found = watch.timeout_error(image, record_of(image, 1, kind), 2.0, 0)
    assert type(found) is error and text in str(found)


@pytest.mark.parametrize("epoch", [5, 6])
@pytest.mark.parametrize("kind", [watch.PROGRESS, watch.ARRIVAL])
def test_a_wait_for_a_rank_that_runs_another_program_says_so(kind: int, epoch: int) -> None:
    """Its flags are others, so that what is waited for may never come."""
    state = Fake()
    state.images = two_programs()
    record = record_of(state.images[0], 1, kind)
    record[watch.EPOCH] = epoch
    state.record[1:] = record
    state.record[0] = 1
    words = state.arenas[0][0]
    for rank, number in enumerate((1, 1, 2)):
        at = layout.SAID + 2 * ((epoch & 1) * layout.MAX_WORLD + rank)
        words[at : at + 2] = number * layout.NUMBERED, epoch
    with pytest.raises(CallsDiffer) as caught:
        state.check()
    said = str(caught.value)
    assert "rank 0 called `ag_gemm` of A [16, 16], B [16, 16], C [48, 16] (program 1)" in said
    assert "rank 2 `gemm_ar` of" in said and "(program 2)" in said
    # A rank of which nothing is known yet is no other.
    words[layout.SAID :] = [0] * len(words[layout.SAID :])
    assert watch.other_call(words, 0, 3, record) is None


@pytest.mark.parametrize("epoch", [5, -(2**31)])
def test_the_watchdog_stops_what_waits_for_a_dead_rank_and_nothing_else(epoch: int) -> None:
    """A dead rank that had started the call may have sent everything: its call is left alone."""
    before = epoch - 1 if epoch > 0 else 2**31 - 1
    state = Fake()
    words = state.arenas[0][0]
    words[layout.EPOCH] = epoch
    words[layout.ARRIVED : layout.ARRIVED + 3] = [epoch] * 3
    state.busy, state.dead = True, [2]
    state.tend()
    assert state.stopped() == [[0, 0, 0]]
    words[layout.ARRIVED + 2] = before
    state.dead = []
    state.tend()
    assert state.stopped() == [[0, 0, 0]]
    state.dead = [2]
    state.tend()
    assert state.stopped() == [[layout.LOST + 2, 0, 0]]
    with pytest.raises(PeerTimeout, match="the process of rank 2 has ended"):
        state.check_usable()


def test_a_call_that_cannot_start_is_an_error_once_the_group_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TILELINK_TIMEOUT", "0.1")
    monkeypatch.setattr("tilelink.backend.runtime.state.GRACE", 0.1)
    state = Fake()
    state.settle()  # nothing runs
    state.busy = True
    state.give_up("rank 1 gave up")
    with pytest.raises(PeerTimeout, match="held up by other work"):
        state.settle()


def test_an_error_names_the_limits_that_its_program_was_recorded_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = Fake()
    for image, progress, arrival in zip(two_programs(), ("2.5", "0.1"), ("33", "44"), strict=True):
        monkeypatch.setenv("TILELINK_TIMEOUT", progress)
        monkeypatch.setenv("TILELINK_ARRIVAL_TIMEOUT", arrival)
        state.number_of(image)
    for number, kind, limit in ((1, watch.PROGRESS, "2.5"), (1, watch.ARRIVAL, "33")):
        state.record[1:] = record_of(state.images[0], number, kind)
        state.record[0] = 1
        with pytest.raises(WaitTimeout, match=rf"\b{limit} s"):
            state.check()
    # Whatever program it is of, a call that was stopped has its time.
    monkeypatch.setattr("tilelink.backend.runtime.state.GRACE", 0.1)
    state.limits[0] = (0.2, 33.0)
    state.busy = True
    state.give_up("rank 1 gave up")
    with pytest.raises(PeerTimeout, match=r"has not ended in the 0\.3 s since"):
        state.settle()


def test_without_arenas_calls_are_looked_at_where_a_rank_is_dead() -> None:
    state = Fake(arenas=0)
    state.busy = state.collectives = True
    asked: list[int] = []

    def idle() -> bool:
        asked.append(1)
        return not state.busy

    state.idle = idle  # type: ignore[method-assign]
    state.tend()
    assert asked == [] and state.ended == []
    state.dead = [2]
    state.tend()
    # The library's collective would wait for that rank: its communicator is aborted, and the call is no good.
    assert asked == [1] and state.ended == [True]
    with pytest.raises(PeerTimeout, match="the process of rank 2 has ended, and with it a coll"):
        state.check()
    state.check()  # raised once
    with pytest.raises(PeerTimeout, match="given up"):
        state.check_usable()


@pytest.mark.parametrize(("busy", "collectives"), [(False, True), (True, False)])
def test_no_communicator_is_aborted_that_nothing_waits_in(busy: bool, collectives: bool) -> None:
    state = Fake(arenas=0)
    state.busy, state.collectives, state.dead = busy, collectives, [2]
    state.tend()
    assert state.ended == []


def test_a_collective_that_ended_is_no_good_where_a_rank_is_dead() -> None:
    """A peer that saw it first may have ended its own, and sent on what it never received."""
    state = Fake(arenas=0)
    state.collectives = state.busy = True
    state.check()
    state.busy, state.dead = False, [2]  # no round of the watchdog has seen it
    with pytest.raises(PeerTimeout, match="the process of rank 2 has ended, and with it a coll"):
        state.check()
    state.check()  # raised once
    with pytest.raises(PeerTimeout, match="given up"):
        state.check_usable()


def test_a_collective_that_ended_while_all_ranks_lived_is_good() -> None:
    state = Fake(arenas=0)
    state.collectives = True
    state.check()
    state.dead = [2]
    state.check()


@pytest.mark.parametrize("captured", [False, True])
def test_collectives_behind_which_other_calls_stand_are_ended_too(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a graph of the user's, whose replays are not known here."""
    state, told = Fake(), gpu_state(Events(), monkeypatch)
    if captured:
        told.note_capture(True)
        told.note_capture(False)
    else:
        told.note_call(True, True, 5)
    told.note_call(False, False, 5)
    state.collectives, state.replayed_collectives = told.collectives, told.replayed_collectives
    state.busy = not captured
    state.tend()
    assert state.ended == []
    state.dead = [2]
    state.tend()
    assert state.ended == [True]
    with pytest.raises(PeerTimeout, match="and with it a collective"):
        state.check()


def test_collectives_are_ended_though_the_group_was_given_up_first() -> None:
    """An agreement that a dead rank does not come to is an error before the watchdog looks."""
    state = Fake(arenas=0)
    state.busy = state.collectives = True
    state.dead = [2]
    state.give_up("rank 2 did not come")
    state.tend()
    assert state.ended == [True]
    state.tend()
    assert state.ended == [True]


def test_a_fused_call_that_ended_is_good_though_a_rank_is_dead() -> None:
    state = Fake()
    state.dead = [2]
    state.check()


class Events:
    """A driver whose stream takes some looks until it is behind its work."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.looks = 0
        self.captured = False

    def record(self, event: int, stream: int) -> None:
        self.log.append(("record", stream))

    def capturing(self, stream: int) -> bool:
        return self.captured

    def completed(self, event: int) -> bool:
        self.looks -= 1
        return self.looks < 0


def gpu_state(events: Events, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a state on a GPU remembers of calls, without the rest."""
    monkeypatch.setattr(arena, "driver", lambda: events)
    state: Any = object.__new__(arena.CudaState)
    state._done, state._called, state.arenas, state.world = SimpleNamespace(handle=1), False, [], 2
    state._unmarked = state._marked = None
    state.collectives = state.replayed_collectives = False
    return state


def collective_alone() -> Image:
    schedule = Schedule(emitter="library", moves=(("A", Move("none")),))
    image = image_of(
        run_passes(kernels.ag_gemm.build({"M": 32, "K": 16, "N": 16}, world=2), schedule)
    )
    assert image.apart
    return image


def test_calls_of_the_library_alone_cost_no_event_until_somebody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events()
    state, image = gpu_state(events, monkeypatch), collective_alone()
    assert state.idle()
    for _ in range(3):
        state.note_call(image.apart, True, 5)
    assert events.log == [] and state.collectives
    monkeypatch.setattr(arena, "LOOK", 0.0)
    events.looks = 2
    assert not state.idle() and events.log == [("record", 5)]
    assert not state.idle() and state.idle()
    # One event stands for all calls up to it; a later call needs another one.
    assert events.log == [("record", 5)]
    state.note_call(image.apart, True, 6)
    events.captured = True
    assert not state.idle() and len(events.log) == 1  # no event gets into a graph of the user's
    events.captured = False
    assert state.idle() and events.log[1:] == [("record", 6)]


def test_beside_programs_that_signal_every_call_has_its_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events()
    state = gpu_state(events, monkeypatch)
    state.note_call(True, True, 5)
    state.arenas = [object()]
    state.note_call(two_programs()[0].apart, False, 6)
    state.note_call(True, True, 7)
    assert events.log == [("record", 6), ("record", 7)]
    assert state.idle() and len(events.log) == 2
