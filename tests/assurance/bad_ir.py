"""Bad IR text: kernels and fused programs that were cut, misspelt, or put together wrongly."""

from __future__ import annotations

from tests.assurance.bad_case import ROOT, Case, Command

PROGRAMS = ROOT / "tests" / "programs"
KERNEL = (PROGRAMS / "kernels" / "ag_gemm.ir").read_text()
FUSED = (PROGRAMS / "ag_gemm.sm.ir").read_text()
MOE = (PROGRAMS / "kernels" / "moe.ir").read_text()
DIGITS = "9" * 5000


def text(
    name: str, content: str | bytes, *words: str, command: str = "check", code: int = 1
) -> Command:
    """A whole IR file."""
    arguments = (command, "p.ir")
    return Command(f"ir: {name}", arguments, words, code=code, files={"p.ir": content})


def edit(base: str, kind: str, command: str, name: str, old: str, new: str, *words: str) -> Command:
    """``base`` with the first ``old`` replaced; the message points into the file."""
    assert old in base, old
    content = base.replace(old, new, 1)
    return text(f"{kind}: {name}", content, "p.ir:", *words, command=command)


def kernel(name: str, old: str, new: str, *words: str, command: str = "run") -> Command:
    """The kernel of the all-gather GEMM, edited."""
    return edit(KERNEL, "kernel", command, name, old, new, *words)


def fused(name: str, old: str, new: str, *words: str, command: str = "check") -> Command:
    """The fused program of the all-gather GEMM, edited."""
    return edit(FUSED, "program", command, name, old, new, *words)


def cut(name: str, base: str, end: str, *words: str) -> Command:
    """``base`` up to and with ``end``."""
    return text(f"cut {name}", base[: base.index(end) + len(end)], "p.ir:", *words)


STORE = "    store @C[%m, %n] (%c)\n"
CAST = "%c = cast (%acc.2) : bf16[m, n]"
A_TENSOR = 'tensor @A {dims = [M, K], dtype = "bf16", move = "gather", over = 0'
PUSH = "stage @push {extent = [M / WORLD], tile = [4], workers = [0, 2]}"
LAUNCH = 'launch @ag_gemm {after = ["head"], stages = 3, warps = 8, workers = 4}'
WAIT_ACK = "wait @ack[0..WORLD] {epoch = (0 - 1)}"

CASES: tuple[Case, ...] = (
    text("empty", "", "p.ir:", "op"),
    text("a comment", "# nothing\n", "p.ir:"),
    text("prose", "this is no IR\n", "p.ir:"),
    text("binary", bytes(range(256)), "p.ir", code=2),
    text("Python", "import os\nprint(1)\n", "p.ir:"),
    text("a number", "3\n", "p.ir:"),
    text("an op alone", "zeros\n", "p.ir:", "kernel"),
    text("a kernel without a name", "kernel {world = 2} do {\n}\n", "p.ir:", "name"),
    text("a kernel without a block", "kernel @f {world = 2}\n", "p.ir:", "block"),
    text("a kernel with nothing in it", "kernel @f {world = 2} do {\n}\n", "p.ir:", "@f"),
    text("a program with nothing in it", "program @f {world = 2} do {\n}\n", "p.ir:", "@f"),
    text("two kernels of one name", KERNEL + KERNEL, "p.ir", "ag_gemm", "twice", code=2),
    text(
        "deep nesting",
        "kernel @f {world = 2} do {\n" + "for_range {lo = 0, hi = 1} do {\n" * 3000,
        "p.ir:",
        "nest",
    ),
    text(
        "a deep expression",
        KERNEL.replace("value = 24", "value = " + "(" * 5000 + "1"),
        "p.ir:",
        "nest",
    ),
    cut("in a declaration", KERNEL, "extent @K {value", "="),
    cut("in a string", KERNEL, 'dtype = "bf', "p.ir:"),
    cut("in a loop", KERNEL, "zeros : fp32[m, n]", "}"),
    cut("in a type", KERNEL, "zeros : fp32[m", "]"),
    cut("in the stage", FUSED, "stage @push", "p.ir:"),
    kernel("unknown op", "zeros", "zeroes", "zeroes", "zeros"),
    kernel("unknown attribute", "over = 0", "ofer = 0", "ofer"),
    kernel("attribute twice", "over = 0", "over = 0, over = 1", "over"),
    kernel("unknown symbol", "load @A[", "load @Q[", "@Q"),
    kernel("symbol that is an extent", "load @A[%m, %k]", "load @M[%m, %k]", "@M"),
    kernel(
        "a symbol twice",
        "  tensor @B",
        '  tensor @A {dims = [M], dtype = "bf16", move = "local", role = "in"}\n  tensor @B',
        "@A",
        "twice",
    ),
    kernel("an extent twice", "extent @K", "extent @M", "@M", "twice"),
    kernel("a value that is not there", "(%acc.2)", "(%q)", "%q"),
    kernel("a value of another block", CAST, "%c = cast (%d) : bf16[m, n]", "%d"),
    kernel("a value twice", CAST, "%acc = zeros : fp32[m, n]\n    " + CAST, "%acc", "twice"),
    kernel("world missing", "{world = 4}", "{}", "world"),
    kernel("world 0", "{world = 4}", "{world = 0}", "world"),
    kernel("world negative", "{world = 4}", "{world = (0 - 4)}", "world"),
    kernel("world text", "{world = 4}", '{world = "4"}', "world"),
    kernel("world a name", "{world = 4}", "{world = M}", "world"),
    kernel("world 1000000", "{world = 4}", "{world = 1000000}", "world"),
    kernel("world that does not divide", "{world = 4}", "{world = 5}", "24"),
    kernel("world of many digits", "{world = 4}", f"{{world = {DIGITS}}}", "number"),
    kernel("extent 0", "value = 24", "value = 0", "value"),
    kernel("extent negative", "value = 24", "value = (0 - 24)", "value"),
    kernel("extent a float", "value = 24", "value = 24.0", "value"),
    kernel("extent text", "value = 24", 'value = "24"', "value"),
    kernel("extent true", "value = 24", "value = true", "value"),
    kernel("extent huge", "value = 24", "value = 99999999999", "value"),
    kernel("dims a number", "dims = [M, K]", "dims = 3", "dims"),
    kernel("dims empty", "dims = [M, K]", "dims = []", "@A"),
    kernel("dims of an unknown extent", "dims = [M, K]", "dims = [M, Q]", "`Q`"),
    kernel("dims of 0", "dims = [M, K]", "dims = [M, 0]", "dims"),
    kernel("dims by zero", "dims = [M, K]", "dims = [M, K / 0]", "zero"),
    kernel("dims text", "dims = [M, K]", 'dims = ["M", "K"]', "dims"),
    kernel("dtype unknown", 'dtype = "bf16"', 'dtype = "fp8"', "dtype", "fp8"),
    kernel("dtype a word", 'dtype = "bf16"', "dtype = bf16", "dtype"),
    kernel("role unknown", 'role = "in"', 'role = "through"', "role", "through"),
    kernel("move unknown", 'move = "gather"', 'move = "teleport"', "move", "teleport"),
    kernel("over past the rank", "over = 0", "over = 5", "over", "5"),
    kernel("over missing", "over = 0, ", "", "over"),
    kernel("owner missing", "owner = e / 2 % WORLD, ", "", "owner"),
    kernel("owner past the world", "e / 2 % WORLD", "WORLD", "owner"),
    kernel("owner uneven", "e / 2 % WORLD", "min(e, 3)", "own"),
    kernel("owner by zero", "e / 2 % WORLD", "e / 0", "zero"),
    kernel("owner of a stranger", "e / 2 % WORLD", "q", "`q`"),
    kernel("too many indices", "@A[%m, %k]", "@A[%m, %k, %k]", "@A", "3"),
    kernel("too few indices", "@A[%m, %k]", "@A[%m]", "@A", "1"),
    kernel("a float as an index", "store @C[%m, %n] (%c)", "store @C[%acc, %n] (%c)", "%acc"),
    kernel(
        "wrong dtype of a load",
        "load @A[%m, %k] : bf16[m, k]",
        "load @A[%m, %k] : int32[m, k]",
        "bf16",
    ),
    kernel(
        "wrong shape of a load",
        "load @A[%m, %k] : bf16[m, k]",
        "load @A[%m, %k] : bf16[m, n]",
        "load",
    ),
    kernel(
        "wrong rank of a load", "load @A[%m, %k] : bf16[m, k]", "load @A[%m, %k] : bf16[m]", "load"
    ),
    kernel("unknown dtype of a value", "zeros : fp32[m, n]", "zeros : fp7[m, n]", "fp7"),
    kernel("unknown name in a type", "zeros : fp32[m, n]", "zeros : fp32[m, q]", "`q`"),
    kernel("a value that is a tile", "zeros : fp32[m, n]", "zeros : tile", "tile"),
    kernel("dot of wrong shapes", "dot (%a, %b, %acc.1)", "dot (%b, %a, %acc.1)", "dot"),
    kernel("dot of one operand", "dot (%a, %b, %acc.1)", "dot (%a)", "dot", "1 operands"),
    kernel(
        "dot with a wrong result",
        "dot (%a, %b, %acc.1) : fp32",
        "dot (%a, %b, %acc.1) : bf16",
        "%d",
    ),
    kernel("dot of a tile", "dot (%a, %b, %acc.1)", "dot (%m, %b, %acc.1)", "%m"),
    kernel("cast to another shape", CAST, "%c = cast (%acc.2) : bf16[n, m]", "cast"),
    kernel("cast of two", CAST, "%c = cast (%acc.2, %acc) : bf16[m, n]", "cast"),
    kernel("store of two values", "(%c)", "(%c, %c)", "store"),
    kernel("store of nothing", STORE, "    store @C[%m, %n]\n", "store"),
    kernel("store to the wrong place", "store @C[%m, %n]", "store @C[%n, %m]", "store"),
    kernel("no store", STORE, "", "`C`"),
    kernel("yield missing", "      yield (%d)\n", "", "yield"),
    kernel(
        "yield in the middle", "      %d = dot", "      yield (%acc.1)\n      %d = dot", "yield"
    ),
    kernel("yield of another type", "yield (%d)", "yield (%a)", "%a"),
    kernel("yield outside a loop", STORE, STORE + "    yield (%c)\n", "yield"),
    kernel(
        "too many loop variables",
        "(%m: tile, %n: tile)",
        "(%m: tile, %n: tile, %o: tile)",
        "for_tiles",
    ),
    kernel("a loop variable of data", "(%m: tile, %n: tile)", "(%m: fp32, %n: tile)", "%m"),
    kernel("a loop over a stranger", "extent = [M, N]", "extent = [M, Q]", "`Q`"),
    kernel("a loop over text", "extent = [M, N]", 'extent = "MN"', "extent"),
    kernel("a loop over nothing", "{extent = [M, N]}", "{}", "for_tiles"),
    kernel("carried types that differ", "%acc.1: fp32[m, n]", "%acc.1: bf16[m, n]", "%acc"),
    kernel("axis past the rank", CAST, "%c = sum (%acc.2) {axis = 4} : bf16[m]", "axis", "4"),
    kernel("axis missing", CAST, "%c = sum (%acc.2) : bf16[m]", "axis"),
    kernel(
        "where without a condition", CAST, "%c = where (%acc, %acc, %acc) : fp32[m, n]", "where"
    ),
    kernel("not of floats", CAST, "%c = not (%acc.2) : fp32[m, n]", "not"),
    kernel("index of data", CAST, "%c = index (%acc.2) : int32[m]", "index"),
    kernel("param of a tensor", CAST, "%c = param @A : fp32", "@A"),
    kernel("a launch in a kernel", STORE, "    flush\n", "flush"),
    kernel("a wait in a kernel", STORE, "    wait @A[%m, 0]\n", "@A"),
    kernel(
        "a stage at the top",
        "  for_tiles {extent = [M, N]}",
        "  head do {\n  }\n  for_tiles {extent = [M, N]}",
        "head",
    ),
    kernel("nothing gathered", "load @A[%m, %k] : bf16[m, k]", "zeros : bf16[m, k]", "`A`"),
    text(
        "table that is no tensor",
        MOE.replace('table = "dest"', 'table = "T"'),
        "p.ir:",
        "table",
        command="run",
    ),
    text(
        "into that is not there",
        MOE.replace('into = "R"', 'into = "Q"'),
        "p.ir:",
        "into",
        command="run",
    ),
    fused("a kernel is called a program", "program @ag_gemm", "kernel @ag_gemm", "kernel"),
    text(
        "a program with a kernel's body",
        KERNEL.replace("kernel @", "program @"),
        "p.ir:",
        "for_tiles",
    ),
    fused("no agents", FUSED[FUSED.index("  head do {") :], "}\n", "ag_gemm"),
    fused(
        "after itself",
        '{after = ["head"], stages',
        '{after = ["ag_gemm"], stages',
        "ag_gemm",
        "after",
    ),
    fused("after a stranger", '{after = ["head"], stages', '{after = ["tail"], stages', "tail"),
    fused(
        "after what is behind it",
        "  head do {",
        '  stream @s {after = ["ag_gemm"]} do {\n  }\n  head do {',
        "`s`",
        "after",
    ),
    fused("after that is text", 'after = ["head"]', 'after = "head"', "after"),
    fused("two heads", "  head do {", "  head do {\n  }\n  head do {", "head"),
    fused("workers 0", "workers = 4", "workers = 0", "workers"),
    fused("workers negative", "workers = 4", "workers = (0 - 4)", "workers"),
    fused("workers text", "workers = 4", 'workers = "4"', "workers"),
    fused("workers huge", "workers = 4}", "workers = 4000000000}", "workers"),
    fused("stage workers reversed", "workers = [0, 2]", "workers = [2, 0]", "workers"),
    fused("stage workers one number", "workers = [0, 2]", "workers = 2", "workers"),
    fused("stage workers past the launch", "workers = [0, 2]", "workers = [0, 9]", "workers"),
    fused("warps 3", "warps = 8", "warps = 3", "warps"),
    fused("tile 0", "tile = [4]", "tile = [0]", "tile"),
    fused("tile negative", "tile = [4]", "tile = [(0 - 4)]", "tile"),
    fused("tile of two axes", "tile = [4]", "tile = [4, 4]", "tile"),
    fused("segment 0", "segment = 16", "segment = 0", "segment"),
    fused("group 0", "group = 2", "group = 0", "group"),
    fused("visit of a stranger", "visit = (RANK + WORLD - i) % WORLD", "visit = q", "`q`"),
    fused(
        "visit past the segments", "visit = (RANK + WORLD - i) % WORLD", "visit = i + 100", "A.all"
    ),
    fused("visit by zero", "visit = (RANK + WORLD - i) % WORLD", "visit = i / 0", "zero"),
    fused("axis past the stage", PUSH, PUSH.replace("tile", "axis = 3, tile"), "axis"),
    fused("a queue of another kind", PUSH, PUSH.replace("tile", 'queue = "fifo", tile'), "queue"),
    fused(
        "a stage outside a launch",
        "  head do {",
        "  " + PUSH + " do (%t: tile) {\n  }\n  head do {",
        "stage",
    ),
    fused(
        "flag of negative size", "flag @ack {dims = [WORLD]", "flag @ack {dims = [0 - 4]", "dims"
    ),
    fused("flag offset negative", "offset = 512", "offset = (0 - 512)", "offset"),
    fused("flag offset not a word", "offset = 512", "offset = 513", "offset"),
    fused("flag offset far out", "offset = 512", "offset = 99999999999999", "ack"),
    fused("buffer space unknown", 'space = "symmetric"', 'space = "moon"', "space"),
    fused(
        "words of no encoding",
        'space = "symmetric"',
        'space = "symmetric", words = "moon"',
        "words",
    ),
    fused(
        "words without an encoding",
        'space = "symmetric"',
        'space = "symmetric", words = true',
        "words",
    ),
    fused("buffer with an odd offset", "offset = 262144", "offset = 262145", "offset"),
    fused("wait on a tensor", WAIT_ACK, "wait @A[0..WORLD, 0]", "@A"),
    fused("wait with too many indices", WAIT_ACK, "wait @ack[0, 0]", "@ack"),
    fused("wait far out", WAIT_ACK, "wait @ack[99]", "@ack"),
    fused("wait by zero", WAIT_ACK, "wait @ack[1 / 0]", "zero"),
    fused("wait epoch text", WAIT_ACK, 'wait @ack[0..WORLD] {epoch = "x"}', "epoch"),
    fused(
        "wait on a range that is reversed", WAIT_ACK, "wait @ack[3..1] {epoch = (0 - 1)}", "@ack"
    ),
    fused(
        "notify of nobody", "notify @ack[RANK] {peer = p}", "notify @ack[RANK] {peer = 99}", "peer"
    ),
    fused("notify by a stranger", "peer = p}", "peer = zz}", "`zz`"),
    fused("notify count 0", "count = 2", "count = 0", "count"),
    fused("notify through a flag", "through = @A.sent", "through = @A.ready", "@A.ready"),
    fused("notify through nothing", "through = @A.sent", "through = @nowhere", "@nowhere"),
    fused("scope unknown", WAIT_ACK, WAIT_ACK.replace("{", '{scope = "galaxy", '), "scope"),
    fused("transfer to nowhere", "to = @A.all", "to = @B.all", "@B.all"),
    fused("transfer without a peer", "peer = (RANK + s) % WORLD, to", "to", "peer"),
    fused("transfer to a number", "to = @A.all[%t at t.start + RANK * 16, :]", "to = 3", "to"),
    fused("a range that is text", "hi = WORLD", 'hi = "W"', "hi"),
    fused(
        "a finish in the stage",
        "      store @C[%m, %n] (%c)",
        "      finish do {\n      }",
        "finish",
    ),
    fused(
        "emit of a broken one",
        "dot (%a, %b, %acc.1)",
        "dot (%b, %a, %acc.1)",
        "dot",
        command="emit",
    ),
    fused("run of a broken one", "zeros : fp32[m, n]", "zeros : fp32[n, m]", "acc", command="run"),
    fused("simulate a broken one", "tensor @C", "tensor @D", "@C", command="simulate"),
    Command(
        "ir: a program where a kernel is needed",
        ("graph", "p.ir"),
        ("needs", "kernel"),
        2,
        {"p.ir": FUSED},
    ),
    Command(
        "ir: no such kernel", ("check", "p.ir::foo"), ("`foo`", "ag_gemm"), 2, {"p.ir": KERNEL}
    ),
    Command(
        "ir: set of a stranger", ("check", "p.ir", "--set", "Q=3"), ("`Q`",), 2, {"p.ir": KERNEL}
    ),
    Command(
        "ir: set that does not divide",
        ("check", "p.ir", "--set", "M=25"),
        ("25", "A"),
        1,
        {"p.ir": KERNEL},
    ),
    Command(
        "ir: dtype of IR", ("check", "p.ir", "--dtype", "fp32"), ("--dtype",), 2, {"p.ir": KERNEL}
    ),
    Command(
        "ir: world that does not divide",
        ("check", "p.ir", "--world", "5"),
        ("5", "A"),
        1,
        {"p.ir": KERNEL},
    ),
)
