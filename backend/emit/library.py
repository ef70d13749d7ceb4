"""The launches that the library runs, as calls of the host function: one product a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilelink.backend.emit.scope import refuse
from tilelink.backend.emit.text import identifier, span
from tilelink.backend.product import product_of
from tilelink.ir import At, Expr, Op, Ref, Value

if TYPE_CHECKING:
    from tilelink.backend.emit.host import Host


def write_library(host: Host, launch: Op, after: str) -> None:
    """``with call.library(…):`` with one product, or a loop over the blocks that are multiplied."""
    (stage,) = launch.find("stage")
    with host.writer.block(f'with call.library("{launch.symbol}", {after}):'):
        _Library(host, stage).write()


class _Library:
    def __init__(self, host: Host, stage: Op) -> None:
        self.host, self.stage = host, stage
        self.product = product_of(stage)
        loop = next(op for op in stage.body if op.blocks)
        self.extents: dict[Value, Expr | int] = {
            **dict(zip(stage.args, stage["extent"], strict=True)),
            loop.args[0]: loop["extent"][0],
        }
        axis = int(stage.get("axis", 0))
        # The variable whose segments are multiplied one by one, if there is one.
        self.cut = stage.args[axis] if stage.get("segment") is not None else None

    def write(self) -> None:
        """All tasks, in the order of the queue."""
        host, stage = self.host, self.stage
        if self.cut is None:
            self.task()
            return
        name = identifier(self.cut.name)
        position = "i" if name != "i" else "i_"
        length = int(stage["segment"])
        extent = Expr.of(stage["extent"][int(stage.get("axis", 0))]).substitute(host.program.env)
        count = stage.get("segments", extent // length)
        host.variables["i"] = position
        with host.writer.block(f"for {position} in range({host.expr(count)}):"):
            number = Expr.of(stage.get("visit", Expr.name("i")))
            start = host.writer.let(name, host.expr(number * length))
            host.variables[f"{self.cut.name}.start"] = start
            self.task()

    def task(self) -> None:
        """One product."""
        product = self.product
        assert product.store.ref is not None
        args = [
            self.view(op, turn)
            for op, turn in zip((product.left, product.right), product.turned, strict=True)
        ]
        args.append(self.region(product.store, product.store.ref))
        if product.bias is not None:
            args.append(f"bias={self.view(product.bias, False)}")
        self.host.writer.call("call.matmul(", args)

    def view(self, load: Op, turned: bool) -> str:
        """The matrix that a load takes, transposed where the product takes it so."""
        if load.get("own") is not None:
            raise refuse(load, "a product of the library that reads from one of two places")
        assert load.ref is not None
        return self.region(load, load.ref) + (".T" if turned else "")

    def region(self, op: Op, ref: Ref) -> str:
        """The torch view of the region that an index of tile variables names."""
        parts: list[str] = []
        for item, length in zip(ref.index, self.host.program.shape(ref.symbol), strict=True):
            value = item.value if isinstance(item, At) else item
            if not isinstance(value, Value):
                raise refuse(op, "an index of a product that is no tile")
            if value != self.cut:
                moved = self.start(item.start).value != 0 if isinstance(item, At) else False
                if moved or self.known(length) != self.known(self.extents[value]):
                    raise refuse(op, "a product of a part of a matrix")
                parts.append(":")
                continue
            start = item.start if isinstance(item, At) else Expr.name(f"{value.name}.start")
            end = start + int(self.stage["segment"])
            parts.append(span(self.host.expr(start), self.host.expr(end)))
        while parts and parts[-1] == ":":
            parts.pop()
        whole = self.host.whole(ref.symbol)
        return f"{whole}[{', '.join(parts)}]" if parts else whole

    def known(self, length: Expr | int) -> Expr:
        """A length with the extents that are fixed as numbers."""
        return Expr.of(length).substitute(self.host.program.env)

    def start(self, where: Expr) -> Expr:
        """The place of a variable that walks its whole extent in one tile, which starts at 0."""
        zeros = {f"{v.name}.start": 0 for v in self.stage.args if v != self.cut}
        return where.substitute(zeros)
