"""What one task costs on one worker of a machine: the formulas of the virtual clock.

A task of a matrix product is bound by the tensor cores, by the latency of its loads, by the L2 cache or
by memory, whichever is slowest; other tasks by memory. Times are microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, gcd

from tilelink.schedules.machine import Machine

WARPGROUP = 4  # warps that share one `wgmma`
WGMMA_ROWS = 64
WGMMA_COLUMNS = 256  # of the widest instruction
# Columns from which on an instruction computes as long as it reads from shared memory: 64 rows of 16 elements are
# 2 KiB, a column is 32 bytes, 128 bytes a cycle are read, and two columns are multiplied. So it reads for
# 16 + N / 4 cycles and computes for N / 2.
FULL_COLUMNS = 64
# Tiles of a CTA that the library chooses from.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (64, 128))
# Stages whose tiles are being multiplied, on average, and so not being loaded.
BUSY_STAGES = 1.5
BUSY_SLOTS = 2.0  # the same of a ring that two warp groups empty: each holds a slot
MMA_RATE = 0.6  # of `mma.sync`, for tiles of fewer rows than `wgmma` takes
# Bytes of a line of the L2 cache, which are a row of a box in shared memory too, and those that one of its slices
# hands over in a cycle.
LINE_BYTES, BEAT_BYTES = 128, 64


@dataclass(frozen=True, slots=True)
class Task:
    """A task's work: ``flops`` of products in ``steps`` of ``rows`` by ``columns``, ``elementwise``
    operations, ``bytes`` loaded and stored, ``memory`` of them from or to memory and not the cache. ``sums``
    are bytes that are read behind the product, when nothing of it is under way any more but for the other
    warp group's where two take turns; of ``landed`` bytes, which a loader fetches meanwhile, nothing remains but
    to add them, and to fetch them where they hold up the ring of the product. ``filled``: lines of the cache that
    TMA fills in for what lies past the end of a tensor, which takes it longer than to read them."""

    flops: float = 0.0
    dtype: str = "bf16"
    steps: float = 0.0
    rows: int = 0
    columns: int = 0
    elementwise: float = 0.0
    bytes: float = 0.0
    memory: float = 0.0
    sums: float = 0.0
    landed: float = 0.0
    filled: float = 0.0


@dataclass(frozen=True, slots=True)
class Code:
    """How a launch runs: the emitter, warps and stages, whether tiles overlap (``flat``), whether two
    warp groups take ``turns`` at them, and whether parts of sums land ``apart`` from the operands."""

    emitter: str = "triton"
    warps: int = 8
    stages: int = 3
    flat: bool = False
    turns: bool = False
    apart: bool = False


def tensor_core_share(rows: int, columns: int, warps: int, issue: float = 0.0) -> float:
    """The share of the tensor cores' rate that tiles of ``rows`` by ``columns`` reach.

    A warpgroup's ``wgmma`` is 64 rows high; groups beyond the tile's rows split its columns. Below 64
    columns shared memory is too slow for its operands, below 64 rows ``mma.sync`` takes over. ``issue`` is
    the time between two instructions in columns; the widest instruction is what rates are measured with.
    """
    if rows < WGMMA_ROWS:
        return MMA_RATE
    groups = max(1, warps // WARPGROUP)
    across = max(1, groups * WGMMA_ROWS // rows)
    wide = min(WGMMA_COLUMNS, max(8, columns // across))
    fed = min(1.0, 2.0 * wide / (FULL_COLUMNS + wide))
    return min(fed, wide / (wide + issue) * (WGMMA_COLUMNS + issue) / WGMMA_COLUMNS)


@cache
def cache_share(pitch: int, width: int) -> float:
    """By how much longer the L2 cache is busy with rows of ``width`` bytes, ``pitch`` apart, than by their bytes.

    A row comes in pieces of a line's length. Where a pitch is no multiple of a line, pieces lie across lines, and
    a slice hands over half a line even where less of it is asked for.
    """
    piece = min(width, LINE_BYTES)
    starts = [row * pitch % LINE_BYTES for row in range(LINE_BYTES // gcd(pitch, LINE_BYTES))]
    beats = sum((start + piece - 1) // BEAT_BYTES - start // BEAT_BYTES + 1 for start in starts)
    return max(1.0, beats * BEAT_BYTES / (len(starts) * piece))


def library_us(machine: Machine, task: Task, now: float) -> float:
    """Microseconds of a product of the vendor's library over the whole GPU.

    Its last wave of CTAs is not full, and edges of its tiles lie outside; it takes the best of its tiles.
    """
    memory = max(task.memory / (machine.hbm_gbps * 1e3), task.bytes / (machine.l2_gbps * 1e3))
    fixed = machine.emitter("library").tile_us
    found = []
    for m, n in LIBRARY_TILES:
        ctas = ceil(task.rows / m) * ceil(task.columns / n)
        waves = ceil(ctas / machine.sms)
        more = waves * machine.sms * m * n / (task.rows * task.columns)
        found.append(machine.dot_us(task.flops * more, task.dtype, now) + waves * fixed)
    return max(min(found), memory)


def _sums_us(machine: Machine, task: Task, active: float) -> float:
    """Microseconds in which a worker reads the parts that it adds to a product."""
    return task.sums / (machine.sum_gbps * 1e3) * active + machine.load_us


def task_us(
    machine: Machine, task: Task, code: Code, share: float, active: float, now: float
) -> float:
    """Microseconds of ``task`` on one worker.

    ``share``: the machine's rates divided by this are one worker's. ``active``: workers that draw on
    memory at once. ``now``: microseconds since the first product of the call.
    """
    return Timed(machine, task, code, share, active).us(now)


class Timed:
    """:func:`task_us` of many moments: of a product, the rate of the tensor cores alone depends on it.

    ``drawing``: workers that share the rate of the cache, where they are others than ``share`` says: those that
    copy meanwhile leave it to them.
    """

    def __init__(
        self,
        machine: Machine,
        task: Task,
        code: Code,
        share: float,
        active: float,
        drawing: float | None = None,
    ) -> None:
        self._machine, self._task, self._code = machine, task, code
        self._library = bool(task.flops) and code.emitter == "library"
        self._fixed: float | None = None
        # Of a task without a product, where a wait in front of it has held it up.
        self.late_us = 0.0
        self._last: tuple[float, float] | None = None
        vector = task.elementwise / (machine.elementwise_tflops * 1e6) * share
        cached = task.bytes / (machine.l2_gbps * 1e3) * (share if drawing is None else drawing)
        if not task.flops:
            self._fixed = _unmultiplied_us(machine, task, code, active, vector, cached)
            self.late_us = _unmultiplied_us(machine, task, code, active, vector, cached, late=True)
            return
        if self._library:
            return
        memory = task.memory / (machine.hbm_gbps * 1e3) * active
        emitter = machine.emitter(code.emitter)
        full = tensor_core_share(task.rows, task.columns, code.warps, emitter.issue)
        self._flops = task.flops * share / full
        # While one warpgroup waits at a step, another one multiplies.
        step = emitter.step_us * max(1.0, 2.0 * WARPGROUP / code.warps)
        fixed = emitter.flat_us if code.flat else emitter.tile_us
        if code.turns:
            # What one group spends at its steps and behind its tile, the other one multiplies.
            step, fixed = step / 2, fixed / 2
        busy = BUSY_SLOTS if code.emitter == "gluon" else BUSY_STAGES
        loads = task.steps * machine.load_us / max(0.5, code.stages - busy)
        self._steps = task.steps * step
        self._least = max(loads, cached, memory) + task.filled * machine.fill_us
        self._vector, self._tile = vector, fixed
        self._behind = _sums_us(machine, task, active) if task.sums else None

    def us(self, now: float) -> float:
        """Microseconds of the task where it begins ``now``, microseconds since the first product of the call."""
        if self._fixed is not None:
            return self._fixed
        # Workers begin their tiles together, wave by wave.
        if self._last is None or self._last[0] != now:
            self._last = now, self._product_us(now)
        return self._last[1]

    def _product_us(self, now: float) -> float:
        task = self._task
        if self._library:
            return library_us(self._machine, task, now)
        dot = self._machine.dot_us(self._flops, task.dtype, now)
        product = max(dot + self._steps, self._least)
        if self._behind is not None:
            # One group adds while the other multiplies, as long as that takes.
            both = product + self._behind
            product = max(product, both / 2) if self._code.turns else both
        return product + self._vector + self._tile


def _unmultiplied_us(
    machine: Machine,
    task: Task,
    code: Code,
    active: float,
    vector: float,
    cached: float,
    late: bool = False,
) -> float:
    """Microseconds of a task without a product; ``vector`` and ``cached``: of its operations, and at the cache.

    ``late``: a wait has held it up, so that nothing of it has been fetched while a product was computed.
    """
    if task.landed:
        # The stores behind it are under way while the next tile is multiplied. But where parts lie in the ring of
        # the product, the other group begins that tile when they are there. What peers wrote is in the cache.
        held = code.turns and not code.apart
        fetched = task.landed / (machine.l2_gbps * 1e3) * active + machine.load_us
        return vector + (fetched if held or late else 0.0)
    if task.sums:
        # Behind a wait: what stands before it is another task's.
        return 0.0 if code.turns and not late else max(vector, _sums_us(machine, task, active))
    memory = task.memory / (machine.sum_gbps * 1e3) * active
    return max(vector, cached, memory) + (machine.load_us if task.bytes else 0.0)
