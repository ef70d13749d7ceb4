"""The sum of a scatter in the epilogue of the own tiles: the form, its refusals, and what slips past no rule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import tilelink
import tilelink.language as tk
from tests.assurance.grid import Sample
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.check import IRTypeError, check_types
from tilelink.kernel import load_kernels
from tilelink.kernels import gemm_ar, gemm_rs, gemm_rs_add
from tilelink.schedules import Move, Schedule, ScheduleError

ROOT = Path(__file__).parents[2]
SAMPLE = Sample("gemm_rs", "C", "copy_engine-folded", 3, 6, columns=2, workers=4)
ADD = replace(SAMPLE, kernel="gemm_rs_add", tensor="P")


def own_stage(program: Op) -> Op:
    """The stage of the own tiles."""
    (launch,) = program.find("launch")
    return next(s for s in launch.find("stage") if any(o.name == "load_sum" for o in s.walk()))


@pytest.mark.parametrize("resource", ["copy_engine", "sm:1", "epilogue"])
@pytest.mark.parametrize("sample", [SAMPLE, ADD], ids=lambda s: s.kernel)
def test_the_own_tiles_come_last_and_read_no_part_of_their_own(
    sample: Sample, resource: str
) -> None:
    program = replace(sample, resource=f"{resource}-folded").program()
    verify(program, sample.op())
    own = own_stage(program)
    names = [op.name for op in own.body]
    (sum_,) = [op for op in own.body if op.name == "load_sum"]
    at = names.index("load_sum")
    # The main loop, this rank's part as it is rounded, the waits for all others, the sum.
    assert names[at - 3 : at + 1] == ["cast", "wait", "wait", "load_sum"]
    assert sum_.operands == own.body[at - 3].results and sum_.get("own") is None
    assert [str(op.ref) for op in own.body[at - 2 : at]] == [
        f"@{sample.tensor}.ready[0..RANK, {op.ref.index[1]}]"
        if n == 0
        else f"@{sample.tensor}.ready[RANK + 1..WORLD, {op.ref.index[1]}]"
        for n, op in enumerate(own.body[at - 2 : at])
        if op.ref is not None
    ]
    assert own["segments"] == 1 and str(own["visit"]) == "RANK"
    if resource == "sm:1":
        assert own["queue"] == "dynamic" and own.get("first") is None


@pytest.mark.parametrize("workers", [1, 3, 4, 7])
def test_workers_are_even_over_both_stages(workers: int) -> None:
    program = replace(SAMPLE, workers=workers).program()
    geometry = Geometry(program)
    (launch,) = program.find("launch")
    taken = [0] * workers
    for stage in launch.find("stage"):
        tasks = len(geometry.queue(stage, geometry.env(0)))
        for worker in range(workers):
            first = geometry.first_position(stage, worker, 0, workers)
            taken[worker] += len(range(first, tasks, workers))
    assert sum(taken) == 6 * 2 and max(taken) - min(taken) <= 1


def test_a_copy_carries_a_few_megabytes_and_tiles_go_channel_by_channel() -> None:
    extents = {"M": 8192, "K": 3584, "N": 8192}
    op = gemm_rs.build(extents, {}, 2)
    tiles = (("K", 64), ("M", 128), ("N", 256))
    move = Move("copy_engine", sum="epilogue")
    program = run_passes(op, Schedule(tiles=tiles, moves=(("C", move),)))
    assert program.declared("C")["channel_rows"] == 512  # 8 MiB of the 64 of a slice
    (launch,) = program.find("launch")
    assert [s.get("group") for s in launch.find("stage")] == [4, 4]
    many = run_passes(op, Schedule(tiles=tiles, moves=(("C", replace(move, channels=16)),)))
    assert many.declared("C")["channel_rows"] == 256
    # Among more ranks slices are cut in fewer pieces, so that a call has no more copies.
    for world, pieces in ((4, 2), (8, 1)):
        other = run_passes(
            gemm_rs.build(extents, {}, world), Schedule(tiles=tiles, moves=(("C", move),))
        )
        assert other.declared("C")["channel_rows"] == 8192 // world // pieces


@tilelink.kernel("scatter C[M, N] over M sum; scatter D[M, N] over M sum")
def two_sums(A, B, C, D):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
        D[m, n] = acc * 2.0


@tilelink.kernel("scatter P[M, N] over M sum; shard C[M] over M")
def rows_of_a_sum(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m in tk.tiles(M):
        C[m] = tk.sum(tk.cast(P[m, :], tk.float32), axis=1)


@pytest.mark.parametrize(
    ("kernel", "moves", "said"),
    [
        (gemm_ar, {"C": Move("epilogue", shots=1, sum="epilogue")}, "neither a scatter nor"),
        (gemm_rs, {"C": Move("none", sum="epilogue")}, "collective"),
        (two_sums, {"C": Move("epilogue", sum="epilogue")}, "stored last"),
        (rows_of_a_sum, {"P": Move("epilogue", sum="epilogue")}, "arithmetic on each element"),
    ],
)
def test_what_does_not_fold_is_refused(kernel: object, moves: dict[str, Move], said: str) -> None:
    op = kernel.build({"M": 32, "K": 16, "N": 16}, {}, 2)  # type: ignore[attr-defined]
    with pytest.raises(ScheduleError, match=said) as caught:
        run_passes(op, Schedule(moves=tuple(moves.items())))
    assert caught.value.values["field"] == "sum"


def test_one_rank_has_nothing_to_fold() -> None:
    op = gemm_rs.build({"M": 32, "K": 16, "N": 16}, {}, 1)
    folded, plain = (
        run_passes(op, Schedule(moves=(("C", Move(sum=where)),))) for where in ("epilogue", "stage")
    )
    verify(folded, op)
    assert folded.find("launch") == plain.find("launch")
    assert not folded.find("load_sum")


@cache
def text_of(sample: Sample) -> str:
    return print_ir(sample.program())


@pytest.mark.parametrize(
    ("sample", "old", "new"),
    [
        # The own part: of another tile, from memory that nobody writes, of the product before it is rounded.
        (SAMPLE, "n.own] (%c.own)", "n.own]"),
        (SAMPLE, "n.own] (%c.own)", "n.own] {own = @C.partial[%m.own, %n.own]}"),
        (SAMPLE, "cast (%acc.3.own)", "cast (%acc.own)"),
        # Another place of the sum, of the result, of an operand.
        (SAMPLE, "@C.parts[:, %m.own at m.own.start % 16", "@C.parts[:, %m.own at 0"),
        (
            SAMPLE,
            "store @C[%m.own at m.own.start % 16",
            "store @C[%m.own at (m.own.start + 8) % 16",
        ),
        (SAMPLE, "load @A[%m.own, %k.own]", "load @A[%m.own at (m.own.start + 8) % M, %k.own]"),
        # A wait for others too few, or for another channel's flag.
        (SAMPLE, "wait @C.ready[0..RANK", "wait @C.ready[1..RANK"),
        (SAMPLE, "wait @C.ready[RANK + 1..WORLD", "wait @C.ready[RANK + 2..WORLD"),
        # The two stages together: a slice twice, one missing, the own one computed where it is stored.
        (SAMPLE, "segments = 2", "segments = 3"),
        (SAMPLE, "segments = 2", "segments = 1"),
        (SAMPLE, "visit = (RANK + 1 + i) % WORLD", "visit = (RANK + i) % WORLD"),
        (SAMPLE, "visit = RANK}", "visit = (RANK + 1) % WORLD}"),
        (ADD, "visit = RANK}", "visit = (RANK + 1) % WORLD}"),
        (ADD, "cast (%p.1)", "cast (%p.own)"),
    ],
)
def test_a_mistake_is_refused(sample: Sample, old: str, new: str) -> None:
    head, body = text_of(sample).split("\n", 1)
    assert old in body
    verify(parse_ir(f"{head}\n{body}"))
    with pytest.raises(VerifyError):
        verify(parse_ir(f"{head}\n{body.replace(old, new, 1)}"))


def test_what_follows_the_sum_is_the_next_loop_of_the_kernel() -> None:
    op = gemm_rs_add.build(
        {"M": 48, "K": 8, "N": 16}, {}, 3, present=["A", "B", "C", "bias", "residual"]
    )
    moves = (("P", Move("epilogue", sum="epilogue")),)
    text = print_ir(run_passes(op, Schedule(tiles=(("M", 8), ("N", 8)), workers=3, moves=moves)))
    head, body = text.split("\n", 1)
    verify(parse_ir(text))
    for old, new in (
        ("load @bias[%n.own]", "load @bias[%n.own at (n.own.start + 8) % N]"),
        ("load @residual[%m.own at m.own.start % 16", "load @residual[%m.own at 0"),
        ("add (%out.1", "sub (%out.1"),
    ):
        assert old in body
        with pytest.raises(VerifyError):
            verify(parse_ir(f"{head}\n{body.replace(old, new)}"))


def test_an_own_part_of_another_type_is_no_ir() -> None:
    text = text_of(replace(SAMPLE, workers=3))
    for old, new, said in (
        ("(%c.own) : bf16", "(%acc.3.own) : bf16", "rounded"),
        (
            "(%c.own) : bf16",
            "(%c.own) {own = @C.partial[%m.own, %n.own]} : bf16",
            "operand and `own`",
        ),
        ("first = 2", "first = true", "expression"),
    ):
        assert old in text, old
        with pytest.raises(IRTypeError) as caught:
            check_types(parse_ir(text.replace(old, new)))
        assert said in str(caught.value)


@pytest.mark.parametrize("resource", ["copy_engine", "sm:4", "epilogue"])
@pytest.mark.parametrize("world", [4, 8])
def test_large_tiles_do_not_spill(resource: str, world: int) -> None:
    op = gemm_rs.build({"M": 1024, "K": 3584, "N": 8192}, {}, world)
    schedule = Schedule(
        tiles=(("K", 64), ("M", 128), ("N", 256)),
        stages=4,
        moves=(("C", Move(resource, sum="epilogue")),),
    )
    program = run_passes(op, schedule)
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == []
    # What is added comes in vectors, and the main loop in front of it is pipelined.
    assert "LDG.E.EF.128" in kernel.stages["sass"] or "LDG.E.128" in kernel.stages["sass"]


@pytest.mark.parametrize("resource", ["copy_engine", "epilogue"])
def test_no_part_of_a_short_tile_begins_behind_the_last_column(resource: str) -> None:
    present = [*gemm_rs_add.signature.tensors]
    op = gemm_rs_add.build({"M": 96, "N": 144, "K": 48}, world=4, dtype="fp32", present=present)
    schedule = Schedule(
        tiles=(("K", 32), ("M", 64), ("N", 64)),
        warps=2,
        moves=(("P", Move(resource, sum="epilogue")),),
    )
    program = compile_kernel(op, schedule)
    # The residual could be loaded by TMA, were all of its blocks inside.
    loads = [o for o in own_stage(program).walk() if o.name == "load" and o.symbol == "residual"]
    assert [o.get("via") for o in loads] == ["tma"]
    text = emit(program)
    assert "n_own_part" in text
    validate(read_module(Source("emitted.py", text)), program)


def test_the_lint_sees_a_part_that_is_read_above_its_wait() -> None:
    op = gemm_rs.build({"M": 512, "K": 128, "N": 256}, {}, 4)
    moves = (("C", Move("epilogue", sum="epilogue")),)
    program = run_passes(op, Schedule(tiles=(("M", 64), ("N", 128)), moves=moves))
    (kernel,) = compile_offline(emit(program), program)
    assert kernel.given and lint(kernel) == []
    assert any("above the wait" in p for p in lint(replace(kernel, given=())))


def test_a_gather_of_the_same_nest_shares_the_queue_of_the_own_tiles() -> None:
    kernel = load_kernels(ROOT / "tests" / "kernels" / "maps.py")["ag_gemm_rs"]
    op = kernel.build({"M": 32, "K": 8, "N": 16}, {}, 2)
    moves = (("A", Move("sm:1")), ("C", Move("sm:1", sum="epilogue")))
    program = run_passes(op, Schedule(tiles=(("M", 8), ("N", 8)), workers=3, moves=moves))
    verify(program, op)
    assert own_stage(program)["queue"] == "dynamic"
    queues = [op.symbol for op in program.find("counter") if op.symbol.endswith(".queue")]
    assert queues == sorted(set(queues))
    # No own tile meets the condition of the gather's wait: it has no number, and all others have theirs.
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    wrong = text.replace(", taken, 1, True", ", taken, 3, True")
    assert wrong != text
    with pytest.raises(EmittedError, match="waits are numbered"):
        validate(read_module(Source("emitted.py", wrong)), program)
