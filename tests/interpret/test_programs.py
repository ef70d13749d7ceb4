"""The hand-written fused programs on the interpreter, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret
from tilelink.backend.runtime.errors import BadArgument, RankFailed, RankStuck, WaitTimeout
from tilelink.ir import Op, parse_ir
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

PROGRAMS = sorted((Path(__file__).parents[1] / "programs").glob("*.ir"))


def read(name: str) -> Op:
    path = next(p for p in PROGRAMS if p.name == name)
    return parse_ir(path.read_text(), path.name)


def random_inputs(program: Op, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    m, k, n = (int(program.declared(x)["value"]) for x in "MKN")
    world = int(program["world"])
    rows = m // world if program.declared("A")["move"] == "gather" else m
    return [
        {
            "A": torch.randn(rows, k, generator=generator).bfloat16(),
            "B": torch.randn(k, n, generator=generator).bfloat16(),
        }
        for _ in range(world)
    ]


def expected(program: Op, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    if program.declared("A")["move"] == "gather":
        whole = torch.cat([i["A"] for i in inputs]).double()
        return [whole @ i["B"].double() for i in inputs]
    total = torch.stack([i["A"].double() @ i["B"].double() for i in inputs]).sum(0)
    if program.declared("C")["move"] == "scatter":
        return list(total.chunk(len(inputs)))
    return [total] * len(inputs)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_program_gives_the_right_numbers_call_after_call(path: Path) -> None:
    program = parse_ir(path.read_text(), path.name)
    calls = [random_inputs(program, seed) for seed in range(3)]
    # The epoch passes the largest int32 between the second and the third call.
    outputs = interpret.run_calls(program, calls, epoch=2**31 - 3, timeout=120.0)
    for inputs, ranks in zip(calls, outputs, strict=True):
        for got, want in zip(ranks, expected(program, inputs), strict=True):
            error = (got["C"].double() - want).norm(dim=1) / want.norm(dim=1)
            assert got["C"].dtype == torch.bfloat16
            assert float(error.max()) < 4e-3


def test_a_kernel_of_many_ops_agrees_with_torch() -> None:
    """Causal attention with uneven tiles, a projection, a bias and gelu, against plain PyTorch."""
    program = parse_ir((Path(__file__).parent / "attention.ir").read_text(), "attention.ir")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    given = {
        "Q": random(2, 40, 24),
        "K": random(2, 40, 24),
        "V": random(2, 40, 24),
        "W": random(24, 24),
        "bias": random(24),
    }
    found = interpret.run(program, [given], scalars={"scale": 0.2}, timeout=100.0, emit=emit)[0]
    q, k, v, w, bias = (t.float() for t in given.values())
    scores = q @ k.transpose(1, 2) * 0.2
    scores = scores.masked_fill(~torch.ones(40, 40).tril().bool(), -1e30)
    wanted = torch.nn.functional.gelu((scores.softmax(-1) @ v) @ w.T + bias)
    assert (found["O"].float() - wanted).norm() / wanted.norm() < 5e-3
    assert (found["L"] - scores.logsumexp(-1)).abs().max() < 1e-4


def test_what_stands_behind_the_end_of_a_short_tile_warns_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ratio.py"
    path.write_text(
        "import tilelink\nimport tilelink.language as tk\n\n"
        '@tilelink.kernel("gather A[M, N] over M")\n'
        "def ratio(A, B, C):\n    M, N = A.shape\n    for m, n in tk.tiles(M, N):\n"
        "        C[m, n] = A[m, n] / B[m, n]\n"
    )
    shards = [torch.full((3, 5), 6.0), torch.full((3, 5), 8.0)]
    kernel = load_kernels(path)["ratio"]
    found = kernel.on("interpret", world=2)(shards, torch.full((6, 5), 2.0))
    assert all(torch.equal(got, torch.cat(shards) / 2.0) for got in found)
    assert "Warning" not in capfd.readouterr().err


def test_lost_signal_is_named_with_its_place() -> None:
    """Among so many ranks that all are told to stop in a loop which the compiler does not write out."""
    kernel = kernels.ag_gemm.build({"M": 64, "K": 32, "N": 32}, {}, 8)
    tiles = (("K", 16), ("M", 16), ("N", 16))
    move = Move(resource="copy_engine")
    program = compile_kernel(kernel, Schedule(tiles=tiles, moves=(("A", move),)))

    def without_one_notify(plan: Op) -> str:
        source = emit(plan)
        call = 'call.notify("A.ready"'
        assert call in source
        return source.replace(call, f"if not (rank == 1 and A_s == 1): {call}")

    with pytest.raises(WaitTimeout) as caught:
        interpret.run(program, random_inputs(program, 0), timeout=12.0, emit=without_one_notify)
    values = caught.value.values
    assert (values["rank"], values["producer"]) == (2, 1)
    assert values["channel"] == "@A.ready[1, 0]"
    assert (values["expected"], values["seen"]) == (1, 0)
    assert "ag_gemm.py" in str(caught.value) and "A[m, k]" in str(caught.value)


def failing(statement: str) -> interpret.Emit:
    return lambda plan: emit(plan).replace("    call.head(", f"    {statement}\n    call.head(")


def test_rank_that_raises_is_named() -> None:
    program = read("ag_gemm.copy_engine.ir")
    with pytest.raises(RankFailed, match=r"rank 1 .* ZeroDivisionError"):
        interpret.run(program, random_inputs(program, 0), emit=failing("1 // (call.rank - 1)"))


def test_rank_that_dies_is_named_with_its_exit_code() -> None:
    program = read("ag_gemm.copy_engine.ir")
    emit_it = failing("call.rank == 2 and __import__('os')._exit(7)")
    with pytest.raises(RankFailed, match=r"rank 2 .* exit code 7"):
        interpret.run(program, random_inputs(program, 0), emit=emit_it)


def test_rank_that_never_comes_is_an_error_not_a_hang() -> None:
    program = read("gemm_ar.epilogue.ir")
    emit_it = failing("call.rank == 1 and __import__('time').sleep(60)")
    with pytest.raises(RankStuck) as caught:
        interpret.run(program, random_inputs(program, 0), timeout=4.0, emit=emit_it)
    assert "1" in str(caught.value.values["ranks"])


def test_missing_and_misshapen_tensors_are_named() -> None:
    program = read("gemm_ar.epilogue.ir")
    inputs = random_inputs(program, 0)
    with pytest.raises(BadArgument, match="`B`: is missing"):
        interpret.run(program, [{"A": i["A"]} for i in inputs])
    with pytest.raises(BadArgument, match="`A`: has shape"):
        interpret.run(program, [{**i, "A": i["A"].T} for i in inputs])
