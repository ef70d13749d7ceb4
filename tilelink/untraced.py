"""Calls of kernels in functions that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kernel(*args, **kwargs)


# What it wraps costs about a microsecond more, so that only calls that are traced come here.
call: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _call, reason="a kernel of tilelink; tilelink.ops has operators that can be traced"
)
