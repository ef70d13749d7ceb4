"""The emitter `library`: emitted modules on the interpreter, and what the CUDA runtime would enqueue."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.collectives import Group
from tests.sim.test_library import ARGUMENTS, WORLD, draw
from tests.unit.test_library import cyclic_gather, library, schedule
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, load_module, plan, write_module
from tilelink.backend.runtime.errors import WaitTimeout
from tilelink.backend.runtime.image import image_of
from tilelink.ir import Op
from tilelink.kernels import ag_gemm, gemm_ar, gemm_ar_add, gemm_rs, gemm_rs_add
from tilelink.schedules import Move, Schedule


@pytest.mark.parametrize("resource", ["none", "copy_engine"])
@pytest.mark.parametrize(
    "kernel",
    [ag_gemm, cyclic_gather, gemm_rs, gemm_rs_add, gemm_ar, gemm_ar_add],
    ids=lambda kernel: str(kernel.name),
)
def test_emitted_modules_give_the_numbers_of_the_reference(kernel: Any, resource: str) -> None:
    shapes = ARGUMENTS[kernel.name]
    given = {name: draw(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    extents = {"M": 32, "K": 24, "N": 16}
    how = schedule(kernel.build(extents, world=WORLD, present=[*given, "C"]), resource)
    wanted = kernel.on("reference", world=WORLD)(**given)
    found = kernel.on("interpret", world=WORLD, schedule=how)(**given)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


class Library:
    """NCCL and cuBLAS of one rank, as a log; every rank holds what this one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        product = torch.mm

        def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
            self.log.append("mm")
            product(a, b, out=out)

        def all_gather(target: torch.Tensor, source: torch.Tensor) -> None:
            self.log.append("all_gather")
            target.copy_(torch.cat([source] * WORLD))

        def reduce_scatter(target: torch.Tensor, source: torch.Tensor) -> None:
            self.log.append("reduce_scatter")
            target.copy_(source.chunk(WORLD)[0] * WORLD)

        def all_reduce(target: torch.Tensor) -> None:
            self.log.append("all_reduce")
            target.mul_(WORLD)

        monkeypatch.setattr(torch, "mm", mm)
        self.group = Group(all_gather, reduce_scatter, all_reduce)


def _no_stream(name: str) -> torch.cuda.Stream:
    raise AssertionError(f"the side stream {name}")


def recorded(kernel: Any, tensors: dict[str, torch.Tensor], group: Group) -> plan.Plan:
    """The plan of rank 0, recorded with these tensors."""
    program = library(kernel)
    image = image_of(program)
    module = load_module(write_module(emit(program), image.name))
    arenas = [torch.zeros(image.arena_bytes, dtype=torch.uint8) for _ in range(WORLD)]
    recorder = plan.Recorder(
        image, 0, arenas, torch.zeros(WORLD, dtype=torch.int64), 10.0, 600.0,
        streams=_no_stream, group=group, host_record=0, addresses=[0] * WORLD,
    )  # fmt: skip
    recorder.workspace = torch.zeros(image.workspace_bytes, dtype=torch.uint8)
    recorder.tensors = tensors
    module.host(recorder)
    return recorder.finish()


def tensors_for(kernel: Any, seed: int) -> dict[str, torch.Tensor]:
    rows = {"ag_gemm": 16}.get(kernel.name, 32)
    out = {"gemm_rs": 16}.get(kernel.name, 32)
    a, b = draw(rows, 24, seed=seed)[0], draw(24, 16, seed=seed + 1)[0]
    return {"A": a, "B": b, "C": torch.full((out, 16), float("nan"), dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("kernel", "log"),
    [
        (ag_gemm, ["all_gather", "mm"]),
        (gemm_rs, ["mm", "reduce_scatter"]),
        (gemm_ar, ["mm", "all_reduce"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_call_is_the_two_library_calls_and_no_kernel_of_ours(
    kernel: Any, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library_ = Library(monkeypatch)

    def compile_launch(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel of ours")

    monkeypatch.setattr(plan, "compile_launch", compile_launch)
    first = tensors_for(kernel, 1)
    made = recorded(kernel, first, library_.group)
    assert library_.log == [] and made.launches == []
    for seed in (1, 5, 9):
        # The plan was recorded with the tensors of the first call, and works on those of this one.
        now = tensors_for(kernel, seed)
        library_.log.clear()
        made.enqueue(0, now)
        assert library_.log == log
        a = torch.cat([now["A"]] * WORLD) if kernel is ag_gemm else now["A"]
        wanted = (a.float() @ now["B"].float()).bfloat16()
        if kernel is not ag_gemm:
            wanted = (wanted * WORLD)[: now["C"].shape[0]]
        assert torch.equal(now["C"], wanted)


def test_a_plan_keeps_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_for(ag_gemm, 1)
    made = recorded(ag_gemm, tensors, Library(monkeypatch).group)
    made.enqueue(0, tensors)
    kept = [weakref.ref(t) for t in tensors.values()]
    tensors.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_lost_signal_between_products_is_named_with_its_place() -> None:
    program = library(ag_gemm, {"M": 32, "K": 24, "N": 16}, resource="copy_engine")

    def without_one_notify(planned: Op) -> str:
        call = 'call.notify("A.ready"'
        source = emit(planned)
        assert call in source
        return source.replace(call, f"if rank != 1: {call}")

    inputs = [
        {"A": a, "B": b} for a, b in zip(draw(16, 24, seed=1), draw(24, 16, seed=2), strict=True)
    ]
    with pytest.raises(WaitTimeout) as caught:
        interpret.run(program, inputs, timeout=12.0, emit=without_one_notify)
    values = caught.value.values
    assert (values["rank"], values["producer"], values["channel"]) == (0, 1, "@A.ready[1, 0]")
    # The second product of rank 0: its own slice comes first.
    assert values["tile"] == 1
    assert "tk.dot(A[m, k]" in str(caught.value)


def test_copies_and_products_by_slices_go_to_the_stream_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library_ = Library(monkeypatch)
    log = library_.log

    class Launch:
        compiled = None

        def __init__(self, kernel: Any, workers: int) -> None:
            self.name = f"{kernel.fn.__name__} {workers}"

        def run(self, stream: int, _: object) -> None:
            log.append(self.name)

    monkeypatch.setattr(plan, "compile_launch", lambda kernel, n, args, **_: Launch(kernel, n))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: log.append(f"mm {tuple(a.shape)}"))
    program = library(ag_gemm, resource="copy_engine")
    image = image_of(program)
    assert image.launches == () and not image.bare
    module = load_module(write_module(emit(program), image.name))
    arenas = [torch.zeros(image.arena_bytes, dtype=torch.uint8) for _ in range(WORLD)]
    recorder = plan.Recorder(
        image, 0, arenas, torch.zeros(WORLD, dtype=torch.int64), 10.0, 600.0,
        streams=_no_stream, group=None, host_record=0, addresses=[0] * WORLD,
    )  # fmt: skip
    recorder.workspace = torch.zeros(image.workspace_bytes, dtype=torch.uint8)
    recorder.tensors = tensors_for(ag_gemm, 1)

    @contextlib.contextmanager
    def stream(name: str, after: tuple[str, ...]) -> Iterator[None]:
        yield

    # What a stream does is the matter of test_plan.
    for name, what in (
        ("stream", stream),
        ("transfer", lambda *_: None),
        ("notify", lambda *_: None),
    ):
        monkeypatch.setattr(recorder, name, what)
    module.host(recorder)
    recorder.finish().enqueue(0, recorder.tensors)
    assert log == [
        "head_kernel 1",
        "mm (16, 24)",
        "wait_kernel 1",
        "mm (16, 24)",
        "acknowledge_kernel 1",
        "guard_kernel 32",
    ]


def test_parts_that_begin_amid_sixteen_bytes_stay_with_the_library() -> None:
    kernel = gemm_ar.build({"M": 2, "K": 16, "N": 8}, {}, 2, dtype="fp16")
    move = Move("copy_engine", sum="epilogue", shots=2)
    tiles = tuple((name, 16) for name in "KMN")
    how = Schedule(tiles=tiles, workers=3, emitter="library", moves=(("C", move),))
    launches = interpret.plan(compile_kernel(kernel, how)).find("launch")
    assert [op.get("emitter") for op in launches] == ["library", None]
    # Sums of whole numbers below 2048 are exact in fp16.
    chance = torch.Generator().manual_seed(0)
    left, right = (
        [torch.randint(-3, 4, shape, generator=chance).half() for _ in range(2)]
        for shape in ((2, 16), (16, 8))
    )
    wanted = gemm_ar.on("reference", world=2)(left, right)
    found = gemm_ar.on("interpret", world=2, schedule=how)(left, right)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)
