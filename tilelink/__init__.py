"""tilelink: kernels that compute and communicate at once on several GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilelink.errors import InternalError, IRSyntaxError, Source, Span, TilelinkError
from tilelink.kernel import BoundKernel, Kernel, kernel, load_kernels

if TYPE_CHECKING:
    from tilelink.backend.runtime.errors import WaitTimeout
    from tilelink.backend.runtime.recover import recover
    from tilelink.backend.runtime.release import release
    from tilelink.backend.runtime.symmetric import empty, peers
    from tilelink.backend.runtime.watch import synchronize

__version__ = "0.1.0"

__all__ = [
    "BoundKernel",
    "IRSyntaxError",
    "InternalError",
    "Kernel",
    "Source",
    "Span",
    "TilelinkError",
    "WaitTimeout",
    "empty",
    "kernel",
    "load_kernels",
    "peers",
    "recover",
    "release",
    "synchronize",
]

# Names whose modules import torch: found when they are first used.
_LAZY = {
    "WaitTimeout": "tilelink.backend.runtime.errors",
    "empty": "tilelink.backend.runtime.symmetric",
    "peers": "tilelink.backend.runtime.symmetric",
    "recover": "tilelink.backend.runtime.recover",
    "release": "tilelink.backend.runtime.release",
    "synchronize": "tilelink.backend.runtime.watch",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
