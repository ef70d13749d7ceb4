"""From mapping text to a parse tree: parser, places in a host file, syntax errors by example."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken
from lark.lark import PostLex

from tilelink.errors import Source, Span, did_you_mean
from tilelink.frontend.mapping_errors import SYNTAX_MISTAKES, MappingSyntaxError

# What the lexer reads in parts, and stops inside of.
_WHOLE = re.compile(r"//|\*\*|\d+\.\d*|\.\d+")


@cache
def _parser() -> Lark:
    grammar = files("tilelink.frontend").joinpath("mapping.lark").read_text(encoding="utf-8")
    return Lark(
        grammar, parser="lalr", lexer="contextual", postlex=_Brackets(), maybe_placeholders=False
    )


class _Brackets(PostLex):
    """Drops the newlines inside parentheses and brackets."""

    always_accept = ("_SEP",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens that the parser sees."""
        depth = 0
        for token in stream:
            depth = max(0, depth + (token in ("(", "[")) - (token in (")", "]")))
            if depth and token.type == "_SEP" and not token.startswith(";"):
                continue
            yield token


class Locator:
    """Places of a mapping text: in the text itself, or in the host file that holds it."""

    def __init__(
        self, text: str, name: str, host: Source | None, line_offset: int, column_offset: int
    ) -> None:
        self.text = text
        inside = host is not None and _holds(host, text, line_offset, column_offset)
        self.source = host if host is not None and inside else Source(name, text)
        self.line_offset = line_offset if inside else 0
        self.column_offset = column_offset if inside else 0

    def span(self, first: Token, last: Token | None = None) -> Span:
        """From the start of ``first`` to the end of ``last``, within the line of ``first``."""
        line, column = first.line or 1, first.column or 1
        last = last if last is not None and last.line == line else first
        return self.at(line, column, last.end_column or column + 1)

    def shape_span(self, first: Token, last: Token) -> Span:
        """From a tensor's name to the bracket behind its last extent, in the line of ``first``."""
        start, end = first.start_pos or 0, self.text.find("]", last.end_pos or 0) + 1
        inside = self.text[start:end].partition("\n")[0]
        return self.at(first.line or 1, first.column or 1, (first.column or 1) + len(inside))

    def at(self, line: int, column: int, end: int) -> Span:
        """The place with these 1-based numbers in the mapping text."""
        shift = self.column_offset if line == 1 else 0
        return Span(
            self.source, line + self.line_offset, column + shift, max(end, column + 1) + shift
        )


def _holds(host: Source, text: str, line_offset: int, column_offset: int) -> bool:
    """Whether the text stands in the host file at the offsets, character by character."""
    return all(
        host.line(number + line_offset).startswith(line, column_offset if number == 1 else 0)
        for number, line in enumerate(text.split("\n"), 1)
    )


def parse_tree(text: str, locator: Locator) -> Tree[Token]:
    """The parse tree of ``text``; the MappingSyntaxError that fits best where there is none."""
    try:
        return _parser().parse(text)
    except UnexpectedInput as error:
        raise _mistake(error, locator) from None


def _signatures(error: UnexpectedInput) -> tuple[tuple[Any, ...], ...]:
    """What identifies a syntax error, most telling first: parser state, accepted tokens, token."""
    interactive: Any = error.interactive_parser
    state, accepts = interactive.parser_state.position, frozenset(interactive.accepts())
    kind = error.token.type if isinstance(error, UnexpectedToken) else error.char  # type: ignore[attr-defined]
    return ((state, accepts, kind), (accepts, kind), (state, accepts), (accepts,))


@cache
def _taught() -> dict[tuple[Any, ...], type[MappingSyntaxError]]:
    """Every signature of every malformed example, with its mistake; the first example wins."""
    found: dict[tuple[Any, ...], type[MappingSyntaxError]] = {}
    for mistake in SYNTAX_MISTAKES:
        for example in mistake.examples:
            try:
                _parser().parse(example)
            except UnexpectedInput as error:
                for signature in _signatures(error):
                    found.setdefault(signature, mistake)
    return found


def _mistake(error: UnexpectedInput, locator: Locator) -> MappingSyntaxError:
    taught = _taught()
    matches = (taught[s] for s in _signatures(error) if s in taught)
    mistake = next(matches, MappingSyntaxError)
    span, found = _place(error, locator)
    suggestion = did_you_mean(found.strip("`"), mistake.words) or mistake.advice
    return mistake(span, found=found, suggestion=suggestion)


def _place(error: UnexpectedInput, locator: Locator) -> tuple[Span, str]:
    """Where the parser stopped, and what it found there, for people to read."""
    lines = locator.text.split("\n")
    token = error.token if isinstance(error, UnexpectedToken) else None
    if token is not None and token.type in ("$END", "_SEP"):
        # The mistake is what is missing at the end of the text before, not what follows it.
        position = len(locator.text) if token.type == "$END" else token.start_pos or 0
        before = re.sub(r"#[^\n]*", "", locator.text[:position]).rstrip(" \t\r\n;")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        names = {"$END": "the end of the text", ";": "`;`", "\n": "the end of the line"}
        found = names["$END" if token.type == "$END" else token[:1]]
        return locator.at(line, column, column + 1), found
    line, column = error.line, error.column
    parts = _WHOLE.finditer(lines[line - 1])
    whole = next((part for part in parts if part.start() < column <= part.end()), None)
    if whole is not None:
        return locator.at(line, whole.start() + 1, whole.end() + 1), f"`{whole[0]}`"
    if token is not None:
        return locator.at(line, column, column + max(1, len(token))), f"`{token}`"
    rest = re.match(r"[=<>!]=|\w+|.", lines[line - 1][column - 1 :])
    found = rest[0] if rest else ""
    return locator.at(line, column, column + len(found)), f"`{found}`"
