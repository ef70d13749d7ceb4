"""All-reduce in one shot and in two: where the parts lie, who sums them, and that the numbers are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emitted_mutants import mutants as text_mutants
from tilelink import kernels
from tilelink.backend import simulate
from tilelink.backend.accuracy import TOLERANCE, relative_error
from tilelink.backend.emit.triton import emit
from tilelink.backend.mutate import mutants
from tilelink.backend.mutate.judge import Trial, judge
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.reference import run as reference
from tilelink.backend.validate import EmittedError, read_module, validate
from tilelink.cli.inputs import random_inputs
from tilelink.errors import Source
from tilelink.ir import Op
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule, ScheduleError, default_schedule

TENSOR = {"gemm_ar": "C", "gemm_ar_add": "P"}


def schedule(kernel: str, tile: int = 16, workers: int = 5, **move: Any) -> Schedule:
    tiles = tuple((name, tile) for name in "KMN")
    return Schedule(
        tiles=tiles,
        workers=workers,
        moves=((TENSOR[kernel], Move(**move)),),
    )


def whole_numbers(world: int, m: int, k: int, n: int) -> tuple[list[torch.Tensor], ...]:
    """A and B of every rank: whole numbers, of which sums and products are exact, and which bf16 rounds once."""
    generator = torch.Generator().manual_seed(m + n)

    def make(*shape: int) -> list[torch.Tensor]:
        return [torch.randint(-3, 4, shape, generator=generator).bfloat16() for _ in range(world)]

    return make(m, k), make(k, n)


def agrees(kernel: str, backend: str, world: int, m: int, n: int, chosen: Schedule) -> None:
    """The same bits as the reference, on every rank."""
    a, b = whole_numbers(world, m, 24, n)
    one = getattr(kernels, kernel)
    got = one.on(backend, world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, one.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_two_shots_give_the_bits_of_the_reference(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from((2, 4, 8)))
    kernel = data.draw(st.sampled_from(sorted(TENSOR)))
    resource = data.draw(st.sampled_from(("epilogue", "copy_engine", "sm:2")))
    m = data.draw(st.integers(1, 40))
    n = world * data.draw(st.integers(1, 40))
    if data.draw(st.booleans()):
        m, n = n, m
    channels = data.draw(st.sampled_from((None, 1, 2)))
    chosen = schedule(kernel, resource=resource, channels=channels, shots=2)
    agrees(kernel, "simulate", world, m, n, chosen)


@pytest.mark.parametrize("kernel", sorted(TENSOR))
@pytest.mark.parametrize("resource", ("epilogue", "copy_engine", "sm:2"))
@pytest.mark.parametrize(("m", "n"), ((16, 64), (128, 24), (1, 128)))
def test_emitted_two_shots_are_the_program_and_compute_it(
    kernel: str, resource: str, m: int, n: int
) -> None:
    chosen = schedule(kernel, resource=resource, shots=2)
    program = compile_kernel(
        getattr(kernels, kernel).build({"M": m, "K": 24, "N": n}, world=4), chosen
    )
    validate(read_module(Source("emitted.py", emit(program))), program)
    if kernel == "gemm_ar":
        agrees(kernel, "interpret", 4, m, n, chosen)


@pytest.mark.parametrize("resource", ("copy_engine", "sm:2", "epilogue"))
@pytest.mark.parametrize("m", (3, 4, 40))
def test_parts_of_one_column_are_pushed_a_row_at_a_time(resource: str, m: int) -> None:
    """One element of each row of the whole lies behind another where it lands, and not where it is read."""
    chosen = schedule("gemm_ar", resource=resource, shots=2)
    program = compile_kernel(kernels.gemm_ar.build({"M": m, "K": 24, "N": 2}, world=2), chosen)
    validate(read_module(Source("emitted.py", emit(program))), program)
    agrees("gemm_ar", "interpret", 2, m, 2, chosen)


@pytest.mark.parametrize("n", (4, 12, 40))
def test_the_library_multiplies_parts_wherever_they_begin(n: int) -> None:
    chosen = replace(
        schedule("gemm_ar", resource="copy_engine", shots=2, channels=1), emitter="library"
    )
    program = compile_kernel(kernels.gemm_ar.build({"M": 5, "K": 24, "N": n}, world=4), chosen)
    assert any(launch.get("emitter") == "library" for launch in program.find("launch"))
    validate(read_module(Source("emitted.py", emit(program))), program)
    agrees("gemm_ar", "interpret", 4, 5, n, chosen)


def parts(m: int, n: int, world: int = 4, tile: int = 16, **move: Any) -> Op:
    """The tensor C of the program of gemm_ar."""
    chosen = schedule("gemm_ar", tile, **move)
    op = kernels.gemm_ar.build({"M": m, "K": 16, "N": n}, world=world)
    return run_passes(op, chosen, after="choose-shots").declared("C")


@pytest.mark.parametrize(
    ("m", "n", "axis"),
    [
        (64, 64, 0),  # whole tiles of rows
        (16, 64, 1),  # less than a tile of rows a rank
        (1, 64, 1),
        (8, 24, 1),  # no whole tiles at all: the last axis
        (8, 6, 0),  # the only axis that four ranks divide
    ],
)
def test_the_axis_that_is_shared_out(m: int, n: int, axis: int) -> None:
    tensor = parts(m, n, shots=2)
    assert (tensor["shots"], tensor["part_axis"]) == (2, axis)


def test_small_sums_take_one_shot_and_large_ones_two() -> None:
    # 512 KiB at four ranks is the last that takes one.
    assert parts(512, 512, tile=128).get("shots") is None
    assert parts(512, 1024, tile=128).get("shots") == 2
    assert parts(512, 1024, tile=128, shots=1).get("shots") is None
    assert parts(512, 1024, tile=128, resource="none").get("shots") is None
    assert parts(511, 1026, tile=128).get("shots") is None  # four ranks divide neither axis


@pytest.mark.parametrize(("kernel", "name"), [("ag_gemm", "A"), ("gemm_rs", "C")])
@pytest.mark.parametrize("shots", [1, 2])
def test_shots_of_what_is_no_reduce_are_an_error(kernel: str, name: str, shots: int) -> None:
    op = getattr(kernels, kernel).build({"M": 256, "K": 64, "N": 128}, world=2)
    asked = replace(default_schedule(op).move(name), shots=shots)
    with pytest.raises(ScheduleError, match=f"moves.{name}.shots.*means nothing"):
        run_passes(op, replace(default_schedule(op), moves=((name, asked),)))


def test_two_shots_of_what_cannot_be_cut_are_an_error() -> None:
    with pytest.raises(ScheduleError, match=r"moves\.C\.shots.*4 parts"):
        parts(3, 6, shots=2)


@pytest.mark.parametrize("cut", ("P", "Q"))
@pytest.mark.parametrize("resource", ("epilogue", "copy_engine", "sm:1"))
def test_sums_of_one_loop_nest_are_exchanged_each_in_its_own_way(cut: str, resource: str) -> None:
    """Ranks share out the columns of one sum, at whose parts the tiles of the other one end too."""
    kernel = load_kernels(Path(__file__).parents[1] / "kernels" / "maps.py")["ar_gate"]
    moves = tuple((name, Move(resource, shots=1 + (name == cut))) for name in "PQ")
    tiles = tuple((name, 16) for name in "KMN")
    chosen = Schedule(tiles=tiles, workers=9, moves=moves)
    op = kernel.build({"M": 20, "K": 16, "N": 15}, world=3)
    program = compile_kernel(op, chosen)
    assert next(op for op in program.walk() if op.name == "stage")["axis"] == 1
    validate(read_module(Source("emitted.py", emit(program))), program)
    inputs = random_inputs(op, 1)
    for mine, right in zip(simulate.run(program, inputs), reference(op, inputs), strict=True):
        assert relative_error(mine["C"], right["C"]) < TOLERANCE["bf16"]


@pytest.mark.parametrize("resource", ("epilogue", "copy_engine", "sm:1"))
def test_mutants_of_two_shots_survive_nothing(resource: str) -> None:
    kernel = kernels.gemm_ar.build({"M": 16, "K": 8, "N": 8}, world=2)
    chosen = schedule("gemm_ar", 8, workers=2, resource=resource, shots=2)
    program = compile_kernel(kernel, chosen)
    inputs = [random_inputs(program, call) for call in range(2)]
    trial = Trial(inputs, [reference(kernel, given) for given in inputs], kernel)
    # All are judged by `python -m tests.assurance.mutants`; here every seventh.
    verdicts = [judge(mutant, trial) for mutant in list(mutants(program))[::7]]
    assert len(verdicts) > 15
    assert [v.mutant.description for v in verdicts if v.survivors] == []
    assert all(v.proof or v.truth for v in verdicts)


def test_mutants_of_the_text_of_two_shots_are_refused() -> None:
    kernel = kernels.gemm_ar.build({"M": 32, "K": 32, "N": 128}, world=2)
    program = compile_kernel(kernel, schedule("gemm_ar", resource="epilogue", shots=2))
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    names = ("peer_tiles_wait", "all_tile_notify", "peer_tile_wait")
    found = [m for m in text_mutants(text) if any(n in m.what for n in names)]
    assert len(found) > 5
    for mutant in found:
        with pytest.raises(EmittedError):
            validate(read_module(Source("emitted.py", mutant.text)), program)


@pytest.mark.parametrize(("m", "n", "world"), ((64, 768, 2), (24, 72, 8), (33, 40, 4)))
def test_columns_that_workers_copy_are_rows_of_them(m: int, n: int, world: int) -> None:
    """Parts of columns that no power of two is as wide as: each copy has all rows of its tile."""
    op = kernels.gemm_ar.build({"M": m, "K": 24, "N": n}, world=world)
    for slots in (1, 2):
        move = Move(resource="sm:4", shots=2, slots=slots)
        tiles = (("K", 32), ("M", 128), ("N", 256))
        program = compile_kernel(op, Schedule(tiles=tiles, workers=8, moves=(("C", move),)))
        assert program.declared("C")["part_axis"] == 1
        validate(read_module(Source("emitted.py", emit(program))), program)


def test_ranks_share_out_the_columns_of_dynamic_rows() -> None:
    extents = {"M": 1024, "K": 16, "N": 1024}
    op = kernels.gemm_ar.build(extents, world=4, dynamic=("M",))
    assert default_schedule(op).move("C") == Move(resource="copy_engine")
    two = run_passes(op, after="choose-shots").declared("C")
    assert (two["shots"], two["part_axis"]) == (2, 1)
    op = kernels.gemm_ar.build({**extents, "N": 1022}, world=4, dynamic=("M",))
    assert run_passes(op, after="choose-shots").declared("C").get("shots") is None
    with pytest.raises(ScheduleError, match="no axis of `C` can be cut into 4 parts"):
        run_passes(op, Schedule(moves=(("C", Move(resource="epilogue", shots=2)),)))


@pytest.mark.parametrize("resource", ("epilogue", "copy_engine", "sm:2"))
@pytest.mark.parametrize(("m", "n"), ((64, 1024), (60, 1024), (64, 2048)))
def test_parts_are_handed_on_in_taller_tiles_than_they_are_stored_in(
    resource: str, m: int, n: int
) -> None:
    kernel = load_kernels(Path(__file__).parents[1] / "kernels" / "misc.py")["doubled_rows"]
    op = kernel.build({"M": m, "N": n}, {}, 4)
    moves = (("Y", Move(resource, shots=2)),)
    chosen = Schedule(tiles=(("M", 16), ("N", 128)), workers=5, moves=moves)
    program = compile_kernel(op, chosen)
    stages = {
        s.symbol: s["tile"][0] for launch in program.find("launch") for s in launch.find("stage")
    }
    assert stages["Y.relay"] > stages["Y.tiles"]
    inputs = random_inputs(op, m)
    for mine, right in zip(simulate.run(program, inputs), reference(op, inputs), strict=True):
        assert torch.equal(mine["Y"], right["Y"])
    emitted = Source("emitted.py", emit(program))
    validate(read_module(emitted), program)
