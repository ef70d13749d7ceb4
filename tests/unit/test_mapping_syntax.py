"""Each malformed example of the mapping language is recognised as the mistake that it teaches."""

import pytest

from tilelink.errors import Source
from tilelink.frontend.mapping import parse_mapping
from tilelink.frontend.mapping_errors import SYNTAX_MISTAKES, MappingSyntaxError

EXAMPLES = [(mistake, text) for mistake in SYNTAX_MISTAKES for text in mistake.examples]


@pytest.mark.parametrize(("mistake", "text"), EXAMPLES, ids=lambda v: getattr(v, "code", v))
def test_each_example_is_recognised(mistake: type[MappingSyntaxError], text: str) -> None:
    with pytest.raises(MappingSyntaxError) as caught:
        parse_mapping(text)
    assert type(caught.value) is mistake, caught.value.render()
    assert caught.value.span is not None
    assert "= help: " in caught.value.render()


def test_every_mistake_has_examples_and_a_code_of_its_own() -> None:
    assert all(mistake.examples for mistake in SYNTAX_MISTAKES)
    assert len({mistake.code for mistake in SYNTAX_MISTAKES}) == len(SYNTAX_MISTAKES)


# Texts that are no example: other names, other lines, other tensors around the mistake.
@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("local W[E, H]\nscattter Y[T, H] over T sum", "unknown-statement", 2, 1),
        ("gather K[S, H, D] over S\ngather V[S, H, D]\nlocal Q[S]", "missing-over", 2, 18),
        ("scatter Y[T, H] over T  # the sum\nlocal W[E]", "missing-sum", 1, 23),
        ("local W[E]; reduce Y[T, H] avg", "missing-sum", 1, 28),
        ("gather A[M, K] over M {\n  tile 64 x 2 * K\n  owner m // 64\n}", "bad-operator", 3, 11),
        ("gather A[M, K] over M {\n  owner (m / (M / WORLD)\n}", "unclosed-parenthesis", 3, 1),
        ("gather A[M, K] over M {\n  owner m / 64\n", "unclosed-block", 2, 15),
        ("gather A[M, K] over M {\n  tile 64, K\n}", "tile-separator", 2, 10),
        ("exchange X[T, H] by d[T, k] into R[C, H]", "incomplete-exchange", 1, 41),
        ("gather A[M, K] over M, M dynamc", "bad-mark", 1, 26),
        ("gather A[M, K] over M dynamic; local B[K]", "missing-comma", 1, 23),
        ("gather A[M, K] over M { owner m ** 2 % WORLD }", "bad-operator", 1, 33),
        ("gather A[M, K] over M {\n  tile 1.5 x K\n}", "not-an-integer", 2, 8),
        ("gather A[M, K] over M !", "missing-separator", 1, 23),
    ],
)
def test_mistakes_in_other_texts(text: str, code: str, line: int, column: int) -> None:
    with pytest.raises(MappingSyntaxError) as caught:
        parse_mapping(text)
    span = caught.value.span
    assert span is not None
    assert (caught.value.code, span.line, span.column) == (code, line, column), str(caught.value)


def test_the_error_as_people_see_it() -> None:
    with pytest.raises(MappingSyntaxError) as caught:
        parse_mapping("local B[K, N]\ngathr A[M, K] over M", "ag_gemm.map")
    assert str(caught.value) == (
        "error[unknown-statement]: a statement cannot begin with `gathr`\n"
        " --> ag_gemm.map:2:1\n"
        "  |\n"
        "2 | gathr A[M, K] over M\n"
        "  | ^^^^^\n"
        "  |\n"
        "  = help: did you mean `gather`?"
    )


def test_places_in_a_python_file() -> None:
    python = 'import tilelink\n\n@tilelink.kernel("gather A[M, K] over Q")\ndef k(A): ...\n'
    host = Source("examples/k.py", python)
    with pytest.raises(Exception, match="over-not-a-dimension") as caught:
        parse_mapping("gather A[M, K] over Q", host=host, line_offset=2, column_offset=18)
    assert "--> examples/k.py:3:39\n" in str(caught.value)
    assert '3 | @tilelink.kernel("gather A[M, K] over Q")\n  | ' + " " * 38 + "^\n" in str(
        caught.value
    )


def test_places_fall_back_to_the_text_where_escapes_move_it() -> None:
    text = "local B[K, N]\ngather A[M, K] over Q"
    host = Source("examples/k.py", '@tilelink.kernel("local B[K, N]\\ngather A[M, K] over Q")\n')
    with pytest.raises(Exception, match="over-not-a-dimension") as caught:
        parse_mapping(text, "examples/k.py", host=host, line_offset=0, column_offset=18)
    assert "--> examples/k.py:2:21\n" in str(caught.value)
    assert "2 | gather A[M, K] over Q\n" in str(caught.value)
