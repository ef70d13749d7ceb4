"""The end of a process group: what the runtime keeps for it is given back.

Here nothing is known of what that is. Modules list the tables that they keep states in, and what else they
keep by state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tilelink.backend.runtime import watch
from tilelink.backend.runtime.errors import Unavailable
from tilelink.backend.runtime.groups import found, generations, prune

if TYPE_CHECKING:
    from tilelink.backend.runtime.state import GroupState

tables: list[dict[Any, Any]] = []  # states of groups, by what stands for a group
forgetting: list[Callable[[GroupState], None]] = []  # drops what a module keeps for a state


def release(group: Any = None) -> None:
    """Gives back what is kept for ``group`` and its generations since :func:`tilelink.recover`: arenas, symmetric
    memory, programs with their own tensors, recorded calls.

    To be called when a group is no longer used for fused calls, at the latest before its memory is needed for
    something else. It waits for this rank's calls and for the work of its GPU, not for other ranks: memory that
    a peer still writes to stays until that peer has given it back, too. Behind it the group is as if no call had
    been made: the next one is collective and slow, and needs all ranks to have released the group. Nothing
    happens for a group that has made no call.

    Not for use any more, as their memory is gone: CUDA graphs that calls of the group were captured into, and
    tensors of :func:`tilelink.empty` and :func:`tilelink.peers`. Destroy graphs first. Other threads must not be
    in a call of the group.

    A group that ``torch.distributed.destroy_process_group`` ends is forgotten without this, unless there are such
    graphs or tensors: at the next :func:`tilelink.synchronize` or first call of another group.

    ``group``: a process group, None for the default one, or for this process alone where there is none.

    Errors: the WaitTimeout of a call that nobody has been told of, once all is given back; PeerTimeout where a
    call cannot end because other work holds up its stream, Unavailable inside a graph capture: then nothing is.
    """
    import torch
    import torch.distributed as dist

    if group is None and dist.is_available():
        group = dist.group.WORLD
    if _capturing(torch):
        raise Unavailable(
            backend="cuda", reason="memory cannot be released while a graph is captured"
        )
    every = generations(group)
    states = [state for state in _states() if any(state.group is one for one in every)]
    for state in states:
        state.rest()
    # A rank that was done earlier may have left: that says nothing of calls that have ended here.
    errors = [error for state in states if (error := state.untold()) is not None]
    for state in states:
        forget(state)
    sweep()
    if errors:
        raise errors[0]


def sweep() -> None:
    """Forgets the groups that torch.distributed has destroyed, where nothing can touch their memory any more.

    On threads of the user alone: memory is unmapped behind all work of a GPU, which a capture does not survive.
    """
    gone = [state for state in _states() if state.destroyed()]
    if gone:
        import torch

        for state in [] if _capturing(torch) else gone:
            if not state.held and state.idle():
                # PyTorch ends the process where it cannot wait for the GPU as it unmaps: while another thread
                # captures, for one. So that is tried first, and else left for the next time.
                with contextlib.suppress(RuntimeError):
                    state.rest()
                    forget(state)
    prune()


def forget(state: GroupState) -> None:
    """Drops everything that is kept for a state of which no call runs."""
    watch.unwatch(state)
    found.clear()
    for drop in forgetting:
        drop(state)
    for table in tables:
        for key in [key for key, known in table.items() if known is state]:
            del table[key]
    state.close()


def _states() -> list[GroupState]:
    return [state for table in tables for state in list(table.values())]


def _capturing(torch: Any) -> bool:
    cuda = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())
