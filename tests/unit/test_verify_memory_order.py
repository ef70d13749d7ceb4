"""Weak synchronisation, the async proxy, held-back notifies and odd words: what rests on them is refused."""

import pytest

from tests.unit.verify_programs import text_of
from tilelink.backend.verify import (
    BoundsError,
    CoverError,
    FenceError,
    MatchError,
    ProgressError,
    ReuseError,
    UndecidedError,
    VerifyError,
    verify,
)
from tilelink.ir import Op, parse_ir

AG, RS, AR = "ag_gemm.copy_engine", "gemm_rs.copy_engine", "gemm_ar.epilogue"
PUSH = "gemm_rs.epilogue"
SENT = "(%c) {peer = m.start / 16"
COUNTED = "through = @C.arrived[m.start / 16, 0]"
READY = "wait @A.ready[m.start / 16, 0] {if = m.start / 16 != RANK"
LOAD = "when = m.start / 16 == RANK}"
DONE = "notify @C.done[m.start / 16, 0]"
PARTIAL = "store @C.partial[%m, %n] (%c)"
OWN = "wait @C.done[RANK, 0] {count = 6"
STREAM = "wait @C.done[(RANK + s.1) % WORLD, 0] {count = 6"
ARRIVED = "wait @C.ready[0..RANK, 0]"
ACK = "notify @ack[RANK] {peer = p"
HEAD = "wait @ack[0..WORLD] {"
SUM = "    stage @sum"
PARTS = "%n.1] {own = @C.partial[%m.1, %n.1]}"


def edited(name: str, *edits: tuple[str, str]) -> Op:
    """The program with each first text of ``edits`` replaced, once, by the second."""
    text = text_of(name)
    for old, new in edits:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return parse_ir(text, name)


FINE = [
    (AG, [(READY, READY + ', scope = "sys"')]),
    # An input that nobody writes needs no fence; a proxy fence behind the wait is what others need.
    (AG, [("load @B[%k, %n]", 'load @B[%k, %n] {via = "tma"}')]),
    (AG, [(LOAD, 'via = "tma", ' + LOAD), (READY, READY + ", proxy = true")]),
    # An output is complete when the launch is.
    (AG, [("store @C[%m, %n] (%c)", 'store @C[%m, %n] (%c) {via = "tma"}')]),
    (RS, [(OWN, OWN + ', scope = "gpu"')]),
    (RS, [(PARTIAL, PARTIAL + ' {via = "tma"}'), (DONE, DONE + " {drain = true}")]),
    (RS, [(DONE, DONE + " {delay = 1}"), (SUM, "    flush\n" + SUM)]),
    (PUSH, [(COUNTED, COUNTED + ", delay = 1"), (SUM, "    flush\n" + SUM)]),
    (PUSH, [(SENT, SENT + ', via = "tma"'), (COUNTED, COUNTED + ", drain = true")]),
    (
        RS,
        [
            (PARTIAL, PARTIAL + ' {via = "tma"}'),
            (DONE, DONE + " {delay = 1, drain = true}"),
            (SUM, "    flush {drain = true}\n" + SUM),
        ],
    ),
    # Counters are cleared, and end at their count; acknowledgements keep peers from the next epoch.
    (RS, [(OWN, OWN + ', compare = "equal"')]),
    (RS, [(ARRIVED, ARRIVED + ' {compare = "equal"}')]),
    # Nothing in this launch waits for another of its workers.
    (AG, [("workers = 4", "resident = 1, workers = 4")]),
    # Only few of these workers have a tile, and the others leave at once.
    (RS, [("workers = 4", "workers = 264")]),
]


@pytest.mark.parametrize(("name", "edits"), FINE)
def test_enough_is_accepted(name: str, edits: list[tuple[str, str]]) -> None:
    verify(edited(name, *edits))


# (program, edits, the error, a part of its text)
WEAK = [
    (AG, [(READY, READY + ', order = "relaxed"')], CoverError, "acquires nothing"),
    (AG, [(READY, READY + ', scope = "gpu"')], CoverError, "too small a scope"),
    (AG, [(ACK, ACK + ', scope = "gpu"')], ReuseError, "releases nothing"),
    (AG, [(ACK, ACK + ", barrier = false")], ReuseError, "without its barrier"),
    (AG, [(ACK, ACK + ', order = "relaxed"')], ReuseError, "next call"),
    (AG, [(HEAD, HEAD + 'order = "relaxed", ')], ReuseError, "next call"),
    # A stream is no kernel: it neither reaches nor is reached in scope gpu.
    (RS, [(DONE, DONE + ' {scope = "gpu"}')], CoverError, "C.partial"),
    (RS, [(STREAM, STREAM + ', scope = "gpu"')], CoverError, "stream @copy"),
    (RS, [(DONE, DONE + ' {order = "relaxed"}')], CoverError, "releases nothing"),
    # The last of counted notifies raises the flag for all: a weak one among them is weak for all.
    (AR, [("count = 3, peer", 'count = 3, order = "relaxed", peer')], CoverError, "C.parts"),
    # The async proxy.
    (AG, [(LOAD, 'via = "tma", ' + LOAD)], CoverError, "proxy = true"),
    (RS, [(PARTIAL, PARTIAL + ' {via = "tma"}')], CoverError, "drain"),
    (
        RS,
        [(PARTIAL, PARTIAL + ' {via = "tma"}'), (SUM, "    flush {drain = true}\n" + SUM)],
        CoverError,
        "drain",
    ),
    (
        RS,
        [
            (PARTIAL, PARTIAL + ' {via = "tma"}\n      %z = load @C.partial[%m, %n] : bf16[m, n]'),
            (DONE, DONE + " {drain = true}"),
        ],
        CoverError,
        "drain",
    ),
    (
        RS,
        [
            (
                PARTIAL,
                PARTIAL + '\n      %z = load @C.partial[%m, %n] {via = "tma"} : bf16[m, n]',
            )
        ],
        CoverError,
        "proxy = true",
    ),
    # The proxy fence stands before the acquire that counts.
    (
        AG,
        [
            (LOAD, 'via = "tma", ' + LOAD),
            (READY, "wait @A.ready[(RANK + 1) % WORLD, 0] {proxy = true}\n      " + READY),
        ],
        CoverError,
        "proxy = true",
    ),
    # Held back.
    (RS, [(DONE, DONE + " {delay = 1}")], MatchError, "lost"),
    (PUSH, [(COUNTED, COUNTED + ", delay = 1")], MatchError, "lost"),
    (
        PUSH,
        [(COUNTED, COUNTED + ", delay = 1"), ("    finish", "    flush\n    finish")],
        ProgressError,
        "flush",
    ),
    (
        AR,
        [
            ("C.arrived[d.1, m.start / 16]", "C.arrived[d.1, m.start / 16], delay = 1"),
            (SUM, "    flush\n" + SUM),
        ],
        UndecidedError,
        "delay",
    ),
    (
        RS,
        [(DONE, DONE + " {delay = 1}"), ("    stage @gemm", "    flush\n    stage @gemm")],
        MatchError,
        "lost",
    ),
    (
        RS,
        [(DONE, DONE + " {delay = 1}"), ("    finish", "    flush\n    finish")],
        ProgressError,
        "flush",
    ),
    (
        RS,
        [
            (PARTIAL, PARTIAL + ' {via = "tma"}'),
            (DONE, DONE + " {delay = 1}"),
            (SUM, "    flush {drain = true}\n" + SUM),
        ],
        CoverError,
        "drain",
    ),
    (AG, [(ACK, ACK + ", delay = 1")], FenceError, "held back"),
    (RS, [(DONE, DONE + " {delay = 2}")], UndecidedError, "delay"),
    (PUSH, [(SENT, SENT + ', via = "tma"')], CoverError, "drain"),
    (
        PUSH,
        [
            (SENT, SENT + ', via = "tma"'),
            (COUNTED, COUNTED + ", delay = 1"),
            (SUM, "    flush\n" + SUM),
        ],
        CoverError,
        "drain",
    ),
    # Words of flags and counters.
    (RS, [("counter @C.done {", "counter @C.done {cleared = false, ")], MatchError, "not cleared"),
    (
        AR,
        [("counter @C.arrived {", "counter @C.arrived {cleared = false, ")],
        MatchError,
        "not cleared",
    ),
    (RS, [("flag @C.ready {", "flag @C.ready {cleared = true, ")], MatchError, "lost"),
    (RS, [("flag @ack {", "flag @ack {cleared = true, ")], MatchError, "epoch of the call before"),
    (RS, [(HEAD, HEAD + 'compare = "equal", ')], MatchError, "equality"),
    (RS, [(ARRIVED, ARRIVED + " {epoch = 1}")], MatchError, "epoch +1"),
    (RS, [("(0 - 1)", "(0 - 2)")], MatchError, "epoch -2"),
    (RS, [(OWN, OWN + ", epoch = (0 - 1)")], MatchError, "no epoch"),
    (AR, [("@C.arrived[d.1, m", "@C.arrived[d.1 + 1, m")], BoundsError, "through"),
    # Residency.
    (AR, [("workers = 4", "resident = 3, workers = 4")], ProgressError, "has not begun"),
    ("ag_gemm.sm", [("workers = 4", "resident = 2, workers = 4")], ProgressError, "has not begun"),
    (RS, [("workers = 4", "resident = 0, workers = 4")], ProgressError, "resident"),
]


@pytest.mark.parametrize(("name", "edits", "error", "part"), WEAK)
def test_too_little_is_refused(
    name: str, edits: list[tuple[str, str]], error: type[VerifyError], part: str
) -> None:
    with pytest.raises(error) as caught:
        verify(edited(name, *edits))
    assert part in str(caught.value)
    assert caught.value.span is not None or error is UndecidedError


def test_equality_without_an_acknowledgement_is_refused() -> None:
    """Without acknowledgements nothing keeps a peer from raising the flag for the next call."""
    text = text_of(AG).replace(READY, READY + ', compare = "equal"')
    text = text.replace("notify @ack[RANK] {peer = p}", "").replace(
        "wait @ack[0..WORLD] {epoch = (0 - 1)}", ""
    )
    with pytest.raises(VerifyError):
        verify(parse_ir(text, "p"))
