"""Kernels in the public language become Tile IR: extents, roles, moves, loops, text that round-trips."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tilelink.ir import Expr, Op, Type, parse_ir, print_ir
from tilelink.kernel import Kernel, load_kernels

FOLDER = Path(__file__).parents[1] / "kernels"
KERNELS = {
    name: found
    for path in sorted(FOLDER.glob("*.py"))
    for name, found in load_kernels(path).items()
}
HEAD = "import math\nimport tilelink\nimport tilelink.language as tk\n"
Write = Callable[..., Kernel]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a kernel of a mapping, parameters and a body."""

    def make(mapping: str, params: str, body: str, head: str = "") -> Kernel:
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        path = tmp_path / "written.py"
        text = f"{HEAD}{head}\n@tilelink.kernel({mapping!r})\ndef f({params}):\n{lines}\n"
        path.write_text(text)
        return load_kernels(path)["f"]

    return make


def example(name: str, **options: object) -> Op:
    """A kernel of the folder at its example extents on 4 ranks."""
    found = KERNELS[name]
    return found.build(found.example, world=4, **options)  # type: ignore[arg-type]


def roles(op: Op) -> dict[str, tuple[str, str]]:
    """Each tensor's role and move."""
    return {t.symbol: (t["role"], t["move"]) for t in op.find("tensor")}


def ops(op: Op, name: str) -> list[Op]:
    """Every op called ``name``, at any depth."""
    return [inner for inner in op.walk() if inner.name == name]


def check_values(op: Op) -> None:
    """Every value is defined once, before it is used, and not used outside its block."""

    def visit(body: tuple[Op, ...], known: frozenset[str], every: set[str]) -> None:
        for inner in body:
            for operand in inner.operands:
                assert operand.name in known, f"{operand} in {inner.name}"
            for block in inner.blocks:
                names = {a.name for a in block.args}
                assert not names & every
                every |= names
                visit(block.ops, known | names, every)
            for result in inner.results:
                assert result.name not in every
                every.add(result.name)
                known |= {result.name}

    visit(op.body, frozenset(), set())


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_text_round_trips_and_values_are_well_formed(name: str) -> None:
    op = example(name)
    text = print_ir(op)
    assert parse_ir(text) == op
    assert print_ir(parse_ir(text)) == text
    check_values(op)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_op_points_into_the_file(name: str) -> None:
    for op in example(name).walk():
        if op.name not in ("extent", "scalar"):
            assert op.span is not None
            assert op.span.source.name.endswith(".py")
            assert op.span.source.line(op.span.line)


def test_ag_gemm_is_the_kernel_of_the_design() -> None:
    op = example("ag_gemm")
    assert roles(op) == {"A": ("in", "gather"), "B": ("in", "local"), "C": ("out", "local")}
    assert op.declared("A")["owner"] == Expr.name("e") // (Expr.name("M") // Expr.name("WORLD"))
    assert op.declared("B")["dims"] == (Expr.name("K"), Expr.name("N"))
    assert [e["value"] for e in op.find("extent")] == [64, 32, 48]
    (dot,) = ops(op, "dot")
    assert [v.type for v in dot.operands] == [
        Type("bf16", ("m", "k")),
        Type("bf16", ("k", "n")),
        Type("fp32", ("m", "n")),
    ]
    (store,) = ops(op, "store")
    assert store.operands[0].type == Type("bf16", ("m", "n"))
    assert (
        store.span is not None
        and store.span.source.line(store.span.line).strip() == "C[m, n] = acc"
    )


def test_a_sum_of_products_accumulates_in_the_dot() -> None:
    op = example("ag_gemm_nk")
    (dot,) = ops(op, "dot")
    assert len(dot.operands) == 3
    assert not ops(op, "add")
    assert op.declared("weight")["dims"] == (Expr.name("N"), Expr.name("K"))


def test_optional_arguments_choose_what_is_compiled() -> None:
    without = example("gemm_rs_bias")
    assert set(roles(without)) == {"A", "B", "C", "P"}
    both = example("gemm_rs_bias", present={"A", "B", "bias", "residual"})
    assert roles(both)["residual"] == ("in", "shard")
    assert both.declared("bias")["dims"] == (Expr.name("N"),)
    assert len(ops(both, "add")) == 2


def test_reading_a_sum_runs_this_ranks_part() -> None:
    op = example("gemm_rs_bias")
    first, second = op.find("for_tiles")
    assert first.get("part") is None
    assert (second["part"], second["part_axis"], second["part_of"]) == ("own", 0, "P")
    whole = example("gemm_ar_norm").find("for_tiles")[1]
    assert whole.get("part") is None


def test_scalar_parameters_and_results_keep_their_order() -> None:
    op = example("gemm_ar_norm")
    assert [s.symbol for s in op.find("scalar")] == ["eps"]
    assert [t.symbol for t in op.find("tensor") if t["role"] == "out"] == ["X", "Y"]
    assert roles(op)["P"] == ("temp", "reduce")


def test_causal_attention_loops_to_the_end_of_the_tile() -> None:
    op = example("attention")
    (loop,) = [f for f in ops(op, "for_tiles") if f.get("bounds")]
    assert [v.type for v in loop.operands[2:]] == [r.type for r in loop.results]
    (stop,) = ops(op, "bound")
    assert stop["which"] == "stop" and stop.results[0] == loop.operands[1]
    (outer,) = [f for f in ops(op, "for_tiles") if f.get("part")]
    assert (outer["part"], outer["part_of"]) == ("own", "Q")
    free = KERNELS["attention"].build(
        KERNELS["attention"].example, world=4, scalars={"causal": False}
    )
    assert len(ops(op, "where")) == 1 and not ops(free, "where")


def test_index_tiles_read_rows_of_a_gathered_tensor() -> None:
    op = example("moe_up")
    assert op.declared("order")["dtype"] == op.declared("offs")["dtype"] == "int32"
    (load,) = [x for x in ops(op, "load") if x.symbol == "A"]
    assert load.results[0].type == Type("bf16", ("p", "k"))
    assert op.declared("Y")["dims"] == (Expr.name("P"), Expr.name("F"))


def test_dispatch_and_combine_declare_what_they_fill() -> None:
    op = example("ep_moe")
    assert [op.declared("X")[k] for k in ("move", "table", "into", "offsets")] == [
        "exchange",
        "dest",
        "R",
        "offs",
    ]
    assert [op.declared("Z")[k] for k in ("move", "source", "into")] == ["combine", "R", "Y"]
    assert roles(op)["R"] == ("temp", "local")
    assert roles(example("ep_dispatch"))["R"] == ("out", "local")


def test_tile_variables_do_not_take_names_of_extents(write: Write) -> None:
    found = write(
        "local A[m, k]",
        "A, C",
        "a, b = A.shape\nfor m, k in tk.tiles(a, b):\n    C[m, k] = A[m, k]",
    )
    op = found.build({"m": 8, "k": 8})
    assert parse_ir(print_ir(op)) == op
    (loop,) = op.find("for_tiles")
    assert {a.name for a in loop.args}.isdisjoint({"m", "k"})


def test_two_names_of_one_extent_become_one(write: Write) -> None:
    body = (
        "M, K = A.shape\nK2, N = B.shape\nfor m, n in tk.tiles(M, N):\n"
        "    acc = tk.zeros([m, n])\n    for k in tk.tiles(K):\n"
        "        acc = tk.dot(A[m, k], B[k, n], acc)\n    C[m, n] = acc"
    )
    op = write("gather A[M, K] over M", "A, B, C", body).build({"M": 8, "K": 16, "N": 24})
    assert [e.symbol for e in op.find("extent")] == ["M", "K", "N"]


def test_variables_cross_iterations_only_where_they_have_to(write: Write) -> None:
    body = (
        "M, K = A.shape\nfor m in tk.tiles(M):\n    x = tk.zeros([m])\n    best = 0.0\n"
        "    for k in tk.tiles(K):\n        y = A[m, k].sum(axis=1)\n        x += y\n"
        "    y = A[m, :]\n    for k in tk.tiles(K):\n        y = A[m, k]\n        x += y.max(axis=1)\n"
        "    C[m] = x + best"
    )
    op = write("local A[M, K]", "A, C", body).build({"M": 8, "K": 16})
    inner = [f for f in ops(op, "for_tiles") if f["extent"] == (Expr.name("K"),)]
    assert [len(f.results) for f in inner] == [1, 1]


def test_a_literal_that_a_loop_adds_to_is_carried(write: Write) -> None:
    body = (
        "M = A.shape[0]\ncount = 0\ntotal = 0\nfor e in tk.range(M):\n    count = count + 1\n"
        "    total = total + A[e]\nC[0] = total\nC[1] = count.to(tk.float32)"
    )
    op = write("local A[M]", "A, C", body).build({"M": 8, "C_0": 2}, {"A": "fp32"})
    (loop,) = op.find("for_range")
    assert [r.type for r in loop.results] == [Type("int32"), Type("fp32")]
    assert [loop["lo"], loop["hi"]] == [0, Expr.name("M")]


def test_functions_are_lowered_in_place_with_names_of_their_own(write: Write) -> None:
    head = "def twice(x, m):\n    acc = x + x\n    return acc * m\n"
    body = (
        "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    acc = A[m, n]\n    y = twice(acc, 3)\n"
        "    C[m, n] = acc + y"
    )
    op = write("local A[M, N]", "A, C", body, head).build({"M": 8, "N": 8})
    check_values(op)
    last = ops(op, "add")[-1]
    (load,) = ops(op, "load")
    assert last.operands[0] == load.results[0]


def test_constants_of_the_surroundings_are_bound_early(write: Write) -> None:
    body = (
        "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    x = A[m, n] * (SCALE * 2)\n"
        "    if GATED:\n        x = tk.silu(x)\n    C[m, n] = x"
    )
    op = write("local A[M, N]", "A, C", body, "SCALE = 1.5\nGATED = True\n").build({"M": 8, "N": 8})
    assert [c["value"] for c in ops(op, "constant")] == [3.0]
    assert len(ops(op, "silu")) == 1


def test_shifted_tiles_and_slices_of_local_tensors(write: Write) -> None:
    body = (
        "M, N = C.shape\nfor m, n in tk.tiles(M, N):\n"
        "    C[m, n] = W[m, n] + W[m, n + N]\n"
        "for m in tk.tiles(M):\n    D[m, :] = W[m, 0:N]"
    )
    op = write("local W[M, 2 * N]; local C[M, N]; local D[M, N]", "W, C, D", body).build(
        {"M": 8, "N": 16}
    )
    assert "%n at n.start + N" in print_ir(op)
    assert "0..N" in print_ir(op)
    assert parse_ir(print_ir(op)) == op


def test_dynamic_extents_stay_symbolic(write: Write) -> None:
    body = "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    C[m, n] = A[m, n] * M"
    op = write("gather A[M, N] over M, M dynamic", "A, C", body).build({"M": 8, "N": 16}, world=2)
    assert op.declared("M")["dynamic"] is True
    assert Expr.name("M") in [c["value"] for c in ops(op, "constant")]


def test_owner_maps_may_read_a_table(write: Write) -> None:
    body = "M, N = C.shape\nfor m, n in tk.tiles(M, N):\n    C[m, n] = A[m, n]"
    mapping = "gather A[M, N] over M { owner table[m] }; local C[M, N]"
    op = write(mapping, "A, table, C", body).build({"M": 8, "N": 16}, world=2)
    assert op.declared("table")["dtype"] == "int32"
    assert op.declared("table")["dims"] == (Expr.name("M"),)


def test_mapping_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.map").write_text("gather A[M, K] over M\n")
    path = tmp_path / "k.py"
    path.write_text(
        HEAD + '@tilelink.kernel("rows.map")\ndef f(A, C):\n    M, K = A.shape\n'
        "    for m, k in tk.tiles(M, K):\n        C[m, k] = A[m, k]\n"
    )
    assert roles(load_kernels(path)["f"].build({"M": 8, "K": 8}, world=2))["A"] == ("in", "gather")


def test_arithmetic_promotes_and_literals_take_the_other_type(write: Write) -> None:
    body = (
        "M, N = A.shape\nfor m, n in tk.tiles(M, N):\n    x = A[m, n]\n"
        "    C[m, n] = x * 2 + 0.5\n    D[m, n] = tk.where(m.index[:, None] < 3, x, -math.inf)\n"
        "    I[m, n] = x + tk.zeros([m, n], tk.float32)"
    )
    op = write("local A[M, N]", "A, C, D, I", body).build({"M": 8, "N": 8}, {"A": "fp16"})
    assert [c.results[0].type.dtype for c in ops(op, "constant")] == [
        "fp16",
        "fp16",
        "int32",
        "fp16",
    ]
    assert ops(op, "add")[-1].results[0].type.dtype == "fp32"
    assert ops(op, "lt")[0].results[0].type == Type("bool", ("m", "1"))


def test_a_loop_over_an_axis_that_is_as_long_as_there_are_ranks(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(
        "import tilelink\nimport tilelink.language as tk\n\n\n"
        '@tilelink.kernel("gather A[M, K] over M; local S[WORLD, K]")\n'
        "def f(A, S, C, D):\n    M, K = A.shape\n    W = S.shape[0]\n"
        "    for w, k in tk.tiles(W, K):\n        C[w, k] = S[w, k]\n"
        "    for m, k in tk.tiles(M, K):\n        D[m, k] = A[m, k]\n"
    )
    kernel = load_kernels(path)["f"].build({"M": 32, "K": 8}, world=4)
    assert [op.symbol for op in kernel.find("extent")] == ["M", "K"]
    assert str(kernel.declared("C")["dims"][0]) == "WORLD"
