"""Make the pages of performance, comparisons, measurements and evidence in docs from the raw JSON of their runs.

    python bench/report.py                      # all pages, from all of bench/results
    python bench/report.py FILE … --out PAGE    # the page of performance from some

`--check` writes nothing and fails where a page is not what the JSON gives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import comparisons, evidence, measurements, performance

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it; 1 where it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="JSON of run.py and graph_check.py")
    parser.add_argument("--out", help="the page; default: all pages in docs")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    files = [Path(f) for f in options.files] or sorted((ROOT / "bench" / "results").glob("*.json"))
    runs = [(_shown(f), json.loads(f.read_text(encoding="utf-8"))) for f in files]
    if options.out is not None:
        pages = {Path(options.out): performance.page(runs)}
    else:
        docs = ROOT / "docs"
        makers = {
            "performance": performance,
            "comparisons": comparisons,
            "measurements": measurements,
            "evidence": evidence,
        }
        pages = {docs / f"{name}.md": maker.page(runs) for name, maker in makers.items()}
    stale = False
    for out, text in pages.items():
        current = out.read_text(encoding="utf-8") if out.exists() else ""
        if not options.check:
            out.write_text(text, encoding="utf-8")
        elif current != text:
            print(f"{out} is out of date: python bench/report.py writes it", file=sys.stderr)
            stale = True
    return 1 if stale else 0


def _shown(path: Path) -> str:
    """``path`` relative to the repository where it lies in it."""
    return os.path.relpath(path, ROOT) if path.resolve().is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
