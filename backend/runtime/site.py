"""The call path of decorated kernels, with as little as possible between arguments and the recorded plan.

What kind of call it is (shapes, element types, alignments, compile-time arguments) is one key; what has
been found out about calls of a kind is kept beside it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd.graph import increment_version

from tilelink.backend.runtime import release
from tilelink.backend.runtime.arena import CudaState, state_of
from tilelink.backend.runtime.choose import Chosen
from tilelink.backend.runtime.cuda import PLANS, Program, program_of, refuse
from tilelink.backend.runtime.errors import BadArgument
from tilelink.backend.runtime.plan import Plan
from tilelink.backend.runtime.views import TORCH_DTYPES
from tilelink.errors import TilelinkError
from tilelink.frontend.arguments import check_tensor, has_storage
from tilelink.frontend.bind import match_arguments

KINDS = 4096  # kinds of calls remembered a site
NO_NUMBERS: Mapping[str, Any] = MappingProxyType({})
_records_gradients = torch.is_grad_enabled


class Route:
    """Calls of one kind: their program, and where each of its tensors and scalars comes from."""

    __slots__ = ("extents", "fresh", "names", "numbers", "program", "stored", "tensors", "whole")

    def __init__(
        self,
        program: Program,
        extents: Mapping[str, int],
        names: tuple[str, ...],
        given: Mapping[str, Any],
    ) -> None:
        self.program, self.extents = program, extents
        place = {name: number for number, name in enumerate(names)}
        # What is not contiguous is copied; outputs that are left out are not among them.
        self.tensors = [
            (name, place[name], given[name].is_contiguous())
            for name in program.image.tensors
            if given.get(name) is not None
        ]
        # Those that a call writes: autograd is to know that they change.
        self.stored = [
            number for name, number, _ in self.tensors if program.image.tensors[name].role != "in"
        ]
        # Whether the arguments are what the program works on, as they are and in its order, but for outputs
        # behind them; and those: what is allocated.
        image, self.names = program.image, names
        slots = program.slots(extents)
        rest = [slots[name] for name in image.tensors][len(names) :]
        self.whole = (
            names == tuple(image.tensors)[: len(names)]
            and len(names) == len(self.tensors)
            and not image.scalars
            and all(dense for *_, dense in self.tensors)
            and all(slot.role == "out" for slot in rest)
        )
        device = given[names[0]].device if self.whole else None
        self.fresh = [(s.name, s.dims, TORCH_DTYPES[s.dtype], device) for s in rest]
        # An argument that is left out has its default, always.
        self.numbers = [
            (name, place.get(name), given[name] if name not in place else None)
            for name in program.image.scalars
        ]
        for name, _, dense in self.tensors:
            if not dense and program.image.tensors[name].role != "in":
                raise BadArgument(
                    name=name,
                    detail="is an output and not contiguous",
                    help="pass a contiguous tensor",
                )

    def __call__(self, values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        program, extents = self.program, self.extents
        if self.stored:
            increment_version([values[number] for number in self.stored])
        if self.whole:
            return program.call(self.gather(values), NO_NUMBERS, extents)
        given = {
            name: values[number] if dense else values[number].contiguous()
            for name, number, dense in self.tensors
        }
        tensors = program.allocate(given, extents)
        scalars: Mapping[str, Any] = NO_NUMBERS
        if self.numbers:
            scalars = {
                name: default if number is None else values[number]
                for name, number, default in self.numbers
            }
        return program.call(tensors, scalars, extents)

    def gather(self, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        """The tensors of a call that is ``whole``, by name."""
        tensors = dict(zip(self.names, values))  # noqa: B905 - as many as the kind of call has
        for name, dims, dtype, device in self.fresh:
            tensors[name] = torch.empty(dims, dtype=dtype, device=device)
        return tensors


class Site:
    """A kernel with the group, the schedule and the capacities that its calls use; see :func:`program_of`.

    Calling it runs the kernel on this rank's arguments and returns its outputs in parameter order.
    """

    def __init__(
        self,
        kernel: Any,
        group: Any,
        schedule: Any,
        capacities: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.kernel, self.group, self.schedule = kernel, group, schedule
        self.capacities = capacities
        self._met: set[int] = set()
        self._routes: dict[tuple[object, ...], Route] = {}
        # By the addresses too: the route, and the recorded call where it is the same each time.
        self._calls: dict[tuple[object, ...], tuple[Route, Plan | None, tuple[int, ...]]] = {}
        signature = kernel.signature
        self._positional = [n for n in signature.names if n not in signature.keywords]
        # Compile-time arguments and extents count by value, other numbers by type.
        self._fixed = signature.constants | signature.extents
        with _listing:
            _sites.add(self)

    def forget(self, state: Any) -> None:
        """Drops what was found out for a state of the group, which is the first thing in each key."""
        for known in (self._routes, self._calls):
            for key in [key for key in known if key[0] == id(state)]:
                del known[key]

    @property
    def programs(self) -> int:
        """How many programs its calls have needed."""
        return len(self._met)

    def chosen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chosen | None:
        """What calls of this kind run; None where there has been none."""
        values = (*args, *kwargs.values())
        key = self._key(state_of(self.group), len(args), tuple(kwargs), values)
        route = self._routes.get(key) if key is not None else None
        return None if route is None else route.program.chosen

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        state = state_of(self.group)
        state.check_usable()
        if kwargs:
            return self._look(state, args, kwargs)((*args, *kwargs.values()))
        try:
            # Tensors alone, as nearly always: nothing else has all of these.
            key = (
                id(state),
                _records_gradients(),
                *[
                    (
                        t.shape,
                        t.is_contiguous() or t.stride(),
                        t.dtype,
                        t.get_device(),
                        t.data_ptr(),
                        t.requires_grad,
                    )
                    for t in args
                ],
            )
        except (AttributeError, RuntimeError):
            return self._look(state, args, kwargs)(args)
        known = self._calls.get(key)
        if known is None:
            known = self._remember(key, state, args)
        route, plan, reach = known
        if plan is None:
            return route(args)
        program, tensors = route.program, route.gather(args)
        if program.endless and program.reach(tensors) != reach:
            del self._calls[key]
            return route(args)
        if route.stored:
            increment_version([args[number] for number in route.stored])
        return program.enqueue(plan, tensors)

    def _remember(
        self, key: tuple[Any, ...], state: CudaState, args: tuple[torch.Tensor, ...]
    ) -> tuple[Route, Plan | None, tuple[int, ...]]:
        """The route of these tensors, the recorded call where it depends on no others, and how far it reads on
        behind them."""
        route, plan = self._look(state, args, {}), None
        reach: tuple[int, ...] = ()
        if route.whole and route.fresh:
            plan = route.program.portable(route.extents)
        elif route.whole:
            tensors = route.gather(args)
            plan = route.program.plan(tensors, NO_NUMBERS, route.extents)
            reach = route.program.reach(tensors)
        if len(self._calls) >= PLANS:
            self._calls.pop(next(iter(self._calls)))
        self._calls[key] = route, plan, reach
        return route, plan, reach

    def _look(self, state: CudaState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Route:
        """The route of this kind of call, found out where it is new."""
        key = self._key(state, len(args), tuple(kwargs), (*args, *kwargs.values()))
        route = self._routes.get(key) if key is not None else None
        if route is None:
            route = self._meet(args, kwargs)
            if key is not None:
                if len(self._routes) >= KINDS:
                    self._routes.clear()
                self._routes[key] = route
        return route

    def _key(
        self, state: CudaState, count: int, keywords: tuple[str, ...], values: tuple[Any, ...]
    ) -> tuple[object, ...] | None:
        """What decides how a call runs; None where only a look at each argument can tell."""
        facts: list[object] = [id(state), count, keywords]
        names = self._positional
        for number, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                if value.layout is not torch.strided or (
                    value.requires_grad and torch.is_grad_enabled()
                ):
                    return None
                if not has_storage(value):
                    return None
                address = value.data_ptr() & 15
                facts += (value.shape, value.stride(), value.dtype, value.device, address)
            elif value is None or isinstance(value, bool | str):
                facts.append(value)
            elif isinstance(value, int | float):
                at = number - count
                name = keywords[at] if at >= 0 else names[number] if number < len(names) else ""
                facts.append((type(value), repr(value) if name in self._fixed else None))
            else:
                return None
        return tuple(facts)

    def _meet(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Route:
        """Checks the arguments of a kind of call that is new, and finds its program; collective."""
        kernel, signature = self.kernel, self.kernel.signature
        try:
            given = match_arguments(kernel.name, signature, args, kwargs)
            for name, value in given.items():
                if name in signature.tensors:
                    check_tensor(name, value, name in signature.stored)
        except TilelinkError as error:
            # The other ranks may be about to call: they hear of it instead of waiting.
            refuse(kernel.name, error, self.group)
            raise
        tensors = {n: v for n, v in given.items() if n in signature.tensors}
        scalars = {n: v for n, v in given.items() if n not in signature.tensors}
        program, extents = program_of(
            kernel, tensors, scalars, self.group, self.schedule, self.capacities
        )
        self._met.add(id(program))
        names = (*self._positional[: len(args)], *kwargs)
        return Route(program, extents, names, given)


_sites: weakref.WeakSet[Site] = weakref.WeakSet()
_listing = threading.Lock()


def _forget(state: Any) -> None:
    with _listing:
        sites = list(_sites)
    for site in sites:
        site.forget(state)


release.forgetting.append(_forget)
