"""What several tests of the command line begin with."""

from pathlib import Path

import pytest

AG_GEMM = """\
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def ag_gemm(A, B, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file with one kernel."""
    path = tmp_path / "ag_gemm.py"
    path.write_text(AG_GEMM)
    return str(path)
