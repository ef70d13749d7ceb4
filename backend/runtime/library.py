"""The vendor's library: products with the arithmetic of a tile (fp32 sums, rounded once), and collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

Fetch = Callable[[], torch.Tensor]
Collective = Callable[[torch.Tensor, torch.Tensor], None]

_C: Any = torch._C


class Switch:
    """Something that PyTorch may do in products: ``read()``, ``write(value)``, and whether a value is exact.

    ``exact(value)`` is what to write instead of ``value``, or None where sums are in fp32 as it is. These are
    the functions behind the attributes of `torch.backends.cuda.matmul`, which take longer than the product
    takes to enqueue, and lose part of a value that is a pair.
    """

    __slots__ = ("exact", "read", "write")

    def __init__(
        self,
        read: Callable[[], Any],
        write: Callable[[Any], object],
        exact: Callable[[Any], Any],
    ) -> None:
        self.read, self.write, self.exact = read, write, exact


def _reduction(dtype: str) -> Switch:
    """Whether parts of a sum are added in ``dtype``: a flag, with another one of split depths beside it or not."""
    read = getattr(_C, f"_get_cublas_allow_{dtype}_reduced_precision_reduction")
    write = getattr(_C, f"_set_cublas_allow_{dtype}_reduced_precision_reduction")

    def exact(value: Any) -> Any:
        if isinstance(value, tuple):
            return (False, *value[1:]) if value[0] else None
        return False if value else None

    return Switch(read, lambda v: write(*v) if isinstance(v, tuple) else write(v), exact)


# By the dtype of the operands. TF32 rounds operands of fp32; the others round parts of a sum.
_SWITCHES: dict[torch.dtype, tuple[Switch, ...]] = {
    torch.float32: (
        Switch(
            lambda: torch.backends.cuda.matmul.fp32_precision,
            lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
            lambda value: None if value in ("ieee", "none") else "ieee",
        ),
    ),
    torch.bfloat16: (_reduction("bf16"),),
    torch.float16: (
        _reduction("fp16"),
        Switch(
            _C._get_cublas_allow_fp16_accumulation,
            _C._set_cublas_allow_fp16_accumulation,
            lambda value: False if value else None,
        ),
    ),
}


def matmul(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``out = a @ b + bias``: (m, k) by (k, n) into (m, n), all of one floating dtype; bias is (n,).

    Either operand may be the transpose of a contiguous matrix, and may be a parameter of a model: no
    gradient is kept. Sums are in fp32 and the result is rounded once, whatever the process allows PyTorch
    to do elsewhere: its switches are put back.
    """
    changed: list[tuple[Switch, Any]] = []
    for switch in _SWITCHES.get(a.dtype, ()):
        value = switch.read()
        exact = switch.exact(value)
        if exact is not None:
            changed.append((switch, value))
            switch.write(exact)
    # PyTorch writes into no tensor that is given while it records gradients. Not `torch.no_grad`, which
    # takes microseconds.
    recording = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
    finally:
        torch._C._set_grad_enabled(recording)
        for switch, value in changed:
            switch.write(value)


def collective_of(op: str, group: Any, device: torch.device) -> Collective:
    """A function of ``(target, source)`` that enqueues a collective of ``group`` on the current stream.

    ``op``: ``all_gather``, ``reduce_scatter`` (sum), both along the first axis of contiguous tensors, or
    ``all_reduce`` (sum), in place: of ``target`` alone. It is what the function of ``torch.distributed`` comes
    to: the same call of the group's backend, with its time limit and its watchdog. The function's own checks
    and decorators take as long as the rest of a small call, so options are made once and they are left out.
    ValueError for another ``op``.
    """
    if op not in ("all_gather", "reduce_scatter", "all_reduce"):
        raise ValueError(f"unknown collective {op}")
    backend = group._get_backend(device)
    options: Any
    if op == "all_gather":
        from torch._C._distributed_c10d import AllgatherOptions

        options, enqueue = AllgatherOptions(), backend._allgather_base
    elif op == "reduce_scatter":
        options, enqueue = dist.ReduceScatterOptions(), backend._reduce_scatter_base
    else:
        options, enqueue = dist.AllreduceOptions(), backend.allreduce
    # On the current stream: no events to and from one of the backend's own.
    options.asyncOp = False

    def move(target: torch.Tensor, source: torch.Tensor) -> None:
        work = enqueue(target, source, options)
        if work is not None:
            work.wait()

    def add(target: torch.Tensor, _: torch.Tensor) -> None:
        work = enqueue([target], options)
        if work is not None:
            work.wait()

    return add if op == "all_reduce" else move


def place_of(
    tensor: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> tuple[str, int, tuple[int, ...], tuple[int, ...]] | None:
    """Where ``tensor`` lies in one of the contiguous tensors ``given``; None if in none of them.

    The name of that one, the elements in front, shape and strides: with them `as_strided` makes the same
    region of another tensor of that name, so that nothing of a call has to be kept for the next.
    """
    for name, whole in given.items():
        skip = tensor.data_ptr() - whole.data_ptr()
        if 0 <= skip < max(1, whole.nbytes) and tensor.dtype == whole.dtype:
            return name, skip // whole.element_size(), tuple(tensor.shape), tuple(tensor.stride())
    return None
