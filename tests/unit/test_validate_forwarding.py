"""Workers that copy beside products with roles, read back: intact text passes, edited text does not."""

from __future__ import annotations

import functools
import re

import pytest

from tests.edits import changed, check, refused_of
from tilelink import kernels
from tilelink.backend.emit.offline import compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.validate import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    Unclear,
)
from tilelink.device import roles
from tilelink.ir import Op
from tilelink.schedules import Move, Schedule
from tilelink.schedules.roles import LEAVING

RS, AG = "gemm_rs", "ag_gemm"


@functools.cache
def emitted(kernel: str, stages: int = 4) -> tuple[Op, str]:
    """A program whose two copying workers have three tiles of four boxes or more, and its module."""
    op = getattr(kernels, kernel).build({"M": 1024, "K": 256, "N": 512}, world=4)
    scatters = kernel == RS
    move = Move(
        resource="sm:2",
        copies="boxes",
        sum="epilogue" if scatters else "stage",
        channels=2 if scatters else None,
    )
    tiles = (("K", 64), ("M", 128), ("N", 128))
    schedule = Schedule(
        tiles=tiles,
        emitter="gluon",
        stages=stages,
        workers=5,
        moves=(("C" if scatters else "A", move),),
    )
    program = compile_kernel(op, schedule)
    return program, emit(program)


@pytest.mark.parametrize("kernel", [RS, AG])
def test_workers_that_copy_beside_products_are_clean(kernel: str) -> None:
    program, text = emitted(kernel)
    assert "roles.forward(" in text and "device.queue_next(" in text
    check(program, text)


def test_a_slot_is_given_back_when_all_of_the_group_know_that_it_has_been_read() -> None:
    """What is read is known to the thread that stores: a barrier of the group stands before the arrival."""
    program, text = emitted(RS)
    (compiled,) = compile_offline(text, program)
    assert lint(compiled) == []
    ptx = compiled.stages["ptx"]
    waits = list(re.finditer(rf"bulk\.wait_group\.read\s+{LEAVING};", ptx))
    assert len(waits) == 2  # each of the groups, a box a store
    for wait in waits:
        arrival = ptx.index("mbarrier.arrive.shared", wait.end())
        assert "bar.sync" in ptx[wait.end() : arrival]


def test_boxes_that_leave_are_as_many_as_the_device_says() -> None:
    assert roles.LEAVING.value == LEAVING


DRAW = r"( +)taken = device\.queue_next\(ctx, \d+\)\n"
ORDER = r" +roles\.order\(orders, number, taken\)\n"
ORDERED = r"taken = roles\.ordered\(orders, number\)"
FORWARD = r"( +roles\.forward\(.*?\n +\)\n)"
FORWARDED = r"( +roles\.forwarded\(ring, at, step, 1\)\n)"
ONE_READS = r"\1if number % 2 == role:\n\2    taken = roles.ordered(orders, number)"
PEERS = r"(roles\.forward\(\s+\()C_parts_128x64_at0, C_parts_128x64_at1"
BOX = r"(slot = roles\.take\(ring, at\)\n +roles\.forward\(.*?)a_ring"
ALL = r"( +roles\.all_forwarded\(ring, at, step\)\n)"
DRAIN = r"( +device\.drain_tma_stores\(\)\n)"
# One edit a rule: the kernel, what is replaced by what, and who objects.
EDITS = [
    # The loader: a place is drawn, handed on, and then the tile is loaded.
    (RS, ORDER, "", EmittedHazard),
    (RS, rf"(while taken.*?{DRAW}){ORDER}", r"\1", EmittedHazard),
    (RS, rf"(while taken.*?)({DRAW})({ORDER})", r"\1\4\2", EmittedHazard),
    (RS, ORDER, r"        roles.order(orders, number, taken + 1)\n", EmittedHazard),
    (RS, ORDER, r"        roles.order(orders, number + 1, taken)\n", EmittedHazard),
    (RS, rf"({ORDER})", r"\1\1", EmittedHazard),
    (RS, rf"(while taken.*?) +number \+= 1\n({DRAW}{ORDER})", r"\1\2", EmittedHazard),
    (RS, rf"{DRAW}({ORDER} +while)", r"\1taken = tl.program_id(0)\n\2", EmittedHazard),
    (RS, rf"({DRAW})({ORDER} +while)", r"\1\1\3", EmittedHazard),
    # The next order behind what the loader does of the tile before: groups would wait for it, it for them.
    (RS, rf"( +for C_c_part in .*?step \+= 1\n)( +number \+= 1\n{DRAW}{ORDER})", r"\2\1", EmittedHazard),
    (RS, r"token \+= device\.consumer_tile_wait\(.*?\n +\)\n", "pass\n", EmittedError),
    (RS, r"C_t_start \+ token", "C_t_start", EmittedHazard),
    (RS, r"taken, 1, True", "taken, 1", EmittedHazard),
    (RS, r"while taken < 6:", "while taken < 5:", EmittedError),
    (RS, r"claim\(ring, step, 16384\)", "claim(ring, step, 32768)", EmittedHazard),
    (RS, r"claim\(ring, step, 16384\)", "claim(ring, step + 1, 16384)", EmittedHazard),
    (RS, r"C_c_part,\n +a_ring,", "C_c_part, b_ring,", EmittedError),
    (RS, r"(C_partial_128x64,\n[^\n]*?) \* 256 \+", r"\1 * 128 +", EmittedDiffers),
    # The groups: both read every order, and one of them sends the tile on.
    (RS, rf"{ORDERED}\n( +while)", r"taken = tl.program_id(0)\n\1", EmittedError),
    (RS, ORDERED, "taken = roles.ordered(orders, number + 1)", EmittedHazard),
    (RS, rf"({ORDERED})", r"\1; \1", EmittedHazard),
    (RS, rf"(step \+= 8\n +){ORDERED}", r"\1taken += 2", EmittedHazard),
    (RS, rf"(step \+= 8\n( +)){ORDERED}", ONE_READS, EmittedError),
    (RS, r"(taken < 6:\n +if number % 2) == role", r"\1 != role", EmittedHazard),
    (RS, r"(taken < 6:\n +if number) % 2 == role", r"\1 >= 0", EmittedHazard),
    (RS, r"(C_t_start = C_t_at \* 128\n) +roles\.turn\(turns, number\)\n", r"\1", EmittedHazard),
    (RS, r"(at \+= 1\n) +roles\.pass_turn\(turns, number\)\n( +roles\.all)", r"\1\2", EmittedHazard),
    (RS, rf"{FORWARD}{FORWARDED}", r"\2\1", EmittedHazard),
    (RS, FORWARDED, "", EmittedHazard),
    (RS, FORWARDED, r"\1\1", EmittedHazard),
    (RS, r"forwarded\(ring, at, step, 1\)", "forwarded(ring, at, step, 2)", EmittedHazard),
    (RS, r"forwarded\(ring, at, step, 1\)", "forwarded(ring, at + 1, step, 1)", EmittedHazard),
    (RS, r"forwarded\(ring, at, step, 1\)", "forwarded(ring, at, step + 1, 1)", EmittedHazard),
    (RS, r"forwarded\(ring, at, step, 1\)", "forwarded(ring, at, step - 1, 1)", EmittedHazard),
    (RS, r"roles\.forwarded\(ring, at, step, 1\)", "roles.give(ring, at)", EmittedHazard),
    (RS, r"roles\.forwarded\(ring, at, step, 1\)", "roles.give(ring, at - 1, at > step)", EmittedHazard),
    (RS, r"forwarded\(ring, at, step, 1\)", "all_forwarded(ring, at, step)", EmittedHazard),
    (RS, ALL, "", EmittedHazard),
    (RS, ALL, r"\1\1", EmittedHazard),
    (RS, r"all_forwarded\(ring, at, step\)", "all_forwarded(ring, at - 1, step)", EmittedHazard),
    (RS, r"all_forwarded\(ring, at, step\)", "forwarded(ring, at, step, 1)", EmittedHazard),
    (RS, rf"{ALL}{DRAIN}", r"\1", EmittedHazard),
    (RS, rf"{ALL}{DRAIN}( +device\.peer_tile_notify\(.*?\n +\)\n)", r"\1\3\2", EmittedHazard),
    (RS, rf"({ALL}{DRAIN})( +device\.peer_tile_notify\(.*?\n +\)\n)", r"\4\1", EmittedHazard),
    (RS, rf"({ALL}{DRAIN} +device\.peer_tile_notify.*?rank \* 2 \+ )", r"\g<1>1 + ", EmittedError),
    (RS, r"(C_parts_128x64_at3\),\s+)\(rank \+ 1 \+ C_s\) % 4", r"\1(rank + 2 + C_s) % 4", EmittedError),
    (RS, PEERS, r"\1C_parts_128x64_at1, C_parts_128x64_at0", EmittedError),
    (RS, PEERS, r"\1C_parts_128x64_at1", EmittedError),
    (RS, r"(roles\.forward\(.*?)C_t_start,", r"\g<1>128 - C_t_start,", EmittedDiffers),
    (RS, r"(roles\.forward\(.*?)C_t_start,", r"\g<1>C_t_start + 64,", EmittedError),
    (RS, r"(roles\.forward\(.*?)C_c_part,", r"\1C_c_start,", EmittedError),
    (RS, r"(roles\.forward\(.*?a_ring\.index\()slot\)", r"\1roles.take(ring, at - 1))", EmittedHazard),
    (RS, BOX, r"\1b_ring", EmittedHazard),
    (RS, BOX, r"\1C_parts_landing", EmittedHazard),
    (RS, r"(\"C\.parts\", peer=1\)\[rank\], \()128, 64", r"\g<1>64, 64", EmittedError),
    (RS, r"peer=1\)\[rank\]", "peer=2)[rank]", EmittedError),
    # What passes between them.
    (RS, r"orders = roles\.orders\(\)\n", "pass\n", EmittedError),
    (RS, r"orders = roles\.orders\(\)\n", "orders = roles.orders(); orders = roles.orders()\n", Unclear),
    (RS, r"orders = roles\.orders\(\)\n", "orders = turns\n", EmittedHazard),
    (AG, r"step \+= 4\n( +taken)", r"step += 3\n\1", EmittedHazard),
    (AG, r"rank \* 256 \+ A_t_start", "A_t_start", EmittedDiffers),
    (AG, r"A_128x64, A_t_start, A_c_part", "A_128x64, A_t_start, A_c_start", EmittedError),
    (AG, r"A_128x64, A_t_start, A_c_part", "A_128x64, A_t_start + 64, A_c_part", EmittedError),
    (AG, rf"{ALL}{DRAIN}", r"\1", EmittedHazard),
    (AG, r"queue_next\(ctx, (\d+)\)", r"queue_next(ctx, 1 + \1)", EmittedError),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new", "error"), EDITS)
def test_an_edit_is_refused(kernel: str, old: str, new: str, error: type[EmittedError]) -> None:
    program, text = emitted(kernel)
    with pytest.raises(error):
        check(program, changed(text, old, new, re.DOTALL))


def test_other_workers_draw_no_tiles() -> None:
    """A third worker that copies, as all roles agree, would multiply besides: its products wait for its copies."""
    program, text = emitted(RS)
    assert text.count("if tl.program_id(0) < 2:") == 2
    for others in ("< 3", "< 1"):
        with pytest.raises((EmittedDiffers, EmittedHazard)):
            check(program, text.replace("tl.program_id(0) < 2:", f"tl.program_id(0) {others}:"))


def test_a_ring_has_a_slot_beside_those_of_boxes_that_leave() -> None:
    """With two, a group would wait for its third box while the first two wait for the third to be on its way."""
    program, text = emitted(RS)
    few = text.replace(" ring = roles.ring(4, 1)", " ring = roles.ring(2, 1)")
    few = re.sub(r"(roles\.tiles\([AB]_\w+), 4\)", r"\1, 2)", few)
    assert few != text
    with pytest.raises(EmittedHazard, match="all slots"):
        check(program, few)


def test_a_launch_that_copies_nothing_has_no_orders() -> None:
    op = kernels.gemm_rs.build({"M": 512, "K": 128, "N": 256}, world=4)
    tiles = (("K", 64), ("M", 128), ("N", 128))
    program = compile_kernel(op, Schedule(tiles=tiles, emitter="gluon", workers=3))
    text = emit(program)
    check(program, text)
    with pytest.raises(EmittedHazard, match="nothing is drawn"):
        check(
            program,
            text.replace(
                "turns = roles.turns()\n", "turns = roles.turns()\n    orders = roles.orders()\n", 1
            ),
        )


@pytest.mark.parametrize("kernel", [RS, AG])
def test_mutants_of_the_copying_stage_are_refused(kernel: str) -> None:
    program, text = emitted(kernel)
    lines, concerned = text.splitlines(), set()
    for number, line in enumerate(lines, 1):
        if re.search(r"# Stage \w\.push", line):
            end = next(n for n in range(number + 1, len(lines)) if not lines[n].strip())
            concerned |= set(range(number + 1, end + 1))
    assert refused_of(program, text, lambda mutant: mutant.line in concerned) > 30
