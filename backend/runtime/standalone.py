"""What ``python emitted.py`` does under ``torchrun``: random inputs, a few calls, the time of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tilelink.backend.runtime.cuda import run_program
from tilelink.backend.runtime.errors import Unavailable
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.views import TORCH_DTYPES
from tilelink.backend.runtime.watch import synchronize
from tilelink.ir import Op

CALLS = 20


def run_standalone(program: Op, text: str, host: Callable[[Any], None]) -> None:
    """Runs the program on random inputs and prints the median time of a call on rank 0.

    Needs as many GPUs as the program has ranks: ``torchrun --nproc-per-node WORLD emitted.py``.
    """
    image = image_of(program)
    if not torch.cuda.is_available():
        raise Unavailable(backend="cuda", reason="PyTorch sees no CUDA device")
    if int(os.environ.get("WORLD_SIZE", "1")) != image.world:
        command = f"torchrun --nproc-per-node {image.world} {sys.argv[0]}"
        raise Unavailable(backend="cuda", reason=f"{image.world} processes are needed: {command}")
    rank = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if image.world > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    torch.manual_seed(rank)
    tensors = {}
    for slot in image.tensors.values():
        if slot.role in ("in", "inout"):
            dtype = TORCH_DTYPES[slot.dtype]
            if dtype.is_floating_point:
                tensors[slot.name] = torch.randn(slot.dims, device="cuda").to(dtype)
            else:
                tensors[slot.name] = torch.zeros(slot.dims, dtype=dtype, device="cuda")
    scalars = dict.fromkeys(image.scalars, 1.0)
    times = []
    for _ in range(CALLS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run_program(text, host, tensors, scalars)
        stop.record()
        synchronize()
        times.append(start.elapsed_time(stop))
    if rank == 0:
        median = sorted(times[CALLS // 4 :])[(CALLS - CALLS // 4) // 2]
        print(f"{image.name}: {median:.4f} ms a call, median of {CALLS - CALLS // 4}")
    if image.world > 1:
        dist.destroy_process_group()
