"""Queue orders and sizes against the formulas of docs/ir.md, computed one position at a time."""

import numpy as np
import pytest

from tilelink.backend.expand import (
    UnknownExtent,
    bytes_of,
    dims_of,
    environment,
    owner_order,
    stage_tiles,
)
from tilelink.backend.expand_walk import expand
from tilelink.ir import Op, parse_ir

PROGRAM = """program @p {world = 4} do {
  extent @M {value = 52}
  extent @N {value = 20}
  extent @H {value = 3}
  tensor @A {dims = [M, N], dtype = "bf16", move = "gather", over = 0, owner = e / 2 %% WORLD, role = "in"}
  buffer @A.all {dims = [M, N], dtype = "fp32", offset = 262144, space = "symmetric"}
  flag @f {dims = [WORLD, 2], offset = 4096}
  launch @k do {
    stage @s {%s} do (%s) {
      %%x = load @A.all[%%m, %%n] : fp32[m, n]
    }
  }
}"""


def program(attributes: str, arguments: str = "%m: tile, %n: tile") -> Op:
    return parse_ir(PROGRAM % (attributes, arguments))


def one_at_a_time(
    extents: list[int],
    tiles: list[int],
    segment: int,
    visits: list[int],
    group: int,
) -> list[list[tuple[int, int, int]]]:
    """The queue of a loop segmented along axis 0, straight from the text of docs/ir.md."""
    per = -(-segment // tiles[0])
    counts = [-(-e // t) for e, t in zip(extents[1:], tiles[1:], strict=True)]
    nb = int(np.prod(counts))
    found = []
    for q in range(len(visits) * per * nb):
        seg, r = visits[q // (per * nb)], q % (per * nb)
        width = group * nb
        first = r // width * group
        rows = min(per - first, group)
        a = first + r % width % rows
        b = r % width // rows
        start = seg * segment + a * tiles[0]
        point = [(start, min(start + tiles[0], (seg + 1) * segment), seg * per + a)]
        others = []
        for count, tile, extent in zip(
            reversed(counts), reversed(tiles[1:]), reversed(extents[1:]), strict=True
        ):
            others.append((b % count * tile, min((b % count + 1) * tile, extent), b % count))
            b //= count
        found.append(point + others[::-1])
    return found


def queue_of(stage: Op, op: Op, rank: int) -> list[list[tuple[int, int, int]]]:
    tiles = stage_tiles(stage, environment(op), rank).values()
    columns = [
        list(zip(t.start.tolist(), t.stop.tolist(), t.tile.tolist(), strict=True)) for t in tiles
    ]
    return [list(point) for point in zip(*columns, strict=True)]


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("tile", [(4, 8), (5, 7), (13, 20), (16, 32)])
def test_queue_order_follows_the_text(rank: int, group: int, tile: tuple[int, int]) -> None:
    op = program(
        f"extent = [M, N], group = {group}, segment = 13, tile = [{tile[0]}, {tile[1]}], "
        "visit = (RANK + WORLD - i) % WORLD"
    )
    stage = op.find("launch")[0].find("stage")[0]
    visits = [(rank + 4 - i) % 4 for i in range(4)]
    assert queue_of(stage, op, rank) == one_at_a_time([52, 20], list(tile), 13, visits, group)


def test_one_segment_of_the_rank_and_three_variables() -> None:
    op = program(
        "extent = [M, N, H], segment = 13, segments = 1, tile = [6, 9, 1], visit = RANK",
        "%m: tile, %n: tile, %h: int32",
    )
    stage = op.find("launch")[0].find("stage")[0]
    assert queue_of(stage, op, 2) == one_at_a_time([52, 20, 3], [6, 9, 1], 13, [2], 1)


def test_every_index_is_in_exactly_one_tile() -> None:
    op = program("extent = [M, N], group = 3, segment = 13, tile = [4, 6]")
    stage = op.find("launch")[0].find("stage")[0]
    seen = np.zeros((52, 20), dtype=int)
    for (m0, m1, _), (n0, n1, _) in queue_of(stage, op, 0):
        seen[m0:m1, n0:n1] += 1
    assert (seen == 1).all()


def test_shapes_and_bytes() -> None:
    op = program("extent = [M, N], tile = [4, 6]")
    env = environment(op)
    assert env == {"WORLD": 4, "M": 52, "N": 20, "H": 3}
    assert dims_of(op.declared("A"), env) == (13, 20)
    assert bytes_of(op.declared("A"), env) == 13 * 20 * 2
    assert bytes_of(op.declared("A.all"), env) == 52 * 20 * 4
    assert bytes_of(op.declared("f"), env) == 4 * 2 * 4


def test_a_cyclic_shard_is_its_owners_blocks_in_increasing_order() -> None:
    op = program("extent = [M, N], tile = [4, 6]")
    owner, place = owner_order(op.declared("A"), environment(op))
    for rank in range(4):
        mine = [e for e in range(52) if e // 2 % 4 == rank]
        assert np.flatnonzero(owner == rank).tolist() == mine
        assert place[mine].tolist() == list(range(len(mine)))


def test_rows_cover_a_loop_that_does_not_synchronise() -> None:
    text = """program @p {world = 2} do {
  extent @M {value = 8}
  extent @K {value = 10}
  tensor @A {dims = [M, K], dtype = "bf16", move = "local", role = "in"}
  launch @k do {
    stage @s {extent = [M], tile = [4]} do (%m: tile) {
      for_tiles {extent = [K], tile = [4]} do (%k: tile) {
        %x = load @A[%m, %k] : bf16[m, k]
      }
      for_tiles {extent = [K], tile = [4]} do (%j: tile) {
        %y = load @A[%m, j.start..j.start + 1] : bf16[m, 1]
      }
    }
  }
}"""
    out = expand(parse_ir(text))
    whole, steps = out.accesses
    assert whole.lo.tolist() == [[0, 0], [4, 0]] * 2
    assert whole.hi.tolist() == [[4, 10], [8, 10]] * 2
    assert steps.lo[:, 1].tolist() == [0, 4, 8] * 4
    assert (np.diff(steps.seq.reshape(4, 3), axis=1) > 0).all()
    assert (steps.seq.reshape(4, 3)[:, 0] > whole.seq).all()


def test_an_unknown_name_is_an_error_with_its_place() -> None:
    op = program("extent = [M, Q], tile = [4, 6]")
    with pytest.raises(UnknownExtent, match="`Q` is not known") as caught:
        expand(op)
    assert caught.value.span is not None


ORDER = """program @p {world = 2} do {
  extent @M {value = 8}
  buffer @T {dims = [M], dtype = "bf16", offset = 0, space = "local"}
  counter @d {dims = [1], offset = 131072}
  counter @c {dims = [2], offset = 131200}
  flag @f {dims = [WORLD], offset = 4096}
  launch @k {workers = 2} do {
    stage @s {extent = [M], tile = [4]} do (%m: tile) {
      wait @f[0] {compare = "equal", order = "relaxed", proxy = true, scope = "gpu"}
      %x = load @T[%m] {via = "tma", wide = true} : bf16[m]
      for_tiles {extent = [M], tile = [4]} do (%k: tile) {
        store @T[%k] (%x)
        %y = load @T[%k at (k.start + 4) % M] : bf16[k]
      }
      notify @d[0] {delay = 1, drain = true}
      notify @f[RANK] {barrier = false, count = 2, peer = 0, through = @c[RANK + 1]}
    }
    flush
  }
}"""


def test_memory_order_stands_in_the_rows() -> None:
    out = expand(parse_ir(ORDER))
    wait, held, flag = out.syncs
    assert (wait.relaxed, wait.gpu, wait.proxy, wait.equal) == (True, True, True, True)
    assert (held.relaxed, held.delay, held.drain, held.gpu) == (False, True, True, False)
    assert (flag.relaxed, flag.via, flag.delay) == (True, "c", False)
    # The word of rank 1 is past the end.
    assert flag.through.tolist() == [1, 1, -2, -2]
    first, store, _ = out.accesses
    assert (first.tma, first.wide, store.tma, store.wide) == (True, True, False, False)
    assert [p.kind for p in out.phases] == ["stage", "flush"]
    assert out.phases[1].first == len(out.task_rank) == 4


def test_a_loop_that_reads_what_it_writes_is_taken_apart() -> None:
    _, store, load = expand(parse_ir(ORDER)).accesses
    assert len(store.task) == len(load.task) == 8
    assert load.lo[:2, 0].tolist() == [4, 0]


def test_what_cannot_be_enumerated_is_said() -> None:
    assert expand(parse_ir(ORDER)).problems == []
    for old, new, part in (
        ("notify @d[0]", "notify @d[0..1, 0]", "more indices"),
        ("@c[RANK + 1]", "@c[0..2]", "one element"),
        ("wait @f[0]", "wait @g[0]", "declares"),
    ):
        problems = expand(parse_ir(ORDER.replace(old, new))).problems
        assert any(part in text for _, text in problems), (new, problems)
