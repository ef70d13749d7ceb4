"""Parts of a scatter that are read where they were made: the form, the proof, the emitted text, the runs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.expand import stage_tiles
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import explore
from tilelink.backend.simulate.clock import predict, timeline
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.check_tables import IRTypeError
from tilelink.kernels import gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError
from tilelink.schedules.machine import Machine

SMALL = (("K", 16), ("M", 16), ("N", 16))
# Own tiles are computed beside the others': of 2 and of 4 ranks.
SHARED = {2: ({"M": 320, "K": 16, "N": 16}, 3), 4: ({"M": 1536, "K": 16, "N": 16}, 8)}
ROLES = {"M": 1024, "K": 128, "N": 256}
# With roles, so many places that own tiles can follow the others.
ROLES_SHARED = {"M": 8192, "K": 128, "N": 256}


def schedule(sum: str = "epilogue", slots: int = 1, **fields: object) -> Schedule:
    move = Move("epilogue", sum=sum, slots=slots, direction="pull")
    given: dict[str, object] = {"tiles": SMALL, "workers": 4, **fields}
    return Schedule(moves=(("C", move),), **given)  # type: ignore[arg-type]


@cache
def pulled(sum: str = "epilogue", slots: int = 1, world: int = 2) -> Op:
    op = gemm_rs.build({"M": 64 * world, "K": 32, "N": 32}, {}, world)
    return compile_kernel(op, schedule(sum, slots))


@cache
def shared(world: int, slots: int = 1) -> Op:
    extents, workers = SHARED[world]
    given = schedule(slots=slots, order="interleave", workers=workers)
    return compile_kernel(gemm_rs.build(extents, {}, world), given)


@cache
def with_roles(world: int = 4, shares: bool = False, columns: int = 128) -> Op:
    given = schedule(
        tiles=(("K", 64), ("M", 128), ("N", columns)),
        emitter="gluon",
        order="interleave",
        workers=8,
    )
    shape = ROLES_SHARED if shares else ROLES
    return compile_kernel(gemm_rs.build(shape, {}, world), given)


def stages(program: Op) -> list[Op]:
    (launch,) = program.find("launch")
    return list(launch.find("stage"))


@pytest.mark.parametrize("sum", ["stage", "epilogue"])
def test_nothing_is_stored_to_a_peer_and_nothing_lands(sum: str) -> None:
    program = pulled(sum)
    assert not any(op.get("peer") is not None for op in program.walk() if op.name == "store")
    assert {op.symbol for op in program.find("buffer")} == {"C.partial"}
    assert program.declared("C.partial")["space"] == "symmetric"
    (total,) = [op for op in program.walk() if op.name == "load_sum"]
    assert total.get("remote") is True and bool(total.operands) == (sum == "epilogue")
    (told,) = [op for op in program.walk() if op.name == "notify" and op.symbol == "C.ready"]
    assert str(told["peer"]) == "m.start / 64"
    assert parse_ir(print_ir(program)) == program


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sum", ["stage", "epilogue"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r" *wait @C\.ready[^\n]*\n", ""),
        (r"notify @C\.ready[^\n]*\n", "\n"),
        (r"(notify @C\.ready[^}]*)drain = true, ", r"\1"),
        (r"(notify @C\.ready\[[^\]]*\] \{)", r'\1order = "relaxed", '),
        (r"(notify @C\.ready[^}]*peer = )[^,]*,", r"\1(m.start / 64 + 1) % WORLD,"),
        (r" *wait @ack[^\n]*\n", ""),
        (r" *notify @ack[^\n]*\n", ""),
        (r"\{remote = true\}", ""),
        (r"\{remote = true\}", "{own = @C.partial[:, :], remote = true}"),
        (r'(buffer @C\.partial \{[^}]*space = )"symmetric"', r'\1"local"'),
        (r"store @C\.partial\[%m,", "store @C.partial[%m at (m.start + 64) % 128,"),
        (r"load_sum @C\.partial\[%([\w.]+),", r"load_sum @C.partial[%\1 at (\1.start + 64) % 128,"),
    ],
)
def test_a_mistake_is_refused(sum: str, slots: int, old: str, new: str) -> None:
    text = print_ir(pulled(sum, slots))
    changed, count = re.subn(old, new, text)
    if slots == 2 and ("@ack" in old or "drain" in old):
        # With two slots nobody acknowledges, and nothing goes through TMA.
        assert "drain" in old or not count
        return
    assert count
    with pytest.raises((VerifyError, IRTypeError)):
        verify(parse_ir(changed))


def test_a_peer_that_still_reads_is_acknowledged_before_the_next_call_stores() -> None:
    """Without the wait of `head` the next call overwrites what another rank may still add."""
    text = re.sub(r" *wait @ack[^\n]*\n", "", print_ir(pulled("epilogue")))
    with pytest.raises(VerifyError, match=r"reads @C\.partial"):
        verify(parse_ir(text))


def test_own_memory_that_peers_read_is_written_behind_the_head() -> None:
    text = print_ir(pulled("epilogue"))
    loose = text.replace('launch @gemm_rs {after = ["head"], ', "launch @gemm_rs {")
    assert loose != text
    with pytest.raises(VerifyError):
        verify(parse_ir(loose))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sum", ["stage", "epilogue"])
def test_every_interleaving_of_a_small_instance_is_right(sum: str, slots: int) -> None:
    op = gemm_rs.build({"M": 32, "K": 16, "N": 16}, {}, 2)
    program = compile_kernel(op, schedule(sum, slots, workers=2))
    found = explore.explore(program, calls=2 + (slots == 2))
    assert found.bad is None and found.complete, found.bad
    silent = re.sub(r" *wait @C\.ready[^\n]*\n", "", print_ir(program))
    assert explore.explore(parse_ir(silent), calls=1).bad is not None


@pytest.mark.parametrize(("world", "slots"), [(2, 1), (4, 1), (2, 2)])
def test_own_tiles_are_computed_beside_the_others(world: int, slots: int) -> None:
    program = shared(world, slots)
    others, rest, own, last = stages(program)
    assert [s.symbol for s in (others, rest, own, last)] == [
        "C.gemm", "C.gemm.rest", "C.own", "C.own.rest",
    ]  # fmt: skip
    (launch,) = program.find("launch")
    few = own["workers"][1]
    assert rest["workers"] == (few, launch["workers"]) and own["workers"] == (0, few)
    assert others["positions"][1] == rest["positions"][0] and others["positions"][0] == 0
    assert own["positions"][1] == last["positions"][0] and own["positions"][0] == 0
    # At least half of them, and each behind all tiles of its place, were one worker to run all.
    assert 2 * own["positions"][1] >= last["positions"][1]
    geometry = Geometry(program)
    load = np.zeros(launch["workers"], dtype=int)
    seen: list[tuple[int, int]] = []
    for stage in stages(program):
        tiles = geometry.queue(stage, geometry.env(1))
        lo, hi = stage["positions"]
        assert len(tiles) == hi - lo
        walked = stage_tiles(stage, geometry.env(1), 1)
        assert [t[0].start for t in tiles] == walked[stage.args[0].name].start.tolist()
        seen += [(t[0].start, t[1].start) for t in tiles]
        first, last_ = geometry.worker_range(launch, stage)
        for worker in range(first, last_):
            turn = geometry.first_position(stage, worker, first, last_)
            load[worker] += len(range(turn, len(tiles), last_ - first))
    extents, _ = SHARED[world]
    assert len(seen) == len(set(seen)) == extents["M"] // 16
    # Own tiles take longer where a worker reads what it adds.
    assert load[:few].max() <= load[few:].max()


def test_few_places_leave_own_tiles_to_the_end() -> None:
    op = gemm_rs.build({"M": 128, "K": 32, "N": 32}, {}, 2)
    assert len(stages(run_passes(op, schedule(order="interleave")))) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"(stage @C\.own \{[^\n]*positions = \[)0, ", r"\g<1>1, ", "cover"),
        (r"positions = \[(\d+), 10\]", r"positions = [\1, 11]", "positions"),
        ("positions = [0, ", 'queue = "dynamic", positions = [0, ', "queue"),
        (r"positions = \[0, \d+\]", "positions = [3, 3]", "positions"),
    ],
)
def test_positions_that_are_no_part_of_a_queue_are_refused(old: str, new: str, said: str) -> None:
    text = print_ir(shared(2))
    changed = re.sub(old, new, text) if "\\" in old else text.replace(old, new)
    assert changed != text
    with pytest.raises(VerifyError, match=said):
        verify(parse_ir(changed))


def inputs(extents: dict[str, int], world: int, call: int) -> tuple[list[torch.Tensor], ...]:
    """Whole numbers, whose products and sums are exact."""
    drawn = torch.Generator().manual_seed(call)

    def some(*shape: int) -> list[torch.Tensor]:
        parts = [torch.randint(-2, 3, shape, generator=drawn) for _ in range(world)]
        return [part.to(torch.bfloat16) for part in parts]

    return some(extents["M"], extents["K"]), some(extents["K"], extents["N"])


@pytest.mark.parametrize("backend", ["simulate", "interpret"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("world", "sum", "order"),
    [(2, "stage", "auto"), (4, "epilogue", "auto"), (2, "epilogue", "interleave")],
)
def test_runs_are_exact(backend: str, slots: int, world: int, sum: str, order: str) -> None:
    extents, workers = {"M": 64 * world, "K": 32, "N": 32}, 3
    if order == "interleave":
        extents, workers = SHARED[world]
    run = gemm_rs.on(
        backend, world=world, schedule=schedule(sum, slots, order=order, workers=workers)
    )
    for call in range(1 + slots):
        a, b = inputs(extents, world, call)
        whole = torch.stack([x.float() @ y.float() for x, y in zip(a, b, strict=True)]).sum(0)
        for found, wanted in zip(run(a, b), whole.chunk(world), strict=True):
            assert torch.equal(found.float(), wanted)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sum", ["stage", "epilogue"])
def test_the_emitted_text_is_the_program(sum: str, slots: int) -> None:
    program = pulled(sum, slots)
    validate(read_module(Source("emitted.py", emit(program))), program)
    program = shared(2, slots)
    validate(read_module(Source("emitted.py", emit(program))), program)


TEXTS = [
    ("stage", r"remote_tile\(\s*peers, 1,", "remote_tile(peers, 0,"),
    ("stage", r"C_sum_at \+= token\n", "pass\n"),
    ("stage", r"C_sum_total \+= C_sum_part1\.to", "C_sum_total += C_sum_part0.to"),
    ("stage", r"(C_sum_at = tl\.cast\()(\w+)", r"\1\2 % 64"),
    ("epilogue", r"C_sum_at \+= token\n", "pass\n"),
    ("epilogue", r"(tile_sum_remote\([^)]*), rank, 2,", r"\1, 0, 2,"),
    ("epilogue", r"(tile_sum_remote\([^)]*), None, rank", r"\1, None, 1 - rank"),
    ("epilogue", r"(C_sum_at = tl\.cast\()(\w+)", r"\1\2 % 64"),
    ("epilogue", r"tile_sum_remote\(\s*c_own", "tile_sum_remote(acc_own"),
    ("epilogue", r"C_partial_16x16\.store\(\[m_start,", "C_partial_16x16.store([m_start % 64,"),
]  # fmt: skip


@pytest.mark.parametrize(("sum", "old", "new"), TEXTS)
def test_a_text_that_reads_otherwise_is_refused(sum: str, old: str, new: str) -> None:
    program = pulled(sum)
    text = emit(program)
    wrong = re.sub(old, new, text[text.index("@triton.jit") :])
    wrong = text[: text.index("@triton.jit")] + wrong
    assert wrong != text
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", wrong)), program)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("shares", [False, True])
def test_a_loader_fetches_parts_over_the_link(shares: bool, columns: int) -> None:
    program = with_roles(4, shares, columns)
    assert len(stages(program)) == (4 if shares else 2)
    text = emit(program)
    assert "roles.fetch_remote(" in text and "C_partial_128x64_at3" in text
    validate(read_module(Source("emitted.py", text)), program)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"C_partial_128x64_at0, C_partial_128x64_at1,", "C_partial_128x64_at1, C_partial_128x64_at0,"),
        (r"(fetch_remote\(\s*landing,\s*step,\s*\([^)]*\),\s*m_own_start) \+ token", r"\1"),
        (r"(fetch_remote\([^)]*\),\s*m_own_start \+ token,\s*n_own_part,\s*C_partial_landing,\s*)rank", r"\g<1>0"),
        (r"ctx\.epoch, q, 2, True", "ctx.epoch, q, 2, False"),
        (r'call\.buffer\("C\.partial", peer=2\)', 'call.buffer("C.partial", peer=3)'),
        (r"(sum_landed\([^)]*), rank, 4\)", r"\1, 0, 4)"),
    ],
)  # fmt: skip
def test_a_loader_that_reads_otherwise_is_refused(old: str, new: str) -> None:
    program = with_roles()
    text = emit(program)
    wrong = re.sub(old, new, text)
    assert wrong != text
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", wrong)), program)


@pytest.mark.parametrize(
    ("world", "columns", "stages_"), [(4, 128, 5), (4, 256, 4), (8, 128, 5), (2, 256, 4)]
)
def test_roles_that_fetch_parts_do_not_spill(world: int, columns: int, stages_: int) -> None:
    given = schedule(
        tiles=(("K", 64), ("M", 128), ("N", columns)),
        emitter="gluon",
        order="interleave",
        workers=132,
        stages=stages_,
    )
    program = compile_kernel(gemm_rs.build({"M": 8192, "K": 3584, "N": 8192}, {}, world), given)
    assert len(stages(program)) == 4
    compiled = compile_offline(emit(program), program)[0]
    assert lint(compiled) == []
    sass = compiled.stages["sass"]
    assert "HGMMA" in sass and "LDG.E.EF" not in sass and "UTMALDG" in sass


@pytest.mark.parametrize("sum", ["stage", "epilogue"])
def test_large_tiles_do_not_spill(sum: str) -> None:
    given = schedule(sum, tiles=(("K", 64), ("M", 128), ("N", 256)), workers=132, stages=4)
    program = run_passes(gemm_rs.build({"M": 1024, "K": 3584, "N": 8192}, {}, 4), given)
    (kernel,) = compile_offline(emit(program), program)
    assert lint(kernel) == []
    # What is added comes in vectors.
    assert re.search(r"LDG\.E(\.EF)?\.128", kernel.stages["sass"])


def test_the_clock_charges_reads_to_the_link() -> None:
    machine = Machine.load("h200x4")
    extents = {"M": 8192, "K": 3584, "N": 8192}

    def us(slow: float, order: str) -> float:
        given = schedule(
            tiles=(("K", 64), ("M", 128), ("N", 128)),
            emitter="gluon", stages=5, workers=132, order=order,
        )  # fmt: skip
        program = run_passes(gemm_rs.build(extents, {}, 4), given)
        return predict(program, replace(machine, read_gbps=machine.read_gbps / slow))

    # Three parts of 32 MiB: at a fifth of the rate the link is what the call waits for.
    assert us(5, "interleave") > 3 * (32 << 20) / (machine.read_gbps / 5 * 1e3)
    assert us(1, "interleave") < us(1, "auto") < us(5, "auto")


def test_all_ranks_run_as_one_on_the_clock() -> None:
    machine = Machine.load("h200x2")
    program = pulled("epilogue")
    assert timeline(program, machine).makespan == pytest.approx(predict(program, machine), rel=0.05)


def two_shots(sum: str, slots: int, order: str) -> Schedule:
    given = schedule(sum, slots, order=order, workers=6)
    return replace(given, moves=tuple((n, replace(m, shots=2)) for n, m in given.moves))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("world", "sum", "order"),
    [(4, "stage", "auto"), (2, "epilogue", "interleave"), (4, "epilogue", "auto")],
)
def test_the_first_of_two_shots_may_be_a_pull(world: int, sum: str, order: str, slots: int) -> None:
    extents = {"M": 256, "K": 32, "N": 32}
    given = two_shots(sum, slots, order)
    program = compile_kernel(gemm_ar.build(extents, {}, world), given)
    assert len(stages(program)) == (5 if order == "interleave" else 3)
    validate(read_module(Source("emitted.py", emit(program))), program)
    a, b = inputs(extents, world, 0)
    whole = torch.stack([x.float() @ y.float() for x, y in zip(a, b, strict=True)]).sum(0)
    for found in gemm_ar.on("simulate", world=world, schedule=given)(a, b):
        assert torch.equal(found.float(), whole)


def test_what_every_rank_would_read_is_refused() -> None:
    op = gemm_ar.build({"M": 64, "K": 32, "N": 32}, {}, 2)
    with pytest.raises(ScheduleError, match="one shot"):
        run_passes(op, schedule("stage"))


def test_a_schedule_keeps_its_direction() -> None:
    found = schedule()
    assert Schedule.from_json(found.to_json()) == found
    assert found.with_resource("copy_engine").move("C").direction == "push"
    assert found.with_resource("epilogue").move("C").direction == "pull"
    assert "direction" not in str(Schedule(moves=(("C", Move("epilogue")),)).to_sparse())
