"""The ranks of one measurement: agreement between them, barriers, and a watchdog."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

import tilelink


class Agreement:
    """Exchange of small JSON values between ranks through a key-value store.

    Never through the GPU: a failed kernel may leave a device unusable, and a collective on it would
    hang the ranks that are well. ``store`` needs ``set(key, text)`` and ``get(key)``, which blocks
    until the key is there.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.round = 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank."""
        self.round += 1
        prefix = f"bench/{self.round}"
        self.store.set(f"{prefix}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{prefix}/{rank}")) for rank in range(self.world)]

    def first(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.gather(value if self.rank == 0 else None)[0]

    def errors(self, mine: dict[str, str]) -> dict[str, str]:
        """The errors of all ranks by name, each with the lowest rank that met it in front."""
        merged: dict[str, str] = {}
        for rank, errors in enumerate(self.gather(mine)):
            for name, text in errors.items():
                merged.setdefault(name, f"rank {rank}: {text}")
        return merged


class Watchdog:
    """Ends the process when it stops making progress: a hung GPU can be left in no other way."""

    def __init__(self, seconds: float, rescue: Callable[[str], None]) -> None:
        self.seconds = seconds
        self.rescue = rescue
        self.doing = "start"
        self.last = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, doing: str) -> None:
        """Says that progress was made, and what comes next."""
        self.doing = doing
        self.last = time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 10))
            if time.monotonic() - self.last > self.seconds:
                reason = f"no progress for {self.seconds:.0f} s in: {self.doing}"
                print(f"watchdog: {reason}", file=sys.stderr, flush=True)
                try:
                    self.rescue(reason)
                finally:
                    os._exit(1)


class Cluster:
    """This process's place among the ranks of one node, one GPU each."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        dist.init_process_group("nccl", device_id=self.device, timeout=timedelta(minutes=10))
        store = dist.distributed_c10d._get_default_store()
        self.agreement = Agreement(store, self.rank, self.world)
        self.group = dist.group.WORLD
        assert self.group is not None
        self.group_name = self.group.group_name
        # NCCL opens its channels at the first collective of each kind; not inside a measurement.
        self._one = torch.ones(1, device=self.device)
        dist.all_reduce(self._one)
        pad = symm_mem.empty(16, dtype=torch.int32, device=self.device)
        self._handle = symm_mem.rendezvous(pad, self.group_name)
        self._pad = pad
        self.meet()
        torch.cuda.synchronize()

    def meet(self) -> None:
        """A barrier of all ranks on the current stream; the host does not wait."""
        self._handle.barrier(channel=0)

    def settle(self) -> None:
        """Wait for the device, and raise what a kernel of ours reported."""
        torch.cuda.synchronize()
        report = getattr(tilelink, "synchronize", None)
        if report is not None:
            report()

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, element by element; collective."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values


def describe_error(error: BaseException) -> str:
    """Type and message on one line, at most 400 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost with ``error``: nothing more can run on this rank."""
    if not isinstance(error, RuntimeError) or "CUDA error" not in str(error):
        return False
    try:
        # A lost context gives its error again; a refused call or a failed capture does not.
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def leave(code: int) -> None:
    """Ends the process at once: exit handlers of NCCL and of graphs may wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_all_or_none(main: Callable[[], int]) -> None:
    """Runs ``main`` and ends the process: an exception on one rank ends the launch of all."""
    try:
        leave(main())
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        leave(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
