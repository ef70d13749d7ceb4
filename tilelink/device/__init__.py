"""Device primitives for kernels that communicate: a small public Triton library.

Every function may be called from any ``@triton.jit`` kernel. The names are those of the TileLink paper
(Zheng et al., 2025, section 3): signals between tiles (``producer_tile_notify``,
``consumer_tile_wait``), between peers (``peer_tile_notify``, ``peer_tile_wait``), between all ranks
(``rank_notify``, ``rank_wait``; ``all_tile_notify`` and ``peer_tiles_wait`` for one tile), data
movement (``tile_push_data``, ``tile_pull_data``, ``rank_copy_data``), and data that is its own signal
(``store_words``, ``load_words``, ``sum_words``, ``empty_words``). Where control words lie in an
arena says :mod:`tilelink.ir.layout`.
"""

from tilelink.device import data, dialect, keys, math, places, program, signal, words
from tilelink.device.data import (
    peer_pointer,
    pointer,
    rank_copy_data,
    remote_tile,
    tile_pull_data,
    tile_push_data,
    tile_sum_parts,
    tile_sum_remote,
)
from tilelink.device.math import erf, floordiv, floormod, integer_power, power, tanh
from tilelink.device.program import (
    acknowledge_kernel,
    begin_call,
    call_context,
    end_call,
    finish_arrive,
    finish_leave,
    grouped_tile,
    head_kernel,
    hear_call,
    notify_kernel,
    of_slot,
    open_call,
    open_within,
    queue_next,
    slot,
    spoil,
    wait_kernel,
)
from tilelink.device.signal import (
    Context,
    all_tile_notify,
    consumer_tile_wait,
    context,
    counted_all_tile_notify,
    counted_tile_notify,
    delayed_all_notify,
    delayed_counted_all_notify,
    delayed_counted_notify,
    delayed_peer_notify,
    delayed_tile_notify,
    drain_tma_stores,
    peer_tile_notify,
    peer_tile_wait,
    peer_tiles_wait,
    producer_tile_notify,
    rank_notify,
    rank_wait,
)
from tilelink.device.words import empty_words, load_words, store_words, sum_words

__all__ = [
    "Context",
    "acknowledge_kernel",
    "all_tile_notify",
    "begin_call",
    "call_context",
    "consumer_tile_wait",
    "context",
    "counted_all_tile_notify",
    "counted_tile_notify",
    "delayed_all_notify",
    "delayed_counted_all_notify",
    "delayed_counted_notify",
    "delayed_peer_notify",
    "delayed_tile_notify",
    "drain_tma_stores",
    "empty_words",
    "end_call",
    "erf",
    "finish_arrive",
    "finish_leave",
    "floordiv",
    "floormod",
    "grouped_tile",
    "head_kernel",
    "hear_call",
    "integer_power",
    "load_words",
    "notify_kernel",
    "of_slot",
    "open_call",
    "open_within",
    "peer_pointer",
    "peer_tile_notify",
    "peer_tile_wait",
    "peer_tiles_wait",
    "pointer",
    "power",
    "producer_tile_notify",
    "queue_next",
    "rank_copy_data",
    "rank_notify",
    "rank_wait",
    "remote_tile",
    "slot",
    "spoil",
    "store_words",
    "sum_words",
    "tanh",
    "tile_pull_data",
    "tile_push_data",
    "tile_sum_parts",
    "tile_sum_remote",
    "wait_kernel",
]

keys.settle(dialect, places, data, math, signal, program, words)
