"""Calls of many lengths through the whole host path of a GPU rank, with GPU, peers and driver replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.collectives import Group
from tilelink import kernels
from tilelink.backend.runtime import cuda, order, plan, site
from tilelink.backend.runtime.errors import BadArgument, TooLargeForSM
from tilelink.backend.runtime.views import Rows
from tilelink.errors import TilelinkError
from tilelink.frontend.errors import NotDivisible
from tilelink.schedules import Move, Schedule

WORLD = 2


class Driver:
    """Counts what is enqueued."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ends: dict[int, int] = {}  # of allocations, by the last byte of what lies in them

    def end_of(self, address: int) -> int:
        return self.ends.get(address, 0)

    def event(self) -> Any:
        return SimpleNamespace(handle=1)

    def record(self, *_: int) -> None:
        self.calls.append(("record",))

    def wait_event(self, stream: int, event: int) -> None:
        self.calls.append(("wait event",) if event < 1000 else ("follow", stream, event - 1000))

    def wait_geq(self, stream: int, address: int, value: int) -> None:
        self.calls.append(("wait", value))

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        self.calls.append(("copy", size))

    def resident(self, *_: int) -> int:
        return 1

    def capture(self, stream: int, enqueue: Callable[[int], None]) -> Any:
        enqueue(stream)
        return SimpleNamespace(handle=2)

    def launch_graph(self, graph: int, stream: int) -> None:
        self.calls.append(("graph",))


class State:
    """Rank 0 of two, whose agreements are counted and always reached."""

    def __init__(self, driver: Driver) -> None:
        self.device = torch.device("cpu")
        self.rank, self.world, self.group, self.host_address = 0, WORLD, None, 0
        self.driver = driver
        self.agreed: list[dict[str, str]] = []
        self.images: list[Any] = []
        self.limits: list[tuple[float, float]] = []
        self.errors: list[TilelinkError] = []

    def check_usable(self) -> None:
        return

    def number_of(self, image: Any) -> int:
        self.images.append(image)
        self.limits.append((len(self.images), 600.0))
        return len(self.images)

    def workspace_for(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def arena_for(self, size: int, slots: int) -> Any:
        views = [torch.zeros(size, dtype=torch.uint8) for _ in range(WORLD)]
        addresses = [view.data_ptr() for view in views]
        return SimpleNamespace(views=views, addresses=addresses, peers=torch.tensor(addresses))

    def agree(self, kernel: str, facts: dict[str, str], error: Any, least: float = 0.0) -> None:
        self.agreed.append(facts)
        if error is not None:
            self.errors.append(error)

    def refuse(self, kernel: str, error: TilelinkError) -> None:
        self.errors.append(error)

    def mark(self, stream: int) -> int:
        return 1000 + stream

    def stream(self, name: str) -> Any:
        return SimpleNamespace(cuda_stream=7)

    def spare(self) -> Any:
        return SimpleNamespace(cuda_stream=5)

    def note_call(self, apart: bool, collectives: bool, stream: int) -> None:
        return


class Launched:
    """Kernels that were launched: names, workers and integer arguments."""

    def __init__(self) -> None:
        self.recorded: list[tuple[str, tuple[int, ...]]] = []
        self.boxes: list[tuple[int, ...]] = []  # rows of descriptors of matrices

    def compile(self, kernel: Any, workers: int, args: tuple[Any, ...], **_: Any) -> Any:
        numbers = tuple(a for a in args if isinstance(a, int) and not isinstance(a, bool))
        self.recorded.append((kernel.fn.__name__, numbers))
        self.boxes.append(tuple(int(a.shape[0]) for a in args if hasattr(a, "block_shape")))
        compiled = SimpleNamespace(
            run=None,
            function=0,
            n_regs=0,
            metadata=SimpleNamespace(num_warps=8, shared=0),
        )
        return SimpleNamespace(run=lambda *_: None, compiled=compiled, workers=workers)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> tuple[State, Driver, Launched]:
    driver, launched = Driver(), Launched()
    state = State(driver)
    for module in (cuda, plan):
        monkeypatch.setattr(module, "driver", lambda: driver)
    for module in (cuda, site):
        monkeypatch.setattr(module, "state_of", lambda group: state)
    monkeypatch.setattr(plan, "compile_launch", launched.compile)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 3, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = SimpleNamespace(name="no known GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for kept in ("_kernels", "_programs"):
        monkeypatch.setattr(cuda, kept, {})
    monkeypatch.setattr(order, "_orders", {})
    monkeypatch.setattr(order, "driver", lambda: driver)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    return state, driver, launched


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.bfloat16)


def test_a_trace_compiles_and_agrees_a_capacity_at_a_time(
    rank: tuple[State, Driver, Launched],
) -> None:
    state, driver, launched = rank
    call = kernels.ag_gemm.on(dynamic=("M",), schedule=Schedule(moves=(("A", Move()),)))
    b = matrix(32, 64)
    for rows in (2, 60, 64, 66, 500, 128, 40, 512, 4):
        a = matrix(rows // WORLD, 32)
        del driver.calls[:]
        assert call(a, b).shape == (rows, 64)
        copied = [size for kind, *rest in driver.calls if kind == "copy" for size in rest]
        assert copied == [rows // WORLD * 32 * 2, 4], rows
    assert call.compilations == 3  # 16, 128 and 512
    assert len(state.agreed) == 2 * 3  # what it is, and that every rank has compiled
    assert [image.dynamic["M"] for image in state.images] == [16, 128, 512]
    assert [image.least["M"] for image in state.images] == [2, 18, 258]
    # A call of a length that has been there is a lookup.
    known = len(launched.recorded)
    out = matrix(60, 64)
    for _ in range(plan.HOT + 2):
        a = matrix(30, 32) if _ == 0 else a
        call(a, b, out)
    assert len(launched.recorded) == known + 2 and driver.calls[-1] == ("graph",)


def test_what_ran_is_told_with_what_gave_way_to_it(
    rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call, a, b = kernels.ag_gemm.on(world=WORLD), matrix(32, 32), matrix(32, 64)
    meet, tried = cuda._meet, []

    def too_large(*args: Any) -> Any:
        tried.append(args)
        if len(tried) == 1:
            args[2]()
            raise TooLargeForSM(kernel="ag_gemm", required=300, resource="shared", limit=200)
        return meet(*args)

    monkeypatch.setattr(cuda, "_meet", too_large)
    assert call(a, b).shape == (64, 64)
    for _ in range(2):
        found = call.explain(a, b)
        assert found.origin == "default" and found.extents["M"] == 64
        origin, why = found.refused[-1]
        assert origin and "needs 300 of shared" in why
        call(a, b)
    # Another shape has not run: it is chosen here, and nothing is agreed.
    agreed = len(rank[0].agreed)
    assert call.explain(matrix(64, 32), b).extents["M"] == 128
    assert len(rank[0].agreed) == agreed


def test_descriptors_reach_behind_an_input_as_far_as_its_memory_does(
    rank: tuple[State, Driver, Launched],
) -> None:
    _, driver, launched = rank
    moves = (("C", Move("epilogue", slots=2, signal="sentinel")),)
    tiles = (("K", 64), ("M", 64), ("N", 64))
    call = kernels.gemm_rs.on(dynamic={"M": 256}, schedule=Schedule(tiles=tiles, moves=moves))
    a, b, out = matrix(70, 64), matrix(64, 128), matrix(35, 128)
    pitch, end = 64 * 2, a.data_ptr() + 70 * 64 * 2
    rows: list[int] = []
    # Nothing known, nothing there, part of a row, seven rows, more than a box reaches; then less than before.
    for left in (None, 0, pitch - 1, 7 * pitch, 1000 * pitch, 7 * pitch):
        if left is not None:
            driver.ends[end - 1] = end + left
        call(a, b, out)
        rows.append(max(launched.boxes[-1]))
    assert rows == [70, 70, 70, 77, 70 + 255, 70 + 255]  # the last one is known
    plans = len(launched.recorded)
    driver.ends[end - 1] = end
    call(a, b, out)
    assert len(launched.recorded) == plans
    # Other memory at the same address, with less behind it, has a plan of its own.
    driver.ends[end - 1] = end + 8 * pitch
    call(a, b, out)
    assert len(launched.recorded) == plans + 1 and 78 in launched.boxes[-1]


def test_rows_behind_one_row_are_as_far_apart_as_it_is_long(
    rank: tuple[State, Driver, Launched],
) -> None:
    """One row of a wider matrix is contiguous, whatever its stride is."""
    _, driver, _ = rank
    whole = torch.zeros(10, 192, dtype=torch.bfloat16)
    row, end = whole[6:7, :64], whole.data_ptr() + whole.numel() * 2
    assert row.is_contiguous() and row.stride(0) == 192
    driver.ends[row.data_ptr() + 64 * 2 - 1] = end
    behind = plan.rows_behind(row)
    reached = Rows(row, 1 + behind)
    last = reached.data_ptr() + ((reached.shape[0] - 1) * reached.stride()[0] + 64) * 2
    assert behind == 11 and end - 64 * 2 < last <= end


@pytest.mark.parametrize("kernel", [kernels.ag_gemm, kernels.gemm_rs, kernels.gemm_ar])
def test_calls_of_the_library_alone_need_nothing_of_the_runtime(
    kernel: Any, rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, driver, launched = rank

    def unwanted(*_: Any) -> Any:
        raise AssertionError("an arena, or a stream of the runtime's")

    for name in ("arena_for", "stream", "spare"):
        monkeypatch.setattr(state, name, unwanted)
    made: list[str] = []
    group = Group(
        gather=lambda target, _: made.append("gather"),
        scatter=lambda target, _: made.append("scatter"),
        reduce=lambda _: made.append("reduce"),
    )
    monkeypatch.setattr(state, "group", group)
    moved = "A" if kernel is kernels.ag_gemm else "C"
    call = kernel.on(schedule=Schedule(emitter="library", moves=((moved, Move("none")),)))
    a, b = matrix(16, 32), matrix(32, 64)
    out = call(a, b)
    for count in range(2, plan.HOT + 3):
        call(a, b, out)
        assert len(made) == count
    assert driver.calls == [] and launched.recorded == []
    # Its ranks have agreed to it all the same, without the output and with it.
    assert len(state.agreed) == 2 * 2


@pytest.mark.parametrize("given", [False, True])
def test_a_call_with_one_tensor_twice_says_nothing_of_a_call_with_two(
    given: bool, rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library alone is called with is found by name, and both names stood for one tensor at first."""
    monkeypatch.setattr(rank[0], "group", Group(reduce=lambda _: None))
    schedule = Schedule(emitter="library", moves=(("C", Move("none")),))
    call = kernels.gemm_ar.on(schedule=schedule)
    memory = torch.randint(-3, 4, (6, 16, 16)).bfloat16()
    a, b = memory[0], memory[2]
    inside = memory[3:5].view(32, 16)[8:24]
    for left, right in ((a, a), (memory[3], inside), (a, b), (b, a), (b, b), (inside, memory[4])):
        for _ in range(2):
            out = (matrix(16, 16),) if given else ()
            assert torch.equal(call(left, right, *out), left @ right)


def test_all_calls_of_a_program_have_the_limits_of_its_first(
    rank: tuple[State, Driver, Launched],
) -> None:
    _, _, launched = rank
    call = kernels.gemm_ar.on(schedule=Schedule(moves=(("C", Move()),)))
    kept: list[torch.Tensor] = []
    for depth, seconds in ((32, 1), (64, 2), (32, 1), (64, 2)):
        del launched.recorded[:]
        kept += matrix(48, depth), matrix(depth, 64)
        kept.append(call(*kept[-2:]))
        found = [numbers for name, numbers in launched.recorded if name == "gemm_ar"]
        assert found
        assert all(seconds * 10**9 in n and 600 * 10**9 in n for n in found)


def test_a_length_that_ranks_cannot_share_is_told_to_them(
    rank: tuple[State, Driver, Launched],
) -> None:
    state, _, _ = rank
    call = kernels.gemm_rs.on(dynamic=("M",), schedule=Schedule(moves=(("C", Move()),)))
    with pytest.raises(NotDivisible, match="not a multiple of the number of ranks, 2"):
        call(matrix(7, 32), matrix(32, 64))
    assert [type(error) for error in state.errors] == [NotDivisible]
    assert call(matrix(8, 32), matrix(32, 64)).shape == (4, 64)


def test_an_output_of_another_length_is_refused(rank: tuple[State, Driver, Launched]) -> None:
    state, _, _ = rank
    call = kernels.gemm_ar.on(dynamic=("M",), schedule=Schedule(moves=(("C", Move()),)))
    call(matrix(48, 32), matrix(32, 64), matrix(48, 64))
    with pytest.raises(TilelinkError, match="48"):
        call(matrix(40, 32), matrix(32, 64), matrix(48, 64))
    assert len(state.errors) == 1
    unaligned = torch.zeros(40 * 32 + 1, dtype=torch.bfloat16)[1:].view(40, 32)
    with pytest.raises(TilelinkError, match="16 bytes"):
        call(unaligned, matrix(32, 64))


def test_an_emitted_module_takes_the_lengths_it_was_proven_for(
    rank: tuple[State, Driver, Launched],
) -> None:
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import compile_kernel
    from tilelink.backend.runtime import load_module, write_module

    op = kernels.gemm_ar.build({"M": 64, "K": 32, "N": 64}, world=WORLD, dynamic=("M",))
    module = load_module(write_module(emit(compile_kernel(op)), "gemm_ar"))
    for rows in (64, 5):
        (out,) = cuda.run_program(module.TEXT, module.host, [matrix(rows, 32), matrix(32, 64)], {})
        assert out.shape == (rows, 64)
    with pytest.raises(BadArgument, match="is 65, the program is for 1 to 64"):
        cuda.run_program(module.TEXT, module.host, [matrix(65, 32), matrix(32, 64)], {})


def test_scalars_of_an_emitted_module_are_known_by_name(
    rank: tuple[State, Driver, Launched],
) -> None:
    """In whatever order a call names them, and as what the program has them."""
    text = """
program @scaled {world = 2} do {
  extent @M {value = 16}
  scalar @alpha {dtype = "fp32"}
  scalar @count {dtype = "int32"}
  tensor @X {dims = [M], dtype = "fp32", move = "local", role = "in"}
  head do { }
}
"""
    recorded: list[tuple[Any, ...]] = []

    def host(call: Any) -> None:
        call.head()
        recorded.append((call.scalar("alpha"), call.scalar("count")))

    x = torch.zeros(16)
    for numbers in (
        {"alpha": 2.0, "count": 3},
        {"count": 2, "alpha": 3.0},
        {"alpha": 3, "count": 2.0},
    ):
        cuda.run_program(text, host, [x], numbers)
    assert recorded == [(2.0, 3), (3.0, 2)]
    assert [type(value) for value in recorded[1]] == [float, int]
    for wrong, why in (({"alpha": 2.0}, "is missing"), ({"alpha": 2.0, "count": 2.5}, "is 2.5")):
        with pytest.raises(BadArgument, match=f"argument `count`: {why}"):
            cuda.run_program(text, host, [x], wrong)


def test_scalars_are_told_apart_by_their_bits(rank: tuple[State, Driver, Launched]) -> None:
    """Zeros of both signs are two numbers, and what is not a number is one."""
    text = """
program @scaled {world = 2} do {
  extent @M {value = 16}
  scalar @alpha {dtype = "fp32"}
  tensor @X {dims = [M], dtype = "fp32", move = "local", role = "in"}
  head do { }
}
"""
    recorded: list[str] = []

    def host(call: Any) -> None:
        call.head()
        recorded.append(str(call.scalar("alpha")))

    x = torch.zeros(16)
    for _ in range(2):
        for alpha in (0.0, -0.0, float("nan"), 1.0, float("inf")):
            cuda.run_program(text, host, [x], {"alpha": alpha})
    assert recorded == ["0.0", "-0.0", "nan", "1.0", "inf"]


def test_an_edited_kernel_of_the_same_program_is_another_one(
    rank: tuple[State, Driver, Launched],
) -> None:
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import compile_kernel
    from tilelink.backend.runtime import load_module, write_module

    state, _, _ = rank
    source = emit(compile_kernel(kernels.gemm_ar.build({"M": 64, "K": 32, "N": 64}, world=WORLD)))
    edited = source.replace("def host(call):\n", "def host(call):\n    hosts.append(call)\n")
    hosts: list[object] = []
    modules = [load_module(write_module(text, "gemm_ar")) for text in (source, edited)]
    modules[1].hosts = hosts  # type: ignore[attr-defined]
    inputs = [matrix(64, 32), matrix(32, 64)]
    for module in (*modules, *modules):
        cuda.run_program(module.TEXT, module.host, inputs, {})
    assert hosts  # what was recorded for the intact kernel does not stand for it
    first, second = (f["emitted source"] for f in state.agreed if "emitted source" in f)
    assert first != second and all((first, second))


def test_a_kernel_that_needs_more_shared_memory_than_there_is_has_an_error_of_its_own(
    rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    from tilelink.backend.runtime.errors import TooLargeForSM

    def compile_launch(*_: object, **__: object) -> None:
        raise OutOfResources(262144, 232448, "shared memory")

    monkeypatch.setattr(plan, "compile_launch", compile_launch)
    call = kernels.gemm_ar.on(schedule=Schedule(stages=6, moves=(("C", Move()),)))
    with pytest.raises(TooLargeForSM, match="262144 of shared memory, and there are 232448"):
        call(matrix(48, 32), matrix(32, 64))
    assert [type(error) for error in rank[0].errors] == [TooLargeForSM]


def test_a_schedule_that_nobody_asked_for_gives_way_where_it_does_not_fit(
    rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    from tilelink.backend.runtime.errors import TooLargeForSM

    fits, tried = plan.compile_launch, []

    def compile_launch(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        if len(tried) == 1:
            raise OutOfResources(262144, 232448, "shared memory")
        return fits(*args, **kwargs)

    monkeypatch.setattr(plan, "compile_launch", compile_launch)
    assert kernels.gemm_ar.on()(matrix(48, 32), matrix(32, 64)).shape == (48, 64)
    assert [type(error) for error in rank[0].errors] == [TooLargeForSM] and len(tried) > 1


def test_calls_of_several_threads_come_one_behind_the_other(
    rank: tuple[State, Driver, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever streams: a stream waits for the last call of all, which has been enqueued by then."""
    _, driver, _ = rank
    local = threading.local()
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: local.stream, raising=False
    )
    call = kernels.ag_gemm.on(schedule=Schedule(moves=(("A", Move()),)))
    a, b = matrix(32, 32), matrix(32, 64)
    local.stream = 3
    call(a, b)
    copy = driver.copy

    def slowly(stream: int, target: int, source: int, size: int) -> None:
        time.sleep(0.02)
        copy(local.stream, target, source, size)
        driver.calls[-1] = ("by", local.stream)

    monkeypatch.setattr(driver, "copy", slowly)

    def run(stream: int) -> None:
        local.stream = stream
        for _ in range(3):
            call(a, b)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = 3
    for kind, *rest in driver.calls:
        if kind == "follow":
            stream, behind = rest
            assert behind == last != stream
            last = stream
        elif kind == "by":
            assert rest == [last]
    assert last in (4, 5)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_was_enqueued_in_part_is_waited_for_by_nobody(
    rank: tuple[State, Driver, Launched],
    monkeypatch: pytest.MonkeyPatch,
    problem: type[BaseException],
) -> None:
    state, driver, _ = rank
    stopped: list[str] = []
    monkeypatch.setattr(cuda, "Arena", SimpleNamespace)
    monkeypatch.setattr(
        state, "cut_short", lambda image, arena: stopped.append(image.name), raising=False
    )
    call = kernels.ag_gemm.on(schedule=Schedule(moves=(("A", Move()),)))
    a, b = matrix(32, 32), matrix(32, 64)
    call(a, b)

    def broken(*_: int) -> None:
        raise problem

    monkeypatch.setattr(driver, "copy", broken)
    with pytest.raises(problem):
        call(a, b)
    assert stopped == ["ag_gemm"]
