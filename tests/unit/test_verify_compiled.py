"""What the passes make is proven, and stops being proven when any one wait or notify is taken out."""

import pytest

from tests.unit.test_verify import is_access
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import VerifyError, mutants, verify
from tilelink.ir import parse_ir, print_ir
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs
from tilelink.schedules import Move, Schedule

CASES = [
    (ag_gemm, "A", "copy_engine"),
    (ag_gemm, "A", "sm:2"),
    (ag_gemm, "A", "none"),
    (gemm_rs, "C", "copy_engine"),
    (gemm_rs, "C", "sm:2"),
    (gemm_rs, "C", "epilogue"),
    (gemm_rs, "C", "none"),
    (gemm_ar, "C", "copy_engine"),
    (gemm_ar, "C", "epilogue"),
    (gemm_ar, "C", "none"),
]


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize(("kernel", "moved", "resource"), CASES)
def test_deletions_are_refused(kernel, moved, resource, channels):  # type: ignore[no-untyped-def]
    world = 3
    op = kernel.build({"M": world * 24, "N": 40, "K": 24}, world=world)
    schedule = Schedule(
        tiles=(("M", 16), ("N", 32), ("K", 16)),
        workers=8,
        moves=((moved, Move(resource, None, channels)),),
    )
    # Read back from text, so that every op has a place of its own.
    program = parse_ir(print_ir(run_passes(op, schedule)), "compiled")
    assert verify(program).world == world
    for line, mutant in mutants(program):
        with pytest.raises(VerifyError) as caught:
            verify(mutant)
        assert is_access(program, caught.value.span), (line, str(caught.value))
