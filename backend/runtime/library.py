"""The vendor's library: products with the arithmetic of a tile (fp32 sums, rounded once), and collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

Collective = Callable[[torch.Tensor, torch.Tensor], None]
# Takes the handle of the main stream, and the tensors of a call by name.
Command = Callable[[int, Mapping[str, torch.Tensor]], None]

Tensors = Mapping[str, torch.Tensor]
_C: Any = torch._C
# What a switch of PyTorch's is set to for a product, and back; None where sums are in fp32 as it is.
_Setting = tuple[tuple[Any, ...], tuple[Any, ...]] | None
_records_gradients, _record_gradients = torch.is_grad_enabled, _C._set_grad_enabled


def matmul(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``out = a @ b + bias``: (m, k) by (k, n) into (m, n), all of one floating dtype; bias is (n,).

    Either operand may be the transpose of a contiguous matrix, and may be a parameter of a model: no
    gradient is kept. Sums are in fp32 and the result is rounded once, whatever the process allows PyTorch
    to do elsewhere: its switches are put back.
    """
    _EXACT.get(a.dtype, _multiply)(a, b, out, bias)


def _multiply(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """:func:`matmul` with what the process allows."""
    # PyTorch writes into no tensor that is given while it records gradients of another. Not
    # `torch.no_grad`, which takes microseconds.
    recording = _records_gradients() and (
        a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    )
    if recording:
        _record_gradients(False)
    try:
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
    finally:
        if recording:
            _record_gradients(True)


def _without(
    read: Callable[[], Any],
    write: Callable[..., Any],
    setting: Callable[[Any], _Setting],
    multiply: Callable[..., None] = _multiply,
) -> Callable[..., None]:
    """``multiply`` where a switch of PyTorch's does not change sums.

    ``read`` and ``write`` are the functions behind an attribute of `torch.backends.cuda.matmul`, which itself
    takes longer than the product takes to enqueue, and loses part of a value that is a pair.
    """
    known: dict[Any, _Setting] = {}

    def exact(*args: Any) -> None:
        value = read()
        if value not in known:
            known[value] = setting(value)
        found = known[value]
        if found is None:
            multiply(*args)
            return
        write(*found[0])
        try:
            multiply(*args)
        finally:
            write(*found[1])

    return exact


def _reduced(value: Any) -> _Setting:
    """A flag, or one with another of split depths beside it, which may stay as it is."""
    pair = value if isinstance(value, tuple) else (value,)
    return ((False, *pair[1:]), pair) if pair[0] else None


def _reduction(dtype: str) -> tuple[Callable[[], Any], Callable[..., Any], Any]:
    """Whether parts of a sum are added in ``dtype``."""
    name = f"cublas_allow_{dtype}_reduced_precision_reduction"
    return getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{name}"), _reduced


def _set_precision(value: str) -> None:
    """How products of fp32 are made; what PyTorch allows in general goes on to be what it allows here."""
    switches = torch.backends.cuda.matmul
    switches.fp32_precision = "none"
    if switches.fp32_precision != value:
        switches.fp32_precision = value


# By the dtype of the operands. TF32 rounds operands of fp32; the others round parts of a sum.
_EXACT: dict[torch.dtype, Callable[..., None]] = {
    torch.float32: _without(
        lambda: torch.backends.cuda.matmul.fp32_precision,
        _set_precision,
        lambda value: None if value in ("ieee", "none") else (("ieee",), (value,)),
    ),
    torch.bfloat16: _without(*_reduction("bf16")),
    torch.float16: _without(
        *_reduction("fp16"),
        _without(
            _C._get_cublas_allow_fp16_accumulation,
            _C._set_cublas_allow_fp16_accumulation,
            _reduced,
        ),
    ),
}


class Place:
    """A tensor that the library works on: the runtime's own, or one of a call's or a region in it, by name.

    ``of(tensors)``: the tensor itself. For one that is whole, ``tensors.get(name, own)`` is as good, and no
    call of Python: ``own`` is None where ``name`` is one of the call's, so that nothing of a call is kept.
    """

    __slots__ = ("name", "own", "region")

    def __init__(self, tensor: torch.Tensor, given: Tensors) -> None:
        place = place_of(tensor, given)
        self.name: str | None = None
        self.own: Any = None
        self.region: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None
        if place is None:
            self.own = tensor
        else:
            self.name, *_ = place
            if tensor is not given[self.name]:
                self.region = place[1:]

    def of(self, tensors: Tensors) -> torch.Tensor:
        """The tensor, in a call on ``tensors``."""
        if self.name is None:
            own: torch.Tensor = self.own
            return own
        whole = tensors[self.name]
        if self.region is None:
            return whole
        skip, shape, strides = self.region
        return whole.as_strided(shape, strides, whole.storage_offset() + skip)


def product(
    dtype: torch.dtype, a: Place, b: Place, out: Place, bias: Place | None = None
) -> Command:
    """:func:`matmul` of what stands at these places, tensors of ``dtype``, on the current stream."""
    multiply = _EXACT.get(dtype, _multiply)
    if bias is not None or a.region or b.region or out.region:
        added = None if bias is None else bias.of
        left, right, into = a.of, b.of, out.of
        return lambda _, t: multiply(left(t), right(t), into(t), added and added(t))
    (x, own_x), (y, own_y), (z, own_z) = ((p.name, p.own) for p in (a, b, out))

    def whole(_: int, tensors: Mapping[Any, Any]) -> None:
        multiply(tensors.get(x, own_x), tensors.get(y, own_y), tensors.get(z, own_z))

    return whole


def collective_of(op: str, group: Any, device: torch.device) -> Collective:
    """A function of ``(target, source)`` that enqueues a collective of ``group`` on the current stream.

    ``op``: ``all_gather``, ``reduce_scatter`` (sum), both along the first axis of contiguous tensors, or
    ``all_reduce`` (sum), in place: of ``target`` alone. It is what the function of ``torch.distributed`` comes
    to: the same call of the group's backend, with its time limit and its watchdog. The function's own checks
    and decorators take as long as the rest of a small call, so options are made once and they are left out.
    ValueError for another ``op``.
    """
    enqueue, options = _backend(op, group, device)

    def move(target: torch.Tensor, source: torch.Tensor) -> None:
        work = enqueue(target, source, options)
        if work is not None:
            work.wait()

    def add(target: torch.Tensor, _: torch.Tensor) -> None:
        work = enqueue([target], options)
        if work is not None:
            work.wait()

    return add if op == "all_reduce" else move


def collective(op: str, group: Any, device: torch.device, target: Place, source: Place) -> Command:
    """:func:`collective_of` of what stands at these places, on the current stream."""
    if target.region or source.region:
        move = collective_of(op, group, device)
        return lambda _, t: move(target.of(t), source.of(t))
    enqueue, options = _backend(op, group, device)
    (x, own_x), (y, own_y) = ((p.name, p.own) for p in (target, source))

    def whole(_: int, tensors: Mapping[Any, Any]) -> None:
        work = enqueue(tensors.get(x, own_x), tensors.get(y, own_y), options)
        if work is not None:
            work.wait()

    def whole_in_place(_: int, tensors: Mapping[Any, Any]) -> None:
        work = enqueue([tensors.get(x, own_x)], options)
        if work is not None:
            work.wait()

    return whole_in_place if op == "all_reduce" else whole


def _backend(op: str, group: Any, device: torch.device) -> tuple[Callable[..., Any], Any]:
    """The function of a group's backend for a collective, and options that have it on the current stream."""
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
    # No events to and from a stream of the backend's own.
    options.asyncOp = False
    return enqueue, options


def place_of(
    tensor: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> tuple[str, int, tuple[int, ...], tuple[int, ...]] | None:
    """Where ``tensor`` lies in one of the contiguous tensors ``given``; None if in none of them.

    The name of that one, the elements in front, shape and strides: with them `as_strided` makes the same
    region of another tensor of that name, so that nothing of a call has to be kept for the next.
    """
    # One that is given as it is comes first: another may lie around it.
    for name, whole in sorted(given.items(), key=lambda item: item[1] is not tensor):
        skip = tensor.data_ptr() - whole.data_ptr()
        if 0 <= skip < max(1, whole.nbytes) and tensor.dtype == whole.dtype:
            return name, skip // whole.element_size(), tuple(tensor.shape), tuple(tensor.stride())
    return None
