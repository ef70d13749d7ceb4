"""Validation of emitted modules: intact texts pass, and texts that were changed do not."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.assurance.emitted import BESIDE, EVEN, MUTATED, ODD, RESOURCES, TILES, Result, attack
from tests.assurance.emitted import case as case_of
from tests.edits import changed, check
from tilelink.backend.emit.triton import emit
from tilelink.backend.validate import (
    EmittedDiffers,
    EmittedError,
    EmittedHazard,
    Unclear,
    read_module,
    split_modules,
    validate,
)
from tilelink.cli.main import main
from tilelink.errors import Source
from tilelink.ir import Op

PAIRS = [(k, r) for k, resources in RESOURCES.items() for r in resources]


@functools.cache
def _emitted(kernel: str, resource: str, shape: tuple[tuple[str, int], ...]) -> tuple[Op, str]:
    program = case_of(kernel, resource, dict(shape), workers=5, tiles=TILES).program()
    return program, emit(program)


def emitted(kernel: str, resource: str, shape: dict[str, int] = EVEN) -> tuple[Op, str]:
    """A program with several tasks a worker, and its module."""
    return _emitted(kernel, resource, tuple(shape.items()))


@pytest.mark.parametrize(("kernel", "resource"), PAIRS)
def test_intact_modules_pass(kernel: str, resource: str) -> None:
    program, text = emitted(kernel, resource, ODD)
    found = validate(read_module(Source("emitted.py", text)), program)
    waits = sum(op.name == "wait" for op in program.walk())
    assert found.accesses > 0
    assert (found.signals > 0) == (waits > 0)


# One edit a rule: kernel, resource, what is replaced by what, and who objects.
EDITS = [
    ("ag_gemm", "copy_engine", r"(q \+ tl.num_programs\(0\),\s+1),\s+True", r"\1", EmittedHazard),
    ("ag_gemm", "copy_engine", r"a_shift = token", "a_shift = 0", EmittedHazard),
    ("ag_gemm", "copy_engine", r"token \+= device.peer", "token = device.peer", EmittedHazard),
    ("ag_gemm", "copy_engine", r"for m_part in range\(0, 4\)", "for m_part in range(0, 3)", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"ctx\.epoch", "ctx.epoch - 1", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"device\.rank_notify\(ctx, 128\)", "pass", EmittedDiffers),
    ("ag_gemm", "copy_engine", r'\n +call\.notify\("A.ready".*', "", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"arrival_ns, True\)", "arrival_ns, False)", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"device\.open_call\(.*\)", "pass", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"program, 128, True", "program, None, True", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"program, 128, True", "program, 129, True", EmittedHazard),
    ("ag_gemm", "copy_engine", r"program, 128, True", "program, 128, False", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"call\.begin\(\)", "pass", EmittedError),
    ("ag_gemm", "copy_engine", r"call\.begin\(\)", "call.head(ack_wait=True)", EmittedDiffers),
    ("ag_gemm", "copy_engine", r'"A.copy", after=\("head",\)', '"A.copy", after=()', EmittedDiffers),
    ("gemm_rs", "epilogue", r"end_call\(ctx, (\d+), \d+", r"end_call(ctx, \1, \1", EmittedHazard),
    ("gemm_rs", "epilogue", r"if device\.end_call\(.*\):", "if rank == 0:", EmittedError),
    ("gemm_rs", "epilogue", r"(end_call\(.*), False\)", r"\1, True)", EmittedHazard),
    ("gemm_rs", "epilogue", r"device\.rank_notify\(ctx, 128\)", "pass", EmittedDiffers),
    ("gemm_rs", "epilogue", r"device\.spoil\(.*\)", "pass", EmittedDiffers),
    ("gemm_rs", "epilogue", r"( +)(device\.spoil\(.*\))", r"\1if rank == 0:\n\1    \2", EmittedHazard),
    ("gemm_rs", "copy_engine", r"if (device\.finish_arrive\(ctx\)):\n +", r"\1\n    ", EmittedError),
    ("ag_gemm", "copy_engine", r"ag_gemm, 5, args", "ag_gemm, 4, args", EmittedDiffers),
    ("ag_gemm", "copy_engine", r"a = a_from.load", "a = unknown.load", Unclear),
    ("ag_gemm", "sm:2", r"queue_next\(ctx, (\d+)\)", r"queue_next(ctx, \1 + 1)", EmittedError),
    ("ag_gemm", "sm:2", r"\n {8}taken = device\.queue_next\([^)]*\)", "", Unclear),
    ("ag_gemm", "sm:2", r"q in tl.range\(tl.program_id\(0\), 3, 2", "q in tl.range(0, 3, 2", EmittedError),
    ("gemm_rs", "copy_engine", r"(delayed_tile_notify\(ctx, pending), True", r"\1", EmittedHazard),
    ("gemm_rs", "copy_engine", r"finish_leave\(ctx, (\d+), (\d+)\)", r"finish_leave(ctx, \1, \1)", EmittedHazard),
    ("gemm_rs", "copy_engine", r"\n    device.delayed_tile_notify\(ctx, pending, True\)", "", EmittedDiffers),
    ("gemm_rs", "sm:2", r"C_sum_parts \+= token", "pass", EmittedHazard),
    ("gemm_rs", "epilogue", r"C_sum_total \+= C_sum_part1", "C_sum_total += C_sum_part2", EmittedHazard),
    ("gemm_rs", "epilogue", r"C_sum_total \+= C_sum_part3.to\(tl.float32\)\n", "pass\n", EmittedDiffers),
    ("gemm_rs", "epilogue", r"C_sum_part1.to\(tl.float32\)", "C_sum_part1", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r"(tile_sum_parts\(\s*)c_own(\w*)", r"\1acc_own", EmittedError),
    ("gemm_rs", "copy_engine-folded", r"32768, None, rank, 4", "32768 // 2, None, rank, 4", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r"32768, None, rank, 4", "32768, None, rank * 0, 4", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r"32768, None, rank, 4", "32768, None, rank, 3", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r"c_own = acc_own.to\(tl.bfloat16\)", "c_own = acc_own", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r"C_sum_parts \+= token", "pass", EmittedHazard),
    ("gemm_rs", "copy_engine-folded", r", 1, 0, rank, ctx", ", 1, 0, rank * 0, ctx", EmittedDiffers),
    ("gemm_rs", "copy_engine-folded", r"(% tl.num_programs\(0\))\n", r"\1 * 0\n", EmittedError),
    ("gemm_rs", "epilogue", r"\n    device.delayed_counted_notify\(.*", "", EmittedDiffers),
    ("gemm_rs", "epilogue", r"pending_peer = m_start // 128", "pending_peer = rank", EmittedDiffers),
    ("gemm_rs", "epilogue", r"pending = 1024 \+ rank", "pending = 1024 + (rank + 1) % 4", EmittedDiffers),
    ("gemm_rs", "epilogue", r"pending_through, 2\)", "pending_through, 1)", EmittedDiffers),
    ("gemm_rs", "epilogue", r"(peer_tiles_wait\(\s*ctx, .*?), 0, 4", r"\1, 1, 4", EmittedDiffers),
    ("gemm_rs", "epilogue", r"(peer_tiles_wait\(\s*ctx, .*?), 0, 4", r"\1, 0, 5", EmittedHazard),
    ("gemm_ar", "epilogue", r"(counted_all_tile_notify\(\s*ctx, [^,]*, [^,]*), \d+", r"\1, 0", EmittedDiffers),
    ("gemm_ar", "epilogue", r"counted_(all_tile_notify\(\s*ctx, [^,]*),[^)]*\)", r"\1)", EmittedDiffers),
    ("gemm_rs", "epilogue", r'"C.parts", peer=1\)\[rank\]', '"C.parts", peer=2)[rank]', EmittedDiffers),
    ("gemm_rs", "epilogue", r'"C.parts", peer=1\)\[rank\]', '"C.parts", peer=1)[(rank + 1) % 4]', Unclear),
    ("gemm_rs", "epilogue", r"if C_parts_peer == 2", "if C_parts_peer == 1", EmittedDiffers),
    ("gemm_rs", "epilogue", r"device.delayed_counted_notify\(", "device.counted_tile_notify(", EmittedError),
    ("gemm_ar", "none", r'"all_reduce"', '"reduce_scatter"', EmittedDiffers),
    ("gemm_rs", "epilogue", r"a = A_64x64.load\(\[m_start", "a = A_64x64.load([m_start * 0", EmittedDiffers),
    ("gemm_rs", "epilogue", r"tl.dot\(a, b, acc\)", "tl.dot(b, b, acc)", EmittedHazard),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "resource", "old", "new", "error"), EDITS)
def test_an_edit_is_refused(
    kernel: str, resource: str, old: str, new: str, error: type[EmittedError]
) -> None:
    program, text = emitted(kernel, resource)
    with pytest.raises(error):
        check(program, changed(text, old, new))


def test_offsets_that_wrap_are_refused_and_wide_ones_are_not() -> None:
    program, text = emitted("gemm_rs", "sm:2")
    far = r"\1 + (\2 - \2 + 46341) * 46341 * 0"
    narrow = changed(text, r"(m_start) = (m_segment)\b", rf"m_start = {far[5:]} + \2")
    with pytest.raises(EmittedHazard, match="64 bits"):
        check(program, narrow)
    wide = narrow.replace("46341) * 46341", "46340) * 46340")
    check(program, wide)


def test_a_module_of_another_shape_is_refused() -> None:
    program, _ = emitted("gemm_rs", "epilogue")
    _, other = emitted("gemm_rs", "epilogue", ODD)
    with pytest.raises(EmittedDiffers):
        check(program, other)


def test_the_error_points_at_the_line_of_the_module() -> None:
    program, text = emitted("ag_gemm", "copy_engine")
    bad = changed(text, r"ctx\.epoch", "ctx.epoch - 1")
    lines = bad.splitlines()
    line = next(n for n, t in enumerate(lines, 1) if "ctx.epoch - 1" in t)
    with pytest.raises(EmittedDiffers) as caught:
        check(program, bad)
    assert caught.value.span is not None
    # The error points at the call, which begins a line above its first argument.
    call = caught.value.span.line
    assert "peer_tile_wait(" in lines[call - 1]
    assert all(lines[n].strip().endswith(",") for n in range(call, line))


def test_statements_of_no_module_are_refused() -> None:
    program, text = emitted("ag_gemm", "none")
    for extra in ("import os\n", "def helper():\n    pass\n", "TEXT = ''\n"):
        with pytest.raises(Unclear):
            check(program, text + extra)


def test_files_with_several_modules_are_split() -> None:
    _, text = emitted("ag_gemm", "none")
    parts = split_modules(text + text, "two.py")
    assert len(parts) == 2
    assert parts[1].text.lstrip("\n") == text
    assert parts[1].line(len(text.splitlines()) + 1) == text.splitlines()[0]


@pytest.mark.parametrize("kernel", MUTATED)
def test_mutants_of_the_text_are_refused(kernel: str) -> None:
    result = Result()
    for number, resource in enumerate(RESOURCES[kernel]):
        one = case_of(kernel, resource, EVEN, workers=5, tiles=TILES)
        attack(one, 3, 100 + number, result, Counter())
        if resource in BESIDE:
            attack(replace(one, emitter="library"), 6, 100 + number, result, Counter())
    assert result.mutants >= 12
    assert result.refused == result.mutants


def test_the_command_accepts_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = str(Path(__file__).parents[2] / "tilelink" / "kernels" / "gemm_rs.py")
    options = ["--world", "2", "--set", "M=256,N=128,K=64", "--resource", "epilogue"]
    assert main(["emit", kernel, *options]) == 0
    text = capsys.readouterr().out
    module = tmp_path / "module.py"
    module.write_text(text)
    assert main(["check", "--emitted", str(module), kernel]) == 0
    out = capsys.readouterr().out
    assert out.count("the text is the program of its kernel") == 2
    module.write_text(changed(text, r"ctx\.epoch", "ctx.epoch - 1"))
    assert main(["check", "--emitted", str(module), kernel]) == 1
    assert "emitted-differs" in capsys.readouterr().err
