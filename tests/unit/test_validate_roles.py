"""Translation validation of kernels whose warps have roles: what a module must not say."""

from __future__ import annotations

import re

import pytest

from tests.edits import changed, check, refused_of
from tests.roles import (
    ADDED,
    ALL,
    CASES,
    EPILOGUE,
    FIVE,
    FOLDED,
    FOLDED_HALVES,
    HALVES,
    LANDING,
    PEERS,
    RS,
    TURNS,
    Case,
    fused,
    named,
)
from tilelink.backend.emit.triton import emit
from tilelink.backend.validate import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    Unclear,
    read_module,
    validate,
)
from tilelink.errors import Source


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
    edited = changed(emit(fused(case)), old, new, re.DOTALL)
    with pytest.raises(error):
        check(fused(case), edited)


@pytest.mark.parametrize("case", [TURNS, EPILOGUE, FOLDED, LANDING], ids=named)
def test_mutants_of_the_text_are_refused(case: Case) -> None:
    # Two waits in a row may stand in either order.
    refused = refused_of(
        fused(case),
        emit(fused(case)),
        lambda mutant: mutant.kind != "swap" or "_wait(" not in mutant.what,
    )
    assert refused > 40
