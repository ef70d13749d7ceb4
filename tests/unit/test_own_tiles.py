"""Own tiles of a sum that is pushed, beside the others or between them: form, proof, text and runs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.assurance.grid import Sample
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.expand import stage_tiles
from tilelink.backend.mutate.judge import judge
from tilelink.backend.mutate.target import wrong_tasks
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import explore
from tilelink.backend.simulate.clock import predict, timeline
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import gemm_ar, gemm_ar_add, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError
from tilelink.schedules.machine import Machine
from tilelink.schedules.space import Space

OWNS = ("beside", "between")
# Rows, depth and columns by ranks, and workers: slices of two rows of tiles, whose channels are columns.
SMALL = {2: ((64, 32, 384), 3), 4: ((128, 32, 256), 6), 8: ((256, 32, 256), 8)}
NAMES = {
    "beside": ["C.gemm", "C.gemm.rest", "C.own", "C.own.rest"],
    "between": ["C.gemm", "C.own", "C.gemm.rest", "C.own.rest"],
}


def schedule(own: str, slots: int = 1, **fields: object) -> Schedule:
    """A schedule of small tiles."""
    move = Move("epilogue", sum="epilogue", shots=2, slots=slots, own=own)
    given: dict[str, object] = {"tiles": (("K", 16), ("M", 16), ("N", 16)), "order": "interleave"}
    return Schedule(moves=(("C", move),), **{**given, **fields})  # type: ignore[arg-type]


@cache
def small(own: str, world: int = 2, slots: int = 1) -> Op:
    """A proven program in which own tiles do not come last."""
    (m, k, n), workers = SMALL[world]
    op = gemm_ar.build({"M": m, "K": k, "N": n}, {}, world)
    return compile_kernel(op, schedule(own, slots, workers=workers))


def large(own: str, world: int, rows: int, tile: tuple[int, int], emitter: str) -> Op:
    """The product (rows, 3584) x (3584, 8192) of a rank."""
    op = gemm_ar.build({"M": rows, "K": 3584, "N": 8192}, {}, world)
    m, n = tile
    given = schedule(
        own, tiles=(("K", 64), ("M", m), ("N", n)), stages=4 if n == 256 else 5, emitter=emitter
    )
    return run_passes(op, given)


def stages(program: Op) -> list[Op]:
    return [stage for launch in program.find("launch") for stage in launch.find("stage")]


@pytest.mark.parametrize(
    ("own", "world", "slots"), [(own, w, 1) for own in OWNS for w in SMALL] + [("beside", 2, 2)]
)
def test_some_own_tiles_come_before_the_last_of_the_others(
    own: str, world: int, slots: int
) -> None:
    program = small(own, world, slots)
    (launch,) = program.find("launch")
    parts = stages(program)[:-1]
    assert [s.symbol for s in parts[:4]] == NAMES[own]
    assert (parts[0]["group"], program.declared("C")["channel_axis"]) == (2, 1)
    geometry = Geometry(program)
    seen: list[tuple[int, int]] = []
    complete: dict[tuple[int, int], int] = {}
    (rows, _, _), _ = SMALL[world]
    slice_ = rows // world
    reached = {True: 0, False: 0}
    for stage in parts:
        mine = "own" in stage.symbol
        lo, hi = stage["positions"]
        assert lo == reached[mine]
        reached[mine] = hi
        tiles = geometry.queue(stage, geometry.env(1))
        walked = stage_tiles(stage, geometry.env(1), 1)
        assert [t[0].start for t in tiles] == walked[stage.args[0].name].start.tolist()
        apart = own == "beside" and stage.symbol in ("C.gemm.rest", "C.own")
        assert ("workers" in dict(stage.attrs)) == apart
        for m, n in ((t[0].start, t[1].start) for t in tiles):
            seen.append((m, n))
            place = (m % slice_, n)
            if mine:
                # Were one worker to run all, this place of all other slices would be done.
                assert complete[place] == world - 1
            else:
                complete[place] = complete.get(place, 0) + 1
    assert len(seen) == len(set(seen)) == rows // 16 * (SMALL[world][0][2] // 16)
    assert 2 * parts[2 if own == "beside" else 1]["positions"][1] >= (
        reached[True] if own == "beside" else 0
    )
    copies = stages(program)[-1]
    assert (copies["queue"], copies["interleave"]) == ("dynamic", True)
    if own == "beside":
        few = parts[2]["workers"][1]
        assert parts[1]["workers"] == (few, launch["workers"])
    assert parse_ir(print_ir(program)) == program


def test_channels_are_rows_where_a_slice_has_many() -> None:
    op = gemm_ar.build({"M": 512, "K": 32, "N": 128}, {}, 2)
    program = compile_kernel(op, schedule("beside", workers=5))
    assert len(stages(program)) == 5 and program.declared("C").get("channel_axis") is None
    program = compile_kernel(op, replace(schedule("beside", workers=5), tiles=(("M", 64),)))
    assert program.declared("C")["channel_axis"] == 1


def test_so_few_tiles_come_last() -> None:
    op = gemm_ar.build({"M": 64, "K": 32, "N": 32}, {}, 2)
    assert len(stages(run_passes(op, schedule("beside", workers=132)))) == 3


def test_a_scatter_may_have_its_own_tiles_there_too() -> None:
    op = gemm_rs.build({"M": 128, "K": 32, "N": 256}, {}, 4)
    move = Move("epilogue", sum="epilogue", own="beside")
    given = replace(schedule("beside", workers=6), moves=(("C", move),))
    assert [s.symbol for s in stages(compile_kernel(op, given))] == NAMES["beside"]


MISTAKES = [
    (r" *wait @C\.ready[^\n]*\n", ""),
    (r" *wait @C\.summed[^\n]*\n", ""),
    (r"(notify @C\.ready[^}]*)count = \d+, ", r"\1count = 1, "),
    (r"(notify @C\.summed[^}]*)count = \d+, ", r"\1count = 1, "),
    (r"(notify @C\.ready\[[^\]]*\] \{)", r'\1order = "relaxed", '),
    (r"(wait @C\.ready\[[^,]*, n\.own\.start / 16)\]", r"\1 - 1]"),
    (r"(wait @C\.summed\[[^\]]* / 16)\]", r"\1 - 1]"),
    (r" *wait @ack[^\n]*\n", ""),
    (r" *flush[^\n]*\n", ""),
    (r"(stage @C\.own \{[^\n]*positions = \[)0, ", r"\g<1>1, "),
    (r"(stage @C\.gemm\.rest \{[^\n]*positions = \[\d+, )(\d+)", lambda m: m[1] + str(int(m[2]) - 1)),
    (r"(stage @C\.own\.rest [^\n]*visit = )RANK", r"\1(RANK + 1) % WORLD"),
    (r"(store @C\.all\[%m\.own\.rest, %n\.own\.rest)\]", r"\1 at (n.own.rest.start + 16) % 384]"),
]  # fmt: skip


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize(("old", "new"), MISTAKES)
def test_a_mistake_is_refused(own: str, old: str, new: str) -> None:
    text = print_ir(small(own))
    changed, count = re.subn(old, new, text)
    assert count and changed != text
    with pytest.raises(VerifyError):
        verify(parse_ir(changed))


@pytest.mark.parametrize("own", OWNS)
def test_own_tiles_in_front_of_what_they_add_are_refused(own: str) -> None:
    """One worker that runs all stages in order would wait for itself by way of the other ranks."""
    program = small(own)
    (launch,) = program.find("launch")
    ops = list(launch.body)
    names = [op.symbol if op.name == "stage" else "" for op in ops]
    at, before = names.index("C.own.rest"), names.index("C.gemm.rest")
    ops.insert(before, ops.pop(at))
    turned = launch.with_ops(tuple(ops))
    body = tuple(turned if op is launch else op for op in program.body)
    with pytest.raises(VerifyError, match="circle"):
        verify(program.with_ops(body))


@pytest.mark.parametrize("own", OWNS)
def test_both_oracles_see_tasks_of_another_part(own: str) -> None:
    sample = Sample(
        "gemm_ar", "C", "epilogue-folded", 2, 4, columns=8, workers=3, shots=2,
        order="interleave", own=own,
    )  # fmt: skip
    program, trial = sample.program(), sample.trial()
    assert len(stages(program)) >= 5
    found = list(wrong_tasks(program))
    assert len(found) >= 10
    for mutant in found[::3]:
        verdict = judge(mutant, trial)
        assert not verdict.survivors, (mutant, verdict)


@pytest.mark.parametrize("own", OWNS)
def test_every_interleaving_of_a_small_instance_is_right(own: str) -> None:
    op = gemm_ar.build({"M": 32, "K": 16, "N": 64}, {}, 2)
    program = compile_kernel(op, schedule(own, workers=3 if own == "beside" else 2))
    assert len(stages(program)) >= 5
    found = explore.explore(program, calls=1)
    assert found.bad is None and found.complete, found.bad
    silent = re.sub(r" *wait @C\.ready[^\n]*\n", "", print_ir(program))
    assert explore.explore(parse_ir(silent), calls=1).bad is not None


def inputs(shape: tuple[int, int, int], world: int, call: int) -> tuple[list[torch.Tensor], ...]:
    """Whole numbers, whose products and sums are exact."""
    drawn = torch.Generator().manual_seed(call)
    m, k, n = shape

    def some(*size: int) -> list[torch.Tensor]:
        parts = [torch.randint(-2, 3, size, generator=drawn) for _ in range(world)]
        return [part.to(torch.bfloat16) for part in parts]

    return some(m, k), some(k, n)


@pytest.mark.parametrize(
    ("backend", "own", "world", "slots"),
    [("simulate", own, world, 1) for own in OWNS for world in SMALL]
    + [
        ("simulate", "between", 2, 2),
        ("interpret", "beside", 2, 2),
        ("interpret", "between", 2, 1),
    ],
)
def test_runs_are_exact(backend: str, own: str, world: int, slots: int) -> None:
    shape, workers = SMALL[world]
    run = gemm_ar.on(backend, world=world, schedule=schedule(own, slots, workers=workers))
    for call in range(1 + slots):
        a, b = inputs(shape, world, call)
        whole = torch.stack([x.float() @ y.float() for x, y in zip(a, b, strict=True)]).sum(0)
        assert whole.abs().max() <= 256  # whole numbers of bf16
        for found in run(a, b):
            assert torch.equal(found.float(), whole)


def test_what_is_added_behind_the_sum_follows_the_columns() -> None:
    (m, k, n), workers = SMALL[2]
    move = dict(schedule("between").moves)["C"]
    given = replace(schedule("between", workers=workers), moves=(("P", move),))
    present = ["A", "B", "residual"]
    program = compile_kernel(gemm_ar_add.build({"M": m, "K": k, "N": n}, {}, 2, present), given)
    assert [s.symbol for s in stages(program)][:4] == [
        x.replace("C", "P") for x in NAMES["between"]
    ]
    assert stages(program)[-1]["interleave"] is True


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("slots", [1, 2])
def test_the_emitted_text_is_the_program(own: str, slots: int) -> None:
    program = small(own, 2, slots)
    validate(read_module(Source("emitted.py", emit(program))), program)


TEXTS = [
    ("beside", r"tl\.program_id\(0\) >= 2:", "tl.program_id(0) >= 1:"),
    ("beside", r"(tl\.range\(tl\.program_id\(0\), \d+, )2,", r"\g<1>1,"),
    ("beside", r"(m_rest_place = q \+ )\d+", r"\g<1>1"),
    ("between", r"m_own_rest_place = q \+ \d+", "m_own_rest_place = q"),
    ("between", r"(ctx, \d+ \+ n_own_start // )16(, 24, 0, rank)", r"\g<1>32\2"),
    ("beside", r"(pending_\d = \d+ \+ rank \* 24 \+ n_own_start // )16", r"\g<1>32"),
    ("between", r"(C_all_to\.store\(\[m_own_rest_start, n_own_rest_start)", r"\1 * 0"),
    ("beside", r"(\d+ \+ m_C_0_start // 32 \* 24 \+ n_C_1_start // )16", r"\g<1>32"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "old", "new"), TEXTS)
def test_a_text_that_does_otherwise_is_refused(own: str, old: str, new: str) -> None:
    program = small(own)
    text = emit(program)
    wrong = re.sub(old, new, text)
    assert wrong != text
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", wrong)), program)


@pytest.mark.parametrize("columns", [128, 256])
def test_the_text_with_roles_is_the_program(columns: int) -> None:
    op = gemm_ar.build({"M": 1024, "K": 128, "N": 32 * columns}, {}, 4)
    tiles = (("K", 64), ("M", 128), ("N", columns))
    program = compile_kernel(op, schedule("beside", tiles=tiles, emitter="gluon", workers=8))
    assert [s.symbol for s in stages(program)][:4] == NAMES["beside"]
    validate(read_module(Source("emitted.py", emit(program))), program)


@pytest.mark.parametrize(
    ("own", "world", "rows", "tile", "emitter"),
    [
        ("beside", 4, 4096, (128, 256), "triton"),
        ("between", 4, 1024, (128, 256), "triton"),
        ("beside", 4, 4096, (128, 128), "gluon"),
        ("beside", 8, 4096, (128, 256), "gluon"),
    ],
)
def test_large_tiles_do_not_spill(
    own: str, world: int, rows: int, tile: tuple[int, int], emitter: str
) -> None:
    program = large(own, world, rows, tile, emitter)
    assert len(stages(program)) >= 5
    (kernel, *_) = compile_offline(emit(program), program)
    assert lint(kernel) == []


@pytest.mark.parametrize(
    ("own", "world", "rows", "tile", "emitter"),
    [
        ("between", 4, 1024, (128, 256), "triton"),
        ("between", 8, 1024, (128, 256), "triton"),
        ("beside", 8, 4096, (128, 256), "triton"),
    ],
)
def test_the_clock_sees_what_leaves_early(
    own: str, world: int, rows: int, tile: tuple[int, int], emitter: str
) -> None:
    machine = Machine.load(f"h200x{world}")
    last = predict(large("last", world, rows, tile, emitter), machine)
    assert predict(large(own, world, rows, tile, emitter), machine) < 0.97 * last


def test_sums_are_sent_while_others_are_computed() -> None:
    machine = Machine.load("h200x8")

    def first(own: str) -> tuple[float, float]:
        """When the first sum leaves, and when the last tile of another slice is done."""
        tracks = timeline(large(own, 8, 4096, (128, 128), "gluon"), machine).tracks
        found = [s for t in tracks if t.rank == 0 for s in t.segments]
        sent = min(s.start for s in found if s.label.startswith("C.all to"))
        return sent, max(s.end for s in found if s.label.startswith("@C.gemm"))

    sent, others = first("beside")
    assert sent < 0.4 * others
    sent, others = first("last")
    assert sent > others - 5


def test_schedules_keep_it_and_refuse_what_does_not_go_with_it() -> None:
    found = schedule("between")
    assert Schedule.from_json(found.to_json()) == found
    assert "own" not in str(schedule("last").to_sparse())
    assert found.with_resource("copy_engine").move("C").own == "last"
    assert found.with_resource("epilogue").move("C").own == "between"
    with pytest.raises(ScheduleError, match="the order is `auto`"):
        schedule("beside", order="auto")
    with pytest.raises(ScheduleError, match="no registers"):
        schedule("between", emitter="gluon")


def test_the_space_has_it_where_there_are_many_tiles() -> None:
    def owns(kernel: object, rows: int) -> set[tuple[str, str, str]]:
        op = kernel.build({"M": rows, "K": 3584, "N": 8192}, {}, 4)  # type: ignore[attr-defined]
        space = Space(op, Machine.load("h200x4"))
        computations = {c.emitter: c for c in space.computations()}
        return {
            (s.emitter, m.own, s.order)
            for c in computations.values()
            for s in space.moves(c)
            for _, m in s.moves
            if m.own != "last"
        }

    wanted = {("triton", o, "interleave") for o in OWNS} | {("gluon", "beside", "interleave")}
    assert {o for o in owns(gemm_ar, 1024) if o[0] != "library"} == wanted
    assert owns(gemm_ar, 256) == set() and owns(gemm_rs, 1024) == set()


def test_loads_are_even() -> None:
    """No worker of a large product has a tile more than another, weighed by what own ones cost."""
    program = large("beside", 8, 4096, (128, 128), "gluon")
    geometry = Geometry(program)
    launch = program.find("launch")[0]
    load = np.zeros(launch["workers"])
    for stage in stages(program)[:4]:
        lo, hi = geometry.worker_range(launch, stage)
        queue = len(geometry.queue(stage, geometry.env(0)))
        for worker in range(lo, hi):
            turn = geometry.first_position(stage, worker, lo, hi)
            cost = 1 + 700 * 7 / 3584 if "own" in stage.symbol else 1
            load[worker] += cost * len(range(turn, queue, hi - lo))
    assert load.max() < 1.15 * load.mean()
