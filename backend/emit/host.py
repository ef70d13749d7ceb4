"""The host program: agents in the order in which they are enqueued, as a Python function."""

from __future__ import annotations

from tilelink.backend.emit.body import plain_notify, plain_wait
from tilelink.backend.emit.kernel import Kernel
from tilelink.backend.emit.library import write_library
from tilelink.backend.emit.scope import Program, refuse
from tilelink.backend.emit.text import Writer, condition, render, span
from tilelink.ir import All, Expr, Op, Range, Ref


def _python(text: str) -> str:
    """An expression of a kernel as one of the host, whose numbers are Python's."""
    return text.replace("tl.minimum(", "min(").replace("tl.maximum(", "max(")


class Host:
    """Writes ``def host(call)``."""

    def __init__(self, program: Program, kernels: dict[int, Kernel]) -> None:
        self.program = program
        self.kernels = kernels
        self.writer = Writer()
        self.variables: dict[str, str] = {}

    def text(self) -> str:
        """The whole function."""
        writer = self.writer
        with writer.block("def host(call):"):
            writer.line('"""Enqueue one call: every agent, in program order."""')
            writer.let("rank", "call.rank")
            for op in self.program.op.body:
                self.agent(op)
        writer.prune()
        return writer.text()

    def lookup(self, name: str) -> str:
        """The Python text of a name."""
        if name == "RANK":
            return "rank"
        if name in self.variables:
            return self.variables[name]
        if name in self.program.dynamic:
            return f'call.extent("{name}")'
        raise KeyError(name)

    def expr(self, value: Expr | int) -> str:
        """An expression as Python."""
        if isinstance(value, Expr):
            value = value.substitute(
                {k: v for k, v in self.program.env.items() if k in value.names}
            )
        return _python(render(value, self.lookup))

    def condition(self, value: Expr | int) -> str:
        """A condition as Python."""
        if isinstance(value, Expr):
            value = value.substitute(self.program.env)
        return _python(condition(value, self.lookup))

    def agent(self, op: Op) -> None:
        """One agent; of a declaration only whether `head` can do what it asks."""
        if op.name in ("flag", "counter") and bool(op.get("cleared", op.name == "counter")) != (
            op.name == "counter"
        ):
            raise refuse(op, f"a {op.name} with `cleared = {str(op['cleared']).lower()}`")
        folded = self.program.folded
        begun = folded and op.name == "launch"  # what comes behind the head has it within
        names = tuple(n for n in op.get("after", ()) if not (begun and n == "head"))
        after = f"after={_names(names)}"
        if op.name == "head" and folded:
            self.folded(op)
            return
        if op.name == "head":
            for inner in op.walk():
                _plain(inner, self.program)
            waits = any(o.name == "wait" for o in op.walk())
            self.writer.line(f"call.head(ack_wait={waits})")
        elif op.name == "stream":
            with self.writer.block(f'with call.stream("{op.symbol}", {after}):'):
                self.ops(op.body)
        elif op.name == "launch" and op.get("emitter") == "library":
            write_library(self, op, after)
        elif op.name == "launch":
            self.launch(self.kernels[id(op)], after)
        elif op.name == "collective":
            assert op.ref is not None
            args = [f'"{op["op"]}"', self.view(op, op.ref), self.view(op, op["to"]), after]
            self.writer.call("call.collective(", args)

    def folded(self, head: Op) -> None:
        """A head that launches have within them: its wait is theirs."""
        program = self.program
        heard = [(op.name, str(op.ref), str(op.get("epoch")), len(op.attrs)) for op in head.body]
        # Whoever waits for nobody takes no epoch, which is what flags hold and what a launch ends.
        signals = program.alone or program.streams or bool(program.op.find("flag"))
        needed = signals and not program.slots
        if heard != [("wait", "@ack[0..WORLD]", "-1", 1)] and (heard or needed):
            raise refuse(head, "a folded head that waits for other than all acknowledgements")
        if not program.alone:
            self.writer.line("call.begin()")

    def launch(self, kernel: Kernel, after: str) -> None:
        """The launch of a kernel with its arguments."""
        args: list[str] = []
        for parameter in kernel.parameters:
            if parameter.kind == "context":
                args.append("rank" if parameter.name == "rank" else f"call.{parameter.name}")
            elif parameter.kind == "scalar":
                args.append(f'call.scalar("{parameter.symbol}")')
            elif parameter.kind == "extent":
                args.append(f'call.extent("{parameter.symbol}")')
            else:
                peer = "" if parameter.peer is None else str(parameter.peer)
                axes = len(self.program.shape(parameter.symbol))
                mine = peer and axes > len(parameter.block)
                room = bool(parameter.block) and not peer
                room &= self.program.closed(parameter.symbol) or self.program.endless(
                    parameter.symbol
                )
                whole = self.whole(parameter.symbol, peer, parameter.slot, room)
                whole += "[rank]" if mine else ""
                if parameter.block and not peer and axes > len(parameter.block):
                    whole += ".flatten(0, 1)"  # the parts of all ranks, one below the other
                block = ", ".join(map(str, parameter.block))
                other = ', "gluon"' if kernel.emitter == "gluon" else ""
                made = f"call.descriptor({whole}, ({block}){other})"
                args.append(made if parameter.block else whole)
        writer = self.writer
        writer.line("args = (")
        with writer.indent():
            for arg in args:
                writer.line(f"{arg},")
        writer.line(")")
        tail = [
            kernel.name,
            str(kernel.workers),
            "args",
            f"num_warps={kernel.warps}",
            f"num_stages={kernel.stages}",
            after,
        ]
        writer.call("call.launch(", tail)

    def whole(
        self, symbol: str, peer: str = "", slot: int | None = None, room: bool = False
    ) -> str:
        """The torch view of a tensor, or of a buffer here or on a peer, in one of two slots; ``room``: of all the
        memory that a buffer may take, or of what lies behind an input too."""
        if self.program.symbols[symbol].name == "tensor":
            return f'call.{"room" if room else "tensor"}("{symbol}")'
        where = (f", peer={peer}" if peer else "") + ("" if slot is None else f", slot={slot}")
        return f'call.{"room" if room else "buffer"}("{symbol}"{where})'

    def view(self, op: Op, ref: Ref) -> str:
        """The torch view of a region of this rank."""
        whole, parts = self.region(op, ref)
        return f"{whole}[{', '.join(parts)}]" if parts else whole

    def region(self, op: Op, ref: Ref, peer: str = "") -> tuple[str, list[str]]:
        """The torch view of all of a tensor or buffer, and the index of a region in it."""
        whole = self.whole(ref.symbol, peer)
        parts: list[str] = []
        for item in ref.index:
            if isinstance(item, All):
                parts.append(":")
            elif isinstance(item, Range):
                parts.append(span(self.expr(item.lo), self.expr(item.hi)))
            elif isinstance(item, Expr):
                parts.append(self.expr(item))
            else:
                raise refuse(op, "a tile in a stream")
        while parts and parts[-1] == ":":
            parts.pop()
        return whole, parts

    def ops(self, body: tuple[Op, ...]) -> None:
        """The ops of a stream."""
        for op in body:
            guard = op.get("if")
            if guard is not None:
                with self.writer.block(f"if {self.condition(guard)}:"):
                    self.op(op)
            else:
                self.op(op)

    def op(self, op: Op) -> None:
        """One op of a stream."""
        writer = self.writer
        if op.name == "for_range":
            name = op.args[0].name
            self.variables[name] = name.replace(".", "_")
            low, high = self.expr(op["lo"]), self.expr(op["hi"])
            bounds = high if low == "0" else f"{low}, {high}"
            with writer.block(f"for {self.variables[name]} in range({bounds}):"):
                self.ops(op.body)
            return
        assert op.ref is not None
        _plain(op, self.program)
        if op.name == "wait":
            kind = self.program.symbols[op.symbol].name
            if kind != "counter":
                raise refuse(op, "a stream that waits for a flag between ranks")
            args = [f'"{op.symbol}"', self.index(op), self.expr(op.get("count", 1))]
            writer.call("call.wait_counter(", args)
        elif op.name == "notify":
            peer = self.expr(op["peer"])
            writer.call("call.notify(", [f'"{op.symbol}"', self.index(op), peer])
        elif op.name == "transfer":
            peer = self.expr(op["peer"])
            for name, ref, where in (("source", op.ref, ""), ("target", op["to"], peer)):
                whole, parts = self.region(op, ref, where)
                if parts:
                    writer.call(f"{name} = {whole}[", parts, "]")
                else:
                    writer.line(f"{name} = {whole}")
            writer.line("call.transfer(source, target)")
        else:
            raise refuse(op, f"the op `{op.name}` in a stream")

    def index(self, op: Op) -> str:
        """The element of a flag or counter, as a tuple."""
        assert op.ref is not None
        parts: list[str] = []
        for item in op.ref.index:
            if not isinstance(item, Expr):
                raise refuse(op, "a flag index that is not one element")
            parts.append(self.expr(item))
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"


def _plain(op: Op, program: Program) -> None:
    """Raises CannotEmit for a signal that stream operations and the kernel of `head` do not make."""
    if op.name == "wait":
        plain_wait(op)
        if op.get("proxy"):
            raise refuse(op, "a proxy fence outside of a kernel")
    elif op.name == "notify":
        plain_notify(program, op)
        for key in ("drain", "delay"):
            if op.get(key):
                raise refuse(op, f"a notify with `{key}` outside of a kernel")
        if op.get("scope", "sys") != "sys":
            raise refuse(op, "a notify of a stream for this GPU's kernels only")


def _names(names: tuple[str, ...]) -> str:
    return f"({', '.join(repr(str(n)).replace(chr(39), chr(34)) for n in names)}{',' * (len(names) == 1)})"
