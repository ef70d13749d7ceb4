"""Mistakes in kernels and in calls of them, one class each."""

from __future__ import annotations

import pickle

from tilelink.errors import TilelinkError


class UnknownName(TilelinkError):
    """A name that is neither a local variable, a global, nor a parameter."""

    code = "unknown-name"
    message = "`{name}` is not defined{where}"
    hint = "{advice}"


class UnsupportedSyntax(TilelinkError):
    """Python that is outside the subset of kernels."""

    code = "unsupported-syntax"
    message = "{what} cannot be used in a kernel"
    hint = "{advice}"


class WrongRank(TilelinkError):
    """As many indices as a tensor has no axes."""

    code = "wrong-rank"
    message = "`{tensor}` has {rank} {axes}, but {given} {are} indexed here"
    hint = "give one index an axis; `:` takes a whole axis"


class UnmappedRead(TilelinkError):
    """An access of a moved tensor that is not a tile of its mapping."""

    code = "unmapped-read"
    message = "`{tensor}` is {moved}, but this {access} of it is not a tile of the mapping"
    hint = "{advice}"


class ShapeMismatch(TilelinkError):
    """Two extents or shapes that have to agree."""

    code = "shape-mismatch"
    message = "{left} does not agree with {right}"
    hint = "{advice}"


class DtypeMismatch(TilelinkError):
    """An element type that an operation or a parameter does not take."""

    code = "dtype-mismatch"
    message = "{what}"
    hint = "{advice}"


class NotAnExtent(TilelinkError):
    """A loop over something that is no extent."""

    code = "not-an-extent"
    message = "{what} is not an extent"
    hint = "loop over extents (`M, K = A.shape`), or over bounds with `tk.tiles(lo, hi)`"


class BadExtent(TilelinkError):
    """An extent that is no length of an axis."""

    code = "bad-extent"
    message = "`{name}` is {value!r}, but {what} is a whole number from 1 to {most}"
    hint = "{advice}"


class IndexPastEnd(TilelinkError):
    """An index or a slice that is known and does not lie inside its axis."""

    code = "index-past-end"
    message = "{part} of axis {axis} of `{tensor}` {fault}"
    hint = "{advice}"


class EmptyLoop(TilelinkError):
    """A loop whose bounds are written as numbers, the last before the first."""

    code = "empty-loop"
    message = "`tk.{name}({bounds})` ends before it begins"
    hint = "{advice}"


class UnusedValue(TilelinkError):
    """An expression that stands as a statement: operations change nothing, so its value is lost."""

    code = "unused-value"
    message = "nothing uses the value of `{text}`"
    hint = "{advice}"


class IdleLoop(TilelinkError):
    """An outermost loop that reads tensors and stores nothing."""

    code = "idle-loop"
    message = "this loop reads {tensors}, but stores nothing"
    hint = "store tiles of a result in it, `C[m, n] = x`, or take it out"


class NoOutput(TilelinkError):
    """A kernel that stores to no parameter."""

    code = "no-output"
    message = "`{kernel}` stores to none of its parameters, so a call has no result"
    hint = "store tiles of the result in a parameter: `C[m, n] = x`"


class NoSuchAxis(TilelinkError):
    """An axis of a shape that the tensor does not have."""

    code = "no-such-axis"
    message = "`{shape}` has {rank} {axes}: there is no axis {axis}"
    hint = "axes count from 0; `-1` is the last one"


class StoreOutsideLoop(TilelinkError):
    """A store that belongs to no task."""

    code = "store-outside-loop"
    message = "this store to `{tensor}` is in no loop, so no tile of it is a task"
    hint = "store tiles: `for {variables} in tk.tiles({extents}): {tensor}[{variables}] = …`"


class NeverStored(TilelinkError):
    """An output whose only stores are in loops that run no iteration."""

    code = "never-stored"
    message = (
        "`{tensor}` is stored here, but this loop runs no iteration, and nothing else stores it"
    )
    hint = "correct the bounds of the loop"


class GatheredStore(TilelinkError):
    """A store to a parameter whose shards every rank reads."""

    code = "gathered-store"
    message = "`{tensor}` is {moved}, so it cannot be stored to: peers may still be reading it"
    hint = "store to a tensor of its own"


class NeverUsed(TilelinkError):
    """A moved tensor that the kernel does not touch, so that nobody could wait for its tiles."""

    code = "never-used"
    message = "`{tensor}` is {moved}, but the kernel never {does} it"
    hint = "{advice}"


class MissingExtent(TilelinkError):
    """An extent without a value."""

    code = "missing-extent"
    message = "the value of {names} of kernel `{kernel}` is not known"
    hint = "give it with `--set {first}=512`, or in the decorator with `example=dict({first}=512)`"


class BadCall(TilelinkError):
    """Arguments that do not fit the function."""

    code = "bad-call"
    message = "{what}"
    hint = "{advice}"


class NoStorage(BadCall):
    """A tensor without memory: one that is traced, transformed, or wraps another one."""

    code = "no-storage"
    message = "argument `{name}` {what}: it has no memory that a kernel could read"
    hint = "{advice}"


class NeedsGradient(BadCall):
    """An input whose gradient is asked for, though a call of a kernel is not recorded for it."""

    code = "needs-gradient"
    message = "argument `{name}` requires a gradient, and kernels have no backward pass"
    hint = (
        "`tilelink.ops` has operators with one; else pass `{name}.detach()`, or call the kernel under "
        "torch.no_grad()"
    )


class NotPicklable(TilelinkError, pickle.PicklingError):
    """A kernel that another process could not find again."""

    code = "not-picklable"
    message = "{what} cannot be pickled: {why}"
    hint = "{advice}"


class StoreAfterSum(TilelinkError):
    """A contribution that comes after the sum has been read."""

    code = "store-after-sum"
    message = "`{tensor}` is stored here, but its sum is read {where}"
    hint = (
        "reading `{tensor}` gives the sum over all ranks, so all of it must be stored before: "
        "read it in a loop of its own after the last store, and write the result to another tensor"
    )


class PartialStore(TilelinkError):
    """An output of which each rank writes its own part only, declared whole."""

    code = "partial-store"
    message = (
        "`{tensor}` is whole on each rank, but this loop runs this rank's part of `{extent}` only"
    )
    hint = (
        "say in the mapping that each rank keeps its part: `shard {tensor}[{dims}] over {extent}`"
    )


class LoopCarried(TilelinkError):
    """A variable whose type changes from one iteration to the next."""

    code = "loop-carried"
    message = "`{name}` enters the loop as {before}, but an iteration leaves it as {after}"
    hint = "give it the same type before the loop, or use another name inside"


class NotCompileTime(TilelinkError):
    """A condition that is not known when the kernel is compiled."""

    code = "not-compile-time"
    message = "{what} is not known when the kernel is compiled"
    hint = "{advice}"


class NotDivisible(TilelinkError):
    """An extent that cannot be shared out or aligned."""

    code = "not-divisible"
    message = "{what} is not a multiple of {unit}"
    hint = "{advice}"


class NotContiguous(TilelinkError):
    """An argument with gaps in memory."""

    code = "not-contiguous"
    message = "argument `{name}` is neither contiguous nor the transpose of a contiguous matrix"
    hint = "pass `{name}.contiguous()`"


class NoSource(TilelinkError):
    """A function whose text cannot be found."""

    code = "no-source"
    message = "the source of `{name}` cannot be read: {why}"
    hint = "define kernels and the functions they call in a file"


class BadFile(TilelinkError):
    """A kernel file that cannot be imported."""

    code = "bad-file"
    message = "{what}"
    hint = "{advice}"
