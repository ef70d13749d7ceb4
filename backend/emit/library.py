"""The launches that the library runs, as calls of the host function: one product a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilelink.backend.emit.body import plain_notify, plain_wait
from tilelink.backend.emit.kernel import acknowledged
from tilelink.backend.emit.scope import refuse
from tilelink.backend.emit.text import identifier, span
from tilelink.backend.product import product_of
from tilelink.ir import All, At, Expr, Op, Range, Ref, Value

if TYPE_CHECKING:
    from tilelink.backend.emit.host import Host


def write_library(host: Host, launch: Op, after: str) -> None:
    """``with call.library(…):`` with one product, or a loop over the blocks that are multiplied.

    Waits and notifies of a task are kernels of one CTA before and behind its product.
    """
    with host.writer.block(f'with call.library("{launch.symbol}", {after}):'):
        for op in launch.body:
            if op.name == "stage":
                _Library(host, op).write()
            elif acknowledged(op, host.program) is None:
                raise refuse(op, "a finish of the library's launch that does more than acknowledge")
            else:
                host.writer.line("call.acknowledge()")


class _Library:
    def __init__(self, host: Host, stage: Op) -> None:
        self.host, self.stage = host, stage
        self.product = product_of(stage)
        axis = int(stage.get("axis", 0))
        # The variable whose segments are multiplied one by one, if there is one.
        self.cut = stage.args[axis] if stage.get("segment") is not None else None
        # How many rows of a segment are there.
        self.there = Expr.of(stage.get("live", stage.get("segment", 0)))
        self.tile = "0"
        loop = next(op for op in stage.body if op.blocks)
        self.extents: dict[Value, Expr | int] = {
            **dict(zip(stage.args, stage["extent"], strict=True)),
            loop.args[0]: loop["extent"][0],
        }

    def write(self) -> None:
        """All tasks, in the order of the queue."""
        host, stage = self.host, self.stage
        if self.cut is None:
            self.task()
            return
        name = identifier(self.cut.name)
        self.tile = "i" if name != "i" else "i_"
        length = int(stage["segment"])
        extent = Expr.of(stage["extent"][int(stage.get("axis", 0))]).substitute(host.program.env)
        count = stage.get("segments", extent // length)
        host.variables["i"] = self.tile
        with host.writer.block(f"for {self.tile} in range({host.expr(count)}):"):
            number = Expr.of(stage.get("visit", Expr.name("i")))
            start = host.writer.let(name, host.expr(number * length))
            host.variables[f"{self.cut.name}.start"] = start
            self.task()

    def task(self) -> None:
        """What a task does, in order; its product stands where it stores."""
        for op in self.stage.body:
            if op.name == "wait":
                self.guarded(op, self.wait)
            elif op.name == "notify":
                self.guarded(op, self.notify)
            elif op is self.product.store:
                self.multiply()

    # Synchronisation ----------------------------------------------------------------------------

    def guarded(self, op: Op, write: Callable[[Op], None]) -> None:
        """``op`` under its `if`."""
        guard = op.get("if")
        if guard is None:
            write(op)
            return
        with self.host.writer.block(f"if {self.condition(guard)}:"):
            write(op)

    def wait(self, op: Op) -> None:
        """A kernel that holds up the stream until each flag of the index has this call's epoch."""
        assert op.ref is not None
        host, program = self.host, self.host.program
        plain_wait(op)
        if program.symbols[op.symbol].name != "flag" or op.get("epoch", 0) != 0:
            raise refuse(op, "a wait between products for something else than a flag of this call")
        shape = program.shape(op.symbol)
        index: list[str] = []
        depth = host.writer.depth
        for item, whole in zip(op.ref.index or tuple(All() for _ in shape), shape, strict=True):
            if isinstance(item, All):
                item = Range(Expr.const(0), Expr.of(whole))
            if isinstance(item, Range):
                name = "part" if index else "source"
                low, high = self.expr(item.lo), self.expr(item.hi)
                host.writer.line(
                    f"for {name} in range({high if low == '0' else f'{low}, {high}'}):"
                )
                host.writer.depth += 1
                index.append(name)
            elif isinstance(item, Expr):
                index.append(self.expr(item))
            else:
                raise refuse(op, "a flag index that is not one element")
        by_rank = program.constant(shape[0]) == program.world
        args = [f'"{op.symbol}"', _tuple(index), index[0] if by_rank else "rank"]
        host.writer.call("call.wait(", [*args, self.tile, str(program.wait_id(op))])
        host.writer.depth = depth

    def notify(self, op: Op) -> None:
        """A kernel that counts behind the product."""
        assert op.ref is not None
        plain_notify(self.host.program, op)
        if self.host.program.symbols[op.symbol].name != "counter" or op.get("delay"):
            raise refuse(op, "a notify between products of something else than a local counter")
        index: list[str] = []
        for item in op.ref.index:
            if not isinstance(item, Expr):
                raise refuse(op, "a counter index that is not one element")
            index.append(self.expr(item))
        self.host.writer.call("call.count(", [f'"{op.symbol}"', _tuple(index)])

    # Products -----------------------------------------------------------------------------------

    def multiply(self) -> None:
        """The product; where an operand lies in one of two places, one for each."""
        loads = (self.product.left, self.product.right)
        choices = [op for op in loads if op.get("own") is not None]
        if not choices:
            self.call(None)
            return
        if len(choices) > 1:
            detail = "a product of which both operands lie in one of two places"
            raise refuse(choices[1], detail, "use the emitter triton")
        (choice,) = choices
        with self.host.writer.block(f"if {self.condition(choice['when'])}:"):
            self.call(choice)
        with self.host.writer.block("else:"):
            self.call(None)

    def call(self, own: Op | None) -> None:
        """``call.matmul(…)``; the load ``own`` reads where this rank's own part lies."""
        product = self.product
        assert product.store.ref is not None
        args: list[str] = []
        for load, turn in zip((product.left, product.right), product.turned, strict=True):
            ref = load["own"] if load is own else load.ref
            assert isinstance(ref, Ref)
            args.append(self.region(load, ref) + (".T" if turn else ""))
        args.append(self.region(product.store, product.store.ref))
        if product.bias is not None:
            assert product.bias.ref is not None
            args.append(f"bias={self.region(product.bias, product.bias.ref)}")
        self.host.writer.call("call.matmul(", args)

    def region(self, op: Op, ref: Ref) -> str:
        """The torch view of the region that an index of tile variables names."""
        parts: list[str] = []
        for item, length in zip(ref.index, self.host.program.shape(ref.symbol), strict=True):
            value = item.value if isinstance(item, At) else item
            if not isinstance(value, Value):
                raise refuse(op, "an index of a product that is no tile")
            if value != self.cut:
                zeros = {f"{v.name}.start": 0 for v in self.extents if v != self.cut}
                moved = isinstance(item, At) and item.start.substitute(zeros).value != 0
                walked = self.extents[value]
                if not moved and self.of_capacity(length, walked):
                    parts.append(span("0", self.expr(walked)))
                    continue
                if moved or self.known(length) != self.known(self.extents[value]):
                    raise refuse(op, "a product of a part of a matrix", "use the emitter triton")
                parts.append(":")
                continue
            start = item.start if isinstance(item, At) else Expr.name(f"{value.name}.start")
            parts.append(span(self.expr(start), self.expr(start + self.there)))
        while parts and parts[-1] == ":":
            parts.pop()
        whole = self.host.whole(ref.symbol)
        return f"{whole}[{', '.join(parts)}]" if parts else whole

    def of_capacity(self, length: Expr | int, walked: Expr | int) -> bool:
        """Whether memory is as long as the capacity of the dynamic extent that a task walks all of."""
        program = self.host.program
        varies = bool(Expr.of(walked).names & program.dynamic)
        return varies and program.constant(length) == program.capacity(walked)

    # Expressions --------------------------------------------------------------------------------

    def known(self, length: Expr | int) -> Expr:
        """A length with the extents that are fixed as numbers."""
        return Expr.of(length).substitute(self.host.program.env)

    def concrete(self, value: Expr | int) -> Expr:
        """An expression in which the tile that is multiplied has its start alone."""
        if self.cut is None:
            return Expr.of(value)
        start, length = Expr.name(f"{self.cut.name}.start"), int(self.stage["segment"])
        stop = start + self.there
        fields = {f"{self.cut.name}.stop": stop, f"{self.cut.name}.tile": start // length}
        return Expr.of(value).substitute(fields)

    def expr(self, value: Expr | int) -> str:
        """An expression of a task as Python."""
        return self.host.expr(self.concrete(value))

    def condition(self, value: Expr | int) -> str:
        """A condition of a task as Python."""
        return self.host.condition(self.concrete(value))


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
