"""One rank of the interpreter: a process that runs emitted modules over arenas in shared memory.

Started by :mod:`tilelink.backend.runtime.pool` with ``TRITON_INTERPRET=1``. Everything that a
program enqueues is recorded first, then run: the main stream's agents one after another here, each
side stream in a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_semantic

from tilelink.backend.runtime import load_module
from tilelink.backend.runtime.image import image_of, shared_bytes
from tilelink.backend.runtime.views import Views, record_words, spread_axis
from tilelink.device import head_kernel, signal
from tilelink.ir import layout, parse_ir

POLL = 5e-5  # seconds between two looks of a side stream at a counter


class Shared:
    """The memory of all ranks, mapped here: an arena a rank, then a scratch area a rank, then words.

    Scratch and words serve the collectives: ``words[r]`` counts the barriers that rank r has reached.
    """

    def __init__(self, fd: int, rank: int, world: int, stride: int) -> None:
        self.rank, self.world, self.stride = rank, world, stride
        self.map = mmap.mmap(fd, shared_bytes(world, stride))
        whole = torch.frombuffer(self.map, dtype=torch.uint8)
        self.base = whole.data_ptr()
        self.arenas = [whole[r * stride : (r + 1) * stride] for r in range(world)]
        self.scratch = [
            whole[(world + r) * stride : (world + r + 1) * stride] for r in range(world)
        ]
        self.words = whole[2 * world * stride :].view(torch.int32)
        self.peers = torch.tensor([a.data_ptr() for a in self.arenas], dtype=torch.int64)

    def word(self, rank: int, number: int) -> ctypes.c_int32:
        """Word ``number`` of the arena of ``rank``."""
        return ctypes.c_int32.from_address(self.base + rank * self.stride + number * layout.WORD)

    def barrier(self, stop: Callable[[], None]) -> None:
        """Returns once every rank has come here as often as this one; ``stop`` raises to give up."""
        self.words[self.rank] += 1
        mine = int(self.words[self.rank])
        while int(self.words[: self.world].min()) < mine:
            stop()
            time.sleep(POLL)


def read_clock(polls: Any) -> Any:
    """What kernels use for their time limits here: nanoseconds, as a Triton scalar."""
    del polls
    return interpreter_semantic.to_tensor(time.monotonic_ns(), False)


def poll_gently() -> None:
    """Has a kernel's poll (an atomic addition of zero) give up the core, for other ranks and threads."""
    add = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, *rest: Any) -> Any:
        if not value.data.any():
            time.sleep(POLL)
        return add(self, op, ptr, value, *rest)

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


class Failed(Exception):
    """Another thread of this rank has raised."""


class Call(Views):
    """What an emitted ``host(call)`` talks to, on the interpreter."""

    def __init__(self, *args: Any, shared: Shared) -> None:
        super().__init__(*args)
        self._shared = shared
        self._main: list[tuple[str, tuple[str, ...], Callable[[], None]]] = []
        self._streams: dict[str, tuple[tuple[str, ...], list[Callable[[], None]]]] = {}
        self._current: list[Callable[[], None]] = []
        self._done: dict[str, threading.Event] = {}
        self._errors: list[BaseException] = []

    def head(self, ack_wait: bool = True) -> None:
        """Begins the call: epoch, arrival, counters, and the wait for the acknowledgements."""
        arguments = self.head_arguments(ack_wait)
        self._enqueue("head", (), lambda: head_kernel[(1,)](*arguments))

    def launch(
        self,
        kernel: Any,
        workers: int,
        args: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
        after: tuple[str, ...] = ("head",),
        name: str | None = None,
    ) -> None:
        """A persistent kernel of ``workers`` CTAs, here one after another."""
        del num_warps, num_stages
        name = name or self.next_name("launch")
        self._enqueue(name, after, lambda: kernel[(workers,)](*args))

    def collective(
        self,
        op: str,
        src: torch.Tensor,
        dst: torch.Tensor,
        after: tuple[str, ...] = ("head",),
        name: str | None = None,
    ) -> None:
        """The library's collective along the axis on which the shapes differ, through shared memory."""
        self._enqueue(
            name or self.next_name("collective"), after, lambda: self._collective(op, src, dst)
        )

    @contextlib.contextmanager
    def stream(self, name: str, after: tuple[str, ...] = ("head",)) -> Iterator[Call]:
        """A side stream: what is called inside runs in order, beside the main stream."""
        self._current = []
        self._streams[name] = (tuple(after), self._current)
        self._done[name] = threading.Event()
        yield self

    def wait_counter(self, name: str, index: tuple[int, ...], count: int) -> None:
        """In a stream: until the local counter is at least ``count``."""
        word = self._shared.word(self.rank, self.word_of(name, index))

        def wait() -> None:
            while word.value - count < 0:
                self._check()
                time.sleep(POLL)

        self._current.append(wait)

    def transfer(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """In a stream: copies ``src`` to ``dst``, regions of the same shape and dtype."""
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"transfer of {src.dtype}{list(src.shape)} to {dst.dtype}{list(dst.shape)}"
            )

        def copy() -> None:
            dst.copy_(src)

        self._current.append(copy)

    def notify(self, flag: str, index: tuple[int, ...], peer: int) -> None:
        """In a stream: the flag element of ``peer`` becomes this rank's epoch."""
        target = self._shared.word(peer, self.word_of(flag, index))
        epoch = self._shared.word(self.rank, layout.EPOCH)

        def write() -> None:
            target.value = epoch.value

        self._current.append(write)

    def finish(self) -> None:
        """Runs what was enqueued; raises the first error of any stream."""
        threads = [
            threading.Thread(target=self._run_stream, args=(name,), daemon=True)
            for name in self._streams
        ]
        for thread in threads:
            thread.start()
        try:
            for name, after, action in self._main:
                self._wait_for(after)
                action()
                self._done[name].set()
        except Failed:
            pass
        except BaseException as error:
            self._fail(error)
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _enqueue(self, name: str, after: tuple[str, ...], action: Callable[[], None]) -> None:
        self._done[name] = threading.Event()
        self._main.append((name, tuple(after), action))

    def _check(self) -> None:
        if self._errors:
            raise Failed

    def _wait_for(self, after: tuple[str, ...]) -> None:
        for name in after:
            while not self._done[name].wait(POLL):
                self._check()

    def _run_stream(self, name: str) -> None:
        after, actions = self._streams[name]
        try:
            self._wait_for(after)
            for action in actions:
                self._check()
                action()
            self._done[name].set()
        except Failed:
            pass
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        # Kernels that wait for what will not come any more leave at once.
        for rank in range(self.world):
            self._shared.word(rank, layout.ABORT).value = 1

    def _collective(self, op: str, src: torch.Tensor, dst: torch.Tensor) -> None:
        shared = self._shared
        source = src.contiguous()
        size = source.numel() * source.element_size()
        if size > shared.stride:
            raise ValueError(f"a collective of {size} B does not fit {shared.stride} B of scratch")

        def part(rank: int) -> torch.Tensor:
            return shared.scratch[rank][:size].view(source.dtype).view(source.shape)

        part(self.rank).copy_(source)
        shared.barrier(self._check)
        parts = [part(r) for r in range(self.world)]
        if op == "all_gather":
            result = torch.cat(parts, dim=spread_axis(source.shape, dst.shape))
        elif op in ("reduce_scatter", "all_reduce"):
            total = torch.zeros(source.shape, dtype=torch.float32)
            for p in parts:
                total += p.float()
            result = total.to(source.dtype)
            if op == "reduce_scatter":
                axis = spread_axis(dst.shape, source.shape)
                result = result.chunk(self.world, dim=axis)[self.rank]
        else:
            raise ValueError(f"unknown collective {op}")
        dst.copy_(result)
        shared.barrier(self._check)


def run_calls(message: dict[str, Any], shared: Shared) -> dict[str, Any]:
    """Runs ``message["calls"]`` (inputs by name, one dict a call); returns the outputs of each."""
    module = load_module(message["path"])
    image = image_of(parse_ir(module.TEXT))
    common = (image, shared.rank, shared.arenas, shared.peers)
    # NaN in every floating dtype: nothing may be read before it is written.
    workspace = torch.full((image.workspace_bytes,), 0xFF, dtype=torch.uint8)
    outputs: list[dict[str, torch.Tensor]] = []
    for inputs in message["calls"]:
        call = Call(*common, message["progress"], message["arrival"], shared=shared)
        call.tensors = inputs
        call.workspace = workspace
        call.scalars = message["scalars"]
        module.host(call)
        call.finish()
        if shared.word(shared.rank, layout.ABORT).value:
            return {"abort": record_words(call.arena)}
        outputs.append({slot.name: inputs[slot.name].clone() for slot in image.outputs})
    return {"outputs": outputs}


def serve(connection: Connection, shared: Shared) -> None:
    """Answers requests until the other end closes."""
    connection.send_bytes(pickle.dumps({"ready": True}))
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reply = run_calls(message, shared)
        except BaseException:
            reply = {"error": traceback.format_exc()}
        connection.send_bytes(pickle.dumps(reply))


def main(arguments: list[str]) -> None:
    """Forks one process a rank: ``MEMORY_FD STRIDE CONTROL_FD RANK_0_FD RANK_1_FD …``.

    Imports take seconds and are done once, before the fork. On the control connection goes
    ``(rank, exit code)`` for every rank that ends.
    """
    memory, stride, control, *sockets = map(int, arguments)
    faulthandler.enable()
    # Interpreted code has no timer and counts polls, whose cost varies with the load of the machine.
    signal._clock = read_clock
    poll_gently()
    torch.set_num_threads(1)
    ranks: dict[int, int] = {}
    for rank, fd in enumerate(sockets):
        child = os.fork()
        if child == 0:
            for other in (*sockets[:rank], *sockets[rank + 1 :], control):
                os.close(other)
            try:
                serve(Connection(fd), Shared(memory, rank, len(sockets), stride))
            finally:
                os._exit(0)
        ranks[child] = rank
    for fd in sockets:
        os.close(fd)
    report = Connection(control)
    while ranks:
        child, status = os.wait()
        with contextlib.suppress(OSError):
            report.send_bytes(pickle.dumps((ranks.pop(child), os.waitstatus_to_exitcode(status))))


if __name__ == "__main__":
    main(sys.argv[1:])
