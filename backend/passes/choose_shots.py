"""How a reduce is summed: by every rank (one shot), or each part by one rank that hands it on (two)."""

from __future__ import annotations

from tilelink.backend.expand import environment
from tilelink.backend.passes.common import (
    dynamic_extent,
    global_dims,
    replace_declaration,
    schedule_of,
    tensors_of,
)
from tilelink.frontend.owners import uniform_block
from tilelink.ir import DTYPES, Expr, Index, Op, Value
from tilelink.ir.layout import PAYLOAD
from tilelink.schedules import Schedule, ScheduleError
from tilelink.schedules.default import ONE_SHOT_BYTES


def choose_shots(program: Op) -> Op:
    """Record on every reduce that is summed in two shots which axis the ranks share out for it.

    Before::

        tensor @C {dims = [M, N], move = "reduce", …}

    After::

        tensor @C {dims = [M, N], move = "reduce", part_axis = 1, shots = 2, …}

    The world divides the axis, and the outer loops that store the tensor walk it; dynamic rows are not shared out,
    since parts would differ in length. The first axis is taken if
    its parts are whole tiles, else the last such one, else any. In one shot by stores of the tiles, `part_axis`
    alone is recorded where the first axis is a single tile: it says along which axis channels lie. Errors:
    ScheduleError where two shots are asked for and no axis will do.
    """
    if program["world"] == 1:
        return program
    schedule = schedule_of(program)
    for name, tensor in tensors_of(program).items():
        move = schedule.move(name)
        if tensor["move"] in ("gather", "scatter") and move.shots is not None:
            raise ScheduleError(
                tensor.span,
                field=f"moves.{name}.shots",
                detail=f"{move.shots}, which means nothing for `{name}`, a {tensor['move']}",
                help="leave it out: shots are of a `reduce`",
            )
        if tensor["move"] != "reduce" or move.resource == "none":
            continue
        twice = 2 if move.signal == "word" else 1  # half of what is sent are epochs
        small = _bytes(program, tensor) * int(program["world"]) * twice <= ONE_SHOT_BYTES
        # A sum in an epilogue needs a part of this rank's.
        small &= move.sum == "stage"
        if move.shots == 1 or (move.shots is None and small):
            if move.resource == "epilogue":
                program = _by_columns(program, schedule, tensor)
            continue
        axis = _part_axis(program, schedule, tensor)
        if axis is not None:
            new = tensor.with_attrs(shots=2, part_axis=axis)
            program = replace_declaration(program, new)
        elif move.shots == 2:
            raise ScheduleError(
                tensor.span,
                field=f"moves.{name}.shots",
                detail=f"no axis of `{name}` can be cut into {program['world']} parts that tasks store whole",
                help="store it by tiles of an axis that the world divides, or use 1",
            )
    return program


def _by_columns(program: Op, schedule: Schedule, tensor: Op) -> Op:
    """The program, with channels along the last axis of ``tensor`` if a single tile holds the first."""
    dims, last = global_dims(tensor, environment(program)), len(tensor["dims"]) - 1
    nests = [op for op in program.body if op.blocks and _stored_by(op, tensor.symbol)]
    walked = all(_walked(nest, tensor.symbol, last) for nest in nests)
    if last == 0 or dims[0] > schedule.tile(str(tensor["dims"][0]), 128) or not walked:
        return program
    return replace_declaration(program, tensor.with_attrs(part_axis=last))


def last_store(nests: tuple[Op, ...], name: str) -> int:
    """The number of the last loop nest that stores ``name``; -1 where none does."""
    stores = [n for n, nest in enumerate(nests) if _stored_by(nest, name)]
    return stores[-1] if stores else -1


def _stored_by(nest: Op, name: str) -> list[Op]:
    return [
        op for op in nest.walk() if op.name == "store" and op.ref is not None and op.symbol == name
    ]


def _bytes(program: Op, tensor: Op) -> int:
    size = DTYPES[tensor["dtype"]]
    for length in global_dims(tensor, environment(program)):
        size *= length
    return size


def _part_axis(program: Op, schedule: Schedule, tensor: Op) -> int | None:
    """The axis that the ranks share out for the sum, or None."""
    nests = [op for op in program.body if op.blocks and _stored_by(op, tensor.symbol)]
    dims = global_dims(tensor, environment(program))
    world = int(program["world"])
    fits: list[tuple[int, bool]] = []
    for axis, (dim, length) in enumerate(zip(tensor["dims"], dims, strict=True)):
        if dynamic_extent(program) in Expr.of(dim).names:
            continue  # ranks would have parts of different lengths, and some none
        cut = {_cut(program, nest, tensor.symbol, axis) for nest in nests}
        inner = axis == len(dims) - 1 and schedule.move(tensor.symbol).signal != "flag"
        if inner and length // world * DTYPES[tensor["dtype"]] % PAYLOAD:
            continue  # parts of rows that are of no whole words
        if length % world or (cut != {None} and cut != {length // world}):
            continue
        if all(_walked(nest, tensor.symbol, axis) for nest in nests):
            fits.append((axis, length // world % schedule.tile(str(dim), 128) == 0))
    whole = [axis for axis, even in fits if even]
    if whole:
        return 0 if 0 in whole else whole[-1]
    return fits[-1][0] if fits else None


def _outer(nest: Op) -> list[Value]:
    """The tile variables of the loops that become the queue of a stage."""
    found: list[Value] = []
    body: tuple[Op, ...] = (nest,)
    while len(body) == 1 and body[0].name in ("for_tiles", "for_range") and not body[0].results:
        if body[0].name == "for_tiles" and body[0].get("extent") is None:
            break
        found += [v for v in body[0].args if v.type.is_tile]
        body = body[0].body
    return found


def _element(op: Op, axis: int) -> Index | None:
    """What an access indexes ``axis`` with; None where it names no index."""
    return op.ref.index[axis] if op.ref is not None and op.ref.index else None


def _walked(nest: Op, name: str, axis: int) -> bool:
    """Whether every store of ``name`` is by a tile of the outer loops along ``axis``."""
    outer = _outer(nest)
    return all(_element(op, axis) in outer for op in _stored_by(nest, name))


def _cut(program: Op, nest: Op, name: str, axis: int) -> int | None:
    """The length of the owners' blocks by which other tensors cut the nest: None if none does, 0 if they
    cut another axis than ``axis`` of ``name``."""
    outer = _outer(nest)
    variables = [_element(op, axis) for op in _stored_by(nest, name)]
    found: int | None = None
    for other, tensor in tensors_of(program).items():
        if tensor["move"] not in ("gather", "scatter", "shard") or tensor.get("over") is None:
            continue
        over = int(tensor["over"])
        for op in nest.walk():
            named = op.name in ("load", "store") and op.ref is not None and op.symbol == other
            element = _element(op, over) if named else None
            if element is None or element not in outer:
                continue
            if element not in variables:
                return 0
            names = environment(program)
            extent = global_dims(tensor, names)[over]
            block = uniform_block(Expr.of(tensor["owner"]), extent, names["WORLD"], names)
            found = block if found in (None, block) else 0
    return found
