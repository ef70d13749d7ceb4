"""Mistakes of strength: synchronisation that is missing, or weaker than what rests on it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tilelink.backend.mutate.sites import (
    SYNCHRONISATION,
    Mutant,
    declared,
    mutant,
    reordered,
    replaced,
    sites,
    with_attr,
    with_index,
)
from tilelink.ir import Expr, Op, Range, Ref, Value, make
from tilelink.ir.layout import ENCODINGS


def drop(program: Op) -> Iterator[Mutant]:
    """``wait``, ``notify`` -> nothing, where data is handed over."""
    for site in sites(program, *SYNCHRONISATION):
        if not site.in_ack:
            yield mutant(program, site, "drop", "removed")


def lost_data(program: Op) -> Iterator[Mutant]:
    """``transfer``, ``store`` -> nothing: what is signalled was never sent."""
    for site in sites(program, "transfer", "store"):
        yield mutant(program, site, "lost-data", "removed")


def weaken(program: Op) -> Iterator[Mutant]:
    """``wait``, ``notify`` -> the same with ``order = "relaxed"``."""
    for site in sites(program, *SYNCHRONISATION):
        if site.op.get("order") is None:
            yield mutant(program, site, "weaken", "relaxed", with_attr(site.op, "order", "relaxed"))


def no_barrier(program: Op) -> Iterator[Mutant]:
    """``notify`` of a kernel -> the same with ``barrier = false``."""
    for site in sites(program, "notify"):
        kernel = site.agent is not None and site.agent.name in ("launch", "head")
        if kernel and site.op.get("barrier") is None:
            what = "no CTA barrier before"
            yield mutant(program, site, "no-barrier", what, with_attr(site.op, "barrier", False))


def re_scope(program: Op) -> Iterator[Mutant]:
    """``wait``, ``notify`` of scope sys -> scope gpu."""
    for site in sites(program, *SYNCHRONISATION):
        if site.op.get("scope", "sys") == "sys":
            yield mutant(program, site, "re-scope", "scope gpu", with_attr(site.op, "scope", "gpu"))


def no_proxy_fence(program: Op) -> Iterator[Mutant]:
    """``wait {proxy = true}`` -> without it; a load behind a wait without it -> ``via = "tma"``."""
    for site in sites(program, "wait"):
        if site.op.get("proxy"):
            op = with_attr(site.op, "proxy", None)
            yield mutant(program, site, "no-proxy-fence", "no proxy fence behind", op)
    kinds = declared(program)
    fenced = any(op.get("proxy") for op in program.walk())
    for site in sites(program, "load"):
        if kinds[site.op.symbol].name == "buffer" and site.op.get("via") is None and not fenced:
            op = with_attr(site.op, "via", "tma")
            yield mutant(program, site, "no-proxy-fence", "through the async proxy, no fence", op)


def undrained(program: Op) -> Iterator[Mutant]:
    """``notify``, ``flush`` with ``drain`` -> without; a drainless store -> ``via = "tma"``."""
    drains = False
    for site in sites(program, "notify", "flush"):
        if site.op.get("drain"):
            drains = True
            yield mutant(
                program, site, "undrained", "no drain in", with_attr(site.op, "drain", None)
            )
    kinds = declared(program)
    for site in sites(program, "store"):
        local = site.op.get("peer") is None and kinds[site.op.symbol].name == "buffer"
        if local and site.op.get("via") is None and not drains:
            op = with_attr(site.op, "via", "tma")
            yield mutant(program, site, "undrained", "by TMA, nothing drains it", op)


def forgotten_flush(program: Op) -> Iterator[Mutant]:
    """``flush`` -> nothing; a notify that nothing flushes -> ``delay = 1``."""
    flushes = False
    for site in sites(program, "flush"):
        flushes = True
        yield mutant(program, site, "forgotten-flush", "removed")
    for site in sites(program, "notify"):
        if site.above[-1].name == "stage" and not flushes and site.op.get("delay") is None:
            op = with_attr(site.op, "delay", 1)
            yield mutant(program, site, "forgotten-flush", "held back, nothing flushes", op)


def delay(program: Op) -> Iterator[Mutant]:
    """``notify`` -> ``delay = 1`` with a flush at the end; ``flush`` -> behind a later stage."""
    for site in sites(program, "notify"):
        if site.above[-1].name != "stage" or site.op.get("delay") is not None:
            continue
        held = replaced(program, site.path, with_attr(site.op, "delay", 1))
        launch_path = site.path[:1]
        launch = held.blocks[launch_path[0][0]].ops[launch_path[0][1]]
        last = max(n for n, op in enumerate(launch.body) if op.name == "stage")
        if site.path[1][1] == last:
            continue  # nothing follows that it could be late for
        ops = (*launch.body[: last + 1], make("flush"), *launch.body[last + 1 :])
        text = f"held back to the end of the launch: {site.op.name} {site.op.ref}"
        program_ = replaced(held, launch_path, launch.with_ops(ops))
        yield Mutant("delay", text, site.op.span, program_)
    for site in sites(program, "flush"):
        ops = site.siblings
        for later in range(site.position + 1, len(ops)):
            if ops[later].name == "stage":
                moved = (*ops[: site.position], *ops[site.position + 1 : later + 1], site.op)
                text = f"flush moved behind the stage @{ops[later].symbol}"
                rest = (*moved, *ops[later + 1 :])
                yield Mutant("delay", text, site.op.span, reordered(program, site, rest))


def reset(program: Op) -> Iterator[Mutant]:
    """``flag`` -> cleared by `head`; ``counter`` -> not cleared."""
    for site in sites(program, "flag", "counter"):
        cleared = site.op.name == "counter"
        if bool(site.op.get("cleared", cleared)) == cleared:
            what = "not cleared" if cleared else "cleared"
            yield mutant(program, site, "reset", what, with_attr(site.op, "cleared", not cleared))


def one_slot(program: Op) -> Iterator[Mutant]:
    """Two slots -> one, without the acknowledgements that one needs."""
    if program.get("slots") is None:
        return
    ops = tuple(op.with_attrs(folded=None) if op.name == "head" else op for op in program.body)
    yield Mutant(
        "one-slot",
        "one slot, and no acknowledgements",
        program.span,
        program.with_ops(ops).with_attrs(slots=None),
    )


def unpolled(program: Op) -> Iterator[Mutant]:
    """``buffer {words = "…"}`` -> without it, under flags that its words carry; such a flag -> carried by another
    buffer's words, or raised."""
    tagged = [op.symbol for op in program.find("buffer") if op.get("words")]
    for site in sites(program, "buffer"):
        if site.op.get("words"):
            op = with_attr(site.op, "words", None)
            yield mutant(program, site, "unpolled", "plain data under a flag nobody raises", op)
    for site in sites(program, "flag"):
        carried = site.op.get("carried")
        for name in tagged if carried is not None else ():
            if name != carried.symbol:
                op = with_attr(site.op, "carried", Ref(name))
                yield mutant(program, site, "unpolled", f"carried by @{name}", op)
        if carried is not None:
            op = with_attr(site.op, "carried", None)
            yield mutant(program, site, "unpolled", "raised beside the words", op)


def emptying(program: Op) -> Iterator[Mutant]:
    """``load {empty = true}`` -> without it, or behind another that empties the same words; buffers of words that
    hold epochs -> words that hold a sentinel, which no load puts back."""
    for site in sites(program, "load", "load_sum"):
        if site.op.get("empty"):
            left = with_attr(site.op, "empty", None)
            yield mutant(program, site, "emptying", "what was read stays there", left)
            results = tuple(Value(f"{v.name}.before", v.type) for v in site.op.results)
            before = replace(site.op, results=results)
            yield mutant(program, site, "emptying", "emptied before it is read", before, site.op)
    old, new = ENCODINGS["epoch"], ENCODINGS["sentinel"]
    for site in sites(program, "buffer"):
        if site.op.get("words") == "epoch":
            place = (int(site.op["offset"]) - old.area) * new.bytes // old.bytes
            op = site.op.with_attrs(words="sentinel", offset=new.area + place)
            yield mutant(program, site, "emptying", "words that nobody empties", op)


def missing_ack(program: Op) -> Iterator[Mutant]:
    """The ack of a call, or the wait for it -> nothing, or a part of the ranks."""
    for site in sites(program, "finish"):
        yield mutant(program, site, "missing-ack", "removed")
    for site in sites(program, *SYNCHRONISATION):
        if site.in_ack:
            yield mutant(program, site, "missing-ack", "removed")
    yield from _part_of_ranks(program)


def _part_of_ranks(program: Op) -> Iterator[Mutant]:
    for site in sites(program, "for_range"):
        if any(op.name == "finish" for op in site.above):
            lo, hi = site.op["lo"], site.op["hi"]
            for what, op in (
                ("all but the first of", with_attr(site.op, "lo", _plus(lo, 1))),
                ("all but the last of", with_attr(site.op, "hi", _plus(hi, -1))),
            ):
                yield mutant(program, site, "missing-ack", what, op)
    for site in sites(program, "wait"):
        if site.agent is None or site.agent.name != "head" or site.op.ref is None:
            continue
        for axis, element in enumerate(site.op.ref.index):
            if isinstance(element, Range):
                for what, part in (
                    ("all but the first", Range(element.lo + 1, element.hi)),
                    ("all but the last", Range(element.lo, element.hi - 1)),
                ):
                    op = replace(site.op, ref=with_index(site.op.ref, axis, part))
                    yield mutant(program, site, "missing-ack", what, op)


def _plus(value: Any, by: int) -> Expr:
    return Expr.of(value) + by
