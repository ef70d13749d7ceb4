"""Signals that are too weak, which a sanitizer must report, and one that is stronger than it has to be."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device.signal import EPOCH, _word, drain_tma_stores


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


@triton.jit
def joined_notify(ctx, pending, system: tl.constexpr = False):
    """As `tilelink.device.delayed_tile_notify`, acquiring what the notifies before it released.

    Read-modify-writes carry on the releases before them (PTX memory model, observation order); a tool
    that follows only the last release needs this.
    """
    if pending >= 0:
        drain_tma_stores()
        tl.debug_barrier()
        tl.atomic_add(ctx.arena + pending, 1, sem="acq_rel", scope="sys")


@triton.jit
def deaf_call(ctx, program, ACK: tl.constexpr, STREAMS: tl.constexpr = False):
    """As `tilelink.device.open_call`, waiting for no acknowledgement, and telling nobody but streams."""
    tl.store(ctx.arena + EPOCH, ctx.epoch)
