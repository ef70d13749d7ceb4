"""Products that the host function hands to the library: which matrices, which way round, in which task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilelink.backend.validate.trace import Touch
from tilelink.backend.validate.values import Flow, Ints, Key

if TYPE_CHECKING:
    from tilelink.backend.product import Product
    from tilelink.backend.validate.host import HostMachine, View


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """The transpose of a region of a matrix."""

    view: View


@dataclass(frozen=True, slots=True, eq=False)
class Called:
    """One call of `matmul`: the symbols of left, right, result and bias, and what was transposed."""

    symbols: tuple[str, str, str, str]
    turned: tuple[bool, bool]

    def differs(self, product: Product) -> str:
        """How it is another product than the program's; "" if it is that one."""
        loads = (product.left, product.right, product.store, product.bias)
        for have, op, what in zip(
            self.symbols, loads, ("left", "right", "result", "bias"), strict=True
        ):
            places = ["" if op is None else op.symbol]
            if op is not None and op.get("own") is not None:
                places.append(op["own"].symbol)
            if have not in places:
                return f"`{have}` is its {what}, not `{places[0]}`"
        if self.turned != product.turned:
            return "another operand is transposed"
        return ""


def multiply(host: HostMachine, a: Any, b: Any, out: Any, bias: Any) -> Called:
    """Reads ``call.matmul(a, b, out, bias=bias)``: touches of a task of every rank that is on."""
    agent = host.library
    if agent is None or agent.trace is None:
        host.hazard("a product outside of a launch of the library")
    trace = agent.trace
    turned = (isinstance(a, Turned), isinstance(b, Turned))
    views = [v.view if isinstance(v, Turned) else v for v in (a, b)]
    views += [out, *([] if bias is None else [bias])]
    for number, view in enumerate(views):
        if not host.is_region(view) or len(view.axes) != (2 if number < 3 else 1):
            host.unclear("a product of something that is no matrix of this rank")
        if np.any(view.home[host.on] != host.rank[host.on]):
            host.unclear("a product in memory of a peer")
    _shapes(host, views, turned)
    lane = np.flatnonzero(host.on)
    segment = trace.segments[0][lane]
    zero = segment.copy()
    flows: dict[Key, Flow] = {}
    for view in [*views[:2], *views[3:]]:
        read = (view.home[lane], view.lo[lane], view.hi[lane])
        trace.touches.append(
            Touch(host.site, view.symbol, False, "tma", lane, 0, zero, trace.next(), *read)
        )
        have = np.ones(len(lane), dtype=bool)
        axes = tuple(view.axes)
        # Two operands may be regions of one symbol.
        key = (host.site[0], len(flows), view.symbol)
        flows[key] = Flow(view.symbol, have, *read, axes)
    written = (out.home[lane], out.lo[lane], out.hi[lane])
    trace.touches.append(
        Touch(host.site, out.symbol, True, "tma", lane, 0, zero, trace.next(), *written, flows)
    )
    trace.segments[0] = trace.segments[0] + host.on
    named = [v.symbol for v in views] + [""]
    return Called((named[0], named[1], named[2], named[3]), turned)


def _shapes(host: HostMachine, views: list[View], turned: tuple[bool, bool]) -> None:
    """(m, k) by (k, n) is (m, n), and a bias is (n,)."""
    sizes: list[Ints] = [(v.hi - v.lo)[:, list(v.axes)][host.on] for v in views]
    left, right = (s[:, ::-1] if t else s for s, t in zip(sizes[:2], turned, strict=True))
    result = sizes[2]
    fits = (left[:, 1] == right[:, 0]) & (result[:, 0] == left[:, 0])
    fits &= result[:, 1] == right[:, 1]
    if len(sizes) == 4:
        fits &= sizes[3][:, 0] == result[:, 1]
    if not fits.all():
        host.hazard("a product of matrices whose shapes do not fit")
