"""What the passes make is proven, and stops being proven when any one wait or notify is taken out."""

from dataclasses import replace

import pytest

from tests.unit.test_verify import is_access
from tilelink.backend.mutate import deletions
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import CoverError, RaceError, ReuseError, VerifyError, verify
from tilelink.ir import Op, parse_ir, print_ir
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
    for line, mutant in deletions(program):
        with pytest.raises(VerifyError) as caught:
            verify(mutant)
        assert is_access(program, caught.value.span), (line, str(caught.value))


def weakened(op: Op, number: int, seen: list[int]) -> Op:
    """``op`` with its wait or notify ``number`` made relaxed."""
    if op.name in ("wait", "notify"):
        seen[0] += 1
        if seen[0] - 1 == number:
            return op.with_attrs(order="relaxed")
    blocks = tuple(
        replace(b, ops=tuple(weakened(o, number, seen) for o in b.ops)) for b in op.blocks
    )
    return replace(op, blocks=blocks)


@pytest.mark.parametrize(("kernel", "moved", "resource"), CASES)
def test_every_release_and_acquire_is_needed(kernel, moved, resource):  # type: ignore[no-untyped-def]
    """Relaxed, each of them still counts and still blocks; what rests on it is refused all the same."""
    op = kernel.build({"M": 72, "N": 40, "K": 24}, world=3)
    schedule = Schedule(
        tiles=(("M", 16), ("N", 32), ("K", 16)),
        workers=8,
        moves=((moved, Move(resource, None, 2)),),
    )
    program = run_passes(op, schedule)
    verify(program)
    count = sum(o.name in ("wait", "notify") for o in program.walk())
    assert (count > 0) == (resource != "none")
    for number in range(count):
        with pytest.raises((CoverError, RaceError, ReuseError)):
            verify(weakened(program, number, [0]))
