"""Every form of the trace of varying rows has code at every capacity, for each number of GPUs."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.varying import FORMS, K, N, lengths_for, schedule_for, sizes_for
from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_emitted_at_every_capacity(name: str, world: int) -> None:
    kernel = getattr(kernels, name)
    b = torch.empty((K, N), dtype=torch.bfloat16, device="meta")
    for place, (move, form) in enumerate(FORMS[name]):
        sizes = sizes_for(place == 0, form, world)
        capacities = {"M": sizes}
        served: set[str] = set()
        for rows in lengths_for(name, world, *sizes[-1:]):
            shard = rows // world if name == "ag_gemm" else rows
            a = torch.empty((shard, K), dtype=torch.bfloat16, device="meta")
            bound, _ = kernel.at_capacity(kernel.bind((a, b), world, {}), capacities)
            if (capacity := str(bound.request.extents)) not in served:
                served.add(capacity)
                op = kernel.build_for(bound)
                assert emit(compile_kernel(op, schedule_for(name, move, form)))
        assert len(served) <= 6
