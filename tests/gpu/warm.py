"""Compiles emitted kernels into Triton's cache, many at once, so that ranks find them there.

Every rank of a call would compile the same kernel; with hundreds of shapes that is most of the time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

import tilelink.kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import load_module, write_module
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.plan import Recorder
from tilelink.backend.runtime.views import TORCH_DTYPES


def warm(kind: str, extents: dict[str, int], world: int, dtype: str, schedule: Any) -> str:
    """Compiles one kernel of `tilelink.kernels` as a call on rank 0 would; the error's text, if any."""
    try:
        op = getattr(tilelink.kernels, kind).build(extents, world=world, dtype=dtype)
        program = compile_kernel(op, schedule)
        module = load_module(write_module(emit(program), program.symbol))
        image = image_of(program)
        arena = torch.empty(image.arena_bytes, dtype=torch.uint8, device="cuda")
        recorder = Recorder(
            image,
            0,
            [arena] * world,
            torch.zeros(world, dtype=torch.int64, device="cuda"),
            1.0,
            1.0,
            streams=lambda _: torch.cuda.Stream(),  # type: ignore[no-untyped-call]
            group=None,
            host_record=1 << 40,
            addresses=[arena.data_ptr()] * world,
        )
        recorder.tensors = {
            slot.name: torch.empty(slot.dims, dtype=TORCH_DTYPES[slot.dtype], device="cuda")
            for slot in image.tensors.values()
        }
        recorder.workspace = torch.empty(image.workspace_bytes, dtype=torch.uint8, device="cuda")
        module.host(recorder)
        with contextlib.suppress(NotImplementedError):
            recorder.finish()
    except Exception as error:
        return f"{kind} {extents}: {type(error).__name__}: {error}"
    return ""


def start(device: int) -> None:
    """Begins a process of a pool: its GPU."""
    torch.cuda.set_device(device)
