"""A sensible schedule for a kernel that nobody has tuned."""

from __future__ import annotations

from tilelink.ir import DTYPES, Op
from tilelink.schedules.schedule import Move, Schedule

# Largest sums whose stores go straight to the peers (bench/results/mlp_h200x4.json): GEMM + reduce-scatter of
# 9 and 17 MB takes 0.138 and 0.135 ms so and 0.162 and 0.164 by copy engine; of 38 MB, 0.354 and 0.316.
EPILOGUE_BYTES = {"reduce": 1 << 20, "scatter": 24 << 20}


def default_schedule(kernel: Op) -> Schedule:
    """The schedule to use for ``kernel`` (Tile IR) where neither the user nor a table gives one.

    Moved tensors travel by copy engine, which costs the computation nothing. A small sum is stored
    straight into its ranks, since the fixed cost of a copy would show: a reduce of at most 1 MiB, a
    scatter of at most 24 MiB.
    """
    extents = {op.symbol: int(op["value"]) for op in kernel.find("extent")}
    wide = any(op.get("dtype") == "fp32" for op in kernel.find("tensor"))
    rows, columns, depth = product_extents(kernel)
    tiles: dict[str, int] = {}
    for name in extents:
        tiles[name] = 64 if wide else 128
    # Accumulators of all products of one loop share the registers of 256 threads.
    dots = max((sum(o.name == "dot" for o in op.body) for op in kernel.walk()), default=1)
    for name in sorted(columns):
        tiles[name] = 64 if wide else max(64, 256 // max(1, dots))
    for name in sorted(depth):
        tiles[name] = 32 if wide else 64
    for name in sorted(rows):
        tiles[name] = 64 if wide else 128
    tiles = {name: min(size, _power(extents[name])) for name, size in tiles.items()}
    moves: dict[str, Move] = {}
    for tensor in kernel.find("tensor"):
        if tensor["move"] in ("gather", "scatter", "reduce"):
            moves[tensor.symbol] = Move(resource=_resource(tensor, extents))
    return Schedule(tiles=tuple(sorted(tiles.items())), moves=tuple(sorted(moves.items())))


def _resource(tensor: Op, extents: dict[str, int]) -> str:
    size = DTYPES[tensor["dtype"]]
    for dim in tensor["dims"]:
        size *= dim if isinstance(dim, int) else int(dim.evaluate(extents))
    return "epilogue" if size <= EPILOGUE_BYTES.get(tensor["move"], 0) else "copy_engine"


def product_extents(kernel: Op) -> tuple[set[str], set[str], set[str]]:
    """Extents that are rows, columns and depth of some matrix product of ``kernel``, by name."""
    rows: set[str] = set()
    columns: set[str] = set()
    depth: set[str] = set()
    loops = {
        arg.name: str(extent)
        for op in kernel.walk()
        if op.name == "for_tiles" and op.get("extent") is not None
        for arg, extent in zip(op.args, op["extent"], strict=False)
    }
    for op in kernel.walk():
        if op.name == "dot":
            (m, k), (_, n) = op.operands[0].type.shape[-2:], op.operands[1].type.shape[-2:]
            for target, dim in ((rows, m), (columns, n), (depth, k)):
                if dim in loops:
                    target.add(loops[dim])
    return rows, columns - rows, depth - rows - columns


def _power(extent: int) -> int:
    """The smallest power of two that holds ``extent``, at least 16."""
    return max(16, 1 << max(0, extent - 1).bit_length())
