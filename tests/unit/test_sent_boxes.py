"""Tiles that leave a role for other ranks: the boxes, what the compiler makes of them, and who has them."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from tests.roles import CASES, WORLD
from tilelink.backend.emit.triton import emit
from tilelink.device import roles
from tilelink.schedules.roles import SENT_BYTES, sent_box

ROW, COLUMN = 1024, 4096  # where the tile goes
ROLE = 1  # whose room it leaves by


@pytest.mark.parametrize(
    ("room", "item", "box"),
    [
        ((128, 64), 2, (16, 64)),
        ((64, 64), 2, (16, 64)),
        ((64, 256), 2, (16, 64)),
        ((128, 32), 2, (32, 32)),
        ((128, 64), 4, (16, 32)),
        ((128, 16), 2, (64, 16)),
        ((64, 8), 2, (64, 8)),
    ],
)
def test_boxes_are_as_many_bytes_and_come_out_even(
    room: tuple[int, int], item: int, box: tuple[int, int]
) -> None:
    assert sent_box(room, item) == box
    assert not room[0] % box[0] and not room[1] % box[1]
    assert box[0] * box[1] * item in (SENT_BYTES, room[0] * room[1] * item)


@gluon.jit  # type: ignore[untyped-decorator]
def leave(  # type: ignore[no-untyped-def]
    descriptor,
    rows: gl.constexpr,
    width: gl.constexpr,
    columns: gl.constexpr,
    role: gl.constexpr,
    row: gl.constexpr,
    column: gl.constexpr,
):
    room = roles.room(descriptor, rows, width).index(role)
    value = roles.full(rows, columns, 1, tl.bfloat16)
    roles.send((descriptor,), 0, row, column, value, room)


def compiled(room: tuple[int, int], box: tuple[int, int], columns: int) -> dict[str, str]:
    """PTX and SASS of `leave`, by way of ``room`` in boxes of ``box``, of a tile of so many columns."""
    layout = roles.descriptor_layout(box, tl.bfloat16)
    types = {"descriptor": f"tensordesc<bf16[{box[0]},{box[1]}],{layout!r}>"}
    given = (*room, columns, ROLE, ROW, COLUMN)
    names = ("rows", "width", "columns", "role", "row", "column")
    constants = {(n,): value for n, value in enumerate(given, start=1)}
    types |= dict.fromkeys(names, "constexpr")
    source = GluonASTSource(leave, types, constants, {})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return {form: str(made.asm[form]) for form in ("ptx", "sass")}


FACTS = {"global_smem": 0, "%tid.x": 0, "%nctaid.z": 1}
OPS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "mul": operator.mul,
}


def copies(ptx: str) -> list[object]:
    """What thread 0 does in order: a copy as (row, column, byte of the rooms), or "read", "put"."""
    lines = [line.strip() for line in ptx.splitlines()]
    places = {line.partition(":")[0]: n for n, line in enumerate(lines) if line.startswith("$L")}
    numbers, at = dict(FACTS), 0
    found: list[object] = []

    def value(text: str) -> int:
        return int(text) if text.lstrip("-").isdecimal() else numbers[text]

    while lines[at] != "ret;":
        line, at = lines[at], at + 1
        name, _, rest = line.partition("\t")
        args = [arg.strip() for arg in rest.rstrip(";").split(",")]
        kind = name.strip().split(".")
        if copied := re.search(r"bulk_group \[%\w+, \{(\S+), (\S+)\}\], \[(\S+)\]", line):
            column, row, place = map(value, copied.groups())
            found.append((row, column, place))
        elif "bulk.wait_group.read" in line:
            assert args == ["0"]
            found.append("read")
        elif kind[0] == "st" or kind[0] == "stmatrix":
            found += ["put"] * (found[-1:] != ["put"])
        elif jump := re.match(r"(?:@(%p\d+) )?bra(?:\.uni)?\s+(\S+);", line):
            if jump[1] is None or numbers[jump[1]]:
                at = places[jump[2]]
        elif kind[0] in ("mov", "setp", *OPS) and kind[-1][1:] == "32":
            made = None
            if all(a in numbers or a.lstrip("-").isdecimal() for a in args[1:]):
                given = [value(a) for a in args[1:]]
                if kind[0] == "mov":
                    made = given[0]
                elif kind[0] == "setp":
                    made = int(getattr(operator, kind[1])(*given))
                else:
                    made = OPS[kind[0]](*given)
            numbers.pop(args[0], None)
            if made is not None:
                numbers[args[0]] = made
    return found


@pytest.mark.parametrize(
    ("room", "columns"), [((128, 64), 128), ((64, 128), 256), ((128, 32), 64), ((64, 64), 64)]
)
def test_a_tile_leaves_box_behind_box_each_when_the_one_before_has_been_read(
    room: tuple[int, int], columns: int
) -> None:
    box = sent_box(room, 2)
    order: list[object] = []
    for piece in range(0, columns, room[1]):
        order += ["read", "put"]
        for right, below in itertools.product(range(0, room[1], box[1]), range(0, room[0], box[0])):
            # In shared memory columns of up to 128 bytes lie with all of their rows below each other.
            inside = (right * room[0] + below * box[1]) * 2
            place = ROLE * room[0] * room[1] * 2 + inside
            order += [(ROW + below, COLUMN + piece + right, place), "read"]
    made = compiled(room, box, columns)
    assert copies(made["ptx"]) == order
    # Written out, the boxes of all ranks would take more uniform registers than there are.
    assert made["sass"].count("UTMASTG") == columns // room[1]


def test_a_tile_for_this_rank_leaves_as_a_whole_and_nobody_waits() -> None:
    first, second = (ROW, COLUMN, 128 * 64 * 2), (ROW, COLUMN + 64, 128 * 64 * 2)
    expected = ["read", "put", first, "read", "put", second]
    assert copies(compiled((128, 64), (128, 64), 128)["ptx"]) == expected


def test_all_of_the_descriptors_of_other_ranks_are_of_such_boxes_and_no_other_is() -> None:
    cases = [case for case in CASES if case.resource == "epilogue"]
    texts = {f"{c.name} {c.tile}": emit(c.fused()) for c in cases}
    texts = {name: text for name, text in texts.items() if "roles.send(" in text}
    assert {name.partition(" (")[0] for name in texts} >= {
        "gemm_rs",
        "gemm_rs folded",
        "gemm_ar folded",
    }
    rooms = {"128x64", "64x64", "64x256", "128x32"}
    assert {_room(text) for text in texts.values()} == rooms
    for text in texts.values():
        rows, columns = map(int, _room(text).split("x"))
        box = sent_box((rows, columns), 2)
        sent = re.findall(r"peer=(\d)\)\[rank\], \((\d+), (\d+)\)", text)
        assert [tuple(map(int, s)) for s in sent] == [(p, *box) for p in range(WORLD)]
        stored = re.findall(r"roles\.store\(\w*?_(\d+x\d+)\b", text)
        assert set(stored) <= {f"{rows}x{columns}"}


def _room(text: str) -> str:
    (found,) = re.findall(r"room = roles\.room\(\w+, (\d+), (\d+)\)", text)
    return "x".join(found)
