"""Why an emitted module is refused. The span is a place in the emitted text."""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import TilelinkError


class EmittedError(TilelinkError):
    """Base of all refusals of an emitted module."""

    code: ClassVar[str] = "emitted"


class Unclear(EmittedError):
    """Text of which the meaning is not known here; it is refused, never skipped."""

    code: ClassVar[str] = "emitted-unclear"
    message: ClassVar[str] = "the meaning of this is not known to the validation: {detail}"
    hint: ClassVar[str] = "emit the module again with `tilelink emit`, and do not edit it"


class NotCovered(EmittedError):
    """Text of a form that `tilelink emit` writes, and the validation does not follow: it may well be right."""

    code: ClassVar[str] = "emitted-not-covered"
    message: ClassVar[str] = "validation does not cover {form}; nothing is said of this module"
    hint: ClassVar[str] = (
        "`tilelink check` without --emitted proves the program; docs/translation-validation.md lists such forms"
    )


class EmittedHazard(EmittedError):
    """Text that says plainly what it does, and that is wrong on the device."""

    code: ClassVar[str] = "emitted-hazard"
    message: ClassVar[str] = "{detail}"
    hint: ClassVar[str] = "emit the module again with `tilelink emit`, and do not edit it"


class EmittedDiffers(EmittedError):
    """Text that does something else than the program that the kernel compiles to."""

    code: ClassVar[str] = "emitted-differs"
    message: ClassVar[str] = "the emitted module is not this program: {detail}"
    hint: ClassVar[str] = "give the kernel, shape and schedule that the module was emitted for"
