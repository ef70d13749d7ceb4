"""The MLP of Llama-3-8B, tensor-parallel over four ranks, fused and simulated on this CPU.

    down(silu(x @ gate) * (x @ up)),  hidden 4096, intermediate 14336, 512 tokens, bf16

Each rank holds 128 of the tokens and a quarter of every weight. The first kernel gathers the tokens
while it multiplies; the second sums over the ranks and scatters the tokens while it multiplies. For
each: what was compiled and proven, the error against the reference, and the timeline that the model of
a machine with H200 GPUs predicts. For the second also what the copy engine would take: with so few
tokens, stores that go straight to their rank are ahead of it.
"""

import os
import sys
import time

import torch

from tilelink.backend import reference, simulate
from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import verify
from tilelink.kernels import ag_gemm_swiglu, gemm_rs
from tilelink.schedules import default_schedule
from tilelink.schedules.machine import Machine

WORLD = 4
TOKENS, HIDDEN, INTERMEDIATE = 512, 4096, 14336
PART = INTERMEDIATE // WORLD
LIMIT = TOLERANCE["bf16"]


def run(kernel, extents, inputs, other=None):
    """Compiles, proves, simulates and checks one kernel; returns its output and the worst error."""
    machine = Machine.load()
    op = kernel.build(extents, world=WORLD, scalars={"nk": True})
    schedule = default_schedule(op)
    program = run_passes(op, schedule)
    report = verify(program)
    print(f"\n{kernel.name}: {', '.join(f'{n}={v}' for n, v in extents.items())}")
    print(
        f"  compiled   {report.tiles} tiles, {report.channels} channels, {report.waits} waits, "
        f"{report.notifies} notifies, {report.workspace_bytes / 2**20:.1f} MiB of workspace a rank"
    )
    print(f"  proven     {', '.join(report.rules)}")
    outputs = [rank["C"] for rank in simulate.run(program, inputs)]
    expected = [rank["C"] for rank in reference.run(op, inputs)]
    error = max(map(relative_error, outputs, expected))
    print(f"  correct    relative error {error:.1e} against the reference (limit {LIMIT:.0e})")
    timeline = simulate.timeline(program, machine)
    if other is not None:
        changed = simulate.timeline(run_passes(op, schedule.with_resource(other)), machine)
        chosen = schedule.moves[0][1].resource
        print(
            f"  predicted  {timeline.makespan:.0f} us with {chosen}, "
            f"{changed.makespan:.0f} us with {other}"
        )
    print(timeline.render(100))
    return outputs, error


def random(*shape, scale=1.0):
    """A bf16 tensor of normal numbers."""
    return torch.normal(0.0, scale, shape).to(torch.bfloat16)


def main():
    """Both kernels, the second on what the first computed; 1 if a result is wrong."""
    start = time.perf_counter()
    torch.manual_seed(0)
    # Threads of a matrix product spin while they wait, which is slow where cores are shared.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    print(f"MLP of Llama-3-8B: {TOKENS} tokens, tensor-parallel over {WORLD} ranks, bf16")
    hidden, first = run(
        ag_gemm_swiglu,
        {"M": TOKENS, "K": HIDDEN, "N": PART},
        [
            {
                "A": random(TOKENS // WORLD, HIDDEN),
                "Wg": random(PART, HIDDEN, scale=0.02),
                "Wu": random(PART, HIDDEN, scale=0.02),
            }
            for _ in range(WORLD)
        ],
    )
    _, second = run(
        gemm_rs,
        {"M": TOKENS, "K": PART, "N": HIDDEN},
        [{"A": part, "B": random(HIDDEN, PART, scale=0.02)} for part in hidden],
        other="copy_engine",
    )
    print(f"\n{time.perf_counter() - start:.1f} s on this CPU")
    return int(max(first, second) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
