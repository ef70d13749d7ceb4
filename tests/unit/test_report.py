"""The page that ``tilelink report`` writes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tilelink.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page, which must be closed in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


def report(tmp_path: Path, *arguments: str) -> Page:
    out = tmp_path / "report.html"
    assert main(["report", *arguments, "-o", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["ag_gemm", "gemm_rs", "gemm_ar"])
def test_a_page_has_all_that_is_known_of_a_kernel(tmp_path: Path, name: str) -> None:
    file = EXAMPLES / f"{name}.py"
    page = report(tmp_path, str(file), "--world", "2")
    said = "".join(page.text)
    for part in ("Proof", "Predicted timeline", "Critical path", "Tile dependency graph"):
        assert part in said
    assert f"launch @{name}" in said and "import triton" in said
    # The file as it stands, whatever characters it has.
    assert file.read_text(encoding="utf-8").rstrip("\n") in said
    # Bounds, a timeline a rank, and the graph.
    assert len(page.of("svg")) == 1 + 2 + 1
    assert "rank 0" in said and "rank 1" in said
    # It loads nothing.
    assert not page.of("script") and not page.of("link") and not page.of("img")


def test_lanes_cover_the_timeline_and_lie_beside_each_other(tmp_path: Path) -> None:
    from tilelink.backend.pipeline import compile_kernel
    from tilelink.backend.simulate import timeline
    from tilelink.cli import report as module
    from tilelink.kernels import ag_gemm
    from tilelink.schedules.machine import Machine

    op = ag_gemm.build({"M": 512, "K": 128, "N": 256}, world=2)
    predicted = timeline(compile_kernel(op), Machine.load("h200x8"))
    lanes = predicted.lanes(1, module.COLUMNS)
    page = Page(module._lanes(predicted, 1))
    assert len(page.of("text")) == len(lanes) + 5
    by_lane: dict[str | None, list[tuple[float, float]]] = {}
    for rect in page.of("rect"):
        x, width = float(rect["x"] or 0), float(rect["width"] or 0)
        by_lane.setdefault(rect["y"], []).append((x, x + width))
    busy = [sum(glyph != " " for glyph in glyphs) for _, glyphs in lanes]
    drawn = [
        sum(b - a for a, b in spans)
        for _, spans in sorted(by_lane.items(), key=lambda e: float(e[0] or 0))
    ]
    assert drawn == [count for count in busy if count]
    for spans in by_lane.values():
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start
    assert (
        max(end for spans in by_lane.values() for _, end in spans) <= 10 + 7 * 40 + module.COLUMNS
    )


def test_the_same_page_comes_out_each_time(tmp_path: Path) -> None:
    file = str(EXAMPLES / "gemm_rs.py")
    texts = []
    for number in range(2):
        out = tmp_path / f"{number}.html"
        assert main(["report", file, "-o", str(out)]) == 0
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]


def test_a_fused_program_has_a_page_without_what_only_its_kernel_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ir", str(EXAMPLES / "ag_gemm.py"), "--fused"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "fused.ir"
    file.write_text(text)
    said = "".join(report(tmp_path, str(file)).text)
    assert "Predicted timeline" in said and "Tile dependency graph" not in said
    # What cannot be proven has no page, and leaves the one that was there.
    broken = re.sub(r"^ *wait @A\.ready.*\n", "", text, count=1, flags=re.MULTILINE)
    assert broken != text
    file.write_text(broken)
    out = tmp_path / "report.html"
    before = out.read_text(encoding="utf-8")
    assert main(["report", str(file), "-o", str(out)]) == 1
    assert "cover" in capsys.readouterr().err and out.read_text(encoding="utf-8") == before
