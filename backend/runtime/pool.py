"""Processes that stay alive between runs of the interpreter, one a rank, and the memory they share.

A rank that dies or gets stuck is an error of that run alone: the others are told to leave, keep their
processes, and the next run finds a fresh process in the dead one's place and a new generation of arenas.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from tilelink.backend.runtime.errors import RankFailed, RankStuck
from tilelink.backend.runtime.image import Image, shared_bytes
from tilelink.errors import TilelinkError
from tilelink.ir import layout

STRIDE = 16 << 20  # bytes of one rank's arena, at least
GRACE = 5.0  # seconds that ranks get to leave a call once they were told to

Answer = dict[str, Any]


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
        self.control, theirs = socket.socketpair()
        numbers = (self.memory, stride, world, theirs.fileno())
        # A session of its own, so that the ranks, which it forks, end with it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tilelink.backend.runtime.worker", *map(str, numbers)],
            env=environment,
            pass_fds=(self.memory, theirs.fileno()),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.connections: list[Connection | None] = [None] * world
        self.pids = [0] * world
        self.start(timeout)

    def start(self, timeout: float = 60.0) -> None:
        """Has a process for every rank that has none."""
        fresh = [rank for rank, c in enumerate(self.connections) if c is None]
        for rank in fresh:
            ours, theirs = socket.socketpair()
            try:
                socket.send_fds(self.control, [bytes([rank])], [theirs.fileno()])
            except OSError:
                raise RankFailed(rank=rank, detail="could not be started") from None
            self.connections[rank] = Connection(ours.detach())
            theirs.close()
        if fresh:
            answers = self.collect(fresh, timeout)
            for rank in fresh:
                found = answers[rank]
                if isinstance(found, TilelinkError):
                    raise found
                self.pids[rank] = found["pid"]

    def arena(self, rank: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The int32 words of the arena of ``rank``."""
        words = self.stride // layout.WORD
        return self.words[rank * words : (rank + 1) * words]

    def renew(self) -> None:
        """A new generation: control words, flags and counters are zero; no rank may be running."""
        for rank in range(self.world):
            self.arena(rank)[: layout.DATA // layout.WORD] = 0
        # The counts of the collectives' barriers.
        self.words[2 * self.world * self.stride // layout.WORD :] = 0

    def poison(self, image: Image, epoch: int) -> None:
        """Fills the buffers of a program with NaN, which empties words that hold nothing else, and words that hold
        epochs with one that is not met behind ``epoch``; no rank may be running."""
        far = np.array(epoch + (1 << 31) & 0xFFFFFFFF, dtype=np.uint32).view(np.int32)
        for rank in range(self.world):
            for first, last, encoding in image.places:
                place = slice(first // layout.WORD, -(-last // layout.WORD))
                self.arena(rank)[place] = far if encoding == "epoch" else layout.EMPTY

    def start_epoch(self, epoch: int) -> None:
        """Sets the epoch that the last call is taken to have had, with all flags; no rank may be running."""
        flags = slice(
            layout.FLAGS // layout.WORD, (layout.FLAGS + layout.FLAG_BYTES) // layout.WORD
        )
        for rank in range(self.world):
            arena = self.arena(rank)
            arena[layout.EPOCH] = arena[layout.ENDED] = epoch
            arena[layout.ARRIVED : layout.ACK + layout.MAX_WORLD] = epoch
            arena[flags] = epoch

    def request(self, messages: list[Answer], timeout: float) -> list[Answer | TilelinkError]:
        """Sends one message a rank and returns what became of each: its answer, or the error it met.

        A rank that ends is RankFailed and the others are told at once; what has not answered after
        ``timeout`` seconds is RankStuck and its process is ended.
        """
        for rank, message in enumerate(messages):
            # The end of a process shows when its answer is read.
            with contextlib.suppress(OSError):
                self._connection(rank).send_bytes(pickle.dumps(message))
        answers = self.collect(list(range(self.world)), timeout)
        return [answers[rank] for rank in range(self.world)]

    def collect(self, ranks: list[int], timeout: float) -> dict[int, Answer | TilelinkError]:
        """What each of ``ranks`` answers; see :meth:`request`."""
        deadline = time.monotonic() + timeout
        limit, answers = timeout, dict[int, Answer | TilelinkError]()
        while len(answers) < len(ranks):
            waiting = {self._connection(r): r for r in ranks if r not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = self._read(rank)
                except (EOFError, OSError):
                    answers[rank] = self._dead(rank)
                    self._tell(layout.LOST + rank, [r for r in ranks if r not in answers])
                    deadline = min(deadline, time.monotonic() + limit / 2 + GRACE)
            if not ready:
                late = [r for r in ranks if r not in answers]
                self._tell(1, late)
                names = ", ".join(map(str, late))
                for rank in late:
                    self._end(rank)
                    answers[rank] = RankStuck(seconds=limit, ranks=names)
        return answers

    def _connection(self, rank: int) -> Connection:
        found = self.connections[rank]
        assert found is not None
        return found

    def _read(self, rank: int) -> Answer | TilelinkError:
        answer: Answer = pickle.loads(self._connection(rank).recv_bytes())
        if "error" not in answer:
            return answer
        lines = str(answer["error"]).strip().splitlines()
        return RankFailed(rank=rank, detail=f"raised {lines[-1]}", notes=tuple(lines[-8:]))

    def _tell(self, value: int, ranks: list[int]) -> None:
        for rank in ranks:
            arena = self.arena(rank)
            if arena[layout.ABORT] == 0:
                arena[layout.ABORT] = value

    def _end(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.pids[rank]:
                os.kill(self.pids[rank], signal.SIGKILL)
        self._exit_code(rank)
        self._forget(rank)

    def _dead(self, rank: int) -> RankFailed:
        code = self._exit_code(rank)
        self._forget(rank)
        said = "an unknown exit code" if code is None else f"exit code {code}"
        return RankFailed(rank=rank, detail=f"died with {said}")

    def _exit_code(self, rank: int) -> int | None:
        """What the parent of the ranks says of the end of one; None if it says nothing in a second."""
        self.control.settimeout(1.0)
        try:
            while True:
                data = self.control.recv(8, socket.MSG_WAITALL)
                if len(data) < 8:
                    return None
                ended, code = struct.unpack("<ii", data)
                if ended == rank:
                    return int(code)
        except OSError:
            return None
        finally:
            self.control.settimeout(None)

    def _forget(self, rank: int) -> None:
        self._connection(rank).close()
        self.connections[rank], self.pids[rank] = None, 0

    def close(self) -> None:
        """Ends the processes at once."""
        self.control.close()
        for connection in self.connections:
            if connection is not None:
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
    pool.start()
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
