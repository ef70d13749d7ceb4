"""The text of a Python function: its syntax tree, its spans, and what its names stand for."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from tilelink.errors import Source, Span
from tilelink.frontend.errors import NoSource

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function: its tree with positions of the whole file, and the scopes around it."""

    function: FunctionType = field(repr=False)
    node: ast.FunctionDef = field(repr=False)
    source: Source

    @property
    def name(self) -> str:
        """The function's name."""
        return self.node.name

    def span(self, node: ast.AST) -> Span:
        """The place of ``node``; where it runs over several lines, of its first line."""
        line = getattr(node, "lineno", self.node.lineno)
        text = self.source.line(line)
        column = _column(text, getattr(node, "col_offset", 0))
        end_line = getattr(node, "end_lineno", line)
        end_offset = getattr(node, "end_col_offset", None)
        end = len(text) + 1 if end_line != line or end_offset is None else _column(text, end_offset)
        return Span(self.source, line, column, max(end, column + 1))

    def outer(self, name: str, absent: Any = None) -> Any:
        """What ``name`` stands for outside the function: closure, globals, then Python's own names."""
        code = self.function.__code__
        if name in code.co_freevars and self.function.__closure__ is not None:
            cell = self.function.__closure__[code.co_freevars.index(name)]
            try:
                return cell.cell_contents
            except ValueError:
                return absent
        found = self.function.__globals__.get(name, _ABSENT)
        if found is _ABSENT:
            found = getattr(builtins, name, _ABSENT)
        return absent if found is _ABSENT else found


def _column(text: str, offset: int) -> int:
    """The 1-based column of a UTF-8 byte offset."""
    return len(text.encode()[:offset].decode(errors="ignore")) + 1


_shown: dict[str, str] = {}


def show_as(path: str, name: str) -> None:
    """Lets errors show the file ``path`` as ``name``: a copy of standard input, for one."""
    _shown[path] = name


def display_name(path: str) -> str:
    """``path`` as errors show it: relative where it is below the working folder."""
    if path in _shown:
        return _shown[path]
    if not os.path.isabs(path):
        return path
    try:
        relative = os.path.relpath(path)
    except ValueError:
        return path
    return path if relative.startswith("..") else relative


@functools.lru_cache(maxsize=64)
def _functions(text: str) -> dict[str, list[ast.FunctionDef]]:
    """The functions of a file by name, outer ones first."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def read_function(function: Callable[..., Any], span: Span | None = None) -> FunctionSource:
    """The source of ``function``; NoSource, at ``span``, where Python does not know it."""
    name = getattr(function, "__name__", repr(function))
    if not isinstance(function, FunctionType):
        raise NoSource(span, name=name, why="it is not a plain Python function")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise NoSource(
            span, name=name, why="it is an `async` function, and a kernel is a plain one"
        )
    path = function.__code__.co_filename
    linecache.checkcache(path)
    text = "".join(linecache.getlines(path, function.__globals__))
    if not text:
        raise NoSource(span, name=name, why=f"there is no text for {path}")
    try:
        functions = _functions(text)
    except SyntaxError as error:
        raise NoSource(
            span, name=name, why=f"{path} has changed and does not parse ({error.msg})"
        ) from None
    first = function.__code__.co_firstlineno
    for node in functions.get(name, ()):
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        if first in (start, node.lineno):
            return FunctionSource(function, node, Source(display_name(path), text))
    if name == "<lambda>":
        raise NoSource(span, name=name, why="it is a lambda, and not a `def`")
    raise NoSource(span, name=name, why=f"{path} has changed since it was imported")
