"""How many bytes a second leave a GPU for its peers, by who moves them and who sends to whom.

    torchrun --nproc-per-node 4 bench/links.py --out bench/results/links_h200x4.json

Every rank has a block for each of its peers. Patterns: ``pair``: rank 0 sends to rank 1, the others rest;
``both``: ranks 0 and 1 send to each other; ``shift``: all ranks send to the next rank, then to the one behind
it, and so on; ``exchange``: all ranks send to the rank whose number differs in one set of bits, then in another
(of a power of two of ranks); ``mix``: pieces for all peers alternate. Movers: ``copy``: the copy engine, a copy a
block; ``copies``: the same on a stream for each peer; ``boxes N``: N CTAs with TMA loads and stores of 128 x 64
elements; ``stores N``: N CTAs with loads and stores by addresses. Beside a product: while cuBLAS multiplies.
Microseconds are the median of rounds, the largest over the ranks; each is the mean of several passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl

from bench import environment
from bench.cluster import Cluster, Watchdog, run_all_or_none

ROWS, COLUMNS = 2048, 4096  # of a block, bf16: 16 MiB
BOX = (128, 64)
MOST_PEERS = 7
PASSES, ROUNDS, SKIPPED = 3, 12, 2
SLEEP = 400_000  # cycles that the GPU rests while the host enqueues a measurement


@triton.jit  # type: ignore[untyped-decorator]
def _boxes(  # type: ignore[no-untyped-def]
    source,
    a,
    b,
    c,
    d,
    e,
    f,
    g,
    turns,
    count,
    BOX_ROWS: tl.constexpr,
    BOX_COLUMNS: tl.constexpr,
    columns,
):
    target = (a, b, c, d, e, f, g)
    # Box number q of a block goes to one peer; ``turns`` peers alternate.
    for q in tl.range(tl.program_id(0), count * turns, tl.num_programs(0)):
        which, place = q % turns, q // turns
        row = place // (columns // BOX_COLUMNS) * BOX_ROWS
        column = place % (columns // BOX_COLUMNS) * BOX_COLUMNS
        tile = source.load([row, column])
        for peer in tl.static_range(len(target)):
            if which == peer:
                target[peer].store([row, column], tile)


@triton.jit  # type: ignore[untyped-decorator]
def _stores(  # type: ignore[no-untyped-def]
    source,
    a,
    b,
    c,
    d,
    e,
    f,
    g,
    turns,
    count,
    BOX_ROWS: tl.constexpr,
    BOX_COLUMNS: tl.constexpr,
    columns,
):
    target = (a, b, c, d, e, f, g)
    for q in tl.range(tl.program_id(0), count * turns, tl.num_programs(0)):
        which, place = q % turns, q // turns
        row = place // (columns // BOX_COLUMNS) * BOX_ROWS + tl.arange(0, BOX_ROWS)
        column = place % (columns // BOX_COLUMNS) * BOX_COLUMNS + tl.arange(0, BOX_COLUMNS)
        offsets = row[:, None] * columns + column[None, :]
        tile = tl.load(source + offsets)
        for peer in tl.static_range(len(target)):
            if which == peer:
                tl.store(target[peer] + offsets, tile)


def phases(pattern: str, rank: int, world: int) -> list[list[int]]:
    """The peers that ``rank`` sends a block to, at the same time in one phase; phases follow each other."""
    if pattern == "pair":
        return [[1]] if rank == 0 else []
    if pattern == "both":
        return [[1 - rank]] if rank < 2 else []
    if pattern == "shift":
        return [[(rank + by) % world] for by in range(1, world)]
    if pattern == "exchange":
        return [[rank ^ by] for by in range(1, world)]
    return [[(rank + by) % world for by in range(1, world)]]


class Sender:
    """This rank's blocks, and where they go."""

    def __init__(self, cluster: Cluster) -> None:
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric

        self.rank, world = cluster.rank, cluster.world
        shape = [world * ROWS, COLUMNS]
        self.room = symmetric.empty(*shape, dtype=torch.bfloat16, device=torch.device("cuda"))
        handle = symmetric.rendezvous(self.room, dist.distributed_c10d._get_default_group())
        self.block = torch.randn(ROWS, COLUMNS, device="cuda").bfloat16()
        places = slice(self.rank * ROWS, (self.rank + 1) * ROWS)
        self.there = [handle.get_buffer(p, shape, torch.bfloat16)[places] for p in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]  # type: ignore[no-untyped-call]

    def copy(self, peers: list[int], several: bool) -> None:
        """Blocks by the copy engine: one behind the other, or each on a stream of its own."""
        main = torch.cuda.current_stream()
        for peer in peers:
            stream = self.streams[peer] if several else main
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                self.there[peer].copy_(self.block)
        for peer in peers:
            main.wait_stream(self.streams[peer])

    def push(self, peers: list[int], ctas: int, boxes: bool) -> None:
        """Blocks by CTAs."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        def whole(tensor: torch.Tensor) -> Any:
            return TensorDescriptor.from_tensor(tensor, list(BOX)) if boxes else tensor

        count = (ROWS // BOX[0]) * (COLUMNS // BOX[1])
        # The kernels have parameters for seven peers.
        target = [
            whole(self.there[peer]) for peer in (*peers, *[peers[0]] * (MOST_PEERS - len(peers)))
        ]
        kernel: Any = _boxes if boxes else _stores
        kernel[(ctas,)](whole(self.block), *target, len(peers), count, *BOX, COLUMNS, num_warps=4)


def movers(sender: Sender) -> dict[str, Callable[[list[int]], None]]:
    """Who can move the bytes, by name."""
    found: dict[str, Callable[[list[int]], None]] = {
        "copy": lambda peers: sender.copy(peers, False),
        "copies": lambda peers: sender.copy(peers, True),
    }
    for ctas in (8, 16, 32, 132):
        found[f"boxes {ctas}"] = lambda peers, n=ctas: sender.push(peers, n, True)  # type: ignore[misc]
    for ctas in (32, 132):
        found[f"stores {ctas}"] = lambda peers, n=ctas: sender.push(peers, n, False)  # type: ignore[misc]
    return found


def measure(cluster: Cluster, watchdog: Watchdog) -> list[dict[str, Any]]:
    """A row for each pattern, mover, and whether a product runs beside it."""
    sender = Sender(cluster)
    world, rank = cluster.world, cluster.rank
    patterns = ["pair", "both", "shift", "mix"] + ["exchange"] * (world & (world - 1) == 0)
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    rows: list[dict[str, Any]] = []
    cases = [
        (pattern, name, move, beside)
        for pattern in patterns
        for name, move in movers(sender).items()
        for beside in ((False, True) if pattern in ("shift", "mix") else (False,))
        if name != "copies" or pattern == "mix"
    ]
    for pattern, name, move, beside in cases:
        times = []
        for _ in range(ROUNDS):
            start, stop = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            cluster.meet()
            torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
            main = torch.cuda.current_stream()
            if beside:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    for _ in range(8):
                        torch.mm(a, b, out=out)
            start.record()
            for _ in range(PASSES):
                for peers in phases(pattern, rank, world):
                    move(peers)
            stop.record()
            torch.cuda.synchronize()
            times.append(torch.tensor(start.elapsed_time(stop) * 1e3 / PASSES))
        watchdog.beat(f"{pattern} {name}")
        largest = cluster.largest(torch.stack(times).cuda())[SKIPPED:].tolist()
        blocks = sum(map(len, phases(pattern, 0, world)))
        us = statistics.median(largest)
        rows.append(
            {
                "pattern": pattern,
                "mover": name,
                "beside_product": beside,
                "bytes": blocks * ROWS * COLUMNS * 2,
                "us": round(us, 2),
                "gb_per_s": round(blocks * ROWS * COLUMNS * 2 / us / 1e3, 1),
                "samples_us": [round(x, 2) for x in largest],
            }
        )
    return rows


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the raw JSON")
    parser.add_argument("--watchdog", type=float, default=60, help="seconds without progress")
    options = parser.parse_args()
    environment.prepare()
    cluster = Cluster()
    watchdog = Watchdog(options.watchdog, lambda why: print(f"stopped: {why}", flush=True))
    rows = measure(cluster, watchdog)
    if cluster.rank == 0:
        data = {"kind": "links", **environment.describe(cluster.world), "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            beside = "beside a product" if row["beside_product"] else ""
            print(
                f"{row['pattern']:9}{row['mover']:12}{beside:18}{row['us']:9.1f} us"
                f"{row['gb_per_s']:8.1f} GB/s",
                flush=True,
            )
    cluster.agreement.gather(None)
    return 0


if __name__ == "__main__":
    run_all_or_none(main)
