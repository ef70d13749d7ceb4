"""The kernel that ends a call which its launch does not end: little, unless a wait ran out."""

# `@triton.jit` functions are Triton source: their arguments have no Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device.program import clear_words, compare_calls
from tilelink.device.signal import EPOCH
from tilelink.ir import layout

ABORT = tl.constexpr(layout.ABORT)
RECORD = tl.constexpr(layout.RECORD)
RECORD_WORDS = tl.constexpr(layout.RECORD_WORDS)
BEGUN = tl.constexpr(layout.BEGUN)
ENDED = tl.constexpr(layout.ENDED)
LEAVING = tl.constexpr(layout.LEAVING)
CTAS = 32


@triton.jit(do_not_specialize=["host", "size", "rank", "first", "last"])
def guard_kernel(
    arena,
    host,
    out,
    size,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr,
    peers=None,
    rank=0,
    WORLD: tl.constexpr = 1,
    SAYS: tl.constexpr = False,
    first=0,
    last=0,
):
    """Ends the call: clears the counter words [``first``, ``last``), and what else the next one finds as the
    first did. Where the abort word of ``arena`` is set: fills ``out`` with NaN (-1 if not ``FLOAT``), and
    writes 1 and the error record to pinned host memory at address ``host`` (int64).

    ``out`` has ``size`` elements. Launch with any number of CTAs behind everything that writes ``out``.
    Where ``SAYS`` is set, a rank that is known to have begun another call is such a case, see
    :func:`tilelink.device.program.compare_calls`; ``peers``, ``rank`` and ``WORLD`` as those of ``head_kernel``.
    """
    if SAYS:
        compare_calls(arena, peers, rank, WORLD, tl.load(arena + EPOCH))
        tl.debug_barrier()
    if tl.load(arena + ABORT, volatile=True) != 0:
        value = float("nan") if FLOAT else -1
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            offsets = start + tl.arange(0, BLOCK)
            filled = tl.full((BLOCK,), value, out.dtype.element_ty)
            tl.store(out + offsets, filled, mask=offsets < size)
        if tl.program_id(0) == 0:
            record = host.to(tl.pointer_type(tl.int32), bitcast=True)
            words = tl.arange(0, RECORD_WORDS)
            tl.store(record + 1 + words, tl.load(arena + RECORD + words))
            tl.debug_barrier()
            tl.store(record, 1)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        clear_words(arena, first, last)
        tl.store(arena + BEGUN, 0)
        tl.store(arena + LEAVING + 1, 0)
        tl.store(arena + LEAVING + 3, 0)
        tl.store(arena + ENDED, tl.load(arena + EPOCH))
