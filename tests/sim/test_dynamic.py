"""Programs with a dynamic number of rows, run with every number by the simulator, and broken ones."""

from __future__ import annotations

import re

import pytest
import torch

from tests.dynamic import CAPACITY, CASES, WORLD, expected, inputs_of, program_of, same, values_of
from tilelink import kernels
from tilelink.backend import simulate
from tilelink.backend.expand_walk import expand
from tilelink.backend.verify import carried, prove, verify
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.instance import at_extents

# silu of an integer is rounded, and the reference may round otherwise.
ROUNDS = ("ag_gemm_swiglu",)


@pytest.mark.parametrize(("name", "resource"), CASES)
def test_every_number_of_rows_gives_what_the_reference_gives(name: str, resource: str) -> None:
    program = program_of(name, resource)
    for rows in values_of(name):
        inputs = inputs_of(name, rows, seed=rows)
        got = simulate.run(at_extents(program, {"M": rows}), inputs, seed=rows)
        assert same(got, expected(name, rows, inputs), name in ROUNDS), rows


@pytest.mark.parametrize(
    ("name", "resource", "channels"),
    [("ag_gemm", "copy_engine", 3), ("gemm_rs", "copy_engine", 4), ("gemm_ar", "sm:2", 8)],
)
def test_channels_without_rows_are_left_out(name: str, resource: str, channels: int) -> None:
    program = program_of(name, resource, channels)
    verify(program)
    for rows in values_of(name)[::3]:
        inputs = inputs_of(name, rows, seed=rows)
        got = simulate.run(at_extents(program, {"M": rows}), inputs, seed=rows)
        assert same(got, expected(name, rows, inputs)), rows


@pytest.mark.parametrize(("name", "resource"), CASES)
def test_what_the_rule_proves_at_the_ends_holds_in_between(name: str, resource: str) -> None:
    """The rule enumerates both ends of each range of equal structure; here every value is."""
    program = program_of(name, resource)
    verify(program)
    for rows in values_of(name):
        prove(expand(at_extents(program, {"M": rows}), carried(program)), contents=False)


def forgetful(program: Op) -> list[Op]:
    """The program with the number of rows taken for the capacity, at one place after the other."""
    text = print_ir(program)
    start = text.index("\n  buffer @" if "\n  buffer @" in text else "\n  launch @")
    found: list[Op] = []
    for match in re.finditer(r"(?<![\w.\"])M(?: / WORLD)?(?![\w.])", text[start:]):
        whole = "64" if match[0] == "M" else str(64 // WORLD)
        begin, end = (start + place for place in match.span())
        line = text[text.rindex("\n", 0, begin) : text.index("\n", end)]
        if text[:begin].endswith("extent = [") and "segments =" in line:
            continue  # where segments and their number are given, the extent of a queue says nothing
        if re.search(r"\bfirst = [^,{}]*$", text[:begin]):
            continue  # any worker may have the first place of a queue
        if re.search(r"buffer @(A.all|C.partial) ", line) and "symmetric" in line:
            continue  # memory may be longer than what is used of it
        if text[begin - 1 :].startswith(f"(M + {CAPACITY['M'] - 1}) / {CAPACITY['M']}"):
            continue  # one, for all numbers of rows
        found.append(parse_ir(text[:begin] + whole + text[end:], "broken"))
    return found


@pytest.mark.parametrize(
    ("name", "resource"), [c for c in CASES if not c[0].endswith(("add", "swiglu"))]
)
def test_rows_forgotten_at_one_place_are_seen_by_proof_and_simulator(
    name: str, resource: str
) -> None:
    mutants = forgetful(program_of(name, resource))
    assert len(mutants) >= 2
    for number, mutant in enumerate(mutants):
        with pytest.raises(TilelinkError):
            verify(mutant)
        wrong = False
        for rows in (2, 16, 30, 46):
            inputs = inputs_of(name, rows, seed=number)
            try:
                got = simulate.run(at_extents(mutant, {"M": rows}), inputs, seed=number)
            except TilelinkError:
                wrong = True
            else:
                wrong |= not same(got, expected(name, rows, inputs))
        assert wrong, number


def test_calls_of_any_length_need_few_programs() -> None:
    """A trace as serving has it: the length changes at each step."""
    call = kernels.gemm_ar.on("simulate", world=2, dynamic=("M",))
    generator = torch.Generator().manual_seed(7)
    b = [torch.randint(-3, 4, (16, 16), generator=generator).float() for _ in range(2)]
    lengths = [1, 700, 64, 65, 3, 1023, 256, 130, 17, 511, 2, 900]
    for rows in lengths:
        a = [torch.randint(-3, 4, (rows, 16), generator=generator).float() for _ in range(2)]
        wanted = a[0] @ b[0] + a[1] @ b[1]
        assert all(torch.equal(c, wanted) for c in call(a, b)), rows
    assert call.compilations == 5  # 64, 128, 256, 512 and 1024 serve them all


def test_lengths_to_8192_need_at_most_eight_programs() -> None:
    from tilelink.frontend.capacity import capacity_of

    for world in (1, 2, 3, 4, 8):
        served = {capacity_of("M", m, world, ()) for m in range(world, 8193, world)}
        assert len(served) <= 8 and max(high for _, high in served) - 8192 < world
        # Each value is among those that its program is proven for.
        for m in range(world, 8193, world):
            low, high = capacity_of("M", m, world, ())
            assert low <= m <= high
