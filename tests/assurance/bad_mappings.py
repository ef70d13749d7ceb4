"""Bad mapping text: each statement broken in several ways, and maps that mean nothing."""

from __future__ import annotations

from tests.assurance.bad_case import Case, Command
from tests.assurance.bad_source import GOOD_BODY, kernel_text

EXAMPLE = {"M": 64, "N": 32, "K": 32}


def mapping(name: str, text: str, *words: str, source: str = GOOD_BODY) -> Command:
    """``check`` of the all-gather GEMM under the mapping ``text``."""
    line = f'@tilelink.kernel("""{text}""", example={EXAMPLE!r})'
    content = kernel_text(source, decorator=line)
    return Command(f"mapping: {name}", ("check", "k.py"), words, files={"k.py": content})


def owner(name: str, expression: str, *words: str) -> Command:
    """A gather whose owner map is ``expression``."""
    return mapping(f"owner {name}", f"gather A[M, K] over M {{ owner {expression} }}", *words)


def block(name: str, text: str, *words: str) -> Command:
    """A gather with ``text`` as its block."""
    return mapping(name, f"gather A[M, K] over M {{ {text} }}", *words)


CASES: tuple[Case, ...] = (
    mapping("noise", "\\x00\\x01\\x02", "k.py:"),
    mapping("prose", "please gather A for me", "please", "k.py:"),
    mapping("an unknown statement", "gahter A[M, K] over M", "gahter", "gather"),
    mapping("gather alone", "gather", "tensor"),
    mapping("gather without shape", "gather A over M", "extents", "k.py:"),
    mapping("gather without over", "gather A[M, K]", "over"),
    mapping("gather over nothing", "gather A[M, K] over", "extent"),
    mapping("gather over an extent of another", "gather A[M, K] over Q", "`Q`"),
    mapping("gather over a number", "gather A[M, K] over 0", "0"),
    mapping("gather with an open bracket", "gather A[M, K over M", "k.py:"),
    mapping("gather with empty brackets", "gather A[] over M", "extent"),
    mapping("gather with sum", "gather A[M, K] over M sum", "sum"),
    mapping("gather of one extent twice", "gather A[M, M] over M", "`M`"),
    mapping("gather with too few axes", "gather A[M] over M", "`A.shape`"),
    mapping("gather with too many axes", "gather A[M, K, Q] over M", "`A.shape`"),
    mapping("gather twice", "gather A[M, K] over M\ngather A[M, K] over M", "`A`", "twice"),
    mapping("gather and shard of one tensor", "gather A[M, K] over M\nshard A[M, K] over M", "`A`"),
    mapping("two statements on a line", "gather A[M, K] over M gather B[K, N] over K", "gather"),
    mapping("gather of an output", "gather C[M, N] over M", "`C`"),
    mapping("gather of WORLD", "gather WORLD[M, K] over M", "WORLD"),
    mapping("an extent called RANK", "gather A[RANK, K] over RANK", "RANK"),
    mapping("an extent of zero", "gather A[0, K] over K", "0"),
    mapping("a negative extent", "gather A[M, -3] over M", "-3"),
    mapping("division by zero in an extent", "gather A[M, K / 0] over M", "zero"),
    mapping("scatter without sum", "scatter C[M, N] over M", "sum"),
    mapping("scatter with mean", "scatter C[M, N] over M mean", "mean", "sum"),
    mapping("scatter of an input", "scatter B[K, N] over K sum", "`B`"),
    mapping("reduce without sum", "reduce C[M, N]", "sum"),
    mapping("reduce over", "reduce C[M, N] over M sum", "over"),
    mapping("reduce of an input", "reduce B[K, N] sum", "`B`"),
    mapping("ring without over", "ring A[M, K]", "over"),
    mapping("shard without over", "shard A[M, K]", "over"),
    mapping("local with a block", "local B[K, N] { tile 3 }", "local"),
    mapping("local over", "local B[K, N] over K", "over"),
    mapping("local of an unknown tensor", "local Q[K, N]", "`Q`"),
    mapping("exchange without by", "exchange A[M, K] into R[N, K], o[WORLD + 1]", "by"),
    mapping("exchange without offsets", "exchange A[M, K] by d[M, k] into R[N, K]", "exchange"),
    mapping("combine without from", "combine Z[M, K] into Y[M, k, K]", "combine"),
    mapping("combine from nothing", "combine C[M, N] from Q into Y[M, k, N]", "`Q`"),
    mapping("a bad mark", "gather A[M, K] over M, M static", "static"),
    mapping("dynamic of a stranger", "gather A[M, K] over M, Q dynamic", "`Q`"),
    block("an empty map", "owner", "owner"),
    block("an unknown map", "speed 3", "speed"),
    block("a map twice", "tile 4 x 4\n tile 8 x 8", "tile", "twice"),
    mapping("an open block", "gather A[M, K] over M { owner m", "}"),
    block("tile of zero", "tile 0 x K", "tile", "0"),
    block("tile negative", "tile -4 x K", "tile", "-4"),
    block("tile with too few axes", "tile 4", "tile", "`A[M, K]`"),
    block("tile with too many axes", "tile 4 x 4 x 4", "tile", "`A[M, K]`"),
    block("tile of an unknown name", "tile Q x K", "`Q`"),
    block("tile by zero", "tile M / 0 x K", "zero"),
    block("signal of an unknown name", "signal q", "`q`"),
    block("signal by zero", "signal t / 0", "zero"),
    block("signal negative", "signal t - 100", "signal"),
    owner("always 0", "0", "owner"),
    owner("past the world", "WORLD", "owner"),
    owner("negative", "m - 1000", "owner"),
    owner("of an unknown name", "q / 2", "`q`"),
    owner("by zero", "m / 0", "zero"),
    owner("modulo zero", "m % 0", "zero"),
    owner("by a zero in effect", "m / (K - 32)", "zero"),
    owner("RANK", "RANK", "RANK"),
    owner("uneven", "min(m / 2, WORLD - 1)", "owner"),
    owner("power", "m ** 2", "**"),
    owner("float", "m / 2.5", "2.5"),
    owner("text", "'m'", "'"),
    owner("call", "floor(m)", "floor"),
    owner("table that is no tensor", "K[m]", "`K`"),
    owner("table of floats", "B[m]", "`B.shape`"),
    owner("unbalanced", "(m / 2", "k.py:"),
    owner("operator at the end", "m /", "k.py:"),
    owner("deep parentheses", "(" * 2000 + "m" + ")" * 2000, "k.py:"),
    mapping(
        "an extent that WORLD does not divide",
        "gather A[M, 30] over M\ngather B[30, N] over N",
        "30",
    ),
)
