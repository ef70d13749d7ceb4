"""A rank dies while the others wait for it in a collective of the library: they hear of it, and go on without it.

    python -m tests.gpu.dead_collective --world 2
    python -m tests.gpu.dead_collective --world 2 --form followed
    python -m tests.gpu.dead_collective --world 2 --form graph

Processes are started here and not by torchrun, which would end all of them with the first.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

# A call alone; with one behind it that meets nobody; as a replay of a captured graph.
FORMS = ("alone", "followed", "graph")
MOST = 5.0  # seconds from the call to the error: two rounds of the watchdog, and the end of the communicator


def _part(ranks: list[int], rank: int) -> None:
    """Returns when all have come here, on rank 0, which holds the store, when all others have returned.

    A rank that ends while another is in its last call is a death in a collective like any other.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set(f"here/{rank}", "")
    store.wait([f"here/{one}" for one in ranks])
    store.set(f"left/{rank}", "")
    if rank == 0:
        store.wait([f"left/{one}" for one in ranks])


def rank_main(world: int, form: str) -> int:
    """One rank: some calls of which nothing is wrong, then one that the last rank does not live to make."""
    import torch
    import torch.distributed as dist

    import tilelink
    from tilelink import kernels
    from tilelink.schedules import Move, Schedule

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    schedule = Schedule(emitter="library", moves=(("A", Move("none")),))
    call = kernels.ag_gemm.on(group=dist.group.WORLD, schedule=schedule)
    a = torch.full((64, 256), float(rank + 1), device="cuda", dtype=torch.bfloat16)
    b = torch.eye(256, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        out = call(a, b)
    tilelink.synchronize()
    wanted = (
        torch.arange(1, world + 1, device="cuda").repeat_interleave(64)[:, None].expand(-1, 256)
    )
    assert torch.equal(out.float(), wanted.float())
    local = kernels.gemm.on(group=dist.group.WORLD)
    local(a, b)
    graph = torch.cuda.CUDAGraph()
    if form == "graph":
        with torch.cuda.graph(graph):
            out = call(a, b)
        out.zero_()
        graph.replay()
        tilelink.synchronize()
        assert torch.equal(out.float(), wanted.float())
    dist.barrier()
    torch.cuda.synchronize()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    since = time.monotonic()
    if form == "graph":
        graph.replay()
    else:
        call(a, b)
    if form == "followed":
        local(a, b)
    try:
        tilelink.synchronize()
    except tilelink.WaitTimeout as error:
        took = time.monotonic() - since
        print(f"rank {rank}: after {took:.2f} s: {str(error).splitlines()[0]}", flush=True)
        wrong = took > MOST
    else:
        print(f"rank {rank}: the call passed", flush=True)
        wrong = True
    try:
        call(a, b)
    except tilelink.WaitTimeout:
        pass
    else:
        print(f"rank {rank}: a later call was not refused", flush=True)
        wrong = True
    # The context is as good as before.
    wrong = wrong or float(torch.ones(8, device="cuda").sum()) != 8.0
    if world > 2:
        fresh = tilelink.recover(dist.group.WORLD)
        again = kernels.ag_gemm.on(group=fresh, schedule=schedule)(a, b)
        tilelink.synchronize()
        wrong = wrong or not torch.equal(again.float(), wanted[: again.shape[0]].float())
        _part(list(range(world - 1)), rank)
    print(f"rank {rank}: {'WRONG' if wrong else 'right'}", flush=True)
    sys.stdout.flush()
    # Exit handlers would wait for the dead rank.
    os._exit(int(wrong))


def main() -> int:
    """Starts the ranks; 1 unless all but the last, which is killed, find all as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, default=FORMS[0])
    given = parser.parse_args()
    world: int = given.world
    if "RANK" in os.environ:
        return rank_main(world, given.form)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    quiet = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    module = ["-m", "tests.gpu.dead_collective", "--world", str(world), "--form", given.form]
    command = [sys.executable, *module]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **quiet, **common, "RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=120) for process in ranks]
    except subprocess.TimeoutExpired:
        print("a rank hangs", flush=True)
        codes = []
    finally:
        for process in ranks:
            process.kill()
    good = codes == [0] * (world - 1) + [-signal.SIGKILL]
    print("passed" if good else f"FAILED: exit codes {codes}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
