"""The measured problems: fused operators, and the matrix product of one rank in each."""

from __future__ import annotations

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
# Shapes that are measured at fewer rows too, where fixed costs weigh more.
SMALL_ROWS = ((8192, 28672), (4608, 36864))

AG_GEMM = "ag_gemm"
GEMM_RS = "gemm_rs"


@dataclass(frozen=True, slots=True)
class Case:
    """One problem. ``m``, ``k``, ``n``: the matrix product of one rank, in elements.

    ``ag_gemm``: every rank holds m / world rows of A and its own (k, n) weight. ``gemm_rs``: every
    rank holds an (m, k) A and a (k, n) weight, and ends with m / world rows of the sum.
    """

    kind: str
    m: int
    k: int
    n: int
    origin: str

    @property
    def name(self) -> str:
        """``ag_gemm 8192x8192x7168``: M, K, N in this order."""
        return f"{self.kind} {self.m}x{self.k}x{self.n}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one bf16 weight."""
        return 2 * self.k * self.n

    def unsupported(self, world: int) -> str | None:
        """Why the problem cannot be measured on ``world`` ranks, or None."""
        for extent, size in (("K", self.k), ("N", self.n)):
            if size % 8:
                return f"{extent} = {size} is no multiple of 8: bf16 rows are not 16-byte aligned"
        if self.m % world:
            return f"M = {self.m} is no multiple of {world} ranks"
        return None


def mlp_cases(world: int) -> list[Case]:
    """The MLP suite, tensor-parallel ``world``: the most telling shapes first."""
    cases: list[Case] = []
    for hidden, intermediate in (MLP[4], *MLP[:4], MLP[5]):
        cases += _mlp(8192, hidden, intermediate, world)
    for m in (1024, 4096):
        for hidden, intermediate in SMALL_ROWS:
            cases += _mlp(m, hidden, intermediate, world)
    return cases


def _mlp(m: int, hidden: int, intermediate: int, world: int) -> list[Case]:
    slice_ = intermediate // world
    origin = f"MLP hidden {hidden}, intermediate {intermediate}"
    return [
        Case(AG_GEMM, m, hidden, 2 * slice_, f"{origin}, gate and up"),
        Case(GEMM_RS, m, slice_, hidden, f"{origin}, down"),
        Case(AG_GEMM, m, hidden, slice_, f"{origin}, one of gate and up"),
    ]


SUITES = {"mlp": mlp_cases}
