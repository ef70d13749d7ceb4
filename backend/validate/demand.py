"""What the program of the kernel says of each store: which loads flow into it, and along which axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from tilelink.ir import Broadcast, Expr, Op, Ref, Value

Axes: TypeAlias = tuple[int, ...]
# By load and whether it is its `own` reference: the axis of the symbol that each axis of a tile follows.
Loads: TypeAlias = dict[tuple[int, bool], tuple[Op, Axes]]


def axes_of(ref: Ref, rank: int) -> Axes:
    """For each axis of the tile that a reference gives, the axis of the symbol (-1: none)."""
    if not ref.index:
        return tuple(range(rank))
    found: list[int] = []
    axis = 0
    for item in ref.index:
        if isinstance(item, Broadcast):
            found.append(-1)
            continue
        scalar = isinstance(item, Expr) or (
            isinstance(item, Value) and not item.type.is_tile and not item.type.shape
        )
        if not scalar:
            found.append(axis)
        axis += 1
    return tuple(found)


def flows(program: Op) -> dict[int, Loads]:
    """By the identity of each store: the loads that flow into it."""
    found: dict[int, Loads] = {}
    ranks = {op.symbol: len(op["dims"]) for op in program.body if op.name in ("tensor", "buffer")}
    for agent in program.find("launch"):
        for part in agent.body:
            _block(part.body, {}, found, ranks)
    return found


def _block(
    body: tuple[Op, ...], env: dict[str, Loads], found: dict[int, Loads], ranks: Mapping[str, int]
) -> list[Loads]:
    result: list[Loads] = []
    for op in body:
        if op.name == "yield":
            result = [env.get(v.name, {}) for v in op.operands]
        elif op.name in ("for_tiles", "for_range"):
            skip = 2 if op.get("bounds") else 0
            inits = [env.get(v.name, {}) for v in op.operands[skip:]]
            carried = op.args[len(op.args) - len(inits) :] if inits else ()
            env |= {a.name: dict(v) for a, v in zip(carried, inits, strict=True)}
            # A second turn shows what one turn hands to the next.
            for _ in range(2):
                made = _block(op.body, env, found, ranks)
                for arg, more in zip(carried, made, strict=False):
                    env[arg.name] = {**env[arg.name], **more}
            for value, held in zip(op.results, made, strict=False):
                env[value.name] = held
        elif op.name == "store":
            found[id(op)] = env.get(op.operands[0].name, {})
        elif op.name in ("load", "load_sum"):
            assert op.ref is not None
            stacked = op.name == "load_sum" and not op.get("remote")
            loads: Loads = {(id(op), False): (op, _read(op.ref, ranks, stacked))}
            if op.get("own") is not None:
                loads[id(op), True] = (op, _read(op["own"], ranks, False))
            for value in op.operands:  # this rank's part of a sum
                loads |= env.get(value.name, {})
            env[op.results[0].name] = loads
        elif op.results:
            env[op.results[0].name] = _made(op, env)
    return result


def _read(ref: Ref, ranks: Mapping[str, int], summed: bool) -> Axes:
    axes = axes_of(ref, ranks[ref.symbol])
    return axes[1:] if summed else axes


def _made(op: Op, env: dict[str, Loads]) -> Loads:
    rank = len(op.results[0].type.shape)
    found: Loads = {}
    for number, value in enumerate(op.operands):
        for key, (load, axes) in env.get(value.name, {}).items():
            if op.name == "dot" and number < 2:
                axes = (axes[0], -1) if number == 0 else (-1, axes[1])
            elif op.name == "transpose":
                axes = axes[::-1]
            elif op.name == "expand":
                at = int(op["axis"]) % rank
                axes = (*axes[:at], -1, *axes[at:])
            elif op.name in ("sum", "max", "min") and op.get("axis") is not None:
                at = int(op["axis"]) % len(axes)
                axes = (*axes[:at], *((-1,) if op.get("keep") else ()), *axes[at + 1 :])
            elif len(axes) < rank:
                axes = (*(-1,) * (rank - len(axes)), *axes)
            found[key] = (load, axes[:rank])
    return found
