"""Products by the vendor's library, with the arithmetic of a tile: fp32 sums, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Fetch = Callable[[], torch.Tensor]

# By the dtype of the operands: a switch of `torch.backends.cuda.matmul`, values that leave sums in fp32, and
# the one to set where it has another. TF32 rounds operands of fp32; reduced precision rounds parts of a sum.
_SWITCHES: dict[torch.dtype, tuple[tuple[str, tuple[object, ...], object], ...]] = {
    torch.float32: (("fp32_precision", ("ieee", "none"), "ieee"),),
    torch.bfloat16: (("allow_bf16_reduced_precision_reduction", (False,), False),),
    torch.float16: (
        ("allow_fp16_reduced_precision_reduction", (False,), False),
        ("allow_fp16_accumulation", (False,), False),
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
    switches: Any = torch.backends.cuda.matmul
    changed: list[tuple[str, object]] = []
    for name, fine, exact in _SWITCHES.get(a.dtype, ()):
        value = getattr(switches, name)
        if value not in fine:
            changed.append((name, value))
            setattr(switches, name, exact)
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
        for name, value in changed:
            setattr(switches, name, value)


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
