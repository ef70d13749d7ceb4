"""The interpreter executor: emitted Triton source under ``TRITON_INTERPRET=1``, one process a rank.

Two things differ from a GPU. The plan has one worker a rank, since the interpreter runs the programs
of a grid one after another; and bf16 is computed as fp32 throughout (Triton's interpreter gets bf16
arithmetic wrong): inputs are widened, outputs rounded once at the end, so partial results that a GPU
rounds to bf16 on the wire are not rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilelink import knobs
from tilelink.backend.runtime import write_module
from tilelink.backend.runtime.errors import BadArgument, RankFailed, Unavailable
from tilelink.backend.runtime.image import Image, image_of, one_worker, uses, widen
from tilelink.backend.runtime.watch import timeout_error
from tilelink.ir import Op

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
Emit = Callable[[Op], str]


def plan(program: Op) -> Op:
    """The program as the interpreter runs it: one worker a rank, bf16 widened to fp32."""
    single = one_worker(program)
    return widen(single) if uses(single, "bf16") else single


def run(
    program: Op,
    inputs: Sequence[Tensors],
    *,
    calls: int = 1,
    timeout: float = 60.0,
    scalars: Mapping[str, float] | None = None,
    epoch: int = 0,
    emit: Emit | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Runs a fused program ``calls`` times on the same inputs; returns the last call's outputs.

    See :func:`run_calls` for the arguments and errors.
    """
    results = run_calls(
        program, [inputs] * calls, timeout=timeout, scalars=scalars, epoch=epoch, emit=emit
    )
    return results[-1]


def run_calls(
    program: Op,
    inputs: Sequence[Sequence[Tensors]],
    *,
    timeout: float = 60.0,
    scalars: Mapping[str, float] | None = None,
    epoch: int = 0,
    emit: Emit | None = None,
) -> list[list[dict[str, torch.Tensor]]]:
    """Runs one call after another, without a barrier between them, on the interpreter.

    ``inputs[call][rank][name]`` are the user's tensors (shards where a tensor has ``over``); outputs
    that are not given start as NaN. ``epoch`` is the epoch of the call before the first. ``emit``
    gives the module's source for the plan. Returns ``outputs[call][rank][name]``.

    Errors: WaitTimeout if a wait ran out, RankFailed if a rank raised or died, RankStuck if the calls
    took longer than ``timeout`` seconds, BadArgument for a wrong shape or a missing tensor,
    Unavailable where Triton's interpreter cannot run.
    """
    _check_numpy()
    planned = plan(program)
    image, wanted = image_of(planned), image_of(program)
    if emit is None:
        from tilelink.backend.emit.triton import emit as emit_triton

        emit = emit_triton
    path = write_module(emit(planned), image.name)
    from tilelink.backend.runtime.pool import drop, pool_for

    pool = pool_for(image.world, image.arena_bytes)
    pool.poison(image.arena_bytes)
    pool.start_epoch(epoch)
    # Scalars may stand among the tensors of a call; they are the same on all ranks.
    values = {**inputs[0][0], **(scalars or {})}
    # The kernel's own limit comes first, so that a lost signal is named and not only late.
    limit = min(knobs.TIMEOUT.get(), timeout / 3)
    messages = [
        {
            "path": str(path),
            "calls": [_tensors_of(image, call[rank]) for call in inputs],
            "scalars": {n: v for n, v in values.items() if n in image.scalars},
            "progress": limit,
            "arrival": limit,
        }
        for rank in range(image.world)
    ]
    try:
        answers = pool.request(messages, timeout)
    except BaseException:
        drop(pool)
        raise
    records = [a["abort"] for a in answers if "abort" in a]
    if records:
        drop(pool)
        written = [r for r in records if r[0]]
        if not written:
            raise RankFailed(rank=0, detail="left the call without an error record")
        raise timeout_error(wanted, written[0], limit)
    return [
        [_outputs_of(wanted, answers[rank]["outputs"][call]) for rank in range(image.world)]
        for call in range(len(inputs))
    ]


def _tensors_of(image: Image, given: Tensors) -> dict[str, torch.Tensor]:
    import torch

    from tilelink.backend.runtime.views import TORCH_DTYPES

    tensors = {}
    for name, slot in image.tensors.items():
        dtype = TORCH_DTYPES[slot.dtype]
        value = given.get(name)
        if value is None:
            if slot.role not in ("out", "temp"):
                raise BadArgument(name=name, detail="is missing", help="give it for every rank")
            fill = float("nan") if dtype.is_floating_point else -1
            tensors[name] = torch.full(slot.dims, fill, dtype=dtype)
            continue
        if tuple(value.shape) != slot.dims:
            raise BadArgument(
                name=name,
                detail=f"has shape {list(value.shape)}, the program takes {list(slot.dims)}",
                help="a tensor that is spread over the ranks is given as each rank's shard",
            )
        tensors[name] = value.detach().cpu().to(dtype).contiguous().clone()
    return tensors


def _outputs_of(image: Image, outputs: Any) -> dict[str, torch.Tensor]:
    from tilelink.backend.runtime.views import TORCH_DTYPES

    return {slot.name: outputs[slot.name].to(TORCH_DTYPES[slot.dtype]) for slot in image.outputs}


def _check_numpy() -> None:
    import numpy as np

    if tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
        raise Unavailable(
            backend="interpret",
            reason=f"Triton 3.6's interpreter needs numpy below 2.4, this is {np.__version__}",
        )
