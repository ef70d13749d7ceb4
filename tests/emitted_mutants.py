"""Mutants of the text of an emitted module: small edits of its kernels and its host function.

Every edit is made in the text at a place of the syntax tree, so that what is compared is what a reader
of the module would see. Only texts that still parse are produced.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

EVENT = re.compile(
    r"device\.\w*(wait|notify|push|queue|finish|drain|pointer|context|open|close|spoil)"
    r"|\.load\(|\.store\(|tl\.load\("
    r"|tl\.store\(|tl\.dot\(|call\.(head|begin|transfer|notify|wait|launch|collective)|pending ="
    r"|roles\.(ring|turns|pair|tiles|room|claim|fetch|take|give|turn|pass_turn|meet|store|send)\(|hopper\."
    r"|roles\.(fetch_parts|fetch_remote|sum_landed)\(|roles\.delayed_|warp_specialize"
    r"|roles\.(orders|order|ordered|forward|forwarded|all_forwarded)\("
    r"|number \+=|step \+=|own \+=|at \+=|at = own|met \+="
)
CALLS = (
    "device.",
    "roles.delayed",
    "roles.room",
    "roles.send",
    "roles.sum",
    "tl.store",
    "tl.dot",
    "tl.where",
    "roles.fetch_",
    "roles.order",
    "roles.forward",
    "roles.all_forwarded",
)
# What a kernel with roles has two of, one for the operands and one for parts of sums.
TWINS = {"ring": "landing", "turns": "sums", "number": "own"}
TWINS |= {new: old for old, new in TWINS.items()}
PASSED = re.compile(r"roles\.(sum_landed|take|give)\(")
FLIPS = {ast.FloorDiv: "%", ast.Mod: "//", ast.Add: "-", ast.Sub: "+"}
COMPARE = {ast.Lt: "<=", ast.LtE: "<", ast.Eq: "!=", ast.NotEq: "==", ast.GtE: ">"}


@dataclass(frozen=True)
class Mutant:
    """One edit: its kind, the line that it is made in, what it does, and the whole text after it."""

    kind: str
    line: int
    what: str
    text: str


class Editor:
    """Edits of one text by positions of its tree."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.bytes = text.encode()

    def place(self, node: ast.AST) -> tuple[int, int]:
        """The bytes of a node."""
        line, column, end, last = (
            int(getattr(node, name))
            for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")
        )
        return self.starts[line - 1] + column, self.starts[end - 1] + last

    def replaced(self, node: ast.AST, new: str) -> str:
        """The text with a node replaced."""
        first, last = self.place(node)
        return (self.bytes[:first] + new.encode() + self.bytes[last:]).decode()

    def of(self, node: ast.AST) -> str:
        """The text of a node."""
        first, last = self.place(node)
        return self.bytes[first:last].decode()

    def lines(self, node: ast.stmt) -> tuple[int, int]:
        """The bytes of the whole lines of a statement."""
        assert node.end_lineno is not None
        return self.starts[node.lineno - 1], self.starts[node.end_lineno]

    def parses(self, part: ast.stmt, text: str) -> bool:
        """Whether a text can be read in which only this part, a function or a statement of one, was edited."""
        first, last = self.lines(part)
        changed = text.encode()[first : last - len(self.bytes) or None].decode()
        try:
            ast.parse(f"if True:\n{changed}" if part.col_offset else changed)
        except SyntaxError:
            return False
        return True


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """The kernels and the host function."""
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name != "run"]


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """All blocks of statements in a function."""
    for child in ast.walk(node):
        for name in ("body", "orelse"):
            block = getattr(child, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def mutants(text: str) -> Iterator[Mutant]:
    """All mutants of a text, in a fixed order."""
    editor = Editor(text)
    for function in functions(editor.tree):
        for made in _statements(editor, function):
            if made.text != text and editor.parses(function, made.text):
                yield made
        # Of a function only the statement is parsed anew in which an expression was edited.
        inside = {
            line: node
            for node in ast.walk(function)
            if isinstance(node, ast.stmt) and not hasattr(node, "body")
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        for made in _expressions(editor, function):
            if made.text != text and editor.parses(inside.get(made.line, function), made.text):
                yield made
    yield from _carried(text)


def _statements(editor: Editor, function: ast.FunctionDef) -> Iterator[Mutant]:
    for block in blocks(function):
        for number, node in enumerate(block):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            first, last = editor.lines(node)
            code = editor.bytes[first:last]
            shown = code.decode().strip().splitlines()[0]
            simple = isinstance(node, ast.Expr | ast.Assign | ast.AugAssign)
            # Calls of `tl.dot` and waits are what a duplicate changes; a plain assignment is not.
            if EVENT.search(code.decode()):
                rest = b"" if len(block) > 1 else code[: len(code) - len(code.lstrip())] + b"pass\n"
                gone = (editor.bytes[:first] + rest + editor.bytes[last:]).decode()
                yield Mutant("delete", node.lineno, shown, gone)
                twice = (editor.bytes[:last] + code + editor.bytes[last:]).decode()
                if not simple or not re.search(r"\.load\(|pointer\(|context\(|pending =", shown):
                    yield Mutant("duplicate", node.lineno, shown, twice)
            if number + 1 < len(block):
                after = block[number + 1]
                begin, end = editor.lines(after)
                other = editor.bytes[begin:end]
                both = all(EVENT.search(c.decode()) for c in (code, other))
                # Two loads in a row may stand in either order, and so may two waits, and two flushes: each of
                # them orders all that the worker stored before, and neither is waited for by the other.
                alike = any(
                    all(any(word in c for word in words) for c in (code, other))
                    for words in (
                        (b".load(", b"roles.fetch("),
                        (b"token += device.",),
                        (b"device.delayed_",),
                    )
                )
                # Nor is a flush behind the worker's leave a mutant: leaving tells that it reads no more, what it
                # holds back tells of what it stored, and nobody waits for one to hear of the other.
                alike |= b"device.delayed_" in code and b"device.finish_arrive(" in other
                if both and not alike:
                    swapped = editor.bytes[:first] + other + editor.bytes[last:begin] + code
                    yield Mutant(
                        "swap", node.lineno, shown, (swapped + editor.bytes[end:]).decode()
                    )
            yield from _moved_turn(editor, block, number)
        loads = [n for n in block if isinstance(n, ast.Assign) and ".load(" in editor.of(n)]
        for load in loads[:2]:
            yield from _hoisted(editor, function, load)


def _moved_turn(editor: Editor, block: list[ast.stmt], number: int) -> Iterator[Mutant]:
    """A turn that is passed on too early, or waited for too late."""
    code = editor.of(block[number])
    if not code.startswith(("roles.turn(", "roles.pass_turn(")):
        return
    early = code.startswith("roles.pass")
    others = reversed(block[:number]) if early else block[number + 1 :]
    over = next((n for n in others if PASSED.search(editor.of(n))), None)
    if over is None:
        return
    first, last = editor.lines(block[number])
    line = editor.bytes[first:last]
    at = editor.lines(over)[0 if early else 1]
    rest = editor.bytes[:first] + editor.bytes[last:]
    at -= 0 if early else last - first
    yield Mutant("turn", block[number].lineno, code, (rest[:at] + line + rest[at:]).decode())


def _hoisted(editor: Editor, function: ast.FunctionDef, load: ast.Assign) -> Iterator[Mutant]:
    waits = [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.AugAssign) and "_wait(" in editor.of(n) and n.lineno < load.lineno
    ]
    if not waits:
        return
    first, _ = editor.lines(waits[-1])
    begin, end = editor.lines(load)
    code = editor.bytes[begin:end].strip()
    indent = b" " * waits[-1].col_offset
    moved = editor.bytes[:first] + indent + code + b"\n" + editor.bytes[first:begin]
    yield Mutant("hoist", load.lineno, code.decode(), (moved + editor.bytes[end:]).decode())


def _expressions(editor: Editor, function: ast.FunctionDef) -> Iterator[Mutant]:
    start = ast.get_docstring(function) is not None
    body = [n for s in function.body[start:] for n in ast.walk(s)]
    # How deep a loop is pipelined and what a record of a time-out says is no part of what is proven.
    skipped: set[int] = set()
    known = {n.id for n in body if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
    for node in body:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "tl.range":
                skipped |= {id(n) for k in node.keywords for n in ast.walk(k)}
            if name.endswith("_wait"):
                at = {"device.peer_tile_wait": 4, "device.consumer_tile_wait": 3}.get(name)
                if at is not None and at < len(node.args):
                    skipped |= {id(n) for n in ast.walk(node.args[at])}
    for node in body:
        if id(node) in skipped:
            continue
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant):
            if node.value is True or node.value is False:
                new = str(not node.value)
                yield Mutant("flag", line, f"{node.value} -> {new}", editor.replaced(node, new))
            elif isinstance(node.value, int):
                new = str(node.value + 1)
                yield Mutant("number", line, f"{node.value} -> {new}", editor.replaced(node, new))
                if node.value > 1:
                    new = str(node.value // 2)
                    yield Mutant(
                        "number", line, f"{node.value} -> {new}", editor.replaced(node, new)
                    )
            elif isinstance(node.value, str) and "." in node.value:
                new = repr(node.value + "x")
                yield Mutant("name", line, f"{node.value} -> {new}", editor.replaced(node, new))
        elif isinstance(node, ast.Name) and node.id == "rank" and isinstance(node.ctx, ast.Load):
            yield Mutant("rank", line, "rank -> rank + 1", editor.replaced(node, "(rank + 1)"))
        elif (
            isinstance(node, ast.Name)
            and TWINS.get(node.id) in known
            and isinstance(node.ctx, ast.Load)
        ):
            new = TWINS[node.id]
            yield Mutant("twin", line, f"{node.id} -> {new}", editor.replaced(node, new))
        elif isinstance(node, ast.Name) and node.id == "token" and isinstance(node.ctx, ast.Load):
            yield Mutant("token", line, "token -> 0", editor.replaced(node, "0"))
        elif isinstance(node, ast.BinOp) and type(node.op) in FLIPS:
            new = f"{editor.of(node.left)} {FLIPS[type(node.op)]} {editor.of(node.right)}"
            yield Mutant("operator", line, new, editor.replaced(node, f"({new})"))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
            sides = editor.of(node.left), editor.of(node.comparators[0])
            new = f"{sides[0]} {COMPARE[type(node.ops[0])]} {sides[1]}"
            yield Mutant("compare", line, new, editor.replaced(node, new))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "ctx.epoch":
            for new in ("ctx.epoch - 1", "ctx.epoch + 1"):
                yield Mutant("epoch", line, new, editor.replaced(node, f"({new})"))
        elif isinstance(node, ast.keyword) and node.arg == "after":
            yield Mutant("after", line, "after -> ()", editor.replaced(node.value, "()"))
        elif isinstance(node, ast.keyword) and node.arg == "mask":
            text = editor.replaced(node, "mask=None")
            yield Mutant("mask", line, "mask -> None", text)
        elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
            yield from _reordered(editor, node)
        elif isinstance(node, ast.Call):
            yield from _arguments(editor, node)


def _reordered(editor: Editor, node: ast.Tuple) -> Iterator[Mutant]:
    parts = [editor.of(e) for e in node.elts]
    for n in range(len(parts) - 1):
        if parts[n] != parts[n + 1]:
            new = [*parts[:n], parts[n + 1], parts[n], *parts[n + 2 :]]
            text = editor.replaced(node, f"({', '.join(new)})")
            yield Mutant("reorder", node.lineno, f"{parts[n]} <-> {parts[n + 1]}", text)


def _arguments(editor: Editor, node: ast.Call) -> Iterator[Mutant]:
    name = ast.unparse(node.func)
    other = {
        "device.peer_tile_wait": None,
        "device.peer_tile_notify": "device.rank_notify",
        "device.producer_tile_notify": "device.drain_tma_stores",
        "roles.delayed_peer_notify": "device.delayed_peer_notify",
        "roles.delayed_tile_notify": "device.producer_tile_notify",
        "roles.delayed_counted_notify": "device.counted_tile_notify",
        "tl.minimum": "tl.maximum",
        "tl.int64": "tl.int32",
    }.get(name)
    if other:
        yield Mutant("call", node.lineno, f"{name} -> {other}", editor.replaced(node.func, other))
    if name in ("tl.cast", "device.pointer", "device.peer_pointer") and node.args:
        new = {"tl.int64": "tl.int32", "tl.bfloat16": "tl.float32"}.get(editor.of(node.args[-1]))
        if new and name != "tl.cast":
            yield Mutant("type", node.lineno, f"-> {new}", editor.replaced(node.args[-1], new))
    if len(node.args) >= 2 and name.startswith(CALLS):
        for n in range(len(node.args) - 1):
            a, b = (editor.of(x) for x in node.args[n : n + 2])
            if a == b or (name.endswith("_wait") and n + 1 >= 3):
                continue
            first, last = editor.place(node.args[n])[0], editor.place(node.args[n + 1])[1]
            text = editor.bytes[:first] + f"{b}, {a}".encode() + editor.bytes[last:]
            yield Mutant("exchange", node.lineno, f"{name}: {a} <-> {b}", text.decode())


def _carried(text: str) -> Iterator[Mutant]:
    """Edits of the program that a module carries for the runtime."""
    first, last = text.index('TEXT = r"""'), text.index('"""\n', text.index('TEXT = r"""') + 12)
    for match in re.finditer(r"(?<=offset = )\d+|(?<=value = )\d+|(?<=dims = \[)\w+", text):
        if first < match.start() < last:
            word = match[0]
            new = str(int(word) + 1024) if word.isdecimal() else "2"
            line = text.count("\n", 0, match.start()) + 1
            changed = text[: match.start()] + new + text[match.end() :]
            yield Mutant("carried", line, f"{word} -> {new}", changed)
