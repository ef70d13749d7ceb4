"""What the device library does with data: copies, sums and words, under Triton's interpreter."""

from pathlib import Path

from tests.interpret.scripts import interpreted
from tilelink.ir import layout


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
