"""The ranks of a benchmark, and how its processes end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from tilelink.tuning.ranks import Agreement, Cluster, Part, Watchdog, describe_error, fatal

__all__ = [
    "Agreement",
    "Cluster",
    "Part",
    "Watchdog",
    "describe_error",
    "fatal",
    "leave",
    "run_all_or_none",
]


def leave(code: int) -> None:
    """Ends the process at once: exit handlers of NCCL and of graphs may wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_all_or_none(main: Callable[[], int]) -> None:
    """Runs ``main`` and ends the process: an exception on one rank ends the launch of all."""
    try:
        leave(main())
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        leave(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
