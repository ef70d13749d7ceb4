"""Bad kernels in Python: what is under the decorator, and how the decorator is used."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import Any

import tilelink
from tests.assurance.bad_case import Call, Case, Command

HEAD = "import tilelink\nimport tilelink.language as tk\n\n"
MAPPING = '"gather A[M, K] over M"'
EXAMPLE = 'example={"M": 64, "N": 32, "K": 32}'
GOOD_BODY = """\
M, K = A.shape
N = B.shape[1]
for m, n in tk.tiles(M, N):
    acc = tk.zeros([m, n], tk.float32)
    for k in tk.tiles(K):
        acc = tk.dot(A[m, k], B[k, n], acc)
    C[m, n] = acc
"""


def kernel_text(
    body: str = GOOD_BODY,
    mapping: str = MAPPING,
    parameters: str = "A, B, C",
    before: str = "",
    decorator: str = "",
) -> str:
    """A file with one kernel of name ``f``."""
    line = decorator or f"@tilelink.kernel({mapping}, {EXAMPLE})"
    inner = indent(dedent(body), "    ")
    return f"{HEAD}{dedent(before)}\n\n{line}\ndef f({parameters}):\n{inner}"


def body(name: str, old: str, new: str, *words: str, **how: Any) -> Command:
    """The all-gather GEMM with ``old`` of its body replaced."""
    assert old in GOOD_BODY
    text = kernel_text(GOOD_BODY.replace(old, new), **how)
    return Command(f"source: {name}", ("check", "k.py"), ("k.py:", *words), files={"k.py": text})


def whole(name: str, *words: str, code: int = 1, **how: Any) -> Command:
    """A kernel file made with :func:`kernel_text`."""
    files = {"k.py": kernel_text(**how)}
    return Command(f"source: {name}", ("check", "k.py"), words, code=code, files=files)


def text(name: str, content: str, *words: str, code: int = 1) -> Command:
    """A whole file."""
    return Command(
        f"source: {name}",
        ("check", "k.py"),
        words,
        code=code,
        files={"k.py": HEAD + dedent(content)},
    )


def _decorate(mapping: Any, function: Any, **how: Any) -> Any:
    return tilelink.kernel(mapping, **how)(function)


def _plain(A: Any, B: Any, C: Any) -> None:
    """A function with nothing in it."""


class _Callable:
    def __call__(self) -> None:
        pass


GATHER = "gather A[M, K] over M"
DOT = "acc = tk.dot(A[m, k], B[k, n], acc)"
ZEROS = "acc = tk.zeros([m, n], tk.float32)"
STORE = "C[m, n] = acc"

CASES: tuple[Case, ...] = (
    Call("decorator: no mapping", lambda: tilelink.kernel(_plain), ("mapping",)),  # type: ignore[arg-type]
    Call("decorator: mapping is a number", lambda: _decorate(3, _plain), ("mapping", "int")),
    Call("decorator: mapping is None", lambda: _decorate(None, _plain), ("mapping", "NoneType")),
    Call("decorator: mapping is bytes", lambda: _decorate(b"gather", _plain), ("mapping", "bytes")),
    Call("decorator: a lambda", lambda: _decorate(GATHER, lambda A: A), ("lambda",)),
    Call("decorator: a built-in", lambda: _decorate(GATHER, len), ("len", "function")),
    Call("decorator: a class", lambda: _decorate(GATHER, _Callable), ("_Callable", "function")),
    Call("decorator: an object", lambda: _decorate(GATHER, _Callable()), ("function",)),
    Call("decorator: None", lambda: _decorate(GATHER, None), ("None", "function")),
    Call(
        "decorator: a function of exec",
        lambda: _decorate(GATHER, _executed("def g(A):\n    pass\n")["g"]),
        ("g",),
    ),
    Call(
        "decorator: example is a list", lambda: _decorate(GATHER, _plain, example=[1]), ("example",)
    ),
    Call(
        "decorator: example is no number",
        lambda: _decorate(GATHER, _plain, example={"M": "many"}),
        ("example", "M"),
    ),
    Call(
        "decorator: example is negative",
        lambda: _decorate(GATHER, _plain, example={"M": -4}),
        ("example", "M", "-4"),
    ),
    Call(
        "decorator: mapping file missing",
        lambda: _decorate("nowhere.map", _plain),
        ("nowhere.map",),
    ),
    Call("decorator: mapping file binary", lambda: _binary_mapping(), ("binary.map",)),
    whole("decorator not called", "mapping", "k.py:6", decorator="@tilelink.kernel"),
    whole(
        "decorator: an unknown argument",
        "`exmple`",
        "did you mean `example`?",
        "k.py:6",
        decorator=f"@tilelink.kernel({MAPPING}, exmple=dict(M=64))",
    ),
    whole(
        "decorator: an example that is not named",
        "too many positional arguments",
        "example=dict(M=512)",
        decorator=f"@tilelink.kernel({MAPPING}, dict(M=64))",
    ),
    whole("decorator: nothing", "'mapping'", "k.py:6", decorator="@tilelink.kernel()"),
    whole(
        "decorator: an example of small letters",
        "there is no extent `m`",
        "did you mean `M`?",
        "k.py:6",
        code=2,
        decorator=f"@tilelink.kernel({MAPPING}, example=dict(m=64, N=32, K=32))",
    ),
    whole(
        "async function", "async", decorator=f"@tilelink.kernel({MAPPING})\nasync def g(A): pass\n"
    ),
    whole("star arguments", "`*rest`", parameters="A, B, C, *rest"),
    whole("double-star arguments", "rest", parameters="A, B, C, **rest"),
    whole("a moved tensor that is no parameter", "`Q`", mapping='"gather Q[M, K] over M"'),
    whole("an empty body", "`f`", "stores to none", body="pass"),
    whole("a body that returns", "return", body=GOOD_BODY + "return C\n"),
    whole("a default for a tensor that is a number", "`B`", parameters="A, B=3, C=None"),
    body(
        "a product that nobody takes",
        DOT,
        DOT.removeprefix("acc = "),
        "nothing uses",
        "acc = tk.dot",
    ),
    body("== in place of =", STORE, "C[m, n] == acc", "nothing uses", "write `C[m, n] = acc`"),
    body(
        "a method whose value is lost", STORE, f"{STORE}\n    acc.to(tk.bfloat16)", "nothing uses"
    ),
    body(
        "a sum without an axis",
        STORE,
        "C[m, n] = tk.sum(acc)",
        "`sum` without an axis",
        "tk.sum(x, axis=1)",
    ),
    body(
        "a sum along an axis that is not there",
        STORE,
        "C[m, n] = tk.sum(acc, axis=2)",
        "along `2`",
        "2, counted from 0",
    ),
    body("a name in place of a store", STORE, "C = acc", "stores nothing", "C[m, n] = x"),
    body("no store", STORE, "pass", "k.py:10", "reads `A` and `B`", "stores nothing"),
    body("a sum with no start", ZEROS, "pass", "`acc`", "give `acc` a value before"),
    body("a rank", STORE, "C[m, n] = acc * RANK", "`RANK`", "names no rank"),
    body("a function of another library", STORE, "C[m, n] = relu(acc)", "`relu`", "those of `tk`"),
    body(
        "an axis that is not there",
        "N = B.shape[1]",
        "N = A.shape[2]",
        "`A.shape` has 2 axes",
        "axis 2",
    ),
    body("len of a tensor", "N = B.shape[1]", "N = len(B)", "len", "A.shape[0]"),
    body("float of a tile", STORE, "C[m, n] = float(acc)", "float", "x.to(tk.float32)"),
    body(
        "a shape as an extent", "tk.tiles(M, N)", "tk.tiles(A.shape)", "`(M, K)`", "not an extent"
    ),
    body(
        "an attribute of a class",
        STORE,
        "C[m, n] = acc * Cfg.a",
        "the class `Cfg`",
        before="class Cfg:\n    a = 1",
    ),
    body(
        "a lambda from outside",
        STORE,
        "C[m, n] = g(acc)",
        "k.py:",
        "lambda",
        before="g = lambda x: x",
    ),
    body(
        "a function without return",
        STORE,
        "C[m, n] = g(acc)",
        "None",
        "return",
        before="def g(x):\n    pass",
    ),
    whole("a constant without a value", "`relu`", "default", parameters="A, B, C, *, relu"),
    body("undefined name", DOT, "acc = tk.dot(A[m, k], D[k, n], acc)", "`D`", "not defined"),
    body("unknown function of tk", DOT, "acc = tk.matmul(A[m, k], B[k, n])", "matmul"),
    body("call of numpy", ZEROS, "acc = numpy.zeros((m, n))", "numpy", before="import numpy"),
    body("lambda in the body", ZEROS, "acc = (lambda: 0)()", "lambda"),
    body("while", STORE, "while True:\n        C[m, n] = acc", "while"),
    body("try", STORE, "try:\n        pass\n    except: pass", "try"),
    body("with", STORE, "with tk as x:\n        C[m, n] = acc", "with"),
    body("import inside", STORE, "import os", "import"),
    body("global", STORE, "global acc", "global"),
    body("print", STORE, "print(acc)", "print"),
    body("comprehension", STORE, "x = [acc for i in range(3)]", "comprehension"),
    body("f-string", STORE, "x = f'{acc}'", "f-string"),
    body("walrus", STORE, "C[m, n] = (y := acc)", ":="),
    body("break", STORE, "break", "break"),
    body("continue", STORE, "continue", "continue"),
    body("assert", STORE, "assert acc", "assert"),
    body("del", STORE, "del acc", "del"),
    body("yield", STORE, "yield acc", "yield"),
    body("a function in the body", STORE, "def g(): pass", "function"),
    body("a class in the body", STORE, "class G: pass", "class"),
    body("a string value", STORE, "C[m, n] = 'x'", "'x'"),
    body("matrix product operator on one row", DOT, "acc = acc @ 3", "@"),
    body("Python range over a tile", "for k in tk.tiles(K):", "for k in range(m):", "range"),
    body("loop over a number", "for k in tk.tiles(K):", "for k in 5:", "5"),
    body("loop over a tensor", "for k in tk.tiles(K):", "for k in A:", "`A`"),
    body("tiles of a float", "tk.tiles(K)", "tk.tiles(1.5)", "1.5"),
    body("tiles of nothing", "tk.tiles(K)", "tk.tiles()", "tiles"),
    body("for-else", STORE, "for q in tk.tiles(K):\n        pass\n    else:\n        pass", "else"),
    body("too many indices", "A[m, k]", "A[m, k, n]", "`A`", "3"),
    body("too few indices", "A[m, k]", "A[m]", "`A`", "1"),
    body("an index that is text", "A[m, k]", "A['m', k]", "'m'"),
    body("an index with a step", "A[m, k]", "A[m, ::2]", "step"),
    body("a gathered tensor read elsewhere", "A[m, k]", "A[k, k]", "`A`"),
    body("a store to a gathered tensor", STORE, "A[m, n] = acc", "`A`"),
    body("shapes that do not agree", "B[k, n]", "B[n, k]", "does not agree"),
    body("three loop variables for two extents", "for m, n in", "for m, n, o in", "3"),
    body("a dtype that is none", "tk.float32", "tk.float7", "float7"),
    body("a dtype that is a number", "tk.float32", "32", "32"),
    body("zeros with no shape", ZEROS, "acc = tk.zeros()", "zeros"),
    body("zeros with a negative extent", ZEROS, "acc = tk.zeros([-1, n], tk.float32)", "-1"),
    body("zeros of text", ZEROS, "acc = tk.zeros('mn', tk.float32)", "zeros"),
    body("an unknown keyword", ZEROS, "acc = tk.zeros([m, n], colour=3)", "colour"),
    body("dot of one argument", DOT, "acc = tk.dot(A[m, k])", "dot"),
    body("dot of numbers", DOT, "acc = tk.dot(1, 2, 3)", "dot"),
    body("an unknown attribute", "A.shape", "A.size", "size"),
    body("the shape past the rank", "B.shape[1]", "B.shape[7]", "7"),
    body("unpacking into too many", "M, K = A.shape", "M, K, Q = A.shape", "3"),
    body("a carried value that changes type", DOT, "acc = tk.cast(acc, tk.int32)", "`acc`"),
    body("an accumulator not set before", ZEROS, "pass", "`acc`"),
    body("if on a tile", STORE, "if acc > 0:\n        C[m, n] = acc", "compiled"),
    body("division by zero of extents", "tk.tiles(K)", "tk.tiles(K // 0)", "zero"),
    body("an extent that is huge", "tk.tiles(K)", "tk.tiles(10 ** 30)", "10"),
    body("starred call", DOT, "acc = tk.dot(*[A[m, k], B[k, n]])", "*"),
    body(
        "a tile variable that is compared",
        STORE,
        "if m == 0: C[m, n] = acc",
        "`m`",
        "m.index",
        "tk.where",
    ),
    body("a tensor that is compared", STORE, "if A != 0: C[m, n] = acc", "`A`", "A[m, k]"),
    body("a loop with a variable left out", "m, n in", "m in", "`n`", "tk.tiles(…, N)"),
    body(
        "a sum that begins as a number",
        "tk.zeros([m, n], tk.float32)",
        "0",
        "accumulator",
        "tk.zeros([m, n]",
    ),
    body("a product of a whole tensor", "A[m, k], B", "A, B", "`A`", "A[m, k]"),
    body("chained comparison", STORE, "C[m, n] = tk.where(0 < acc < 1, acc, acc)", "comparison"),
    body("is", STORE, "C[m, n] = acc is acc", "is"),
    body("not a name unpacked", "M, K = A.shape", "A.shape = M, K", "A.shape"),
    text(
        "a kernel that calls itself",
        """
        def helper(A, B):
            return helper(A, B)


        @tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32})
        def f(A, C):
            M, K = A.shape
            for m, k in tk.tiles(M, K):
                C[m, k] = helper(A[m, k], 1)
        """,
        "helper",
        "recurs",
    ),
    text(
        "two helpers that call each other",
        """
        def ping(x):
            return pong(x)


        def pong(x):
            return ping(x)


        @tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32})
        def f(A, C):
            M, K = A.shape
            for m, k in tk.tiles(M, K):
                C[m, k] = ping(A[m, k])
        """,
        "ping",
        "recurs",
    ),
    text(
        "a closure over a tensor",
        """
        import torch

        W = torch.zeros(4, 4)


        @tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32})
        def f(A, C):
            M, K = A.shape
            for m, k in tk.tiles(M, K):
                C[m, k] = A[m, k] + W
        """,
        "`W`",
    ),
    text("not Python", "def f(:\n", "not Python", "k.py:"),
    text("raises on import", "raise ValueError('no luck')\n", "no luck", "k.py"),
    text("exits on import", "import sys\nsys.exit(3)\n", "k.py", "exit"),
    text("no kernel in the file", "x = 1\n", "k.py", "kernel", code=2),
    text("an import that is not there", "import no_such_module\n", "no_such_module"),
    text("parentheses without end", "x = " + "(" * 400 + "\n", "not Python"),
    text(
        "an expression too deep",
        "@tilelink.kernel('gather A[M, K] over M', example={'M': 64, 'K': 32})\n"
        "def f(A, C):\n"
        "    M, K = A.shape\n"
        "    for m, k in tk.tiles(M, K):\n"
        f"        C[m, k] = {'-' * 3000}A[m, k]\n",
        "deep",
    ),
)


def _executed(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(text, names)
    return names


def _binary_mapping() -> Any:
    from pathlib import Path

    from tilelink.kernel import load_kernels

    Path("binary.map").write_bytes(b"\xff\xfe\x00\x80")
    Path("k.py").write_text(kernel_text(mapping='"binary.map"'))
    return load_kernels("k.py")
