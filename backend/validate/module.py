"""An emitted module as text: its kernels, its host function, and nothing that is not known."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from tilelink.backend.validate.errors import Unclear
from tilelink.errors import Source, Span

_IMPORTS = frozenset(
    {
        "import triton",
        "import triton.language as tl",
        "from tilelink import device",
        "from tilelink.backend import runtime",
        "from tilelink.device import boxes",
        "from tilelink.device import roles",
        "from triton.experimental import gluon",
        "from triton.experimental.gluon import language as gl",
        "from triton.experimental.gluon.language.nvidia import hopper",
    }
)
_RUN = ast.dump(
    ast.parse(
        "def run(*tensors, group=None):\n    return runtime.run_module(TEXT, host, tensors, group)"
    ).body[0]
)
_MAIN = ast.dump(ast.parse('if __name__ == "__main__":\n    runtime.main(TEXT, host)').body[0])
_FIXED = "tl.constexpr"  # of the role that a group of warps has
_TYPES = frozenset({"tl.int32", "tl.int64", "tl.float32", "tl.int1", _FIXED})


@dataclass(frozen=True, slots=True)
class Module:
    """The parts of one emitted module. ``text`` is the fused program that it carries for the runtime.

    ``roles`` are the functions that kernels start as roles of their warps, ``gluon`` the kernels that do.
    """

    source: Source
    text: str
    kernels: dict[str, ast.FunctionDef]
    host: ast.FunctionDef
    roles: dict[str, ast.FunctionDef]
    gluon: frozenset[str]

    @property
    def name(self) -> str:
        """The name of the program, from the text that the module carries."""
        found = re.search(r"^program @([\w.]+)", self.text, re.MULTILINE)
        return found[1] if found else ""


def split_modules(text: str, name: str) -> list[Source]:
    """The modules of a file: `tilelink emit` prints one a kernel, each with a header of its own."""
    starts = [m.start() for m in re.finditer(r"^# Emitted by tilelink ", text, re.MULTILINE)] or [0]
    starts[0] = 0
    ends = [*starts[1:], len(text)]
    # Blank lines in place of what comes before keep line numbers true.
    return [
        Source(name, "\n" * text.count("\n", 0, a) + text[a:b])
        for a, b in zip(starts, ends, strict=True)
    ]


def read_module(source: Source) -> Module:
    """The parts of a module; Unclear for a statement that no emitted module has."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError as error:
        line = error.lineno or 1
        span = Span(source, line, error.offset or 1, (error.offset or 1) + 1)
        raise Unclear(span, detail=f"it is no Python: {error.msg}") from None
    kernels: dict[str, ast.FunctionDef] = {}
    roles: dict[str, ast.FunctionDef] = {}
    gluon: set[str] = set()
    text, host, ends = "", None, 0
    seen: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and ast.unparse(node) in _IMPORTS:
            continue
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEXT":
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                text = node.value.value
                name = "TEXT"
            else:
                raise _unclear(source, node, "the program's text is no string")
        elif isinstance(node, ast.FunctionDef):
            name = node.name
            if name == "host":
                _plain(source, node)
                host = node
            elif name == "run":
                _drop_docstring(node)
                if ast.dump(node) != _RUN:
                    raise _unclear(source, node, "`run` is not what every module has")
                ends |= 1
            else:
                kind = _kernel(source, node)
                (roles if kind == "role" else kernels)[name] = node
                gluon |= {name} if kind == "gluon" else set()
        elif isinstance(node, ast.If) and ast.dump(node) == _MAIN:
            name = "__main__"
            ends |= 2
        else:
            raise _unclear(source, node, f"a statement of the kind {type(node).__name__}")
        if name in seen:
            raise _unclear(source, node, f"`{name}` is there twice")
        seen.add(name)
    if not text or host is None or ends != 3:
        raise Unclear(
            None, detail="this is no emitted module: TEXT, host, run or its end is missing"
        )
    return Module(source, text.removeprefix("\n"), kernels, host, roles, frozenset(gluon))


def _unclear(source: Source, node: ast.AST, detail: str) -> Unclear:
    line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
    return Unclear(Span(source, line, column + 1, len(source.line(line)) + 1), detail=detail)


def _drop_docstring(node: ast.FunctionDef) -> None:
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]


def _plain(source: Source, node: ast.FunctionDef) -> None:
    a = node.args
    if node.decorator_list or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
        raise _unclear(source, node, "decorators or parameters of the host function")
    _drop_docstring(node)


def _kernel(source: Source, node: ast.FunctionDef) -> str:
    """Whether a function is a kernel of Triton, of Gluon, or a role of one of these."""
    a = node.args
    if a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
        raise _unclear(source, node, "parameters of a kernel")
    for argument in a.args:
        if argument.annotation is not None and ast.unparse(argument.annotation) not in _TYPES:
            raise _unclear(source, argument, "the type of a parameter")
    made = [ast.unparse(d) for d in node.decorator_list]
    role = made == ["gluon.jit"]
    known = len(made) == 1 and re.fullmatch(
        r"(triton|gluon)\.jit\(do_not_specialize=\[('\w+'(, '\w+')*)?\]\)", made[0]
    )
    if not known and not role:
        raise _unclear(source, node, "a function that is no kernel")
    for argument in a.args:
        fixed = argument.annotation is not None and ast.unparse(argument.annotation) == _FIXED
        if fixed and not (role and argument is a.args[0]):
            raise _unclear(source, argument, "a constant parameter")
    _drop_docstring(node)
    return "role" if role else made[0].partition(".")[0]
