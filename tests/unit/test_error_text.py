"""The text of an error: what of a line is shown, and what is underlined."""

import pytest

from tilelink.errors import SHOWN, Source, Span

LINE = "".join(f"{number:04d}" for number in range(500))


@pytest.mark.parametrize("column", [1, 30, 100, 1000, 1950, 2000])
@pytest.mark.parametrize("length", [1, 4, 60])
def test_of_a_long_line_the_part_around_the_mistake_is_shown(column: int, length: int) -> None:
    wrong = LINE[column - 1 : column - 1 + length]
    text = Span(Source("a.ir", LINE), 1, column, column + length).caret()
    place, _, shown, underlined = text.splitlines()
    assert place.endswith(f"a.ir:1:{column}")
    assert shown[underlined.index("^") : underlined.rindex("^") + 1] == wrong
    assert len(shown) <= SHOWN + len("1 | ……")
    assert shown.strip("1 |…") in LINE


@pytest.mark.parametrize("end", [2001, 10**6])
def test_what_is_underlined_ends_with_what_is_shown(end: int) -> None:
    _, _, shown, underlined = Span(Source("a.ir", LINE), 1, 5, end).caret().splitlines()
    assert shown[underlined.index("^") :].startswith(LINE[4:20])
    assert len(underlined) == len(shown) - len("…")


def test_past_the_end_of_a_line_one_place_is_underlined() -> None:
    for text in ("", "abc", LINE):
        _, _, shown, underlined = (
            Span(Source("a.ir", text), 1, len(text) + 1, 9999).caret().splitlines()
        )
        assert underlined.count("^") == 1 and len(underlined) == len(shown) + 1
