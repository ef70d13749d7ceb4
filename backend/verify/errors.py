"""Why a fused program is refused: one class a rule. The span is the access concerned."""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import TilelinkError


class VerifyError(TilelinkError):
    """Base of all refusals; ``notes`` hold the tile, the channel, the rank and the witness."""

    code: ClassVar[str] = "refused"


class CoverError(VerifyError):
    """A read that nothing orders after the write of what it reads."""

    code: ClassVar[str] = "uncovered-read"
    message: ClassVar[str] = "this read of `{symbol}` may happen before its data is there"
    hint: ClassVar[str] = (
        "wait, before the read, for every channel whose tiles it meets; notify after the write"
    )


class RaceError(VerifyError):
    """Two accesses to the same place in one call, one of them a write, in no order."""

    code: ClassVar[str] = "race"
    message: ClassVar[str] = "this access to `{symbol}` and another are in no order"
    hint: ClassVar[str] = "put a notify after the first and a wait for it before the second"


class ReuseError(VerifyError):
    """A write of the next call that may overtake this call's accesses to the same place."""

    code: ClassVar[str] = "unsafe-reuse"
    message: ClassVar[str] = (
        "in the next call this write of `{symbol}` may overtake an access of the call before"
    )
    hint: ClassVar[str] = (
        "acknowledge the last read to the writer, and let its next call wait for that first"
    )


class DataflowError(VerifyError):
    """An access that is ordered, but moves or reads another tile's or another rank's data."""

    code: ClassVar[str] = "wrong-data"
    message: ClassVar[str] = "this access to `{symbol}` is not of the data it should be: {detail}"
    hint: ClassVar[str] = "compare the index, the peer and the owner with the mapping of the tensor"


class MatchError(VerifyError):
    """Notifies and waits that do not add up."""

    code: ClassVar[str] = "unmatched"
    message: ClassVar[str] = "`{element}`: {detail}"
    hint: ClassVar[str] = (
        "in each call, notifies that reach an element and the count waited for are equal"
    )


class ProgressError(VerifyError):
    """A program that can hang."""

    code: ClassVar[str] = "deadlock"
    message: ClassVar[str] = "the program can hang: {detail}"
    hint: ClassVar[str] = (
        "reorder the agents, the stages or the queue so that what is waited for comes first"
    )


class UndecidedError(VerifyError):
    """A program of which the proof cannot tell what it does."""

    code: ClassVar[str] = "cannot-prove"
    message: ClassVar[str] = "nothing can be proven of this `{name}`: {detail}"
    hint: ClassVar[str] = (
        "what synchronises, and where, is known from the extents and the rank alone"
    )


class BoundsError(VerifyError):
    """An index, a peer, a buffer or an array that does not fit."""

    code: ClassVar[str] = "out-of-bounds"
    message: ClassVar[str] = "`{symbol}`: {detail}"
    hint: ClassVar[str] = (
        "indices lie inside the declared extents, and areas of the arena do not overlap"
    )


class RowsError(VerifyError):
    """A dynamic extent whose rows are not each for itself, or not where they are at the capacity."""

    code: ClassVar[str] = "dynamic-rows"
    message: ClassVar[str] = "this `{name}` is not the same for every number of rows: {detail}"
    hint: ClassVar[str] = (
        "rows of a dynamic extent are independent of each other; else compile the kernel for each extent"
    )


class FenceError(VerifyError):
    """Synchronisation that cannot release or acquire what it should."""

    code: ClassVar[str] = "release-acquire"
    message: ClassVar[str] = "`{symbol}`: {detail}"
    hint: ClassVar[str] = (
        "a notify releases what its own task wrote before it; a stream waits for local counters only"
    )
