"""One rank of the interpreter: a process that runs emitted modules over arenas in shared memory.

Started by :mod:`tilelink.backend.runtime.pool` with ``TRITON_INTERPRET=1``. Everything that a
program enqueues is recorded first, then run: the main stream's agents one after another here, each
side stream in a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import math
import mmap
import os
import pickle
import signal as process_signals
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, interpreter_semantic

from tilelink.backend.dtypes import sum_dtype
from tilelink.backend.runtime import load_module
from tilelink.backend.runtime.image import image_of, shared_bytes
from tilelink.backend.runtime.library import matmul
from tilelink.backend.runtime.views import MOST_BEHIND, Views, record_words, spread_axis
from tilelink.device import (
    acknowledge_kernel,
    head_kernel,
    notify_kernel,
    signal,
    wait_kernel,
)
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

    def stop(self) -> None:
        """Sets the abort word of every rank, this one's last."""
        for step in range(1, self.world + 1):
            self.word((self.rank + step) % self.world, layout.ABORT).value = 1

    @property
    def stopped(self) -> bool:
        """Whether this rank was told to leave."""
        return self.word(self.rank, layout.ABORT).value != 0

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


def spare_work() -> None:
    """Has the interpreter leave out what changes nothing: a look through the language at each call of a device
    function, the sums that say whether others overflow, a table of types made for each value, the types of
    tuples, and what is worked out of the type of a block.

    The look is for what the interpreter has to replace, and finds nothing from the second time on; nothing in
    this process needs the language as it was. The sums are compared in an assertion that only Triton's
    option ``debug`` compiles.
    """
    patch, replaced = interpreter._patch_lang, set[str]()

    def patch_language(function: Any) -> Any:
        seen = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        names = {module.__name__ for module in seen}
        if not names <= replaced:
            patch(function)
            replaced.update(names)
        return interpreter._LangPatchScope()  # of no change: there is nothing to undo

    interpreter._patch_lang = patch_language
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def find_type(of: Any) -> Any:
        # That of a block is that of its elements.
        name = of.scalar.name
        if name not in found:
            found[name] = find(of)
        return found[name]

    interpreter._get_np_dtype = find_type
    spare_types()


def spare_types() -> None:
    """Has the language make the type of a tuple when it is asked for, and work out once what follows from the
    elements and the shape of a block. Each value has a shape, a tuple, and most operations make a type."""
    core = tl.core

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        known = type is None or isinstance(type, core.tuple_type)
        self._type = type if known else core.tuple_type(type)

    def type_of(self: Any) -> Any:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def set_type(self: Any, type: Any) -> None:
        self._type = type

    core.tuple.__init__, core.tuple.type = make_tuple, property(type_of, set_type)
    make, made = core.block_type.__init__, dict[tuple[Any, ...], tuple[Any, ...]]()

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        found = made.get(key)
        if found is None:
            make(self, element_ty, shape)
            made[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = found

    core.block_type.__init__ = make_block
    shapes = dict[tuple[int, ...], tuple[Any, Any]]()

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        lengths = tuple(type.shape) if type.is_block() else ()
        found = shapes.get(lengths)
        if found is None:
            shape = core.tuple([core.constexpr(length) for length in lengths])
            found = shapes[lengths] = core.constexpr(math.prod(lengths)), shape
        self.numel, self.shape = found

    core.tensor.__init__ = make_tensor


class Failed(Exception):
    """Another thread of this rank has raised."""


# By whether a dtype is floating-point: what no input has.
_ODD = {True: float("nan"), False: -77}


class Stopped(Exception):
    """The abort word of this rank is set: the rest of a stream is left out."""


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
        self._begun: ctypes.c_int32 | None = None

    def head(self, ack_wait: bool = True) -> None:
        """Begins the call: epoch, arrival, counters, and the wait for the acknowledgements."""
        arguments = self.head_arguments(ack_wait)
        self._enqueue("head", (), lambda: head_kernel[(1,)](*arguments))

    def begin(self) -> None:
        """Begins a call whose launches do what the head does: streams wait until the first one has."""
        self._done["head"] = threading.Event()
        self._done["head"].set()
        self._begun = self._shared.word(self.rank, layout.BEGUN)

    def endless(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` with rows behind it that show in a result which depends on them."""
        rows = torch.full((MOST_BEHIND, *tensor.shape[1:]), _ODD[tensor.dtype.is_floating_point])
        return torch.cat([tensor, rows.to(tensor.dtype)])

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
    def library(self, name: str, after: tuple[str, ...] = ("head",)) -> Iterator[Call]:
        """A launch that the library makes: what is called inside runs in order."""
        actions: list[Callable[[], None]] = []
        self._current = actions

        def run() -> None:
            for action in actions:
                self._check()
                action()

        self._enqueue(name, after, run)
        yield self

    def matmul(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """``out = a @ b + bias``."""
        self._current.append(lambda: matmul(a, b, out, bias))

    def wait(
        self, flag: str, index: tuple[int, ...], producer: int, tile: int, number: int
    ) -> None:
        """Between products: until a flag element has this call's epoch; ``number`` is the wait's own."""
        args = self.wait_arguments(flag, index, producer, tile, number)
        self._current.append(lambda: wait_kernel[(1,)](*args))

    def count(self, counter: str, index: tuple[int, ...]) -> None:
        """Between products: adds 1 to a local counter."""
        word = self.word_of(counter, index)
        self._current.append(lambda: notify_kernel[(1,)](self.arena, word))

    def acknowledge(self) -> None:
        """Behind the products: tells every rank that this one has finished reading."""
        args = self.acknowledge_arguments()
        self._current.append(lambda: acknowledge_kernel[(1,)](*args))

    @contextlib.contextmanager
    def stream(self, name: str, after: tuple[str, ...] = ("head",)) -> Iterator[Call]:
        """A side stream: what is called inside runs in order, beside the main stream."""
        self._current = []
        self._streams[name] = (tuple(after), self._current)
        self._done[name] = threading.Event()
        begun = self._begun
        if begun is not None and "head" in after:
            self._current.append(lambda: self._poll(begun, 1))
        yield self

    def wait_counter(self, name: str, index: tuple[int, ...], count: int) -> None:
        """In a stream: until the local counter is at least ``count``."""
        word = self._shared.word(self.rank, self.word_of(name, index))
        self._current.append(lambda: self._poll(word, count))

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
        with self._failing():
            for name, after, action in self._main:
                self._wait_for(after)
                with contextlib.suppress(Stopped):
                    action()
                self._done[name].set()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        if not (self.image.quiet or self.image.ended):
            self._guard()

    def _guard(self) -> None:
        """What the guard kernel does behind a call that no wait has stopped."""
        for number in (*range(*self.image.counter_words), layout.BEGUN):
            self._shared.word(self.rank, number).value = 0
        epoch = self._shared.word(self.rank, layout.EPOCH).value
        self._shared.word(self.rank, layout.ENDED).value = epoch

    def _poll(self, word: ctypes.c_int32, count: int) -> None:
        while word.value - count < 0:
            self._check_stop()
            time.sleep(POLL)

    def _enqueue(self, name: str, after: tuple[str, ...], action: Callable[[], None]) -> None:
        self._done[name] = threading.Event()
        self._main.append((name, tuple(after), action))

    def _check(self) -> None:
        if self._errors:
            raise Failed

    def _check_stop(self) -> None:
        # What waits on the host sees the abort word too; an error of this rank comes first.
        self._check()
        if self._shared.stopped:
            raise Stopped

    def _wait_for(self, after: tuple[str, ...]) -> None:
        for name in after:
            while not self._done[name].wait(POLL):
                self._check()

    def _run_stream(self, name: str) -> None:
        after, actions = self._streams[name]
        with self._failing():
            self._wait_for(after)
            with contextlib.suppress(Stopped):
                for action in actions:
                    self._check()
                    action()
            self._done[name].set()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Keeps an error for :meth:`finish`, but for that which says that there is one."""
        try:
            yield
        except Failed:
            pass
        except BaseException as error:
            self._errors.append(error)
            # Kernels that wait for what will not come any more leave at once.
            self._shared.stop()

    def _collective(self, op: str, src: torch.Tensor, dst: torch.Tensor) -> None:
        shared = self._shared
        source = src.contiguous()
        size = source.numel() * source.element_size()
        if size > shared.stride:
            raise ValueError(f"a collective of {size} B does not fit {shared.stride} B of scratch")

        def part(rank: int) -> torch.Tensor:
            return shared.scratch[rank][:size].view(source.dtype).view(source.shape)

        part(self.rank).copy_(source)
        shared.barrier(self._check_stop)
        parts = [part(r) for r in range(self.world)]
        if op == "all_gather":
            result = torch.cat(parts, dim=spread_axis(source.shape, dst.shape))
        elif op in ("reduce_scatter", "all_reduce"):
            wide = sum_dtype(source.dtype)
            total = torch.zeros(source.shape, dtype=wide)
            for p in parts:
                total += p.to(wide)
            result = total.to(source.dtype)
            if op == "reduce_scatter":
                axis = spread_axis(dst.shape, source.shape)
                result = result.chunk(self.world, dim=axis)[self.rank]
        else:
            raise ValueError(f"unknown collective {op}")
        dst.copy_(result)
        shared.barrier(self._check_stop)


def run_calls(message: dict[str, Any], shared: Shared) -> dict[str, Any]:
    """Runs ``message["calls"]`` (inputs by name, one dict a call); returns the outputs of each.

    Where this rank was stopped: its error record, and the number of the call.
    """
    module = load_module(message["path"])
    image = image_of(parse_ir(module.TEXT))
    common = (image, shared.rank, shared.arenas, shared.peers)
    # NaN in every floating dtype: nothing may be read before it is written.
    workspace = torch.full((image.workspace_bytes,), 0xFF, dtype=torch.uint8)
    outputs: list[dict[str, torch.Tensor]] = []
    for number, inputs in enumerate(message["calls"]):
        call = Call(*common, message["progress"], message["arrival"], shared=shared)
        call.tensors = inputs
        call.workspace = workspace
        call.scalars = message["scalars"]
        call.extents |= message["extents"][number]
        call.program = 1
        module.host(call)
        call.finish()
        if shared.stopped:
            return {"abort": record_words(call.arena), "call": number}
        outputs.append({slot.name: inputs[slot.name].clone() for slot in image.outputs})
    return {"outputs": outputs}


def answer(message: dict[str, Any], shared: Shared) -> dict[str, Any]:
    """The reply to a request: that of :func:`run_calls`, or the error that kept this rank from it."""
    undo = None
    try:
        if message.get("prepare"):
            module, function, arguments = message["prepare"]
            undo = getattr(importlib.import_module(module), function)(shared, *arguments)
        return run_calls(message, shared)
    except BaseException:
        # Peers that wait for this rank leave.
        shared.stop()
        return {"error": traceback.format_exc()}
    finally:
        if undo is not None:
            undo()


def serve(connection: Connection, shared: Shared) -> None:
    """Answers requests until the other end closes; the first message says which process this is."""
    connection.send_bytes(pickle.dumps({"ready": True, "pid": os.getpid()}))
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(pickle.dumps(answer(message, shared)))


def prepare_interpreter() -> None:
    """Sets up this process, which has ``TRITON_INTERPRET=1``, to run kernels beside other ranks."""
    # Interpreted code has no timer and counts polls, whose cost varies with the load of the machine.
    signal._clock = read_clock
    poll_gently()
    spare_work()
    # NumPy computes what stands behind the end of a short tile too, and nothing reads it.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=interpreter.__name__)
    torch.set_num_threads(1)


def main(arguments: list[str]) -> None:
    """Forks processes of ranks: ``MEMORY_FD STRIDE WORLD CONTROL_FD``.

    Imports take seconds and are done once, before the forks. Whoever has the other end of the control
    socket sends the number of a rank, a byte, with the descriptor of that rank's connection; back goes
    ``(rank, exit code)`` for every rank that ends.
    """
    memory, stride, world, control_fd = map(int, arguments)
    faulthandler.enable()
    prepare_interpreter()
    control = socket.socket(fileno=control_fd)
    ranks: dict[int, int] = {}
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    process_signals.signal(process_signals.SIGCHLD, lambda *_: None)
    process_signals.set_wakeup_fd(woken.fileno())
    while True:
        ready = wait([control, wake])
        if wake in ready:
            wake.recv(4096)
        while ranks:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                control.sendall(struct.pack("<ii", ranks.pop(child), code))
        if control in ready:
            request, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not request:
                return
            child = os.fork()
            if child == 0:
                process_signals.set_wakeup_fd(-1)
                process_signals.signal(process_signals.SIGCHLD, process_signals.SIG_DFL)
                for other in (control, wake, woken):
                    other.close()
                try:
                    connection = Connection(descriptors[0])
                    serve(connection, Shared(memory, request[0], world, stride))
                finally:
                    os._exit(0)
            ranks[child] = request[0]
            os.close(descriptors[0])


if __name__ == "__main__":
    # Under its own name: whoever changes a class of this module in a rank changes the one in use.
    from tilelink.backend.runtime import worker

    worker.main(sys.argv[1:])
