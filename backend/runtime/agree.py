"""Agreement: all ranks of a process group say what they are about to do before any of them does it.

Each rank numbers the programs that it meets. Under that number it leaves, in the group's store, the
facts of its program or the error that keeps it from running; then it reads those of the others. A rank
that fails alone so becomes an error on all ranks instead of a wait without end.

A rank that refuses a call before it meets anything cannot know whether the others meet: they may know the
program. It leaves word of it beside the numbers (:class:`Refusals`) and takes none. Ranks that wait for it
at the number that it would take next give that number up, and a rank that comes to such a number later
takes the next one. Whether a number was given up is decided once, in the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

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


class Refusals:
    """What ranks have refused to call, each under the nonce of its process: nothing, or since its last call."""

    def __init__(self, store: Store, meeting: Meeting) -> None:
        self._store, self._meeting = store, meeting
        self._standing = False
        self._left = 0
        self._heard: dict[int, int] = {}

    def leave(self, kernel: str, error: BaseException, number: int) -> None:
        """Says that this rank, whose next agreement is ``number``, has refused to call ``kernel``."""
        self._left += 1
        said = {"number": number, "kernel": kernel, "error": str(error), "count": self._left}
        self._store.set(self._key(self._meeting.rank), json.dumps(said))
        self._standing = True

    def withdraw(self) -> None:
        """This rank goes on to call: the others may wait for it again."""
        if self._standing:
            self._store.set(self._key(self._meeting.rank), "")
            self._standing = False

    def of(self, ranks: list[int], number: int) -> tuple[int, str] | None:
        """The first of ``ranks`` that has refused a call before its agreement ``number``, and why.

        Each refusal is heard of once.
        """
        for rank in ranks:
            if rank not in self._meeting.processes or not self._store.check([self._key(rank)]):
                continue
            said = self._store.get(self._key(rank))
            refusal: dict[str, Any] = json.loads(said) if said else {}
            new = refusal.get("count", 0) > self._heard.get(rank, 0)
            if new and refusal["number"] == number:
                self._heard[rank] = refusal["count"]
                return rank, str(refusal["error"])
        return None

    def _key(self, rank: int) -> str:
        return f"tilelink/refused/{self._meeting.processes[rank].nonce}"


def join(
    meeting: Meeting,
    kernel: str,
    timeout: float,
    patience: float,
    refusals: Refusals | None = None,
) -> Roster:
    """Waits, for ``timeout`` seconds, until every rank has come to the meeting that :func:`greet` began.

    ``patience``: seconds until the entry of a process that has ended counts as that of a dead rank,
    and not as left over from an earlier use of the store. ``refusals``: of ranks that have made no call.

    Errors: Absent naming the ranks that did not come; AgreementError naming one that has refused its first call.
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
            refusal = refusals.of(missing, 0) if refusals is not None else None
            if refusal is not None:
                raise _cannot(kernel, [refusal[0]], refusal[1])
        if now > deadline:
            raise _absent(kernel, missing, timeout)
        time.sleep(POLL)


class GivenUp(Exception):
    """This rank came to an agreement that the others gave up because of what it had refused before."""


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
    refused: Callable[[list[int]], tuple[int, str] | None] = lambda _: None,
) -> None:
    """Exchanges ``facts`` with all ranks; returns if all are equal and no rank has an error.

    ``key``: a name of this agreement that all ranks use and that was never used before. ``error``: what
    went wrong here, if anything; the caller raises it after this has told the others. ``elsewhere()``
    lists ranks seen to be in a fused call that this rank has not made, ``lost()`` those that are dead,
    ``refused(ranks)`` gives one of them that has refused a call instead of coming here, and why.
    ``timeout``: seconds to wait for the others.

    Errors: AgreementError naming the ranks and the first fact that differs, in the order of ``ORDER``, or the
    one that has refused; Absent naming those that did not come; GivenUp where this rank is the one.
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
            refusal = refused(missing)
            if refusal is not None or store.check([f"{key}/outcome"]):
                _decide(store, key, rank, kernel, refusal)
            busy = [r for r in elsewhere() if r in missing]
            if busy:
                raise Absent(
                    kernel=kernel,
                    detail=f"{_ranks(busy)} runs another program, or this one with other arguments",
                )
        time.sleep(POLL)
    _decide(store, key, rank, kernel, None)
    theirs = [json.loads(store.get(f"{key}/{r}")) for r in range(world)]
    failed = [r for r, t in enumerate(theirs) if "error" in t]
    if failed:
        raise _cannot(kernel, failed, theirs[failed[0]]["error"])
    for key in sorted({key for facts in theirs for key in facts}, key=_place):
        ranks: dict[str, list[int]] = {}
        for r, there in enumerate(theirs):
            ranks.setdefault(there.get(key, "nothing"), []).append(r)
        if len(ranks) > 1:
            said = "; ".join(f"{_ranks(some)}: {value}" for value, some in ranks.items())
            verb = "differ" if key.endswith("s") else "differs"
            raise AgreementError(kernel=kernel, detail=f"its {key} {verb}: {said}")


def _decide(
    store: Store, key: str, rank: int, kernel: str, refusal: tuple[int, str] | None
) -> None:
    """Returns where all have come to an agreement; raises where it was given up: the first rank to ask decides."""
    mine = json.dumps(refusal or ())
    outcome = json.loads(store.compare_set(f"{key}/outcome", "", mine))
    if not outcome:
        return
    other, error = outcome
    if other == rank:
        raise GivenUp
    raise _cannot(kernel, [other], error)


def _cannot(kernel: str, failed: list[int], error: str) -> AgreementError:
    return AgreementError(
        kernel=kernel,
        detail=f"{_ranks(failed)} cannot run it",
        notes=tuple(f"rank {failed[0]}: {line}" for line in error.splitlines()[:12]),
    )


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
