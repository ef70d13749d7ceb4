"""The few CUDA driver calls that PyTorch does not offer, through ctypes on libcuda.

All are enqueued on a stream given by its handle and may be captured into a graph; the ``_v2`` form of
the stream wait is the one that a capture turns into a memory-operation node.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int, c_size_t, c_uint, c_uint32, c_void_p

from tilelink.backend.runtime.errors import DriverError, Unavailable

_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(*addr - value) >= 0
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED
_CAPTURE_UNSUPPORTED = 900
_CAPTURE_IMPLICIT = 906


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("srcXInBytes", c_size_t),
        ("srcY", c_size_t),
        ("srcMemoryType", c_uint),
        ("srcHost", c_void_p),
        ("srcDevice", c_void_p),
        ("srcArray", c_void_p),
        ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t),
        ("dstY", c_size_t),
        ("dstMemoryType", c_uint),
        ("dstHost", c_void_p),
        ("dstDevice", c_void_p),
        ("dstArray", c_void_p),
        ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    )


class Driver:
    """libcuda with argument types set; a call that fails raises DriverError."""

    def __init__(self) -> None:
        try:
            lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unavailable(backend="cuda", reason=str(error)) from None
        self._lib = lib
        self._wait = lib.cuStreamWaitValue32_v2
        self._wait.argtypes = (c_void_p, c_void_p, c_uint32, c_uint)
        self._copy = lib.cuMemcpyAsync
        self._copy.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p)
        self._copy2d = lib.cuMemcpy2DAsync_v2
        self._copy2d.argtypes = (ctypes.POINTER(_Copy2D), c_void_p)
        self._record = lib.cuEventRecord
        self._record.argtypes = (c_void_p, c_void_p)
        self._wait_event = lib.cuStreamWaitEvent
        self._wait_event.argtypes = (c_void_p, c_void_p, c_uint)
        self._query = lib.cuEventQuery
        self._query.argtypes = (c_void_p,)
        self._capturing = lib.cuStreamIsCapturing
        self._capturing.argtypes = (c_void_p, ctypes.POINTER(c_int))
        self._launch_graph = lib.cuGraphLaunch
        self._launch_graph.argtypes = (c_void_p, c_void_p)
        lib.cuEventCreate.argtypes = (ctypes.POINTER(c_void_p), c_uint)
        lib.cuEventDestroy_v2.argtypes = (c_void_p,)
        lib.cuStreamBeginCapture_v2.argtypes = (c_void_p, c_uint)
        lib.cuStreamEndCapture.argtypes = (c_void_p, ctypes.POINTER(c_void_p))
        lib.cuGraphInstantiateWithFlags.argtypes = (
            ctypes.POINTER(c_void_p),
            c_void_p,
            ctypes.c_ulonglong,
        )
        lib.cuGraphDestroy.argtypes = (c_void_p,)
        lib.cuGraphExecDestroy.argtypes = (c_void_p,)
        self._exchange = lib.cuThreadExchangeStreamCaptureMode
        self._exchange.argtypes = (ctypes.POINTER(c_uint),)
        self._range = lib.cuMemGetAddressRange_v2
        self._range.argtypes = (
            ctypes.POINTER(c_void_p),
            ctypes.POINTER(c_size_t),
            c_void_p,
        )
        self._occupancy = lib.cuOccupancyMaxActiveBlocksPerMultiprocessor
        self._occupancy.argtypes = (ctypes.POINTER(c_int), c_void_p, c_int, c_size_t)

    def wait_geq(self, stream: int, address: int, value: int) -> None:
        """The stream goes on once the int32 at ``address`` is, cyclically, at least ``value``."""
        code = self._wait(stream, address, value & 0xFFFFFFFF, _GEQ)
        if code:
            self._fail("cuStreamWaitValue32", code)

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        """Copies ``size`` bytes between addresses of this process, on any GPUs."""
        code = self._copy(target, source, size, stream)
        if code:
            self._fail("cuMemcpyAsync", code)

    def copy_rows(self, stream: int, rows: _Copy2D) -> None:
        """A strided copy made by :func:`rows_of`."""
        code = self._copy2d(ctypes.byref(rows), stream)
        if code:
            self._fail("cuMemcpy2DAsync", code)

    def event(self) -> Event:
        """A new event, without time."""
        handle = c_void_p()
        self._check("cuEventCreate", self._lib.cuEventCreate(ctypes.byref(handle), _NO_TIMING))
        return Event(self, handle.value or 0)

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream has been given so far."""
        code = self._record(event, stream)
        if code:
            self._fail("cuEventRecord", code)

    def wait_event(self, stream: int, event: int) -> None:
        """What the stream is given from now on comes behind the event."""
        code = self._wait_event(stream, event, 0)
        if code:
            self._fail("cuStreamWaitEvent", code)

    def completed(self, event: int) -> bool:
        """Whether all that the event stands for has ended; true where it was never recorded."""
        code = self._query(event)
        if code not in (0, _NOT_READY):
            self._fail("cuEventQuery", code)
        return bool(code == 0)

    def capturing(self, stream: int) -> bool:
        """Whether the stream is being captured into a graph, or another one that it would wait for."""
        status = c_int()
        code = self._capturing(stream, ctypes.byref(status))
        if code not in (0, _CAPTURE_IMPLICIT):
            self._fail("cuStreamIsCapturing", code)
        return bool(code) or status.value != 0

    def capture(self, stream: int, enqueue: Callable[[int], None]) -> Graph:
        """What ``enqueue(stream)`` enqueues, as a graph that can be launched; nothing of it runs.

        ``stream`` is one that nobody else uses. Side streams that ``enqueue`` forks off must be joined.
        """
        lib, graph, ready = self._lib, c_void_p(), c_void_p()
        # Relaxed: what this thread queries meanwhile is its own business.
        code = lib.cuStreamBeginCapture_v2(stream, _RELAXED)
        self._check("cuStreamBeginCapture", code)
        try:
            enqueue(stream)
        except BaseException:
            # Ends the capture; the graph is of no use.
            lib.cuStreamEndCapture(stream, ctypes.byref(graph))
            if graph.value:
                lib.cuGraphDestroy(graph)
            raise
        self._check("cuStreamEndCapture", lib.cuStreamEndCapture(stream, ctypes.byref(graph)))
        try:
            code = lib.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, 0)
            self._check("cuGraphInstantiate", code)
        finally:
            lib.cuGraphDestroy(graph)
        return Graph(self, ready.value or 0)

    def launch_graph(self, graph: int, stream: int) -> None:
        """Enqueues a graph of :meth:`capture`."""
        code = self._launch_graph(graph, stream)
        if code:
            self._fail("cuGraphLaunch", code)

    def relax_capture(self) -> None:
        """Lets this thread query events while another one captures a graph."""
        code = self._exchange(ctypes.byref(c_uint(_RELAXED)))
        if code:
            self._fail("cuThreadExchangeStreamCaptureMode", code)

    def resident(self, function: int, threads: int, shared: int) -> int:
        """CTAs of ``function`` that fit on one SM at a time."""
        blocks = c_int()
        code = self._occupancy(ctypes.byref(blocks), function, threads, shared)
        if code:
            self._fail("cuOccupancyMaxActiveBlocksPerMultiprocessor", code)
        return blocks.value

    def end_of(self, address: int) -> int:
        """Where the memory ends that was allocated, or mapped, in one piece with ``address``; 0 if nobody knows.

        All of it stays as long as something in it is in use.
        """
        base, size = c_void_p(), c_size_t()
        code = self._range(ctypes.byref(base), ctypes.byref(size), address)
        return 0 if code else (base.value or 0) + size.value

    def _check(self, call: str, code: int) -> None:
        if code:
            self._fail(call, code)

    def _fail(self, call: str, code: int) -> None:
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"").decode() or "unknown error"
        help = "the error may come from an earlier call; set CUDA_LAUNCH_BLOCKING=1 to find it"
        if code == _CAPTURE_UNSUPPORTED:
            help = (
                "this driver cannot capture it into a graph: use a schedule without `copy_engine`"
            )
        raise DriverError(call=call, reason=f"{reason} ({code})", help=help)


class Event:
    """An event of the driver; ``handle`` is what its calls take. Destroyed with this object."""

    __slots__ = ("_driver", "handle")

    def __init__(self, driver: Driver, handle: int) -> None:
        self._driver, self.handle = driver, handle

    def __del__(self) -> None:
        self._driver._lib.cuEventDestroy_v2(self.handle)


class Graph:
    """A graph that can be launched; ``handle`` is what its launch takes. Destroyed with this object.

    The driver keeps what a launch that is under way still needs.
    """

    __slots__ = ("_driver", "handle")

    def __init__(self, driver: Driver, handle: int) -> None:
        self._driver, self.handle = driver, handle

    def __del__(self) -> None:
        self._driver._lib.cuGraphExecDestroy(self.handle)


def rows_of(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
) -> _Copy2D:
    """A copy of ``rows`` rows of ``width`` bytes, ``*_pitch`` bytes apart."""
    return _Copy2D(
        srcMemoryType=_UNIFIED,
        srcDevice=source,
        srcPitch=source_pitch,
        dstMemoryType=_UNIFIED,
        dstDevice=target,
        dstPitch=target_pitch,
        WidthInBytes=width,
        Height=rows,
    )


@functools.cache
def driver() -> Driver:
    """libcuda, loaded once."""
    return Driver()
