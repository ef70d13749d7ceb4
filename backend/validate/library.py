"""Launches of the library in the host function: products, which way round, and signals between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilelink.backend.validate.trace import FINISH, Signal, Touch, Trace
from tilelink.backend.validate.values import Flow, Ints, Key, full
from tilelink.ir.layout import ACK

if TYPE_CHECKING:
    from tilelink.backend.product import Product
    from tilelink.backend.validate.host import Agent, HostMachine, View


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


def opened(host: HostMachine) -> tuple[Agent, Trace]:
    """The launch of the library that is open."""
    if host.library is None or host.library.trace is None:
        host.hazard("what the library's launches hold, outside of one")
    return host.library, host.library.trace


def working(host: HostMachine) -> tuple[Agent, Trace]:
    """As :func:`opened`, of what belongs to a task: it stands before the acknowledgement of all of them."""
    agent, trace = opened(host)
    if any(signal.stage == FINISH for signal in trace.signals):
        host.hazard(
            "it comes behind the acknowledgement, which lets the next call overwrite what it reads"
        )
    return agent, trace


def wait(host: HostMachine, name: Any, index: Any, producer: Any, tile: Any, number: Any) -> None:
    """Reads ``call.wait``: the start of the next kernel in the stream is a proxy fence."""
    agent, trace = working(host)
    lane, flat = host.element(name, index, "flag")
    blamed = full(host.number(producer).v, host.lanes)[lane]
    host.number(tile)
    if not isinstance(number, int) or isinstance(number, bool):
        host.unclear("the number of a wait")
    agent.numbers.append(number)
    segment = trace.segments[0][lane]
    trace.signals.append(
        Signal(
            host.site, name, True, lane, 0, segment, trace.next(), host.rank[lane], flat,
            np.ones_like(lane), fence=True, producer=blamed,
        )
    )  # fmt: skip
    trace.passed = trace.passed + host.on


def count(host: HostMachine, name: Any, index: Any) -> None:
    """Reads ``call.count``, behind the task's product: when its kernel has ended its stores are complete."""
    _, trace = working(host)
    lane, flat = host.element(name, index, "counter")
    segment = trace.segments[0][lane] - 1
    if np.any(segment < 0):
        host.hazard("a count before any product")
    trace.signals.append(
        Signal(
            host.site, name, False, lane, 0, segment, trace.next(), host.rank[lane], flat,
            np.ones_like(lane), drained=True,
        )
    )  # fmt: skip
    trace.passed = trace.passed + host.on


def acknowledge(host: HostMachine) -> None:
    """Reads ``call.acknowledge``: each rank's word of the acknowledgements, at every rank."""
    _, trace = opened(host)
    if not host.all:
        host.hazard("an acknowledgement of some ranks alone")
    world = host.layout.world
    symbol, first = host.layout.word(np.array([ACK], dtype=np.int64))
    flat = host.rank + int(first[0])
    for peer in range(world):
        home = np.full(world, peer, dtype=np.int64)
        trace.signals.append(
            Signal(
                host.site, symbol, False, host.rank, FINISH, np.zeros_like(flat), trace.next(),
                home, flat, np.ones_like(flat), drained=True,
            )
        )  # fmt: skip


def multiply(host: HostMachine, a: Any, b: Any, out: Any, bias: Any) -> None:
    """Reads ``call.matmul(a, b, out, bias=bias)``: touches of a task of every rank that is on."""
    agent, trace = working(host)
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
    sides = [v.axes[::-1] if t else v.axes for v, t in zip(views[:2], turned, strict=True)]
    # Rows of the left operand, columns of the right one and of the bias.
    along = [(sides[0][0], -1), (-1, sides[1][1]), *((-1, v.axes[0]) for v in views[3:])]
    for view, axes in zip([*views[:2], *views[3:]], along, strict=True):
        read = (view.home[lane], view.lo[lane], view.hi[lane])
        trace.touches.append(
            Touch(host.site, view.symbol, False, "tma", lane, 0, zero, trace.next(), *read)
        )
        have = np.ones(len(lane), dtype=bool)
        # Two operands may be regions of one symbol.
        key = (host.site[0], len(flows), view.symbol, 0)
        flows[key] = Flow(view.symbol, have, *read, axes)
    written = (out.home[lane], out.lo[lane], out.hi[lane])
    trace.touches.append(
        Touch(host.site, out.symbol, True, "tma", lane, 0, zero, trace.next(), *written, flows)
    )
    trace.segments[0] = trace.segments[0] + host.on
    named = [v.symbol for v in views] + [""]
    agent.products.append(Called((named[0], named[1], named[2], named[3]), turned))


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
