"""The text form: ``print → parse → print`` is the identity.

One op a line::

    %acc.1 = for_tiles (%acc) {extent = [K]} do (%k: tile, %acc.0: fp32[m, n]) {
      %a = load @A[%m, %k] : bf16[m, k]
      ...
    }

Grammar, in order: results ``=``, name, reference, operands in parentheses, attributes in braces,
``:`` result types, blocks (``do (arguments) { ops }``). ``#`` starts a comment.
"""

from __future__ import annotations

import re
from typing import Any

from tilelink.errors import IRSyntaxError, Source, Span
from tilelink.ir.expr import PRECEDENCE, Expr, binary
from tilelink.ir.node import All, At, Block, Broadcast, Index, Op, Range, Ref, Value, normalise
from tilelink.ir.types import Type

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
      | (?P<float>-?\d+\.\d+(?:[eE][-+]?\d+)?|-?\d+[eE][-+]?\d+|-?inf\b|-?nan\b)
      | (?P<int>\d+)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<value>%[A-Za-z_0-9][\w.]*)
      | (?P<symbol>@[A-Za-z_][\w.]*)
      | (?P<word>[A-Za-z_](?:\w|\.(?=[A-Za-z_0-9]))*)
      | (?P<punct>\.\.|==|!=|<=|>=|[-+*/%<>=()\[\]{},:])""",
    re.VERBOSE,
)


# Lines of ops that have been printed, by identity and depth; with the op, so that its identity is not used again.
Printed = dict[tuple[int, int], tuple[Op, list[str]]]


def print_ir(op: Op, printed: Printed | None = None) -> str:
    """The text of ``op`` and all inside it, ending in a newline.

    ``printed``: what earlier calls have printed, and then this one too. Programs that share most of their ops are
    printed faster with it.
    """
    lines: list[str] = []
    _print(op, 0, lines, printed)
    return "\n".join(lines) + "\n"


def op_line(op: Op) -> str:
    """The text of ``op`` alone, on one line, without its blocks."""
    parts = []
    if op.results:
        parts.append(", ".join(map(str, op.results)) + " =")
    parts.append(op.name)
    if op.ref is not None:
        parts.append(str(op.ref))
    if op.operands:
        parts.append("(" + ", ".join(map(str, op.operands)) + ")")
    if op.attrs:
        parts.append("{" + ", ".join(f"{k} = {_attribute(v)}" for k, v in op.attrs) + "}")
    if op.results:
        parts.append(": " + ", ".join(str(r.type) for r in op.results))
    return " ".join(parts)


def _print(op: Op, depth: int, lines: list[str], printed: Printed | None) -> None:
    if printed is not None:
        held = printed.get((id(op), depth))
        if held is None:
            held = printed[id(op), depth] = op, []
            _print_new(op, depth, held[1], printed)
        lines += held[1]
        return
    _print_new(op, depth, lines, printed)


def _print_new(op: Op, depth: int, lines: list[str], printed: Printed | None) -> None:
    pad = "  " * depth
    if not op.blocks:
        lines.append(pad + op_line(op))
        return
    lead = pad + op_line(op)
    for block in op.blocks:
        args = f" ({', '.join(f'{a}: {a.type}' for a in block.args)})" if block.args else ""
        lines.append(f"{lead} do{args} {{")
        for child in block.ops:
            _print(child, depth + 1, lines, printed)
        lead = pad + "}"
    lines.append(pad + "}")


def _attribute(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_attribute, value)) + "]"
    if isinstance(value, int) and value < 0:
        return str(Expr.const(value))
    return repr(value) if isinstance(value, float) else str(value)


def parse_ir(text: str, name: str = "<ir>") -> Op:
    """The op that ``text`` describes, its spans pointing into ``text``; IRSyntaxError where it is malformed."""
    parser = _Parser(Source(name, text))
    try:
        op = parser.op()
    except RecursionError:
        raise IRSyntaxError(
            parser.span, expected="less nesting", found="more than Python can follow"
        ) from None
    if parser.kind != "end":
        parser.fail("the end of the text")
    return op


def parse_expr(text: str) -> Expr:
    """The expression that ``text`` holds; IRSyntaxError where it holds none."""
    parser = _Parser(Source("<expression>", text))
    expr = parser.expr()
    if parser.kind != "end":
        parser.fail("the end of the expression")
    return expr


class _Parser:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.tokens: list[tuple[str, str, Span]] = []
        self.at = 0
        self.types: dict[str, Type] = {}
        self._scan()

    def _scan(self) -> None:
        text, position, line, start = self.source.text, 0, 1, 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            column = position - start + 1
            if match is None or match.lastgroup is None:
                bad = Span(self.source, line, column, column + 1)
                raise IRSyntaxError(bad, expected="an op", found=repr(text[position]))
            token = match.group()
            if match.lastgroup != "space":
                span = Span(self.source, line, column, column + len(token))
                self.tokens.append((match.lastgroup, token, span))
            newlines = token.count("\n")
            if newlines:
                line += newlines
                start = position + token.rindex("\n") + 1
            position = match.end()
        end = Span(self.source, line, position - start + 1, position - start + 2)
        self.tokens.append(("end", "the end of the text", end))

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def token(self) -> str:
        return self.tokens[self.at][1]

    @property
    def span(self) -> Span:
        return self.tokens[self.at][2]

    def fail(self, expected: str) -> None:
        raise IRSyntaxError(self.span, expected=expected, found=f"`{self.token}`")

    def take(self, kind: str, expected: str) -> str:
        if self.kind != kind:
            self.fail(expected)
        token = self.token
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.token == token and self.kind in ("punct", "word"):
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            self.fail(f"`{token}`")

    def op(self) -> Op:
        names: list[str] = []
        if self.kind == "value":
            names.append(self.take("value", "a result")[1:])
            while self.accept(","):
                names.append(self.take("value", "a result")[1:])
            self.expect("=")
        first = self.span
        name = self.take("word", "the name of an op")
        ref = self.ref() if self.kind == "symbol" else None
        last = self.tokens[self.at - 1][2]
        end = last.end if last.line == first.line else first.end
        operands = self.operands() if self.token == "(" else ()
        attrs = self.attributes() if self.token == "{" else ()
        types: list[Type] = []
        if self.accept(":"):
            types.append(self.type())
            while self.accept(","):
                types.append(self.type())
        if len(types) != len(names):
            self.fail(f"{len(names)} result types")
        blocks: list[Block] = []
        while self.accept("do"):
            blocks.append(self.block())
        results = tuple(self.define(n, t) for n, t in zip(names, types, strict=True))
        span = Span(self.source, first.line, first.column, end)
        return Op(name, results, ref, operands, attrs, tuple(blocks), span)

    def define(self, name: str, type_: Type) -> Value:
        self.types[name] = type_
        return Value(name, type_)

    def use(self) -> Value:
        span = self.span
        name = self.take("value", "a value")[1:]
        if name not in self.types:
            raise IRSyntaxError(span, expected="a value defined above", found=f"`%{name}`")
        return Value(name, self.types[name])

    def operands(self) -> tuple[Value, ...]:
        self.expect("(")
        values = [self.use()]
        while self.accept(","):
            values.append(self.use())
        self.expect(")")
        return tuple(values)

    def attributes(self) -> tuple[tuple[str, Any], ...]:
        self.expect("{")
        found: dict[str, Any] = {}
        while not self.accept("}"):
            if found:
                self.expect(",")
            span = self.span
            key = self.take("word", "an attribute name")
            if key in found:
                raise IRSyntaxError(span, expected="each attribute once", found=f"`{key}` again")
            self.expect("=")
            found[key] = normalise(self.attribute())
        return tuple(sorted(found.items()))

    def attribute(self) -> Any:
        if self.kind == "string":
            raw = self.take("string", "a string")[1:-1]
            return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], raw)
        if self.kind == "float":
            return float(self.take("float", "a number"))
        if self.kind == "symbol":
            return self.ref()
        if self.token in ("true", "false"):
            return self.take("word", "a truth value") == "true"
        if self.accept("["):
            items: list[Any] = []
            while not self.accept("]"):
                if items:
                    self.expect(",")
                items.append(self.attribute())
            return tuple(items)
        return self.expr()

    def type(self) -> Type:
        dtype = self.take("word", "a type")
        shape: list[str] = []
        if self.accept("["):
            shape.append(str(self.expr()))
            while self.accept(","):
                shape.append(str(self.expr()))
            self.expect("]")
        return Type(dtype, tuple(shape))

    def block(self) -> Block:
        args: list[Value] = []
        if self.accept("("):
            while not self.accept(")"):
                if args:
                    self.expect(",")
                name = self.take("value", "a block argument")[1:]
                self.expect(":")
                args.append(self.define(name, self.type()))
        self.expect("{")
        ops: list[Op] = []
        while not self.accept("}"):
            if self.kind == "end":
                self.fail("an op or `}`")
            ops.append(self.op())
        return Block(tuple(args), tuple(ops))

    def ref(self) -> Ref:
        symbol = self.take("symbol", "a symbol")[1:]
        index: list[Index] = []
        if self.accept("["):
            index.append(self.index())
            while self.accept(","):
                index.append(self.index())
            self.expect("]")
        return Ref(symbol, tuple(index))

    def index(self) -> Index:
        if self.accept(":"):
            return All()
        if self.accept("+"):
            return Broadcast()
        if self.kind == "value":
            value = self.use()
            return At(value, self.expr()) if self.accept("at") else value
        lo = self.expr()
        return Range(lo, self.expr()) if self.accept("..") else lo

    def expr(self, level: int = 1) -> Expr:
        left = self.atom()
        while self.token in PRECEDENCE and self.kind in ("punct", "word"):
            op, mine = self.token, PRECEDENCE[self.token]
            if mine < level:
                break
            self.at += 1
            left = binary(op, left, self.expr(mine + 1))
        return left

    def atom(self) -> Expr:
        if self.kind == "int" and len(self.token) > 18:
            self.fail("a number below 10^18")
        if self.kind == "int":
            return Expr.const(int(self.take("int", "a number")))
        if self.accept("("):
            inner = self.expr()
            self.expect(")")
            return inner
        word = self.take("word", "an expression")
        if word in ("min", "max") and self.accept("("):
            left = self.expr()
            self.expect(",")
            right = self.expr()
            self.expect(")")
            return binary(word, left, right)
        if self.accept("["):
            index = [self.expr()]
            while self.accept(","):
                index.append(self.expr())
            self.expect("]")
            return Expr("table", (word, *index))
        return Expr.name(word)
