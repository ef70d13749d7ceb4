"""Mutants are legal, distinct and of every class; what each does to a program is what its class says."""

import json
from pathlib import Path

import pytest

from tests.assurance.grid import Sample, samples
from tests.dynamic import program_of
from tests.strategies import FOLDED, PULLED
from tilelink.backend.mutate import CLASSES, OPERATORS, deletions, mutants
from tilelink.backend.mutate.judge import prove
from tilelink.backend.mutate.sites import replaced, sites
from tilelink.cli.main import main
from tilelink.cli.mutate import Progress
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.vocabulary import check_names

PROGRAMS = Path(__file__).parents[1] / "programs"
SAMPLES = (
    Sample("ag_gemm", "A", "copy_engine", 2, 4),
    Sample("gemm_rs", "C", "sm:1", 2, 4),
    Sample("gemm_ar_add", "P", "copy_engine", 2, 3),
    Sample("gemm_ar", "C", "none", 2, 3),
    Sample("gemm_ar", "C", "sm:1", 2, 2, columns=2, shots=2, slots=2),
    Sample("gemm_ar", "C", "epilogue", 2, 2, columns=2, shots=2, slots=2, signal="word"),
    Sample("gemm_rs", "C", "epilogue", 2, 2, slots=2, signal="sentinel"),
)


def named(sample: Sample) -> str:
    slots = "-slots" if sample.slots == 2 else ""
    return f"{sample.kernel}-{sample.resource}{slots}-{sample.signal}"


@pytest.mark.parametrize("sample", SAMPLES, ids=named)
def test_mutants_are_legal_distinct_and_differ(sample: Sample) -> None:
    program = sample.program()
    texts = [print_ir(program)]
    for number, mutant in enumerate(mutants(program)):
        assert mutant.name in CLASSES
        check_names(mutant.program)
        text = print_ir(mutant.program)
        if number % 7 == 0:  # parsing is what takes time here
            assert print_ir(parse_ir(text)) == text
        texts.append(text)
    assert len(set(texts)) == len(texts) > 20


def test_every_class_occurs_and_order_is_fixed() -> None:
    programs = [sample.program() for sample in SAMPLES]
    programs.append(program_of("ag_gemm", "copy_engine"))  # with dynamic rows
    first = [[(m.name, m.description) for m in mutants(p)] for p in programs]
    again = [[(m.name, m.description) for m in mutants(p)] for p in programs]
    assert first == again
    # A program without TMA or held back notifies has no drain and no flush to forget.
    found = {name for listed in first for name, _ in listed}
    assert set(CLASSES) == found


def test_grid_is_wide_enough() -> None:
    chosen = samples()
    assert {s.kernel for s in chosen} == {
        "ag_gemm",
        "ag_gemm_swiglu",
        "gemm_rs",
        "gemm_rs_add",
        "gemm_ar",
        "gemm_ar_add",
    }
    plain = {"copy_engine", "sm:1", "sm:2", "epilogue", "none"}
    assert {s.resource for s in chosen} == plain | set(FOLDED) | {"sm:1-folded"} | set(PULLED)
    assert {s.shots for s in chosen if s.resource in FOLDED and s.emitter != "library"} == {
        None,
        2,
    }
    assert {s.world for s in chosen} == {2, 3}
    assert len({s.name for s in chosen}) == len(chosen)


def test_deletions_take_out_each_wait_and_notify_once() -> None:
    program = parse_ir((PROGRAMS / "gemm_rs.copy_engine.ir").read_text())
    kept = [op for op in program.walk() if op.name in ("wait", "notify")]
    found = list(deletions(program))
    assert len(found) == len(kept)
    for _, mutant in found:
        assert sum(op.name in ("wait", "notify") for op in mutant.walk()) == len(kept) - 1


def test_sites_lead_to_their_ops() -> None:
    program = parse_ir((PROGRAMS / "ag_gemm.sm.ir").read_text())
    walked = [op for op in program.walk() if op is not program]
    assert [site.op for site in sites(program)] == walked
    for site in sites(program):
        assert site.siblings[site.position] is site.op
        removed = replaced(program, site.path)
        assert sum(1 for _ in removed.walk()) == len(walked) + 1 - sum(1 for _ in site.op.walk())


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("weaken", 'order = "relaxed"', ""),
        ("no-barrier", "barrier = false", ""),
        ("stale", "epoch = 1", ""),
        ("equality", 'compare = "equal"', ""),
        ("oversize-grid", "resident = 1", ""),
    ],
)
def test_operators_write_what_their_class_says(name: str, left: str, right: str) -> None:
    program = parse_ir((PROGRAMS / "ag_gemm.sm.ir").read_text())
    text = print_ir(program)
    changed = [print_ir(m.program) for m in mutants(program) if m.name == name]
    assert any(left in t for t in changed) and left not in text
    assert right in text


def test_every_operator_says_what_it_rewrites() -> None:
    assert all(operator.__doc__ for operator in OPERATORS)


@pytest.mark.parametrize(
    "name", ["drop", "weaken", "missing-ack", "stale", "guard", "lost-data", "wrong-count"]
)
def test_the_proof_refuses_what_breaks_the_samples(name: str) -> None:
    program = parse_ir((PROGRAMS / "gemm_rs.epilogue.ir").read_text())
    assert prove(program) == ""
    tried = [m for m in mutants(program) if m.name == name]
    accepted = [m.description for m in tried if not prove(m.program)]
    assert (tried or name == "guard") and accepted == []


def write_small(tmp_path: Path) -> Path:
    """A program that the command can break in a moment."""
    path = tmp_path / "small.ir"
    path.write_text(print_ir(SAMPLES[0].program()))
    return path


def test_command_prints_a_table_and_exits_by_survivors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_small(tmp_path)
    assert main(["mutate", str(path), "--class", "drop", "--class", "weaken"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ag_gemm: M=32 K=8 N=8, 2 ranks")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert set(rows) == {"drop", "weaken", "all"}
    for row in rows.values():
        mutants_, refused, found, *_, proof_missed, simulator_missed = map(int, row)
        assert mutants_ == refused == found > 0
        assert proof_missed == simulator_missed == 0


def test_command_keeps_survivors_as_ir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilelink.backend.mutate import judge

    path, folder = write_small(tmp_path), tmp_path / "survivors"
    monkeypatch.setattr(judge, "prove", lambda *_: "")
    options = ["--class", "drop", "--survivors", str(folder), "--json"]
    assert main(["mutate", str(path), *options]) == 1
    printed = json.loads(capsys.readouterr().out)
    kept = sorted(folder.iterdir())
    assert printed["classes"]["drop"]["proof missed"] == len(kept) > 0
    for file in kept:
        text = file.read_text()
        assert text.startswith("# drop: removed: ") and "\n# missed by: proof\n" in text
        assert isinstance(parse_ir(text), Op)


def test_command_says_of_the_undecided_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilelink.backend.mutate import judge

    path = write_small(tmp_path)
    unknown = judge.Truth(judge.UNDECIDED, "too many states")
    monkeypatch.setattr(judge, "prove", lambda *_: "")
    monkeypatch.setattr(judge, "decide", lambda *_, **__: unknown)
    options = ["mutate", str(path), "--class", "drop", "--limit", "2"]
    assert main([*options, "--json"]) == 1
    counts = json.loads(capsys.readouterr().out)["classes"]["drop"]
    assert counts["undecided"] == counts["mutants"] == 2
    assert not any(key.endswith("missed") for key in counts)
    assert main(options) == 1
    printed = capsys.readouterr().out
    assert "missed by" not in printed
    assert printed.count("# may be right, no objection from: proof\n# undecided: too many") == 2


def test_command_takes_a_kernel_at_a_small_instance(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(Path(__file__).parents[2] / "examples" / "gemm_rs.py")
    assert main(["mutate", source, "--class", "missing-ack", "--limit", "3"]) == 0
    assert capsys.readouterr().out.startswith("gemm_rs: M=32 ")


def test_command_names_the_classes_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutate", "nothing.ir", "--class", "dorp"]) == 2
    assert "there is no class `dorp`" in capsys.readouterr().err


def test_of_many_workers_some_numbers_that_fit_are_tried() -> None:
    def fitting(workers: int) -> list[int]:
        program = parse_ir(
            f"program @f {{world = 2}} do {{\n  launch @g {{workers = {workers}}} do {{\n  }}\n}}\n"
        )
        found = [m for m in mutants(program) if m.name == "oversize-grid"]
        return [int(m.program.find("launch")[0]["resident"]) for m in found]

    assert fitting(8) == [7, 6, 5, 4, 3, 2, 1]
    assert fitting(132) == [131, 66, 33, 16, 8, 4, 2, 1]


def test_progress_says_how_long_all_mutants_take() -> None:
    progress = Progress("f", 200)
    progress.done = 50
    assert progress.text(progress.start + 1.0) == "f: 50 of 200 mutants"
    said = progress.text(progress.start + 30.0)
    assert said.startswith("f: 50 of 200 mutants in 30 s, all in about 120 s") and "--limit" in said
