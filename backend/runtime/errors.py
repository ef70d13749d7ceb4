"""What can go wrong when a program runs, one class a mistake."""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import TilelinkError


class WaitTimeout(TilelinkError):
    """A wait ran out: a rank did not start the call, or did not send what it should have.

    ``values`` holds the fields of the error record: ``rank``, ``worker``, ``tile``, ``channel``,
    ``expected``, ``seen``, ``producer`` and ``limit`` (seconds).
    """

    code: ClassVar[str] = "wait-timeout"
    message: ClassVar[str] = (
        "rank {rank} waited in vain for rank {producer}: worker {worker}, tile {tile}, "
        "channel {channel}, expected {expected}, seen {seen}; {why}"
    )
    hint: ClassVar[str] = (
        "outputs of the call hold NaN and this process group's workspace is no longer used; see whether "
        "rank {producer} died, raised an error or called something else; `tilelink.recover()` on every "
        "live rank goes on"
    )


class PeerLost(WaitTimeout):
    """The process of a rank has ended, so that what a wait waits for will never come."""

    code: ClassVar[str] = "peer-lost"
    message: ClassVar[str] = WaitTimeout.message
    hint: ClassVar[str] = (
        "outputs of the call hold NaN; `tilelink.recover()` on every live rank gives the group of those "
        "that are left"
    )


class EpochOverwritten(WaitTimeout):
    """The epoch of a rank's arena is not the one that its last call left: memory was overwritten."""

    code: ClassVar[str] = "epoch-overwritten"
    message: ClassVar[str] = (
        "rank {rank} cannot begin a call of `{kernel}`: the epoch of its arena is {seen}, "
        "its last call left {expected}"
    )
    hint: ClassVar[str] = (
        "something wrote past the end of its memory (compute-sanitizer finds it); `tilelink.recover()` "
        "on every live rank goes on with a fresh arena"
    )


class CallsDiffer(WaitTimeout):
    """The ranks of one call run different programs, each known to all: other kernels, shapes or schedules."""

    code: ClassVar[str] = "calls-differ"
    message: ClassVar[str] = "rank {rank} called {mine}, rank {producer} {theirs}"
    hint: ClassVar[str] = (
        "all ranks make the same calls in the same order; outputs of the call hold NaN, and "
        "`tilelink.recover()` on every live rank goes on"
    )


class ExtentsDiffer(WaitTimeout):
    """The ranks of one call passed tensors of different lengths along a dynamic extent."""

    code: ClassVar[str] = "extents-differ"
    message: ClassVar[str] = (
        "rank {rank} called `{kernel}` with {extent} = {expected}, rank {producer} with {seen}"
    )
    hint: ClassVar[str] = (
        "all ranks pass the same number of rows; outputs of the call hold NaN, and `tilelink.recover()` on "
        "every live rank goes on"
    )


class PeerTimeout(WaitTimeout):
    """Another rank's wait ran out and told this one, or this process group was given up before."""

    code: ClassVar[str] = "peer-timeout"
    message: ClassVar[str] = "rank {rank} left the call early: {why}"
    hint: ClassVar[str] = (
        "outputs here hold NaN and the group is no longer used; `tilelink.recover()` on every live rank "
        "goes on"
    )


class RecoveryFailed(TilelinkError):
    """The live ranks could not agree on a new generation of their group."""

    code: ClassVar[str] = "recovery-failed"
    message: ClassVar[str] = "rank {rank} has no new group: {why}"
    hint: ClassVar[str] = "{help}"


class AgreementError(TilelinkError):
    """The ranks of a process group do not run the same program, or not all of them came to it."""

    code: ClassVar[str] = "agreement"
    message: ClassVar[str] = "the ranks do not agree on `{kernel}`: {detail}"
    hint: ClassVar[str] = (
        "every rank calls the same kernels in the same order with the same shapes, dtypes and schedule"
    )


class BadArgument(TilelinkError):
    """A tensor that cannot be handed to a fused kernel as it is."""

    code: ClassVar[str] = "bad-argument"
    message: ClassVar[str] = "argument `{name}`: {detail}"
    hint: ClassVar[str] = "{help}"


class NotPrepared(TilelinkError):
    """A program met for the first time while a CUDA graph is being captured."""

    code: ClassVar[str] = "not-prepared"
    message: ClassVar[str] = (
        "`{kernel}` is called with these shapes for the first time inside a graph capture"
    )
    hint: ClassVar[str] = (
        "call it once before the capture: memory and the agreement of the ranks cannot be captured"
    )


class TooManyWorkers(TilelinkError):
    """A launch whose spinning CTAs would not all be resident at once."""

    code: ClassVar[str] = "too-many-workers"
    message: ClassVar[str] = (
        "`{kernel}` launches {workers} workers, but {resident} fit on this GPU at once "
        "({registers} registers, {shared} B shared memory, {warps} warps each)"
    )
    hint: ClassVar[str] = "use at most {resident} workers, or smaller tiles or fewer stages"


class TooLargeForSM(TilelinkError):
    """A kernel whose tiles and stages need more of an SM than there is."""

    code: ClassVar[str] = "too-large-for-sm"
    message: ClassVar[str] = (
        "a CTA of `{kernel}` needs {required} of {resource}, and there are {limit}"
    )
    hint: ClassVar[str] = (
        "use fewer stages or smaller tiles in the schedule; `tilelink emit FILE --stage ttgir`, with the same "
        "schedule and extents, says how many stages fit"
    )


class OutOfMemory(TilelinkError):
    """Memory of a GPU that a rank asked for in vain; the other ranks get an AgreementError that repeats it."""

    code: ClassVar[str] = "out-of-memory"
    message: ClassVar[str] = "rank {rank} has no {size} of GPU memory for {what}: {reason}"
    hint: ClassVar[str] = (
        "free tensors, and what PyTorch keeps of them with torch.cuda.empty_cache(); where a program needs less "
        "than TILELINK_ARENA_MB, lower that on every rank; then every rank calls again"
    )


class DriverError(TilelinkError):
    """A CUDA driver call that failed."""

    code: ClassVar[str] = "cuda-driver"
    message: ClassVar[str] = "{call} failed: {reason}"
    hint: ClassVar[str] = "{help}"


class Unavailable(TilelinkError):
    """An executor that cannot run here."""

    code: ClassVar[str] = "unavailable"
    message: ClassVar[str] = "the {backend} backend cannot run here: {reason}"
    hint: ClassVar[str] = "`tilelink env` lists what each backend needs"


class RankFailed(TilelinkError):
    """A rank of the interpreter raised an error or its process died."""

    code: ClassVar[str] = "rank-failed"
    message: ClassVar[str] = "rank {rank} of the interpreter {detail}"
    hint: ClassVar[str] = "the other ranks were stopped; the next run starts fresh processes"


class RankStuck(TilelinkError):
    """Ranks of the interpreter that did not finish in time."""

    code: ClassVar[str] = "rank-stuck"
    message: ClassVar[str] = (
        "after {seconds:g} s these ranks of the interpreter had not finished: {ranks}"
    )
    hint: ClassVar[str] = (
        "the processes were stopped; an inner step takes about 2.5 ms, so use smaller extents or a "
        "larger timeout"
    )
