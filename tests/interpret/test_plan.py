"""What the CUDA runtime enqueues for emitted programs, with the driver replaced by a log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.collectives import Group
from tests.dynamic import program_of
from tilelink import kernels
from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import load_module, plan, write_module
from tilelink.backend.runtime.errors import DriverError
from tilelink.backend.runtime.image import image_of
from tilelink.ir import Op, layout, parse_ir
from tilelink.schedules import default_schedule

PROGRAMS = Path(__file__).parents[1] / "programs"
Log = list[tuple[Any, ...]]
launched: list[tuple[str, tuple[Any, ...]]] = []  # kernels with their arguments, in a recording


class Stream:
    cuda_stream = 7

    def __init__(self, log: Log) -> None:
        self.log = log


class Event:
    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.handle = Event.made


class Graph:
    handle = 99


class Spare:
    cuda_stream = 5


def spare() -> Any:
    return Spare()


class Driver:
    def __init__(self, log: Log) -> None:
        self.log = log

    def end_of(self, address: int) -> int:
        return 0

    def event(self) -> Event:
        return Event()

    def record(self, event: int, stream: int) -> None:
        self.log.append(("side records" if stream == Stream.cuda_stream else "main records", event))

    def wait_event(self, stream: int, event: int) -> None:
        self.log.append(("side waits" if stream == Stream.cuda_stream else "main waits", event))

    def capture(self, stream: int, enqueue: Callable[[int], None]) -> Graph:
        self.log.append(("capture", stream))
        enqueue(stream)
        self.log.append(("captured", stream))
        return Graph()

    def launch_graph(self, graph: int, stream: int) -> None:
        self.log.append(("graph", graph, stream))

    def wait_geq(self, stream: int, address: int, value: int) -> None:
        self.log.append(("wait", stream, address, value))

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        self.log.append(("copy", stream, target, source, size))


def record(
    name: str | Op,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    extents: dict[str, int] | None = None,
    group: Any = None,
) -> tuple[plan.Plan, Log, plan.Recorder]:
    """The plan of one call of a program (or a sample's name) on ``rank``, and the log of what it enqueues."""
    log: Log = []
    program = parse_ir((PROGRAMS / name).read_text()) if isinstance(name, str) else name
    image = image_of(program)
    module = load_module(write_module(emit(program), image.name))

    class Launch:
        compiled = None

        def __init__(self, kernel: Any, workers: int, args: tuple[Any, ...]) -> None:
            self.name, self.workers = kernel.fn.__name__, workers
            launched.append((self.name, args))

        def run(self, stream: int, _: object) -> None:
            log.append(("kernel", self.name, self.workers))

    monkeypatch.setattr(
        plan, "compile_launch", lambda kernel, workers, args, **_: Launch(kernel, workers, args)
    )
    monkeypatch.setattr(plan, "driver", lambda: Driver(log))
    size = image.arena_bytes
    arenas = [torch.zeros(size, dtype=torch.uint8) for _ in range(image.world)]
    addresses = [a.data_ptr() for a in arenas]
    stream: Any = Stream(log)
    recorder = plan.Recorder(
        image,
        rank,
        arenas,
        torch.tensor(addresses),
        10.0,
        600.0,
        streams=lambda _: stream,
        group=group,
        host_record=0,
        addresses=addresses,
    )
    recorder.workspace = torch.zeros(image.workspace_bytes, dtype=torch.uint8)
    recorder.extents |= extents or {}
    recorder.tensors = {
        s.name: torch.zeros(s.dims, dtype=TORCH_DTYPES[s.dtype])
        for s in image.at(recorder.extents).values()
    }
    del launched[:]
    module.host(recorder)
    recorded = recorder.finish()
    assert log == []
    return recorded, log, recorder


def enqueued(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Log, list[torch.Tensor], torch.Tensor]:
    """The log of one call of a sample program on ``rank``, the arenas of all ranks, its workspace."""
    recorded, log, recorder = record(name, rank, monkeypatch)
    recorded.enqueue(1)
    assert recorder.workspace is not None
    return log, recorder._arenas, recorder.workspace


def test_gather_copies_and_flags_go_to_every_peer_before_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, arenas, _ = enqueued("ag_gemm.copy_engine.ir", 1, monkeypatch)
    kinds = [entry[0] for entry in log]
    assert kinds[:3] == ["kernel", "main records", "side waits"]
    assert log[0][1] == "head_kernel"
    copies = [entry for entry in log if entry[0] == "copy"]
    assert [entry[4] for entry in copies] == [16 * 32 * 2, 4] * 3
    for step, peer in enumerate((2, 3, 0)):
        data, flag = copies[2 * step : 2 * step + 2]
        assert data[2] == arenas[peer].data_ptr() + 262144 + 16 * 32 * 2
        assert flag[2] == arenas[peer].data_ptr() + 4096 + 4
        assert flag[3] == arenas[1].data_ptr() + 4 * layout.EPOCH
    # The spinning kernel comes behind the copies, the guard behind the join.
    assert kinds[-4:] == ["side records", "kernel", "main waits", "kernel"]
    assert log[-3][2] == 4
    assert log[-1][1] == "guard_kernel"


def test_streams_of_a_call_without_a_head_wait_until_its_kernel_has_begun_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kernel in ("ag_gemm", "gemm_rs"):
        made = compile_kernel(
            getattr(kernels, kernel).build({"M": 64, "K": 32, "N": 48}, world=2),
            default_schedule(
                getattr(kernels, kernel).build({"M": 64, "K": 32, "N": 48}, world=2)
            ).with_resource("copy_engine"),
        )
        recorded, log, recorder = record(made, 0, monkeypatch)
        recorded.enqueue(1)
        base = recorder._arenas[0].data_ptr()
        # Forked in front of the kernel, which needs the copies; they wait for its word before anything else.
        assert [entry[0] for entry in log[:4]] == ["main records", "kernel", "side waits", "wait"]
        assert log[3] == ("wait", 7, base + 4 * layout.BEGUN, 1)
        assert "head_kernel" not in [entry[1] for entry in log]
        assert log[-1][1] == "guard_kernel" and log[-2][0] == "main waits"


def test_scatter_stream_waits_for_its_counter_and_forks_from_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, arenas, workspace = enqueued("gemm_rs.copy_engine.ir", 0, monkeypatch)
    waits = [entry for entry in log if entry[0] == "wait"]
    base = arenas[0].data_ptr() + 131072
    assert waits == [("wait", 7, base + 4 * peer, 6) for peer in (1, 2, 3)]
    # The event of the head stands right behind it, although it is asked for after the launch.
    assert [entry[0] for entry in log[:4]] == ["kernel", "main records", "kernel", "side waits"]
    assert log[1][1] == log[3][1]
    # Slices leave from this rank's own memory for its place at each peer, the flag behind them.
    slices = [entry for entry in log if entry[0] == "copy" and entry[4] > 4]
    size = 16 * 48 * 2
    assert [(c[2], c[3], c[4]) for c in slices] == [
        (arenas[p].data_ptr() + 268288, workspace.data_ptr() + 262144 + p * size, size)
        for p in (1, 2, 3)
    ]


def test_a_call_that_repeats_becomes_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    recorded, log, recorder = record("ag_gemm.copy_engine.ir", 1, monkeypatch)
    for _ in range(plan.HOT - 1):
        recorded.run(1, recorder.tensors, spare)
    single = log[: len(log) // (plan.HOT - 1)]
    assert log == single * (plan.HOT - 1)
    del log[:]
    for _ in range(3):
        recorded.run(1, recorder.tensors, spare)
    # Captured once, on a stream of its own, with all that a call enqueues, and launched each time.
    assert log == [("capture", 5), *single, ("captured", 5), *[("graph", Graph.handle, 1)] * 3]


@pytest.mark.parametrize(
    "variable", [("TILELINK_GRAPHS", "0"), ("CUDA_DEVICE_MAX_CONNECTIONS", "1")]
)
def test_no_graph_where_it_is_not_wanted(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    recorded, log, recorder = record("ag_gemm.copy_engine.ir", 1, monkeypatch)
    for _ in range(plan.HOT + 2):
        recorded.run(1, recorder.tensors, spare)
    assert not [entry for entry in log if entry[0] in ("capture", "graph")]


def test_a_driver_that_captures_nothing_costs_the_graph_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    recorded, log, recorder = record("ag_gemm.copy_engine.ir", 1, monkeypatch)

    def refuse(self: Driver, stream: int, enqueue: Callable[[int], None]) -> Graph:
        raise DriverError(call="cuStreamBeginCapture", reason="no", help="none")

    monkeypatch.setattr(Driver, "capture", refuse)
    for _ in range(plan.HOT + 2):
        recorded.run(1, recorder.tensors, spare)
    single = log[: len(log) // (plan.HOT + 2)]
    assert log == single * (plan.HOT + 2)
    assert caplog.text.count("no graph of a call") == 1


def test_a_collective_works_on_the_tensors_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    group = Group(gather=lambda *ends: seen.append((ends[0].data_ptr(), ends[1].data_ptr())))
    recorded, log, recorder = record("ag_gemm.collective.ir", 1, monkeypatch, group=group)
    for _ in range(plan.HOT + 1):
        fresh = {name: torch.zeros_like(t) for name, t in recorder.tensors.items()}
        recorded.run(1, fresh, spare)
        assert seen[-1][1] == fresh["A"].data_ptr()
    # Where it lands is the program's own.
    assert len({target for target, _ in seen}) == 1
    assert not [entry for entry in log if entry[0] == "graph"]


@pytest.mark.parametrize("rows", [64, 20, 2])
def test_a_call_copies_as_many_rows_as_it_has(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("ag_gemm", "copy_engine")
    recorded, log, recorder = record(program, 0, monkeypatch, {"M": rows})
    recorded.enqueue(1)
    width = 32 * 4
    copies = [entry for entry in log if entry[0] == "copy"]
    base = recorder._arenas[1].data_ptr() + recorder.image.buffers["A.all"].offset
    assert [(c[2], c[4]) for c in copies if c[4] > 4] == [(base, rows // 2 * width)]
    # Flags lie where they lie for every number of rows, and the kernel tells the peers of the number.
    flag = recorder._arenas[1].data_ptr() + recorder.image.flags["A.ready"].offset
    assert [c[2] for c in copies if c[4] == 4] == [flag]
    kernel, guard = launched
    assert rows in [a for a in kernel[1] if isinstance(a, int)]
    said = (2, True, *recorder.image.counter_words)
    assert (guard[0], guard[1][-4:]) == ("guard_kernel", said)


def test_a_head_kernel_tells_the_peers_how_many_rows_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = 20
    program = program_of("ag_gemm", "copy_engine")
    heads = [op.with_attrs(folded=None) if op.name == "head" else op for op in program.body]
    _, _, recorder = record(program.with_ops(tuple(heads)), 0, monkeypatch, {"M": rows})
    recorder.head(True)
    recorder.finish()
    assert (launched[0][0], launched[0][1][-1]) == ("head_kernel", rows)
    said = (2, True, *recorder.image.counter_words)
    assert (launched[-1][0], launched[-1][1][-4:]) == ("guard_kernel", said)


def test_a_program_without_dynamic_rows_says_its_number_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, recorder = record("ag_gemm.copy_engine.ir", 1, monkeypatch)
    assert recorder.said() == 0
    assert launched[-1][1][-4:] == (4, True, *recorder.image.counter_words)
