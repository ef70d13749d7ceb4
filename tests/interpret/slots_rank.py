"""One rank of ``test_slots``: programs with slots and without in turn, each rank at its own pace.

Run as ``python -m tests.interpret.slots_rank RANK WORLD STORE`` with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, local
from tilelink.schedules import Move, Schedule

EXTENTS = {"M": 48, "K": 16, "N": 48}
# Kernel, resource, shots, slots, signal. The second comes from the other ranks than the first at the same
# places, and so do the words of the last six, three of each encoding.
PROGRAMS = (
    ("gemm_ar", "epilogue", 1, 2, "flag"),
    ("gemm_rs", "epilogue", None, 2, "flag"),
    ("gemm_ar", "epilogue", 2, 2, "flag"),
    ("gemm_ar", "epilogue", 1, 1, "flag"),
    ("gemm_ar", "epilogue", 1, 2, "word"),
    ("gemm_rs", "epilogue", None, 2, "word"),
    ("gemm_ar", "epilogue", 2, 2, "word"),
    ("gemm_ar", "epilogue", 1, 2, "sentinel"),
    ("gemm_rs", "epilogue", None, 2, "sentinel"),
    ("gemm_ar", "epilogue", 2, 2, "sentinel"),
)
CALLS = 48


def inputs(call: int, world: int) -> list[dict[str, torch.Tensor]]:
    """Whole numbers: sums are exact, and the same in every call only by accident."""
    generator = torch.Generator().manual_seed(call)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    m, k, n = (EXTENTS[name] for name in "MKN")
    return [{"A": draw(m, k), "B": draw(k, n)} for _ in range(world)]


def main(rank: int, world: int, store: str) -> None:
    """Makes the calls; AssertionError for a wrong number."""
    meeting = FileStore(store, world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    state = local.state_of(dist.group.WORLD)
    built: list[Any] = []
    for name, resource, shots, slots, signal in PROGRAMS:
        op = getattr(kernels, name).build(EXTENTS, world=world, dtype="fp32")
        move = Move(resource=resource, shots=shots, slots=slots, signal=signal)
        tiles = tuple((extent, 16) for extent in "KMN")
        program = interpret.plan(compile_kernel(op, Schedule(tiles=tiles, moves=(("C", move),))))
        built.append((name, program, emit(program)))
    order, pace = random.Random(7), random.Random(rank)
    for call in range(CALLS):
        name, program, source = built[order.randrange(len(built))]
        given = inputs(call, world)
        time.sleep(pace.choice((0.0, 0.0, 0.05)))
        found = state.call(source, program, given[rank])["C"]
        state.check()
        total = torch.stack([i["A"] @ i["B"] for i in given]).sum(0)
        right = total.chunk(world)[rank] if name == "gemm_rs" else total
        assert torch.equal(found, right), f"rank {rank}, call {call}, {name}"
    assert len(state.arenas) == 2, "programs with slots have an arena of their own, and share it"
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
