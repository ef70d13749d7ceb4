"""Compilation for sm_90 with no GPU, and a lint of what came out.

Kernels are compiled in a process of their own, because MLIR ends the process where it finds a fault.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilelink.backend.emit.compiler import compile_kernel
from tilelink.backend.emit.kernel import Kernel, compile_options
from tilelink.backend.emit.scope import Program
from tilelink.backend.emit.tiles import step_bytes
from tilelink.backend.emit.triton import kernels_of
from tilelink.errors import TilelinkError
from tilelink.ir import Op

SHARED_LIMIT = 232_448  # bytes of shared memory a CTA of sm_90 can have
_POINTER = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}


class CompileFailed(TilelinkError):
    """Triton refused an emitted kernel."""

    code = "compile-failed"
    message = "Triton could not compile the kernel `{kernel}`"
    hint = "this is a fault of tilelink, not of your program; please report it with the program"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compiled kernel.

    ``stages`` maps ``ttir``, ``ttgir``, ``llir``, ``ptx`` and ``sass`` to text; ``shared`` is in bytes
    a CTA, ``spills`` and ``registers`` a thread. ``dots`` says for each 16-bit matrix product of the
    program how many rows its tile has, ``waits`` whether the kernel has waits. ``given`` names the
    descriptors of tensors that nothing but the user writes, ``read_back`` those of buffers that are
    read within a call, ``wide`` the pointers to tensors of 2^31 elements and
    more; ``wide_arena`` is set where a symmetric buffer is that large, ``roles`` where warps have roles.
    ``stages_held`` of the main loop hold ``step`` bytes each.
    """

    name: str
    stages: dict[str, str]
    cubin: bytes
    shared: int
    warps: int
    registers: int
    spills: int
    dots: tuple[int, ...]
    waits: bool
    given: tuple[str, ...] = ()
    read_back: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    wide_arena: bool = False
    roles: bool = False
    stages_held: int = 0
    step: int = 0

    @property
    def stages_fit(self) -> int:
        """How many stages there is shared memory for; 0 where no number of them would do."""
        if not self.step:
            return 0
        beside = self.shared - self.stages_held * self.step
        return max(0, (SHARED_LIMIT - beside) // self.step)


def signature(program: Op, kernel: Kernel) -> dict[str, str]:
    """The Triton signature of a kernel's parameters."""
    facts = Program(program)
    found: dict[str, str] = {}
    for parameter in kernel.parameters:
        if parameter.kind == "context":
            kinds = {"arena": "*i32", "peers": "*i64", "rank": "i32", "program": "i32"}
            found[parameter.name] = kinds.get(parameter.name, "i64")
            continue
        if parameter.kind == "extent":
            found[parameter.name] = "i32"
            continue
        dtype = _POINTER[str(facts.symbols[parameter.symbol]["dtype"])]
        if parameter.kind == "descriptor":
            block = ",".join(map(str, parameter.block))
            found[parameter.name] = f"tensordesc<{dtype}[{block}]>"
        elif parameter.kind == "scalar":
            found[parameter.name] = "fp32" if dtype in ("bf16", "fp16", "fp32") else dtype
        else:
            found[parameter.name] = f"*{dtype}"
    return found


def options_of(program: Op, kernel: Kernel) -> dict[str, int]:
    """What Triton compiles a kernel of ``program`` with."""
    words = any(op.get("words") for op in program.find("buffer"))
    folded = any(op.get("folded") for op in program.find("head"))
    return compile_options(kernel.warps, kernel.stages, words, folded and kernel.emitter != "gluon")


def compile_offline(
    source: str, program: Op, sass: bool = True, only: str | None = None
) -> list[Compiled]:
    """Every kernel of the emitted module ``source`` of ``program``, or that named ``only``, compiled for sm_90.

    Without ``sass``, that stage is left out: :func:`~tilelink.backend.emit.machine_code.disassemble` gives it
    for many kernels in the time of few. Raises :class:`CompileFailed` with the last lines of Triton's message.
    """
    done: list[Compiled] = []
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "emitted.py"
        # The host part needs a GPU runtime; kernels need Triton and the device library only.
        module.write_text(
            source.replace("from tilelink.backend import runtime\n", "runtime = None\n")
        )
        for identity, kernel in kernels_of(program):
            if only not in (None, kernel.name):
                continue
            launch = next(op for op in program.body if id(op) == identity)
            request = {
                "module": str(module),
                "kernel": kernel.name,
                "signature": signature(program, kernel),
                "options": options_of(program, kernel),
                "emitter": kernel.emitter,
                "sass": sass,
                "out": str(Path(folder) / kernel.name),
            }
            failed = compile_kernel(request)
            if failed is not None:
                notes = tuple(failed.strip().splitlines()[-12:])
                raise CompileFailed(launch.span, kernel=kernel.name, notes=notes)
            read = _read(Path(folder) / kernel.name, kernel, launch)
            read = replace(read, step=step_bytes(Program(program), launch))
            done.append(_with_memory(read, program, kernel))
    return done


def _read(out: Path, kernel: Kernel, launch: Op) -> Compiled:
    facts: dict[str, Any] = json.loads((out / "metadata.json").read_text())
    stages = {
        name: (out / name).read_text()
        for name in ("ttir", "ttgir", "llir", "ptx", "sass")
        if (out / name).exists()
    }
    usage = facts["usage"]
    return Compiled(
        kernel.name,
        stages,
        (out / "cubin").read_bytes(),
        int(facts["shared"]),
        int(facts["warps"]),
        int(usage.get("REG", 0)),
        int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0)),
        _dot_rows(launch),
        any(op.name == "wait" for op in launch.walk()),
        roles=launch.get("roles") is not None,
        stages_held=kernel.stages,
    )


def _with_memory(compiled: Compiled, program: Op, kernel: Kernel) -> Compiled:
    """Adds what the lint has to know of the memory that a kernel's parameters stand for."""
    facts = Program(program)
    read = {
        ref.symbol
        for op in program.walk()
        if op.name in ("load", "load_sum", "transfer", "collective")
        for ref in (op.ref, op.get("own"))
        if ref is not None
    }
    large = {
        name
        for name, op in facts.symbols.items()
        if op.name in ("tensor", "buffer") and (facts.numel(name) or 0) >= 1 << 31
    }
    made = {op.symbol for op in program.walk() if op.name == "store" and op.ref is not None}
    made |= {op["to"].symbol for op in program.walk() if op.name == "transfer"}
    # What a collective alone has written is there when a launch starts, as inputs are.
    gathered = {op["to"].symbol for op in program.find("collective")} - made
    inputs = {op.symbol for op in program.find("tensor") if op["role"] == "in"}
    return replace(
        compiled,
        given=tuple(
            p.name
            for p in kernel.parameters
            if p.kind == "descriptor" and p.symbol in inputs | gathered
        ),
        read_back=tuple(
            p.name
            for p in kernel.parameters
            if p.kind == "descriptor"
            and facts.symbols[p.symbol].name == "buffer"
            and p.symbol in read
        ),
        wide=tuple(p.name for p in kernel.parameters if p.kind == "pointer" and p.symbol in large),
        wide_arena=any(
            facts.symbols[name].name == "buffer" and facts.symbols[name].get("space") != "local"
            for name in large
        ),
    )


def _dot_rows(launch: Op) -> tuple[int, ...]:
    """Rows of the tile of each 16-bit matrix product, where its loop says."""
    tiles: dict[str, int] = {}
    for op in launch.walk():
        sizes = op.get("tile")
        if sizes is not None:
            variables = [a for a in op.args if a.type.is_tile]
            tiles |= {a.name: int(s) for a, s in zip(variables, sizes, strict=False)}
    return tuple(
        tiles.get(op.operands[0].type.shape[0], 0)
        for op in launch.walk()
        if op.name == "dot" and op.operands[0].type.dtype in ("bf16", "fp16")
    )


def lint(compiled: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, a sentence each; empty if nothing is."""
    return [*lint_code(compiled, compiled.stages["sass"]), *lint_text(compiled)]


def lint_code(compiled: Compiled, sass: str) -> list[str]:
    """What is wrong with the machine code of a kernel, ``sass``, and with what it uses."""
    problems: list[str] = []
    local = re.findall(r"\b(?:LDL|STL)(?:\.\w+)*\b", sass)
    if compiled.spills or local:
        problems.append(f"spills: {compiled.spills} bytes a thread, {len(local)} local accesses")
    if any(rows >= 64 for rows in compiled.dots) and "HGMMA" not in sass:
        problems.append("a 16-bit matrix product without HGMMA")
    if any(compiled.dots) and not re.search(r"\b(?:HGMMA|HMMA)", sass):
        problems.append("a 16-bit matrix product without tensor cores")
    if compiled.shared > SHARED_LIMIT:
        most = compiled.stages_fit
        advice = f"use `stages = {most}`" if most else "use smaller tiles"
        problems.append(
            f"{compiled.shared} bytes of shared memory, {SHARED_LIMIT} are there: {advice}"
        )
    if "MULTIMEM" in sass:
        problems.append("a multimem instruction")
    return problems


def lint_text(compiled: Compiled) -> list[str]:
    """What is wrong with the forms of a kernel before its machine code."""
    problems: list[str] = []
    ptx, ttgir = (compiled.stages.get(s, "") for s in ("ptx", "ttgir"))
    if "multimem" in ptx:
        problems.append("a multimem instruction in PTX")
    if compiled.waits:
        problems += _wait_order(ttgir, ptx, compiled.given)
    problems += _release_order(ttgir)
    if compiled.roles:
        problems += _role_forms(ttgir)
    else:
        problems += _drain_order(ttgir, compiled.read_back)
    problems += _address_width(ttgir, compiled.wide, compiled.wide_arena)
    return problems


_READ = re.compile(r"async_tma_copy_global_to_local|ttg\.async_copy_global_to_local|\btt\.load\b")
_ACQUIRE = re.compile(r"tt\.atomic_rmw .*acquire, sys|tt\.atomic_rmw .*acquire, gpu")
_TILE = re.compile(
    r"(?:async_tma_copy_global_to_local|async_copy_global_to_local|tt\.load .*tensor<)"
)


_GIVEN = re.compile(r"async_tma_copy_global_to_local %(\w+)\[")


def _wait_order(ttgir: str, ptx: str, given: tuple[str, ...]) -> list[str]:
    """Tile loads above the first acquire of a loop that waits, but for loads of ``given`` tensors."""
    if not re.search(r"acquire\.sys|sys\.acquire", ptx):
        return ["a wait without an acquire at system scope"]
    problems: list[str] = []
    known = _in_roles(ttgir, given)

    def free(text: str) -> bool:
        found = _GIVEN.search(text)
        return found is not None and found[1] in known

    for body in _loops(_without_table(ttgir)):
        acquires = [n for n, text in enumerate(body) if _ACQUIRE.search(text)]
        loads = [n for n, text in enumerate(body) if _TILE.search(text) and not free(text)]
        if acquires and loads and loads[0] < acquires[0]:
            problems.append("a tile is loaded above the wait of its loop")
    return problems


def _in_roles(ttgir: str, names: tuple[str, ...]) -> set[str]:
    """``names``, and what the roles of a kernel call the same: each takes all that is handed to any, in order."""
    started = re.search(r"ttg\.warp_specialize\(([^)]*)\)", ttgir)
    if started is None:
        return set(names)
    handed = re.findall(r"%(\w+)", started[1])
    found, others = set(names), set[str]()
    for role in re.finditer(r"^\s*partition\d+\((.*)$", ttgir, re.M):
        mine = re.findall(r"%(\w+): ", role[1])
        for name, argument in zip(handed, mine, strict=True):
            (found if name in names else others).add(argument)
    return found - others


def _without_table(ttgir: str) -> str:
    """The text without loads from the table of all arenas' addresses, which nobody writes."""
    table: set[str] = set()
    kept: list[str] = []
    for text in ttgir.splitlines():
        made = re.match(r"\s*%(\w+) = tt\.(splat|addptr|load) %(\w+)", text)
        if made is not None:
            name, op, source = made.groups()
            ours = source == "peers" or source in table
            if ours and op == "load":
                continue
            (table.add if ours else table.discard)(name)
        kept.append(text)
    return "\n".join(kept)


def _loops(ttgir: str) -> list[list[str]]:
    """Lines of every outermost `scf.for` or `scf.while` of a module."""
    found: list[list[str]] = []
    depth = 0
    current: list[str] | None = None
    for text in ttgir.splitlines():
        opens = text.count("{") - text.count("}")
        if current is None and re.search(r"\bscf\.(?:for|while)\b", text):
            current, depth = [], 0
        if current is not None:
            current.append(text)
            depth += opens
            if depth <= 0 and len(current) > 1:
                found.append(current)
                current = None
    return found


def _release_order(ttgir: str) -> list[str]:
    """Releases without a CTA barrier, or without the end of TMA stores, before them."""
    problems: list[str] = []
    barrier = False
    for text in ttgir.splitlines():
        if re.search(r"\bgpu\.barrier\b|ttg\.barrier\b|inline_asm.*bar\.sync 0", text):
            barrier = True
        elif re.search(r"\btt\.store\b|tma_copy_local_to_global", text):
            barrier = False
        elif re.search(r"tt\.atomic_rmw .*(?:release|acq_rel), (?:sys|gpu)", text) and not barrier:
            problems.append("a release that no CTA barrier precedes since the last store")
    return problems


_RELEASE = re.compile(r"tt\.atomic_rmw .*(?:release|acq_rel), (?:sys|gpu)")
_TMA_STORE = re.compile(r"tma_copy_local_to_global %(\w+)\[")
_DRAIN = re.compile(r"cp\.async\.bulk\.wait_group 0")


def _drain_order(ttgir: str, read_back: tuple[str, ...]) -> list[str]:
    """Releases behind TMA stores that have been read from shared memory, but may not have completed.

    Only of stores to memory that is read within the call, or by one of several descriptors, which are
    peers'; the end of the kernel drains the others.
    """
    problems: list[str] = []
    under_way = False
    head = re.search(r"tt\.func public @\w+\((.*)$", ttgir, re.M)
    known = set(re.findall(r"%(\w+): !tt\.tensordesc", head[1])) if head is not None else set()
    for text in ttgir.splitlines():
        stored = _TMA_STORE.search(text)
        if stored is not None and (stored[1] in read_back or stored[1] not in known):
            under_way = True
        elif _DRAIN.search(text):
            under_way = False
        elif under_way and _RELEASE.search(text):
            problems.append("a release behind TMA stores that nothing has drained")
            under_way = False
    return problems


def _role_forms(ttgir: str) -> list[str]:
    """Releases of a role behind TMA stores that nothing has drained; calls of functions, in a role or beside them.

    A function is made for the warps of a whole kernel: one that is not inlined has too many threads for a role,
    and its barriers wait for those of all roles, which never come. Descriptors have other names there.
    """
    problems: list[str] = []
    lines = ttgir.splitlines()
    if any("tt.call" in text for text in lines):
        problems.append("a kernel with roles calls a function that is not inlined")
    starts = [n for n, text in enumerate(lines) if "ttg.warp_specialize(" in text]
    ends = [n for n, text in enumerate(lines) if "ttg.warp_return" in text]
    if not starts or not ends:
        return ["a kernel with roles that starts none"]
    under_way = False
    for text in lines[starts[0] : ends[-1]]:
        if re.search(r"ttg\.warp_(?:yield|return)", text):
            under_way = False
        elif "tma_copy_local_to_global" in text:
            under_way = True
        elif _DRAIN.search(text):
            under_way = False
        elif under_way and _RELEASE.search(text):
            problems.append("a release of a role behind TMA stores that nothing has drained")
            under_way = False
    return problems


_DEFINES = re.compile(r"%(\w+) = (tt\.\w+) %(\w+)(?:, %\w+)?.* : (.*?)(?: loc\(|$)")


def _address_width(ttgir: str, wide: tuple[str, ...], wide_arena: bool) -> list[str]:
    """Addresses of large tensors of which the first offset, from the start, has 32 bits.

    Offsets from a place inside are those of one tile, and small.
    """
    starts = set(wide)
    problems: list[str] = []
    for text in ttgir.splitlines():
        found = _DEFINES.search(text)
        if found is None:
            continue
        result, name, operand, types = found.groups()
        if name in ("tt.bitcast", "tt.int_to_ptr") and wide_arena:
            if re.search(r"-> !tt\.ptr<(?!i32|i64)", types):
                starts.add(result)
        elif name in ("tt.splat", "tt.broadcast") and operand in starts:
            starts.add(result)
        elif name == "tt.addptr" and operand in starts and re.search(r"(?:, |x)i32\b", types):
            problems.append("an offset in 32 bits from the start of 2^31 elements or more")
    return problems
