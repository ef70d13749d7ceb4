"""Agreement: all ranks of a process group say what they are about to do before any of them does it.

Each rank numbers the programs that it meets. Under that number it leaves, in the group's store, the
facts of its program or the error that keeps it from running; then it reads those of the others. A rank
that fails alone so becomes an error on all ranks instead of a wait without end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from tilelink.backend.runtime.errors import AgreementError
from tilelink.backend.runtime.roster import POLL, Meeting, Roster, Store, roster_of

# The first fact that differs is reported: a cause before its consequences, the source last.
ORDER = ("kernel", "shapes", "dtypes", "schedule", "versions", "emitted source")
LOOK = 0.25  # seconds between two looks for ranks that are elsewhere, or dead


class Absent(AgreementError):
    """Some rank did not come to the agreement: it may be in a fused call, or dead."""


def greet(store: Store, rank: int, world: int) -> Meeting:
    """Says to the other ranks of a group which process this is, and waits for nobody; see :func:`join`."""
    return Meeting(store, "tilelink/hello", rank, world)


def join(meeting: Meeting, kernel: str, timeout: float, patience: float) -> Roster:
    """Waits, for ``timeout`` seconds, until every rank has come to the meeting that :func:`greet` began.

    ``patience``: seconds until the entry of a process that has ended counts as that of a dead rank,
    and not as left over from an earlier use of the store.

    Errors: Absent naming the ranks that did not come.
    """
    world = meeting.world
    deadline = time.monotonic() + timeout
    look = time.monotonic() + LOOK
    while True:
        meeting.look()
        missing = [r for r in range(world) if r not in meeting.here]
        if not missing:
            return roster_of(meeting)
        now = time.monotonic()
        if now > look:
            look = now + LOOK
            _raise_dead(kernel, [r for r in meeting.dead(patience) if r in missing])
        if now > deadline:
            raise _absent(kernel, missing, timeout)
        time.sleep(POLL)


def agree(
    store: Store,
    rank: int,
    world: int,
    key: str,
    kernel: str,
    facts: Mapping[str, str],
    error: BaseException | None,
    timeout: float,
    elsewhere: Callable[[], list[int]] = list,
    lost: Callable[[], list[int]] = list,
) -> None:
    """Exchanges ``facts`` with all ranks; returns if all are equal and no rank has an error.

    ``key``: a name of this agreement that all ranks use and that was never used before. ``error``: what
    went wrong here, if anything; the caller raises it after this has told the others. ``elsewhere()``
    lists ranks seen to be in a fused call that this rank has not made, ``lost()`` those that are dead.
    ``timeout``: seconds to wait for the others.

    Errors: AgreementError naming the ranks and the first fact that differs, in the order of ``ORDER``;
    Absent naming those that did not come.
    """
    mine = {"error": str(error)} if error is not None else dict(facts)
    store.set(f"{key}/{rank}", json.dumps(mine))
    if error is not None:
        return
    deadline = time.monotonic() + timeout
    look = time.monotonic() + LOOK
    missing = list(range(world))
    while missing:
        missing = [r for r in missing if not store.check([f"{key}/{r}"])]
        if not missing:
            break
        now = time.monotonic()
        if now > deadline:
            raise _absent(kernel, missing, timeout)
        if now > look:
            look = now + LOOK
            _raise_dead(kernel, [r for r in lost() if r in missing])
            busy = [r for r in elsewhere() if r in missing]
            if busy:
                raise Absent(
                    kernel=kernel,
                    detail=f"{_ranks(busy)} runs another program, or this one with other arguments",
                )
        time.sleep(POLL)
    theirs = [json.loads(store.get(f"{key}/{r}")) for r in range(world)]
    failed = [r for r, t in enumerate(theirs) if "error" in t]
    if failed:
        first = failed[0]
        raise AgreementError(
            kernel=kernel,
            detail=f"{_ranks(failed)} cannot run it",
            notes=tuple(
                f"rank {first}: {line}" for line in theirs[first]["error"].splitlines()[:12]
            ),
        )
    for key in sorted({key for facts in theirs for key in facts}, key=_place):
        ranks: dict[str, list[int]] = {}
        for r, there in enumerate(theirs):
            ranks.setdefault(there.get(key, "nothing"), []).append(r)
        if len(ranks) > 1:
            said = "; ".join(f"{_ranks(some)}: {value}" for value, some in ranks.items())
            verb = "differ" if key.endswith("s") else "differs"
            raise AgreementError(kernel=kernel, detail=f"its {key} {verb}: {said}")


def _place(key: str) -> tuple[int, str]:
    return (ORDER.index(key) if key in ORDER else len(ORDER), key)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _absent(kernel: str, missing: list[int], timeout: float) -> Absent:
    return Absent(
        kernel=kernel, detail=f"{_ranks(missing)} did not come to it within {timeout:g} s"
    )


def _raise_dead(kernel: str, dead: list[int]) -> None:
    if dead:
        verb = "have" if len(dead) > 1 else "has"
        raise Absent(kernel=kernel, detail=f"the process of {_ranks(dead)} {verb} ended")
