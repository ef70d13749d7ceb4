"""The words of memory order, one at a time: what they allow runs, what they do not order is caught."""

from __future__ import annotations

import pytest

from tests.sim.programs import ALL_NAMES, error, expected, inputs_of, sample_text
from tilelink.backend.simulate import (
    BalanceError,
    BoundsError,
    DeadlockError,
    RaceError,
    run,
    timeline,
)
from tilelink.backend.simulate.attack import attack
from tilelink.backend.simulate.geometry import Geometry
from tilelink.backend.simulate.scheduler import Options, Scheduler
from tilelink.backend.simulate.trace import Traces
from tilelink.ir import Op, parse_ir
from tilelink.schedules.machine import Machine

SCHEDULES = 24


def altered(name: str, *pairs: tuple[str, str]) -> Op:
    """The sample with texts replaced; each must be there."""
    text = sample_text(name)
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return parse_ir(text, f"{name}.ir")


def oracle(program: Op) -> str | None:
    """What an attack of two calls finds; None if all schedules are right."""
    calls = [inputs_of(program, seed) for seed in range(2)]
    right = [[{"C": c} for c in expected(program, inputs)] for inputs in calls]
    failure = attack(program, calls, right, SCHEDULES)
    return None if failure is None else failure.oracle


def worded(name: str, number: int, word: str) -> Op:
    """The sample with one more attribute in its line ``number``."""
    lines = sample_text(name).splitlines()
    line = lines[number].rstrip()
    lines[number] = f"{line[:-1]}, {word}}}" if line.endswith("}") else f"{line} {{{word}}}"
    return parse_ir("\n".join(lines), f"{name}.ir")


def lines(kind: str) -> list[tuple[str, int, str]]:
    """Every line of the samples that is a ``kind``."""
    return [
        (name, number, line.strip())
        for name in ALL_NAMES
        for number, line in enumerate(sample_text(name).splitlines())
        if line.strip().startswith(kind)
    ]


RELAXED = [
    pytest.param(name, number, word, id=f"{name}: {text} {word}")
    for kind, words in (
        ("wait", ('order = "relaxed"',)),
        ("notify", ('order = "relaxed"', "barrier = false")),
    )
    for name, number, text in lines(kind)
    for word in words
]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_samples_withstand_the_attack(name: str) -> None:
    assert oracle(parse_ir(sample_text(name))) is None


@pytest.mark.parametrize(("name", "number", "word"), RELAXED)
def test_a_relaxed_word_orders_nothing(name: str, number: int, word: str) -> None:
    assert oracle(worded(name, number, word)) == "happens-before"


REMOTE = [
    pytest.param(name, number, id=f"{name}: {text}")
    for kind in ("wait", "notify")
    for name, number, text in lines(kind)
    if "counter" not in sample_text(name) or "@C.done" not in text
]


@pytest.mark.parametrize(("name", "number"), REMOTE)
def test_device_scope_does_not_reach_another_rank(name: str, number: int) -> None:
    assert oracle(worded(name, number, 'scope = "gpu"')) == "happens-before"


def test_device_scope_reaches_kernels_of_the_rank_but_no_stream() -> None:
    wait = "wait @C.done[RANK, 0] {count = 6}"
    notify = "notify @C.done[m.start / 16, 0]"
    kernel = altered("gemm_rs.copy_engine", (wait, wait[:-1] + ', scope = "gpu"}'))
    assert oracle(kernel) is None
    stream = altered("gemm_rs.copy_engine", (notify, notify + ' {scope = "gpu"}'))
    with pytest.raises(RaceError, match=r"C\.partial.*transfer"):
        for seed in range(SCHEDULES):
            run(stream, inputs_of(stream), seed)


LOAD = "own = @A[%m at m.start - RANK * 16, %k],"
READY = "{if = m.start / 16 != RANK}"


def test_a_tma_load_needs_the_proxy_fence_behind_its_wait() -> None:
    tma = (LOAD, LOAD + ' via = "tma",')
    bare = altered("ag_gemm.copy_engine", tma)
    with pytest.raises(RaceError, match=r"A\.all"):
        run(bare, inputs_of(bare))
    fenced = altered(
        "ag_gemm.copy_engine", tma, (READY, "{if = m.start / 16 != RANK, proxy = true}")
    )
    assert oracle(fenced) is None


STORE, DONE = "store @C.partial[%m, %n] (%c)", "notify @C.done[m.start / 16, 0]"


def test_a_tma_store_is_released_only_when_drained() -> None:
    tma = (STORE, STORE + ' {via = "tma"}')
    bare = altered("gemm_rs.copy_engine", tma)
    with pytest.raises(RaceError, match=r"C\.partial"):
        for seed in range(SCHEDULES):
            run(bare, inputs_of(bare), seed)
    assert oracle(altered("gemm_rs.copy_engine", tma, (DONE, DONE + " {drain = true}"))) is None
    # An output that only the user reads is complete when the launch is.
    last = ("store @C[%m, %n] (%c)", 'store @C[%m, %n] (%c) {via = "tma"}')
    assert oracle(altered("ag_gemm.copy_engine", last)) is None


def test_a_read_of_its_own_tma_store_is_not_ordered() -> None:
    name = "gemm_rs.copy_engine"
    twice = altered(
        name,
        (STORE, STORE + ' {via = "tma"}\n      %x = load @C.partial[%m, %n] : bf16[m, n]'),
        (DONE, DONE + " {drain = true}"),
    )
    with pytest.raises(RaceError, match=r"C\.partial"):
        run(twice, inputs_of(twice))


FLUSH = ("    stage @sum", "    flush\n    stage @sum")


def test_delayed_notifies_come_with_the_next_store_or_the_flush() -> None:
    delayed = (DONE, DONE + " {delay = 1}")
    program = altered("gemm_rs.copy_engine", delayed, FLUSH)
    assert oracle(program) is None
    assert oracle(altered("gemm_rs.copy_engine", delayed)) in ("deadlock", "balance")
    drained = (DONE, DONE + " {delay = 1, drain = true}")
    tma = (STORE, STORE + ' {via = "tma"}')
    assert oracle(altered("gemm_rs.copy_engine", drained, tma, FLUSH)) is None
    flushed = (FLUSH[0], FLUSH[1].replace("flush", "flush {drain = true}"))
    # Holding a notify back costs nothing on the virtual clock of the timeline.
    plain = timeline(parse_ir(sample_text("gemm_rs.copy_engine")), Machine.load())
    assert timeline(program, Machine.load()).makespan == pytest.approx(plain.makespan)
    # The flush drains what it releases, but the notifies that a next store released had not.
    assert oracle(altered("gemm_rs.copy_engine", delayed, tma, flushed)) == "happens-before"


def test_a_peers_flag_may_be_held_back() -> None:
    counted = "@C.arrived[m.start / 16, 0]}"
    delayed = (counted, counted.replace("}", ", delay = 1}"))
    assert oracle(altered("gemm_rs.epilogue", delayed, FLUSH)) is None
    assert oracle(altered("gemm_rs.epilogue", delayed)) in ("deadlock", "balance")
    late = ("    finish", "    flush\n    finish")
    assert oracle(altered("gemm_rs.epilogue", delayed, late)) == "deadlock"
    # Through the async proxy to a peer: released by what drains it.
    sent = ("(%c) {peer = m.start / 16", '(%c) {via = "tma", peer = m.start / 16')
    drained = (counted, counted.replace("}", ", drain = true}"))
    assert oracle(altered("gemm_rs.epilogue", sent, drained)) is None
    assert oracle(altered("gemm_rs.epilogue", sent)) == "happens-before"


def test_a_lost_notify_is_named() -> None:
    # Nothing waits for the counter, so that only the worker's exit shows the loss.
    text = sample_text("ag_gemm.copy_engine")
    text = text.replace(
        "  head do {", "  counter @extra {dims = [1], offset = 131072}\n  head do {"
    )
    text = text.replace(
        "store @C[%m, %n] (%c)", "store @C[%m, %n] (%c)\n notify @extra[0] {delay = 1}"
    )
    program = parse_ir(text)
    with pytest.raises(BalanceError, match=r"held back by .* are lost"):
        run(program, inputs_of(program))


def test_an_equal_wait_misses_a_producer_that_is_ahead() -> None:
    equal = (READY, READY[:-1] + ', compare = "equal"}')
    assert oracle(altered("ag_gemm.copy_engine", equal)) is None
    wait = "wait @ack[0..WORLD] {epoch = (0 - 1)}"
    # Without acknowledgements a fast rank is a call ahead: then at-least races, and equal hangs.
    ahead = altered("ag_gemm.copy_engine", equal, (wait, ""))
    found = {type(caught(ahead, seed)) for seed in range(SCHEDULES)}
    assert DeadlockError in found


def caught(program: Op, seed: int) -> Exception | None:
    """What a run of three calls without the race detector raises."""
    calls = [inputs_of(program, call) for call in range(3)]
    options = Options(versions=False, races=False)
    try:
        Scheduler(Traces(Geometry(program)), calls, seed, options).run()
    except Exception as failure:  # every kind is a finding here
        return failure
    return None


def test_words_that_the_head_clears() -> None:
    flag = "flag @A.ready {"
    cleared = altered("ag_gemm.copy_engine", (flag, flag + "cleared = true, "))
    # A fast peer's signal can come before this rank's head clears it.
    assert oracle(cleared) == "deadlock"
    counter = "counter @C.done {"
    kept = altered("gemm_rs.copy_engine", (counter, counter + "cleared = false, "))
    assert oracle(kept) in ("balance", "happens-before")


def test_workers_that_are_not_resident_come_later() -> None:
    some = ("workers = 4}", "workers = 4, resident = 2}")
    assert oracle(altered("ag_gemm.copy_engine", some)) is None
    # Workers 0 and 1 push what the others wait for: two that spin can keep them out.
    pushed = altered("ag_gemm.sm", some)
    assert oracle(pushed) == "deadlock"


def test_offsets_past_31_bits_are_wide_or_refused() -> None:
    def program(word: str) -> Op:
        return parse_ir(f"""
        program @big {{world = 1}} do {{
          extent @M {{value = 65536}}
          extent @N {{value = 32769}}
          tensor @C {{dims = [M, N], dtype = "bf16", move = "local", role = "out"}}
          launch @main {{workers = 1}} do {{
            stage @fill {{extent = [M, N], tile = [8, N]}} do (%m: tile, %n: tile) {{
              %z = zeros : bf16[m, n]
              store @C[%m, %n] (%z){word}
            }}
          }}
        }}
        """)

    def last(op: Op) -> None:
        traces = Traces(Geometry(op))
        stage = op.find("launch")[0].body[0]
        queue = traces.geometry.queue(stage, traces.geometry.env(0))
        traces.trace(0, "main", stage, 0, queue[0])
        traces.trace(0, "main", stage, len(queue) - 1, queue[-1])

    with pytest.raises(BoundsError, match=r"past 2\^31 - 1"):
        last(program(""))
    last(program(" {wide = true}"))


@pytest.mark.parametrize("name", ["ag_gemm.sm", "gemm_ar.epilogue"])
def test_data_can_arrive_after_a_relaxed_signal(name: str) -> None:
    """Not only the clocks: some schedule leaves the store behind, and the numbers are wrong."""
    notify = (
        "notify @A.ready[RANK, t.start / 8] {"
        if "ag" in name
        else "notify @C.ready[RANK, m.start / 16] {"
    )
    relaxed = altered(name, (notify, notify + 'order = "relaxed", '))
    inputs = inputs_of(relaxed)
    right = expected(relaxed, inputs)
    options = Options(versions=False, races=False)
    wrong = 0
    for seed in range(SCHEDULES):
        found = Scheduler(Traces(Geometry(relaxed)), [inputs], seed, options).run()[0]
        wrong += any(not error(o["C"], w) < 0.005 for o, w in zip(found, right, strict=True))
    assert wrong > 0
