"""Python text as ``ruff format`` would leave it, and expressions of the IR as Python."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tilelink.ir import Expr
from tilelink.ir.expr import PRECEDENCE

WIDTH = 100

_COMPARE = frozenset({"==", "!=", "<", "<=", ">", ">=", "and", "or"})
_RESERVED = frozenset(
    {"arena", "peers", "rank", "epoch", "ctx", "tl", "triton", "device", "runtime", "call", "world"}
    | {
        "progress_ns",
        "arrival_ns",
        "worker",
        "workers",
        "token",
        "range",
        "min",
        "max",
        "host",
        "run",
    }
    | {"TEXT", "WORLD", "torch"}
)


def identifier(name: str) -> str:
    """A Python identifier for a name of the IR: ``A.all`` gives ``A_all``."""
    text = re.sub(r"\W", "_", name)
    if not text or text[0].isdigit():
        text = f"v{text}"
    return f"{text}_" if keyword.iskeyword(text) or text in _RESERVED else text


def render(
    expr: Expr | int, lookup: Callable[[str], str], outer: int = 0, flat: bool = True
) -> str:
    """``expr`` as Python over non-negative ints; ``lookup`` gives the text of a name or raises KeyError.

    ``flat`` false asks for a number where the expression is a comparison inside arithmetic.
    """
    if isinstance(expr, int):
        return str(expr) if expr >= 0 or outer == 0 else f"({expr})"
    if expr.op == "const":
        return render(int(expr.args[0]), lookup, outer)
    if expr.op == "name":
        return lookup(str(expr.args[0]))
    if expr.op == "table":
        index = ", ".join(render(a, lookup) for a in expr.args[1:])
        return f"{lookup(str(expr.args[0]) + '[]')}({index})"
    left, right = expr.args
    if expr.op in ("min", "max"):
        return f"tl.{expr.op}imum({render(left, lookup)}, {render(right, lookup)})"
    if expr.op in ("and", "or"):
        sign = "&" if expr.op == "and" else "|"
        parts = [_condition(side, lookup) for side in (left, right)]
        text = f"{parts[0]} {sign} {parts[1]}"
        return f"({text})" if outer else text
    mine = PRECEDENCE[expr.op]
    sides = (
        render(left, lookup, mine + (mine == 3), flat=mine == 3),
        render(right, lookup, mine + 1, flat=mine == 3),
    )
    text = f"{sides[0]} {'//' if expr.op == '/' else expr.op} {sides[1]}"
    if expr.op in _COMPARE and not flat:
        return f"tl.where({text}, 1, 0)"
    return f"({text})" if mine < outer else text


def _condition(expr: Expr, lookup: Callable[[str], str]) -> str:
    text = render(expr, lookup)
    return f"({text})" if expr.op in _COMPARE else f"({text} != 0)"


def condition(expr: Expr | int, lookup: Callable[[str], str]) -> str:
    """``expr`` as a condition: what is not a comparison is compared with zero."""
    text = render(expr, lookup)
    return text if isinstance(expr, Expr) and expr.op in _COMPARE else f"{text} != 0"


def span(low: str, high: str) -> str:
    """The slice ``low:high``, spaced as ruff does."""
    simple = all(re.fullmatch(r"[\w.]*", side) for side in (low, high))
    return f"{low}:{high}" if simple else f"{low} : {high}"


def one_call(text: str) -> bool:
    """Whether ``text`` is one call, so that an attribute binds to all of it."""
    head, _, rest = text.partition("(")
    depth = 1
    for at, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return at == len(rest) - 1 and head.replace(".", "").replace("_", "").isalnum()
    return False


def split_arguments(text: str) -> list[str]:
    """``text`` cut at the commas outside of brackets."""
    found, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [part.strip() for part in found if part.strip()]


def split_sum(text: str) -> list[str]:
    """``text`` cut at the ``+`` outside of brackets."""
    found, depth = [""], 0
    for word in text.split(" "):
        if word == "+" and depth == 0:
            found.append("")
            continue
        depth += sum(word.count(c) for c in "([") - sum(word.count(c) for c in ")]")
        found[-1] += f" {word}" if found[-1] else word
    return found


class Writer:
    """Lines of Python with indentation; calls are broken where they are too long."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0
        self._pure: dict[str, list[range]] = {}

    def line(self, text: str = "", comment: str = "") -> None:
        """One line at the current indentation, with a trailing ``comment`` where it fits."""
        full = "    " * self.depth + text
        self.lines.append(
            (full + comment if len(full + comment) <= WIDTH else full) if text else ""
        )

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """``head`` (with its colon) and an indented block."""
        self.line(head)
        with self.indent():
            yield

    @contextmanager
    def indent(self) -> Iterator[None]:
        """One level deeper."""
        self.depth += 1
        yield
        self.depth -= 1

    def fits(self, text: str) -> bool:
        """Whether ``text`` is no longer than a line."""
        return len(text) <= WIDTH - 4 * self.depth

    def let(self, name: str, value: str) -> str:
        """``name = value``, dropped by :meth:`prune` if nothing reads it."""
        first = len(self.lines)
        if self.fits(f"{name} = {value}"):
            self.line(f"{name} = {value}")
        else:
            self.line(f"{name} = (")
            with self.indent():
                whole = len(value) <= WIDTH - 4 * self.depth
                for number, term in enumerate([value] if whole else split_sum(value)):
                    self.line(f"+ {term}" if number else term)
            self.line(")")
        self._pure.setdefault(name, []).append(range(first, len(self.lines)))
        return name

    def call(self, head: str, args: Sequence[str], tail: str = ")") -> None:
        """``head`` (ending in an opening bracket), arguments, ``tail``; broken if over-long."""
        flat = head + ", ".join(args) + tail
        room = WIDTH - 4 * self.depth
        if len(flat) <= room:
            self.line(flat)
            return
        self.line(head)
        with self.indent():
            joined = ", ".join(args)
            if len(joined) <= room - 4:
                self.line(joined)
            else:
                for arg in args:
                    self.line(f"{arg},")
        self.line(tail)

    def assign(self, name: str, value: str, comment: str = "") -> None:
        """``name = value``; a call that is too long for a line is broken at its arguments."""
        if len(f"{name} = {value}") > WIDTH - 4 * self.depth and one_call(value):
            head, _, rest = value.partition("(")
            self.call(f"{name} = {head}(", split_arguments(rest[:-1]))
        else:
            self.line(f"{name} = {value}", comment)

    def prune(self) -> None:
        """Drop what :meth:`let` assigned and nothing reads, until nothing changes."""
        dead: set[int] = set()
        words = [re.findall(r"\w+", text.split("#")[0]) for text in self.lines]
        changed = True
        while changed:
            changed = False
            counts: dict[str, int] = {}
            for number, found in enumerate(words):
                if number not in dead:
                    for word in found:
                        counts[word] = counts.get(word, 0) + 1
            for name, places in self._pure.items():
                alive = [place for place in places if place.start not in dead]
                if alive and counts.get(name, 0) == len(alive):
                    dead.update(number for place in alive for number in place)
                    changed = True
        self.lines = [text for number, text in enumerate(self.lines) if number not in dead]
        self._pure.clear()

    def text(self) -> str:
        """All lines, ending in one newline."""
        return "\n".join(self.lines).rstrip("\n") + "\n"
