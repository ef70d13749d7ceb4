"""One rank that stands for all, against the clock of all ranks; and the model against measurements."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.programs import resized, sample
from tilelink.backend.pipeline import run_passes
from tilelink.backend.simulate import predict, timeline
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.mirror import Asymmetric, Mirror, Piece
from tilelink.backend.simulate.walk import Notify
from tilelink.kernels import ag_gemm, gemm_ar, gemm_rs
from tilelink.schedules import Schedule, default_schedule
from tilelink.schedules.costs import Code, Task, Timed
from tilelink.schedules.machine import Machine

RESULTS = Path(__file__).parents[2] / "bench" / "results"
H200 = Machine.load("h200x4")


@pytest.mark.parametrize("name", ["ag_gemm.copy_engine", "gemm_rs.copy_engine"])
@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_stands_for_all_in_the_samples(name: str, world: int) -> None:
    program = resized(name, world, 1024, 512, 1024)
    assert predict(program, H200) == pytest.approx(timeline(program, H200).makespan, rel=0.05)


@pytest.mark.parametrize("kernel", [ag_gemm, gemm_rs, gemm_ar], ids=lambda k: str(k.name))
@pytest.mark.parametrize("resource", ["copy_engine", "sm:16", "epilogue", "none"])
def test_one_rank_stands_for_all_in_compiled_kernels(kernel: object, resource: str) -> None:
    if kernel is ag_gemm and resource == "epilogue":
        resource = "sm:4"
    op = kernel.build({"M": 2048, "K": 1024, "N": 2048}, {}, 4)  # type: ignore[attr-defined]
    program = run_passes(op, default_schedule(op).with_resource(resource))
    whole = timeline(program, H200).makespan
    # Ranks that send to the same peer at once queue at its link, which one rank alone does not see.
    assert predict(program, H200) == pytest.approx(whole, rel=0.05)


def test_another_event_at_the_same_place_is_no_mirror_image() -> None:
    program = sample("ag_gemm.copy_engine")
    stream = next(a for a in program.body if a.name == "stream")
    geometry = Geometry(program)
    mirror = Mirror(geometry)
    events = list(mirror._walkers[0].block(stream.body))
    at, event = next((n, e) for n, e in enumerate(events) if isinstance(e, Notify))
    assert mirror.notify(Piece(stream.body), at, event, 1).op is event.op
    with pytest.raises(Asymmetric):
        mirror.notify(Piece(stream.body), at - 1, event, 1)


def test_what_is_waited_for_is_fetched_behind_the_wait() -> None:
    # One tile a worker on two ranks: that of the peer is there no sooner than the own one, so that what it has to
    # read for its sum stands behind its product, and is as long under way as the links take.
    op = gemm_rs.build({"M": 128, "K": 3584, "N": 8192}, {}, 2)
    pulled = Schedule.from_json(
        """{"tiles": {"M": 64, "N": 128, "K": 64}, "stages": 5, "emitter": "gluon", "order": "interleave",
            "moves": {"C": {"resource": "epilogue", "sum": "epilogue", "direction": "pull"}}}"""
    )
    program = run_passes(op, pulled)
    machine = Machine.load("h200x2")
    slow = replace(machine, read_gbps=machine.read_gbps / 2)
    read = 64 * 8192 * 2 / (machine.read_gbps * 1e3)
    assert predict(program, slow) - predict(program, machine) == pytest.approx(read, rel=0.05)


def test_a_part_that_comes_late_is_not_there_for_nothing() -> None:
    part = 128 * 128 * 2.0
    for task in (Task(sums=part), Task(landed=part)):
        timed = Timed(H200, task, Code("gluon", turns=True, apart=True), H200.sms, H200.sms)
        assert timed.us(0.0) < timed.late_us
        assert timed.late_us > part / (H200.l2_gbps * 1e3)  # were all of the cache its own


def test_prediction_is_fast_enough_for_a_search() -> None:
    op = ag_gemm.build({"M": 8192, "K": 8192, "N": 7168}, {}, 8)
    program = run_passes(op, default_schedule(op))
    taken = []
    for _ in range(3):
        start = time.process_time()
        predict(program, Machine.load("h200x8"))
        taken.append(time.process_time() - start)
    assert min(taken) < 0.3


def test_the_model_agrees_with_what_was_measured() -> None:
    """A sample of cells; `tilelink tune --score` has all of them."""
    from tilelink.tuning.score import points_of, score

    name = "mlp_h200x4.json"
    points = points_of((RESULTS / name).read_text(), name)
    cells = list(dict.fromkeys(p.problem.cell for p in points))[::3]
    found = score([p for p in points if p.problem.cell in cells])
    assert found.median_error <= 0.15
    assert found.good_share >= 0.8
