"""Torch's types for the element types of Tile IR."""

from __future__ import annotations

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which contributions of ``dtype`` are added over ranks: fp32, of integers int64.

    Rounded to int32 at the end, such a sum has wrapped around as one in int32 has.
    """
    return torch.float32 if dtype.is_floating_point else torch.int64


__all__ = ["TORCH_DTYPES", "sum_dtype"]
