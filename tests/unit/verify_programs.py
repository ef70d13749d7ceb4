"""The hand-written programs of tests/programs at other sizes, by rewriting their numbers."""

import re
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "programs"
NAMES = (
    "ag_gemm.copy_engine",
    "ag_gemm.sm",
    "ag_gemm.collective",
    "gemm_rs.copy_engine",
    "gemm_rs.sm",
    "gemm_rs.epilogue",
    "gemm_rs.collective",
    "gemm_ar.epilogue",
)


def text_of(name: str) -> str:
    """The text of a program as it is in the tree."""
    return (PROGRAMS / f"{name}.ir").read_text()


def resized(
    name: str, world: int, shard: int, k: int, n: int, tile: tuple[int, int], workers: int = 4
) -> str:
    """A program with another world, ``shard`` rows a rank and GEMM tiles ``tile`` (16 rows a shard before).

    Not for programs with a fixed number of channels a shard (``sm``) or with channels of 16 rows (``gemm_ar``).
    """
    text = text_of(name)
    text = re.sub(r"world = \d+", f"world = {world}", text)
    for extent, value in (("M", world * shard), ("K", k), ("N", n)):
        text = re.sub(rf"@{extent} {{value = \d+", f"@{extent} {{value = {value}", text)
    text = re.sub(r"(\* |\+ |/ |% |segment = )16\b", rf"\g<1>{shard}", text)
    count = -(-shard // tile[0]) * -(-n // tile[1])
    text = re.sub(r"count = 6\b", f"count = {count}", text)
    text = re.sub(r"tile = \[\d+, 16\]", f"tile = [{tile[0]}, {tile[1]}]", text)
    text = text.replace("offset = 268288", f"offset = {262144 + world * shard * n * 2}")
    return text.replace("workers = 4", f"workers = {workers}")
