"""Keys of compiled kernels that do not depend on what a process compiled before.

Triton names a compiled kernel in its cache on disk by the sources of all functions that it calls and by the
constants that these read. Of a function that no kernel has called yet it leaves the constants out, so that the
name is another one in a process that meets kernels in another order, and what stands in the cache is not found.
"""

from __future__ import annotations

from types import ModuleType

from triton.runtime.jit import JITCallable


def settle(*modules: ModuleType) -> None:
    """Works out the keys of the functions that ``modules`` define, in the order of their definition.

    To be called where they are imported, before a kernel can call them. Under Triton's interpreter there
    are none.
    """
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITCallable) and function.__module__ == module.__name__:
                function.cache_key  # noqa: B018 - worked out when first read
