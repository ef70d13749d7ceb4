"""One call, recorded once and enqueued many times.

An emitted ``host(call)`` only depends on the addresses of the user's tensors, on scalars and on
run-time extents. So it is run against a :class:`Recorder`, which turns it into a flat list of driver
calls; a later call with the same arguments enqueues that list again, on whatever stream is current,
captured or not. A plan that repeats is itself captured into a graph, which one driver call enqueues.
A plan keeps addresses, not tensors; what the library is called with is found anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton

from tilelink import knobs
from tilelink.backend.runtime.driver import Event, driver, rows_of
from tilelink.backend.runtime.errors import DriverError
from tilelink.backend.runtime.guard import CTAS, guard_kernel
from tilelink.backend.runtime.image import Slot
from tilelink.backend.runtime.library import Command, Place, collective, collective_of, product
from tilelink.backend.runtime.views import MOST_BEHIND, Rows, Views, lasting, spread_axis
from tilelink.device import acknowledge_kernel, head_kernel, notify_kernel, wait_kernel
from tilelink.ir import layout

NO_TENSORS: Mapping[str, torch.Tensor] = MappingProxyType({})
HOT = 3  # calls with the same arguments until a plan becomes a graph


class Pointer:
    """An address with the dtype of what lies there: a tensor as far as a kernel launch can tell."""

    __slots__ = ("address", "dtype")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.address = tensor.data_ptr()
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address


@dataclass(slots=True)
class Launch:
    """A compiled kernel with its arguments, to be run on a stream."""

    compiled: Any
    workers: int
    arguments: tuple[Any, ...]

    def run(self, stream: int, _: object = None) -> None:
        """Enqueues it."""
        kernel = self.compiled
        kernel.run(
            self.workers,
            1,
            1,
            stream,
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            *self.arguments,
        )


def compile_launch(kernel: Any, workers: int, args: tuple[Any, ...], **options: Any) -> Launch:
    """The launch of a kernel with these arguments, not run; compiled where it has not been before."""
    # Triton's own idea of the device: kernels are compiled ahead of a search where there is none.
    device = triton.runtime.driver.active.get_current_device()
    key = (kernel, device, *options.values(), *_specialised(kernel, args))
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel.warmup(*args, grid=(workers,), **options)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        _compiled[key] = compiled
    given = tuple(_plain(a) for a in args)
    return Launch(compiled, workers, (*given, *(p.default for p in kernel.params[len(args) :])))


_compiled: dict[tuple[object, ...], Any] = {}


def _specialised(kernel: Any, args: tuple[Any, ...]) -> Iterator[object]:
    """What of a kernel's arguments Triton compiles in: kinds, alignments, numbers unless told not to."""
    described, gluon = _descriptor_types()
    for parameter, value in zip(kernel.params, args, strict=False):
        if isinstance(value, torch.Tensor):
            yield value.dtype, value.data_ptr() % 16 == 0
        elif isinstance(value, described):
            laid_out = repr(value.layout) if isinstance(value, gluon) else ""
            yield value.base.dtype, tuple(value.block_shape), value.padding, laid_out
        elif isinstance(value, int) and parameter.do_not_specialize:
            yield int, -(1 << 31) <= value < 1 << 31, value >= 1 << 63
        elif isinstance(value, float) and not parameter.is_constexpr:
            yield float
        else:
            yield type(value), value


@functools.cache
def _descriptor_types() -> tuple[tuple[Any, ...], Any]:
    """The classes of tensor descriptors, and Gluon's among them."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Gluon
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (TensorDescriptor, Gluon), Gluon


def _plain(argument: Any) -> Any:
    if isinstance(argument, int | float):
        return argument
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, _descriptor_types()[0]):
        plain = object.__new__(type(argument))
        plain.__dict__.update(argument.__dict__)
        plain.base = Pointer(argument.base)
        return plain
    return argument


class Plan:
    """What one call enqueues, in order; ``launches`` are its persistent kernels."""

    def __init__(self) -> None:
        # A command, or a list of them where events may still be asked for; flat in the end.
        self._open: list[Command | list[Command]] = []
        self._commands: list[Command] = []
        self.launches: list[Launch] = []
        # Whether all that it enqueues can be captured into a graph of its own, and whether by PyTorch alone.
        self.capturable = True
        self.by_torch = False
        self._uses = 0
        self._graph: Callable[[int], None] | None = None

    def add(self, command: Command) -> None:
        """Puts a command at the end."""
        self._open.append(command)

    def place(self) -> list[Command]:
        """A place at the end that can be filled later."""
        place: list[Command] = []
        self._open.append(place)
        return place

    def close(self) -> None:
        """Makes the list flat."""
        for command in self._open:
            self._commands.extend(command if isinstance(command, list) else (command,))
        self._open = []

    def enqueue(self, stream: int, tensors: Mapping[str, torch.Tensor] = NO_TENSORS) -> None:
        """Enqueues everything; ``stream`` is the handle of the main stream, which is current.

        ``tensors``: those of this call, where the library is called with some of them.
        """
        for command in self._commands:
            command(stream, tensors)

    def run(
        self,
        stream: int,
        tensors: Mapping[str, torch.Tensor],
        spare: Callable[[], torch.cuda.Stream],
    ) -> None:
        """As :meth:`enqueue` on a stream that is not being captured; from the ``HOT``-th call on as a graph.

        ``spare()`` is a stream that nothing else uses, to capture on.
        """
        graph = self._graph
        if graph is not None:
            graph(stream)
            return
        if not self.capturable:
            for command in self._commands:
                command(stream, tensors)
            return
        self._uses += 1
        if self._uses == HOT and graphs():
            try:
                self._graph = graph = self._capture(spare(), tensors)
            except (DriverError, RuntimeError) as problem:
                # The calls are the same one by one, only slower to enqueue.
                logging.getLogger("tilelink").warning("no graph of a call: %s", problem)
        if graph is not None:
            graph(stream)
        else:
            self.enqueue(stream, tensors)

    def _capture(
        self, spare: torch.cuda.Stream, tensors: Mapping[str, torch.Tensor]
    ) -> Callable[[int], None]:
        """What launches a graph of this plan."""
        if not self.by_torch:
            graph, launch = driver().capture(spare.cuda_stream, self.enqueue), driver().launch_graph
            return lambda stream: launch(graph.handle, stream)
        # The library's products go to the current stream, and may need memory that lasts as long as the graph.
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.stream(spare):
            # PyTorch keeps the state of its random numbers with the graph, and writes to it in each replay.
            with lasting():
                captured.capture_begin(capture_error_mode="relaxed")
            try:
                self.enqueue(spare.cuda_stream, tensors)
            finally:
                captured.capture_end()
        return lambda _: captured.replay()


def rows_behind(tensor: torch.Tensor) -> int:
    """How many rows of the length of a matrix's lie behind it in memory that stays as long as the matrix does.

    What is there belongs to others, or to nobody. It may be read, and is not looked at.
    """
    if tensor.dim() != 2 or not tensor.is_contiguous():
        return 0
    pitch = tensor.shape[1] * tensor.element_size()
    if not pitch or not tensor.shape[0]:
        return 0
    # Of memory that is mapped in pieces, the piece with the last element is what counts.
    end = tensor.data_ptr() + tensor.shape[0] * pitch
    return max(0, min(MOST_BEHIND, (driver().end_of(end - 1) - end) // pitch))


def graphs() -> bool:
    """Whether plans that repeat become graphs.

    With one hardware queue the branches of a graph may enter it in any order, and a kernel that spins
    would hold up the copies behind it.
    """
    return knobs.GRAPHS.get() and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1"


class Agent:
    """Where an agent ends: its stream (None: the main one) and the place for its event."""

    def __init__(self, stream: int | None, place: list[Command]) -> None:
        self.stream = stream
        self.place = place
        self.event: Event | None = None

    def completed(self) -> Event:
        """The event of its end, recorded from now on in each call."""
        if self.event is None:
            event, stream, record = driver().event(), self.stream, driver().record
            self.event = event
            if stream is None:
                self.place.append(lambda main, _: record(event.handle, main))
            else:
                self.place.append(lambda *_: record(event.handle, stream))
        return self.event


def _nothing(target: torch.Tensor, source: torch.Tensor) -> None:
    """A collective of one rank."""


def _waiting(event: Event) -> Command:
    """The main stream waits for ``event``."""
    wait = driver().wait_event
    return lambda main, _: wait(main, event.handle)


class Recorder(Views):
    """What an emitted ``host(call)`` talks to on a GPU; ``plan`` is the result."""

    def __init__(
        self,
        *args: Any,
        streams: Callable[[str], torch.cuda.Stream],
        group: Any,
        host_record: int,
        addresses: list[int],
    ) -> None:
        super().__init__(*args)
        self.plan = Plan()
        self._streams = streams
        self._group = group
        self.host_record = host_record
        self._agents: dict[str, Agent] = {}
        self._stream: int | None = None
        self._base = self.arena.data_ptr()
        self._addresses = addresses
        self._begun = False

    def endless(self, tensor: torch.Tensor) -> torch.Tensor | Rows:
        """``tensor``, and as many of the rows behind it as a box may reach and :func:`rows_behind` finds."""
        rows = rows_behind(tensor) if knobs.READ_BEHIND.get() else 0
        return Rows(tensor, tensor.shape[0] + rows) if rows else tensor

    def head(self, ack_wait: bool = True) -> None:
        """Begins the call: epoch, arrival, counters, and the wait for the acknowledgements."""
        if not self.image.quiet:
            self._launch(compile_launch(head_kernel, 1, self.head_arguments(ack_wait), num_warps=4))
        self._end("head", None)

    def begin(self) -> None:
        """Begins a call whose launches do what the head does: streams wait until the first one has."""
        self._begun = True
        self._end("head", None)

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
        """A persistent kernel of ``workers`` CTAs on the main stream."""
        self._join_main(after)
        launch = compile_launch(
            kernel, workers, args, **self.options(kernel, num_warps, num_stages)
        )
        self.plan.launches.append(launch)
        self._launch(launch)
        self._end(name or self.next_name("launch"), None)

    def collective(
        self,
        op: str,
        src: torch.Tensor,
        dst: torch.Tensor,
        after: tuple[str, ...] = ("head",),
        name: str | None = None,
    ) -> None:
        """The library's collective along the axis on which the shapes differ, on the main stream."""
        self._join_main(after)
        ends = (dst.shape, src.shape) if op == "reduce_scatter" else (src.shape, dst.shape)
        axis = spread_axis(*ends)
        source_at, target_at = Place(src, self.tensors), Place(dst, self.tensors)
        in_place, world = src.data_ptr() == dst.data_ptr(), self.world
        enqueue = collective_of(op, self._group, dst.device) if world > 1 else _nothing

        def gather(_: int, tensors: Mapping[str, torch.Tensor]) -> None:
            source = source_at.of(tensors)
            parts = source.new_empty((world, *source.shape))
            enqueue(parts.view(-1), source.reshape(-1))
            target_at.of(tensors).copy_(torch.cat(parts.unbind(0), dim=axis))

        def scatter(_: int, tensors: Mapping[str, torch.Tensor]) -> None:
            parts = source_at.of(tensors).chunk(world, dim=axis)
            enqueue(target_at.of(tensors), torch.stack(parts))

        def apart(_: int, tensors: Mapping[str, torch.Tensor]) -> None:
            target, source = target_at.of(tensors), source_at.of(tensors)
            target.copy_(source)
            enqueue(target, source)

        if (op == "all_reduce" or world == 1) and not in_place:
            self.plan.add(apart)
        elif axis and op != "all_reduce" and world > 1:
            # The library knows the first axis only.
            self.plan.add(gather if op == "all_gather" else scatter)
        elif world > 1:
            self.plan.add(collective(op, self._group, dst.device, target_at, source_at))
        # Ranks may make graphs of different calls, but NCCL registers the buffers of captured collectives, on all
        # ranks or on none; its communicators cannot be destroyed while such a graph lives, nor does the time limit
        # of a group see replays.
        self.plan.capturable = False
        self._end(name or self.next_name("collective"), None)

    @contextlib.contextmanager
    def library(self, name: str, after: tuple[str, ...] = ("head",)) -> Iterator[Recorder]:
        """A launch that the library makes: what is called inside, one after another on the main stream."""
        self._join_main(after)
        self.plan.by_torch = True
        # Of a program that the library alone makes, one plan serves all addresses.
        self.plan.capturable &= not self.image.bare
        yield self
        self._end(name, None)

    def matmul(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """``out = a @ b + bias`` by cuBLAS; see :func:`tilelink.backend.runtime.library.matmul`."""
        left, right, into = (Place(tensor, self.tensors) for tensor in (a, b, out))
        added = None if bias is None else Place(bias, self.tensors)
        self.plan.add(product(a.dtype, left, right, into, added))

    def wait(
        self, flag: str, index: tuple[int, ...], producer: int, tile: int, number: int
    ) -> None:
        """Between products: until a flag element has this call's epoch; ``number`` is the wait's own."""
        args = self.wait_arguments(flag, index, producer, tile, number)
        self._launch(compile_launch(wait_kernel, 1, args, num_warps=4))

    def count(self, counter: str, index: tuple[int, ...]) -> None:
        """Between products: adds 1 to a local counter, behind all that came before."""
        word = self.word_of(counter, index)
        self._launch(compile_launch(notify_kernel, 1, (self.arena, word), num_warps=1))

    def acknowledge(self) -> None:
        """Behind the products: tells every rank that this one has finished reading."""
        args = self.acknowledge_arguments()
        self._launch(compile_launch(acknowledge_kernel, 1, args, num_warps=1))

    @contextlib.contextmanager
    def stream(self, name: str, after: tuple[str, ...] = ("head",)) -> Iterator[Recorder]:
        """A side stream: what is called inside is enqueued there."""
        stream, wait = self._streams(name).cuda_stream, driver().wait_event
        for other in after:
            event = self._agents[other].completed()
            self.plan.add(lambda *_, e=event: wait(stream, e.handle))
        if self._begun and "head" in after:
            begun, reached = self._base + layout.BEGUN * layout.WORD, driver().wait_geq
            self.plan.add(lambda *_: reached(stream, begun, 1))
        self._stream = stream
        yield self
        self._stream = None
        self._end(name, stream)

    def wait_counter(self, name: str, index: tuple[int, ...], count: int) -> None:
        """In a stream: until the local counter is at least ``count``."""
        handle, wait = self._handle(), driver().wait_geq
        address = self._base + self.word_of(name, index) * layout.WORD
        self.plan.add(lambda *_: wait(handle, address, count))

    def transfer(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """In a stream: copies ``src`` to ``dst``, regions of one shape and dtype, by copy engine."""
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"transfer of {src.dtype}{list(src.shape)} to {dst.dtype}{list(dst.shape)}"
            )
        handle, calls = self._handle(), driver()
        if src.numel() == 0:
            return
        source, target, item = src.data_ptr(), dst.data_ptr(), src.element_size()
        if src.is_contiguous() and dst.is_contiguous():
            size = src.numel() * item
            self.plan.add(lambda *_: calls.copy(handle, target, source, size))
            return
        while src.dim() > 2 and src.shape[0] == 1:
            src, dst = src[0], dst[0]
        if src.dim() > 2:
            for part, place in zip(src.unbind(0), dst.unbind(0), strict=True):
                self.transfer(part, place)
            return
        if src.dim() != 2 or src.stride(1) != 1 or dst.stride(1) != 1:
            raise ValueError(f"transfer between strides {src.stride()} and {dst.stride()}")
        rows, width = src.shape[0], src.shape[1] * item
        copy = rows_of(target, dst.stride(0) * item, source, src.stride(0) * item, width, rows)
        self.plan.add(lambda *_: calls.copy_rows(handle, copy))

    def notify(self, flag: str, index: tuple[int, ...], peer: int) -> None:
        """In a stream: the flag element of ``peer`` becomes this rank's epoch, by a four-byte copy."""
        handle, copy = self._handle(), driver().copy
        source = self._base + layout.EPOCH * layout.WORD
        target = self._addresses[peer] + self.word_of(flag, index) * layout.WORD
        self.plan.add(lambda *_: copy(handle, target, source, layout.WORD))

    def finish(self) -> Plan:
        """Joins the side streams, puts the guard of every output behind them, and closes the plan."""
        for name, agent in self._agents.items():
            if agent.stream is not None:
                self._join_main((name,))
        # Where nothing signals, nothing runs out and nothing is to be cleared.
        guarded = not (self.image.quiet or self.image.ended)
        for slot in self.image.outputs if guarded else ():
            self._guard(slot)
        self.plan.close()
        return self.plan

    def _guard(self, slot: Slot) -> None:
        tensor = self.tensors[slot.name]
        floating = tensor.dtype.is_floating_point
        args: tuple[object, ...] = (
            *(self.arena, self.host_record, tensor, tensor.numel(), 1024, floating),
        )
        says = bool(self.image.flags) and self.world > 1
        args += (self.peers, self.rank, self.world, says)
        args += self.image.counter_words
        self._launch(compile_launch(guard_kernel, CTAS, args, num_warps=4))

    def _launch(self, launch: Launch) -> None:
        self.plan.add(launch.run)

    def _join_main(self, after: tuple[str, ...]) -> None:
        for name in after:
            agent = self._agents[name]
            if agent.stream is not None:
                self.plan.add(_waiting(agent.completed()))

    def _end(self, name: str, stream: int | None) -> None:
        self._agents[name] = Agent(stream, self.plan.place())

    def _handle(self) -> int:
        if self._stream is None:
            raise ValueError("a transfer, notify or wait of a stream outside of one")
        return self._stream
