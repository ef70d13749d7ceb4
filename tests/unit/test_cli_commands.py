"""Each command on a real kernel, and the documents that quote the command line."""

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

AG_GEMM = """\
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 64, "K": 32, "N": 48})
def ag_gemm(A, B, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ag_gemm.py"
    path.write_text(AG_GEMM)
    return str(path)


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
    for option, want in (("fp32", ["fp32"] * 3), ("A=fp16,C=fp32", ["fp16", "fp16", "fp32"])):
        assert main(["ir", file, "--dtype", option]) == 0
        kernel = parse_ir(capsys.readouterr().out)
        assert [op["dtype"] for op in kernel.find("tensor")] == want


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


def test_file_that_is_not_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slip.py"
    path.write_text(AG_GEMM.replace("tk.float32)", "tk.float32"))
    assert main(["check", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error[bad-file]: this is not Python: '(' was never closed")
    assert f"--> {path}:10:" in error
    assert "Traceback" not in error


def test_extents_that_nobody_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bare.py"
    path.write_text(re.sub(r", example=\{.*?\}", "", AG_GEMM))
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


def test_run_prints_a_verdict(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["run", file, "--tile", "M=16,N=16,K=16", "--workers", "2"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == (
        [
            "kernel",
            "backend",
            "world",
            "dtype",
            "shape",
            "resource",
            "output",
            "error",
            "limit",
            "verdict",
        ]
    )
    cells = re.split(r"  +", row)
    assert cells[:7] == [
        "ag_gemm",
        "simulate",
        "4",
        "bf16",
        "M=64 K=32 N=48",
        "copy_engine",
        "C",
    ]
    assert float(cells[7]) <= float(cells[8]) < 0.1
    assert cells[9] == "ok"


def test_run_sees_a_wrong_result(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from tilelink.backend import simulate

    right = simulate.run

    def wrong(*args: object, **options: object) -> object:
        outputs = right(*args, **options)  # type: ignore[arg-type]
        outputs[3]["C"][17] *= 1.05
        return outputs

    monkeypatch.setattr(simulate, "run", wrong)
    assert main(["run", file]) == 1
    assert capsys.readouterr().out.rstrip().endswith("WRONG")


def test_run_of_a_racy_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    lines = (PROGRAMS / "ag_gemm.copy_engine.ir").read_text().splitlines()
    bad = tmp_path / "bad.ir"
    bad.write_text("\n".join(line for line in lines if "wait @A.ready" not in line) + "\n")
    assert main(["run", str(bad)]) == 1
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith("refused")
    assert captured.err.startswith("error[race]:")


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


def test_readme_shows_the_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    shown = [line.partition("  #")[0].rstrip() for line in block[1].splitlines()]
    example = (ROOT / "examples" / "ag_gemm.py").read_text()
    assert "\n".join(shown[3:]).strip() in example


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


def test_random_tables_fit_their_use() -> None:
    pytest.importorskip("torch")
    from tilelink.cli.inputs import random_inputs

    kernel = parse_ir(
        """
        kernel @moe {world = 2} do {
          extent @T {value = 6}
          extent @P {value = 40}
          extent @E {value = 3}
          tensor @A {dims = [T], dtype = "fp32", move = "gather", over = 0, role = "in"}
          tensor @order {dims = [P], dtype = "int32", move = "local", role = "in"}
          tensor @offs {dims = [E + 1], dtype = "int32", move = "local", role = "in"}
          tensor @dest {dims = [100], dtype = "int64", move = "local", role = "in"}
          tensor @Y {dims = [P], dtype = "fp32", move = "local", role = "out"}
          scalar @eps {dtype = "fp32"}
          for_range {lo = 0, hi = E} do (%e: int32) {
            %lo = load @offs[%e] : int32
            %hi = load @offs[e + 1] : int32
            for_tiles (%lo, %hi) {bounds = true} do (%p: tile) {
              %rows = load @order[%p] : int32[p]
              %a = load @A[%rows] : fp32[p]
              store @Y[%p] (%a)
            }
          }
        }
        """
    )
    ranks = random_inputs(kernel, 0)
    assert [sorted(rank) for rank in ranks] == [["A", "dest", "eps", "offs", "order"]] * 2
    for rank in ranks:
        offs = rank["offs"].tolist()
        assert offs == sorted(offs) and (offs[0], offs[-1]) == (0, 40)
        assert set(rank["order"].tolist()) == set(range(6))
        assert set(rank["dest"].tolist()) == {0, 1}
        assert rank["A"].shape == (3,)
        assert rank["eps"] == 1e-5
    assert not ranks[0]["A"].equal(ranks[1]["A"])
    again = random_inputs(kernel, 0)
    assert all(again[1][name].equal(ranks[1][name]) for name in ("A", "order", "offs"))


def test_equal_nan_and_infinities_are_no_error_and_others_are() -> None:
    torch = pytest.importorskip("torch")
    from tilelink.cli.run import error_of

    nan, inf = float("nan"), float("inf")
    odd = torch.tensor([[1.0, nan, inf, -inf], [3.0, 4.0, 0.0, 0.0]])
    assert error_of(odd.clone(), odd) == 0.0
    near = odd.clone()
    near[1, 1] = 9.0
    assert error_of(near, odd) == pytest.approx(1.0)
    for place, values in enumerate(((nan, inf), (0.0, inf), (nan, -inf, 0.0), (inf, nan))):
        for value in values:
            other = odd.clone()
            other[0, place] = value
            assert error_of(other, odd) == error_of(odd, other) == inf


STORED_EACH_STEP = "        acc = tk.dot(A[m, k], B[k, n], acc)\n        C[m, n] = acc\n"
READ_FIRST = "    acc = C[m, n].to(tk.float32)\n"
EMPTY = "for e in tk.range(K - 32):\n    for m, n in tk.tiles(M, N):\n        C[m, n] = 0.0\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        acc = tk.dot(A[m, k], B[k, n], acc)\n    C[m, n] = acc\n", STORED_EACH_STEP),
        ("    acc = tk.zeros([m, n], tk.float32)\n", READ_FIRST),
        ("for k in tk.tiles(K):", "for k in tk.tiles(K, 0):"),
        ("for k in tk.tiles(K):", "for k in tk.tiles(0, K - 32):"),
        ("for m, n in tk.tiles(M, N):", EMPTY + "for m, n in tk.tiles(M, N):"),
    ],
    ids=["stored after each step", "read before stored", "empty", "empty by extents", "no tasks"],
)
def test_unusual_stores_and_empty_loops_agree_with_the_reference(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from tests.assurance.bad_source import GOOD_BODY, kernel_text

    assert old in GOOD_BODY
    file = tmp_path / "unusual.py"
    file.write_text(kernel_text(GOOD_BODY.replace(old, new)))
    assert main(["run", str(file), "--world", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("ok")


def test_run_says_how_many_values_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from tests.assurance.bad_source import kernel_text

    text = "M, K = A.shape\nfor m, k in tk.tiles(M, K):\n    C[m, k] = A[m, k] ** A[m, k]\n"
    file = tmp_path / "pow.py"
    file.write_text(kernel_text(text, parameters="A, C"))
    assert main(["run", str(file), "--world", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    found = re.search(r"C \((\d+) not finite\) +0\.0e\+00", row)
    assert found is not None and 0 < int(found[1]) < 2 * 64 * 32


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tilelink {__version__}\n"


def test_what_moves_the_bytes_is_told_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule that says nothing of a tensor leaves it to a copy engine."""
    file = str(ROOT / "examples" / "gemm_rs.py")
    for schedule, resource in (
        ('{"workers": 64}', "copy_engine"),
        ('{"moves": {"C": {"resource": "sm:2"}}}', "sm:2"),
    ):
        assert main(["run", file, "--set", "M=64,N=32,K=32", "--schedule", schedule]) == 0
        row = capsys.readouterr().out.splitlines()[1].split()
        assert resource in row, row


def test_what_moves_an_intermediate_tensor_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{ROOT / 'tests' / 'kernels' / 'gemm_rs.py'}::gemm_rs_bias"
    assert main(["run", file, "--resource", "sm:1"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert "sm:1" in row, row


def test_a_kernel_in_ir_with_a_dynamic_extent(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(PROGRAMS / "kernels" / "ag_gemm.ir")
    assert main(["ir", file, "--dynamic", "M"]) == 0
    assert "extent @M {dynamic = true, value = " in capsys.readouterr().out
    assert main(["ir", file, "--dynamic", "K,Q"]) == 2
    assert "--dynamic: there is no extent `Q`" in capsys.readouterr().err


def test_a_program_that_does_not_fit_is_refused_before_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tilelink.cli.source import Unit

    monkeypatch.setattr(Unit, "program", lambda *_: pytest.fail("compiled"))
    file = str(ROOT / "examples" / "ag_gemm.py")
    assert main(["run", file, "--set", "M=1048576,N=65536,K=65536"]) == 1
    assert "error[too-large]" in capsys.readouterr().err


def test_an_edited_program_is_held_against_the_kernel_that_it_carries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = str(ROOT / "examples" / "ag_gemm.py"), tmp_path / "edited.ir"
    assert main(["ir", file, "--fused", "--set", "M=64,N=32,K=32"]) == 0
    text = capsys.readouterr().out
    path.write_text(text)
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "ok"
    store = next(line for line in text.splitlines() if line.lstrip().startswith("store @C"))
    for edited in (
        text.replace(store + "\n", ""),
        text.replace("\n      %acc = zeros", "\n      %acc = full {value = 1.0}"),
    ):
        path.write_text(edited)
        assert main(["run", str(path)]) == 1
        assert capsys.readouterr().out.splitlines()[1].split()[-1] == "WRONG"
    # A kernel of other extents is another kernel: its text is the first that names an extent's value.
    path.write_text(text.replace("value = 64}", "value = 32}", 1))
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "ran"
