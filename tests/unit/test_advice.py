"""The help of a refusal, followed, leads to a command that is accepted."""

import re
import shlex
from pathlib import Path

import pytest

from tilelink.cli.main import main

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
ROWS = """
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather X[M, N] over M", example={"M": 64, "N": 64})
def doubled(X, Y):
    M, N = X.shape
    for m in tk.tiles(M):
        Y[m, :] = X[m, :] * 2.0
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The help of a command line that is refused, wholly."""
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error[") and "error[internal]" not in said
    return said.splitlines()[-1].partition("= help: ")[2]


def options(advice: str) -> list[str]:
    """The first of the options that a help names."""
    found = re.search(r"`(--[^`]+)`", advice)
    assert found is not None, advice
    return shlex.split(found[1])


@pytest.mark.parametrize(
    "given",
    [
        "--set M=8192,K=8192,N=8192 --tile M=2048,N=1024,K=64",
        "--set M=8192,K=8192,N=8192 --tile M=2048,N=1024,K=2048",
        "--set M=8192,K=8192,N=8192 --tile M=256,N=256,K=8192",
    ],
)
def test_tiles_that_are_too_large_are_refused_with_lengths_that_fit(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["emit", str(ROOT / "examples" / "ag_gemm.py"), *given.split()]
    assert main([*words, *options(refused(capsys, *words))]) == 0


def test_a_whole_axis_that_is_too_large_is_to_be_walked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.py"
    file.write_text(ROWS)
    words = ["emit", str(file), "--set", "M=64,N=2097152"]
    assert "`tk.tiles(N)`" in refused(capsys, *words)
    file.write_text(ROWS.replace("m in tk.tiles(M)", "m, n in tk.tiles(M, N)").replace(":]", "n]"))
    assert main(words) == 0
