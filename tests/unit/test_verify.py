"""The proof accepts what is right and refuses what is not, at the access that would go wrong."""

import time

import pytest

from tests.unit.verify_programs import NAMES, resized, text_of
from tilelink.backend.mutate import deletions
from tilelink.backend.verify import (
    BoundsError,
    CoverError,
    DataflowError,
    FenceError,
    MatchError,
    ProgressError,
    RaceError,
    ReuseError,
    UndecidedError,
    VerifyError,
    verify,
)
from tilelink.errors import Span
from tilelink.ir import Op, op_line, parse_ir

ACCESSES = ("load", "load_sum", "store", "transfer", "collective")


def is_access(program: Op, span: Span | None) -> bool:
    return any(op.span == span and op.name in ACCESSES for op in program.walk())


@pytest.mark.parametrize("name", NAMES)
def test_every_program_is_accepted_and_every_deletion_refused(name: str) -> None:
    program = parse_ir(text_of(name), name)
    report = verify(program)
    assert report.world == program["world"]
    lines = [op_line(op) for op in program.walk() if op.name in ("wait", "notify")]
    tried = 0
    for line, mutant in deletions(program):
        assert line.startswith(lines[tried])
        tried += 1
        with pytest.raises(VerifyError) as caught:
            verify(mutant)
        assert is_access(program, caught.value.span), (line, str(caught.value))
        assert "rank" in str(caught.value)
    assert tried == len(lines)
    assert (tried > 0) == (not name.endswith("collective"))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("shard", "tile"), [(16, (8, 16)), (20, (8, 16)), (7, (16, 32))])
@pytest.mark.parametrize("name", [n for n in NAMES if ".sm" not in n and "_ar" not in n])
def test_other_worlds_and_tiles_that_do_not_divide(
    name: str, world: int, shard: int, tile: tuple[int, int]
) -> None:
    program = parse_ir(resized(name, world, shard, 40, 24, tile), name)
    assert verify(program).world == world
    if world == 1:
        return
    for line, mutant in deletions(program):
        with pytest.raises(VerifyError):
            verify(mutant)
            pytest.fail(line)


# (program, what is replaced, by what, the error, a part of its text)
WRONG = [
    # A transfer to another peer than the one that is told.
    (
        "ag_gemm.copy_engine",
        "peer = (RANK + s) % WORLD, to",
        "peer = (RANK + s + 1) % WORLD, to",
        DataflowError,
        "",
    ),
    # The flag is raised at another peer than the data goes to.
    (
        "ag_gemm.copy_engine",
        "notify @A.ready[RANK, 0] {peer = (RANK + s) % WORLD}",
        "notify @A.ready[RANK, 0] {peer = (RANK + s + 1) % WORLD}",
        CoverError,
        "",
    ),
    # The right place in nobody's eyes: past the end, or another rank's slot.
    (
        "ag_gemm.copy_engine",
        "RANK * 16..RANK * 16 + 16",
        "RANK * 16 + 16..RANK * 16 + 32",
        BoundsError,
        "past the end",
    ),
    (
        "ag_gemm.copy_engine",
        "RANK * 16..RANK * 16 + 16",
        "(RANK + 1) % WORLD * 16..(RANK + 1) % WORLD * 16 + 16",
        VerifyError,
        "A.all",
    ),
    # A flag of another source.
    (
        "ag_gemm.copy_engine",
        "wait @A.ready[m.start / 16, 0]",
        "wait @A.ready[(m.start / 16 + 1) % WORLD, 0]",
        CoverError,
        "A.all",
    ),
    # `if` dropped: a flag that nobody raises.
    ("ag_gemm.copy_engine", " {if = m.start / 16 != RANK}", "", MatchError, "never notified"),
    # Own data where a peer's is meant, and the other way round.
    (
        "ag_gemm.copy_engine",
        "when = m.start / 16 == RANK",
        "when = m.start / 16 == 0",
        BoundsError,
        "past the end",
    ),
    ("ag_gemm.copy_engine", "when = m.start / 16 == RANK", "when = 0", DataflowError, "A.all"),
    ("ag_gemm.copy_engine", "m.start - RANK * 16", "m.start % 8", DataflowError, "another part"),
    (
        "ag_gemm.copy_engine",
        "load @A.all[%m, %k]",
        "load @A.all[%m at (m.start + 8) % M, %k]",
        VerifyError,
        "A.all",
    ),
    # Not after `head`.
    ("ag_gemm.copy_engine", 'stream @copy {after = ["head"]}', "stream @copy", FenceError, "head"),
    # Counts.
    (
        "gemm_rs.copy_engine",
        "% WORLD, 0] {count = 6}",
        "% WORLD, 0] {count = 5}",
        CoverError,
        "C.partial",
    ),
    (
        "gemm_rs.copy_engine",
        "% WORLD, 0] {count = 6}",
        "% WORLD, 0] {count = 7}",
        CoverError,
        "C.partial",
    ),
    (
        "gemm_rs.copy_engine",
        "wait @C.done[RANK, 0] {count = 6}",
        "wait @C.done[RANK, 0] {count = 1}",
        CoverError,
        "C.partial",
    ),
    ("gemm_ar.epilogue", "count = 3", "count = 2", CoverError, "C.parts"),
    ("gemm_ar.epilogue", "count = 3", "count = 4", CoverError, "C.parts"),
    (
        "gemm_ar.epilogue",
        "through = @C.arrived[d.1, m.start / 16]",
        "through = @C.arrived[0, m.start / 16]",
        MatchError,
        "more than this element",
    ),
    ("gemm_ar.epilogue", ", through = @C.arrived[d.1, m.start / 16]", "", FenceError, "through"),
    # Slices.
    (
        "gemm_rs.copy_engine",
        "@C.partial[(RANK + s.1) % WORLD * 16..(RANK + s.1) % WORLD * 16 + 16, :]",
        "@C.partial[RANK * 16..RANK * 16 + 16, :]",
        VerifyError,
        "C.parts",
    ),
    (
        "gemm_rs.copy_engine",
        "to = @C.parts[RANK, :, :]",
        "to = @C.parts[(RANK + 1) % WORLD, :, :]",
        VerifyError,
        "C.parts",
    ),
    (
        "gemm_rs.copy_engine",
        "own = @C.partial[%m.1, %n.1]",
        "own = @C.partial[%m.1 at (m.1.start + 16) % M, %n.1]",
        VerifyError,
        "C.partial",
    ),
    (
        "gemm_rs.copy_engine",
        "%m.1 at m.1.start - RANK * 16, %n.1] {own",
        "%m.1 at (m.1.start + 8) % 16, %n.1] {own",
        DataflowError,
        "another tile",
    ),
    (
        "gemm_rs.copy_engine",
        "store @C[%m.1 at m.1.start - RANK * 16",
        "store @C[%m.1 at (m.1.start + 8) % 16",
        DataflowError,
        "another part",
    ),
    (
        "gemm_rs.epilogue",
        "{peer = m.start / 16}",
        "{peer = 3 - m.start / 16}",
        VerifyError,
        "C.parts",
    ),
    (
        "gemm_rs.epilogue",
        "store @C.parts[RANK, %m at",
        "store @C.parts[(RANK + 1) % WORLD, %m at",
        DataflowError,
        "another rank's",
    ),
    # An output in part only; a contribution for a sum.
    (
        "ag_gemm.copy_engine",
        "stage @gemm {extent = [M, N]",
        "stage @gemm {extent = [M, N - 16]",
        DataflowError,
        "never written",
    ),
    (
        "gemm_rs.copy_engine",
        "store @C[%m.1 at m.1.start - RANK * 16, %n.1] (%s)",
        "%z = load @C.partial[%m.1, %n.1] : bf16[m.1, n.1]\n store @C[%m.1 at m.1.start - RANK * 16, %n.1] (%z)",
        DataflowError,
        "one rank's contribution",
    ),
    # A notify that nothing waits for.
    (
        "gemm_ar.epilogue",
        "wait @C.ready[0..WORLD, m.1.start / 16]",
        "wait @C.ready[0..WORLD, m.1.start / 16]\n notify @C.arrived[0, 0]",
        MatchError,
        "",
    ),
    # A peer's private memory.
    (
        "ag_gemm.copy_engine",
        'offset = 262144, space = "symmetric"',
        'offset = 262144, space = "local"',
        BoundsError,
        "symmetric",
    ),
    # Collectives without their neighbours.
    ("ag_gemm.collective", 'after = ["A"]', 'after = ["head"]', CoverError, "A.all"),
    ("gemm_rs.collective", 'after = ["gemm_rs"]', 'after = ["head"]', CoverError, "C.partial"),
    # Areas.
    (
        "gemm_rs.copy_engine",
        'offset = 262144, space = "local"',
        'offset = 267776, space = "symmetric"',
        BoundsError,
        "overlaps",
    ),
    ("gemm_rs.copy_engine", "offset = 131072", "offset = 4096", BoundsError, "area"),
    # Workers.
    ("gemm_rs.sm", "[WORLD - 1, 2]", "[RANK + 1, 2]", UndecidedError, "made of the program's"),
    ("ag_gemm.sm", "workers = [0, 2]", "workers = [2, 2]", ProgressError, "no worker"),
    ("gemm_rs.copy_engine", "workers = 4", "resident = 2, workers = 4", ProgressError, "resident"),
    ("gemm_ar.epilogue", "workers = 4", "resident = 3, workers = 4", ProgressError, "resident"),
]


@pytest.mark.parametrize(("name", "old", "new", "error", "part"), WRONG)
def test_a_wrong_program_is_refused(
    name: str, old: str, new: str, error: type[VerifyError], part: str
) -> None:
    text = text_of(name)
    assert old in text
    with pytest.raises(error) as caught:
        verify(parse_ir(text.replace(old, new, 1), name))
    assert part in str(caught.value)
    assert caught.value.span is not None


def swapped(text: str, first: str, second: str) -> str:
    """``text`` with the line that starts with ``first`` and the next that starts with ``second`` swapped."""
    lines = text.split("\n")
    a = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    b = next(i for i, line in enumerate(lines) if i > a and line.strip().startswith(second))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("ag_gemm.copy_engine", "transfer", "notify @A.ready"),
        ("ag_gemm.sm", "transfer", "notify @A.ready"),
        ("gemm_rs.copy_engine", "store @C.partial", "notify @C.done"),
        ("gemm_rs.copy_engine", "transfer", "notify @C.ready"),
        ("gemm_rs.copy_engine", "wait @C.done[(RANK", "transfer"),
        ("gemm_rs.copy_engine", "wait @C.ready[0", "%s = load_sum"),
        ("gemm_ar.epilogue", "store @C.parts", "notify @C.ready"),
        ("gemm_rs.sm", "wait @C.done", "transfer"),
    ],
)
def test_the_order_of_access_and_synchronisation_matters(
    name: str, first: str, second: str
) -> None:
    program = parse_ir(swapped(text_of(name), first, second), name)
    with pytest.raises(CoverError) as caught:
        verify(program)
    assert is_access(program, caught.value.span)


def test_the_witness_of_an_unsafe_reuse_names_both_accesses() -> None:
    text = text_of("ag_gemm.copy_engine")
    with pytest.raises(ReuseError) as caught:
        verify(parse_ir(text.replace("notify @ack[RANK] {peer = p}", ""), "p"))
    shown = str(caught.value)
    assert "transfer @A" in shown
    assert "`load` reads @A.all" in shown
    assert "`transfer` writes @A.all" in shown


def test_two_writers_of_one_place_race() -> None:
    text = text_of("ag_gemm.copy_engine").replace(
        "store @C[%m, %n] (%c)", "store @C[%m, %n at 0] (%c)"
    )
    with pytest.raises(RaceError):
        verify(parse_ir(text, "p"))


def moved(text: str, agent: str, before: str) -> str:
    """``text`` with the top-level block that starts with ``agent`` put in front of the one ``before``."""
    lines = text.split("\n")
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"  {agent}"))
    end = next(i for i in range(begin, len(lines)) if lines[i] == "  }") + 1
    block, rest = lines[begin:end], lines[:begin] + lines[end:]
    at = next(i for i, line in enumerate(rest) if line.startswith(f"  {before}"))
    return "\n".join(rest[:at] + block + rest[at:])


def test_a_stream_in_front_of_the_launch_it_waits_for_is_a_deadlock() -> None:
    text = moved(text_of("gemm_rs.copy_engine"), "stream @copy", "launch @gemm_rs")
    with pytest.raises(ProgressError, match="hardware queue") as caught:
        verify(parse_ir(text, "p"))
    assert "@C.done" in str(caught.value)


def test_a_stage_that_waits_for_a_later_stage_is_a_deadlock_with_its_cycle() -> None:
    text = text_of("gemm_rs.sm")
    start, middle = text.index("    stage @push"), text.index("    stage @sum")
    end = text.index("    finish")
    text = text[:start] + text[middle:end] + text[start:middle] + text[end:]
    with pytest.raises(ProgressError, match="circle") as caught:
        verify(parse_ir(text, "p"))
    shown = str(caught.value)
    assert "stage @sum on rank 0" in shown
    assert "stage @push" in shown
    assert "@C.ready" in shown


def test_ranks_that_each_want_the_other_first_are_a_deadlock() -> None:
    text = text_of("ag_gemm.sm").replace(
        "      for_range {hi = WORLD, lo = 1} do (%s: int32) {",
        "      wait @A.ready[(RANK + 1) % WORLD, 0..2]\n"
        "      for_range {hi = WORLD, lo = 1} do (%s: int32) {",
    )
    with pytest.raises(ProgressError, match="circle") as caught:
        verify(parse_ir(text, "p"))
    notes = "\n".join(caught.value.notes)
    assert all(f"rank {rank}" in notes for rank in range(4))


def test_a_program_of_many_tiles_takes_less_than_a_second() -> None:
    text = resized("ag_gemm.copy_engine", 8, 1024, 8192, 7168, (128, 256), workers=132)
    program = parse_ir(text, "p")
    begin = time.perf_counter()
    report = verify(program)
    assert time.perf_counter() - begin < 1.0
    assert report.tiles == 8 * 64 * 28
    assert report.workspace_bytes == 8192 * 8192 * 2
    assert report.transfers == 8 * 7
