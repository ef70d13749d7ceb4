"""Every error a user can meet: one class a mistake, the message a template, the position attached by the base.

The printed shape is the same for Python source, mapping text and IR text::

    error[unmapped-read]: `A` is gathered, but this read of it is not a tile of the mapping
      --> examples/ag_gemm.py:12:27
       |
    12 |             acc = tk.dot(A[m, 2 * k], B[k, n], acc)
       |                          ^^^^^^^^^^^
       = help: index a gathered tensor with the loop tile itself
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

SHOWN = 140  # characters of a line that are shown beside a mistake in it


@dataclass(frozen=True, slots=True)
class Source:
    """A text that users wrote: its display name and content."""

    name: str
    text: str = field(repr=False)

    def line(self, number: int) -> str:
        """The 1-based line ``number`` without its newline, or an empty string past the end."""
        lines = self.text.splitlines()
        return lines[number - 1] if 1 <= number <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A place in a :class:`Source`: 1-based line and column, ``end`` the column after the last character."""

    source: Source
    line: int
    column: int
    end: int

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"

    def caret(self) -> str:
        """The source line with the span underlined, as the error text shows it; of a long line what is near."""
        number = str(self.line)
        pad = " " * len(number)
        text = self.source.line(self.line).replace("\t", " ")
        first, last = self.column - 1, max(self.column, min(self.end - 1, len(text)))
        if len(text) > SHOWN:
            start = max(0, min(first - SHOWN // 4, len(text) - SHOWN))
            stop, before = start + SHOWN, "…" if start else ""
            text = f"{before}{text[start:stop]}{'…' if stop < len(text) else ''}"
            first = first - start + len(before)
            last = max(first + 1, min(last, stop) - start + len(before))
        return "\n".join(
            (
                f"{pad}--> {self}",
                f"{pad} |",
                f"{number} | {text}",
                f"{pad} | {' ' * first}{'^' * (last - first)}",
            )
        )


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``did you mean `gather`?``, or an empty string where nothing of ``known`` is close to ``word``."""
    candidates, given = sorted(known), str(word)
    by_case = [c for c in candidates if c.lower() == given.lower()]
    close = by_case or difflib.get_close_matches(given, candidates, n=1)
    return f"did you mean `{close[0]}`?" if close else ""


def choices(word: object, known: Iterable[str], intro: str = "known") -> str:
    """The help for a ``word`` that is none of ``known``: what may have been meant, and all there is."""
    names = list(known)
    listed = f"{intro}: {', '.join(names) or '(none)'}"
    return " ".join(filter(None, (did_you_mean(word, names), listed)))


class TilelinkError(Exception):
    """Base of every error of this package.

    A subclass gives ``code`` (a short kebab-case name), ``message`` and ``hint`` as ``str.format``
    templates over the keyword arguments of the constructor. ``span`` may be None where a mistake has
    no place in a text (a run-time argument, say). ``notes`` are further lines: a witness, for example.
    """

    code: ClassVar[str] = "error"
    message: ClassVar[str] = "{detail}"
    hint: ClassVar[str] = ""

    def __init__(
        self, span: Span | None = None, *, notes: tuple[str, ...] = (), **values: object
    ) -> None:
        self.span = span
        self.values = values
        self.notes = notes
        super().__init__(self.render())

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self), self.span, self.notes, self.values)

    def render(self) -> str:
        """The whole text of the error, hint last."""
        parts = [f"error[{self.code}]: {self.message.format(**self.values)}"]
        pad = " "
        if self.span is not None:
            pad = " " * len(str(self.span.line))
            caret = self.span.caret()
            parts.append(caret)
            if self.notes or self.hint:
                parts.append(f"{pad} |")
        parts += [f"{pad} = note: {note}" for note in self.notes]
        if self.hint:
            parts.append(f"{pad} = help: {self.hint.format(**self.values)}")
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.render()


def _rebuilt(
    kind: type[TilelinkError], span: Span | None, notes: tuple[str, ...], values: dict[str, object]
) -> TilelinkError:
    """An error from another process."""
    return kind(span, notes=notes, **values)


class InternalError(TilelinkError):
    """A fault of the compiler, not of the user's program."""

    code = "internal"
    message = "the compiler broke a rule of its own: {detail}"
    hint = "this is a fault of tilelink, not of your program; please report it with the program"


class IRSyntaxError(TilelinkError):
    """IR text that does not parse."""

    code = "ir-syntax"
    message = "expected {expected}, found {found}"
    hint = "the text form is described in docs/ir.md; `tilelink ir FILE` prints a valid example"
