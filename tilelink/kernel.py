"""The ``@tilelink.kernel`` decorator and the object it makes."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tilelink.errors import InternalError, Source, Span, TilelinkError, choices
from tilelink.signature import checked

if TYPE_CHECKING:
    from tilelink.backend.runtime.explain import Explanation
    from tilelink.frontend.bind import Bound, Signature
    from tilelink.frontend.mapping import Mapping as TileMapping
    from tilelink.frontend.source import FunctionSource
    from tilelink.ir import Op

BACKENDS = ("reference", "simulate", "interpret", "cuda")
MAPPING_SUFFIXES = (".map", ".tl")


def _clean(error: TilelinkError) -> TilelinkError:
    """``error`` without the compiler's frames."""
    error.__traceback__ = None
    error.__cause__ = None
    error.__suppress_context__ = True
    return error


class Kernel:
    """A kernel: what to compute, and how its tiles move between ranks.

    ``name``, ``source`` and ``mapping`` say what it was made from; ``signature`` its parameters;
    ``example`` the extents that the command line uses where none are given.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        source: FunctionSource,
        mapping: TileMapping,
        signature: Signature,
        example: Mapping[str, int],
    ) -> None:
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self.__name__ = self.name = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__
        self.source = source
        self.mapping = mapping
        self.signature = signature
        self.example: Mapping[str, int] = MappingProxyType(dict(example))
        self._built: dict[Any, Op] = {}
        self._plain: BoundKernel | None = None
        self._tied: dict[Any, dict[str, frozenset[str]]] = {}

    def __repr__(self) -> str:
        return f"<tilelink kernel {self.name}({', '.join(self.signature.names)})>"

    def __copy__(self) -> Kernel:
        return self

    def __deepcopy__(self, memo: object) -> Kernel:
        """The same kernel: it is code, as a function is, and what it keeps is found anew elsewhere."""
        return self

    def __reduce__(self) -> Any:
        """By its module and name, as a function; NotPicklable where it is not found there."""
        if _named(self.__module__, self.__qualname__) is not self:
            from tilelink.frontend.errors import NotPicklable

            raise NotPicklable(
                what=f"kernel `{self.name}`",
                why=f"it is pickled by name, and `{self.__module__}.{self.__qualname__}` is not it",
                advice="define it at the top level of a module that can be imported, under its own name",
            )
        return _restored, (self.__module__, self.__qualname__)

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters' names in order."""
        return self.signature.names

    def build(
        self,
        extents: Mapping[str, int],
        dtypes: Mapping[str, str] | None = None,
        world: int = 1,
        present: Iterable[str] | None = None,
        scalars: Mapping[str, Any] | None = None,
        dtype: str = "bf16",
        dynamic: Iterable[str] = (),
    ) -> Op:
        """The typed kernel (Tile IR) for extents by name and element types by tensor.

        ``present`` names the tensor parameters that are given (default: those without a default value,
        and all outputs). ``scalars`` gives compile-time arguments their values, and run-time scalar
        parameters an example of theirs. ``dtype`` is the element type of tensors that ``dtypes`` does not
        name; one of them that is stored to has that of the first parameter.
        ``dynamic`` names extents whose values are capacities, beside those that the mapping marks.
        Raises the errors of `tilelink.frontend.errors`.
        """
        from tilelink.frontend.build import Request

        try:
            self._check_request(extents, dtypes, world, present, scalars)
        except TilelinkError as error:
            raise _clean(error) from None
        signature, values = self.signature, {**self.signature.defaults, **(scalars or {})}
        chosen = frozenset(
            name
            for name in signature.tensors
            if (name in present if present is not None else name not in signature.defaults)
            or name in signature.stored
        )
        unknown = [n for n in signature.names if n in signature.constants and n not in values]
        if unknown:
            from tilelink.frontend.errors import BadCall

            raise _clean(
                BadCall(
                    self.source.span(self.source.node),
                    what=f"`{unknown[0]}` of `{self.name}` is known when it is compiled, and has no value",
                    advice=f"give it a default: `*, {unknown[0]}=…`",
                )
            )
        constants = {n: v for n, v in values.items() if self._is_constant(n, v)}
        runtime = {
            n: "int32" if isinstance(values.get(n, 0.0), int) else "fp32"
            for n in signature.names
            if n not in signature.tensors | signature.extents and n not in constants
        }
        return self._build(
            Request(
                extents=dict(extents),
                dtypes=dict(dtypes or {}),
                stored=signature.stored,
                world=world,
                present=chosen,
                constants=constants,
                scalars=runtime,
                dtype=dtype,
                dynamic=frozenset(dynamic),
            )
        )

    def _check_request(
        self, extents: Any, dtypes: Any, world: Any, present: Any, scalars: Any
    ) -> None:
        """BadCall or BadExtent where an argument of :meth:`build` is not of its kind."""
        from tilelink.frontend.errors import BadCall
        from tilelink.frontend.validate import check_extents, check_world

        for what, value in (("extents", extents), ("dtypes", dtypes), ("scalars", scalars)):
            if value is not None and not isinstance(value, Mapping):
                raise BadCall(
                    what=f"`{what}` is a {type(value).__name__}", advice="pass a dict by name"
                )
        check_world(world)
        check_extents(extents)
        words = set(re.findall(r"\w+", self.source.source.text + self.mapping.source.text))
        unknown = [n for n in dtypes or () if n not in words]
        unknown += [n for n in (*(present or ()), *(scalars or ())) if n not in self.params]
        if unknown:
            raise BadCall(
                what=f"`{unknown[0]}` is no argument of `{self.name}`",
                advice=f"its arguments: {', '.join(self.params)}",
            )

    def _is_constant(self, name: str, value: Any) -> bool:
        fixed = name in self.signature.constants or isinstance(value, bool | str) or value is None
        return fixed and name not in self.signature.tensors | self.signature.extents

    def _build(self, request: Any) -> Op:
        from tilelink.frontend.build import build_kernel

        key = (tuple(sorted(request.extents.items())), *_form(request))
        if key not in self._built:
            try:
                self._built[key] = build_kernel(self.source, self.mapping, request)
            except TilelinkError as error:
                raise _clean(error) from None
            except Exception as error:
                detail = f"{type(error).__name__} in `{self.name}`: {error}"
                raise InternalError(self.source.span(self.source.node), detail=detail) from error
        return self._built[key]

    def bind(
        self,
        args: Sequence[Any],
        world: int,
        kwargs: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
    ) -> Bound:
        """Extents, element types and arguments by name of a call with one rank's arguments.

        ``strict`` also asks for what a GPU needs: contiguous memory and aligned rows. Errors name the
        argument.
        """
        from tilelink.frontend.bind import bind_arguments, match_arguments
        from tilelink.frontend.validate import check_world

        try:
            check_world(world)
            arguments = match_arguments(self.name, self.signature, tuple(args), kwargs or {})
            return bind_arguments(
                self.name, self.signature, self.mapping, arguments, world, strict=strict
            )
        except TilelinkError as error:
            raise _clean(error) from None

    def build_for(self, bound: Bound) -> Op:
        """The typed kernel of a bound call."""
        op = self._build(bound.request)
        for name, value in bound.tensors.items():
            if value is None and op.declared(name)["role"] != "out":
                from tilelink.frontend.errors import BadCall

                raise _clean(
                    BadCall(
                        what=f"`{self.name}` reads `{name}` before it stores to it, so it needs it",
                        advice=f"pass `{name}`: it is changed in place",
                    )
                )
        return op

    def at_capacity(
        self, bound: Bound, capacities: Mapping[str, tuple[int, ...]]
    ) -> tuple[Bound, dict[str, int]]:
        """A bound call as that of the program which serves it, and the values of its dynamic extents.

        ``capacities``: of each dynamic extent, see `tilelink.frontend.capacity`.
        """
        if not capacities:
            return bound, {}
        from tilelink.frontend.capacity import at_capacity, tied_to

        form = _form(bound.request)
        try:
            if form not in self._tied:
                built = self._build(replace(bound.request, dynamic=frozenset(capacities)))
                self._tied[form] = {name: tied_to(built, name) for name in capacities}
            tied = self._tied[form]
            request, values = at_capacity(bound.request, self.mapping, capacities, tied)
        except TilelinkError as error:
            raise _clean(error) from None
        return replace(bound, request=request), values

    @checked("Kernel.on", 'kernel.on("simulate", world=4)')
    def on(
        self,
        backend: str | None = None,
        *,
        world: int | None = None,
        group: Any = None,
        schedule: Any = None,
        seed: int = 0,
        dynamic: Any = None,
    ) -> BoundKernel:
        """This kernel on a backend: ``reference``, ``simulate`` or ``interpret`` on this CPU, else CUDA.

        The CPU backends take for each tensor a list of one a rank and give lists back; a tensor that is
        not in a list is that of every rank. ``world`` is the number of ranks (default: the length of
        the lists). ``group`` is a process group of torch.distributed, ``schedule`` a schedule, ``seed``
        the simulator's.

        ``dynamic`` names extents of the mapping that vary from call to call, ``dynamic=("M",)``, beside those
        that it marks itself: calls of any length run a few programs, each compiled for a capacity. The
        capacities are 16, 128 and from there on double, or are those of a dict: ``dynamic={"M": (256, 4096)}``.
        """
        from tilelink.frontend.errors import BadCall
        from tilelink.frontend.validate import check_world
        from tilelink.schedules import Schedule

        wrong: tuple[str, str] | None = None
        if backend is not None and backend not in BACKENDS:
            wrong = f"there is no backend `{backend}`", choices(backend, BACKENDS)
        elif schedule is not None and not isinstance(schedule, Schedule):
            wrong = (
                f"`schedule` is a {type(schedule).__name__}",
                "pass a tilelink.schedules.Schedule: `Schedule.from_json` reads one",
            )
        elif not isinstance(seed, int) or not 0 <= seed < 2**63:
            wrong = f"`seed` is {seed!r}", "pass an integer from 0 to 2^63 - 1"
        elif group is not None and backend not in (None, "cuda"):
            wrong = (
                f"`group` is for GPUs: the backend `{backend}` runs all ranks in this process",
                "leave it out, and give the number of ranks as `world`",
            )
        if wrong is not None:
            raise _clean(BadCall(what=wrong[0], advice=wrong[1]))
        if world is not None:
            try:
                check_world(world)
            except TilelinkError as error:
                raise _clean(error) from None
        from tilelink.frontend.capacity import read_capacities

        try:
            capacities = read_capacities(self.name, self.mapping, dynamic)
        except TilelinkError as error:
            raise _clean(error) from None
        return BoundKernel(self, backend or "cuda", world, group, schedule, seed, capacities)

    def explain(self, *args: Any, device: str | None = None, **kwargs: Any) -> Explanation:
        """As :meth:`BoundKernel.explain`."""
        return self.on().explain(*args, device=device, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs on the GPU of this rank; outputs in parameter order, those not given allocated."""
        if _is_compiling():
            return _untraced(self, args, kwargs)
        if self._plain is None:
            self._plain = self.on()
        return self._plain(*args, **kwargs)


class BoundKernel:
    """A kernel with a backend chosen, to be called."""

    def __init__(
        self,
        kernel: Kernel,
        backend: str,
        world: int | None,
        group: Any,
        schedule: Any,
        seed: int,
        capacities: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.kernel = kernel
        self.backend = backend
        self.world = world
        self.group = group
        self.schedule = schedule
        self.seed = seed
        self.capacities = capacities
        self._site: Any = None
        self._programs: dict[Any, Op] = {}

    def __copy__(self) -> BoundKernel:
        return self

    def __deepcopy__(self, memo: object) -> BoundKernel:
        """The same object: nothing of it changes but what it remembers of its calls."""
        return self

    def __reduce__(self) -> Any:
        """By the kernel's name and the options of :meth:`Kernel.on`; NotPicklable with a process group."""
        if self.group is not None:
            from tilelink.frontend.errors import NotPicklable

            raise NotPicklable(
                what=f"kernel `{self.kernel.name}` with the process group that it was given",
                why="a group belongs to the processes that made it",
                advice="pickle the kernel, and give it its group where it is loaded: `kernel.on(group=group)`",
            )
        options = (self.backend, self.world, None, self.schedule, self.seed, dict(self.capacities))
        return BoundKernel, (self.kernel, *options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in parameter order; a single one is not wrapped in a tuple."""
        if _is_compiling():
            return _untraced(self, args, kwargs)
        try:
            if self._site is not None:
                outputs = self._site(args, kwargs)
                return outputs[0] if len(outputs) == 1 else outputs
            if self.backend == "cuda":
                return self._launch(args, kwargs)
            return self._run(args, kwargs)
        except TilelinkError as error:
            raise _clean(error) from None

    def _launch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._site is None:
            from tilelink.backend.runtime.site import Site

            self._site = Site(self.kernel, self.group, self.schedule, self.capacities)
        return _unwrap(self._site(args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from tilelink.frontend.arguments import check_apart

        world, per_rank = self._split(args, kwargs)
        bounds = [self._bind(rank, world, a, k) for rank, (a, k) in enumerate(per_rank)]
        for rank, bound in enumerate(bounds):
            self._check_ranks(bounds[0], bound, rank)
        check_apart([bound.tensors for bound in bounds], self.kernel.signature.stored)
        op = self.kernel.build_for(bounds[0])
        inputs = [
            {**{n: t for n, t in b.tensors.items() if t is not None}, **b.scalars} for b in bounds
        ]
        results = self._execute(op, bounds[0], inputs)
        outputs = [t for t in op.find("tensor") if t["role"] in ("out", "inout")]
        names = [t.symbol for t in outputs]
        return _unwrap(
            tuple(
                [_deliver(b.tensors.get(n), r[n]) for b, r in zip(bounds, results, strict=True)]
                for n in names
            )
        )

    def _bind(self, rank: int, world: int, args: list[Any], kwargs: dict[str, Any]) -> Bound:
        from tilelink.frontend.arguments import check_tensor, on_rank

        try:
            bound = self.kernel.bind(args, world, kwargs, strict=False)
            for name, value in bound.tensors.items():
                check_tensor(name, value, name in self.kernel.signature.stored)
        except TilelinkError as error:
            raise (on_rank(error, rank) if rank else error) from None
        return bound

    def explain(self, *args: Any, device: str | None = None, **kwargs: Any) -> Explanation:
        """Which schedule a call with these arguments takes on this rank's GPU, and where that schedule is from.

        Of a kind of call that has run, what ran. Else it is chosen and compiled here, some seconds, and nothing is
        launched nor told to other ranks; tensors may be on the CPU or the meta device, since only shapes and
        element types count. ``device`` is a GPU by the name that CUDA has for it, ``"NVIDIA H200"``; the number
        of ranks is ``world`` of :meth:`Kernel.on`, or that of the group. What only a GPU knows is left out then:
        whether the tiles fit its shared memory. Errors: those of a call.
        """
        try:
            return self._explain(args, kwargs, device)
        except TilelinkError as error:
            raise _clean(error) from None

    def _explain(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: str | None
    ) -> Explanation:
        import torch

        from tilelink.backend.runtime import explain as explaining
        from tilelink.frontend.errors import BadCall

        if device is None:
            if not torch.cuda.is_available():
                raise BadCall(
                    what="there is no GPU here whose schedule could be explained",
                    advice='name one: `kernel.on(world=4).explain(a, b, device="NVIDIA H200")`',
                )
            device = torch.cuda.get_device_name()
            ran = None if self._site is None else self._site.chosen(args, kwargs)
            if ran is not None:
                return explaining.explained(ran, device)
        world, per_rank = self._split(args, kwargs)
        if self.world is None and self.backend == "cuda":
            world = _ranks_of(self.group)
        first, named = per_rank[0]
        bound = self._bind_shapes(first, named, world)
        # Simulator and interpreter take none that was tuned for GPUs.
        default = self.backend != "cuda"
        return explaining.explain(self.kernel.build_for(bound), self.schedule, device, default)

    def _bind_shapes(self, args: list[Any], kwargs: dict[str, Any], world: int) -> Bound:
        bound = self.kernel.bind(args, world, kwargs, strict=False)
        return self.kernel.at_capacity(bound, self.capacities)[0]

    @property
    def compilations(self) -> int:
        """How many programs the calls of this object have needed so far where extents are dynamic."""
        return self._site.programs if self._site is not None else len(self._programs)

    def _execute(self, op: Op, bound: Bound, inputs: list[dict[str, Any]]) -> Any:
        if self.backend == "reference":
            from tilelink.backend import reference

            return reference.run(op, inputs)
        from tilelink.backend.pipeline import compile_kernel

        program = self._at_capacity(bound) if self.capacities else compile_kernel(op, self.schedule)
        if self.backend == "simulate":
            from tilelink.backend import simulate

            return simulate.run(program, inputs, seed=self.seed)
        from tilelink.backend.runtime import interpret

        return interpret.run(program, inputs)

    def _at_capacity(self, bound: Bound) -> Op:
        """The program of the capacity that serves a call, at the call's values; compiled once."""
        from tilelink.backend.pipeline import compile_kernel
        from tilelink.ir.instance import at_extents

        served, values = self.kernel.at_capacity(bound, self.capacities)
        key = (tuple(sorted(served.request.extents.items())), *_form(served.request))
        if key not in self._programs:
            self._programs[key] = compile_kernel(self.kernel.build_for(served), self.schedule)
        return at_extents(self._programs[key], values)

    def _split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, list[tuple[list[Any], dict[str, Any]]]]:
        """The number of ranks, and each one's arguments: lists are taken apart, all else is shared."""
        from tilelink.frontend.errors import BadCall
        from tilelink.frontend.validate import check_world

        named = dict(zip(self.kernel.params, args, strict=False)) | kwargs
        lists = {n: len(v) for n, v in named.items() if isinstance(v, list | tuple)}
        world = self.world if self.world is not None else next(iter(lists.values()), 1)
        for name, length in lists.items():
            if length != world:
                raise BadCall(
                    what=f"argument `{name}` is a list of {length}, but there are {world} ranks",
                    advice="pass a list of one tensor a rank",
                )

        check_world(world)

        def of(value: Any, rank: int) -> Any:
            return value[rank] if isinstance(value, list | tuple) else value

        return world, [
            ([of(a, rank) for a in args], {k: of(v, rank) for k, v in kwargs.items()})
            for rank in range(world)
        ]

    def _check_ranks(self, first: Bound, bound: Bound, rank: int) -> None:
        from tilelink.frontend.arguments import check_same
        from tilelink.frontend.errors import ShapeMismatch

        if bound.request == first.request and bound.scalars == first.scalars:
            return
        check_same({**first.tensors, **first.scalars}, {**bound.tensors, **bound.scalars}, rank)
        raise ShapeMismatch(
            left=f"the arguments of rank {rank}",
            right="those of rank 0",
            advice="all ranks pass the same shapes, element types and numbers",
        )


def _ranks_of(group: Any) -> int:
    """How many ranks a call on this group has; of none, the default group or this process alone."""
    import torch.distributed as dist

    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return 1 if group is None else int(group.size())


def _is_compiling() -> bool:
    """Whether torch.compile traces this call. A call needs torch anyway; the module that is read here does not."""
    import torch

    return torch.compiler.is_dynamo_compiling()


def _untraced(called: Kernel | BoundKernel, args: Any, kwargs: Any) -> Any:
    """The call as it is made without torch.compile: what is traced ends before it, and goes on behind it."""
    from tilelink.untraced import call

    return call(called, args, kwargs)


def _named(module: str, name: str) -> Any:
    """What is called ``name`` in a module, which is imported where it is not yet; None if there is nothing."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _restored(module: str, name: str) -> Kernel:
    """The kernel that was pickled under this name; NotPicklable where there is none here."""
    found = _named(module, name)
    if not isinstance(found, Kernel):
        from tilelink.frontend.errors import NotPicklable

        raise NotPicklable(
            what=f"the kernel `{module}.{name}`",
            why="nothing here has that name",
            advice=f"make `{module}` importable in the process that loads it",
        )
    return found


def _form(request: Any) -> tuple[Any, ...]:
    """What a request asks for beside the values of extents."""
    return (
        tuple(sorted(request.dtypes.items())),
        request.world,
        request.present,
        tuple(sorted((n, repr(v)) for n, v in request.constants.items())),
        tuple(sorted(request.scalars.items())),
        request.dtype,
        request.dynamic,
        tuple(sorted(request.least.items())),
        tuple(sorted(request.ranks.items())),
    )


def _deliver(given: Any, result: Any) -> Any:
    """The output tensor: the one the caller gave, filled, or the executor's own."""
    if given is None or given is result:
        return result
    given.copy_(result)
    return given


def _unwrap(outputs: Any) -> Any:
    if isinstance(outputs, tuple | list) and len(outputs) == 1:
        return outputs[0]
    return outputs


@checked("tilelink.kernel", '@tilelink.kernel("gather A[M, K] over M", example=dict(M=512))')
def kernel(
    mapping: str, *, example: Mapping[str, int] | None = None
) -> Callable[[Callable[..., Any]], Kernel]:
    """Makes a kernel of a function: ``@tilelink.kernel("gather A[M, K] over M")``.

    ``mapping`` is text of the mapping language, or the path of a ``.map`` or ``.tl`` file beside the
    source. ``example`` gives extents to the command line. The function is parsed, never called; a mistake
    raises an error of `tilelink.frontend` with its place.
    """
    given: object = mapping
    if not isinstance(given, str):
        from tilelink.frontend.errors import BadCall

        kind = "a function" if callable(given) else type(given).__name__
        raise BadCall(
            what=f"`tilelink.kernel` takes the mapping as text, not {kind}",
            advice='@tilelink.kernel("gather A[M, K] over M")',
        )
    _check_example(example)

    def decorate(function: Callable[..., Any]) -> Kernel:
        from tilelink.frontend.bind import read_signature
        from tilelink.frontend.source import read_function

        try:
            source = read_function(function)
            placed = _read_mapping(mapping, source)
            signature = read_signature(source, placed)
        except TilelinkError as error:
            raise _clean(error) from None
        return Kernel(function, source, placed, signature, example or {})

    return decorate


def _check_example(example: Any) -> None:
    from tilelink.frontend.errors import BadCall
    from tilelink.frontend.validate import check_extents

    if example is not None and not isinstance(example, Mapping):
        raise BadCall(
            what=f"`example` is a {type(example).__name__}",
            advice="give extents by name: example=dict(M=512)",
        )
    try:
        check_extents(example or {})
    except TilelinkError as error:
        error.notes = ("in the `example` of the decorator",)
        raise _clean(error) from None


def _read_mapping(text: str, source: FunctionSource) -> TileMapping:
    from tilelink.frontend.errors import BadFile
    from tilelink.frontend.mapping import parse_mapping

    if text.endswith(MAPPING_SUFFIXES) and "\n" not in text:
        path = Path(source.function.__code__.co_filename).parent / text
        try:
            content = path.read_text()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise BadFile(
                what=f"the mapping file `{text}` of kernel `{source.name}` cannot be read: {why}",
                advice=f"the path is relative to the folder of {source.source.name}",
            ) from None
        from tilelink.frontend.source import display_name

        return parse_mapping(content, display_name(str(path)))
    for decorator in source.node.decorator_list:
        for node in ast.walk(decorator):
            if isinstance(node, ast.Constant) and node.value == text:
                quotes = _quotes(source.source, node)
                return parse_mapping(
                    text,
                    source.source.name,
                    host=source.source,
                    line_offset=node.lineno - 1,
                    column_offset=node.col_offset + quotes,
                )
    return parse_mapping(text, f"<mapping of {source.name}>")


def _quotes(source: Source, node: ast.Constant) -> int:
    """How many characters stand before the content of a string literal."""
    start = source.line(node.lineno)[node.col_offset :]
    prefix = len(start) - len(start.lstrip("rRuUbBfF"))
    return prefix + (3 if start[prefix : prefix + 3] in ('"""', "'''") else 1)


def load_kernels(path: str | Path) -> dict[str, Kernel]:
    """The kernels that a Python file defines, by name, in order of definition.

    Raises BadFile where the file cannot be read or imported, and the errors of its kernels.
    """
    from tilelink.frontend.errors import BadFile
    from tilelink.frontend.source import display_name

    path = Path(path)
    name = display_name(str(path))
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadFile(
            what=f"{name} cannot be read: {why}", advice="give the path of a Python file"
        ) from None
    try:
        compile(text, str(path), "exec")
    except SyntaxError as error:
        column = error.offset or 1
        end = max(error.end_offset or 0, column + 1)
        span = Span(Source(name, text), error.lineno or 1, column, end)
        raise BadFile(
            span,
            what=f"this is not Python: {error.msg}",
            advice=f"the file is read as Python {sys.version_info.major}.{sys.version_info.minor}",
        ) from None
    except (RecursionError, MemoryError):
        raise BadFile(
            what=f"{name} is nested too deep to be read", advice="write shorter expressions"
        ) from None
    except ValueError as error:  # a NUL character
        raise BadFile(what=f"{name} is not Python: {error}", advice="give a text file") from None
    module_name = f"tilelink_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise BadFile(what=f"{name} is not a Python file", advice="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except TilelinkError as error:
        error.span = error.span or _place_in(error, path, Source(name, text))
        raise _clean(error) from None
    except (Exception, SystemExit) as error:
        raise BadFile(
            _place_in(error, path, Source(name, text)),
            what=f"importing {name} failed: {type(error).__name__}: {error}",
            advice="the file is imported to find its kernels",
        ) from None
    found = [v for v in vars(module).values() if isinstance(v, Kernel)]
    return {k.name: k for k in sorted(found, key=_line)}


def _line(found: Kernel) -> int:
    return found.source.node.lineno


def _place_in(error: BaseException, path: Path, source: Source) -> Span | None:
    """The last line of ``path``, whose text is ``source``, on the way to ``error``."""
    found, frame, file = None, error.__traceback__, str(path.resolve())
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == file:
            found = Span(source, frame.tb_lineno, 1, len(source.text) + 1)
        frame = frame.tb_next
    return found
