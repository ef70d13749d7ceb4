"""The reference executor on the example kernels, against PyTorch arithmetic on whole tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tilelink
from tilelink.backend.accuracy import relative_error
from tilelink.backend.reference import run
from tilelink.kernel import Kernel, load_kernels

FOLDER = Path(__file__).parent.parent / "kernels"
WORLDS = [1, 2, 4]
# Lengths by loop variable that divide no extent of the tests.
TILES: list[dict[str, int] | None] = [
    None,
    {"m": 7, "n": 5, "k": 9, "q": 5, "s": 3, "e": 1, "f": 5, "p": 3, "t": 3, "h": 7, "r": 5},
]
DTYPES = [("fp32", 2e-6), ("bf16", 8e-3)]
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}

everywhere = pytest.mark.parametrize("world", WORLDS)
tiled = pytest.mark.parametrize("tiles", TILES, ids=["whole", "tiled"])
typed = pytest.mark.parametrize(("dtype", "limit"), DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for name in ("ag_gemm", "gemm_rs", "attention", "moe"):
        found |= load_kernels(FOLDER / f"{name}.py")
    return found


class Numbers:
    """Random tensors, each different from the last."""

    def __init__(self, dtype: str = "fp32") -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = TORCH[dtype]

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def order(self, length: int) -> torch.Tensor:
        return torch.randperm(length, generator=self.generator).int()


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert relative_error(actual, expected.to(actual.dtype)) <= limit


def rounded_sum(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """What a reduction gives: contributions rounded to ``dtype``, added exactly."""
    return sum((p.to(dtype).double() for p in parts), torch.zeros_like(parts[0]).double())


GEMM: dict[str, int] = {"M": 24, "K": 20, "N": 18}


@everywhere
@tiled
@typed
def test_all_gather_gemms(
    kernels: dict[str, Kernel], world: int, tiles: Any, dtype: str, limit: float
) -> None:
    numbers = Numbers(dtype)
    a, b, c = numbers(24, 20), numbers(20, 18), numbers(20, 18)
    wide, gate, up = a.double(), b.double(), c.double()
    cases: list[tuple[str, dict[str, torch.Tensor | float], torch.Tensor]] = [
        ("ag_gemm", {"B": b}, wide @ gate),
        ("ag_gemm_nk", {"weight": b.T.contiguous()}, wide @ gate),
        (
            "ag_gemm_silu",
            {"gate": b, "up": c},
            torch.nn.functional.silu(wide @ gate) * (wide @ up),
        ),
    ]
    for name, weights, expected in cases:
        op = kernels[name].build(GEMM, world=world, dtype=dtype)
        outputs = run(op, [{"A": part, **weights} for part in a.chunk(world)], tiles)
        for output in outputs:
            close(output["C"], expected, limit)


@everywhere
@tiled
@typed
def test_reductions(
    kernels: dict[str, Kernel], world: int, tiles: Any, dtype: str, limit: float
) -> None:
    numbers = Numbers(dtype)
    inputs: list[dict[str, Any]] = [
        {"A": numbers(24, 20), "B": numbers(20, 18)} for _ in range(world)
    ]
    parts = [i["A"].double() @ i["B"].double() for i in inputs]
    total = rounded_sum(parts, TORCH[dtype])
    for rank, output in enumerate(
        run(kernels["gemm_rs"].build(GEMM, world=world, dtype=dtype), inputs, tiles)
    ):
        close(output["C"], total.chunk(world)[rank], limit)
    reduced = run(kernels["gemm_ar"].build(GEMM, world=world, dtype=dtype), inputs, tiles)
    for output in reduced:
        close(output["C"], total, limit)
        assert torch.equal(output["C"], reduced[0]["C"])


@everywhere
@tiled
def test_bias_and_residual_after_a_reduce_scatter(
    kernels: dict[str, Kernel], world: int, tiles: Any
) -> None:
    numbers = Numbers()
    bias, residual = numbers(18), numbers(24, 18)
    inputs: list[dict[str, Any]] = [
        {"A": numbers(24, 20), "B": numbers(20, 18), "bias": bias, "residual": part}
        for part in residual.chunk(world)
    ]
    expected = sum((i["A"].double() @ i["B"].double() for i in inputs), bias + residual.double())
    present = ["A", "B", "C", "bias", "residual"]
    op = kernels["gemm_rs_bias"].build(GEMM, world=world, dtype="fp32", present=present)
    for rank, output in enumerate(run(op, inputs, tiles)):
        close(output["C"], expected.chunk(world)[rank], 2e-6)


@everywhere
@tiled
def test_residual_and_norm_after_an_all_reduce(
    kernels: dict[str, Kernel], world: int, tiles: Any
) -> None:
    numbers = Numbers()
    residual, weight = numbers(24, 18), numbers(18)
    inputs: list[dict[str, Any]] = [
        {"A": numbers(24, 20), "B": numbers(20, 18), "residual": residual, "weight": weight}
        for _ in range(world)
    ]
    x = sum((i["A"].double() @ i["B"].double() for i in inputs), residual.double())
    op = kernels["gemm_ar_norm"].build(GEMM, world=world, dtype="fp32", scalars={"eps": 1e-6})
    scalars = [s.symbol for s in op.find("scalar")]
    for output in run(op, [{**i, **dict.fromkeys(scalars, 1e-6)} for i in inputs], tiles):
        close(output["X"], x, 2e-6)
        expected = torch.nn.functional.rms_norm(x, (18,), weight.double(), 1e-6)
        close(output["Y"], expected, 4e-6)


def contiguous(world: int, length: int) -> list[list[int]]:
    return [list(range(r * length // world, (r + 1) * length // world)) for r in range(world)]


def cyclic(world: int, length: int) -> list[list[int]]:
    return [[i for i in range(length) if i // 2 % world == r] for r in range(world)]


def zigzag(world: int, length: int) -> list[list[int]]:
    block = length // (2 * world)
    blocks = [range(b * block, (b + 1) * block) for b in range(2 * world)]
    return [[*blocks[r], *blocks[2 * world - 1 - r]] for r in range(world)]


OWNERS: dict[str, tuple[str, Callable[[int, int], list[list[int]]]]] = {
    "contiguous": ("s / (S / WORLD)", contiguous),
    "cyclic": ("s / 2 % WORLD", cyclic),
    "zigzag": ("min(s / (S / (2 * WORLD)), 2 * WORLD - 1 - s / (S / (2 * WORLD)))", zigzag),
}


@everywhere
@tiled
@pytest.mark.parametrize("owners", list(OWNERS))
@pytest.mark.parametrize("name", ["attention", "ring_attention"])
def test_attention(
    kernels: dict[str, Kernel], name: str, owners: str, world: int, tiles: Any
) -> None:
    owner, shards = OWNERS[owners]
    move = "gather" if name == "attention" else "ring"
    moves = {"K": move, "V": move, "Q": "shard", "O": "shard"}
    mapping = "\n".join(
        f"{kind} {tensor}[B, H, S, D] over S {{ owner {owner} }}" for tensor, kind in moves.items()
    )
    kernel = tilelink.kernel(mapping)(kernels[name].__wrapped__)
    numbers, rows = Numbers(), shards(world, 16)
    q, k, v = (numbers(2, 1, 16, 8) for _ in range(3))
    inputs = [{"Q": q[:, :, r], "K": k[:, :, r], "V": v[:, :, r]} for r in rows]
    constants = {"causal": True} if name == "attention" else None
    op = kernel.build(
        {"B": 2, "H": 1, "S": 16, "D": 8}, world=world, dtype="fp32", scalars=constants
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=name == "attention"
    )
    for rank, output in enumerate(run(op, inputs, tiles)):
        close(output["O"], expected[:, :, rows[rank]], 2e-6)


MOE = {"T": 8, "H": 6, "E": 4, "F": 10, "P": 16, "TOPK": 2}


def routed(numbers: Numbers, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of the 16 (token, choice) pairs, and where each expert's pairs begin."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return numbers.order(16), starts


COUNTS = [[4, 4, 4, 4], [0, 9, 0, 7], [16, 0, 0, 0]]


@everywhere
@tiled
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_moe_up(kernels: dict[str, Kernel], counts: list[int], world: int, tiles: Any) -> None:
    numbers = Numbers()
    pairs, offs = routed(numbers, counts)
    a, order = numbers(8, 6), pairs // 2
    inputs: list[dict[str, Any]] = [
        {"A": part, "W": numbers(4, 6, 10), "order": order, "offs": offs} for part in a.chunk(world)
    ]
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    op = kernels["moe_up"].build({k: MOE[k] for k in "THEFP"}, world=world, dtype="fp32")
    for rank, output in enumerate(run(op, inputs, tiles)):
        weights = inputs[rank]["W"].double()[expert]
        expected = torch.einsum("ph,phf->pf", a.double()[order.long()], weights)
        close(output["Y"], expected, 2e-6)


@everywhere
@tiled
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_moe_down(kernels: dict[str, Kernel], counts: list[int], world: int, tiles: Any) -> None:
    numbers = Numbers()
    pairs, offs = routed(numbers, counts)
    slot = torch.argsort(pairs).reshape(8, 2).int()
    weight = numbers(8, 2)
    inputs: list[dict[str, Any]] = [
        {"X": numbers(16, 10), "W": numbers(4, 10, 6), "slot": slot, "weight": weight, "offs": offs}
        for _ in range(world)
    ]
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    total = torch.zeros(8, 6, dtype=torch.float64)
    for i in inputs:
        z = torch.einsum("pf,pfh->ph", i["X"].double(), i["W"].double()[expert])
        total += (z[slot.long()] * weight.double()[:, :, None]).sum(1)
    op = kernels["moe_down"].build(MOE, world=world, dtype="fp32")
    for rank, output in enumerate(run(op, inputs, tiles)):
        close(output["C"], total.chunk(world)[rank], 2e-6)


@everywhere
@tiled
@pytest.mark.parametrize("routing", ["random", "all to the last", "own"])
def test_expert_parallel_moe(
    kernels: dict[str, Kernel], routing: str, world: int, tiles: Any
) -> None:
    numbers = Numbers()
    tables = {
        "random": [numbers.order(16).reshape(8, 2) % world for _ in range(world)],
        "all to the last": [torch.full((8, 2), world - 1, dtype=torch.int32)] * world,
        "own": [torch.full((8, 2), r, dtype=torch.int32) for r in range(world)],
    }[routing]
    inputs: list[dict[str, Any]] = [
        {"X": numbers(8, 6), "dest": dest, "weight": numbers(8, 2), "W": numbers(6, 6)}
        for dest in tables
    ]
    op = kernels["ep_moe"].build({"T": 8, "H": 6, "k": 2, "CAP": 64}, world=world, dtype="fp32")
    experts = torch.stack([i["W"] for i in inputs]).double()
    for rank, output in enumerate(run(op, inputs, tiles)):
        mine = inputs[rank]
        every = torch.einsum("th,tkhf->tkf", mine["X"].double(), experts[mine["dest"].long()])
        expected = (every * mine["weight"].double()[:, :, None]).sum(1)
        close(output["C"], expected, 2e-6)


@everywhere
def test_dispatch(kernels: dict[str, Kernel], world: int) -> None:
    numbers = Numbers()
    inputs: list[dict[str, Any]] = [
        {"X": numbers(8, 6), "dest": numbers.order(16).reshape(8, 2) % world} for _ in range(world)
    ]
    op = kernels["ep_dispatch"].build(
        {"T": 8, "H": 6, "k": 2, "CAP": 64}, world=world, dtype="fp32"
    )
    for rank, output in enumerate(run(op, inputs)):
        for source, i in enumerate(inputs):
            lo, hi = output["offs"][source : source + 2].tolist()
            rows = [t for t, row in enumerate(i["dest"].tolist()) for to in row if to == rank]
            assert torch.equal(output["R"][lo:hi], i["X"][rows])
        assert not output["R"][int(output["offs"][world]) :].any()
