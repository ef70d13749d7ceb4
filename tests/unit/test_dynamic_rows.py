"""What a dynamic extent may be: kernels and programs that are refused, and the capacities of calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dynamic import CASES, kernel_of, program_of
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.expand_walk import expand
from tilelink.backend.passes import UnsupportedProgram
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.image import image_of
from tilelink.backend.validate import EmittedError, read_module, split_modules, validate
from tilelink.backend.verify import RowsError, carried, smaller, verify
from tilelink.cli.main import main
from tilelink.errors import TilelinkError
from tilelink.frontend.capacity import capacity_of, read_capacities
from tilelink.frontend.errors import BadCall, NotDivisible
from tilelink.ir import Expr, Op, parse_ir, print_ir
from tilelink.ir.check import check_types
from tilelink.ir.vocabulary import check_names
from tilelink.kernel import Kernel, load_kernels
from tilelink.schedules import Move, Schedule

HEAD = "import tilelink\nimport tilelink.language as tk\n\n\n"
Write = Callable[[str, str, str], Kernel]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(mapping: str, params: str, body: str) -> Kernel:
        lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
        path = tmp_path / "k.py"
        path.write_text(f"{HEAD}@tilelink.kernel({mapping!r})\ndef f({params}):\n{lines}\n")
        return load_kernels(path)["f"]

    return make


GATHER = "gather A[M, K] over M, M dynamic"
ROW_TO_ROW = """
M, K = A.shape
for m in tk.tiles(M):
    C[m, :] = A[m, :] * 2.0
"""
BAD_BODIES = {
    "a sum over rows": """
M, K = A.shape
for k in tk.tiles(K):
    s = tk.zeros([k], tk.float32)
    for m in tk.tiles(M):
        s = s + tk.sum(A[m, k], axis=0)
    C[k] = s
""",
    "a product over rows": """
M, K = A.shape
for k, l in tk.tiles(K, K):
    s = tk.zeros([k, l], tk.float32)
    for m in tk.tiles(M):
        s = tk.dot(A[m, k].T, A[m, l], s)
    C[k, l] = s
""",
    "the number of a row": """
M, K = A.shape
for m, k in tk.tiles(M, K):
    C[m, k] = A[m, k] + m.index[:, None]
""",
    "rows as columns": """
M, K = A.shape
for m, k in tk.tiles(M, K):
    C[k, m] = A[m, k].T
""",
}


def test_rows_that_are_each_for_itself_are_accepted(write: Write) -> None:
    op = write(GATHER, "A, C", ROW_TO_ROW).build({"M": 64, "K": 16}, world=2)
    program = compile_kernel(op)
    assert verify(program).rules[-1] == "rows"


@pytest.mark.parametrize("what", BAD_BODIES)
def test_rows_that_depend_on_each_other_are_refused(write: Write, what: str) -> None:
    kernel = write(GATHER, "A, C", BAD_BODIES[what])
    op = kernel.build({"M": 64, "K": 16}, world=2)
    with pytest.raises((RowsError, UnsupportedProgram)):
        compile_kernel(op)
    # The mark is what asks for too much.
    plain = write(GATHER.removesuffix(", M dynamic"), "A, C", BAD_BODIES[what])
    compile_kernel(plain.build({"M": 64, "K": 16}, world=2))


@pytest.mark.parametrize("streams", [1, 2])
def test_copies_of_rows_that_a_call_does_not_have_are_not_there(streams: int) -> None:
    """Of a stream of its own they are no copies at all; those of another tensor that come behind are the same."""
    kernel = load_kernels(Path(__file__).parents[1] / "kernels" / "maps.py")["ag_gemm_rs"]
    move = Move(tile=8, streams=streams)
    schedule = Schedule(tiles=(("K", 16), ("M", 16), ("N", 16)), moves=(("A", move), ("C", move)))
    op = kernel.build({"M": 64, "K": 32, "N": 32}, world=4, dynamic=("M",))
    assert verify(run_passes(op, schedule)).rules[-1] == "rows"


def test_what_cannot_be_dynamic_is_refused_by_the_passes() -> None:
    op = kernels.gemm_rs.build({"M": 64, "K": 32, "N": 32}, world=2, dynamic=("N",))
    with pytest.raises(UnsupportedProgram, match="is not the first axis of"):
        run_passes(op)
    op = kernels.gemm_ar.build({"M": 64, "K": 32, "N": 32}, world=2, dynamic=("M", "K"))
    with pytest.raises(UnsupportedProgram, match="are both dynamic"):
        run_passes(op)


EDITS = {
    "rows at another place": ("m.start - m.start / 32 * (32 - M / WORLD)", "m.start"),
    "memory that depends on the rows": ("dims = [64, K]", "dims = [M, K]"),
    "another number of rows": ("live = M / WORLD", "live = M / WORLD - 1"),
    "a flag that depends on the rows": (
        "wait @A.ready[m.start / 32, 0]",
        "wait @A.ready[m.start / (M / WORLD), 0]",
    ),
    "a copy from another place": ("@A[0..M / WORLD, :]", "@A[32 - M / WORLD..32, :]"),
    "a copy of fewer rows": (
        "@A[0..M / WORLD, :] {peer = (RANK + A.s) % WORLD, to = @A.all[RANK * 32..RANK * 32 + M / WORLD",
        "@A[0..M / WORLD - 1, :] {peer = (RANK + A.s) % WORLD, to = @A.all[RANK * 32..RANK * 32 + M / WORLD - 1",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_programs_that_are_right_at_the_capacity_only_are_refused(what: str) -> None:
    text = print_ir(program_of("ag_gemm", "copy_engine"))
    old, new = EDITS[what]
    head, body = text.split("} do {\n  extent", 1)
    assert old in body
    mutant = parse_ir(f"{head}}} do {{\n  extent{body.replace(old, new)}")
    with pytest.raises(TilelinkError):
        verify(mutant)


def emitted(name: str, resource: str) -> tuple[Op, str]:
    program = program_of(name, resource)
    return program, emit(program)


@pytest.mark.parametrize(("name", "resource"), CASES)
def test_emitted_modules_are_what_their_programs_say_for_every_value(
    name: str, resource: str
) -> None:
    program, text = emitted(name, resource)
    (source,) = split_modules(text, "module.py")
    validate(read_module(source), program)


TEXTS = {
    "rows of the user at the places of the capacity": ("(32 - M // 2)", "(32 - M // 4)"),
    "rows past the end of a segment": ("m_segment * 32 + M // 2", "m_segment * 32 + 32"),
    "tiles that are not there": ("tl.cdiv(M // 2, 8)", "4"),
    "copies of the capacity": ('call.extent("M") // 2', "32"),
    "a whole store of a short tile": ("if (m_stop - m_start) == 8:", "if (m_stop - m_start) > 0:"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_is_right_at_the_capacity_only_is_refused(what: str) -> None:
    # Tiles of bf16, so that whole ones go through TMA.
    schedule = Schedule(moves=(("A", Move()),), tiles=(("K", 16), ("M", 16), ("N", 32)))
    op = kernels.ag_gemm.build({"M": 64, "K": 32, "N": 32}, world=2, dynamic=("M",))
    program = run_passes(op, schedule)
    old, new = TEXTS[what]
    old = old.replace("== 8", "== 16").replace(", 8)", ", 16)")
    new = "2" if new == "4" else new
    head, body = emit(program).split('"""\n\n\n', 1)
    assert old in body
    (source,) = split_modules(f'{head}"""\n\n\n{body.replace(old, new)}', "module.py")
    with pytest.raises(EmittedError):
        validate(read_module(source), program)


@pytest.mark.parametrize("what", ["B", "C"])
def test_a_descriptor_reaches_behind_nothing_but_inputs_of_as_many_rows_as_there_are(
    what: str,
) -> None:
    tiles = (("K", 64), ("M", 64), ("N", 64))
    schedule = Schedule(moves=(("C", Move("none")),), tiles=tiles, emitter="gluon")
    op = kernels.gemm_ar.build({"M": 64, "K": 128, "N": 128}, world=2, dynamic=("M",))
    program = run_passes(op, schedule)
    text = emit(program)
    assert 'call.room("A")' in text and f'call.tensor("{what}")' in text
    validate(read_module(split_modules(text, "module.py")[0]), program)
    text = text.replace(f'call.tensor("{what}")', f'call.room("{what}")')
    with pytest.raises(EmittedError, match=f"@{what} is no input behind"):
        validate(read_module(split_modules(text, "module.py")[0]), program)


def test_both_ends_of_each_structure_are_proven() -> None:
    """Tiles of 8 rows, two ranks: the structure changes behind each multiple of 16."""
    program = program_of("ag_gemm", "copy_engine")
    values = [int(p.declared("M")["value"]) for p in smaller(expand(program), carried(program))]
    assert values == [2, 16, 18, 32, 34, 48, 50]


def test_a_program_is_proven_from_its_least_value_on() -> None:
    def small(least: int | None) -> list[int]:
        program = program_of("ag_gemm", "copy_engine")
        text = print_ir(program)
        if least is not None:
            text = text.replace(
                "extent @M {dynamic = true,", f"extent @M {{dynamic = true, least = {least},"
            )
        found = parse_ir(text)
        kernel = kernel_of("ag_gemm")
        return [int(p.declared("M")["value"]) for p in smaller(expand(found), kernel)]

    assert small(33) == [34, 48, 50]
    assert small(None)[0] == 2


def test_counts_that_follow_the_rows_of_a_call_are_read_back() -> None:
    op = kernels.gemm_rs.build({"M": 96, "N": 16, "K": 16}, world=2, dynamic=("M",))
    tiles = (("K", 16), ("M", 16), ("N", 16))
    move = Move(resource="copy_engine", channels=2)
    program = run_passes(op, Schedule(tiles=tiles, workers=4, moves=(("C", move),)))
    waits = [o for o in program.walk() if o.name == "wait" and isinstance(o.get("count"), Expr)]
    assert any("M" in o["count"].names for o in waits)
    again = parse_ir(print_ir(program))
    check_names(again)
    check_types(again)
    assert again == program


def test_the_proof_of_a_hand_written_program_needs_its_kernel() -> None:
    program: Op = program_of("ag_gemm", "copy_engine").with_attrs(kernel_text=None)
    with pytest.raises(RowsError, match="it carries no kernel"):
        verify(program)


def test_capacities_grow_and_stay_multiples_of_the_ranks() -> None:
    assert capacity_of("M", 1, 1, ()) == (1, 16)
    assert capacity_of("M", 17, 1, ()) == (17, 128)
    assert capacity_of("M", 129, 1, ()) == (129, 256)
    assert capacity_of("M", 5000, 1, ()) == (4097, 8192)
    assert capacity_of("M", 6, 6, ()) == (6, 18)
    assert capacity_of("M", 72, 6, ()) == (24, 132)
    assert capacity_of("M", 300, 4, (256, 4096)) == (260, 4096)
    with pytest.raises(NotDivisible, match="is not a multiple of 4"):
        capacity_of("M", 6, 4, ())
    with pytest.raises(BadCall, match="its largest capacity 4096"):
        capacity_of("M", 5000, 4, (256, 4096))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (3, "`dynamic` is a int"),
        (("Q",), "`Q` is no extent"),
        ({"M": (64, 32)}, "in increasing order"),
        ({"M": (0, 32)}, "in increasing order"),
        ({"M": ("64",)}, "in increasing order"),
    ],
)
def test_dynamic_that_is_none_is_refused(given: Any, match: str) -> None:
    with pytest.raises(BadCall, match=match):
        kernels.ag_gemm.on("simulate", dynamic=given)


def test_the_mark_of_the_mapping_and_the_call_add_up(write: Write) -> None:
    kernel = write(GATHER, "A, C", ROW_TO_ROW)
    assert read_capacities("f", kernel.mapping, None) == {"M": ()}
    assert read_capacities("f", kernel.mapping, {"M": (128,)}) == {"M": (128,)}


def test_the_runtime_reads_the_rows_of_a_call_off_its_tensors() -> None:
    image = image_of(program_of("gemm_rs_add", "epilogue"))
    assert image.dynamic == {"M": 64} and image.least == {"M": 1}
    found = image.extents_of({"A": (48, 32), "B": (32, 32)})
    assert found == {"M": 48}
    assert {name: slot.dims for name, slot in image.at(found).items()} == {
        "A": (48, 32),
        "B": (32, 32),
        "C": (24, 32),
        "bias": (32,),
        "residual": (24, 32),
    }
    # A shard tells as well.
    assert image.extents_of({"residual": (10, 32)}) == {"M": 20}
    assert image.buffers["P.parts"].dims == (2, 32, 32)


def test_the_command_line_compiles_for_a_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parents[2] / "examples" / "ag_gemm.py")
    assert main(["check", file, "--dynamic", "M"]) == 0
    assert "holds for every value up to it" in capsys.readouterr().out
    assert main(["ir", file, "--dynamic", "M", "--fused"]) == 0
    assert "live = M / WORLD" in capsys.readouterr().out
    assert main(["run", file, "--dynamic", "M"]) == 0
    assert main(["check", file, "--dynamic", "Q"]) == 2
    assert "known: M, K, N" in capsys.readouterr().err


@pytest.mark.parametrize("resource", ["copy_engine", "epilogue", "none"])
def test_mutants_of_dynamic_rows_are_noticed(
    resource: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(Path(__file__).parents[2] / "tilelink" / "kernels" / "gemm_rs.py") + "::gemm_rs"
    options = ["--dynamic", "M", "--resource", resource, "--class", "frozen-rows", "--json"]
    assert main(["mutate", file, *options]) == 0
    counts = json.loads(capsys.readouterr().out)["classes"]["frozen-rows"]
    assert counts["mutants"] == counts["refused"] == counts["found"] >= 2


def test_a_loop_over_more_channels_than_a_call_has_rows_is_proven() -> None:
    """Copies of a row each, 64 a rank: few rows of a call, and no other extent, tell how many there are."""
    op = kernels.ag_gemm.build({"M": 128, "K": 8, "N": 16}, world=2, dynamic=("M",))
    tiles = (("K", 16), ("M", 64), ("N", 16))
    moves = (("A", Move(resource="copy_engine", tile=1)),)
    program = run_passes(op, Schedule(tiles=tiles, workers=3, moves=moves))
    (stream,) = program.find("stream")
    assert any(loop.get("hi") == 64 for loop in stream.walk())
    verify(program, op)
