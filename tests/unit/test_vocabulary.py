"""The words of IR text: everything that the compiler prints is known, and a misspelt word is refused."""

import re
from pathlib import Path

import pytest

from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.cli.main import main
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.vocabulary import OPS, IRNameError, check_names
from tilelink.kernel import load_kernels
from tilelink.schedules import default_schedule

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
AG_GEMM = PROGRAMS / "ag_gemm.copy_engine.ir"


@pytest.mark.parametrize("path", sorted(PROGRAMS.rglob("*.ir")), ids=lambda path: path.name)
def test_written_programs_use_known_words(path: Path) -> None:
    check_names(parse_ir(path.read_text(), path.name))


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "kernels").glob("*.py")), ids=str)
def test_kernels_and_their_programs_use_known_words(path: Path) -> None:
    fused = 0
    for kernel in load_kernels(path).values():
        if not kernel.example:
            continue
        op = kernel.build({**kernel.example}, {}, 4, dtype="bf16")
        check_names(op)
        for resource in ("copy_engine", "sm:4", "epilogue", "none"):
            try:
                program = run_passes(op, default_schedule(op).with_resource(resource))
            except TilelinkError:
                continue  # that resource does not fit that kernel
            check_names(program)
            fused += 1
    assert fused >= 2


def test_a_loop_nest_of_the_front_end_fuses_into_known_words() -> None:
    """The test above skips what cannot be fused; this one may not."""
    kernel = load_kernels(ROOT / "examples" / "gemm_rs.py")["gemm_rs"]
    op = kernel.build({**kernel.example}, {}, 4, dtype="bf16")
    check_names(compile_kernel(op))


def test_the_reference_page_names_every_op() -> None:
    words = set(re.findall(r"[a-z_0-9]+", (ROOT / "docs" / "ir.md").read_text()))
    assert set(OPS) - words == set()


def change(old: str, new: str) -> Op:
    text = AG_GEMM.read_text()
    assert old in text
    return parse_ir(text.replace(old, new, 1), "edited.ir")


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("= load ", "= lod ", "there is no op `lod`", "did you mean `load`?"),
        ("wait @ack", "wiat @ack", "there is no op `wiat`", "did you mean `wait`?"),
        ("workers =", "worker =", "`launch` has no attribute `worker`", "did you mean `workers`?"),
        ("notify @ack", "notify @akc", "there is no flag or counter `@akc`", "`@ack`?"),
        ("load @A.all", "load @A.al", "there is no tensor or buffer `@A.al`", "`@A.all`?"),
        ("to = @A.all", "to = @ack", "there is no tensor or buffer `@ack`", "known here: `@A`"),
        ('["head"]', '["haed"]', "there is no agent `haed` to come after", "did you mean `head`?"),
        ("dims = [WORLD], ", "", "`flag` lacks its attribute `dims`", "docs/ir.md"),
        ("world = 4", 'world = "4"', "`world` of `program` is not a whole number", "write"),
    ],
)
def test_misspelt_words(old: str, new: str, message: str, hint: str) -> None:
    with pytest.raises(IRNameError) as caught:
        check_names(change(old, new))
    assert message in str(caught.value)
    assert hint in str(caught.value)
    assert caught.value.span is not None


def test_the_proof_is_not_given_an_access_that_it_cannot_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A load that is misspelt is no load: without it nothing is left for the waits to be needed by."""
    edited = tmp_path / "edited.ir"
    edited.write_text(print_ir(change("= load @A.all", "= lod @A.all")))
    for command in ("check", "run", "simulate"):
        assert main([command, str(edited)]) == 1
        assert "error[ir-name]: there is no op `lod`" in capsys.readouterr().err
