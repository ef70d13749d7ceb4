"""Bad input straight into the executors of a fused program: the simulator and the interpreter."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from tests.assurance.bad_case import ROOT, Call, Case
from tilelink.ir import Op, parse_ir

TEXT = (ROOT / "tests" / "programs" / "gemm_ar.epilogue.ir").read_text(encoding="utf-8")
EXECUTORS = ("simulate", "interpret")


@cache
def program() -> Op:
    """The fused program that all cases hand their inputs to."""
    return parse_ir(TEXT, "gemm_ar.epilogue.ir")


def good() -> list[dict[str, Any]]:
    """Inputs of every rank."""
    from tilelink.cli.inputs import random_inputs

    return random_inputs(program(), 0)


def execute(name: str, inputs: Any) -> Any:
    """The outputs of an executor."""
    if name == "simulate":
        from tilelink.backend import simulate

        return simulate.run(program(), inputs)
    from tilelink.backend.runtime import interpret

    return interpret.run(program(), inputs)


def changed(by: str, change: Any) -> Any:
    """The outputs of an executor on ``change(inputs)``."""
    return execute(by, change(good()))


def given(name: str, words: tuple[str, ...], change: Any) -> list[Case]:
    """Each executor on ``change(inputs)``."""
    return [
        Call(f"executor: {name} [{by}]", partial(changed, by, change), words) for by in EXECUTORS
    ]


def at(rank: int, name: str, change: Any) -> Any:
    """A change of one tensor of one rank."""

    def of(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        inputs[rank][name] = change(inputs[rank][name])
        return inputs

    return of


def without(rank: int, name: str) -> Any:
    """A change that takes one tensor of one rank away."""

    def of(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        del inputs[rank][name]
        return inputs

    return of


CASES: tuple[Case, ...] = (
    *given("no ranks", ("0 ranks",), lambda i: []),
    *given("too few ranks", ("ranks",), lambda i: i[:-1]),
    *given("too many ranks", ("ranks",), lambda i: [*i, i[0]]),
    *given("None", ("list over ranks",), lambda i: None),
    *given("a number", ("list over ranks",), lambda i: 3),
    *given("one mapping for all ranks", ("list over ranks",), lambda i: i[0]),
    *given("a rank of None", ("list over ranks",), lambda i: [*i[:-1], None]),
    *given("lists of tensors", ("list over ranks",), lambda i: [list(r.values()) for r in i]),
    *given("a tensor missing", ("`B`", "missing"), without(1, "B")),
    *given("a tensor of None", ("`B`", "missing"), at(1, "B", lambda x: None)),
    *given("a number for a tensor", ("`B`", "not a tensor"), at(1, "B", lambda x: 3)),
    *given("an array for a tensor", ("`B`", "not a tensor"), at(1, "B", lambda x: x.tolist())),
    *given("a transposed tensor", ("`A`", "shape"), at(1, "A", lambda x: x.T)),
    *given("a tensor too long", ("`A`", "shape"), at(1, "A", lambda x: x.repeat(2, 1))),
    *given("a scalar tensor", ("`A`", "shape"), at(1, "A", lambda x: x[0, 0])),
    *given("another element type", ("`A`", "float64"), at(1, "A", lambda x: x.double())),
    *given("integers", ("`A`", "int32"), at(0, "A", lambda x: x.int())),
)
