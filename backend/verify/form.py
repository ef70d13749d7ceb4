"""What a fused program must look like before its rows mean anything: which op stands where, and shapes.

The parser takes any op anywhere, and the expansion follows the places that docs/ir.md names. A store in
a place that it does not visit would be an access that no rule sees.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from tilelink.backend.copying import copies_of
from tilelink.backend.expand import environment, evaluate, loop_tiles, tile_sizes
from tilelink.backend.passes.bind_emitter import (
    Unfit,
    check_copies,
    landing_stages,
    split_product,
)
from tilelink.backend.product import NotAProduct, product_of
from tilelink.backend.verify.errors import UndecidedError
from tilelink.ir import All, At, Broadcast, Expr, Op, Range, Ref, Value, dynamic_extents, parse_ir
from tilelink.ir.layout import ACK, ENCODINGS, WORD
from tilelink.ir.node import DECLARATIONS
from tilelink.schedules.roles import LEAST_LANDING, MOST_LANDING, TURNS

AGENTS = ("head", "stream", "launch", "collective")
LOOPS = ("for_tiles", "for_range")
ACCESSES = ("load", "load_sum", "store", "transfer")
# What copy engines and stream memory operations can do.
STREAM = ("wait", "notify", "transfer", "for_range", "for_tiles", "yield", "constant", "bound")
STREAM_SCALARS = ("add", "sub", "mul", "floordiv", "mod", "minimum", "maximum")
WORDS = {
    "scope": ("sys", "gpu"),
    "order": ("relaxed",),
    "compare": ("equal",),
    "via": ("tma",),
    "delay": (1,),
    "queue": ("static", "dynamic"),
    "space": ("symmetric", "local"),
}
SWITCHES = ("barrier", "proxy", "drain", "wide", "cleared", "folded", "empty", "remote", "ends")
Dim: TypeAlias = "str | int | None"  # a tile's length by its name, a number, or unknown


def check_form(program: Op) -> None:
    """Raise UndecidedError for an op out of place, a word of another kind, or shapes that differ."""
    for op in program.body:
        if op.name not in (*DECLARATIONS, *AGENTS):
            _fail(op, "it stands outside of every agent")
        if op.name in DECLARATIONS and op.ref is None:
            _fail(op, "it declares nothing")
    symbols = [op.symbol for op in program.body if op.name in DECLARATIONS and op.ref is not None]
    if len(symbols) != len(set(symbols)):
        twice = next(s for s in symbols if symbols.count(s) > 1)
        _fail(program.body[symbols.index(twice)], f"`@{twice}` is declared twice")
    checker = _Checker(program)
    for agent in program.body:
        if agent.name == "launch":
            checker.launch(agent)
        elif agent.name in AGENTS:
            checker.block(agent.body, agent.name)
            if agent.name == "head":
                checker.head(agent)
    _check_folded(program)
    _check_words(program)


class _Checker:
    def __init__(self, program: Op) -> None:
        self.program = program
        self.env = environment(program)
        known = (op for op in program.body if op.name in DECLARATIONS)
        self.declared = {op.symbol: op for op in known}
        self.lengths: dict[str, Dim] = {}
        self.tiles: set[str] = set()

    def launch(self, launch: Op) -> None:
        self.roles(launch)
        for place, child in enumerate(launch.body):
            if child.name not in ("stage", "flush", "finish"):
                _fail(child, "a launch holds stages, flushes between them, and a finish")
            if child.name == "finish" and place != len(launch.body) - 1:
                _fail(child, "a finish comes last in its launch")
            self.words(child)
            self.tiles |= {v.name for v in child.args if v.type.is_tile}
            if child.name == "stage":
                self.queue(child)
                self.held_back(child)
            if child.name != "flush":
                self.block(child.body, child.name)
        if launch.get("emitter") == "library":
            self.library(launch)

    def queue(self, stage: Op) -> None:
        """Its length is made of the program's extents, which are the same on all ranks."""
        for extent in stage.get("extent", ()):
            if not Expr.of(extent).names <= self.env.keys():
                _fail(stage, f"its extent `{extent}` is not made of the program's extents")
        if stage.get("positions") is None:
            return
        dynamic = {op.symbol for op in dynamic_extents(self.program)}
        named = set().union(*(Expr.of(e).names for e in stage["extent"]))
        if stage.get("queue", "static") != "static" or named & dynamic:
            _fail(stage, "some `positions` are of a static queue whose length is known")
        ranks = np.arange(int(self.program["world"]), dtype=np.int64)
        whole = stage.with_attrs(positions=None)
        (rows, *_) = loop_tiles(whole, {**self.env, "RANK": ranks}, len(ranks))
        (lo, hi), count = stage["positions"], rows.start.shape[1]
        if not 0 <= lo < hi <= count:
            _fail(stage, f"it has no positions {lo}..{hi}, of {count}")

    def library(self, launch: Op) -> None:
        """The library's own kernel: one product a task, of whole matrices or of rows of one segment."""
        names = [op.name for op in launch.body]
        if names not in (["stage"], ["stage", "finish"]):
            _fail(launch, "a launch of the library holds one stage, and at most a finish")
        if int(launch["workers"]) != 1 or launch.get("resident") is not None:
            _fail(launch, "the library runs its products one after another: one worker")
        stage = launch.body[0]
        if stage.get("queue", "static") != "static" or stage.get("workers") is not None:
            _fail(stage, "the library takes its tasks in their order")
        if stage.get("positions") is not None:
            _fail(stage, "the library takes all tasks of its queue")
        try:
            product = product_of(stage)
        except NotAProduct as error:
            _fail(error.op, f"no product of the library: {error.detail}")
        if product.store.get("peer") is not None:
            _fail(product.store, "the library stores on its own rank")
        at, loop = next((n, op) for n, op in enumerate(stage.body) if op.blocks)
        for number, op in enumerate(stage.body):
            if op.name == "wait" and number > at:
                _fail(op, "between products of the library, a wait stands before its product")
            if op.name == "notify" and product.store in stage.body[number:]:
                _fail(op, "between products of the library, a notify stands behind its product")
        for loops in (stage, loop):
            self.undivided(loops)

    def undivided(self, loop: Op) -> None:
        """Each variable is walked in one tile, along the axis of segments in one a segment."""
        axis, segment = int(loop.get("axis", 0)), loop.get("segment")
        if loop.name != "stage" and segment is not None:
            _fail(loop, "a product of the library goes over all of its depth at once")
        for number, (extent, tile) in enumerate(
            zip(loop["extent"], tile_sizes(loop, self.env), strict=True)
        ):
            cut = number == axis and segment is not None
            length = self.length(Expr.of(segment if cut else extent))
            if not isinstance(length, int) or tile < length:
                _fail(loop, f"a tile of {tile} of {length} cuts a product of the library")

    def roles(self, launch: Op) -> None:
        """With roles, a task's waits and loads up to its main loop are the loader's, the rest a group's.

        In a stage of another form the text would not say what comes before what.
        """
        gluon, roles = launch.get("emitter") == "gluon", launch.get("roles") is not None
        stages = [child for child in launch.body if child.name == "stage"]
        copying = bool(stages) and all(copies_of(child) for child in stages)
        if roles > gluon or (gluon and not roles and not copying):
            detail = (
                "roles are for the emitter `gluon`, which without them has kernels that copy alone"
            )
            _fail(launch, detail)
        try:
            for child in stages if roles else ():
                if not copies_of(child):
                    split_product(child)
            if roles:
                check_copies(launch)
        except Unfit as unfit:
            _fail(unfit.op, f"with roles, a stage has no {unfit.detail.removeprefix('a ')}")
        if roles and launch["roles"] != TURNS and any(map(copies_of, stages)):
            _fail(launch, "workers copy beside two warp groups that take turns, and no others")
        self.landing(launch)

    def landing(self, launch: Op) -> None:
        """A ring of their own is for parts of sums that a launch has, of boxes alike, and groups in turns."""
        if launch.get("landing") is None:
            return
        least, most = LEAST_LANDING, MOST_LANDING
        if launch.get("roles") != TURNS:
            _fail(launch, "parts have a ring of their own where two warp groups take turns")
        if not least <= int(launch["landing"]) <= most:
            _fail(launch, f"a ring for parts of sums has {least} to {most} boxes")
        if not landing_stages(launch):
            _fail(
                launch,
                "a ring for parts of sums, of which it has none, or not one behind the other",
            )

    def head(self, head: Op) -> None:
        """The kernel of `head` waits for the acknowledgements of the call before, and does nothing else."""
        for op in head.body:
            flag = self.declared.get(op.symbol) if op.ref is not None else None
            acks = flag is not None and flag.get("offset") in (None, ACK * WORD)
            if op.name != "wait" or not acks or op.get("if") is not None:
                _fail(op, "`head` can only wait for the acknowledgements of the call before")

    def held_back(self, stage: Op) -> None:
        """A notify that is held back stands behind all accesses of its task, which it releases.

        It is performed when a task comes to its first store: in front of that, its own could be meant.
        """
        for place, op in enumerate(stage.body):
            if not any(o.name == "notify" and o.get("delay") is not None for o in op.walk()):
                continue
            later = [o for after in stage.body[place + 1 :] for o in after.walk()]
            told = not op.blocks or all(o.name == "notify" for o in op.body)
            if not told or any(o.name in ACCESSES for o in later):
                _fail(op, "a notify with `delay` comes behind every access of its task")

    def block(self, ops: tuple[Op, ...], place: str) -> None:
        for op in ops:
            if op.name in (*AGENTS, *DECLARATIONS, "stage", "finish", "flush"):
                _fail(op, f"it cannot stand in a {place}")
            if op.blocks and op.name not in LOOPS:
                _fail(op, "it has a body of its own")
            if place == "stream" and op.name not in (*STREAM, *STREAM_SCALARS):
                _fail(op, "a copy engine cannot do it")
            self.words(op)
            if op.name in LOOPS:
                if not op.args:
                    _fail(op, "a loop without a variable")
                self.tiles |= {v.name for v in op.args if v.type.is_tile}
                self.block(op.body, place)
            elif op.name in ("load", "load_sum", "store"):
                self.memory(op)
            elif op.name in ("wait", "notify"):
                self.whole(op, op.ref)
            elif op.name == "dot":
                self.dot(op)

    def words(self, op: Op) -> None:
        for key, value in op.attrs:
            if key in WORDS and value not in WORDS[key]:
                _fail(op, f"`{key} = {value}` means nothing")
            if key in SWITCHES and not isinstance(value, bool):
                _fail(op, f"`{key}` is true or false")
        if op.name == "load" and (op.get("when") is None) != (op.get("own") is None):
            _fail(op, "`own` and `when` come together")

    def whole(self, op: Op, ref: Ref | None) -> None:
        """Every axis of an array of words is indexed."""
        if ref is None:
            _fail(op, "it names nothing")
        elif len(ref.index) != len(self.declared[ref.symbol]["dims"]):
            _fail(op, f"`@{ref.symbol}` has {len(self.declared[ref.symbol]['dims'])} axes")

    def memory(self, op: Op) -> None:
        if op.ref is None or (not op.operands if op.name == "store" else not op.results):
            _fail(op, "it lacks its memory or its value")
            return
        kind = op.operands[0].type if op.name == "store" else op.results[0].type
        have = [self.dim(d) for d in kind.shape]
        if op.name == "store" and not have:
            return  # a scalar fills the region
        own = op.get("own")
        if op.name != "store" and op.operands:
            self.folded(op)
        if op.get("remote"):
            self.remote(op)
        for ref in (op.ref, own):
            if not isinstance(ref, Ref):
                continue
            want = self.region(ref)
            if op.name == "load_sum" and ref is op.ref and not op.get("remote"):
                want = want[1:]
            same = len(have) == len(want) and all(
                a is None or b is None or a == b for a, b in zip(have, want, strict=True)
            )
            if not same:
                shape = ", ".join("?" if d is None else str(d) for d in want)
                detail = f"@{ref.symbol} has [{shape}] there, the value is {kind}"
                _fail(op, detail)

    def remote(self, op: Op) -> None:
        """A sum of what lies at one place of all ranks' memories, this one's among them."""
        assert op.ref is not None
        declared = self.declared[op.symbol]
        if declared.name != "buffer" or declared.get("space") != "symmetric":
            _fail(op, "other ranks read symmetric buffers alone")
        if op.get("own") is not None or declared.get("words"):
            _fail(op, "a `remote` sum has no `own`, and is of no words")

    def folded(self, op: Op) -> None:
        """A sum of which this rank's part is a value: a tile like the others, rounded like them."""
        assert op.ref is not None
        mine, found = op.operands[0].type, op.results[0].type
        if op.name != "load_sum" or len(op.operands) > 1 or op.get("own") is not None:
            _fail(op, "only a `load_sum` without `own` takes an operand, one")
        if list(map(self.dim, mine.shape)) != list(map(self.dim, found.shape)):
            _fail(op, f"it adds {mine} to parts that are {found}")
        if mine.dtype != self.declared[op.ref.symbol]["dtype"]:
            _fail(op, f"its own part is {mine.dtype}, which is not rounded as the others are")

    def region(self, ref: Ref) -> list[Dim]:
        """The shape of what ``ref`` names; axes without an index are whole."""
        declared = self.declared[ref.symbol]
        dims = list(declared["dims"])
        found: list[Dim] = []
        axis = 0
        for item in ref.index:
            if isinstance(item, Broadcast):
                found.append(1)
                continue
            value = item.value if isinstance(item, At) else item
            if isinstance(item, All):
                found.append(self.axis(declared, axis) if axis < len(dims) else None)
            elif isinstance(item, Range):
                found.append(self.length(item.hi - item.lo))
            elif isinstance(value, Value) and value.type.is_tile:
                found.append(value.name)
            elif isinstance(value, Value):
                found += [self.dim(d) for d in value.type.shape]
            axis += 1
        found += [self.axis(declared, a) for a in range(axis, len(dims))]
        return found

    def axis(self, declared: Op, axis: int) -> Dim:
        length = self.length(declared["dims"][axis])
        over = declared.get("over")
        held = declared.name == "tensor" and declared.get("role") in ("in", "out", "inout")
        if held and over == axis and isinstance(length, int):
            return length // self.env["WORLD"]
        return length

    def dim(self, text: str) -> Dim:
        if text in self.tiles:
            return text
        if text not in self.lengths:
            value = int(text) if text.isdigit() else parse_ir(f"dim {{value = {text}}}")["value"]
            self.lengths[text] = self.length(value)
        return self.lengths[text]

    def length(self, value: Expr | int) -> Dim:
        if isinstance(value, Expr) and not value.names <= self.env.keys():
            return None
        return int(evaluate(value, self.env))

    def dot(self, op: Op) -> None:
        left, right = ([self.dim(d) for d in v.type.shape] for v in op.operands[:2])
        out = [self.dim(d) for d in op.results[0].type.shape]
        if len(left) != 2 or len(right) != 2 or left[1] != right[0] or out != [left[0], right[1]]:
            types = ", ".join(str(v.type) for v in op.operands[:2])
            _fail(op, f"a product of {types} that is {op.results[0].type}")


def _check_folded(program: Op) -> None:
    """What a folded head asks for: workers that all do what it did, and streams that wait until one has.

    What `head` does to counters at the start of a call is done at its end: they are left at 0 for whoever comes
    next, and so must every program of such an arena leave them.
    """
    slots = program.get("slots")
    folded = [op for op in program.find("head") if op.get("folded") is not None]
    ends = [op for op in program.find("launch") if op.get("ends") is not None]
    if slots is None and not folded:
        if ends:
            _fail(ends[0], "a launch that ends a call begins it too: its `head` is folded")
        return
    if slots is not None and (slots != 2 or not folded):
        _fail(program, "slots are two, and come with a folded head")
    for op in program.body:
        if op.name in ("flag", "counter") and op.get("cleared", op.name == "counter") != (
            op.name == "counter"
        ):
            _fail(op, "with a folded head, counters are cleared and flags are not")
    agents = [op for op in program.body if op.name in AGENTS]
    if slots is None:
        _check_workers(program, agents, ends)
        return
    if ends:
        _fail(ends[0], "with slots, a launch ends its call in any case")
    if [op.name for op in agents] != ["head", "launch"]:
        _fail(program, "a program with slots is a folded head and one launch")
    head, launch = agents
    if head.get("folded") is not True or head.body or launch.get("after") != ("head",):
        _fail(head, "with slots, `head` is folded into the launch behind it and waits for nothing")
    if launch.find("finish"):
        _fail(launch, "with slots, nobody acknowledges a call")


def _check_workers(program: Op, agents: list[Op], ends: list[Op]) -> None:
    """A folded head whose call others acknowledge."""
    head = agents[0]
    if head.name != "head" or head.get("folded") is not True:
        _fail(program, "a folded head comes before all other agents")
    for op in agents[1:]:
        if op.name not in ("launch", "stream") or op.get("emitter") == "library":
            _fail(op, "a folded head is within kernels, and streams wait for them alone")
        if "head" not in op.get("after", ()):
            _fail(op, "behind a folded head comes what has it within: `after` names it")
    if [op.name for op in agents[1:2]] != ["launch"]:
        _fail(program, "a folded head is within the launch behind it, for which all others wait")
    for op in ends:
        if op.get("ends") is not True or len(agents) != 2:
            _fail(op, "a launch ends a call that is nothing else")
        for inner in (inner for finish in op.find("finish") for inner in finish.walk()):
            used = inner.ref is not None and program.declared(inner.symbol).name == "counter"
            if used or inner.get("through") is not None:
                _fail(
                    inner,
                    "a launch that ends its call has cleared the counters before its `finish`",
                )


# What a wait or notify of a flag that words carry has no use for: it is performed by loads and stores.
_IDLE = ("order", "scope", "barrier", "compare", "epoch", "through", "delay", "drain", "if")


def _check_words(program: Op) -> None:
    """Words that signal themselves lie where two slots alternate; loads and stores of tiles alone touch them."""
    declared = {op.symbol: op for op in program.body if op.name in DECLARATIONS}
    tagged = {
        name: op["words"]
        for name, op in declared.items()
        if op.name == "buffer" and op.get("words")
    }
    for name in sorted(tagged):
        buffer = declared[name]
        if tagged[name] not in ENCODINGS:
            _fail(buffer, f"`words = {tagged[name]}` means nothing")
        if program.get("slots") != 2 or buffer.get("space") != "symmetric":
            _fail(buffer, "words are of a symmetric buffer in a program with `slots = 2`")
        if buffer["dtype"] not in ("bf16", "fp16", "fp32"):
            _fail(buffer, "words are of elements of bf16, fp16 or fp32")
    carried = {
        name: op["carried"].symbol for name, op in declared.items() if op.get("carried") is not None
    }
    for name, by in carried.items():
        if by not in tagged:
            _fail(declared[name], f"`@{by}` is no buffer of words")
    for agent in program.body:
        for op in agent.walk() if agent.name in AGENTS else ():
            if op.name in ("wait", "notify") and op.ref is not None and op.symbol in carried:
                wrong = next((key for key in _IDLE if op.get(key) is not None), None)
                if wrong is not None:
                    _fail(op, f"words carry `@{op.symbol}`: `{wrong}` means nothing")
                if agent.name != "launch" or agent.get("emitter") is not None:
                    _fail(op, "words are polled by kernels of the emitter `triton`")
            refs = [r for r in (op.ref, *(v for _, v in op.attrs)) if isinstance(r, Ref)]
            if op.get("empty") and (op.ref is None or tagged.get(op.symbol) != "sentinel"):
                _fail(
                    op, "`empty` puts a sentinel back, which only words hold that have nothing else"
                )
            if not any(r.symbol in tagged for r in refs):
                continue
            plain = op.name == "store" or (op.name in ("load", "load_sum") and not op.operands)
            if not plain or op.get("own") is not None or op.get("via") is not None:
                _fail(op, "words are touched by plain loads and stores of tiles alone")
            if agent.get("emitter") is not None:
                _fail(op, "words are polled by kernels of the emitter `triton`")
            value = op.operands[0] if op.name == "store" else op.results[0]
            if len(value.type.shape) != 2:
                _fail(op, "words are of a tile of two axes")


def _fail(op: Op, detail: str) -> None:
    raise UndecidedError(op.span, name=op.name, detail=detail)
