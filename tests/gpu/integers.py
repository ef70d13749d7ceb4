"""Problems on small integers, made, checked and varied on the device, so that every element is exact.

Inputs are -1, 0 or 1, drawn by a hash of (step, tensor, element): every rank can draw what any other one
holds, so the reference needs no communication. Products of at most a few hundred terms and their sums
over ranks stay far inside the integers that bf16 holds exactly (up to 256), so the result has one value
whatever the order of addition, and is compared with ``==``.
"""

# `@triton.jit` functions are Triton source: their arguments have no Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_A, _B = 16, 64  # salts of the tensors; a rank's number is added


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hashed(index, salt, step):
    """A uint32 of (index, salt, step)."""
    x = index.to(tl.uint32) * 0x9E3779B1
    x = _mix(x ^ (tl.cast(salt, tl.uint32) * 0xC2B2AE35))
    return _mix(x ^ (tl.cast(step, tl.uint32) * 0x85EBCA6B))


@triton.jit
def _fill(out, count, first, salt, step, block: tl.constexpr):
    # Elements first .. first + count of the tensors salt, salt + 1, …, one a program of axis 1.
    part = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = (hashed(first + at, salt + part, tl.load(step)) % 3).to(tl.int32) - 1
    tl.store(out + part.to(tl.int64) * count + at, value.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _compare(out, want, count, wrong, block: tl.constexpr):
    # NaN differs from everything. What was read is poisoned for the next call.
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    got = tl.load(out + at, mask=inside, other=0)
    differs = (got != tl.load(want + at, mask=inside, other=0)) & inside
    number = tl.sum(differs.to(tl.int32), axis=0)
    if number > 0:
        tl.atomic_add(wrong, number.to(tl.int64))
    nothing = tl.full((block,), float("nan"), tl.float32)
    tl.store(out + at, nothing.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _now():
    # Each thread's own: between reading it and leaving the loop of `_spin` threads meet nowhere.
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _spin(length):
    begin = _now()
    now = begin
    while now - begin < length:
        now = _now()


@triton.jit
def _pause(step, rank, one_in, most_ns):
    # Begins a call: the next step, and one time in ``one_in`` a delay of up to ``most_ns``.
    number = tl.load(step) + 1
    tl.debug_barrier()
    tl.store(step, number)
    drawn = hashed(tl.full((), 7, tl.int32), rank, number)
    if (drawn % tl.cast(one_in, tl.uint32) == 0) & (most_ns > 0):
        _spin(((drawn >> 8) % tl.cast(most_ns, tl.uint32)).to(tl.int64))


@triton.jit
def jitter(ctx, place, one_in: tl.constexpr, most_ns: tl.constexpr):
    """Inside a kernel of ours: this CTA spins, one time in ``one_in``, for up to ``most_ns``."""
    drawn = hashed(tl.cast(place, tl.int32), tl.program_id(0) * 16 + ctx.rank, ctx.epoch)
    if drawn % one_in == 0:
        _spin(((drawn >> 8) % most_ns).to(tl.int64))


@dataclass(slots=True)
class Problem:
    """One kernel on one shape: its tensors on this rank, and the kernels that vary and check them.

    ``run(a, b, out)`` is the call under test. ``m``, ``k``, ``n`` are the kernel's extents.
    """

    kind: str
    m: int
    k: int
    n: int
    dtype: str
    rank: int
    world: int
    run: Callable[..., Any]
    step: torch.Tensor = field(init=False)
    wrong: torch.Tensor = field(init=False)
    a: torch.Tensor = field(init=False)
    b: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)
    want: torch.Tensor = field(init=False)
    all_a: torch.Tensor = field(init=False)
    all_b: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        dtype, rows = DTYPES[self.dtype], self.m // self.world

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        self.step = torch.zeros((), dtype=torch.int32, device="cuda")
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        gathers = self.kind == "ag_gemm"
        self.a = empty(rows if gathers else self.m, self.k)
        self.b = empty(self.k, self.n)
        parts = 1 if gathers else self.world
        self.all_b = empty(parts, self.k, self.n)
        self.all_a = empty(parts, rows if self.kind == "gemm_rs" else self.m, self.k)
        shape = (rows if self.kind == "gemm_rs" else self.m, self.n)
        self.out, self.want = empty(*shape), empty(*shape)
        self.out.fill_(float("nan"))

    def _draw(self, out: torch.Tensor, first: int, salt: int, parts: int = 1) -> None:
        count = out.numel() // parts
        grid = (triton.cdiv(count, BLOCK), parts)
        _fill[grid](out, count, first, salt, self.step, BLOCK)

    def begin(self, one_in: int = 8, most_ns: int = 0) -> None:
        """The next step: a delay of this rank, then new inputs."""
        _pause[(1,)](self.step, self.rank, one_in, most_ns)
        gathers = self.kind == "ag_gemm"
        first = self.rank * self.a.numel() if gathers else 0
        self._draw(self.a, first, _A if gathers else _A + self.rank)
        self._draw(self.b, 0, _B + self.rank)

    def reference(self) -> None:
        """What the output must be at this step, into ``want``, from inputs that this rank draws itself."""
        parts = self.all_a.shape[0]
        first = self.rank * self.want.shape[0] * self.k if self.kind == "gemm_rs" else 0
        self._draw(self.all_a, first, _A, parts)
        if parts == 1:
            torch.mm(self.all_a[0], self.b, out=self.want)
            return
        self._draw(self.all_b, 0, _B, parts)
        # One long product is the sum of the ranks' products.
        whole = self.all_a.transpose(0, 1).reshape(self.want.shape[0], -1)
        torch.mm(whole, self.all_b.view(-1, self.n), out=self.want)

    def compare(self) -> None:
        """Counts the elements that differ, and fills the output with NaN."""
        count = self.out.numel()
        _compare[(triton.cdiv(count, BLOCK),)](self.out, self.want, count, self.wrong, BLOCK)

    def call(self, one_in: int = 8, most_ns: int = 0) -> None:
        """One checked call: new inputs, the reference, the kernel under test, the comparison."""
        self.begin(one_in, most_ns)
        self.reference()
        self.run(self.a, self.b, self.out)
        self.compare()

    def control(self) -> int:
        """How many elements differ when the reference is that of other inputs: must not be none."""
        self.begin()
        self.reference()
        self.begin()
        self.run(self.a, self.b, self.out)
        before = int(self.wrong)
        self.compare()
        found = int(self.wrong) - before
        self.wrong.fill_(before)
        return found

    def capture(self, calls: int, one_in: int = 8, most_ns: int = 0) -> torch.cuda.CUDAGraph:
        """A graph of ``calls`` checked calls."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                self.call(one_in, most_ns)
        return graph


def emitted(
    kernel: Any,
    extents: dict[str, int],
    world: int,
    schedule: Any = None,
    dtype: str = "bf16",
    edit: Callable[[str], str] | None = None,
) -> Callable[..., Any]:
    """The ``run`` of a module emitted for a kernel of `tilelink.kernels`, its source edited by ``edit``."""
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import compile_kernel
    from tilelink.backend.runtime import load_module, write_module

    program = compile_kernel(kernel.build(extents, world=world, dtype=dtype), schedule)
    source = emit(program)
    if edit is not None:
        source = edit(source)
    run: Callable[..., Any] = load_module(write_module(source, program.symbol)).run
    return run


# How a kernel begins a call, and how its workers leave it.
BEGINS = tuple(f"    ctx = device.{name}(" for name in ("context", "begin_call", "call_context"))
LEAVES = tuple(f"if device.{name}(ctx" for name in ("finish_arrive", "end_call"))


def with_jitter(source: str, one_in: int = 4, most_ns: int = 4000) -> str:
    """Emitted ``source`` in which every CTA may spin at its start, at every tile, and before it leaves.

    Of a kernel whose warps have roles, each role that knows the call may spin for itself at every tile.
    """
    lines: list[str] = []
    beginning = False
    knows = inside = (
        False  # whether the function has a parameter ``ctx``; whether the line is of its parameters
    )
    for line in source.replace(
        "from tilelink import device\n",
        "from tilelink import device\nfrom tests.gpu.integers import jitter\n",
    ).splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if line.startswith("def "):
            knows, inside = False, True
        knows |= inside and re.search(r"\bctx\b", line) is not None
        inside &= not line.endswith(":")
        if line.lstrip().startswith(LEAVES):
            lines.append(f"{indent}jitter(ctx, 1 << 20, {one_in}, {most_ns})")
        lines.append(line)
        beginning |= line.startswith(BEGINS)
        if beginning and line.endswith(")"):
            beginning = False
            lines.append(f"    jitter(ctx, 1 << 21, {one_in}, {most_ns})")
            knows = True
        elif not knows:
            continue
        elif line.lstrip().startswith("for q in tl.range(") and line.endswith(":"):
            lines.append(f"{indent}    jitter(ctx, q, {one_in}, {most_ns})")
        elif line.lstrip().startswith("q += "):
            lines.append(f"{indent}jitter(ctx, q, {one_in}, {most_ns})")
        elif line.lstrip().startswith("while taken < "):
            lines.append(f"{indent}    jitter(ctx, taken, {one_in}, {most_ns})")
    return "\n".join(lines) + "\n"
