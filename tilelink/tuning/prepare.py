"""Compiling candidates before they are measured: many processes, no GPU, the caches of the ranks.

A process proves a candidate, emits it, and compiles its kernels as a launch on a GPU of the target would
(same arguments' types and alignment, same options), so that ranks find them in Triton's cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tilelink.schedules import Schedule
from tilelink.tuning.problem import Problem

CAPABILITY = 90  # of the GPUs that kernels are compiled for
SLACK = 1 << 16  # bytes of an arena beyond what the program asks for


@dataclass(frozen=True, slots=True)
class Prepared:
    """A candidate ready to run: the emitted module's path; or why there is none."""

    path: str | None
    failed: str | None = None


def make_pool(processes: int | None = None) -> ProcessPoolExecutor:
    """Processes to prepare and predict in: by default all cores but a few for the ranks."""
    count = processes or max(1, (os.cpu_count() or 2) * 3 // 4)
    # Not forked: a process that uses a GPU must not be.
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_single)


def _single() -> None:
    """One thread a process: there are as many processes as cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def submit(
    pool: Executor, problem: Problem, schedules: Iterable[Schedule]
) -> dict[Schedule, Future[Prepared]]:
    """Starts preparing every schedule of a problem."""
    text = problem.to_json()
    return {s: pool.submit(prepare, text, s.to_json()) for s in schedules}


def prepare(problem: str, schedule: str) -> Prepared:
    """Proves, emits and compiles one candidate (JSON texts)."""
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import compile_kernel
    from tilelink.backend.runtime import load_module, write_module
    from tilelink.backend.runtime.image import image_of

    try:
        program = compile_kernel(Problem.from_json(problem).build(), Schedule.from_json(schedule))
        path = write_module(emit(program), program.symbol)
        spills = compile_module(load_module(path), image_of(program))
    except Exception as error:  # whatever it is, the search goes on without this candidate
        text = " ".join(str(error).split())
        return Prepared(None, f"{type(error).__name__}: {text}"[:300])
    # It may be fast by chance; `tilelink tune --check` would refuse it.
    return Prepared(None, f"spills {spills} bytes a thread") if spills else Prepared(str(path))


def compile_module(module: Any, image: Any) -> int:
    """Compiles every kernel that a call of an emitted module launches; bytes that they spill a thread."""
    import torch
    import triton

    from tilelink import knobs
    from tilelink.backend.dtypes import TORCH_DTYPES
    from tilelink.backend.runtime.plan import compile_launch
    from tilelink.backend.runtime.views import Views

    class Precompiler(Views):
        """Takes the calls of an emitted host function; launches compile, all else does nothing."""

        compiled = spills = 0

        def launch(
            self,
            kernel: Any,
            workers: int,
            args: tuple[Any, ...],
            num_warps: int,
            num_stages: int,
            **_: Any,
        ) -> None:
            """Compiles a kernel for these arguments."""
            found = compile_launch(
                kernel, workers, args, **self.options(kernel, num_warps, num_stages)
            )
            self.compiled += 1
            self.spills += spilled(found.compiled)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return _Nothing()

    triton.runtime.driver.set_active(_Target())
    # Never touched, so never in memory.
    arena = torch.empty(image.arena_bytes + SLACK, dtype=torch.uint8)
    peers = torch.zeros(image.world, dtype=torch.int64)
    limits = knobs.TIMEOUT.get(), knobs.ARRIVAL_TIMEOUT.get()
    call = Precompiler(image, 0, [arena] * image.world, peers, *limits)
    call.workspace = torch.empty(image.workspace_bytes, dtype=torch.uint8)
    call.tensors = {
        slot.name: torch.empty(slot.dims, dtype=TORCH_DTYPES[slot.dtype])
        for slot in image.tensors.values()
    }
    call.scalars = dict.fromkeys(image.scalars, 1.0)
    module.host(call)
    return call.spills


def spilled(compiled: Any) -> int:
    """Bytes of local memory that a thread of a compiled kernel uses."""
    from tilelink.backend.emit.compile_worker import resources

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = resources(cubin)
    return usage.get("STACK", 0) + usage.get("LOCAL", 0)


class _Nothing:
    """What answers a call of the host function that enqueues no kernel."""

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Target:
    """As much of a Triton driver as compiling for another GPU asks for."""

    def get_current_target(self) -> Any:
        """The GPU to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        """Its number: one is as good as another."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """No stream."""
        return 0
