"""The relative error of a result."""

import pytest
import torch

from tilelink.backend.accuracy import finite_parts, relative_error, row_error


def test_is_the_worst_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 100.0]])
    actual = torch.tensor([[3.0, 3.0], [1.0, 100.0]])
    assert relative_error(actual, expected) == pytest.approx(1 / 5)


def test_zero_rows_compare_absolutely() -> None:
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)) == 5.0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    good, worse = torch.ones(2, 2), torch.ones(2, 2)
    worse[1, 0] = bad
    assert relative_error(worse, good) == float("inf")
    assert relative_error(good, worse) == float("inf")
    assert relative_error(worse, worse) == float("inf")


def test_a_vector_is_one_row_and_leading_axes_are_rows() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    one, two = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    two[1, 2] = 2.0
    assert relative_error(two, one) == pytest.approx(1.0)


def test_is_computed_in_float64() -> None:
    big = torch.full((1, 4), 1e30)
    assert relative_error(big, big * (1 + 2**-20)) == pytest.approx(2**-20, rel=0.1)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))


def test_nothing_to_compare() -> None:
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0


def test_the_worst_row_may_be_anywhere() -> None:
    expected = torch.ones(5000, 2, dtype=torch.bfloat16)
    for row in (0, 2047, 2048, 4999):
        actual = expected.clone()
        actual[row] = 1.5
        assert relative_error(actual, expected) == 0.5
    found = row_error(expected, expected)
    assert found.shape == () and found.dtype == torch.float64


def test_only_what_is_finite_on_both_sides_is_compared() -> None:
    odd = torch.tensor([1.0, float("nan"), float("inf")])
    both = finite_parts(odd + 1, odd)
    assert both is not None and [x.tolist() for x in both] == [[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert finite_parts(odd, -odd) is None
    assert (
        finite_parts(odd.nan_to_num(), odd) is None and finite_parts(odd, odd.nan_to_num()) is None
    )
