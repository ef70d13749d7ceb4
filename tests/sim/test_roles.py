"""Kernels whose warps have roles: proof, simulation and the clock."""

from __future__ import annotations

import re

import pytest
import torch

import tilelink
import tilelink.language as tk
from tests.roles import (
    FOLDED,
    LANDING,
    WORLD,
    Case,
    fused,
    named,
)
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.simulate import predict, run
from tilelink.backend.simulate.errors import DeadlockError, RaceError
from tilelink.backend.simulate.faults import Drop, Limits
from tilelink.backend.validate import (
    read_module,
    validate,
)
from tilelink.backend.verify import (
    CoverError,
    MatchError,
    ProgressError,
    UndecidedError,
    verify,
)
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import gemm_rs
from tilelink.schedules import Move, Schedule
from tilelink.schedules.machine import Machine


@tilelink.kernel("gather A[M, K] over M")
def in_turn(A, B, W, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    P = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(P[m, k], W[k, n], acc)
        C[m, n] = acc


def two_products() -> tuple[Op, list[dict[str, torch.Tensor]]]:
    """One launch of two products, of which the second reads what the first stores, by one worker."""
    kernel = in_turn.build({"M": 256, "N": 64, "K": 64}, {}, 2)
    tiles = (("K", 32), ("M", 64), ("N", 32))
    program = compile_kernel(kernel, Schedule(tiles=tiles, emitter="gluon", workers=1))
    sizes = {"A": (128, 64), "B": (64, 64), "W": (64, 64)}
    torch.manual_seed(0)
    inputs = [
        {n: torch.randint(-1, 2, size).bfloat16() for n, size in sizes.items()} for _ in range(2)
    ]
    return program, inputs


def test_a_loader_does_not_wait_for_the_stores_of_its_own_worker() -> None:
    """Without the wait between them, a later task of the same worker loads what is not there yet."""
    program, inputs = two_products()
    (launch,) = program.find("launch")
    assert (launch["roles"], [op.name for op in launch.body]) == (
        "turns",
        ["stage", "stage", "finish"],
    )
    validate(read_module(Source("emitted.py", emit(program))), program)
    text = print_ir(program)
    bare = "\n".join(line for line in text.splitlines() if not re.search(r"wait @P\.", line))
    with pytest.raises(CoverError):
        verify(parse_ir(bare))
    with pytest.raises(RaceError):
        for seed in range(4):
            run(parse_ir(bare), inputs, seed=seed)
    wanted = in_turn.on("reference", world=2)(**{n: [i[n] for i in inputs] for n in inputs[0]})
    for seed in range(4):
        outputs = run(program, inputs, seed=seed, calls=2)
        assert all(torch.equal(o["C"], w) for o, w in zip(outputs, wanted, strict=True))


def test_a_lost_signal_ends_every_role() -> None:
    program, inputs = two_products()
    with pytest.raises(tilelink.TilelinkError, match="ready"):
        run(program, inputs, faults=(Drop(rank=1, number=0),), limits=Limits(progress=1.0))


FORMS = [
    ('roles = "turns", ', "", "roles"),
    ('emitter = "gluon", ', "", "roles"),
    ("drain = true", "delay = 1, drain = true", "held back"),
    ("        yield (%acc.2)", "        yield (%acc)", "something else than sums"),
    ("      %p = cast", "      wait @P.done[0] {count = 8}\n      %p = cast", None),
]


@pytest.mark.parametrize(("old", "new", "says"), FORMS)
def test_form_of_launches_with_roles(old: str, new: str, says: str | None) -> None:
    text = print_ir(two_products()[0])
    assert old in text
    edited = parse_ir(text.replace(old, new, 1))
    if says is None:  # a wait of the epilogue is one of the group's
        with pytest.raises(tilelink.TilelinkError, match=r"circle|deadlock|cycle"):
            verify(edited)
        return
    with pytest.raises((UndecidedError, MatchError), match=says):
        verify(edited)


def test_what_groups_hold_back_is_flushed_before_their_worker_waits_for_it() -> None:
    program, inputs = two_products()
    text = print_ir(program)
    held = re.sub(r"(notify @P\.done\[0\] \{)", r"\1delay = 1, ", text, count=1)
    assert held != text
    flushed = held.replace("    stage @C.gemm", "    flush {drain = true}\n    stage @C.gemm", 1)
    late = held.replace("    finish do", "    flush {drain = true}\n    finish do", 1)
    assert flushed != held != late
    verify(parse_ir(flushed))
    wanted = in_turn.on("reference", world=2)(**{n: [i[n] for i in inputs] for n in inputs[0]})
    for seed in range(4):
        outputs = run(parse_ir(flushed), inputs, seed=seed, calls=2)
        assert all(torch.equal(o["C"], w) for o, w in zip(outputs, wanted, strict=True))
    with pytest.raises(ProgressError, match="held back until then"):
        verify(parse_ir(late))
    with pytest.raises(DeadlockError):
        run(parse_ir(late), inputs)


@pytest.mark.parametrize("case", [FOLDED, LANDING], ids=named)
def test_a_landed_sum_needs_the_proxy_fence(case: Case) -> None:
    """The proof and the simulator both miss it behind either of the waits."""
    tensors = case.tensors()
    text = print_ir(case.program(tensors))
    inputs = [{n: t[r] for n, t in tensors.items()} for r in range(WORLD)]
    bare, count = re.subn(r"(wait @C\.ready.*) \{proxy = true\}", r"\1", text)
    assert count == 2
    with pytest.raises(CoverError):
        verify(parse_ir(bare))
    with pytest.raises(RaceError):
        for seed in range(4):
            run(parse_ir(bare), inputs, seed=seed)


BARE = "%C.bare = load @C[%m.own at m.own.start % 256, %n.own] : bf16[m.own, n.own]"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("      %C.sum = ", "      notify @C.done[0, 0]\n      %C.sum = ", "in front of a sum"),
        ("      %C.sum = ", f"      {BARE}\n      %C.sum = ", "in front of a sum"),
        (" (%C.sum) {via", " (%C.sum) {via", None),
        ("    finish do {", "      notify @C.done[0, 0] {delay = 1}\n    }\n    finish do {", "held back"),
        ("    finish do {", "      wait @C.ready[0, 0]\n    }\n    finish do {", "behind a sum"),
    ],
)  # fmt: skip
def test_form_of_landed_sums(old: str, new: str, says: str | None) -> None:
    text = print_ir(fused(FOLDED))
    assert old in text
    if "finish" in old:  # behind the stage's last op
        old = "    }\n" + old
    edited = parse_ir(text.replace(old, new, 1))
    if says is None:
        verify(edited)
        return
    with pytest.raises(UndecidedError, match=says):
        verify(edited)


@pytest.mark.parametrize("tile", [(128, 128, 5), (128, 256, 4)])
def test_the_clock_hides_parts_that_land_beneath_the_product(tile: tuple[int, int, int]) -> None:
    """What remains is to add them: less than to load them, where no other group multiplies meanwhile.

    Of 128 x 256 a worker has two own tiles, whose three parts of 64 KB take a few microseconds from the cache.
    """
    kernel = gemm_rs.build({"M": 4096, "N": 4096, "K": 3584}, {}, WORLD)
    schedule = Schedule(
        tiles=(("K", 64), ("M", tile[0]), ("N", tile[1])),
        stages=tile[2],
        emitter="gluon",
        moves=(("C", Move(resource="copy_engine", sum="epilogue")),),
    )
    program = run_passes(kernel, schedule)
    text = print_ir(program)
    loaded = re.sub(r"(load_sum .*) \{via = \"tma\"\}", r"\1", text)
    assert loaded != text
    machine = Machine.load("h200x8")
    landed, behind = predict(program, machine), predict(parse_ir(loaded), machine)
    assert landed < behind - 3 if tile[1] == 256 else landed < behind * 1.01
