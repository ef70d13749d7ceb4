"""The simulator on the hand-written samples: right numbers, and every broken one is caught."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tests.sim.programs import (
    ALL_NAMES,
    NAMES,
    error,
    expected,
    inputs_of,
    resized,
    sample,
    sample_text,
)
from tilelink.backend.simulate import (
    BalanceError,
    BoundsError,
    DeadlockError,
    InputError,
    RaceError,
    VersionError,
    run,
    run_calls,
)
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Options, Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_right_under_any_schedule(name: str) -> None:
    program = sample(name)
    inputs = inputs_of(program)
    right = expected(program, inputs)
    for seed in range(30):
        for outputs, want in zip(run(program, inputs, seed), right, strict=True):
            assert error(outputs["C"], want) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_calls_follow_each_other_on_one_arena(name: str) -> None:
    program = sample(name)
    calls = [inputs_of(program, seed) for seed in range(3)]
    for seed in range(3):
        for inputs, outputs in zip(calls, run_calls(program, calls, seed), strict=True):
            for found, want in zip(outputs, expected(program, inputs), strict=True):
                assert error(found["C"], want) < 0.005


@pytest.mark.parametrize("workers", [1, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_workers(name: str, workers: int) -> None:
    program = sample(name)
    inputs = inputs_of(program)
    for outputs, want in zip(
        run(program, inputs, seed=workers, calls=2, workers=workers),
        expected(program, inputs),
        strict=True,
    ):
        assert error(outputs["C"], want) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_queues(name: str) -> None:
    program = parse_ir(
        sample_text(name).replace("stage @gemm {", 'stage @gemm {queue = "dynamic", ')
    )
    inputs = inputs_of(program)
    for seed in range(2):
        found = run(program, inputs, seed, calls=2)
        for outputs, want in zip(found, expected(program, inputs), strict=True):
            assert error(outputs["C"], want) < 0.005


def dropped_lines() -> Iterator[tuple[str, int, str]]:
    """Each line of each sample that synchronises."""
    for name in ALL_NAMES:
        for number, line in enumerate(sample_text(name).splitlines()):
            if line.strip().startswith(("wait", "notify")):
                yield name, number, line.strip().split(" {")[0]


def mutant(name: str, number: int) -> Op:
    """The sample without one line."""
    lines = sample_text(name).splitlines()
    return parse_ir("\n".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(n, i, id=f"{n}: {text}") for n, i, text in dropped_lines()],
)
def test_every_wait_and_notify_is_needed(name: str, number: int) -> None:
    program = mutant(name, number)
    inputs = inputs_of(program)
    is_wait = "wait" in sample_text(name).splitlines()[number]
    with pytest.raises(RaceError if is_wait else DeadlockError):
        for seed in range(20):
            # Some schedules get by, and then only the balance at the end shows the fault.
            with contextlib.suppress(BalanceError):
                run(program, inputs, seed, calls=2)


def altered(name: str, old: str, new: str) -> Op:
    """The sample with one text in place of another."""
    text = sample_text(name)
    assert old in text
    return parse_ir(text.replace(old, new))


def test_notify_before_the_store_is_a_race() -> None:
    name = "gemm_rs.copy_engine"
    store, notify = "store @C.partial[%m, %n] (%c)", "notify @C.done[m.start / 16, 0]"
    text = sample_text(name).replace(store, "<1>").replace(notify, store).replace("<1>", notify)
    program = parse_ir(text)
    with pytest.raises(RaceError, match=r"C\.partial"):
        for seed in range(20):
            run(program, inputs_of(program), seed)


def test_own_tile_read_from_the_buffer_is_not_a_number() -> None:
    old = "when = m.start / 16 == RANK"
    program = altered("ag_gemm.copy_engine", old, "when = m.start / 16 == RANK + 1")
    with pytest.raises(BoundsError):
        run(program, inputs_of(program))
    # The own rows were never pushed: what the tile reads there is the NaN of fresh memory.
    program = altered("ag_gemm.copy_engine", old, "when = m.start < 0")
    with pytest.raises(VersionError, match="what nobody has written"):
        run(program, inputs_of(program))
    blind = Scheduler(Traces(Geometry(program)), [inputs_of(program)], 0, Options(versions=False))
    for outputs in blind.run()[0]:
        assert outputs["C"].isnan().any()


def test_counts_that_do_not_match_are_caught() -> None:
    low = altered(
        "gemm_rs.copy_engine",
        "wait @C.done[RANK, 0] {count = 6}",
        "wait @C.done[RANK, 0] {count = 5}",
    )
    with pytest.raises((BalanceError, RaceError)):
        run(low, inputs_of(low))
    high = altered(
        "gemm_rs.copy_engine",
        "wait @C.done[RANK, 0] {count = 6}",
        "wait @C.done[RANK, 0] {count = 7}",
    )
    with pytest.raises(DeadlockError, match="has been made"):
        run(high, inputs_of(high))
    early = altered("gemm_ar.epilogue", "{count = 3,", "{count = 2,")
    with pytest.raises((BalanceError, RaceError)):
        run(early, inputs_of(early))
    unheard = altered(
        "gemm_rs.copy_engine", "for_range {hi = WORLD, lo = 1}", "for_range {hi = WORLD, lo = 2}"
    )
    with pytest.raises((BalanceError, DeadlockError)):
        run(unheard, inputs_of(unheard))


def test_a_notify_that_nobody_waits_for_is_unbalanced() -> None:
    line = "notify @C.done[m.start / 16, 0]"
    program = altered("gemm_rs.copy_engine", line, f"{line}\n      notify @C.done[0, 1]")
    wide = parse_ir(
        sample_text("gemm_rs.copy_engine")
        .replace("counter @C.done {dims = [WORLD, 1]", "counter @C.done {dims = [WORLD, 2]")
        .replace(line, f"{line}\n      notify @C.done[0, 1]")
    )
    with pytest.raises(BoundsError):
        run(program, inputs_of(program))
    with pytest.raises(BalanceError, match="nothing waits"):
        run(wide, inputs_of(wide))


def test_stages_in_the_wrong_order_deadlock_on_themselves() -> None:
    text = sample_text("gemm_rs.copy_engine")
    gemm, rest = text.split("    stage @sum")
    before, gemm = gemm.split("    stage @gemm")
    total, after = rest.split("    finish do")
    swapped = parse_ir(
        f"{before}    stage @sum{total}    stage @gemm{gemm}    finish do{after}", "swapped.ir"
    )
    with pytest.raises(DeadlockError) as caught:
        run(swapped, inputs_of(swapped))
    text = str(caught.value)
    assert "swapped.ir:" in text and "stage @sum tile m.1=0..8 n.1=" in text
    assert "C.done[0, 0], which is 0 and must be 6" in text
    assert "that is the first of these" in text


def test_a_ring_of_streams_is_shown_as_a_cycle() -> None:
    old = 'stream @copy {after = ["head"]} do {'
    program = altered(
        "ag_gemm.copy_engine", old, f"{old}\n    wait @A.ready[(RANK + 1) % WORLD, 0]"
    )
    with pytest.raises(DeadlockError) as caught:
        run(program, inputs_of(program), seed=3)
    notes = "\n".join(caught.value.notes)
    for rank in range(4):
        assert f"rank {rank} @copy" in notes
    assert "that is the first of these" in notes


def test_an_agent_that_does_not_wait_for_the_head_is_a_race() -> None:
    program = altered("ag_gemm.copy_engine", 'stream @copy {after = ["head"]}', "stream @copy")
    with pytest.raises(RaceError, match="epoch and counters"):
        for seed in range(20):
            run(program, inputs_of(program), seed, calls=2)


def test_one_seed_gives_one_run() -> None:
    name, number, _ = next(dropped_lines())
    program = mutant(name, number)
    texts = []
    for _ in range(2):
        with pytest.raises(TilelinkError) as caught:
            run(program, inputs_of(program), seed=5, calls=3)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_inputs_are_checked_and_left_alone() -> None:
    program = sample("ag_gemm.copy_engine")
    inputs = inputs_of(program)
    before = [{k: v.clone() for k, v in rank.items()} for rank in inputs]
    run(program, inputs)
    for rank, kept in zip(inputs, before, strict=True):
        assert all(torch.equal(rank[k], kept[k]) for k in kept)
    with pytest.raises(InputError, match="ranks of inputs"):
        run(program, inputs[:3])
    with pytest.raises(InputError, match="missing"):
        run(program, [{"A": i["A"]} for i in inputs])
    with pytest.raises(InputError, match="shape"):
        run(program, [{**i, "B": i["B"].T} for i in inputs])
    with pytest.raises(InputError, match="float32"):
        run(program, [{**i, "B": i["B"].float()} for i in inputs])


LOCAL = 'offset = 262144, space = "local"'


def test_overlapping_buffers_are_refused() -> None:
    program = altered("gemm_rs.copy_engine", LOCAL, 'offset = 262145, space = "symmetric"')
    with pytest.raises(BoundsError, match="shares bytes"):
        run(program, inputs_of(program))


def test_places_in_the_workspace_and_in_the_arena_do_not_overlap() -> None:
    program = altered("gemm_rs.copy_engine", LOCAL, 'offset = 268288, space = "local"')
    inputs = inputs_of(program)
    for outputs, want in zip(run(program, inputs), expected(program, inputs), strict=True):
        assert error(outputs["C"], want) < 0.005


@pytest.mark.parametrize(
    ("name", "m", "k", "n"),
    [("ag_gemm.copy_engine", 512, 512, 640), ("gemm_rs.copy_engine", 512, 320, 640)],
)
def test_larger_programs(name: str, m: int, k: int, n: int) -> None:
    program = resized(name, 4, m, k, n)
    inputs = inputs_of(program)
    for outputs, want in zip(run(program, inputs), expected(program, inputs), strict=True):
        assert error(outputs["C"], want) < 0.005
