"""Copies shared by several side streams: the same values, and who has which channel or peer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.test_shots import whole_numbers
from tilelink import kernels
from tilelink.backend.pipeline import run_passes
from tilelink.ir import Expr, Op, parse_ir, print_ir
from tilelink.ir.check import check_types
from tilelink.schedules import Move, Schedule

TENSOR = {"ag_gemm": "A", "gemm_rs": "C", "gemm_ar": "C"}


def schedule(kernel: str, tile: int, **move: int | None) -> Schedule:
    """Tiles of ``tile``, and a move by copy engine."""
    tiles = tuple((name, tile) for name in "KMN")
    return Schedule(tiles=tiles, workers=5, moves=((TENSOR[kernel], Move(**move)),))  # type: ignore[arg-type]


def streams_of(kernel: str, world: int, **move: int) -> dict[str, Op]:
    """The side streams of a program of 16 rows and a channel of 8 rows a rank at most."""
    op = getattr(kernels, kernel).build({"M": 16 * world, "K": 8, "N": 8}, world=world)
    made = schedule(kernel, 8, **move)
    return {op.symbol: op for op in run_passes(op, made).find("stream")}


@pytest.mark.parametrize("backend", ["simulate", "interpret"])
@given(data=st.data())
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
def test_several_streams_give_the_bits_of_the_reference(backend: str, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from((2, 3, 4)))
    kernel = data.draw(st.sampled_from(sorted(TENSOR)))
    streams = data.draw(st.integers(2, 4))
    channels = data.draw(st.sampled_from((None, 1, 2, 3)))
    m, n = world * data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    a, b = whole_numbers(world, m // world if kernel == "ag_gemm" else m, 24, n)
    one = getattr(kernels, kernel)
    chosen = schedule(kernel, 16, streams=streams, channels=channels)
    got = one.on(backend, world=world, schedule=chosen)(a, b)
    for mine, right in zip(got, one.on("reference", world=world)(a, b), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("kernel", sorted(TENSOR))
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_text_is_read_back_and_has_no_name_twice(kernel: str, channels: int) -> None:
    op = getattr(kernels, kernel).build({"M": 128, "K": 8, "N": 8}, world=4)
    program = run_passes(op, schedule(kernel, 8, channels=channels, streams=2))
    check_types(program)
    assert parse_ir(print_ir(program)) == program


@pytest.mark.parametrize("kernel", sorted(TENSOR))
def test_streams_share_channels_where_their_number_divides_and_else_peers(kernel: str) -> None:
    assert sorted(streams_of(kernel, 4, channels=2, streams=1)) == [f"{TENSOR[kernel]}.copy"]
    by_channel = streams_of(kernel, 4, channels=2, streams=2)
    by_peer = streams_of(kernel, 4, channels=1, streams=2)
    assert len(by_channel) == len(by_peer) == 2

    def pairs(streams: dict[str, Op]) -> list[list[tuple[int, int]]]:
        found = []
        for stream in streams.values():
            loops = [op for op in stream.walk() if op.name == "for_range"]
            notify = next(op for op in stream.walk() if op.name == "notify")
            assert notify.ref is not None and isinstance(notify.ref.index[1], Expr)
            env = [{"RANK": 0, "WORLD": 4}]
            for loop in loops:
                env = [
                    {**e, loop.args[0].name: i}
                    for e in env
                    for i in range(int(loop["lo"]), int(Expr.of(loop["hi"]).evaluate(e)))
                ]
            channel = notify.ref.index[1]
            found.append([(int(notify["peer"].evaluate(e)), int(channel.evaluate(e))) for e in env])
        return found

    for streams, split in ((by_channel, 1), (by_peer, 0)):
        first, second = pairs(streams)
        assert not {p[split] for p in first} & {p[split] for p in second}
        channels = 2 if split else 1
        assert sorted(first + second) == [(p, c) for p in (1, 2, 3) for c in range(channels)]
