"""Calls that begin and end in their kernels: what the pass folds, and what the proof asks of a folded head."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tilelink import kernels
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.fold_head import fold_head
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.validate import EmittedError, EmittedHazard, read_module, validate
from tilelink.backend.verify import MatchError, ReuseError, UndecidedError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.schedules import Move, Schedule

AGENTS = ("head", "launch", "stream", "collective")


def program(kernel: str, resource: str, emitter: str = "triton", **move: object) -> Op:
    """A small program, proven."""
    op = getattr(kernels, kernel).build({"M": 64, "K": 32, "N": 48}, world=2)
    tensor = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}[kernel]
    chosen = Schedule(
        tiles=(("K", 16), ("M", 16), ("N", 16)),
        workers=3,
        emitter=emitter,
        moves=((tensor, Move(resource=resource, **move)),),  # type: ignore[arg-type]
    )
    return compile_kernel(op, chosen)


def agents(made: Op) -> list[str]:
    return [op.name for op in made.body if op.name in AGENTS]


def folded(made: Op) -> bool:
    return any(op.get("folded") for op in made.find("head"))


@pytest.mark.parametrize("kernel", ["ag_gemm", "gemm_rs"])
def test_streams_come_behind_the_first_launch_and_a_guard_ends_the_call(kernel: str) -> None:
    made = program(kernel, "copy_engine")
    assert folded(made) and agents(made)[:2] == ["head", "launch"] and "stream" in agents(made)
    assert not any(op.get("ends") for op in made.find("launch"))
    text = emit(made)
    assert "call.begin()" in text and "call.head(" not in text
    assert text.index("call.begin()") < text.index("call.launch(") < text.index("call.stream(")
    # The first launch waits and tells the streams; each takes the epoch itself.
    assert text.count("device.call_context(") == len(made.find("launch"))
    assert text.count("device.open_call(") == text.count("open_call(ctx, program, 128, True)") == 1


@pytest.mark.parametrize("resource", ["epilogue", "sm:1"])
def test_a_launch_alone_ends_its_call(resource: str) -> None:
    made = program("gemm_rs", resource, sum="epilogue")
    assert folded(made) and agents(made) == ["head", "launch"]
    assert made.find("launch")[0].get("ends") is True
    text = emit(made)
    assert "call.begin()" not in text and "call.head(" not in text
    assert "device.end_call(" in text and "False):" in text and "device.spoil(" in text


def test_where_the_library_computes_the_head_is_a_kernel() -> None:
    for made in (program("ag_gemm", "copy_engine", "library"), program("gemm_rs", "none")):
        assert not folded(made)


@pytest.mark.parametrize(
    ("kernel", "move", "begins"),
    [
        (kernels.ag_gemm, ("A", Move()), "open_call(ctx, program, 128, True, M)"),
        (kernels.gemm_rs, ("C", Move("epilogue")), "open_call(ctx, program, 128, False, M)"),
        (kernels.gemm_ar, ("C", Move("epilogue", slots=2)), "ns, program, M)"),
    ],
)
def test_launches_tell_and_compare_the_value_of_a_dynamic_extent(
    kernel: Any, move: tuple[str, Move], begins: str
) -> None:
    op = kernel.build({"M": 64, "K": 32, "N": 48}, world=2, dynamic=("M",))
    made = compile_kernel(op, Schedule(moves=(move,)))
    text = emit(made)
    assert folded(made) and "call.head" not in text
    assert text.count(begins) == 1 and text.count("device.hear_call(ctx)") == 1
    validate(read_module(Source("f.py", text)), made)
    for old, new in (
        (begins, begins.replace(", M)", ")")),
        (begins, begins.replace(", M)", ", rank)")),
        ("device.hear_call(ctx)", "pass"),
        ("device.hear_call(ctx)", "device.hear_call(arena)"),
    ):
        with pytest.raises(EmittedError):
            validate(read_module(Source("f.py", text.replace(old, new))), made)


def test_the_pass_changes_no_program_twice() -> None:
    made = program("gemm_rs", "copy_engine")
    assert fold_head(made) == made


BAD = (
    (r"head \{folded = true\}", "head", "ends a call begins it"),
    (r"head \{folded = true\}", "head {folded = false}", "folded head"),
    (r", ends = true", ", ends = false", "nothing else"),
    (r'after = \["head"\], ', "", "`after` names it"),
    (r"(flag @ack \{)", r"\1cleared = true, ", "counters are cleared and flags are not"),
    (r"(counter @\S+ \{)", r"\1cleared = false, ", "counters are cleared and flags are not"),
)


@pytest.mark.parametrize(("old", "new", "why"), BAD, ids=[f"{o}-{n}" for o, n, _ in BAD])
def test_what_no_kernel_could_do_is_refused(old: str, new: str, why: str) -> None:
    text = print_ir(program("gemm_rs", "epilogue", sum="epilogue").with_attrs(kernel_text=None))
    broken, count = re.subn(old, new, text, count=1)
    assert count == 1
    with pytest.raises(UndecidedError, match=why):
        verify(parse_ir(broken))


WAIT = r"wait @ack\[0\.\.WORLD\] \{epoch = \(0 - 1\)\}"


@pytest.mark.parametrize(
    ("old", "new"), [(WAIT, ""), (WAIT, "wait @ack[0..1] {epoch = (0 - 1)}"), ("notify @ack", "")]
)
def test_calls_that_do_not_hear_of_each_other_are_refused_as_with_a_head_of_their_own(
    old: str, new: str
) -> None:
    for resource in ("epilogue", "copy_engine"):
        text = print_ir(program("gemm_rs", resource, sum="epilogue").with_attrs(kernel_text=None))
        broken = re.sub(old if new or old == WAIT else r" *notify @ack.*\n", new, text, count=1)
        assert broken != text
        with pytest.raises((ReuseError, MatchError)):
            verify(parse_ir(broken))


@pytest.mark.parametrize("new", ["", "wait @ack[1] {epoch = (0 - 1)}", "wait @ack[0..WORLD]"])
def test_other_waits_of_a_folded_head_have_no_code(new: str) -> None:
    for resource in ("epilogue", "copy_engine"):
        text = re.sub(WAIT, new, print_ir(program("gemm_rs", resource, sum="epilogue")), count=1)
        with pytest.raises(CannotEmit):
            emit(parse_ir(text))


def test_a_call_that_takes_no_epoch_has_no_flags() -> None:
    """Also where no stream waits for it, and nothing says that its launch ends it."""
    made = program("gemm_rs", "epilogue", sum="epilogue")
    text = re.sub(WAIT, "", print_ir(made).replace("ends = true, ", ""))
    with pytest.raises(CannotEmit, match="other than all acknowledgements"):
        emit(parse_ir(text))


def test_a_finish_that_uses_counters_comes_before_they_are_cleared() -> None:
    """The end of a call in its launch stands before the ops of its `finish`."""
    text = print_ir(program("gemm_rs", "sm:1", sum="epilogue").with_attrs(kernel_text=None))
    wait = "      wait @C.done[(RANK + 1) % WORLD, 0] {count = 3}\n"
    ending = text.replace("    finish do {\n", f"    finish do {{\n{wait}")
    assert ending != text
    with pytest.raises(UndecidedError, match="cleared the counters"):
        verify(parse_ir(ending))
    with pytest.raises(EmittedHazard, match="has cleared it"):
        validate(read_module(Source("emitted.py", emit(parse_ir(ending)))), parse_ir(ending))
    # The pass leaves the end of such a call to the guard.
    plain = ending.replace("head {folded = true}", "head").replace("ends = true, ", "")
    made = fold_head(parse_ir(plain))
    assert folded(made) and not any(op.get("ends") for op in made.find("launch"))
    verify(made)
    validate(read_module(Source("emitted.py", emit(made))), made)


def test_streams_in_front_of_the_launch_are_refused() -> None:
    """They wait for it, and with one hardware queue it would not start."""
    made = program("ag_gemm", "copy_engine")
    ops = list(made.body)
    stream = next(op for op in ops if op.name == "stream")
    ops.remove(stream)
    ops.insert(next(n for n, op in enumerate(ops) if op.name == "launch"), stream)
    with pytest.raises(UndecidedError, match="within the launch behind it"):
        verify(made.with_ops(tuple(ops)))


def test_a_launch_beside_streams_ends_no_call() -> None:
    made = program("ag_gemm", "copy_engine")
    text = re.sub(r"(launch @ag_gemm \{after = \[.head.\], )", r"\1ends = true, ", print_ir(made))
    assert "ends = true" in text
    with pytest.raises(UndecidedError, match="a call that is nothing else"):
        verify(parse_ir(text))
