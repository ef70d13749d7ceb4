"""What the tasks of a stage draw from memory, and not from the cache: bytes, for the virtual clock.

Tiles that run at once read together what they share. What they come back to later, the columns of the next
block of rows or of the next group, the cache has kept as far as it can hold the operand: tiles of both run at
the same time, out of step. A product of the library over a block is over before the next one begins; of an
operand that half of the cache cannot hold it leaves nothing there that the next one, which begins where it did,
would find.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tilelink.backend.simulate.geometry import Env, Geometry, Tile
from tilelink.ir import DTYPES, At, Expr, Op, Value


@dataclass(frozen=True, slots=True)
class Draw:
    """Bytes of one task: ``memory`` in all, ``streamed`` of them of operands that half of the cache cannot hold.

    Half of it: lines of the far half are kept in the near one too.
    """

    memory: float = 0.0
    streamed: float = 0.0


@dataclass(frozen=True, slots=True)
class _Running:
    """The tiles of a queue that run at once, by what they share."""

    names: tuple[str, ...]
    axis: int
    own: dict[str, int]  # tiles of the queue along each variable
    whole: dict[str, int]  # tiles of the extent along each variable
    rows: int
    across: int
    tiles: int

    @property
    def at_once(self) -> int:
        """How many of them read one operand together."""
        return min(self.tiles, self.rows * self.across)

    def distinct(self, used: set[str]) -> int:
        """Of the tiles that run, those that differ in the variables ``used``."""
        rows = self.rows if self.names[self.axis] in used else 1
        return min(rows * (self.across if used - {self.names[self.axis]} else 1), self.at_once)


def draw_of(stage: Op, geometry: Geometry, env: Env, workers: int, cache: int) -> Draw:
    """What a task of ``stage`` draws, on average: ``workers`` share its queue, ``cache`` bytes are kept."""
    queue = geometry.queue(stage, env)
    if not queue:
        return Draw()
    running = _running(stage, geometry, env, queue, workers)
    names, tiles = running.names, len(queue)
    memory = streamed = 0.0
    for op in stage.walk():
        if op.name not in ("load", "store", "load_sum") or op.ref is None:
            continue
        if op.name == "load_sum" and op.operands and op.get("via") != "tma":
            continue
        decl = geometry.decls[op.symbol]
        footprint = float(prod(decl.shape) * DTYPES[decl.dtype])
        used = {n for n in names if any(_mentions(item, n) for item in op.ref.index)}
        if decl.op.get("over") is None:
            # A stage of some blocks touches its share of what lies along their axis.
            footprint *= prod(running.own[n] / running.whole[n] for n in used)
        each = footprint / max(1, prod(running.own[n] for n in used))
        once = footprint / tiles
        again = max(0.0, each * running.distinct(used) / running.at_once - once)
        drawn = once + again * (1.0 - _kept(footprint, cache, running.tiles > 1))
        memory += drawn
        if op.name == "load" and footprint > cache / 2:
            streamed += drawn
    return Draw(memory, streamed)


def _kept(footprint: float, cache: int, at_once: bool) -> float:
    """The share of an operand that who reads it again finds in the cache; ``at_once``: tiles run side by side."""
    if footprint <= cache / 2:
        return 1.0
    return min(1.0, cache / footprint) if at_once else 0.0


def _running(
    stage: Op, geometry: Geometry, env: Env, queue: list[tuple[Tile, ...]], workers: int
) -> _Running:
    axis = int(stage.get("axis", 0))
    names = tuple(arg.name for arg in stage.args[: len(queue[0])])
    own = {name: len({t[i].number for t in queue}) for i, name in enumerate(names)}
    whole = {
        name: max(
            own[name],
            geometry.value(extent, env) // max(1, queue[0][i].stop - queue[0][i].start),
        )
        for i, (name, extent) in enumerate(zip(names, stage["extent"], strict=False))
    }
    others = prod(count for i, count in enumerate(own.values()) if i != axis)
    blocks = 1
    if stage.get("segment") is not None:
        segment = geometry.value(stage["segment"], env)
        blocks = len({t[axis].start // segment for t in queue})
    rows, most = int(stage.get("group", 1)), own[names[axis]]
    if stage.get("interleave"):
        rows *= blocks  # tiles of all blocks take turns
    else:
        most //= blocks  # those of a block come before those of the next
    rows = max(1, min(most, rows))
    tiles = min(workers, len(queue))
    return _Running(names, axis, own, whole, rows, min(others, -(-tiles // rows)), tiles)


def _mentions(item: Any, name: str) -> bool:
    """Whether an element of an index depends on the loop variable ``name``."""
    value = item.value if isinstance(item, At) else item
    if isinstance(value, Value) and value.name == name:
        return True
    place = item.start if isinstance(item, At) else item
    fields = {name, *(f"{name}.{field}" for field in ("start", "stop", "tile"))}
    return isinstance(place, Expr) and bool(fields & place.names)
