"""The IR: expressions mean what they print, and text round-trips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import expressions, ops
from tilelink.ir import Expr, Op, make, parse_ir, print_ir

PROGRAMS = sorted((Path(__file__).parents[1] / "programs").glob("*.ir"))
ENV = {
    "M": 7,
    "N": 3,
    "WORLD": 4,
    "RANK": 2,
    "s": 5,
    "m.start": 11,
    "n.1.stop": 13,
    "offs": np.arange(1 << 12),
}


def _safe(expr: Expr) -> int | None:
    try:
        # An element of a table is a NumPy number, whose division by zero only warns.
        with np.errstate(divide="raise"):
            return int(expr.evaluate(ENV))
    except (ArithmeticError, IndexError):
        return None


@given(ops())
@settings(max_examples=80)
def test_text_round_trips(op: Op) -> None:
    text = print_ir(op)
    parsed = parse_ir(text)
    assert parsed == op
    assert print_ir(parsed) == text


@given(expressions())
@settings(max_examples=200)
def test_a_printed_expression_parses_to_the_same(expr: Expr) -> None:
    op = parse_ir(f"x {{a = {expr}}}")
    assert op == make("x", a=expr)


@given(expressions(), expressions(), st.sampled_from("+-*/%"))
def test_folding_keeps_the_value(a: Expr, b: Expr, op: str) -> None:
    left, right = _safe(a), _safe(b)
    if left is None or right is None or (op in "/%" and right == 0):
        return
    plain = {"+": left + right, "-": left - right, "*": left * right}.get(op)
    if plain is None:
        plain = left // right if op == "/" else left % right
    function = {"+": a + b, "-": a - b, "*": a * b, "/": a // b, "%": a % b}[op]
    assert _safe(function) == plain


@given(expressions())
@settings(max_examples=200)
def test_a_divisor_divides_the_value(expr: Expr) -> None:
    value = _safe(expr)
    if value is None:
        return

    def of(name: str) -> int:
        known = ENV[name]
        return known if isinstance(known, int) else 1

    divisor = expr.divisor(of)
    assert value == 0 if divisor == 0 else value % divisor == 0


def test_what_divides_the_start_of_a_slice_divides_places_in_it() -> None:
    starts = {"n.start": 24}
    slice_start = (Expr.name("n.start") + 36) % 360 + Expr.name("i") * 8
    assert slice_start.divisor(lambda name: starts.get(name, 1)) == 4
    assert (Expr.name("n.start") // 4).divisor(lambda name: starts.get(name, 1)) == 1


@given(expressions())
def test_arrays_evaluate_as_numbers_do(expr: Expr) -> None:
    alone = _safe(expr)
    if alone is None:
        return
    env = {k: np.array([v, v]) if k != "offs" else v for k, v in ENV.items()}
    with np.errstate(divide="ignore"):
        both = np.broadcast_to(np.asarray(expr.evaluate(env)), (2,))
    assert both.tolist() == [alone, alone]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_sample_programs_are_in_canonical_form(path: Path) -> None:
    text = "".join(
        line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#")
    )
    assert print_ir(parse_ir(text)) == text
