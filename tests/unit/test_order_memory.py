"""`order-memory`, and an emitter that makes exactly what stands in the program."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.kernels import maps
from tilelink import kernels
from tilelink.backend.emit.scope import CannotEmit
from tilelink.backend.emit.triton import emit
from tilelink.backend.passes import PASSES
from tilelink.backend.passes.order_memory import order_memory, rewrite
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.validate import read_module, validate
from tilelink.backend.verify import BoundsError, verify
from tilelink.errors import Source
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.schedules import Move, Schedule, default_schedule

EXTENTS = {"M": 512, "N": 256, "K": 256}
WORDS = ("via", "proxy", "scope", "delay", "drain", "wide")

SMALL = """
program @p {world = 2} do {
  extent @M {value = 64}
  extent @K {value = KK, dynamic = DYNAMIC}
  tensor @A {dims = [M, K], dtype = "bf16", move = "local", role = "in"}
  tensor @C {dims = [M, K], dtype = "DTYPE", move = "local", role = "out"}
  counter @done {dims = [1], offset = 131072}
  head do {}
  launch @main {after = ["head"], workers = 1} do {
    stage @copy {extent = [M, K], tile = [TM, 32]} do (%m: tile, %k: tile) {
      %a = load @A[%m, %k] : bf16[m, k]
      store @C[%m, %k] (%a)
      NOTIFY
    }
  }
}
"""


def small(**changes: str) -> Op:
    """The copy of a matrix, ordered."""
    values = {"KK": "32", "DYNAMIC": "false", "DTYPE": "bf16", "TM": "16", "NOTIFY": "", **changes}
    text = SMALL
    for key, value in values.items():
        text = re.sub(rf"\b{key}\b", value, text)
    return order_memory(parse_ir(text))


def paths(program: Op) -> list[str | None]:
    """`via` of the load and of the store."""
    return [op.get("via") for op in program.walk() if op.name in ("load", "store")]


def fused(name: str, resource: str) -> Op:
    kernel = getattr(kernels, name).build(EXTENTS, {}, 4)
    return run_passes(kernel, default_schedule(kernel).with_resource(resource))


def without(program: Op, *words: str, of: tuple[str, ...] = ()) -> Op:
    """The program with these attributes taken out, of these ops or of all."""

    def strip(op: Op) -> Op:
        return op.with_attrs(**dict.fromkeys(words)) if not of or op.name in of else op

    return rewrite(program, strip)


def body(program: Op) -> str:
    """The emitted text without the program that it carries."""
    return re.sub(r'TEXT = r""".*?"""', "", emit(program), flags=re.S)


def test_a_box_of_two_axes_may_go_through_tma() -> None:
    assert paths(small()) == ["tma", "tma"]


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"DTYPE": "int32"}, ["tma", None]),
        ({"KK": "33"}, [None, None]),  # rows of 66 bytes
        ({"DYNAMIC": "true"}, [None, None]),
        ({"TM": "512"}, [None, None]),  # no box is that long
        ({"NOTIFY": "notify @done[0]"}, ["tma", None]),  # signalled, and nothing drains
    ],
)
def test_what_no_descriptor_or_signal_allows_does_not(
    changes: dict[str, str], right: list[str | None]
) -> None:
    assert paths(small(**changes)) == right


def test_scope_is_that_of_the_kernel_unless_a_stream_waits() -> None:
    (notify,) = (o for o in small(NOTIFY="notify @done[0]").walk() if o.name == "notify")
    assert notify.get("scope") == "gpu" and notify.get("delay") is None
    streamed = [o for o in fused("gemm_rs", "copy_engine").walk() if o.name == "notify"]
    assert [o.get("scope") for o in streamed if o.symbol == "C.done"] == [None]


def test_wide_from_two_to_the_thirty_one_elements() -> None:
    assert not any(op.get("wide") for op in small(KK=str(2**25 - 32)).walk())
    wide = [op.name for op in small(KK=str(2**25)).walk() if op.get("wide")]
    assert wide == ["load", "store"]


@pytest.mark.parametrize(
    ("name", "resource"),
    [
        *itertools.product(("ag_gemm", "gemm_rs", "gemm_ar_add"), ("copy_engine", "sm:2", "none")),
        ("gemm_rs", "epilogue"),
        ("gemm_ar_add", "epilogue"),
    ],
)
def test_a_second_run_changes_nothing(name: str, resource: str) -> None:
    program = fused(name, resource)
    assert order_memory(program) == program
    assert parse_ir(print_ir(program)) == program
    assert "order-memory" in [name for name, _ in PASSES]


def test_a_flattened_stage_holds_its_notify_back_until_a_flush() -> None:
    (launch,) = fused("gemm_rs", "copy_engine").find("launch")
    names = [op.name for op in launch.body]
    assert names[:2] == ["stage", "flush"] and launch.body[1]["drain"] is True
    (notify,) = (op for op in launch.body[0].walk() if op.name == "notify")
    assert (notify["delay"], notify["drain"]) == (1, True)


def test_a_peers_flag_is_held_back_too_but_not_in_a_loop_over_peers() -> None:
    program = fused("gemm_rs", "epilogue")
    (launch,) = program.find("launch")
    assert [op.name for op in launch.body[:2]] == ["stage", "flush"]
    (notify,) = (op for op in launch.body[0].walk() if op.name == "notify")
    assert notify["delay"] == 1 and program.declared(notify.symbol).name == "flag"
    (store,) = (op for op in launch.body[0].walk() if op.name == "store")
    assert store.get("via") == "tma" and store.get("peer") is not None
    # In the text once a tile, for the tile before, and once behind the loop.
    assert body(program).count("device.delayed_") == 2
    assert "device.peer_tile_notify(" not in body(program)
    # One descriptor a rank, of this rank's slice there, and the store by the one of the tile's owner.
    text = emit(program)
    assert re.findall(r'buffer\("C.parts", peer=(\d)\)\[rank\], \(128, 128\)', text) == list("0123")
    assert len(re.findall(r"C_parts_to\.store\(", text)) == 2
    # At once, not behind the next main loop: the stores go by pointers, as before.
    at_once = order_memory(
        without(without(fused("gemm_rs", "epilogue"), "delay", "via"), "flatten")
    )
    assert all(op.get("via") is None for op in at_once.walk() if op.get("peer") is not None)
    reduced = fused("gemm_ar", "epilogue")
    assert all(op.get("delay") is None for op in reduced.walk())
    assert "device.delayed_" not in body(reduced)


def test_without_via_everything_goes_by_pointers() -> None:
    program = fused("ag_gemm", "copy_engine")
    assert ".load([" in body(program) and ".store([" in body(program)
    bare = body(without(program, "via"))
    assert ".load([" not in bare and ".store([" not in bare and "tl.load(" in bare
    one = body(without(program, "via", of=("store",)))
    assert ".load([" in one and ".store([" not in one


def test_without_proxy_no_wait_has_a_fence() -> None:
    program = fused("ag_gemm", "copy_engine")
    waits = r"peer_tile_wait\((?:[^()]|\([^()]*\))*,\s*True,?\s*\)"
    assert re.search(waits, body(program))
    assert not re.search(waits, body(without(program, "proxy")))


def test_without_scope_a_counter_is_released_to_the_system() -> None:
    program = fused("gemm_rs", "sm:2")
    assert re.search(r"delayed_tile_notify\(ctx, pending\)", body(program))
    assert re.search(r"delayed_tile_notify\(ctx, pending, True\)", body(without(program, "scope")))


def test_a_notify_that_nothing_flushes_is_lost_in_the_text_too() -> None:
    program = fused("gemm_rs", "sm:2")
    assert body(program).count("device.delayed_tile_notify(") == 2

    def drop(op: Op) -> Op:
        kept = tuple(o for o in op.body if o.name != "flush")
        return op.with_ops(kept) if op.name == "launch" else op

    assert body(rewrite(program, drop)).count("device.delayed_tile_notify(") == 1


def test_a_notify_at_once_in_a_flattened_stage_drains_only_where_it_says_so() -> None:
    program = without(fused("gemm_rs", "sm:2"), "delay")
    text = body(program)
    assert "delayed_tile_notify" not in text
    assert text.index(".store([") < text.index("drain_tma_stores()")
    assert text.index("drain_tma_stores()") < text.index("producer_tile_notify(")
    assert "drain_tma_stores" not in body(without(program, "drain"))


@pytest.mark.parametrize("resource", ["copy_engine", "sm:2", "epilogue"])
def test_nested_loops_hold_a_notify_back_too(resource: str) -> None:
    def nested(op: Op) -> Op:
        return op.with_attrs(flatten=None) if op.name == "stage" else op

    program = rewrite(fused("gemm_rs", resource), nested)
    text = emit(program)
    validate(read_module(Source("emitted.py", text)), program)
    held = next(line for line in text.splitlines() if "device.delayed_" in line)
    assert text.index(held) < text.index(".store([")


def test_wide_offsets_are_those_that_say_so() -> None:
    program = without(fused("ag_gemm", "none"), "via")
    assert "tl.int64)" not in body(program).split("# Stage")[1]

    def widen(op: Op) -> Op:
        return op.with_attrs(wide=True) if op.name == "load" else op

    assert "tl.int64)" in body(rewrite(program, widen)).split("# Stage")[1]


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("wait", {"order": "relaxed"}, "a wait with `order = relaxed`"),
        ("wait", {"compare": "equal"}, "a wait with `compare = equal`"),
        ("wait", {"scope": "gpu"}, "a wait of scope `gpu`"),
        ("notify", {"order": "relaxed"}, "a notify with `order = relaxed`"),
        ("notify", {"barrier": False}, "a notify without the barrier"),
        ("notify", {"drain": None}, "held back and drains nothing"),
        ("flag", {"cleared": True}, "a flag with `cleared = true`"),
        ("counter", {"cleared": False}, "a counter with `cleared = false`"),
    ],
)
@pytest.mark.parametrize("resource", ["copy_engine", "sm:2"])
def test_what_has_no_primitive_is_refused(
    kind: str, words: dict[str, Any], message: str, resource: str
) -> None:
    def spoil(op: Op) -> Op:
        return op.with_attrs(**words) if op.name == kind else op

    with pytest.raises(CannotEmit, match=message):
        emit(rewrite(fused("gemm_rs", resource), spoil))


def test_a_flag_between_ranks_is_never_raised_for_one_gpu() -> None:
    def narrow(op: Op) -> Op:
        return op.with_attrs(scope="gpu") if op.name == "notify" else op

    with pytest.raises(CannotEmit, match="raised for this GPU only"):
        emit(rewrite(fused("gemm_rs", "sm:2"), narrow))


def test_words_of_memory_order_are_those_of_the_pass() -> None:
    programs = [fused("gemm_rs", r) for r in ("copy_engine", "sm:2", "none")]
    programs.append(fused("ag_gemm", "copy_engine"))
    found = {key for program in programs for op in program.walk() for key, _ in op.attrs}
    assert set(WORDS) - {"wide"} <= found
    assert not {"order", "barrier", "compare", "resident", "cleared"} & found


def test_tiles_that_begin_inside_of_16_bytes_do_not_go_through_tma() -> None:
    """On sm_90 such a box is an illegal instruction: slices of 36 columns, 72 bytes, begin so."""
    kernel = kernels.gemm_ar.build({"M": 24, "K": 136, "N": 72}, world=2)
    moves = (("C", Move("copy_engine", shots=2)),)
    program = compile_kernel(kernel, Schedule(tiles=(("N", 128),), moves=moves))
    through = {op.symbol for op in program.walk() if op.get("via") == "tma"}
    assert through == {"A"}

    def forced(op: Op) -> Op:
        return op.with_attrs(via="tma") if op.name == "load" and op.symbol == "B" else op

    with pytest.raises(BoundsError, match="72 bytes into a row"):
        verify(rewrite(program, forced))


def test_tiles_of_whole_slices_go_through_tma() -> None:
    kernel = kernels.gemm_ar.build({"M": 24, "K": 136, "N": 128}, world=2)
    moves = (("C", Move("copy_engine", shots=2)),)
    program = compile_kernel(kernel, Schedule(tiles=(("N", 64),), moves=moves))
    assert {"A", "B"} <= {op.symbol for op in program.walk() if op.get("via") == "tma"}


@pytest.mark.parametrize("tail", [1, 2])
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_notify_before_another_store_is_not_held_back(direction: str, tail: int) -> None:
    """One of two sums is told of, and then the other is stored for a collective."""
    kernel = maps.ar_two.build({"M": 32, "N": 48, "K": 32}, world=2)
    moves = (("C", Move("epilogue", shots=2, direction=direction)), ("D", Move("none")))
    tiles = tuple((name, 16) for name in "KMN")
    program = compile_kernel(kernel, Schedule(tiles=tiles, workers=4, tail=tail, moves=moves))
    made = program.find("launch")[0].find("stage")[-1]
    names = [op.name for op in made.body]
    told = names.index("notify")
    assert "store" in names[told:] and made.body[told].get("delay") is None
    validate(read_module(Source("emitted.py", emit(program))), program)
