"""Bad command lines: every command, and the options that they share."""

from __future__ import annotations

from tests.assurance.bad_case import ROOT, Case, Command

FILE = str(ROOT / "examples" / "ag_gemm.py")
FUSED = str(ROOT / "tests" / "programs" / "ag_gemm.sm.ir")
ON_FILES = ("run", "check", "ir", "graph", "emit", "simulate")


def usage(name: str, *arguments: str, words: tuple[str, ...], code: int = 2) -> Command:
    """A command line that is refused."""
    return Command(f"command: {name}", arguments, words, code=code)


def _of_every_command() -> list[Case]:
    cases: list[Case] = []
    for command in ON_FILES:
        cases += [
            usage(f"{command} without FILE", command, words=("FILE",)),
            usage(f"{command} of a missing file", command, "nowhere.py", words=("nowhere.py",)),
            usage(f"{command} of a folder", command, ".", words=("`.`",)),
            usage(
                f"{command} of no such kernel", command, f"{FILE}::foo", words=("`foo`", "ag_gemm")
            ),
            usage(f"{command} with an unknown option", command, FILE, "--fast", words=("--fast",)),
            Command(
                f"command: {command} of empty standard input",
                (command, "-"),
                ("<stdin>", "kernel"),
                code=2,
            ),
            Command(
                f"command: {command} of a binary file",
                (command, "k.py"),
                ("k.py",),
                code=2,
                files={"k.py": bytes(range(256))},
            ),
            Command(
                f"command: {command} of an empty file",
                (command, "k.py"),
                ("k.py", "kernel"),
                code=2,
                files={"k.py": ""},
            ),
        ]
    return cases


CASES: tuple[Case, ...] = (
    *_of_every_command(),
    usage("no command", words=("COMMAND",)),
    usage("an unknown command", "fly", words=("fly",)),
    usage("an unknown command with a file", "tunes", FILE, words=("tunes",)),
    Command(
        "command: a missing file, as a process",
        ("check", "nowhere.py"),
        ("nowhere.py",),
        2,
        process=True,
    ),
    Command(
        "command: binary standard input, as a process",
        ("check", "-"),
        ("<stdin>",),
        2,
        given=b"\xff\xfe\x00\x80",
        process=True,
    ),
    Command(
        "command: nothing on standard input, as a process",
        ("run", "-"),
        ("<stdin>",),
        2,
        process=True,
    ),
    Command("command: an unknown command, as a process", ("fly",), ("fly",), 2, process=True),
    Command(
        "command: binary standard input", ("check", "-"), ("<stdin>",), 2, given=b"\xff\xfe\x00\x80"
    ),
    usage("a file name with a NUL", "check", "a\0b.py", words=("NUL",)),
    usage("an empty file name", "check", "", words=("FILE",)),
    usage("only a kernel name", "check", "::f", words=("FILE",)),
    usage("a kernel name that is empty", "check", f"{FILE}::", words=("kernel",)),
    usage("a file name far too long", "check", "a" * 5000, words=("too long",)),
    usage("world 0", "check", FILE, "--world", "0", words=("--world", "0")),
    usage("world negative", "check", FILE, "--world", "-4", words=("--world", "-4")),
    usage("world text", "check", FILE, "--world", "many", words=("--world", "many")),
    usage("world a float", "check", FILE, "--world", "2.0", words=("--world", "2.0")),
    usage(
        "world that does not divide M", "check", FILE, "--world", "7", words=("`M`", "7"), code=1
    ),
    usage("world too large", "check", FILE, "--world", "512", words=("--world", "512", "64")),
    usage("world of many digits", "check", FILE, "--world", "9" * 5000, words=("--world",)),
    usage("set without a number", "check", FILE, "--set", "M", words=("--set", "`M`")),
    usage("set of nothing", "check", FILE, "--set", "", words=("--set",)),
    usage("set to text", "check", FILE, "--set", "M=x", words=("--set", "`x`")),
    usage("set to 0", "check", FILE, "--set", "M=0", words=("--set", "`0`")),
    usage("set negative", "check", FILE, "--set", "M=-4", words=("--set", "`-4`")),
    usage("set of a stranger", "check", FILE, "--set", "Q=4", words=("--set", "`Q`")),
    usage("set of a tile variable", "run", FILE, "--set", "m=4", words=("--set", "`m`", "M, K, N")),
    usage("dynamic stranger", "check", FILE, "--dynamic", "M,Q", words=("--dynamic", "`Q`")),
    usage("dynamic of a fused program", "check", FUSED, "--dynamic", "M", words=("--dynamic",)),
    usage("run with a tile of a stranger", "run", FILE, "--tile", "Q=4", words=("--tile", "`Q`")),
    usage(
        "run with workers that are no number",
        "run",
        FILE,
        "--schedule",
        '{"workers": true}',
        words=("workers",),
    ),
    usage("set of WORLD", "check", FILE, "--set", "WORLD=4", words=("--set", "`WORLD`")),
    usage("set huge", "check", FILE, "--set", "M=2147483648", words=("--set", "2147483647")),
    usage("set huge on run", "run", FILE, "--set", "M=1000000000000", words=("--set", "large")),
    usage("set beyond 64 bits", "check", FILE, "--set", "M=" + "9" * 30, words=("--set", "large")),
    usage("dtype unknown", "check", FILE, "--dtype", "float8", words=("--dtype", "float8")),
    usage("dtype empty", "check", FILE, "--dtype", "", words=("--dtype",)),
    usage("dtype of a stranger", "check", FILE, "--dtype", "Q=fp32", words=("--dtype", "`Q`")),
    usage("dtype bool", "check", FILE, "--dtype", "bool", words=("bool",), code=1),
    usage("target unknown", "check", FILE, "--target", "abacus", words=("--target", "abacus")),
    usage("target a path", "check", FILE, "--target", "../../x", words=("--target", "../../x")),
    usage(
        "target unknown with a world",
        "check",
        FILE,
        "--world",
        "2",
        "--target",
        "abacus",
        words=("--target", "abacus"),
    ),
    usage("backend unknown", "run", FILE, "--backend", "tpu", words=("--backend", "tpu")),
    usage("backend cuda without a GPU", "run", FILE, "--backend", "cuda", words=("cuda",), code=1),
    usage("seed text", "run", FILE, "--seed", "x", words=("--seed", "x")),
    usage("seed beyond 64 bits", "run", FILE, "--seed", "9" * 30, words=("--seed",)),
    usage("seed negative", "run", FILE, "--seed", "-1", words=("--seed", "-1")),
    usage("stage unknown", "emit", FILE, "--stage", "wasm", words=("--stage", "wasm")),
    usage("format unknown", "graph", FILE, "--format", "png", words=("--format", "png")),
    usage("pass unknown", "ir", FILE, "--after", "magic", words=("--after", "magic")),
    usage("after and fused", "ir", FILE, "--after", "magic", "--fused", words=("--fused",)),
    usage(
        "trace that cannot be written",
        "simulate",
        FILE,
        "--trace",
        "no/such/t.json",
        words=("no/such/t.json",),
    ),
    usage("trace to a folder", "simulate", FILE, "--trace", ".", words=("`.`",)),
    usage("world for a fused program", "check", FUSED, "--world", "8", words=("--world", "fused")),
    usage("set for a fused program", "check", FUSED, "--set", "M=8", words=("--set", "fused")),
    usage(
        "schedule for a fused program",
        "check",
        FUSED,
        "--schedule",
        "{}",
        words=("--schedule", "fused"),
    ),
    usage("graph of a fused program", "graph", FUSED, words=("graph", "fused")),
    usage("after of a fused program", "ir", FUSED, "--after", "order-tiles", words=("ir --after",)),
    usage("env with a file", "env", FILE, words=("ag_gemm.py",)),
)
