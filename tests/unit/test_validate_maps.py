"""Validation of kernels whose maps cut the depth of a product, whose tiles are ragged, and of attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.assurance.emitted import attempt, chosen
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import run_passes
from tilelink.backend.validate.prove import Wanted
from tilelink.ir import Op
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

KERNELS = Path(__file__).parents[1] / "kernels"
TILES = (("K", 32), ("M", 16), ("N", 16), ("S", 16))


def program(
    name: str, extents: dict[str, int], moves: dict[str, str], world: int, file: str = "maps"
) -> Op:
    """The fused program of a kernel of tests/kernels."""
    kernel = load_kernels(KERNELS / f"{file}.py")[name]
    tiles = TILES if file == "maps" else (("S", 16),)
    schedule = Schedule(
        tiles=tiles, workers=4, moves=tuple((n, Move(r)) for n, r in sorted(moves.items()))
    )
    return run_passes(kernel.build(extents, world=world, dtype="bf16"), schedule)


DEPTH = ("ag_over_depth", {"M": 40, "N": 24, "K": 162}, {"A": "copy_engine"}, 3)
CASES = [
    DEPTH,
    ("ag_over_depth", {"M": 40, "N": 24, "K": 54}, {"A": "sm:1"}, 2),
    ("ag_cyclic", {"M": 48, "N": 24, "K": 40}, {"A": "none"}, 4),
    ("ag_zigzag", {"M": 60, "N": 24, "K": 75}, {"A": "copy_engine"}, 3),
    ("ag_inner", {"M": 40, "N": 24, "K": 54}, {"A": "copy_engine"}, 3),
    ("ar_gate", {"M": 24, "N": 20, "K": 40}, {"P": "epilogue", "Q": "epilogue"}, 2),
    ("attention", {"B": 1, "H": 2, "S": 64, "D": 16}, {"K": "copy_engine", "V": "copy_engine"}, 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[3]}")
def test_texts_are_accepted_and_their_mutants_refused(
    case: tuple[str, dict[str, int], dict[str, str], int],
) -> None:
    made = program(*case, file="attention" if case[0] == "attention" else "maps")
    text = emit(made)
    wanted = Wanted(made)
    original, reason = attempt(text, wanted)
    assert not reason
    refused = 0
    for mutant in chosen(text, 40, 0):
        if mutant.kind == "flag":
            continue  # a wait in front of generic loads alone needs no fence
        if mutant.kind == "mask" and "k = tl.load(" in text.splitlines()[mutant.line - 1]:
            continue  # scores of keys past the last are masked too: see below
        if mutant.kind == "swap" and mutant.what.startswith("for P_d in"):
            continue  # the notify of Q releases what is stored of P too, and who reads P waits for both
        if mutant.kind == "swap" and "_all_push_from" in mutant.what:
            continue  # of own rows: the launch that reads them comes behind all of the one that copies them
        print_, reason = attempt(mutant.text, wanted)
        assert reason or print_ == original, f"line {mutant.line} {mutant.kind}: {mutant.what}"
        refused += bool(reason)
    assert refused >= 30


def test_a_depth_that_is_multiplied_with_rows_of_another_rank_is_refused() -> None:
    """All rows are read, each once, and each meets a place of A: that of another rank."""
    made = program("ag_over_depth", {"M": 40, "N": 24, "K": 54}, {"A": "sm:1"}, 2)
    text = emit(made)
    other = "(1 - k_segment) * 27 + k_at * 32"
    assert "b_rows = k_start + tl.arange" in text and "b_rows < k_stop" in text
    turned = text.replace("b_rows = k_start +", f"b_rows = {other} +").replace(
        "b_rows < k_stop", f"b_rows < {other} + (k_stop - k_start)"
    )
    assert "do not belong together" in attempt(turned, made)[1]


def test_a_sum_that_is_multiplied_where_an_operand_belongs_is_refused() -> None:
    made = program(*DEPTH)
    text = emit(made)
    assert "tl.dot(transpose, b, acc)" in text
    assert attempt(text.replace("tl.dot(transpose, b, acc)", "tl.dot(transpose, acc, b)"), made)[1]


def test_keys_are_masked_where_they_are_loaded_or_wherever_they_flow() -> None:
    made = program(*CASES[-1], file="attention")
    text = emit(made)
    mask = ", mask=(k_rows < s_stop)[:, None]"
    assert mask in text
    loose = text.replace(mask, "")
    assert attempt(loose, made)[1] == ""
    scores = ('qk_1_whole = tl.where(qk_1_inside1, qk_1, float("-inf"))', "qk_1_whole = qk_1")
    for masked, plain in (scores, ("p_whole = tl.where(p_inside1, p, 0.0)", "p_whole = p")):
        assert masked in text
        assert "should not" in attempt(loose.replace(masked, plain), made)[1]


ATTENTION = [
    (resource, order, world)
    for resource in ("copy_engine", "sm:1", "none")
    for order in ("row", "arrival")
    for world in (2, 3, 4)
]


@pytest.mark.parametrize(("resource", "order", "world"), ATTENTION)
def test_shards_come_in_any_order(resource: str, order: str, world: int) -> None:
    """A maximum and sums over all of them, and queries that are read again for each."""
    kernel = load_kernels(KERNELS / "maps.py")["softmax_rows"]
    moves = tuple((name, Move(resource)) for name in "KV")
    schedule = Schedule(tiles=(("S", 16),), workers=4, order=order, moves=moves)
    made = run_passes(kernel.build({"S": 32 * world, "D": 16}, world=world), schedule)
    assert attempt(emit(made), made)[1] == ""


@pytest.mark.parametrize("tensor", ["K", "V"])
def test_keys_meet_their_values(tensor: str) -> None:
    """All keys and all values are read, each once, and each key meets a value: that of another rank."""
    made = program("softmax_rows", {"S": 48, "D": 16}, {"K": "none", "V": "none"}, 3)
    text = emit(made)
    read = f"{tensor}_all_16x16.load([s_start, 0])"
    assert read in text and attempt(text, made)[1] == ""
    turned = text.replace(read, f"{tensor}_all_16x16.load([(s_start + 16) % 48, 0])")
    assert "do not belong together" in attempt(turned, made)[1]


def test_parts_of_one_sum_are_not_added_behind_those_of_another() -> None:
    made = program("ar_gate", {"M": 24, "N": 20, "K": 40}, {"P": "epilogue", "Q": "epilogue"}, 2)
    text = emit(made)
    product, part = "mul = sigmoid.to(tl.float32) * cast", "p_1_part1.to(tl.float32)"
    assert product in text and part in text and attempt(text, made)[1] == ""
    behind = text.replace(product, f"mul = (sigmoid.to(tl.float32) + {part}) * cast")
    assert "a sum from the left" in attempt(behind, made)[1]
    # Two sums may be added to each other; no part of either is added to that.
    added = text.replace(product, f"mul = p_1_total + q_1_total + {part}")
    assert "a sum from the left" in attempt(added, made)[1]


def test_keys_in_the_place_of_values_are_refused() -> None:
    extents = {"B": 1, "H": 2, "S": 64, "D": 16}
    made = program("attention", extents, {"K": "none", "V": "none"}, 2, "attention")
    text = emit(made)
    keys, values = 'call.buffer("K.all")', 'call.buffer("V.all")'
    front, back = text.split("    args = (", 1)
    assert keys in back and values in back
    swapped = back.replace(keys, "?").replace(values, keys).replace("?", values)
    assert attempt(text, made)[1] == ""
    assert attempt(f"{front}    args = ({swapped}", made)[1]
