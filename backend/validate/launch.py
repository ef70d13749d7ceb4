"""An emitted kernel whose warps have roles: each role is run, and they are put together as one worker.

The roles that load are run by all workers of all ranks: the loader, and the fetcher of parts of sums that land
in a ring of their own. Then the two groups that multiply are, as two lanes a worker in step. What passes between
them in shared memory makes what the loader does in a task come before what the groups do behind their main loop,
and what the fetcher does before what they do behind the sum.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tilelink.backend.validate.forwarding import CopyingGroups, CopyingLoader
from tilelink.backend.validate.layout import Layout
from tilelink.backend.validate.loader import FetcherMachine, LoaderMachine, RoleMachine
from tilelink.backend.validate.ring import Loaded, Orders, Pair, Ring, Room, Turns
from tilelink.backend.validate.roles import GROUPS
from tilelink.backend.validate.trace import Touch, Trace
from tilelink.backend.validate.values import (
    Choice,
    Context,
    Data,
    Descriptor,
    Name,
    Num,
    Pointer,
    Special,
    full,
)
from tilelink.errors import Source

GROUP_WARPS = 4
LOADER_WARPS = 1  # of each role that loads
_RINGS = 2  # of the operands, and of parts of sums
_CELL_AXES = 2


class LaunchMachine(RoleMachine):
    """The kernel itself: shared memory, the start of the roles, and the way out."""

    def __init__(
        self,
        source: Source,
        function: ast.FunctionDef,
        layout: Layout,
        workers: int,
        streamed: frozenset[str],
        functions: Mapping[str, ast.FunctionDef],
        landed: tuple[int, ...],
        reverse: bool = False,
    ) -> None:
        super().__init__(source, function, layout, workers, streamed)
        self.reverse = reverse
        self.functions = functions
        self.used: set[str] = set()
        self.landed = landed
        # In the order in which they are made: of the operands, and of parts that land apart.
        self.rings: list[Ring] = []
        self.turns: list[Turns] = []
        self.pair: Pair | None = None
        self.orders: Orders | None = None
        self.rooms: list[Room] = []
        self.started = False

    def free(self, node: ast.Name) -> Any:
        """Functions of roles."""
        return Name(f"role {node.id}") if node.id in self.functions else super().free(node)

    def once(self, held: object, times: int = 1) -> None:
        """Refuses more than there are roles for, and shared memory behind the start of the roles."""
        made = len(held) if isinstance(held, list) else int(held is not None)
        if made >= times or self.started or not self.all:
            self.unclear("shared memory that is made twice, or too late")

    def on_roles_ring(self, slots: Any, readers: Any) -> Ring:
        """``roles.ring``."""
        self.once(self.rings, _RINGS)
        self.rings.append(Ring(self.whole(slots, "slots"), self.whole(readers, "readers")))
        return self.rings[-1]

    def on_roles_turns(self) -> Turns:
        """``roles.turns``."""
        self.once(self.turns, _RINGS)
        self.turns.append(Turns())
        return self.turns[-1]

    def on_roles_pair(self) -> Pair:
        """``roles.pair``."""
        self.once(self.pair)
        self.pair = Pair()
        return self.pair

    def on_roles_orders(self) -> Orders:
        """``roles.orders``."""
        self.once(self.orders)
        self.orders = Orders(np.zeros(self.lanes, dtype=np.int64))
        return self.orders

    def on_roles_tiles(self, descriptor: Any, count: Any) -> Room:
        """``roles.tiles``."""
        self.once(None)
        if not isinstance(descriptor, Descriptor) or len(descriptor.block) != _CELL_AXES:
            self.unclear("tiles of something that is no descriptor")
        dtype = self.layout.declared[descriptor.symbol]["dtype"]
        item = self.layout.item[descriptor.symbol]
        room = Room(descriptor.block, dtype, item, self.whole(count, "a number of tiles"))
        self.rooms.append(room)
        return room

    def on_roles_room(self, descriptor: Any, rows: Any, columns: Any) -> Room:
        """``roles.room``: a tile for each group."""
        self.once(next((r for r in self.rooms if r.columns), None))
        made = self.on_roles_tiles(descriptor, GROUPS)
        block = self.whole(rows, "a number of rows"), self.whole(columns, "a number of columns")
        if any(whole % part for whole, part in zip(block, made.block, strict=True)):
            self.hazard("memory by way of which tiles leave, in boxes that do not come out even")
        self.rooms[-1] = room = replace(made, block=block, columns=made.block[1])
        return room

    def on_gl_warp_specialize(self, started: Any, warps: Any, registers: Any) -> None:
        """``gl.warp_specialize``: two groups of the same function, a warp that loads, and one that may fetch."""
        self.once(None)
        several = GROUPS + len(self.rings)
        if warps != (GROUP_WARPS, *(LOADER_WARPS,) * len(self.rings)):
            self.unclear("warps that are not those of two groups and of a role for each ring")
        if not isinstance(registers, tuple) or len(registers) != len(warps):
            self.unclear("registers of other warps")
        shape = isinstance(started, tuple) and len(started) == several
        if not shape or any(not isinstance(s, tuple) or len(s) != 2 for s in started):
            self.unclear("roles that are not two groups and one for each ring")
        for function, given in started:
            named = isinstance(function, Name) and function.path.startswith("role ")
            if not named or not isinstance(given, tuple):
                self.unclear("a role that is no function of the module")
        (one, mine), (two, others), (load, its), *fetch = started
        same = len(mine) == len(others) and all(
            a is b or a == b for a, b in zip(mine[1:], others[1:], strict=True)
        )
        if one != two or (mine[:1], others[:1]) != ((0,), (1,)) or not same or load == one:
            self.unclear("groups that do not run the same function for the roles 0 and 1")
        if any(function in (one, load) for function, _ in fetch):
            self.unclear("one function for two roles")
        if not self.rings:
            self.unclear("roles without a ring")
        if len(self.rings) == _RINGS and len(self.turns) != _RINGS:
            self.hazard("two groups take parts of sums from one ring, and have no turns at it")
        if any(ring.readers != (GROUPS if not self.turns else 1) for ring in self.rings):
            self.hazard("the ring waits for another number of groups than take its steps")
        if self.orders is not None and not self.turns:
            self.hazard(
                "groups that have half of each tile are handed tiles that one of them copies"
            )
        self.started = True
        source, rest = self.source, (self.layout, self.workers, self.streamed)
        loaded = Loaded(self.rings[0], self.rooms)
        loader = CopyingLoader(
            self.orders, self.reverse, source, self.function_of(load), *rest, loaded
        )
        self.role(loader, its)
        if loader.opened is not None:
            if self.opened is not None:
                self.hazard("the launch and its loader both open the call")
            # All that groups do comes behind a step of the loader.
            self.opened, self.told = loader.opened, loader.told
        if self.orders is not None and not loader.trace.queues:
            self.hazard("there is shared memory for tiles that are drawn, and nothing is drawn")
        self.trace.queues |= loader.trace.queues
        self.trace.tickets |= loader.trace.tickets
        self.trace.drawers |= loader.trace.drawers
        fetcher = None
        for function, given in fetch:
            landing = Loaded(self.rings[1], self.rooms)
            fetcher = FetcherMachine(
                self.landed, source, self.function_of(function), *rest, landing
            )
            self.role(fetcher, given)
            if fetcher.opened is not None:
                self.hazard("the role that fetches opens the call, which the loader opens")
            if loaded.used & landing.used:
                self.hazard("operands and parts of sums are loaded into the same memory")
        self.group(one, mine, loader, fetcher)

    def function_of(self, name: Name) -> ast.FunctionDef:
        """The function of a role."""
        found = name.path.removeprefix("role ")
        self.used.add(found)
        return self.functions[found]

    def role(self, machine: LoaderMachine, given: tuple[Any, ...]) -> None:
        """Runs a role that loads; its events are this worker's."""
        self.bound(machine, machine.function, given, 1)
        machine.start({})
        machine.finished()
        self.a_part(machine)
        self.wait_names += machine.wait_names
        self.adopt(machine.trace, 1)

    def group(
        self,
        name: Name,
        given: tuple[Any, ...],
        loader: LoaderMachine,
        fetcher: FetcherMachine | None,
    ) -> None:
        """Runs the groups; behind what the loader and the fetcher do in a task comes what they do."""
        function = self.function_of(name)
        turns: list[Turns | None] = [*self.turns, None, None]
        assert loader.loaded is not None
        machine = CopyingGroups(
            self.orders, self.source, function, self.layout, self.workers, self.streamed,
            loader.loaded, turns[0], self.pair,
            fetcher.loaded if fetcher is not None else None, turns[1],
        )  # fmt: skip
        self.bound(machine, function, (Num(machine.role), *given[1:]), GROUPS)
        machine.start({})
        machine.finished()
        counts = {n: c[: self.lanes] for n, c in machine.trace.segments.items()}
        same = counts.keys() == loader.trace.segments.keys() and all(
            np.array_equal(c, loader.trace.segments[n]) for n, c in counts.items()
        )
        if not same:
            self.hazard("the loader and the groups do not go through the same tasks")
        if fetcher is not None:
            mine = fetcher.trace.segments
            if any(not np.array_equal(c, counts.get(n, -1)) for n, c in mine.items()):
                self.hazard("the fetcher and the groups do not go through the same tasks")
        for role, taking in zip((loader, fetcher), machine.takings(), strict=False):
            gifts = taking.gifts[: self.lanes] + taking.gifts[self.lanes :]
            assert role is not None
            if (gifts != role.claimed * taking.loaded.ring.readers).any():
                self.hazard("steps are given back by more or fewer groups than the ring waits for")
        if any(mask.any() for mask, _ in machine.flying):
            self.hazard("products are under way when a group ends")
        self.a_part(machine)
        if machine.opened is not None:
            self.hazard("groups open the call, which the loader opens for them")
        self.wait_names += machine.wait_names
        self.adopt(machine.trace, GROUPS)
        for symbol, lanes in machine.tma.items():
            both = lanes.reshape(GROUPS, -1).any(axis=0)
            self.tma[symbol] = self.tma.get(symbol, np.zeros_like(both)) | both

    def a_part(self, machine: RoleMachine) -> None:
        """Refuses a role that begins the call or leaves it: the launch does so, once for all of them."""
        if machine.begun or machine.left:
            self.hazard("a role begins or leaves the call, of which it is a part")

    def bound(
        self, machine: RoleMachine, function: ast.FunctionDef, given: tuple[Any, ...], times: int
    ) -> None:
        """Gives a role its arguments, ``times`` lanes for each of the kernel's."""
        names = [a.arg for a in function.args.args]
        if len(names) != len(given):
            self.unclear(f"{len(given)} arguments for {len(names)} parameters of a role")
        for number, (name, value) in enumerate(zip(names, given, strict=True)):
            already = number == 0 and times > 1
            machine.env[name] = value if already else self.widened(value, times)

    def widened(self, value: Any, times: int) -> Any:
        """A value for ``times`` lanes in place of each."""
        if isinstance(value, Num):
            return Num(np.tile(full(value.v, self.lanes), times), value.wide)
        if isinstance(value, Pointer) and not value.shape:
            home = np.tile(full(value.home, self.lanes), times)
            return replace(value, home=home, base=np.tile(full(value.base, self.lanes), times))
        fixed = (
            Context
            | Descriptor
            | Special
            | Ring
            | Turns
            | Pair
            | Orders
            | Room
            | int
            | float
            | Data
        )
        if isinstance(value, Choice) or not isinstance(value, fixed):
            self.unclear("an argument of a role")
        return value

    def adopt(self, trace: Trace, times: int) -> None:
        """Puts the events of a role behind those that are there."""
        shift = self.trace.step
        lanes = trace.lanes // times

        def moved(event: Touch | Any) -> Any:
            facts: dict[str, Any] = {"lane": event.lane % lanes, "seq": event.seq + shift}
            if isinstance(event, Touch) and event.pair >= 0:
                facts["pair"] = event.pair + shift
            return replace(event, **facts)

        self.trace.touches += [moved(t) for t in trace.touches]
        self.trace.signals += [moved(s) for s in trace.signals]
        self.trace.pairs |= {pair + shift: site for pair, site in trace.pairs.items()}
        self.trace.flushed |= trace.flushed
        self.trace.segments = {n: c[:lanes] for n, c in trace.segments.items()}
        self.trace.stage_sites = dict(trace.stage_sites)
        self.trace.step = shift + trace.step

    def on_device_finish_arrive(self, ctx: Any) -> Num:
        """``device.finish_arrive``: behind the roles."""
        if not self.started:
            self.hazard("the launch is left before its roles are started")
        return super().on_device_finish_arrive(ctx)

    def on_device_end_call(self, ctx: Any, first: Any, last: Any, slots: Any) -> Num:
        """``device.end_call``: by warps that drain no stores of other warps."""
        if any(lanes.any() for lanes in self.tma.values()):
            self.hazard("TMA stores of a group are not drained when its worker ends the call")
        return super().on_device_end_call(ctx, first, last, slots)
