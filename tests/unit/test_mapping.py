"""The mapping language: what each statement means, and every rule that the grammar cannot say."""

import pytest

from tilelink.frontend.mapping import Mapping, Statement, parse_mapping
from tilelink.frontend.mapping_errors import MappingError
from tilelink.ir import Expr


def only(text: str) -> Statement:
    (statement,) = parse_mapping(text).statements
    return statement


def dims(exprs: tuple[Expr, ...]) -> list[str]:
    return [str(e) for e in exprs]


@pytest.mark.parametrize("kind", ["gather", "ring", "shard"])
def test_divided_tensors(kind: str) -> None:
    s = only(f"{kind} K[S, H, 2 * D] over S")
    assert (s.kind, s.tensor, dims(s.dims), s.over, s.axis) == (
        kind,
        "K",
        ["S", "H", "2 * D"],
        "S",
        0,
    )
    assert str(s.owner) == "e / (S / WORLD)"
    assert (s.tile, s.signal, s.extra) == (None, None, ())


def test_scatter_over_a_later_axis() -> None:
    s = only("scatter C[M, N] over N sum")
    assert (s.kind, s.over, s.axis, str(s.owner)) == ("scatter", "N", 1, "e / (N / WORLD)")


def test_reduce_and_local_have_no_owner() -> None:
    reduce, local = parse_mapping("reduce C[M, N] sum; local B[K, N]").statements
    assert (reduce.kind, reduce.over, reduce.owner) == ("reduce", None, None)
    assert (local.kind, local.tensor, dims(local.dims)) == ("local", "B", ["K", "N"])


def test_maps() -> None:
    s = only("gather A[M, K] over M {\n owner m / (M / WORLD)\n tile 128 x K\n signal t / 2\n}")
    assert str(s.owner) == "e / (M / WORLD)"
    assert s.tile is not None and dims(s.tile) == ["128", "K"]
    assert str(s.signal) == "t / 2"


def test_maps_on_one_line_in_any_order() -> None:
    s = only("gather A[M, K] over M { signal t % 4 tile 128x64; owner m / 64 % WORLD }")
    assert str(s.owner) == "e / 64 % WORLD"
    assert s.tile is not None and dims(s.tile) == ["128", "64"]
    assert str(s.signal) == "t % 4"


def test_zigzag_owner() -> None:
    block = "s / (S / (2 * WORLD))"
    owner = only(f"ring K[S] over S {{ owner min({block}, 2 * WORLD - 1 - {block}) }}").owner
    assert owner is not None
    got = [owner.evaluate({"e": e, "S": 16, "WORLD": 4}) for e in range(16)]
    assert got == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_dynamic_map_reads_a_table() -> None:
    s = only("gather A[M, K] over M { owner owner_of[m / 64, 0] }")
    assert s.owner == Expr("table", ("owner_of", Expr.name("e") // 64, Expr.const(0)))


def test_a_lower_case_extent_keeps_its_name() -> None:
    s = only("gather A[m, k] over m { owner e / (m / WORLD) }")
    assert (str(s.owner), s.over) == ("e / (m / WORLD)", "m")


def test_exchange_and_combine() -> None:
    mapping = parse_mapping(
        "exchange X[T, H] by dest[T, k]\n    into R[CAP, H], offs[WORLD + 1], T dynamic\n"
        "combine Z[CAP, H] from R into Y[T, k, H] { tile 1 x H }\n"
    )
    exchange, combine = mapping.statements
    assert mapping.dynamic == {"T"}
    assert (exchange.kind, exchange.tensor, exchange.over) == ("exchange", "X", None)
    assert [k for k, _ in exchange.extra] == [
        "table", "table_dims", "into", "into_dims", "offsets", "offsets_dims",
    ]  # fmt: skip
    assert exchange.get("table") == "dest" and dims(exchange.get("table_dims")) == ["T", "k"]
    assert exchange.get("into") == "R" and dims(exchange.get("into_dims")) == ["CAP", "H"]
    assert exchange.get("offsets") == "offs"
    assert dims(exchange.get("offsets_dims")) == ["WORLD + 1"]
    assert (combine.tensor, combine.get("source"), combine.get("into")) == ("Z", "R", "Y")
    assert dims(combine.get("into_dims")) == ["T", "k", "H"]
    assert combine.tile is not None and dims(combine.tile) == ["1", "H"]


def test_two_exchanges_may_share_a_table() -> None:
    text = """
        exchange X[T, H] by dest[T, k] into R[CAP, H], offs[WORLD + 1]
        exchange G[T, 1] by dest[T, k] into RG[CAP, 1], offs_g[WORLD + 1]
        local dest[T, k]
    """
    assert [s.tensor for s in parse_mapping(text).statements] == ["X", "G", "dest"]


def test_separators_comments_and_line_breaks() -> None:
    mapping = parse_mapping(
        "\n# all-gather\n;gather A[M,\n   K] over M, M dynamic  # rows\n"
        "{\n # maps\n owner m / (M\n / WORLD)\n}\n\n  local B[K, N];;"
        " scatter C[M, N]\n over M\n sum ;\r\n"
    )
    assert [s.tensor for s in mapping.statements] == ["A", "B", "C"]
    assert mapping.dynamic == {"M"}
    assert str(mapping.statements[0].owner) == "e / (M / WORLD)"


def test_an_empty_mapping() -> None:
    assert parse_mapping(" # nothing\n") == Mapping(
        (), frozenset(), parse_mapping(" # nothing\n").source
    )


def test_keywords_are_names_where_names_stand() -> None:
    mapping = parse_mapping("gather sum[over, tile] over over; local gather[dynamic]")
    assert [(s.tensor, s.over) for s in mapping.statements] == [("sum", "over"), ("gather", None)]


def test_the_span_of_a_statement() -> None:
    s = parse_mapping("local B[K, N]\n  gather A[M, K] over M {\n tile 1 x K }").statements[1]
    assert (s.span.line, s.span.column, s.span.end) == (2, 3, 24)


EXCHANGE = "exchange X[T, H] by dest[T, k] into R[CAP, H], offs[WORLD + 1]\n"


@pytest.mark.parametrize(
    ("text", "code", "line", "caret", "says"),
    [
        ("local A[M]\ngather A[M, K] over M", "tensor-twice", 2, "A", "line 1"),
        (EXCHANGE + "local R[CAP, H]", "tensor-twice", 2, "R", "line 1"),
        (EXCHANGE + "local offs[WORLD + 1]", "tensor-twice", 2, "offs", "line 1"),
        ("gather A[M, K] over N", "over-not-a-dimension", 1, "N", "`M`, `K`"),
        ("gather A[2 * M, K] over M", "over-not-a-dimension", 1, "M", "`K`"),
        ("gather A[M, M] over M", "over-twice", 1, "M", "two axes"),
        ("gather A[M, K] over M { owner n / 4 }", "unknown-name", 1, "n", "K, M, WORLD"),
        ("gather A[M, K] over M { owner M_ / 4 }", "unknown-name", 1, "M_", "`M`"),
        ("gather A[M, K] over M { tile 4 x t }", "unknown-name", 1, "t", "tile"),
        ("gather A[M, K] over M { signal m }", "unknown-name", 1, "m", "signal"),
        ("local B[K]\ngather A[M] over M { owner B }", "unknown-name", 2, "B", "`B[i]`"),
        ("gather A[M, K] over M { owner K[m] }", "not-a-table", 1, "K", "number"),
        ("gather A[M, K] over M { owner (m + RANK) % WORLD }", "rank-in-map", 1, "RANK", "owner"),
        ("gather A[M, K] over M { tile RANK x K }", "rank-in-map", 1, "RANK", "tile"),
        ("gather A[M, K * RANK] over M", "rank-in-map", 1, "RANK", "shape"),
        ("gather A[M, K] over M {\n tile 128 }", "tile-rank", 2, "tile 128", "1 lengths"),
        ("reduce A[M, K] sum { tile 1 x 2 x 3 }", "tile-rank", 1, "tile 1 x 2 x 3", "3 lengths"),
        ("gather A[M] over M { tile 1\n tile 2 }", "map-twice", 2, "tile", "twice"),
        ("reduce A[M] sum { owner m }", "map-not-here", 1, "owner", "all of the sum"),
        (EXCHANGE[:-1] + " { owner t }", "map-not-here", 1, "owner", "table"),
        ("shard A[M] over M { signal t }", "map-not-here", 1, "signal", "no traffic"),
        ("gather A[M] over M, N dynamic", "dynamic-not-a-dimension", 1, "N", "`M`"),
        ("gather A[M] over M, WORLD dynamic", "dynamic-not-a-dimension", 1, "WORLD", "`M`"),
        ("gather M[M] over M", "reserved-name", 1, "M", "tensor"),
        ("gather A[M, e] over M { owner e }", "reserved-name", 1, "e", "variable"),
        ("gather A[M, t] over M { signal t }", "reserved-name", 1, "t", "variable"),
        ("gather A[M, m] over M { owner m }", "reserved-name", 1, "m", "variable"),
        ("gather A[M] over M { owner m / 0 }", "division-by-zero", 1, "0", "zero"),
        ("gather A[M] over M { owner m % 0 }", "division-by-zero", 1, "0", "zero"),
        ("combine Z[C, H] from R into Y[T, k, H]", "unknown-exchange", 1, "R", "`R`"),
        ("local A[n[0]]", "unknown-name", 1, "n", "cannot be read"),
        (
            "exchange X[T, H] by dest[U, k] into R[C, H], o[WORLD + 1]",
            "shape-mismatch", 1, "dest[U, k]", "`dest[T, k]`",
        ),
        (
            "exchange X[T, H] by dest[T, k] into R[C, G], o[WORLD + 1]",
            "shape-mismatch", 1, "R[C, G]", "`R[C, H]`",
        ),
        (
            "exchange X[T, H] by dest[T, k] into R[C, H], o[WORLD]",
            "shape-mismatch", 1, "o[WORLD]", "`o[WORLD + 1]`",
        ),
        (
            EXCHANGE + "combine Z[C, H] from R into Y[T, k, H]",
            "shape-mismatch", 2, "Z[C, H]", "`Z[CAP, H]`",
        ),
        (
            EXCHANGE + "combine Z[CAP, N] from R into Y[T, H]",
            "shape-mismatch", 2, "Y[T, H]", "`Y[T, k, N]`",
        ),
    ],
)  # fmt: skip
def test_mistakes(text: str, code: str, line: int, caret: str, says: str) -> None:
    with pytest.raises(MappingError) as caught:
        parse_mapping(text)
    error, span = caught.value, caught.value.span
    assert error.code == code, str(error)
    assert span is not None and span.line == line
    assert span.source.line(line)[span.column - 1 : span.end - 1] == caret
    assert says in str(error)


def test_rank_is_allowed_in_a_signal_map() -> None:
    assert str(only("gather A[M] over M { signal (t + RANK) % 2 }").signal) == "(t + RANK) % 2"


def test_extents_from_elsewhere() -> None:
    text = "gather A[M] over M { owner m / BLOCK % WORLD }"
    with pytest.raises(MappingError, match="unknown-name"):
        parse_mapping(text)
    (s,) = parse_mapping(text, extents=["BLOCK"]).statements
    assert str(s.owner) == "e / BLOCK % WORLD"
