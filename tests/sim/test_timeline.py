"""The virtual clock against hand arithmetic and against what was measured on the machine."""

import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.programs import NAMES, resized, sample, sample_text
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import DeadlockError, Timeline, timeline
from tilelink.ir import parse_ir
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, default_schedule
from tilelink.schedules.machine import Machine, UnknownMachineError

H200 = Machine.load()


def ag_gemm(m: int = 2048, k: int = 2048, n: int = 2048, world: int = 4) -> Timeline:
    """The timed copy-engine sample."""
    return timeline(resized("ag_gemm.copy_engine", world, m, k, n), H200)


@pytest.mark.parametrize(
    ("op", "mebibytes", "microseconds"),
    [
        ("all_gather", 1, 27),
        ("all_gather", 16, 73),
        ("all_gather", 117, 348),
        ("all_reduce", 1, 36),
        ("all_reduce", 16, 120),
        ("all_reduce", 117, 635),
    ],
)
def test_collectives_take_what_was_measured(op: str, mebibytes: int, microseconds: float) -> None:
    assert H200.collective_us(op, mebibytes * 2**20, 8) == pytest.approx(microseconds, rel=0.02)


def test_collective_time_grows_with_size_and_is_zero_alone() -> None:
    times = [H200.collective_us("reduce_scatter", 2.0**e, 8) for e in range(10, 34)]
    assert all(a <= b for a, b in itertools.pairwise(times))
    assert H200.collective_us("reduce_scatter", 1e9, 1) == 0.0


def test_unknown_machines_name_the_known_ones() -> None:
    with pytest.raises(UnknownMachineError, match="h200x8"):
        Machine.load("abacus")


# cuBLAS alone in bench/results/mlp_h200x4.json; nested loops of ours are up to a tenth behind it.
@pytest.mark.parametrize(
    ("m", "k", "n", "milliseconds"), [(8192, 8192, 7168, 1.355), (8192, 4096, 3584, 0.313)]
)
def test_compute_alone_is_near_cublas(m: int, k: int, n: int, milliseconds: float) -> None:
    bound = timeline(resized("ag_gemm.copy_engine", 2, m, k, n), H200).compute
    assert bound * 1e-3 == pytest.approx(milliseconds, rel=0.1)


def tile_us(k: int, now: float) -> float:
    """A tile of 128 x 256 x 64, by hand: one of 132 workers, ``now`` microseconds after the first one."""
    triton = H200.emitters["triton"]
    dot, cast = H200.dot_us(132 * 2 * 128 * 256 * k, "bf16", now), 128 * 256 / (30e6 / 132)
    return dot + k / 64 * triton.step_us + cast + triton.tile_us


@pytest.mark.parametrize("now", [0.0, 250.0, 5000.0])
@pytest.mark.parametrize("flops", [1e9, 1e11, 3e12])
def test_products_begin_fast_and_slow_down(flops: float, now: float) -> None:
    taken, steps = H200.dot_us(flops, "bf16", now), 20_000
    times = [now + taken * (n + 0.5) / steps for n in range(steps)]
    rates = [715e6 * (1 + H200.burst * math.exp(-t / H200.burst_us)) for t in times]
    assert sum(rates) / steps * taken == pytest.approx(flops, rel=2e-3)


def test_compute_alone_is_waves_of_tiles() -> None:
    found = ag_gemm().compute
    assert (2048 // 128) * (2048 // 256) <= 132  # one wave
    start = H200.head_us + H200.launch_us
    assert found == pytest.approx(start + tile_us(2048, 0.0) + H200.finish_us, rel=1e-6)


def test_communication_alone_is_the_bytes_of_one_rank_over_its_links() -> None:
    assert ag_gemm().communication == pytest.approx(3 * 512 * 2048 * 2 / 379e3, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_faster_than_its_bounds(name: str) -> None:
    found = timeline(sample(name), H200)
    assert found.makespan >= found.compute
    assert found.makespan >= found.communication
    assert 0.0 < found.efficiency <= 1.0


def test_collectives_of_one_group_run_in_turn(tmp_path: Path) -> None:
    """The library takes them one behind the other, so no call ends before the sum of them."""
    path = tmp_path / "both.py"
    path.write_text(
        "import tilelink\nimport tilelink.language as tk\n\n"
        '@tilelink.kernel("gather A[M, K] over M; gather B[K, N] over K")\n'
        "def both(A, B, C):\n"
        "    M, K = A.shape\n"
        "    N = B.shape[1]\n"
        "    for m, n in tk.tiles(M, N):\n"
        "        acc = tk.zeros((m, n))\n"
        "        for k in tk.tiles(K):\n"
        "            acc = tk.dot(A[m, k], B[k, n], acc)\n"
        "        C[m, n] = acc.to(C.dtype)\n"
    )
    op = load_kernels(path)["both"].build({"M": 4096, "K": 4096, "N": 4096}, {}, 4)
    moves = tuple((name, Move(resource="none")) for name in "AB")
    schedule = replace(default_schedule(op), moves=moves)
    found = timeline(run_passes(op, schedule), H200)
    one = H200.collective_us("all_gather", 4096 * 4096 * 2, 4)
    assert found.communication == pytest.approx(2 * one)
    assert found.makespan >= found.communication + found.compute / 2


def test_waits_delay_the_tiles_that_need_them() -> None:
    # One worker a rank and slow links: a rank's last slice cannot start before the last copy.
    slow = {name: getattr(H200, name) for name in Machine.__dataclass_fields__}
    slow["link_gbps"] = 1.0
    program = resized("ag_gemm.copy_engine", 4, 512, 512, 512, workers=1)
    found = timeline(program, Machine(**slow))
    copies = 3 * (128 * 512 * 2 / 1e3 + H200.copy_us + H200.link_latency_us + H200.copy_signal_us)
    last = H200.head_us + H200.stream_us + copies + H200.poll_us
    # The worker computes its own slice first, and waits.
    own = tile_us(512, 0.0)
    since = last - H200.head_us - H200.launch_us
    first = tile_us(512, since)
    assert own < since
    ends = last + first + tile_us(512, since + first) + H200.finish_us
    assert found.makespan == pytest.approx(ends, rel=1e-6)
    assert found.makespan > found.compute


def test_the_critical_path_covers_the_whole_time() -> None:
    for found in (ag_gemm(), timeline(resized("gemm_rs.copy_engine", 4, 2048, 256, 2048), H200)):
        steps = found.critical_path()
        assert steps[0].start == pytest.approx(0.0)
        assert steps[-1].end == pytest.approx(found.makespan)
        for before, after in itertools.pairwise(steps):
            assert before.end == pytest.approx(after.start)
        for step in steps:
            assert sum(us for _, us in step.parts) == pytest.approx(step.end - step.start)
    assert any("@copy" in step.track for step in steps)


def test_nobody_does_two_things_at_once() -> None:
    tracks = ag_gemm().tracks
    assert max(len(track.segments) for track in tracks) > 2
    for track in tracks:
        for before, after in itertools.pairwise(track.segments):
            assert before.end <= after.start + 1e-9


def test_chrome_trace_has_a_process_a_rank() -> None:
    found = ag_gemm()
    trace = json.loads(json.dumps(found.to_chrome()))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["pid"] for e in slices} == set(range(4))
    assert max(e["ts"] + e["dur"] for e in slices) <= found.makespan + 0.01
    assert any(e["name"] == "A to rank 1" for e in slices)


def test_the_picture_fits_its_width_and_shows_every_agent() -> None:
    found = ag_gemm()
    lines = found.render(width=80).splitlines()
    rows = [line for line in lines if "|" in line]
    assert all(len(line) <= 80 for line in rows)
    assert [line.split()[0] for line in rows] == ["head", "@copy", *["@ag_gemm"] * 4]
    copies = [c for c, _ in itertools.groupby(rows[1]) if c.isdigit()]
    assert copies == ["1", "2", "3"]
    assert f"{found.makespan:.0f} us" in lines[0]


def test_timing_is_deterministic() -> None:
    assert ag_gemm().render() == ag_gemm().render()


def test_a_program_that_cannot_end_is_an_error() -> None:
    text = sample_text("gemm_rs.copy_engine").replace("count = 6", "count = 7")
    with pytest.raises(DeadlockError):
        timeline(parse_ir(text), H200)


def test_a_standstill_names_rank_tile_channel_and_line_of_each_wait() -> None:
    text = sample_text("ag_gemm.copy_engine")
    kept = [line for line in text.splitlines(keepends=True) if "notify @A.ready" not in line]
    (line,) = (number for number, words in enumerate(kept, 1) if "wait @A.ready" in words)
    with pytest.raises(DeadlockError) as caught:
        timeline(parse_ir("".join(kept), "lost.ir"), H200)
    *told, more = caught.value.notes
    pattern = (
        r"rank (\d) @ag_gemm worker \d+ stage @\w+(?:\.\w+)* tile m=(\d+)\.\.\d+ n=\d+\.\.\d+ waits at "
        rf"`wait @A\.ready.*` \(lost\.ir:{line}:\d+\) for A\.ready\[(\d), \d\], which is 0 and must be 1"
    )
    rows = int(parse_ir(text).find("extent")[0]["value"]) // 4
    for note in told:
        found = re.fullmatch(pattern, note)
        assert found is not None, note
        rank, start, source = map(int, found.groups())
        assert source == start // rows != rank
    assert int(more.split()[1]) + len(told) == caught.value.values["blocked"]


def test_a_large_program_is_timed_in_seconds() -> None:
    program = resized("ag_gemm.copy_engine", 8, 8192, 8192, 7168)
    start = time.process_time()
    timeline(program, H200)
    assert time.process_time() - start < 10.0
