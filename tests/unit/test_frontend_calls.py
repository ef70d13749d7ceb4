"""Calls: arguments become extents and element types, outputs come back, mistakes name the argument."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilelink.errors import TilelinkError
from tilelink.kernel import Kernel, load_kernels

FOLDER = Path(__file__).parents[1] / "kernels"
KERNELS: dict[str, Kernel] = {
    name: found
    for path in sorted(FOLDER.glob("*.py"))
    for name, found in load_kernels(path).items()
}
WORLD = 2


def rand(*shape: int) -> torch.Tensor:
    """A reproducible bf16 tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether no row is off by more than bf16 rounding explains."""
    error = (result.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool(error.max() < 0.01)


def test_shards_give_global_extents() -> None:
    bound = KERNELS["ag_gemm"].bind([rand(16, 32), rand(32, 48)], WORLD)
    assert bound.request.dtypes == {"A": "bf16", "B": "bf16"}
    op = KERNELS["ag_gemm"].build_for(bound)
    assert {e.symbol: e["value"] for e in op.find("extent")} == {"M": 32, "K": 32, "N": 48}
    assert bound.tensors["C"] is None


def test_one_call_in_lists_out() -> None:
    a, b = rand(32, 32), [rand(32, 48), rand(32, 48) + 1]
    result = KERNELS["ag_gemm"].on("reference", world=WORLD)(list(a.chunk(WORLD)), b)
    assert all(close(c, a.float() @ w.float()) for c, w in zip(result, b, strict=True))


def test_outputs_that_are_given_are_filled() -> None:
    a, b = rand(32, 32), rand(32, 48)
    out = [torch.zeros(32, 48) for _ in range(WORLD)]
    result = KERNELS["ag_gemm"].on("reference", world=WORLD)(list(a.chunk(WORLD)), b, C=out)
    assert all(x is y for x, y in zip(result, out, strict=True))
    assert out[0].dtype == torch.float32 and close(out[1], a.float() @ b.float())


def test_several_outputs_and_a_scalar() -> None:
    a, b, residual, weight = rand(16, 32), rand(32, 48), rand(16, 48), rand(48)
    run = KERNELS["gemm_ar_norm"].on("reference")
    x, y = run([a, a], [b, b], residual, weight, eps=0.5)
    total = 2 * (a.float() @ b.float()) + residual.float()
    norm = total * torch.rsqrt((total * total).mean(1, keepdim=True) + 0.5) * weight.float()
    assert close(x[0], total) and close(y[1], norm)


def test_optional_arguments() -> None:
    a, b, bias = rand(16, 32), rand(32, 48), rand(48)
    run = KERNELS["gemm_rs_bias"].on("reference")
    plain = torch.cat(run([a, a], [b, b]))
    biased = torch.cat(run([a, a], [b, b], bias=bias))
    assert close(plain, 2 * (a.float() @ b.float()))
    assert close(biased, 2 * (a.float() @ b.float()) + bias.float())


def test_experts_without_tokens() -> None:
    tokens, experts, top = 8, 4, 2
    x, w = rand(tokens, 16), rand(experts, 16, 24)
    chosen = torch.tensor([[0, 3]] * tokens)
    order = torch.argsort(chosen.flatten(), stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    offs = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    rows = (order // top).int()
    result = KERNELS["moe_up"].on("reference", world=WORLD)(list(x.chunk(WORLD)), w, rows, offs)
    expected = torch.stack(
        [x[r].float() @ w[e].float() for r, e in zip(rows, chosen.flatten()[order], strict=True)]
    )
    assert close(result[0], expected)


def test_attention_matches_torch() -> None:
    q, k, v = rand(1, 2, 32, 16), rand(1, 2, 32, 16) * 2, rand(1, 2, 32, 16) - 1
    for name, causal in (("attention", True), ("attention", False), ("ring_attention", False)):
        options = {"causal": causal} if name == "attention" else {}
        shards = [list(t.chunk(WORLD, 2)) for t in (q, k, v)]
        result = torch.cat(KERNELS[name].on("reference")(*shards, **options), 2)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), is_causal=causal
        )
        assert close(result, expected), name


def test_a_transposed_view_of_a_contiguous_matrix_is_accepted() -> None:
    KERNELS["ag_gemm"].bind([rand(16, 32), rand(48, 32).T], WORLD)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((rand(16, 32, 1), rand(32, 48)), "shape-mismatch", ("`A`", "2 axes")),
        ((rand(16, 32),), "bad-call", ("`B`",)),
        ((rand(16, 32), 3.0), "bad-call", ("`B`", "float")),
        ((rand(16, 32), rand(32, 48), None, 1), "bad-call", ("3 arguments",)),
        ((rand(16, 32), rand(32, 48).double()), "dtype-mismatch", ("`B`", "float64")),
        ((rand(16, 32), rand(32, 48)[:, ::2]), "not-contiguous", ("`B`",)),
        ((rand(16, 32), rand(32, 44)), "not-divisible", ("`B`", "44", "8")),
    ],
)
def test_arguments_that_do_not_fit(
    args: tuple[object, ...], code: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(TilelinkError) as caught:
        KERNELS["ag_gemm"].bind(args, WORLD)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words)


def test_inner_extents_that_differ() -> None:
    with pytest.raises(TilelinkError) as caught:
        KERNELS["ag_gemm"].on("reference", world=WORLD)([rand(16, 32)] * 2, rand(40, 48))
    assert caught.value.code == "shape-mismatch"
    assert "32" in str(caught.value) and "40" in str(caught.value) and "`B`" in str(caught.value)


def test_ranks_that_disagree() -> None:
    with pytest.raises(TilelinkError, match="rank 1"):
        KERNELS["ag_gemm"].on("reference")([rand(16, 32), rand(8, 32)], rand(32, 48))


def test_unknown_backends_and_arguments() -> None:
    with pytest.raises(TilelinkError, match="no backend `gpu`"):
        KERNELS["ag_gemm"].on("gpu")
    with pytest.raises(TilelinkError, match="no parameter"):
        KERNELS["ag_gemm"].bind([rand(16, 32), rand(32, 48)], WORLD, {"D": 1})


def test_importing_and_building_loads_no_torch() -> None:
    code = (
        "import sys, tilelink\n"
        "assert 'lark' not in sys.modules and 'torch' not in sys.modules\n"
        f"k = tilelink.load_kernels({str(FOLDER / 'ag_gemm.py')!r})['ag_gemm']\n"
        "k.build(k.example, world=4)\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
        "assert callable(tilelink.kernel)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_dispatch_and_combine_give_the_weighted_sum() -> None:
    x, dest = [rand(8, 16), rand(8, 16) * 2], torch.tensor([[0, 1]] * 4 + [[1, 1]] * 4).int()
    weight, experts = torch.rand(8, 2), [rand(16, 16), rand(16, 16) - 1]
    result = KERNELS["ep_moe"].on("reference")(x, dest, weight, experts, CAP=64)
    for rank in range(WORLD):
        rows = [
            sum(
                w * (x[rank][t].float() @ experts[d].float())
                for w, d in zip(weight[t], dest[t], strict=True)
            )
            for t in range(8)
        ]
        assert close(result[rank], torch.stack([torch.as_tensor(row) for row in rows]))


def test_in_place_arguments_are_changed_and_returned() -> None:
    a = [torch.zeros(4, 8), torch.ones(4, 8)]
    result = KERNELS["in_place"].on("reference")(a)
    assert result[0] is a[0] and bool((a[0] == 1).all()) and bool((a[1] == 2).all())


def test_heads_in_groups_share_keys() -> None:
    q, k = rand(4, 8, 16), rand(2, 8, 16)
    result = KERNELS["grouped_scores"].on("reference", world=WORLD)(q, list(k.chunk(WORLD, 1)))
    expected = torch.einsum("hqd,hsd->hqs", q.float(), k.float().repeat_interleave(2, 0))
    assert close(result[1], expected)


@pytest.mark.parametrize("alpha", [3, 0.5])
def test_reductions_masks_and_scalars(alpha: float) -> None:
    a = rand(8, 16).float()
    half = a[:, :8]
    (result,) = KERNELS["spread"].on("reference")([a], None, alpha)
    count = ((half > 0) & (half <= 1)).sum(1)
    expected = (a.amax(1) - a.amin(1)) ** 2 / 3 + alpha * count
    assert torch.allclose(result, expected)
