"""Gluon kernels of all ranks on one GPU, agent by agent: numbers, and what a wait does that runs out.

    python -m tests.gpu.roles --out FILE

The arenas of all ranks are tensors of this process, and each agent runs on every rank before the next one
does, all ranks beside each other, so every wait finds what it waits for. Data are small integers: results
are those of the reference, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.roles import CASES, WORLD, Case
from tilelink.backend.dtypes import TORCH_DTYPES
from tilelink.backend.emit.triton import emit
from tilelink.backend.runtime import load_module, write_module
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.views import Views
from tilelink.ir import Op, layout


class Rank(Views):
    """One rank's host program, recorded: a function an agent."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.agents: list[Callable[[], None]] = []
        self.copies: list[Callable[[], Any]] = []
        self.counts = False  # whether a stream waits for a kernel

    def head(self, ack_wait: bool = True) -> None:
        """The epoch, arrivals and counters."""
        first, last = self.image.counter_words

        def run() -> None:
            self.arena[layout.EPOCH] += 1
            for arena in self._arenas:
                arena.view(torch.int32)[layout.ARRIVED + self.rank] = self.arena[layout.EPOCH]
            self.arena[first:last] = 0
            self.arena[layout.EXITED] = 0

        self.agents = [run]

    def begin(self) -> None:
        """What the streams of a call copy, whose kernels begin it."""

        def run() -> None:
            self.arena[layout.EPOCH] = self.arena[layout.ENDED] + 1

        self.agents = [run]

    def guard(self) -> None:
        """What ends a call that its kernel does not end."""
        if self.image.ended:
            return
        first, last = self.image.counter_words
        self.arena[first:last] = 0
        self.arena[layout.BEGUN] = 0
        self.arena[layout.ENDED] = self.arena[layout.EPOCH]

    @contextlib.contextmanager
    def stream(self, name: str, after: tuple[str, ...]) -> Iterator[None]:
        """Copies, one after the other."""
        self.copies = []
        yield
        copies = self.copies

        def run() -> None:
            for copy in copies:
                copy()

        # Agents run one after the other here: what waits for no kernel comes before it.
        self.agents.insert(len(self.agents) if self.counts else 1, run)

    def transfer(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """A copy."""
        self.copies.append(lambda: target.copy_(source))

    def notify(self, flag: str, index: tuple[int, ...], peer: int) -> None:
        """A flag of a peer."""
        word = self.word_of(flag, index)
        there = self._arenas[peer].view(torch.int32)
        self.copies.append(lambda: there[word : word + 1].copy_(self.arena[:1]))

    def wait_counter(self, name: str, index: tuple[int, ...], count: int) -> None:
        """A counter that the launch before has completed."""
        word = self.word_of(name, index)
        self.counts = True

        def wait() -> None:
            seen = int(self.arena[word])
            assert seen == count, f"{name}{list(index)} of rank {self.rank} is {seen}, not {count}"

        self.copies.append(wait)

    def launch(
        self, kernel: Any, workers: int, args: tuple[Any, ...], num_warps: int, num_stages: int,
        after: tuple[str, ...],
    ) -> None:  # fmt: skip
        """A kernel."""
        run = kernel[(workers,)]
        self.agents.append(lambda: run(*args, num_warps=num_warps, num_stages=num_stages))


def ranks_of(program: Op, tensors: dict[str, list[torch.Tensor]], limit: float) -> list[Rank]:
    """Host programs of all ranks over memory of this GPU; ``limit`` of a wait, in seconds."""
    image = image_of(program)
    module = load_module(write_module(emit(program), image.name))
    arenas = [
        torch.zeros(max(image.arena_bytes, 1), dtype=torch.uint8, device="cuda")
        for _ in range(WORLD)
    ]
    table = torch.tensor([a.data_ptr() for a in arenas], dtype=torch.int64, device="cuda")
    found = []
    for number in range(WORLD):
        rank = Rank(image, number, arenas, table, limit, limit)
        rank.workspace = torch.zeros(
            max(image.workspace_bytes, 1), dtype=torch.uint8, device="cuda"
        )
        rank.tensors = {n: t[number].cuda() for n, t in tensors.items()}
        for slot in image.tensors.values():
            if slot.name not in rank.tensors:
                empty = torch.full(slot.dims, float("nan"), dtype=TORCH_DTYPES[slot.dtype])
                rank.tensors[slot.name] = empty.cuda()
        module.host(rank)
        found.append(rank)
    return found


def numbers(case: Case) -> dict[str, Any]:
    """Three calls of a case against the reference."""
    tensors = case.tensors()
    program = case.program(tensors)
    fixed = {n: v for n, v in case.options if n == "nk"}
    wanted = case.kernel.on("reference", world=WORLD)(**tensors, **fixed)
    ranks = ranks_of(program, tensors, 10.0)
    (output,) = [s.name for s in ranks[0].image.outputs]
    wrong = 0
    streams = [torch.cuda.Stream() for _ in ranks]  # type: ignore[no-untyped-call]
    for _ in range(3):
        for rank in ranks:
            rank.tensors[output].fill_(float("nan"))
        torch.cuda.synchronize()
        for number in range(len(ranks[0].agents)):
            # A folded sum waits for parts that kernels of the other ranks store meanwhile.
            for rank, stream in zip(ranks, streams, strict=True):
                with torch.cuda.stream(stream):
                    rank.agents[number]()
            torch.cuda.synchronize()
        for rank in ranks:
            rank.guard()
        wrong += sum(
            not torch.equal(rank.tensors[output].cpu(), want)
            for rank, want in zip(ranks, wanted, strict=True)
        )
        if any(int(rank.arena[layout.RECORD]) for rank in ranks):
            return {"wrong": -1, "record": ranks[0].arena[16:32].tolist()}
    return {"wrong": wrong}


def lost(limit: float = 0.5) -> dict[str, Any]:
    """A signal that never comes: every role ends, a record says who waited for what."""
    case = CASES[2]
    tensors = case.tensors()
    ranks = ranks_of(case.program(tensors), tensors, limit)
    for rank in ranks:
        rank.agents[0]()
    torch.cuda.synchronize()
    start = time.perf_counter()
    ranks[1].agents[-1]()
    torch.cuda.synchronize()
    record = ranks[1].arena[layout.RECORD : layout.RECORD + layout.RECORD_WORDS].tolist()
    told = all(int(rank.arena[layout.ABORT]) == 1 for rank in ranks)
    return {"seconds": round(time.perf_counter() - start, 2), "record": record, "told": told,
            "wrong": int(not (record[0] == 1 and record[1] == 1 and told))}  # fmt: skip


def main() -> None:
    """Runs all cases, prints a line each, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    # The kernel of a folded sum waits for copies of other ranks that are made beside it.
    for case in (c for c in CASES if (c.resource, c.sum) != ("copy_engine", "epilogue")):
        where = {
            "case": case.name,
            "resource": case.resource,
            "shape": case.shape,
            "tile": case.tile,
        }
        try:
            found.append({**where, **numbers(case)})
        except Exception as error:
            found.append({**where, "wrong": -2, "error": f"{type(error).__name__}: {error}"[:600]})
        print(found[-1], flush=True)
        args.out.write_text(json.dumps({"kind": "gluon_roles", "cases": found}))
    found.append({"case": "a signal that is lost", **lost()})
    print(found[-1], flush=True)
    args.out.write_text(json.dumps({"kind": "gluon_roles", "cases": found}))
    sys.exit(any(one["wrong"] for one in found))


if __name__ == "__main__":
    main()
