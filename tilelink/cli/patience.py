"""What a command that takes long says while nothing else is seen of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AFTER_S = 5.0  # seconds until it is said


@contextmanager
def patience(text: str) -> Iterator[None]:
    """Says ``text`` on standard error, once, if the block takes longer than ``AFTER_S``."""
    timer = threading.Timer(AFTER_S, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
