"""Who the ranks of a group are, and whether their processes live.

Ranks find each other through the group's store. Keys of an earlier use of the same store may still be
there (a process group that was destroyed and made again), so nothing is believed that does not repeat a
number which this rank has just drawn.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POLL = 0.002  # seconds between two looks into the store


class Store(Protocol):
    """What is used of a ``torch.distributed`` store."""

    def set(self, key: str, value: str) -> None:
        """Leaves a value."""

    def get(self, key: str) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Replaces ``expected`` (empty: nothing) by ``desired``; the value that stands now."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some host: its number, when it began, where, and a number of this meeting's own."""

    pid: int
    began: str
    host: str
    nonce: str

    @property
    def machine(self) -> str:
        """What tells its host from others; empty where that is not known."""
        boot, _, space = self.host.partition(" ")
        return boot if space else ""

    @property
    def alive(self) -> bool:
        """Whether it still runs; a process of another host is taken to."""
        if self.host != _host():
            return True
        fields = _stat(self.pid)
        return bool(fields) and fields[0] not in "ZX" and fields[19] == self.began

    def text(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"pid": self.pid, "began": self.began, "host": self.host, "nonce": self.nonce}


def this_process() -> Process:
    """The running process, with a fresh nonce."""
    fields = _stat(os.getpid())
    return Process(os.getpid(), fields[19] if fields else "", _host(), secrets.token_hex(8))


def process_of(text: dict[str, Any]) -> Process:
    """What :meth:`Process.text` gave."""
    return Process(int(text["pid"]), text["began"], text["host"], text["nonce"])


def _stat(pid: int) -> list[str]:
    # From the state on: the name before it may hold anything.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@functools.cache
def _host() -> str:
    """The machine since it was started, and the space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(16)


class Meeting:
    """A handshake of ranks under ``prefix``: each one's process, seen by each other one.

    A rank is here once its entry repeats the nonce that this rank has drawn for this meeting.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.me = this_process()
        self.processes: dict[int, Process] = {rank: self.me}
        self.here: set[int] = {rank}
        self._store, self._prefix = store, prefix
        self._since = dict.fromkeys(range(world), time.monotonic())
        self._write()

    def look(self) -> None:
        """Reads the entries of the ranks that are not here yet."""
        fresh = False
        for rank in sorted(set(range(self.world)) - self.here):
            if not self._store.check([f"{self._prefix}/{rank}"]):
                continue
            entry = json.loads(self._store.get(f"{self._prefix}/{rank}"))
            process = process_of(entry)
            if self.processes.get(rank) != process:
                self.processes[rank], fresh = process, True
                self._since[rank] = time.monotonic()
            if entry["seen"].get(str(self.rank)) == self.me.nonce:
                self.here.add(rank)
        if fresh:
            self._write()

    def dead(self, patience: float) -> list[int]:
        """Ranks whose last known process has ended; those not here must have had ``patience`` seconds
        for another process to take their place."""
        now = time.monotonic()
        return [
            rank
            for rank, process in sorted(self.processes.items())
            if (rank in self.here or now - self._since[rank] > patience) and not process.alive
        ]

    def _write(self) -> None:
        seen = {str(rank): process.nonce for rank, process in sorted(self.processes.items())}
        entry = json.dumps({**self.me.text(), "seen": seen})
        self._store.set(f"{self._prefix}/{self.rank}", entry)


@dataclass(frozen=True, slots=True)
class Roster:
    """The processes of a group's ranks, by rank, and a name that no other use of its store has."""

    name: str
    processes: tuple[Process, ...]

    def lost(self) -> list[int]:
        """Ranks whose process has ended."""
        return [rank for rank, process in enumerate(self.processes) if not process.alive]

    def machines(self) -> list[list[int]]:
        """The ranks of each host, as far as hosts are known; that of the lowest rank first."""
        found: dict[str, list[int]] = {}
        for rank, process in enumerate(self.processes):
            if process.machine:
                found.setdefault(process.machine, []).append(rank)
        return list(found.values())


def roster_of(meeting: Meeting) -> Roster:
    """The roster of a meeting that every rank has come to."""
    processes = tuple(meeting.processes[rank] for rank in range(meeting.world))
    names = " ".join(process.nonce for process in processes)
    return Roster(hashlib.sha256(names.encode()).hexdigest()[:16], processes)
