"""Agreement: all ranks of a process group say what they are about to do before any of them does it.

Each rank numbers the programs that it meets. Under that number it leaves, in the group's store, the
facts of its program or the error that keeps it from running; then it reads those of the others. A rank
that fails alone so becomes an error on all ranks instead of a wait without end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from tilelink.backend.runtime.errors import AgreementError

POLL = 0.002  # seconds between two looks into the store
# The first fact that differs is reported: a cause before its consequences, the source last.
ORDER = ("kernel", "shapes", "dtypes", "schedule", "versions", "emitted source")


class Store(Protocol):
    """What is used of a ``torch.distributed`` store."""

    def set(self, key: str, value: str) -> None:
        """Leaves a value."""

    def get(self, key: str) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


class Absent(AgreementError):
    """Some rank did not come to the agreement: it may be in a fused call, or dead."""


def agree(
    store: Store,
    rank: int,
    world: int,
    number: int,
    kernel: str,
    facts: Mapping[str, str],
    error: BaseException | None,
    timeout: float,
    elsewhere: Callable[[], list[int]] = list,
) -> None:
    """Exchanges ``facts`` with all ranks; returns if all are equal and no rank has an error.

    ``number``: how many agreements this rank has had in this group. ``error``: what went wrong here, if
    anything; the caller raises it after this has told the others. ``elsewhere()`` lists ranks seen to be
    in a fused call that this rank has not made. ``timeout``: seconds to wait for the others.

    Errors: AgreementError naming the ranks and the first fact that differs, in the order of ``ORDER``;
    Absent naming those that did not come.
    """
    prefix = f"tilelink/agree/{number}"
    mine = {"error": str(error)} if error is not None else dict(facts)
    store.set(f"{prefix}/{rank}", json.dumps(mine))
    if error is not None:
        return
    deadline = time.monotonic() + timeout
    look = time.monotonic() + 1.0
    missing = list(range(world))
    while missing:
        missing = [r for r in missing if not store.check([f"{prefix}/{r}"])]
        if not missing:
            break
        now = time.monotonic()
        if now > deadline:
            raise Absent(
                kernel=kernel,
                detail=f"{_ranks(missing)} did not come to it within {timeout:g} s",
            )
        if now > look:
            look = now + 1.0
            busy = [r for r in elsewhere() if r in missing]
            if busy:
                raise Absent(
                    kernel=kernel,
                    detail=f"{_ranks(busy)} runs another program, or this one with other arguments",
                )
        time.sleep(POLL)
    theirs = [json.loads(store.get(f"{prefix}/{r}")) for r in range(world)]
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
