"""From traces to rows of the proof: every event is found again in the program, and keeps its own order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from tilelink.backend.expand import evaluate
from tilelink.backend.expand_rows import Access, Expansion, Phase, Sync
from tilelink.backend.validate.demand import Loads, axes_of
from tilelink.backend.validate.errors import EmittedDiffers
from tilelink.backend.validate.inflow import Inflow, regions
from tilelink.backend.validate.tiles import gather
from tilelink.backend.validate.trace import FINISH, PREFIX, Signal, Touch, Trace
from tilelink.backend.validate.values import Flow, Ints, Key
from tilelink.errors import Source, Span


@dataclass(slots=True)
class Placed:
    """A trace with the tasks of the program that its lanes ran: ``task[stage][lane, segment]``."""

    trace: Trace
    phases: dict[int, Phase]
    task: dict[int, Ints]
    rank: Ints

    def tasks(self, stage: int, lane: Ints, segment: Ints) -> Ints:
        """The task of each lane's segment."""
        return self.task[stage][lane, segment]


class Rows:
    """Rows for the proof. ``expected`` is the program's own expansion."""

    def __init__(self, expected: Expansion, source: Source, demands: dict[int, Loads]) -> None:
        self.expected, self.source, self.demands = expected, source, demands
        self.accesses: list[Access] = []
        self.syncs: list[Sync] = []
        self.volume: dict[int, Ints] = {}
        self.regions: dict[int, Ints] = {}  # boxes read of each load, by its row
        self.sorted: dict[int, tuple[Ints, Ints]] = {}

    # Refusals ---------------------------------------------------------------------------------

    def span(self, site: tuple[int, int]) -> Span:
        """A place of the emitted text."""
        line, column = site
        return Span(self.source, line, column + 1, len(self.source.line(line)) + 1)

    def differs(self, site: tuple[int, int] | None, detail: str, *notes: str) -> NoReturn:
        """Refuses a difference."""
        span = self.span(site) if site is not None else None
        raise EmittedDiffers(span, detail=detail, notes=notes)

    # Tasks ------------------------------------------------------------------------------------

    def launch(self, agent: int, trace: Trace, workers: int) -> Placed:
        """The tasks of a launch: each stage's in queue order, and `finish`."""
        world = self.expected.world
        rank = np.repeat(np.arange(world, dtype=np.int64), workers)
        mine = [p for p in self.expected.phases if p.agent == agent]
        stages = [p for p in mine if p.kind == "stage"]
        if len(stages) != len(trace.segments):
            self.differs(None, f"{len(trace.segments)} stages; the program has {len(stages)}")
        found = Placed(trace, {}, {}, rank)
        for number, phase in enumerate(stages):
            found.phases[number] = phase
            found.task[number] = self.queue(trace, number, phase, rank)
        for phase in mine:
            if phase.kind == "finish":
                found.phases[FINISH] = phase
                found.task[FINISH] = (phase.first + rank)[:, None]
        return found

    def queue(self, trace: Trace, number: int, phase: Phase, rank: Ints) -> Ints:
        """The task of each lane and segment of a stage (-1 where there is none)."""
        counts = trace.segments[number]
        site = trace.stage_sites[number]
        most = int(counts.max()) if len(counts) else 0
        table = np.full((len(counts), most + 1), -1, dtype=np.int64)
        drawn = trace.tickets.get(number)
        workers = len(rank) // self.expected.world
        low, high = (int(w) for w in phase.op.get("workers", (0, workers)))
        first = int(evaluate(phase.op.get("first", 0), self.expected.env, phase.op))
        turned = (np.arange(workers) - low - first) % (high - low)
        for r in range(self.expected.world):
            # In the order in which workers stand in the queue: the first is where the stage begins.
            lanes = np.flatnonzero(rank == r)[np.argsort(turned, kind="stable")]
            total = int(counts[lanes].sum())
            if total != phase.count:
                self.differs(
                    site,
                    f"rank {r} runs {total} tasks of the stage @{phase.op.symbol}, "
                    f"the program {phase.count}",
                )
            if drawn is None:
                # Whoever has one task more than others comes first in the queue: no worker stands in for another.
                share = -(-(phase.count - turned[lanes % workers]) // (high - low))
                inside = (lanes % workers >= low) & (lanes % workers < high)
                other = counts[lanes] != np.where(inside, np.maximum(share, 0), 0)
                if np.any(other):
                    lane = lanes[int(np.argmax(other))]
                    self.differs(
                        site,
                        f"worker {lane % workers} of rank {r} runs {counts[lane]} tasks of the stage "
                        f"@{phase.op.symbol}, the program has it run another number",
                    )
                # Turn by turn, worker by worker: the order in which one worker would run them.
                grid = np.arange(most)[None, :] < counts[lanes][:, None]
                turn, who = np.nonzero(grid.T)
                table[lanes[who], turn] = phase.first + r * phase.count + np.arange(total)
        if drawn is not None or number in trace.drawers:
            mine = np.tile(
                (np.arange(workers) >= low) & (np.arange(workers) < high), self.expected.world
            )
            if not np.array_equal(trace.drawers.get(number, ~mine), mine):
                self.differs(
                    site,
                    f"the tasks of the stage @{phase.op.symbol} are drawn by other workers than "
                    f"{low} to {high - 1}",
                )
        for lane, segment, ticket in drawn or ():
            if np.any(ticket >= phase.count):
                self.differs(site, "a worker takes a position that the queue does not have")
            table[lane, segment] = phase.first + rank[lane] * phase.count + ticket
        return table

    # Accesses ---------------------------------------------------------------------------------

    def touches(self, placed: Placed, choose: Callable[[Access], bool]) -> None:
        """All reads and writes of an agent, each matched with an access of the program."""
        groups: dict[tuple[Any, ...], list[Touch]] = {}
        for touch in placed.trace.touches:
            key = (touch.site, touch.symbol, touch.write, touch.stage, touch.pair >= 0, touch.via)
            groups.setdefault(key, []).append(touch)
        sides: dict[tuple[int, int], tuple[Ints, Ints, Ints]] = {}
        candidates = [a for a in self.expected.accesses if choose(a)]
        # Of a copy the side that is written comes first: it says which copy of the task it is.
        ordered = sorted(groups.items(), key=lambda g: (g[0][0], not g[0][2], g[1][0].seq))
        for (site, symbol, write, stage, paired, via), parts in ordered:
            task = np.concatenate([placed.tasks(stage, t.lane, t.segment) for t in parts])
            seq = np.concatenate([np.full(len(t.lane), t.seq) for t in parts])
            home = np.concatenate([t.home for t in parts])
            lo = np.concatenate([t.lo for t in parts])
            hi = np.concatenate([t.hi for t in parts])
            if paired and not write and site in sides:
                which, row = self.source_side(site, symbol, sides[site], task, lo, hi, candidates)
            else:
                which, row = self.match(site, symbol, write, paired, task, home, lo, hi, candidates)
            if not write and not paired:
                pick, which, row, lo = self.continued(
                    symbol, task, home, lo, hi, which, row, candidates
                )
                task, seq, home, hi = task[pick], seq[pick], home[pick], hi[pick]
            if paired and write:
                sides[site] = (which, row, task)
            for number in np.unique(which).tolist():
                access = candidates[number]
                some = np.flatnonzero(which == number)
                at = row[some]
                tagged = self.expected.declarations[symbol].get("words")
                if tagged and not write and np.any(hi[some] > access.hi[at]):
                    self.differs(
                        site, f"it polls words of @{symbol} that the program does not read"
                    )
                first = lo[some]
                # What is read past the tile is not used: the flows into stores are compared below.
                last = np.minimum(hi[some], access.hi[at]) if not write else hi[some]
                self.accesses.append(
                    replace(
                        access,
                        task=task[some],
                        seq=seq[some],
                        rank=access.rank[at],
                        home=home[some],
                        lo=first,
                        hi=last,
                        want=access.want[at] + first - access.lo[at],
                        origin=None,
                        tma=via == "tma",
                        # Offsets in 32 bits that wrap have been refused.
                        wide=True,
                    )
                )
                self.count(access, at, first, last, write)
                if write and not paired:
                    self.flows(site, parts, some, access, at, task, first, last)

    def products(self, placed: Placed, choose: Callable[[Access], bool]) -> None:
        """Products over an axis that is moved: both sides are the same places of the whole, and are added in
        the order of the program."""
        candidates = [a for a in self.expected.accesses if choose(a)]
        reached: dict[
            tuple[int, int], Ints
        ] = {}  # by site: the last row of each task, in program order
        for product in placed.trace.products:
            if not len(product.lane):
                continue
            task = placed.tasks(product.stage, product.lane, product.segment)
            ends: list[Ints] = []
            turn = np.zeros(len(task), dtype=np.int64)
            for side, axis in zip(product.sides, product.axes, strict=True):
                which, row = self.match(
                    product.site,
                    side.symbol,
                    False,
                    False,
                    task,
                    side.home,
                    side.lo,
                    side.hi,
                    candidates,
                )
                place = np.zeros(len(task), dtype=np.int64)
                for number in np.unique(which).tolist():
                    access, some = candidates[number], which == number
                    at = row[some]
                    place[some] = access.want[at, axis] + side.lo[some, axis] - access.lo[at, axis]
                    turn[some] = np.maximum(turn[some], access.seq[at])
                ends.append(place)
            last = reached.setdefault(product.site, np.full(len(self.expected.task_rank), -1))
            if np.any(turn < last[task]):
                self.differs(product.site, "products are added in another order than the program's")
            last[task] = turn
            if not np.array_equal(ends[0], ends[1]):
                n = int(np.flatnonzero(ends[0] != ends[1])[0])
                one, two = (side.symbol for side in product.sides)
                self.differs(
                    product.site,
                    f"a product of parts of @{one} and @{two} that do not belong together",
                    f"the task: {self.expected.describe(int(task[n]))}",
                )

    def source_side(
        self,
        site: tuple[int, int],
        symbol: str,
        written: tuple[Ints, Ints, Ints],
        task: Ints,
        lo: Ints,
        hi: Ints,
        candidates: list[Access],
    ) -> tuple[Ints, Ints]:
        """The rows that the program copies to the places that this copy writes."""
        which = np.full(len(task), -1, dtype=np.int64)
        targets, row, tasks = written
        if not np.array_equal(task, tasks):
            self.differs(site, "a copy of which one side is empty")
        for target in np.unique(targets).tolist():
            pair = candidates[target].pair
            number = next(
                n for n, a in enumerate(candidates) if a.pair == pair and not a.write and pair >= 0
            )
            access, some = candidates[number], targets == target
            at = row[some]
            fits = np.all((access.lo[at] == lo[some]) & (access.hi[at] == hi[some]), axis=1)
            if access.symbol != symbol or not fits.all():
                self.differs(
                    site, f"another part of @{symbol} is copied there than the program copies"
                )
            which[some] = number
        return which, row

    def continued(
        self,
        symbol: str,
        task: Ints,
        home: Ints,
        lo: Ints,
        hi: Ints,
        which: Ints,
        row: Ints,
        candidates: list[Access],
    ) -> tuple[Ints, Ints, Ints, Ints]:
        """Reads that go on in further rows of the program, as one read a row.

        Returns for each read the number of the given one, its access and row, and where it begins. Where
        the program reads nothing behind the first row, what lies there is read past the tile.
        """
        pick = np.arange(len(task))
        found = [(pick, which, row, lo)]
        while len(pick):
            end = np.zeros_like(lo)
            for number in np.unique(which).tolist():
                end[which == number] = candidates[number].hi[row[which == number]]
            more: list[tuple[Ints, Ints, Ints, Ints]] = []
            for axis in range(lo.shape[1]):
                some = np.flatnonzero(hi[pick][:, axis] > end[:, axis])
                if not len(some):
                    continue
                at, begin = pick[some], lo[some].copy()
                begin[:, axis] = end[some, axis]
                next_, there = self.find(
                    symbol, False, False, task[at], home[at], begin, hi[at], candidates
                )
                same = next_ == which[some]
                more.append((at[same], next_[same], there[same], begin[same]))
            found += more
            if not more:
                break
            pick, which, row, lo = (np.concatenate(column) for column in zip(*more, strict=True))
        whole = [np.concatenate(column) for column in zip(*found, strict=True)]
        return whole[0], whole[1], whole[2], whole[3]

    def order(self, access: Access) -> tuple[Ints, Ints]:
        """The rows of an access sorted by task, and their tasks."""
        held = self.sorted.get(id(access))
        if held is None:
            by = np.argsort(access.task, kind="stable")
            held = self.sorted[id(access)] = (by, access.task[by])
        return held

    def match(
        self,
        site: tuple[int, int],
        symbol: str,
        write: bool,
        paired: bool,
        task: Ints,
        home: Ints,
        lo: Ints,
        hi: Ints,
        candidates: list[Access],
    ) -> tuple[Ints, Ints]:
        """For each row the access of the program that it is part of (its number), and the row there."""
        which, row = self.find(symbol, write, paired, task, home, lo, hi, candidates)
        bad = np.flatnonzero(which < 0)
        if len(bad):
            n = int(bad[0])
            region = ", ".join(
                f"{a}..{b}" for a, b in zip(lo[n].tolist(), hi[n].tolist(), strict=True)
            )
            verb = "writes" if write else "reads"
            self.differs(
                site,
                f"this {verb} @{symbol}[{region}] of rank {int(home[n])}, which its task does not do",
                f"the task: {self.expected.describe(int(task[n]))}",
            )
        return which, row

    def find(
        self,
        symbol: str,
        write: bool,
        paired: bool,
        task: Ints,
        home: Ints,
        lo: Ints,
        hi: Ints,
        candidates: list[Access],
    ) -> tuple[Ints, Ints]:
        """Like :meth:`match`, with -1 where there is none."""
        which = np.full(len(task), -1, dtype=np.int64)
        row = np.full(len(task), -1, dtype=np.int64)
        for number, access in enumerate(candidates):
            kind = access.op.name == "transfer"
            if access.symbol != symbol or access.write != write or kind != paired:
                continue
            by, tasks = self.order(access)
            begin = np.searchsorted(tasks, task, side="left")
            end = np.searchsorted(tasks, task, side="right")
            many = int((end - begin).max()) if len(task) else 0
            for step in range(many):
                at = by[np.minimum(begin + step, len(by) - 1)]
                fits = (which < 0) & (begin + step < end) & (access.home[at] == home)
                fits &= np.all((lo >= access.lo[at]) & (lo < access.hi[at]), axis=1)
                if write:
                    fits &= np.all(hi <= access.hi[at], axis=1)
                elif paired:
                    fits &= np.all((lo == access.lo[at]) & (hi == access.hi[at]), axis=1)
                which = np.where(fits, number, which)
                row = np.where(fits, at, row)
        return which, row

    def count(self, access: Access, at: Ints, lo: Ints, hi: Ints, write: bool) -> None:
        """Adds up what is touched of each row of an access; reads of the same again count once."""
        size = np.prod(hi - lo, axis=1)
        held = self.volume.setdefault(id(access), np.zeros(len(access.task), dtype=np.int64))
        if not write:
            rows = np.column_stack((at, lo, hi))
            if access.op.name == "load":
                # Several loads, of the same region or each of a part of it.
                known = self.regions.get(id(access))
                rows = rows if known is None else np.concatenate((known, rows))
                held[:] = 0
            boxes = np.unique(rows, axis=0)
            self.regions[id(access)] = boxes
            axes = lo.shape[1]
            at = boxes[:, 0]
            size = np.prod(boxes[:, 1 + axes :] - boxes[:, 1 : 1 + axes], axis=1)
        np.add.at(held, at, size)

    def complete(self, choose: Callable[[Access], bool]) -> None:
        """Refuses where the program touches more, or (in writes) less, than the module."""
        for access in self.expected.accesses:
            if not choose(access) or access.op.name == "collective":
                continue
            size = np.prod(access.hi - access.lo, axis=1)
            held = self.volume.get(id(access))
            if held is not None and not access.write:
                held = _shared(access, held)
            if held is not None and np.array_equal(held, size):
                continue
            if held is None and not access.write and self.twin(access):
                continue
            n = 0 if held is None else int(np.flatnonzero(held != size)[0])
            have = 0 if held is None else int(held[n])
            verb = "written" if access.write else "read"
            raise EmittedDiffers(
                access.op.span,
                detail=f"{have} of {int(size[n])} elements of @{access.symbol} are {verb} "
                f"by {self.expected.describe(int(access.task[n]))}",
            )

    def twin(self, access: Access) -> bool:
        """Whether another access of the program reads the same, and is complete."""
        for other in self.expected.accesses:
            same = other is not access and other.symbol == access.symbol and not other.write
            if not same or id(other) not in self.volume or other.op.name != access.op.name:
                continue
            if all(
                np.array_equal(a, b)
                for a, b in (
                    (other.task, access.task),
                    (other.home, access.home),
                    (other.lo, access.lo),
                    (other.hi, access.hi),
                )
            ):
                return True
        return False

    # Flows ------------------------------------------------------------------------------------

    def flows(
        self,
        site: tuple[int, int],
        parts: list[Touch],
        some: Ints,
        access: Access,
        at: Ints,
        task: Ints,
        lo: Ints,
        hi: Ints,
    ) -> None:
        """Compares the regions that flow into a store with those that the program stores."""
        tasks = task[some]
        needed = self.needed(access, tasks, lo - access.lo[at], hi - lo)
        have = {symbol: np.zeros_like(sizes) for symbol, sizes in needed.sizes.items()}
        starts = np.cumsum([0, *(len(t.lane) for t in parts)])
        for number, touch in enumerate(parts):
            mine = np.flatnonzero((some >= starts[number]) & (some < starts[number + 1]))
            if len(mine) == 0:
                continue
            local = some[mine] - starts[number]
            for (line, _, symbol, _), flow in touch.flows.items():
                on = flow.have[local]
                if on.any():
                    place = f"@{symbol}", f"(line {line}) flows into this store of @{access.symbol}"
                    self.flow(site, needed, flow, place, tasks, mine, local)
                    size = np.prod(flow.hi[local] - flow.lo[local], axis=1)
                    have[symbol][mine, flow.home[local]] += size * on
        for symbol, sizes in needed.sizes.items():
            bad = np.argwhere(sizes != have[symbol])
            if len(bad):
                k, rank = (int(x) for x in bad[0])
                self.differs(
                    site,
                    f"{int(have[symbol][k, rank])} elements of @{symbol} of rank {rank} flow into this store of "
                    f"@{access.symbol}, where the program has {int(sizes[k, rank])}",
                    f"the task: {self.expected.describe(int(tasks[k]))}",
                )

    def flow(
        self,
        site: tuple[int, int],
        needed: Inflow,
        flow: Flow,
        place: tuple[str, str],
        tasks: Ints,
        mine: Ints,
        local: Ints,
    ) -> None:
        """Refuses a region that flows into a part of a store where or along axes that the program has not.

        ``mine`` are rows of ``needed`` and ``tasks``, ``local`` those of ``flow``; ``place``: what flows where.
        """
        what, where = place
        axes = needed.along.get(flow.symbol)
        if axes is not None and not any(_follows(flow.axes, a) for a in axes):
            self.differs(site, f"{what} {where} along other axes than in the program")
        first, last, home = flow.lo[local], flow.hi[local], flow.home[local]
        outside = flow.have[local] & ~needed.holds(flow.symbol, mine, home, first, last)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            ends = zip(first[k].tolist(), last[k].tolist(), strict=True)
            region = ", ".join(f"{lo}..{hi}" for lo, hi in ends)
            task = self.expected.describe(int(tasks[mine[k]]))
            self.differs(site, f"{what}[{region}] {where}, which should not", f"the task: {task}")

    def needed(self, access: Access, tasks: Ints, offset: Ints, length: Ints) -> Inflow:
        """What flows into parts of a store in the program: each of ``tasks`` stores one of ``length`` elements an
        axis, which begins ``offset`` behind the task's first."""
        assert access.op.ref is not None
        placed = axes_of(access.op.ref, length.shape[1])
        needed = Inflow(len(tasks), self.expected.world)
        nowhere = np.zeros(len(tasks), dtype=bool)
        for (_, own), (op, axes) in self.demands.get(id(access.op), {}).items():
            # Axes of what is read with those of the store that are cut as they are.
            cut = [
                (axis, placed[tile_axis])
                for tile_axis, axis in enumerate(axes)
                if axis >= 0 and tile_axis < len(placed) and placed[tile_axis] >= 0
            ]
            found: dict[Key, Flow] = {}
            for other in self.expected.accesses:
                if other.op is op and other.own == own and not other.write:
                    needed.declare(other.symbol, tuple(axes))
                    for flow in regions(other, self.order(other), tasks, offset, length, cut):
                        gather(found, (0, 0, other.symbol, 0), flow, nowhere, True)
            # The turns of a loop make one box where they continue each other.
            for flow in found.values():
                needed.add(flow)
        return needed

    # Signals ----------------------------------------------------------------------------------

    def signals(self, placed: Placed) -> None:
        """All waits and notifies of an agent, each matched with one of the program."""
        for signal, seq in _grouped(placed.trace.signals):
            if signal.stage not in placed.task:
                self.differs(signal.site, "a signal that belongs to no task of the program")
            lane, segment, pick = signal.lane, signal.segment, np.arange(len(signal.lane))
            before = segment == PREFIX
            if before.any():
                if not signal.wait:
                    self.differs(signal.site, "a notify before any task")
                self.idle(placed, signal)
                lane, segment, pick = self.repeated(placed, signal)
            elif signal.wait and signal.last is not None:
                lane, segment, pick = _spread(lane, segment, signal.last - segment + 1)
            if before.any() and not before.all():
                self.differs(signal.site, "a wait that some workers make before their first task")
            task = placed.tasks(signal.stage, lane, segment)
            self.sync(placed, signal, task, pick, seq[pick])

    def repeated(self, placed: Placed, signal: Signal) -> tuple[Ints, Ints, Ints]:
        """A wait before the first task orders all tasks of its worker."""
        counts = placed.trace.segments[signal.stage][signal.lane]
        return _spread(signal.lane, np.zeros_like(signal.lane), counts)

    def idle(self, placed: Placed, signal: Signal) -> None:
        """A worker without tasks may wait only for what a worker with tasks waits for."""
        counts = placed.trace.segments[signal.stage][signal.lane]
        rank = placed.rank[signal.lane]
        key = (rank * self.expected.world + signal.home) * (1 << 32) + signal.flat
        busy = np.unique(key[counts > 0])
        if not np.all(np.isin(key[counts == 0], busy)):
            self.differs(signal.site, "a worker without a task waits for what no task waits for")

    def sync(self, placed: Placed, signal: Signal, task: Ints, pick: Ints, seq: Ints) -> None:
        """Rows of one signal, found again in the program."""
        flat, home, bound = signal.flat[pick], signal.home[pick], signal.bound[pick]
        rank = placed.rank[signal.lane][pick]
        through = (
            signal.through_flat[pick]
            if signal.through_flat is not None
            else np.full(len(pick), -1, dtype=np.int64)
        )
        left = np.ones(len(pick), dtype=bool)
        for old in self.expected.syncs:
            same = old.symbol == signal.symbol and old.wait == signal.wait
            if not same or (old.wait and old.epoch != signal.epoch):
                continue
            if old.via != signal.through and (old.wait or (old.bound > 1).any()):
                continue
            mine, keys = packed(
                (task, home, flat, bound), (old.task, old.home, old.flat, old.bound)
            )
            hit = left & np.isin(mine, keys)
            if not hit.any():
                continue
            left &= ~hit
            some = np.flatnonzero(hit)
            self.syncs.append(
                replace(
                    old,
                    task=task[some],
                    seq=seq[some],
                    rank=rank[some],
                    home=home[some],
                    flat=flat[some],
                    bound=bound[some],
                    through=through[some],
                    inside=np.ones(len(some), dtype=bool),
                    relaxed=False,
                    gpu=not signal.system,
                    proxy=signal.fence,
                    drain=signal.drained,
                    delay=signal.delayed,
                    equal=False,
                )
            )
        if left.any():
            n = int(np.flatnonzero(left)[0])
            verb = "waits for" if signal.wait else "notifies"
            self.differs(
                signal.site,
                f"this {verb} element {int(flat[n])} of @{signal.symbol} of rank {int(home[n])} "
                f"(count {int(bound[n])}), which its task does not do",
                f"the task: {self.expected.describe(int(task[n]))}",
            )

    def same_signals(self) -> None:
        """Refuses where a wait or notify of the program is missing, or made twice."""
        names = {name: n for n, name in enumerate(sorted(self.expected.declarations))}
        old, new = packed(_columns(self.expected.syncs, names), _columns(self.syncs, names))
        old, new = np.sort(old), np.sort(new)
        if np.array_equal(old, new):
            return
        for sync in self.expected.syncs:
            mine = _columns([sync], names)
            one, all_ = packed(mine, _columns(self.syncs, names))
            short = np.flatnonzero(~np.isin(one, all_))
            if len(short):
                n = int(short[0])
                verb = "wait for" if sync.wait else "notify of"
                raise EmittedDiffers(
                    sync.op.span,
                    detail=f"it lacks the {verb} element {int(sync.flat[n])} of @{sync.symbol} by "
                    f"{self.expected.describe(int(sync.task[n]))}",
                )
        self.differs(
            None,
            f"some of its {len(new)} waits and notifies are made twice; the program has {len(old)}",
        )


def _follows(axes: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether each axis of a tile that follows one of a region's follows the one that is ``wanted``."""
    return all(a in (-1, w) for a, w in zip(axes, wanted, strict=False))


def _spread(lane: Ints, first: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Rows repeated for ``counts`` tasks of their lane from ``first`` on: lanes, segments, row numbers."""
    pick = np.repeat(np.arange(len(lane)), counts)
    ends = np.cumsum(counts)
    segment = first[pick] + np.arange(len(pick)) - np.repeat(ends - counts, counts)
    return lane[pick], segment, pick


def _grouped(signals: Sequence[Signal]) -> list[tuple[Signal, Ints]]:
    """Signals of the same call as one, each with the number of each row in the order of events."""
    groups: dict[tuple[Any, ...], list[Signal]] = {}
    for s in signals:
        facts = (s.site, s.symbol, s.wait, s.stage, s.epoch, s.through, s.fence, s.system)
        groups.setdefault((*facts, s.delayed, s.drained), []).append(s)
    found: list[tuple[Signal, Ints]] = []
    for some in groups.values():
        columns = {
            name: np.concatenate([getattr(s, name) for s in some])
            for name in ("lane", "segment", "home", "flat", "bound")
        }
        if all(s.last is not None for s in some):
            columns["last"] = np.concatenate([s.last for s in some if s.last is not None])
        seq = np.concatenate([np.full(len(s.lane), s.seq, dtype=np.int64) for s in some])
        through = [s.through_flat for s in some if s.through_flat is not None]
        whole = replace(
            some[0], **columns, through_flat=np.concatenate(through) if through else None
        )
        found.append((whole, seq))
    return found


def packed(first: Sequence[Ints], second: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Rows of two tables, given as columns, as numbers: the same number for the same row."""
    size = len(first[0])
    key = np.zeros(size + len(second[0]), dtype=np.int64)
    for a, b in zip(first, second, strict=True):
        column = np.concatenate((a, b)).astype(np.int64)
        if len(column):
            column = column - column.min()
            both = key * (int(column.max()) + 1) + column
            key = np.unique(both, return_inverse=True)[1].ravel().astype(np.int64)
    return key[:size], key[size:]


def _columns(syncs: Sequence[Sync], names: dict[str, int]) -> list[Ints]:
    empty = np.zeros(0, dtype=np.int64)
    table = [
        (
            np.full(len(s.task), names[s.symbol]),
            np.full(len(s.task), s.wait),
            np.full(len(s.task), s.epoch),
            s.task,
            s.home,
            s.flat,
            s.bound,
            s.through,
        )
        for s in syncs
    ]
    return [np.concatenate([empty, *(row[n] for row in table)]) for n in range(8)]


def _shared(access: Access, held: Ints) -> Ints:
    """What is read of each row of an access: of one that a task reads again, as much as of the first."""
    rows = np.column_stack((access.task, access.home, access.lo, access.hi))
    _, same = np.unique(rows, axis=0, return_inverse=True)
    most = np.zeros(len(rows), dtype=np.int64)
    np.maximum.at(most, same.reshape(-1), held)
    return np.asarray(most[same.reshape(-1)])
