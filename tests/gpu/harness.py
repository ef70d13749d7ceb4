"""Starts one process a GPU, as torchrun does, and never waits longer than it was told to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Rank:
    """What became of one rank: exit code (None: it was stopped at the time limit), output, seconds."""

    rank: int
    code: int | None
    output: str
    seconds: float


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(
    arguments: list[str],
    world: int,
    timeout: float,
    env: dict[str, str] | None = None,
    gpus: int | None = None,
) -> list[Rank]:
    """Runs ``python ARGUMENTS`` once a rank and waits at most ``timeout`` seconds for all of them.

    Once a rank has failed with an error of its own, the others get ten more seconds. Of ``gpus`` fewer than
    ranks, several share one; the driver gives each its turn, so that they wait for each other for milliseconds.
    Copies by engine can be held up so for longer than a wait may last.
    """
    port = free_port()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{r}" for r in range(world)]
        processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                "PYTHONUNBUFFERED": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % (gpus or world)),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                # Multicast objects are never needed, and can take a shared host's GPUs down.
                "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
                "NCCL_NVLS_ENABLE": "0",
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1" if gpus and gpus < world else "0",
                **(env or {}),
            }
            with logs[rank].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = started + timeout
        ended: dict[int, float] = {}
        while len(ended) < world and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic() - started
                    if (process.returncode or 0) > 0:
                        deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.02)
        for rank, process in enumerate(processes):
            if rank not in ended:
                process.kill()
                process.wait()
        return [
            Rank(
                rank,
                processes[rank].returncode if rank in ended else None,
                logs[rank].read_text(errors="replace"),
                ended.get(rank, time.monotonic() - started),
            )
            for rank in range(world)
        ]


def failures(ranks: list[Rank], killed: tuple[int, ...] = ()) -> str:
    """What went wrong, as text; empty if every rank but those killed on purpose ended with code 0."""
    bad = [r for r in ranks if r.rank not in killed and r.code != 0]
    return "\n".join(
        f"rank {r.rank}: {'time limit' if r.code is None else f'exit code {r.code}'} after "
        f"{r.seconds:.1f} s\n{r.output[-3000:]}"
        for r in bad
    )
