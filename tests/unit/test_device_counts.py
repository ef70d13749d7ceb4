"""Counts of elements near 2^31 in the device library: loops count in 64 bits, whatever they are given."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilelink import device


@triton.jit
def copies(source, target, count):  # type: ignore[no-untyped-def]
    device.rank_copy_data(source, target, count)


@triton.jit
def spoils(source, target, count):  # type: ignore[no-untyped-def]
    ctx = device.call_context(source, source, 0, 2, 0, 0)
    device.spoil(ctx, tl.full((), 0, tl.int64), target, count)


@pytest.mark.parametrize("kernel", [copies, spoils])
@pytest.mark.parametrize("count", ["i32", "i64"])
def test_no_loop_over_elements_counts_in_32_bits(kernel: object, count: str) -> None:
    pointer = "*i32" if kernel is spoils else "*fp32"
    signature = {"source": pointer, "target": "*fp32", "count": count}
    source = ASTSource(kernel, signature=signature, constexprs={}, attrs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    loops = re.findall(r"scf\.for .*: (i\d+) \{", compiled.asm["ttir"])
    assert loops == ["i64"]
