"""Each mistake gives its own error, with a caret on the place and no frame of the compiler."""

from pathlib import Path

import pytest

from tilelink.errors import TilelinkError
from tilelink.kernel import load_kernels

HEAD = "import torch\nimport tilelink\nimport tilelink.language as tk\nTABLE = [1, 2]\n\n"
COPY = "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    C[m, n] = {}"
SUM = "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    C[m, n] = A[m, n]\n"

# mapping, body, code of the error, text under the caret
MISTAKES = [
    ("gather A[M, N] over M", COPY.format("A[m, 2 * n]"), "unmapped-read", "A[m, 2 * n]"),
    ("gather A[M, N] over M", COPY.format("A[m + 8, n]"), "unmapped-read", "A[m + 8, n]"),
    ("gather A[M, N] over M", COPY.format("A[m, ::2]"), "unmapped-read", "A[m, ::2]"),
    (
        "reduce C[M, N] sum",
        "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    D[m, n] = C[m, n]",
        "unmapped-read",
        "C[m, n]",
    ),
    (
        "shard A[M, N] over M",
        "M, N = A.shape\nfor n in tk.tiles(N):\n    C[:, n] = A[:, n]",
        "unmapped-read",
        "A[:, n]",
    ),
    ("gather A[M, N] over M", COPY.format("A[m]"), "wrong-rank", "A[m]"),
    ("gather A[M, N] over M", COPY.format("A[n, m]"), "shape-mismatch", "A[n, m]"),
    ("gather A[M, N] over M", COPY.format("A[m, n].T"), "shape-mismatch", "C[m, n]"),
    (
        "gather A[M, N] over M",
        COPY.format("A[m, n] + A[m, :]"),
        "shape-mismatch",
        "A[m, n] + A[m, :]",
    ),
    (
        "gather A[M, N] over M",
        COPY.format("tk.dot(A[m, n], A[m, n])"),
        "shape-mismatch",
        "tk.dot(A[m, n], A[m, n])",
    ),
    (
        "gather A[M, N] over M",
        COPY.format("tk.dot(A[m, n], D[n, n].to(tk.float32))"),
        "dtype-mismatch",
        "tk.dot(A[m, n], D[n, n].to(tk.float32))",
    ),
    ("gather A[M, N] over M", COPY.format("A[m, n] // 2.0"), "dtype-mismatch", "A[m, n] // 2.0"),
    (
        "gather A[M, N] over M",
        COPY.format("A[m, n] & A[m, n]"),
        "dtype-mismatch",
        "A[m, n] & A[m, n]",
    ),
    ("gather A[M, N] over M", COPY.format("x"), "unknown-name", "x"),
    (
        "gather A[M, N] over M",
        COPY.format("A[m, n]") + "\n    tk.exp(A[m, n])",
        "unused-value",
        "tk.exp(A[m, n])",
    ),
    ("gather A[M, N] over M", COPY.format("A[m, n]") + "\n    m.index", "unused-value", "m.index"),
    ("gather A[M, N] over M", COPY.format("A.shape[2]"), "no-such-axis", "A.shape[2]"),
    ("gather A[M, N] over M", COPY.format("tk.blah(A[m, n])"), "unknown-name", "tk.blah"),
    (
        "gather A[M, N] over M; gather Z[M, N] over M",
        COPY.format("A[m, n]"),
        "unknown-name",
        "gather Z[M, N] over M",
    ),
    (
        "gather A[M, N] over M",
        "M, N = A.shape\nfor m in tk.tiles(M):\n    x = A[m, :]\nC[0] = x",
        "unknown-name",
        "x",
    ),
    ("gather A[M, N] over M", "for m in tk.tiles(3):\n    pass", "not-an-extent", "tk.tiles(3)"),
    (
        "gather A[M, N] over M",
        "M = A.shape[0]\nfor m in tk.tiles(0, 1.5):\n    C[m, 0] = 1.0",
        "not-an-extent",
        "tk.tiles(0, 1.5)",
    ),
    (
        "gather A[M, N] over M",
        COPY.format("A[m, n] if A[m, n] > 0 else 1.0"),
        "not-compile-time",
        "A[m, n] > 0",
    ),
    ("gather A[M, N] over M", COPY.format("tk.exp(A[m, n], 3)"), "bad-call", "tk.exp(A[m, n], 3)"),
    ("gather A[M, N] over M", COPY.format("tk.log(m)"), "unsupported-syntax", "tk.log(m)"),
    (
        "gather A[M, N] over M",
        COPY.format("tk.sum(A[m, n])"),
        "unsupported-syntax",
        "tk.sum(A[m, n])",
    ),
    (
        "gather A[M, N] over M",
        COPY.format("torch.matmul(A, A)"),
        "unsupported-syntax",
        "torch.matmul(A, A)",
    ),
    ("gather A[M, N] over M", COPY.format("TABLE[0]"), "unsupported-syntax", "TABLE"),
    ("gather A[M, N] over M", "while True:\n    pass", "unsupported-syntax", "while True:"),
    ("gather A[M, N] over M", "return A", "unsupported-syntax", "return A"),
    (
        "gather A[M, N] over M",
        COPY.format("[x for x in A]"),
        "unsupported-syntax",
        "[x for x in A]",
    ),
    ("gather A[M, N] over M", "for m in range(3):\n    pass", "unsupported-syntax", "range(3)"),
    ("reduce C[M, N] sum", SUM + "    C[m, n] = C[m, n] + 1.0", "store-after-sum", "C[m, n]"),
    (
        "reduce C[M, N] sum",
        SUM
        + "for m, n in tk.tiles(M, N):\n    D[m, n] = C[m, n]\nfor m, n in tk.tiles(M, N):\n    C[m, n] = 0.0",
        "store-after-sum",
        "C[m, n]",
    ),
    ("shard A[M, N] over M", COPY.format("A[m, n]"), "partial-store", "C[m, n]"),
    (
        "shard A[M, N] over M; reduce C[M, N] sum",
        COPY.format("A[m, n]"),
        "partial-store",
        "C[m, n]",
    ),
    (
        "shard A[M, N] over M; scatter C[M, N] over M sum",
        COPY.format("A[m, n]"),
        "partial-store",
        "C[m, n]",
    ),
    (
        "shard A[M, N] over N; scatter C[M, N] over M sum",
        COPY.format("A[m, n]"),
        "partial-store",
        "C[m, n]",
    ),
    (
        "gather A[M, N] over M",
        "M, N = A.shape\nfor m in tk.tiles(M):\n    x = tk.zeros([m])\n"
        "    for n in tk.tiles(N):\n        x = x[:, None] + A[m, n]\n    C[m] = x",
        "loop-carried",
        "tk.tiles(N)",
    ),
    ("gather A[M, N] ovr M", COPY.format("A[m, n]"), "missing-over", "ovr"),
]


def refuse(
    tmp_path: Path, mapping: str, body: str, params: str = "A, C, D=None", **extents: int
) -> TilelinkError:
    """The error that a kernel gives."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path = tmp_path / "wrong.py"
    path.write_text(f'{HEAD}@tilelink.kernel("{mapping}")\ndef f({params}):\n{lines}\n')
    with pytest.raises(TilelinkError) as caught:
        given = {"M": 64, "N": 48} | extents
        load_kernels(path)["f"].build(given, world=4, present={"A", "C", "D"})
    return caught.value


def under_caret(error: TilelinkError) -> str:
    """The text that the error underlines."""
    assert error.span is not None
    line = error.span.source.line(error.span.line)
    return line[error.span.column - 1 : error.span.end - 1]


@pytest.mark.parametrize(("mapping", "body", "code", "text"), MISTAKES)
def test_mistake(tmp_path: Path, mapping: str, body: str, code: str, text: str) -> None:
    error = refuse(tmp_path, mapping, body)
    assert error.code == code, str(error)
    assert under_caret(error) == text
    printed = str(error).splitlines()
    assert printed[0].startswith(f"error[{code}]: ")
    assert printed[-1].lstrip().startswith("= help: ")
    assert "frontend/" not in str(error) and "Traceback" not in str(error)


def test_shape_mismatch_names_both_extents_and_values(tmp_path: Path) -> None:
    body = (
        "M, K = A.shape\nK2, N = C.shape\nfor m, n in tk.tiles(M, N):\n    x = tk.zeros([m, n])\n"
        "    for k in tk.tiles(K):\n        x = tk.dot(A[m, k], C[k, n], x)"
    )
    text = str(refuse(tmp_path, "gather A[M, K] over M", body, K=32, K2=40))
    assert "`K` (= 32)" in text and "`K2` (= 40)" in text


def test_extents_that_the_ranks_cannot_share(tmp_path: Path) -> None:
    error = refuse(tmp_path, "gather A[M, N] over M", COPY.format("A[m, n]"), M=63)
    assert error.code == "not-divisible" and "63" in str(error) and "4" in str(error)


def test_missing_extents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        f'{HEAD}@tilelink.kernel("gather A[M, N] over M")\ndef f(A, C):\n    '
        + COPY.format("A[m, n]").replace("\n", "\n    ")
    )
    with pytest.raises(TilelinkError, match="value of `N` of kernel `f`") as caught:
        load_kernels(path)["f"].build({"M": 64}, world=4)
    assert "--set N=512" in str(caught.value)


def test_a_mistake_in_a_helper_points_into_the_helper(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        f"{HEAD}def helper(x):\n    return x + missing\n\n\n"
        '@tilelink.kernel("gather A[M, N] over M")\ndef f(A, C):\n    M, N = A.shape\n'
        "    for m, n in tk.tiles(M, N):\n        C[m, n] = helper(A[m, n])\n"
    )
    with pytest.raises(TilelinkError) as caught:
        load_kernels(path)["f"].build({"M": 64, "N": 48}, world=4)
    assert under_caret(caught.value) == "missing"


def test_carets_count_characters_not_bytes(tmp_path: Path) -> None:
    error = refuse(tmp_path, "gather A[M, N] over M", 'x = "é"; y = nothing')
    assert under_caret(error) == "nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "this is not Python"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
        ("x = 1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(TilelinkError, match=message) as caught:
        load_kernels(path)
    assert caught.value.code == "bad-file" and caught.value.span is not None
    assert caught.value.span.line == 1


def test_a_condition_may_be_a_tensor_of_bools(tmp_path: Path) -> None:
    body = COPY.format("tk.where(A[m, n], 1.0, 0.0)")
    error = refuse(tmp_path, "gather A[M, N] over M", body)
    assert error.code == "dtype-mismatch" and "or of a tensor of bools" in str(error)
