"""What the runtime keeps for one process group: who is in it, what was agreed, what became of calls.

Nothing here knows what the memory is. A GPU's is in :mod:`tilelink.backend.runtime.arena`, shared memory
of processes in :mod:`tilelink.backend.runtime.local`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from tilelink import knobs
from tilelink.backend.runtime import watch
from tilelink.backend.runtime.agree import Absent, GivenUp, Refusals, agree, greet, join
from tilelink.backend.runtime.errors import PeerTimeout, Unavailable
from tilelink.backend.runtime.groups import registry_of
from tilelink.backend.runtime.image import Image
from tilelink.backend.runtime.roster import Meeting, Roster
from tilelink.errors import TilelinkError
from tilelink.ir import layout

CONTROL_WORDS = layout.SAID + 4 * layout.MAX_WORLD  # of an arena, from its start
GRACE = 1.0  # seconds beyond a time limit until a call that was stopped must have left
AHEAD = 12  # looks in a row, four a second: a replayed graph may be on a stream unknown here

T = TypeVar("T")


class Memory(Protocol):
    """An arena on every rank of a group; ``size`` in bytes."""

    size: int


class GroupState(ABC):
    """A process group of ``world`` ranks, seen by one of them, and its arenas."""

    def __init__(self, group: Any, rank: int, world: int, store: Any) -> None:
        if world > layout.MAX_WORLD:
            raise Unavailable(backend="cuda", reason=f"{world} ranks, at most {layout.MAX_WORLD}")
        self.group, self.rank, self.world, self.store = group, rank, world, store
        self.arenas: list[Any] = []
        self._newest: dict[int, Any] = {}  # by the slots of its programs
        self.images: list[Image] = []
        self.limits: list[
            tuple[float, float]
        ] = []  # of each program's waits, see :meth:`number_of`
        self.roster: Roster | None = None
        self._hello: Meeting | None = None
        self._refusals: Refusals | None = None
        self._refused = False  # a call, since the last one that was not
        if store is not None:
            # Before this rank compiles anything, so that its death meanwhile is seen. A store that cannot
            # be reached is an error of the first agreement.
            with contextlib.suppress(RuntimeError):
                self._greet()
        self._agreements = 0
        self._suspects: dict[int, int] = {}
        self._given_up = ""
        self._stopped: float | None = None
        self._pending: float | None = None
        self._dead: list[int] = []  # as the watchdog last saw it
        # Whether a call that is not known to have ended well meets other ranks in collectives of the library, and
        # whether a graph of the user's may at any time; for which ranks such were ended, until that is said.
        self.collectives = False
        self.replayed_collectives = False
        self._ended_for: list[int] = []
        self._raising = threading.Lock()
        self._registry = registry_of(group)
        # Whether the user may reach memory of this group in ways that nobody here sees: graphs of the user's that
        # calls were captured into, tensors in symmetric memory.
        self.held = False
        watch.watch(self)

    # What the memory's module gives.

    @abstractmethod
    def allocate(self, size: int) -> Memory:
        """An arena of ``size`` bytes on every rank; collective."""

    @abstractmethod
    def control(self, arena: Any, rank: int) -> Sequence[int]:
        """The first ``CONTROL_WORDS`` words of the arena of ``rank`` now, whatever runs meanwhile."""

    @abstractmethod
    def set_abort(self, arena: Any, rank: int, value: int) -> None:
        """Writes the abort word of ``rank``, whatever runs meanwhile."""

    @abstractmethod
    def idle(self) -> bool:
        """Whether all calls of this rank that the host has enqueued have ended."""

    def stop_collectives(self) -> None:  # noqa: B027 - few kinds of memory need it
        """Ends collectives of the library that wait for a rank that will not come."""

    @property
    @abstractmethod
    def host(self) -> watch.HostRecord:
        """Where a call that was stopped leaves its record."""

    # Programs and agreements.

    def number_of(self, image: Image) -> int:
        """The number that stands for a program in error records: 1 for the first that was met.

        Its waits have the time limits of now, for progress and for arrival: they are in what is recorded.
        """
        self.limits.append((knobs.TIMEOUT.get(), knobs.ARRIVAL_TIMEOUT.get()))
        self.images.append(image)
        return len(self.images)

    def arena_for(self, size: int, slots: int = 1) -> Any:
        """An arena of at least ``size`` bytes: the newest, or a further one; collective where it is.

        Programs with two ``slots`` have an arena of their own, which is never too small.
        """
        newest = self._newest.get(slots)
        if newest is None or newest.size < size:
            least = knobs.ARENA_MB.get() << 20
            grown = max(size, least, 2 * newest.size if newest is not None else 0)
            if slots == 2:
                grown = layout.SLOT_ARENA
            grown = -(-grown // (2 << 20)) * (2 << 20)
            newest = self._newest[slots] = self.allocate(grown)
            self.arenas.append(newest)
        return newest

    def _greet(self) -> tuple[Meeting, Refusals]:
        if self._hello is None or self._refusals is None:
            self._hello = greet(self.store, self.rank, self.world)
            self._refusals = Refusals(self.store, self._hello)
        return self._hello, self._refusals

    def refuse(self, kernel: str, error: BaseException) -> None:
        """Tells ranks that come to agree on a call of ``kernel`` that this one does not make it, for ``error``;
        those that know the program wait for this rank in the call. It stands until this rank's next call."""
        if self.store is not None:
            self._greet()[1].leave(kernel, error, self._agreements)
            self._refused = True

    def agree(
        self, kernel: str, facts: dict[str, str], error: BaseException | None, least: float = 0.0
    ) -> None:
        """See :func:`tilelink.backend.runtime.agree.agree`; a group of one always agrees.

        The time limit is that for arrival, and at least ``least`` seconds.
        """
        if self.store is None:
            return
        limit = max(least, knobs.ARRIVAL_TIMEOUT.get())
        try:
            hello, refusals = self._greet()
            if self.roster is None:
                patience = min(limit, knobs.TIMEOUT.get())
                self.roster = join(hello, kernel, limit, patience, refusals)
            while True:
                number, self._agreements = self._agreements, self._agreements + 1
                with contextlib.suppress(GivenUp):
                    agree(
                        self.store,
                        self.rank,
                        self.world,
                        f"tilelink/{self.roster.name}/agree/{number}",
                        kernel,
                        facts,
                        error,
                        limit,
                        self._elsewhere,
                        self.lost,
                        partial(refusals.of, number=number),
                    )
                    return
        except Absent as problem:
            self.give_up(str(problem))
            raise

    def together(self, what: str, facts: dict[str, str], step: Callable[[], T]) -> T:
        """What ``step()`` gives, once every rank has made this step with the same ``facts``.

        An error that it raises on one rank is one on all of them: AgreementError on the others, which would
        go on to wait for that rank.
        """
        try:
            made = step()
        except Exception as problem:
            self.agree(what, facts, problem)
            raise
        self.agree(what, facts, None)
        return made

    def check_one_host(self) -> None:
        """Raises Unavailable, on every rank alike, where the ranks are on different hosts."""
        hosts = self.roster.machines() if self.roster is not None else []
        if len(hosts) > 1:
            ranks = "; ".join(", ".join(map(str, host)) for host in hosts)
            raise Unavailable(
                backend="cuda",
                reason="ranks map each other's memory, so all must be on one host, and they are on "
                f"{len(hosts)}: ranks {ranks}",
            )

    def lost(self) -> list[int]:
        """Ranks whose process has ended, as far as this host can see."""
        return self.roster.lost() if self.roster is not None else []

    # The end of a call that lacks something.

    def give_up(self, why: str, word: int = 1) -> None:
        """Sets the abort word of every rank to ``word``, so that ranks that spin leave, and refuses
        further calls."""
        if not self._given_up:
            self._given_up = why.splitlines()[0]
        if self._stopped is None:
            self._stopped = time.monotonic()
        for arena in self.arenas:
            # This rank last; see `tilelink.device.signal`.
            for step in range(1, self.world + 1):
                self.set_abort(arena, (self.rank + step) % self.world, word)

    def tend(self) -> None:
        """Called a few times a second by the watchdog: stops calls that wait for a rank that is dead.

        A dead rank that had started a call may have sent all that it needs, so that one is left to its
        own time limit; one that it had not started never ends by itself before the limit for arrival.
        """
        if self.world == 1:
            return
        if self._given_up:
            # Given up for another reason, maybe before this thread saw who is dead.
            if self.collectives or self.replayed_collectives:
                self._end_collectives(self.lost(), not self.idle())
            return
        now = time.monotonic()
        self._dead = lost = self.lost()
        if not lost and not self.arenas:
            # Nothing of this group's programs signals, so nobody can have been told to stop.
            return
        busy = not self.idle()
        self._pending = (self._pending or now) if busy else None
        if not lost and (self._pending is None or now - self._pending < 1.0):
            return
        stopped = bool(lost)
        for arena in self.arenas:
            words = self.control(arena, self.rank)
            if words[layout.ABORT] == 0:
                # Where the head is folded into the launch, the epoch is stored when the call has ended.
                begun = words[layout.ARRIVED + self.rank]
                missing = [r for r in lost if _before(words[layout.ARRIVED + r], begun)]
                if missing:
                    self.set_abort(arena, self.rank, layout.LOST + missing[0])
            stopped = stopped or bool(words[layout.ABORT])
        if stopped and busy and self._stopped is None:
            self._stopped = now
        self._end_collectives(lost, busy)

    def _end_collectives(self, lost: list[int], busy: bool) -> None:
        """Ends collectives of the library that may wait for one of the ranks ``lost``."""
        if lost and (self.replayed_collectives or (self.collectives and busy)):
            # Said before it happens: who waits for the call goes on once it has.
            self._ended_for = list(lost)
            self.collectives = self.replayed_collectives = False
            self.stop_collectives()

    def settle(self) -> None:
        """Waits for this rank's calls; PeerTimeout if the group was stopped and they do not end."""
        started = time.monotonic()
        limit = self._longest()
        while not self.idle():
            now = time.monotonic()
            if self._stopped is not None and now - max(self._stopped, started) > limit:
                self.give_up("its call could not start")
                raise PeerTimeout(
                    rank=self.rank,
                    why=f"the group was stopped, and a call of this rank has not ended in the {limit:g} s since: "
                    "its stream is held up by other work",
                )
            if now - started > 0.002:
                time.sleep(2e-4)

    def check(self) -> None:
        """Raises WaitTimeout if a call has run into one since this was last asked."""
        with self._raising:
            error = self._take() or self._cut_short()
        if error is None:
            return
        first = not self._given_up
        # A kernel aborts its own arena; a peer may already run a program on another one.
        if first and len(self.arenas) > 1:
            self.give_up(str(error))
        self._given_up = self._given_up or str(error).splitlines()[0]
        raise error

    def check_usable(self) -> None:
        """Raises WaitTimeout if a call has run into one, ever, or a rank is dead: the workspace holds no
        promise any more."""
        if self._refused and self._refusals is not None:
            self._refusals.withdraw()
            self._refused = False
        if not (self.host.aborted or self._given_up or self._dead):
            return
        self.check()
        if self._given_up:
            raise PeerTimeout(
                rank=self.rank, why=f"this process group was given up: {self._given_up}"
            )
        if self._dead:
            why = f"the process of rank {', '.join(map(str, self._dead))} has ended"
            self.give_up(why, layout.LOST + self._dead[0])
            raise PeerTimeout(rank=self.rank, why=why)

    def _take(self) -> TilelinkError | None:
        """The error of a call that was stopped, once."""
        if not self.host.aborted:
            return None
        self.drain()
        error = self._error()
        self.host.clear()
        return error

    def _cut_short(self) -> TilelinkError | None:
        """That a call lacks what a collective of the library would have brought, once.

        Also where this rank ended no collective of its own: what a peer's sends on once that peer has ended it is
        not what the dead rank would have sent, and nothing in a call tells. A peer that did was ahead in seeing a
        rank dead, which is therefore seen here now. Until then a call is as doubtful whatever came behind it; one
        that had ended when all ranks still lived is well.
        """
        if not (self._ended_for or self.collectives or self.replayed_collectives):
            return None
        ended = self.idle()
        lost = self._ended_for or self.lost()
        if not lost:
            self.collectives = self.collectives and not ended
            return None
        who = ", ".join(map(str, lost))
        self._end_collectives(lost, not ended)
        self._ended_for = []
        self.collectives = self.replayed_collectives = False
        why = f"the process of rank {who} has ended, and with it a collective of the library"
        return PeerTimeout(rank=self.rank, why=why)

    # The end of the group.

    def destroyed(self) -> bool:
        """Whether torch.distributed has destroyed the group."""
        return self._registry is not None and self.group not in self._registry

    def rest(self) -> None:
        """Waits until nothing of this rank can touch memory of the group; PeerTimeout as :meth:`settle`."""
        self.settle()

    def untold(self) -> TilelinkError | None:
        """The error of a call that was stopped, where nobody has been told; none once the group was destroyed."""
        with self._raising:
            return None if self.destroyed() else self._take()

    def close(self) -> None:
        """Drops the memory of the group; behind :meth:`rest`, or a look at :meth:`idle`."""
        self.arenas.clear()
        self._newest.clear()
        self.images.clear()
        self.limits.clear()

    def drain(self) -> None:
        """Waits, for a bounded time, until calls that were stopped have left."""
        # Word 0 may be seen before the rest of the record: the kernel that writes them must have ended.
        deadline = time.monotonic() + self._longest()
        while not self.idle() and time.monotonic() < deadline:
            time.sleep(2e-4)

    def _longest(self) -> float:
        """Seconds until a call that was stopped, of any program, must have left."""
        return max([knobs.TIMEOUT.get(), *(progress for progress, _ in self.limits)]) + GRACE

    def _error(self) -> TilelinkError:
        record = self.host.record
        if record[watch.WRITTEN]:
            return self._described(record)
        first = self._first_hand()
        if first is None:
            lost = ", ".join(map(str, self.lost()))
            why = f"the process of rank {lost} has ended" if lost else "another rank gave up"
            return PeerTimeout(rank=self.rank, why=why)
        note = str(first).splitlines()[0].partition(": ")[2]
        return PeerTimeout(first.span, notes=(note,), rank=self.rank, why="another rank stopped it")

    def _first_hand(self) -> TilelinkError | None:
        """What the rank says that stopped the others, if it has left a record."""
        for arena in self.arenas:
            for rank in range(self.world):
                words = self.control(arena, rank)
                record = words[layout.RECORD : layout.RECORD + layout.RECORD_WORDS]
                if record[watch.WRITTEN]:
                    return self._described(record)
        return None

    def _described(self, record: Sequence[int]) -> TilelinkError:
        kind, number = record[watch.KIND], record[watch.PROGRAM]
        if kind in (watch.PROGRESS, watch.ARRIVAL):
            # Whoever calls something else sends other tiles, and its peers may wait in vain.
            for arena in self.arenas:
                words = self.control(arena, record[watch.RANK])
                record = watch.other_call(words, record[watch.RANK], self.world, record) or record
        # Ranks that agree number programs alike.
        image = self.images[number - 1] if 0 < number <= len(self.images) else self.images[-1]
        known = 0 < number <= len(self.limits)
        now = knobs.TIMEOUT.get(), knobs.ARRIVAL_TIMEOUT.get()
        progress, arrival = self.limits[number - 1] if known else now
        limit = arrival if kind == watch.ARRIVAL else progress
        return watch.timeout_error(image, record, limit, self.rank, self.images)

    def _elsewhere(self) -> list[int]:
        """Ranks that have started a fused call which this rank has not made.

        They have if their epoch has arrived here and is ahead of this rank's while all work of this
        rank is done.
        """
        if not self.idle():
            return []
        ahead: set[int] = set()
        for arena in self.arenas:
            words = self.control(arena, self.rank)
            for rank in range(self.world):
                if (words[layout.ARRIVED + rank] - words[layout.ARRIVED + self.rank]) % (
                    1 << 32
                ) == 1:
                    ahead.add(rank)
        self._suspects = {rank: self._suspects.get(rank, 0) + 1 for rank in sorted(ahead)}
        return [rank for rank, times in self._suspects.items() if times >= AHEAD]


def _before(left: int, right: int) -> bool:
    """Whether epoch ``left`` lies before ``right``, cyclically."""
    return (left - right) % (1 << 32) >= 1 << 31
