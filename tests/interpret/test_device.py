"""The device library and whole emitted kernels under Triton's interpreter."""

import atexit
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tilelink.backend.emit.triton import emit
from tilelink.ir import layout, parse_ir

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import torch
import triton
import triton.language as tl
from tilelink import device
from tilelink.ir import layout

WORDS = 70000
arenas = [torch.zeros(WORDS, dtype=torch.int32) for _ in range(2)]
peers = torch.tensor([a.data_ptr() for a in arenas])

def head(rank, wait=True, limit=10**6, signals=True):
    device.head_kernel[(1,)](
        arenas[rank], peers, rank, 32768, 32800, limit, limit,
        ACK=layout.ACK, WORLD=2, WAIT=wait, SIGNALS=signals,
    )
"""


# Runs each script that is named on standard input in a fork, which need not import anything again.
_SERVER = """
import os, runpy, signal, sys, traceback
import torch, triton
from tilelink.backend.runtime.worker import spare_work

spare_work()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        code = 1
        try:
            runpy.run_path(line.strip())
            code = 0
        except BaseException:
            traceback.print_exc(file=open(line.strip() + ".said", "w"))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def server() -> subprocess.Popen[str]:
    """The process that runs scripts on the interpreter: the variable must be set before Triton is imported."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def interpreted(tmp_path: Path, script: str) -> None:
    """Runs a script on the interpreter, behind the prelude."""
    path = tmp_path / "script.py"
    path.write_text(_PRELUDE + script)
    process = server()
    assert process.stdin is not None and process.stdout is not None
    print(path, file=process.stdin, flush=True)
    code = int(process.stdout.readline())
    said = Path(f"{path}.said")
    assert code == 0, said.read_text()[-2000:] if said.exists() else code


def test_a_script_that_fails_is_seen(tmp_path: Path) -> None:
    for script in ("assert arenas[0][0] == 1", "import os; os.abort()"):
        with pytest.raises(AssertionError):
            interpreted(tmp_path, script)
    interpreted(tmp_path, "assert arenas[0][0] == 0")


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


def test_a_kernel_of_many_ops_agrees_with_torch() -> None:
    """Causal attention with uneven tiles, a projection, a bias and gelu, against plain PyTorch."""
    interpret = pytest.importorskip("tilelink.backend.runtime.interpret")
    program = parse_ir((Path(__file__).parent / "attention.ir").read_text(), "attention.ir")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    given = {
        "Q": random(2, 40, 24),
        "K": random(2, 40, 24),
        "V": random(2, 40, 24),
        "W": random(24, 24),
        "bias": random(24),
    }
    found = interpret.run(program, [given], scalars={"scale": 0.2}, timeout=100.0, emit=emit)[0]
    q, k, v, w, bias = (t.float() for t in given.values())
    scores = q @ k.transpose(1, 2) * 0.2
    scores = scores.masked_fill(~torch.ones(40, 40).tril().bool(), -1e30)
    wanted = torch.nn.functional.gelu((scores.softmax(-1) @ v) @ w.T + bias)
    assert (found["O"].float() - wanted).norm() / wanted.norm() < 5e-3
    assert (found["L"] - scores.logsumexp(-1)).abs().max() < 1e-4


def test_words_fit_the_record() -> None:
    assert layout.RECORD + layout.RECORD_WORDS <= layout.ARRIVED


def test_parts_are_added_in_rank_order_around_the_own_one(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def add(own, parts, out, rank, step, rows, masked: tl.constexpr):
    offsets = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (tl.arange(0, 4) < rows)[:, None] & (tl.arange(0, 8) < 8)[None, :]
    mine = tl.load(own + offsets)
    if masked:
        total = device.tile_sum_parts(mine, parts + offsets, step, inside, rank, 5)
    else:
        total = device.tile_sum_parts(mine, parts + offsets, step, None, rank, 5)
    tl.store(out + offsets, total, mask=inside)

torch.manual_seed(0)
for rank in range(5):
    for masked in (False, True):
        own = torch.randn(4, 8).half()
        parts = torch.randn(5, 6, 8).half()
        parts[rank] = float("nan")  # what lies in the place of the own part is not read
        out = torch.full((4, 8), 7.0)
        add[(1,)](own, parts, out, rank, 48, 3 if masked else 4, masked)
        terms = [own if r == rank else parts[r, :4] for r in range(5)]
        want = terms[0].float()
        for term in terms[1:]:
            want = want + term.float()
        rows = 3 if masked else 4
        assert torch.equal(out[:rows], want[:rows]) and out[rows:].eq(7).all(), (rank, masked)

own, parts, out = torch.full((4, 8), -0.0).half(), torch.full((5, 6, 8), -0.0).half(), torch.ones(4, 8)
add[(1,)](own, parts, out, 2, 48, 4, False)
assert torch.signbit(out).all()  # a sum of negative zeros is one
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


def test_ranks_that_call_with_other_numbers_are_named(tmp_path: Path) -> None:
    """A rank says its number in its head; behind the call each compares, whatever the next call is about."""
    interpreted(
        tmp_path,
        """
from tilelink.backend.runtime.guard import guard_kernel

def begin(rank, said):
    device.head_kernel[(1,)](
        arenas[rank], peers, rank, 32768, 32800, 10**6, 10**6,
        ACK=layout.ACK, WORLD=2, WAIT=False, SIGNALS=True, program=1, said=said, SAYS=True,
    )

hosts = [torch.zeros(17, dtype=torch.int32) for _ in range(2)]
outs = [torch.ones(100) for _ in range(2)]

def end(rank, said):
    guard_kernel[(2,)](
        arenas[rank], hosts[rank].data_ptr(), outs[rank], 100, BLOCK=64, FLOAT=True,
        peers=peers, rank=rank, said=said, WORLD=2, SAYS=True,
    )

# Alike; rank 1 is a call ahead with another number when rank 0 compares.
begin(0, 40), begin(1, 40), begin(1, 24)
end(0, 40)
assert not outs[0].isnan().any() and hosts[0][0] == 0 and arenas[0][layout.ABORT] == 0
# The next call: rank 0 has another number than rank 1.
begin(0, 32)
end(0, 32), end(1, 24)
for rank in range(2):
    assert outs[rank].isnan().all() and hosts[rank][0] == 1, rank
    assert arenas[rank][layout.ABORT] == 1
record = arenas[0][layout.RECORD : layout.RECORD + layout.RECORD_WORDS].tolist()
assert record[0:2] == [1, 0] and record[5:8] == [32, 24, 1] and record[9] == 5, record
""",
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
        a[layout.SAID : layout.SAID + 2 * layout.MAX_WORLD] = 0
    for rank in range(2):
        device.head_kernel[(1,)](
            arenas[rank], peers, rank, 32768, 32800, 10**6, 10**6,
            ACK=layout.ACK, WORLD=2, WAIT=False, SIGNALS=True, program=1, said=40 + rank, SAYS=True,
        )
    for a in arenas:
        assert (a[layout.ACK : layout.ACK + layout.MAX_WORLD] == 77).all(), epoch
        said = a[layout.SAID : layout.SAID + 2 * layout.MAX_WORLD].view(2, -1)
        assert said[epoch & 1, :2].tolist() == [40, 41] and (said[1 - (epoch & 1)] == 0).all()
    assert arenas[0][layout.EPOCH] == epoch and arenas[0][layout.ABORT] == 0
guard_kernel[(1,)](
    arenas[0], host.data_ptr(), out, 4, BLOCK=64, FLOAT=True,
    peers=peers, rank=0, said=40, WORLD=2, SAYS=True,
)
record = arenas[0][layout.RECORD : layout.RECORD + 10].tolist()
assert record[5:8] == [40, 41, 1] and record[9] == 5 and out.isnan().all(), record
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


def test_long_copies_reach_every_element_and_no_other(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
@triton.jit
def move(source, target, rows, columns, source_stride, target_stride):
    device.tile_push_data(source, target, rows, columns, source_stride, target_stride)

source = torch.arange(1, 40001)
for rows, columns, one, two in (
    (3, 5000, 5000, 5000), (2, 4096, 4096, 4096), (3, 5000, 6000, 5000), (2, 4097, 4097, 4100),
    (1, 9000, 9000, 9000), (0, 50, 50, 50), (4, 0, 7, 7), (1, 8192, 1, 1),
):
    target = torch.zeros(40000, dtype=torch.int64)
    move[(1,)](source, target, rows, columns, one, two)
    wanted = torch.zeros(40000, dtype=torch.int64)
    for row in range(rows):
        wanted[row * two : row * two + columns] = source[row * one : row * one + columns]
    assert torch.equal(target, wanted), (rows, columns, one, two)
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
guard_kernel[(2,)](arena, 0, out, 4, 16, True, peers, 0, 0, 2, False, 32768, 32771)
assert arena[layout.ENDED] == 4 and out.tolist() == [1] * 4
assert arena[32768 : 32772].tolist() == [0, 0, 0, 9]
assert [int(arena[w]) for w in (layout.BEGUN, layout.LEAVING + 1, layout.LEAVING + 3)] == [0] * 3
""",
    )


def test_words_wait_for_their_call_and_are_marked_in_time(tmp_path: Path) -> None:
    interpreted(
        tmp_path,
        """
arenas = [torch.zeros(layout.SLOT_ARENA // 4, dtype=torch.int32) for _ in range(2)]
peers = torch.tensor([a.data_ptr() for a in arenas])

@triton.jit
def send(arena, peers, rank, value, rows: tl.int32, epoch: tl.int32, PAIR: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = device.peer_pointer(peers, 1, layout_words, tl.int64)
    device.store_words(words, epoch, tl.load(value + at), rank * 32, 8, rows, 4, PAIR)

@triton.jit
def receive(arena, peers, out, rows: tl.int32, limit: tl.int64, PAIR: tl.constexpr):
    ctx = device.context(arena, peers, 1, 2, limit, limit)
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = device.pointer(arena, layout_words, tl.int64)
    total = device.sum_words(
        ctx, words, 0, 8, (4, 8), tl.float16, rows, 4, PAIR, 2, 32, tl.float32, 1024, 128, 7, 3
    )
    tl.store(out + at, total)
    second = device.load_words(
        ctx, words, 32, 8, (4, 8), tl.float16, rows, 4, PAIR, 1024, 1, 7, 3
    )
    tl.store(out + 32 + at, second.to(tl.float32))

layout_words = tl.constexpr(layout.WORDS)
values = [torch.randint(-9, 9, (4, 8)).half() for _ in range(2)]
for pair in (True, False):
    for a in arenas:
        a[layout.EPOCH] += 1
    epoch = int(arenas[0][layout.EPOCH])
    for rank in range(2):
        send[(1,)](arenas[rank], peers, rank, values[rank], 3, epoch, pair)
    out = torch.full((2, 4, 8), 7.0)
    receive[(1,)](arenas[1], peers, out, 3, 10**6, pair)
    assert torch.equal(out[0, :3, :4], (values[0] + values[1])[:3, :4].float())
    assert torch.equal(out[1, :3, :4], values[1][:3, :4].float())
    # Nothing but the words of the tile has been touched, and each holds the call.
    held = arenas[1].view(torch.int64)[layout.WORDS // 8 :][:32].view(2, 4, 4)
    assert ((held[:, :3, :2] >> 32) == epoch).all() and (held[:, 3] == 0).all()
    assert (held[:, :, 2:] == 0).all()
# Of another call, and of a rank that has not begun: the record names its part, its flag and its tile.
for a in arenas:
    a[layout.EPOCH] += 1
epoch = int(arenas[0][layout.EPOCH])
send[(1,)](arenas[0], peers, 0, values[0], 3, epoch, True)
send[(1,)](arenas[1], peers, 1, values[1], 3, epoch - 1, True)
receive[(1,)](arenas[1], peers, torch.zeros(2, 4, 8), 3, 10**6, True)
record = arenas[1][layout.RECORD : layout.RECORD + 12].tolist()
assert record[0] == 1 and record[3] == 7 and record[4] == 1024 + 128, record
assert record[5:8] == [epoch, epoch - 1, 1] and record[8] == 3, record
assert [int(a[layout.ABORT]) for a in arenas] == [1, 1]

@triton.jit
def call(arena, peers):
    ctx = device.begin_call(arena, peers, 0, 2, 10**6, 10**6, 5)
    device.end_call(ctx, 0, 0, True)

# Twice in so many calls, once for each slot, all words are marked with an epoch that is far away.
arena = arenas[0]
words = arena.view(torch.int64)[layout.WORDS // 8 : layout.SENTINELS // 8].view(2, -1)
half = layout.WORD_AGE // 2
arena[layout.EPOCH] = arena[layout.ARRIVED] = half - 2
words.fill_(5)
for epoch in range(half - 1, half + 3):
    call[(1,)](arena, peers)
    assert arena[layout.EPOCH] == epoch
    marked = [bool((w >> 32 == epoch - 2**31).all()) for w in words]
    assert marked == [epoch == half, epoch == half + 1], (epoch, marked)
    kept = [bool((w == 5).all()) for w in words]
    assert kept == [epoch < half, epoch < half + 1], (epoch, kept)
""",
    )


def test_words_without_an_epoch_are_empty_before_and_after(tmp_path: Path) -> None:
    """Data of any bits arrives, NaN as NaN, and what was read is EMPTY again, and nothing else."""
    interpreted(
        tmp_path,
        """
arenas = [torch.zeros(layout.SLOT_ARENA // 4, dtype=torch.int32) for _ in range(2)]
for a in arenas:
    a[layout.SENTINELS // 4 :] = layout.EMPTY
peers = torch.tensor([a.data_ptr() for a in arenas])

@triton.jit
def send(arena, peers, rank, value, columns: tl.int32, VECTOR: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = device.peer_pointer(peers, 1, sentinels, tl.int32)
    device.store_words(words, None, tl.load(value + at), rank * 64, 16, 3, columns, VECTOR)

@triton.jit
def receive(arena, peers, out, columns: tl.int32, limit: tl.int64, VECTOR: tl.constexpr, PARTS: tl.constexpr):
    ctx = device.context(arena, peers, 1, 2, limit, limit)
    at = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = device.pointer(arena, sentinels, tl.int32)
    if PARTS == 1:
        found = device.load_words(
            ctx, words, 64, 16, (4, 16), tl.float16, 3, columns, VECTOR, 1024, 1, 7, 3
        )
        tl.store(out + at, found.to(tl.float32))
        device.empty_words(words, 64, 16, (4, 16), tl.float16, 3, columns, VECTOR, 1, 0)
    else:
        total = device.sum_words(
            ctx, words, 0, 16, (4, 16), tl.float16, 3, columns, VECTOR, 2, 64, tl.float32, 1024, 128, 7, 3
        )
        tl.store(out + at, total)
        device.empty_words(words, 0, 16, (4, 16), tl.float16, 3, columns, VECTOR, 2, 64)

sentinels = tl.constexpr(layout.SENTINELS)
held = arenas[1][layout.SENTINELS // 4 :]
for vector, columns in ((True, 8), (False, 6)):
    for parts in (2, 1):
        values = [torch.randint(-9, 9, (4, 16)).half() for _ in range(2)]
        # The bits of EMPTY, half of them, and a NaN of another kind; and a sum of infinities.
        values[1].view(torch.int16)[0, :6] = torch.tensor([-1, -1, -1, 0, 0, -1], dtype=torch.int16)
        values[1][1, 0] = float("nan")
        values[0][2, 1], values[1][2, 1] = float("inf"), float("-inf")
        for rank in range(2):
            send[(1,)](arenas[rank], peers, rank, values[rank], columns, vector)
        assert (held[:64].view(2, 4, 8)[:, :3, : columns // 2] != layout.EMPTY).all()
        assert (held[:64].view(2, 4, 8)[:, 3] == layout.EMPTY).all()
        out = torch.full((4, 16), 7.0)
        receive[(1,)](arenas[1], peers, out, columns, 10**6, vector, parts)
        want = (values[0].float() + values[1].float()) if parts == 2 else values[1].float()
        place = (slice(0, 3), slice(0, columns))
        assert torch.equal(out[place].nan_to_num(5e5), want[place].nan_to_num(5e5))
        left = held[:64].view(2, 4, 8).clone()
        if parts == 1:
            # The other part is still there: only what was read was emptied.
            assert (left[0, :3, : columns // 2] != layout.EMPTY).all()
            held[:32] = layout.EMPTY
        assert (held == layout.EMPTY).all() and not arenas[1][layout.ABORT]
# What is not there is waited for no longer than the limit, and the record names its part.
send[(1,)](arenas[0], peers, 0, values[0], 8, True)
arenas[1][layout.EPOCH] = arenas[1][layout.ARRIVED] = 1
receive[(1,)](arenas[1], peers, out, 8, 10**6, True, 2)
record = arenas[1][layout.RECORD : layout.RECORD + 9].tolist()
assert record[0] == 1 and record[3] == 7 and record[4] == 1024 + 128, record
assert record[7] == 1 and record[8] == 3, record
""",
    )
