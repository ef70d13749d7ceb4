"""A ring of their own for the parts of folded sums: the pass, its form, kernels, and who does what of a task."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from tests.roles import CASES, Case
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.land_sums import land_sums
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import predict, run
from tilelink.backend.simulate.explore import explore
from tilelink.backend.simulate.roles import loading_of, parts_of, shares_of
from tilelink.backend.validate import EmittedDiffers, read_module, validate
from tilelink.backend.verify import UndecidedError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernel import Kernel
from tilelink.kernels import gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule
from tilelink.schedules.machine import Machine
from tilelink.schedules.roles import LEAST_LANDING, SHARED_BYTES, landing_slots

TURNS = next(c for c in CASES if c.name == "ag_gemm" and c.tile == (128, 128, 5))
HALVES = next(c for c in CASES if c.sum == "epilogue" and c.tile[1] == 256)
# Bytes in which no further box of 128 x 64 elements would fit.
LEFT_OVER = 128 * 64 * 2
RING = next(c for c in CASES if c.sum == "epilogue" and c.tile == (128, 128, 6))
ADDED = next(c for c in CASES if c.name == "gemm_rs_add folded" and c.resource == "epilogue")
FIVE = next(c for c in CASES if c.name == "gemm_rs folded" and c.tile == (128, 128, 5))


def program(
    kernel: Kernel = gemm_rs,
    world: int = 4,
    tile: tuple[int, int, int] = (128, 128, 64),
    stages: int = 5,
    order: str = "auto",
    shape: tuple[int, int, int] | None = None,
    workers: int = 7,
    **move: object,
) -> Op:
    """A product of 2 x 4 tiles a rank, and of many where tiles of all ranks take turns."""
    rows, columns, depth = tile
    high = (8 if order == "interleave" else 2) * world * rows
    m, n, k = shape or (high, 512, 192)
    op = kernel.build({"M": m, "N": n, "K": k}, {}, world)
    given = {"resource": "epilogue", "sum": "epilogue", **move}
    (name,) = (t.symbol for t in op.find("tensor") if t["move"] in ("scatter", "reduce"))
    schedule = Schedule(
        tiles=(("K", depth), ("M", rows), ("N", columns)),
        stages=stages,
        emitter="gluon",
        workers=16 if order == "interleave" else workers,
        order=order,
        moves=((name, Move(**given)),),  # type: ignore[arg-type]
    )
    return compile_kernel(op, schedule)


def landing(fused: Op) -> int | None:
    found: int | None = fused.find("launch")[0].get("landing")
    return found


# How many boxes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "tile", "sums", "extra", "boxes"),
    [
        (4, (128, 128, 64), 1, 0, 4),
        (5, (128, 128, 64), 1, 0, 2),
        (6, (128, 128, 64), 1, 0, 0),
        # A piece that changes its layout: the room is half as wide, and two boxes fit still.
        (5, (128, 128, 64), 1, 128 * 64 * 2, 2),
        (5, (128, 128, 64), 1, 128 * 128 * 2, 0),
        (5, (64, 128, 64), 1, 0, 6),  # no more, whatever is left
        (3, (128, 256, 64), 1, 0, 0),  # halves
        (3, (128, 128, 64), 2, 0, 0),
    ],
)
def test_boxes_are_what_shared_memory_leaves(
    stages: int, tile: tuple[int, int, int], sums: int, extra: int, boxes: int
) -> None:
    assert landing_slots(stages, tile, sums, 2, extra) == boxes
    rows, columns, depth = tile
    box = rows * depth * 2
    assert not boxes or boxes >= LEAST_LANDING
    least = 2 * rows * 32 * 2  # the narrowest room
    used = stages * (rows + columns) * depth * 2 + extra + least + boxes * box
    assert not boxes or used < SHARED_BYTES


@pytest.mark.parametrize(
    ("change", "boxes"),
    [
        ({}, 2),
        ({"stages": 4}, 4),
        ({"stages": 6}, None),
        ({"resource": "copy_engine"}, 2),
        ({"kernel": gemm_ar, "shots": 2}, 2),
        ({"tile": (128, 256, 64), "stages": 3}, None),
        ({"sum": "stage"}, None),
        ({"direction": "pull"}, 2),
        ({"direction": "pull", "order": "interleave"}, 2),
    ],
    ids=str,
)
def test_launches_whose_sums_land_apart(change: dict[str, object], boxes: int | None) -> None:
    fused = program(**change)  # type: ignore[arg-type]
    assert landing(fused) == boxes
    assert land_sums(fused) == fused and parse_ir(print_ir(fused)) == fused
    text = emit(fused)
    assert ("_fetch(" in text) == (boxes is not None)
    # The fetcher waits, not the loader.
    loaders = [r for r in text.split("@gluon.jit\n") if re.match(r"def \w+_load\(", r)]
    assert loaders
    assert not boxes or all("tiles_wait(" not in role for role in loaders)


# The form ----------------------------------------------------------------------------------------


def edited(case: Case, old: str, new: str) -> Op:
    text = print_ir(case.fused())
    assert old in text
    return parse_ir(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("case", "old", "new", "says"),
    [
        (FIVE, "landing = 2, ", "landing = 1, ", "2 to 6 boxes"),
        (FIVE, "landing = 2, ", "landing = 7, ", "2 to 6 boxes"),
        (TURNS, 'roles = "turns"', 'landing = 2, roles = "turns"', "of which it has none"),
        (HALVES, 'roles = "halves"', 'landing = 2, roles = "halves"', "take turns"),
        (FIVE, 'roles = "turns", ', "", "roles are for"),
        (FIVE, "      %acc.own = zeros", "      wait @C.ready[0, 0]\n      %acc.own = zeros", "or not one"),
    ],
)  # fmt: skip
def test_a_ring_for_nothing_is_refused(case: Case, old: str, new: str, says: str) -> None:
    with pytest.raises(UndecidedError, match=says):
        verify(edited(case, old, new))


def test_a_kernel_has_the_ring_that_its_program_says() -> None:
    """Both are sound, and one is not the other."""
    with_ring, without = FIVE.fused(), edited(FIVE, "landing = 2, ", "")
    verify(without)
    validate(read_module(Source("emitted.py", emit(without))), without)
    text = emit(with_ring).replace("landing = 2, ", "", 1)
    with pytest.raises(EmittedDiffers, match="rings"):
        validate(read_module(Source("emitted.py", text)), without)


# The kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"world": 2},
        {"world": 4, "resource": "copy_engine"},
        {"world": 8},
        {"world": 2, "kernel": gemm_ar, "shots": 2},
        {"world": 4, "kernel": gemm_ar, "shots": 2},
        {"world": 8, "kernel": gemm_ar, "shots": 2, "resource": "copy_engine"},
        {"world": 8, "direction": "pull", "order": "interleave"},
    ],
    ids=str,
)
def test_kernels_with_a_fetcher_compile_without_spills(change: dict[str, object]) -> None:
    fused = program(**change)  # type: ignore[arg-type]
    text = emit(fused)
    assert landing(fused) and "[4, 1, 1]," in text
    validate(read_module(Source("emitted.py", text)), fused)
    compiled = compile_offline(text, fused)[0]
    assert lint(compiled) == [] and (compiled.warps, compiled.spills) == (12, 0)
    assert compiled.shared <= SHARED_BYTES


@pytest.mark.parametrize(("stages", "boxes"), [(4, 3), (5, 2)])
def test_what_is_added_to_a_sum_has_memory_to_change_its_layout_in(stages: int, boxes: int) -> None:
    fused = replace(ADDED, tile=(128, 128, stages), options=(("residual", 1),)).fused()
    assert landing(fused) == boxes
    compiled = compile_offline(emit(fused), fused)[0]
    assert SHARED_BYTES - LEFT_OVER < compiled.shared <= SHARED_BYTES


# The simulator -----------------------------------------------------------------------------------


def test_a_fetcher_is_an_agent_of_its_own() -> None:
    """What it does is what stands between the loop and the end of the sum, of tiles that have one."""
    launch = FIVE.fused().find("launch")[0]
    plain = edited(FIVE, "landing = 2, ", "").find("launch")[0]
    assert (parts_of(plain), loading_of(plain)) == (3, 1)
    assert (parts_of(launch), loading_of(launch)) == (4, 2)
    gemm, own = launch.find("stage")
    names = [[op.name for op in share.within(own)] for share in shares_of(launch, own)]
    assert names == [["zeros", "for_tiles"], ["cast", "wait", "wait", "load_sum"], ["store"]]
    names = [[op.name for op in share.within(gemm)] for share in shares_of(launch, gemm)]
    assert names == [["zeros", "for_tiles"], [], ["cast", "store", "notify"]]
    two = [[op.name for op in share.within(own)] for share in shares_of(plain, own)]
    assert two == [["zeros", "for_tiles", "cast", "wait", "wait", "load_sum"], ["store"]]


def test_every_interleaving_of_a_small_program_adds_the_parts_of_its_call() -> None:
    """One tile a worker; without the wait for the parts of the other rank, another number comes out."""
    fused = program(world=2, tile=(64, 64, 32), stages=3, shape=(128, 64, 32), workers=1)
    assert landing(fused) == 6
    assert explore(fused).bad is None
    bare = re.sub(r"\n *wait @C\.ready.*", "", print_ir(fused))
    assert explore(parse_ir(bare)).bad is not None


def test_the_clock_exposes_parts_in_the_ring_of_the_product_alone() -> None:
    """For each own tile of a worker, the time in which its parts are fetched from the cache: about 2 us.

    Of so deep a product that parts are there before it ends; what has to be waited for is fetched behind it.
    """
    kernel = gemm_rs.build({"M": 2048, "N": 4096, "K": 7168}, {}, 4)
    schedule = Schedule(
        tiles=(("K", 64), ("M", 128), ("N", 128)),
        stages=5,
        emitter="gluon",
        moves=(("C", Move(resource="copy_engine", sum="epilogue")),),
    )
    fused = run_passes(kernel, schedule)
    ring = parse_ir(print_ir(fused).replace("landing = 2, ", "", 1))
    machine = Machine.load("h200x8")
    assert 1 < predict(ring, machine) - predict(fused, machine) < 3


@pytest.mark.parametrize("case", [FIVE, RING], ids=["apart", "in the ring of the product"])
def test_sums_are_the_same_wherever_parts_land(case: Case) -> None:
    tensors = case.tensors()
    inputs = [{name: some[rank] for name, some in tensors.items()} for rank in range(4)]
    wanted = gemm_rs.on("reference", world=4)(**tensors)
    for seed in range(2):
        outputs = run(case.program(tensors), inputs, seed=seed, calls=2)
        assert all(torch.equal(o["C"], w) for o, w in zip(outputs, wanted, strict=True))
