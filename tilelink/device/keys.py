"""Keys of compiled kernels: what a process finds in Triton's cache on disk, and what it must not find there.

Triton names a compiled kernel by the sources of all functions that it calls and by the constants that these read.
Of a function that no kernel has called yet it leaves the constants out, so that the name is another one in a
process that meets kernels in another order, and what stands in the cache is not found. And it takes
functions that make assembly for its own, whose text can only change with its version, so that a kernel
of an older release of this library would be found in place of one that is made differently.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from types import ModuleType

from triton.runtime.jit import JITCallable


@cache
def sources() -> str:
    """A digest of the text of this package."""
    texts = sorted(
        (path.name, path.read_text(encoding="utf-8"))
        for path in files("tilelink.device").iterdir()
        if path.name.endswith(".py")
    )
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def settle(*modules: ModuleType) -> None:
    """Works out the keys of the functions that ``modules`` define, in the order of their definition.

    To be called where they are imported, before a kernel can call them. Under Triton's interpreter there
    are none.
    """
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITCallable) and function.__module__ == module.__name__:
                key = function.cache_key + sources()
                function.hash = hashlib.sha256(key.encode()).hexdigest()
