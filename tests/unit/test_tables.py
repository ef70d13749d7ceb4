"""Tuned tables: their form, their key, and how a kernel finds its schedule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tilelink.backend.emit.scope import NoRoles
from tilelink.backend.expand import environment, evaluate
from tilelink.backend.passes.common import tasks_of_stage
from tilelink.backend.pipeline import compile_kernel, run_passes
from tilelink.backend.runtime.choose import choices, compile_chosen, predicted_choices
from tilelink.ir import Op, Ref
from tilelink.kernel import Kernel
from tilelink.kernels import ag_gemm, gemm, gemm_ar, gemm_rs
from tilelink.schedules import Schedule, default_schedule, tables
from tilelink.schedules.machine import Machine
from tilelink.schedules.tables import (
    BadTable,
    Entry,
    Run,
    Table,
    kernel_key,
    load_tables,
    lookup,
    parse_table,
    world_of,
)

DEVICE = "NVIDIA H200"
RUN = Run("a.json", "2026-01-01", {"triton": "3.6.0"})


def built(m: int = 1024, k: int = 512, n: int = 512, world: int = 4) -> Op:
    return ag_gemm.build({"M": m, "K": k, "N": n}, {}, world)


def table(*entries: Entry, world: int = 4, device: str = DEVICE) -> Table:
    key = kernel_key(built(world=world))
    return Table("ag_gemm", key, "bf16", world, device, (RUN,), entries, name="t.json")


def table_of(op: Op, made: Entry) -> Table:
    """A table with one entry, of the kernel and the ranks of ``op``."""
    return Table(
        op.symbol, kernel_key(op), "bf16", op["world"], DEVICE, (RUN,), (made,), name="t.json"
    )


def entry(m: int, k: int, n: int, group: int = 2, us: float = 10.0) -> Entry:
    schedule = replace(default_schedule(built()), group=group)
    return Entry({"M": m, "K": k, "N": n}, schedule, us)


def test_a_table_round_trips() -> None:
    first = replace(
        table(
            entry(1024, 512, 512), replace(entry(2048, 512, 512), baseline_us=12.5, baseline="x")
        ),
        present=("bias",),
        constants={"nk": True},
    )
    again = parse_table(first.to_json(), "t.json")
    assert again == first
    assert again.to_json() == first.to_json()
    # A line an entry, so that a change of one is a change of one line.
    assert sum('"extents"' in line for line in first.to_json().splitlines()) == 2


def test_the_key_is_of_what_is_computed_and_moved() -> None:
    key = kernel_key(built())
    assert key == kernel_key(built(4096, 8, 16, world=2))
    assert key != kernel_key(ag_gemm.build({"M": 8, "K": 8, "N": 8}, {}, 4, dtype="fp16"))
    assert key != kernel_key(ag_gemm.build({"M": 8, "K": 8, "N": 8}, {}, 4, scalars={"nk": True}))
    assert key != kernel_key(gemm_rs.build({"M": 8, "K": 8, "N": 8}, {}, 4))


def test_a_kernel_of_another_name_has_the_same_key() -> None:
    op = built()
    renamed = replace(op, ref=Ref("mine"))
    assert kernel_key(renamed) == kernel_key(op)


def test_what_was_tuned_serves_calls_with_fewer_rows_too() -> None:
    rows = {"M": 1024, "K": 512, "N": 512}
    dynamic = ag_gemm.build(rows, {}, 4, dynamic=("M",))
    assert kernel_key(dynamic) == kernel_key(built())
    copied = replace(entry(1024, 512, 512), schedule=default_schedule(built()))
    found = lookup(dynamic, DEVICE, [table(copied)])
    assert found is not None
    assert Schedule.from_json(compile_kernel(dynamic, found.schedule)["schedule"]) == found.schedule


def test_of_what_was_tuned_a_call_with_fewer_rows_takes_no_more_than_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last tiles are cut in programs whose rows are known.
    cut = Schedule.from_json(
        '{"tail": 2, "workers": 33, "moves": {"C": {"resource": "copy_engine"}}}'
    )
    fixed = gemm_rs.build({"M": 1024, "K": 512, "N": 512}, {}, 4)
    compile_kernel(fixed, cut)
    dynamic = gemm_rs.build({"M": 1024, "K": 512, "N": 512}, {}, 4, dynamic=("M",))
    only = table_of(fixed, Entry({"M": 1024, "K": 512, "N": 512}, cut, 10.0))
    monkeypatch.setattr(tables, "load_tables", lambda: (only,))
    assert cut in [choice.schedule for choice in choices(dynamic, DEVICE)]
    found = compile_chosen(dynamic, None, DEVICE)
    assert found.origin != "tuned (t.json)"
    assert Schedule.from_json(found.program["schedule"]).tail == 1


def test_lookup_takes_the_entry_of_the_shape() -> None:
    found = lookup(built(), DEVICE, [table(entry(2048, 512, 512, 3), entry(1024, 512, 512, 5))])
    assert found is not None
    assert (found.schedule.group, found.distance) == (5, 0.0)
    assert "tuned (t.json)" in found.origin


def test_lookup_takes_the_nearest_shape_and_none_that_is_far() -> None:
    tables = [table(entry(2048, 512, 512, 3), entry(8192, 512, 512, 5))]
    found = lookup(built(4096, 512, 600), DEVICE, tables)
    assert found is not None
    assert found.schedule.group in (3, 5)
    assert found.entry.extents["M"] in (2048, 8192)
    near = lookup(built(3072, 512, 512), DEVICE, tables)
    assert near is not None
    assert near.schedule.group == 3
    assert "tuned for M=2048" in near.origin
    assert lookup(built(64, 512, 512), DEVICE, tables) is None


@pytest.mark.parametrize(("world", "device"), [(1, DEVICE), (4, "NVIDIA H100")])
def test_lookup_never_crosses_devices_nor_leaves_one_rank(world: int, device: str) -> None:
    assert lookup(built(world=world), device, [table(entry(1024, 512, 512))]) is None


def test_lookup_crosses_ranks_where_none_is_near_on_as_many() -> None:
    four = table(entry(1024, 512, 512, 3))
    found = lookup(built(world=8), DEVICE, [four])
    assert found is not None and (found.schedule.group, found.distance) == (3, 1.0)
    assert "on 4 ranks" in found.origin
    eight = replace(four, world=8, entries=(entry(4096, 512, 512, 5),), name="e.json")
    found = lookup(built(world=8), DEVICE, [four, eight])
    assert found is not None and (found.schedule.group, found.distance) == (5, 2.0)
    assert lookup(built(world=32), DEVICE, [four]) is None


def test_new_entries_replace_those_of_their_shape_and_drop_unused_runs() -> None:
    old = table(entry(1024, 512, 512, 3), entry(2048, 512, 512, 3))
    later = Run("b.json", "2026-02-02", {})
    one = old.with_entries([entry(1024, 512, 512, 7)], later)
    assert [(e.extents["M"], e.schedule.group, one.runs[e.run].source) for e in one.entries] == [
        (1024, 7, "b.json"),
        (2048, 3, "a.json"),
    ]
    both = one.with_entries([entry(2048, 512, 512, 9)], later)
    assert [r.source for r in both.runs] == ["b.json"]
    assert parse_table(both.to_json(), "t.json") == both


def test_a_sparse_schedule_is_the_whole_one() -> None:
    schedule = replace(default_schedule(built()), group=4, warps=4)
    sparse = schedule.to_sparse()
    assert "stages" not in sparse
    assert Schedule.from_json(json.dumps(sparse)) == schedule


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: "{", "not JSON"),
        (lambda d: [], "not an object"),
        (lambda d: d | {"color": 1}, "no field `color`"),
        (lambda d: {k: v for k, v in d.items() if k != "key"}, "`key` is missing"),
        (lambda d: d | {"world": "four"}, "`world` is 'four'"),
        (lambda d: d | {"world": True}, "`world` is True"),
        (lambda d: d | {"entries": [d["entries"][0]] * 2}, "there twice"),
        (lambda d: d | {"entries": [d["entries"][0] | {"us": -1}]}, "time of -1"),
        (lambda d: d | {"entries": [d["entries"][0] | {"run": 3}]}, "no run 3"),
        (lambda d: d | {"entries": [d["entries"][0] | {"extents": {"M": 0}}]}, "`M` is 0"),
        (lambda d: d | {"entries": [d["entries"][0] | {"schedule": {"warps": 3}}]}, "`warps`"),
        (lambda d: d | {"entries": [{"us": 1.0}]}, "`extents` is missing"),
    ],
)
def test_a_broken_table_is_refused_by_name(change: object, words: str) -> None:
    data = json.loads(table(entry(1024, 512, 512)).to_json())
    broken = change(data)  # type: ignore[operator]
    text = broken if isinstance(broken, str) else json.dumps(broken)
    with pytest.raises(BadTable, match=words) as caught:
        parse_table(text, "t.json")
    assert "t.json" in str(caught.value)


def test_the_tables_of_the_package_are_as_they_would_be_written() -> None:
    from importlib.resources import files

    tables = load_tables()
    assert tables
    for found in tables:
        text = (files("tilelink.schedules") / "tuned" / found.name).read_text()
        assert found.to_json() == text
        assert found.file_name == found.name


def test_a_call_takes_what_was_tuned_for_it() -> None:
    tuned = load_tables()[0]
    extents = dict(tuned.entries[0].extents)
    op = ag_gemm.build(extents, {}, tuned.world)
    first = next(choices(op, tuned.device))
    assert first.schedule == tuned.entries[0].schedule
    found = compile_chosen(op, None, tuned.device)
    assert Schedule.from_json(found.program["schedule"]) == tuned.entries[0].schedule
    assert found.origin.startswith("tuned")


def test_the_callers_schedule_and_the_knob_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = load_tables()[0]
    op = ag_gemm.build(dict(tuned.entries[0].extents), {}, tuned.world)
    asked = replace(default_schedule(op), group=1)
    found = compile_chosen(op, asked, tuned.device)
    assert (Schedule.from_json(found.program["schedule"]), found.origin) == (asked, "given")
    monkeypatch.setenv("TILELINK_TUNED", "0")
    assert [c.origin for c in choices(op, tuned.device)] == ["default"]


def test_kin_of_a_device_takes_what_was_tuned_there() -> None:
    """Where it has nothing near of its own; that comes first, whatever is tuned nearer on the other."""
    kin = "NVIDIA H100 80GB HBM3"
    assert Machine.kin_of(kin) == (DEVICE,) and Machine.kin_of(DEVICE) == (kin,)
    there = table(entry(1024, 512, 512))
    op = built(1024, 512, 512)
    found = lookup(op, kin, [there])
    assert found is not None and found.table is there and found.distance == 0.0
    own = replace(there, device=kin, entries=(entry(2048, 512, 512),))
    assert lookup(op, kin, [there, own]).table is own  # type: ignore[union-attr]
    assert lookup(op, DEVICE, [own]).table is own  # type: ignore[union-attr]
    assert lookup(op, "NVIDIA H100 PCIe", [there, own]) is None
    # Four of them have a description of their own; of more there is that of the kin.
    four, eight = Machine.of_device(kin, 4), Machine.of_device(kin, 8)
    assert four is not None and (four.name, four.device) == ("h100x4", kin)
    assert eight is not None and eight == Machine.of_device(DEVICE, 8)


def test_unknown_machines_have_the_default() -> None:
    assert [c.origin for c in choices(built(), "Abacus 9000")] == ["default"]


def test_a_product_alone_is_the_same_on_any_number_of_ranks() -> None:
    one, four = (gemm.build({"M": 64, "K": 64, "N": 64}, {}, world) for world in (1, 4))
    assert world_of(one) == world_of(four) == 1
    assert world_of(built(world=4)) == 4
    alone = Table("gemm", kernel_key(four), "bf16", 1, DEVICE, (RUN,), (entry(64, 64, 64),))
    assert lookup(four, DEVICE, [alone]) is not None
    assert lookup(one, DEVICE, [alone]) is not None


def test_a_shape_that_nobody_tuned_is_predicted_the_same_each_time() -> None:
    op = gemm_ar.build({"M": 16, "K": 512, "N": 2048}, {}, 4)
    first, second = (predicted_choices(op, DEVICE) for _ in range(2))
    assert first == second
    assert Machine.of_device(DEVICE, 4) is not None


def test_a_prediction_does_not_step_through_any_number_of_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tilelink.backend.runtime import choose

    def tasks(program: Op) -> int:
        env = environment(program)
        stages = [op for op in program.walk() if op.name == "stage"]
        return sum(int(evaluate(tasks_of_stage(program, s), env, s)) for s in stages)

    # Of slices of 138 rows a box has two, and so a copy as many tasks as a hundred tiles.
    op = gemm_rs.build({"M": 1104, "K": 176, "N": 6416}, {}, 8)
    boxes = Schedule.from_json(
        """{"tiles": {"M": 256, "N": 128, "K": 64}, "group": 4,
            "moves": {"C": {"resource": "sm:4", "copies": "boxes"}}}"""
    )
    default = tasks(run_passes(op))
    assert tasks(run_passes(op, boxes)) > 100 * default
    clocked: list[int] = []

    def clock(program: Op, _: Machine) -> float:
        clocked.append(tasks(program))
        return float(len(clocked))

    monkeypatch.setattr(choose, "predict", clock)
    predicted_choices(op, DEVICE)
    assert default <= max(clocked) < 20 * default


def test_a_schedule_that_does_not_compile_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilelink.backend.runtime import choose

    op = built()
    # No tensor of this kernel is called X, so the passes refuse it.
    wrong = Schedule.from_json('{"moves": {"X": {"resource": "copy_engine"}}}')
    refused = iter([choose.Choice(wrong, "tuned"), choose.Choice(None, "default")])
    monkeypatch.setattr(choose, "choices", lambda *_: refused)
    found = choose.compile_chosen(op, None, DEVICE)
    assert found.origin == "default"
    assert Schedule.from_json(found.program["schedule"]) == default_schedule(op)


# Two groups have half of a tile each: there is no code for that where the last tile of a slice is not full, nor
# the capacity of dynamic rows a multiple of a tile.
HALVES = Schedule.from_json(
    """{"tiles": {"M": 128, "N": 256, "K": 64}, "stages": 4, "emitter": "gluon",
        "moves": {"C": {"resource": "copy_engine", "channels": 4}}}"""
)


@pytest.mark.parametrize(
    ("kernel", "rows", "dynamic"),
    [(gemm_rs, 324, ()), (gemm_rs, 192, ("M",))],
    ids=["slices", "dynamic"],
)
def test_a_schedule_that_cannot_be_emitted_gives_way(
    kernel: Kernel, rows: int, dynamic: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = {"M": rows, "K": 512, "N": 1024}
    op = kernel.build(extents, {}, 2, dynamic=dynamic)
    with pytest.raises(NoRoles):
        compile_chosen(op, HALVES, DEVICE)
    made = Entry(extents, HALVES, 10.0)
    only = table_of(op, made)
    monkeypatch.setattr(tables, "load_tables", lambda: (only,))
    found = compile_chosen(op, None, DEVICE)
    assert "t.json" not in found.origin and found.source


def test_tiles_that_are_cut_keep_their_parts_and_parts_need_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tilelink.backend.runtime import choose

    op = gemm_rs.build({"M": 128, "K": 8192, "N": 2048}, {}, 2)
    cut = Schedule.from_json('{"tiles": {"M": 64, "N": 128, "K": 64}, "split": 2}')
    assert choose._refitted(op, cut, DEVICE) == cut
    monkeypatch.setattr(choose, "_predicted_us", lambda _, s, *__: 10.0 - s.tail)
    full = Schedule.from_json('{"tiles": {"M": 128, "N": 128, "K": 64}, "stages": 6}')
    # The sums of a tile in fp32 do not fit beside six stages.
    assert choose._refitted(op, full, DEVICE).tail == 1
    assert choose._refitted(op, replace(full, stages=4), DEVICE).tail == 3


def test_of_another_shape_the_tail_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilelink.backend.runtime import choose

    op = ag_gemm.build({"M": 1024, "K": 8192, "N": 2048}, {}, 2)
    copied = Schedule.from_json(
        """{"tiles": {"M": 128, "N": 128, "K": 64}, "stages": 6, "emitter": "gluon", "tail": 3,
            "moves": {"A": {"resource": "copy_engine"}}}"""
    )

    def predicted(_: Op, schedule: Schedule, __: Machine, ___: int) -> float:
        return {1: 12.0, 2: 10.0, 3: 11.0}[schedule.tail]

    monkeypatch.setattr(choose, "_predicted_us", predicted)
    for rows, tail in ((1024, 3), (2048, 2)):
        made = Entry({"M": rows, "K": 8192, "N": 2048}, copied, 10.0)
        only = table_of(op, made)
        monkeypatch.setattr(tables, "load_tables", lambda only=only: (only,))
        found = next(c for c in choices(op, DEVICE) if "t.json" in c.origin)
        assert found.schedule == replace(copied, tail=tail)
        assert found.origin.endswith(", tail 2") == (tail != copied.tail)


def test_what_is_predicted_and_cannot_be_emitted_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilelink.backend.runtime import choose

    op = gemm_rs.build({"M": 324, "K": 512, "N": 1024}, {}, 2)
    second = choose.Choice(default_schedule(op), "second")
    both = choose.Choice(HALVES, "first"), second
    monkeypatch.setattr(choose, "predicted_choices", lambda *_: both)
    assert choose.compile_chosen(op, None, "another GPU").origin == "second"


def test_a_prediction_has_the_default_to_beat_where_what_was_tuned_nearby_does_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tilelink.backend.runtime import choose

    op = gemm_rs.build({"M": 324, "K": 512, "N": 1024}, {}, 2)
    nearby = Entry({"M": 512, "K": 512, "N": 1024}, HALVES, 10.0)
    only = table_of(op, nearby)
    monkeypatch.setattr(tables, "load_tables", lambda: (only,))
    seen: list[Schedule | None] = []

    def predicted(_: Op, __: str, near: Schedule | None = None) -> tuple[choose.Choice, ...]:
        seen.append(near)
        return ()

    monkeypatch.setattr(choose, "predicted_choices", predicted)
    assert compile_chosen(op, None, DEVICE).origin == "default"
    assert seen == [None]


@pytest.mark.parametrize(("kernel", "rows"), [(gemm_rs, 128), (gemm_ar, 4096)])
def test_a_prediction_alone_has_no_call_take_what_was_never_measured_to_pay(
    kernel: Kernel, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilelink.backend.runtime import choose

    op = kernel.build({"M": rows, "K": 512, "N": 1024}, {}, 4)

    def predicted(_: Op, schedule: Schedule, __: Machine, ___: int) -> float:
        pulled = any(m.direction == "pull" and not m.spans for _, m in schedule.moves)
        new = pulled or (kernel is gemm_rs and any(m.own != "last" for _, m in schedule.moves))
        return 1.0 if new else 20.0 if schedule.workers == 132 else 30.0

    monkeypatch.setattr(choose, "_predicted_us", predicted)
    near = replace(default_schedule(op), workers=66)
    found = predicted_choices(op, DEVICE, near)
    assert found
    moves = [move for choice in found for _, move in choice.schedule.moves]  # type: ignore[union-attr]
    assert all(move.direction == "push" or move.spans for move in moves)
    assert kernel is gemm_ar or all(move.own == "last" for move in moves)
