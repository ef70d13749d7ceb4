"""What the CUDA runtime enqueues for emitted programs, with the driver replaced by a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tilelink.backend.emit.triton import emit
from tilelink.backend.runtime import load_module, plan, write_module
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.views import TORCH_DTYPES
from tilelink.ir import layout, parse_ir

PROGRAMS = Path(__file__).parents[1] / "programs"
Log = list[tuple[Any, ...]]


class Stream:
    cuda_stream = 7

    def __init__(self, log: Log) -> None:
        self.log = log

    def wait_event(self, event: Event) -> None:
        self.log.append(("side waits", event.number))


class Event:
    made = 0

    def __init__(self, log: Log) -> None:
        Event.made += 1
        self.log, self.number = log, Event.made

    def record(self, stream: Stream | None = None) -> None:
        self.log.append(("side records" if stream else "main records", self.number))

    def wait(self) -> None:
        self.log.append(("main waits", self.number))


class Driver:
    def __init__(self, log: Log) -> None:
        self.log = log

    def wait_geq(self, stream: int, address: int, value: int) -> None:
        self.log.append(("wait", stream, address, value))

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        self.log.append(("copy", stream, target, source, size))


def record(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Log, list[torch.Tensor], torch.Tensor]:
    """The log of one call of a sample program on ``rank``, the arenas of all ranks, its workspace."""
    log: Log = []
    program = parse_ir((PROGRAMS / name).read_text())
    image = image_of(program)
    module = load_module(write_module(emit(program), image.name))

    class Launch:
        compiled = None

        def __init__(self, kernel: Any, workers: int) -> None:
            self.name, self.workers = kernel.fn.__name__, workers

        def run(self, stream: int) -> None:
            log.append(("kernel", self.name, self.workers))

    monkeypatch.setattr(
        plan, "compile_launch", lambda kernel, workers, args, **_: Launch(kernel, workers)
    )
    monkeypatch.setattr(plan, "driver", lambda: Driver(log))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
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
        group=None,
        host_record=0,
        addresses=addresses,
    )
    recorder.workspace = torch.zeros(image.workspace_bytes, dtype=torch.uint8)
    recorder.tensors = {
        s.name: torch.zeros(s.dims, dtype=TORCH_DTYPES[s.dtype]) for s in image.tensors.values()
    }
    module.host(recorder)
    recorded = recorder.finish()
    assert log == []
    recorded.enqueue(1)
    return log, arenas, recorder.workspace


def test_gather_copies_and_flags_go_to_every_peer_before_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, arenas, _ = record("ag_gemm.copy_engine.ir", 1, monkeypatch)
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


def test_scatter_stream_waits_for_its_counter_and_forks_from_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, arenas, workspace = record("gemm_rs.copy_engine.ir", 0, monkeypatch)
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
