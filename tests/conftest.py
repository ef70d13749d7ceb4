"""Options that hold for every test."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

INTERPRETER = "tests/interpret/"

# Before anything loads PyTorch, and for every process that a test starts: tensors are small, and threads that
# share an operation wait for each other where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine lent for a GPU run may have pytest and nothing else of the `dev` extra.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("tilelink", settings(), deadline=None)
    settings.load_profile("tilelink")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device, with the reason."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives all tests of the interpreter to one worker: each run of it is a process a rank already.

    A scheduler of our own, because marks of pytest-xdist do not reach it under pytest 9.2.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda test: INTERPRETER if test.startswith(INTERPRETER) else test
    return scheduler
