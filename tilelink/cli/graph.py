"""``tilelink graph``: the tile dependency graph as text, Graphviz, JSON or a drawing."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from tilelink.cli import table
from tilelink.cli.options import add_common, add_output, writing
from tilelink.cli.source import Unit, load

if TYPE_CHECKING:
    import networkx as nx

FORMATS = ("text", "dot", "json", "svg")
FIRST_EDGES = 12


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "graph",
        help="print the tile dependency graph",
        description="Print the graph of communication tiles and compute tiles of all ranks: "
        "an edge where one needs what the other writes (RAW), or where the next call must not "
        "overwrite what this one reads (WAR).",
    )
    parser.set_defaults(execute=writing(execute))
    add_common(parser)
    add_output(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")


def execute(args: argparse.Namespace) -> int:
    """Prints the graph of each kernel."""
    from tilelink.backend.graph import build_graph

    write = {"text": as_text, "dot": as_dot, "json": as_json, "svg": as_svg}[args.format]
    for unit in load(args):
        print(write(unit, build_graph(unit.kernel("graph"), unit.schedule(args))))
    return 0


def as_text(unit: Unit, graph: nx.DiGraph[str]) -> str:
    """Counts of nodes and edges by kind, then the first edges."""
    nodes = Counter(data["kind"] for _, data in graph.nodes(data=True))
    edges = Counter(data["kind"] for _, _, data in graph.edges(data=True))
    rows = [(f"{kind} tiles", f"{count:,}") for kind, count in sorted(nodes.items())]
    rows += [(f"{kind} edges", f"{count:,}") for kind, count in sorted(edges.items())]
    lines = [f"{unit.name}: world {unit.world}", table.pairs(rows)]
    shown = ordered_edges(graph)[:FIRST_EDGES]
    if shown:
        lines.append(f"first {table.number(len(shown), 'edge')}")
        lines += [
            f"  {label(graph, a)} -> {label(graph, b)}  {graph.edges[a, b]['kind']}"
            for a, b in shown
        ]
    return "\n".join(lines)


def as_dot(unit: Unit, graph: nx.DiGraph[str]) -> str:
    """Graphviz input; edges to the next call are dashed."""
    lines = [f'digraph "{unit.name}" {{', "  rankdir=LR; node [shape=box];"]
    for node in ordered_nodes(graph):
        shape = "ellipse" if graph.nodes[node]["kind"] == "transfer" else "box"
        lines.append(f'  "{node}" [label="{label(graph, node)}", shape={shape}];')
    for a, b in ordered_edges(graph):
        style = ", style=dashed" if graph.edges[a, b].get("call") else ""
        lines.append(f'  "{a}" -> "{b}" [label="{graph.edges[a, b]["kind"]}"{style}];')
    return "\n".join([*lines, "}"])


def as_json(unit: Unit, graph: nx.DiGraph[str]) -> str:
    """``{"name", "world", "nodes": [{"id", …}], "edges": [{"from", "to", …}]}``."""
    nodes = [{"id": node, **graph.nodes[node]} for node in ordered_nodes(graph)]
    edges = [{"from": a, "to": b, **graph.edges[a, b]} for a, b in ordered_edges(graph)]
    return json.dumps(
        {"name": unit.name, "world": unit.world, "nodes": nodes, "edges": edges}, indent=1
    )


def as_svg(unit: Unit, graph: nx.DiGraph[str]) -> str:
    """A drawing: a column for each level of this call's edges, which run from left to right."""
    import networkx as nx

    call = nx.DiGraph()
    call.add_nodes_from(ordered_nodes(graph))
    call.add_edges_from(edge for edge in ordered_edges(graph) if not graph.edges[edge].get("call"))
    # A character of the 10 px monospace font is 6 px wide.
    width = 10 + max((6 * len(label(graph, node)) for node in call), default=0)
    height, gap = 16, 90
    place: dict[str, tuple[int, int]] = {}
    levels = list(nx.topological_generations(call))
    for column, level in enumerate(levels):
        for row, node in enumerate(sorted(level, key=lambda node: graph.nodes[node]["order"])):
            place[node] = (10 + column * (width + gap), 30 + row * (height + 4))
    right = 20 + len(levels) * (width + gap)
    bottom = 40 + max((len(level) for level in levels), default=0) * (height + 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{bottom}" '
        'font-family="monospace" font-size="10" style="background: white">',
        f'<text x="10" y="18">{escape(unit.name)}: world {unit.world}</text>',
    ]
    for a, b in call.edges:
        (x1, y1), (x2, y2) = place[a], place[b]
        parts.append(
            f'<line x1="{x1 + width}" y1="{y1 + height // 2}" x2="{x2}" y2="{y2 + height // 2}" '
            'stroke="#999" stroke-width="0.5"/>'
        )
    for node, (x, y) in place.items():
        fill = "#dbe9ff" if graph.nodes[node]["kind"] == "compute" else "#ffe7c2"
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"/>')
        parts.append(f'<text x="{x + 3}" y="{y + 11}">{escape(label(graph, node))}</text>')
    return "\n".join([*parts, "</svg>"])


def label(graph: nx.DiGraph[str], node: str) -> str:
    """The node's name, with the tile for a compute tile."""
    tile = graph.nodes[node].get("tile") or {}
    return " ".join([node, *(f"{name}={lo}..{hi}" for name, (lo, hi) in tile.items())])


def ordered_nodes(graph: nx.DiGraph[str]) -> list[str]:
    """Nodes in the order in which the graph was built."""
    return sorted(graph, key=lambda node: graph.nodes[node]["order"])


def ordered_edges(graph: nx.DiGraph[str]) -> list[tuple[str, str]]:
    """Edges by the order of their ends."""
    order = {node: data["order"] for node, data in graph.nodes(data=True)}
    return sorted(graph.edges, key=lambda edge: (order[edge[0]], order[edge[1]]))
