"""The schedule space of a kernel: how it may compute, and how each of its tensors may travel.

Both halves are enumerated in a fixed order, the same on every rank and machine. The product of the two is
the whole space; a search need not make it. A value that :class:`Schedule` or :class:`Move` refuse is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import ceil, prod
from typing import Any

from tilelink.ir import DTYPES, Op, dynamic_extents
from tilelink.schedules.costs import Code, Task, library_us, task_us
from tilelink.schedules.default import default_schedule, product_extents
from tilelink.schedules.machine import Machine
from tilelink.schedules.roles import (
    PRODUCT_WARPS,
    SHARED_BYTES,
    SHARED_RESERVE,
    TURNS,
    landing_slots,
    roles_of,
    room_bytes,
)
from tilelink.schedules.schedule import (
    COPIES,
    DIRECTIONS,
    EMITTERS,
    OWNS,
    SIGNALS,
    SUMS,
    Move,
    Schedule,
    ScheduleError,
)

STORE_COLUMNS = 128  # of a tile that is stored at once
ACCUMULATORS = 128  # fp32 registers of a thread that accumulators may take; more of them spill
ROW_TILES = (16, 32, 64, 128, 256)
COLUMN_TILES = (32, 64, 128, 256)
# In the order in which equals are preferred.
DEPTH_TILES = (64, 128, 32, 256)
# Elements of a product's tile up to which a step of 256 of the depth is worth it: so few wait for memory, and what
# matters is how much of it is asked for at once.
DEEP_TILE = 64 * 64
STAGES = (4, 3, 5, 6, 2)
RING_STAGES = (6, 5, 4, 3)  # of a loader with a warp of its own: the deeper its ring, the better
GROUPS = (4, 8, 16)
FEW_ROWS = (2,)  # the same, of slices of few rows
SPLITS = (1, 2, 4, 8)
TAILS = (2, 3)  # kernels that add three parts at once to 128 elements a thread spill a few bytes
# Of the workers, those that have a tile in the last wave, from which on it is worth no parts; the shortest depth
# that is; and the part of a tile's time that the last wave may take in parts.
FULL_WAVE, TAIL_DEPTH, TAIL_TIME = 0.7, 1024, 0.75
COPY_WORKERS = (4, 8, 16, 32, 64)
# Those that copy beside products whose warps have roles, and do nothing else: about as many as keep the links
# busy. Signals are for so few tiles that what waits for them begins soon.
BESIDE_WORKERS, BESIDE_CHANNELS = (12, 16, 20), (2, 4, 8)
# What is stored is walked channel by channel, so channels of few rows of tiles read the columns' operand again and
# again. Where the cache does not hold it that costs more than is predicted: on four H100, GEMM + reduce-scatter of
# 4096 x 3584 x 8192 took 583 us with one row of tiles a channel, 475 with two, 401 with four (399, 394 and 387).
BESIDE_ROWS, CACHED_BYTES = 4, 24 << 20
CHANNELS = (None, 1, 2, 4, 8)
# Elements of a product's tile from which on a tile is worth its fixed costs.
SMALLEST_TILE = 16 * 32
# Bytes of a sum from which on one shot, or a second set of slots, costs more than it can gain.
SMALL_SUM = 32 << 20
# Bytes of a sum from which on there are so many own tiles that some can be computed before the last of the others.
LARGE_SUM = 8 << 20
# Bytes of a gathered tensor up to which tiles may span its shards: of more, there is enough to compute with each
# shard while the next is on its way.
SMALL_GATHER = 16 << 20
# Rows of a rank's slice below which tiles of a product that is scattered may span slices: tiles of fewer rows read
# the other operand more often than tensor cores need it.
SMALL_SLICE = 64
# The same of a sum as words that signal themselves: with the number of the call, which is twice as many bytes, and
# without.
SMALL_WORDS = {"flag": 1 << 62, "word": 4 << 20, "sentinel": 8 << 20}


class Space:
    """All schedules of ``kernel`` (Tile IR, extents known) on ``machine``.

    ``base`` is the default schedule: what no part of the space changes stays as it says. ``product`` is the
    kernel's matrix product, ``extents`` its extents by name.
    """

    def __init__(self, kernel: Op, machine: Machine) -> None:
        self.kernel = kernel
        self.machine = machine
        self.base = default_schedule(kernel)
        self.product = product_of(kernel)
        self.extents = {op.symbol: int(op["value"]) for op in kernel.find("extent")}

    def computations(self) -> list[Schedule]:
        """The default schedule with every legal way to compute: tiles, warps, stages, group, emitter, split, tail.

        Without a matrix product there is the default alone.
        """
        if self.product is None:
            return [self.base]
        found: dict[Schedule, None] = {}
        for emitter in EMITTERS:
            base = self._waiting() if emitter == "gluon" else self.base
            for tiles in self._tiles(self.product):
                depths = RING_STAGES if emitter == "gluon" else STAGES
                for warps, stages in itertools.product((4, 8), depths):
                    for extra in self._extras(emitter, tiles):
                        made = _made(
                            base,
                            tiles=tiles,
                            warps=warps,
                            stages=stages,
                            emitter=emitter,
                            **extra,
                        )
                        if made is not None and legal(self.product, made):
                            found.setdefault(self._plain(made))
        return list(found)

    def _waiting(self) -> Schedule:
        """The default schedule with one slot for all that moves, as products whose warps have roles need it."""
        moves = ((name, replace(move, slots=1, signal="flag")) for name, move in self.base.moves)
        return replace(self.base, moves=tuple(moves))

    def moves(self, schedule: Schedule) -> list[Schedule]:
        """``schedule`` with every way in which the moved tensors may travel.

        Where the ring of a kernel with roles leaves no room for one of the parts of a sum in the epilogue, so does
        the deepest that does.
        """
        if self.kernel["world"] == 1:
            return [schedule]
        options = [
            [(tensor.symbol, move) for move in moves if self._walks(schedule, tensor, move)]
            for tensor, moves in self._moves
        ]
        made = (
            one
            for some in itertools.product(*options)
            for one in _moving(schedule, tuple(sorted(some)))
        )
        found = [s for s in made if legal(self.product, s)]
        return list(dict.fromkeys(one for s in found for one in (s, *self._shallower(s))))

    @cached_property
    def _moves(self) -> list[tuple[Op, list[Move]]]:
        """The moved tensors, each with every way in which it may travel."""
        return [
            (tensor, self._moves_of(tensor))
            for tensor in self.kernel.find("tensor")
            if tensor["move"] in ("gather", "scatter", "reduce")
        ]

    def _shallower(self, schedule: Schedule) -> list[Schedule]:
        """The schedule with as many stages as let parts of its sums land apart; none where it has none."""
        folded = any(move.sum == "epilogue" for _, move in schedule.moves)
        if not folded or lands_apart(self.product, schedule):
            return []
        fewer = (replace(schedule, stages=n) for n in RING_STAGES if n < schedule.stages)
        return [s for s in fewer if lands_apart(self.product, s)][:1]

    def _walks(self, schedule: Schedule, tensor: Op, move: Move) -> bool:
        """Whether a tensor may travel so: tiles are as long as the schedule says, no shard is spanned for nothing,
        and workers copy beside products with roles in the one form that such a kernel has.
        """
        if self.product is None:
            return True
        if schedule.tail > 1 and (
            move.sm_workers or move.signal != "flag" or move.sum == "epilogue"
        ):
            return False
        if move.sm_workers and schedule.emitter == "gluon" and self._turned(schedule, tensor, move):
            if not self._beside(schedule, tensor, move):
                return False
        elif move.sm_workers and move.sm_workers not in COPY_WORKERS:
            return False
        if tensor["move"] not in ("gather", "scatter") or schedule.emitter == "library":
            return True
        over = str(tensor["dims"][tensor["over"]]) in self.product.names[0]
        # Parts of sums are not stored where the sum goes: its own tiles are no product's.
        cut = self.cuts(schedule) or (tensor["move"] == "scatter" and schedule.split > 1)
        return not (over and move.spans == cut and schedule.tiles != self.base.tiles)

    def _turned(self, schedule: Schedule, tensor: Op, move: Move) -> bool:
        """Whether copies by workers would stand beside products of which two warp groups have every other tile.

        What gathers in another form is a launch of its own.
        """
        assert self.product is not None
        rows, columns, _ = self.product.tile(schedule)
        turns = roles_of(rows, columns, self.product.dots) == TURNS
        return tensor["move"] != "gather" or (turns and move.copies == "boxes" and not move.spans)

    def _beside(self, schedule: Schedule, tensor: Op, move: Move) -> bool:
        """Whether workers can copy a tensor beside products whose warps have roles, in a way worth measuring."""
        assert self.product is not None
        rows, columns, _ = self.product.tile(schedule)
        if tensor["move"] == "scatter":
            per = self.product.extent[0] // int(self.kernel["world"]) // (move.channels or 1)
            _, wide, deep = self.product.extent
            again = wide * deep * DTYPES[self.product.dtype] > CACHED_BYTES
            if move.sum != "epilogue" or (again and per < BESIDE_ROWS * rows):
                return False
        return (
            tensor["move"] in ("gather", "scatter")
            and roles_of(rows, columns, self.product.dots) == TURNS
            and move.copies == "boxes"
            and move.sm_workers in BESIDE_WORKERS
            and move.channels in BESIDE_CHANNELS
        )

    def cuts(self, schedule: Schedule) -> bool:
        """Whether tiles of the product are no taller than the rows of a rank, so that they may end at a shard."""
        if self.product is None:
            return True
        rows, tallest = self.product.names[0], self.product.extent[0]
        fitting = _fitting(ROW_TILES, max(1, tallest // int(self.kernel["world"])))
        return dict(schedule.tiles).get(rows[0], 0) in fitting

    def schedules(self) -> Iterator[Schedule]:
        """The whole space, computations outermost."""
        for computation in self.computations():
            yield from self.moves(computation)

    def _tiles(self, product: Product) -> Iterator[tuple[tuple[str, int], ...]]:
        """Tile lengths of the product's extents; others keep their default."""
        rows, columns, depth = product.names
        tallest, widest, deepest = product.extent
        if _moved_rows(self.kernel, rows, ("gather", "shard")) and not self._spanned():
            tallest = max(1, tallest // int(self.kernel["world"]))
        sizes = (
            _fitting(ROW_TILES, tallest),
            _fitting(COLUMN_TILES, widest),
            _fitting(DEPTH_TILES, deepest),
        )
        for m, n, k in itertools.product(*sizes):
            if m * n < SMALLEST_TILE:
                continue
            new = dict.fromkeys(rows, m) | dict.fromkeys(columns, n) | dict.fromkeys(depth, k)
            yield tuple(sorted({**dict(self.base.tiles), **new}.items()))

    def _spanned(self) -> bool:
        """Whether tiles may span shards: all that cuts them is small gathered tensors."""
        moved = [t for t in self.kernel.find("tensor") if t["move"] in ("gather", "shard")]
        return all(t["move"] == "gather" and self.bytes_of(t) <= SMALL_GATHER for t in moved)

    def _scattered(self) -> bool:
        """Whether tiles that are stored may span slices: all that cuts them is scatters to slices of few rows."""
        moved = [t for t in self.kernel.find("tensor") if t["move"] in ("scatter", "shard")]
        return all(t["move"] == "scatter" and self._low(t) for t in moved)

    def _low(self, tensor: Op) -> bool:
        """Whether the slices of a scatter have few rows, and nothing says which of them share a signal."""
        length = tensor["dims"][tensor["over"]]
        told = tensor.get("tile") is not None or tensor.get("signal") is not None
        if told or dynamic_extents(self.kernel):
            return False
        whole = length if isinstance(length, int) else int(length.evaluate(self.extents))
        return whole // int(self.kernel["world"]) < SMALL_SLICE

    def _extras(self, emitter: str, tiles: tuple[tuple[str, int], ...]) -> Iterator[dict[str, Any]]:
        """The fields beside tiles, warps and stages: group, split and tail."""
        assert self.product is not None
        rows = self.product.names[0]
        tallest = self.product.extent[0]
        if _moved_rows(self.kernel, rows, ("scatter", "shard")):
            tallest = max(1, tallest // int(self.kernel["world"]))
        splits: tuple[int, ...] = SPLITS if emitter == "triton" else (1,)
        if dict(tiles)[rows[0]] not in _fitting(ROW_TILES, tallest) and not self._scattered():
            # A tile that is stored ends with the slice of its owner; parts of sums are not stored there.
            splits = tuple(split for split in splits if split > 1)
        tails = self._tails(tiles) if emitter != "library" else (1,)
        groups: tuple[int, ...] = GROUPS
        if _moved_rows(self.kernel, rows, ("scatter",)):
            # Rows of tiles of one slice are walked together: more than it has are as many.
            per = ceil(tallest / dict(tiles)[rows[0]])
            fewer = FEW_ROWS if per <= GROUPS[0] else ()
            groups = tuple(g for g in (*fewer, *GROUPS) if g < 2 * per) or (GROUPS[0],)
        for group, split, tail in itertools.product(groups, splits, tails):
            if split == 1 or tail == 1:
                yield {"group": group, "split": split, "tail": tail}

    def _tails(self, tiles: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
        """Into how many parts the tiles of the last wave may be cut: 1, and what leaves few workers idle."""
        assert self.product is not None
        (rows, columns, depth), (tall, wide, deep) = self.product.names, self.product.extent
        if deep < TAIL_DEPTH or dynamic_extents(self.kernel):
            return (1,)
        m, n, k = (dict(tiles)[some[0]] for some in (rows, columns, depth))
        world = int(self.kernel["world"])
        cut = world if _moved_rows(self.kernel, rows, ("gather", "scatter")) else 1
        workers = self.base.workers
        left = cut * ceil(max(1, tall // cut) / m) * ceil(wide / n) % workers
        if not 0 < left < FULL_WAVE * workers:
            return (1,)
        times = {t: ceil(left * t / workers) / t for t in TAILS if t <= deep // k}
        return (1, *(t for t, time in times.items() if time <= TAIL_TIME))

    def _plain(self, schedule: Schedule) -> Schedule:
        """A library's product has no tiles, warps or stages of ours: those of the default stand for all."""
        if schedule.emitter != "library":
            return schedule
        return replace(self.base, emitter="library")

    def _moves_of(self, tensor: Op) -> list[Move]:
        kind, size = tensor["move"], self.bytes_of(tensor)
        found: dict[Move, None] = {}
        # What matters least is outermost, so that the head of the list has all of the rest.
        for channels, resource in itertools.product(CHANNELS, _resources(kind)):
            if channels is not None and resource == "none":
                continue
            low = kind == "scatter" and self._low(tensor)
            for extra in _move_extras(kind, resource, size, low):
                move = _made(Move(), resource=resource, channels=channels, **extra)
                if move is not None:
                    found.setdefault(move)
        return list(found)

    def bytes_of(self, tensor: Op) -> int:
        """Bytes of the whole of a tensor."""
        dims = (d if isinstance(d, int) else int(d.evaluate(self.extents)) for d in tensor["dims"])
        return prod(dims) * DTYPES[tensor["dtype"]]


def _resources(kind: str) -> tuple[str, ...]:
    beside = BESIDE_WORKERS if kind in ("gather", "scatter") else ()
    workers = tuple(f"sm:{n}" for n in sorted({*COPY_WORKERS, *beside}))
    direct = () if kind == "gather" else ("epilogue",)
    return ("copy_engine", *workers, *direct, "none")


def _move_extras(kind: str, resource: str, size: int, low: bool) -> list[dict[str, Any]]:
    """Combinations of the further fields of a move that mean something for it; ``low``: of slices of few rows."""
    axes: dict[str, tuple[Any, ...]] = {}
    if resource == "none":
        return [{}]
    if kind != "gather":
        axes["sum"] = SUMS
    elif size <= SMALL_GATHER:
        axes["spans"] = (False, True)
    if resource.startswith("sm:"):
        axes["copies"] = COPIES
    if kind == "reduce":
        axes["shots"] = (1, 2) if size <= SMALL_SUM else (2,)
    if resource == "epilogue":
        axes["signal"] = tuple(s for s in SIGNALS if size <= SMALL_WORDS[s])
    if resource == "epilogue" and kind == "scatter":
        axes["direction"] = DIRECTIONS
        axes["spans"] = (False, True) if low else (False,)
    if resource == "epilogue" and kind == "reduce" and size >= LARGE_SUM:
        axes["own"] = OWNS
    axes["slots"] = (1, 2) if size <= SMALL_SUM else (1,)
    found = [dict(zip(axes, some, strict=True)) for some in itertools.product(*axes.values())]
    if kind == "scatter":
        found = [one for one in found if _pulls(one)]
    # In one shot no rank owns a part of the sum.
    return [one for one in found if not (one.get("shots") == 1 and one.get("sum") == "epilogue")]


def _pulls(move: dict[str, Any]) -> bool:
    """Whether what is pulled is added in an epilogue, or in a stage where tiles span slices, and no other way.

    A stage of its own would read all that is pulled when everything else is done; of few rows that is little.
    """
    spans = move.get("spans", False)
    if move.get("direction") != "pull":
        return not spans
    return bool((move["sum"] == "stage") == spans)


def _moving(schedule: Schedule, moves: tuple[tuple[str, Move], ...]) -> list[Schedule]:
    """``schedule`` with ``moves``, where it takes them.

    Tiles of all ranks take turns where a sum is pulled, or own tiles do not come last, so that what goes over the
    link is spread over the call; where tiles are stored at peers they may, and every link is busy at any time.
    """
    turns = any(
        (move.direction == "pull" and not move.spans) or move.own != "last" for _, move in moves
    )
    pushes = any(
        move.resource == "epilogue" and move.direction == "push" and move.shots != 1
        for _, move in moves
    )
    orders = ["interleave"] if turns or pushes else []
    if not turns:
        orders.append(schedule.order)
    made = (_made(schedule, moves=moves, order=order) for order in orders)
    return [one for one in made if one is not None]


def _made(base: Any, **changes: Any) -> Any:
    """``base`` with fields replaced, or None where it refuses them."""
    try:
        return replace(base, **changes)
    except ScheduleError:
        return None


def _fitting(sizes: Sequence[int], length: int) -> list[int]:
    """Tile lengths up to the smallest that holds ``length``, and the largest of them at least."""
    found = [size for size in sizes if size < 2 * length]
    return found or [min(sizes)]


def _moved_rows(
    kernel: Op, rows: Sequence[str], moves: Sequence[str] = ("gather", "scatter", "shard")
) -> bool:
    """Whether ``moves`` spread the rows of the product over the ranks, so that tiles end at each shard."""
    return any(
        tensor.get("over") is not None
        and tensor["move"] in moves
        and str(tensor["dims"][tensor["over"]]) in rows
        for tensor in kernel.find("tensor")
    )


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix products of one loop over output tiles.

    ``names``: extents that are rows, columns and depth; ``extent``: the shortest of each. ``dots``: products
    of one loop, which share its accumulator registers. ``dtype``: of the operands.
    """

    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    extent: tuple[int, int, int]
    dots: int
    dtype: str

    def tile(self, schedule: Schedule) -> tuple[int, int, int]:
        """The tile lengths of rows, columns and depth."""
        tiles = dict(schedule.tiles)
        m, n, k = (tiles.get(some[0], 128) for some in self.names)
        return m, n, k

    def shared_bytes(self, schedule: Schedule) -> int:
        """Shared memory of a CTA: the slots of the ring of operand tiles, and a tile on its way out."""
        m, n, k = self.tile(schedule)
        size = DTYPES[self.dtype]
        slots = schedule.stages * (m * k + self.dots * k * n) * size
        # Tiles wider than a descriptor's limit leave in halves, one after the other; sums of a part of the depth
        # in fp32.
        leaving = DTYPES["fp32"] if schedule.split > 1 or schedule.tail > 1 else size
        return slots + m * min(n, STORE_COLUMNS) * leaving


def product_of(kernel: Op) -> Product | None:
    """The products of ``kernel``; None where it has none with extents of its own."""
    rows, columns, depth = (tuple(sorted(some)) for some in product_extents(kernel))
    if not (rows and columns and depth):
        return None
    lengths = {op.symbol: int(op["value"]) for op in kernel.find("extent")}
    dots = max(sum(o.name == "dot" for o in op.body) for op in kernel.walk() if op.blocks)
    first = next(op for op in kernel.walk() if op.name == "dot")
    shortest = [min(lengths[n] for n in some) for some in (rows, columns, depth)]
    m, n, k = shortest
    return Product((rows, columns, depth), (m, n, k), dots, first.operands[0].type.dtype)


def legal(product: Product | None, schedule: Schedule) -> bool:
    """Whether a schedule fits the GPU as far as can be told without compiling it."""
    if product is None or schedule.emitter == "library":
        return True
    m, n, k = product.tile(schedule)
    if k > 128 and m * n > DEEP_TILE:
        return False
    if schedule.emitter == "gluon":
        return _has_roles(product, schedule)
    if schedule.split > 1 and not _worth_splitting(product, schedule, (m, n, k)):
        return False
    if schedule.warps * 32 * ACCUMULATORS < m * n * product.dots:
        return False
    # More warps than 16 rows or 32 columns each would idle.
    if schedule.warps * 16 > max(m, 64) * max(1, n // 32):
        return False
    return product.shared_bytes(schedule) <= SHARED_BYTES - SHARED_RESERVE


def _worth_splitting(product: Product, schedule: Schedule, tile: tuple[int, int, int]) -> bool:
    """Whether half as many parts would leave workers without a task, and all parts are of whole steps."""
    (m, n, k), (rows, columns, depth) = tile, product.extent
    tasks = ceil(rows / m) * ceil(columns / n)
    fewer = tasks * schedule.split // 2 < schedule.workers
    return fewer and depth % (schedule.split * k) == 0


def _has_roles(product: Product, schedule: Schedule) -> bool:
    """Whether two warp groups can share the tiles, and a ring of them and what leaves fit together."""
    (m, n, k), size = product.tile(schedule), DTYPES[product.dtype]
    roles = roles_of(m, n, product.dots)
    if roles is None or schedule.warps != PRODUCT_WARPS or size != DTYPES["bf16"]:
        return False
    if any(move.slots != 1 for _, move in schedule.moves):
        return False
    ring = schedule.stages * (m * k + product.dots * k * n) * size
    return ring + room_bytes(m, roles, size) <= SHARED_BYTES - SHARED_RESERVE


def lands_apart(product: Product | None, schedule: Schedule) -> bool:
    """Whether the parts of a sum in the epilogue have a ring of their own, as far as the schedule tells.

    It is taken that something of the tile leaves or comes by addresses, in pieces as large as a box.
    """
    folded = any(move.sum == "epilogue" for _, move in schedule.moves)
    if product is None or schedule.emitter != "gluon" or not folded:
        return False
    tile, size = product.tile(schedule), DTYPES[product.dtype]
    return landing_slots(schedule.stages, tile, product.dots, size, tile[0] * tile[2] * size) > 0


def estimate_us(product: Product | None, schedule: Schedule, machine: Machine) -> float:
    """Microseconds of the products alone, by waves of tiles: enough to order computations by."""
    if product is None:
        return 0.0
    (m, n, k), (rows, columns, depth) = product.tile(schedule), product.extent
    if schedule.emitter == "library":
        flops = 2.0 * rows * columns * depth * product.dots
        whole = Task(flops, product.dtype, 1.0, rows, columns * product.dots)
        return library_us(machine, whole, 0.0)
    split, tail = schedule.split, schedule.tail
    size = DTYPES[product.dtype]
    steps = ceil(depth / split / k)
    tiles = ceil(rows / m) * ceil(columns / n) * split
    workers = min(schedule.workers, machine.sms)
    # Each operand comes from memory once at least.
    operands = (columns * product.dots + rows) * depth * size / tiles
    task = Task(
        flops=2.0 * m * n * k * steps * product.dots,
        dtype=product.dtype,
        steps=steps * product.dots,
        rows=m,
        columns=n,
        bytes=steps * (m * k + product.dots * k * n) * size + m * n * size,
        memory=operands + m * n * size,
    )
    turns = schedule.emitter == "gluon" and roles_of(m, n, product.dots) == TURNS
    code = Code(schedule.emitter, schedule.warps, schedule.stages, schedule.flatten, turns)
    one = task_us(machine, task, code, machine.sms, min(workers, tiles), 0.0)
    if tail > 1 and tiles % workers:
        parts = tiles % workers * tail
        few = ceil(steps / tail)
        part = replace(task, flops=task.flops * few / steps, steps=few * product.dots)
        part = replace(part, bytes=few * (m * k + product.dots * k * n) * size)
        short = task_us(machine, part, code, machine.sms, min(workers, parts), 0.0)
        added = _adding_us(parts * m * n * product.dots, machine)
        return tiles // workers * one + ceil(parts / workers) * short + added
    many = rows * columns * product.dots * split
    return ceil(tiles / workers) * one + (_adding_us(many, machine) if split > 1 else 0.0)


def _adding_us(elements: int, machine: Machine) -> float:
    """Microseconds until parts of sums, in fp32, are known to be there, read and added."""
    size = elements * DTYPES["fp32"]
    return machine.store_signal_us + machine.load_us + size / (machine.sum_gbps * 1e3)


def by_class(
    schedules: Sequence[Schedule],
    key: Callable[[Schedule], float],
    keep: int,
    product: Product | None,
) -> list[Schedule]:
    """The ``keep`` best of each class (:func:`class_of`) by ``key``, in order of ``key``."""
    classes: dict[tuple[Any, ...], list[Schedule]] = {}
    for schedule in sorted(schedules, key=key):
        classes.setdefault(class_of(schedule, product), []).append(schedule)
    return sorted((s for some in classes.values() for s in some[:keep]), key=key)


def class_of(schedule: Schedule, product: Product | None) -> tuple[Any, ...]:
    """What makes schedules different in kind: who makes the code, with roles in which form, how each tensor
    moves but for numbers, and whether parts of sums land apart from the operands."""
    roles = None
    if schedule.emitter == "gluon" and product is not None:
        rows, columns, _ = product.tile(schedule)
        roles = roles_of(rows, columns, product.dots)
    numbers = ("resource", "tile", "channels", "streams")
    kinds = [f.name for f in fields(Move) if f.name not in numbers]
    return (
        schedule.emitter,
        roles,
        *(
            (
                "sm" if move.sm_workers else move.resource,
                *(getattr(move, name) for name in kinds),
            )
            for _, move in schedule.moves
        ),
        lands_apart(product, schedule),
    )
