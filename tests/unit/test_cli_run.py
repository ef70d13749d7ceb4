"""``tilelink run``: inputs, verdicts and what is refused."""

import re
from pathlib import Path

import pytest

from tilelink.cli import patience
from tilelink.cli.main import main
from tilelink.ir import parse_ir

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"


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


def test_integers_are_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "kernels.py"
    path.write_text(
        "import tilelink, tilelink.language as tk\n"
        "@tilelink.kernel('gather A[M] over M', example={'M': 16})\n"
        "def f(A, C):\n"
        "    for m in tk.tiles(A.shape[0]):\n"
        "        C[m] = A[m] + 1\n"
    )
    assert main(["run", str(path), "--dtype", "A=int32"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", row)[2:5] == ["4", "int32", "M=16"]


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


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_what_takes_long_says_so_once_and_not_in_what_it_prints(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, str(ROOT / "examples" / "ag_gemm.py"), "--set", "M=64,N=32,K=32"]
    monkeypatch.setattr(patience, "AFTER_S", 600.0)
    assert main(words) == 0
    quick = capsys.readouterr()
    assert quick.err == ""
    monkeypatch.setattr(patience, "AFTER_S", 0.0)
    assert main(words) == 0
    slow = capsys.readouterr()
    assert slow.out == quick.out
    assert slow.err.startswith("ag_gemm: ") and len(slow.err.splitlines()) == 1
    assert "4 ranks of M=64 K=32 N=32" in slow.err


SEVERAL = """import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={"M": 32, "K": 16})
def idle(A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        x = A[m, k]


@tilelink.kernel("gather A[M, K] over M; shard C[M, K] over M", example={"M": 34, "K": 16})
def uneven(A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]


@tilelink.kernel("gather A[M, K] over M", example={"M": 32, "K": 16})
def fine(A, C):
    M, K = A.shape
    for m, k in tk.tiles(M, K):
        C[m, k] = A[m, k]
"""


@pytest.mark.parametrize("command", ["run", "check"])
def test_each_kernel_of_a_file_is_judged(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "several.py"
    path.write_text(SEVERAL)
    assert main([command, str(path)]) == 1
    said = capsys.readouterr()
    assert said.err.count("error[") == 2
    assert "several.py:8:" in said.err and "several.py:12:" in said.err
    if command == "run":
        verdicts = {row.split()[0]: row.split()[-1] for row in said.out.splitlines()[1:]}
        assert verdicts == {"idle": "refused", "uneven": "refused", "fine": "ok"}
    else:
        assert said.out.startswith("fine: cannot hang, race or read the wrong tile")


def test_what_is_wrong_with_the_call_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "several.py"
    head, _, _, fine = SEVERAL.split("\n\n\n")
    path.write_text("\n\n\n".join([head, fine, fine.replace("fine", "other")]))
    assert main(["check", str(path), "--set", "Q=4"]) == 2
    assert capsys.readouterr().err.count("error[unknown-name]") == 1
