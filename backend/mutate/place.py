"""Mistakes of place: synchronisation at the wrong point, stages and agents in the wrong order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from tilelink.backend.mutate.sites import (
    AGENTS,
    SYNCHRONISATION,
    Mutant,
    Site,
    line,
    mutant,
    reordered,
    sites,
    with_attr,
)
from tilelink.ir import Op

FEW_WORKERS = 8  # of which each number that fits is tried
_MOVES_DATA = ("transfer", "store", "load", "load_sum")


def re_order(program: Op) -> Iterator[Mutant]:
    """A notify before an earlier write, a wait behind a later access, a transfer behind its notify."""
    for site in sites(program, "notify"):
        for place in range(site.position - 1, -1, -1):
            if _touches(site.siblings[place]):
                yield _moved(program, site, place, "early")
    for site in sites(program, "wait"):
        for place in range(site.position + 1, len(site.siblings)):
            if _touches(site.siblings[place]):
                yield _moved(program, site, place, "late")
    for site in sites(program, "transfer"):
        for place in range(site.position + 1, len(site.siblings)):
            if site.siblings[place].name in SYNCHRONISATION:
                yield _moved(program, site, place, "late")
        for place in range(site.position - 1, -1, -1):
            if site.siblings[place].name == "wait":
                yield _moved(program, site, place, "early")


def swap(program: Op) -> Iterator[Mutant]:
    """Two neighbours, at least one of them synchronisation -> the other way round."""
    names = (*SYNCHRONISATION, "transfer", "store", "for_range")
    for site in sites(program, *names):
        ops, at = site.siblings, site.position
        if at + 1 < len(ops) and ops[at + 1].name in names:
            both = (site.op.name, ops[at + 1].name)
            if any(name in SYNCHRONISATION for name in both):
                order = (*ops[:at], ops[at + 1], site.op, *ops[at + 2 :])
                text = f"swapped: {line(site.op)} / {line(ops[at + 1])}"
                yield Mutant("re-order", text, site.op.span, reordered(program, site, order))


def stage_order(program: Op) -> Iterator[Mutant]:
    """Two stages of a launch -> in the other order."""
    for site in sites(program, "stage"):
        for other in range(site.position + 1, len(site.siblings)):
            if site.siblings[other].name != "stage":
                continue
            ops = list(site.siblings)
            ops[site.position], ops[other] = ops[other], ops[site.position]
            text = f"@{site.op.symbol} and @{ops[site.position].symbol} exchanged"
            program_ = reordered(program, site, tuple(ops))
            yield Mutant("stage-order", text, site.op.span, program_)


def double(program: Op) -> Iterator[Mutant]:
    """A notify or a transfer -> twice, and a transfer or a store once more behind the notify."""
    for site in sites(program, "notify", "transfer"):
        yield mutant(program, site, "double", "twice", site.op, site.op)
    for site in sites(program, "transfer", "store"):
        for place in range(site.position + 1, len(site.siblings)):
            if site.siblings[place].name == "notify":
                ops = site.siblings
                again = (*ops[: place + 1], site.op, *ops[place + 1 :])
                text = f"again behind its notify: {line(site.op)}"
                yield Mutant("double", text, site.op.span, reordered(program, site, again))
                break


def agent_order(program: Op) -> Iterator[Mutant]:
    """``after`` dropped, or another agent's; agents enqueued in another order."""
    agents = [op for op in program.body if op.name in AGENTS]
    names = ["head" if op.name == "head" else op.symbol for op in agents]
    for site in sites(program, *AGENTS):
        after = site.op.get("after", ())
        own = "head" if site.op.name == "head" else site.op.symbol
        for name in after:
            rest = tuple(other for other in after if other != name)
            op = with_attr(site.op, "after", rest or None)
            yield mutant(program, site, "agent-order", f"not after {name}", op)
            for instead in names:
                if instead not in (name, own) and instead not in after:
                    op = with_attr(site.op, "after", (*rest, instead))
                    what = f"after {instead}, not after {name}"
                    yield mutant(program, site, "agent-order", what, op)
    where = [n for n, op in enumerate(program.body) if op.name in AGENTS]
    for one, two in itertools.combinations(range(len(agents)), 2):
        ops = list(program.body)
        ops[where[one]], ops[where[two]] = agents[two], agents[one]
        text = f"enqueued in the other order: {names[one]}, {names[two]}"
        yield Mutant("agent-order", text, agents[one].span, program.with_ops(tuple(ops)))


def oversize_grid(program: Op) -> Iterator[Mutant]:
    """A launch -> fewer workers on the device than it has: each number, of many workers some."""
    for site in sites(program, "launch"):
        workers = int(site.op["workers"])
        numbers: Iterable[int] = range(workers - 1, 0, -1)
        if workers > FEW_WORKERS:
            halves = (workers >> n for n in range(1, workers.bit_length()))
            numbers = tuple(dict.fromkeys((workers - 1, *halves)))
        for resident in numbers:
            op = with_attr(site.op, "resident", resident)
            yield mutant(program, site, "oversize-grid", f"{resident} workers fit", op)


def lost_tasks(program: Op) -> Iterator[Mutant]:
    """The workers of a stage -> one that the launch does not have: its tasks are nobody's."""
    for site in sites(program, "stage"):
        workers = int(site.above[-1]["workers"])
        lo, hi = (int(v) for v in site.op.get("workers", (0, workers)))
        dynamic = site.op.get("queue", "static") == "dynamic"
        if hi == workers and not dynamic:
            op = with_attr(site.op, "workers", (lo, hi + 1))
            yield mutant(program, site, "lost-tasks", f"for worker {hi} of {workers} too", op)


def _touches(op: Op) -> bool:
    """Whether the op, or one inside it, reads or writes memory."""
    return any(inner.name in _MOVES_DATA for inner in op.walk())


def _moved(program: Op, site: Site, place: int, what: str) -> Mutant:
    """The op of ``site`` at the number ``place`` of its block."""
    ops = [op for n, op in enumerate(site.siblings) if n != site.position]
    ops.insert(place, site.op)
    text = f"{what}: {line(site.op)}, past {line(site.siblings[place])}"
    return Mutant("re-order", text, site.op.span, reordered(program, site, tuple(ops)))
