"""Words that hold a sentinel until they are there: whoever reads them puts it back, and what happens if not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.edits import changed, check
from tests.sim.test_words import WHOLE, compiled, pair, trial, words
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.expand import bytes_of, environment
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate.attack import attack
from tilelink.backend.simulate.explore import explore
from tilelink.backend.validate import EmittedError
from tilelink.backend.verify import verify
from tilelink.backend.verify.errors import BoundsError, RaceError, ReuseError, UndecidedError
from tilelink.errors import TilelinkError
from tilelink.ir import Op, layout
from tilelink.schedules import Move, Schedule

LOAD = "      %b = load @B[%i, %j] {empty = true} : fp32[i, j]\n"
CAST = "      %b = cast (%y) : fp32[i, j]\n"


def lamport(*edits: tuple[str, str]) -> Op:
    """The program of two ranks that each store a tile in the other one, announced by sentinels."""
    text = "\n".join(line for line in WHOLE.splitlines() if "#" not in line)
    text = text.replace(f"offset = {layout.WORDS}", f"offset = {layout.SENTINELS}")
    text = text.replace('words = "epoch"', 'words = "sentinel"')
    text = text.replace("      %b = load @B[%i, %j] : fp32[i, j]\n", LOAD)
    return pair(*edits, text=text)


def fails(program: Op, calls: int = 4) -> tuple[str, str]:
    """The oracle of the simulator and the kind of exploration's finding; "" where one finds nothing."""
    given = trial(program, calls)
    failure = attack(program, given.inputs, given.expected, 20, 0)
    bad = explore(program, calls).bad
    return failure.oracle if failure else "", bad.kind if bad else ""


def test_a_program_that_empties_what_it_reads_is_right() -> None:
    program = lamport()
    verify(program)
    given = trial(program, 5)
    assert attack(program, given.inputs, given.expected, 40, 0) is None
    explored = explore(program, 4)
    assert explored.complete and explored.bad is None


def test_data_alone_takes_no_more_bytes_than_it_has() -> None:
    for signal, times in (("word", 2), ("sentinel", 1)):
        program = compiled(shots=2, signal=signal)
        env = environment(program)
        assert {bytes_of(b, env) for b in program.find("buffer")} == {16 * 16 * 2 * times}


def test_what_is_not_emptied_is_taken_for_data_two_calls_later() -> None:
    program = lamport((" {empty = true}", ""))
    with pytest.raises(ReuseError, match="leaves them there"):
        verify(program)
    oracle, found = fails(program)
    assert oracle and found
    # Within two calls no place is used again, and nothing shows.
    assert explore(program, 2).bad is None


def test_what_nobody_reads_is_not_emptied() -> None:
    """Half of what is sent stays in the place."""
    half = lamport(
        ("[N, N], tile = [16, 16]} do (%i", "[8, N], tile = [8, 16]} do (%i"),
    )
    with pytest.raises(TilelinkError, match="nobody reads it"):
        verify(half)


def test_a_word_is_read_by_one_load() -> None:
    again = LOAD.replace("%b", "%a.again")
    for first, second in ((again, LOAD), (again.replace(" {empty = true}", ""), LOAD)):
        program = lamport((LOAD, first + second))
        with pytest.raises(RaceError, match="read once"):
            verify(program)
    oracle, found = fails(lamport((LOAD, again + LOAD)))
    assert oracle and found == "deadlock"
    # Looking first and taking then is more than the proof takes, and harmless.
    oracle, found = fails(lamport((LOAD, again.replace(" {empty = true}", "") + LOAD)))
    assert (oracle, found) == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (f"offset = {layout.SENTINELS}", f"offset = {layout.WORDS}", BoundsError),
        (f"offset = {layout.SENTINELS}", f"offset = {layout.DATA}", BoundsError),
        (f"offset = {layout.SENTINELS}", f"offset = {layout.SLOT_ARENA - 1024}", BoundsError),
        ('words = "sentinel"', 'words = "epoch"', UndecidedError),
        (', words = "sentinel"', "", UndecidedError),
        ("slots = 2, ", "", TilelinkError),
        ("load @A[%m, %n]", "load @A[%m, %n] {empty = true}", UndecidedError),
    ],
)
def test_sentinels_of_another_form_are_refused(old: str, new: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(lamport((old, new)))


def test_rows_are_of_whole_words() -> None:
    """A row that ends within a word would share it with the next."""
    narrow = lamport(
        ('buffer @B {dims = [N, N], dtype = "fp32"', 'buffer @B {dims = [N, 17], dtype = "bf16"'),
        ("%a = load @A[%m, %n]", "%z = load @A[%m, %n]"),
        ("      store @B", "      %a = cast (%z) : bf16[m, n]\n      store @B"),
        (LOAD, LOAD.replace("%b", "%y").replace("fp32", "bf16") + CAST),
    )
    with pytest.raises(BoundsError, match="not whole words"):
        verify(narrow)


def test_sums_that_do_not_fit_their_slot_are_refused() -> None:
    large = kernels.gemm_ar.build({"M": 1024, "K": 8, "N": 8192}, world=2)
    with pytest.raises(TilelinkError, match="words do not fit a slot"):
        run_passes(large, words("gemm_ar", tile=128, shots=2, signal="sentinel"))
    run_passes(
        kernels.gemm_ar.build({"M": 512, "K": 8, "N": 8192}, world=2),
        words("gemm_ar", tile=128, shots=2, signal="sentinel"),
    )


EMPTY = r"device\.empty_words\((?:[^()]|\([^()]*\))*\)"
EDITS = (
    EMPTY,
    (f"({EMPTY})", r"\1; \1"),
    (r"(empty_words\((?:[^,]+,){1}\s*)", r"\g<1>16 + "),
    (r"(empty_words\((?:[^,]+,){6}\s*)None", r"\g<1>8"),
    (r"(empty_words\((?:[^,]+,){7}\s*)None", r"\g<1>8"),
    (r"(empty_words\((?:[^,]+,){9}\s*)2", r"\g<1>1"),
    (r"(empty_words\((?:[^,]+,){10}\s*)(\d+)", r"\g<1>0 * \2"),
    (r"(empty_words\((?:[^,]+,){10}\s*)(\d+)", r"\g<1>2 * \2"),
    (r"(empty_words\(\s*)C_parts", r"\1C_all"),
    (r"(empty_words\((?:[^,]+,){5}\s*)tl\.bfloat16", r"\1tl.float16"),
    (r"(store_words\(\s*\w+,\s*)None", r"\1ctx.epoch"),
    (r"slot \* 16777216", "(slot + 1) * 16777216"),
    (r", tl\.int32\)", ", tl.int64)"),
    (r"device\.store_words\(", "tl.store("),
)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_text_is_refused(edit: str | tuple[str, str]) -> None:
    text, program = emitted()
    old, new = (edit, "pass") if isinstance(edit, str) else edit
    edited = changed(text, old, new)
    with pytest.raises((EmittedError, SyntaxError)):
        check(program, edited)


def test_what_is_emptied_before_it_is_read_or_behind_the_loop_is_refused() -> None:
    text, program = emitted()
    found = re.search(rf"\n( +)({EMPTY})", text)
    assert found is not None
    indent, call = found.group(1), found.group(2)
    without = text.replace(found.group(0), "", 1)
    before = without.index(f"{indent}C_part = device.sum_words(")
    late = without.index("\n    # Stage C.sum.")
    for at, moved in ((before, f"{indent}{call}\n"), (late, f"\n    {call}\n")):
        changed = without[:at] + moved + without[at:]
        with pytest.raises(EmittedError):
            check(program, changed)


def emitted() -> tuple[str, Op]:
    """An all-reduce in two shots as text, and its program."""
    op = kernels.gemm_ar.build({"M": 16, "K": 16, "N": 64}, world=2)
    program = compile_kernel(op, words("gemm_ar", 16, workers=2, shots=2, signal="sentinel"))
    text = emit(program)
    check(program, text)
    return text, program


@pytest.mark.parametrize(
    "move",
    [{"resource": "sm:4", "slots": 2}, {"resource": "epilogue"}, {"resource": "copy_engine"}],
)
def test_sentinels_need_two_slots_and_stores_of_the_epilogue(move: dict[str, Any]) -> None:
    with pytest.raises(TilelinkError, match="`sentinel` goes with"):
        Move(signal="sentinel", **move)
    moved = Schedule(moves=(("C", Move(resource="epilogue", slots=2, signal="sentinel")),))
    assert Schedule.from_json(moved.to_json()) == moved
    assert moved.with_resource("sm:4").move("C") == Move(resource="sm:4", slots=2)
