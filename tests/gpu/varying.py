"""Calls whose number of rows changes at every step, on GPUs: exact on integers, few programs, no silence."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.kernels import shared
from tilelink import kernels
from tilelink.backend.runtime.errors import WaitTimeout
from tilelink.backend.runtime.watch import synchronize
from tilelink.schedules import Move, Schedule

Row = dict[str, Any]
LENGTHS = (1, 2048, 513, 64, 7, 1000, 256, 129, 2047, 33, 1536, 2)
K, N = 64, 512
# How C or A moves, and, where it is not Triton's, the emitter with its tiles.
FOLDED, HALVES = ("gluon", 128, 128), ("gluon", 128, 256)
ALL_ROWS = ("triton", 128, 64)  # tiles that hold all rows there can be
FORMS: dict[str, tuple[tuple[Move, tuple[str, int, int] | None], ...]] = {
    "ag_gemm": (
        (Move("copy_engine"), None),
        (Move("copy_engine"), FOLDED),
        (Move("sm:8"), None),
        (Move("sm:8", spans=True), None),
        (Move("sm:8", spans=True, slots=2), None),
        (Move("sm:8", spans=True), FOLDED),
        (Move("none"), None),
    ),
    "gemm_rs": (
        (Move("copy_engine"), None),
        (Move("epilogue"), None),
        (Move("sm:8"), None),
        (Move("epilogue", slots=2), None),
        (Move("epilogue", slots=2, signal="sentinel"), None),
        (Move("epilogue", slots=2, spans=True, direction="pull"), ALL_ROWS),
        (Move("epilogue", spans=True, direction="pull"), ALL_ROWS),
        (Move("copy_engine", sum="epilogue"), FOLDED),
        (Move("epilogue", sum="epilogue"), FOLDED),
        (Move("copy_engine", sum="epilogue"), HALVES),
        (Move("none"), None),
    ),
    "gemm_ar": (
        (Move("copy_engine", shots=1), None),
        (Move("copy_engine", shots=2), None),
        (Move("epilogue", shots=1), None),
        (Move("epilogue", shots=1, slots=2, signal="sentinel"), None),
        (Move("epilogue", shots=2, slots=2, signal="sentinel"), None),
        (Move("epilogue", shots=2, sum="epilogue"), FOLDED),
        (Move("copy_engine", shots=2, sum="epilogue"), FOLDED),
        (Move("none"), None),
    ),
}
MOVED = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}


def schedule_for(name: str, move: Move, form: tuple[str, int, int] | None) -> Schedule:
    """How the kernel ``name`` runs in this form."""
    emitter, high, wide = form or ("triton", 64, 128)
    tiles = (("K", 64), ("M", high), ("N", wide))
    return Schedule(moves=((MOVED[name], move),), tiles=tiles, emitter=emitter, stages=3)


def sizes_for(first: bool, form: tuple[str, int, int] | None, world: int) -> tuple[int, ...]:
    """The capacities: doubling for the first form of a kernel, two for the others. Halves of a tile can be
    kept apart where a rank's slice has the rows of one."""
    if first:
        return ()
    if form == ALL_ROWS:
        return 16, ALL_ROWS[1]
    least = HALVES[1] * world if form == HALVES else 256
    return least // world * world, 2048


def lengths_for(name: str, world: int, most: int = LENGTHS[1]) -> list[int]:
    """The numbers of rows of the trace, up to ``most``, of which ranks can have equal parts where the kernel asks
    for it."""
    unit = 1 if name == "gemm_ar" else world
    return [rows for m in LENGTHS if (rows := -(-m // unit) * unit) <= most]


def whole(rows: int, columns: int, seed: int) -> torch.Tensor:
    """-1, 0 and 1: sums of 64 products are exact in bf16, and sums over ranks in fp32."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randint(-1, 2, (rows, columns), generator=generator, device="cuda")
    return values.bfloat16()


def step(name: str, rows: int, rank: int, world: int, seed: int) -> tuple[Any, Any, torch.Tensor]:
    """This rank's A and B, and its output, by plain arithmetic."""
    b = [whole(K, N, 1000 * seed + 10 * r + 1) for r in range(world)]
    if name == "ag_gemm":
        a = whole(rows, K, 1000 * seed)
        mine = a.chunk(world)[rank].contiguous()
        return mine, b[rank], (a.float() @ b[rank].float()).bfloat16()
    every = [whole(rows, K, 1000 * seed + 10 * r + 2) for r in range(world)]
    total = torch.stack([x.float() @ y.float() for x, y in zip(every, b, strict=True)]).sum(0)
    wanted = total.bfloat16()
    if name == "gemm_rs":
        wanted = wanted.chunk(world)[rank].contiguous()
    return every[rank], b[rank], wanted


def varying(rank: int, world: int) -> list[Row]:
    """Each kernel and form through the trace, four times, without a wait between its calls."""
    rows: list[Row] = []
    for name, forms in FORMS.items():
        for move, form in forms:
            if move.resource == "none" and shared(world):
                continue  # the library's collectives need a GPU a rank
            schedule = schedule_for(name, move, form)
            sizes = sizes_for(move is forms[0][0], form, world)
            lengths = lengths_for(name, world, *sizes[-1:])
            call = getattr(kernels, name).on(schedule=schedule, dynamic={"M": sizes})
            steps = [step(name, m, rank, world, seed) for seed, m in enumerate(lengths)]
            for a, b, _ in steps:  # a new capacity is met, compiled and agreed
                call(a, b)
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for a, b, wanted in steps * 4:
                wrong += (call(a, b) != wanted).sum()
            synchronize()
            dist.all_reduce(wrong)
            said = [f"{k}={v}" for k, v in asdict(move).items() if v != getattr(Move(), k)]
            resource = " ".join((*said, *([] if form is None else map(str, form))))
            record = {"test": "varying", "kernel": name, "resource": resource, "M": max(lengths)}
            record |= {"K": K, "N": N, "dtype": "bf16", "programs": call.compilations}
            record |= {"mismatched": int(wrong), "error": float(wrong)}
            rows.append({**record, "ok": int(wrong) == 0 and call.compilations <= 6})
    return rows


def unequal(rank: int, world: int) -> list[Row]:
    """Rank 1 alone calls with fewer rows of a capacity that all know: no rank hangs, each has an error."""
    call = kernels.ag_gemm.on(dynamic=("M",))
    b = whole(K, N, 1)
    for rows in (64 * world, 48 * world):
        call(whole(rows // world, K, 2), b)
    synchronize()
    dist.barrier()
    started, message = time.monotonic(), ""
    out = call(whole(40 if rank == 1 else 64, K, 3), b)
    try:
        synchronize()
    except WaitTimeout as problem:
        message = str(problem)
    seconds = time.monotonic() - started
    print(f"rank {rank} after {seconds:.2f} s: {message}", flush=True)
    told = "called `ag_gemm` with M = " in message
    nan = bool(out.float().isnan().all())
    row = {"test": "unequal", "seconds": seconds, "message": message, "nan": nan}
    return [{**row, "ok": told and nan and seconds < 30}]
