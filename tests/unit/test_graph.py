"""The tile dependency graph against regions counted by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import networkx as nx
import pytest

from tilelink import kernels
from tilelink.backend.graph import build_graph
from tilelink.kernel import load_kernels
from tilelink.schedules import Move, Schedule

MAPS = load_kernels(str(Path(__file__).parents[1] / "kernels" / "maps.py"))
EXTENTS = {"M": 64, "N": 48, "K": 32}
WORLD = 4


def schedule(tensor: str, channels: int) -> Schedule:
    """Tiles of 16 and this many channels a source."""
    tiles = tuple((name, 16) for name in "KMN")
    return Schedule(tiles=tiles, workers=4, moves=((tensor, Move(channels=channels)),))


def needs(graph: nx.DiGraph[str], node: str) -> set[str]:
    """What ``node`` reads in the same call."""
    return {u for u, _, kind in graph.in_edges(node, data="kind") if kind == "RAW"}


@pytest.mark.parametrize("channels", (1, 2))
def test_a_gathered_tile_needs_the_channels_that_hold_its_rows(channels: int) -> None:
    m = 32 * WORLD
    op = kernels.ag_gemm.build({**EXTENTS, "M": m}, world=WORLD)
    graph = build_graph(op, schedule("A", channels))
    rows = m // WORLD // channels
    tiles = [(n, d) for n, d in graph.nodes(data=True) if d["kind"] == "compute"]
    assert len(tiles) == WORLD * (m // 16) * 3
    for node, data in tiles:
        lo, hi = data["tile"]["m"]
        expected = {
            f"A[{channel}]:{source}->{data['rank']}"
            for source, channel in product(range(WORLD), range(channels))
            if source != data["rank"]
            and lo < source * (m // WORLD) + (channel + 1) * rows
            and hi > source * (m // WORLD) + channel * rows
        }
        assert needs(graph, node) == expected


def test_a_tile_that_sums_over_the_gathered_axis_needs_every_rank() -> None:
    graph = build_graph(MAPS["ag_over_depth"].build(EXTENTS, world=WORLD), schedule("A", 1))
    tiles = [(n, d) for n, d in graph.nodes(data=True) if d["kind"] == "compute"]
    assert len(tiles) == WORLD * 4 * 3
    for node, data in tiles:
        others = {f"A[0]:{s}->{data['rank']}" for s in range(WORLD) if s != data["rank"]}
        assert needs(graph, node) == others


def test_a_sum_needs_every_rank_and_its_own_tile() -> None:
    graph = build_graph(kernels.gemm_rs.build(EXTENTS, world=WORLD), schedule("C", 1))
    sums = [(n, d) for n, d in graph.nodes(data=True) if n.startswith("C.sum[")]
    assert len(sums) == WORLD * 3
    for node, data in sums:
        found = needs(graph, node)
        rank = data["rank"]
        assert {u for u in found if "->" in u} == {
            f"C[0]:{s}->{rank}" for s in range(WORLD) if s != rank
        }
        own = [u for u in found if "->" not in u]
        assert len(own) == 1 and own[0].endswith(f"@{rank}")
        assert list(graph.nodes[own[0]]["tile"].values()) == list(data["tile"].values())


@pytest.mark.parametrize("kernel", ("ag_gemm", "gemm_rs", "gemm_ar"))
def test_one_call_has_no_cycle(kernel: str) -> None:
    graph = build_graph(getattr(kernels, kernel).build(EXTENTS, world=WORLD))
    call = nx.DiGraph((u, v) for u, v, kind in graph.edges(data="kind") if kind == "RAW")
    assert nx.is_directed_acyclic_graph(call)


@pytest.mark.parametrize(("kernel", "shots"), [("gemm_rs", None), ("gemm_ar", 2)])
def test_an_own_tile_that_sums_in_its_epilogue_needs_the_parts_of_all_others(
    kernel: str, shots: int | None
) -> None:
    op = getattr(kernels, kernel).build({**EXTENTS, "M": 32 * WORLD}, world=WORLD)
    tiles = tuple((name, 16) for name in "KMN")
    move = Move("epilogue", channels=2, sum="epilogue", shots=shots)
    graph = build_graph(op, Schedule(tiles=tiles, workers=4, moves=(("C", move),)))
    own = [(n, d) for n, d in graph.nodes(data=True) if n.startswith("C.own")]
    assert len(own) == WORLD * 2 * 3
    for node, data in own:
        rank, channel = data["rank"], data["tile"]["m.own"][0] % 32 // 16
        others = [source for source in range(WORLD) if source != rank]
        assert needs(graph, node) == {f"C[{channel}]:{source}->{rank}" for source in others}
        sent = {v for _, v, kind in graph.out_edges(node, data="kind") if kind == "RAW"}
        told = {f"C.summed[{channel}]:{rank}->{target}" for target in others}
        assert {v for v in sent if "->" in v} == (told if shots == 2 else set())
