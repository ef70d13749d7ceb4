"""Symmetric memory of a process group: arenas, side streams, and what became of past calls."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tilelink import knobs
from tilelink.backend.runtime import watch
from tilelink.backend.runtime.agree import Absent, agree
from tilelink.backend.runtime.errors import PeerTimeout, Unavailable
from tilelink.backend.runtime.image import Image
from tilelink.ir import layout


class Arena:
    """``size`` bytes on every rank of a group, mapped by all of them.

    ``views[r]`` is the arena of rank r as a uint8 tensor of this process; ``peers`` the int64 table of
    their addresses on the GPU. Control words, flags and counters are zero, on every rank, once the
    constructor returns.
    """

    def __init__(self, group: Any, rank: int, world: int, device: torch.device, size: int) -> None:
        self.size = size
        if world == 1:
            self.views = [torch.zeros(size, dtype=torch.uint8, device=device)]
            self.addresses = [self.views[0].data_ptr()]
        else:
            # A multicast object is never needed here, and creating one can take a host's GPUs down.
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            from torch._C._distributed_c10d import _SymmetricMemory

            # Not through `symm_mem.empty`: its memory pool may pair different blocks on different ranks.
            self.memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
            self.handle = _SymmetricMemory.rendezvous(self.memory, group.group_name)
            self.views = [
                self.handle.get_buffer(r, (size,), torch.uint8, 0) if r != rank else self.memory
                for r in range(world)
            ]
            self.addresses = [view.data_ptr() for view in self.views]
            self.memory[: layout.DATA].zero_()
        self.peers = torch.tensor(self.addresses, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        if world > 1:
            # Nobody writes a peer's flags before that peer has cleared them.
            dist.barrier(group=group)
            torch.cuda.synchronize(device)

    def word(self, rank: int, number: int) -> torch.Tensor:
        """Word ``number`` of the arena of ``rank``, as an int32 tensor of one element."""
        return self.views[rank][number * 4 : number * 4 + 4].view(torch.int32)


class GroupState:
    """Everything the runtime keeps for one process group on one device."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        if self.world > layout.MAX_WORLD:
            raise Unavailable(
                backend="cuda", reason=f"{self.world} ranks, at most {layout.MAX_WORLD}"
            )
        self.store = _store_of(group) if self.world > 1 else None
        self.arenas: list[Arena] = []
        # A program keeps the one that it first met: captured graphs hold its address.
        self.workspaces: list[torch.Tensor] = []
        self.agreements = 0
        self.streams: dict[str, torch.cuda.Stream] = {}
        words = 1 + layout.RECORD_WORDS
        self._pinned = torch.zeros(words, dtype=torch.int32, pin_memory=True)
        self.host_address = self._pinned.data_ptr()
        self.host = watch.HostRecord(self.host_address, words)
        # Of the last call: its program and the stream it was enqueued on.
        self.image: Image | None = None
        self.last: torch.cuda.Stream | None = None
        self._suspects: dict[int, int] = {}
        self._given_up: str = ""
        self._reported = False
        watch.watch(self)

    def stream(self, name: str) -> torch.cuda.Stream:
        """The side stream ``name``, made once."""
        if name not in self.streams:
            self.streams[name] = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        return self.streams[name]

    def arena_for(self, size: int) -> Arena:
        """An arena of at least ``size`` bytes: the newest, or a further one; collective where it is."""
        if not self.arenas or self.arenas[-1].size < size:
            least = knobs.ARENA_MB.get() << 20
            grown = max(size, least, 2 * self.arenas[-1].size if self.arenas else 0)
            grown = -(-grown // (2 << 20)) * (2 << 20)
            self.arenas.append(Arena(self.group, self.rank, self.world, self.device, grown))
        return self.arenas[-1]

    def workspace_for(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes of this rank's own memory, shared by programs, which run in turn."""
        if not self.workspaces or self.workspaces[-1].numel() < size:
            self.workspaces.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return self.workspaces[-1]

    def agree(
        self, kernel: str, facts: dict[str, str], error: BaseException | None, least: float = 0.0
    ) -> None:
        """See :func:`tilelink.backend.runtime.agree.agree`; a group of one always agrees.

        The time limit is that for arrival, and at least ``least`` seconds.
        """
        if self.store is None:
            return
        number, self.agreements = self.agreements, self.agreements + 1
        limit = max(least, knobs.ARRIVAL_TIMEOUT.get())
        try:
            agree(
                self.store,
                self.rank,
                self.world,
                number,
                kernel,
                facts,
                error,
                limit,
                self._elsewhere,
            )
        except Absent as problem:
            self.give_up(str(problem))
            raise

    def give_up(self, why: str) -> None:
        """Sets the abort word of every rank, so that ranks that spin leave, and refuses further calls."""
        self._given_up = why
        self._stop()

    def _stop(self) -> None:
        # On a stream of its own: the current one may be held up by the call that is to be stopped.
        with torch.cuda.stream(self.stream("look")):
            for arena in self.arenas:
                for rank in range(self.world):
                    arena.word(rank, layout.ABORT).fill_(1)

    def check(self) -> None:
        """Raises WaitTimeout, once, if a call has run into one."""
        if self.host.aborted and not self._reported:
            self._reported = True
            # A kernel aborts its own arena; a peer may already run a program on another one.
            if len(self.arenas) > 1:
                self._stop()
            raise self._error()

    def check_usable(self) -> None:
        """Raises WaitTimeout if a call has run into one, ever: the workspace holds no promise any more."""
        self.check()
        if self._reported or self._given_up:
            why = self._given_up.splitlines()[0] if self._given_up else "an earlier call timed out"
            raise PeerTimeout(rank=self.rank, why=f"this process group was given up: {why}")

    def _error(self) -> Exception:
        # Word 0 may be seen before the rest of the record: the kernel that writes them must have ended.
        torch.cuda.synchronize(self.device)
        assert self.image is not None
        record = self.host.record
        limit = knobs.ARRIVAL_TIMEOUT if record[watch.KIND] == watch.ARRIVAL else knobs.TIMEOUT
        return watch.timeout_error(self.image, record, limit.get(), self.rank)

    def _elsewhere(self) -> list[int]:
        """Ranks that have started a fused call which this rank has not made.

        They have if their epoch has arrived here and is ahead of this rank's while all work of this
        rank is done; seen three times in a row, since a replayed graph may be on a stream unknown here.
        """
        if self.last is not None and not self.last.query():
            return []
        ahead: set[int] = set()
        with torch.cuda.stream(self.stream("look")):
            for arena in self.arenas:
                words = arena.views[self.rank][: layout.ACK * 4].view(torch.int32).tolist()
                for rank in range(self.world):
                    if (words[layout.ARRIVED + rank] - words[layout.EPOCH]) % (1 << 32) == 1:
                        ahead.add(rank)
        self._suspects = {rank: self._suspects.get(rank, 0) + 1 for rank in sorted(ahead)}
        return [rank for rank, times in self._suspects.items() if times >= 3]


def _store_of(group: Any) -> Any:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


_states: dict[tuple[str, torch.device], GroupState] = {}


def state_of(group: Any) -> GroupState:
    """The state of ``group`` (None: the default group, or this process alone) on the current device."""
    if not torch.cuda.is_available():
        raise Unavailable(backend="cuda", reason="PyTorch sees no CUDA device")
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    device = torch.device("cuda", torch.cuda.current_device())
    key = (group.group_name if group is not None else "", device)
    found = _states.get(key)
    if found is None or found.group is not group:
        found = _states[key] = GroupState(group, device)
    return found
