"""The measured problems: fused operators, and the matrix product of one rank in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

# (hidden, intermediate) of the MLP shapes of the TileLink paper (arXiv 2503.20313, table 4).
MLP = (
    (4096, 11008),
    (4096, 14336),
    (3584, 14336),
    (4608, 36864),
    (8192, 28672),
    (8192, 29568),
)
ROWS = 8192
# The shape that is measured at other numbers of rows too, where fixed costs weigh more.
LARGE = (8192, 28672)
DECODE_ROWS = (16, 32, 64)
SMALL_ROWS = (128, 256, 512, 1024, 2048, 4096, 16384)
ALL_REDUCE_ROWS = (1, 16, 64, 256, 1024, 4096)
# (hidden, intermediate) of layers that no schedule was tuned for, and numbers of rows that no tile divides: what a
# call takes there is tuned for another shape, predicted, or the default.
OTHERS = ((2048, 5632), (3072, 8192), (5120, 13824), (6144, 16384), (7168, 18432), (12288, 49152))
ODD_ROWS = (8, 184, 872, 2792, 5160, 13104)
# Eight ranks of hidden 4096, intermediate 11008, each slice rounded up to a multiple of 128: the shape of
# published prototypes. It is measured beside the grid and is no part of its means.
PADDED = (4096, 2 * 1408)
EXTRA = "beside the grid"

AG_GEMM = "ag_gemm"
GEMM_RS = "gemm_rs"
GEMM_AR = "gemm_ar"
GEMM = "gemm"
GEMM_LEAST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """One problem. ``m``, ``k``, ``n``: the matrix product of one rank, in elements.

    ``ag_gemm``: every rank holds m / world rows of A and its own (k, n) weight. ``gemm_rs``: every rank
    holds an (m, k) A and a (k, n) weight, and ends with m / world rows of the sum; with ``gemm_ar`` it
    ends with all of it. ``gemm``: one GPU alone. ``world``: how many ranks take part, None for all.
    """

    kind: str
    m: int
    k: int
    n: int
    origin: str
    world: int | None = None

    @property
    def name(self) -> str:
        """``ag_gemm 8192x8192x7168``: M, K, N in this order; the number of ranks where it is set."""
        suffix = "" if self.world is None else f" on {self.world}"
        return f"{self.kind} {self.m}x{self.k}x{self.n}{suffix}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one bf16 weight."""
        return 2 * self.k * self.n

    @property
    def output_bytes(self) -> int:
        """Bytes of the bf16 product of one rank."""
        return 2 * self.m * self.n

    def rows_in(self, world: int) -> int:
        """Rows of A that a rank holds."""
        return self.m // world if self.kind == AG_GEMM else self.m

    def rows_out(self, world: int) -> int:
        """Rows of the result that a rank ends with."""
        return self.m // world if self.kind == GEMM_RS else self.m

    def unsupported(self, world: int) -> str | None:
        """Why the problem cannot be measured on ``world`` ranks, or None."""
        for extent, size in (("K", self.k), ("N", self.n)):
            if size % 8:
                return f"{extent} = {size} is no multiple of 8: bf16 rows are not 16-byte aligned"
        if self.kind in (AG_GEMM, GEMM_RS) and self.m % world:
            return f"M = {self.m} is no multiple of {world} ranks"
        return None


def mlp_cases(parallel: int) -> list[Case]:
    """The six MLP shapes at 8192 rows, weights cut in ``parallel``: the most telling shapes first."""
    cases = []
    for shape in (MLP[4], *MLP[:4], MLP[5]):
        cases += [
            _gate_up(ROWS, shape, parallel),
            _down(ROWS, shape, parallel),
            _gate(ROWS, shape, parallel),
        ]
    return cases + _padded(parallel)


def small_m_cases(parallel: int) -> list[Case]:
    """Hidden 8192, intermediate 28672 at other numbers of rows."""
    order = (1024, 4096, 256, 2048, 512, 128, 16384)
    assert sorted(order) == sorted(SMALL_ROWS)
    return [make(m, LARGE, parallel) for m in order for make in (_gate_up, _down)]


def all_reduce_cases(parallel: int) -> list[Case]:
    """GEMM + all-reduce of the second layer of hidden 8192, intermediate 28672."""
    order = (16, 64, 256, 1, 1024, 4096)
    assert sorted(order) == sorted(ALL_REDUCE_ROWS)
    return [_all_reduce(m, LARGE, parallel) for m in order]


def grid_cases(parallel: int) -> list[Case]:
    """All three suites; the shapes that single figures are promised for come first."""
    first = [
        _gate_up(ROWS, LARGE, parallel),
        _down(ROWS, LARGE, parallel),
        _all_reduce(16, LARGE, parallel),
        _all_reduce(64, LARGE, parallel),
        _gate_up(1024, LARGE, parallel),
        _down(1024, LARGE, parallel),
        *_padded(parallel),
        _down(ROWS, MLP[0], parallel),
        _gate_up(4096, LARGE, parallel),
        _down(4096, LARGE, parallel),
    ]
    rest = all_reduce_cases(parallel) + small_m_cases(parallel) + mlp_cases(parallel)
    return list(dict.fromkeys(first + rest))


def scaling_cases(world: int, parallel: int | None = None) -> list[Case]:
    """The shapes of hidden 8192 on 2, 4 and 8 of ``world`` ranks, weights cut in as many."""
    cases = []
    for m in (ROWS, 1024, 4096, 256, 2048, 512, 128, 16384):
        for size in (2, 4, 8):
            if size <= world:
                cut = parallel or size
                cases += [_gate_up(m, LARGE, cut, size), _down(m, LARGE, cut, size)]
    for m in (16, 64, 256, 1, 1024, 4096):
        for size in (2, 4, 8):
            if size <= world:
                cases.append(_all_reduce(m, LARGE, parallel or size, size))
    return cases


def untuned_cases(parallel: int) -> list[Case]:
    """Every other layer with numbers of rows that are not round; each operator meets each number once."""
    found = []
    for number, shape in enumerate(OTHERS):
        few, more, most = (ODD_ROWS[(number + step) % len(ODD_ROWS)] for step in (0, 2, 4))
        found += [
            _gate_up(few, shape, parallel),
            _down(more, shape, parallel),
            _all_reduce(most - 1, shape, parallel),
        ]
    return found


def decode_cases(parallel: int) -> list[Case]:
    """Hidden 8192, intermediate 28672 at the few rows of a step that generates."""
    return [
        make(m, LARGE, parallel) for m in DECODE_ROWS for make in (_gate_up, _down, _all_reduce)
    ]


def gemm_cases(parallel: int) -> list[Case]:
    """The different matrix products of the grid with 1024 rows and more, for one GPU."""
    found: dict[tuple[int, int, int], Case] = {}
    for case in grid_cases(parallel):
        if case.m >= GEMM_LEAST_ROWS:
            shape = case.m, case.k, case.n
            found.setdefault(shape, Case(GEMM, *shape, f"{case.kind}, {case.origin}"))
    return list(found.values())


def _gate_up(m: int, shape: tuple[int, int], parallel: int, world: int | None = None) -> Case:
    hidden, intermediate = shape
    return Case(
        AG_GEMM, m, hidden, 2 * (intermediate // parallel), _mlp(shape, "gate and up"), world
    )


def _gate(m: int, shape: tuple[int, int], parallel: int) -> Case:
    hidden, intermediate = shape
    return Case(AG_GEMM, m, hidden, intermediate // parallel, _mlp(shape, "one of gate and up"))


def _down(m: int, shape: tuple[int, int], parallel: int, world: int | None = None) -> Case:
    hidden, intermediate = shape
    return Case(GEMM_RS, m, intermediate // parallel, hidden, _mlp(shape, "down"), world)


def _all_reduce(m: int, shape: tuple[int, int], parallel: int, world: int | None = None) -> Case:
    hidden, intermediate = shape
    return Case(GEMM_AR, m, intermediate // parallel, hidden, _mlp(shape, "down"), world)


def _padded(parallel: int) -> list[Case]:
    hidden, columns = PADDED
    origin = f"{_mlp(MLP[0], 'gate and up')}, padded, {EXTRA}"
    return [Case(AG_GEMM, ROWS, hidden, columns, origin)] if parallel == 8 else []


def _mlp(shape: tuple[int, int], layer: str) -> str:
    return f"MLP hidden {shape[0]}, intermediate {shape[1]}, {layer}"


# From the number of ranks, and the number of parts that weights are cut in (None: as many).
SUITES: dict[str, Callable[[int, int | None], list[Case]]] = {
    "mlp": lambda world, parallel: mlp_cases(parallel or world),
    "small-m": lambda world, parallel: small_m_cases(parallel or world),
    "allreduce": lambda world, parallel: all_reduce_cases(parallel or world),
    "grid": lambda world, parallel: grid_cases(parallel or world),
    "scaling": scaling_cases,
    "decode": lambda world, parallel: decode_cases(parallel or world),
    "untuned": lambda world, parallel: untuned_cases(parallel or world),
    # One GPU stands for a rank of eight unless told otherwise.
    "gemm": lambda world, parallel: gemm_cases(parallel or 8),
}


def named(cases: Iterable[Case], only: str) -> list[Case]:
    """The cases whose name or origin contains one of the texts that ``only`` lists, by comma."""
    texts = only.split(",")
    return [c for c in cases if any(text in f"{c.name} ({c.origin})" for text in texts)]
