"""Kernels whose warps have roles: the pass, the text and its compilation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tilelink
import tilelink.language as tk
from tests.roles import (
    CASES,
    EPILOGUE,
    FOLDED,
    HALVES,
    PEERS,
    RS,
    SWIGLU,
    TURNS,
    WORLD,
    Case,
    fused,
    named,
)
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.order_memory import order_memory
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime import interpret
from tilelink.backend.validate import (
    read_module,
    validate,
)
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError


def launches(program: Op) -> list[tuple[str | None, list[str]]]:
    return [(op.get("roles"), [child.name for child in op.body]) for op in program.find("launch")]


# The pass -------------------------------------------------------------------------------------


def test_products_are_parted_from_what_follows_them() -> None:
    assert launches(fused(RS)) == [("turns", ["stage", "flush"]), (None, ["stage", "finish"])]
    first, second = fused(RS).find("launch")
    assert (first["emitter"], second.get("emitter"), second["part"]) == ("gluon", None, 2)
    assert second["after"] == ("head", first.symbol)
    agents = [op.symbol for op in fused(RS).body if op.name in ("launch", "stream")]
    # Behind the copies that it waits for: they must not stand behind a kernel that waits.
    assert agents == ["gemm_rs", "C.copy", "gemm_rs.part2"]
    assert launches(fused(FOLDED)) == [("turns", ["stage", "flush", "stage", "finish"])]
    assert launches(fused(TURNS)) == [("turns", ["stage", "finish"])]
    assert launches(fused(HALVES)) == [("halves", ["stage", "finish"])]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_programs_round_trip_and_a_second_run_of_order_memory_changes_nothing(case: Case) -> None:
    program = fused(case)
    assert parse_ir(print_ir(program)) == program
    assert order_memory(program) == program


@pytest.mark.parametrize("case", CASES, ids=named)
def test_groups_hold_back_what_they_notify_where_nothing_waits_before_it(case: Case) -> None:
    """What such a notify releases goes through TMA, to peers too; what else goes to peers by addresses."""
    launch = fused(case).find("launch")[0]
    # An all-reduce by the epilogue tells all ranks in a loop, which nothing can hold back.
    tells = case.name.startswith("gemm_ar") and case.resource != "copy_engine"
    held = not tells or case.sum == "epilogue"
    if case.tail > 1:
        first = next(n for n, op in enumerate(launch.body) if "positions" in dict(op.attrs) and n)
        launch = launch.with_ops(launch.body[:first])
    told = [op for op in launch.body[0].walk() if op.name == "notify"]
    assert bool(told) == (not case.name.startswith("ag"))
    assert all((op.get("delay"), op.get("drain")) == (1, True) for op in told if held)
    assert not any(op.get("delay") for op in told if not held)
    flushes = [n for n, op in enumerate(launch.body) if op.name == "flush"]
    assert flushes == [1] * (held and bool(told))
    peers = [
        op for op in launch.body[0].walk() if op.get("peer") is not None and op.name == "store"
    ]
    assert bool(peers) == (case.resource == "epilogue")
    assert all((op.get("via") == "tma") == held for op in peers)


REFUSED = [
    ({"warps": 4}, "warps"),
    ({"tiles": (("K", 64), ("M", 32), ("N", 128))}, "32 x 128"),
    ({"tiles": (("K", 64), ("M", 256), ("N", 256))}, "256 x 256"),
    ({"moves": (("A", Move(resource="sm:4", slots=2)),)}, "begins and ends a call"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_roles_cannot_run_is_refused_by_name(change: dict[str, object], says: str) -> None:
    kernel = ag_gemm.build({"M": 1024, "N": 512, "K": 128}, {}, WORLD)
    schedule = Schedule(tiles=(("K", 64), ("M", 128), ("N", 128)), emitter="gluon")
    with pytest.raises(ScheduleError, match=re.escape(says)) as refused:
        run_passes(kernel, replace(schedule, **change))  # type: ignore[arg-type]
    assert "triton" in str(refused.value)


def test_roles_have_no_workers_that_copy_what_they_store() -> None:
    kernel = gemm_rs.build({"M": 1024, "N": 512, "K": 128}, {}, WORLD)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    schedule = Schedule(tiles=tiles, emitter="gluon", moves=(("C", Move(resource="sm:4")),))
    with pytest.raises(ScheduleError, match="workers that copy"):
        run_passes(kernel, schedule)


@tilelink.kernel("reduce P[M, N] sum")
def no_product(A, C):  # type: ignore[no-untyped-def]
    M, N = A.shape
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        P[m, n] = A[m, n]
    for m, n in tk.tiles(M, N):
        C[m, n] = P[m, n]


@tilelink.kernel("gather A[M, K] over M")
def normalised(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(tk.cast(A[m, k] * 2.0, A.dtype), B[k, n], acc)
        C[m, n] = acc


@pytest.mark.parametrize(
    ("kernel", "shape", "says"),
    [
        (no_product, {"M": 256, "N": 128}, "multiplies no matrices"),
        (normalised, {"M": 256, "N": 128, "K": 64}, "in the main loop"),
    ],
)
def test_kernels_of_another_form_are_refused(
    kernel: tilelink.Kernel, shape: dict[str, int], says: str
) -> None:
    with pytest.raises(ScheduleError, match=says):
        run_passes(kernel.build(shape, {}, 2), Schedule(emitter="gluon"))


def test_two_slots_are_refused() -> None:
    kernel = gemm_ar.build({"M": 256, "N": 256, "K": 128}, {}, 2)
    move = Move(resource="epilogue", slots=2)
    with pytest.raises(ScheduleError, match="begins and ends a call"):
        run_passes(kernel, Schedule(emitter="gluon", moves=(("C", move),)))


def test_a_ring_that_does_not_fit_is_refused() -> None:
    kernel = gemm_rs.build({"M": 1024, "N": 512, "K": 128}, {}, WORLD)
    schedule = Schedule(tiles=(("K", 64), ("M", 128), ("N", 128)), emitter="gluon", stages=8)
    with pytest.raises(CannotEmit, match="8 stages, which take 2") as refused:
        emit(compile_kernel(kernel, schedule))
    assert "help: use 6 stages, or the emitter triton" in str(refused.value)
    assert emit(compile_kernel(kernel, replace(schedule, stages=6)))


def test_halves_of_short_tiles_are_refused() -> None:
    kernel = gemm_rs.build({"M": 360, "N": 256, "K": 128}, {}, WORLD)
    schedule = Schedule(tiles=(("K", 64), ("M", 128), ("N", 256)), emitter="gluon", stages=3)
    with pytest.raises(CannotEmit, match="fewer rows") as refused:
        emit(compile_kernel(kernel, schedule))
    assert "triton" in str(refused.value)


def with_sum(**change: object) -> str:
    """The text of the stage of a sum folded by roles, where the shape or the schedule is another one."""
    shape = {"M": 1024, "N": 512, "K": 192}
    shape |= {k: int(str(v)) for k, v in change.items() if k in shape}
    tiles = {"K": 64, "M": 128, "N": 128} | dict(change.get("tiles", ()))  # type: ignore[call-overload]
    schedule = Schedule(
        tiles=tuple(sorted(tiles.items())),
        emitter=str(change.get("emitter", "gluon")),
        moves=(("C", Move(resource="epilogue", sum="epilogue")),),
    )
    program = compile_kernel(gemm_rs.build(shape, {}, WORLD), schedule)
    assert order_memory(program) == program and parse_ir(print_ir(program)) == program
    text = print_ir(program)
    return text[text.index("stage @C.own") :]


@pytest.mark.parametrize(
    ("change", "lands"),
    [
        ({}, True),
        ({"tiles": {"K": 32}}, True),
        ({"tiles": {"N": 256}}, True),
        ({"tiles": {"M": 64}}, True),
        ({"tiles": {"K": 128}}, False),  # more than a thread adds at a time
        ({"N": 520}, False),  # short columns
        ({"M": 800}, False),  # short rows
        ({"emitter": "triton"}, False),  # no loader
    ],
    ids=str,
)
def test_parts_land_in_the_ring_where_they_are_slots_of_it(
    change: dict[str, object], lands: bool
) -> None:
    stage = with_sum(**change)
    assert bool(re.search(r'load_sum .*via = "tma"', stage)) == lands
    fenced = re.findall(r"wait @C\.ready.*proxy = true", stage)
    assert len(fenced) == 2 * lands


# The text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=named)
def test_text_is_as_ruff_leaves_it(case: Case, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    path = tmp_path / "emitted.py"
    path.write_text(emit(fused(case)))
    command = [ruff, "format", "--diff", "--isolated", "--line-length", "100", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("case", [TURNS, HALVES, SWIGLU, RS, EPILOGUE, FOLDED], ids=named)
def test_kernels_compile_clean_for_sm_90(case: Case) -> None:
    program = fused(case)
    kernel = compile_offline(emit(program), program)[0]
    assert lint(kernel) == []
    sass = kernel.stages["sass"]
    assert "HGMMA" in sass and "UTMALDG" in sass and "USETMAXREG" in sass
    assert (kernel.warps, kernel.roles) == (12, True)


def test_the_lint_sees_stores_that_are_not_drained_and_loads_above_their_wait() -> None:
    def objections(case: Case, old: str, new: str) -> str:
        text = emit(fused(case))
        assert re.search(old, text, re.DOTALL)
        text = re.sub(old, new, text, flags=re.DOTALL)
        return " ".join(lint(compile_offline(text, fused(case))[0]))

    now = "device.producer_tile_notify(ctx, 32768, True)"
    assert "drained" in objections(RS, r"roles\.delayed_tile_notify\(ctx, pending, True\)", now)
    wait = r"(            token \+= device.peer_tile_wait\(.*?\n            \)\n)(.*?)(\n\n\n)"
    late = objections(TURNS, wait, r"            pass\n\2\n\1\3")
    assert "above the wait" in late


@pytest.mark.parametrize("case", [PEERS, EPILOGUE], ids=named)
def test_stores_to_peers_leave_through_tma_and_no_barrier_is_another_groups(case: Case) -> None:
    """The releases stand behind a drain and the group's own barrier; see the lint for the order."""
    kernel = compile_offline(emit(fused(case)), fused(case))[0]
    ptx, sass = kernel.stages["ptx"], kernel.stages["sass"]
    assert lint(kernel) == [] and "UTMASTG" in sass
    stores = re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta", ptx)
    assert len(stores) >= 2 * WORLD  # each of two groups to each rank
    assert not re.findall(r"bar\.sync\s+0;", ptx)
    # Tiles are counted, and the last of a channel tells the peer; waits that ran out tell all apart.
    counted = [
        (part, match.start())
        for part in ptx.split("setmaxnreg")
        for match in re.finditer(r"atom\.global\.gpu\.acq_rel\.add", part)
    ]
    assert any("bulk.tensor.2d.global.shared" in part for part, _ in counted)
    for part, at in counted:
        # In front of it in the text or round the loop: what it releases are stores of the task before.
        behind = max(part[:at].rfind("bulk.tensor.2d.global.shared::cta"), 0)
        assert re.search(r"bulk\.wait_group 0;.*bar\.sync", part[behind:at], re.DOTALL)


@pytest.mark.parametrize(("world", "loads"), [(2, 8), (4, 18), (8, 9)])
def test_arrived_parts_are_loaded_together_16_bytes_a_thread(world: int, loads: int) -> None:
    """As many as registers hold, of one piece of a tile or of several, stand in front of the first use of one.

    That is where a step of the depth is not as wide as what a group adds at a time.
    """
    kernel = gemm_rs.build({"M": 1024, "N": 512, "K": 192}, {}, world)
    schedule = Schedule(
        tiles=(("K", 128), ("M", 128), ("N", 128)),
        stages=2,
        emitter="gluon",
        moves=(("C", Move(resource="epilogue", sum="epilogue")),),
    )
    program = compile_kernel(kernel, schedule)
    compiled = compile_offline(emit(program), program)[0]
    assert lint(compiled) == []
    sass = re.findall(r"\b(LDG\.E\.EF\S*|STG\.E\S*|FADD)", compiled.stages["sass"])
    runs = re.findall(r"L+", "".join("L" if op.startswith("LDG") else "." for op in sass))
    assert all(op.endswith(".128") for op in sass if op.startswith("LDG"))
    assert max(map(len, runs)) >= loads


@pytest.mark.parametrize(
    ("world", "tile", "stages"),
    [(2, (128, 128), 6), (4, (128, 128), 5), (4, (128, 256), 4), (8, (128, 256), 3), (8, (64, 256), 4)],
)  # fmt: skip
def test_parts_that_land_in_the_ring_take_no_loads_and_no_spills(
    world: int, tile: tuple[int, int], stages: int
) -> None:
    kernel = gemm_rs.build({"M": 1024, "N": 512, "K": 192}, {}, world)
    schedule = Schedule(
        tiles=(("K", 64), ("M", tile[0]), ("N", tile[1])),
        stages=stages,
        emitter="gluon",
        moves=(("C", Move(resource="epilogue", sum="epilogue")),),
    )
    program = compile_kernel(kernel, schedule)
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    compiled = compile_offline(text, program)[0]
    assert lint(compiled) == [] and "roles.fetch_parts(" in text
    sass = compiled.stages["sass"]
    assert "LDG.E.EF" not in sass and "LDSM" in sass
    # Read, then given back: no load from the ring stands between the end of reading and the arrival.
    reads = 0
    for given in re.finditer(r"mbarrier\.arrive\.shared", compiled.stages["ptx"]):
        before = compiled.stages["ptx"][: given.start()]
        read = before.rfind("ldmatrix")
        assert read < 0 or "bar.sync" in before[read:] or "barrier.sync" in before[read:]
        reads += read >= 0
    assert reads


def test_the_interpreter_runs_the_triton_kernels_of_the_same_schedule() -> None:
    plan = interpret.plan(fused(RS))
    assert launches(plan) == [(None, ["stage", "flush"]), (None, ["stage", "finish"])]
    assert "gluon" not in emit(plan).split('"""')[-1]
