"""One rank of ``test_release``: a group that is released, one that is destroyed, and calls behind both.

Run as ``python -m tests.interpret.release_rank RANK WORLD STORE`` with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

import tilelink
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, local, watch
from tilelink.schedules import Schedule


def main(rank: int, world: int, store: str) -> None:
    """AssertionError where something is kept, or a number is wrong."""
    op = kernels.gemm_ar.build({"M": 16, "K": 16, "N": 16}, world=world, dtype="fp32")
    program = interpret.plan(compile_kernel(op, Schedule(tiles=(("K", 16), ("M", 16), ("N", 16)))))
    source = emit(program)

    def call() -> Any:
        """A weak reference to the arena that a call ran on."""
        state = local.state_of(dist.group.WORLD)
        a = torch.full((16, 16), float(rank + 1))
        found = state.call(source, program, {"A": a, "B": torch.ones(16, 16)})["C"]
        assert torch.equal(found, torch.full((16, 16), 16.0 * sum(range(1, world + 1))))
        tilelink.synchronize()
        return weakref.ref(state.arenas[0])

    dist.init_process_group("gloo", store=FileStore(store, world), rank=rank, world_size=world)
    first, again = call(), call()
    assert first() is again() is not None
    # Each rank when it is done: no rank waits for another one.
    tilelink.release()
    gc.collect()
    assert first() is None and local._states == {}
    second = call()
    # What is destroyed is not looked at again, though its ranks come to their ends.
    dist.barrier()
    dist.destroy_process_group()
    tilelink.synchronize()
    gc.collect()
    assert second() is None and local._states == {} and watch._all() == []
    fresh = FileStore(f"{store}-second", world)
    dist.init_process_group("gloo", store=fresh, rank=rank, world_size=world)
    third = call()
    assert len(local._states) == 1 and third() is not None
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
