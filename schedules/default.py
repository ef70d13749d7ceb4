"""A sensible schedule for a kernel that nobody has tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from tilelink.ir import DTYPES, Op, Value
from tilelink.ir.layout import DATA, PAYLOAD, SLOT_BYTES, SLOT_SENTINELS
from tilelink.schedules.schedule import Move, Schedule

# Largest sums whose stores go straight to the peers (bench/results/mlp_h200x4.json): GEMM + reduce-scatter of
# 9 and 17 MB takes 0.138 and 0.135 ms so and 0.162 and 0.164 by copy engine; of 38 MB, 0.354 and 0.316. An
# all-reduce in one shot sends the whole to every rank: of 1 MB only.
EPILOGUE_BYTES = {"reduce": 1 << 20, "scatter": 24 << 20}
# Bytes of a sum over all ranks of which one shot is the faster way: 256 KB at 8 ranks, 1 MB at 2. One shot
# sends every contribution to every rank, two shots send less and take one more trip over the link.
ONE_SHOT_BYTES = 2 << 20
# Largest sums that travel as words: those of the number of the call are twice the bytes, but nothing has to be put
# back. Where a sum is not read once, and sentinels cannot announce it, a reduce travels so up to a larger size.
WORD_BYTES = 128 << 10
REREAD_WORD_BYTES = 1 << 20
SENTINEL_BYTES = 8 << 20
WORD_RANKS = 8  # at most: a thread polls its places of all of them at once
# Tasks that are about enough for all SMs of a GPU: below, tiles are cut smaller.
TASKS = 100
COLUMNS = 64  # of the smallest tile
# Tiles of so few rows may have fewer columns, and are better than wide ones from half as many tasks on. One H200
# took 10.9 us for 16 x 4096 x 2816 with 88 tiles of 32 columns in steps of 256, 12.7 in steps of 128; cuBLAS 10.7.
# (`few_rows_products_h200.json`)
FEW_ROWS, FEW_COLUMNS = 64, 32
# Depth of a product that takes as long as adding one part to it: 715 TFLOP/s of bf16 against 2.1 TB/s of parts.
PART_DEPTH = 340


def default_schedule(kernel: Op, smaller: bool = True) -> Schedule:
    """The schedule to use for ``kernel`` (Tile IR) where neither the user nor a table gives one.

    Moved tensors travel by copy engine, which costs the computation nothing. A small sum is stored
    straight into its ranks, since the fixed cost of a copy would show: a reduce of at most 1 MiB (of 24
    MiB in two shots), a scatter of at most 24 MiB. Where a product has too few tiles for the SMs, they are
    made smaller if that gives enough, unless ``smaller`` is false: warps with roles need large ones. Stores of a
    product that fills the SMs alternate between two slots; sums of at most 8 MiB travel as words that signal
    themselves.
    Where the tiles of a product are more than there are workers, and parts are whole tiles, a reduce in two shots
    is summed in the epilogue of its own tiles, which are computed while the parts of the others arrive; but not
    many tiles, of which each would add parts for longer than it multiplies.
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
    lengths = {**extents, **_shards(kernel, extents)}
    tiles = {name: min(size, _power(lengths[name])) for name, size in tiles.items()}
    small = None if wide or not smaller else _smaller(kernel, extents, tiles, rows, columns, depth)
    moves: dict[str, Move] = {}
    for tensor in kernel.find("tensor"):
        if tensor["move"] in ("gather", "scatter", "reduce"):
            moves[tensor.symbol] = Move(resource=_resource(kernel, tensor, extents))
    if small is not None and _fits_slots(kernel, extents, moves):
        moves = {
            name: replace(move, slots=2, signal=_signal(kernel, name, extents, move))
            for name, move in moves.items()
        }
        signalling = [name for name, move in moves.items() if move.signal == "sentinel"]
        if _landing(kernel, extents, signalling) > SLOT_SENTINELS:
            moves = {name: replace(move, signal="flag") for name, move in moves.items()}
    chosen = small or Schedule(tiles=tuple(sorted(tiles.items())))
    if len(moves) == 1 and _sums_own(kernel, extents, chosen):
        moves = {name: replace(move, sum="epilogue", signal="flag") for name, move in moves.items()}
    return replace(chosen, moves=tuple(sorted(moves.items())))


def _sums_own(kernel: Op, extents: dict[str, int], schedule: Schedule) -> bool:
    """Whether the one moved tensor is a reduce in two shots whose sum can stand in an epilogue, and pays there."""
    (tensor,) = (t for t in kernel.find("tensor") if t["move"] in ("gather", "scatter", "reduce"))
    world, name = int(kernel["world"]), tensor.symbol
    if tensor["move"] != "reduce" or world == 1:
        return False
    if any(op.get("dynamic") for op in kernel.find("extent")):
        return False
    if _bytes(tensor, extents) * world <= ONE_SHOT_BYTES:
        return False
    stores = [op for op in kernel.walk() if op.name == "store" and op.symbol == name]
    nests = [op for op in kernel.body if op.blocks and any(o in stores for o in op.walk())]
    if len(stores) != 1 or len(nests) != 1:
        return False
    (nest,), (store,) = nests, stores
    tiled = nest.name == "for_tiles" and not nest.results and nest.get("extent") is not None
    if not tiled or nest.body[-1] is not store or not any(o.name == "dot" for o in nest.walk()):
        return False
    if store.ref is None or store.ref.index != nest.args:
        return False
    if store.operands[0].type.dtype != tensor["dtype"]:
        return False
    lengths = [d if isinstance(d, int) else int(d.evaluate(extents)) for d in nest["extent"]]
    sizes = [schedule.tile(str(extent), 128) for extent in nest["extent"]]
    tasks = prod(-(-length // size) for length, size in zip(lengths, sizes, strict=True))
    # Parts that end within a tile leave by addresses, and cost registers that the sum needs.
    whole = any(n % (world * size) == 0 for n, size in zip(lengths, sizes, strict=True))
    shallow = min(extents[name] for name in product_extents(kernel)[2]) < PART_DEPTH * (world - 1)
    return whole and tasks > schedule.workers and not (shallow and tasks > 2 * schedule.workers)


def _smaller(
    kernel: Op,
    extents: dict[str, int],
    tiles: dict[str, int],
    rows: set[str],
    columns: set[str],
    depth: set[str],
) -> Schedule | None:
    """Tiles, warps and stages for one product, so that it fills a GPU; None where none do."""
    if len(rows) != 1 or len(columns) != 1:
        return None
    (m,), (n,) = rows, columns
    found = dict(tiles)

    def tasks() -> int:
        return -(-extents[m] // found[m]) * -(-extents[n] // found[n])

    if found[m] < 64:
        found[n] = min(found[n], 128)
    low = found[m] <= FEW_ROWS
    while tasks() < TASKS and found[n] > (FEW_COLUMNS if low else COLUMNS):
        found[n] //= 2
    if tasks() < (TASKS // 2 if low else TASKS):
        return None
    if found == tiles or found[m] * found[n] > 64 * 64:
        stages = 3 if found == tiles else 4
        return Schedule(tiles=tuple(sorted(found.items())), stages=stages)
    if found[m] < 64 and found[n] > COLUMNS:
        return Schedule(tiles=tuple(sorted(found.items())), warps=4, stages=4)
    # One warpgroup's tiles, which wait for memory: the narrower they are, the longer are their steps.
    narrow = found[n] < COLUMNS
    for name in depth:
        found[name] = min(256 if narrow else 128, _power(extents[name]))
    stages = (4 if narrow else 5) if found[m] == FEW_ROWS else 6
    return Schedule(tiles=tuple(sorted(found.items())), warps=4, stages=stages)


def _shards(kernel: Op, extents: dict[str, int]) -> dict[str, int]:
    """Of the extents that ranks share out, the elements of one rank: a tile ends with them."""
    world = int(kernel["world"])
    found: dict[str, int] = {}
    for tensor in kernel.find("tensor"):
        if tensor["move"] in ("gather", "scatter", "shard"):
            name = str(tensor["dims"][int(tensor["over"])])
            if name in extents:
                found[name] = max(1, extents[name] // world)
    return found


def _bytes(tensor: Op, extents: dict[str, int]) -> int:
    size = DTYPES[tensor["dtype"]]
    for dim in tensor["dims"]:
        size *= dim if isinstance(dim, int) else int(dim.evaluate(extents))
    return size


def _resource(kernel: Op, tensor: Op, extents: dict[str, int]) -> str:
    limit = EPILOGUE_BYTES.get(tensor["move"], 0)
    world = int(kernel["world"])
    lengths = [d if isinstance(d, int) else int(d.evaluate(extents)) for d in tensor["dims"]]
    fixed = not any(op.get("dynamic") for op in kernel.find("extent"))
    if tensor["move"] == "reduce" and fixed and any(length % world == 0 for length in lengths):
        limit = EPILOGUE_BYTES["scatter"]  # in two shots, the first of which is a scatter
    others = (t["move"] in ("gather", "scatter", "shard") for t in kernel.find("tensor"))
    if tensor["move"] == "reduce" and not fixed and any(others):
        return "epilogue"  # rows that are there lie by owner: no range that a copy could take
    return "epilogue" if _bytes(tensor, extents) <= limit else "copy_engine"


def _fits_slots(kernel: Op, extents: dict[str, int], moves: dict[str, Move]) -> bool:
    """Whether what all moved tensors land in fits a slot, and workers move all of them."""
    if not moves or int(kernel["world"]) == 1:
        return False
    if not all(move.by_workers for move in moves.values()):
        return False
    return _landing(kernel, extents, tuple(moves)) <= SLOT_BYTES - DATA


def _landing(kernel: Op, extents: dict[str, int], names: Sequence[str]) -> int:
    """Bytes that what moves lands in, at most: a scatter once, a reduce twice, or in one shot on each rank."""
    total = 0
    for tensor in kernel.find("tensor"):
        if tensor.symbol in names:
            size = _bytes(tensor, extents)
            total += max(2 * size, ONE_SHOT_BYTES) if tensor["move"] == "reduce" else size
    return total


def _signal(kernel: Op, name: str, extents: dict[str, int], move: Move) -> str:
    """``sentinel`` for a small sum that is stored and read by tiles of its two axes, in whole words, and ``word``
    for the smallest."""
    tensor = next(op for op in kernel.find("tensor") if op.symbol == name)
    dims = [d if isinstance(d, int) else int(d.evaluate(extents)) for d in tensor["dims"]]
    size, world = _bytes(tensor, extents), int(kernel["world"])
    if (
        tensor["move"] == "gather"
        or size > SENTINEL_BYTES
        or len(dims) != 2
        or move.resource != "epilogue"
        or world > WORD_RANKS
    ):
        return "flag"
    unit = world * PAYLOAD // DTYPES[tensor["dtype"]]
    used = [op for op in kernel.walk() if op.ref is not None and op.symbol == name]
    for op in used:
        if op.name in ("load", "store"):
            assert op.ref is not None
            plain = [isinstance(i, Value) and i.type.is_tile for i in op.ref.index]
            if plain != [True, True]:
                return "flag"
    if dims[1] % max(1, unit):
        return "flag"
    if _read_once(kernel, name):
        return "word" if size <= WORD_BYTES else "sentinel"
    return "word" if tensor["move"] == "reduce" and size <= REREAD_WORD_BYTES else "flag"


def _read_once(kernel: Op, name: str) -> bool:
    """Whether every element of the sum of ``name`` is read once: by the compiler, or by one nest's own tiles."""
    loads = [op for op in kernel.walk() if op.name == "load" and op.symbol == name]
    if not loads:
        return True
    nests = [op for op in kernel.body if op.blocks and loads[0] in op.body]
    index = loads[0].ref.index if loads[0].ref is not None else ()
    return len(loads) == 1 and len(nests) == 1 and set(index) == set(nests[0].args)


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
