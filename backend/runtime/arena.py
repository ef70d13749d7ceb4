"""Symmetric memory of a process group on GPUs: arenas, side streams, and a way in beside a busy GPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tilelink.backend.runtime import release, watch
from tilelink.backend.runtime.driver import driver
from tilelink.backend.runtime.errors import DriverError, OutOfMemory, Unavailable
from tilelink.backend.runtime.groups import found, standing_for, store_of
from tilelink.backend.runtime.image import Image
from tilelink.backend.runtime.state import CONTROL_WORDS, GroupState
from tilelink.backend.runtime.views import clear_words, lasting
from tilelink.errors import TilelinkError
from tilelink.ir import layout

DONE = 1 << 20  # more than a counter counts to
SYMMETRIC = "symmetric memory"
LOOK = 0.02  # seconds until an event counts as behind work that runs: of a stream with none it completes at once


@contextmanager
def asking(rank: int, size: int, what: str) -> Iterator[None]:
    """Raises OutOfMemory where there are no ``size`` bytes for ``what`` on the GPU of this ``rank``."""
    try:
        yield
    except RuntimeError as problem:
        reason = str(problem).partition("\n")[0]
        # Not all of PyTorch raises the class that it has for this.
        if (
            not isinstance(problem, torch.OutOfMemoryError)
            and "out of memory" not in reason.lower()
        ):
            raise
        said = ". ".join(reason.split(". ")[:3])
        raise OutOfMemory(
            rank=rank, size=f"{size / 2**20:.1f} MiB", what=what, reason=said
        ) from problem


class NoArena:
    """What stands for an arena in a program that reads and writes nothing of one: no memory, no addresses."""

    size = 0

    @lasting()
    def __init__(self, world: int, device: torch.device) -> None:
        self.views = [torch.empty(0, dtype=torch.uint8, device=device)] * world
        self.addresses = [0] * world
        self.peers = torch.empty(0, dtype=torch.int64, device=device)


class Arena:
    """``size`` bytes on every rank of a group, mapped by all of them.

    ``views[r]`` is the arena of rank r as a uint8 tensor of this process; ``peers`` the int64 table of
    their addresses on the GPU: both once :meth:`map` has met the other ranks. Control words, flags and counters
    are zero, and words that signal themselves of no call, on every rank, once :meth:`CudaState.allocate` returns.
    """

    def __init__(self, rank: int, world: int, device: torch.device, size: int) -> None:
        self.size, self.rank, self.world = size, rank, world
        if world == 1:
            self.memory = torch.zeros(size, dtype=torch.uint8, device=device)
        else:
            # A multicast object is never needed here, and creating one can take a host's GPUs down.
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            from torch._C._distributed_c10d import _SymmetricMemory

            # Not through `symm_mem.empty`: its memory pool may pair different blocks on different ranks.
            self.memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)

    def map(self, name: str) -> None:
        """Maps the memory of all ranks, which meet in the group ``name`` of symmetric memory."""
        self.views = [self.memory]
        if self.world > 1:
            from torch._C._distributed_c10d import _SymmetricMemory

            self.handle = _SymmetricMemory.rendezvous(self.memory, name)
            self.views = [
                self.handle.get_buffer(r, (self.size,), torch.uint8, 0)
                if r != self.rank
                else self.memory
                for r in range(self.world)
            ]
        self.addresses = [view.data_ptr() for view in self.views]
        self.memory[: layout.DATA].zero_()
        clear_words(self.memory)
        device = self.memory.device
        self.peers = torch.tensor(self.addresses, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)


def _meeting(name: str, store: Any, rank: int, world: int) -> Any:
    """Makes ``name`` known to symmetric memory, whose ranks meet through ``store`` alone.

    Older releases of PyTorch look the name up among process groups, newer ones in a table of their own;
    a group without a backend serves both, and no rank has to take part in making it.
    """
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

    prefixed = dist.PrefixStore(f"{name}/memory", store)  # type: ignore[attr-defined]
    group = dist.ProcessGroup(prefixed, rank, world)
    register: Any = _register_process_group
    register(name, group)
    _SymmetricMemory.set_group_info(name, rank, world, prefixed)
    return group


class CudaState(GroupState):
    """A process group on the GPUs of one host, one a rank."""

    @lasting()
    def __init__(self, group: Any, device: torch.device) -> None:
        world = group.size() if group is not None else 1
        self.device = device
        # A program keeps the one that it first met: captured graphs hold its address.
        self.workspaces: list[torch.Tensor] = []
        self.streams: dict[str, torch.cuda.Stream] = {}
        words = 1 + layout.RECORD_WORDS
        self._pinned = torch.zeros(words, dtype=torch.int32, pin_memory=True)
        self.host_address = self._pinned.data_ptr()
        self._record = watch.HostRecord(self.host_address, words)
        self._pinned_words = self._record.words
        # For copies beside kernels that leave no SM free: what is written, and where words are read to.
        self._values = torch.arange(layout.LOST + layout.MAX_WORLD, dtype=torch.int32).pin_memory()
        self._words = torch.zeros(CONTROL_WORDS, dtype=torch.int32, pin_memory=True)
        self._relay = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
        self._looking = threading.Lock()
        self._look = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        # Not a query of the stream: the user may capture it meanwhile.
        self._done = driver().event()
        self._called = False
        # The stream of the last call, in a list of its own, where no event stands behind that call; the list of
        # the call that one was put behind since.
        self._unmarked: list[int] | None = None
        self._marked: list[int] | None = None
        self._meeting: Any = None
        self._spare: torch.cuda.Stream | None = None
        super().__init__(
            group, group.rank() if group is not None else 0, world, store_of(group, world)
        )

    def check_usable(self) -> None:
        """As the base class; no call of Python more where all is well."""
        if self._pinned_words[0] or self._given_up or self._dead or self._refused:
            super().check_usable()

    @property
    def host(self) -> watch.HostRecord:
        """The pinned words that the guard kernel writes."""
        return self._record

    def stream(self, name: str) -> torch.cuda.Stream:
        """The side stream ``name``, made once."""
        if name not in self.streams:
            self.streams[name] = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        return self.streams[name]

    @lasting()
    def workspace_for(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes of this rank's own memory, shared by programs, which run in turn."""
        if not self.workspaces or self.workspaces[-1].numel() < size:
            self.workspaces.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return self.workspaces[-1]

    def allocate(self, size: int) -> Arena:
        """Symmetric memory of the group, with cleared control words on all ranks."""
        return self.block(size)

    @lasting()
    def block(self, size: int) -> Arena:
        """``size`` bytes that all ranks map once this returns; collective.

        Errors: Unavailable where ranks are on different hosts; OutOfMemory, or Unavailable where GPUs cannot reach
        each other, and AgreementError on the other ranks.
        """
        self.check_one_host()
        group = self._symmetric_group()

        def take() -> Arena:
            with self._taking(size):
                if group and self._meeting is None:
                    self._meeting = _meeting(group, self.store, self.rank, self.world)
                return Arena(self.rank, self.world, self.device, size)

        def share() -> None:
            with self._taking(size):
                arena.map(group)

        # Nobody waits in a rendezvous for a rank that has nothing to bring; and nobody writes a peer's flags
        # before that peer has cleared them.
        arena = self.together(SYMMETRIC, {"bytes": str(size)}, take)
        self.together(SYMMETRIC, {}, share)
        return arena

    def _symmetric_group(self) -> str:
        return f"tilelink/{self.roster.name}" if self.roster is not None else ""

    @contextmanager
    def _taking(self, size: int) -> Iterator[None]:
        try:
            with asking(self.rank, size, SYMMETRIC):
                yield
        except TilelinkError:
            raise
        except Exception as problem:
            reason = f"{SYMMETRIC}: {str(problem).partition(chr(10))[0]}"
            raise Unavailable(backend="cuda", reason=reason) from problem

    def spare(self) -> torch.cuda.Stream:
        """A stream that carries nothing: graphs of calls are captured on it."""
        if self._spare is None:
            self._spare = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._spare

    def note_call(self, apart: bool, collectives: bool, stream: int) -> None:
        """Remembers that a call was enqueued on the stream of this handle, which is not being captured.

        ``apart``: see :attr:`Image.apart`; ``collectives``: whether it waits for other ranks in the library's.
        While no program of the group signals anything, the watchdog looks at calls only where a rank is dead:
        then :meth:`idle` puts an event behind the last one.
        """
        if apart and not self.arenas:
            self._unmarked = [stream]
        else:
            driver().record(self._done.handle, stream)
            self._unmarked = None
        if collectives:
            self.collectives = True
        self._called = True

    def note_capture(self, collectives: bool) -> None:
        """Remembers that a call went into a graph of the user's, whose replays nobody here sees."""
        self.held = True
        if collectives:
            self.replayed_collectives = True

    def mark(self, stream: int) -> int | None:
        """An event behind the last call, which is on the stream of this handle; None if it is captured now."""
        calls, last = driver(), self._unmarked
        if last is not None and last is not self._marked:
            if calls.capturing(stream):
                return None
            calls.record(self._done.handle, stream)
            self._marked = last
        return self._done.handle

    def cut_short(self, image: Image, arena: Arena) -> None:
        """Ends a call of which not all was enqueued: ranks that spin leave, streams here that wait for its kernels
        go on, and the group is given up."""
        self.give_up(f"a call of `{image.name}` was enqueued in part")
        first, last = image.counter_words
        done = torch.full((max(1, last - first),), DONE, dtype=torch.int32).pin_memory()
        begin = arena.addresses[self.rank]
        places = [(layout.BEGUN, 1), (first, last - first)]
        with self._looking:
            for word, count in places:
                if count:
                    target, size = begin + word * layout.WORD, count * layout.WORD
                    driver().copy(self._look.cuda_stream, target, done.data_ptr(), size)
            self._await_look()

    def idle(self) -> bool:
        """Whether the last call that the host knows of has ended."""
        if not self._called:
            return True
        calls, last = driver(), self._unmarked
        if last is not None and last is not self._marked:
            (stream,) = last
            if calls.capturing(stream):
                return False
            calls.record(self._done.handle, stream)
            self._marked = last
            deadline = time.monotonic() + LOOK
            while not calls.completed(self._done.handle):
                if time.monotonic() > deadline:
                    return False
                time.sleep(2e-4)
        return calls.completed(self._done.handle)

    def control(self, arena: Arena, rank: int) -> list[int]:
        """The first words of an arena, by copy engine: kernels may hold every SM."""
        size = CONTROL_WORDS * layout.WORD
        with self._looking:
            stream, copy = self._look.cuda_stream, driver().copy
            copy(stream, self._relay.data_ptr(), arena.addresses[rank], size)
            copy(stream, self._words.data_ptr(), self._relay.data_ptr(), size)
            self._await_look()
            return [int(v) for v in self._words.tolist()]

    def set_abort(self, arena: Arena, rank: int, value: int) -> None:
        """Four bytes by copy engine."""
        target = arena.addresses[rank] + layout.ABORT * layout.WORD
        source = self._values.data_ptr() + value * layout.WORD
        with self._looking:
            driver().copy(self._look.cuda_stream, target, source, layout.WORD)
            self._await_look()

    def _await_look(self) -> None:
        deadline = time.monotonic() + 5.0
        while not self._look.query():
            if time.monotonic() > deadline:
                raise DriverError(
                    call="cuMemcpyAsync",
                    reason="a copy of a few words has not ended within 5 s",
                    help="the GPU is held up by other work",
                )
            time.sleep(2e-5)

    def tend(self) -> None:
        """As the base class; on the watchdog's thread, beside captures of the user."""
        torch.cuda.set_device(self.device)
        driver().relax_capture()
        super().tend()

    def rest(self) -> None:
        """As the base class, and for replays of graphs that were captured."""
        super().rest()
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """As the base class, with what symmetric memory knows of the group."""
        super().close()
        self.workspaces.clear()
        if self._meeting is not None:
            from torch._C._distributed_c10d import _unregister_process_group

            self._meeting = None
            unregister: Any = _unregister_process_group
            unregister(self._symmetric_group())

    def stop_collectives(self) -> None:
        """Aborts the library's communicator, whose kernels would wait for the dead rank for minutes."""
        backend = self.group._get_backend(self.device)
        if hasattr(backend, "abort"):
            threading.Thread(target=backend.abort, daemon=True).start()


_states: dict[tuple[Any, int], CudaState] = {}
release.tables.append(_states)


def state_of(group: Any) -> CudaState:
    """The state of ``group`` (None: the default group, or this process alone) on the current device.

    Where the ranks have agreed on a new generation with the same members, it is that one's.

    Errors: Unavailable without a GPU, or for a group that was destroyed.
    """
    if group is None and dist.is_available():
        group = dist.group.WORLD
    if _states:
        # CUDA is up, and PyTorch's own function would ask for that first.
        known: CudaState | None = found.get((group, torch._C._cuda_getDevice()))
        if known is not None:
            return known
    elif not torch.cuda.is_available():
        raise Unavailable(backend="cuda", reason="PyTorch sees no CUDA device")
    device = torch.cuda.current_device()
    release.sweep()
    standing = standing_for(group)
    state = _states.get((standing, device))
    if state is not None and state.destroyed():
        raise Unavailable(backend="cuda", reason="its process group was destroyed")
    if state is None:
        state = _states[standing, device] = CudaState(standing, torch.device("cuda", device))
    found[group, device] = state
    return state
