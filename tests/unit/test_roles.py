"""Kernels whose warps have roles: the pass, the text, its compilation, validation, proof and simulation."""

from __future__ import annotations

import functools
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.assurance.emitted import attempt
from tests.emitted_mutants import mutants
from tests.roles import CASES, WORLD, Case
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.order_memory import order_memory
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime import interpret
from tilelink.backend.simulate import predict, run
from tilelink.backend.simulate.errors import DeadlockError, RaceError
from tilelink.backend.simulate.faults import Drop, Limits
from tilelink.backend.validate import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    Unclear,
    read_module,
    validate,
)
from tilelink.backend.validate.prove import Wanted
from tilelink.backend.verify import (
    CoverError,
    MatchError,
    ProgressError,
    UndecidedError,
    verify,
)
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule, ScheduleError
from tilelink.schedules.machine import Machine

TURNS, HALVES, RS, SWIGLU = CASES[1], CASES[2], CASES[6], CASES[5]
FOLDED = next(c for c in CASES if c.sum == "epilogue")
EPILOGUE = next(c for c in CASES if c.resource == "epilogue" and c.tile[1] == 256)
LANDING = next(c for c in CASES if c.sum == "epilogue" and c.tile == (128, 128, 4))
FIVE = next(c for c in CASES if c.name == "gemm_rs folded" and c.tile == (128, 128, 5))
FOLDED_HALVES = next(c for c in CASES if c.sum == "epilogue" and c.tile[1] == 256)
ADDED = next(c for c in CASES if c.depth == 128)
PEERS = next(c for c in CASES if c.name == "gemm_rs folded" and c.tile[:2] == (64, 128))
ALL = next(c for c in CASES if c.name == "gemm_ar" and c.tile[1] == 256)


def named(case: Case) -> str:
    return f"{case.name} {case.resource} {case.tile}"


@functools.cache
def fused(case: Case) -> Op:
    return case.fused()


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


# Validation -----------------------------------------------------------------------------------


def check(case: Case, text: str) -> None:
    validate(read_module(Source("emitted.py", text)), fused(case))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_intact_modules_pass(case: Case) -> None:
    found = validate(read_module(Source("emitted.py", emit(fused(case)))), fused(case))
    assert found.accesses > 0 and found.signals > 0


HELD = r"roles\.delayed_tile_notify\(ctx, pending, True\)\n"
AGAIN = "roles.delayed_tile_notify(ctx, pending, True)\n"
EARLY = "roles.store(C_128x64, 0, n_own_start, C_sum, room.index(role))"
OPENS = "device.open_within(ctx, program, 128"
OPENED = r"(def \w+_fetch\(.*?)\):\n(.*?_fetch, \(ctx[^)]*)\)"
GROUP = r"(.*?_multiply,\s*\(\s*{},\s*)"
GROUPS = r"(_multiply\(\s*role: tl\.constexpr,\s*)(ctx.*?\):\n)" + GROUP.format(0) + GROUP.format(1)
DRAINED = r"\n    device\.drain_tma_stores\(\)\n(?=\n\n)"
# What a module must not say, by what is replaced in it, and who objects.
EDITS = [
    (TURNS, r"device\.open_within\(", "device.open_call(", EmittedHazard),
    (TURNS, r"device\.open_within\(.*\)", "pass", EmittedError),
    # Kernel and roles open a call once, and leave it once, all together.
    (TURNS, r"(def ag_gemm\(.*?\n)(    ring = )", rf"\1    {OPENS}, True)\n\2", EmittedHazard),
    (PEERS, GROUPS, rf"\1program, \2    {OPENS}, False)\n\3program, \4program, ", EmittedHazard),
    (PEERS, OPENED, rf"\1, program):\n    {OPENS}, False)\n\2, program)", EmittedHazard),
    (PEERS, rf"{DRAINED}\n", "\n", EmittedHazard),
    (PEERS, DRAINED, r"\n    device.drain_tma_stores()\n    device.finish_arrive(ctx)\n", EmittedHazard),
    (PEERS, r"( +)device\.spoil\((.*?)\)", r"\1if rank == 0:\n\1    device.spoil(\2)", EmittedHazard),
    (RS, r"if (device\.finish_arrive\(ctx\)):\n +(device\.finish_leave)", r"\1\n    \2", EmittedHazard),
    (TURNS, r"roles\.turn\(turns, number\)", "pass", EmittedHazard),
    (TURNS, r"roles\.pass_turn\(turns, number\)", "pass", EmittedHazard),
    (TURNS, r"roles\.give\(ring, at - 1\)", "pass", EmittedHazard),
    (TURNS, r"roles\.give\(ring, at - 1, (\w+) > 0\)", r"roles.give(ring, at, \1 >= 0)", EmittedHazard),
    (TURNS, r"mma_wait\(1, deps", "mma_wait(2, deps", EmittedHazard),
    (TURNS, r"mma_wait\(0, deps", "mma_wait(1, deps", EmittedHazard),
    (TURNS, r"roles\.take\(ring, at\)", "roles.take(ring, at + 1)", EmittedHazard),
    (TURNS, r"number \+= 1", "number += 2", EmittedError),
    (TURNS, r"step \+= 4\b", "step += 3", EmittedHazard),
    (TURNS, r"roles\.claim\(ring, step, 32768\)", "roles.claim(ring, step, 16384)", EmittedHazard),
    (TURNS, r"roles\.claim\(ring, step, 32768\)", "roles.claim(ring, step, 65536)", EmittedHazard),
    (TURNS, r"k_start, n_start, b_ring", "k_start + 64, n_start, b_ring", EmittedError),
    (TURNS, r"ring\(3, 1\)", "ring(3, 2)", EmittedHazard),
    (TURNS, r"ring\(3, 1\)", "ring(4, 1)", EmittedError),
    (TURNS, r"a_row = m_start \+ token", "a_row = m_start", EmittedHazard),
    (TURNS, r"q, 1, True", "q, 1", EmittedHazard),
    (TURNS, r"\(ag_gemm_multiply, \(1, ", "(ag_gemm_multiply, (0, ", Unclear),
    (TURNS, r"\[4, 1\],", "[4, 4],", Unclear),
    (TURNS, r"gl\.warp_specialize\(\n +\[(.*?)\n    \)\n", r"pass\n", EmittedError),
    (TURNS, r"\(128, 64\), \"gluon\"", "(128, 64)", EmittedDiffers),
    (TURNS, r"acc = roles\.zeros\(128, 128\)", "acc = roles.full(128, 128, 1)", Unclear),
    (HALVES, r"a\.slice\(role \* 64, 64\)", "a.slice(0, 64)", EmittedError),
    (HALVES, r"m_half = m_start \+ role \* 64", "m_half = m_start", EmittedError),
    (HALVES, r"room\.index\(role\)", "room.index(0)", EmittedHazard),
    (HALVES, r"ring\(4, 2\)", "ring(4, 1)", EmittedHazard),
    (EPILOGUE, r"device\.drain_tma_stores\(\)", "pass", EmittedHazard),
    (ALL, r"roles\.meet\(pair, met\)", "pass", EmittedHazard),
    (EPILOGUE, r"roles\.meet\(pair, met\)", "pass", EmittedHazard),
    (EPILOGUE, r"met \+= 1", "pass", EmittedHazard),
    (EPILOGUE, r"if role == 0:", "if role >= 0:", EmittedDiffers),
    # What a group holds back: of its own last tile, made once, in front of its next store, flushed.
    (RS, r"pending = (\d+ \+ )", r"pending = 1 + \1", EmittedError),
    (RS, r"( +)(roles\.store\(.*?\n)( +pending = )", rf"\1\2\1{AGAIN}\3", EmittedError),
    (RS, rf"( +){HELD}(.*?)(\1pending = )", rf"\2\1{AGAIN}\3", EmittedError),
    (RS, rf"(        number \+= 1.*?\n)    {HELD}", r"\1", EmittedError),
    (RS, r"ctx, pending, True", "ctx, pending", EmittedHazard),
    (RS, r"roles\.delayed_tile_notify\(ctx", "device.delayed_tile_notify(ctx", EmittedHazard),
    (PEERS, r"roles\.send\(\s*\((\w+), (\w+),", r"roles.send((\2, \1,", EmittedError),
    (PEERS, r"(roles\.send\(\s*\([^)]*\),\s*)", r"\1 1 - ", EmittedError),
    (PEERS, r"(roles\.send\(\s*\()\w+, ", r"\1", EmittedError),
    (PEERS, r"pending_peer = m_start", "pending_peer = 256 + m_start", EmittedError),
    (PEERS, r"room\.index\(role\)", "room.index(1 - role)", EmittedHazard),
    # A tile leaves for other ranks in boxes of a part of the room, all of it, and lies there as they do.
    (PEERS, r"\(16, 64\), \"gluon\"", "(64, 64), \"gluon\"", EmittedHazard),
    (PEERS, r"\(16, 64\), \"gluon\"", "(8, 64), \"gluon\"", EmittedHazard),
    (PEERS, r"\(16, 64\), \"gluon\"", "(16, 32), \"gluon\"", EmittedHazard),
    (PEERS, r"\(16, 64\), \"gluon\"", "(16, 64)", EmittedDiffers),
    (PEERS, r"(peer=3\)\[rank\], )\(16, 64\)", r"\1(32, 64)", EmittedHazard),
    (PEERS, r"roles\.room\((\w+), 64, 64\)", r"roles.room(\1, 32, 64)", Unclear),
    (PEERS, r"roles\.room\((\w+), 64, 64\)", r"roles.room(\1, 128, 64)", Unclear),
    (PEERS, r"roles\.room\((\w+), 64, 64\)", r"roles.room(\1, 64, 32)", EmittedHazard),
    (PEERS, r"roles\.room\((\w+), 64, 64\)", r"roles.room(\1, 24, 64)", EmittedHazard),
    (PEERS, r"roles\.room\(\w+, 64, 64\)", "roles.tiles(C_parts_16x64_at0, 2)", Unclear),
    (PEERS, r"roles\.send\(.*?room\.index\(role\),?\s*\)\n", "pass\n", EmittedError),
    (PEERS, r"(roles\.send\(\s*\([^)]*\),[^,]*,\s*)", r"\g<1>16 + ", EmittedError),
    (PEERS, r"room\.index\(role\)", "a_ring.index(role)", EmittedHazard),
    (RS, r"roles\.room\((\w+), 128, 128\)", r"roles.room(\1, 128, 64)", EmittedHazard),
    (RS, r"roles\.room\((\w+), 128, 128\)", r"roles.room(\1, 256, 128)", EmittedHazard),
    (RS, r"(\"C.partial\"\), )\(128, 128\)", r"\1(16, 64)", EmittedHazard),
    # What has arrived of one piece of a tile is not added to another piece, nor as that of another rank.
    (ADDED, r"C_sum_arrived_2, rank, 4", "C_sum_arrived, rank, 4", EmittedError),
    (ADDED, r"C_sum_arrived, rank, 4", "C_sum_arrived, rank + 1, 4", EmittedError),
    (ADDED, r"C_sum_arrived, rank, 4", "C_sum_arrived, rank, 3", EmittedError),
    (ADDED, r"roles\.read_parts\(C_sum_parts", "roles.read_parts(8 + C_sum_parts", EmittedError),
    # The same of parts that the loader fetches into the ring, behind its waits, for the group to add.
    (FOLDED, r"token \+= device\.peer_tiles_wait\(ctx, 1024, 1, 0.*?\n", "pass\n", EmittedError),
    (FOLDED, r"q, 1, True\)", "q, 1)", EmittedHazard),
    (FOLDED, r"% 256 \+ token", "% 256", EmittedHazard),
    (FOLDED, r"m_own_start % 256 \+ token", "128 - m_own_start % 256 + token", EmittedError),
    (FOLDED, r"C_parts_128x64,\n +256,", "C_parts_128x64, 128,", EmittedHazard),
    (FOLDED, r"token,\n +n_own_part,", "token, n_own_start,", EmittedError),
    (FOLDED, r"token,\n +n_own_part,", "token, n_own_start + n_own_stop - n_own_part - 64,", EmittedError),
    (FOLDED, r"a_ring,\n +rank,\n +4,", "b_ring, rank, 4,", Unclear),
    (FOLDED, r"a_ring,\n +rank,\n +4,", "a_ring, (rank + 1) % 4, 4,", EmittedHazard),
    (FOLDED, r"a_ring,\n +rank,\n +4,", "a_ring, rank, 3,", EmittedHazard),
    (FOLDED, r"(    +)step \+= 3\n\n\n", r"\1step += 2\n\n\n", EmittedHazard),
    (FOLDED, r"n_own_start, n_own_stop, 64", "n_own_start, n_own_stop - 64, 64", EmittedHazard),
    (FOLDED, r"\.flatten\(0, 1\)", "", EmittedError),
    (FOLDED, r"c_own_low, ring, at", "c_own_high, ring, at", EmittedError),
    (FOLDED, r"c_own_low, ring, at,", "c_own_low, ring, at + 3,", EmittedHazard),
    (FOLDED, r"c_own_low, ring, at, a_ring", "c_own_low, ring, at, b_ring", EmittedError),
    (FOLDED, r"(c_own_low, ring, at, a_ring, 0), rank, 4", r"\1, 3 - rank, 4", EmittedHazard),
    (FOLDED, r"c_own = acc_own\.to\(tl\.bfloat16\)", "c_own = acc_own", EmittedHazard),
    (FOLDED, r"at \+= 3", "at += 2", EmittedHazard),
    (FOLDED, r"step \+= 3 \+ 6", "step += 3 + 3", EmittedHazard),
    (FOLDED, r"at \+= 3\n +roles\.pass_turn\(turns, number\)", "at += 3", EmittedHazard),
    (FOLDED, r"(at \+= 3\n( +))C_sum_2", r"\1roles.pass_turn(turns, number)\n\2C_sum_2", EmittedHazard),
    (FOLDED, r"(at \+= 3\n( +))C_sum_2", rf"\1{EARLY}\n\2C_sum_2", EmittedHazard),
    (FOLDED, r"roles\.sum_landed\(c_own_high, .*?at \+= 3\n", "c_own_high\n", EmittedHazard),
    (FOLDED, r"n_own_part, C_sum_2", "n_own_part, C_sum", EmittedError),
    # The same where parts have a ring of their own, a fetcher and turns of their own.
    (LANDING, r"token \+= device\.peer_tiles_wait\(ctx, 1024, 1, 0.*?\n", "pass\n", EmittedError),
    (LANDING, r"q, 1, True\)", "q, 1)", EmittedHazard),
    (LANDING, r"% 256 \+ token", "% 256", EmittedHazard),
    (LANDING, r"m_own_start % 256 \+ token", "128 - m_own_start % 256 + token", EmittedError),
    (LANDING, r"(_fetch\(.*?)landing,\n +step", r"\1ring, step", EmittedError),
    (LANDING, r"(_fetch\(.*?)landing,\n +step,", r"\1landing, step + 1,", EmittedHazard),
    (LANDING, r"(_fetch\(.*?range\()C_own_worker, 8", r"\1C_own_worker, 7", EmittedHazard),
    (LANDING, r"(_fetch\(.*?range\()C_own_worker", r"\1tl.program_id(0)", EmittedError),
    (LANDING, r"C_parts_landing,\n +rank,\n +4,", "C_parts_landing, rank, 3,", EmittedHazard),
    (LANDING, r"n_own_start, n_own_stop, 64", "n_own_start, n_own_stop - 64, 64", EmittedHazard),
    (LANDING, r"(    +)step \+= 3\n\n\n@gluon.jit\(", r"\1step += 2\n\n\n@gluon.jit(", EmittedHazard),
    (LANDING, r"roles\.turn\(sums, own\)", "pass", EmittedHazard),
    (LANDING, r"roles\.turn\(sums, own\)", "roles.turn(sums, number)", EmittedHazard),
    (LANDING, r"roles\.turn\(sums, own\)", "roles.turn(turns, own)", EmittedHazard),
    (LANDING, r"roles\.pass_turn\(sums, own\)", "pass", EmittedHazard),
    (LANDING, r"roles\.pass_turn\(sums, own\)", "roles.pass_turn(sums, own + 1)", EmittedHazard),
    (LANDING, r"(at \+= 3\n( +))C_sum_2", r"\1roles.pass_turn(sums, own)\n\2C_sum_2", EmittedHazard),
    (LANDING, r"(at \+= 3\n( +))C_sum_2", rf"\1{EARLY}\n\2C_sum_2", EmittedHazard),
    (LANDING, r"(roles\.turn\(turns, number\))(\n +acc_own)", r"\1; roles.turn(sums, own)\2", EmittedHazard),
    (LANDING, r"own \+= 1", "own += 2", EmittedError),
    (LANDING, r"own \+= 1", "pass", EmittedError),
    (LANDING, r"at = own \* 6", "at = own * 3", EmittedHazard),
    (LANDING, r"at = own \* 6", "pass", EmittedHazard),
    (LANDING, r"c_own_low, landing, at", "c_own_low, ring, at", EmittedHazard),
    (LANDING, r"c_own_low, landing, at, C_parts_landing", "c_own_low, landing, at, a_ring", EmittedError),
    (LANDING, r"c_own_low, landing, at", "c_own_high, landing, at", EmittedError),
    (LANDING, r"landing = roles\.ring\(4, 1\)", "landing = roles.ring(4, 2)", EmittedHazard),
    (LANDING, r"landing = roles\.ring\(4, 1\)", "landing = roles.ring(5, 1)", EmittedError),
    (LANDING, r"landing = roles\.ring\(4, 1\)", "landing = ring", EmittedError),
    (LANDING, r"sums = roles\.turns\(\)", "sums = turns", EmittedError),
    (LANDING, r"(_landing) = roles\.tiles\(\w+, 4\)", r"\1 = roles.tiles(C_parts_128x64, 3)", Unclear),
    (LANDING, r"(_landing) = roles\.tiles\(\w+, 4\)", r"\1 = a_ring", EmittedHazard),
    (FIVE, r"room = roles\.room\(\w+, 128, 64\)", "room = C_parts_landing", EmittedHazard),
    (LANDING, r"\[4, 1, 1\]", "[4, 1, 4]", Unclear),
    (LANDING, r"\[4, 1, 1\]", "[4, 1]", Unclear),
    (LANDING, r"\[232, 40, 40\]", "[232, 40]", Unclear),
    (LANDING, r"\(\w+_fetch, \(ctx.*?\)\),\n", "", Unclear),
    (LANDING, r"\(\w+_fetch, \(ctx", "(gemm_rs_load, (ctx", EmittedError),
    (FOLDED_HALVES, r"a_ring, role \* 64, rank", "a_ring, 0, rank", EmittedError),
    (FOLDED_HALVES, r"c_own_low_low, ring", "c_own_low_high, ring", EmittedError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "old", "new", "error"), EDITS, ids=[f"{named(c)} {o} {n}" for c, o, n, _ in EDITS]
)
def test_an_edit_is_refused(case: Case, old: str, new: str, error: type[EmittedError]) -> None:
    text = emit(fused(case))
    start = text.index('"""\n', text.index("TEXT = ") + 12)
    body, count = re.subn(old, new, text[start:], count=1, flags=re.DOTALL)
    assert count == 1
    with pytest.raises(error):
        check(case, text[:start] + body)


@pytest.mark.parametrize("case", [TURNS, EPILOGUE, FOLDED, LANDING], ids=named)
def test_mutants_of_the_text_are_refused(case: Case) -> None:
    """A sample of all kinds; those that change no event of any worker are no mutants."""
    wanted, text = Wanted(fused(case)), emit(fused(case))
    original, reason = attempt(text, wanted)
    assert not reason
    kinds: dict[str, list[str]] = {}
    for mutant in mutants(text):
        # Two waits in a row may stand in either order.
        if mutant.kind != "swap" or "_wait(" not in mutant.what:
            kinds.setdefault(mutant.kind, []).append(mutant.text)
    chance, tried = random.Random(0), 0
    for some in kinds.values():
        for changed in chance.sample(some, min(6, len(some))):
            print_, reason = attempt(changed, wanted)
            tried += bool(reason)
            assert reason or print_ == original, changed
    assert tried > 40


# Proof and simulation -------------------------------------------------------------------------


@tilelink.kernel("gather A[M, K] over M")
def in_turn(A, B, W, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(P[m, k], W[k, n], acc)
        C[m, n] = acc


def two_products() -> tuple[Op, list[dict[str, torch.Tensor]]]:
    """One launch of two products, of which the second reads what the first stores, by one worker."""
    kernel = in_turn.build({"M": 256, "N": 64, "K": 64}, {}, 2)
    tiles = (("K", 32), ("M", 64), ("N", 32))
    program = compile_kernel(kernel, Schedule(tiles=tiles, emitter="gluon", workers=1))
    sizes = {"A": (128, 64), "B": (64, 64), "W": (64, 64)}
    torch.manual_seed(0)
    inputs = [
        {n: torch.randint(-1, 2, size).bfloat16() for n, size in sizes.items()} for _ in range(2)
    ]
    return program, inputs


def test_a_loader_does_not_wait_for_the_stores_of_its_own_worker() -> None:
    """Without the wait between them, a later task of the same worker loads what is not there yet."""
    program, inputs = two_products()
    assert launches(program) == [("turns", ["stage", "stage", "finish"])]
    validate(read_module(Source("emitted.py", emit(program))), program)
    text = print_ir(program)
    bare = "\n".join(line for line in text.splitlines() if not re.search(r"wait @P\.", line))
    with pytest.raises(CoverError):
        verify(parse_ir(bare))
    with pytest.raises(RaceError):
        for seed in range(4):
            run(parse_ir(bare), inputs, seed=seed)
    wanted = in_turn.on("reference", world=2)(**{n: [i[n] for i in inputs] for n in inputs[0]})
    for seed in range(4):
        outputs = run(program, inputs, seed=seed, calls=2)
        assert all(torch.equal(o["C"], w) for o, w in zip(outputs, wanted, strict=True))


def test_a_lost_signal_ends_every_role() -> None:
    program, inputs = two_products()
    with pytest.raises(tilelink.TilelinkError, match="ready"):
        run(program, inputs, faults=(Drop(rank=1, number=0),), limits=Limits(progress=1.0))


FORMS = [
    ('roles = "turns", ', "", "roles"),
    ('emitter = "gluon", ', "", "roles"),
    ("drain = true", "delay = 1, drain = true", "held back"),
    ("        yield (%acc.2)", "        yield (%acc)", "something else than sums"),
    ("      %p = cast", "      wait @P.done[0] {count = 8}\n      %p = cast", None),
]


@pytest.mark.parametrize(("old", "new", "says"), FORMS)
def test_form_of_launches_with_roles(old: str, new: str, says: str | None) -> None:
    text = print_ir(two_products()[0])
    assert old in text
    edited = parse_ir(text.replace(old, new, 1))
    if says is None:  # a wait of the epilogue is one of the group's
        with pytest.raises(tilelink.TilelinkError, match=r"circle|deadlock|cycle"):
            verify(edited)
        return
    with pytest.raises((UndecidedError, MatchError), match=says):
        verify(edited)


def test_what_groups_hold_back_is_flushed_before_their_worker_waits_for_it() -> None:
    program, inputs = two_products()
    text = print_ir(program)
    held = re.sub(r"(notify @P\.done\[0\] \{)", r"\1delay = 1, ", text, count=1)
    assert held != text
    flushed = held.replace("    stage @C.gemm", "    flush {drain = true}\n    stage @C.gemm", 1)
    late = held.replace("    finish do", "    flush {drain = true}\n    finish do", 1)
    assert flushed != held != late
    verify(parse_ir(flushed))
    wanted = in_turn.on("reference", world=2)(**{n: [i[n] for i in inputs] for n in inputs[0]})
    for seed in range(4):
        outputs = run(parse_ir(flushed), inputs, seed=seed, calls=2)
        assert all(torch.equal(o["C"], w) for o, w in zip(outputs, wanted, strict=True))
    with pytest.raises(ProgressError, match="held back until then"):
        verify(parse_ir(late))
    with pytest.raises(DeadlockError):
        run(parse_ir(late), inputs)


@pytest.mark.parametrize("case", [PEERS, EPILOGUE], ids=named)
def test_stores_to_peers_leave_through_tma_and_no_barrier_is_another_groups(case: Case) -> None:
    """The releases stand behind a drain and the group's own barrier; see the lint for the order."""
    kernel = compile_offline(emit(fused(case)), fused(case))[0]
    ptx, sass = kernel.stages["ptx"], kernel.stages["sass"]
    assert lint(kernel) == [] and "UTMASTG" in sass
    stores = re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta", ptx)
    assert len(stores) >= 2 * WORLD  # each of two groups to each rank
    assert not re.findall(r"bar\.sync\s+0;", ptx)
    for role in ptx.split("setmaxnreg"):
        for release in re.finditer(
            r"atom\.global\.(?:sys|gpu)\.(?:acq_rel|release)\.(?:add|exch)", role
        ):
            before = role[: release.start()]
            last = max(before.rfind("bulk.tensor.2d.global.shared::cta"), 0)
            drained = re.search(r"bulk\.wait_group 0;.*bar\.sync", before[last:], re.DOTALL)
            assert not last or drained


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
    for given in re.finditer(r"mbarrier\.arrive\.shared", compiled.stages["ptx"]):
        before = compiled.stages["ptx"][: given.start()]
        read = before.rfind("ldmatrix")
        assert read < 0 or "bar.sync" in before[read:] or "barrier.sync" in before[read:]


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


@pytest.mark.parametrize("case", [FOLDED, LANDING], ids=named)
def test_a_landed_sum_needs_the_proxy_fence(case: Case) -> None:
    """The proof and the simulator both miss it behind either of the waits."""
    tensors = case.tensors()
    text = print_ir(case.program(tensors))
    inputs = [{n: t[r] for n, t in tensors.items()} for r in range(WORLD)]
    bare, count = re.subn(r"(wait @C\.ready.*) \{proxy = true\}", r"\1", text)
    assert count == 2
    with pytest.raises(CoverError):
        verify(parse_ir(bare))
    with pytest.raises(RaceError):
        for seed in range(4):
            run(parse_ir(bare), inputs, seed=seed)


BARE = "%C.bare = load @C[%m.own at m.own.start % 256, %n.own] : bf16[m.own, n.own]"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("      %C.sum = ", "      notify @C.done[0, 0]\n      %C.sum = ", "in front of a sum"),
        ("      %C.sum = ", f"      {BARE}\n      %C.sum = ", "in front of a sum"),
        (" (%C.sum) {via", " (%C.sum) {via", None),
        ("    finish do {", "      notify @C.done[0, 0] {delay = 1}\n    }\n    finish do {", "held back"),
        ("    finish do {", "      wait @C.ready[0, 0]\n    }\n    finish do {", "behind a sum"),
    ],
)  # fmt: skip
def test_form_of_landed_sums(old: str, new: str, says: str | None) -> None:
    text = print_ir(fused(FOLDED))
    assert old in text
    if "finish" in old:  # behind the stage's last op
        old = "    }\n" + old
    edited = parse_ir(text.replace(old, new, 1))
    if says is None:
        verify(edited)
        return
    with pytest.raises(UndecidedError, match=says):
        verify(edited)


@pytest.mark.parametrize("tile", [(128, 128, 5), (128, 256, 4)])
def test_the_clock_hides_parts_that_land_beneath_the_product(tile: tuple[int, int, int]) -> None:
    """What remains is to add them: less than to load them, where no other group multiplies meanwhile.

    Of 128 x 256 a worker has one own tile, whose three parts of 64 KB take a few microseconds from the cache.
    """
    kernel = gemm_rs.build({"M": 2048, "N": 4096, "K": 3584}, {}, WORLD)
    schedule = Schedule(
        tiles=(("K", 64), ("M", tile[0]), ("N", tile[1])),
        stages=tile[2],
        emitter="gluon",
        moves=(("C", Move(resource="copy_engine", sum="epilogue")),),
    )
    program = run_passes(kernel, schedule)
    text = print_ir(program)
    loaded = re.sub(r"(load_sum .*) \{via = \"tma\"\}", r"\1", text)
    assert loaded != text
    machine = Machine.load("h200x8")
    landed, behind = predict(program, machine), predict(parse_ir(loaded), machine)
    assert landed < behind - 3 if tile[1] == 256 else landed < behind * 1.01


def test_the_interpreter_runs_the_triton_kernels_of_the_same_schedule() -> None:
    plan = interpret.plan(fused(RS))
    assert launches(plan) == [(None, ["stage", "flush"]), (None, ["stage", "finish"])]
    assert "gluon" not in emit(plan).split('"""')[-1]
