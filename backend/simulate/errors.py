"""Mistakes that only a run of the fused program shows."""

from __future__ import annotations

from tilelink.errors import TilelinkError


class RunError(TilelinkError):
    """A mistake that a run has met; ``command`` is what makes the same run again, if that is known."""

    command: str = ""

    def render(self) -> str:
        """The whole text of the error, the command last."""
        text = super().render()
        return f"{text}\n = reproduce: {self.command}" if self.command else text


class RaceError(RunError):
    """Two accesses to the same memory, one of them a write, that nothing orders."""

    code = "race"
    message = "`{symbol}` on rank {rank}: {second} is not ordered after {first}"
    hint = "a wait or a notify is missing on the way from the first access to the second"


class DeadlockError(RunError):
    """Every task waits for another; the notes follow the waits."""

    code = "deadlock"
    message = "{blocked} tasks wait and none can run"
    hint = "each line waits for the next; the last one names what never comes"


class StandstillError(DeadlockError):
    """A deadlock of a timed run, which knows what each task waits for, but follows no waits."""

    hint = (
        "a notify is missing, or comes behind its own wait: `tilelink check FILE` and `tilelink run FILE` "
        "follow these waits to it"
    )


class BalanceError(RunError):
    """A notify that nobody waits for, or a count that no wait expects."""

    code = "unbalanced"
    message = "`{channel}` on rank {rank}: {detail}"
    hint = "each notify is waited for in the same call, and each count is reached exactly"


class BoundsError(RunError):
    """An access outside of a tensor, a buffer, a flag or a counter, or of the wrong shape."""

    code = "bounds"
    message = "`{symbol}`: {detail}"


class InputError(TilelinkError):
    """Inputs that are not those of the program."""

    code = "input"
    message = "rank {rank}, `{name}`: {detail}"
    hint = "inputs are a list over ranks of name to tensor: shards where a tensor has `over`"


class VersionError(RunError):
    """A read that saw another write than the one whose value it should have."""

    code = "version"
    message = "`{symbol}` on rank {rank}: {reader} reads {found}, where it should read {expected}"
    hint = "each read sees the same write of its own call, whatever the schedule and the call"


class NumbersError(RunError):
    """An output that differs from the reference by more than rounding explains."""

    code = "numbers"
    message = (
        "`{symbol}` of rank {rank} in call {call}: relative error {error:.1e}, limit {limit:.0e}"
    )
    hint = "no race and no stale read was seen: some op reads or writes another tile than it should"


class StepsError(RunError):
    """A run that was cut off since it took more steps than it was given."""

    code = "steps"
    message = "still running after {steps} steps"
    hint = "a correct program of this size ends in fewer; the limit is an argument of the run"


class WaitRanOut(RunError):
    """A wait of the simulated run ran out: the error that the runtime raises on that rank.

    ``values`` holds ``rank``, ``worker``, ``tile``, ``channel``, ``expected``, ``seen``, ``producer``
    and ``limit`` (virtual seconds).
    """

    code = "wait-timeout"
    message = (
        "rank {rank} waited in vain for rank {producer}: worker {worker}, tile {tile}, "
        "channel {channel}, expected {expected}, seen {seen}; {why}"
    )
    hint = "outputs of the call hold NaN; see whether rank {producer} died or lost a signal"


class RankStopped(RunError):
    """Another rank's wait ran out in the simulated run and told this one."""

    code = "peer-timeout"
    message = "rank {rank} left the call early: {why}"
    hint = "the rank whose wait ran out names the channel and the producer; outputs here hold NaN"
