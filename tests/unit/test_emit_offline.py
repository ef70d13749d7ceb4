"""Emitted kernels compiled for sm_90 with no GPU, and the lint with its positive controls."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tilelink import kernels
from tilelink.backend.emit.machine_code import code_of, disassemble
from tilelink.backend.emit.offline import SHARED_LIMIT, Compiled, compile_offline, lint
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes.order_memory import order_memory
from tilelink.backend.pipeline import compile_kernel
from tilelink.ir import Op, parse_ir
from tilelink.schedules import Move, Schedule

PROGRAMS = Path(__file__).parents[1] / "programs"


def read(name: str, change: dict[str, str] | None = None) -> Op:
    text = (PROGRAMS / f"{name}.ir").read_text()
    for old, new in (change or {}).items():
        text = re.sub(old, new, text)
    return order_memory(parse_ir(text, name))


def large_ag_gemm() -> Op:
    """8192 x 8192 x 7168 on 8 ranks, in tiles of 128 x 256 x 64."""
    return read(
        "ag_gemm.copy_engine",
        {
            "world = 4": "world = 8",
            r"@M \{value = 64": "@M {value = 8192",
            r"@K \{value = 32": "@K {value = 8192",
            r"@N \{value = 48": "@N {value = 7168",
            r"tile = \[8, 16\]": "tile = [128, 256]",
            r"tile = \[16\]": "tile = [64]",
            r"\b16\b": "1024",
            "workers = 4": "workers = 132",
        },
    )


def compiled(program: Op) -> Compiled:
    (kernel,) = compile_offline(emit(program), program)
    return kernel


def test_large_gemm_is_clean_and_the_lint_can_fail() -> None:
    kernel = compiled(large_ag_gemm())
    assert kernel.dots == (128,) and kernel.waits
    assert lint(kernel) == []
    sass, ttgir = kernel.stages["sass"], kernel.stages["ttgir"]
    assert "HGMMA" in sass and "UTMALDG" in sass

    def spoilt(**stages: str) -> list[str]:
        return lint(replace(kernel, stages={**kernel.stages, **stages}))

    assert any("HGMMA" in p for p in spoilt(sass=sass.replace("HGMMA", "FFMA")))
    assert any("spills" in p for p in lint(replace(kernel, spills=8)))
    assert any("shared" in p for p in lint(replace(kernel, shared=SHARED_LIMIT + 1)))
    assert any("multimem" in p for p in spoilt(ptx=kernel.stages["ptx"] + "multimem.st"))
    relaxed = kernel.stages["ptx"].replace("acquire", "relaxed")
    assert any("acquire" in p for p in spoilt(ptx=relaxed))
    first = ttgir.index("acquire, sys")
    start = ttgir.rindex("\n", 0, first)
    hoisted = f"{ttgir[:start]}\n ttng.async_tma_copy_global_to_local{ttgir[start:]}"
    assert any("above the wait" in p for p in spoilt(ttgir=hoisted))
    bare = re.sub(r".*(?:gpu\.barrier|ttg\.barrier).*\n", "", ttgir)
    assert any("release" in p for p in spoilt(ttgir=bare))


@pytest.mark.parametrize("name", sorted(p.stem for p in PROGRAMS.glob("*.ir")))
def test_samples_compile_clean(name: str) -> None:
    assert lint(compiled(read(name))) == []


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_dtypes_compile_clean(dtype: str) -> None:
    # fp32 elements take twice the room.
    change = {"bf16": dtype, "offset = 268288": "offset = 294912"}
    assert lint(compiled(read("gemm_rs.copy_engine", change))) == []


def test_weights_stored_n_by_k_compile_clean() -> None:
    change = {
        r"@B \{dims = \[K, N\]": "@B {dims = [N, K]",
        r"%b = load @B\[%k, %n\] : bf16\[k, n\]": "%bt = load @B[%n, %k] : bf16[n, k]\n"
        "        %b = transpose (%bt) : bf16[k, n]",
    }
    assert lint(compiled(read("gemm_ar.epilogue", change))) == []


@pytest.mark.parametrize(("m", "world", "shots"), ((1, 2, 1), (16, 4, 1), (64, 8, 2)))
@pytest.mark.parametrize("signal", ("word", "sentinel"))
def test_words_are_sixteen_bytes_a_thread_and_nothing_fences(
    m: int, world: int, shots: int, signal: str
) -> None:
    op = kernels.gemm_ar.build({"M": m, "K": 3584, "N": 8192}, world=world)
    tiles = (("K", 128), ("M", max(16, m)), ("N", 64))
    move = Move(resource="epilogue", shots=shots, slots=2, signal=signal)
    schedule = Schedule(tiles=tiles, warps=4, stages=6, moves=(("C", move),))
    kernel = compiled(compile_kernel(op, schedule))
    assert lint(kernel) == [] and kernel.spills == 0
    sass = kernel.stages["sass"]
    lines = [line for line in sass.splitlines() if re.search(r"\b(STG|LDG|MEMBAR|BAR)\b", line)]
    stores = [n for n, line in enumerate(lines) if "STG.E.128.STRONG.SYS" in line]
    polls = [n for n, line in enumerate(lines) if "LDG.E.128.STRONG.SYS" in line]
    assert stores and not any("STG.E.64.STRONG.SYS" in line for line in lines)
    # All parts of a tile are under way together, and no fence stands between a store and the next poll.
    together = max(sum(n <= p < n + world for p in polls) for n in polls)
    assert together == world
    first = next(n for n in polls if n > stores[0])
    assert not any("MEMBAR" in line for line in lines[stores[0] : first])


def test_kernels_disassembled_together_have_the_instructions_of_each() -> None:
    def operations(sass: str) -> list[str]:
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)

    kernels = [compiled(read(name)) for name in ("ag_gemm.copy_engine", "gemm_rs.copy_engine")]
    together = disassemble([kernel.cubin for kernel in kernels])
    assert [operations(text) for text in together] == [
        operations(kernel.stages["sass"]) for kernel in kernels
    ]
    assert len(set(together)) == 2 and disassemble([]) == []


def test_what_ends_a_wait_is_a_loop_over_many_ranks() -> None:
    """Written out for eight ranks at every wait, as it is for few, it takes what a kernel with roles lacks."""

    def built(world: int) -> Compiled:
        kernel = kernels.ag_gemm.build({"M": 8192, "K": 8192, "N": 7392}, {}, world)
        schedule = Schedule(
            tiles=(("K", 64), ("M", 128), ("N", 128)),
            stages=6,
            emitter="gluon",
            tail=3,
            moves=(("A", Move(resource="copy_engine")),),
        )
        program = compile_kernel(kernel, schedule)
        return compile_offline(emit(program), program)[0]

    few, many = built(4), built(8)
    assert lint(few) == [] and lint(many) == []
    stops = [code.stages["ptx"].count("atom.global.sys.release.exch") for code in (few, many)]
    assert 0 < stops[1] < stops[0]
    # Through one more function they would be too deep for the inliner, and made for other warps than the role's.
    ttgir = many.stages["ttgir"]
    called = ttgir.replace("ttg.warp_return", "tt.call @stop_all() : () -> ()\n ttg.warp_return", 1)
    assert any(
        "not inlined" in p for p in lint(replace(many, stages={**many.stages, "ttgir": called}))
    )


def test_what_is_no_cubin_or_has_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match="not an ELF file"):
        code_of(b"source")
    kernel = compiled(read("ag_gemm.copy_engine"))
    with pytest.raises(ValueError, match="no code"):
        code_of(kernel.cubin.replace(b".text", b".test"))


@pytest.mark.parametrize(
    ("tile", "stages"), [((128, 256, 128), 5), ((128, 128, 64), 12), ((64, 64, 128), 16)]
)
def test_more_stages_than_fit_are_told_how_many_do(tile: tuple[int, int, int], stages: int) -> None:
    kernel = kernels.ag_gemm.build({"M": 2048, "N": 2048, "K": 2048}, {}, 4)

    def compiled(stages: int) -> Compiled:
        chosen = Schedule(tiles=tuple(zip("MNK", tile, strict=True)), stages=stages)
        program = compile_kernel(kernel, chosen)
        (found,) = compile_offline(emit(program), program, sass=False)
        return found

    most = compiled(stages).stages_fit
    assert 1 < most < stages
    assert compiled(most).shared <= SHARED_LIMIT < compiled(most + 1).shared
