"""Tiles of a pulled scatter that span the slices of several ranks: the form, the proof, the text, the runs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.kernels import maps
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.graph import build_graph
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import explore
from tilelink.backend.simulate.clock import predict, timeline
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError, default_schedule
from tilelink.schedules.machine import Machine


def schedule(tile: int = 16, slots: int = 2, **fields: Any) -> Schedule:
    """Tiles of ``tile`` rows and 16 columns; fields of the schedule, and ``channels`` of the move."""
    move = Move("epilogue", slots=slots, direction="pull", spans=True)
    move = replace(move, channels=fields.pop("channels", None))
    given = {"tiles": (("K", 16), ("M", tile), ("N", 16)), "workers": 3, **fields}
    return Schedule(moves=(("C", move),), **given)


def build(rows: int, columns: int, world: int, depth: int = 32) -> Op:
    return gemm_rs.build({"M": rows, "K": depth, "N": columns}, {}, world)


@cache
def spanning(
    rows: int = 48, tile: int = 16, world: int = 2, slots: int = 2, channels: int | None = None
) -> Op:
    return compile_kernel(build(rows, 48, world), schedule(tile, slots, channels=channels))


def product(program: Op) -> Op:
    stage = program.find("launch")[0].find("stage")[0]
    assert stage.symbol == "C.gemm"
    return stage


def told(program: Op) -> tuple[Op, Op]:
    """The loop over owners behind the store of a tile, and its notify."""
    store, loop = product(program).body[-2:]
    assert store.name == "store" and store.symbol == "C.partial" and store.get("peer") is None
    (notify,) = loop.body
    assert loop.name == "for_range" and notify.symbol == "C.ready"
    return loop, notify


# Rows, tile, ranks, channels: who is told of a tile, and how many tiles each channel of an owner is of.
COUNTS = [
    # One tile holds all rows: everyone is told, and each tile of columns has a flag.
    (32, 32, 4, None, ("0", "WORLD"), "1"),
    (24, 32, 8, 1, ("0", "WORLD"), "3"),
    (24, 32, 8, 2, ("0", "WORLD"), "(min(n.start / 32 * 32 + 32, 48) - n.start / 32 * 32 + 15) / 16"),
    # Whole slices in each tile.
    (32, 16, 4, None, ("m.start / 8", "(m.stop - 1) / 8 + 1"), "1"),
    # Whole tiles in each slice.
    (64, 16, 2, 3, ("m.start / 32", "(m.stop - 1) / 32 + 1"), "2"),
    # Neither: the second of three tiles is of both ranks.
    (48, 16, 2, 3, ("m.start / 24", "(m.stop - 1) / 24 + 1"),
     "(C.d * 24 + 23) / 16 - C.d * 24 / 16 + 1"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tile", "world", "channels", "owners", "count"), COUNTS)
def test_a_tile_is_stored_once_and_all_who_own_some_of_it_are_told(
    rows: int, tile: int, world: int, channels: int | None, owners: tuple[str, str], count: str
) -> None:
    program = spanning(rows, tile, world, channels=channels)
    assert product(program).get("segment") is None
    loop, notify = told(program)
    assert (str(loop["lo"]), str(loop["hi"])) == owners
    assert str(notify.get("count", 1)) == count
    assert (notify.get("through") is None) == (count == "1")
    (total,) = [op for op in program.walk() if op.name == "load_sum"]
    assert total["remote"] is True and not total.operands
    assert parse_ir(print_ir(program)) == program


def test_sums_wait_for_the_columns_of_all_ranks_and_share_the_workers() -> None:
    given = schedule(tiles=(("K", 64), ("M", 128), ("N", 128)), workers=132)
    program = compile_kernel(build(128, 8192, 4, 64), given)
    (_, total) = program.find("launch")[0].find("stage")
    assert [str(op.ref) for op in total.body if op.name == "wait"] == [
        "@C.ready[0..WORLD, n.C.1.start / 128]"
    ]
    # 64 tiles of 32 rows would leave half of the workers without one.
    assert total["tile"] == (16, 128)
    assert not program.find("counter")
    # Sums of columns that are no part of one channel wait for all that they meet.
    wide = compile_kernel(build(128, 8192, 4, 64), schedule(128, workers=132, channels=300))
    (wait,) = [op for op in wide.walk() if op.name == "wait"]
    assert str(wait.ref) == "@C.ready[0..WORLD, n.C.1.start / 32]"


MISTAKES = [
    (r" *wait @C\.ready[^\n]*\n", ""),
    (r"notify @C\.ready[^\n]*\n", "\n"),
    (r"(notify @C\.ready\[[^\]]*\] \{)", r'\1order = "relaxed", '),
    (r"(notify @C\.ready[^}]*peer = )C\.d", r"\1(C.d + 1) % WORLD"),
    (r"(notify @C\.ready\[RANK, )n\.start / 16", r"\g<1>(n.start / 16 + 1) % 3"),
    (r"(wait @C\.ready\[0\.\.WORLD, )n\.C\.1\.start / 16", r"\g<1>0"),
    (r"wait @C\.ready\[0\.\.WORLD", "wait @C.ready[0..WORLD - 1"),
    (r"wait @C\.ready\[0\.\.WORLD", "wait @C.ready[1..WORLD"),
    (r"(\(m\.stop - 1\) / 24) \+ 1", r"\1"),
    (r"lo = m\.start / 24", "lo = m.start / 24 + 1"),
    (r"\(C\.d \* 24 \+ 23\) / 16", "(C.d * 24 + 22) / 16 - 1"),
    (r"\(C\.d \* 24 \+ 23\) / 16", "(C.d * 24 + 23) / 16 + 1"),
    (r"through = @C\.arrived\[C\.d, n\.start / 16\]", "through = @C.arrived[0, n.start / 16]"),
    (r"\{remote = true\}", ""),
    (r"store @C\.partial\[%m,", "store @C.partial[%m at (m.start + 16) % 48,"),
    (r"load_sum @C\.partial\[%([\w.]+),", r"load_sum @C.partial[%\1 at (\1.start + 24) % 48,"),
    (r" *wait @ack[^\n]*\n", ""),
    (r" *notify @ack[^\n]*\n", ""),
]  # fmt: skip


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("old", "new"), MISTAKES)
def test_a_mistake_is_refused(slots: int, old: str, new: str) -> None:
    text = print_ir(spanning(slots=slots))
    changed, count = re.subn(old, new, text)
    if not count:
        assert slots == 2 and "@ack" in old  # which two slots do without
        return
    with pytest.raises(VerifyError):
        verify(parse_ir(changed))


EXPLORED = [(16, 16, 2, None), (16, 16, 2, 1), (24, 16, 2, None), (48, 32, 3, None)]


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("rows", "tile", "world", "channels"), EXPLORED)
def test_every_interleaving_of_a_small_instance_is_right(
    rows: int, tile: int, world: int, channels: int | None, slots: int
) -> None:
    given = schedule(tile, slots, channels=channels, workers=1 if world == 3 else 2)
    program = compile_kernel(build(rows, 32 // (world - 1), world, 16), given)
    found = explore.explore(program, calls=2 + (slots == 2))
    assert found.bad is None and found.complete, found.bad
    silent = re.sub(r" *wait @C\.ready[^\n]*\n", "", print_ir(program))
    assert explore.explore(parse_ir(silent), calls=1).bad is not None


# Rows, columns, tile, ranks, channels: slices of 1 to 24 rows, tiles of all, of some whole and of parts.
SHAPES = [
    (2, 8, 16, 2, None),
    (72, 40, 32, 2, 2),
    (48, 72, 64, 3, None),
    (20, 24, 16, 4, 1),
    (96, 48, 64, 4, None),
    (72, 40, 16, 8, 2),
    (128, 80, 64, 8, None),
]  # fmt: skip


def inputs(rows: int, depth: int, columns: int, world: int, call: int) -> tuple[Any, Any]:
    """Whole numbers, whose products and sums are exact."""
    drawn = torch.Generator().manual_seed(call)

    def some(*shape: int) -> list[torch.Tensor]:
        parts = [torch.randint(-2, 3, shape, generator=drawn) for _ in range(world)]
        return [part.to(torch.bfloat16) for part in parts]

    return some(rows, depth), some(depth, columns)


def check_runs(run: Any, shape: tuple[int, int, int], world: int, calls: int) -> None:
    for call in range(calls):
        a, b = inputs(*shape, world, call)
        whole = torch.stack([x.float() @ y.float() for x, y in zip(a, b, strict=True)]).sum(0)
        for found, wanted in zip(run(a, b), whole.chunk(world), strict=True):
            assert torch.equal(found.float(), wanted)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "tile", "world", "channels"), SHAPES)
def test_simulated_runs_are_exact(
    rows: int, columns: int, tile: int, world: int, channels: int | None, slots: int
) -> None:
    given = schedule(tile, slots, channels=channels)
    run = gemm_rs.on("simulate", world=world, schedule=given)
    check_runs(run, (rows, 32, columns), world, 1 + slots)


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "world", "channels", "slots"),
    [(24, 40, 16, 2, None, 2), (20, 24, 32, 4, 1, 2), (96, 40, 64, 4, None, 1), (72, 40, 16, 8, 2, 2)],
)  # fmt: skip
def test_interpreted_runs_are_exact(
    rows: int, columns: int, tile: int, world: int, channels: int | None, slots: int
) -> None:
    run = gemm_rs.on("interpret", world=world, schedule=schedule(tile, slots, channels=channels))
    check_runs(run, (rows, 32, columns), world, 2)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "tile", "world", "channels"), SHAPES)
def test_the_emitted_text_is_the_program(
    rows: int, columns: int, tile: int, world: int, channels: int | None, slots: int
) -> None:
    given = schedule(tile, slots, channels=channels)
    program = compile_kernel(build(rows, columns, world), given)
    validate(read_module(Source("emitted.py", emit(program))), program)


def test_parts_of_the_depth_and_of_the_last_wave_go_together_with_it() -> None:
    for extra in ({"split": 2}, {"tail": 2}):
        program = compile_kernel(build(48, 64, 2), schedule(**extra))
        validate(read_module(Source("emitted.py", emit(program))), program)
        run = gemm_rs.on("simulate", world=2, schedule=schedule(**extra))
        check_runs(run, (48, 32, 64), 2, 2)


TEXTS = [
    (r"low=m_start // 8,", "low=m_start // 8 + 1,"),
    (r"(high=\(m_stop - 1\) // 8) \+ 1", r"\1"),
    (r"low=m_start // 8,\s*high=[^\n]*\n", "\n"),
    (r"low=m_start // 8,", "low=m_start // 8, others=True,"),
    (r"(all_tile_notify\(\s*ctx,\s*\d+ \+ rank \* 3 \+ )n_start // 16", r"\g<1>0"),
    (r"remote_tile\(\s*peers, 1,", "remote_tile(peers, 0,"),
    (r"C_sum_at \+= token\n", "pass\n"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), TEXTS)
def test_a_text_that_reads_otherwise_is_refused(old: str, new: str) -> None:
    program = spanning(32, 16, 4)
    text = emit(program)
    start = text.index("@triton.jit")
    wrong = text[:start] + re.sub(old, new, text[start:])
    assert wrong != text
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", wrong)), program)


def test_ranks_are_told_one_by_one_only_where_each_counts_otherwise() -> None:
    """Of every tile a thread a rank tells its owners, for one fence and one flight over the link."""
    alike, apart = emit(spanning(32, 16, 4)), emit(spanning(48, 16, 2, channels=3))
    assert "device.all_tile_notify(" in alike and "low=" in alike and "for C_d" not in alike
    assert "for C_d in range(" in apart and "all_tile_notify(" not in apart


ROLE_SHAPES = [(256, 128, 4, None), (256, 256, 4, 2), (384, 256, 8, 2), (128, 256, 4, None)]


@pytest.mark.parametrize(("rows", "columns", "world", "channels"), ROLE_SHAPES)
def test_groups_with_halves_tell_the_owners_of_the_whole_tile(
    rows: int, columns: int, world: int, channels: int | None
) -> None:
    tiles = (("K", 64), ("M", 128), ("N", columns))
    given = schedule(slots=1, channels=channels, tiles=tiles, emitter="gluon", stages=4)
    program = compile_kernel(build(rows, 1024, world, 256), given)
    (launch, _) = program.find("launch")
    assert launch["roles"] == ("turns" if columns == 128 else "halves")
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    if rows == 256 and columns == 256:
        # The group that tells has the first half of the rows, all of one rank.
        wrong = text.replace("high=(m_stop - 1)", "high=(m_half + 64 - 1)")
        assert wrong != text
        with pytest.raises(EmittedError):
            validate(read_module(Source("emitted.py", wrong)), program)


@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize(
    ("rows", "tiles", "warps", "stages"),
    [(128, (128, 64, 64), 4, 8), (128, (128, 128, 128), 8, 3), (256, (128, 128, 64), 8, 6)],
)
def test_products_of_few_rows_do_not_spill(
    world: int, rows: int, tiles: tuple[int, int, int], warps: int, stages: int
) -> None:
    given = schedule(
        tiles=tuple(zip("MNK", tiles, strict=True)), workers=132, warps=warps, stages=stages
    )
    program = compile_kernel(build(rows, 8192, world, 3584), given)
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == []
    sass = kernel.stages["sass"]
    assert "HGMMA" in sass and re.search(r"LDG\.E(\.EF)?\.(64|128)", sass)


def test_the_clock_finds_that_weights_are_read_once() -> None:
    machine = Machine.load("h200x4")
    op = build(128, 8192, 4, 3584)
    given = schedule(tiles=(("K", 64), ("M", 128), ("N", 64)), workers=132, warps=4, stages=8)
    program = compile_kernel(op, given)
    us = predict(program, machine)
    assert timeline(program, machine).makespan == pytest.approx(us, rel=0.02)
    assert us < 0.9 * predict(compile_kernel(op, default_schedule(op)), machine)


def test_the_graph_has_an_edge_from_each_tile_to_every_owner_of_its_rows() -> None:
    graph = build_graph(build(48, 32, 2), schedule())
    tiles = [(n, d) for n, d in graph.nodes(data=True) if n.startswith("C.gemm[")]
    # Two ranks have three tiles by two, and sum two channels of their slice in two parts.
    assert len(tiles) == 2 * 3 * 2
    for node, data in tiles:
        (start, stop), (column, _) = data["tile"]["m"], data["tile"]["n"]
        owners = {start // 24, (stop - 1) // 24} - {data["rank"]}
        sent = {v for _, v, kind in graph.out_edges(node, data="kind") if kind == "RAW"}
        wanted = {f"C[{column // 16}]:{data['rank']}->{owner}" for owner in owners}
        assert {v for v in sent if "->" in v} == wanted
    needed = [(n, d) for n, d in graph.nodes(data=True) if n.startswith("C.sum[")]
    assert len(needed) == 2 * 2 * 2
    for node, data in needed:
        channel, other = data["tile"]["n.C.1"][0] // 16, 1 - data["rank"]
        found = {u for u, _, kind in graph.in_edges(node, data="kind") if kind == "RAW"}
        assert {u for u in found if "->" in u} == {f"C[{channel}]:{other}->{data['rank']}"}


@tilelink.kernel("scatter C[M, N] over M sum { tile 8 x N }")
def told_by_rows(A: Any, B: Any, C: Any) -> None:
    """A mapping that says which rows share a signal."""
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


def with_move(**changes: Any) -> Schedule:
    given = schedule()
    return replace(given, moves=tuple((n, replace(m, **changes)) for n, m in given.moves))


SMALL = {"M": 48, "K": 32, "N": 32}
REFUSED = [
    (gemm_rs.build(SMALL, {}, 2), with_move(direction="push"), "stored, each at the rank"),
    (gemm_rs.build(SMALL, {}, 2), with_move(sum="epilogue"), "epilogue of tiles"),
    (gemm_rs.build(SMALL, {}, 2), with_move(tile=8), "share a signal"),
    (told_by_rows.build(SMALL, {}, 2), with_move(), "share a signal"),
    (gemm_ar.build(SMALL, {}, 2), with_move(shots=2), "neither a gather nor a scatter"),
    (gemm_rs.build(SMALL, {}, 2, dynamic=("M",)), with_move(slots=1), "run time"),
    (maps.rs_cyclic.build(SMALL, {}, 2), with_move(), "one behind the other"),
    (maps.ag_gemm_rs.build(SMALL, {}, 2), with_move(slots=1), "shards of another tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "given", "said"), REFUSED)
def test_where_no_tile_can_span_slices_the_schedule_is_refused(
    op: Op, given: Schedule, said: str
) -> None:
    with pytest.raises(ScheduleError, match=said) as caught:
        run_passes(op, given)
    assert "`moves.C.spans`" in str(caught.value)
    assert caught.value.span is not None


def test_what_is_gathered_and_scattered_in_one_nest_may_both_be_spanned() -> None:
    moves = (*with_move(slots=1).moves, ("A", Move("copy_engine", spans=True)))
    program = compile_kernel(
        maps.ag_gemm_rs.build(SMALL, {}, 2), replace(schedule(), moves=tuple(sorted(moves)))
    )
    stages = [stage for launch in program.find("launch") for stage in launch.find("stage")]
    (gemm,) = (stage for stage in stages if any(op.name == "dot" for op in stage.walk()))
    assert gemm.get("segment") is None


def test_what_leaves_its_rank_does_not_span() -> None:
    given = schedule()
    assert Schedule.from_json(given.to_json()) == given
    assert given.to_sparse()["moves"]["C"]["spans"] is True
    assert given.with_resource("epilogue").move("C").spans
    moved = given.with_resource("copy_engine")
    assert not moved.move("C").spans
    compile_kernel(build(48, 32, 2), moved.with_tiles(M=8))
    assert Schedule(moves=(("A", Move(spans=True)),)).with_resource("sm:4").move("A").spans
