"""Options that hold for every test."""

import contextlib

import pytest

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
