"""``tilelink report``: all that is known of a kernel before it runs, as one page for a browser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from tilelink import __version__
from tilelink.cli import check, graph, table
from tilelink.cli.options import add_common, add_output, writing
from tilelink.cli.patience import patience
from tilelink.cli.source import Unit, load, machine_of

if TYPE_CHECKING:
    from tilelink.backend.simulate.timeline import Timeline

COLUMNS = 640  # of a timeline: what is shorter than a column is drawn with its neighbours
NODES = 300  # of a graph, at most: a drawing of more shows nothing
STYLE = """\
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
pre { font: 12.5px/1.45 ui-monospace, monospace; overflow-x: auto; padding: .8rem; background: var(--soft); }
table { border-collapse: collapse; margin: .8rem 0; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg text { font: 11px ui-monospace, monospace; fill: currentColor; }
svg.graph text { fill: black; }
.scroll { overflow-x: auto; }
.legend span { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; vertical-align: -.1em; }
.sync { font-weight: bold; }
"""
COMPUTE, SUM, WAIT = "#4c78a8", "#f2cf5b", "#8884"
# Of ranks: the blocks of rows that are theirs, and the copies that go to them.
RANKS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#7f7f7f")
_SYNC = re.compile(r"^(\s*)(wait|notify|acknowledge|flush)\b", re.MULTILINE)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="write a page with proof, timeline, IR and source of a kernel",
        description="Write one page of HTML, which needs nothing else: what was compiled and under which "
        "schedule, what is proven, the predicted timeline of every rank with its bounds, the tile dependency "
        "graph, the fused IR and the emitted source. Times are predictions of a machine model.",
    )
    parser.set_defaults(execute=writing(execute))
    add_common(parser)
    add_output(parser)


def execute(args: argparse.Namespace) -> int:
    """Prints the page; a program that is refused raises, with the witness."""
    units = load(args)
    title = ", ".join(unit.name for unit in units)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>{escape(title)}: tilelink report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
    ]
    for unit in units:
        parts += _unit(unit, args)
    parts += [_listing("Source", args.text), f"<p>tilelink {__version__}</p>\n</body>\n</html>"]
    print("\n".join(parts))
    return 0


def _unit(unit: Unit, args: argparse.Namespace) -> Iterator[str]:
    """The sections of one kernel."""
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.simulate import timeline
    from tilelink.backend.verify import verify
    from tilelink.ir import print_ir

    program = check.unproven(unit, args)
    report = verify(program, None if unit.fused else unit.op)
    shape = " ".join(f"{op.symbol}={op['value']}" for op in unit.op.find("extent"))
    with patience(f"{unit.name}: predicting the tiles of {unit.world} ranks of {shape}"):
        predicted = timeline(program, machine_of(args.target))
    yield f"<h1>{escape(unit.name)}</h1>"
    yield _table(
        [
            ("shape", shape),
            ("ranks", str(unit.world)),
            ("predicted", predicted.summary()),
            ("a call", check.counts_of(report)),
            ("workspace", f"{table.size(report.workspace_bytes)} a rank"),
        ]
    )
    if not unit.fused:
        yield _listing("Schedule", unit.schedule(args).to_json())
    yield "<h2>Proof</h2>\n<p>It cannot hang, race or read the wrong tile:</p>"
    yield _table([(rule, check.MEANING[rule]) for rule in report.rules])
    yield "<p>What that assumes:</p>\n<ul>"
    yield from (f"<li>{escape(text)}</li>" for text in report.assumptions)
    yield "</ul>"
    yield from _times(predicted)
    if not unit.fused:
        yield _graph(unit, args)
    # What it was made from stands in sections of its own.
    fused = program.with_attrs(kernel_text=None, schedule=None)
    yield _listing("Fused program", print_ir(fused), highlight=True)
    yield _listing("Emitted source", emit(program))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return "\n".join(["<table>", *cells, "</table>"])


def _listing(title: str, text: str, highlight: bool = False) -> str:
    """A text that is folded up where it is long; ``highlight``: its lines of synchronisation."""
    shown = escape(text.rstrip("\n"))
    if highlight:
        shown = _SYNC.sub(r'\1<span class="sync">\2</span>', shown)
    lines = text.count("\n")
    state = " open" if lines <= 24 else ""
    summary = f"{table.number(lines, 'line')}"
    return (
        f"<h2>{escape(title)}</h2>\n<details{state}><summary>{summary}</summary>\n"
        f"<pre>{shown}</pre>\n</details>"
    )


# The timeline -------------------------------------------------------------------------------------


def _times(predicted: Timeline) -> Iterator[str]:
    """Bounds, the timeline of each rank and the critical path."""
    yield "<h2>Predicted timeline</h2>"
    yield _bounds(predicted)
    yield _legend(predicted.world)
    for rank in range(predicted.world):
        state = " open" if rank == 0 else ""
        yield f"<details{state}><summary>rank {rank}</summary>"
        yield _lanes(predicted, rank)
        yield "</details>"
    steps = predicted.critical_path()
    yield "<h2>Critical path</h2>\n<table>"
    yield "<tr><th>from, us</th><th>to, us</th><th>on</th><th>with, us</th></tr>"
    for step in steps:
        parts = ", ".join(f"{kind} {us:.1f}" for kind, us in step.parts)
        yield (
            f'<tr><td class="number">{step.start:.1f}</td><td class="number">{step.end:.1f}</td>'
            f"<td>{escape(step.track)}</td><td>{escape(parts)}</td></tr>"
        )
    yield "</table>"


def _bounds(predicted: Timeline) -> str:
    """Bars of the call and of what it could be at best."""
    rows = (
        ("the call", predicted.makespan, COMPUTE),
        ("compute alone", predicted.compute, RANKS[2]),
        ("communication alone", predicted.communication, RANKS[1]),
    )
    longest = max(us for _, us, _ in rows) or 1.0
    parts = [f'<svg width="{COLUMNS + 300}" height="{20 * len(rows)}" role="img">']
    for number, (name, us, colour) in enumerate(rows):
        y = 20 * number
        width = COLUMNS * us / longest
        parts.append(f'<text x="0" y="{y + 13}">{name}</text>')
        parts.append(f'<rect x="150" y="{y + 3}" width="{width:.1f}" height="13" fill="{colour}"/>')
        parts.append(f'<text x="{155 + width:.1f}" y="{y + 13}">{us:.1f} us</text>')
    efficiency = f"Overlap efficiency {predicted.efficiency:.3f}: the longer bound over the call."
    return "\n".join(['<div class="scroll">', *parts, f"</svg></div>\n<p>{efficiency}</p>"])


def _legend(world: int) -> str:
    ranks = [(RANKS[r % len(RANKS)], f"of or to rank {r}") for r in range(min(world, len(RANKS)))]
    entries = [*ranks, (COMPUTE, "other work"), (SUM, "sum"), (WAIT, "wait")]
    spans = (f'<span style="background: {colour}"></span>{text}' for colour, text in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def _lanes(predicted: Timeline, rank: int) -> str:
    """A lane for each agent and group of workers of ``rank``."""
    lanes = predicted.lanes(rank, COLUMNS)
    left = 10 + max((7 * len(name) for name, _ in lanes), default=0)
    scale = predicted.makespan / COLUMNS
    height = 20 * len(lanes) + 18
    parts = [
        f'<div class="scroll"><svg width="{left + COLUMNS + 40}" height="{height}" role="img">'
    ]
    for number, (name, glyphs) in enumerate(lanes):
        y = 20 * number
        parts.append(f'<text x="0" y="{y + 13}">{escape(name)}</text>')
        for glyph, begin, end in _runs(glyphs):
            colour, what = _meaning(glyph)
            said = f"{what}, {begin * scale:.1f} to {end * scale:.1f} us"
            parts.append(
                f'<rect x="{left + begin}" y="{y + 2}" width="{end - begin}" height="15" fill="{colour}">'
                f"<title>{said}</title></rect>"
            )
    bottom = height - 4
    for tick in range(5):
        at = COLUMNS * tick // 4
        parts.append(f'<text x="{left + at}" y="{bottom}">{at * scale:.1f}</text>')
    return "\n".join([*parts, "</svg></div>"])


def _runs(glyphs: str) -> Iterator[tuple[str, int, int]]:
    """Stretches of one character, but for blanks: it, where it begins and where it ends."""
    for match in re.finditer(r"(.)\1*", glyphs):
        if match[1] != " ":
            yield match[1], match.start(), match.end()


def _meaning(glyph: str) -> tuple[str, str]:
    """The colour of a character of a timeline, and what it stands for."""
    from tilelink.backend.simulate.timeline import number_of

    if glyph in "#+.":
        return {"#": (COMPUTE, "work"), "+": (SUM, "sum"), ".": (WAIT, "wait")}[glyph]
    rank = number_of(glyph)
    if rank is None:
        return COMPUTE, "work"
    return RANKS[rank % len(RANKS)], f"block of, or copy to, rank {rank}"


# The graph ----------------------------------------------------------------------------------------


def _graph(unit: Unit, args: argparse.Namespace) -> str:
    from tilelink.backend.graph import build_graph

    found = build_graph(unit.op, unit.schedule(args))
    counts = f"{table.number(len(found), 'tile')}, {table.number(found.number_of_edges(), 'edge')}"
    parts = [f"<h2>Tile dependency graph</h2>\n<p>{counts}.</p>"]
    if len(found) <= NODES:
        drawing = graph.as_svg(unit, found).replace("<svg ", '<svg class="graph" ', 1)
        parts.append(f'<div class="scroll">{drawing}</div>')
    else:
        parts.append("<p>Too many to draw; <code>tilelink graph</code> prints them.</p>")
    return "\n".join(parts)
