"""Every Hypothesis strategy of the tests, in one place."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from tilelink.ir import (
    TILE,
    All,
    At,
    Block,
    Broadcast,
    Expr,
    Op,
    Range,
    Ref,
    Type,
    Value,
    binary,
    make,
)
from tilelink.schedules import Move, Schedule
from tilelink.schedules.schedule import ORDERS, OWNS

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOLDED = ("copy_engine-folded", "sm:2-folded", "epilogue-folded")
# What workers copy beside products whose warps have roles.
BESIDE_ROLES = {
    "ag_gemm": ("sm:1-boxes", "sm:2-boxes"),
    "gemm_rs": ("sm:1-boxes-folded", "sm:2-boxes-folded"),
}
# Parts of a scatter that are read where they were made.
PULLED = ("epilogue-pull", "epilogue-pull-folded")
# The same, by tiles that span the slices of several ranks.
SPANNING = ("epilogue-pull-spans",)
PULLED_TWO = ("epilogue-two-pull", "epilogue-two-pull-folded")
# The same of a reduce, in two shots; own tiles come last, beside the others or between them.
OWN_TWO = ("epilogue-two-folded-beside", "epilogue-two-folded-between")
FOLDED_TWO = ("copy_engine-two-folded", "sm:2-two-folded", "epilogue-two-folded", *OWN_TWO)
RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:2", "none"),
    "gemm_rs": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED, *PULLED),
    "gemm_ar": ("copy_engine", "sm:2", "epilogue", "none", *FOLDED_TWO),
}
MOVED = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}


def move_of(text: str, channels: int | None = None, tile: int | None = None) -> Move:
    """The move of a resource's name; ``-folded`` behind it puts the sum into the epilogue, ``-two`` asks for
    two shots, ``-pull`` lets parts be read where they were made, by ``-spans`` of tiles that span slices,
    ``-boxes`` lets workers copy boxes. Own tiles are computed ``-beside`` the others or ``-between`` them."""
    own = next((word for word in OWNS if text.endswith(f"-{word}")), "last")
    text = text.removesuffix(f"-{own}")
    spans = text.endswith("-spans")
    text = text.removesuffix("-spans")
    folded = text.endswith("-folded")
    text = text.removesuffix("-folded")
    direction = "pull" if text.endswith("-pull") else "push"
    text = text.removesuffix("-pull")
    copies = "boxes" if text.endswith("-boxes") else "rows"
    text = text.removesuffix("-boxes")
    resource, shots = text.removesuffix("-two"), 2 if text.endswith("-two") else None
    move = Move(resource, tile, channels, "epilogue" if folded else "stage", shots)
    return replace(move, direction=direction, spans=spans, own=own, copies=copies)


def order_of(move: Move, order: str = "auto") -> str:
    """``order``, or that in which own tiles need not come last."""
    return order if move.own == "last" else "interleave"


@dataclass(frozen=True)
class Case:
    """One run of one of the three kernels: shapes are global, ``m`` the moved extent."""

    kernel: str
    world: int
    m: int
    k: int
    n: int
    dtype: str
    resource: str
    tiles: tuple[int, int, int]
    channels: int | None
    workers: int
    seed: int
    emitter: str = "triton"

    def schedule(self) -> Schedule:
        """The schedule of this case."""
        m, n, k = self.tiles
        move = move_of(self.resource, self.channels)
        return Schedule(
            tiles=(("K", k), ("M", m), ("N", n)),
            workers=self.workers,
            group=2,
            order=order_of(move),
            emitter=self.emitter,
            moves=((MOVED[self.kernel], move),),
        )

    def inputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A and B of every rank: what the user of that rank passes."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = self.m // self.world if self.kernel == "ag_gemm" else self.m

        def make(*shape: int) -> list[torch.Tensor]:
            drawn = [torch.randn(shape, generator=generator) for _ in range(self.world)]
            return [t.to(TORCH[self.dtype]) for t in drawn]

        return make(rows, self.k), make(self.k, self.n)


@st.composite
def cases(
    draw: Any,
    kernel: str,
    worlds: tuple[int, ...],
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32"),
    size: int = 12,
) -> Case:
    """A case of ``kernel``; tile lengths often do not divide the shape."""
    world = draw(st.sampled_from(worlds))
    resource = draw(st.sampled_from(RESOURCES[kernel]))
    any_rows = kernel == "gemm_ar" and resource not in FOLDED_TWO
    m = draw(st.integers(1, 8 * size)) if any_rows else world * draw(st.integers(1, 4 * size))
    beside = resource.startswith(("copy_engine", "none"))
    return Case(
        kernel=kernel,
        world=world,
        m=m,
        k=8 * draw(st.integers(1, size)),
        n=8 * draw(st.integers(1, size)),
        dtype=draw(st.sampled_from(dtypes)),
        resource=resource,
        emitter=draw(st.sampled_from(("triton", "library") if beside else ("triton",))),
        tiles=(
            draw(st.sampled_from((16, 32, 64))),
            draw(st.sampled_from((16, 32, 64))),
            draw(st.sampled_from((16, 32))),
        ),
        channels=draw(st.sampled_from((None, 1, 2, 3))),
        workers=draw(st.integers(3, 6)),
        seed=draw(st.integers(0, 1 << 16)),
    )


# Kernels of random programs: file (None: tilelink.kernels), name, extents by what each is a multiple of
# (W: the world), moved tensors with their resources, optional tensors, whether whole numbers stay whole.
GATHERS, SUMS = ("copy_engine", "sm:1", "sm:2", "none"), ("copy_engine", "sm:1", "epilogue", "none")
# Of a scatter whose sum may stand in the epilogue of the loop that makes it.
SCATTERS = (*SUMS, "copy_engine-folded", "sm:1-folded", "epilogue-folded", *PULLED)
GEMM = {"M": "W", "N": "1", "K": "1"}
FLOATS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Family:
    """A kernel that random programs are made of.

    ``mapping`` is a mapping with holes for drawn maps: ``{A:*M,K}`` for a tensor A[M, K] that is moved
    over M, ``{B:K,*N}`` for a tensor B[K, N] moved over N. "" keeps the kernel's own.
    """

    file: str | None
    name: str
    extents: dict[str, str]
    moves: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    exact: bool = True
    constants: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    mapping: str = ""


_GATHER, _SCATTER = "gather A[M, K] over M {A:*M,K}", "scatter C[M, N] over M sum {C:*M,N}"
FAMILIES = (
    Family(None, "ag_gemm", GEMM, {"A": GATHERS}, ("bias",), True, ("nk",), FLOATS, _GATHER),
    Family(None, "ag_gemm_swiglu", GEMM, {"A": GATHERS}, (), False, ("nk",), FLOATS, _GATHER),
    Family(None, "gemm_rs", GEMM, {"C": SCATTERS}, (), True, ("nk",), FLOATS, _SCATTER),
    Family(None, "gemm_ar", {**GEMM, "M": "1"}, {"C": SUMS}, constants=("nk",)),
    Family(None, "gemm_rs_add", GEMM, {"P": SCATTERS}, ("bias", "residual"), constants=("nk",)),
    Family(
        None, "gemm_ar_add", {**GEMM, "M": "1"}, {"P": SUMS}, ("bias", "residual"), True, ("nk",)
    ),
    Family("ag_gemm", "ag_gemm_silu", GEMM, {"A": GATHERS}, (), False),
    Family("ag_gemm", "ag_gemm_nk", GEMM, {"A": GATHERS}, mapping=_GATHER),
    Family("gemm_rs", "gemm_rs_bias", GEMM, {"P": SCATTERS}, ("bias", "residual")),
    Family("maps", "ag_cyclic", {**GEMM, "M": "4W"}, {"A": GATHERS}),
    Family("maps", "ag_zigzag", {**GEMM, "M": "2W"}, {"A": GATHERS}),
    Family("maps", "rs_cyclic", {**GEMM, "M": "4W"}, {"C": SCATTERS}),
    Family("maps", "ag_signals", {**GEMM, "M": "8W"}, {"A": GATHERS}),
    Family(
        "maps",
        "ag_over_depth",
        {"M": "1", "N": "1", "K": "W"},
        {"A": GATHERS},
        mapping="gather A[K, M] over K {A:*K,M}",
    ),
    Family(
        "maps",
        "ag_columns",
        {"M": "1", "N": "W", "K": "1"},
        {"B": GATHERS},
        mapping="gather B[K, N] over N {B:K,*N}",
    ),
    Family(
        "maps",
        "ag_gemm_rs",
        GEMM,
        {"A": GATHERS, "C": SCATTERS},
        mapping=f"{_GATHER}; {_SCATTER}",
    ),
    # Its intermediate is bf16.
    Family("maps", "mlp", {**GEMM, "H": "1"}, {"A": GATHERS}, (), False, (), ("bf16",), _GATHER),
    Family("maps", "ar_norm", {**GEMM, "M": "1"}, {"P": SUMS}, (), False),
    Family("misc", "in_place", {"M": "1", "K": "1"}, {}),
    Family("misc", "grouped_scores", {"G": "=2", "H": "=4", "S": "W", "D": "=16"}, {"K": GATHERS}),
    Family(
        "attention",
        "attention",
        {"B": "=1", "H": "=2", "S": "W", "D": "=16"},
        {"K": GATHERS, "V": GATHERS},
        (),
        False,
        ("causal",),
    ),
)


@dataclass(frozen=True)
class Drawn:
    """One random program: a kernel, its maps and sizes, and a schedule.

    ``workers`` is that of the simulated launches, ``dynamic`` a bit for each stage whose queue is
    dynamic, ``seed`` that of the data and of the simulator's schedule.
    """

    family: Family
    mapping: str
    world: int
    extents: tuple[tuple[str, int], ...]
    dtype: str
    present: tuple[str, ...]
    constants: tuple[tuple[str, bool], ...]
    schedule: Schedule
    workers: int
    dynamic: int
    seed: int

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "family"}
        data["schedule"] = json.loads(self.schedule.to_json())
        data["extents"], data["constants"] = dict(self.extents), dict(self.constants)
        return json.dumps({"kernel": [self.family.file, self.family.name], **data})

    @staticmethod
    def from_json(text: str) -> Drawn:
        """The program that :meth:`to_json` wrote."""
        data = json.loads(text)
        file, name = data.pop("kernel")
        (family,) = (f for f in FAMILIES if (f.file, f.name) == (file, name))
        data["schedule"] = Schedule.from_json(json.dumps(data["schedule"]))
        data["extents"] = tuple(data["extents"].items())
        data["constants"] = tuple(data["constants"].items())
        data["present"] = tuple(data["present"])
        return Drawn(family, **data)


# Owner maps: the map, and what the extent is a multiple of, for blocks of b elements.
_BLOCK = "{x} / ({X} / WORLD)"
_HALF = "{x} / ({X} / (2 * WORLD))"
OWNERS: dict[str, tuple[str, str]] = {
    "": ("", "1W"),
    "blocks": (_BLOCK, "1W"),
    "zigzag": (f"min({_HALF}, 2 * WORLD - 1 - {_HALF})", "2W"),
    "cyclic": ("{x} / {b} % WORLD", "bW"),
}


@st.composite
def drawn_maps(draw: Any, family: Family, world: int, most: int) -> tuple[str, dict[str, int]]:
    """A mapping for ``family`` and the extents that it is cut over; ("", {}) keeps the kernel's own.

    Holes over the same axis have owners of their own. Tiles divide the owner's blocks.
    """
    if not family.mapping or draw(st.integers(0, 3)) == 0:
        return "", {}
    holes = re.findall(r"\{(\w+):([^}]*)\}", family.mapping)
    chosen: dict[str, tuple[str, int, int]] = {}
    units: dict[str, int] = {}
    for tensor, dims in holes:
        (axis,) = (d[1:] for d in dims.split(",") if d.startswith("*"))
        name = draw(st.sampled_from(sorted(OWNERS)))
        b = draw(st.sampled_from((1, 2, 4, 8)))
        owner, multiple = OWNERS[name]
        b = b if multiple == "bW" else 0
        unit = world * (b or int(multiple[0]))
        chosen[tensor] = (owner.format(x=axis.lower(), X=axis, b=b), unit, b)
        units[axis] = math.lcm(units.get(axis, 1), unit)
    extents = {
        axis: unit * draw(st.integers(1, max(1, most // unit))) for axis, unit in units.items()
    }
    text = family.mapping
    for tensor, dims in holes:
        owner, unit, b = chosen[tensor]
        names = dims.split(",")
        (axis,) = (d[1:] for d in names if d.startswith("*"))
        block = b or extents[axis] // unit
        lines = [f"owner {owner}"] if owner else []
        if draw(st.booleans()):
            tile = draw(st.sampled_from([d for d in range(1, block + 1) if block % d == 0]))
            lines.append("tile " + " x ".join(str(tile) if d[0] == "*" else d for d in names))
        if draw(st.booleans()):
            lines.append(f"signal t / {draw(st.sampled_from((1, 2, 3)))}")
        text = text.replace(f"{{{tensor}:{dims}}}", f"{{ {'  '.join(lines)} }}" if lines else "")
    return text, extents


@st.composite
def drawn_programs(draw: Any, small: bool = False) -> Drawn:
    """Random programs over :data:`FAMILIES`; ``small`` ones are fit for the interpreter.

    Products and sums of elements -1..1 stay below 256, so that they are whole in every float type.
    """
    family = draw(st.sampled_from(FAMILIES))
    world = draw(st.sampled_from((1, 2, 4) if small else (1, 2, 3, 4, 5, 6, 7, 8)))
    longest = 48 if small else 96
    # A sum over K on every rank, and over the ranks: kept whole by what the extents are.
    deepest = 200 // world
    over_depth = "over K" in family.mapping
    mapping, extents = draw(drawn_maps(family, world, deepest if over_depth else longest))
    for name, unit in family.extents.items():
        if name in extents:
            continue
        if unit.startswith("="):
            extents[name] = int(unit[1:])
            continue
        step = int(unit.removesuffix("W") or 1) * (world if unit.endswith("W") else 1)
        most = deepest if name in ("K", "H") else longest
        extents[name] = step * draw(st.integers(1, max(1, most // step)))
    sizes = (32, 64) if small else (16, 32, 64)
    tiles = tuple(sorted((name, draw(st.sampled_from(sizes))) for name in extents))
    moves = {
        name: move_of(
            draw(st.sampled_from(resources)),
            tile=draw(st.sampled_from((None, None, 4, 16))),
            channels=draw(st.sampled_from((None, None, 1, 2, 3))),
        )
        for name, resources in family.moves.items()
    }
    least = max((move.sm_workers for move in moves.values()), default=0) + 1
    schedule = Schedule(
        tiles=tiles,
        order=draw(st.sampled_from(ORDERS)),
        group=draw(st.sampled_from((1, 2, 3, 8))),
        workers=draw(st.integers(least, 8)),
        flatten=draw(st.booleans()),
        moves=tuple(sorted(moves.items())),
    )
    return Drawn(
        family,
        mapping,
        world,
        tuple(sorted(extents.items())),
        draw(st.sampled_from(family.dtypes)),
        tuple(name for name in family.optional if draw(st.booleans())),
        tuple((name, draw(st.booleans())) for name in family.constants),
        schedule,
        draw(st.integers(1, 8)),
        draw(st.integers(0, 7)),
        draw(st.integers(0, 1 << 16)),
    )


BINARY = ("+", "-", "*", "/", "%", "min", "max", "==", "!=", "<", "<=", ">", ">=", "and", "or")
NAMES = st.sampled_from(("M", "N", "WORLD", "RANK", "s", "m.start", "n.1.stop"))
RESERVED = frozenset({"and", "or", "min", "max", "do", "at", "true", "false", "inf", "nan"})
WORDS: st.SearchStrategy[str] = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True).filter(
    lambda word: word not in RESERVED
)


def expressions(depth: int = 3) -> st.SearchStrategy[Expr]:
    """Integer expressions over :data:`NAMES`."""
    leaf = st.one_of(st.integers(-9, 99).map(Expr.const), NAMES.map(Expr.name))
    if depth == 0:
        return leaf
    inner = expressions(depth - 1)
    pair = st.builds(binary, st.sampled_from(BINARY), inner, inner)
    table = st.builds(lambda i: Expr("table", ("offs", i)), inner)
    return st.one_of(leaf, pair, table)


@st.composite
def ops(draw: Any, depth: int = 2) -> Op:
    """A valid op tree: values are defined above their use and have unique names."""
    counter = [0]

    def fresh(kind: Type) -> Value:
        counter[0] += 1
        return Value(f"v{counter[0]}", kind)

    def block(known: tuple[Value, ...], level: int) -> Block:
        args = tuple(fresh(TILE) for _ in range(draw(st.integers(0, 2))))
        visible = known + args
        body = []
        for _ in range(draw(st.integers(0, 3))):
            made = one(visible, level)
            visible += made.results
            body.append(made)
        return Block(args, tuple(body))

    def index(known: tuple[Value, ...]) -> Any:
        options = [
            expressions(1),
            st.just(All()),
            st.just(Broadcast()),
            st.builds(Range, expressions(1), expressions(1)),
        ]
        if known:
            options += [
                st.sampled_from(known),
                st.builds(At, st.sampled_from(known), expressions(1)),
            ]
        return draw(st.one_of(*options))

    def ref(known: tuple[Value, ...]) -> Ref:
        return Ref(draw(WORDS), tuple(index(known) for _ in range(draw(st.integers(0, 3)))))

    def attribute(known: tuple[Value, ...], nested: int = 1) -> Any:
        simple = st.one_of(
            st.integers(-5, 5),
            st.booleans(),
            st.text(max_size=5),
            st.floats(allow_nan=False, width=32),
            expressions(2),
        )
        choice = draw(st.integers(0, 3))
        if choice == 0 and nested:
            return [attribute(known, 0) for _ in range(draw(st.integers(0, 3)))]
        return ref(known) if choice == 1 else draw(simple)

    def one(known: tuple[Value, ...], level: int) -> Op:
        results = tuple(
            fresh(
                Type(
                    draw(st.sampled_from(("bf16", "fp32"))),
                    tuple(draw(st.lists(NAMES, max_size=2))),
                )
            )
            for _ in range(draw(st.integers(0, 2)))
        )
        operands = tuple(draw(st.lists(st.sampled_from(known), max_size=2))) if known else ()
        keys = draw(st.lists(WORDS, max_size=3, unique=True))
        attrs = {k: attribute(known) for k in keys}
        blocks = tuple(block(known, level - 1) for _ in range(draw(st.integers(0, level))))
        op = make(draw(WORDS), results=results, operands=operands, blocks=blocks)
        if draw(st.booleans()):
            op = replace(op, ref=ref(known))
        return op.with_attrs(**attrs)

    return one((), depth)
