"""Validation of kernels whose maps cut the depth of a product, whose tiles are ragged, and of attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.assurance.emitted import attempt, chosen
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import run_passes
from tilelink.ir import Op
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

KERNELS = Path(__file__).parents[1] / "kernels"
TILES = (("K", 32), ("M", 16), ("N", 16))


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
    ("attention", {"B": 1, "H": 2, "S": 64, "D": 16}, {"K": "copy_engine", "V": "copy_engine"}, 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[3]}")
def test_texts_are_accepted_and_their_mutants_refused(
    case: tuple[str, dict[str, int], dict[str, str], int],
) -> None:
    made = program(*case, file="attention" if case[0] == "attention" else "maps")
    text = emit(made)
    original, reason = attempt(text, made)
    assert not reason
    refused = 0
    for mutant in chosen(text, 40, 0):
        if mutant.kind == "flag":
            continue  # a wait in front of generic loads alone needs no fence
        print_, reason = attempt(mutant.text, made)
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
