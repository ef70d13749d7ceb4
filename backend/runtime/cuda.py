"""Runs fused programs on GPUs: the call path of decorated functions and of emitted modules.

One process drives one GPU. What is met for the first time is checked, agreed between the ranks,
given memory and compiled; after that a call is a lookup and a list of driver calls.
"""

from __future__ import annotations

import hashlib
import inspect
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from tilelink.backend.runtime import load_module, release, write_module
from tilelink.backend.runtime.arena import Arena, CudaState, NoArena, asking, state_of
from tilelink.backend.runtime.choose import Chosen, compile_chosen
from tilelink.backend.runtime.driver import driver
from tilelink.backend.runtime.errors import (
    BadArgument,
    NotPrepared,
    TooLargeForSM,
    TooManyWorkers,
)
from tilelink.backend.runtime.faults import reason
from tilelink.backend.runtime.image import Image, Slot, image_of
from tilelink.backend.runtime.order import order_of
from tilelink.backend.runtime.plan import Plan, Recorder, rows_behind
from tilelink.backend.runtime.views import TORCH_DTYPES, lasting
from tilelink.errors import InternalError, TilelinkError
from tilelink.ir import FLOATS, Op, parse_ir

PLANS = 256  # recorded calls kept a program

Tensors = dict[str, torch.Tensor]
Extents = Mapping[str, int]
NO_EXTENTS: Extents = MappingProxyType({})
Host = Callable[[Any], None]


class Program:
    """A program bound to a process group, compiled on every rank; and to an arena, if it needs one."""

    @lasting()
    def __init__(self, state: CudaState, image: Image, host: Host, arena: Arena | NoArena) -> None:
        self.state, self.image, self.host, self.arena = state, image, host, arena
        self.number = state.number_of(image)
        # Of a decorated kernel: its schedule, and where that is from.
        self.chosen: Chosen | None = None
        self.workspace = state.workspace_for(image.workspace_bytes)
        self.device = state.device.index
        self._order = order_of(self.device)
        # Looked at in every call.
        self._apart, self.endless = image.apart, () if image.bare else image.endless
        self._collectives = bool(image.collectives) and state.world > 1
        self.outputs = tuple(slot.name for slot in image.outputs)
        self._only = self.outputs[0] if len(self.outputs) == 1 else None
        self.temporary = {
            s.name: torch.empty(s.dims, dtype=TORCH_DTYPES[s.dtype], device=state.device)
            for s in image.tensors.values()
            if s.role == "temp"
        }
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._bare: dict[tuple[int, ...], Plan] = {}
        self._slots: dict[tuple[int, ...], dict[str, Slot]] = {}

    def slots(self, extents: Extents) -> dict[str, Slot]:
        """The tensors of a call with these values of the dynamic extents."""
        if not extents:
            return self.image.tensors
        key = tuple(extents.values())
        found = self._slots.get(key)
        if found is None:
            if len(self._slots) >= PLANS:
                self._slots.clear()
            found = self._slots[key] = self.image.at(extents)
        return found

    def allocate(self, given: Mapping[str, torch.Tensor | None], extents: Extents) -> Tensors:
        """The tensors of a call: those given, and fresh ones for outputs that are not."""
        tensors = dict(self.temporary)
        for name, slot in self.slots(extents).items():
            value = given.get(name)
            if value is not None:
                tensors[name] = value
            elif slot.role == "out":
                tensors[name] = torch.empty(
                    slot.dims, dtype=TORCH_DTYPES[slot.dtype], device=self.state.device
                )
        return tensors

    def plan(self, tensors: Tensors, scalars: Mapping[str, float], extents: Extents) -> Plan:
        """The recorded call for these addresses and numbers; the order of ``tensors`` is always the same."""
        numbers = map(_bits, scalars.values())
        key = (*[t.data_ptr() for t in tensors.values()], *numbers, *extents.values())
        if self.endless:
            key = (*key, *self.reach(tensors))
        found = self._plans.get(key)
        if found is None:
            distinct = _check_apart(self.image, tensors)
            # What the library alone is called with is found anew in every call with as many rows, by name: where
            # two names stand for the same memory, what is recorded tells them not apart.
            rows = tuple(extents.values())
            found = self._bare.get(rows) or self._record(tensors, scalars, extents)
            if self.image.bare and distinct:
                self._bare[rows] = found
            if len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = found
        return found

    def reach(self, tensors: Tensors) -> tuple[int, ...]:
        """How many rows lie behind the inputs that kernels may read on: memory of an address may be another
        allocation by the next call, with less behind it."""
        return tuple([rows_behind(tensors[name]) for name in self.endless])

    def portable(self, extents: Extents) -> Plan | None:
        """The recorded call for any addresses, of outputs that lie in no other tensor; or None."""
        return self._bare.get(tuple(extents.values()))

    def call(
        self, tensors: Tensors, scalars: Mapping[str, float], extents: Extents = NO_EXTENTS
    ) -> tuple[torch.Tensor, ...]:
        """Enqueues one call; returns the outputs in parameter order. ``extents``: the dynamic ones."""
        return self.enqueue(self.plan(tensors, scalars, extents), tensors)

    def enqueue(self, plan: Plan, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """Enqueues a call that was recorded with tensors like these; returns the outputs as :meth:`call`."""
        state, order = self.state, self._order
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        with order.turn:
            if torch._C._cuda_isCurrentStreamCapturing():
                plan.enqueue(stream, tensors)
                state.note_capture(self._collectives)
            else:
                if order.stream != stream:
                    order.follow(stream)
                try:
                    plan.run(stream, tensors, state.spare)
                except BaseException:
                    self._cut_short(stream)
                    raise
                state.note_call(self._apart, self._collectives, stream)
                order.stream, order.last = stream, state
        if self._only is not None:
            return (tensors[self._only],)
        return tuple([tensors[name] for name in self.outputs])

    def _cut_short(self, stream: int) -> None:
        """A call was enqueued in part, as an error or ^C left it: nobody waits for the rest, on any rank."""
        if isinstance(self.arena, Arena) and self.state.world > 1:
            self.state.note_call(self._apart, self._collectives, stream)
            self.state.cut_short(self.image, self.arena)

    @lasting()
    def _record(self, tensors: Tensors, scalars: Mapping[str, float], extents: Extents) -> Plan:
        state = self.state
        recorder = Recorder(
            self.image,
            state.rank,
            self.arena.views,
            self.arena.peers,
            *state.limits[self.number - 1],
            streams=state.stream,
            group=state.group,
            host_record=state.host_address,
            addresses=self.arena.addresses,
        )
        recorder.tensors = tensors
        recorder.workspace = self.workspace
        recorder.scalars = dict(scalars)
        recorder.program = self.number
        recorder.extents |= extents
        self.host(recorder)
        plan = recorder.finish()
        for name, launch in zip(self.image.launches, plan.launches, strict=True):
            _check_resident(name, launch.compiled, launch.workers, state.device)
        return plan


def program_of(
    kernel: Any,
    tensors: Mapping[str, torch.Tensor | None],
    scalars: Mapping[str, float],
    group: Any = None,
    schedule: Any = None,
    capacities: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[Program, Extents]:
    """The program of a decorated kernel for these arguments, known to all ranks of the group; and the values
    of its dynamic extents in this call.

    ``tensors``: by parameter name, None for what is to be allocated; on the current device, contiguous
    or the transpose of a contiguous matrix, 16-byte aligned. ``group``: a process group, None for the
    default one; without torch.distributed the kernel runs on this GPU alone. ``capacities``: of each dynamic
    extent, see `tilelink.frontend.capacity`. The first time with new shapes, or for a new capacity, is
    collective and slow. Nothing is launched on any rank unless every rank can.

    Errors: those of ``kernel.bind`` and of the compiler, BadArgument, AgreementError, NotPrepared inside
    a graph capture, TooManyWorkers, OutOfMemory, WaitTimeout for an earlier call that ran into one.
    """
    state = state_of(group)
    state.check_usable()
    shapes, values = _shape_key(tensors), NO_EXTENTS
    if capacities:
        try:
            bound, values = kernel.at_capacity(
                kernel.bind((), state.world, {**tensors, **scalars}), capacities
            )
            shapes = tuple(sorted(bound.request.extents.items()))
        except TilelinkError as error:
            refuse(kernel.name, error, group)
            raise
    key = (id(kernel), id(state), schedule, shapes, _constants(kernel, scalars), _kinds(tensors))
    known = _kernels.get(key)
    if known is None:
        with _meeting:
            known = _kernels.get(key)
            if known is None:
                program = _meet_kernel(state, kernel, tensors, scalars, schedule, capacities)
                known = _kernels[key] = _Known(kernel, program)
    elif values:
        try:
            _check_tensors(known.program.slots(values), _dense(tensors), state.device)
        except TilelinkError as error:
            refuse(kernel.name, error, group)
            raise
    return known.program, values


def refuse(kernel: str, error: TilelinkError, group: Any = None) -> None:
    """Tells the ranks of ``group`` that this one cannot run ``kernel``; the caller then raises ``error``."""
    state_of(group).refuse(kernel, error)


def run_program(
    text: str, host: Host, tensors: Any, scalars: Mapping[str, float], group: Any = None
) -> tuple[torch.Tensor, ...]:
    """Runs an emitted module: its IR text and host function; see :func:`launch`.

    ``tensors``: by name, or in parameter order (all of them, or those that the program reads). ``scalars``: by
    name, in any order.
    """
    state = state_of(group)
    state.check_usable()
    digest = hashlib.sha256(text.encode()).hexdigest()
    # The kernels are the module's: one whose text was edited has the same program and other kernels.
    key = (digest, host, id(state))
    program = _programs.get(key)
    if program is None:
        image = image_of(parse_ir(text))
        given, numbers = _by_name(image, tensors), _numbers(image, scalars)
        facts = {"program": digest[:16], "emitted source": _source_of(host)}
        with _meeting:
            program = _programs.get(key) or _meet(
                state, image.name, lambda: (image, host, facts), given, numbers
            )
            _programs[key] = program
    given = _by_name(program.image, tensors)
    extents = program.image.extents_of({n: t.shape for n, t in given.items()})
    _check_extents(program.image, extents)
    _check_tensors(program.slots(extents), given, state.device)
    numbers = _numbers(program.image, scalars)
    return program.call(program.allocate(given, extents), numbers, extents)


def _source_of(host: Host) -> str:
    """A digest of the file that an emitted module's ``host`` was read from; empty if there is none now."""
    try:
        source = Path(inspect.getfile(host)).read_bytes()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source).hexdigest()[:16]


class _Known:
    """A program of a kernel; holds the kernel, so that its id is not used again."""

    def __init__(self, kernel: Any, program: Program) -> None:
        self.kernel, self.program = kernel, program


_meeting = threading.RLock()  # ranks meet one program at a time
_kernels: dict[tuple[object, ...], _Known] = {}
_programs: dict[tuple[str, Host, int], Program] = {}


def _forget(state: Any) -> None:
    for kernel in [key for key, known in _kernels.items() if known.program.state is state]:
        del _kernels[kernel]
    for program in [key for key, known in _programs.items() if known.state is state]:
        del _programs[program]


release.forgetting.append(_forget)


def _bits(number: float) -> object:
    """What tells a number from others that a kernel may tell from it: zeros of both signs are equal, and NaN is
    not what it is."""
    return struct.pack("d", number) if isinstance(number, float) else number


def _shape_key(tensors: Mapping[str, torch.Tensor | None]) -> tuple[object, ...]:
    return tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
        for t in tensors.values()
    )


def _kinds(tensors: Mapping[str, torch.Tensor | None]) -> tuple[object, ...]:
    """What of the tensors goes into a program beside their shapes."""
    return tuple((n, None if t is None else t.dtype) for n, t in tensors.items())


def _dense(tensors: Mapping[str, torch.Tensor | None]) -> Tensors:
    """The tensors that are given, contiguous."""
    return {n: t.contiguous() for n, t in tensors.items() if t is not None}


def _constants(kernel: Any, scalars: Mapping[str, Any]) -> tuple[object, ...]:
    """What of the scalars goes into the program: compile-time arguments; of others, their type."""
    fixed = kernel.signature.constants
    return tuple(
        repr(v) if n in fixed or isinstance(v, bool | str) or v is None else type(v)
        for n, v in scalars.items()
    )


def _meet_kernel(
    state: CudaState,
    kernel: Any,
    tensors: Mapping[str, torch.Tensor | None],
    scalars: Mapping[str, float],
    schedule: Any,
    capacities: Mapping[str, tuple[int, ...]],
) -> Program:
    made: list[Chosen] = []

    def compile_it(default: bool = False) -> tuple[Image, Host, dict[str, str]]:
        bound = kernel.bind((), state.world, {**tensors, **scalars})
        bound, _ = kernel.at_capacity(bound, capacities)
        op: Op = kernel.build_for(bound)
        device = torch.cuda.get_device_name(state.device)
        chosen = compile_chosen(op, schedule, device, default)
        made.append(chosen)
        program, source = chosen.program, chosen.source
        image = image_of(program)
        module = load_module(write_module(source, image.name))
        shapes = {n: list(s.dims) for n, s in image.tensors.items()}
        facts = {
            "kernel": kernel.name,
            "shapes": ", ".join(f"{n}{dims}" for n, dims in shapes.items()),
            "dtypes": ", ".join(f"{n}: {s.dtype}" for n, s in image.tensors.items()),
            "schedule": str(program.get("schedule", "")),
            "emitted source": hashlib.sha256(source.encode()).hexdigest()[:16],
        }
        return image, module.host, facts

    given = _dense(tensors)
    try:
        program = _meet(state, kernel.name, compile_it, given, scalars)
    except TooLargeForSM as error:
        # So it is on every rank. What was tuned for another shape, or predicted, gives way.
        if schedule is not None:
            raise
        program = _meet(state, kernel.name, partial(compile_it, True), given, scalars)
        first, last = made
        refused = (*first.refused, (first.origin, reason(error)))
        made = [replace(last, refused=refused)]
    program.chosen = made[-1]
    return program


def _meet(
    state: CudaState,
    name: str,
    prepare: Callable[[], tuple[Image, Host, dict[str, str]]],
    given: Tensors,
    scalars: Mapping[str, float],
) -> Program:
    """Checks, agrees, allocates, compiles, and agrees once more that every rank has compiled."""
    error: TilelinkError | None = None
    facts: dict[str, str] = {}
    try:
        if torch.cuda.is_current_stream_capturing():
            raise NotPrepared(kernel=name)
        image, host, facts = prepare()
        if image.world != state.world:
            raise BadArgument(
                name="group",
                detail=f"has {state.world} ranks, the program is for {image.world}",
                help="emit the program for this number of ranks",
            )
        extents = image.extents_of({n: t.shape for n, t in given.items()})
        _check_extents(image, extents)
        _check_tensors(image.at(extents), given, state.device)
    except Exception as problem:
        error = _typed(problem, name)
    if error is not None:
        state.refuse(name, error)
        raise error
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    state.agree(name, {**facts, "versions": versions}, None)
    arena: Arena | NoArena = NoArena(state.world, state.device)
    if not image.apart:
        # An error of one rank is one of all here too.
        arena = state.arena_for(image.arena_bytes, image.slots)
    try:
        fresh = sum(s.bytes for n, s in image.at(extents).items() if n not in given)
        with asking(state.rank, fresh + image.workspace_bytes, f"`{name}`"):
            program = Program(state, image, host, arena)
            numbers = {n: scalars[n] for n in image.scalars}
            program.plan(program.allocate(given, extents), numbers, extents)
    except Exception as problem:
        error = _typed(problem, name)
    # All ranks were there a moment ago, but one may find in its cache what another has to compile.
    state.agree(name, {"compiled": "yes"}, error, least=120.0)
    if error is not None:
        raise error
    return program


def _typed(problem: Exception, kernel: str) -> TilelinkError:
    if isinstance(problem, TilelinkError):
        return problem
    error: TilelinkError
    if isinstance(problem, OutOfResources):
        error = TooLargeForSM(
            kernel=kernel, required=problem.required, resource=problem.name, limit=problem.limit
        )
    else:
        error = InternalError(detail=f"{type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error


def _by_name(image: Image, tensors: Any) -> Tensors:
    if isinstance(tensors, Mapping):
        return dict(tensors)
    visible = [s.name for s in image.tensors.values() if s.role != "temp"]
    read = [s.name for s in image.tensors.values() if s.role in ("in", "inout")]
    names = visible if len(tensors) == len(visible) else read
    if len(tensors) != len(names):
        raise BadArgument(
            name=image.name,
            detail=f"{len(tensors)} tensors were given",
            help=f"pass {', '.join(visible)}, or {', '.join(read)} alone",
        )
    return dict(zip(names, tensors, strict=True))


def _numbers(image: Image, scalars: Mapping[str, float]) -> dict[str, float]:
    """The scalars of a call in the order of the program and of its types; BadArgument for what is none."""
    found: dict[str, float] = {}
    for name, dtype in image.scalars.items():
        value = scalars.get(name)
        if isinstance(value, float) and value.is_integer() and dtype not in FLOATS:
            value = int(value)
        if not isinstance(value, int | float) or (isinstance(value, float) and dtype not in FLOATS):
            detail = "is missing" if value is None else f"is {value!r}"
            raise BadArgument(name=name, detail=detail, help=f"it is a number, {dtype}")
        found[name] = float(value) if dtype in FLOATS else int(value)
    return found


def _check_extents(image: Image, extents: Extents) -> None:
    """Raises BadArgument where a dynamic extent is not among the values that the program is proven for."""
    for name, value in extents.items():
        low, high = image.least[name], image.dynamic[name]
        if not low <= value <= high:
            raise BadArgument(
                name=name,
                detail=f"is {value}, the program is for {low} to {high}",
                help="emit the program for a larger capacity, or for none",
            )


def _check_tensors(slots: Mapping[str, Slot], given: Tensors, device: torch.device) -> None:
    """Raises BadArgument for what a kernel could not read or write as it is."""
    for name, slot in slots.items():
        tensor = given.get(name)
        if tensor is None:
            if slot.role in ("in", "inout"):
                raise BadArgument(name=name, detail="is missing", help="the program reads it")
            continue
        _check_tensor(slot, tensor, device)


def _check_tensor(slot: Slot, tensor: torch.Tensor, device: torch.device) -> None:
    def refuse(detail: str, help: str) -> BadArgument:
        return BadArgument(name=slot.name, detail=detail, help=help)

    if tensor.device != device:
        raise refuse(
            f"is on {tensor.device}, this rank computes on {device}",
            "move it, or call torch.cuda.set_device first",
        )
    if tensor.dtype != TORCH_DTYPES[slot.dtype]:
        raise refuse(f"is {tensor.dtype}, the program takes {slot.dtype}", "convert it")
    if tuple(tensor.shape) != slot.dims:
        raise refuse(
            f"has shape {list(tensor.shape)}, the program takes {list(slot.dims)}",
            "a tensor that is spread over the ranks is passed as this rank's shard",
        )
    if not tensor.is_contiguous():
        raise refuse("is not contiguous", "pass tensor.contiguous()")
    if tensor.data_ptr() % 16:
        raise refuse("does not start at a multiple of 16 bytes", "pass a copy: tensor.clone()")


def _check_apart(image: Image, tensors: Tensors) -> bool:
    """Raises BadArgument where an output shares memory with another tensor of the call.

    Tiles are read and written in no order, so what is read could already be overwritten. Returns whether no
    two tensors at all share memory: inputs may.
    """
    outputs, distinct = {slot.name for slot in image.outputs}, True
    spans = [(n, t.data_ptr(), t.data_ptr() + t.nbytes) for n, t in tensors.items()]
    for (one, low, high), (other, start, stop) in combinations(spans, 2):
        if not (low < stop and start < high):
            continue
        distinct = False
        if one in outputs or other in outputs:
            name, with_ = (one, other) if one in outputs else (other, one)
            raise BadArgument(
                name=name,
                detail=f"shares memory with `{with_}`",
                help="pass a tensor of its own, or leave the output out to have it allocated",
            )
    return distinct


def _check_resident(name: str, compiled: Any, workers: int, device: torch.device) -> None:
    """Raises TooManyWorkers unless all CTAs of a launch are on the GPU at once.

    They spin, so one that had to wait for another one's SM could wait for ever.
    """
    compiled.run  # noqa: B018 - loads the kernel, which fills in its function and registers
    threads = compiled.metadata.num_warps * 32
    per_sm = driver().resident(compiled.function, threads, compiled.metadata.shared)
    resident = per_sm * torch.cuda.get_device_properties(device).multi_processor_count
    if workers > resident:
        raise TooManyWorkers(
            kernel=name,
            workers=workers,
            resident=resident,
            registers=compiled.n_regs,
            shared=compiled.metadata.shared,
            warps=compiled.metadata.num_warps,
        )
