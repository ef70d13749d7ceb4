"""`equivalent` judges mutants: hand-made mistakes of every kind of bug, and edits that change nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.assurance.exhaustive import MOVED, TILE
from tests.strategies import move_of
from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate.explore import equivalent
from tilelink.ir import Op, parse_ir, print_ir, rewrite
from tilelink.schedules import Schedule

WORKERS = 2


@cache
def intact(name: str) -> tuple[Op, Op, str]:
    """The kernel, its fused program for two ranks with one tile, two steps of K, and that as text."""
    kernel, resource = name.split(".")
    rows = TILE * (1 if kernel == "gemm_ar" else 2)
    extents = {"M": rows, "K": 2 * TILE, "N": TILE}
    op = getattr(kernels, kernel).build(extents, world=2)
    tiles = (("K", TILE), ("M", TILE), ("N", TILE))
    moves = ((MOVED[kernel], move_of(resource)),)
    program = run_passes(op, Schedule(tiles=tiles, workers=WORKERS, group=1, moves=moves))
    return op, program, print_ir(program)


def edited(name: str, *changes: tuple[str, str]) -> Op:
    """The program with texts replaced, each of which stands in it."""
    text = intact(name)[2]
    for old, new in changes:
        assert old in text and old != new, (old, text)
        text = text.replace(old, new)
    return parse_ir(text, name)


AG, RS, AR = "ag_gemm.copy_engine", "gemm_rs.copy_engine", "gemm_ar.epilogue"
SM, LIBRARY = "ag_gemm.sm:1", "ag_gemm.none"
READY = "wait @A.ready[m.start / 16, 0] {if = m.start / 16 != RANK, proxy = true}"
ACKS = "wait @ack[0..WORLD] {epoch = (0 - 1)}"
SENT = "notify @A.ready[RANK, 0] {peer = (RANK + A.s) % WORLD}"
PUSH = (
    "transfer @A[0..16, :] {peer = (RANK + A.s) % WORLD, to = @A.all[RANK * 16..RANK * 16 + 16, :]}"
)
DONE = "notify @C.done[m.start / 16, 0] {delay = 1, drain = true}"
PARTIAL = 'store @C.partial[%m, %n] (%c) {via = "tma"}'
STORE = "store @C.parts[RANK, %m, %n] (%c) {peer = (RANK + 1 + C.d) % WORLD}"
HERE = "notify @C.ready[RANK, 0] {peer = C.p}"
# The two change places, each in the other's loop over the peers.
STORED_LATE = STORE.replace("C.d", "C.p")
HERE_EARLY = HERE.replace("C.p", "C.d")
SUM_WAIT = "wait @C.ready[0..WORLD, 0]"
LOAD_B = '%b = load @B[%k, %n] {via = "tma"} : bf16[k, n]'
Change = tuple[str, str]

# The mistake, the program, its edits, and the kind of what is wrong with it.
BROKEN: list[tuple[str, str, list[Change], str]] = [
    ("a wait acquires nothing", AG, [(READY, READY[:-1] + ', order = "relaxed"}')], "race"),
    ("a notify releases nothing", RS, [(DONE, DONE[:-1] + ', order = "relaxed"}')], "race"),
    ("gpu scope between ranks", AR, [(HERE, HERE[:-1] + ', scope = "gpu"}')], "race"),
    (
        "no CTA barrier in front of the release",
        AR,
        [(HERE, HERE[:-1] + ", barrier = false}")],
        "race",
    ),
    (
        "notified before the store",
        AR,
        [(STORE, "#"), (HERE, STORED_LATE), ("#", HERE_EARLY)],
        "race",
    ),
    ("no proxy fence behind the wait", AG, [(", proxy = true", "")], "race"),
    ("the TMA store is not drained", RS, [(", drain = true", ""), ("{drain = true}", "")], "race"),
    (
        "`head` clears a flag that a peer sets",
        AG,
        [("[WORLD, 1], offset", "[WORLD, 1], cleared = true, offset")],
        "deadlock",
    ),
    (
        "a counter keeps its old count",
        RS,
        [("counter @C.done {", "counter @C.done {cleared = false, ")],
        "race",
    ),
    (
        "the signal of the call before will do",
        AG,
        [("{if = m.start / 16", "{epoch = (0 - 1), if = m.start / 16")],
        "race",
    ),
    (
        "waits for the next call's signal",
        AG,
        [("{if = m.start / 16", "{epoch = 1, if = m.start / 16")],
        "deadlock",
    ),
    (
        "only an exact word is taken",
        AG,
        [("{epoch = (0 - 1)}", '{compare = "equal", epoch = (0 - 2)}')],
        "deadlock",
    ),
    (
        "spinning CTAs keep out the one they wait for",
        SM,
        [("stages = 3, warps", "resident = 1, stages = 3, warps")],
        "deadlock",
    ),
    (
        "the copies are over before the launch begins",
        RS,
        [('launch @gemm_rs {after = ["head"]', 'launch @gemm_rs {after = ["C.copy"]')],
        "deadlock",
    ),
    (
        "copies start beside `head`",
        AG,
        [('stream @A.copy {after = ["head"]}', "stream @A.copy")],
        "race",
    ),
    ("nobody waits for acknowledgements", AG, [(ACKS, "")], "race"),
    (
        "only the own acknowledgement is waited for",
        AG,
        [("wait @ack[0..WORLD]", "wait @ack[RANK]")],
        "race",
    ),
    ("one rank sends no signal", AG, [(SENT, SENT[:-1] + ", if = RANK != 0}")], "deadlock"),
    (
        "one rank sends no data",
        AG,
        [(PUSH, PUSH.replace("{peer", "{if = RANK != 0, peer"))],
        "version",
    ),
    (
        "one rank copies half",
        AG,
        [
            ("transfer @A[0..16, :]", "transfer @A[0..16 - RANK * 8, :]"),
            ("RANK * 16..RANK * 16 + 16", "RANK * 16..RANK * 16 + 16 - RANK * 8"),
        ],
        "version",
    ),
    ("a signal twice in one call", AG, [(SENT, SENT + "\n" + SENT)], "unbalanced"),
    ("the wait is gone", AG, [(READY, "")], "race"),
    (
        "an index past the end",
        AG,
        [("to = @A.all[RANK * 16..RANK * 16 + 16", "to = @A.all[RANK * 32..RANK * 32 + 16")],
        "bounds",
    ),
    (
        "a step of the product is left out",
        AG,
        [("{extent = [K], tile = [16]}", "{extent = [K - 16], tile = [16]}")],
        "values",
    ),
    (
        "flags share a word",
        AG,
        [("[WORLD, 1], offset = 4096", "[WORLD, 1], offset = 516")],
        "bounds",
    ),
    (
        "a flag on the words of control",
        AG,
        [("[WORLD], offset = 512", "[WORLD], offset = 0")],
        "bounds",
    ),
    (
        "read above the wait",
        AR,
        [
            (SUM_WAIT, "#"),
            (" : bf16[m.C.0, n.C.1]", " : bf16[m.C.0, n.C.1]\n" + SUM_WAIT),
            ("#", ""),
        ],
        "race",
    ),
    ("a notify held back is lost", RS, [("flush {drain = true}", "")], "deadlock"),
    ("another peer's flag", AG, [(SENT, "notify @A.ready[RANK, 0] {peer = RANK}")], "deadlock"),
    (
        "a signal that nothing waits for",
        AG,
        [(READY, READY.replace("m.start / 16, 0", "RANK, 0"))],
        "deadlock",
    ),
    ("sent once more behind its signal", AG, [(SENT, SENT + "\n" + PUSH)], "race"),
    (
        "another tile of the weight",
        AG,
        [("load @B[%k, %n]", "load @B[%k at (k.start + 16) % K, %n]")],
        "values",
    ),
    (
        "the landing buffer is read for the own rows",
        AG,
        [("m.start / 16 == RANK} : bf16", "m.start / 16 == WORLD} : bf16")],
        "version",
    ),
    ("counted one short", RS, [("{count = 1}", "{count = 2}")], "deadlock"),
    (
        "a worker writes what another writes",
        AG,
        [("store @C[%m, %n]", "store @C[%m at 0, %n]")],
        "race",
    ),
    (
        "an output that is none",
        AG,
        [
            (
                'tensor @C {dims = [M, N], dtype = "bf16", move = "local", role = "out"}',
                'tensor @C {dims = [M, N], dtype = "bf16", move = "local", role = "temp"}',
            )
        ],
        "values",
    ),
    (
        "an output of another element type",
        AG,
        [('@C {dims = [M, N], dtype = "bf16"', '@C {dims = [M, N], dtype = "fp32"')],
        "values",
    ),
    (
        "the product before the gather is over",
        LIBRARY,
        [('after = ["A"], ', "")],
        "race",
    ),
]

HARMLESS: list[tuple[str, str, list[Change]]] = [
    ("waited for twice", AG, [(READY, READY + "\n" + READY)]),
    ("sent twice before its signal", AG, [(PUSH, PUSH + "\n" + PUSH)]),
    (
        "sent by halves",
        AG,
        [
            (
                PUSH,
                PUSH.replace("0..16", "0..8").replace("16 + 16", "16 + 8")
                + "\n"
                + PUSH.replace("0..16", "8..16").replace("RANK * 16..", "RANK * 16 + 8.."),
            )
        ],
    ),
    ("tiles in another order", AG, [("visit = (RANK + WORLD - i) % WORLD", "visit = i")]),
    (
        "any worker takes the next task",
        AR,
        [("stage @C.gemm {", 'stage @C.gemm {queue = "dynamic", ')],
    ),
    ("one worker", AG, [("workers = 2", "workers = 1")]),
    ("nothing is held back", RS, [("{delay = 1, drain = true}", "{drain = true}")]),
    ("no access through the async proxy", AG, [(', via = "tma"', ""), (", proxy = true", "")]),
    ("a fence that nothing needs", AR, [(SUM_WAIT, SUM_WAIT + " {proxy = true}")]),
    (
        "two waits in another order",
        RS,
        [
            ("wait @C.done[RANK, 0] {count = 1}\n", ""),
            (
                "wait @C.ready[RANK + 1..WORLD, 0]",
                "wait @C.ready[RANK + 1..WORLD, 0]\nwait @C.done[RANK, 0] {count = 1}",
            ),
        ],
    ),
    (
        "the own word need not be waited for",
        AG,
        [(", proxy = true}", ", proxy = true}\nwait @A.ready[0, 0] {if = 0}")],
    ),
    ("exactly the count", RS, [("{count = 1}", '{compare = "equal", count = 1}')]),
    (
        "further up in the arena",
        AG,
        [("bytes = 26", "bytes = 36"), ("offset = 262144", "offset = 270336")],
    ),
    (
        "waits for the acknowledgements word by word",
        AG,
        [(ACKS, "wait @ack[0] {epoch = (0 - 1)}\nwait @ack[1] {epoch = (0 - 1)}")],
    ),
    (
        "a loop over nothing",
        AG,
        [(PUSH, "for_range {hi = 0, lo = 0} do (%z: int32) {\n" + SENT + "\n}\n" + PUSH)],
    ),
    ("another name", AG, [("A.all", "landing")]),
]


@pytest.mark.parametrize(
    ("name", "changes", "kind"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_broken_program_is_not_equivalent(name: str, changes: list[Change], kind: str) -> None:
    op, program, _ = intact(name)
    verdict = equivalent(edited(name, *changes), program, op)
    assert verdict.equivalent is False, verdict
    assert verdict.kind == kind, verdict


@pytest.mark.parametrize(
    ("name", "changes"), [h[1:] for h in HARMLESS], ids=[h[0] for h in HARMLESS]
)
def test_a_harmless_edit_is_equivalent(name: str, changes: list[Change]) -> None:
    op, program, _ = intact(name)
    changed = edited(name, *changes)
    assert equivalent(changed, program, op).equivalent is True, equivalent(changed, program, op)
    assert equivalent(changed, program).equivalent is True


def test_a_stage_that_waits_for_one_behind_it_is_not_equivalent() -> None:
    op, program, _ = intact(RS)

    def turned(launch: Op) -> tuple[Op, ...]:
        if launch.name != "launch":
            return (launch,)
        made, flush, summed, finish = launch.body
        return (launch.with_ops((summed, made, flush, finish)),)

    verdict = equivalent(rewrite(program, turned), program, op)
    assert (verdict.equivalent, verdict.kind) == (False, "deadlock")


def test_a_stream_in_front_of_what_it_waits_for_hangs_one_hardware_queue() -> None:
    op, program, _ = intact(RS)
    block = program.blocks[0]
    launch, stream = block.ops[-2:]
    assert (launch.name, stream.name) == ("launch", "stream")
    mutant = replace(program, blocks=(replace(block, ops=(*block.ops[:-2], stream, launch)),))
    assert equivalent(mutant, program, op, one_queue=False).equivalent is True
    verdict = equivalent(mutant, program, op)
    assert (verdict.equivalent, verdict.kind) == (False, "deadlock")
