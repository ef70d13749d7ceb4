"""reuse, within a call: a buffer that is the memory of something else, given to the library in place.

Only the library's all-reduce makes one into the other. Every access of what it reads comes before it, and
every access of what it makes behind it, agent by agent, so that it does not matter that both are one memory.
Both are this rank's own, which the next call of the rank does not touch before this one has ended.
"""

from __future__ import annotations

from tilelink.backend.expand_rows import Expansion
from tilelink.backend.verify.errors import BoundsError, ReuseError
from tilelink.backend.verify.order import ancestors
from tilelink.ir import Op


def check_alias(out: Expansion) -> None:
    """Raise BoundsError for an alias of other memory, ReuseError where both are in use at once."""
    for symbol, declared in out.declarations.items():
        alias = declared.get("alias")
        if alias is not None:
            _placed(out, declared, symbol, alias.symbol)
            _apart(out, declared, symbol, alias.symbol)


def _placed(out: Expansion, declared: Op, symbol: str, target: str) -> None:
    other = out.declarations.get(target)
    detail = ""
    if other is None or other.name not in ("tensor", "buffer") or target == symbol:
        detail = "its `alias` is no tensor and no other buffer"
    elif declared.get("space") != "local" or declared.get("offset") is not None:
        detail = "an alias is local, and has no place of its own"
    elif other.get("alias") is not None or other.get("space", "local") != "local":
        detail = f"@{target} is an alias itself, or memory that peers reach"
    elif other.name == "tensor" and other.get("role") != "out":
        detail = f"@{target} is given by the user"
    elif out.dims[symbol] != out.dims[target] or declared["dtype"] != other["dtype"]:
        detail = f"@{target} has another shape or element type"
    elif any(
        name != symbol and (op.get("alias") is not None and op["alias"].symbol == target)
        for name, op in out.declarations.items()
    ):
        detail = f"@{target} has two aliases"
    if detail:
        raise BoundsError(declared.span, symbol=symbol, detail=detail)


def _apart(out: Expansion, declared: Op, symbol: str, target: str) -> None:
    pivots = [
        (number, agent.symbol, agent["to"].symbol)
        for number, agent in enumerate(out.agents)
        if agent.name == "collective"
        and agent["op"] == "all_reduce"
        and {agent.symbol, agent["to"].symbol} == {symbol, target}
    ]
    if len(pivots) != 1:
        detail = f"no single all-reduce makes the one of @{symbol} and @{target} into the other"
        raise ReuseError(declared.span, symbol=symbol, notes=(detail,))
    pivot, parts, _ = pivots[0]
    after = ancestors(out)
    for access in out.accesses:
        if access.symbol not in (symbol, target):
            continue
        for number in sorted({out.phases[p].agent for p in out.task_phase[access.task].tolist()}):
            first, second = (number, pivot) if access.symbol == parts else (pivot, number)
            if number != pivot and first not in after[second]:
                raise ReuseError(
                    access.op.span,
                    symbol=access.symbol,
                    notes=(
                        f"@{symbol} is the memory of @{target}, which an all-reduce sums in place",
                        f"nothing orders that with {out.describe(int(access.task[0]))}",
                    ),
                )
