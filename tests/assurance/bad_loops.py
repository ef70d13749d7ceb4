"""Bad loops, indices and stores: empty, past the end, in no loop, and too large to be proven."""

from __future__ import annotations

from tests.assurance.bad_case import ROOT, Case, Command
from tests.assurance.bad_source import DOT, STORE, ZEROS, body, kernel_text, whole

FILE = str(ROOT / "examples" / "ag_gemm.py")
FUSED = (ROOT / "tests" / "programs" / "ag_gemm.sm.ir").read_text(encoding="utf-8")
COPIES = (ROOT / "tests" / "programs" / "ag_gemm.copy_engine.ir").read_text(encoding="utf-8")
READ_K = "for k in tk.tiles(K):"


def copy(name: str, place: str, *words: str, lines: str) -> Command:
    """A kernel that copies A to C by ``lines``; the error points at ``place``, a line and a column."""
    content = kernel_text(f"M, K = A.shape\n{lines}\n", parameters="A, C")
    expected = (f"k.py:{place}", *words)
    return Command(f"loop: {name}", ("check", "k.py"), expected, files={"k.py": content})


def large(command: str, value: str, *words: str) -> Command:
    """The all-gather GEMM of examples/ with a huge extent."""
    name = f"large: {command} with {value}"
    return Command(name, (command, FILE, "--set", value), ("error[too-large]", *words))


def fused(name: str, old: str, new: str, *words: str) -> Command:
    """``simulate`` of a fused program, which nothing proves, with ``old`` replaced."""
    assert old in FUSED
    files = {"p.ir": FUSED.replace(old, new)}
    return Command(
        f"large: {name}", ("simulate", "p.ir"), ("error[too-large]", *words), files=files
    )


CASES: tuple[Case, ...] = (
    copy(
        "a range that ends before it begins",
        "9:14",
        "`tk.range(-3)` ends before it begins",
        lines="for e in tk.range(-3):\n    for m, k in tk.tiles(M, K):\n        C[e, m, k] = A[m, k]",
    ),
    copy(
        "tiles that end before they begin",
        "9:14",
        "`tk.tiles(8, 4)` ends before it begins",
        lines="for m in tk.tiles(8, 4):\n    C[m, :] = A[m, :]",
    ),
    copy(
        "an output that only an empty loop stores",
        "10:9",
        "`C`",
        "no iteration",
        lines="for m in tk.tiles(M, 0):\n    C[m, :] = A[m, :]",
    ),
    copy(
        "an output that only an empty inner loop stores",
        "11:13",
        "`C`",
        "no iteration",
        lines="for m in tk.tiles(M):\n    for k in tk.tiles(K, K):\n        C[m, k] = A[m, k]",
    ),
    copy(
        "a store in no loop",
        "9:5",
        "`C`",
        "in no loop",
        lines="C[:, :] = A[:, :]",
    ),
    copy(
        "a gathered tensor that is added to",
        "10:9",
        "`A` is gathered",
        lines="for m in tk.tiles(M):\n    A[m, :] += 1.0\n    C[m, :] = A[m, :]",
    ),
    copy(
        "a gathered tensor that is stored to in another loop",
        "10:9",
        "`A` is gathered",
        lines="for m in tk.tiles(M):\n    A[m, :] += 1.0\nfor m in tk.tiles(M):\n    C[m, :] = A[m, :]",
    ),
    copy(
        "an index past the end",
        "10:16",
        "index 99",
        "axis 1 of `A`",
        "32",
        lines="for m in tk.tiles(M):\n    C[m] = A[m, 99]",
    ),
    copy(
        "an index at the end",
        "10:16",
        "index 32",
        "axis 1 of `A`",
        lines="for m in tk.tiles(M):\n    C[m] = A[m, 32]",
    ),
    copy(
        "a slice past the end",
        "10:21",
        "`31:33`",
        "axis 1 of `A`",
        "32",
        lines="for m in tk.tiles(M):\n    C[m, 0:2] = A[m, 31:33]",
    ),
    copy(
        "a slice from below 0",
        "10:21",
        "`-2:2`",
        "axis 1 of `A`",
        lines="for m in tk.tiles(M):\n    C[m, 0:4] = A[m, -2:2]",
    ),
    copy(
        "a slice that divides by zero in effect",
        "10:21",
        "zero",
        lines="for m in tk.tiles(M):\n    C[m, 0:4] = A[m, 0:K // (M - 64)]",
    ),
    body("a slice that is empty", "B[k, n]", "B[16:0, n]", "`16:0`", "axis 0 of `B`", "empty"),
    body("a tuple in arithmetic", DOT, "acc = acc + (1, 2)", "a tuple of 2", "k.py:13:"),
    body("a tuple that is stored", STORE, "C[m, n] = (acc, acc)", "a tuple of 2", "k.py:14:"),
    whole(
        "a number as the default of a tensor",
        "k.py:7:12",
        "the default of `B` is 3",
        parameters="A, B=3, C=None",
    ),
    body(
        "an output that is read back in the task that stores it",
        STORE,
        "C[m, n] = acc\n    D[m, n] = C[m, n]",
        "read of `C`",
        parameters="A, B, C, D",
    ),
    copy(
        "a range of 10^8 around tiles",
        "9:14",
        "error[too-large]",
        "100000000",
        lines="for e in tk.range(10**8):\n    for m, k in tk.tiles(M, K):\n        C[m, k] = A[m, k]",
    ),
    body(
        "a range of 10^8 in a task",
        STORE,
        "for e in tk.range(10**8):\n        C[m, n] = acc",
        "error[too-large]",
        "k.py:14:18",
    ),
    body(
        "a range of 10^9 without a store",
        ZEROS,
        ZEROS + "\n    for e in tk.range(10**9):\n        acc = acc + B[e, n]",
        "10",
    ),
    *(
        Command(
            f"large: a loop of 10^12 copies, {command}",
            (command, "p.ir"),
            ("error[too-large]", "p.ir:16", "`s`"),
            files={"p.ir": COPIES.replace("hi = WORLD, lo = 1", "hi = 1000000000000, lo = 1")},
        )
        for command in ("run", "simulate", "check")
    ),
    large("check", "M=2000000000", "axis 0 of `A`", "2,000,000,000"),
    large("run", "M=2000000000", "axis 0 of `A`", "2,000,000,000"),
    large("graph", "M=2000000000", "axis 0 of `A`"),
    large("check", "N=2000000000", "over [M, N]"),
    large("graph", "N=2000000000", "over [M, N]"),
    large("simulate", "N=2000000000", "over [M, N]"),
    large("run", "K=2000000000"),
    large("simulate", "K=2000000000"),
    fused("a fused program", "extent @N {value = 48}", "extent @N {value = 2000000000}", "stage"),
)
