"""The ranks of one measurement: agreement between them, barriers, and a watchdog. Needs GPUs."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch._C._distributed_c10d import _SymmetricMemory

import tilelink


class Agreement:
    """Exchange of small JSON values between ranks through a key-value store.

    Never through the GPU: a failed kernel may leave a device unusable, and a collective on it would
    hang the ranks that are well. ``store`` needs ``set(key, text)`` and ``get(key)``, which blocks
    until the key is there; ``name`` begins the keys, and is another one for every set of ranks.
    """

    def __init__(self, store: Any, rank: int, world: int, name: str = "bench") -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.name = name
        self.round = 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank."""
        self.round += 1
        prefix = f"{self.name}/{self.round}"
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

    def pause(self) -> None:
        """Until the next :meth:`beat` nothing is due: this rank waits for others at work."""
        self.last = math.inf

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


class Part:
    """Some ranks of one node, one GPU each, seen by one of them: what a measurement runs on.

    ``group`` is their process group. All methods but :meth:`settle` are collective over it.
    """

    def __init__(
        self, rank: int, world: int, device: torch.device, group: Any, agreement: Agreement
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.group, self.agreement = group, agreement
        self.group_name: Any = group.group_name
        self._memory: list[torch.Tensor] = []
        self._handle: Any = None
        if world > 1:
            # NCCL opens its channels at the first collective of each kind; not inside a measurement.
            dist.all_reduce(torch.ones(1, device=device), group=group)
            # Not through `symm_mem.empty`: blocks of its pool, and their signals, are shared by groups.
            self._pad = _SymmetricMemory.empty_strided_p2p((16,), (1,), torch.int32, device)
            self._handle = symm_mem.rendezvous(self._pad, self.group_name)
            self.meet()
        torch.cuda.synchronize()

    def meet(self) -> None:
        """A barrier of all ranks on the current stream; the host does not wait."""
        if self._handle is not None:
            self._handle.barrier(channel=0)

    def settle(self) -> None:
        """Wait for the device, and raise what a kernel of ours reported."""
        torch.cuda.synchronize()
        report = getattr(tilelink, "synchronize", None)
        if report is not None:
            report()

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, element by element."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def symmetric(self, *shape: int) -> torch.Tensor:
        """A bf16 tensor at the start of symmetric memory, the same memory in each call.

        Outgrown memory is kept: memory that one rank frees while another uses it pairs wrong blocks.
        """
        size = 2 * math.prod(shape)
        if not self._memory or self._memory[-1].numel() < size:
            # Not from the pool either: torch's all-reduces take no offset into a block.
            memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device)
            symm_mem.rendezvous(memory, self.group_name)
            self._memory.append(memory)
        return self._memory[-1][:size].view(torch.bfloat16).view(shape)


class Cluster(Part):
    """All ranks of the job, as torchrun started them."""

    def __init__(self) -> None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=10))
        self.store = dist.distributed_c10d._get_default_store()
        self._parts: dict[tuple[int, ...], Part | None] = {}
        group = dist.group.WORLD
        assert group is not None
        super().__init__(rank, world, device, group, Agreement(self.store, rank, world))

    def part(self, ranks: Sequence[int]) -> Part | None:
        """The part of ``ranks``, None on the others. Every rank of the job has to call this."""
        key = tuple(ranks)
        if key == tuple(range(self.world)):
            return self
        if key not in self._parts:
            group = dist.new_group(list(key))
            part: Part | None = None
            if self.rank in key:
                place = key.index(self.rank)
                name = "bench/" + "-".join(map(str, key))
                agreement = Agreement(self.store, place, len(key), name)
                part = Part(place, len(key), self.device, group, agreement)
            self._parts[key] = part
        return self._parts[key]


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
