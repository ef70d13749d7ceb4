"""How calls begin and end, by head, by kernel or by guard, under Triton's interpreter."""

from pathlib import Path

import pytest

from tests.interpret.scripts import interpreted


def test_head_advances_clears_and_waits(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
arenas[0][32768:32810] = 7
head(0), head(1)
for a in arenas:
    assert a[layout.EPOCH] == 1 and a[layout.ARRIVED : layout.ARRIVED + 2].tolist() == [1, 1]
assert arenas[0][32768:32800].eq(0).all() and arenas[0][32800:32810].eq(7).all()
assert arenas[0][layout.ABORT] == 0
head(0, limit=10**6)  # nobody has acknowledged epoch 1
record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
assert record[0] == 1 and record[4] == layout.ACK and record[5:8] == [1, 0, 0], record
assert [int(a[layout.ABORT]) for a in arenas] == [1, 1]
""",
    )


def test_a_program_without_flags_takes_no_epoch_that_nobody_acknowledges(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
arenas[0][32768:32800] = 7
head(0, wait=False, signals=False)
assert arenas[0][32768:32800].eq(0).all()
head(0), head(1)
for a in arenas:
    assert a[layout.EPOCH] == 1 and a[layout.ABORT] == 0
    assert a[layout.ARRIVED : layout.ARRIVED + 2].tolist() == [1, 1]
""",
    )


def test_ranks_that_call_with_other_numbers_are_named(tmp_path: Path) -> None:
    """A rank says its number in its head; behind the call each compares, whatever the next call is about."""
    interpreted(
        tmp_path,
        """
from tilelink.backend.runtime.guard import guard_kernel

def begin(rank, said):
    device.head_kernel[(1,)](
        arenas[rank], peers, rank, 32768, 32800, 10**6, 10**6,
        ACK=layout.ACK, WORLD=2, WAIT=False, SIGNALS=True, program=1, said=said,
    )

hosts = [torch.zeros(17, dtype=torch.int32) for _ in range(2)]
outs = [torch.ones(100) for _ in range(2)]

def end(rank):
    guard_kernel[(2,)](
        arenas[rank], hosts[rank].data_ptr(), outs[rank], 100, BLOCK=64, FLOAT=True,
        peers=peers, rank=rank, WORLD=2, SAYS=True,
    )

# Alike; rank 1 is a call ahead with another number when rank 0 compares.
begin(0, 40), begin(1, 40), begin(1, 24)
end(0)
assert not outs[0].isnan().any() and hosts[0][0] == 0 and arenas[0][layout.ABORT] == 0
# The next call: rank 0 has another number than rank 1.
begin(0, 32)
end(0), end(1)
for rank in range(2):
    assert outs[rank].isnan().all() and hosts[rank][0] == 1, rank
    assert arenas[rank][layout.ABORT] == 1
record = arenas[0][layout.RECORD : layout.RECORD + layout.RECORD_WORDS].tolist()
one = layout.NUMBERED  # of program 1
assert record[0:2] == [1, 0] and record[5:8] == [one + 32, one + 24, 1] and record[9] == 5, record
""",
    )


@pytest.mark.parametrize("late", [False, True])
def test_ranks_that_call_other_programs_are_named(tmp_path: Path, late: bool) -> None:
    """Each rank finds out by itself, in the call or, where the word of the other was late, in the next one."""
    interpreted(
        tmp_path,
        """
@triton.jit
def call(arena, peers, rank, out, limit: tl.int64, program: tl.int32, host: tl.int64):
    ctx = device.begin_call(arena, peers, rank, 2, limit, limit, program)
    tl.store(out + tl.program_id(0), tl.full((), 1.0, tl.float32))
    if device.end_call(ctx, 32768, 32770, True):
        device.spoil(ctx, host, out, 2)

hosts = [torch.zeros(1 + layout.RECORD_WORDS, dtype=torch.int32) for _ in range(2)]
outs = [torch.zeros(2) for _ in range(2)]

def run(rank, program):
    call[(2,)](arenas[rank], peers, rank, outs[rank], 10**6, program, hosts[rank].data_ptr())

late, word = CASE, layout.SAID + 2 * layout.MAX_WORLD + 2  # what rank 1 says in odd calls
run(1, 3)
if late:
    there = arenas[0][word : word + 2].clone()
    arenas[0][word : word + 2] = 0
run(0, 2)
assert bool(arenas[0][layout.ABORT]) != late
if late:
    assert outs[0].tolist() == [1, 1]
    arenas[0][word : word + 2] = there
    run(0, 2)
assert outs[0].isnan().all() and hosts[0][0] == 1 and arenas[1][layout.ABORT] == 1
record = arenas[0][layout.RECORD : layout.RECORD + layout.RECORD_WORDS].tolist()
numbers = [2 * layout.NUMBERED, 3 * layout.NUMBERED]
assert record[:2] == [1, 0] and record[5:8] == [*numbers, 1] and record[9] == 5, record
""".replace("CASE", str(late)),
    )


def test_numbers_are_said_beside_acknowledgements_past_the_largest_epoch(tmp_path: Path) -> None:
    """An epoch is an int32 that comes around; its parity is that of its bits."""
    interpreted(
        tmp_path,
        """
from tilelink.backend.runtime.guard import guard_kernel

host, out = torch.zeros(17, dtype=torch.int32), torch.ones(4)
for a in arenas:
    a[layout.EPOCH] = a[layout.ARRIVED : layout.ARRIVED + 2] = 2**31 - 2
for epoch in (2**31 - 1, -(2**31), -(2**31) + 1, -(2**31) + 2):
    for a in arenas:
        a[layout.ACK : layout.ACK + layout.MAX_WORLD] = 77
        a[layout.SAID : layout.SAID + 4 * layout.MAX_WORLD] = 0
    for rank in range(2):
        device.head_kernel[(1,)](
            arenas[rank], peers, rank, 32768, 32800, 10**6, 10**6,
            ACK=layout.ACK, WORLD=2, WAIT=False, SIGNALS=True, program=1, said=40 + rank,
        )
    for a in arenas:
        assert (a[layout.ACK : layout.ACK + layout.MAX_WORLD] == 77).all(), epoch
        said = a[layout.SAID : layout.SAID + 4 * layout.MAX_WORLD].view(2, -1, 2)
        there = [[layout.NUMBERED + 40, epoch], [layout.NUMBERED + 41, epoch]]
        assert said[epoch & 1, :2].tolist() == there and (said[1 - (epoch & 1)] == 0).all()
    assert arenas[0][layout.EPOCH] == epoch and arenas[0][layout.ABORT] == 0
guard_kernel[(1,)](
    arenas[0], host.data_ptr(), out, 4, BLOCK=64, FLOAT=True,
    peers=peers, rank=0, WORLD=2, SAYS=True,
)
record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
one = layout.NUMBERED
assert record[5:8] == [one + 40, one + 41, 1] and record[9] == 5 and out.isnan().all(), record
""",
    )


def test_a_call_without_a_head_begins_ends_and_is_spoiled(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def call(arena, peers, rank, out, limit: tl.int64, program: tl.int32, host: tl.int64):
    ctx = device.begin_call(arena, peers, rank, 2, limit, limit, program)
    tl.store(arena + 32768, 7)
    tl.store(out + tl.program_id(0), tl.full((), 1.0, tl.float32) * device.slot(ctx))
    if device.end_call(ctx, 32768, 32770, True):
        device.spoil(ctx, host, out, 3)

host = torch.zeros(1 + layout.RECORD_WORDS, dtype=torch.int32)
out = torch.zeros(4)
for epoch in (1, 2, 3):
    call[(3,)](arenas[0], peers, 0, out, 10**6, 5, host.data_ptr())
    assert arenas[0][layout.EPOCH] == epoch and arenas[0][layout.EXITED] == 0
    assert [int(a[layout.ARRIVED]) for a in arenas] == [epoch, epoch]
    assert arenas[0][layout.PROGRAM] == 5 and arenas[0][32768] == 0
    assert out.tolist() == [epoch % 2] * 3 + [0] and host[0] == 0
# A call that was stopped: outputs are NaN, and the host has the record.
arenas[0][layout.ABORT] = 1
arenas[0][layout.RECORD] = 1
arenas[0][layout.RECORD + 4] = 1024
call[(3,)](arenas[0], peers, 0, out, 10**6, 5, host.data_ptr())
assert out[:3].isnan().all() and out[3] == 0
assert host[0] == 1 and host[1] == 1 and host[5] == 1024
call[(3,)](arenas[0], peers, 0, out, 10**6, 5, 0)
arenas[0][layout.ABORT] = 0
# Something has overwritten the epoch.
arenas[0][layout.EPOCH] += 3
arenas[0][layout.RECORD : layout.RECORD + 16] = 0
call[(1,)](arenas[0], peers, 0, out, 10**6, 5, 0)
record = arenas[0][layout.RECORD : layout.RECORD + 11].tolist()
assert record[0] == 1 and record[9] == 4 and record[4] == layout.EPOCH, record
""",
    )


def test_a_call_with_acknowledgements_begins_and_ends_in_its_kernel(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def call(arena, peers, rank, out, limit: tl.int64, program: tl.int32, host: tl.int64):
    ctx = device.call_context(arena, peers, rank, 2, limit, limit)
    device.open_call(ctx, program, layout_ack, True)
    tl.store(arena + 32768, 7)
    tl.store(out + tl.program_id(0), tl.full((), 1.0, tl.float32) * ctx.epoch)
    if device.end_call(ctx, 32768, 32770, False):
        device.rank_notify(ctx, layout_ack)
        device.spoil(ctx, host, out, 3)

host = torch.zeros(1 + layout.RECORD_WORDS, dtype=torch.int32)
out = torch.zeros(4)
for epoch in (1, 2, 3):
    call[(3,)](arenas[0], peers, 0, out, 10**6, 5, host.data_ptr())
    assert arenas[0][layout.EPOCH] == arenas[0][layout.ENDED] == epoch
    assert [int(a[layout.ARRIVED]) for a in arenas] == [epoch, epoch]
    assert [int(a[layout.ACK]) for a in arenas] == [epoch, epoch]
    assert arenas[0][layout.PROGRAM] == 5 and arenas[0][layout.BEGUN] == 1
    assert arenas[0][32768] == 0 and arenas[0][layout.LEAVING + epoch % 2 * 2] == 0
    assert out.tolist() == [epoch] * 3 + [0] and host[0] == 0
    # The peer acknowledges as well, or the next call waits in vain for it.
    arenas[0][layout.ACK + 1] = epoch
arenas[0][layout.ACK + 1] = 1
call[(1,)](arenas[0], peers, 0, out, 10**6, 5, host.data_ptr())
record = arenas[0][layout.RECORD : layout.RECORD + 11].tolist()
assert record[0] == 1 and record[4] == layout.ACK + 1 and record[5:7] == [3, 1], record
assert all(int(a[layout.ABORT]) == 1 for a in arenas)
assert out[:3].isnan().all() and out[3] == 0 and host[0] == 1
# A launch that is not the first tells nobody, and one without flags takes no epoch.
@triton.jit
def second(arena, peers, rank, out, limit: tl.int64):
    ctx = device.call_context(arena, peers, rank, 2, limit, limit)
    tl.store(out, tl.full((), 1.0, tl.float32) * ctx.epoch)
    ctx = device.call_context(arena, peers, rank, 2, limit, limit, False)
    device.open_call(ctx, 9)
    tl.store(out + 1, tl.full((), 1.0, tl.float32) * ctx.epoch)

before = arenas[1].clone()
before[layout.PROGRAM] = 9
second[(2,)](arenas[1], peers, 1, out, 10**6)
assert torch.equal(arenas[1], before) and out[:2].tolist() == [1, 0]
# Something has overwritten the epoch.
arenas[0][layout.ENDED] += 3
arenas[0][layout.RECORD : layout.RECORD + 16] = 0
call[(1,)](arenas[0], peers, 0, out, 10**6, 5, 0)
record = arenas[0][layout.RECORD : layout.RECORD + 11].tolist()
assert record[0] == 1 and record[9] == 4 and record[4] == layout.EPOCH, record
""".replace("layout_ack", "128"),
    )


def test_a_guard_ends_the_call(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
from tilelink.backend.runtime.guard import guard_kernel

arena = arenas[0]
arena[layout.EPOCH] = 4
arena[layout.ENDED] = 3
for word in (layout.BEGUN, layout.LEAVING + 1, layout.LEAVING + 3, 32768, 32770, 32771):
    arena[word] = 9
out = torch.ones(4)
guard_kernel[(2,)](arena, 0, out, 4, 16, True, peers, 0, 2, False, 32768, 32771)
assert arena[layout.ENDED] == 4 and out.tolist() == [1] * 4
assert arena[32768 : 32772].tolist() == [0, 0, 0, 9]
assert [int(arena[w]) for w in (layout.BEGUN, layout.LEAVING + 1, layout.LEAVING + 3)] == [0] * 3
""",
    )
