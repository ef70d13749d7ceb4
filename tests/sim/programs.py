"""The samples of ``tests/programs``, and the same programs at other sizes."""

from pathlib import Path

import torch

from tilelink.ir import Op, parse_ir

SAMPLES = Path(__file__).parents[1] / "programs"
NAMES = ("ag_gemm.copy_engine", "gemm_ar.epilogue", "gemm_rs.copy_engine")
ALL_NAMES = tuple(sorted(path.stem for path in SAMPLES.glob("*.ir")))


def sample_text(name: str) -> str:
    """The text of one sample."""
    return (SAMPLES / f"{name}.ir").read_text()


def sample(name: str) -> Op:
    """One sample, parsed."""
    return parse_ir(sample_text(name), name)


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A bf16 matrix of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def inputs_of(program: Op, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random A and B for every rank of a GEMM program, shards where A is gathered."""
    extents = {op.symbol: int(op["value"]) for op in program.find("extent")}
    m, k, n, world = extents["M"], extents["K"], extents["N"], int(program["world"])
    if program.declared("A").get("over") is not None:
        m //= world
    return [
        {
            "A": random(m, k, seed=1000 * seed + 2 * r),
            "B": random(k, n, seed=1000 * seed + 2 * r + 1, scale=k**-0.5),
        }
        for r in range(world)
    ]


def expected(program: Op, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What the samples compute, by plain arithmetic: gather and multiply, or multiply and sum."""
    a = [i["A"].float() for i in inputs]
    b = [i["B"].float() for i in inputs]
    move = program.declared("C")["move"]
    if move == "local":
        return [(torch.cat(a) @ x).bfloat16() for x in b]
    total = sum((x @ y).bfloat16().float() for x, y in zip(a, b, strict=True))
    assert isinstance(total, torch.Tensor)
    whole = total.bfloat16()
    return list(whole.chunk(len(a))) if move == "scatter" else [whole] * len(a)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error over rows."""
    difference = (found.float() - right.float()).norm(dim=1)
    return float((difference / right.float().norm(dim=1)).max())


def resized(
    name: str,
    world: int,
    m: int,
    k: int,
    n: int,
    tile: tuple[int, int, int] = (128, 256, 64),
    workers: int = 132,
) -> Op:
    """The sample ``ag_gemm.copy_engine`` or ``gemm_rs.copy_engine`` at another size.

    ``m`` and ``tile[0]`` such that a rank's rows are whole tiles.
    """
    rows = m // world
    tiles = rows // tile[0] * -(-n // tile[1])
    text = sample_text(name)
    for old, new in (
        ("world = 4", f"world = {world}"),
        ("@M {value = 64}", f"@M {{value = {m}}}"),
        ("@K {value = 32}", f"@K {{value = {k}}}"),
        ("@N {value = 48}", f"@N {{value = {n}}}"),
        ("RANK * 16 + 16", f"RANK * {rows} + {rows}"),
        ("RANK * 16", f"RANK * {rows}"),
        ("% WORLD * 16 + 16", f"% WORLD * {rows} + {rows}"),
        ("% WORLD * 16", f"% WORLD * {rows}"),
        ("m.start / 16", f"m.start / {rows}"),
        ("segment = 16", f"segment = {rows}"),
        ("tile = [8, 16]", f"tile = [{tile[0]}, {tile[1]}]"),
        ("tile = [16]", f"tile = [{tile[2]}]"),
        ("workers = 4", f"workers = {workers}"),
        ("count = 6", f"count = {tiles}"),
        ("offset = 268288", f"offset = {262144 + m * n * 2}"),
    ):
        text = text.replace(old, new)
    return parse_ir(text, name)
