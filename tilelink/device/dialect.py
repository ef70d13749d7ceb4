"""What Triton and Gluon spell differently, so that the rest of this library is written once.

A Gluon kernel may call a function made with ``@triton.jit``; it is then compiled as Gluon, in which every
tile has a layout. Scalars, which signals are made of, have none.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import core

_CTA = 1024  # threads of a CTA, at most

if triton.knobs.runtime.interpret:

    @triton.jit
    def axis(length: tl.constexpr):
        """The int32 vector 0, 1, … ``length`` - 1 (a power of two)."""
        return tl.arange(0, length)

    @triton.jit
    def threads():
        """An int32 vector of which every thread that runs this holds an element."""
        return tl.arange(0, 1)

    @triton.jit
    def gluon():
        """Whether this is compiled as Gluon."""
        return False

else:

    def _arange(count: int, semantic: Any, generator: Any) -> Any:
        from triton.experimental.gluon.language import BlockedLayout
        from triton.experimental.gluon.language._semantic import GluonSemantic

        if not isinstance(semantic, GluonSemantic):
            return semantic.arange(0, count or _CTA)
        warps = semantic.num_warps(generator).value
        return semantic.arange(0, count or 32 * warps, BlockedLayout([1], [32], [warps], [0]))

    @core.builtin
    def axis(length: Any, _semantic: Any = None, _generator: Any = None) -> Any:
        """The int32 vector 0, 1, … ``length`` - 1 (a power of two)."""
        return _arange(core._unwrap_if_constexpr(length), _semantic, _generator)

    @core.builtin
    def threads(_semantic: Any = None, _generator: Any = None) -> Any:
        """An int32 vector of which every thread that runs this holds an element.

        Threads of a role, where warps have roles, else those of the CTA.
        """
        return _arange(0, _semantic, _generator)

    @core.builtin
    def gluon(_semantic: Any = None, _generator: Any = None) -> Any:
        """Whether this is compiled as Gluon."""
        from triton.experimental.gluon.language._semantic import GluonSemantic

        return core.constexpr(isinstance(_semantic, GluonSemantic))
