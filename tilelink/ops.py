"""The ready-made kernels as operators of PyTorch: differentiable, and traced whole by ``torch.compile``.

``ag_gemm``, ``gemm_rs`` and ``gemm_ar`` return fresh tensors and change none. What they compute is that of the
kernels of the same names in :mod:`tilelink.kernels`; ``torch.ops.tilelink`` holds them with the number of ranks
and the name of the group as plain arguments, so that the shape of a result depends on arguments alone.

Tensors on GPUs run the fused kernels. Those on the CPU run the kernels' reference: every rank gathers the
arguments of all others and interprets the kernel for each, which is slow, and there to test models with.

Gradients follow what tensor parallelism does with these layers (Megatron-LM, arXiv:1909.08053, section 3, and
arXiv:2205.05198, section 4.2):

- of a tensor that differs from rank to rank (a shard of rows, a slice of a weight) every rank gets the
  gradient of the sum over the ranks of what they compute from the result;
- a result that is the same on every rank (``gemm_ar``) goes, on every rank, into the same loss, whose gradient
  by it they all have whole: so it is not summed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tilelink import kernels
from tilelink.kernel import BoundKernel, Kernel

_GEMM = "(Tensor a, Tensor b, bool nk, bool dynamic, int world, str group) -> Tensor"


def ag_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    nk: bool = False,
    group: dist.ProcessGroup | str | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """All-gather and product: (M, N), ``gathered a @ b + bias``, of this rank's columns.

    ``a``: this rank's rows, (M / WORLD, K), of bf16, fp16 or fp32; where it has more axes, rows are all but the
    last, gathered along the first. ``b``: this rank's weight, (K, N), or (N, K) with ``nk``, as
    ``torch.nn.Linear`` keeps it. ``bias``: (N,). ``group``: a process group or its name; None is the default
    group, or this process alone. ``dynamic``: the number of rows varies from call to call.

    The gradient by ``a`` is a fused product and reduce-scatter; that by ``b`` gathers ``a`` again, which is not
    kept, and is a product of the library's. Under autocast all tensors are cast to its element type first.

    Errors: those of a call of ``tilelink.kernels.ag_gemm``.
    """
    name, world = _named(group)
    a, b, bias = _cast(a), _cast(b), None if bias is None else _cast(bias)
    rows = a if a.dim() < 3 else a.flatten(0, -2)
    out: torch.Tensor = _ag_gemm(rows, b, bias, nk, dynamic, world, name)
    return out if a.dim() < 3 else out.view(a.shape[0] * world, *a.shape[1:-1], -1)


def gemm_rs(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    nk: bool = False,
    group: dist.ProcessGroup | str | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """Product and reduce-scatter: (M / WORLD, N), this rank's rows of the sum over the ranks of ``a @ b``.

    ``a``: (M, K), K this rank's slice; where it has more axes, rows are all but the last, scattered along the
    first. ``b``: (K, N), or (N, K) with ``nk``. The rest as in :func:`ag_gemm`.

    The gradient by ``a`` alone is a fused all-gather and product. Where that by ``b`` is asked for too, the
    gradient of the result is gathered once, for two products of the library's.

    Errors: those of a call of ``tilelink.kernels.gemm_rs``.
    """
    name, world = _named(group)
    a, b = _cast(a), _cast(b)
    rows = a if a.dim() < 3 else a.flatten(0, -2)
    if a.dim() > 2:
        _check_shared(a.shape[0], world)
    out: torch.Tensor = _gemm_rs(rows, b, nk, dynamic, world, name)
    return out if a.dim() < 3 else out.view(a.shape[0] // world, *a.shape[1:-1], -1)


def gemm_ar(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    nk: bool = False,
    group: dist.ProcessGroup | str | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """Product and all-reduce: (M, N), the sum over the ranks of ``a @ b``, the same bits on every rank.

    ``a``: (M, K), K this rank's slice, with any axes before; ``b``: (K, N), or (N, K) with ``nk``. The rest as in
    :func:`ag_gemm`.

    The gradients are local products: the gradient of the result is taken to be the same on every rank, since
    all go on from the same result to the same loss (Megatron's *g*: all-reduce forward, nothing backward).
    ``torch.distributed.nn.all_reduce`` sums it over the ranks instead, as if each had a loss of its own.

    Errors: those of a call of ``tilelink.kernels.gemm_ar``.
    """
    name, world = _named(group)
    a, b = _cast(a), _cast(b)
    rows = a if a.dim() < 3 else a.flatten(0, -2)
    out: torch.Tensor = _gemm_ar(rows, b, nk, dynamic, world, name)
    return out if a.dim() < 3 else out.view(*a.shape[:-1], -1)


# Of what tells it by the name of a group, the one function that torch.compile knows.
_size_of: Any = distributed_c10d._get_group_size_by_name


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in autocast's element type, where autocast is on."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point():
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _named(group: Any) -> tuple[str, int]:
    """The name of a group and how many ranks it has; no name for this process alone."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return "", 1
        group = dist.group.WORLD
    if isinstance(group, str):
        return group, _size_of(group)
    return group.group_name, group.size()


def _resolve(name: str) -> Any:
    names: Any = distributed_c10d
    return names._resolve_process_group(name)


def _check_shared(rows: int, world: int) -> None:
    if rows % world:
        from tilelink.frontend.errors import NotDivisible

        raise NotDivisible(
            what=f"axis 0 of argument `a`, {rows},",
            unit=f"the number of ranks, {world}",
            advice="the result is scattered along it: every rank gets as much",
        )


def _group(name: str, world: int) -> Any:
    """The group of that name; BadCall where it has not as many ranks as the operator is for."""
    if not name:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    else:
        group = _resolve(name)
    ranks = 1 if group is None else group.size()
    if ranks != world:
        from tilelink.frontend.errors import BadCall

        raise BadCall(
            what=f"an operator for {world} ranks is run by {ranks}",
            advice="trace the model again: it was compiled before this process group was made",
        )
    return group


_bound: dict[tuple[Kernel, Any, bool], BoundKernel] = {}


def _run(
    kernel: Kernel,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    nk: bool,
    dynamic: bool,
    world: int,
    name: str,
) -> torch.Tensor:
    """One call of a kernel on this rank's tensors."""
    group = _group(name, world)
    if not b.is_contiguous() and b.dim() == 2 and b.t().is_contiguous():
        b, nk = b.t(), not nk
    extra: dict[str, Any] = {} if bias is None else {"bias": bias}
    if nk:
        extra["nk"] = True
    if a.is_cuda:
        return _launch(kernel, a, b, extra, group, dynamic)
    return _interpret(kernel, {"A": a, "B": b, **extra}, world, group)


def _launch(
    kernel: Kernel,
    a: torch.Tensor,
    b: torch.Tensor,
    extra: dict[str, Any],
    group: Any,
    dynamic: bool,
) -> torch.Tensor:
    """The kernel on this rank's GPU."""
    key = (kernel, group, dynamic)
    if key not in _bound:
        _bound[key] = kernel.on(group=group, dynamic=("M",) if dynamic else None)
    if "bias" in extra:
        extra = {**extra, "bias": _dense(extra["bias"])}
    out: torch.Tensor = _bound[key](_dense(a), _dense(b), **extra)
    return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels on GPUs take it: contiguous, at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _interpret(kernel: Kernel, given: dict[str, Any], world: int, group: Any) -> torch.Tensor:
    """The kernel's reference, on what all ranks of a group of CPU processes pass."""
    kernel.bind(
        (), world, given, strict=False
    )  # what is wrong with these is told before others wait
    of_all = {name: _of_all(value, world, group) for name, value in given.items()}
    out: torch.Tensor = kernel.on("reference", world=world)(**of_all)[group.rank() if group else 0]
    return out


def _of_all(value: Any, world: int, group: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return list(_gather(value, world, group).view(world, *value.shape).unbind())


def _gather(rows: torch.Tensor, world: int, group: Any) -> torch.Tensor:
    """The rows of all ranks, in their order, by the library."""
    whole = rows.new_empty((rows.shape[0] * world, *rows.shape[1:]))
    if world == 1:
        return whole.copy_(rows)
    # Newer releases of PyTorch have another name for it. What comes behind on this stream waits for it: beside a
    # fused kernel, which may hold every SM, it might never end.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, rows.contiguous(), group=group)
    return whole


_expect: Any = torch._check


def _columns(b: torch.Tensor, nk: bool) -> Any:
    return b.shape[0] if nk else b.shape[1]


def _check_shapes(a: torch.Tensor, b: torch.Tensor, nk: bool) -> None:
    """What tracing needs of the shapes; a call finds out the rest, and says more."""
    _expect(a.dim() == 2 and b.dim() == 2, lambda: "tilelink: `a` and `b` are matrices")
    _expect(
        a.shape[1] == b.shape[1 if nk else 0],
        lambda: f"tilelink: `a` has {a.shape[1]} columns, `b` is {tuple(b.shape)}, nk={nk}",
    )


def _make(
    name: str, schema: str, run: Any, fake: Any, save: Any = None, backward: Any = None
) -> Any:
    """An operator of ``torch.ops.tilelink``, with what traces it and its gradient."""
    op = torch.library.custom_op(f"tilelink::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=save)
    return op


def _run_ag_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    nk: bool,
    dynamic: bool,
    world: int,
    group: str,
) -> torch.Tensor:
    return _run(kernels.ag_gemm, a, b, bias, nk, dynamic, world, group)


def _fake_ag_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    nk: bool,
    dynamic: bool,
    world: int,
    group: str,
) -> torch.Tensor:
    _check_shapes(a, b, nk)
    return a.new_empty((a.shape[0] * world, _columns(b, nk)))


def _save_ag_gemm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, bias, *ctx.how = inputs
    by_a, by_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if by_b else None, b if by_a else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _ag_gemm_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    nk, dynamic, world, group = ctx.how
    by_a, by_b, by_bias = ctx.needs_input_grad[:3]
    of_a = _gemm_rs(grad, b, not nk, dynamic, world, group) if by_a else None
    of_b = _by_weight(_gather_rows(a, world, group), grad, nk) if by_b else None
    of_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if by_bias else None
    return of_a, of_b, of_bias, None, None, None, None


def _run_gemm_rs(
    a: torch.Tensor, b: torch.Tensor, nk: bool, dynamic: bool, world: int, group: str
) -> torch.Tensor:
    return _run(kernels.gemm_rs, a, b, None, nk, dynamic, world, group)


def _fake_gemm_rs(
    a: torch.Tensor, b: torch.Tensor, nk: bool, dynamic: bool, world: int, group: str
) -> torch.Tensor:
    _check_shapes(a, b, nk)
    _expect(a.shape[0] % world == 0, lambda: f"tilelink: {a.shape[0]} rows for {world} ranks")
    return a.new_empty((a.shape[0] // world, _columns(b, nk)))


def _save_gemm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, *ctx.how = inputs
    by_a, by_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if by_b else None, b if by_a else None)


def _gemm_rs_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    nk, dynamic, world, group = ctx.how
    by_a, by_b = ctx.needs_input_grad[:2]
    of_a = of_b = None
    if by_b:
        whole = _gather_rows(grad, world, group)
        of_a, of_b = _by_input(whole, b, nk) if by_a else None, _by_weight(a, whole, nk)
    elif by_a:
        of_a = _ag_gemm(grad, b, None, not nk, dynamic, world, group)
    return of_a, of_b, None, None, None, None


def _run_gemm_ar(
    a: torch.Tensor, b: torch.Tensor, nk: bool, dynamic: bool, world: int, group: str
) -> torch.Tensor:
    return _run(kernels.gemm_ar, a, b, None, nk, dynamic, world, group)


def _fake_gemm_ar(
    a: torch.Tensor, b: torch.Tensor, nk: bool, dynamic: bool, world: int, group: str
) -> torch.Tensor:
    _check_shapes(a, b, nk)
    return a.new_empty((a.shape[0], _columns(b, nk)))


def _gemm_ar_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    nk = ctx.how[0]
    by_a, by_b = ctx.needs_input_grad[:2]
    of_a = _by_input(grad, b, nk) if by_a else None
    of_b = _by_weight(a, grad, nk) if by_b else None
    return of_a, of_b, None, None, None, None


def _by_input(grad: torch.Tensor, b: torch.Tensor, nk: bool) -> torch.Tensor:
    """The gradient by ``a`` of ``a @ b``."""
    return grad @ (b if nk else b.t())


def _by_weight(a: torch.Tensor, grad: torch.Tensor, nk: bool) -> torch.Tensor:
    """The gradient by ``b`` of ``a @ b``."""
    return grad.t() @ a if nk else a.t() @ grad


_ag_gemm = _make(
    "ag_gemm",
    "(Tensor a, Tensor b, Tensor? bias, bool nk, bool dynamic, int world, str group) -> Tensor",
    _run_ag_gemm,
    _fake_ag_gemm,
    _save_ag_gemm,
    _ag_gemm_backward,
)
_gemm_rs = _make("gemm_rs", _GEMM, _run_gemm_rs, _fake_gemm_rs, _save_gemm, _gemm_rs_backward)
_gemm_ar = _make("gemm_ar", _GEMM, _run_gemm_ar, _fake_gemm_ar, _save_gemm, _gemm_ar_backward)
_gather_rows = _make(
    "gather_rows",
    "(Tensor rows, int world, str group) -> Tensor",
    lambda rows, world, group: _gather(rows, world, _group(group, world)),
    lambda rows, world, group: rows.new_empty((rows.shape[0] * world, *rows.shape[1:])),
)

__all__ = ["ag_gemm", "gemm_ar", "gemm_rs"]
