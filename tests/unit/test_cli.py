"""The command line: arguments, exit codes, errors; no kernel is compiled here."""

import argparse
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilelink.cli import ir, options, source, table
from tilelink.cli.main import COMMANDS, main
from tilelink.errors import IRSyntaxError
from tilelink.ir import parse_ir

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
AG_GEMM = PROGRAMS / "ag_gemm.copy_engine.ir"


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["run"], ["ir"], ["ir", "a.ir", "--world", "0"]]
)
def test_bad_arguments_end_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage: tilelink" in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    names = [module.__name__.rpartition(".")[2] for module in COMMANDS]
    assert names == [
        "run",
        "check",
        "ir",
        "graph",
        "emit",
        "simulate",
        "report",
        "tune",
        "mutate",
        "env",
    ]
    for name in names:
        assert main([name, "--help"]) == 0
        assert f"usage: tilelink {name}" in capsys.readouterr().out


def test_unreadable_file_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", "there/is/no.py"]) == 2
    assert capsys.readouterr().err.startswith("error[file]: cannot open `there/is/no.py`")


def test_extents_and_names() -> None:
    assert options.extents("M=512, N=256") == {"M": 512, "N": 256}
    assert options.merged([{"M": 1, "N": 2}, {"M": 3}]) == {"M": 3, "N": 2}
    assert options.dtypes("fp16") == {"": "fp16"}
    assert options.dtypes("A=bf16,B=fp32") == {"A": "bf16", "B": "fp32"}
    assert options.resources("sm:16") == {"": "sm:16"}


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (options.extents, "M"),
        (options.extents, "M=0"),
        (options.extents, "M=-4"),
        (options.extents, "=4"),
        (options.dtypes, "float16"),
        (options.resources, "sm:0"),
        (options.resources, "A=dma"),
    ],
)
def test_option_texts_that_are_refused(read: object, text: str) -> None:
    assert callable(read)
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


@pytest.mark.parametrize("path", sorted(PROGRAMS.glob("*.ir")), ids=lambda path: path.name)
def test_ir_prints_what_it_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", str(path)]) == 0
    assert parse_ir(capsys.readouterr().out) == parse_ir(path.read_text())


def test_ir_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(AG_GEMM.read_text()))
    assert main(["ir", "-"]) == 0
    assert parse_ir(capsys.readouterr().out) == parse_ir(AG_GEMM.read_text())


def test_what_is_printed_may_go_to_a_file_when_all_of_it_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.ir"
    assert main(["ir", str(AG_GEMM)]) == 0
    printed = capsys.readouterr().out
    assert main(["ir", str(AG_GEMM), "-o", str(out)]) == 0
    assert (capsys.readouterr().out, out.read_text()) == ("", printed)
    bad = tmp_path / "bad.ir"
    bad.write_text("program @p {world = 2} do {\n")
    assert main(["ir", str(bad), "-o", str(out)]) == 1
    assert out.read_text() == printed
    assert main(["ir", str(AG_GEMM), "-o", str(tmp_path / "no" / "where")]) == 2
    assert "where`: No such file or directory" in capsys.readouterr().err


def test_an_unknown_option_shows_those_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", str(AG_GEMM), "--stages", "ptx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: tilelink emit")
    said = "unrecognized arguments: --stages ptx; did you mean `--stage`?"
    assert error.endswith(f"tilelink emit: error: {said}\n")


def test_one_program_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both.ir"
    both.write_text(AG_GEMM.read_text() + (PROGRAMS / "gemm_rs.copy_engine.ir").read_text())
    assert main(["ir", f"{both}::gemm_rs"]) == 0
    assert parse_ir(capsys.readouterr().out).symbol == "gemm_rs"
    assert main(["ir", str(both)]) == 0
    assert [op.symbol for op in source.parse_all(capsys.readouterr().out, "x")] == [
        "ag_gemm",
        "gemm_rs",
    ]
    assert main(["ir", f"{both}::gemm_ar"]) == 2
    assert "it holds: ag_gemm, gemm_rs" in capsys.readouterr().err


def test_positions_in_the_second_program_of_a_file() -> None:
    text = AG_GEMM.read_text()
    broken = text + "# second\nprogram @x {world = 2} do {\n  extent @M {value = }\n}\n"
    with pytest.raises(IRSyntaxError) as caught:
        source.parse_all(broken, "two.ir")
    assert caught.value.span is not None
    assert caught.value.span.line == text.count("\n") + 3


@pytest.mark.parametrize(
    "option", [["--set", "M=32"], ["--world", "2"], ["--tile", "M=8"], ["--resource", "none"]]
)
def test_fused_program_takes_no_shape_and_no_schedule(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", str(AG_GEMM), *option]) == 2
    assert f"error[fused-program]: {option[0]} does not apply" in capsys.readouterr().err


def test_malformed_ir_shows_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.ir"
    bad.write_text("program @p {world = 2} do {\n  wait @f[0 {}\n}\n")
    assert main(["ir", str(bad)]) == 1
    error = capsys.readouterr().err
    assert f"--> {bad}:2:13" in error
    assert "2 |   wait @f[0 {}" in error


def test_internal_fault_leaves_a_reproducer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(op: object) -> str:
        raise ZeroDivisionError("made by the test")

    monkeypatch.setattr(ir, "print_ir", fault)
    assert main(["ir", str(AG_GEMM)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error[internal]:")
    assert "ZeroDivisionError: made by the test" in error
    assert "Traceback" not in error
    written = re.search(r"a reproducer was written to (\S+)", error)
    assert written is not None
    reproducer = Path(written[1])
    text = reproducer.read_text()
    reproducer.unlink()
    assert f"# command: tilelink ir {AG_GEMM}" in text
    assert "Traceback" in text
    # Comments and the program: the reproducer is itself a FILE.
    assert parse_ir(text) == parse_ir(AG_GEMM.read_text())


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TILELINK_DEBUG", "1")
    assert main(["ir", "there/is/no.py"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "tilelink", "ir", str(AG_GEMM)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


def test_ir_and_check_import_neither_torch_nor_triton() -> None:
    code = (
        "import sys\nfrom tilelink.cli.main import main\n"
        f"main(['ir', {str(AG_GEMM)!r}])\nmain(['ir', '--list-passes'])\n"
        f"main(['check', {str(AG_GEMM)!r}])\n"
        "print(sorted({'torch', 'triton', 'networkx', 'lark'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_table_has_columns_and_no_trailing_spaces() -> None:
    text = table.render(["a", "long"], [["xyz", ""], ["1", "2"]], indent="  ")
    assert text == "  a    long\n  xyz\n  1    2"
    assert table.pairs([("a", "1"), ("bcd", "2")]) == "  a    1\n  bcd  2"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert table.size(count) == text


def test_plurals() -> None:
    assert [table.number(n, noun) for n, noun in ((1, "tile"), (2, "tile"), (3, "notify"))] == [
        "1 tile",
        "2 tiles",
        "3 notifies",
    ]
