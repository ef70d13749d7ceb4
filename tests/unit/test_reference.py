"""The reference executor against plain PyTorch arithmetic on whole tensors."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tilelink.backend.accuracy import relative_error
from tilelink.backend.reference import OutOfBounds, UnequalPaths, run
from tilelink.backend.reference_moves import CapacityExceeded, TableRange
from tilelink.backend.reference_plan import InputError, OwnersDiffer
from tilelink.ir import Op, parse_ir

KERNELS = Path(__file__).parent.parent / "programs" / "kernels"
TILINGS: list[dict[str, int] | None] = [None, {"m": 5, "n": 3, "k": 4}, {"m": 1, "n": 2, "k": 7}]


def kernel(name: str, **world: int) -> Op:
    path = KERNELS / f"{name}.ir"
    return parse_ir(path.read_text(), str(path)).with_attrs(**world)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding of the element type, and of the type itself."""
    assert actual.dtype == expected.dtype
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[actual.dtype]
    assert relative_error(actual, expected) <= 2 * unit


@pytest.mark.parametrize("tiles", TILINGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_gather_gemm_with_cyclic_owners(world: int, tiles: dict[str, int] | None) -> None:
    a = randn(24, 10, dtype=torch.bfloat16)
    rows = [[m for m in range(24) if m // 2 % world == r] for r in range(world)]
    bs = [randn(10, 7, dtype=torch.bfloat16, seed=r + 1) for r in range(world)]
    inputs = [{"A": a[rows[r]], "B": bs[r]} for r in range(world)]
    outputs = run(kernel("ag_gemm", world=world), inputs, tiles)
    assert [list(o) for o in outputs] == [["C"]] * world
    for r in range(world):
        same_numbers(outputs[r]["C"], (a.double() @ bs[r].double()).bfloat16())


@pytest.mark.parametrize("tiles", TILINGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_bias_after_a_reduce_scatter_is_added_once(
    world: int, tiles: dict[str, int] | None
) -> None:
    inputs = [
        {
            "A": randn(12, 6, dtype=torch.bfloat16, seed=r),
            "B": randn(6, 5, dtype=torch.bfloat16, seed=10 + r),
            "bias": randn(5, seed=20 + r),
        }
        for r in range(world)
    ]
    parts = [(i["A"].float() @ i["B"].float()).bfloat16() for i in inputs]
    whole = sum((p.float() for p in parts), torch.zeros(12, 5)).bfloat16()
    outputs = run(kernel("gemm_rs_bias", world=world), inputs, tiles)
    for r, chunk in enumerate(whole.chunk(world)):
        assert list(outputs[r]) == ["D"]
        expected = (chunk.float() + inputs[r]["bias"]).bfloat16()
        same_numbers(outputs[r]["D"], expected)


@pytest.mark.parametrize("tiles", TILINGS)
@pytest.mark.parametrize(("world", "rows"), [(1, 3), (2, 16), (4, 11), (4, 0)])
def test_all_reduce_of_a_run_time_number_of_rows(
    world: int, rows: int, tiles: dict[str, int] | None
) -> None:
    inputs = [
        {
            "A": randn(rows, 8, dtype=torch.float16, seed=r),
            "B": randn(6, 8, dtype=torch.float16, seed=10 + r),
        }
        for r in range(world)
    ]
    outputs = run(kernel("gemm_ar", world=world), inputs, tiles)
    parts = [(i["A"].float() @ i["B"].float().T).half() for i in inputs]
    expected = sum((p.float() for p in parts), torch.zeros(rows, 6)).half()
    for output in outputs:
        same_numbers(output["C"], expected)
        assert torch.equal(output["C"], outputs[0]["C"])


@pytest.mark.parametrize(
    ("contributions", "total"),
    [
        # 1 + 2**-12 is no fp16 and leaves its rank as 1; 2049 is then a tie that rounds to even.
        ([2048.0, 1 + 2**-12, 0.0, 0.0], 2048.0),
        # Additions in fp16 would lose each 1.
        ([2048.0, 1.0, 1.0, 0.0], 2050.0),
        # In rank order fp32 loses the small term; in any order that cancels first it does not.
        ([32768.0, 2.0**-10, -32768.0, 0.0], 0.0),
        ([32768.0, -32768.0, 2.0**-10, 0.0], 2.0**-10),
    ],
)
def test_how_contributions_are_added(contributions: list[float], total: float) -> None:
    inputs = [{"A": torch.zeros(1, 8).half(), "B": torch.zeros(6, 8).half()} for _ in range(4)]
    for i, value in zip(inputs, contributions, strict=True):
        high = float(torch.tensor(value).half())
        i["A"][0, 0], i["A"][0, 1] = high, value - high
        i["B"][:, :2] = 1.0
    for output in run(kernel("gemm_ar"), inputs):
        assert output["C"].tolist() == [[total] * 6]


def zigzag(world: int, length: int) -> list[list[int]]:
    block = length // (2 * world)
    return [
        [i for b in (r, 2 * world - 1 - r) for i in range(b * block, (b + 1) * block)]
        for r in range(world)
    ]


@pytest.mark.parametrize("tiles", [None, {"m": 3, "n": 5}, {"m": 16, "n": 1}])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_causal_attention_with_zigzag_owners(world: int, tiles: dict[str, int] | None) -> None:
    q, k, v = (randn(16, 2, 4, seed=s) for s in range(3))
    rows = zigzag(world, 16)
    inputs: list[dict[str, torch.Tensor | float]] = [
        {"Q": q[rows[r]], "K": k[rows[r]], "V": v[rows[r]], "scale": 0.5} for r in range(world)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.5
    ).transpose(0, 1)
    outputs = run(kernel("attention", world=world), inputs, tiles)
    for r in range(world):
        torch.testing.assert_close(outputs[r]["O"], expected[rows[r]], rtol=1e-5, atol=1e-6)


def moe_inputs(world: int, tables: list[list[list[int]]]) -> list[dict[str, torch.Tensor | float]]:
    return [
        {
            "X": randn(5, 4, dtype=torch.bfloat16, seed=r),
            "dest": torch.tensor(tables[r], dtype=torch.int32),
            "w": torch.full((4,), float(2**r)),
        }
        for r in range(world)
    ]


ROUTINGS = {
    "spread": [[[0, 1], [1, 2], [2, 0], [0, 0], [2, 1]]] * 3,
    "rank 1 gets nothing": [[[0, 2]] * 5, [[2, 2], [0, 0], [0, 2], [2, 0], [0, 2]], [[2, 0]] * 5],
    "rank 0 to itself": [[[0, 0]] * 5, [[1, 1]] * 5, [[2, 2]] * 5],
}


@pytest.mark.parametrize("tiles", [None, {"c": 2, "t": 3}])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_exchange_and_combine(routing: str, tiles: Mapping[str, int] | None) -> None:
    inputs = moe_inputs(3, ROUTINGS[routing])
    text = (KERNELS / "moe.ir").read_text().replace("@CAP {value = 12}", "@CAP {value = 30}")
    outputs = run(parse_ir(text), inputs, tiles)
    for rank in range(3):
        rows: list[torch.Tensor] = []
        starts = [0]
        for source in inputs:
            x, dest = source["X"], source["dest"]
            assert isinstance(x, torch.Tensor) and isinstance(dest, torch.Tensor)
            rows += [x[t] for t, j in (dest == rank).nonzero().tolist()]
            starts.append(len(rows))
        assert outputs[rank]["offs"].tolist() == starts
        expected = torch.zeros(30, 4, dtype=torch.bfloat16)
        if rows:
            expected[: len(rows)] = torch.stack(rows)
        assert torch.equal(outputs[rank]["R"], expected)
        x, dest = inputs[rank]["X"], inputs[rank]["dest"]
        assert isinstance(x, torch.Tensor) and isinstance(dest, torch.Tensor)
        # Weights are powers of two, so that only the last addition rounds.
        weights = (2.0 ** dest.float()).sum(1, keepdim=True)
        assert torch.equal(outputs[rank]["out"], (x.float() * weights).bfloat16())


def test_more_rows_than_capacity_is_an_error() -> None:
    with pytest.raises(CapacityExceeded, match=r"30 rows are sent to rank 1.*room for 12"):
        run(kernel("moe"), moe_inputs(3, [[[1, 1]] * 5] * 3))


def test_a_table_entry_that_is_no_rank_is_an_error() -> None:
    tables = [[[0, 1]] * 5, [[0, 1]] * 4 + [[0, 3]], [[0, 1]] * 5]
    with pytest.raises(TableRange, match=r"`dest\[4, 1\]` of rank 1 is 3"):
        run(kernel("moe"), moe_inputs(3, tables))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"A": torch.zeros(12, 10, dtype=torch.bfloat16)}, r"shape \[12, 10\], expected \[6, 10\]"),
        ({"A": torch.zeros(6, 10)}, "holds torch.float32, expected bf16"),
        ({"A": 3.0}, "rank 1 has no tensor `A`"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, torch.Tensor | float], says: str) -> None:
    good: dict[str, torch.Tensor | float] = {
        "A": torch.zeros(6, 10, dtype=torch.bfloat16),
        "B": torch.zeros(10, 7, dtype=torch.bfloat16),
    }
    with pytest.raises(InputError, match=says):
        run(kernel("ag_gemm"), [good, {**good, **change}, good, good])


def test_the_number_of_inputs_is_the_world() -> None:
    with pytest.raises(InputError, match="4 ranks, but there are 3"):
        run(kernel("ag_gemm"), [{}] * 3)


def test_what_is_never_stored_is_nan() -> None:
    text = """
    kernel @half {world = 1} do {
      extent @M {value = 4}
      tensor @C {dims = [M], dtype = "fp32", move = "local", role = "out"}
      %z = zeros : fp32[2]
      store @C[0..2] (%z)
    }"""
    (output,) = run(parse_ir(text), [{}])
    assert output["C"].isnan().tolist() == [False, False, True, True]


IN_PLACE = """
kernel @in_place {world = 2} do {
  extent @B {value = 3}
  extent @N {value = 4}
  tensor @X {dims = [B, N], dtype = "fp32", move = "reduce", role = "inout"}
  tensor @Y {dims = [B, N], dtype = "fp32", move = "local", role = "out"}
  for_range {hi = B, lo = 0} do (%b: int32) {
    for_tiles {extent = [N]} do (%n: tile) {
      %x = load @X[%b, %n] : fp32[n]
      %d = add (%x, %x) : fp32[n]
      store @X[%b, %n] (%d)
    }
    for_tiles {extent = [N]} do (%n.1: tile) {
      %s = load @X[%b, %n.1] : fp32[n.1]
      store @Y[%b, %n.1] (%s)
    }
  }
}
"""


@pytest.mark.parametrize("tiles", [None, {"N": 3}])
def test_a_sum_inside_a_loop_and_an_argument_in_place(tiles: dict[str, int] | None) -> None:
    inputs = [{"X": randn(3, 4, seed=r)} for r in range(2)]
    before = [i["X"].clone() for i in inputs]
    expected = 2 * before[0] + 2 * before[1]
    for rank, output in enumerate(run(parse_ir(IN_PLACE), inputs, tiles)):
        assert torch.equal(output["X"], expected)
        assert torch.equal(output["Y"], expected)
        assert torch.equal(inputs[rank]["X"], before[rank])


def test_ranks_that_do_not_meet_the_same_sums() -> None:
    text = IN_PLACE.replace("{hi = B, lo = 0}", "{hi = RANK + 1, lo = 0}")
    with pytest.raises(UnequalPaths, match="rank 0: the end; rank 1: X"):
        run(parse_ir(text), [{"X": randn(3, 4)}] * 2)


def test_an_intermediate_is_gathered_after_its_last_store() -> None:
    text = """
    kernel @gathered {world = 2} do {
      extent @M {value = 6}
      extent @N {value = 3}
      tensor @X {dims = [M, N], dtype = "fp32", move = "shard", over = 0, owner = e % WORLD, role = "in"}
      tensor @P {dims = [M, N], dtype = "bf16", move = "gather", over = 0, owner = e % WORLD, role = "temp"}
      tensor @C {dims = [N], dtype = "fp32", move = "local", role = "out"}
      for_tiles {extent = [M]} do (%m: tile) {
        %x = load @X[%m, :] : fp32[m, N]
        %y = silu (%x) : fp32[m, N]
        store @P[%m, :] (%y)
      }
      %p = load @P[:, :] : bf16[M, N]
      %f = cast (%p) : fp32[M, N]
      %s = sum (%f) {axis = 0} : fp32[N]
      store @C[:] (%s)
    }"""
    x = randn(6, 3)
    expected = torch.nn.functional.silu(x).bfloat16().float().sum(0)
    for output in run(parse_ir(text), [{"X": x[0::2]}, {"X": x[1::2]}], {"m": 2}):
        torch.testing.assert_close(output["C"], expected)


@pytest.mark.parametrize("tiles", [None, {"m": 2}])
@pytest.mark.parametrize("loop", ["tiles", "range"])
def test_a_loop_over_a_shard_walks_this_rank_only(loop: str, tiles: dict[str, int] | None) -> None:
    head, index, shape = "for_tiles (%z) {extent = [M]}", "tile", "[m, N]"
    flat = "%r = sum (%x) {axis = 0} : fp32[N]"
    if loop == "range":
        head, index, shape = "for_range (%z) {hi = M, lo = 0}", "int32", "[N]"
        flat = "%r = abs (%x) : fp32[N]"
    owner = "owner = e % WORLD, over = 0"
    text = f"""
    kernel @total {{world = 2}} do {{
      extent @M {{value = 6}}
      extent @N {{value = 3}}
      tensor @X {{dims = [M, N], dtype = "fp32", move = "shard", {owner}, role = "in"}}
      tensor @P {{dims = [N], dtype = "fp32", move = "local", role = "out"}}
      %z = zeros : fp32[N]
      %acc = {head} : fp32[N] do (%m: {index}, %a: fp32[N]) {{
        %x = load @X[%m, :] : fp32{shape}
        {flat}
        %s = add (%a, %r) : fp32[N]
        yield (%s)
      }}
      store @P[:] (%acc)
    }}"""
    x = randn(6, 3).abs()
    outputs = run(parse_ir(text), [{"X": x[0::2]}, {"X": x[1::2]}], tiles)
    for rank, output in enumerate(outputs):
        torch.testing.assert_close(output["P"], x[rank::2].sum(0))


def test_one_loop_over_parts_that_differ() -> None:
    shard = 'dtype = "fp32", move = "shard", over = 0'
    text = f"""
    kernel @differ {{world = 2}} do {{
      extent @M {{value = 4}}
      tensor @X {{dims = [M], {shard}, owner = e % WORLD, role = "in"}}
      tensor @Y {{dims = [M], {shard}, owner = e / (M / WORLD), role = "out"}}
      for_tiles {{extent = [M]}} do (%m: tile) {{
        %x = load @X[%m] : fp32[m]
        store @Y[%m] (%x)
      }}
    }}"""
    with pytest.raises(OwnersDiffer, match=r"`Y` is not shared out .* as `X` is"):
        run(parse_ir(text), [{"X": torch.zeros(2)}] * 2)


def test_a_slice_past_the_end_is_an_error() -> None:
    text = """
    kernel @past {world = 1} do {
      extent @M {value = 4}
      tensor @X {dims = [M], dtype = "fp32", move = "local", role = "in"}
      tensor @Y {dims = [M], dtype = "fp32", move = "local", role = "out"}
      %x = load @X[1..5] : fp32[4]
      store @Y[:] (%x)
    }"""
    with pytest.raises(OutOfBounds, match="rank 0 reaches 1 to 5 of axis 0 of `X`, which has 4"):
        run(parse_ir(text), [{"X": torch.zeros(4)}])


def test_integer_tiles_index_rows() -> None:
    text = """
    kernel @rows {world = 1} do {
      extent @T {value = 4}
      extent @E {value = 5}
      extent @H {value = 3}
      tensor @X {dims = [E, H], dtype = "bf16", move = "local", role = "in"}
      tensor @at {dims = [T], dtype = "int32", move = "local", role = "in"}
      tensor @Y {dims = [E, H], dtype = "bf16", move = "local", role = "out"}
      for_tiles {extent = [T, H]} do (%t: tile, %h: tile) {
        %i = load @at[%t] : int32[t]
        %x = load @X[%i, %h] : bf16[t, h]
        %y = neg (%x) : bf16[t, h]
        store @Y[%i, %h] (%y)
      }
    }"""
    x, at = randn(5, 3, dtype=torch.bfloat16), torch.tensor([4, 0, 3, 1], dtype=torch.int32)
    for tiles in (None, {"t": 3, "h": 2}):
        (output,) = run(parse_ir(text), [{"X": x, "at": at}], tiles)
        assert torch.equal(output["Y"][[0, 1, 3, 4]], -x[[0, 1, 3, 4]])
        assert output["Y"][2].isnan().all()
