"""Words that signal themselves: what they carry and what they do not, in every executor and oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.edits import changed, check
from tests.sim.test_shots import TENSOR, agrees, schedule
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.mutate import mutants
from tilelink.backend.mutate.judge import Trial, judge
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.reference import run as reference
from tilelink.backend.simulate.attack import attack
from tilelink.backend.simulate.explore import explore
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import VerifyError, verify
from tilelink.backend.verify.errors import BoundsError, CoverError, MatchError, RaceError
from tilelink.cli.inputs import random_inputs
from tilelink.errors import Source, TilelinkError
from tilelink.ir import Op, layout, parse_ir, print_ir
from tilelink.schedules import Move, Schedule, ScheduleError

# Each rank stores a tile in the other one, as words, and beside it one as plain data.
PAIR = f"""
program @pair {{bytes = {layout.SLOT_ARENA}, slots = 2, world = 2}} do {{
  extent @N {{value = 16}}
  tensor @A {{dims = [N, N], dtype = "fp32", move = "local", role = "in"}}
  tensor @C {{dims = [N, N], dtype = "fp32", move = "local", role = "out"}}
  tensor @E {{dims = [N, N], dtype = "fp32", move = "local", role = "out"}}
  buffer @B {{dims = [N, N], dtype = "fp32", offset = {layout.WORDS}, space = "symmetric", words = "epoch"}}
  buffer @D {{dims = [N, N], dtype = "fp32", offset = {layout.DATA}, space = "symmetric"}}
  flag @B.ready {{carried = @B, dims = [WORLD], offset = 4096}}
  head {{folded = true}} do {{
  }}
  launch @pair {{after = ["head"], workers = 1}} do {{
    stage @send {{extent = [N, N], tile = [16, 16]}} do (%m: tile, %n: tile) {{
      %a = load @A[%m, %n] : fp32[m, n]
      store @B[%m, %n] (%a) {{peer = (RANK + 1) % WORLD}}
      notify @B.ready[RANK] {{peer = (RANK + 1) % WORLD}}
    }}
    stage @receive {{extent = [N, N], tile = [16, 16]}} do (%i: tile, %j: tile) {{
      wait @B.ready[(RANK + 1) % WORLD]
      %b = load @B[%i, %j] : fp32[i, j]
      store @C[%i, %j] (%b)
    }}
  }}
}}
"""
WHOLE = PAIR.replace("tensor @E", "#").replace("buffer @D", "#")


def pair(*edits: tuple[str, str], text: str = "") -> Op:
    """The program above without its plain part, after some edits."""
    found = text or "\n".join(line for line in WHOLE.splitlines() if "#" not in line)
    for old, new in edits:
        assert found.count(old) == 1, old
        found = found.replace(old, new)
    return parse_ir(found)


def trial(program: Op, calls: int = 3) -> Trial:
    """Whole numbers for the program above: every rank ends with the other one's."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        [{"A": torch.randint(-9, 9, (16, 16), generator=generator).float()} for _ in range(2)]
        for _ in range(calls)
    ]
    names = [op.symbol for op in program.find("tensor") if op["role"] == "out"]
    right = [[dict.fromkeys(names, ranks[1 - r]["A"]) for r in range(2)] for ranks in inputs]
    return Trial(inputs, right)


def compiled(n: int = 16, world: int = 2, tile: int = 8, **move: Any) -> Op:
    """An all-reduce by words, one tile of 8 a task."""
    op = kernels.gemm_ar.build({"M": 16, "K": 8, "N": n}, world=world)
    return compile_kernel(op, words("gemm_ar", tile, workers=2, **move))


def words(kernel: str, tile: int = 16, workers: int = 5, **move: Any) -> Schedule:
    """A schedule whose sums travel as words."""
    given = {"resource": "epilogue", "slots": 2, "signal": "word", **move}
    return schedule(kernel, tile, workers=workers, **given)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_words_give_the_bits_of_the_reference(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from((2, 3, 4, 8)))
    kernel = data.draw(st.sampled_from(sorted(TENSOR)))
    shots = data.draw(st.sampled_from((1, 2)))
    channels = data.draw(st.sampled_from((None, 1, 2)))
    signal = data.draw(st.sampled_from(("word", "sentinel")))
    m, n = data.draw(st.integers(1, 40)), 2 * world * data.draw(st.integers(1, 20))
    chosen = words(kernel, shots=shots, channels=channels, signal=signal)
    agrees(kernel, "simulate", world, m, n, chosen)


@pytest.mark.parametrize(
    ("kernel", "shots"),
    [
        *((kernel, shots) for kernel in ("gemm_ar", "gemm_ar_add") for shots in (1, 2)),
        ("gemm_rs", None),
    ],
)
@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32"))
@pytest.mark.parametrize(("m", "n"), ((16, 64), (128, 24), (3, 40), (32, 8)))
@pytest.mark.parametrize("signal", ("word", "sentinel"))
def test_emitted_words_are_the_program(
    kernel: str, dtype: str, m: int, n: int, shots: int | None, signal: str
) -> None:
    m = m + (-m) % 4 if kernel == "gemm_rs" else m
    name = TENSOR.get(kernel, "C")
    op = getattr(kernels, kernel).build({"M": m, "K": 24, "N": n}, world=4, dtype=dtype)
    move = Move(resource="epilogue", slots=2, signal=signal, shots=shots)
    tiles = tuple((extent, 16) for extent in "KMN")
    program = compile_kernel(op, Schedule(tiles=tiles, workers=5, moves=((name, move),)))
    text = emit(program)
    assert "device.store_words(" in text and "_notify(" not in text and "_wait(" not in text
    found = validate(read_module(Source("emitted.py", text)), program)
    assert found.signals == found.report.waits + found.report.notifies > 0


@pytest.mark.parametrize("signal", ("word", "sentinel"))
def test_every_interleaving_of_three_calls_is_right(signal: str) -> None:
    for shots in (1, 2):
        found = explore(compiled(shots=shots, signal=signal), 3)
        assert found.complete and found.bad is None, found


def test_flights_to_many_ranks_take_no_more_steps_than_a_run_may() -> None:
    op = kernels.gemm_ar.build({"M": 128, "N": 64, "K": 8}, world=8)
    tiles = (("K", 8), ("M", 8), ("N", 16))
    move = Move(resource="epilogue", shots=1, slots=2, signal="word")
    program = run_passes(op, Schedule(tiles=tiles, workers=5, moves=(("C", move),)))
    inputs = [{"A": torch.ones(128, 8), "B": torch.ones(8, 64)} for _ in range(8)]
    inputs = [{name: t.bfloat16() for name, t in given.items()} for given in inputs]
    assert attack(program, [inputs], None, schedules=1) is None


def test_a_program_of_two_ranks_is_right() -> None:
    program = pair()
    verify(program)
    found = trial(program)
    assert attack(program, found.inputs, found.expected, 20, 0) is None
    explored = explore(program, 3)
    assert explored.complete and explored.bad is None


def test_words_release_nothing_but_themselves() -> None:
    """Plain data that is stored before them may not be there when they are."""
    text = PAIR.replace(
        "      notify @B.ready",
        "      store @D[%m, %n] (%a) {peer = (RANK + 1) % WORLD}\n      notify @B.ready",
    ).replace(
        "      store @C[%i, %j] (%b)\n",
        "      store @C[%i, %j] (%b)\n      %d = load @D[%i, %j] : fp32[i, j]\n"
        "      store @E[%i, %j] (%d)\n",
    )
    # Where the flag is raised, it is a release of all that comes before.
    plain = text.replace(f"offset = {layout.WORDS}", "offset = 1048576")
    plain = plain.replace(', words = "epoch"', "").replace("carried = @B, ", "")
    verify(pair(text=plain))
    assert explore(pair(text=plain), 3).bad is None
    program = pair(text=text)
    with pytest.raises(CoverError, match="it releases nothing but them"):
        verify(program)
    found = trial(program)
    failure = attack(program, found.inputs, found.expected, 20, 0)
    assert failure is not None and failure.oracle == "happens-before"
    bad = explore(program, 2).bad
    assert bad is not None and bad.kind == "race"


def test_a_wait_stands_directly_for_the_load_of_its_words() -> None:
    load = "      %b = load @B[%i, %j] : fp32[i, j]\n"
    moved = pair((load, f"      %z = zeros : fp32[i, j]\n      store @C[%i, %j] (%z)\n{load}"))
    with pytest.raises((CoverError, RaceError), match=r"stands between|unordered"):
        verify(moved)
    with pytest.raises(VerifyError):
        verify(pair(("      wait @B.ready[(RANK + 1) % WORLD]\n", "")))
    gone = pair((load, "      %b = zeros : fp32[i, j]\n"))
    with pytest.raises(MatchError, match="no load behind this wait"):
        verify(gone)


def test_a_word_is_written_once_and_read_where_it_is_written() -> None:
    store = "      store @B[%m, %n] (%a) {peer = (RANK + 1) % WORLD}\n"
    with pytest.raises(RaceError, match="written once"):
        verify(pair((store, store + store)))
    half = pair(("[N, N], tile = [16, 16]} do (%m", "[8, N], tile = [8, 16]} do (%m"))
    with pytest.raises(TilelinkError, match="no rank writes it"):
        verify(half)
    found = trial(half)
    assert attack(half, found.inputs, found.expected, 3, 0) is not None
    bad = explore(half, 1).bad
    assert bad is not None and bad.kind == "deadlock"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"offset = {layout.WORDS}", f"offset = {layout.DATA}"),
        (f"offset = {layout.WORDS}", f"offset = {layout.WORDS + layout.SLOT_WORDS - 1024}"),
        (', words = "epoch"', ""),
        ('dtype = "fp32", offset', 'dtype = "int32", offset'),
        ("carried = @B, ", ""),
        ("load @B[%i, %j]", "load @B[%i, %j] {via = \"tma\"}"),
        ("notify @B.ready[RANK] {", 'notify @B.ready[RANK] {order = "relaxed", '),
        ("wait @B.ready[(RANK + 1) % WORLD]", "wait @B.ready[(RANK + 1) % WORLD] {proxy = true}"),
        ("slots = 2, ", ""),
        ("head {folded = true}", "head"),
    ],
)  # fmt: skip
def test_words_of_another_form_are_refused(old: str, new: str) -> None:
    if "proxy" in new:
        verify(pair((old, new)))  # a fence more does no harm
        return
    with pytest.raises(VerifyError):
        verify(pair((old, new)))


def test_plain_data_may_not_lie_among_words() -> None:
    text = PAIR.replace(f"offset = {layout.DATA}", f"offset = {layout.WORDS + 2048}")
    with pytest.raises(BoundsError, match="outside the area"):
        verify(pair(text=text))


def test_half_a_word_is_refused() -> None:
    op = kernels.gemm_ar.build({"M": 16, "K": 8, "N": 9}, world=3)
    for shots, why in ((1, "whole words"), (2, "no axis of `C`")):
        with pytest.raises(ScheduleError, match=why):
            run_passes(op, words("gemm_ar", shots=shots))
    # In fp32 every element is a word.
    wide = kernels.gemm_ar.build({"M": 16, "K": 8, "N": 9}, world=3, dtype="fp32")
    compile_kernel(wide, words("gemm_ar", shots=2))


def test_a_sum_of_more_parts_than_are_polled_together_is_refused() -> None:
    most = layout.POLLED
    for world in (most, most + 1):
        op = kernels.gemm_ar.build({"M": 4, "K": 8, "N": 8}, world=world)
        if world == most:
            program = run_passes(op, words("gemm_ar", shots=1))
            emit(program)
            continue
        with pytest.raises(ScheduleError, match="a sum of 32 parts, and at most 31"):
            run_passes(op, words("gemm_ar", shots=1))
    edited = parse_ir(print_ir(program).replace(f"world = {most}", f"world = {most + 1}"))
    with pytest.raises(TilelinkError, match="more than 31 ranks"):
        emit(edited)


@pytest.mark.parametrize(
    "move",
    [
        {"resource": "sm:4", "slots": 2},
        {"resource": "epilogue", "slots": 1},
        {"resource": "copy_engine"},
        {"resource": "epilogue", "slots": 2, "sum": "epilogue"},
    ],
)
def test_words_need_two_slots_and_stores_of_the_epilogue(move: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="signal"):
        Move(signal="word", **move)
    with pytest.raises(ScheduleError, match="signal"):
        Move(signal="bell")
    moved = Schedule(moves=(("C", Move(resource="epilogue", slots=2, signal="word")),))
    assert moved.with_resource("sm:4").move("C") == Move(resource="sm:4", slots=2)
    assert moved.with_resource("epilogue") == moved


def test_words_that_do_not_fit_their_slot_are_refused() -> None:
    large = kernels.gemm_ar.build({"M": 512, "K": 8, "N": 8192}, world=2)
    with pytest.raises(TilelinkError, match="words do not fit a slot"):
        run_passes(large, words("gemm_ar", tile=128, shots=1))


def test_nothing_is_counted() -> None:
    program = compiled(n=64, shots=2, channels=1)
    counts = [op.get("count") for op in program.walk() if op.name == "notify"]
    assert max(count for count in counts if count is not None) > 1
    assert not program.find("counter")
    assert "through" not in print_ir(program.with_attrs(kernel_text=None))


@pytest.mark.parametrize("shots", (1, 2))
@pytest.mark.parametrize("signal", ("word", "sentinel"))
def test_mutants_are_refused_and_found(shots: int, signal: str) -> None:
    op = kernels.gemm_ar.build({"M": 16, "K": 8, "N": 16}, world=2)
    program = compile_kernel(op, words("gemm_ar", 8, workers=2, shots=shots, signal=signal))
    calls = [random_inputs(op, seed) for seed in range(3)]
    inputs = [[{k: v.round() for k, v in rank.items()} for rank in call] for call in calls]
    found = Trial(inputs, [reference(op, given) for given in inputs], op)
    names = set()
    for mutant in mutants(program):
        verdict = judge(mutant, found)
        assert not verdict.survivors, (mutant.name, mutant.description, verdict)
        names.add(mutant.name)
    assert {"unpolled", "emptying"} <= names


EDITS = (
    r"store_words\(\s*\w+,\s*ctx\.epoch",
    (r"(store_words\(\s*\w+,\s*)ctx\.epoch", r"\1ctx.epoch + 1"),
    (r"(store_words\(\s*\w+,\s*)ctx\.epoch", r"\1ctx.epoch - 2"),
    (r"(store_words\(\s*\w+,\s*)ctx\.epoch", r"\g<1>0"),
    (r"slot \* 16777216", "(slot + 1) * 16777216"),
    r" \+ slot \* 16777216",
    (r"slot \* 16777216", "slot * 33554432"),
    (r", tl\.int64\)", ", tl.bfloat16)"),
    (r"(device\.store_words\((?:[^,]+,){5}\s*)None", r"\g<1>8"),
    (r"(device\.store_words\((?:[^,]+,){6}\s*)None", r"\g<1>4"),
    (r"(device\.sum_words\((?:[^,]+,){7}\s*)None", r"\g<1>8"),
    (r"(device\.sum_words\((?:[^,]+,){8}\s*)None", r"\g<1>4"),
    (r"(device\.sum_words\((?:[^,]+,){2}\s*)", r"\g<1>16 + "),
    (r"(device\.sum_words\((?:[^,]+,){10}\s*)2", r"\g<1>1"),
    (r"(device\.sum_words\((?:[^,]+,){11}\s*)(\d+)", r"\g<1>2 * \2"),
    (r"(device\.sum_words\((?:[^,]+,){11}\s*)(\d+)", r"\g<1>0 * \2"),
    (r"(device\.sum_words\((?:[^,]+,){6}\s*)tl\.bfloat16", r"\g<1>tl.float16"),
    (r"(device\.sum_words\((?:[^,]+,){13}\s*)", r"\g<1>1 + "),
    (r"c = acc\.to\(tl\.bfloat16\)", "c = acc"),
    (r"c = acc\.to\(tl\.bfloat16\)", "c = acc.to(tl.float16)"),
    (r"device\.store_words\(", "tl.store("),
)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_text_is_refused(edit: str | tuple[str, str]) -> None:
    op = kernels.gemm_ar.build({"M": 16, "K": 16, "N": 64}, world=2)
    program = compile_kernel(op, words("gemm_ar", 16, workers=2, shots=2))
    text = emit(program)
    check(program, text)
    old, new = (edit, "") if isinstance(edit, str) else edit
    edited = changed(text, old, new)
    with pytest.raises((EmittedError, SyntaxError)):
        check(program, edited)
