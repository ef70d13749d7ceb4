"""Programs whose launches have roles: the cases of the tests of Gluon kernels, on a GPU and without one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilelink.backend.pipeline import compile_kernel
from tilelink.ir import Op
from tilelink.kernel import Kernel
from tilelink.kernels import ag_gemm, ag_gemm_swiglu, gemm_ar, gemm_ar_add, gemm_rs, gemm_rs_add
from tilelink.schedules import Move, Schedule

WORLD = 4
BOTH = (("bias", 1), ("residual", 1))


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel under one schedule at one shape; ``options`` of the kernel."""

    name: str
    kernel: Kernel
    resource: str
    shape: tuple[int, int, int]
    tile: tuple[int, int, int]  # rows, columns, stages
    options: tuple[tuple[str, Any], ...] = ()
    sum: str = "stage"  # where parts that have arrived are added
    depth: int = 64  # of a step of the product
    tail: int = 1  # parts of the tiles of the last wave

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Inputs of all ranks, -1, 0 or 1."""
        m, k, n = self.shape
        nk = bool(dict(self.options).get("nk"))
        split = self.name.startswith("ag")
        sizes = {
            "A": (m // WORLD if split else m, k),
            "B": (n, k) if nk else (k, n),
            "Wg": (n, k) if nk else (k, n),
            "Wu": (n, k) if nk else (k, n),
            "bias": (n,),
            "residual": (m if "ar" in self.name else m // WORLD, n),
        }
        known = [p for p in self.kernel.signature.tensors if p in sizes]
        wanted = [p for p in known if p not in ("bias", "residual") or p in dict(self.options)]
        shared = {p: torch.randint(-1, 2, sizes[p]) for p in wanted if p == "bias"}
        return {
            p: [shared.get(p, torch.randint(-1, 2, sizes[p])).bfloat16() for _ in range(WORLD)]
            for p in wanted
        }

    def program(self, tensors: dict[str, list[torch.Tensor]]) -> Op:
        """The fused program."""
        rows, columns, stages = self.tile
        fixed = {n: v for n, v in self.options if n == "nk"}
        bound = self.kernel.bind((), WORLD, {**{n: t[0] for n, t in tensors.items()}, **fixed})
        op = self.kernel.build_for(bound)
        moved = [
            t.symbol for t in op.find("tensor") if t["move"] in ("gather", "scatter", "reduce")
        ]
        schedule = Schedule(
            tiles=(("K", self.depth), ("M", rows), ("N", columns)),
            stages=stages,
            emitter="gluon",
            tail=self.tail,
            moves=tuple((name, Move(resource=self.resource, sum=self.sum)) for name in moved),
        )
        return compile_kernel(op, replace(schedule, workers=7))

    def fused(self) -> Op:
        """The fused program of random inputs."""
        return self.program(self.tensors())


CASES = (
    Case("ag_gemm", ag_gemm, "copy_engine", (512, 200, 328), (128, 128, 5)),
    Case("ag_gemm", ag_gemm, "copy_engine", (800, 256, 512), (128, 128, 3)),
    Case("ag_gemm", ag_gemm, "copy_engine", (1024, 256, 768), (128, 256, 4)),
    Case("ag_gemm", ag_gemm, "copy_engine", (1024, 200, 520), (64, 256, 4)),
    Case("ag_gemm bias", ag_gemm, "copy_engine", (512, 192, 392), (128, 128, 4), (("bias", 1), ("nk", True))),
    Case("ag_gemm swiglu", ag_gemm_swiglu, "copy_engine", (1024, 192, 264), (128, 128, 4), (("nk", True),)),
    Case("gemm_rs", gemm_rs, "copy_engine", (1024, 192, 520), (128, 128, 5)),
    Case("gemm_rs", gemm_rs, "copy_engine", (1024, 136, 520), (128, 256, 4)),
    Case("gemm_rs", gemm_rs, "epilogue", (1024, 192, 520), (128, 128, 4)),
    Case("gemm_rs", gemm_rs, "epilogue", (800, 192, 256), (128, 128, 3)),
    Case("gemm_rs", gemm_rs, "epilogue", (1024, 192, 512), (128, 256, 3)),
    Case("gemm_rs_add", gemm_rs_add, "copy_engine", (512, 128, 264), (128, 128, 4), BOTH),
    Case("gemm_rs folded", gemm_rs, "copy_engine", (1024, 192, 512), (128, 128, 6), (), "epilogue"),
    Case("gemm_rs folded", gemm_rs, "copy_engine", (1024, 192, 512), (128, 128, 4), (), "epilogue"),
    Case("gemm_rs folded", gemm_rs, "epilogue", (1024, 192, 512), (128, 256, 3), (), "epilogue"),
    Case("gemm_rs folded", gemm_rs, "epilogue", (1024, 192, 512), (128, 128, 5), (), "epilogue"),
    Case("gemm_rs folded", gemm_rs, "epilogue", (1024, 192, 512), (64, 128, 5), (), "epilogue"),
    Case("gemm_rs folded", gemm_rs, "copy_engine", (1024, 192, 512), (128, 128, 2), (), "epilogue", 128),
    Case("gemm_rs folded", gemm_rs, "epilogue", (1024, 160, 512), (128, 128, 6), (), "epilogue", 32),
    Case("gemm_rs_add folded", gemm_rs_add, "epilogue", (1024, 192, 512), (128, 128, 4), BOTH, "epilogue"),
    Case("gemm_rs_add folded", gemm_rs_add, "copy_engine", (1024, 192, 520), (128, 128, 4), BOTH, "epilogue"),
    Case("ag_gemm tail", ag_gemm, "copy_engine", (1024, 200, 520), (128, 128, 4), tail=2),
    Case("gemm_rs tail", gemm_rs, "copy_engine", (1024, 192, 512), (128, 256, 4), tail=3),
    Case("gemm_rs tail", gemm_rs, "epilogue", (800, 192, 264), (64, 128, 5), tail=2),
    Case("gemm_ar", gemm_ar, "epilogue", (384, 192, 264), (128, 128, 4)),
    Case("gemm_ar", gemm_ar, "epilogue", (512, 192, 264), (128, 256, 3)),
    Case("gemm_ar", gemm_ar, "copy_engine", (512, 192, 264), (128, 256, 4)),
    Case("gemm_ar folded", gemm_ar, "epilogue", (1024, 192, 512), (128, 128, 5), (), "epilogue"),
    Case("gemm_ar_add", gemm_ar_add, "copy_engine", (256, 128, 128), (64, 128, 5), BOTH),
)  # fmt: skip

TURNS, HALVES, RS, SWIGLU = CASES[1], CASES[2], CASES[6], CASES[5]
FOLDED = next(c for c in CASES if c.sum == "epilogue")
EPILOGUE = next(c for c in CASES if c.resource == "epilogue" and c.tile[1] == 256)
LANDING = next(c for c in CASES if c.sum == "epilogue" and c.tile == (128, 128, 4))
FIVE = next(c for c in CASES if c.name == "gemm_rs folded" and c.tile == (128, 128, 5))
FOLDED_HALVES = next(c for c in CASES if c.sum == "epilogue" and c.tile[1] == 256)
ADDED = next(c for c in CASES if c.depth == 128)
PEERS = next(c for c in CASES if c.name == "gemm_rs folded" and c.tile[:2] == (64, 128))
ALL = next(c for c in CASES if c.name == "gemm_ar" and c.tile[1] == 256)


def named(case: Case) -> str:
    """A short name of a case."""
    return f"{case.name} {case.resource} {case.tile}"


@functools.cache
def fused(case: Case) -> Op:
    """The fused program of a case, made once."""
    return case.fused()
