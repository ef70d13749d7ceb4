"""Processes that stay alive between runs of the interpreter, one a rank, and the memory they share."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from tilelink.backend.runtime.errors import RankFailed, RankStuck
from tilelink.backend.runtime.image import shared_bytes
from tilelink.ir import layout

STRIDE = 16 << 20  # bytes of one rank's arena, at least


class Pool:
    """``world`` interpreter processes with arenas of ``stride`` bytes; closed by :meth:`close`."""

    def __init__(self, world: int, stride: int, timeout: float = 60.0) -> None:
        self.world, self.stride = world, stride
        total = shared_bytes(world, stride)
        self.memory = os.memfd_create("tilelink-arenas")
        os.ftruncate(self.memory, total)
        self.map = mmap.mmap(self.memory, total)
        self.words = np.frombuffer(self.map, dtype=np.int32)
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        pairs = [socket.socketpair() for _ in range(world + 1)]
        theirs = [pair[1].fileno() for pair in pairs]
        numbers = (self.memory, stride, *theirs)
        # A session of its own, so that the ranks, which it forks, end with it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tilelink.backend.runtime.worker", *map(str, numbers)],
            env=environment,
            pass_fds=(self.memory, *theirs),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.control, *self.connections = [Connection(pair[0].detach()) for pair in pairs]
        for pair in pairs:
            pair[1].close()
        self.collect(timeout)

    def arena(self, rank: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The int32 words of the arena of ``rank``."""
        words = self.stride // layout.WORD
        return self.words[rank * words : (rank + 1) * words]

    def poison(self, size: int) -> None:
        """Fills the data areas, up to ``size`` bytes of an arena, with NaN; no rank may be running."""
        for rank in range(self.world):
            self.arena(rank)[layout.DATA // layout.WORD : -(-size // layout.WORD)] = -1

    def start_epoch(self, epoch: int) -> None:
        """Sets the epoch that the last call is taken to have had, with all flags; no rank may be running."""
        flags = slice(
            layout.FLAGS // layout.WORD, (layout.FLAGS + layout.FLAG_BYTES) // layout.WORD
        )
        for rank in range(self.world):
            arena = self.arena(rank)
            arena[layout.EPOCH] = epoch
            arena[layout.ARRIVED : layout.ACK + layout.MAX_WORLD] = epoch
            arena[flags] = epoch

    def request(self, messages: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
        """Sends one message a rank and returns the answers."""
        for rank, message in enumerate(messages):
            try:
                self.connections[rank].send_bytes(pickle.dumps(message))
            except OSError:
                self._dead(rank)
        return self.collect(timeout)

    def collect(self, timeout: float) -> list[dict[str, Any]]:
        """One answer a rank; RankFailed where one raised or died, RankStuck after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < self.world:
            waiting = [c for r, c in enumerate(self.connections) if r not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [r for r in range(self.world) if r not in answers]
                raise RankStuck(seconds=timeout, ranks=", ".join(map(str, late)))
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(self.connections[rank].recv_bytes())
                except (EOFError, OSError):
                    self._dead(rank)
                if "error" in answers[rank]:
                    trace = str(answers[rank]["error"]).strip()
                    last = trace.splitlines()[-1]
                    raise RankFailed(
                        rank=rank, detail=f"raised {last}", notes=tuple(trace.splitlines()[-8:])
                    )
        return [answers[r] for r in range(self.world)]

    def _dead(self, rank: int) -> None:
        code = "an unknown exit code"
        while self.control.poll(1.0):
            try:
                ended, status = pickle.loads(self.control.recv_bytes())
            except (EOFError, OSError):
                break
            if ended == rank:
                code = f"exit code {status}"
                break
        raise RankFailed(rank=rank, detail=f"died with {code}")

    def close(self) -> None:
        """Ends the processes at once."""
        for connection in (self.control, *self.connections):
            connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        del self.words
        self.map.close()
        os.close(self.memory)


_pools: dict[int, Pool] = {}


def pool_for(world: int, arena_bytes: int) -> Pool:
    """The pool of ``world`` ranks, with arenas of at least ``arena_bytes``; started where needed."""
    pool = _pools.get(world)
    if pool is not None and pool.stride < arena_bytes:
        drop(pool)
        pool = None
    if pool is None:
        stride = STRIDE
        while stride < arena_bytes:
            stride *= 2
        pool = _pools[world] = Pool(world, stride)
    return pool


def drop(pool: Pool) -> None:
    """Ends a pool whose state is no longer known."""
    for world, known in list(_pools.items()):
        if known is pool:
            del _pools[world]
    pool.close()


@atexit.register
def close_all() -> None:
    """Ends every pool."""
    for pool in list(_pools.values()):
        drop(pool)
