"""The positive controls of the soak, without GPUs: each finds what it breaks in the text of today's emitter."""

from __future__ import annotations

from functools import cache

import pytest

import tilelink.kernels
from tests.gpu.integers import with_jitter
from tests.gpu.reliability import SOAKED, schedule_of, small
from tests.gpu.text_mutants import MUTANTS, TextMutant
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel


@cache
def source(kernel: str, resource: str, world: int) -> str:
    """The module that the soak runs."""
    op = getattr(tilelink.kernels, kernel).build(small(world), world=world, dtype="bf16")
    return with_jitter(emit(compile_kernel(op, schedule_of(op, resource))))


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kernel}-{m.resource}-{m.name}")
def test_a_mutant_breaks_the_text_and_leaves_a_module(mutant: TextMutant, world: int) -> None:
    intact = source(mutant.kernel, mutant.resource, world)
    broken = mutant.edit(intact)
    compile(broken, mutant.name, "exec")
    assert broken != intact


def test_there_are_enough_of_enough_kinds() -> None:
    assert len(MUTANTS) >= 20
    assert {"dropped wait", "dropped notify", "wrong count", "wrong epoch", "forgotten flush"} <= {
        m.kind for m in MUTANTS
    }
    # Of kernels that the soak runs, or it is no control of it.
    soaked = {(kind, resource) for kind, resource, _ in SOAKED} | {("gemm_ar", "epilogue")}
    assert {(m.kernel, m.resource) for m in MUTANTS} <= soaked
