"""The explorer: intact programs are right, broken ones are bad, with and without persistent sets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.assurance.exhaustive import Instance, agree, controls, examine
from tests.sim.programs import sample_text
from tilelink import kernels
from tilelink.backend.simulate.explore import equivalent, explore
from tilelink.ir import Op, parse_ir, print_ir, rewrite

SMALL = [
    Instance("ag_gemm", "copy_engine", 2, 1, 2),
    Instance("ag_gemm", "sm:1", 2, 1, 2),
    Instance("gemm_rs", "sm:1", 2, 1, 2),
    Instance("gemm_rs", "epilogue", 2, 1, 2),
    Instance("gemm_ar", "copy_engine", 2, 1, 1),
    Instance("ag_gemm", "sm:1-boxes", 2, 1, 2),
    Instance("gemm_rs", "sm:1-boxes-folded", 2, 1, 2),
]


@pytest.mark.parametrize("instance", SMALL, ids=lambda i: i.name)
def test_intact_programs_are_right_and_controls_are_bad_in_both_searches(
    instance: Instance,
) -> None:
    result = examine((instance, 1000, True))
    assert result.wrong == ()
    assert result.unreduced > result.states // 2 > 1
    assert result.controls >= 6


def test_both_searches_agree_on_mutants() -> None:
    """The full list is that of `tests.assurance.exhaustive --step 1`."""
    found = agree((Instance("gemm_rs", "sm:1", 2, 1, 2), 6, 2000))
    assert found.differ == ()
    assert found.mutants > found.bad > 0


def test_both_searches_agree_on_mutants_where_two_loaders_draw() -> None:
    found = agree((Instance("gemm_rs", "sm:2-boxes-folded", 2, 2, 3), 6, 2000))
    assert found.differ == ()
    assert found.mutants >= found.bad > 20


def changed(name: str, old: str, new: str) -> Op:
    text = sample_text(name)
    assert old in text
    return parse_ir(text.replace(old, new), name)


# Program, text, its replacement, the kind of problem.
BAD = [
    ("ag_gemm.copy_engine", "wait @ack[0..WORLD] {epoch = (0 - 1)}", "", "race"),
    ("ag_gemm.copy_engine", "notify @ack[RANK] {peer = p}", "", "deadlock"),
    (
        "ag_gemm.copy_engine",
        "wait @A.ready[m.start / 16, 0] {if",
        'wait @A.ready[m.start / 16, 0] {order = "relaxed", if',
        "race",
    ),
    # Across ranks, the scope of a device is not enough; inside one it is.
    (
        "ag_gemm.copy_engine",
        "notify @A.ready[RANK, 0] {",
        'notify @A.ready[RANK, 0] {scope = "gpu", ',
        "race",
    ),
    # A peer's word of this call may come before the head that clears it.
    ("ag_gemm.copy_engine", "flag @A.ready {", "flag @A.ready {cleared = true, ", "deadlock"),
    # A read through the async proxy of what a peer's copy engine wrote.
    ("ag_gemm.copy_engine", "load @A.all[%m, %k] {", 'load @A.all[%m, %k] {via = "tma", ', "race"),
    ("ag_gemm.copy_engine", 'stream @copy {after = ["head"]}', "stream @copy", "race"),
    ("gemm_rs.copy_engine", "counter @C.done {", "counter @C.done {cleared = false, ", "race"),
    ("gemm_rs.copy_engine", "store @C.partial[%m, %n]", 'STORE {via = "tma"}', "race"),
    ("gemm_ar.epilogue", "count = 3", "count = 2", "balance"),
    ("gemm_ar.epilogue", "{count = 3,", "{barrier = false, count = 3,", "race"),
    (
        "ag_gemm.collective",
        'launch @ag_gemm {after = ["A"]',
        'launch @ag_gemm {after = ["head"]',
        "race",
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "kind"), BAD)
def test_a_bad_state_is_found(name: str, old: str, new: str, kind: str) -> None:
    if new.startswith("STORE"):
        old, new = f"{old} (%c)", f"{old} (%c) {new.removeprefix('STORE ')}"
    found = explore(changed(name, old, new))
    assert found.bad is not None
    assert found.bad.kind == kind, found.bad
    assert found.complete


FINE = [
    # TMA stores that are drained in front of the release, and loads behind a proxy fence.
    (
        "gemm_rs.copy_engine",
        "store @C.partial[%m, %n] (%c)\n      notify @C.done[m.start / 16, 0]",
        'store @C.partial[%m, %n] (%c) {via = "tma"}\n'
        "      notify @C.done[m.start / 16, 0] {drain = true}",
    ),
    (
        "gemm_ar.epilogue",
        "wait @C.ready[0..WORLD, m.1.start / 16]",
        "wait @C.ready[0..WORLD, m.1.start / 16] {proxy = true}",
    ),
    # Held back by one task, and performed in front of the next stage.
    (
        "gemm_rs.copy_engine",
        "notify @C.done[m.start / 16, 0]\n    }",
        "notify @C.done[m.start / 16, 0] {delay = 1}\n    }\n    flush",
    ),
    (
        "gemm_rs.epilogue",
        "C.arrived[m.start / 16, 0]}\n    }",
        "C.arrived[m.start / 16, 0], delay = 1}\n    }\n    flush",
    ),
]


@pytest.mark.parametrize(("name", "old", "new"), FINE)
def test_what_the_memory_model_allows_is_right(name: str, old: str, new: str) -> None:
    found = explore(changed(name, old, new))
    assert found.complete
    assert found.bad is None, found.bad


def test_a_notify_that_is_held_back_when_the_worker_leaves_is_lost() -> None:
    old = "notify @C.done[m.start / 16, 0]"
    found = explore(changed("gemm_rs.copy_engine", old, f"{old} {{delay = 1}}"))
    assert found.bad is not None
    assert found.bad.kind == "deadlock"
    counted = "@C.arrived[m.start / 16, 0]"
    found = explore(changed("gemm_rs.epilogue", f"{counted}}}", f"{counted}, delay = 1}}"))
    assert found.bad is not None
    assert found.bad.kind == "deadlock"


def test_a_proxy_fence_makes_loads_through_the_async_proxy_right() -> None:
    text = sample_text("ag_gemm.copy_engine")
    text = text.replace("load @A.all[%m, %k] {", 'load @A.all[%m, %k] {via = "tma", ')
    text = text.replace("{if = m.start / 16 != RANK}", "{if = m.start / 16 != RANK, proxy = true}")
    found = explore(parse_ir(text, "p"))
    assert found.complete
    assert found.bad is None, found.bad


def test_workers_that_are_not_resident_hang_the_ones_that_spin() -> None:
    """The sum of a finished slice waits for tasks of a worker that cannot start."""
    program = Instance("gemm_rs", "sm:1", 2, 3, 3).program()
    assert explore(program, 1, 3).bad is None
    found = explore(program, 1, 3, resident=1)
    assert found.bad is not None
    assert found.bad.kind == "deadlock"


def test_a_stream_in_front_of_its_launch_hangs_one_hardware_queue() -> None:
    program = Instance("gemm_rs", "copy_engine", 2, 1, 2).program()
    agents = [op for op in program.body if op.name in ("stream", "launch")]
    order = {id(agents[0]): agents[1], id(agents[1]): agents[0]}
    block = program.blocks[0]
    body = tuple(order.get(id(op), op) for op in block.ops)
    turned = replace(program, blocks=(replace(block, ops=body),))
    assert explore(turned).bad is None
    found = explore(turned, one_queue=True)
    assert found.bad is not None
    assert found.bad.kind == "deadlock"
    assert explore(program, one_queue=True).bad is None


def test_tasks_that_are_left_in_a_queue_are_missed() -> None:
    """Nobody waits for them and nothing they write is read by another agent: the queue itself tells."""
    program = Instance("ag_gemm", "sm:1", 2, 2, 2).program()
    (queue,) = (op for op in program.find("counter") if op.symbol == "C.gemm.queue")
    kept = rewrite(program, lambda o: (o.with_attrs(cleared=False),) if o == queue else (o,))
    assert explore(kept, 1).bad is None
    found = explore(kept, 2)
    assert found.bad is not None
    assert found.bad.kind == "balance"
    assert "never drawn" in found.bad.detail


def test_too_large_is_said_and_not_guessed() -> None:
    program = Instance("gemm_rs", "copy_engine", 2, 3, 6).program()
    found = explore(program, limit=50, reduce=False)
    assert not found.complete
    assert found.bad is None
    assert "50" in found.why
    assert equivalent(program, program, limit=5).equivalent is None


def test_the_trace_leads_to_the_bad_state() -> None:
    old = "wait @A.ready[m.start / 16, 0] {if = m.start / 16 != RANK}"
    found = explore(changed("ag_gemm.copy_engine", old, ""))
    assert found.bad is not None
    assert "is not ordered behind" in found.bad.detail
    assert "call 0" in found.bad.detail
    assert found.trace
    assert all("rank" in step for step in found.trace)


def test_equivalent_mutants_are_told_from_others() -> None:
    instance = Instance("ag_gemm", "copy_engine", 2, 2, 2)
    program = instance.program()
    kernel = kernels.ag_gemm.build({"M": 64, "K": 16, "N": 16}, world=2)

    def twice(op: Op) -> tuple[Op, ...]:
        return (op, op) if op.name == "wait" and op.symbol == "A.ready" else (op,)

    assert equivalent(rewrite(program, twice), program, kernel).equivalent is True
    assert equivalent(rewrite(program, twice), program).equivalent is True

    text = print_ir(program)
    assert "store @C[%m, %n]" in text
    text = text.replace("store @C[%m, %n]", "store @C[%m at (m.start + 16) % M, %n]")
    verdict = equivalent(parse_ir(text, "p"), program, kernel)
    assert verdict.equivalent is False
    assert verdict.kind == "values"
    for label, mutant in controls(program):
        assert equivalent(mutant, program, kernel).equivalent is False, label
