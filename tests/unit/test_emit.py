"""The emitter's text: determinism, style, structure and refusals."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilelink.backend.emit.scope import CannotEmit, linear
from tilelink.backend.emit.text import Writer, render, span
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.order_memory import order_memory
from tilelink.ir import Op, parse_ir, print_ir

PROGRAMS = sorted((Path(__file__).parents[1] / "programs").glob("*.ir"))
ROOT = Path(__file__).parents[2]


def program(name: str) -> Op:
    path = next(p for p in PROGRAMS if p.name == f"{name}.ir")
    return order_memory(parse_ir(path.read_text(), path.name))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_text_is_python_and_carries_the_program(path: Path) -> None:
    op = parse_ir(path.read_text(), path.name)
    source = emit(op)
    compile(source, path.name, "exec")
    text = print_ir(op)
    assert hashlib.sha256(text.encode()).hexdigest() in source
    carried = re.search(r'TEXT = r"""\n(.*?)"""', source, re.DOTALL)
    assert carried is not None and parse_ir(carried[1]) == op
    assert max(len(line) for line in source.replace(text, "").splitlines()) <= 100


def test_text_does_not_depend_on_the_hash_seed() -> None:
    script = (
        "import sys\nfrom tilelink.ir import parse_ir\n"
        "from tilelink.backend.emit.triton import emit\n"
        "for path in sys.argv[1:]:\n    sys.stdout.write(emit(parse_ir(open(path).read(), path)))\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", script, *map(str, PROGRAMS)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1 and b"@triton.jit" in next(iter(texts))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_text_is_as_ruff_leaves_it(path: Path, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed")
    module = tmp_path / "emitted.py"
    module.write_text(emit(parse_ir(path.read_text(), path.name)))
    options = ["--isolated", "--line-length", "100", str(module)]
    check = ["check", "--select", "B,C4,E,F,I,RUF,SIM,UP,W", *options]
    for command in (check, ["format", "--check", *options]):
        result = subprocess.run(
            [ruff, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_local_shard_is_chosen_before_the_loop() -> None:
    source = emit(program("ag_gemm.copy_engine"))
    choice, loop = source.index("a_from = A_"), source.index("for k_start in tl.range(")
    wait = source.index("device.peer_tile_wait(")
    assert wait < choice < loop < source.index("a = a_from.load([a_row, k_start])")
    assert "a_row = m_start + token" in source


def test_counters_that_a_stream_waits_for_are_released_to_the_system() -> None:
    source = emit(program("gemm_rs.copy_engine"))
    assert re.search(r"producer_tile_notify\(ctx, .*, True\)", source)
    assert "device.finish_leave(ctx, 32768, 32772)" in source
    # No stream waits for it: the kernel's own counter needs the GPU's scope only.
    assert not re.search(r"producer_tile_notify\(.*True\)", emit(program("gemm_rs.sm")))


def test_nothing_that_is_signalled_leaves_by_tma() -> None:
    source = emit(program("gemm_rs.copy_engine"))
    stage = source[source.index("# Stage gemm.") : source.index("# Stage sum.")]
    assert "tl.store(" in stage and ".store([" not in stage


def test_a_static_rank_is_never_specialised() -> None:
    for path in PROGRAMS:
        found = re.findall(r"@triton\.jit\((.*)\)", emit(parse_ir(path.read_text())))
        assert found and all('"rank"' in options for options in found)


def test_origin_comments_name_lines_of_python_sources() -> None:
    from dataclasses import replace

    from tilelink.errors import Source, Span

    op = program("ag_gemm.copy_engine")
    place = Span(Source("examples/ag_gemm.py", "x\n" * 20), 9, 5, 6)

    def mark(node: Op) -> Op:
        blocks = tuple(replace(b, ops=tuple(map(mark, b.ops))) for b in node.blocks)
        return replace(node, blocks=blocks, span=place if node.name == "dot" else node.span)

    lines = [line for line in emit(mark(op)).splitlines() if "tl.dot(" in line]
    assert lines and all(line.endswith("  # ag_gemm.py:9") for line in lines)


def test_an_op_without_code_is_refused_with_its_place() -> None:
    text = print_ir(program("gemm_rs.sm")).replace("cast (", "sort (")
    with pytest.raises(CannotEmit, match="the op `sort`") as caught:
        emit(parse_ir(text, "bad.ir"))
    assert caught.value.span is not None and "sort" in caught.value.span.caret()


def test_expressions() -> None:
    def text(source: str) -> str:
        attribute = dict(parse_ir(f"x {{e = {source}}}").attrs)["e"]
        value = render(attribute, lambda name: name.replace(".", "_"))
        env = {"a": 7, "b": 3, "m_start": 40}
        assert eval(value.replace("tl.minimum", "min"), env.copy()) == attribute.evaluate(
            {"a": 7, "b": 3, "m.start": 40}
        )
        return value

    assert text("a - (b - 1)") == "a - (b - 1)"
    assert text("(a + b) % 4 * 2") == "(a + b) % 4 * 2"
    assert text("a / (b * 2)") == "a // (b * 2)"
    assert text("min(a, m.start / 8) + 1") == "tl.minimum(a, m_start // 8) + 1"


def test_lengths_of_ranges_that_move() -> None:
    attrs = dict(parse_ir("x {d = (r + 1) % 4 * 16 + 24 - ((r + 1) % 4 * 16 + 8)}").attrs)
    terms = linear(attrs["d"])
    assert terms.pop("") == 16 and not any(terms.values())


def test_writer_breaks_calls_as_ruff_does() -> None:
    writer = Writer()
    writer.call("f(", ["a" * 40, "b" * 40])
    writer.call("f(", ["a" * 50, "b" * 44])
    writer.call("f(", ["a" * 60, "b" * 60])
    assert writer.lines == [
        f"f({'a' * 40}, {'b' * 40})",
        f"f({'a' * 50}, {'b' * 44})",
        "f(",
        f"    {'a' * 60},",
        f"    {'b' * 60},",
        ")",
    ]
    assert span("0", "n") == "0:n" and span("a + 1", "b") == "a + 1 : b"
