"""From FILE on the command line to kernels and fused programs."""

from __future__ import annotations

import argparse
import ast
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilelink.cli.errors import (
    FusedIsFixed,
    FusedOnly,
    MissingExtents,
    NoFile,
    NoKernel,
    UnknownName,
)
from tilelink.cli.options import check_known, merged, read_file, read_input, schedule_of
from tilelink.errors import InternalError, IRSyntaxError, TilelinkError, choices, did_you_mean
from tilelink.frontend.validate import check_kernel
from tilelink.ir import FLOATS, Op, parse_ir
from tilelink.ir.check import check_types
from tilelink.ir.vocabulary import check_names

if TYPE_CHECKING:
    from tilelink.kernel import Kernel
    from tilelink.schedules import Schedule
    from tilelink.schedules.machine import Machine

DEFAULT_WORLD = 4
_TOP = re.compile(r"^(?:kernel|program) @", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Unit:
    """One kernel or fused program of a FILE. ``op`` is its IR, every extent known."""

    name: str
    path: str
    op: Op

    @property
    def fused(self) -> bool:
        """Whether the FILE gave a fused program, so that the kernel itself is not known."""
        return self.op.name == "program"

    @property
    def world(self) -> int:
        """The number of ranks."""
        return int(self.op["world"])

    def kernel(self, command: str) -> Op:
        """The kernel; FusedOnly if the FILE holds a fused program."""
        if self.fused:
            raise FusedOnly(command=command, path=self.path)
        return self.op

    def schedule(self, args: argparse.Namespace) -> Schedule:
        """The schedule to compile the kernel with."""
        return schedule_of(args, self.kernel("--schedule"))

    def program(self, args: argparse.Namespace) -> Op:
        """The fused program: the one given, or the kernel compiled."""
        if self.fused:
            # Not when it is read: between the passes, a program refers to what a later one declares.
            check_names(self.op)
            check_types(self.op)
            check_size(self.op)
            return self.op
        from tilelink.backend.pipeline import compile_kernel

        return compile_kernel(self.op, self.schedule(args))


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """A kernel of a FILE that is refused before there is IR of it, and why."""

    name: str
    error: TilelinkError


def check_size(program: Op) -> None:
    """TooLarge where a stage of a fused program has more tasks than can be enumerated."""
    from tilelink.backend.expand import environment, stage_tiles

    env = environment(program)
    for launch in program.find("launch"):
        for stage in launch.find("stage"):
            stage_tiles(stage, env, 0)


def load(args: argparse.Namespace) -> list[Unit]:
    """The kernels that ``args.file`` names, built for the extents and world of the options.

    The first that cannot be built raises its error.
    """
    units: list[Unit] = []
    for found in load_each(args):
        if isinstance(found, Unbuilt):
            raise found.error
        units.append(found)
    return units


def load_each(args: argparse.Namespace) -> list[Unit | Unbuilt]:
    """The same for commands that judge each kernel by itself: with those that cannot be built."""
    path, colons, wanted = args.file.rpartition("::") if "::" in args.file else (args.file, "", "")
    if not path or (colons and not wanted):
        raise NoFile(given=args.file)
    if args.target:
        machine_of(args.target)
    text = read_input() if path == "-" else read_file(path)
    args.text = text
    shown = "<stdin>" if path == "-" else path
    if is_ir(path, text):
        units = [_from_ir(op, shown, args) for op in parse_all(text, shown)]
        for number, unit in enumerate(units):
            if unit.name in [other.name for other in units[:number]]:
                raise NoKernel(
                    path=shown,
                    wanted=f"`{unit.name}`, for it is there twice,",
                    advice="give each its own name",
                )
        chosen = _choose({unit.name: unit for unit in units}, wanted, shown)
        return [unit for unit in units if unit.name in chosen]
    return _from_python(path, shown, text, wanted, args)


def parse_all(text: str, name: str) -> list[Op]:
    """Every ``kernel`` and ``program`` of an IR text, spans counted from its first line."""
    starts = [match.start() for match in _TOP.finditer(text)] or [0]
    ends = [*starts[1:], len(text)]
    starts[0] = 0
    # Blank lines in place of what comes before keep line numbers true.
    ops = []
    for start, end in zip(starts, ends, strict=True):
        ops.append(parse_ir("\n" * text.count("\n", 0, start) + text[start:end], name))
    return ops


def is_ir(path: str, text: str) -> bool:
    """Whether FILE is IR text: by its suffix, else by what it holds."""
    if path.endswith(".ir"):
        return True
    return not path.endswith(".py") and _TOP.search(text) is not None


def _like(kernel: Kernel, named: dict[str, str]) -> str:
    """The element type of tensors that are not named: that of the first argument that is and holds floats."""
    read = [n for n in kernel.signature.names if n in named and n not in kernel.signature.stored]
    return next((named[n] for n in read if named[n] in FLOATS), "bf16")


def _choose(known: Mapping[str, object], wanted: str, path: str) -> list[str]:
    if (wanted and wanted not in known) or not known:
        advice = choices(wanted, sorted(known), "it holds")
        if not known:
            advice = "a kernel is a function under `@tilelink.kernel(...)`"
        raise NoKernel(path=path, wanted=f"`{wanted}`" if wanted else "at all", advice=advice)
    return [wanted] if wanted else list(known)


def _from_ir(op: Op, path: str, args: argparse.Namespace) -> Unit:
    if op.name not in ("kernel", "program"):
        raise IRSyntaxError(op.span, expected="`kernel` or `program`", found=f"`{op.name}`")
    if op.name == "kernel":
        check_names(op)
        check_types(op)
    if op.ref is None:
        raise IRSyntaxError(op.span, expected=f"a name behind `{op.name}`", found="none")
    unit = Unit(op.symbol, path, op)
    sets = merged(args.set)
    if unit.fused:
        given = {
            "--set": sets,
            "--dtype": args.dtype,
            "--schedule": args.schedule,
            "--tile": args.tile,
            "--resource": args.resource,
            "--workers": args.workers,
            "--emitter": args.emitter,
            "--dynamic": args.dynamic,
            "--world": args.world not in (None, unit.world),
        }
        for option, value in given.items():
            if value:
                raise FusedIsFixed(option=option, path=path)
        return unit
    extents = [child.symbol for child in op.find("extent")]
    check_known("--set", "extent", sets, extents)
    check_known("--dynamic", "extent", args.dynamic, extents)
    if args.dtype:
        raise UnknownName(option="--dtype", what="choice for", name=path, advice="IR has its types")
    world = world_of(args, int(op["world"]))
    body = tuple(
        child.with_attrs(
            value=sets.get(child.symbol, child["value"]),
            dynamic=True if child.symbol in args.dynamic else child.get("dynamic"),
        )
        if child.name == "extent"
        else child
        for child in op.body
    )
    kernel = op.with_attrs(world=world).with_ops(body)
    check_kernel(kernel)
    return Unit(op.symbol, path, kernel)


def _from_python(
    path: str, shown: str, text: str, wanted: str, args: argparse.Namespace
) -> list[Unit | Unbuilt]:
    from tilelink.frontend.source import show_as
    from tilelink.kernel import load_kernels

    if path == "-":
        # The front end reads source through its file, as Python's own tracebacks do.
        with tempfile.TemporaryDirectory(prefix="tilelink-") as folder:
            file = Path(folder) / "stdin.py"
            file.write_text(text, encoding="utf-8")
            show_as(str(file.resolve()), shown)
            units = _build_all(load_kernels(file), wanted, shown, args)
            return [
                replace(u, op=u.op.with_attrs(file=shown)) if isinstance(u, Unit) else u
                for u in units
            ]
    return _build_all(load_kernels(path), wanted, shown, args)


def _build_all(
    kernels: dict[str, Kernel], wanted: str, shown: str, args: argparse.Namespace
) -> list[Unit | Unbuilt]:
    found: list[Unit | Unbuilt] = []
    for name in _choose(kernels, wanted, shown):
        try:
            found.append(_build(kernels[name], name, shown, args))
        except InternalError:
            raise
        except TilelinkError as error:
            found.append(Unbuilt(name, error))
    return found


def _build(kernel: Kernel, name: str, path: str, args: argparse.Namespace) -> Unit:
    from tilelink.frontend.errors import MissingExtent

    sets = merged(args.set)
    spoken = set(re.findall(r"\w+", kernel.source.source.text))
    named = {tensor: dtype for tensor, dtype in args.dtype.items() if tensor}
    try:
        op = kernel.build(
            {**kernel.example, **sets},
            # What the file does not speak of is refused below, with what there is.
            {name: dtype for name, dtype in named.items() if name in spoken},
            world_of(args, DEFAULT_WORLD),
            dtype=args.dtype.get("") or _like(kernel, named),
            dynamic=args.dynamic,
        )
    except MissingExtent as error:
        values = error.values
        _check_example(kernel, re.findall(r"`(\w+)`", str(values["names"])))
        raise MissingExtents(
            error.span, kernel=name, names=values["names"], first=values["first"]
        ) from None
    extents = [child.symbol for child in op.find("extent")]
    # An extent may have several names in the source, of which the IR keeps one.
    check_known(
        "--set", "extent", [name for name in sets if name not in _named_extents(kernel)], extents
    )
    check_known("--dynamic", "extent", args.dynamic, extents)
    check_known("--dtype", "tensor", named, [child.symbol for child in op.find("tensor")])
    return Unit(name, path, op)


def _check_example(kernel: Kernel, missing: list[str]) -> None:
    """UnknownName where the decorator gives an extent no value, but one to a name that is close to it."""
    known, source = _named_extents(kernel), kernel.source
    for name in kernel.example:
        meant = did_you_mean(name, missing)
        if name not in known and meant:
            place = source.span(next(reversed(source.node.decorator_list), source.node))
            raise UnknownName(place, option="example", what="extent", name=name, advice=meant)


def _named_extents(kernel: Kernel) -> set[str]:
    """The names that a kernel's source unpacks shapes into, those in its mapping, and its parameters."""
    from tilelink.frontend.tensors import mapping_extents

    found = {*mapping_extents(kernel.mapping), *kernel.params}
    for node in ast.walk(kernel.source.node):
        if isinstance(node, ast.Assign) and ".shape" in ast.unparse(node.value):
            targets = [name for target in node.targets for name in ast.walk(target)]
            found |= {name.id for name in targets if isinstance(name, ast.Name)}
    return found


def world_of(args: argparse.Namespace, default: int) -> int:
    """The number of ranks: ``--world``, else that of ``--target``, else ``default``."""
    if args.world:
        return int(args.world)
    if args.target:
        return machine_of(args.target).world
    return default


def machine_of(target: str | None) -> Machine:
    """The machine model called ``target``, or the default; UnknownName if there is none."""
    from tilelink.schedules.machine import Machine, UnknownMachineError

    try:
        return Machine.load(target) if target is not None else Machine.load()
    except UnknownMachineError:
        advice = choices(target, Machine.known())
        raise UnknownName(
            option="--target", what="machine", name=str(target), advice=advice
        ) from None
