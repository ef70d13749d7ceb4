"""The help of a refusal, followed, leads to a command that is accepted."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tilelink.cli.main import main

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
ROWS = """
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather X[M, N] over M", example={"M": 64, "N": 64})
def doubled(X, Y):
    M, N = X.shape
    for m in tk.tiles(M):
        Y[m, :] = X[m, :] * 2.0
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The help of a command line that is refused, wholly."""
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error[") and "error[internal]" not in said
    return said.splitlines()[-1].partition("= help: ")[2]


def options(advice: str) -> list[str]:
    """The first of the options that a help names."""
    found = re.search(r"`(--[^`]+)`", advice)
    assert found is not None, advice
    return shlex.split(found[1])


@pytest.mark.parametrize(
    "given",
    [
        "--set M=8192,K=8192,N=8192 --tile M=2048,N=1024,K=64",
        "--set M=8192,K=8192,N=8192 --tile M=2048,N=1024,K=2048",
        "--set M=8192,K=8192,N=8192 --tile M=256,N=256,K=8192",
    ],
)
def test_tiles_that_are_too_large_are_refused_with_lengths_that_fit(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["emit", str(ROOT / "examples" / "ag_gemm.py"), *given.split()]
    assert main([*words, *options(refused(capsys, *words))]) == 0


def test_a_whole_axis_that_is_too_large_is_to_be_walked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.py"
    file.write_text(ROWS)
    words = ["emit", str(file), "--set", "M=64,N=2097152"]
    assert "`tk.tiles(N)`" in refused(capsys, *words)
    file.write_text(ROWS.replace("m in tk.tiles(M)", "m, n in tk.tiles(M, N)").replace(":]", "n]"))
    assert main(words) == 0


AG_GEMM = ROOT / "examples" / "ag_gemm.py"
MEANT = re.compile(r"did you mean `([^`]+)`\?")


def meant(capsys: pytest.CaptureFixture[str]) -> str:
    """What may have been meant, as the error just printed says."""
    said = capsys.readouterr().err
    found = MEANT.search(said)
    assert found is not None, said
    return found[1]


@pytest.mark.parametrize(
    ("right", "wrong", "slip"),
    [
        ("gather A", "gahter A", "gahter"),
        ("gather A[", "gather AA[", "AA"),
        ('over M"', 'over M { onwer m / (M / WORLD) }"', "onwer"),
        ('over M"', 'over M { owner m / (M / WRLD) }"', "WRLD"),
        ("tk.zeros", "tk.zeroes", "tk.zeroes"),
        ("tk.float32", "tk.flot32", "tk.flot32"),
        ("C[m, n] = acc", "C[m, n] = ac", "ac"),
        ("C[m, n] = acc", "C[m, n] = acc.tto(tk.bfloat16)", "tto"),
        ("C[m, n] = acc", "C[m, n] = acc * m.strt", "strt"),
    ],
)
def test_what_may_have_been_meant_in_a_kernel_is_accepted(
    right: str, wrong: str, slip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "k.py"
    file.write_text(AG_GEMM.read_text().replace(right, wrong, 1))
    assert main(["ir", str(file)]) == 1
    corrected = re.sub(rf"\b{re.escape(slip)}\b", meant(capsys), wrong)
    file.write_text(AG_GEMM.read_text().replace(right, corrected, 1))
    assert main(["ir", str(file)]) == 0


@pytest.mark.parametrize(
    ("words", "slip"),
    [
        ("chek FILE", "chek"),
        ("check FILE --wrld 2", "--wrld"),
        ("check FILE::ag_gem", "ag_gem"),
        ("check FILE --set MM=256", "MM"),
        ("check FILE --tile Mm=64", "Mm"),
        ("check FILE --dtype bf61", "bf61"),
        ("check FILE --dtype AA=bf16", "AA"),
        ("check FILE --resource A=copyengine", "copyengine"),
        ("check FILE --emitter tritn", "tritn"),
        ("check FILE --target h20x8", "h20x8"),
        ("ir FILE --after order-tile", "order-tile"),
        ("mutate FILE --class drop_wait --limit 1", "drop_wait"),
        ("check FILE --schedule {'wrkers':64}", "wrkers"),
        ("check FILE --schedule {'order':'groupd'}", "groupd"),
        ("check FILE --schedule {'tiles':{'Mm':64}}", "Mm"),
        ("check FILE --schedule {'moves':{'Aa':{}}}", "Aa"),
        ("check FILE --schedule {'moves':{'A':{'resorce':'none'}}}", "resorce"),
        ("check FILE --schedule {'moves':{'A':{'resource':'copyengine'}}}", "copyengine"),
        ("check FILE --schedule {'moves':{'A':{'signal':'flags'}}}", "flags"),
    ],
)
def test_what_may_have_been_meant_on_the_command_line_is_accepted(
    words: str, slip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [w.replace("FILE", str(AG_GEMM)).replace("'", '"') for w in words.split()]
    assert main(given) == 2
    word = meant(capsys)
    assert main([re.sub(rf"(?<![\w/-]){slip}(?!\w)", word, w) for w in given]) == 0


@pytest.mark.parametrize("file", ["moe.py", "attention.py"])
def test_what_is_not_fused_runs_where_the_help_says(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(ROOT / "tests" / "kernels" / file)]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "error[cannot-fuse]" in printed.err
    advised = set(re.findall(r"`tilelink run FILE (.*?)`", printed.err))
    assert len(advised) == 1
    assert main([*command, *advised.pop().split()]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    fused = [line for line in printed.out.splitlines()[1:] if "refused" not in line]
    assert len(rows) > len(fused)
    assert all(row.split()[1] == "reference" and row.endswith("ran") for row in rows)


def test_the_reference_alone_sees_what_depends_on_tiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "k.py"
    file.write_text(AG_GEMM.read_text().replace("= acc\n", "= acc - tk.max(acc, 1, True)\n"))
    assert main(["run", str(file), "--backend", "reference"]) == 1
    assert "error[tile-dependent]" in capsys.readouterr().err


def emitted(
    capsys: pytest.CaptureFixture[str], file: str, schedule: Mapping[str, Any], *more: str
) -> tuple[str, str]:
    """The field and the help of the refusal to emit an example under ``schedule``; empty where it is emitted."""
    words = ["emit", str(ROOT / "examples" / f"{file}.py"), "--schedule", json.dumps(schedule)]
    code = main([*words, *more])
    said = capsys.readouterr().err
    assert bool(code) == said.startswith("error["), said
    if not code:
        return "", ""
    field = re.search(r"schedule field `([\w.]+)`", said)
    return field[1] if field else "", said.splitlines()[-1].partition("= help: ")[2]


KINDS = [("ag_gemm", "A"), ("gemm_rs", "C"), ("gemm_ar", "C")]


@pytest.mark.parametrize(("file", "tensor"), KINDS)
@pytest.mark.parametrize(
    "move",
    [
        {"signal": "word"},
        {"signal": "sentinel"},
        {"signal": "word", "slots": 2},
        {"direction": "pull"},
        {"own": "beside"},
        {"own": "between", "sum": "epilogue"},
        {"slots": 2},
        {"slots": 2, "resource": "none"},
        {"resource": "epilogue"},
        {"resource": "epilogue", "slots": 2},
        {"resource": "epilogue", "signal": "word", "slots": 2},
        {"resource": "epilogue", "direction": "pull"},
        {"resource": "sm:132"},
    ],
    ids=str,
)
def test_the_first_advice_on_a_move_is_accepted(
    file: str, tensor: str, move: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = dict(move)
    for _ in range(4):
        field, advice = emitted(capsys, file, {"moves": {tensor: changed}})
        if not advice:
            return
        field = field.rpartition(".")[2]
        first = re.match(r"use (?:`\"sum\": )?[`\"]?([\w:]+)", advice)
        assert first is not None, advice
        changed[field] = int(first[1]) if first[1].isdecimal() else first[1]
        for name in re.findall(r"`(\w+)`", advice.partition("leave out ")[2]):
            del changed[name]
    pytest.fail(f"four times advised, and refused still: {advice}")


@pytest.mark.parametrize("file", ["gemm_rs", "gemm_ar"])
@pytest.mark.parametrize(
    "move",
    [{"signal": "word"}, {"signal": "sentinel"}, {"own": "beside"}, {"direction": "pull"}],
    ids=str,
)
def test_what_a_field_goes_with_is_accepted_of_a_sum(
    file: str, move: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, advice = emitted(capsys, file, {"moves": {"C": move}})
    needs = re.search(r"goes with (\{.*\})", advice)
    assert needs is not None, advice
    schedule: dict[str, Any] = {"moves": {"C": {**move, **json.loads(needs[1])}}}
    _, advice = emitted(capsys, file, schedule)
    if advice.startswith("use the order `interleave`"):
        _, advice = emitted(capsys, file, {**schedule, "order": "interleave"})
    if advice == "use push, or two shots":
        schedule["moves"]["C"]["shots"] = 2
        _, advice = emitted(capsys, file, schedule)
    assert not advice


@pytest.mark.parametrize(
    "given",
    [
        {"tiles": {"M": 32, "N": 64, "K": 32}},
        {"tiles": {"M": 256, "N": 256, "K": 64}},
        {"tiles": {"M": 64, "N": 512, "K": 64}},
        {"tiles": {"M": 128, "N": 256, "K": 64}, "stages": 16},
        {"tiles": {"M": 128, "N": 256, "K": 256}, "stages": 4},
        {
            "tiles": {"M": 128, "N": 256, "K": 256},
            "moves": {"A": {"resource": "sm:8", "copies": "boxes"}},
        },
        {"tiles": {"M": 128, "N": 128, "K": 512}},
        {"warps": 4},
    ],
    ids=str,
)
def test_advice_on_roles_is_accepted(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--set", "M=1024,N=512,K=2048"]
    schedule = {"emitter": "gluon", **given}
    for _ in range(3):
        _, advice = emitted(capsys, "ag_gemm", schedule, *shape)
        if not advice:
            break
        assert not any(emitted(capsys, "ag_gemm", {**schedule, "emitter": "triton"}, *shape))
        tiles = re.search(r"`--tile ([^`]*)`", advice)
        if tiles is not None:
            new = dict(part.split("=") for part in tiles[1].split(","))
            schedule["tiles"] = {**schedule["tiles"], **{n: int(v) for n, v in new.items()}}
        most = re.search(r"at most (\d+) along each axis", advice)
        if most is not None:
            schedule["tiles"] = {n: min(v, int(most[1])) for n, v in schedule["tiles"].items()}
        stages, warps = re.search(r"(\d+) stages", advice), re.match(r"use (\d+),", advice)
        if stages is not None:
            schedule["stages"] = int(stages[1])
        if warps is not None:
            schedule["warps"] = int(warps[1])
    else:
        pytest.fail(f"three times advised, and refused still: {advice}")


def test_advice_on_parts_and_powers_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--set", "M=512,N=256,K=192"]
    parts = re.findall(r"\d+", emitted(capsys, "ag_gemm", {"split": 5}, *shape)[1])
    assert parts == ["1", "2", "3", "4", "6", "8", "12", "16"]
    for part in parts:
        assert not any(emitted(capsys, "ag_gemm", {"split": int(part)}, *shape))
    powers = re.findall(r"\d+", emitted(capsys, "ag_gemm", {"tiles": {"M": 100}})[1])
    assert powers == ["64", "128"]
    for power in powers:
        assert not any(emitted(capsys, "ag_gemm", {"tiles": {"M": int(power)}}))


@pytest.mark.parametrize("emitter", ["gluon", "library"])
@pytest.mark.parametrize("shape", ["M=128,K=256,N=512", "M=1024,K=256,N=1024"])
def test_another_emitter_takes_the_default_of_its_own(
    emitter: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "examples" / "gemm_rs.py")
    words = ["emit", file, "--set", shape, "--emitter", emitter, "--tile", "M=64,N=128"]
    if emitter == "library":
        words += ["--resource", "none"]
    assert main(words) == 0, capsys.readouterr().err


def layer(body: str) -> str:
    """A kernel of two products at most, with ``body`` behind its extents."""
    return f"""
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M", example={{"M": 64, "N": 32, "K": 32}})
def f(A, B, D, C):
    M, K = A.shape
    N = B.shape[1]
{body}"""


SUM = """
    for m, n in tk.tiles(M, N):
        {0} = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            {0} = tk.dot(A[m, k], {1}[k, n], {0})
"""
BEHIND = "    for m, n in tk.tiles(M, N):\n        C[m, n] = {}\n"
LEFT, RIGHT = SUM.format("b", "B"), SUM.format("d", "D")
EACH = f"{LEFT}        P[m, n] = b\n{RIGHT}        Q[m, n] = d\n" + BEHIND.format(
    "P[m, n] * Q[m, n]"
)
# What the library does not multiply, and what its help makes of it.
UNLIKE = {
    "two loops": (LEFT + RIGHT.split("\n", 2)[2] + "        C[m, n] = b * d\n", EACH),
    "two products": (
        LEFT.replace("        for", "        d = tk.zeros([m, n], tk.float32)\n        for")
        + "            d = tk.dot(A[m, k], D[k, n], d)\n        C[m, n] = b * d\n",
        EACH,
    ),
    "arithmetic": (
        LEFT + "        C[m, n] = tk.silu(b)\n",
        LEFT + "        P[m, n] = b\n" + BEHIND.format("tk.silu(P[m, n])"),
    ),
    "an operand that is computed": (
        LEFT.replace("A[m, k]", "tk.silu(A[m, k])") + "        C[m, n] = b\n",
        "    for m, k in tk.tiles(M, K):\n        T[m, k] = tk.silu(A[m, k])\n"
        + LEFT.replace("A[m, k]", "T[m, k]")
        + "        C[m, n] = b\n",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_the_library_does_not_multiply_is_taken_apart_as_the_help_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = UNLIKE[name]
    path = tmp_path / "f.py"
    words = ["run", str(path), "--emitter", "library", "--resource", "none", "--world", "2"]
    path.write_text(layer(before))
    advice = refused(capsys, *words)
    declared = re.search(r"`P = (tk\.empty\(.*?\))`", advice)
    # An operand's tensor has the operand's extents.
    made = declared[1] if declared else "tk.empty([M, K], tk.bfloat16)"
    assert declared or "`tk.empty`" in advice
    names = [tensor for tensor in "PQT" if f"{tensor}[m" in after]
    path.write_text(layer("".join(f"    {tensor} = {made}\n" for tensor in names) + after))
    assert main(words) == 0, capsys.readouterr().err


TWO_AXES = """
import tilelink
import tilelink.language as tk


@tilelink.kernel("{mapping}", example={{"M": 32, "N": 32, "K": 32}})
def f(A, B, C):
    M, K = A.shape
    N = B.shape[1]
{before}    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], {read}[k, n], acc)
        {store}[m, n] = acc
{behind}"""
IN_FRONT = """
    P = tk.empty([K, N], tk.bfloat16)
    for k, n in tk.tiles(K, N):
        P[k, n] = B[k, n]
"""
IN_THE_END = """
    for m, n in tk.tiles(M, N):
        C[m, n] = P[m, n]
"""


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ("gather A[M, K] over M; gather B[K, N] over N", "copy `B` to a tensor of its own"),
        ("gather A[M, K] over M; shard C[M, N] over N", "in place of `C`"),
        ("gather A[M, K] over M; scatter C[M, N] over N sum", "in place of `C`"),
        (
            "gather A[M, K] over M; scatter C[M, N] over M sum { owner m % WORLD }",
            "in place of `C`",
        ),
    ],
)
def test_a_loop_nest_that_tensors_cut_apart_is_two_as_the_help_says(
    mapping: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.py"
    words = ["run", str(path), "--world", "2", "--tile", "M=16,N=16"]
    path.write_text(TWO_AXES.format(mapping=mapping, before="", read="B", store="C", behind=""))
    assert says in refused(capsys, *words)
    parted = (
        {"before": IN_FRONT, "read": "P", "store": "C", "behind": ""}
        if "copy `B`" in says
        else {
            "before": "    P = tk.empty([M, N], tk.bfloat16)\n",
            "read": "B",
            "store": "P",
            "behind": IN_THE_END,
        }
    )
    path.write_text(TWO_AXES.format(mapping=mapping, **parted))
    assert main(words) == 0, capsys.readouterr().err


CUBE = """
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[B, S, D] over S", example={"B": 2, "S": 36, "D": 32})
def f(A, C):
    B, S, D = A.shape
    for b, s, d in tk.tiles(B, S, D):
        C[b, s, d] = A[b, s, d] * 2.0
"""


def test_what_has_no_code_is_avoided_as_the_help_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.py"
    path.write_text(CUBE)

    def words(**move: object) -> list[str]:
        chosen = json.dumps({"moves": {"A": move}})
        return ["emit", str(path), "--world", "2", "--schedule", chosen]

    advice = refused(capsys, *words(resource="sm:2", tile=4))
    assert "copy_engine for `A`" in advice and "`moves.A.tile` that divides" in advice
    assert main(words(resource="copy_engine", tile=4)) == 0
    assert main(words(resource="sm:2", tile=6)) == 0


def test_a_vector_that_roles_have_no_layout_for_is_refused_at_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.py"
    extents = {"M": 128, "N": 128, "K": 64}
    text = ONE_AXIS.format(vector="tk.sum(D[:].to(tk.float32), axis=0)", given=extents)
    path.write_text(text)
    words = ["emit", str(path), "--emitter", "gluon", "--tile", "M=128,N=128"]
    assert main(words) == 1
    said = capsys.readouterr().err
    number = 1 + text.splitlines().index("        d = tk.sum(D[:].to(tk.float32), axis=0)")
    assert "error[cannot-emit-roles]" in said and f"f.py:{number}:" in said
    assert "rows or columns" in said
    path.write_text(ONE_AXIS.format(vector="D[n].to(tk.float32)[None, :]", given=extents))
    assert main(words) == 0, capsys.readouterr().err


ONE_AXIS = """
import tilelink
import tilelink.language as tk


@tilelink.kernel("gather A[M, K] over M; local D[N]", example={given})
def f(A, B, D, C):
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        d = {vector}
        C[m, n] = acc * d
"""
