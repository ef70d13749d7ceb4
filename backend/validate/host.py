"""The emitted host function, run for all ranks in step: agents, their order, copies and arguments."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilelink.backend.endless import endless_inputs
from tilelink.backend.validate import library
from tilelink.backend.validate.layout import Layout, constant
from tilelink.backend.validate.library import Called, Turned
from tilelink.backend.validate.machine import Machine
from tilelink.backend.validate.trace import Signal, Touch, Trace
from tilelink.backend.validate.values import Descriptor, Ints, Name, Num, Special, full
from tilelink.errors import Source

CONTEXT = frozenset({"arena", "peers", "progress_ns", "arrival_ns", "program", "host_record"})


@dataclass(slots=True, eq=False)
class View:
    """A region of a tensor or buffer of rank ``home``: box ``[lo, hi)`` and the axes that are left.

    ``flat``: the first two axes are one. ``roomy``: all of the memory that the buffer may take, or what lies
    behind an input too.
    """

    symbol: str
    home: Ints
    lo: Ints
    hi: Ints
    axes: tuple[int, ...]
    whole: bool
    slot: int | None = None
    flat: bool = False
    roomy: bool = False


@dataclass(slots=True, eq=False)
class Agent:
    """One agent as the host enqueues it."""

    kind: str
    name: str
    after: tuple[str, ...]
    node: ast.AST
    workers: int = 0
    warps: int = 0
    stages: int = 0
    kernel: str = ""
    arguments: tuple[Any, ...] = ()
    waits: bool = False
    begins: bool = False  # no kernel: the launches do what a head does
    trace: Trace | None = None
    op: str = ""
    source: str = ""
    target: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    emitter: str = ""
    products: list[Called] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of its waits, in the order of the text


class HostMachine(Machine):
    """A lane a rank. Names of launches and collectives come from the program, in its order."""

    floor = True
    modules = frozenset()

    def __init__(self, source: Source, layout: Layout, kernels: frozenset[str]) -> None:
        super().__init__(source, layout.world)
        self.layout, self.kernels = layout, kernels
        self.rank = np.arange(layout.world, dtype=np.int64)
        self.agents: list[Agent] = []
        self.stream: Agent | None = None
        self.library: Agent | None = None
        self.named: dict[str, list[str]] = {
            kind: [o.symbol for o in layout.program.find(kind) if o.get("emitter") != "library"]
            for kind in ("launch", "collective")
        }

    def start(self, function: ast.FunctionDef) -> list[Agent]:
        """Runs ``host(call)``."""
        if [a.arg for a in function.args.args] != ["call"]:
            self.unclear("the parameters of the host function", function)
        self.env["call"] = Name("call")
        self.run(function.body)
        return self.agents

    def free(self, node: ast.Name) -> Any:
        """Kernels, and the functions of Python that are used."""
        if node.id in self.kernels:
            return Name(f"kernel {node.id}")
        if node.id in ("min", "max", "range"):
            return Name(node.id)
        return super().free(node)

    def attribute(self, value: Any, node: ast.Attribute) -> Any:
        """``call.rank`` and other facts of the call."""
        if isinstance(value, Name) and value.path == "call" and value.of is None:
            if node.attr == "rank":
                return Num(self.rank, True)
            if node.attr in CONTEXT:
                return Special(node.attr)
        if isinstance(value, View) and node.attr == "T" and len(value.axes) == 2:
            return Turned(value)
        return super().attribute(value, node)

    def statement(self, node: ast.stmt) -> None:
        """One statement; ``with call.stream(…)`` is a side stream, ``with call.library(…)`` a launch."""
        if not isinstance(node, ast.With):
            super().statement(node)
            return
        item = node.items[0]
        call = item.context_expr
        plain = len(node.items) == 1 and item.optional_vars is None and isinstance(call, ast.Call)
        if not plain or self.stream is not None or self.library is not None or not self.all:
            self.unclear("a `with`", node)
        assert isinstance(call, ast.Call)
        name, args, options = self.parts(call)
        kinds = {"call.stream": "stream", "call.library": "launch"}
        if name not in kinds or len(args) != 1 or set(options) != {"after"}:
            self.unclear("a `with` of something that is no stream and no launch", node)
        trace = Trace(self.lanes)
        trace.passed = np.zeros(self.lanes, dtype=np.int64)
        agent = Agent(kinds[name], str(args[0]), self.after(options["after"]), node, trace=trace)
        self.agents.append(agent)
        if agent.kind == "launch":
            agent.emitter, agent.workers = "library", 1
            trace.segments[0] = np.zeros(self.lanes, dtype=np.int64)
            trace.stage_sites[0] = (node.lineno, node.col_offset)
            self.library = agent
        else:
            self.stream = agent
        self.run(node.body)
        self.stream = self.library = None
        trace.close()

    def parts(self, node: ast.Call) -> tuple[str, list[Any], dict[str, Any]]:
        """The dotted name and the arguments of a call."""
        function = self.eval(node.func)
        if not isinstance(function, Name) or function.of is not None:
            self.unclear("a call of a value", node)
        options: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.unclear("`**` in a call", node)
            options[keyword.arg] = self.eval(keyword.value)
        return function.path, [self.eval(a) for a in node.args], options

    def call(self, node: ast.Call) -> Any:
        """A call of something of ``call``, or of a view."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "flatten":
            return self.flattened(node, self.eval(node.func.value))
        name, args, options = self.parts(node)
        if name in ("min", "max"):
            return self.extreme(name, args)
        handler = getattr(self, "on_" + name.removeprefix("call."), None)
        if handler is None or not name.startswith("call."):
            self.unclear(f"a call of `{name}`", node)
        try:
            return handler(*args, **options)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            self.unclear(f"the arguments of `{name}`", node)

    def flattened(self, node: ast.Call, value: Any) -> View:
        """All of a buffer with its first two axes as one."""
        axes = [self.eval(a) for a in node.args]
        plain = axes == [0, 1] and not node.keywords and isinstance(value, View)
        if not plain or value.flat or not value.whole or len(value.axes) != 3:
            self.unclear("a view of another shape", node)
        return View(value.symbol, value.home, value.lo, value.hi, value.axes, True, flat=True)

    def extreme(self, name: str, args: list[Any]) -> Num:
        """``min`` and ``max``."""
        values = [self.number(a).v for a in args]
        function = np.minimum if name == "min" else np.maximum
        return Num(function.reduce([full(v, self.lanes) for v in values]), True)

    def number(self, value: Any) -> Num:
        """An integer argument."""
        if isinstance(value, int) and not isinstance(value, bool):
            return Num(value, True)
        if isinstance(value, Num):
            return value
        self.unclear("this is no integer")

    def whole(self, value: Any) -> int:
        """An integer that is the same on all ranks."""
        found = constant(self.number(value).v)
        if found is None:
            self.unclear("a number that differs between ranks")
        return found

    def after(self, value: Any) -> tuple[str, ...]:
        """Names of agents that were enqueued before."""
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            self.unclear("what comes before")
        known = {a.name for a in self.agents}
        for name in value:
            if name not in known:
                self.hazard(f"`{name}` is not enqueued before this")
        return value

    def outside(self) -> None:
        """Refuses an agent inside of a stream or on some ranks alone."""
        if self.stream is not None or self.library is not None or not self.all:
            self.hazard("an agent inside of a stream, or on some ranks alone")

    def view(self, symbol: Any, kind: str, peer: Any = None) -> View:
        """All of a tensor or buffer."""
        declared = self.layout.declared.get(symbol)
        if declared is None or declared.name != kind:
            self.hazard(f"`{symbol}` is no {kind} of the program")
        home = self.rank if peer is None else full(self.number(peer).v, self.lanes)
        if np.any((home < 0) | (home >= self.layout.world)):
            self.hazard("a rank that does not exist")
        if peer is not None and declared.get("space") == "local":
            self.hazard(f"@{symbol} is local: no peer has access to it")
        dims = np.array(self.layout.dims[symbol], dtype=np.int64)
        lo = np.zeros((self.lanes, len(dims)), dtype=np.int64)
        hi = np.broadcast_to(dims, lo.shape).copy()
        return View(symbol, home, lo, hi, tuple(range(len(dims))), True)

    def subscript(self, value: Any, node: ast.Subscript) -> Any:
        """A region of a view, as torch takes it."""
        if not isinstance(value, View) or value.flat:
            self.unclear("an index of something that is no tensor", node)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if len(parts) > len(value.axes) or not value.whole:
            self.unclear("an index", node)
        lo, hi, left = value.lo.copy(), value.hi.copy(), list(value.axes)
        for axis, part in zip(value.axes, parts, strict=False):
            extent = self.layout.dims[value.symbol][axis]
            if isinstance(part, ast.Slice):
                if part.step is not None:
                    self.unclear("a slice with steps", node)
                if part.lower is not None:
                    lo[:, axis] = full(self.integer(part.lower).v, self.lanes)
                if part.upper is not None:
                    hi[:, axis] = full(self.integer(part.upper).v, self.lanes)
            else:
                lo[:, axis] = full(self.integer(part).v, self.lanes)
                hi[:, axis] = lo[:, axis] + 1
                left.remove(axis)
            bad = (lo[:, axis] < 0) | (hi[:, axis] > extent) | (lo[:, axis] > hi[:, axis])
            if np.any(bad & self.on):
                self.hazard(f"an index outside of @{value.symbol}")
        return View(value.symbol, value.home, lo, hi, tuple(left), False, value.slot)

    # call -------------------------------------------------------------------------------------

    def on_tensor(self, name: Any) -> View:
        """``call.tensor``."""
        return self.view(name, "tensor")

    def on_buffer(self, name: Any, peer: Any = None, slot: Any = None) -> View:
        """``call.buffer``: of a buffer that lies in two slots, the part in one of them."""
        view = self.view(name, "buffer", peer)
        twice = self.layout.program.get("slots") is not None
        twice &= self.layout.declared[name].get("space") == "symmetric"
        if slot not in ((0, 1) if twice else (None,)) or isinstance(slot, bool):
            self.hazard(f"the buffer @{name} has {'two slots' if twice else 'one place'}")
        view.slot = slot
        return view

    def on_room(self, name: Any, slot: Any = None) -> View:
        """``call.room``: of a symmetric buffer whose dims depend on a dynamic extent, or of an input behind whose
        rows a kernel may read."""
        decl = self.layout.declared.get(name)
        if decl is not None and decl.name == "tensor":
            view = self.on_tensor(name)
            if slot is not None or name not in endless_inputs(self.layout.program):
                self.hazard(f"@{name} is no input behind whose rows a kernel may read")
        else:
            view = self.on_buffer(name, None, slot)
            decl = self.layout.declared[name]
            if decl.get("space") != "symmetric" or all(isinstance(d, int) for d in decl["dims"]):
                self.hazard(f"there is no more room for @{name} than it takes")
        view.roomy = True
        return view

    def on_scalar(self, name: Any) -> Special:
        """``call.scalar``."""
        if not isinstance(name, str):
            self.unclear("a scalar")
        return Special(f"scalar {name}")

    def on_extent(self, name: Any) -> Num:
        """``call.extent``: the capacity of a dynamic extent."""
        if name not in self.layout.env:
            self.hazard(f"`{name}` is no extent of the program")
        return Num(self.layout.env[name], True)

    def on_descriptor(self, view: Any, block: Any, emitter: Any = "triton") -> Descriptor:
        """``call.descriptor``."""
        if emitter not in ("triton", "gluon"):
            self.unclear("a descriptor for another emitter")
        if not isinstance(view, View):
            self.unclear("a descriptor of something that is no tensor")
        if not isinstance(block, tuple) or not all(isinstance(b, int) for b in block):
            self.unclear("a block that is not constant")
        dims = np.array(self.layout.dims[view.symbol])
        if view.flat:
            if np.any(view.home != self.rank) or len(block) != len(dims) - 1:
                self.unclear("a descriptor of parts of a peer, or in blocks of another shape")
            return Descriptor(view.symbol, block, None, emitter, flat=True)
        if view.whole and not np.any(view.home != self.rank):
            return Descriptor(view.symbol, block, None, emitter, view.slot, roomy=view.roomy)
        if view.roomy:
            self.unclear("a descriptor of a part of the memory of a buffer")
        if view.whole and len(block) == len(dims) and constant(view.home) is not None:
            return Descriptor(view.symbol, block, constant(view.home), emitter, view.slot)
        mine = len(view.axes) == len(dims) - 1 and not np.any(view.lo[:, 0] != self.rank)
        mine &= not np.any(view.hi[:, 0] != self.rank + 1) and not np.any(view.lo[:, 1:])
        peer = constant(view.home)
        mine &= len(block) == len(dims) - 1
        if not mine or np.any(view.hi[:, 1:] != dims[1:]) or peer is None:
            self.unclear("a descriptor of neither a whole tensor nor this rank's slice of it")
        return Descriptor(view.symbol, block, peer, emitter, view.slot)

    def on_head(self, ack_wait: Any = True) -> None:
        """``call.head``."""
        self.outside()
        if not isinstance(ack_wait, bool):
            self.unclear("a flag that is not constant")
        assert self.node is not None
        self.agents.append(Agent("head", "head", (), self.node, waits=ack_wait))

    def on_begin(self) -> None:
        """``call.begin``."""
        self.outside()
        assert self.node is not None
        self.agents.append(Agent("head", "head", (), self.node, begins=True))

    def on_launch(
        self,
        kernel: Any,
        workers: Any,
        args: Any,
        num_warps: Any,
        num_stages: Any,
        after: Any = ("head",),
    ) -> None:
        """``call.launch``."""
        self.outside()
        if not isinstance(kernel, Name) or not kernel.path.startswith("kernel "):
            self.unclear("a launch of something that is no kernel of the module")
        if not isinstance(args, tuple):
            self.unclear("the arguments of a kernel")
        assert self.node is not None
        self.agents.append(
            Agent(
                "launch",
                self.next_name("launch"),
                self.after(after),
                self.node,
                self.whole(workers),
                self.whole(num_warps),
                self.whole(num_stages),
                kernel.path.removeprefix("kernel "),
                args,
            )
        )

    def next_name(self, kind: str) -> str:
        """The program's name for the next agent of a kind."""
        number = sum(a.kind == kind and not a.emitter for a in self.agents)
        names = self.named[kind]
        if number >= len(names):
            self.hazard(f"more agents of the kind {kind} than the program has")
        return names[number]

    def on_collective(self, op: Any, source: Any, target: Any, after: Any = ("head",)) -> None:
        """``call.collective``."""
        self.outside()
        both = [v for v in (source, target) if isinstance(v, View) and v.whole]
        if len(both) != 2 or any(np.any(v.home != self.rank) for v in both):
            self.unclear("a collective of something that is not a whole tensor of this rank")
        assert self.node is not None
        self.agents.append(
            Agent(
                "collective",
                self.next_name("collective"),
                self.after(after),
                self.node,
                op=str(op),
                source=source.symbol,
                target=target.symbol,
            )
        )

    def is_region(self, value: Any) -> bool:
        """Whether a value is a region of a tensor or buffer, as it lies."""
        return isinstance(value, View)

    def on_matmul(self, a: Any, b: Any, out: Any, bias: Any = None) -> None:
        """``call.matmul``."""
        library.multiply(self, a, b, out, bias)

    def on_wait(self, name: Any, index: Any, producer: Any, tile: Any, number: Any) -> None:
        """``call.wait``."""
        library.wait(self, name, index, producer, tile, number)

    def on_count(self, name: Any, index: Any) -> None:
        """``call.count``."""
        library.count(self, name, index)

    def on_acknowledge(self) -> None:
        """``call.acknowledge``."""
        library.acknowledge(self)

    def running(self) -> Trace:
        """The trace of the stream that is open."""
        if self.stream is None or self.stream.trace is None:
            self.hazard("an operation of a stream outside of one")
        return self.stream.trace

    def element(self, name: Any, index: Any, kind: str) -> tuple[Ints, Ints]:
        """The lanes that are on, and the flat element of a flag or counter in each."""
        declared = self.layout.declared.get(name)
        if declared is None or declared.name != kind:
            self.hazard(f"`{name}` is no {kind} of the program")
        dims = self.layout.dims[name]
        if not isinstance(index, tuple) or len(index) != len(dims):
            self.unclear("the index of a flag or counter")
        flat = np.zeros(self.lanes, dtype=np.int64)
        for item, extent in zip(index, dims, strict=True):
            value = full(self.number(item).v, self.lanes)
            if np.any(self.on & ((value < 0) | (value >= extent))):
                self.hazard(f"an index outside of @{name}")
            flat = flat * extent + value
        lane = np.flatnonzero(self.on)
        return lane, flat[lane]

    def on_wait_counter(self, name: Any, index: Any, count: Any) -> None:
        """``call.wait_counter``."""
        trace = self.running()
        lane, flat = self.element(name, index, "counter")
        bound = full(self.number(count).v, self.lanes)[lane]
        zero = np.zeros_like(lane)
        trace.signals.append(
            Signal(self.site, name, True, lane, 0, zero, trace.next(), self.rank[lane], flat, bound)
        )
        trace.passed = trace.passed + self.on

    def on_notify(self, name: Any, index: Any, peer: Any) -> None:
        """``call.notify``."""
        trace = self.running()
        lane, flat = self.element(name, index, "flag")
        home = full(self.number(peer).v, self.lanes)[lane]
        if np.any((home < 0) | (home >= self.layout.world)):
            self.hazard("a rank that does not exist")
        zero = np.zeros_like(lane)
        trace.signals.append(
            Signal(
                self.site, name, False, lane, 0, zero, trace.next(), home, flat, np.ones_like(lane)
            )
        )
        trace.passed = trace.passed + self.on

    def on_transfer(self, source: Any, target: Any) -> None:
        """``call.transfer``."""
        trace = self.running()
        if not isinstance(source, View) or not isinstance(target, View):
            self.unclear("a copy of something that is no region")
        if np.any(source.home[self.on] != self.rank[self.on]):
            self.unclear("a copy from memory of a peer")
        shapes = [(v.hi - v.lo)[:, list(v.axes)] for v in (source, target)]
        if shapes[0].shape != shapes[1].shape or np.any((shapes[0] != shapes[1])[self.on]):
            self.hazard("a copy between regions of different shapes")
        pair = trace.next()
        trace.pairs[pair] = self.site
        lane = np.flatnonzero(self.on)
        zero = np.zeros_like(lane)
        for view, write in ((source, False), (target, True)):
            trace.touches.append(
                Touch(
                    self.site, view.symbol, write, "copy", lane, 0, zero, trace.next(),
                    view.home[lane], view.lo[lane], view.hi[lane], {}, pair,
                )
            )  # fmt: skip
