"""A fused program is held against its kernel: another operand, tile or collective is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.assurance.grid import Sample, wide_grid
from tilelink.backend.expand import Tile
from tilelink.backend.passes import UnsupportedProgram
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import UndecidedError, VerifyError, verify
from tilelink.backend.verify.grid import partition_fault
from tilelink.ir import parse_ir, print_ir
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule, ScheduleError

GATHER = Sample("ag_gemm_swiglu", "A", "sm:1", 2, 4)
SCATTER = Sample("gemm_rs_add", "P", "copy_engine", 2, 4)
REDUCE = Sample("gemm_ar_add", "P", "none", 2, 3)


@pytest.mark.parametrize("sample", list(wide_grid())[::23], ids=lambda s: s.name)
def test_what_the_passes_make_is_accepted(sample: Sample) -> None:
    assert verify(sample.program(), sample.op()).world == sample.world


@pytest.mark.parametrize(
    ("sample", "old", "new"),
    [
        (GATHER, "= load @Wu[%k, %n]", "= load @Wg[%k, %n]"),
        (GATHER, "store @C[%m, %n]", "store @C[%m at (m.start + 8) % M, %n]"),
        (GATHER, "own = @A[%m at m.start % 16, %k]", "own = @Wg[%m at m.start % 16, %k]"),
        (GATHER, "silu", "sigmoid"),
        (SCATTER, "= load @A[%m, %k]", "= load @A[%m at (m.start + 8) % M, %k]"),
        (SCATTER, "transfer @P.partial[", "transfer @A["),
        (REDUCE, 'op = "all_reduce"', 'op = "all_gather"'),
        (REDUCE, "load @P.total[", "load @A["),
        (REDUCE, "load @P.total[", "load @P.partial["),
        (REDUCE, "store @P.partial[%m, %n]", "store @P.partial[%m at (m.start + 8) % M, %n]"),
    ],
)
def test_another_computation_is_refused(sample: Sample, old: str, new: str) -> None:
    text = print_ir(sample.program())
    assert old in text
    with pytest.raises(VerifyError):
        verify(parse_ir(text.replace(old, new)), sample.op())


def changed(sample: Sample, old: str, new: str, *, carried: bool = True) -> str:
    """The text of a program with ``old`` replaced in its stages; with or without its kernel."""
    program = sample.program()
    text = print_ir(program if carried else program.with_attrs(kernel_text=None))
    head, body = text.split("\n", 1)
    assert old in body
    return head + "\n" + body.replace(old, new, 1)


@pytest.mark.parametrize(
    ("sample", "old", "new"),
    [
        (GATHER, "= load @Wu[%k, %n]", "= load @Wg[%k, %n]"),
        (GATHER, "= zeros :", "= full {value = 0.5} :"),
        (replace(GATHER, tile=16), "tile = [16]}", "segment = 8, tile = [8], visit = 0}"),
        (SCATTER, "= load @B[%k, %n]", "= load @B[%k, %n at (n.start + 8) % N]"),
        (REDUCE, "(%a, %b, %acc", "(%b, %a, %acc"),
    ],
)
def test_the_kernel_in_the_text_is_enough(sample: Sample, old: str, new: str) -> None:
    with pytest.raises(VerifyError):
        verify(parse_ir(changed(sample, old, new)))


@pytest.mark.parametrize(
    ("sample", "old", "new"),
    [
        (replace(SCATTER, kernel="gemm_rs", tensor="C"), "transfer @C.partial[", "transfer @A["),
        (replace(REDUCE, kernel="gemm_ar", tensor="C"), '"all_reduce"', '"all_gather"'),
        (replace(REDUCE, kernel="gemm_ar", tensor="C"), '"all_reduce"', '"reduce_scatter"'),
        (replace(GATHER, resource="none"), '"all_gather"', '"all_reduce"'),
        (
            replace(REDUCE, kernel="gemm_ar", tensor="C"),
            "store @C.partial[%m, %n]",
            "store @C.partial[%m at (m.start + 8) % M, %n]",
        ),
        (
            replace(SCATTER, kernel="gemm_rs", tensor="C"),
            "own = @C.partial[%m.C.0, %n.C.1]",
            "own = @C.partial[%m.C.0 at (m.C.0.start + 8) % M, %n.C.1]",
        ),
    ],
)
def test_declarations_decide_what_they_can(sample: Sample, old: str, new: str) -> None:
    report = verify(parse_ir(print_ir(sample.program().with_attrs(kernel_text=None))))
    assert "the stages compute what their kernel says" in report.assumptions
    assert "meaning" not in report.rules
    with pytest.raises(VerifyError):
        verify(parse_ir(changed(sample, old, new, carried=False)))


def test_a_known_kernel_is_no_assumption() -> None:
    report = verify(GATHER.program())
    assert "meaning" in report.rules
    assert "the stages compute what their kernel says" not in report.assumptions


def test_a_carried_kernel_round_trips() -> None:
    program = SCATTER.program()
    again = parse_ir(print_ir(program))
    assert again["kernel_text"] == print_ir(SCATTER.op())
    assert verify(again) == verify(program, SCATTER.op())


def test_a_held_back_notify_follows_its_accesses() -> None:
    lines = print_ir(SCATTER.program()).splitlines()
    at = next(n for n, line in enumerate(lines) if "notify @P.done" in line)
    assert "delay" in lines[at] and "store @P.partial" in lines[at - 1]
    lines[at - 1], lines[at] = lines[at], lines[at - 1]
    with pytest.raises(UndecidedError, match="delay"):
        verify(parse_ir("\n".join(lines) + "\n"))


FILES = ("ag_gemm", "attention", "gemm_rs", "maps", "misc")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("world", [1, 2])
def test_every_kernel_that_compiles_is_its_kernel(file: str, world: int) -> None:
    compiled = 0
    for kernel in load_kernels(f"tests/kernels/{file}.py").values():
        op = kernel.build(kernel.example, {}, world)
        moved = [
            t.symbol for t in op.find("tensor") if t["move"] in ("gather", "scatter", "reduce")
        ]
        for resource in ("copy_engine", "sm:1", "epilogue", "none"):
            moves = tuple((name, Move(resource, None, 2)) for name in moved)
            known = [e.symbol for e in op.find("extent")]
            tiles = tuple((name, 16) for name in ("M", "N", "K", "S") if name in known)
            try:
                program = run_passes(op, Schedule(tiles=tiles, workers=4, moves=moves))
            except (UnsupportedProgram, ScheduleError):
                continue
            assert "meaning" in verify(program, op).rules
            compiled += 1
    assert compiled >= 3


@pytest.mark.parametrize("resource", ["copy_engine", "sm:1"])
@pytest.mark.parametrize(("extent", "tile"), [(48, 8), (96, 16), (144, 8), (192, 32)])
def test_a_tile_of_a_later_block_waits_for_all_its_channels(
    extent: int, tile: int, resource: str
) -> None:
    """Blocks that no tile length divides: a rank's second one starts in the middle of a channel."""
    kernel = load_kernels("tests/kernels/maps.py")["ag_zigzag"]
    op = kernel.build({"M": extent, "N": 16, "K": 16}, {}, 2)
    tiles = (("M", tile), ("N", 16), ("K", 16))
    moves = (("A", Move(resource, None, 3)),)
    verify(run_passes(op, Schedule(tiles=tiles, workers=4, moves=moves)), op)


def grid(*rows: tuple[int, int]) -> Tile:
    """The tiles of one variable on one rank."""
    start, stop = (np.array([list(part)]) for part in zip(*rows, strict=True))
    return Tile(start, stop, start)


@pytest.mark.parametrize(
    ("rows", "extent", "owner", "good"),
    [
        (((0, 4), (4, 8)), 8, None, True),
        (((4, 8), (0, 4)), 8, None, True),
        (((0, 4), (4, 7)), 7, None, True),
        (((0, 4), (0, 4)), 8, None, False),
        (((0, 4), (3, 7)), 8, None, False),
        (((0, 4),), 8, None, False),
        (((0, 4), (4, 9)), 8, None, False),
        (((0, 2), (4, 6)), 8, [0, 0, 1, 1, 0, 0, 1, 1], True),
        (((0, 2), (2, 4)), 8, [0, 0, 1, 1, 0, 0, 1, 1], False),
        (((0, 2),), 8, [0, 0, 1, 1, 0, 0, 1, 1], False),
    ],
)
def test_a_grid_is_each_point_once(rows: Any, extent: int, owner: Any, good: bool) -> None:
    mine = None if owner is None else np.array(owner)
    assert (partition_fault([grid(*rows)], [extent], [mine]) == "") == good
