"""Kernels with a dynamic number of rows, compiled small, and their inputs: for tests of all executors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.pipeline import run_passes
from tilelink.ir import Op
from tilelink.schedules import Move, default_schedule

CAPACITY = {"M": 64, "N": 32, "K": 32}
WORLD = 2
WORKERS = 6
CASES = [
    ("ag_gemm", "copy_engine"),
    ("ag_gemm", "sm:2"),
    ("ag_gemm_swiglu", "copy_engine"),
    ("gemm_rs", "copy_engine"),
    ("gemm_rs", "epilogue"),
    ("gemm_rs", "sm:2"),
    ("gemm_rs_add", "copy_engine"),
    ("gemm_ar", "copy_engine"),
    ("gemm_ar", "epilogue"),
    ("gemm_ar", "sm:2"),
    ("gemm_ar_add", "epilogue"),
    ("ag_gemm", "none"),
    ("gemm_rs", "none"),
    ("gemm_rs_add", "none"),
    ("gemm_ar", "none"),
    ("gemm_ar_add", "none"),
    ("ag_gemm", "library"),
    ("gemm_rs", "library"),
    ("gemm_ar", "library"),
    ("gemm_rs_add", "library"),
    ("ag_gemm", "copy_engine library"),
    ("ag_gemm", "sm:2 library"),
    ("gemm_rs", "copy_engine library"),
    ("gemm_ar", "copy_engine library"),
    ("gemm_ar", "copy_engine shots library"),
    ("gemm_rs", "copy_engine folded"),
    ("gemm_rs", "epilogue folded"),
    ("gemm_rs_add", "sm:2 folded"),
    ("gemm_rs", "epilogue slots"),
    ("gemm_ar", "epilogue slots"),
    ("ag_gemm", "sm:2 slots"),
    ("ag_gemm", "sm:2 spans"),
    ("ag_gemm", "sm:2 spans slots"),
    ("ag_gemm", "copy_engine spans"),
    ("ag_gemm_swiglu", "sm:2 spans"),
    ("gemm_rs", "epilogue word"),
    ("gemm_rs", "epilogue pull"),
    ("gemm_rs", "epilogue pull slots"),
    ("gemm_rs_add", "epilogue pull slots"),
    ("gemm_ar", "epilogue sentinel"),
    ("gemm_ar_add", "epilogue sentinel"),
    ("gemm_ar", "epilogue shots"),
    ("gemm_ar_add", "epilogue shots"),
    ("gemm_ar", "sm:2 shots"),
    ("gemm_ar", "copy_engine shots"),
    ("gemm_ar", "epilogue shots folded"),
    ("gemm_ar", "epilogue shots slots"),
    ("gemm_ar", "epilogue shots sentinel"),
]


@cache
def kernel_of(name: str, rows: int = CAPACITY["M"], dynamic: tuple[str, ...] = ("M",)) -> Op:
    """The Tile IR of a ready-made kernel in fp32, in which integers are exact."""
    kernel = getattr(kernels, name)
    present = [p for p in kernel.params if p in kernel.signature.tensors]
    op: Op = kernel.build(
        {**CAPACITY, "M": rows}, world=WORLD, dtype="fp32", present=present, dynamic=dynamic
    )
    return op


def program_of(name: str, resource: str, channels: int | None = None) -> Op:
    """The fused program of a kernel, not proven: tiles of 8 rows, so that there are several of them, and more
    than workers."""
    op = kernel_of(name)
    schedule = default_schedule(op)
    (tensor, _), *_ = schedule.moves
    library = resource == "library"  # of products, and of collectives
    resource, *forms = resource.split(" ")
    emitter = "library" if library or "library" in forms else schedule.emitter
    move = Move(resource="none" if library else resource, channels=channels)
    for form in forms:
        if form == "library":
            continue
        if form == "folded":
            move = replace(move, sum="epilogue")
        elif form == "shots":
            move = replace(move, shots=2)
        elif form == "spans":
            move = replace(move, spans=True)
        elif form == "pull":
            move = replace(move, spans=True, direction="pull")
        else:
            move = replace(move, slots=2, signal="flag" if form == "slots" else form)
    # What is pulled is stored by tiles of all rows.
    tiles = (("K", 16), ("M", CAPACITY["M"] if move.direction == "pull" else 8), ("N", 32))
    moves, workers = ((tensor, move),), min(schedule.workers, WORKERS)
    chosen = replace(schedule, moves=moves, tiles=tiles, emitter=emitter, workers=workers)
    return run_passes(op, chosen)


def values_of(name: str) -> list[int]:
    """Every number of rows up to the capacity."""
    step = 1 if "ar" in name else WORLD
    return list(range(step, CAPACITY["M"] + 1, step))


def inputs_of(name: str, rows: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Small integers for each rank; tensors that every rank has alike are the same."""
    op = kernel_of(name, rows, ())
    env = {e.symbol: int(e["value"]) for e in op.find("extent")}
    shared = torch.Generator().manual_seed(seed + 1)
    everywhere: dict[str, torch.Tensor] = {}
    ranks: list[dict[str, torch.Tensor]] = []
    for rank in range(WORLD):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        mine: dict[str, torch.Tensor] = {}
        for tensor in op.find("tensor"):
            if tensor["role"] != "in":
                continue
            dims = [d if isinstance(d, int) else int(d.evaluate(env)) for d in tensor["dims"]]
            alike = tensor.symbol in ("bias", "residual") and tensor["move"] == "local"
            if tensor.get("over") is not None:
                dims[int(tensor["over"])] //= WORLD
            if alike and rank:
                mine[tensor.symbol] = everywhere[tensor.symbol]
                continue
            made = torch.randint(-3, 4, dims, generator=shared if alike else generator).float()
            mine[tensor.symbol] = everywhere[tensor.symbol] = made
        ranks.append(mine)
    return ranks


def expected(
    name: str, rows: int, inputs: list[dict[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """What the kernel computes for so many rows."""
    return reference.run(kernel_of(name, rows, ()), inputs)


def same(
    got: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]], close: bool = False
) -> bool:
    """Whether the outputs of all ranks are equal; ``close`` where the kernel rounds."""
    return all(
        torch.allclose(one[n], other[n], rtol=1e-6) if close else torch.equal(one[n], other[n])
        for one, other in zip(got, wanted, strict=True)
        for n in other
    )
