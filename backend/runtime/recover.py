"""A new generation of a process group: the ranks that live agree on who they are and start afresh.

The abandoned arena stays mapped, because late copies and captured graphs may still write there; its abort
word is set for good, so whatever runs on it leaves at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from tilelink import knobs
from tilelink.backend.runtime.agree import Absent, agree
from tilelink.backend.runtime.errors import RecoveryFailed
from tilelink.backend.runtime.groups import make_group, succeed
from tilelink.backend.runtime.roster import POLL, Meeting, Store, process_of
from tilelink.backend.runtime.state import GroupState

PREFIX = "tilelink/recover"
LATE = 2.0  # seconds that a decision without this rank must have stood
DEATH = 0.5  # seconds until the entry of a process that has ended counts as that of a dead rank


def recover(group: Any = None, *, timeout: float | None = None, store: Any = None) -> Any:
    """The process group of the ranks of ``group`` that are alive; called by every live rank.

    To be called after a WaitTimeout, an AgreementError, or an exception that kept this rank from a call.
    Ranks that do not come within ``timeout`` seconds (default: twice ``TILELINK_TIMEOUT`` and 20) are left
    out; a rank whose process has ended is not waited for. The new group has an arena of its own with
    epochs from the start. It is for ``Kernel.on(group=...)`` and for torch.distributed; where all ranks
    are alive, calls on ``group`` go to it as well. The order of the ranks is kept.

    ``group``: None for the default group. ``store``: one that all live ranks reach; needed only where
    the process that hosts the group's store is among the dead.

    Errors: RecoveryFailed where the store cannot be reached, the others went on without this rank, or
    a rank died meanwhile (recover again). Unavailable without a GPU.
    """
    import torch.distributed as dist

    from tilelink.backend.runtime.arena import state_of

    state = state_of(group)
    if group is None:
        group = dist.group.WORLD
    if state.world == 1:
        raise RecoveryFailed(
            rank=0, why="it is the only rank of its group", help="there is nobody to lose"
        )
    return recover_state(state, group, "cuda", timeout, store)


def recover_state(
    state: GroupState, group: Any, device: str, timeout: float | None = None, store: Any = None
) -> Any:
    """:func:`recover` for the state of a group; ``device`` is ``cuda`` or ``cpu``."""
    limit = timeout if timeout is not None else 2 * knobs.TIMEOUT.get() + 20.0
    state.give_up("a new generation was asked for")
    state.drain()
    state.host.clear()
    base = store if store is not None else state.store
    try:
        members, name = elect(base, state, limit)
        rank = members.index(state.rank)
        fresh = _prefixed(f"tilelink/generation/{name}", base)
        agree(fresh, rank, len(members), "here", "the new generation", {}, None, limit)
        ranks = _world_ranks(state, members)
        label = f"tilelink-{name}"
        new = make_group(fresh, label, rank, len(members), device, max(limit, 60.0), ranks)
    except RecoveryFailed:
        raise
    except Absent as problem:
        raise RecoveryFailed(
            rank=state.rank,
            why=f"a rank was lost meanwhile: {problem.values['detail']}",
            help="call tilelink.recover() again on every live rank",
        ) from None
    except RuntimeError as problem:
        # Stores raise DistError and its subclasses, all of them RuntimeErrors.
        raise RecoveryFailed(
            rank=state.rank,
            why=f"the store did not answer: {str(problem).splitlines()[0]}",
            help="its host may be among the dead; pass `store=`, one that all live ranks reach",
        ) from problem
    if len(members) == state.world:
        succeed(group, new)
        if group is not state.group:
            succeed(state.group, new)
    return new


def elect(store: Store, state: GroupState, limit: float) -> tuple[list[int], str]:
    """The ranks of the new generation in order, the same on all of them, and a fresh name for it.

    Every rank waits for all that are not known to be dead, then proposes whom it has met; the first
    proposal in the store holds.
    """
    meeting = Meeting(store, f"{PREFIX}/hello", state.rank, state.world)
    started = time.monotonic()
    standing = ""
    while True:
        meeting.look()
        waited = time.monotonic() - started
        if store.check([f"{PREFIX}/decision"]):
            standing = store.get(f"{PREFIX}/decision").decode()
            chosen = _valid(standing, meeting, waited)
            if chosen is not None:
                return _accept(chosen, standing, state.rank)
        dead = {*state.lost(), *meeting.dead(DEATH)}
        complete = meeting.here | dead == set(range(state.world))
        if complete or waited > limit:
            members = sorted(meeting.here - dead)
            proposal = json.dumps({str(r): meeting.processes[r].text() for r in members})
            now = store.compare_set(f"{PREFIX}/decision", standing, proposal).decode()
            chosen = _valid(now, meeting, waited)
            if chosen is not None:
                return _accept(chosen, now, state.rank)
        time.sleep(POLL)


def _valid(text: str, meeting: Meeting, waited: float) -> list[int] | None:
    """The members that a decision names; None if it is left over from an earlier recovery."""
    decision = {int(rank): process_of(entry) for rank, entry in json.loads(text).items()}
    if meeting.rank in decision:
        return sorted(decision) if decision[meeting.rank] == meeting.me else None
    # Without this rank: theirs, unless one of them comes to this meeting after all.
    theirs = all(meeting.processes.get(rank) == process for rank, process in decision.items())
    return sorted(decision) if theirs and waited > LATE else None


def _accept(members: list[int], text: str, rank: int) -> tuple[list[int], str]:
    if rank not in members:
        raise RecoveryFailed(
            rank=rank,
            why=f"ranks {', '.join(map(str, members))} went on without it",
            help="it came too late; give tilelink.recover() a larger timeout on every rank",
        )
    return members, hashlib.sha256(text.encode()).hexdigest()[:16]


def _prefixed(prefix: str, store: Any) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(prefix, store)


def _world_ranks(state: GroupState, members: list[int]) -> list[int]:
    from torch.distributed import distributed_c10d

    known = distributed_c10d._world.pg_group_ranks.get(state.group)
    if not known:
        return members
    of = {inner: outer for outer, inner in known.items()}
    return [of.get(r, r) for r in members]
