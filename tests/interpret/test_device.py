"""Signals, waits and time-outs of the device library under Triton's interpreter."""

from pathlib import Path

import pytest

from tests.interpret.scripts import interpreted


def test_a_script_that_fails_is_seen(tmp_path: Path) -> None:
    for script in ("assert arenas[0][0] == 1", "import os; os.abort()"):
        with pytest.raises(AssertionError):
            interpreted(tmp_path, script)
    interpreted(tmp_path, "assert arenas[0][0] == 0")


def test_signals_and_data_reach_the_peer(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def send(arena, peers, rank, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    source = device.pointer(arena, 262144, tl.int32)
    target = device.peer_pointer(peers, 1, 262144 + 1024, tl.int32)
    device.tile_push_data(source, target, 3, 8, 8, 16)
    device.peer_tile_notify(ctx, 1024, 1)
    for _ in range(3):
        device.counted_tile_notify(ctx, 1025, 1, 32768, 3)
    device.producer_tile_notify(ctx, 32769)
    device.rank_notify(ctx, layout_ack)

@triton.jit
def receive(arena, peers, rank, out, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    token = device.peer_tile_wait(ctx, 1024, ctx.epoch, 0, 5, 2)
    token += device.peer_tile_wait(ctx, 1025, ctx.epoch, 0, 5, 3)
    lanes = tl.arange(0, 64)
    tl.store(out + lanes, tl.load(arena + 65536 + 256 + token + lanes))

layout_ack = tl.constexpr(layout.ACK)
arenas[0][65536 : 65536 + 24] = torch.arange(1, 25, dtype=torch.int32)
head(0), head(1)
send[(1,)](arenas[0], peers, 0, 10**6)
out = torch.zeros(64, dtype=torch.int32)
receive[(1,)](arenas[1], peers, 1, out, 10**6)
rows = out.view(4, 16)
assert rows[:3, :8].flatten().tolist() == list(range(1, 25)), rows
assert rows[:, 8:].eq(0).all() and rows[3].eq(0).all()
assert arenas[0][32768:32770].tolist() == [3, 1] and arenas[1][1024:1026].tolist() == [1, 1]
assert [int(a[layout.ACK]) for a in arenas] == [1, 1] and arenas[1][layout.ABORT] == 0
""",
    )


def test_a_wait_that_runs_out_leaves_one_record_and_ends_later_waits(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def lost(arena, peers, rank, progress: tl.int64, arrival: tl.int64):
    ctx = device.context(arena, peers, rank, 2, progress, arrival)
    device.peer_tile_wait(ctx, 1030, ctx.epoch, 1, 9, 4)
    device.consumer_tile_wait(ctx, 32770, 6, 10, 5)
    if device.finish_arrive(ctx):
        device.finish_leave(ctx, 32770, 32772)

head(0)  # rank 1 never starts: the arrival limit holds
lost[(2,)](arenas[0], peers, 0, 10**12, 10**7)
record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
assert record == [1, 0, 0, 9, 1030, 1, 0, 1, 4, 2], record
assert [int(a[layout.ABORT]) for a in arenas] == [1, 1]
assert arenas[0][32770:32773].tolist() == [1 << 20, 1 << 20, 0]
assert arenas[0][layout.EXITED] == 0

for a in arenas:
    a.zero_()
head(0), head(1)  # now it has started: the progress limit
lost[(1,)](arenas[0], peers, 0, 10**7, 10**12)
assert arenas[0][layout.RECORD : layout.RECORD + 10].tolist() == [1, 0, 0, 9, 1030, 1, 0, 1, 4, 1]
""",
    )


def test_the_progress_limit_starts_when_every_rank_has_started(tmp_path: Path) -> None:
    """A producer that is here may wait for a third rank that is late, which is no lost signal."""
    interpreted(
        tmp_path,
        """
@triton.jit
def lost(arena, peers, rank, progress: tl.int64, arrival: tl.int64):
    ctx = device.context(arena, peers, rank, 3, progress, arrival)
    device.peer_tile_wait(ctx, 1030, ctx.epoch, 1, 9, 4)

arenas.append(torch.zeros(WORDS, dtype=torch.int32))
peers = torch.tensor([a.data_ptr() for a in arenas])
for absent, kind, producer in ((True, 2, 2), (False, 1, 1)):
    for a in arenas:
        a.zero_()
    arenas[0][layout.EPOCH] = 1
    arenas[0][layout.ARRIVED : layout.ARRIVED + 3] = torch.tensor([1, 1, 0 if absent else 1])
    lost[(1,)](arenas[0], peers, 0, 10**7, 3 * 10**7)
    record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
    assert record == [1, 0, 0, 9, 1030, 1, 0, producer, 4, kind], record
    assert [int(a[layout.ABORT]) for a in arenas] == [1, 1, 1]
""",
    )


def test_a_rank_that_aborts_stops_its_peers_before_itself(tmp_path: Path) -> None:
    """Its other workers signal tiles that are not there as soon as they see its own abort word."""
    interpreted(
        tmp_path,
        """
from tilelink.device import signal

order = []
def xchg(pointer, value, mask=None, **_):
    kept = [True] if mask is None else mask.handle.data
    order.extend(int(p) for p, inside in zip(pointer.handle.data, kept) if inside)
signal._stop_all.fn.__globals__["tl"].atomic_xchg, kept = xchg, tl.atomic_xchg

@triton.jit
def stop(arena, peers, rank, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    signal._abort(ctx, 1030, 1, 0, 1, 9, 4, 1)

stop[(1,)](arenas[0], peers, 0, 10**6)
words = [a.data_ptr() + 4 * layout.ABORT for a in arenas]
assert [p for p in order if p in words] == [words[1], words[0]], order
""",
    )


def test_a_rank_that_is_told_to_stop_tells_the_others(tmp_path: Path) -> None:
    """What it goes on to signal may reach a rank before the word of the one that stopped them all."""
    interpreted(
        tmp_path,
        """
@triton.jit
def wait(arena, peers, rank, out, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 3, limit, limit)
    device.peer_tile_wait(ctx, 1024, 1, 1, 0, 0)
    # The peer's word is set before anything that comes behind the wait.
    tl.store(out, tl.load(tl.load(peers + 2).to(tl.pointer_type(tl.int32), bitcast=True) + 1))

arenas.append(torch.zeros(WORDS, dtype=torch.int32))
peers = torch.tensor([a.data_ptr() for a in arenas])
assert layout.ABORT == 1
arenas[0][layout.ABORT] = 1
out = torch.zeros(1, dtype=torch.int32)
wait[(1,)](arenas[0], peers, 0, out, 10**9)
assert out == 1 and [int(a[layout.ABORT]) for a in arenas] == [1, 1, 1]
# It has nothing to say itself.
for a in arenas:
    assert (a[layout.RECORD : layout.RECORD + layout.RECORD_WORDS] == 0).all()
""",
    )


def test_epochs_are_compared_cyclically(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def wait(arena, peers, rank, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    device.peer_tile_wait(ctx, 1024, ctx.epoch, 1, 0, 0)

arenas[0][layout.EPOCH] = 2**31 - 1
arenas[0][1024] = -(2**31)  # one call ahead, past the wrap
wait[(1,)](arenas[0], peers, 0, 10**6)
assert arenas[0][layout.ABORT] == 0
arenas[0][1024] = 2**31 - 2  # one call behind
wait[(1,)](arenas[0], peers, 0, 10**6)
assert arenas[0][layout.ABORT] == 1
""",
    )


def test_flags_of_several_ranks_are_waited_for_at_once(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def both(arena, peers, rank, out, low, high, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    token = device.peer_tiles_wait(ctx, 1024, 3, low, high, ctx.epoch, 9, 4)
    tl.store(out, token)

head(0), head(1)
out = torch.ones(1, dtype=torch.int32)
both[(1,)](arenas[0], peers, 0, out, 1, 1, 10**6)  # nobody
arenas[0][1024:1028] = torch.tensor([1, 0, 0, 1])
both[(1,)](arenas[0], peers, 0, out, 0, 2, 10**6)
assert out == 0 and arenas[0][layout.RECORD] == 0
arenas[0][1027] = 0
both[(1,)](arenas[0], peers, 0, out, 0, 2, 10**6)
record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
assert record == [1, 0, 0, 9, 1027, 1, 0, 1, 4, 1], record
""",
    )


def test_a_peers_flag_is_raised_a_tile_later(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def late(arena, peers, rank, tiles, limit: tl.int64):
    ctx = device.context(arena, peers, rank, 2, limit, limit)
    pending = tl.full((), -1, tl.int32)
    for tile in range(0, tiles):
        device.delayed_counted_notify(ctx, pending, 1, 32768, 2)
        device.delayed_peer_notify(ctx, tl.where(tile == 2, 1027, -1), 0)
        pending = tl.full((), 1025, tl.int32)
    device.delayed_counted_notify(ctx, pending, 1, 32768, 2)

for tiles, counted, flags in ((1, 1, (0, 0)), (2, 2, (1, 0)), (3, 3, (1, 1))):
    for a in arenas:
        a.zero_()
    head(0), head(1)
    late[(1,)](arenas[0], peers, 0, tiles, 10**6)
    assert arenas[0][32768] == counted, tiles
    assert (int(arenas[1][1025]), int(arenas[0][1027])) == flags, tiles
""",
    )
