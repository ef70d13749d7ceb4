"""Small programs for assurance: every ready-made kernel, every resource, several schedules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from tests.strategies import FOLDED, PULLED, move_of
from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.mutate.judge import Trial
from tilelink.backend.pipeline import run_passes
from tilelink.cli.inputs import random_inputs
from tilelink.ir import Op
from tilelink.schedules import Schedule
from tilelink.schedules.schedule import OWNS, SIGNALS

CALLS = 2
ADD = ("bias", "residual")
# Kernel, the tensor that moves, whether its moved axis is cut by rank, and the resources that fit.
FAMILIES: tuple[tuple[str, str, bool, tuple[str, ...]], ...] = (
    ("ag_gemm", "A", True, ("copy_engine", "sm:1", "sm:2", "none")),
    ("ag_gemm_swiglu", "A", True, ("copy_engine", "sm:1", "sm:2", "none")),
    ("gemm_rs", "C", True, ("copy_engine", "sm:1", "sm:2", "epilogue", "none", *FOLDED, *PULLED)),
    (
        "gemm_rs_add",
        "P",
        True,
        ("copy_engine", "sm:1", "sm:2", "epilogue", "none", *FOLDED, *PULLED),
    ),
    ("gemm_ar", "C", False, ("copy_engine", "sm:1", "sm:2", "epilogue", "none")),
    ("gemm_ar_add", "P", False, ("copy_engine", "sm:1", "sm:2", "epilogue", "none")),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A program of the grid. ``tiles`` counts tiles of ``tile`` rows along the moved axis, of all ranks."""

    kernel: str
    tensor: str
    resource: str
    world: int
    tiles: int
    columns: int = 1
    tile: int = 8
    workers: int = 2
    channels: int | None = None
    order: str = "auto"
    flatten: bool = True
    group: int = 1
    dtype: str = "bf16"
    emitter: str = "triton"
    shots: int | None = None
    slots: int = 1
    streams: int = 1
    split: int = 1
    tail: int = 1
    signal: str = "flag"
    copies: str = "rows"
    spans: bool = False
    own: str = "last"

    @property
    def name(self) -> str:
        """A short name that no other sample has."""
        parts = [self.kernel, self.resource, f"w{self.world}", f"t{self.tiles}x{self.columns}"]
        parts += [f"p{self.workers}", f"c{self.channels or 0}", self.order, f"g{self.group}"]
        parts += [f"s{self.shots}"] if self.shots else []
        parts += ["slots"] if self.slots == 2 else []
        parts += [f"q{self.streams}"] if self.streams > 1 else []
        parts += [f"k{self.split}"] if self.split > 1 else []
        parts += [f"e{self.tail}"] if self.tail > 1 else []
        parts += [f"{self.signal}s"] if self.signal != "flag" else []
        parts += [self.copies] if self.copies != "rows" else []
        parts += ["spans"] if self.spans else []
        parts += [self.own] if self.own != "last" else []
        parts += ["flat" if self.flatten else "nested", self.dtype]
        return ".".join([*parts, *([self.emitter] if self.emitter != "triton" else [])])

    def op(self) -> Op:
        """The kernel (Tile IR)."""
        kernel: Any = getattr(kernels, self.kernel)
        extents = {"M": self.tile * self.tiles, "N": self.tile * self.columns}
        extents["K"] = self.tile * max(self.split, self.tail)
        return kernel.build(extents, {}, self.world, dtype=self.dtype)  # type: ignore[no-any-return]

    def program(self) -> Op:
        """The fused program, not proven."""
        plain = move_of(self.resource, self.channels)
        move = replace(plain, shots=self.shots, slots=self.slots, streams=self.streams)
        move = replace(move, signal=self.signal, copies=self.copies, spans=self.spans)
        move = replace(move, own=self.own)
        moves = ((self.tensor, move),)
        tiles = tuple((name, self.tile) for name in "KMN")
        schedule = Schedule(
            tiles=tiles,
            order=self.order,
            group=self.group,
            workers=self.workers,
            flatten=self.flatten,
            emitter=self.emitter,
            split=self.split,
            tail=self.tail,
            moves=moves,
        )
        return run_passes(self.op(), schedule)

    def trial(self, seed: int = 0) -> Trial:
        """Random inputs of a few calls, and the reference's outputs."""
        kernel = self.op()
        # With slots it is the third call that comes back to the place of the first.
        calls = CALLS + self.slots - 1
        inputs = [random_inputs(kernel, calls * seed + call) for call in range(calls)]
        return Trial(inputs, [reference.run(kernel, given) for given in inputs], kernel)


def samples() -> list[Sample]:
    """Programs to break: each kernel and resource, at two ranks, and with other schedules at three."""
    found = []
    for kernel, tensor, by_rank, resources in FAMILIES:
        for resource in resources:
            plain = Sample(
                kernel, tensor, resource, 2, 4 if by_rank else 3, workers=_least(resource)
            )
            found.append(plain)
            if kernel in ("ag_gemm", "gemm_rs", "gemm_ar"):
                other = replace(plain, world=3, tiles=3, channels=2, flatten=False, order="row")
                found.append(other)
                if resource in ("copy_engine", "copy_engine-folded"):
                    found += [replace(other, streams=2), replace(other, channels=1, streams=2)]
            if resource in ("none", "copy_engine") and kernel != "ag_gemm_swiglu":
                found.append(replace(plain, emitter="library"))
            if not by_rank and resource not in ("none", "sm:2"):
                found.append(replace(plain, tiles=2, columns=2, shots=2))
                folded = f"{resource}-folded"
                found.append(replace(plain, resource=folded, tiles=2, columns=2, shots=2))
            if resource in ("epilogue", "sm:1", *PULLED):
                found.append(replace(plain, tiles=2, slots=2))
            if resource == "epilogue-pull":
                # The second of three tiles meets the slices of both ranks; of one, each meets all.
                low = replace(plain, spans=True)
                found += [replace(low, tiles=3), replace(low, tiles=3, slots=2)]
                found.append(replace(low, tiles=1, columns=2, slots=2))
                found.append(replace(low, tiles=1, columns=2, channels=1))
            if resource == "epilogue-pull-folded" and kernel == "gemm_rs":
                # Own tiles are computed beside the others'.
                found.append(replace(plain, tiles=20, workers=3, order="interleave"))
            if resource == "epilogue-folded" and kernel == "gemm_rs":
                # Some own tiles are computed before the last of the others: of two rows, and of one.
                own = replace(plain, columns=4, workers=3, order="interleave")
                found += [replace(own, tiles=2, own=o) for o in OWNS[1:]]
                found.append(replace(own, tiles=4, own="beside"))
            if resource in ("copy_engine", "epilogue") and kernel in (
                "ag_gemm",
                "gemm_rs",
                "gemm_ar",
            ):
                found.append(replace(plain, tiles=2, split=2))
                # One tile more than there are workers, in two parts.
                found.append(replace(plain, tiles=4, workers=3, tail=2))
            if resource == "sm:1" and kernel in ("ag_gemm", "gemm_rs", "gemm_ar"):
                # Rows of a box are 32 bytes at least.
                boxes = replace(plain, tiles=2, dtype="fp32", copies="boxes")
                found += [boxes, replace(boxes, slots=2)]
                if kernel == "ag_gemm":
                    found += [
                        replace(boxes, spans=True),
                        replace(boxes, spans=True, emitter="library"),
                    ]
            if resource == "sm:1" and kernel in ("ag_gemm", "gemm_rs"):
                # Warps have roles, and tiles 64 rows at least.
                beside = replace(plain, tile=64, workers=3, copies="boxes", emitter="gluon")
                folded = resource if kernel == "ag_gemm" else f"{resource}-folded"
                found.append(replace(beside, resource=folded))
            if kernel == "ag_gemm" and resource == "copy_engine":
                found.append(replace(plain, tiles=2, spans=True))
            if resource == "epilogue":
                found += [replace(plain, tiles=2, slots=2, signal=s) for s in ("word", "sentinel")]
            if resource == "epilogue" and not by_rank:
                found += [replace(plain, resource=r, tiles=2, columns=2, shots=2) for r in PULLED]
                two = replace(plain, tiles=2, columns=2, shots=2, slots=2)
                found += [replace(two, signal=s) for s in SIGNALS]
                folded = f"{resource}-folded"
                found.append(replace(plain, resource=folded, tiles=4, shots=2, slots=2))
                if kernel == "gemm_ar":
                    own = replace(plain, resource=folded, shots=2, columns=4, order="interleave")
                    found.append(replace(own, own="between", tiles=2, workers=2))
    return found


def _least(resource: str) -> int:
    return 3 if resource.startswith("sm:2") else 2


def wide_grid() -> Iterator[Sample]:
    """Many programs that must be proven: worlds, tiles, channels, orders, workers, loops."""
    choices = itertools.product(
        (2, 3, 4),
        (None, 1, 3),
        ("auto", "row", "grouped", "arrival", "departure", "interleave"),
        ((3, 1), (7, 2)),
    )
    for number, (world, channels, order, (workers, group)) in enumerate(choices):
        for kernel, tensor, by_rank, resources in FAMILIES:
            resource = resources[number % len(resources)]
            tiles = world * (1 + number % 3) if by_rank else 1 + number % 5
            yield Sample(
                kernel,
                tensor,
                resource,
                world,
                tiles,
                columns=1 + number % 2,
                workers=workers,
                channels=channels,
                order=order,
                flatten=number % 2 == 0,
                group=group,
                dtype=("bf16", "fp32")[number % 2],
            )


@lru_cache(maxsize=4)
def prepared(sample: Sample) -> tuple[Op, Trial]:
    """The program and the trial of a sample."""
    torch.set_num_threads(1)
    return sample.program(), sample.trial()
