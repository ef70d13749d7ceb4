"""A reduce in two shots whose parts are added in the epilogue of the own tiles, which go from there to all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.assurance.grid import Sample
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.choose import GAIN
from tilelink.backend.simulate.attack import attack
from tilelink.backend.simulate.clock import predict
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import gemm_ar
from tilelink.schedules import Move, Schedule, default_schedule
from tilelink.schedules.machine import Machine

SAMPLE = Sample("gemm_ar", "C", "epilogue-folded", 3, 3, columns=3, shots=2)
ADD = replace(SAMPLE, kernel="gemm_ar_add", tensor="P")
# Columns are shared out: three of them, of which no rank has a whole number of rows.
ACROSS = replace(SAMPLE, tiles=2)
HELD = "device.delayed_counted_notify(ctx, pending, pending_peer, pending_through, 32)"
TOLD = "device.delayed_counted_all_notify(ctx, pending_2, pending_through_2, 32, 2)"
LARGE = (("K", 64), ("M", 128), ("N", 256))


def stages(program: Op) -> dict[str, Op]:
    """The stages of the only launch, by name."""
    (launch,) = program.find("launch")
    return {stage.symbol: stage for stage in launch.find("stage")}


def large(
    world: int, rows: int, resource: str, workers: int = 132, **fields: object
) -> tuple[Op, Op]:
    """Kernel and program of a product of (rows, 14336 / world) and (14336 / world, 8192)."""
    op = gemm_ar.build({"M": rows, "K": 14336 // world, "N": 8192}, {}, world)
    move = Move(resource, shots=2, **fields)  # type: ignore[arg-type]
    schedule = Schedule(tiles=LARGE, stages=4, workers=workers, moves=(("C", move),))
    return op, run_passes(op, schedule)


@pytest.mark.parametrize("resource", ["copy_engine", "sm:1", "epilogue"])
@pytest.mark.parametrize("sample", [SAMPLE, ADD, ACROSS], ids=["ar", "add", "columns"])
def test_the_own_tiles_are_summed_and_sent_where_they_are_made(
    sample: Sample, resource: str
) -> None:
    program = replace(sample, resource=f"{resource}-folded").program()
    verify(program, sample.op())
    name = sample.tensor
    found = stages(program)
    assert f"{name}.relay" not in found
    own = found[f"{name}.own"]
    names = [op.name for op in own.body]
    at = names.index("load_sum")
    assert names[at - 3 : at] == ["cast", "wait", "wait"]
    assert names[at + 1 :] == ["for_range", "for_range"]
    (store,), (notify,) = own.body[at + 1].body, own.body[at + 2].body
    assert store.symbol == f"{name}.all" and store.operands == own.body[at].results
    # Through TMA, so that the release drains; held back, unless the queue is drawn from.
    assert store.get("via") == "tma" and notify.get("drain") is True
    assert notify.get("delay") == (None if own.get("queue") == "dynamic" else 1)
    assert notify.symbol == f"{name}.summed"
    assert int(own.get("axis", 0)) == (1 if sample is ACROSS else 0)
    assert own["segments"] == 1 and str(own["visit"]) == "RANK"


def test_a_sum_in_an_epilogue_is_one_in_two_shots() -> None:
    op = gemm_ar.build({"M": 32, "K": 16, "N": 16}, {}, 2)
    program = run_passes(op, Schedule(moves=(("C", Move("epilogue", sum="epilogue")),)))
    assert program.declared("C")["shots"] == 2


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sample", [SAMPLE, ADD, ACROSS], ids=["ar", "add", "columns"])
def test_all_ranks_get_the_sum_under_hostile_schedules(sample: Sample, slots: int) -> None:
    sample = replace(sample, slots=slots, workers=3)
    program, trial = sample.program(), sample.trial()
    verify(program, sample.op())
    assert attack(program, trial.inputs, trial.expected, schedules=6) is None


@cache
def text_of(sample: Sample) -> str:
    return print_ir(sample.program())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The own part: from memory that nobody writes, of the product before it is rounded.
        ("n.own] (%c.own)", "n.own]"),
        ("cast (%acc.3.own)", "cast (%acc.own)"),
        # Another place of the parts, of the sum, of an operand.
        ("@C.parts[:, %m.own at m.own.start % 8", "@C.parts[:, %m.own at 8 * 0"),
        ("store @C.all[%m.own,", "store @C.all[%m.own at (m.own.start + 8) % M,"),
        ("load @A[%m.own, %k.own]", "load @A[%m.own at (m.own.start + 8) % M, %k.own]"),
        # The sum is for every rank.
        ("for_range {hi = WORLD, lo = 0} do (%C.d", "for_range {hi = WORLD - 1, lo = 0} do (%C.d"),
        ("peer = (RANK + 1 + C.d) % WORLD", "peer = RANK"),
        # What is not yet stored is announced, or to some ranks alone.
        ("{count = 3, delay = 1, drain = true, peer = C.p", "{count = 3, delay = 1, peer = C.p"),
        (
            "{count = 3, delay = 1, drain = true, peer = C.p",
            "{count = 2, delay = 1, drain = true, peer = C.p",
        ),
        # What is held back is lost.
        ("    flush {drain = true}\n    stage @C.sum", "    stage @C.sum"),
        # A wait for others too few.
        ("wait @C.ready[0..RANK", "wait @C.ready[1..RANK"),
        ("wait @C.ready[RANK + 1..WORLD", "wait @C.ready[RANK + 2..WORLD"),
        # The two stages together: a part twice, one missing, the own one on two ranks.
        ("segments = 2", "segments = 3"),
        ("segments = 2", "segments = 1"),
        ("visit = (RANK + 1 + i) % WORLD", "visit = (RANK + i) % WORLD"),
        ("segments = 1, tile = [8, 8], visit = RANK", "segments = 1, tile = [8, 8], visit = 0"),
    ],
)
def test_a_mistake_is_refused(old: str, new: str) -> None:
    head, body = text_of(SAMPLE).split("\n", 1)
    if "at 8 * 0" in new:
        # One tile a part: the place can only be wrong where there are more.
        head, body = text_of(replace(SAMPLE, tiles=6)).split("\n", 1)
        old = old.replace("% 8", "% 16")
    assert old in body, body
    verify(parse_ir(f"{head}\n{body}"))
    with pytest.raises(VerifyError):
        verify(parse_ir(f"{head}\n{body.replace(old, new, 1)}"))


@pytest.mark.parametrize("resource", ["copy_engine", "epilogue"])
@pytest.mark.parametrize("rows", [256, 1024, 4096])
@pytest.mark.parametrize("world", [2, 8])
def test_large_tiles_do_not_spill(resource: str, rows: int, world: int) -> None:
    _, program = large(world, rows, resource, sum="epilogue")
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == []


def test_the_text_of_large_tiles_is_read_back_and_held_to_its_peers() -> None:
    _, program = large(4, 1024, "epilogue", workers=40, sum="epilogue")
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    assert "n_own_part" in text and text.count("device.delayed_counted_all_notify(") == 2
    for old, new in (
        # Another peer's memory under the number of this one, a slice for a buffer, a part twice, a rank left out.
        ('"C.all", peer=1)', '"C.all", peer=2)'),
        ('call.buffer("C.all", peer=1)', 'call.buffer("C.all", peer=1)[rank]'),
        ("C_all_to.store([m_own_start, n_own_part_2]", "C_all_to.store([m_own_start, n_own_part]"),
        ("for C_d in range(0, 4)", "for C_d in range(1, 4)"),
        # What is held back past the first main loop is made once, by every worker, before it waits.
        ("        pending = tl.cast(-1, tl.int32)\n", ""),
        (f"\n        {HELD}\n        pending = tl.cast(-1, tl.int32)\n", "\n"),
        (f"\n        {TOLD}\n", "\n"),
        (f"\n    {TOLD}\n", "\n"),
        (f"\n    {TOLD}\n", "\n    device.delayed_all_notify(ctx, pending_2)\n"),
        (f"\n        {TOLD}\n", f"\n        {TOLD.replace('32, 2', '31, 2')}\n"),
        (f"\n        {TOLD}\n", f"\n        {TOLD.replace('32, 2', '32, 3')}\n"),
    ):
        assert old in text, old
        with pytest.raises(EmittedError):
            validate(read_module(Source("emitted.py", text.replace(old, new, 1))), program)
    # Workers that have no own tile make what they hold back all the same.
    _, program = large(4, 1024, "epilogue", sum="epilogue")
    text = emit(program)
    assert f"\n    {HELD}\n" in text
    with pytest.raises(EmittedError):
        validate(read_module(Source("e.py", text.replace(f"\n    {HELD}\n", "\n"))), program)


@pytest.mark.parametrize("rows", [1024, 4096])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_default_uses_it_where_the_model_prefers_it(world: int, rows: int) -> None:
    machine = Machine.load(f"h200x{world}")
    op, _ = large(world, rows, "epilogue")
    schedule = default_schedule(op)
    move = schedule.move("C")
    assert move.sum == ("stage" if (world, rows) == (8, 4096) else "epilogue")
    other = "epilogue" if move.sum == "stage" else "stage"
    apart = replace(schedule, moves=(("C", replace(move, sum=other)),))
    # Within what the model cannot tell apart, for which a plain call does not leave the default either.
    taken, left = (predict(run_passes(op, s), machine) for s in (schedule, apart))
    assert taken < (1 + GAIN) * left
    # By the library's collective there is nothing to sum.
    compile_kernel(op, schedule.with_resource("none"))


def test_roles_sum_in_the_epilogue_of_their_groups() -> None:
    op = gemm_ar.build({"M": 512, "K": 256, "N": 512}, {}, 2)
    move = Move("epilogue", shots=2, sum="epilogue")
    tiles = (("K", 64), ("M", 128), ("N", 128))
    program = compile_kernel(
        op, Schedule(tiles=tiles, emitter="gluon", stages=4, moves=(("C", move),))
    )
    assert [list(stages_of) for stages_of in _by_launch(program)] == [
        ["C.gemm", "C.own"],
        ["C.sum"],
    ]
    validate(read_module(Source("emitted.py", emit(program))), program)


def _by_launch(program: Op) -> list[list[str]]:
    return [[s.symbol for s in launch.find("stage")] for launch in program.find("launch")]
