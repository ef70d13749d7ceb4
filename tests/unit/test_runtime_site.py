"""The call path of decorated kernels: what is looked up, and what is found out anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.backend.runtime import site
from tilelink.backend.runtime.errors import BadArgument
from tilelink.backend.runtime.image import image_of
from tilelink.frontend.errors import BadCall, NeedsGradient, NoStorage


class Program:
    """Stands for a program on the GPU: remembers what it is called with."""

    def __init__(self, image: Any) -> None:
        self.image = image
        self.calls: list[tuple[dict[str, torch.Tensor], dict[str, float]]] = []
        self.planned: list[dict[str, torch.Tensor]] = []
        self.bare: object = None
        self.endless: tuple[str, ...] = ()
        self.behind = 0

    def slots(self, extents: Mapping[str, int]) -> Any:
        return self.image.tensors

    def allocate(
        self, given: dict[str, torch.Tensor], extents: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        return {**given, "C": given.get("C", torch.empty(0))}

    def reach(self, tensors: dict[str, torch.Tensor]) -> tuple[int, ...]:
        return (self.behind,) * len(self.endless)

    def portable(self, extents: Mapping[str, int]) -> Any:
        return self.bare

    def plan(self, tensors: dict[str, torch.Tensor], *_: Any) -> Any:
        self.planned.append(tensors)
        return object()

    def enqueue(self, plan: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return self.call(tensors, {}, {})

    def call(
        self,
        tensors: dict[str, torch.Tensor],
        scalars: dict[str, float],
        extents: Mapping[str, int],
    ) -> Any:
        self.calls.append((tensors, scalars))
        return (tensors["C"],)


class Bench:
    """A site of `ag_gemm` on two ranks whose runtime is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self.state = SimpleNamespace(check_usable=lambda: None)
        image = image_of(run_passes(kernels.ag_gemm.build({"M": 32, "K": 16, "N": 16}, world=2)))
        self.program = Program(image)

        def program_of(
            kernel: Any, tensors: dict[str, Any], scalars: dict[str, Any], *_: Any
        ) -> tuple[Program, dict[str, int]]:
            self.met.append({**tensors, **scalars})
            return self.program, {}

        monkeypatch.setattr(site, "state_of", lambda group: self.state)
        monkeypatch.setattr(site, "program_of", program_of)
        monkeypatch.setattr(site, "refuse", lambda name, error, group: self.refused.append(name))
        self.site = site.Site(kernels.ag_gemm, None, None)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.bfloat16)


def test_a_kind_of_call_is_met_once(bench: Bench) -> None:
    for _ in range(3):
        a, b = matrix(16, 16), matrix(16, 16)
        bench.site((a, b), {})
        tensors, _ = bench.program.calls[-1]
        assert tensors["A"] is a and tensors["B"] is b
    assert len(bench.met) == 1
    bench.site((matrix(32, 16), matrix(16, 16)), {})
    bench.site((matrix(16, 16), matrix(16, 16).float()), {})
    bench.site((matrix(16, 16), matrix(16, 16)), {"nk": True})
    bench.site((matrix(16, 16),), {"B": matrix(16, 16)})
    assert len(bench.met) == 5
    bench.site((matrix(16, 16), matrix(16, 16)), {"nk": True})
    bench.site((matrix(16, 16),), {"B": matrix(16, 16)})
    assert len(bench.met) == 5 and len(bench.program.calls) == 9


def test_what_is_not_contiguous_is_copied(bench: Bench) -> None:
    b = torch.arange(256, dtype=torch.bfloat16).view(16, 16)
    for _ in range(2):
        bench.site((matrix(16, 16), b.T), {})
        tensors, _ = bench.program.calls[-1]
        assert tensors["B"].is_contiguous() and torch.equal(tensors["B"], b.T)
    with pytest.raises(BadArgument, match="is an output and not contiguous"):
        bench.site((matrix(16, 16), b, matrix(32, 32).T[:16]), {})


def test_another_state_of_the_group_is_met_anew(bench: Bench) -> None:
    bench.site((matrix(16, 16), matrix(16, 16)), {})
    bench.state = SimpleNamespace(check_usable=lambda: None)
    bench.site((matrix(16, 16), matrix(16, 16)), {})
    assert len(bench.met) == 2


def test_a_wrong_argument_is_told_to_the_other_ranks_each_time(bench: Bench) -> None:
    wanted = matrix(16, 16).requires_grad_()
    for _ in range(2):
        with pytest.raises(NeedsGradient, match=r"requires a gradient(.|\n)*tilelink\.ops"):
            bench.site((wanted, matrix(16, 16)), {})
    assert bench.refused == ["ag_gemm"] * 2 and bench.met == []
    with torch.no_grad():
        bench.site((wanted, matrix(16, 16)), {})
    # The kind of call that was fine without gradients is not fine with them.
    with pytest.raises(BadCall, match="requires a gradient"):
        bench.site((wanted, matrix(16, 16)), {})
    with pytest.raises(BadCall, match="needs the argument"):
        bench.site((matrix(16, 16),), {})


def test_a_kind_of_call_that_is_known_takes_no_tensor_without_memory(bench: Bench) -> None:
    a, b, out = matrix(16, 16), matrix(16, 16), matrix(32, 16)
    bench.site((a, b, out), {})
    bench.site((a, b), {})
    bench.site((a,), {"B": b})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [matrix(*t.shape) for t in (a, b, out)]
    for args, kwargs in (
        (fakes, {}),
        (fakes[:2], {}),
        ((a, fakes[1]), {}),
        ((a,), {"B": fakes[1]}),
        ((a, matrix(16, 16).to("meta")), {}),
    ):
        with pytest.raises(NoStorage):
            bench.site(tuple(args), kwargs)
    with pytest.raises(NoStorage):
        torch.vmap(lambda x: bench.site((x, b), {})[0])(torch.stack([a, a]))
    assert len(bench.program.calls) == 3


def test_a_recorded_call_is_found_by_its_tensors_and_all_that_is_known_of_them(
    bench: Bench,
) -> None:
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    a, b, out = matrix(16, 16), memory[:256].view(16, 16), matrix(32, 16)
    for _ in range(3):
        bench.site((a, b, out), {})
        tensors, _numbers = bench.program.calls[-1]
        assert (tensors["A"], tensors["B"], tensors["C"]) == (a, b, out)
    assert len(bench.program.planned) == 1 and len(bench.met) == 1
    # Another address is another call of the same kind.
    bench.site((a, memory[256:512].view(16, 16), out), {})
    assert len(bench.program.planned) == 2 and len(bench.met) == 1
    # The same address seen otherwise is another kind: a shape, a dtype, strides, gradients.
    for other in (memory[:512].view(32, 16), memory[:256].view(torch.float16).view(16, 16), b.T):
        bench.site((a, other, out), {})
    assert len(bench.met) == 4
    a.t_()
    bench.site((a, b, out), {})
    assert len(bench.met) == 5
    b.requires_grad_()
    with pytest.raises(BadCall, match="requires a gradient"):
        bench.site((a, b, out), {})


def test_what_a_call_writes_has_changed_for_autograd(bench: Bench) -> None:
    a, b, out = matrix(16, 16), matrix(16, 16), matrix(32, 16)
    for number in range(1, 4):
        bench.site((a, b, out), {})
        assert (a._version, b._version, out._version) == (0, 0, number)
    bench.site((a, b), {"C": out})
    assert out._version == 4
    bench.site((a, b), {})
    with torch.inference_mode():
        bench.site((a, b, matrix(32, 16)), {})
    scale = torch.ones(16, requires_grad=True)
    kept = scale * out
    bench.site((a, b, out), {})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(kept.sum())


def test_a_recorded_call_is_another_one_where_less_lies_behind_a_tensor(bench: Bench) -> None:
    bench.program.endless, bench.program.behind = ("A",), 7
    a, b, out = matrix(16, 16), matrix(16, 16), matrix(32, 16)
    for _ in range(3):
        bench.site((a, b, out), {})
    assert len(bench.program.planned) == 1
    # As many tensors at the same addresses, in other memory: looked up, and recorded again.
    bench.program.behind = 3
    looked_up = len(bench.program.calls)
    bench.site((a, b, out), {})
    assert len(bench.program.calls) == looked_up + 1
    for _ in range(3):
        bench.site((a, b, out), {})
    assert len(bench.program.planned) == 2


@pytest.mark.parametrize("bare", [False, True])
def test_what_is_left_out_is_allocated_anew_each_time(bench: Bench, bare: bool) -> None:
    bench.program.bare = object() if bare else None
    a, b = matrix(16, 16), matrix(16, 16)
    made = [bench.site((a, b), {})[0] for _ in range(2)]
    assert made[0] is not made[1]
    bench.site((a, b, None), {})
    assert bench.program.calls.pop()[0]["C"] is not None
    for out in made:
        assert (out.shape, out.dtype) == ((32, 16), torch.bfloat16)
    # In the order of the program, given or not: the addresses are a key of it.
    assert [list(tensors) for tensors, _ in bench.program.calls] == [["A", "B", "C"]] * 2


def test_numbers_that_are_left_out_have_their_defaults(bench: Bench) -> None:
    bench.program.image = replace(bench.program.image, scalars={"eps": "fp32"})
    args = (matrix(16, 16), matrix(16, 16), matrix(32, 16))
    given = {**dict(zip("ABC", args, strict=True)), "eps": 0.5}
    route = site.Route(bench.program, {}, ("A", "B", "C"), given)  # type: ignore[arg-type]
    route(args)
    assert not route.whole and bench.program.calls[-1][1] == {"eps": 0.5}


def test_recorded_calls_are_forgotten_in_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "PLANS", 2)
    calls = [(matrix(16, 16), matrix(16, 16), matrix(32, 16)) for _ in range(3)]
    for args in (*calls, calls[2], calls[0]):
        bench.site(args, {})
    assert len(bench.program.planned) == 4 and len(bench.met) == 1


def test_compile_time_arguments_are_told_apart_by_what_they_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros of both signs are two of them, and what is not a number is one."""
    monkeypatch.setattr(bench.site, "_fixed", frozenset({"nk"}))
    args = (matrix(16, 16), matrix(16, 16), matrix(32, 16))
    given = dict(zip("ABC", args, strict=True))
    monkeypatch.setattr(site, "match_arguments", lambda *_: given)
    for _ in range(2):
        for value in (0.0, -0.0, float("nan"), 0):
            bench.site(args, {"nk": value})
        assert len(bench.met) == 4
