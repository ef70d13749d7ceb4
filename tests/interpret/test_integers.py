"""Integer arithmetic on tiles means the same in the reference, in the simulator and in emitted kernels."""

from pathlib import Path

import pytest
import torch

from tilelink.backend import reference, simulate
from tilelink.backend.division import DivisionByZero
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret
from tilelink.backend.validate import read_module, validate
from tilelink.cli.inputs import random_inputs
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.kernel import load_kernels

HEAD = """import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, N] over M")
def f(A, C):
    M, N = A.shape
    for m, n in tk.tiles(M, N):
        x = A[m, n]
"""
EXTENTS = {"M": 12, "N": 20}
BODIES = {
    "rounded down": ["C[m, n] = x // 7"],
    "the rest": ["C[m, n] = x % 7"],
    "by a negative number": ["C[m, n] = x // -7 + (x % -7) * 100"],
    "by a tile": [
        "y = n.index[None, :] - 9",
        "y = tk.where(y == 0, 1, y)",
        "C[m, n] = x // y - x % y",
    ],
    "of indices": ["C[m, n] = x + (m.index[:, None] - 5) // 3 + (n.index[None, :] + 5) % 3"],
    "of an index": ["for e in tk.range(4):", "    x = x + (e - 2) // 3", "C[m, n] = x"],
    "a range counts": ["for e in tk.range(2, 5):", "    x = x * 2 + e", "C[m, n] = x"],
    "to a power": ["C[m, n] = x ** 2 - x ** 5"],
    "to the power of a tile": ["C[m, n] = x ** (n.index[None, :] - 3) + 3 ** n.index[None, :]"],
    "wrapped around": ["C[m, n] = x * 2000000011 + 2000000011"],
}


def build(tmp_path: Path, body: list[str], dtype: str) -> Op:
    path = tmp_path / "kernels.py"
    path.write_text(HEAD + "".join(f"        {line}\n" for line in body))
    return load_kernels(path)["f"].build(EXTENTS, world=2, dtypes={"A": dtype, "C": dtype})


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", BODIES)
def test_integers_agree(tmp_path: Path, name: str, dtype: str) -> None:
    if (name, dtype) == ("wrapped around", "int64"):
        pytest.skip("nothing wraps in 64 bits here")
    kernel = build(tmp_path, BODIES[name], dtype)
    numbers = torch.arange(-60, 60).reshape(6, 20).to(getattr(torch, dtype))
    inputs = [{"A": numbers}, {"A": numbers.flip(0) * 3}]
    want = reference.run(kernel, inputs)
    program = compile_kernel(kernel)
    validate(read_module(Source("emitted.py", emit(program))), program)
    for found in (simulate.run(program, inputs), interpret.run(program, inputs, timeout=120.0)):
        for got, right in zip(found, want, strict=True):
            assert torch.equal(got["C"], right["C"])


def test_division_is_that_of_python(tmp_path: Path) -> None:
    kernel = build(tmp_path, BODIES["rounded down"], "int32")
    numbers = torch.arange(-60, 60, dtype=torch.int32).reshape(6, 20)
    [first, _] = reference.run(kernel, [{"A": numbers}, {"A": numbers}])
    assert first["C"][:6].flatten().tolist() == [x // 7 for x in range(-60, 60)]


@pytest.mark.parametrize(("body", "sign"), [("C[m, n] = 7 // x", "//"), ("C[m, n] = 7 % x", "%")])
def test_a_division_by_zero_is_refused(tmp_path: Path, body: str, sign: str) -> None:
    kernel = build(tmp_path, [body], "int32")
    numbers = torch.arange(120, dtype=torch.int32).reshape(6, 20)
    inputs = [{"A": numbers}, {"A": numbers + 1}]
    for run in (reference.run, lambda _, given: simulate.run(compile_kernel(kernel), given)):
        with pytest.raises(DivisionByZero, match=f"`{sign}` of integers divides by 0") as refused:
            run(kernel, inputs)
        assert f"{body[10:]}" in str(refused.value)


@pytest.mark.parametrize("body", ["C[m, n] = 7 // x", "C[m, n] = 7 % A[m, n]"])
def test_drawn_divisors_are_not_zero(tmp_path: Path, body: str) -> None:
    kernel = build(tmp_path, [body], "int64")
    inputs = random_inputs(kernel, 0)
    assert all(int(rank["A"].min()) == 1 and int(rank["A"].max()) == 2 for rank in inputs)
    reference.run(kernel, inputs)
