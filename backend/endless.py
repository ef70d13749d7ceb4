"""Inputs behind whose rows kernels may read: out of bounds of the tensor, within its allocation.

A tile of a matrix can have more rows than there are: at its end, or where few rows make a tile at all. TMA fills
in zeros for the others, and takes longer for that than to read as much. Where nothing that a kernel stores can
depend on them, it may as well read what lies there in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilelink.backend.expand import environment, evaluate
from tilelink.ir import At, Expr, Index, Op, Ref, Value, dynamic_extents

REDUCE = ("sum", "max", "min")


def endless_inputs(program: Op) -> frozenset[str]:
    """The inputs of a fused program that its kernels may read past their last row.

    Those with as many rows as there are in a call: no row of such a kernel's results depends on another one, which
    the proof checks. And those that are read through TMA by products alone, of tiles that do not end with
    the rows, where in their stages no row depends on another one.
    """
    dynamic = {op.symbol for op in dynamic_extents(program)}
    matrices = [t for t in program.find("tensor") if t["role"] == "in" and len(t["dims"]) == 2]

    def varies(dim: Expr | int | str) -> bool:
        return bool(Expr.of(dim).names & dynamic)

    found = {t.symbol for t in matrices if [varies(dim) for dim in t["dims"]] == [True, False]}
    if not dynamic:
        found |= {t.symbol for t in matrices if _ends_within_tiles(program, t)}
    return frozenset(found)


def mixed_rows(stage: Op, row: str) -> Iterator[tuple[Op, str]]:
    """What in ``stage`` makes a row depend on others, where ``row`` is the tile variable that walks them: the op
    and what it is, in words."""
    for op in stage.walk():
        shapes = [v.type.shape for v in (*op.operands, *op.results)]
        if op.name == "dot" and row in (shapes[0][-1], shapes[1][max(0, len(shapes[1]) - 2)]):
            yield op, "a product that sums over rows"
        if op.name in REDUCE and shapes[0][int(op["axis"])] == row:
            yield op, f"a {op.name} over rows"
        if op.name == "reshape" and any(row in shape for shape in shapes):
            yield op, "a reshape of rows"


def _ends_within_tiles(program: Op, tensor: Op) -> bool:
    """Whether some tile of ``tensor`` ends behind its last row, and all that reads it may read on."""
    env = environment(program)
    rows = int(evaluate(tensor["dims"][0], env, tensor))
    if tensor.get("over") == 0:
        rows //= env["WORLD"]
    within = False
    for stage in program.walk():
        if stage.name != "stage":
            continue
        for load, ref in _accesses(stage, tensor.symbol):
            row = tile_variable(ref.index[0]) if ref.index else None
            names = [variable.name for variable in stage.args]
            if row is None or row not in names or not _of_products(stage, load):
                return False
            if any(True for _ in mixed_rows(stage, row)):
                return False
            within |= rows % int(evaluate(stage["tile"][names.index(row)], env, stage)) != 0
    return within


def _accesses(stage: Op, symbol: str) -> Iterator[tuple[Op, Ref]]:
    """The ops of a stage that name a symbol, each with how it does."""
    for op in stage.walk():
        for ref in (op.ref, *(value for _, value in op.attrs if isinstance(value, Ref))):
            if ref is not None and ref.symbol == symbol:
                yield op, ref


def tile_variable(item: Index) -> str | None:
    """The tile variable that an index element walks with."""
    value = item.value if isinstance(item, At) else item
    return value.name if isinstance(value, Value) and value.type.is_tile else None


def _of_products(stage: Op, load: Op) -> bool:
    """Whether ``load`` is one through TMA, and products alone use what it reads."""
    if load.name != "load" or load.get("via") != "tma" or len(load.results[0].type.shape) != 2:
        return False
    read = {load.results[0].name}
    for op in stage.walk():
        if any(v.name in read for v in op.operands):
            if op.name == "transpose":
                read.add(op.results[0].name)
            elif op.name != "dot":
                return False
    return True
