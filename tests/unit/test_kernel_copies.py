"""Kernels as parts of other objects: copied, pickled, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tilelink
from tilelink import kernels
from tilelink.errors import Source, Span, TilelinkError
from tilelink.frontend.errors import BadCall, NotPicklable
from tilelink.kernel import load_kernels
from tilelink.schedules import Schedule


class Layer(torch.nn.Module):
    """A module that holds a kernel, plain and bound."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16, 16))
        self.kernel = kernels.gemm
        self.bound = kernels.gemm.on("reference", world=1)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_kernel_is_that_kernel(copied: Any) -> None:
    bound = kernels.gemm.on("reference")
    assert copied(kernels.gemm) is kernels.gemm and copied(bound) is bound


def test_modules_that_hold_kernels_are_copied_and_pickled() -> None:
    layer = Layer()
    twin = copy.deepcopy(layer)
    assert twin.weight is not layer.weight
    assert twin.kernel is layer.kernel and twin.bound is layer.bound
    loaded = pickle.loads(pickle.dumps(layer.bound))
    a = torch.ones(16, 16)
    assert torch.equal(loaded(a, a)[0], a @ a)
    assert pickle.loads(pickle.dumps(layer.__dict__))["kernel"] is kernels.gemm


def test_the_options_of_a_bound_kernel_are_pickled_with_it() -> None:
    schedule = Schedule(tiles=(("M", 64),))
    bound = kernels.ag_gemm.on("simulate", world=4, schedule=schedule, seed=7, dynamic={"M": (64,)})
    loaded = pickle.loads(pickle.dumps(bound))
    assert loaded.kernel is kernels.ag_gemm and loaded.capacities == bound.capacities
    options = ("backend", "world", "schedule", "seed")
    assert [getattr(loaded, o) for o in options] == [getattr(bound, o) for o in options]


def test_a_process_group_is_not_pickled() -> None:
    bound = kernels.ag_gemm.on(group=object())
    assert copy.deepcopy(bound) is bound
    with pytest.raises(NotPicklable, match="belongs to the processes that made it") as caught:
        pickle.dumps(bound)
    assert isinstance(caught.value, pickle.PicklingError)


def test_a_kernel_that_its_name_does_not_find_is_not_pickled() -> None:
    @tilelink.kernel("local A[M]")
    def inner(A: Any, C: Any) -> None:
        for m in tilelink.language.tiles(A.shape[0]):
            C[m] = A[m]

    with pytest.raises(NotPicklable, match="pickled by name"):
        pickle.dumps(inner)
    assert copy.deepcopy(inner) is inner


def test_a_kernel_is_loaded_where_its_module_is_found(tmp_path: Path) -> None:
    """That of a file read by its path is found in this process and in no other one."""
    example = load_kernels(Path(__file__).parents[2] / "examples" / "ag_gemm.py")["ag_gemm"]
    assert pickle.loads(pickle.dumps(example)) is example
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    for kernel, error in ((kernels.ag_gemm, ""), (example, "nothing here has that name")):
        (tmp_path / "kernel").write_bytes(pickle.dumps(kernel))
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "kernel")], capture_output=True, text=True
        )
        assert (done.returncode != 0) == bool(error) and error in done.stderr


def test_errors_reach_other_processes_whole() -> None:
    error: TilelinkError = BadCall(
        Span(Source("a.py", "x = 1"), 1, 1, 2), notes=("why",), what="this", advice="that"
    )
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is BadCall and str(loaded) == str(error)
    assert (loaded.span, loaded.notes, loaded.values) == (error.span, error.notes, error.values)
