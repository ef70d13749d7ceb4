"""The kernels under test, their references in plain torch, and the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M")
def ag_gemm(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("scatter C[M, N] over M sum")
def gemm_rs(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("reduce C[M, N] sum")
def gemm_ar(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


KERNELS: dict[str, Any] = {"ag_gemm": ag_gemm, "gemm_rs": gemm_rs, "gemm_ar": gemm_ar}
RESOURCES = ("copy_engine", "sm:16", "epilogue", "none")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call: extents are global, as the kernel's text has them."""

    kernel: str
    M: int
    K: int
    N: int
    resource: str = "copy_engine"
    dtype: str = "bf16"
    emitter: str = "triton"


# (M, K, N) by kernel; M is divided by 8 ranks at most. Odd sizes leave short tiles on every axis.
SHAPES = {
    "ag_gemm": [
        (1024, 512, 768),
        (2048, 4096, 1376),
        (512, 136, 72),
        (1536, 1000, 328),
        (256, 64, 256),
        (8192, 4096, 2816),
        (8192, 8192, 7168),
    ],
    "gemm_rs": [
        (1024, 512, 768),
        (2048, 1376, 4096),
        (512, 136, 72),
        (1536, 1000, 328),
        (256, 64, 256),
        (8192, 1376, 4096),
        (8192, 3584, 8192),
    ],
    "gemm_ar": [
        (64, 512, 768),
        (256, 3584, 8192),
        (24, 136, 72),
        (320, 1000, 328),
        (16, 64, 256),
        (1024, 3584, 8192),
    ],
}


# Slices of so few rows that tiles span them: of all ranks, of some, and of one and a part of the next.
LOW = [(128, 3584, 8192), (256, 512, 768), (64, 136, 72), (200, 1000, 328), (640, 512, 1376)]


def cases(only: str = "") -> list[Case]:
    """Every shape on the default resource, a few on the others, one in each other dtype.

    ``only``: those whose kernel, emitter or resource contains one of its texts, by comma.
    """
    found = []
    for kernel, shapes in SHAPES.items():
        found += [Case(kernel, *shape) for shape in shapes]
        # No epilogue computes the tiles of a gathered input.
        others = [r for r in RESOURCES[1:] if (kernel, r) != ("ag_gemm", "epilogue")]
        if kernel == "gemm_rs":
            others += ["copy_engine-folded", "sm:16-folded", "epilogue-folded", "epilogue-slots"]
            others += ["epilogue-slots-words", "epilogue-slots-sentinels"]
            others += ["epilogue-pull", "epilogue-pull-folded", "epilogue-pull-folded-turned"]
            others += ["epilogue-pull-slots", "epilogue-pull-folded-slots"]
            found += [
                Case(kernel, *shape, resource=r, emitter=emitter)
                for shape in LOW
                for r, emitter in (
                    ("epilogue-pull-spans", "triton"),
                    ("epilogue-pull-slots-spans", "triton"),
                    ("epilogue-pull-spans", "gluon"),
                )
                # Roles have whole tiles of 128 rows.
                if emitter == "triton" or shape[0] % 128 == 0
            ]
        if kernel == "ag_gemm":
            others += ["sm:16-slots", "copy_engine-streams"]
            others += ["sm:16-spans", "copy_engine-spans"]
        if kernel == "gemm_ar":
            others += ["copy_engine-two", "sm:16-two", "sm:16-two-slots", "epilogue-two"]
            others += ["epilogue-two-slots", "epilogue-one-slots"]
            others += ["copy_engine-two-folded", "sm:16-two-folded", "epilogue-two-folded"]
            others += ["epilogue-two-folded-slots"]
            others += ["epilogue-two-folded-beside", "epilogue-two-folded-between"]
            others += ["epilogue-two-folded-beside-slots"]
            others += ["epilogue-two-pull", "epilogue-two-pull-folded-turned"]
            found += [
                Case(kernel, *shapes[-1], resource=f"epilogue-two-folded-{own}")
                for own in ("beside", "between")
            ]
            others += ["epilogue-two-slots-words", "epilogue-one-slots-words"]
            others += ["epilogue-two-slots-sentinels", "epilogue-one-slots-sentinels"]
        found += [
            Case(kernel, *shape, resource=r)
            for r in others
            for shape in shapes[:4]
            # In one shot every rank has the whole of each: of 4 MB more than a slot holds at 8 ranks.
            if not r.startswith("epilogue-one-slots") or shape[0] * shape[2] < 1 << 20
            # Words are for small sums: those of 4 MB do not fit their slot.
            if not r.endswith("words") or shape[0] * shape[2] < 1 << 20
        ]
        # Parts of the depth are equal; of 136, short steps end each.
        first = "copy_engine" if kernel == "ag_gemm" else "epilogue"
        found += [Case(kernel, *shape, resource=f"{first}-split") for shape in shapes[:4]]
        # Tiles of the last wave in parts; of few tiles, all of them.
        found += [Case(kernel, *shape, resource=f"{first}-tail") for shape in shapes[:4]]
        found += [Case(kernel, *shapes[0], dtype=d) for d in ("fp16", "fp32")]
        found += [Case(kernel, *shape, resource="none", emitter="library") for shape in shapes]
        # Boxes need rows of whole boxes: shapes whose shards and rows are even.
        boxed = [s for s in shapes if all(n % 256 == 0 for n in s)]
        boxes = ["sm:16-boxes", "sm:16-boxes-slots"]
        if kernel == "ag_gemm":
            boxes += ["sm:16-boxes-spans", "sm:32-boxes-spans-slots"]
            found += [
                Case(kernel, *s, f"sm:32-boxes{'-spans' * spans}", emitter=emitter)
                for emitter in ("library", "gluon")
                for spans in (False, True)
                for s in boxed
                if emitter == "library" or s[0] >= 1024
            ]
        if kernel == "gemm_rs":
            # Beside products whose warps have roles, tiles of 128 rows: a slice at 8 ranks has one.
            even = [s for s in shapes if s[0] >= 1024 and s[0] % 1024 == 0 and s[2] % 64 == 0]
            found += [Case(kernel, *s, "sm:16-boxes-folded", emitter="gluon") for s in even]
        found += [
            Case(kernel, *s, resource=r)
            for r in boxes
            for s in boxed
            if not r.endswith("slots") or s[0] * max(s[1:]) <= 1 << 22
        ]
        beside = ["copy_engine", *(["copy_engine-folded"] if kernel == "gemm_rs" else [])]
        found += [Case(kernel, *s, r, emitter="library") for r in beside for s in shapes[:4]]
        found += [Case(kernel, *shapes[2], "none", dtype, "library") for dtype in ("fp16", "fp32")]
        folded: tuple[str, ...] = ("copy_engine-folded", "epilogue-folded", "epilogue-two-folded")
        folded += ("epilogue-pull", "epilogue-pull-folded", "epilogue-pull-folded-turned")
        folded += ("epilogue-two-pull", "epilogue-two-pull-folded-turned")
        folded += ("epilogue-two-folded-beside",)
        roles = ["copy_engine", *(r for r in others if r in ("epilogue", *folded))]
        # Parts that land in a ring of their own, of two boxes; and in that of the product, which leaves no room.
        if kernel == "gemm_rs":
            roles += [
                "copy_engine-folded-five",
                "epilogue-folded-five",
                "epilogue-folded-turned-five",
            ]
            roles += [
                "epilogue-pull-folded-turned-five",
                "copy_engine-folded-six",
                "epilogue-folded-six",
            ]
        if kernel == "gemm_ar":
            roles += ["copy_engine-two-folded-five", "epilogue-two-folded-five"]
            roles += ["epilogue-two-folded-six"]
        # Two warp groups share tiles of at least 128 rows.
        found += [
            Case(kernel, *s, r, emitter="gluon")
            for r in (*roles, f"{first}-tail", "none-tail")
            for s in shapes
            if s[0] >= 1024
        ]
    texts = only.split(",")
    return [c for c in found if any(t in f"{c.kernel} {c.emitter} {c.resource}" for t in texts)]


def schedule_for(case: Case, world: int) -> Any:
    """The default schedule of a case with its resource."""
    from tilelink.schedules import default_schedule

    op = KERNELS[case.kernel].build(
        {"M": case.M, "K": case.K, "N": case.N}, world=world, dtype=case.dtype
    )
    # `-folded`: the sum in the epilogue of the own slice; `-one`, `-two`: shots; `-slots`: two slots;
    # `-streams`: two streams; `-words`, `-sentinels`: data that signals itself, by an epoch beside it or alone;
    # `-split`: sums in four parts; `-tail`: the last wave's tiles in two; `-boxes`: workers copy boxes; `-spans`:
    # tiles span shards, those that read a gather or store what is pulled; `-pull`: parts are read where they were
    # made; `-turned`: tiles of all ranks take turns; `-beside`, `-between`: where own ones are, of the others;
    # `-five`, `-six`: slots of the ring of a kernel with roles.
    resource, *words = case.resource.split("-")
    changes: dict[str, Any] = {}
    if words:
        changes["sum"] = "epilogue" if "folded" in words else "stage"
    if "one" in words or "two" in words:
        changes["shots"] = 1 if "one" in words else 2
    if words:
        changes["slots"] = 2 if "slots" in words else 1
        changes["signal"] = "word" if "words" in words else "flag"
        changes["signal"] = "sentinel" if "sentinels" in words else changes["signal"]
    if "streams" in words:
        changes["streams"] = 2
    changes["direction"] = "pull" if "pull" in words else "push"
    changes["copies"] = "boxes" if "boxes" in words else "rows"
    changes["spans"] = "spans" in words
    schedule = default_schedule(op).with_resource(resource)
    changes["own"] = next((word for word in ("beside", "between") if word in words), "last")
    if "turned" in words or changes["own"] != "last":
        # Of few workers, each has so many tiles that own ones are computed beside the others.
        schedule = replace(schedule, order="interleave", workers=16)
    schedule = replace(schedule, emitter=case.emitter, split=4 if "split" in words else 1)
    schedule = replace(schedule, tail=2 if "tail" in words else 1)
    if "spans" in words and "pull" in words:
        # The default's tiles end with the slice of a rank.
        schedule = schedule.with_tiles(M=64 if case.M <= 64 else 128, N=64, K=64)
        schedule = replace(schedule, warps=4, stages=4)
    if case.emitter == "gluon":
        tiles = (("K", 64), ("M", 128), ("N", 128))
        stages = {"five": 5, "six": 6}.get(words[-1] if words else "", 4)
        schedule = replace(schedule, tiles=tiles, warps=8, stages=stages)
        changes["slots"] = 1
    moves = tuple((name, replace(move, **changes)) for name, move in schedule.moves)
    return replace(schedule, moves=moves)


def inputs_for(case: Case, rank: int, world: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (a shard for ag_gemm) and B of this rank, random, of order one after the product."""
    generator = torch.Generator("cuda").manual_seed(seed * 1000 + rank)
    rows = case.M // world if case.kernel == "ag_gemm" else case.M
    a = torch.randn(rows, case.K, device="cuda", generator=generator) / case.K**0.5
    b = torch.randn(case.K, case.N, device="cuda", generator=generator)
    return a.to(DTYPES[case.dtype]), b.to(DTYPES[case.dtype])


def shared(world: int) -> bool:
    """Whether ranks share GPUs, which the library's collectives refuse."""
    return torch.cuda.device_count() < world


def gathered(a: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The shards of all ranks of a group, on this one's GPU."""
    world = dist.get_world_size(group)
    whole = torch.empty(world * a.shape[0], *a.shape[1:], dtype=a.dtype, device="cuda")
    if not shared(dist.get_world_size()):
        dist.all_gather_into_tensor(whole, a, group=group)
        return whole
    bits = a.cpu().view(torch.uint8)
    parts = [torch.empty_like(bits) for _ in range(world)]
    dist.all_gather(parts, bits, group=group)
    return whole.copy_(torch.cat(parts).view(a.dtype))


def reference(case: Case, a: torch.Tensor, b: torch.Tensor, world: int) -> torch.Tensor:
    """The expected output of this rank, in fp32, with the library's collectives and cuBLAS."""
    if case.kernel == "ag_gemm":
        return gathered(a).float() @ b.float()
    total = a.float() @ b.float()
    dist.all_reduce(total)
    if case.kernel == "gemm_rs":
        return total.chunk(world)[dist.get_rank()]
    return total


def bind(case: Case, world: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The call of a case's kernel with its schedule."""
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = KERNELS[case.kernel].on(
        schedule=schedule_for(case, world)
    )
    return call
