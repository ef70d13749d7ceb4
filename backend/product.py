"""A stage that is one plain matrix product: what the library's `matmul` can do in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from tilelink.ir import At, Op, Value

# Ops of a stage that order what it does and compute nothing.
ORDERING = ("wait", "notify")
FLOATS = ("bf16", "fp16", "fp32")
# What a kernel may do about it; `{made}` stands for the declaration of a tensor of the product's extents.
_EACH = (
    "give each product a loop nest of its own, which stores it in a tensor of its own, as {made}"
)
_BEHIND = "store the product as it is, in {made}, and do the rest in a loop nest behind it"
_BEFORE = (
    "make what it multiplies in a loop nest in front of it, in a tensor of its own (`tk.empty`)"
)
_SUM = (
    "add to one sum, which begins with `tk.zeros([m, n], tk.float32)`, over all tiles of one extent"
)
_NEST = "multiply in a loop nest over two extents, `for m, n in tk.tiles(M, N)`"
_TYPE = "give them the element type of the other, in the call or with `--dtype`"


class NotAProduct(Exception):
    """A stage that is not one plain product of two matrices: the op that is in the way, why, and what to do."""

    def __init__(self, op: Op, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.op, self.detail, self.advice = op, detail, advice


@dataclass(frozen=True, slots=True)
class Product:
    """``store = cast(left @ right + bias)`` with fp32 accumulation, rounded once.

    ``left`` and ``right`` are loads of (m, k) and (k, n), or of (k, m) and (n, k) where ``turned``
    says so of the one or the other; ``bias``, a load of (n,), may be missing.
    """

    left: Op
    right: Op
    turned: tuple[bool, bool]
    bias: Op | None
    store: Op


def product_of(stage: Op) -> Product:
    """The product that the tasks of ``stage`` are; NotAProduct, at the op concerned, if they are none.

    Waits stand before its loop and notifies behind its store; they are not looked at.
    """
    ops = [op for op in stage.body if op.name not in ORDERING]
    if len(stage.args) != 2 or not all(a.type.is_tile for a in stage.args):
        _fail(stage, "its loop is not over the tiles of rows and columns", _NEST)
    rows, columns = stage.args
    loops = [n for n, op in enumerate(ops) if op.blocks]
    if len(loops) != 1 or ops[loops[0]].name != "for_tiles":
        advice = _EACH if len(loops) > 1 else _SUM
        _fail(ops[loops[1]] if len(loops) > 1 else stage, "it has not one loop over K", advice)
    loop = ops[loops[0]]
    before, behind = ops[: loops[0]], ops[loops[0] + 1 :]
    start = {op.results[0].name for op in before if op.name == "zeros"}
    for op in before:
        # Scalars stand before every loop; what uses one is refused where it stands.
        if op.name not in ("zeros", "param", "constant"):
            _fail(op, f"`{op.name}` stands before its loop", _BEHIND)
    dots = [op for op in loop.body if op.name == "dot"]
    if len(dots) != 1:
        advice = _EACH if dots else _SUM
        _fail(dots[1] if dots else loop, f"its loop has {len(dots)} products, each a `dot`", advice)
    if len(loop.args) != 2 or len(loop.operands) != 1 or loop.operands[0].name not in start:
        _fail(loop, "its loop does not carry one sum, from zeros, over one extent", _SUM)
    if loop.operands[0].type.dtype != "fp32":
        _fail(loop, f"it accumulates in {loop.operands[0].type.dtype}", _SUM)
    depth, carried = loop.args
    left, right, turned = _operands(loop, depth, carried, rows, columns)
    bias, store = _epilogue(loop, behind, columns)
    assert store.ref is not None
    if [_tile(item) for item in store.ref.index] != [rows, columns]:
        _fail(store, "it does not store its tile of rows and columns", _BEHIND)
    return Product(left, right, turned, bias, store)


def _operands(
    loop: Op, depth: Value, carried: Value, rows: Value, columns: Value
) -> tuple[Op, Op, tuple[bool, bool]]:
    made = {op.results[0].name: op for op in loop.body if op.results}
    (dot,) = (op for op in loop.body if op.name == "dot")
    used, last = set(), loop.body[-1]
    if [v.name for v in dot.operands[2:]] != [carried.name]:
        _fail(dot, "it does not add to the sum that the loop carries", _SUM)
    if [v.name for v in last.operands] != [dot.results[0].name]:
        _fail(last, "its loop gives on another value than the product", _SUM)
    found: list[Op] = []
    turned: list[bool] = []
    for number, value in enumerate(dot.operands[:2]):
        op = made.get(value.name)
        turn = op is not None and op.name == "transpose"
        if op is not None and turn:
            used.add(op.results[0].name)
            op = made.get(op.operands[0].name)
        if op is None or op.name != "load" or op.ref is None:
            _fail(dot, "its operands are not loaded tiles, as they are or transposed", _BEFORE)
        used.add(op.results[0].name)
        wanted = [rows, depth] if number == 0 else [depth, columns]
        for ref in (op.ref, op.get("own")):
            if ref is not None and [_tile(i) for i in ref.index] != wanted[:: -1 if turn else 1]:
                tile = ", ".join(v.name for v in wanted)
                _fail(op, f"it does not load a tile of {tile}", _BEFORE)
        found.append(op)
        turned.append(turn)
    for op in loop.body:
        if op not in (dot, last) and (not op.results or op.results[0].name not in used):
            _fail(op, f"`{op.name}` stands in its loop", _BEFORE)
    kinds = [op.results[0].type.dtype for op in found]
    if kinds[0] != kinds[1] or kinds[0] not in FLOATS:
        _fail(dot, f"it multiplies {kinds[0]} with {kinds[1]}", _TYPE)
    return found[0], found[1], (turned[0], turned[1])


def _epilogue(loop: Op, behind: list[Op], columns: Value) -> tuple[Op | None, Op]:
    """What stands behind the loop: at most a bias, the rounding, and the store."""
    value, bias = loop.results[0].name, None
    loads: dict[str, Op] = {}
    rounded = False
    for number, op in enumerate(behind):
        names = [v.name for v in op.operands]
        if op.name == "load" and op.ref is not None and not op.get("own"):
            if [_tile(item) for item in op.ref.index] != [columns]:
                what = f"it loads more than a vector of {columns.name} behind its loop"
                _fail(op, what, _BEHIND)
            loads[op.results[0].name] = op
        elif op.name == "add" and bias is None and not rounded:
            other = [n for n in names if n != value]
            if len(names) != 2 or len(other) != 1 or other[0] not in loads:
                _fail(op, "something else than a loaded vector is added to it", _BEHIND)
            bias, value = loads.pop(other[0]), op.results[0].name
        elif op.name == "cast" and names == [value] and not rounded:
            value, rounded = op.results[0].name, True
        elif op.name == "store" and names == [value] and number == len(behind) - 1 and not loads:
            return _checked(loop, bias, op)
        else:
            _fail(op, f"`{op.name}` stands behind its loop", _BEHIND)
    _fail(loop, "nothing stores it", _BEHIND)


def _checked(loop: Op, bias: Op | None, store: Op) -> tuple[Op | None, Op]:
    """The library takes operands, bias and result of one element type."""
    (dot,) = (op for op in loop.body if op.name == "dot")
    kind = dot.operands[0].type.dtype
    if store.operands[0].type.dtype != kind:
        _fail(store, f"it stores {store.operands[0].type.dtype}, a product of {kind}", _BEHIND)
    if bias is not None and bias.results[0].type.dtype != kind:
        what = f"the vector is {bias.results[0].type.dtype}, the operands are {kind}"
        _fail(bias, what, _TYPE)
    return bias, store


def _tile(item: object) -> object:
    """The tile variable of an index element, wherever it is placed; None where it is none."""
    value = item.value if isinstance(item, At) else item
    return value if isinstance(value, Value) and value.type.is_tile else None


def _fail(op: Op, detail: str, advice: str) -> NoReturn:
    raise NotAProduct(op, detail, advice)
