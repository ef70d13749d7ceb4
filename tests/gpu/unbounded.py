"""The device primitives with waits that know no limit: what the bounded ones are compared with.

An emitted module that imports this in place of `tilelink.device` waits as other systems do: it polls,
looks at no clock and no abort word, and leaves no record.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device import *  # noqa: F403
from tilelink.device.dialect import axis
from tilelink.device.signal import MAX_WORLD, _fence_proxy


@triton.jit
def _wait(ctx, word, expected, fence: tl.constexpr):
    flag = ctx.arena + word
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while seen - expected < 0:
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    token = tl.where(seen - expected < 0, 0, (seen - expected) >> 31)
    if fence:
        token = _fence_proxy(token)
    return token


@triton.jit
def peer_tile_wait(ctx, word, epoch, producer, tile, wait, fence: tl.constexpr = False):
    """As :func:`tilelink.device.peer_tile_wait`, without limit."""
    return _wait(ctx, word, epoch, fence)


@triton.jit
def consumer_tile_wait(ctx, word, count, tile, wait, fence: tl.constexpr = False):
    """As :func:`tilelink.device.consumer_tile_wait`, without limit."""
    return _wait(ctx, word, count, fence)


@triton.jit
def peer_tiles_wait(ctx, word, step, low, high, epoch, tile, wait, fence: tl.constexpr = False):
    """As :func:`tilelink.device.peer_tiles_wait`, without limit."""
    ranks = axis(MAX_WORLD)
    inside = (ranks >= low) & (ranks < high)
    nothing = ranks * 0
    flags = ctx.arena + word + ranks * step
    behind = tl.cast(1, tl.int32)
    while behind != 0:
        seen = tl.atomic_add(flags, nothing, mask=inside, sem="acquire", scope="sys")
        behind = tl.sum((inside & (seen - epoch < 0)).to(tl.int32), axis=0)
    token = behind >> 31
    if fence:
        token = _fence_proxy(token)
    return token


@triton.jit
def rank_wait(ctx, word, epoch, wait, fence: tl.constexpr = False):
    """As :func:`tilelink.device.rank_wait`, without limit."""
    return peer_tiles_wait(ctx, word, 1, 0, ctx.world, epoch, 0, wait, fence)
