"""Signals that are too weak: what a sanitizer must report."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device.signal import _word


@triton.jit
def relaxed_notify(ctx, word, peer, through, count):
    """As `tilelink.device.counted_tile_notify`, releasing nothing."""
    tl.debug_barrier()
    if tl.atomic_add(ctx.arena + through, 1, sem="relaxed", scope="sys") == count - 1:
        tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="relaxed", scope="sys")


@triton.jit
def narrow_notify(ctx, word, peer, through, count):
    """As `tilelink.device.counted_tile_notify`, releasing to this GPU only."""
    tl.debug_barrier()
    if tl.atomic_add(ctx.arena + through, 1, sem="acq_rel", scope="gpu") == count - 1:
        tl.atomic_xchg(_word(ctx.peers, peer, word), ctx.epoch, sem="release", scope="gpu")
