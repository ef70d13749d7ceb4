"""Workers that copy beside products whose warps have roles: drawn by loaders, stored by groups in turns."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.test_shots import whole_numbers
from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import DeadlockError, RaceError, predict, run, timeline
from tilelink.backend.simulate.attack import attack
from tilelink.backend.simulate.errors import RunError
from tilelink.backend.simulate.explore import explore
from tilelink.backend.simulate.faults import Drop, Limits
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.hostility import MODES
from tilelink.backend.simulate.scheduler import Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.backend.verify import VerifyError, verify
from tilelink.backend.verify.errors import UndecidedError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.schedules import Move, Schedule, ScheduleError
from tilelink.schedules.machine import Machine

TENSOR = {"ag_gemm": "A", "gemm_rs": "C", "gemm_rs_add": "P"}
SCATTER = "gemm_rs"


def schedule(
    kernel: str = SCATTER,
    workers: int = 5,
    sm: int = 2,
    tile: tuple[int, int] = (64, 64),
    stages: int = 3,
    **move: Any,
) -> Schedule:
    """Tiles of 64 rows and a step of 64, copied by ``sm`` of the workers."""
    folded = {} if kernel == "ag_gemm" else {"sum": "epilogue"}
    made = Move(**{"resource": f"sm:{sm}", "copies": "boxes", **folded, **move})
    tiles = (("K", 64), ("M", tile[0]), ("N", tile[1]))
    moves = ((TENSOR[kernel], made),)
    return Schedule(tiles=tiles, workers=workers, stages=stages, emitter="gluon", moves=moves)


@cache
def fused(kernel: str = SCATTER, world: int = 2, m: int = 256, sm: int = 2, **move: Any) -> Op:
    """The proven program of ``m`` rows, and of one tile along the other extents."""
    op = getattr(kernels, kernel).build({"M": m, "K": 64, "N": 64}, world=world)
    return compile_kernel(op, schedule(kernel, sm=sm, **move))


def inputs_of(program: Op, kernel: str = SCATTER, calls: int = 2) -> list[list[dict[str, Any]]]:
    """Whole numbers for every call and rank."""
    world, m = int(program["world"]), int(program.declared("M")["value"])
    rows = m // world if kernel == "ag_gemm" else m
    found = []
    for _ in range(calls):
        a, b = whole_numbers(world, rows, 64, 64)
        found.append([{"A": left, "B": right} for left, right in zip(a, b, strict=True)])
    return found


def edited(program: Op, *changes: tuple[str, str]) -> Op:
    """The program with its text changed, each pattern at one place or more."""
    text = print_ir(program)
    for old, new in changes:
        text, count = re.subn(old, new, text)
        assert count, old
    return parse_ir(text)


@given(data=st.data())
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
def test_what_is_copied_beside_products_gives_the_bits_of_the_reference(
    data: st.DataObject,
) -> None:
    world = data.draw(st.sampled_from((2, 4)))
    kernel = data.draw(st.sampled_from(("ag_gemm", "gemm_rs")))
    sm = data.draw(st.integers(1, 3))
    chosen = schedule(
        kernel,
        workers=sm + data.draw(st.integers(1, 4)),
        sm=sm,
        tile=(64, data.draw(st.sampled_from((64, 128)))),
        channels=data.draw(st.sampled_from((None, 1, 2, 3))),
    )
    m, n = 64 * world * data.draw(st.integers(1, 4)), 64 * data.draw(st.integers(1, 4))
    # Boxes of what is gathered are of whole steps of the depth.
    k = 128 if kernel == "ag_gemm" else 96
    a, b = whole_numbers(world, m // world if kernel == "ag_gemm" else m, k, n)
    one = getattr(kernels, kernel)
    got = one.on("simulate", world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, one.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("kernel", ["ag_gemm", "gemm_rs"])
@pytest.mark.parametrize("world", [2, 4])
def test_no_hostile_schedule_finds_anything(kernel: str, world: int) -> None:
    op = getattr(kernels, kernel).build({"M": 128 * world, "K": 64, "N": 64}, world=world)
    program = fused(kernel, world, 128 * world)
    calls = inputs_of(program, kernel)
    right = [reference.run(op, given) for given in calls]
    assert attack(program, calls, right, 3 * MODES, 0) is None


def drawn_by(program: Op, seed: int) -> list[list[list[int]]]:
    """The positions that the loader of each worker that copies has drawn, by rank, in a run."""
    scheduler = Scheduler(Traces(Geometry(program)), inputs_of(program, calls=1), seed)
    scheduler.run()
    launch = program.find("launch")[0].symbol
    return [
        [next(iter(h.drawn.values())) for h in call.handed[launch] if h.drawn]
        for call in scheduler.calls
    ]


def test_each_position_is_drawn_once_by_whoever_comes_first() -> None:
    program = fused(world=2, m=512)
    count, shares = 4, set()
    for seed in range(4 * MODES):
        for loaders in drawn_by(program, seed):
            # Behind the last task each of the two draws once more.
            assert sorted(q for some in loaders for q in some) == list(range(count + 2))
            assert all(some == sorted(some) and some[-1] >= count for some in loaders)
            shares.add(tuple(len(some) - 1 for some in loaders))
    assert {(count, 0), (0, count)} & shares and (count // 2, count // 2) in shares


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        (r" +wait @C\.done.*\n", RaceError),
        (r" +wait @C\.ready.*\n", RaceError),
        (r"(notify @C\.ready.*)drain = true, ", RaceError),
        (r" +notify @C\.done.*\n", DeadlockError),
        (r" +notify @C\.ready.*\n", DeadlockError),
    ],
)
def test_each_signal_is_needed(pattern: str, error: type[RunError]) -> None:
    program = fused()
    broken = edited(program, (pattern, r"\1" if "(" in pattern else ""))
    with pytest.raises(VerifyError):
        verify(broken)
    with pytest.raises(error):
        for seed in range(2 * MODES):
            run(broken, inputs_of(broken)[0], seed=seed, calls=2)
    assert explore(broken, 1, limit=100_000).bad is not None


def test_a_deadlock_says_what_the_loader_that_a_group_follows_waits_for() -> None:
    broken = edited(fused(), (r" +notify @C\.done.*\n", ""))
    with pytest.raises(DeadlockError) as error:
        run(broken, inputs_of(broken)[0])
    assert "C.done" in str(error.value) and "@C.push" in str(error.value)


def test_groups_of_one_worker_say_nothing_about_each_others_stores() -> None:
    """One worker copies both tiles of a channel; the second one's signal does not cover the first one's stores."""
    program = fused(sm=1, channels=1)
    notify = r"(notify @C\.ready\[.*?\] \{)count = 2, (drain = true, )(.*?), through = .*?\]\}"
    second = "if = C.t.start % 128 != 0, "
    broken = edited(program, (notify, rf"\1\2{second}\3}}"))
    with pytest.raises(VerifyError):
        verify(broken)
    with pytest.raises(RaceError):
        for seed in range(2 * MODES):
            run(broken, inputs_of(broken)[0], seed=seed, calls=2)
    bad = explore(broken, 1).bad
    assert bad is not None and bad.kind in ("race", "version")


def test_a_loader_is_ahead_of_the_groups_of_its_worker() -> None:
    """What a task stores, the next task of the same worker loads: nothing but a wait would order the two."""
    program = fused(sm=1, channels=1)
    load = r"(%C\.box = load @C\.partial\[%C\.t at ).*?(, %C\.c\])"
    # The first task stores into what the second one loads, of this rank.
    store = r"store @C\.parts\[RANK, (%C\.t, %C\.c\] \(%C\.box\) )\{peer = .*?, "
    own = "store @C.partial[%C.t at RANK * 128 + 64, %C.c] (%C.box) {peer = RANK, "
    broken = edited(program, (load, r"\1RANK * 128 + C.t.start\2"), (store, own))
    with pytest.raises(RaceError):
        for seed in range(2 * MODES):
            run(broken, inputs_of(broken)[0], seed=seed)


@pytest.mark.parametrize("number", range(4))
def test_a_lost_signal_ends_every_role(number: int) -> None:
    """The first four notifies of a rank are those of two tiles, of the product and of their copies."""
    program = fused()
    with pytest.raises(RunError, match=r"C\.(done|ready)"):
        faults = (Drop(rank=1, number=number),)
        run(program, inputs_of(program)[0], faults=faults, limits=Limits(progress=1.0))


FORMS = [
    (r"workers = \[2, 5\]", "workers = [1, 5]", "copy and multiply"),
    (r'queue = "dynamic", ', "", "queue of its own"),
    (r'queue = "dynamic", (.*?), workers = \[0, 2\]', r'queue = "dynamic", \1', "all workers"),
    (r"stages = \d+", "stages = 2", "ring of 2 slots"),
    (r'landing = \d+, roles = "turns"', 'roles = "halves"', "take turns"),
    (r"( +)(%C\.box = load)", r"\1notify @C.done[0, 0]\n\1\2", "in front of what is copied"),
    (r"( +)(notify @C\.ready)", r"\1wait @C.done[0, 0]\n\1\2", "behind its load"),
    (r"drain = true, (peer)", r"delay = 1, drain = true, \1", "behind its load"),
]


@pytest.mark.parametrize(("old", "new", "says"), FORMS)
def test_form_of_workers_that_copy_beside_roles(old: str, new: str, says: str) -> None:
    with pytest.raises(UndecidedError, match=says):
        verify(edited(fused(), (old, new)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tile": (128, 256)}, "halves of each tile"),
        ({"copies": "rows"}, "workers that copy beside those that multiply"),
        ({"sum": "stage"}, "workers that copy beside those that multiply"),
        ({"slots": 2}, "emitter"),
    ],
)
def test_what_cannot_be_copied_beside_roles_is_refused_by_name(
    change: dict[str, Any], says: str
) -> None:
    op = kernels.gemm_rs.build({"M": 1024, "K": 128, "N": 512}, world=2)
    with pytest.raises(ScheduleError, match=says):
        run_passes(op, schedule(**change))


def test_slices_that_are_no_whole_tiles_are_not_copied_beside_roles() -> None:
    op = kernels.gemm_rs.build({"M": 192, "K": 128, "N": 512}, world=2)
    with pytest.raises(ScheduleError, match="no slots of the ring"):
        run_passes(op, schedule(tile=(64, 128)))


def test_what_is_gathered_for_halves_of_tiles_is_copied_in_front() -> None:
    op = kernels.ag_gemm.build({"M": 1024, "K": 128, "N": 512}, world=2)
    program = compile_kernel(op, schedule("ag_gemm", tile=(128, 256)))
    assert [launch.get("roles") for launch in program.find("launch")] == [None, "halves"]
    program = compile_kernel(op, schedule("ag_gemm", tile=(128, 128)))
    (launch,) = program.find("launch")
    assert [(s.symbol, s.get("workers")) for s in launch.find("stage")] == [
        ("A.push", (0, 2)),
        ("C.gemm", (2, 5)),
    ]


def test_exploration_follows_two_loaders_that_draw() -> None:
    """With and without persistent sets; of the groups that have no task each ends all the same."""
    for kernel in ("ag_gemm", "gemm_rs"):
        program = fused(kernel, m=128)
        for reduce in (True, False):
            found = explore(program, 1, limit=50_000, reduce=reduce)
            assert found.complete and found.bad is None and found.states > 10


# The clock ------------------------------------------------------------------------------------

H200 = Machine.load("h200x4")
# Short runs on four H100, whose links are those of H200: K, workers that copy, channels, and microseconds.
MEASURED = [
    (1376, 12, 8, 199.0),
    (1376, 16, 8, 195.0),
    (1376, 20, 8, 200.0),
    (1376, 24, 8, 204.0),
    (1376, 16, 4, 201.0),
    (1792, 12, 8, 212.7),
    (1792, 16, 8, 212.6),
]


def large(depth: int, sm: int, channels: int) -> Op:
    op = kernels.gemm_rs.build({"M": 8192, "K": depth, "N": 4096}, world=4)
    chosen = schedule(workers=132, sm=sm, tile=(128, 128), stages=5, channels=channels)
    return run_passes(op, chosen)


@pytest.mark.parametrize("machine", ["h100x4", "h200x4"])
@pytest.mark.parametrize(("depth", "sm", "channels", "us"), MEASURED)
def test_the_clock_agrees_with_what_was_measured(
    machine: str, depth: int, sm: int, channels: int, us: float
) -> None:
    # The model's products alone come out some percent off.
    found = predict(large(depth, sm, channels), Machine.load(machine))
    assert found == pytest.approx(us, rel=0.08)


def test_few_workers_that_copy_hold_up_the_call_and_many_the_products() -> None:
    found = {sm: predict(large(1376, sm, 8), H200) for sm in (4, 8, 16, 48)}
    assert found[4] > 1.5 * found[8] > 1.5 * found[16] and found[48] > 1.1 * found[16]


def test_one_rank_stands_for_all_on_the_clock() -> None:
    program = large(1376, 16, 8)
    assert predict(program, H200) == pytest.approx(timeline(program, H200).makespan, rel=0.05)
