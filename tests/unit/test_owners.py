"""Owner maps: shards and blocks, against their definitions written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelink.frontend.mapping import parse_mapping
from tilelink.frontend.owners import (
    OwnerRangeError,
    UnevenOwnerError,
    owner_array,
    shard_indices,
    uniform_block,
)
from tilelink.ir import Expr


def owner(text: str) -> Expr:
    found = parse_mapping(f"gather A[M] over M {{ owner {text} }}").statements[0].owner
    assert found is not None
    return found


ZIGZAG = "min(m / (M / (2 * WORLD)), 2 * WORLD - 1 - m / (M / (2 * WORLD)))"


@pytest.mark.parametrize(
    ("text", "extent", "world", "shards", "block"),
    [
        ("m / (M / WORLD)", 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]], 2),
        ("m % WORLD", 6, 3, [[0, 3], [1, 4], [2, 5]], 1),
        ("m / 2 % WORLD", 8, 2, [[0, 1, 4, 5], [2, 3, 6, 7]], 2),
        (ZIGZAG, 8, 2, [[0, 1, 6, 7], [2, 3, 4, 5]], 2),
        ("WORLD - 1 - m / (M / WORLD)", 6, 2, [[3, 4, 5], [0, 1, 2]], 3),
        ("0", 5, 1, [[0, 1, 2, 3, 4]], 5),
        ("m / (M / WORLD)", 4, 4, [[0], [1], [2], [3]], 1),
    ],
)
def test_shards(text: str, extent: int, world: int, shards: list[list[int]], block: int) -> None:
    found = shard_indices(owner(text), extent, world, {"M": extent})
    assert [s.tolist() for s in found] == shards
    assert all(s.dtype == np.int64 for s in found)
    assert uniform_block(owner(text), extent, world, {"M": extent}) == block


def test_a_table_says_who_owns_what() -> None:
    names = {"M": 8, "who": np.array([1, 0, 0, 1])}
    assert [s.tolist() for s in shard_indices(owner("who[m / 2]"), 8, 2, names)] == [
        [2, 3, 4, 5],
        [0, 1, 6, 7],
    ]
    assert uniform_block(owner("who[m / 2]"), 8, 2, names) == 2


def test_an_empty_axis() -> None:
    assert [s.tolist() for s in shard_indices(owner("m % WORLD"), 0, 2, {"M": 0})] == [[], []]
    assert uniform_block(owner("m % WORLD"), 0, 2, {"M": 0}) == 1


def test_a_rank_that_does_not_exist() -> None:
    with pytest.raises(OwnerRangeError, match=r"owner of element 4 is rank 2.*0 to 1"):
        owner_array(owner("m / 2"), 8, 2, {"M": 8})


def test_uneven_shards() -> None:
    with pytest.raises(UnevenOwnerError, match=r"the 7 elements .* own 4, 3"):
        shard_indices(owner("m % WORLD"), 7, 2, {"M": 7})


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_the_block_is_the_largest(ranks: list[int]) -> None:
    extent = len(ranks)
    names = {"M": extent, "who": np.array(ranks)}

    def uniform(length: int) -> bool:
        blocks = [set(ranks[i : i + length]) for i in range(0, extent, length)]
        return extent % length == 0 and all(len(b) == 1 for b in blocks)

    largest = max(length for length in range(1, extent + 1) if uniform(length))
    assert uniform_block(owner("who[m]"), extent, 3, names) == largest
