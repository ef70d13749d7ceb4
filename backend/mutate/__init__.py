"""Broken programs on purpose: positive controls of the proof and of the simulator.

Every operator takes a fused program and yields programs with one mistake each. A mistake that neither
harms nor changes anything is *equivalent*; which ones are is decided by exhaustive exploration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tilelink.backend.mutate import count, place, rows, target, weaken
from tilelink.backend.mutate.deletions import deletions
from tilelink.backend.mutate.sites import Mutant
from tilelink.ir import Op, print_ir
from tilelink.ir.text import Printed
from tilelink.ir.vocabulary import check_names

OPERATORS: tuple[Callable[[Op], Iterator[Mutant]], ...] = (
    weaken.drop,
    weaken.lost_data,
    weaken.weaken,
    weaken.no_barrier,
    weaken.re_scope,
    weaken.no_proxy_fence,
    weaken.undrained,
    weaken.forgotten_flush,
    weaken.delay,
    weaken.reset,
    weaken.one_slot,
    weaken.unpolled,
    weaken.emptying,
    weaken.missing_ack,
    place.re_order,
    place.swap,
    place.stage_order,
    place.double,
    place.agent_order,
    place.oversize_grid,
    place.lost_tasks,
    target.wrong_peer,
    target.wrong_flag,
    target.wrong_tile,
    target.wrong_buffer,
    target.wrong_tasks,
    target.guard,
    count.wrong_count,
    count.stale,
    count.equality,
    count.memory,
    rows.frozen_rows,
)

CLASSES = (
    "drop",
    "lost-data",
    "weaken",
    "no-barrier",
    "re-scope",
    "no-proxy-fence",
    "undrained",
    "forgotten-flush",
    "delay",
    "reset",
    "one-slot",
    "unpolled",
    "emptying",
    "missing-ack",
    "re-order",
    "stage-order",
    "double",
    "agent-order",
    "oversize-grid",
    "lost-tasks",
    "re-target",
    "wrong-buffer",
    "wrong-operand",
    "wrong-tasks",
    "guard",
    "wrong-count",
    "stale",
    "equality",
    "memory",
    "frozen-rows",
)


def mutants(program: Op) -> Iterator[Mutant]:
    """Every mutant of a fused program, in a fixed order; their texts differ from it and each other.

    Each is legal text (``check_names``). Where two operators make the same program, the first has it.
    """
    printed: Printed = {}
    seen = {print_ir(program, printed)}
    for operator in OPERATORS:
        for found in operator(program):
            text = print_ir(found.program, printed)
            if text not in seen:
                seen.add(text)
                check_names(found.program)
                yield found


__all__ = ["CLASSES", "OPERATORS", "Mutant", "deletions", "mutants"]
