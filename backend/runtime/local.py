"""The run time of a process group without GPUs: shared memory, and the interpreter in this process.

Each rank is a process of its own with ``TRITON_INTERPRET=1`` and torch.distributed (gloo) or a store
alone. All but the memory and the way a kernel runs is what GPUs have: agreement, watchdog, recovery. It is
how these are tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilelink.backend.runtime import load_module, release, watch, write_module
from tilelink.backend.runtime.groups import standing_for, store_of
from tilelink.backend.runtime.image import Image, image_of, shared_bytes
from tilelink.backend.runtime.state import CONTROL_WORDS, GroupState
from tilelink.backend.runtime.views import clear_words, lasting
from tilelink.backend.runtime.worker import Call, Shared, prepare_interpreter
from tilelink.ir import Op, layout

FOLDER = Path("/dev/shm")


class LocalArena:
    """An arena a rank in a file that all ranks have mapped."""

    def __init__(self, fd: int, rank: int, world: int, size: int) -> None:
        os.ftruncate(fd, shared_bytes(world, size))
        self.size = size
        self.shared = Shared(fd, rank, world, size)
        clear_words(self.shared.arenas[rank])
        os.close(fd)


class LocalState(GroupState):
    """A process group of processes of this host."""

    def __init__(self, group: Any) -> None:
        self._words = (ctypes.c_int32 * (1 + layout.RECORD_WORDS))()
        self._record = watch.HostRecord(ctypes.addressof(self._words), len(self._words))
        self._running = False
        self._programs: dict[str, tuple[Image, Any, LocalArena, int]] = {}
        super().__init__(group, group.rank(), group.size(), store_of(group, group.size()))

    @property
    def host(self) -> watch.HostRecord:
        """The words that a call which was stopped writes."""
        return self._record

    @lasting()
    def allocate(self, size: int) -> LocalArena:
        """A file of shared memory, without a name once every rank has mapped it."""
        if self.roster is None:
            return LocalArena(os.memfd_create("tilelink-arena"), 0, 1, size)
        self.check_one_host()
        path = FOLDER / f"tilelink-{self.roster.name}-{len(self.arenas)}"

        def take() -> LocalArena:
            fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
            return LocalArena(fd, self.rank, self.world, size)

        try:
            arena = self.together("shared memory", {"bytes": str(size)}, take)
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return arena

    def idle(self) -> bool:
        """Whether no call runs."""
        return not self._running

    def control(self, arena: LocalArena, rank: int) -> Sequence[int]:
        """The first words of the arena of ``rank``."""
        words = arena.shared.arenas[rank][: CONTROL_WORDS * layout.WORD].view(torch.int32)
        return [int(v) for v in words.tolist()]

    def close(self) -> None:
        """As the base class, with the programs."""
        super().close()
        self._programs.clear()

    def set_abort(self, arena: LocalArena, rank: int, value: int) -> None:
        """A store."""
        arena.shared.word(rank, layout.ABORT).value = value

    def call(
        self,
        source: str,
        program: Op,
        tensors: Mapping[str, torch.Tensor],
        scalars: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Runs the emitted ``source`` of ``program`` on this rank's tensors; its outputs by name.

        As on a GPU nothing is raised for a call that was stopped: outputs are NaN (-1 for integers), and
        the next :meth:`check` raises.
        """
        self.check_usable()
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        if digest not in self._programs:
            image = image_of(program)
            shapes = {name: list(t.shape) for name, t in sorted(tensors.items())}
            facts = {"kernel": image.name, "shapes": str(shapes), "emitted source": digest}
            self.agree(image.name, facts, None)
            module = load_module(write_module(source, image.name))
            arena = self.arena_for(image.arena_bytes, image.slots)
            self.agree(image.name, {"compiled": "yes"}, None)
            self._programs[digest] = image, module, arena, self.number_of(image)
        image, module, arena, number = self._programs[digest]
        shared: Shared = arena.shared
        given = dict(tensors)
        for name, slot in image.tensors.items():
            if name not in given:
                given[name] = torch.full(slot.dims, float("nan"), dtype=torch.float32)
        limits = self.limits[number - 1]
        call = Call(image, self.rank, shared.arenas, shared.peers, *limits, shared=shared)
        call.tensors, call.scalars, call.program = given, dict(scalars or {}), number
        call.workspace = torch.full((image.workspace_bytes,), 0xFF, dtype=torch.uint8)
        self._running = True
        try:
            module.host(call)
            call.finish()
        finally:
            self._running = False
        outputs = {slot.name: given[slot.name] for slot in image.outputs}
        if not shared.stopped and image.flags:
            self._compare(arena, number)
        if shared.stopped:
            for tensor in outputs.values():
                tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -1)
            record = shared.arenas[self.rank].view(torch.int32)[
                layout.RECORD : layout.RECORD + layout.RECORD_WORDS
            ]
            self._words[1:] = record.tolist()
            self._words[0] = 1
        return outputs

    def _compare(self, arena: LocalArena, program: int) -> None:
        """Stops all ranks where one has begun this call as another program, as the guard of a GPU does."""
        words = self.control(arena, self.rank)
        record = [1, self.rank, *[0] * 7, watch.DIFFERENT, program, words[layout.EPOCH]]
        record = watch.other_call(words, self.rank, self.world, record) or []
        for word, value in enumerate(record):
            arena.shared.word(self.rank, layout.RECORD + word).value = value
        if record:
            self.give_up(str(self._described(record)))


_states: dict[Any, LocalState] = {}
release.tables.append(_states)


def state_of(group: Any) -> LocalState:
    """The state of a process group, or of the newest generation with the same members."""
    release.sweep()
    group = standing_for(group)
    if group not in _states:
        if not _states:
            prepare_interpreter()
        _states[group] = LocalState(group)
    return _states[group]
