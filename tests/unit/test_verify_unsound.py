"""Programs that an enumeration could get wrong: each was made to slip past a rule, and must not."""

import pytest

from tests.unit.test_verify_memory_order import edited
from tests.unit.verify_programs import text_of
from tilelink.backend.expand import ZeroDivisor
from tilelink.backend.expand_walk import expand
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import (
    BoundsError,
    CoverError,
    DataflowError,
    MatchError,
    ProgressError,
    ReuseError,
    UndecidedError,
    VerifyError,
    prove,
    verify,
)
from tilelink.errors import TilelinkError
from tilelink.ir import Op, parse_ir, print_ir
from tilelink.ir.check_tables import IRTypeError
from tilelink.kernels import gemm_ar
from tilelink.schedules import Move, Schedule

AG, RS = "ag_gemm.copy_engine", "gemm_rs.copy_engine"
SMALL = """program @p {world = 1} do {
  extent @M {value = 32}
  tensor @A {dims = [M], dtype = "bf16", move = "local", role = "in"}
  tensor @C {dims = [M], dtype = "bf16", move = "local", role = "out"}
  buffer @T {dims = [M], dtype = "bf16", offset = 0, space = "local"}
  counter @d {dims = [1], offset = 131072}
  head do {
  }
  launch @k {after = ["head"], workers = 2} do {
    stage @s {extent = [1], tile = [1]} do (%i: int32) {
BODY
    }
  }
}"""
COPY = """      for_tiles {extent = [M], tile = [8]} do (%m: tile) {
        %a = load @A[%m] : bf16[m]
        store @C[%m] (%a)
      }"""


def small(body: str, *edits: tuple[str, str]) -> str:
    """A program of one task with ``body``."""
    text = SMALL.replace("BODY", body)
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_the_small_program_is_fine() -> None:
    verify(parse_ir(small(COPY)))


BODIES = [
    # A loop that reads ahead of what it writes, next to what it has written.
    (
        """      for_tiles {extent = [M], tile = [8]} do (%m: tile) {
        %a = load @A[%m] : bf16[m]
        store @T[%m] (%a)
        %b = load @T[%m at (m.start + 8) % M] : bf16[m]
        store @C[%m] (%b)
      }""",
        CoverError,
        "T",
    ),
    (
        """      for_tiles {extent = [M], tile = [8]} do (%m: tile) {
        %b = load @T[%m] : bf16[m]
        %a = load @A[%m] : bf16[m]
        store @T[%m] (%a)
        store @C[%m] (%b)
      }""",
        CoverError,
        "T",
    ),
    # A loop over a part of its extent does not write all of it.
    (
        COPY.replace("extent = [M]", "extent = [M], segment = 8, segments = 2"),
        DataflowError,
        "never written",
    ),
    (COPY.replace("extent = [M]", "extent = [M], segment = 12"), DataflowError, "never written"),
    (
        COPY.replace("extent = [M]", "extent = [M], segment = 8, visit = 0"),
        DataflowError,
        "never written",
    ),
    # More iterations than any extent: their numbers must not run into what follows.
    (
        COPY
        + """
      for_range {lo = 0, hi = 100} do (%i.1: int32) {
        wait @d[0] {count = 100}
      }
      for_range {lo = 0, hi = 100} do (%j: int32) {
        notify @d[0]
      }""",
        VerifyError,
        "",
    ),
    # What nothing can tell.
    (COPY.replace("store @C[%m] (%a)", "store @X[%m] (%a)"), TilelinkError, "@X"),
    (
        COPY.replace("store @C[%m] (%a)", "store @A[%m] (%a)\n store @C[%m] (%a)"),
        BoundsError,
        "input",
    ),
    (COPY.replace("load @A[%m] : bf16[m]", "load @A[%m, %m] : bf16[m, m]"), VerifyError, "m, m"),
    (COPY.replace("load @A[%m] : bf16[m]", "load @A[0..16] : bf16[m]"), UndecidedError, "bf16[m]"),
    (COPY.replace("load @A[%m] : bf16[m]", "load @A[:] : bf16[m]"), UndecidedError, "bf16[m]"),
    (COPY + "\n      notify @d[0, 0]", UndecidedError, "axes"),
    (
        COPY + "\n      stage @x {extent = [1], tile = [1]} do (%q: int32) {\n      }",
        UndecidedError,
        "cannot stand",
    ),
    (
        COPY.replace("store @C[%m] (%a)", "head do {\n store @C[%m] (%a)\n }"),
        UndecidedError,
        "cannot stand",
    ),
    (
        """      %n = load @N[0] : int32
      %z = constant {value = 0} : int32
      for_tiles (%z, %n) {bounds = true, tile = [8]} do (%m: tile) {
        notify @d[0]
      }
"""
        + COPY,
        UndecidedError,
        "run time",
    ),
    (
        "      %n = load @N[0] : int32\n      wait @d[%n] {count = 1}\n      notify @d[0]\n" + COPY,
        UndecidedError,
        "run time",
    ),
]


@pytest.mark.parametrize(("body", "error", "part"), BODIES)
def test_bodies(body: str, error: type[TilelinkError], part: str) -> None:
    table = 'tensor @N {dims = [1], dtype = "int32", move = "local", role = "in"}\n  counter @d'
    with pytest.raises(error) as caught:
        verify(parse_ir(small(body, ("counter @d", table))))
    assert part in str(caught.value)


def two_shots() -> tuple[str, Op]:
    """The text of a reduce in two shots, summed in the epilogue, and its kernel."""
    op = gemm_ar.build({"M": 32, "N": 16, "K": 16}, world=2, dtype="fp32")
    move = Move(resource="epilogue", sum="epilogue", shots=2)
    tiles = (("K", 8), ("M", 8), ("N", 8))
    return print_ir(run_passes(op, Schedule(tiles=tiles, workers=3, moves=(("C", move),)))), op


def test_a_wait_behind_the_end_of_a_loop_is_none() -> None:
    text, op = two_shots()
    end = "        yield (%acc.2.own)\n      }\n"
    wait = "      wait @C.ready[0..RANK, m.own.start % 16 / 8]\n"
    assert end + wait in text
    verify(parse_ir(text), op)
    late = parse_ir(text.replace(end + wait, end.replace("      }\n", wait + "      }\n")))
    with pytest.raises(IRTypeError, match="but `yield`: 0"):
        verify(late, op)


def test_an_op_of_a_finish_that_nothing_needs_reads_what_there_is() -> None:
    text, op = two_shots()
    assert "    finish do {\n" in text
    zeros = "    finish do {\n      %more = zeros : fp32[m.own, n.own]\n"
    with pytest.raises(IRTypeError, match=r"m\.own"):
        verify(parse_ir(text.replace("    finish do {\n", zeros)), op)


def test_a_stage_in_a_launch_is_all_there_is() -> None:
    text = small(COPY).replace("    stage @s", "    notify @d[0]\n    stage @s")
    with pytest.raises(UndecidedError, match="stages, flushes"):
        verify(parse_ir(text))


AGENTS = [
    # Names of agents.
    ([("  head do {\n", "  head do {\n  }\n  head do {\n")], ProgressError, "second agent"),
    ([("stream @copy", "stream @ag_gemm")], ProgressError, "second agent"),
    # In a circle.
    (
        [('launch @ag_gemm {after = ["head"]', 'launch @ag_gemm {after = ["head", "ag_gemm"]')],
        ProgressError,
        "circle",
    ),
    (
        [
            ('launch @ag_gemm {after = ["head"]', 'launch @ag_gemm {after = ["head", "copy"]'),
            ('stream @copy {after = ["head"]', 'stream @copy {after = ["head", "ag_gemm"]'),
        ],
        ProgressError,
        "circle",
    ),
    # A push before its head.
    ([('stream @copy {after = ["head"]', "stream @copy {after = []")], VerifyError, "head"),
    # The acknowledgement of another rank.
    ([("notify @ack[RANK] {peer = p}", "notify @ack[p] {peer = RANK}")], VerifyError, "ack"),
]


@pytest.mark.parametrize(("edits", "error", "part"), AGENTS)
def test_agents(edits: list[tuple[str, str]], error: type[VerifyError], part: str) -> None:
    with pytest.raises(error) as caught:
        verify(edited(AG, *edits))
    assert part in str(caught.value)


def test_an_unknown_agent_is_found_in_an_expansion_too() -> None:
    out = expand(edited(AG, ('after = ["head"], stages', 'after = ["head", "other"], stages')))
    with pytest.raises(ProgressError, match="other"):
        prove(out)


def test_kernels_beside_each_other_count_together() -> None:
    """Three kernels of which any two fit, but not all three."""
    stage = (
        "    stage @n{1} {{extent = [1], tile = [1]}} do (%n{1}: int32) {{\n"
        "      notify @d[{1}]\n    }}\n"
        "    stage @{0} {{extent = [1], tile = [1]}} do (%{0}: int32) {{\n"
        "      wait @d[{1}] {{count = 1}}\n    }}\n"
    )
    body = "".join(
        f'  launch @k{i} {{after = ["head"], workers = 60}} do {{\n{stage.format(f"s{i}", i)}  }}\n'
        for i in range(3)
    )
    text = f"""program @p {{world = 1}} do {{
  counter @d {{dims = [3], offset = 131072}}
  head do {{
  }}
{body}}}"""
    with pytest.raises(ProgressError, match="180 CTAs of 132"):
        verify(parse_ir(text))
    verify(parse_ir(text.replace("workers = 60", "workers = 40")))


LARGE = """program @p {world = 1} do {
  extent @M {value = 65536}
  extent @K {value = 32768}
  tensor @C {dims = [M, KEXPR], dtype = "bf16", move = "local", role = "out"}
  launch @k {workers = 2} do {
    stage @s {extent = [M], tile = [8192]} do (%m: tile) {
      %z = zeros : bf16[m, KEXPR]
      store @C[%m, :] (%z)
    }
  }
}"""


def test_elements_from_two_to_the_31_on_need_wide_offsets() -> None:
    verify(parse_ir(LARGE.replace("KEXPR", "K")))  # the last element is 2^31 - 1
    large = LARGE.replace("KEXPR", "K + 1")
    with pytest.raises(BoundsError, match="32 bits"):
        verify(parse_ir(large))
    verify(parse_ir(large.replace("(%z)", "(%z) {wide = true}")))


def test_the_next_program_is_kept_from_what_this_one_still_reads() -> None:
    """Acknowledged before the sum has read: the same program is refused, with the pair."""
    text = text_of(RS)
    ack = text[text.index("    finish do {") : text.index("  stream")]
    early = text.replace(ack, "  }\n").replace(
        "    stage @sum",
        "    stage @early {extent = [WORLD], tile = [1], workers = [0, 1]} do (%p: int32) {\n"
        "      notify @ack[RANK] {peer = p}\n    }\n    stage @sum",
    )
    with pytest.raises(ReuseError):
        verify(parse_ir(early, "p"))


def test_a_push_that_nobody_reads_is_acknowledged_all_the_same() -> None:
    """No read of it and no later write meets it, but the next program's buffer may lie there."""
    text = text_of(AG).replace(
        "flag @ack",
        'buffer @spare {dims = [M, K], dtype = "bf16", offset = 786432, space = "symmetric"}\n'
        "  flag @ack",
    )
    told = "      notify @A.ready[RANK, 0] {peer = (RANK + s) % WORLD}"
    push = (
        "      transfer @A[:, :] {peer = (RANK + s) % WORLD, "
        "to = @spare[RANK * 16..RANK * 16 + 16, :]}"
    )
    verify(parse_ir(text.replace(told, push + "\n" + told), "p"))
    with pytest.raises(ReuseError, match="spare"):
        verify(parse_ir(text.replace(told, told + "\n" + push), "p"))


def test_a_program_asks_for_the_memory_that_it_uses() -> None:
    need = 262144 + 64 * 32 * 2
    verify(edited(AG, ("program @ag_gemm {", f"program @ag_gemm {{bytes = {need}, ")))
    with pytest.raises(BoundsError, match="asks for"):
        verify(edited(AG, ("program @ag_gemm {", f"program @ag_gemm {{bytes = {need - 1}, ")))


def test_a_report_needs_no_more_than_the_rows() -> None:
    """Rows without their program's bodies prove the same, but for what holds sums."""
    out = expand(parse_ir(text_of(AG), "p"))
    report = prove(out)
    assert report == verify(parse_ir(text_of(AG), "p"))
    assert "residency" in report.rules
    # A wait that is taken away from the rows is missed, whatever the program says.
    kept = [s for s in out.syncs if not (s.wait and s.symbol == "A.ready")]
    bare = expand(parse_ir(text_of(AG), "p"))
    bare.syncs[:] = [bare.syncs[i] for i, s in enumerate(out.syncs) if s in kept]
    with pytest.raises(CoverError):
        prove(bare)


def test_a_dynamic_queue_counts_on_a_word_of_its_own() -> None:
    good = (
        "stage @gemm {",
        'stage @gemm {counter = @q[0], queue = "dynamic", ',
    )
    declare = ("  head do", "  counter @q {dims = [1], offset = 131200}\n  head do")
    verify(edited(AG, good, declare))
    for bad in (
        ("@q[0]", "@q[1]"),
        ("counter @q {", "counter @q {cleared = false, "),
        ("    finish do {", "    finish do {\n      notify @q[0]"),
    ):
        with pytest.raises((BoundsError, MatchError)):
            verify(edited(AG, good, declare, bad))


FIN = "  counter @fin {dims = [1], offset = 131072}\n"
WAITS = "      wait @A.ready[m.start / 16, 0]"
EMPTY = """    stage @empty {extent = [M - 64], tile = [8]} do (%z: tile) {
      wait @fin[0] {count = 1}
    }
"""
AUX = """  launch @aux {after = ["head"], workers = 1} do {
    stage @one {extent = [1], tile = [1]} do (%z: int32) {
      notify @fin[0]
    }
  }
"""


@pytest.mark.parametrize(
    "edits, error, part",
    [
        # `head` makes one kind of wait, and the runtime makes it for all acknowledgements.
        ((("  head do {\n", "  head do {\n    wait @A.ready[1, 0]\n"),), UndecidedError, "`head`"),
        # What another program raised says nothing of this one.
        (
            ((WAITS, "      wait @A.ready[RANK, 0] {epoch = (0 - 1)}\n" + WAITS),),
            MatchError,
            "only `head`",
        ),
        # Waits of a stage stand before its loop, which workers without tasks pass too.
        (
            (
                ("  head do {\n", FIN + "  head do {\n"),
                ("    stage @gemm", EMPTY + "    stage @gemm"),
            ),
            UndecidedError,
            "without tasks",
        ),
        # The words by which ranks say that they have started a call, and odd places.
        ((("offset = 4096", "offset = 256"),), BoundsError, "area of a flag"),
        ((("offset = 4096", "offset = 4097"),), BoundsError, "multiple of 4"),
        ((("offset = 262144", "offset = 262146"),), BoundsError, "multiple of 16"),
        ((("load @B[%k, %n]", "load @B[%k, %n] {when = 1}"),), UndecidedError, "come together"),
        ((("m.start / 16, 0]", "m.start / (RANK - 1), 0]"),), ZeroDivisor, "divides by 0"),
        (
            (("to = @A.all[RANK * 16..RANK * 16 + 16", "to = @A.all[RANK * 16..RANK * 8 + 16"),),
            BoundsError,
            "@",
        ),
    ],
)
def test_texts_that_hands_have_written_are_refused(
    edits: tuple[tuple[str, str], ...], error: type[TilelinkError], part: str
) -> None:
    with pytest.raises(error) as caught:
        verify(edited(AG, *edits))
    assert part in str(caught.value)


def test_a_program_with_flags_acknowledges_even_where_it_uses_none() -> None:
    text = text_of("ag_gemm.collective")
    verify(parse_ir(text))
    flag = "  flag @A.ready {dims = [WORLD, 1], offset = 4096}\n  head do {"
    with pytest.raises(ReuseError, match="advances the epoch"):
        verify(parse_ir(text.replace("  head do {", flag)))


def test_a_kernel_cannot_wait_for_one_behind_it_in_the_main_stream() -> None:
    edits = [
        ("  head do {\n", FIN + "  head do {\n"),
        ("    finish do {\n", "    finish do {\n      wait @fin[0] {count = 1}\n"),
    ]
    text = text_of(AG)
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    before = text.replace("  launch @ag_gemm", AUX + "  launch @ag_gemm")
    behind = text.rstrip().removesuffix("}") + AUX + "}\n"
    verify(parse_ir(before))
    with pytest.raises(ProgressError, match="main stream"):
        verify(parse_ir(behind))
