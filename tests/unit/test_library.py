"""The emitter `library`: which loop nests it takes, what it refuses, and the text that calls it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tilelink
import tilelink.language as tk
from bench.cases import Case
from bench.ours import schedule_of as bench_schedule
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.image import image_of
from tilelink.backend.runtime.library import collective_of, matmul, place_of
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.backend.verify import BoundsError, ReuseError, UndecidedError, VerifyError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.kernels import ag_gemm, ag_gemm_swiglu, gemm_ar, gemm_ar_add, gemm_rs, gemm_rs_add
from tilelink.schedules import Move, Schedule, ScheduleError

EXTENTS = {"M": 32, "N": 16, "K": 24}


def schedule(kernel: Op, resource: str = "none", **fields: Any) -> Schedule:
    """The library's for every moved tensor of ``kernel``."""
    moved = [
        t.symbol for t in kernel.find("tensor") if t["move"] in ("gather", "scatter", "reduce")
    ]
    moves = tuple((name, Move(resource)) for name in sorted(moved))
    return Schedule(emitter="library", workers=4, warps=4, moves=moves, **fields)


def library(
    kernel: Any,
    extents: dict[str, int] = EXTENTS,
    world: int = 2,
    resource: str = "none",
    **given: Any,
) -> Op:
    """The proven program of ``kernel``."""
    op = kernel.build(extents, world=world, **given)
    return compile_kernel(op, schedule(op, resource))


def calls(program: Op) -> list[str]:
    """What the host function calls, in order, without arguments."""
    text = emit(program)
    body = text[text.index("def host") : text.index("def run(")]
    found = ["head", "collective", "library", "matmul", "launch", "stream"]
    at = sorted(
        (body.index(f"call.{n}(", i), n) for n in found for i in _starts(body, f"call.{n}(")
    )
    return [name for _, name in at]


def _starts(text: str, word: str) -> list[int]:
    found, at = [], text.find(word)
    while at >= 0:
        found.append(at)
        at = text.find(word, at + 1)
    return found


@tilelink.kernel("gather A[M, K] over M { owner m / 4 % WORLD }")
def cyclic_gather(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over K { owner k / 4 % WORLD }")
def cyclic_depth(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = acc


@tilelink.kernel("gather A[M, K] over M\nscatter C[M, H] over M sum")
def mlp(A, B, D, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    H = D.shape[1]
    P = tk.empty([M, N], A.dtype)
    Q = tk.empty([M, N], A.dtype)
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        P[m, n] = acc
    for m, n in tk.tiles(M, N):
        Q[m, n] = tk.silu(P[m, n])
    for m, h in tk.tiles(M, H):
        acc = tk.zeros([m, h], tk.float32)
        for n in tk.tiles(N):
            acc = tk.dot(Q[m, n], D[n, h], acc)
        C[m, h] = acc


@tilelink.kernel("reduce C[M, N] sum")
def clipped(A, B, C):  # type: ignore[no-untyped-def]
    M, K = A.shape
    N = B.shape[1]
    for m, n in tk.tiles(M, N):
        acc = tk.zeros([m, n], tk.float32)
        for k in tk.tiles(K):
            acc = tk.dot(A[m, k], B[k, n], acc)
        C[m, n] = tk.maximum(acc, 0.0)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        (ag_gemm, ["collective", "library", "matmul"]),
        (gemm_rs, ["library", "matmul", "collective"]),
        (gemm_ar, ["library", "matmul", "collective"]),
        (gemm_rs_add, ["library", "matmul", "collective", "launch"]),
        (gemm_ar_add, ["library", "matmul", "collective", "launch"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_not_overlapped_it_is_the_two_library_calls_and_nothing_else(
    kernel: Any, wanted: list[str]
) -> None:
    program = library(kernel)
    assert calls(program) == wanted
    for name in ("head", "flag", "counter", "stream"):
        assert not program.find(name)
    image = image_of(program)
    assert not image.waits
    assert image.bare == ("launch" not in wanted)
    assert parse_ir(print_ir(program)) == program


def test_a_layer_of_two_products_runs_in_four_launches() -> None:
    program = library(mlp, {"M": 32, "K": 24, "N": 32, "H": 8})
    launches = [(op.symbol, op.get("emitter"), op.get("after")) for op in program.find("launch")]
    assert launches == [
        ("mlp", "library", ("A",)),
        ("mlp.part2", None, ("mlp",)),
        ("mlp.part3", "library", ("mlp.part2",)),
    ]
    # What a launch leaves for the next needs no signal.
    assert not program.find("counter")


def test_operands_are_transposed_and_a_bias_is_added_by_the_library() -> None:
    turned = emit(library(ag_gemm, scalars={"nk": True}))
    assert 'call.matmul(call.buffer("A.all"), call.tensor("B").T, call.tensor("C"))' in turned
    assert 'bias=call.tensor("bias")' in emit(library(ag_gemm, present=["A", "B", "C", "bias"]))


def test_blocks_that_lie_apart_are_products_of_their_own() -> None:
    text = emit(library(cyclic_gather))
    assert "for i in range(8):" in text and 'call.tensor("C")[m : m + 4]' in text


@pytest.mark.parametrize(
    "owner", ["min(m / 4, 2 * WORLD - 1 - m / 4)", "max(m / 4, m / 4) % WORLD"]
)
def test_owners_of_blocks_are_chosen_by_the_host(owner: str) -> None:
    """Its numbers are Python's: no function of Triton's finds the smaller one."""
    kernel = tilelink.kernel(f"gather A[M, K] over M {{ owner {owner}  tile 4 x K }}")(
        cyclic_gather.__wrapped__
    )
    rows, world = 24, 3
    program = library(kernel, {"M": rows, "N": 16, "K": 16}, world, "copy_engine")
    text = emit(program)
    assert re.search(r"if m(in|ax)\(", text)
    assert "tl.m" not in text[text.index("def host") :]
    validate(read_module(Source("emitted.py", text)), program)
    a = [torch.randint(-3, 4, (rows // world, 16)).bfloat16() for _ in range(world)]
    b = [torch.randint(-3, 4, (16, 16)).bfloat16() for _ in range(world)]
    chosen = Schedule.from_json(str(program["schedule"]))
    got = kernel.on("interpret", world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, kernel.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize(
    ("kernel", "given", "said"),
    [
        (ag_gemm_swiglu, {}, "2 products"),
        (clipped, {}, "stands behind its loop"),
        (gemm_ar, {"dtypes": {"A": "bf16", "B": "bf16", "C": "fp32"}}, "stores fp32"),
        (cyclic_depth, {"extents": {"M": 32, "N": 16, "K": 16}}, "lie apart"),
    ],
    ids=["swiglu", "clipped", "dtype", "depth"],
)
def test_what_is_no_plain_product_is_refused_at_its_op(
    kernel: Any, given: dict[str, Any], said: str
) -> None:
    op = kernel.build(given.pop("extents", EXTENTS), world=2, **given)
    with pytest.raises(ScheduleError) as caught:
        run_passes(op, schedule(op))
    assert said in str(caught.value) and caught.value.span is not None


@pytest.mark.parametrize(("kernel", "resource"), [(gemm_rs, "sm:2"), (gemm_rs, "epilogue")])
def test_what_needs_a_kernel_of_ours_is_refused(kernel: Any, resource: str) -> None:
    op = kernel.build(EXTENTS, world=2)
    with pytest.raises(ScheduleError, match="needs a kernel of our own"):
        run_passes(op, schedule(op, resource))


# One edit of a program each: what stands there, what is put there, and who objects.
EDITS = [
    (ag_gemm, 'launch @ag_gemm {after = ["A"], ', "launch @ag_gemm {", VerifyError),
    (ag_gemm, "workers = 1}", "workers = 2}", UndecidedError),
    (ag_gemm, "tile = [32, 16]", "tile = [16, 16]", UndecidedError),
    (ag_gemm, "tile = [32, 16]", "positions = [0, 1], tile = [32, 16]", UndecidedError),
    (ag_gemm, "{extent = [K], tile = [24]}", "{extent = [K], tile = [16]}", UndecidedError),
    (ag_gemm, "dot (%a, %b, %acc.1)", "dot (%a, %b, %acc.1) : fp32[m, n]\n%x = neg (%acc.2)", UndecidedError),
    (ag_gemm, "emitter = \"library\", ", "emitter = \"library\", resident = 1, ", UndecidedError),
    (gemm_ar, "alias = @C, ", "alias = @B, ", BoundsError),
    (gemm_ar, 'collective @C.partial {after = ["gemm_ar"], ', "collective @C.partial {", ReuseError),
    (gemm_ar_add, '{after = ["gemm_ar_add", "P.partial"]', '{after = ["gemm_ar_add"]', ReuseError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "old", "new", "error"), EDITS, ids=[str(n) for n in range(len(EDITS))]
)
def test_programs_that_were_changed_are_refused(
    kernel: Any, old: str, new: str, error: type[VerifyError]
) -> None:
    text = print_ir(library(kernel))
    verify(parse_ir(text))
    head, body = text.split("} do {\n", 1)
    assert old in body
    with pytest.raises(error):
        verify(parse_ir(f"{head}}} do {{\n{body.replace(old, new, 1)}"))


TEXTS = [
    (ag_gemm, 'call.tensor("B"), call.tensor("C")', 'call.tensor("B").T, call.tensor("C")'),
    (ag_gemm, 'call.buffer("A.all"), call.tensor("B")', 'call.tensor("B"), call.buffer("A.all")'),
    (ag_gemm, 'call.tensor("B"), call.tensor("C")', 'call.buffer("A.all"), call.tensor("C")'),
    (ag_gemm, 'after=("A",)', "after=()"),
    (ag_gemm, '        call.matmul(call.buffer("A.all"), call.tensor("B"), call.tensor("C"))\n', "        pass\n"),
    (gemm_rs, 'call.buffer("C.partial"))', 'call.tensor("C"))'),
    (gemm_rs, 'call.library("gemm_rs"', 'call.library("gemm"'),
    (gemm_ar, 'call.buffer("C.partial"))', 'call.buffer("C.partial"), bias=call.tensor("A")[0])'),
    (cyclic_gather, "range(8)", "range(7)"),
    (cyclic_gather, 'call.tensor("C")[m : m + 4]', 'call.tensor("C")[m + 4 - 4 : m + 2]'),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new"), TEXTS, ids=[str(n) for n in range(len(TEXTS))])
def test_host_functions_that_were_changed_are_refused(kernel: Any, old: str, new: str) -> None:
    refused(kernel, "none", old, new)


def refused(kernel: Any, resource: str, old: str, new: str) -> None:
    """The host function as emitted passes, and is refused with one edit."""
    # All extents equal: shapes tell nothing.
    program = library(kernel, {"M": 32, "N": 32, "K": 32}, resource=resource)
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    start = text.index("def host")
    assert old in text[start:]
    changed = text[:start] + text[start:].replace(old, new, 1)
    with pytest.raises(EmittedError):
        validate(read_module(Source("emitted.py", changed)), program)


SIGNALS = [
    (ag_gemm, "if m // 16 != rank:", "if m // 16 == rank:"),
    (ag_gemm, 'call.wait("A.ready", (m // 16, 0), m // 16, i, 1)', "pass"),
    (ag_gemm, "(m // 16, 0), m // 16, i, 1)", "(rank, 0), m // 16, i, 1)"),
    (ag_gemm, "(m // 16, 0), m // 16, i, 1)", "(m // 16, 0), rank, i, 1)"),
    (ag_gemm, "(m // 16, 0), m // 16, i, 1)", "(m // 16, 0), m // 16, i, 2)"),
    (ag_gemm, "if m // 16 == rank:", "if m // 16 != rank:"),
    (ag_gemm, "        call.acknowledge()\n", ""),
    (ag_gemm, "        call.acknowledge()\n", "        call.acknowledge()\n        call.acknowledge()\n"),
    (gemm_rs, 'call.count("C.done", (m // 16, 0))', "pass"),
    (gemm_rs, 'call.count("C.done", (m // 16, 0))', 'call.count("C.done", (rank, 0))'),
    (gemm_rs, "    call.matmul(", '    call.count("C.done", (0, 0))\n            call.matmul('),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "old", "new"), SIGNALS, ids=[str(n) for n in range(len(SIGNALS))]
)
def test_signals_between_products_that_were_changed_are_refused(
    kernel: Any, old: str, new: str
) -> None:
    refused(kernel, "copy_engine", old, new)


def test_an_acknowledgement_in_front_of_a_product_is_refused() -> None:
    """The next call of a peer would overwrite what the product has still to read."""
    program = library(ag_gemm, resource="copy_engine")
    text = emit(program)
    acknowledge = "        call.acknowledge()\n"
    begin = text.index("        for i in range(2):\n")
    without = text[begin:].replace(acknowledge, "", 1)
    assert len(without) == len(text[begin:]) - len(acknowledge)
    with pytest.raises(EmittedError, match="behind the acknowledgement"):
        early = text[:begin] + acknowledge + without
        validate(read_module(Source("emitted.py", early)), program)


def test_products_are_of_owner_slices_beside_copy_engines() -> None:
    """A slice is waited for before its product, or counted behind it, in the order of arrival or departure."""
    program = library(gemm_rs_add, {"M": 64, "N": 16, "K": 24}, 4, "copy_engine")
    first, second = program.find("launch")
    assert (first.get("emitter"), second.get("emitter")) == ("library", None)
    assert second["after"] == ("head", "gemm_rs_add")
    # The stream stands between them: with one hardware queue copies go before a kernel that waits for them.
    names = [op.name for op in program.body if op.name in ("head", "launch", "stream")]
    assert names == ["head", "launch", "stream", "launch"]
    (stage,) = first.find("stage")
    assert (stage["tile"], stage["segment"]) == ((16, 16), 16)
    assert [op.name for op in stage.body][-2:] == ["store", "notify"]


def test_switches_of_pytorch_are_off_in_a_product_and_put_back() -> None:
    switches = torch.backends.cuda.matmul
    before = switches.fp32_precision, switches.allow_bf16_reduced_precision_reduction
    seen: list[tuple[str, bool]] = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.mm:
                reduced = switches.allow_bf16_reduced_precision_reduction
                seen.append((switches.fp32_precision, reduced))
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    try:
        switches.fp32_precision = "tf32"
        switches.allow_bf16_reduced_precision_reduction = True
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(4, 4, dtype=dtype).as_subclass(Watching)
            matmul(a, a, torch.empty(4, 4, dtype=dtype).as_subclass(Watching))
        assert seen == [("ieee", True), ("tf32", False)]
        assert switches.fp32_precision == "tf32"
        assert switches.allow_bf16_reduced_precision_reduction is True
    finally:
        switches.fp32_precision, switches.allow_bf16_reduced_precision_reduction = before


def test_a_switch_that_follows_a_general_one_follows_it_behind_a_product() -> None:
    general: Any = torch.backends
    switches = general.cuda.matmul
    before = general.fp32_precision, switches.fp32_precision
    a = torch.ones(4, 4)
    try:
        switches.fp32_precision, general.fp32_precision = "none", "tf32"
        matmul(a, a, torch.empty(4, 4))
        assert switches.fp32_precision == "tf32"
        general.fp32_precision = "ieee"
        assert switches.fp32_precision == "ieee"
        switches.fp32_precision = "tf32"
        matmul(a, a, torch.empty(4, 4))
        assert (general.fp32_precision, switches.fp32_precision) == ("ieee", "tf32")
    finally:
        general.fp32_precision, switches.fp32_precision = before


def test_parameters_of_a_model_are_multiplied() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    bias = torch.nn.Parameter(torch.ones(4))
    a, out = torch.arange(8.0).view(2, 4), torch.empty(2, 4)
    matmul(a, weight.T, out, bias)
    assert torch.equal(out, a + 1) and not out.requires_grad
    assert torch.is_grad_enabled()


def test_collectives_of_a_real_backend() -> None:
    from concurrent.futures import ThreadPoolExecutor

    ranks, store = 2, dist.HashStore()  # type: ignore[attr-defined]
    shards = [torch.arange(6.0).view(2, 3) + 10 * r for r in range(ranks)]
    whole, total = torch.cat(shards), torch.stack(shards).sum(0)

    def of(rank: int) -> tuple[torch.Tensor, ...]:
        group: Any = dist.ProcessGroup(store, rank, ranks)
        backend = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=30))
        kind = dist.ProcessGroup.BackendType.GLOO
        group._register_backend(torch.device("cpu"), kind, backend)
        gather, scatter, reduce = (
            collective_of(op, group, torch.device("cpu"))
            for op in ("all_gather", "reduce_scatter", "all_reduce")
        )
        gathered, mine, summed = torch.empty(4, 3), torch.empty(1, 3), shards[rank].clone()
        gather(gathered, shards[rank])
        scatter(mine, shards[rank])
        reduce(summed, summed)
        return gathered, mine, summed

    with ThreadPoolExecutor(ranks) as pool:
        for rank, found in enumerate(pool.map(of, range(ranks))):
            wanted = whole, total[rank : rank + 1], total
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_regions_are_found_again_in_the_tensors_of_a_later_call() -> None:
    one, other = torch.arange(24.0).view(4, 6), torch.arange(100.0, 124.0).view(4, 6)
    regions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t,
        lambda t: t[2:],
        lambda t: t.T,
        lambda t: t[1:3].T,
    ]
    for region in regions:
        place = place_of(region(one), {"B": torch.zeros(3), "A": one})
        assert place is not None and place[0] == "A"
        _, skip, shape, strides = place
        assert torch.equal(other.as_strided(shape, strides, skip), region(other))
    assert place_of(torch.zeros(3), {"A": one}) is None


def test_the_benchmark_names_it() -> None:
    case = Case("gemm_rs", 512, 64, 64, "test")
    found = bench_schedule(gemm_rs, case, 4, "library")
    assert found.emitter == "library" and found.move("C").resource == "none"


def test_a_schedule_with_it_is_read_back() -> None:
    found = replace(Schedule(), emitter="library")
    assert Schedule.from_json(found.to_json()) == found
