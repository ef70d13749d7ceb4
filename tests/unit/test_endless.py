"""Inputs behind whose rows kernels may read: which they are, and that nothing of what lies there is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.endless import endless_inputs
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.validate import EmittedError, read_module, split_modules, validate
from tilelink.kernel import Kernel, load_kernels
from tilelink.schedules import Move, Schedule

TILES = (("K", 64), ("M", 64), ("N", 64))
EPILOGUE = (("C", Move("epilogue")),)
HEAD = "import tilelink\nimport tilelink.language as tk\n\n\n"
Write = Callable[[str], Kernel]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(body: str) -> Kernel:
        path = tmp_path / "k.py"
        lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
        path.write_text(f'{HEAD}@tilelink.kernel("local A[M, K]")\ndef f(A, B, C):\n{lines}\n')
        return load_kernels(path)["f"]

    return make


def inputs(name: str, rows: int, moves: tuple[tuple[str, Move], ...] = EPILOGUE) -> frozenset[str]:
    op = getattr(kernels, name).build({"M": rows, "K": 128, "N": 128}, world=2)
    return endless_inputs(run_passes(op, Schedule(tiles=TILES, moves=moves)))


@pytest.mark.parametrize(("rows", "found"), [(128, set()), (64, set()), (2, {"A"}), (144, {"A"})])
def test_rows_that_end_within_a_tile_may_be_read_on(rows: int, found: set[str]) -> None:
    assert inputs("gemm_ar", rows) == found


def test_a_shard_that_is_read_in_place_ends_where_its_rank_does() -> None:
    copied, stores = (("A", Move("copy_engine")),), (("A", Move("none")),)
    assert inputs("ag_gemm", 144, copied) == {"A"}  # 72 rows a rank
    assert inputs("ag_gemm", 256, copied) == set()
    assert inputs("ag_gemm", 144, stores) == set()  # nothing but the library reads it
    # Weights end with K, which is summed over.
    assert inputs("gemm_ar", 128) == set()


def test_text_that_reads_on_where_it_may_not_is_refused() -> None:
    for rows, other in ((144, "B"), (128, "A")):
        op = kernels.gemm_ar.build({"M": rows, "K": 128, "N": 128}, world=2)
        program = compile_kernel(op, Schedule(tiles=TILES, moves=EPILOGUE))
        text = emit(program)
        assert ('call.room("A")' in text) == (rows == 144)
        validate(read_module(split_modules(text, "module.py")[0]), program)
        changed = text.replace(f'call.tensor("{other}")', f'call.room("{other}")')
        assert changed != text
        with pytest.raises(EmittedError, match=f"@{other} is no input behind"):
            validate(read_module(split_modules(changed, "module.py")[0]), program)


BODY = """
M, K = A.shape
N = B.shape[1]
for m, n in tk.tiles(M, N):
    acc = tk.zeros([m, n], tk.float32)
    for k in tk.tiles(K):
        acc = tk.dot(A[m, k], B[k, n], acc)
    C[m, n] = RESULT
"""


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ("acc", {"A"}),
        ("acc * 2.0 + 1.0", {"A"}),
        ("acc - tk.max(acc, axis=1)[:, None]", {"A"}),
        ("acc - tk.sum(acc, axis=0)[None, :]", set()),
        ("acc + A[m, n]", set()),
    ],
)
def test_rows_of_which_others_are_made_are_not_read_on(
    write: Write, result: str, found: set[str]
) -> None:
    op = write(BODY.replace("RESULT", result)).build({"M": 72, "K": 128, "N": 128}, world=1)
    tiles = (("K", 64), ("M", 64), ("N", 128))
    assert endless_inputs(run_passes(op, Schedule(tiles=tiles))) == found
