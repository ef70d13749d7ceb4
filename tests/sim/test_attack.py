"""The adversary: it finds what is wrong, says how to see it again, and leaves intact programs alone."""

from __future__ import annotations

import itertools
import random
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.assurance.exhaustive import Instance
from tests.sim.programs import ALL_NAMES, expected, inputs_of, sample, sample_text
from tests.strategies import MOVED, cases
from tilelink import kernels
from tilelink.backend import reference
from tilelink.backend.mutate import mutants
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import RaceError, run_calls
from tilelink.backend.simulate.attack import Failure, attack
from tilelink.backend.simulate.boxes import FEW, BoxTable
from tilelink.backend.simulate.command import reproduce
from tilelink.backend.simulate.execute import Task
from tilelink.backend.simulate.explore import explore
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.hostility import HOLDING, MODES, PRIORITIES, SKEWED, Hostility
from tilelink.backend.simulate.scheduler import Options, Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.cli.inputs import random_inputs
from tilelink.cli.main import main
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.node import rewrite
from tilelink.kernel import load_kernels


def attacked(program: Op, schedules: int = 20, seed: int = 0) -> Failure | None:
    """An attack of two calls against plain arithmetic."""
    calls = [inputs_of(program, number) for number in range(2)]
    right = [[{"C": c} for c in expected(program, inputs)] for inputs in calls]
    return attack(program, calls, right, schedules, seed)


def altered(name: str, old: str, new: str) -> Op:
    text = sample_text(name)
    assert old in text
    return parse_ir(text.replace(old, new), f"{name}.ir")


@pytest.mark.parametrize("kernel", sorted(MOVED))
@given(data=st.data())
@settings(
    max_examples=8, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
)
def test_no_alarm_on_intact_programs(kernel: str, data: st.DataObject) -> None:
    case = replace(data.draw(cases(kernel, worlds=(1, 2, 4), size=6)), dtype="bf16")
    op = getattr(kernels, kernel).build({"M": case.m, "K": case.k, "N": case.n}, world=case.world)
    calls = []
    for call in range(2):
        pairs = zip(*replace(case, seed=case.seed + call).inputs(), strict=True)
        calls.append([{"A": a, "B": b} for a, b in pairs])
    right = [reference.run(op, inputs) for inputs in calls]
    failure = attack(compile_kernel(op, case.schedule()), calls, right, 4, case.seed)
    assert failure is None, f"{case}: {failure}"


WRONG_TILE = ("ag_gemm.copy_engine", "load @B[%k, %n]", "load @B[%k, %n at n.start / 17 * 16]")
WAIT = "wait @A.ready[m.start / 16, 0] {if = m.start / 16 != RANK}"


def test_each_oracle_sees_its_own_kind() -> None:
    found = {
        "numbers": altered(*WRONG_TILE),
        "happens-before": altered("ag_gemm.copy_engine", WAIT, ""),
        "deadlock": altered("gemm_rs.copy_engine", "count = 6", "count = 7"),
        "balance": altered(
            "gemm_rs.copy_engine", "notify @ack[RANK] {peer = p}",
            "notify @ack[RANK] {peer = p}\n        notify @ack[RANK] {peer = p}",
        ),
        "version": altered("ag_gemm.copy_engine", "when = m.start / 16 == RANK", "when = m.start < 0"),
        "bounds": altered("ag_gemm.copy_engine", "RANK * 16..RANK * 16 + 16", "RANK * 17..RANK * 17 + 16"),
    }  # fmt: skip
    assert {name: getattr(attacked(op), "oracle", None) for name, op in found.items()} == {
        name: name for name in found
    }


def test_a_stale_call_is_seen_without_numbers() -> None:
    # The own rows come from the buffer, where the last call's copy of another rank's rows may lie.
    old = "transfer @A[:, :] {peer = (RANK + s) % WORLD,"
    late = altered("ag_gemm.copy_engine", old, old.replace("{", "{if = s < WORLD - 1, "))
    failure = attack(late, [inputs_of(late, n) for n in range(2)], None)
    assert failure is not None and failure.oracle == "version"


def test_numbers_alone_do_not_see_a_missing_wait_that_versions_do() -> None:
    """Without the clocks, some schedule still shows that a read saw another write."""
    program = altered("ag_gemm.copy_engine", WAIT, "")
    calls = [inputs_of(program)] * 2  # the same numbers in both calls: stale rows are right
    seen = 0
    for seed in range(24):
        blind = Scheduler(Traces(Geometry(program)), calls, seed, Options(races=False))
        try:
            blind.run()
        except TilelinkError as error:
            seen += error.code == "version"
    assert seen > 0


@pytest.mark.parametrize("file", ["broken.ir", "broken.txt"])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_failure_is_reproduced_by_its_seed_and_by_its_command(
    name: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ack = "wait @ack[0..WORLD] {epoch = (0 - 1)"
    text = sample_text(name).replace(ack, f'{ack}, order = "relaxed"')
    if text == sample_text(name):
        pytest.skip("nothing is acknowledged in this program")
    path = tmp_path / file
    path.write_text(text)
    program = parse_ir(text, str(path))
    failure = attacked(program, seed=7)
    assert failure is not None and failure.oracle == "happens-before"
    calls = [inputs_of(program, number) for number in range(2)]
    with pytest.raises(RaceError) as caught:
        run_calls(program, calls, failure.seed)
    assert str(caught.value) == str(failure.error)
    last = str(failure).splitlines()[-1]
    command = shlex.split(last.removeprefix(" = reproduce: tilelink "))
    assert main(command) == 1
    assert last in capsys.readouterr().err


def test_the_command_of_a_compiled_program_names_its_kernel(
    capsys: pytest.CaptureFixture[str],
) -> None:
    op = kernels.gemm_rs.build({"M": 24, "K": 8, "N": 16}, world=2)
    program = compile_kernel(op)
    head = program.find("head")[0].with_ops(())
    body = tuple(head if child.name == "head" else child for child in program.body)
    broken = program.with_ops(body)
    with pytest.raises(RaceError) as caught:
        for seed in range(20):
            run_calls(broken, [_drawn(broken)] * 3, seed)
    line = str(caught.value).splitlines()[-1]
    words = shlex.split(line.removeprefix(" = reproduce: tilelink "))
    assert main(words) == 0  # the kernel as the compiler makes it is sound
    out = capsys.readouterr().out
    assert "M=24 K=8 N=16" in out and "C (call 2)" in out


def _drawn(program: Op) -> list[dict[str, Any]]:
    return random_inputs(program, 0)


def test_schedules_are_tried_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "late.ir"
    path.write_text(sample_text("ag_gemm.copy_engine").replace(WAIT, ""))
    assert main(["run", str(path), "--calls", "2", "--schedules", "20"]) == 1
    assert "error[race]" in capsys.readouterr().err
    assert main(["run", str(path), "--backend", "interpret", "--calls", "2"]) == 2


def test_runs_that_take_too_many_steps_are_cut_off() -> None:
    program = sample("gemm_rs.sm")
    options = Options(steps=20)
    with pytest.raises(TilelinkError, match="still running after 20 steps"):
        Scheduler(Traces(Geometry(program)), [inputs_of(program)], 0, options).run()


def test_tables_of_a_call_decide_what_it_reads() -> None:
    """Where the course depends on tables, calls with other tables are right, and so are all schedules."""
    kernel = load_kernels(str(Path(__file__).parents[1] / "kernels" / "moe.py"))["moe_up"]
    op = kernel.build({"T": 16, "H": 8, "E": 3, "F": 8, "P": 24}, world=2)
    # The proof does not follow tables; the program before it is what is run.
    program = run_passes(op)
    assert Traces(Geometry(program)).prepare()
    calls = [random_inputs(op, seed) for seed in range(3)]
    right = [reference.run(op, inputs) for inputs in calls]
    assert attack(program, calls, right, 8) is None
    waits = [o for o in program.walk() if o.name == "wait" and o.symbol != "ack"]
    assert waits
    deaf = rewrite(program, lambda o: () if o in waits else (o,))
    failure = attack(deaf, calls, right, 8)
    assert failure is not None and failure.oracle in ("happens-before", "version")


@pytest.mark.parametrize("name", ALL_NAMES)
def test_without_values_the_schedule_is_the_same(name: str) -> None:
    program = sample(name)
    traces, calls = Traces(Geometry(program)), [inputs_of(program, n) for n in range(2)]
    for seed in range(8):
        steps = []
        for values in (True, False):
            run = Scheduler(traces, calls, seed, Options(values))
            run.run()
            steps.append(run.steps)
        assert steps[0] == steps[1]


def test_priorities_reach_orders_that_need_two_choices() -> None:
    """PCT: of two tasks of k steps, a change at the one step that matters comes with 1 / k or more."""
    components = [(0, "a", 0), (0, "b", 0)]
    hits, trials, length = 0, 4000, 16
    for number in range(trials):
        hostile = Hostility(MODES * number + PRIORITIES, components, frozenset(), 2 * length)
        left, order = [length, length], []
        while any(left):
            ready = [c for c in (0, 1) if left[c]]
            chosen = min(ready, key=hostile.key)
            left[chosen] -= 1
            order.append(chosen)
            hostile.ran(chosen)
        # Task a does exactly its first 5 steps, then b all of its own.
        hits += order == [0] * 5 + [1] * length + [0] * (length - 5)
    # At depth 1 (a quarter of the seeds), 1 / 2 for the order and 1 / 32 for the step.
    assert hits / trials > 0.5 * 0.25 / 2 / (2 * length)


def test_skew_makes_a_rank_run_ahead_by_a_call() -> None:
    program = sample("gemm_rs.copy_engine")
    traces, calls = Traces(Geometry(program)), [inputs_of(program, n) for n in range(3)]
    apart = 0
    for number in range(6):
        run = Scheduler(traces, calls, MODES * number + SKEWED, Options(False))
        step = run._step

        def spy(task: Task, run: Scheduler = run, step: Callable[[Task], bool] = step) -> bool:
            nonlocal apart
            goes_on = step(task)
            numbers = run.calls_done()
            apart = max(apart, max(numbers) - min(numbers))
            return goes_on

        run._step = spy  # type: ignore[method-assign]
        run.run()
    assert apart == 1  # the acknowledgement holds it back from more


def test_whoever_holds_a_notify_back_comes_to_every_wait_that_it_can_come_to() -> None:
    """A flush behind a queue of other workers hangs only where its worker draws what waits for its peer."""
    program = Instance("gemm_rs", "sm:2-folded", 2, 2, 3).program()
    moved = [m for m in mutants(program) if m.description == "flush moved behind the stage @C.own"]
    assert len(moved) == 1 and explore(moved[0].program).bad is not None
    calls = [random_inputs(program, seed) for seed in range(2)]
    for number in range(12):
        failure = attack(moved[0].program, calls, None, 1, MODES * number + HOLDING)
        assert failure is not None and failure.oracle == "deadlock"


def test_a_queue_goes_on_where_its_counter_stands() -> None:
    """The second call draws no task from a counter that nobody has cleared, and writes nothing."""
    program = Instance("ag_gemm", "sm:1", 2, 2, 2).program()
    (queue,) = (op for op in program.find("counter") if op.symbol == "C.gemm.queue")
    kept = rewrite(program, lambda o: (o.with_attrs(cleared=False),) if o == queue else (o,))
    calls = [random_inputs(program, seed) for seed in range(2)]
    assert attack(kept, calls[:1], None, 1) is None
    failure = attack(kept, calls, None, 1)
    assert failure is not None and failure.oracle == "version"


def test_tables_of_boxes_agree_with_counting_elements() -> None:
    draw = random.Random(0)
    table = BoxTable()
    boxes: list[tuple[tuple[int, int], ...]] = []
    for _ in range(3 * FEW):
        lows = [draw.randrange(6) for _ in range(2)]
        box = tuple((lo, lo + draw.randrange(1, 4)) for lo in lows)
        row = table.row(box)
        if row == len(boxes):
            boxes.append(box)
    assert len(boxes) == len(table) > FEW
    cells = [frozenset(itertools.product(*(range(lo, hi) for lo, hi in box))) for box in boxes]
    for row, mine in enumerate(cells):
        assert sorted(table.meets[row]) == [i for i, c in enumerate(cells) if c & mine]
        assert sorted(table.covers[row]) == [i for i, c in enumerate(cells) if c <= mine]
    assert np.all([row in table.meets[row] for row in range(len(boxes))])


def test_the_command_of_a_kernel_in_ir_has_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel.txt"
    path.write_text(print_ir(kernels.gemm_rs.build({"M": 24, "K": 8, "N": 16}, world=2)))
    program = compile_kernel(parse_ir(path.read_text(), str(path)).with_attrs(world=4))
    words = shlex.split(reproduce(program, 3, 2))
    assert main(words[1:]) == 0
    ran = capsys.readouterr().out.splitlines()[-1].split()
    assert ran[2] == "4" and "M=24" in ran and "(call" in ran
