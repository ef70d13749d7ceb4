"""The interpreter executor: emitted Triton source under ``TRITON_INTERPRET=1``, one process a rank.

Three things differ from a GPU. Kernels whose warps have roles run as Triton kernels of the same
schedule, since Gluon has no interpreter. The plan has one worker a rank, since the interpreter runs the programs
of a grid one after another; and bf16 is computed as fp32 throughout (Triton's interpreter gets bf16
arithmetic wrong): inputs are widened, outputs rounded once at the end, so partial results that a GPU
rounds to bf16 on the wire are not rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilelink import knobs
from tilelink.backend.runtime import write_module
from tilelink.backend.runtime.errors import (
    BadArgument,
    PeerTimeout,
    RankFailed,
    RankStuck,
    Unavailable,
    WaitTimeout,
)
from tilelink.backend.runtime.image import (
    Image,
    image_of,
    one_worker,
    uses,
    widen,
    without_roles,
)
from tilelink.backend.runtime.watch import timeout_error
from tilelink.errors import TilelinkError
from tilelink.ir import Op

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
Emit = Callable[[Op], str]


def plan(program: Op) -> Op:
    """The program as the interpreter runs it: one worker a rank, bf16 widened to fp32.

    Gluon has no interpreter: launches with roles run as the Triton kernels of the same schedule.
    """
    single = without_roles(one_worker(program))
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
    gives the module's source for the plan. Calls may differ in the value of a dynamic extent, which the
    tensors tell. Returns ``outputs[call][rank][name]``.

    Errors: WaitTimeout if a wait ran out, RankFailed if a rank raised or died, RankStuck if the calls
    took longer than ``timeout`` seconds, BadArgument for a wrong shape or a missing tensor,
    Unavailable where Triton's interpreter cannot run. After each of them the next run works.
    """
    ranks = run_ranks(program, inputs, timeout=timeout, scalars=scalars, epoch=epoch, emit=emit)
    errors = [r for r in ranks if isinstance(r, TilelinkError)]
    # A cause before its consequences: a rank that is gone, one that saw it, those that were told.
    for kind in (RankStuck, RankFailed, WaitTimeout, TilelinkError):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, PeerTimeout):
                raise error
    if errors:
        raise errors[0]
    done = [r for r in ranks if not isinstance(r, TilelinkError)]
    return [[outputs[call] for outputs in done] for call in range(len(inputs))]


def run_ranks(
    program: Op,
    inputs: Sequence[Sequence[Tensors]],
    *,
    timeout: float = 60.0,
    scalars: Mapping[str, float] | None = None,
    epoch: int = 0,
    emit: Emit | None = None,
    prepare: tuple[str, str, tuple[object, ...]] | None = None,
) -> list[list[dict[str, torch.Tensor]] | TilelinkError]:
    """As :func:`run_calls`, but returns what became of each rank: ``outputs[call][name]``, or its error.

    ``prepare`` names a module, a function and arguments: each rank calls ``function(shared, *arguments)``
    before the calls, and what it returns behind them. It is how tests break a rank on purpose.
    """
    _check_numpy()
    planned = plan(program)
    image, wanted = image_of(planned), image_of(program)
    if emit is None:
        from tilelink.backend.emit.triton import emit as emit_triton

        emit = emit_triton
    _check_inputs(image, inputs, scalars or {})
    path = write_module(emit(planned), image.name)
    from tilelink.backend.runtime.pool import drop, pool_for
    from tilelink.backend.runtime.views import TORCH_DTYPES

    pool = pool_for(image.world, image.arena_bytes)
    pool.renew()
    pool.poison(image, epoch)
    pool.start_epoch(epoch)
    dtypes = {name: TORCH_DTYPES[slot.dtype] for name, slot in wanted.tensors.items()}
    # Scalars may stand among the tensors of a call; they are the same on all ranks.
    values = {**inputs[0][0], **(scalars or {})}
    # The kernel's own limit comes first, so that a lost signal is named and not only late.
    limit = min(knobs.TIMEOUT.get(), timeout / 3)
    messages = [
        {
            "path": str(path),
            "calls": [_tensors_of(image, call[rank], dtypes) for call in inputs],
            "extents": [_extents_of(image, call) for call in inputs],
            "scalars": {n: v for n, v in values.items() if n in image.scalars},
            "progress": limit,
            "arrival": limit,
            "prepare": prepare,
        }
        for rank in range(image.world)
    ]
    try:
        answers = pool.request(messages, timeout)
    except BaseException:
        drop(pool)
        raise
    records = [a["abort"] for a in answers if not isinstance(a, TilelinkError) and "abort" in a]
    first = next((r for r in records if r[0]), None)

    dead = [rank for rank, a in enumerate(answers) if isinstance(a, RankFailed)]

    def became(rank: int) -> list[dict[str, torch.Tensor]] | TilelinkError:
        answer = answers[rank]
        if isinstance(answer, TilelinkError):
            return answer
        if "abort" in answer:
            return _stopped(wanted, answer["abort"], first, limit, rank, dead)
        return [_outputs_of(wanted, outputs) for outputs in answer["outputs"]]

    return [became(rank) for rank in range(image.world)]


def _stopped(
    image: Image,
    record: list[int],
    first: list[int] | None,
    limit: float,
    rank: int,
    dead: list[int],
) -> TilelinkError:
    """The error of a rank that left a call early; ``first`` is some rank's record, if there is one,
    ``dead`` are the ranks that failed."""
    if not record[0] and first is None and dead:
        # It was told, and waited for nothing any more.
        return PeerTimeout(rank=rank, why=f"rank {dead[0]} is gone", producer=dead[0])
    if record[0] or first is None:
        return timeout_error(image, record, limit, rank)
    cause = timeout_error(image, first, limit)
    note = str(cause).splitlines()[0].partition(": ")[2]
    return PeerTimeout(cause.span, notes=(note,), rank=rank, why="another rank stopped it")


def _check_inputs(image: Image, inputs: Sequence[Any], scalars: Mapping[str, Any]) -> None:
    """BadArgument unless every call has a mapping for each rank, and every scalar is a number."""
    advice = "inputs are a list over ranks of name to tensor"
    if not inputs:
        raise BadArgument(name="inputs", detail="there is no call", help=advice)
    for number, call in enumerate(inputs):
        if not isinstance(call, Sequence) or not all(isinstance(rank, Mapping) for rank in call):
            detail = f"call {number} is no list over ranks of name to tensor"
            raise BadArgument(name="inputs", detail=detail, help=advice)
        if len(call) != image.world:
            detail = f"call {number} has {len(call)} ranks, the program {image.world}"
            raise BadArgument(name="inputs", detail=detail, help=advice)
    given = {**inputs[0][0], **scalars}
    for name in image.scalars:
        if name not in given:
            raise BadArgument(name=name, detail="is missing", help="give it in `scalars`")
        if not isinstance(given[name], int | float):
            kind = type(given[name]).__name__
            raise BadArgument(name=name, detail=f"is a {kind}, not a number", help="it is a scalar")


def _extents_of(image: Image, call: Sequence[Tensors]) -> dict[str, int]:
    """The values of the dynamic extents in a call; BadArgument where ranks differ."""
    import torch

    found = [
        image.extents_of({n: t.shape for n, t in given.items() if isinstance(t, torch.Tensor)})
        for given in call
    ]
    for rank, mine in enumerate(found):
        if mine != found[0]:
            raise BadArgument(
                name=", ".join(image.dynamic),
                detail=f"is {mine} on rank {rank}, {found[0]} on rank 0",
                help="all ranks pass as many rows",
            )
    return found[0]


def _tensors_of(
    image: Image, given: Tensors, wanted: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    import torch

    from tilelink.backend.runtime.views import TORCH_DTYPES

    tensors = {}
    shapes = {n: t.shape for n, t in given.items() if isinstance(t, torch.Tensor)}
    for name, slot in image.at(image.extents_of(shapes)).items():
        dtype = TORCH_DTYPES[slot.dtype]
        value: Any = given.get(name)
        if value is None:
            if slot.role not in ("out", "temp"):
                raise BadArgument(name=name, detail="is missing", help="give it for every rank")
            fill = float("nan") if dtype.is_floating_point else -1
            tensors[name] = torch.full(slot.dims, fill, dtype=dtype)
            continue
        if not isinstance(value, torch.Tensor):
            detail = f"is a {type(value).__name__}, not a tensor"
            raise BadArgument(name=name, detail=detail, help="give each rank's shard")
        if value.dtype not in (dtype, wanted.get(name, dtype)):
            raise BadArgument(
                name=name,
                detail=f"has element type {value.dtype}, the program takes {wanted.get(name, dtype)}",
                help="convert it first",
            )
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
