"""Translation validation: an emitted module, read back and proven to be the program of its kernel.

The text is interpreted from its syntax tree alone, for every worker of every rank, at its own shape:
each access, wait and notify that it makes, in its order. These rows are compared with the program that
the kernel compiles to, and go through the proof in place of the program's. Nothing of the emitter is
used; of the module, only the text. Whatever is not understood is refused.
"""

from __future__ import annotations

from tilelink.backend.validate.errors import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    NotCovered,
    Unclear,
)
from tilelink.backend.validate.module import Module, read_module, split_modules
from tilelink.backend.validate.prove import Validation, validate

__all__ = [
    "EmittedDiffers",
    "EmittedError",
    "EmittedHazard",
    "Module",
    "NotCovered",
    "Unclear",
    "Validation",
    "read_module",
    "split_modules",
    "validate",
]
