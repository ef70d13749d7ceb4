"""``emit``: a fused program as a Python module that runs on stock Triton and PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata

from tilelink.backend.emit.boxes import emit_boxes
from tilelink.backend.emit.gluon import emit_roles
from tilelink.backend.emit.host import Host
from tilelink.backend.emit.kernel import Kernel, emit_kernel, kernel_name
from tilelink.backend.emit.scope import Program
from tilelink.backend.emit.tiles import check_tiles
from tilelink.backend.passes.order_memory import streamed
from tilelink.ir import Op, print_ir

# Imports of kernels of Gluon, and what in their text needs them.
_GLUON = (
    ("from triton.experimental import gluon", "gluon."),
    ("from triton.experimental.gluon import language as gl", "gl."),
    ("from triton.experimental.gluon.language.nvidia import hopper", "hopper."),
)
_FOOT = '''

def run(*tensors, group=None):
    """Run on this rank; tensors in the order of the kernel's parameters."""
    return runtime.run_module(TEXT, host, tensors, group)


if __name__ == "__main__":
    runtime.main(TEXT, host)
'''


def emit(program: Op) -> str:
    """The Python source of ``program``, a fused program; the same text for the same program, always.

    The module has the program's text (``TEXT``), a Triton kernel for every launch, ``host(call)``,
    which enqueues one call, and ``run``. Raises :class:`~tilelink.backend.emit.scope.CannotEmit` where
    there is no code for an op, and :class:`~tilelink.backend.emit.tiles.TileTooLarge` where a value is too large.
    """
    text = print_ir(program)
    kernels = kernels_of(program)
    host = Host(Program(program), dict(kernels)).text()
    uses_device = any("device." in kernel.source for _, kernel in kernels)
    parts = [_header(program, text)]
    gluon = any(kernel.emitter == "gluon" for _, kernel in kernels)
    if kernels:
        plain = any(kernel.emitter != "gluon" for _, kernel in kernels)
        parts.append(("import triton\n" if plain else "") + "import triton.language as tl\n")
        parts[-1] += (
            "".join(
                f"{line}\n" for line, used in _GLUON if any(used in k.source for _, k in kernels)
            )
            if gluon
            else ""
        )
    imports = ["from tilelink import device\n"] if uses_device else []
    imports.append("from tilelink.backend import runtime\n")
    imports += [
        f"from tilelink.device import {module}\n"
        for module in ("boxes", "roles")
        if any(f"{module}." in kernel.source for _, kernel in kernels if kernel.emitter == "gluon")
    ]
    parts[-1] += "".join(imports)
    parts.append(f'TEXT = r"""\n{text}"""\n')
    sections = "\n".join(parts)
    for _, kernel in kernels:
        sections += f"\n\n{kernel.source}"
    return f"{sections}\n\n{host}{_FOOT}"


def kernels_of(program: Op) -> list[tuple[int, Kernel]]:
    """The kernels of a program in order, each with the identity of its launch.

    Launches of the library need none.
    """
    facts = Program(program)
    system = streamed(program)
    taken = {"TEXT", "host", "run", *facts.symbols}
    launches = [launch for launch in program.find("launch") if launch.get("emitter") != "library"]
    for launch in launches:
        check_tiles(facts, launch)
    return [
        (id(launch), _emitter(launch)(facts, launch, kernel_name(launch, taken), system))
        for launch in launches
    ]


def _emitter(launch: Op) -> Callable[[Program, Op, str, frozenset[str]], Kernel]:
    if launch.get("emitter") != "gluon":
        return emit_kernel
    return emit_boxes if launch.get("roles") is None else emit_roles


def program_hash(text: str) -> str:
    """The hash of a program's text, as the header shows it."""
    return hashlib.sha256(text.encode()).hexdigest()


def _header(program: Op, text: str) -> str:
    schedule = str(program.get("schedule", "default")).replace("\n", " ")
    lines = [
        f"# Emitted by tilelink {_version()}; edit the kernel, not this file.",
        f"# kernel: {program.get('kernel', program.symbol)}, world: {program['world']}",
        f"# schedule: {schedule}",
        f"# program: sha256 {program_hash(text)}",
        "# ruff: noqa: E501",
    ]
    return "\n".join(lines) + "\n"


def _version() -> str:
    try:
        return metadata.version("tilelink")
    except metadata.PackageNotFoundError:
        return "(uninstalled)"
