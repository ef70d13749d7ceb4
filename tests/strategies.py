"""Every Hypothesis strategy of the tests, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMIT = {"bf16": 1e-2, "fp16": 1e-2, "fp32": 1e-5}
RESOURCES = {
    "ag_gemm": ("copy_engine", "sm:2", "none"),
    "gemm_rs": ("copy_engine", "sm:2", "epilogue", "none"),
    "gemm_ar": ("copy_engine", "sm:2", "epilogue", "none"),
}
MOVED = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}


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

    def schedule(self) -> Schedule:
        """The schedule of this case."""
        m, n, k = self.tiles
        move = Move(resource=self.resource, channels=self.channels)
        return Schedule(
            tiles=(("K", k), ("M", m), ("N", n)),
            workers=self.workers,
            group=2,
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
    m = (
        draw(st.integers(1, 8 * size))
        if kernel == "gemm_ar"
        else world * draw(st.integers(1, 4 * size))
    )
    return Case(
        kernel=kernel,
        world=world,
        m=m,
        k=8 * draw(st.integers(1, size)),
        n=8 * draw(st.integers(1, size)),
        dtype=draw(st.sampled_from(dtypes)),
        resource=draw(st.sampled_from(RESOURCES[kernel])),
        tiles=(
            draw(st.sampled_from((16, 32, 64))),
            draw(st.sampled_from((16, 32, 64))),
            draw(st.sampled_from((16, 32))),
        ),
        channels=draw(st.sampled_from((None, 1, 2, 3))),
        workers=draw(st.integers(3, 6)),
        seed=draw(st.integers(0, 1 << 16)),
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
