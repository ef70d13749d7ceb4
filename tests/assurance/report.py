"""How every module here ends: one JSON line on standard output, and an exit code."""

from __future__ import annotations

import json
import sys
from typing import NoReturn


def progress(text: str) -> None:
    """One line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def finish(ok: bool, **figures: object) -> NoReturn:
    """Prints ``figures`` as one line of JSON and exits with 0 if ``ok``, else with 1."""
    print(json.dumps(figures), flush=True)
    sys.exit(0 if ok else 1)
