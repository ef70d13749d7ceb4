"""Each command on a real kernel, but for ``run``."""

import json
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tilelink import __version__
from tilelink.cli.main import main
from tilelink.ir import parse_ir

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"


def extents(text: str) -> dict[str, int]:
    return {op.symbol: op["value"] for op in parse_ir(text).find("extent")}


def test_extents_come_from_the_example_and_from_set(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", file]) == 0
    kernel = parse_ir(capsys.readouterr().out)
    assert kernel["world"] == 4
    assert {op.symbol: op["value"] for op in kernel.find("extent")} == {"M": 64, "K": 32, "N": 48}
    assert main(["ir", file, "--set", "M=128,N=16", "--set", "N=32", "--world", "2"]) == 0
    kernel = parse_ir(capsys.readouterr().out)
    assert kernel["world"] == 2
    assert {op.symbol: op["value"] for op in kernel.find("extent")} == {"M": 128, "K": 32, "N": 32}


def test_extents_of_a_kernel_in_ir(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", file]) == 0
    text = tmp_path / "kernel.ir"
    text.write_text(capsys.readouterr().out)
    assert main(["ir", str(text), "--set", "M=96", "--world", "3"]) == 0
    found = capsys.readouterr().out
    assert extents(found) == {"M": 96, "K": 32, "N": 48}
    assert parse_ir(found)["world"] == 3


def test_target_gives_the_world(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", file, "--target", "h200x8"]) == 0
    assert parse_ir(capsys.readouterr().out)["world"] == 8


def test_element_types(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option, want in (
        ("fp32", ["fp32"] * 3),
        ("A=fp16,C=fp32", ["fp16", "fp16", "fp32"]),
        ("C=fp32", ["bf16", "bf16", "fp32"]),
        ("C=fp32,B=fp16", ["fp16", "fp16", "fp32"]),
        ("fp16,C=fp32", ["fp16", "fp16", "fp32"]),
    ):
        assert main(["ir", file, "--dtype", option]) == 0
        kernel = parse_ir(capsys.readouterr().out)
        assert [op["dtype"] for op in kernel.find("tensor")] == want


def test_the_type_of_one_tensor_is_not_that_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "masked.py"
    path.write_text(
        "import tilelink, tilelink.language as tk\n"
        "@tilelink.kernel('gather A[M] over M; gather mask[M] over M', example={'M': 64})\n"
        "def f(mask, A, C):\n"
        "    for m in tk.tiles(A.shape[0]):\n"
        "        C[m] = tk.where(mask[m], A[m], A[m] * 2.0)\n"
    )
    for option in ("mask=bool,C=bf16", "bf16,mask=bool,C=bf16", "mask=bool,A=bf16,C=bf16"):
        assert main(["ir", str(path), "--dtype", option]) == 0
        kernel = parse_ir(capsys.readouterr().out)
        found = {op.symbol: op["dtype"] for op in kernel.find("tensor")}
        assert found == {"mask": "bool", "A": "bf16", "C": "bf16"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--set", "Q=64"], "--set: there is no extent `Q`"),
        (["--dtype", "Q=bf16"], "--dtype: there is no tensor `Q`"),
        (["--target", "abacus"], "--target: there is no machine `abacus`"),
        (["--fused", "--tile", "Q=64"], "--tile: there is no extent `Q`"),
        (["--fused", "--resource", "B=none"], "--resource: there is no moved tensor `B`"),
        (
            ["--fused", "--schedule", '{"tiles": {"Q": 64}}'],
            "--schedule: there is no extent `Q`",
        ),
        (
            ["--fused", "--schedule", '{"moves": {"B": {"resource": "none"}}}'],
            "--schedule: there is no moved tensor `B`",
        ),
        (["--after", "magic"], "--after: there is no pass `magic`"),
    ],
)
def test_names_that_do_not_exist(
    option: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", file, *option]) == 2
    assert capsys.readouterr().err.startswith(f"error[unknown-name]: {message}")


def test_file_without_a_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"there is no kernel at all in `{path}`" in error
    assert "= help: a kernel is a function under `@tilelink.kernel(...)`" in error


def test_file_that_is_not_python(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slip.py"
    path.write_text(Path(file).read_text().replace("tk.float32)", "tk.float32"))
    assert main(["check", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error[bad-file]: this is not Python: '(' was never closed")
    assert f"--> {path}:10:" in error
    assert "Traceback" not in error


def test_extents_that_nobody_gives(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bare.py"
    path.write_text(re.sub(r", example=\{.*?\}", "", Path(file).read_text()))
    assert main(["check", str(path), "--set", "K=32"]) == 2
    error = capsys.readouterr().err
    assert "the value of `M`, `N` of kernel `ag_gemm` is not known" in error
    assert "--set M=512" in error


def test_schedule_options_reach_the_program(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ir", file, "--fused", "--tile", "M=16,N=16", "--workers", "3"]
    assert main([*command, "--resource", "sm:1"]) == 0
    program = parse_ir(capsys.readouterr().out)
    launch = program.find("launch")[0]
    assert launch["workers"] == 3
    assert not program.find("stream")
    assert main([*command, "--resource", "A=copy_engine"]) == 0
    assert parse_ir(capsys.readouterr().out).find("stream")
    schedule = tmp_path / "schedule.json"
    schedule.write_text('{"workers": 5, "moves": {"A": {"resource": "copy_engine"}}}')
    assert main(["ir", file, "--fused", "--schedule", str(schedule)]) == 0
    assert parse_ir(capsys.readouterr().out).find("launch")[0]["workers"] == 5
    assert main(["ir", file, "--fused", "--schedule", '{"wokers": 5}']) == 2
    assert "error[schedule]" in capsys.readouterr().err


def test_passes_are_listed_in_order_and_can_be_stopped_after(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", "--list-passes"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    texts = []
    for name in names:
        assert main(["ir", file, "--after", name]) == 0
        texts.append(capsys.readouterr().out)
    assert main(["ir", file, "--fused"]) == 0
    assert texts[-1] == capsys.readouterr().out
    waits = [sum(op.name == "wait" for op in parse_ir(text).walk()) for text in texts]
    assert waits[names.index("order-tiles")] == 0 < waits[names.index("place-waits")]


def test_check_counts_and_deletions(capsys: pytest.CaptureFixture[str]) -> None:
    path = PROGRAMS / "gemm_rs.copy_engine.ir"
    assert main(["check", str(path), "--deletions"]) == 0
    out = capsys.readouterr().out
    lines = len(re.findall(r"^ *(?:wait|notify) @", path.read_text(), re.MULTILINE))
    assert f"{lines} tried, {lines} refused" in out
    # 4 ranks; 8 row tiles of 8 by 3 column tiles of 16, then a quarter of them to sum.
    assert f"a call     {4 * (8 * 3 + 2 * 3)} tiles" in out
    # parts [4, 16, 48] and partial [64, 48] in bf16.
    assert f"{(4 * 16 * 48 + 64 * 48) * 2 / 1024:.1f} KiB a rank" in out


@pytest.mark.parametrize("deleted", ["wait @C.ready", "notify @C.ready", "notify @ack"])
def test_check_refuses_with_the_line(
    deleted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (PROGRAMS / "gemm_rs.copy_engine.ir").read_text().splitlines()
    bad = tmp_path / "bad.ir"
    bad.write_text("\n".join(line for line in lines if deleted not in line) + "\n")
    assert main(["check", str(bad)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(rf"error\[[a-z-]+\]: .*\n +--> {re.escape(str(bad))}:\d+:\d+\n", captured.err)


def test_check_reports_a_deletion_that_is_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROGRAMS / "ag_gemm.copy_engine.ir").read_text()
    wait = next(line for line in text.splitlines() if "wait @A.ready" in line)
    double = tmp_path / "double.ir"
    double.write_text(text.replace(wait, f"{wait}\n{wait}"))
    assert main(["check", str(double), "--deletions"]) == 1
    out = capsys.readouterr().out
    assert "5 tried, 3 refused" in out
    assert out.count("not refused: wait @A.ready") == 2


def test_graph_counts(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = ["--tile", "M=16,N=16"]
    # On each of 4 ranks 4 x 3 compute tiles, of which those of 3 owners need one transfer each.
    compute, transfers, needs = 4 * 4 * 3, 4 * 3, 4 * 3 * 3
    assert main(["graph", file, *tiles, "--format", "json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    kinds = [node["kind"] for node in graph["nodes"]]
    assert (kinds.count("compute"), kinds.count("transfer")) == (compute, transfers)
    edges = [edge["kind"] for edge in graph["edges"]]
    assert (edges.count("RAW"), edges.count("WAR")) == (needs, needs)
    ids = {node["id"] for node in graph["nodes"]}
    assert all(edge["from"] in ids and edge["to"] in ids for edge in graph["edges"])
    assert main(["graph", file, *tiles]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"compute tiles +{compute}\n", text)
    assert re.search(rf"RAW edges +{needs}\n", text)
    assert main(["graph", file, *tiles, "--format", "dot"]) == 0
    dot = capsys.readouterr().out
    assert len(re.findall(r'^  "[^"]+" -> "[^"]+"', dot, re.MULTILINE)) == 2 * needs
    assert dot.count("style=dashed") == needs
    assert main(["graph", file, *tiles, "--format", "svg"]) == 0
    drawing = ElementTree.fromstring(capsys.readouterr().out)
    svg = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{svg}rect")) == compute + transfers
    assert len(drawing.findall(f"{svg}line")) == needs


def test_graph_needs_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(PROGRAMS / "ag_gemm.copy_engine.ir")]) == 2
    assert "error[needs-kernel]" in capsys.readouterr().err


def test_simulate_writes_a_trace(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    trace = tmp_path / "trace.json"
    assert main(["simulate", file, "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "overlap efficiency" in out
    assert "critical path" in out
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_emit_prints_python(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", file]) == 0
    source = capsys.readouterr().out
    compile(source, "emitted.py", "exec")
    assert "@triton.jit" in source


def test_cuda_backend_says_what_is_missing(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["run", file, "--backend", "cuda"]) == 1
    assert "error[unavailable]: the cuda backend is not available" in capsys.readouterr().err


def test_env_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in (
        "python",
        "triton",
        "reference",
        "simulate",
        "interpret",
        "cuda",
        "TILELINK_DEBUG",
    ):
        assert re.search(rf"^  {word} ", out, re.MULTILINE)
    assert sys.version.split()[0] in out


def test_demo_checks_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    small = {"TOKENS": 64, "HIDDEN": 96, "PART": 48}
    demo["main"].__globals__.update(small)
    assert demo["main"]() == 0
    out = capsys.readouterr().out
    assert "ag_gemm_swiglu: M=64, K=96, N=48" in out
    assert "gemm_rs: M=64, K=48, N=96" in out
    assert out.count("correct    relative error") == 2
    demo["main"].__globals__["LIMIT"] = -1.0
    assert demo["main"]() == 1


def test_error_page_lists_every_error() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from tilelink.cli.catalogue import page

    assert (ROOT / "docs" / "errors.md").read_text() == page(), (
        "run: python -m tilelink.cli.catalogue > docs/errors.md"
    )


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tilelink {__version__}\n"


def test_a_kernel_in_ir_with_a_dynamic_extent(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(PROGRAMS / "kernels" / "ag_gemm.ir")
    assert main(["ir", file, "--dynamic", "M"]) == 0
    assert "extent @M {dynamic = true, value = " in capsys.readouterr().out
    assert main(["ir", file, "--dynamic", "K,Q"]) == 2
    assert "--dynamic: there is no extent `Q`" in capsys.readouterr().err
