"""Whether what a kernel means depends on how its loops are cut into tiles, and on the order of these.

The schedule decides both. Nothing in the language keeps a body from it: it may keep the last tile of a loop only,
or take the largest element of a tile for that of a row. Two runs of the reference show it: one with one tile a
loop, one with shorter tiles from the last on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from tilelink.backend import reference
from tilelink.backend.accuracy import finite_parts
from tilelink.errors import Span, TilelinkError
from tilelink.ir import Expr, Op

Tensors = dict[str, torch.Tensor]


class TileDependentError(TilelinkError):
    """A kernel whose result depends on lengths or order of its tiles, so that two schedules give two results."""

    code: ClassVar[str] = "tile-dependent"
    message: ClassVar[str] = (
        "`{tensor}` depends on the tiles of `{variable}`: with one tile it differs by {error:.1e} from the "
        "result with tiles of {length} in another order"
    )
    hint: ClassVar[str] = (
        "the schedule sets lengths and order of tiles: carry a sum through the loop, "
        "`acc = tk.dot(a, b, acc)`, and reduce whole axes, `A[m, :]`"
    )


def check_tilings(
    kernel: Op,
    inputs: Sequence[Mapping[str, torch.Tensor | float]],
    expected: list[Tensors],
    limit_of: Callable[[Op, str], float],
) -> None:
    """TileDependentError where the reference gives something else with shorter tiles in another order.

    ``inputs`` and ``expected`` are those of :func:`tilelink.backend.reference.run`, with one tile an extent.
    ``limit_of`` gives for an output how far it may be :func:`apart` for the order in which sums are taken. The
    place is that of the first loop which makes the difference by itself.
    """
    loops = _loops(kernel)
    found = _difference(kernel, inputs, expected, limit_of, {n: s for n, _, s in loops})
    if found is None:
        return
    for name, span, size in loops:
        whole = {other: size if other == name else _WHOLE for other, _, _ in loops}
        alone = _difference(kernel, inputs, expected, limit_of, whole)
        if alone is not None:
            _refuse(span, name, size, *alone)
    name, span, size = loops[0]
    _refuse(span, name, size, *found)


_WHOLE = 2**62


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over rows of ‖row − expected row‖, over the norm of that row or of a usual one, if it is larger.

    Not :func:`~tilelink.backend.accuracy.relative_error`, which judges each row by itself: a row of a few small
    numbers is rounded by more than its limit; what depends on tiles is wrong by more than that in rows of any
    size. Infinity unless NaN and infinities stand at the same places.
    """
    both = finite_parts(got, expected)
    if both is None:
        return math.inf
    if not expected.numel():
        return 0.0
    width = expected.shape[-1] if expected.ndim else 1
    a, b = (x.double().reshape(-1, width) for x in both)
    norm = b.norm(dim=1)
    scale = norm.clamp(min=float(norm.square().mean().sqrt()))
    return float(((a - b).norm(dim=1) / torch.where(scale == 0, 1.0, scale)).max())


def _refuse(span: Span | None, name: str, size: int, tensor: str, error: float) -> None:
    variable = name.split(".")[0]
    raise TileDependentError(span, tensor=tensor, variable=variable, length=size, error=error)


def _difference(
    kernel: Op,
    inputs: Sequence[Mapping[str, torch.Tensor | float]],
    expected: list[Tensors],
    limit_of: Callable[[Op, str], float],
    tiles: Mapping[str, int],
) -> tuple[str, float] | None:
    """The first output that another tiling changes beyond its limit, and by how much."""
    other = reference.run(kernel, inputs, tiles, backwards=True)
    for name in expected[0]:
        worst = max(apart(a[name], b[name]) for a, b in zip(other, expected, strict=True))
        if worst > limit_of(kernel, name):
            return name, worst
    return None


def _loops(kernel: Op) -> list[tuple[str, Span | None, int]]:
    """The variables of all tile loops with the place of the loop and a length that cuts it, the last one first.

    Half of what a rank has where ranks share the extent out; a quarter of the longest extent where the loop
    walks bounds. Inner loops come first: a mistake in one shows in those around it too.
    """
    world = int(kernel["world"])
    extents = {op.symbol: int(op["value"]) for op in kernel.find("extent")}
    shared = {
        str(op["dims"][op["over"]]) for op in kernel.find("tensor") if op.get("over") is not None
    }
    longest = max(extents.values(), default=1)
    found: list[tuple[str, Span | None, int]] = []
    for op in kernel.walk():
        if op.name != "for_tiles":
            continue
        for axis, variable in enumerate(a for a in op.args if a.type.is_tile):
            if op.get("bounds"):
                size = -(-longest // 4)
            else:
                extent = Expr.of(op["extent"][axis])
                parts = 2 * world if str(extent) in shared else 2
                size = -(-int(extent.evaluate({**extents, "WORLD": world})) // parts)
            found.append((variable.name, op.span, max(1, size)))
    return found[::-1]
