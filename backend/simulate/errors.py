"""Mistakes that only a run of the fused program shows."""

from __future__ import annotations

from tilelink.errors import TilelinkError


class RaceError(TilelinkError):
    """Two accesses to the same memory, one of them a write, that nothing orders."""

    code = "race"
    message = "`{symbol}` on rank {rank}: {second} is not ordered after {first}"
    hint = "a wait or a notify is missing on the way from the first access to the second"


class DeadlockError(TilelinkError):
    """Every task waits for another; the notes follow the waits."""

    code = "deadlock"
    message = "{blocked} tasks wait and none can run"
    hint = "each line waits for the next; the last one names what never comes"


class BalanceError(TilelinkError):
    """A notify that nobody waits for, or a count that no wait expects."""

    code = "unbalanced"
    message = "`{channel}` on rank {rank}: {detail}"
    hint = "each notify is waited for in the same call, and each count is reached exactly"


class BoundsError(TilelinkError):
    """An access outside of a tensor, a buffer, a flag or a counter, or of the wrong shape."""

    code = "bounds"
    message = "`{symbol}`: {detail}"


class InputError(TilelinkError):
    """Inputs that are not those of the program."""

    code = "input"
    message = "rank {rank}, `{name}`: {detail}"
    hint = "inputs are a list over ranks of name to tensor: shards where a tensor has `over`"
